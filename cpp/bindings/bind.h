// SPDX-License-Identifier: Apache-2.0
// The parts that the module _core is put together from.
#pragma once

#include <nanobind/nanobind.h>

namespace flashcore {

void bind_attention(nanobind::module_& m);  // attention, attention_varlen, attention_kvcache
void bind_combine(nanobind::module_& m);
void bind_plan(nanobind::module_& m);      // plan, Plan
void bind_schedule(nanobind::module_& m);  // decode_schedule, for tests
void bind_info(nanobind::module_& m);      // info, set_num_threads, get_num_threads
void bind_xla(nanobind::module_& m);       // xla_handlers; with FLASHCORE_JAX=ON

}  // namespace flashcore
