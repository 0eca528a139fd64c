// SPDX-License-Identifier: Apache-2.0
// flashcore.attention, attention_varlen and attention_kvcache: arrays to a problem, and its way through validate, plan
// and launch.
#include <cstdint>

#include "arrays.h"
#include "bind.h"
#include "core/problem_facts.h"
#include "core/recent_plans.h"
#include "flashcore/flashcore.h"
#include "gil.h"
#include "options.h"

namespace flashcore {

using namespace nb::literals;

namespace {

// Whether there are values in arrays that a kernel relies on.
bool has_values(const Problem& problem) { return problem.varlen(); }
bool has_values(const KvCacheProblem&) { return true; }

Result allocate_lse(const Problem& problem, Arrays& arrays) {
  Sizes const size = sizes(problem);
  int64_t const fixed[] = {size.batch, size.heads_q, size.seqlen_q};
  int64_t const varlen[] = {size.heads_q, size.total_q};
  return problem.varlen() ? arrays.allocate(float32, 2, varlen) : arrays.allocate(float32, 3, fixed);
}
Result allocate_lse(const KvCacheProblem& problem, Arrays& arrays) {
  Sizes const size = sizes(problem);
  int64_t const shape[] = {size.batch, size.heads_q, size.seqlen_q};
  return arrays.allocate(float32, 3, shape);
}

// `arrays` holds those of `problem`, a Problem or a KvCacheProblem. Nothing is allocated before it has been validated.
template <class AnyProblem>
nb::object run(AnyProblem& problem, Arrays& arrays, nb::handle out, bool return_lse) {
  problem.stream = arrays.stream();
  if (!out.is_none()) problem.out = arrays.output("out", out);
  validate(problem);
  Device const device = problem.query.device;
  if (has_values(problem) && (device.type == DeviceType::cpu || check_requested())) {
    without_gil([&] { check_values(problem); });
  }
  Plan const chosen = recent_plan(problem, device_properties(device));

  Result made, lse, workspace;
  if (out.is_none()) {
    int64_t shape[4];
    int const dims = problem.query.ndim;
    for (int i = 0; i < dims; ++i) shape[i] = problem.query.shape[i];
    shape[dims - 1] = sizes(problem).head_dim_v;
    made = arrays.allocate(problem.query.dtype, dims, shape);
    problem.out = made.tensor;
  }
  if (return_lse) {
    lse = allocate_lse(problem, arrays);
    problem.lse = lse.tensor;
  }
  if (chosen.workspace > 0) workspace = arrays.allocate(DType{DTypeKind::unsigned_int, 8}, 1, &chosen.workspace);

  without_gil([&] { launch(problem, chosen, workspace.tensor.data); });
  arrays.issued();
  nb::object result = out.is_none() ? arrays.take(std::move(made)) : nb::borrow(out);
  if (!return_lse) return result;
  return nb::make_tuple(result, arrays.take(std::move(lse)));
}

nb::object attention_fixed(nb::handle query, nb::handle key, nb::handle value, nb::handle causal, nb::handle window,
                           nb::handle scale, nb::handle softcap, nb::handle layout, nb::handle out,
                           nb::handle return_lse, nb::handle batch_invariant, nb::handle backend) {
  Problem problem;
  problem.layout = layout_from(layout);
  set_options(problem, {causal, window, scale, softcap, batch_invariant, backend});
  bool const with_lse = bool_from("return_lse", return_lse);
  Arrays arrays;
  problem.query = arrays.input("query", query);
  problem.key = arrays.input("key", key);
  problem.value = arrays.input("value", value);
  return run(problem, arrays, out, with_lse);
}

nb::object attention_varlen(nb::handle query, nb::handle key, nb::handle value, nb::handle cu_seqlens_q,
                            nb::handle cu_seqlens_k, nb::handle max_seqlen_q, nb::handle max_seqlen_k,
                            nb::handle seqused_k, nb::handle causal, nb::handle window, nb::handle scale,
                            nb::handle softcap, nb::handle out, nb::handle return_lse, nb::handle batch_invariant,
                            nb::handle backend) {
  Problem problem;
  set_options(problem, {causal, window, scale, softcap, batch_invariant, backend});
  problem.max_seqlen_q = optional_integer_from("max_seqlen_q", max_seqlen_q);
  problem.max_seqlen_k = optional_integer_from("max_seqlen_k", max_seqlen_k);
  bool const with_lse = bool_from("return_lse", return_lse);
  Arrays arrays;
  problem.query = arrays.input("query", query);
  problem.key = arrays.input("key", key);
  problem.value = arrays.input("value", value);
  problem.cu_seqlens_q = arrays.input("cu_seqlens_q", cu_seqlens_q);
  problem.cu_seqlens_k = arrays.input("cu_seqlens_k", cu_seqlens_k);
  if (!seqused_k.is_none()) problem.seqused_k = arrays.input("seqused_k", seqused_k);
  return run(problem, arrays, out, with_lse);
}

nb::object attention_kvcache(nb::handle query, nb::handle key_cache, nb::handle value_cache, nb::handle cache_seqlens,
                             nb::handle key, nb::handle value, nb::handle page_table, nb::handle causal,
                             nb::handle window, nb::handle scale, nb::handle softcap, nb::handle layout, nb::handle out,
                             nb::handle return_lse, nb::handle batch_invariant, nb::handle backend) {
  Problem options;
  set_options(options, {causal, window, scale, softcap, batch_invariant, backend});
  options.layout = layout_from(layout);
  KvCacheProblem problem = cache_of(options);
  bool const with_lse = bool_from("return_lse", return_lse);
  Arrays arrays;
  problem.query = arrays.input("query", query);
  auto const cache = [&](const char* name, nb::handle array) {
    if (key.is_none()) return arrays.input(name, array);
    return arrays.output(name, array, "append the new keys and values yourself, and call without key= and value=");
  };
  problem.key_cache = cache("key_cache", key_cache);
  problem.value_cache = cache("value_cache", value_cache);
  problem.cache_seqlens = arrays.input("cache_seqlens", cache_seqlens);
  if (!key.is_none()) problem.key = arrays.input("key", key);
  if (!value.is_none()) problem.value = arrays.input("value", value);
  if (!page_table.is_none()) problem.page_table = arrays.input("page_table", page_table);
  return run(problem, arrays, out, with_lse);
}

constexpr const char* attention_doc =
    R"(Scaled dot-product attention: softmax(scale · query keyᵀ + mask) value, in one pass.

Arrays are anything with __dlpack__ (PyTorch, JAX, CuPy, NumPy); none is ever copied. On CUDA the work goes to the
framework's current stream and the call returns at once; on the CPU it returns when the result is there.

query: (batch, seqlen_q, heads_q, head_dim) for layout "bshd", (batch, heads_q, seqlen_q, head_dim) for "bhsd".
    float16 or bfloat16; on the CPU float32 too. Any strides with the last one 1; on CUDA rows are 16-byte aligned and
    head_dim is a multiple of 8. head_dim is at most 256.
key, value: (batch, seqlen_k, heads_k, head_dim), laid out as query, of its dtype and on its device. heads_k divides
    heads_q (grouped-query attention): query head h reads key head h // (heads_q // heads_k).
causal: a query sees no key after its own position; the last query stands at the last key (bottom right).
window: (left, right), how many keys a query sees before and after its position, each an int >= 0 or None for all.
scale: factor of the scores, finite; None means 1 / sqrt(head_dim).
softcap: c > 0 makes scores c · tanh(score / c); 0 is off.
layout: "bshd" or "bhsd", of query, key, value and the result.
out: array to write to and return, of query's shape, dtype and device, not overlapping an input. Not for JAX arrays.
return_lse: also return the natural-log log-sum-exp of the scaled scores, float32, (batch, heads_q, seqlen_q).
batch_invariant: give a sequence the same bits whatever shares its batch.
backend: "cpu", "sm80" or "sm90" (compute capability 9.0) forces a machine; None lets FlashCore choose (see
    flashcore.plan).

Returns an array of query's type and dtype, row-major, on query's device; with return_lse a tuple (array, lse).
A query that sees no key gives zeros and an lse of -inf.

TypeError: not an array, or a dtype that is not supported here. ValueError: wrong shape, stride, alignment, device or
option; a tensor that requires grad while grad is enabled. RuntimeError: no code for this GPU, a driver too old, out of
memory. All of them name the argument, and nothing has been written then.)";

constexpr const char* varlen_doc = R"(Attention over sequences of different lengths, packed one after another.

Arrays are anything with __dlpack__; none is ever copied. Sequence b has the query rows cu_seqlens_q[b] to
cu_seqlens_q[b + 1] and the key rows cu_seqlens_k[b] to cu_seqlens_k[b + 1].

query: (total_q, heads_q, head_dim); dtypes, strides and head_dim as for flashcore.attention.
key, value: (total_k, heads_k, head_dim), of query's dtype and device; heads_k divides heads_q.
cu_seqlens_q, cu_seqlens_k: int32, (sequences + 1), contiguous, on query's device; they start at 0 and never decrease.
max_seqlen_q, max_seqlen_k: the longest sequence, a hint that spares empty work; the lengths are read from cu_seqlens.
seqused_k: int32, (sequences): how many keys of each sequence are used, counted from its first. None: all.
causal, window, scale, softcap, out, batch_invariant, backend: as for flashcore.attention, in each sequence.
return_lse: also return the natural-log log-sum-exp of the scaled scores, float32, (heads_q, total_q).

Returns an array of query's type, shape and dtype; with return_lse a tuple (array, lse). Rows past cu_seqlens_q[-1] are
zero, their lse is -inf.

Raises what flashcore.attention raises. On the CPU the values of cu_seqlens and seqused_k are checked (ValueError names
the sequence). On CUDA kernels clamp them so that nothing outside the arrays is touched, unless FLASHCORE_CHECK=1 is set
in the environment: then they are checked too, which synchronizes the stream.)";

