// SPDX-License-Identifier: Apache-2.0
// A cache on the sm80 machine as the core sees it.
#pragma once

#include "core/kvcache_params.h"
#include "flashcore/plan.h"

namespace flashcore::sm80 {

// Launches `plan` on the current device. Asynchronous. `workspace` has plan.workspace bytes. Throws RuntimeError when a
// launch fails.
void decode(const KvCacheParams& params, DType dtype, const Plan& plan, void* workspace, void* stream);

// Writes the new keys and values to the cache, float16 or bfloat16, on the current device. Asynchronous. Throws
// RuntimeError when the launch fails.
void append(const KvCacheParams& params, void* stream);

// Copies the keys and values of a cache in pages to arrays (batch, seqlen_k, heads_k, head_dim) in device memory, as
// many rows as a sequence has. Pages that do not exist give zeros. Asynchronous. Throws RuntimeError when the launch
// fails.
void gather(const KvCacheParams& params, void* keys, void* values, void* stream);

}  // namespace flashcore::sm80
