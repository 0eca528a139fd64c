// SPDX-License-Identifier: Apache-2.0
// The rungs by name, and which problems they take.
#include "ladder/ladder.h"

namespace flashcore::ladder {
namespace {

// Of shared memory that a kernel may use beside the scores of a query.
constexpr int64_t beside_scores = 16 * 1024;

}  // namespace

const std::vector<Rung>& rungs() {
  static std::vector<Rung> const all = {
      {"baseline", baseline, true, "a query a block, a thread a key, an element a load"},
      {"vectorized", vectorized, true, "16-byte loads of keys and values"},
      {"single_query_mma", single_query_mma, true,
       "Q K^T on tensor cores; 15 of 16 rows, 94% of that work, are padding"},
      {"register_fusion", register_fusion, false, "scores, weights and output stay in registers"},
      {"multi_query", multi_query, false, "16 queries share each tile of keys and values"},
      {"multi_query_mma", multi_query_mma, false, "both products on tensor cores, scores in shared memory"},
      {"parallel_reductions", parallel_reductions, false, "row maxima and sums by warp shuffles"},
      {"fused_tiles", fused_tiles, false, "accumulators of Q K^T are the operand of P V"},
  };
  return all;
}

std::string refusal(const Rung& rung, const ForwardParams& p, DType dtype, const DeviceProperties& device) {
  if (dtype != float16 && dtype != bfloat16) return "takes float16 and bfloat16";
  if (p.head_dim != 64 && p.head_dim != 128) return "takes head dimensions 64 and 128";
  if (p.softcap != 0.0f || !(p.scale > 0.0f)) return "takes plain scores";
  int64_t const keys = (device.shared_memory_per_block - beside_scores) / 4;
  if (rung.keeps_all_scores && p.seqlen_k > keys) return "takes up to " + std::to_string(keys) + " keys on this GPU";
  return "";
}

}  // namespace flashcore::ladder
