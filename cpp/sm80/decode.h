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

}  // namespace flashcore::sm80