constexpr const char* kvcache_doc =
    R"(Attention of a few new queries a sequence over a cache of keys and values (decoding), or of a prompt's queries.

Arrays are anything with __dlpack__; none is ever copied (but the pages of a prompt's cache, see query). Sequence b has
cache_seqlens[b] keys in the cache, and behind them, where key and value are given, the new ones, which the call appends
there in place; they take part. The queries are the last positions of these keys: causal lets the last one see them all.

query: (batch, tokens, heads_q, head_dim); dtypes, strides and head_dim as for flashcore.attention. 1 to 16 tokens read
    the cache once. A prompt's many run as fast as in flashcore.attention. Where the cache has pages, these are brought
    together in a workspace for that if they are not too many (512 MiB); with fewer than 768 rows of queries a key head,
    and with batch_invariant, each 32 rows read the pages again instead.
key_cache, value_cache: (batch, capacity, heads_k, head_dim), of query's dtype and device; heads_k divides heads_q. With
    page_table (pages, page_size, heads_k, head_dim), page_size being 16, 64, 128 or 256.
cache_seqlens: int32, (batch), contiguous, on query's device: keys that are in the cache before the call.
key, value: (batch, new tokens, heads_k, head_dim), to be appended; both or neither. The caches are written to then (not
    JAX arrays, which are immutable), at these tokens alone. cache_seqlens is not: the caller counts on.
page_table: int32, (batch, pages a sequence), last stride 1, on query's device: token t of sequence b is row
    t % page_size of page page_table[b, t // page_size]. Sequences may share pages that nothing is appended to. Entries
    past a sequence's end are never used.
causal, window, scale, softcap, out: as for flashcore.attention.
layout: "bshd" or "bhsd" ("bhsd" caches are (batch or pages, heads_k, capacity or page_size, head_dim)), of all arrays.
return_lse: also return the natural-log log-sum-exp of the scaled scores, float32, (batch, heads_q, tokens).
batch_invariant: give a sequence the same bits whatever shares its batch, at a cost of a few percent of time.
backend: "cpu" or "sm80" (any GPU) forces a machine; None lets FlashCore choose.

Returns an array of query's type, shape and dtype; with return_lse a tuple (array, lse). A query that sees no key gives
zeros and an lse of -inf. Rows of the cache past a sequence's end never matter, whatever they hold.

Raises what flashcore.attention raises. On the CPU the values of cache_seqlens and page_table are checked (ValueError
names the sequence and the page). On CUDA they are read by the kernels alone, so that a captured graph may be replayed
with others: lengths are clamped to what the cache can hold with the new tokens, and keys in pages that do not exist are
as if they were not there, neither read nor written, unless FLASHCORE_CHECK=1 is set in the environment: then they are
checked too, which synchronizes the stream.)";

}  // namespace

