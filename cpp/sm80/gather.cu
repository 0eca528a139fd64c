// SPDX-License-Identifier: Apache-2.0
// The keys and values of a cache in pages, brought together for the forward kernels, which read every tile of keys once
// for each tile of queries: to copy them once costs a prompt less than tiles of decoding.
#include <algorithm>

#include "attention/cache.h"
#include "core/cuda_check.h"
#include "sm80/decode.h"

namespace flashcore::sm80 {
namespace {

constexpr int threads = 256, at_once = 4;  // pieces of 16 bytes that a thread has on their way, of keys and of values

// Blocks (·, batch). Keys and values go to arrays (batch, seqlen_k, heads_k, head_dim), so many as a sequence has;
// those of pages that do not exist are zeros.
__global__ void __launch_bounds__(threads) gather_kernel(__grid_constant__ KvCacheParams const p, uint4* k, uint4* v) {
  int const sequence = static_cast<int>(blockIdx.y);
  auto const chunks = static_cast<uint32_t>(p.head_dim / 8), heads = static_cast<uint32_t>(p.heads_k);
  uint32_t const count = static_cast<uint32_t>(cached_keys(p, sequence) + p.new_tokens) * heads * chunks;
  int64_t const first = int64_t{sequence} * p.seqlen_k * heads * chunks;
  auto const source = [](Rows<void const*> const& rows, int64_t at) {
    return reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(rows.data) + at);
  };
  for (uint32_t begin = blockIdx.x * threads * at_once; begin < count; begin += gridDim.x * threads * at_once) {
    uint4 from_k[at_once] = {}, from_v[at_once] = {};
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      uint32_t const i = begin + j * threads + threadIdx.x, row = i / chunks, key = row / heads;
      if (i >= count) break;
      CachePlace const place = cache_place(p, sequence, static_cast<int>(key));
      if (place.block < 0) continue;
      auto const at = [&](Rows<void const*> const& rows) {
        return place.block * rows.batch_stride + place.row * rows.row_stride + (row - key * heads) * rows.head_stride +
               (i - row * chunks) * 8;
      };
      from_k[j] = __ldg(source(p.k, at(p.k)));
      from_v[j] = __ldg(source(p.v, at(p.v)));
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      uint32_t const i = begin + j * threads + threadIdx.x;
      if (i >= count) break;
      k[first + i] = from_k[j];
      v[first + i] = from_v[j];
    }
  }
}

}  // namespace

void gather(const KvCacheParams& params, void* keys, void* values, void* stream) {
  constexpr int64_t most_blocks = 2048;  // a few rounds of the largest GPUs
  int64_t const chunks = int64_t{params.seqlen_k} * params.heads_k * (params.head_dim / 8);
  int64_t const most = std::max<int64_t>(most_blocks / std::max(params.batch, 1), 1);
  auto const blocks = static_cast<unsigned>(std::clamp<int64_t>(chunks / (threads * at_once), 1, most));
  gather_kernel<<<dim3(blocks, static_cast<unsigned>(params.batch)), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      params, static_cast<uint4*>(keys), static_cast<uint4*>(values));
  cuda_check(cudaGetLastError(), "launching the kernel that brings a cache's pages together");
}

}  // namespace flashcore::sm80
