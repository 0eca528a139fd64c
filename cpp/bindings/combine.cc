// SPDX-License-Identifier: Apache-2.0
// flashcore.combine: lists of partial results to a CombineProblem.
#include "arrays.h"
#include "bind.h"
#include "flashcore/error.h"
#include "flashcore/flashcore.h"
#include "gil.h"
#include "options.h"

namespace flashcore {

using namespace nb::literals;

namespace {

std::vector<Tensor> inputs(const char* name, nb::handle list, Arrays& arrays) {
  if (!nb::isinstance<nb::list>(list) && !nb::isinstance<nb::tuple>(list)) {
    throw TypeError(std::string(name) + ": expected a list of arrays, got " +
                    nb::cast<nb::str>(list.type().attr("__name__")).c_str());
  }
  size_t const parts = nb::len(list);
  if (parts < 1 || parts > CombineProblem::max_parts) {
    throw ValueError(std::string(name) + ": got " + std::to_string(parts) + " arrays, expected 1 to " +
                     std::to_string(CombineProblem::max_parts));
  }
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < parts; ++i) {
    std::string const item = std::string(name) + "[" + std::to_string(i) + "]";
    tensors.push_back(arrays.input(item.c_str(), nb::object(list[i])));
  }
  return tensors;
}

nb::tuple combine(nb::handle outs, nb::handle lses, nb::handle layout) {
  CombineProblem problem;
  problem.layout = layout_from(layout);
  Arrays arrays;
  problem.outs = inputs("outs", outs, arrays);
  problem.lses = inputs("lses", lses, arrays);
  problem.stream = arrays.stream();
  validate(problem);

  const Tensor& first = problem.outs[0];
  Result out = arrays.allocate(first.dtype, first.ndim, first.shape);
  Result lse = arrays.allocate(float32, problem.lses[0].ndim, problem.lses[0].shape);
  problem.out = out.tensor;
  problem.lse = lse.tensor;
  without_gil([&] { launch(problem); });
  arrays.issued();
  nb::object merged = arrays.take(std::move(out));
  return nb::make_tuple(std::move(merged), arrays.take(std::move(lse)));
}

constexpr const char* combine_doc =
    R"(Merges attention results over disjoint sets of keys into the result over all of them.

out = Σ exp(lseᵢ − lse) outᵢ with lse = log Σ exp(lseᵢ), in float32 and in the order of the lists.

outs: list of 1 to 64 arrays of one shape and dtype (float32, float16 or bfloat16): (batch, sequence, heads, head_dim) for
    layout "bshd", (batch, heads, sequence, head_dim) for "bhsd", or (total, heads, head_dim). The last stride is 1.
lses: as many float32 arrays, contiguous: (batch, heads, sequence), or (heads, total) for 3-D outs; natural logarithms.
layout: "bshd" or "bhsd", of 4-D outs and of the result.

Returns (out, lse): row-major arrays of the type of outs[0], of the shapes of outs[0] and lses[0]. A query that no part has
seen a key for gives zeros and an lse of -inf.

TypeError: not a list of arrays, or an unsupported dtype. ValueError: counts, shapes, strides or devices that do not fit
together. RuntimeError: the device cannot do it.)";

}  // namespace

void bind_combine(nb::module_& m) {
  m.def("combine", &combine, "outs"_a.none(), "lses"_a.none(), nb::kw_only(), "layout"_a.none() = "bshd",
        nb::sig("def combine(outs: list[Array] | tuple[Array, ...], lses: list[Array] | tuple[Array, ...], *, "
                "layout: typing.Literal['bshd', 'bhsd'] = 'bshd') -> tuple[Array, Array]"),
        combine_doc);
}

}  // namespace flashcore
