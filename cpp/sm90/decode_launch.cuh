// SPDX-License-Identifier: Apache-2.0
// What the launches of both Hopper decode kernels share: descriptors of the cache, attributes, the launch itself.
#pragma once

#include <cuda_fp16.h>

#include <bit>
#include <type_traits>

#include "core/cuda_check.h"
#include "core/once_per_device.h"
#include "flashcore/plan.h"
#include "sm80/decode_params.h"
#include "sm90/dependent_launch.h"
#include "sm90/tensor_map.h"

namespace flashcore::sm90 {

inline int log2_of_power(int x) { return std::countr_zero(static_cast<unsigned>(x)); }

// Of the cache's keys or values `rows`, whose boxes are `box_rows` keys of 64 columns or, if `whole`, of all.
template <class Config>
auto cache_map(sm80::DecodeParams const& p, Rows<void const*> const& rows, int box_rows, bool whole) {
  constexpr DType dtype = std::is_same_v<typename Config::Element, __half> ? float16 : bfloat16;
  bool const paged = p.page_table != nullptr;
  return tensor_map(
      {rows.data,
       dtype,
       whole ? 64 : p.head_dim,
       {paged ? p.page_size : p.seqlen_k, whole ? Config::panels : 1, p.heads_k, paged ? p.pages : p.batch},
       {rows.row_stride, 64, rows.head_stride, rows.batch_stride},
       {box_rows, whole ? Config::panels : 1}});
}

// `preparing` and `launching` begin the messages of errors.
template <auto kernel, class Arguments>
void launch_decode(Plan const& plan, int threads, Arguments const& arguments, cudaStream_t stream,
                   char const* preparing, char const* launching) {
  static OncePerDevice once;
  once([&] {
    constexpr int most_shared_memory = 227 << 10;  // of a block on compute capability 9.0
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory),
               preparing);
    cuda_check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        preparing);
  });
  launch_dependent(
      kernel, {dim3(static_cast<unsigned>(plan.blocks)), threads, plan.shared_memory, plan.cluster, /*early=*/true},
      stream, arguments, launching);
}

}  // namespace flashcore::sm90