// Each function is defined twice, with one signature for each type that it returns, so that the stubs have overloads.
// The first takes every call: the arguments are handles.
void bind_attention(nb::module_& m) {
  auto const fixed = [&m](const nb::sig& signature) {
    m.def("attention", &attention_fixed, "query"_a.none(), "key"_a.none(), "value"_a.none(), nb::kw_only(),
          "causal"_a.none() = false, "window"_a = nb::none(), "scale"_a = nb::none(), "softcap"_a.none() = 0.0,
          "layout"_a.none() = "bshd", "out"_a = nb::none(), "return_lse"_a.none() = false,
          "batch_invariant"_a.none() = false, "backend"_a = nb::none(), signature, attention_doc);
  };
  auto const varlen = [&m](const nb::sig& signature) {
    m.def("attention_varlen", &attention_varlen, "query"_a.none(), "key"_a.none(), "value"_a.none(),
          "cu_seqlens_q"_a.none(), "cu_seqlens_k"_a.none(), nb::kw_only(), "max_seqlen_q"_a = nb::none(),
          "max_seqlen_k"_a = nb::none(), "seqused_k"_a = nb::none(), "causal"_a.none() = false, "window"_a = nb::none(),
          "scale"_a = nb::none(), "softcap"_a.none() = 0.0, "out"_a = nb::none(), "return_lse"_a.none() = false,
          "batch_invariant"_a.none() = false, "backend"_a = nb::none(), signature, varlen_doc);
  };
  auto const kvcache = [&m](const nb::sig& signature) {
    m.def("attention_kvcache", &attention_kvcache, "query"_a.none(), "key_cache"_a.none(), "value_cache"_a.none(),
          "cache_seqlens"_a.none(), nb::kw_only(), "key"_a = nb::none(), "value"_a = nb::none(),
          "page_table"_a = nb::none(), "causal"_a.none() = false, "window"_a = nb::none(), "scale"_a = nb::none(),
          "softcap"_a.none() = 0.0, "layout"_a.none() = "bshd", "out"_a = nb::none(), "return_lse"_a.none() = false,
          "batch_invariant"_a.none() = false, "backend"_a = nb::none(), signature, kvcache_doc);
  };
#define FLASHCORE_FIXED(return_lse, result)                                                               \
  nb::sig(                                                                                                \
      "def attention(query: Array, key: typing.Any, value: typing.Any, *, causal: bool = False, "         \
      "window: tuple[int | None, int | None] | None = None, scale: float | None = None, "                 \
      "softcap: float = 0.0, layout: typing.Literal['bshd', 'bhsd'] = 'bshd', out: Array | None = None, " \
      "return_lse: " return_lse                                                                           \
      ", batch_invariant: bool = False, "                                                                 \
      "backend: typing.Literal['cpu', 'sm80', 'sm90'] | None = None) -> " result)
#define FLASHCORE_VARLEN(return_lse, result)                                                              \
  nb::sig(                                                                                                \
      "def attention_varlen(query: Array, key: typing.Any, value: typing.Any, cu_seqlens_q: typing.Any, " \
      "cu_seqlens_k: typing.Any, *, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, "   \
      "seqused_k: typing.Any = None, causal: bool = False, "                                              \
      "window: tuple[int | None, int | None] | None = None, scale: float | None = None, "                 \
      "softcap: float = 0.0, out: Array | None = None, return_lse: " return_lse                           \
      ", "                                                                                                \
      "batch_invariant: bool = False, backend: typing.Literal['cpu', 'sm80', 'sm90'] | None = None) -> " result)
#define FLASHCORE_KVCACHE(return_lse, result)                                                                   \
  nb::sig(                                                                                                      \
      "def attention_kvcache(query: Array, key_cache: typing.Any, value_cache: typing.Any, "                    \
      "cache_seqlens: typing.Any, *, key: typing.Any = None, value: typing.Any = None, "                        \
      "page_table: typing.Any = None, causal: bool = False, "                                                   \
      "window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float = 0.0, " \
      "layout: typing.Literal['bshd', 'bhsd'] = 'bshd', out: Array | None = None, return_lse: " return_lse      \
      ", batch_invariant: bool = False, backend: typing.Literal['cpu', 'sm80'] | None = None) -> " result)
  fixed(FLASHCORE_FIXED("typing.Literal[False] = False", "Array"));
  fixed(FLASHCORE_FIXED("typing.Literal[True]", "tuple[Array, Array]"));
  varlen(FLASHCORE_VARLEN("typing.Literal[False] = False", "Array"));
  varlen(FLASHCORE_VARLEN("typing.Literal[True]", "tuple[Array, Array]"));
  kvcache(FLASHCORE_KVCACHE("typing.Literal[False] = False", "Array"));
  kvcache(FLASHCORE_KVCACHE("typing.Literal[True]", "tuple[Array, Array]"));
#undef FLASHCORE_KVCACHE
#undef FLASHCORE_FIXED
#undef FLASHCORE_VARLEN
}

}  // namespace flashcore
