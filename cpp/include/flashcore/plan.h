// SPDX-License-Identifier: Apache-2.0
// What would run for a problem on a device, and the properties of a device that the choice depends on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flashcore/problem.h"

namespace flashcore {

// What plan() needs to know of a device. Numbers of a GPU are those that the CUDA runtime reports.
struct DeviceProperties {
  std::string name;  // "h100", or what the driver calls it
  DeviceType type = DeviceType::cpu;
  int compute_capability = 0;       // major * 10 + minor; 0 on the CPU
  int units = 1;                    // streaming multiprocessors, or threads of the CPU
  int shared_memory_per_block = 0;  // bytes a block may opt in to
  int shared_memory_per_unit = 0;   // bytes a multiprocessor has
  int64_t l2_bytes = 0;
};

// The named devices that can be planned for without having them: h100, h200, a100, l4, rtx4090, b200, cpu.
const std::vector<DeviceProperties>& named_devices();

// One of named_devices(). Throws ValueError for another name.
const DeviceProperties& named_device(const std::string& name);

// A device of this machine. Throws RuntimeError where the driver is too old or the device is not there.
const DeviceProperties& device_properties(Device device);

// How many CUDA devices can be used here; 0 without a driver, a GPU, or CUDA in this build.
int cuda_device_count();

// What a call would run. A plain value: the same problem and device give the same plan.
struct Plan {
  Backend backend = Backend::cpu;
  const char* kernel = "";  // "sm90_forward", "sm90_small", "sm90_stream", "sm80_forward", "cpu_forward"; kvcache.h
  int head_dim = 0;         // the head dimension of the kernel's instance: the problem's, or the next larger one
  int tile_q = 0;           // rows of queries and
  int tile_k = 0;           // keys of one tile; sm90_small: that a block has room for
  int packed_heads = 1;     // query heads of one key head whose rows share a tile
  int threads = 0;          // of a block, or of the CPU
  bool plain_score = true;  // no softcap and a positive scale: the scores go to the softmax as they are
  int64_t tiles = 0;        // of queries, over all sequences and heads
  int64_t blocks = 0;       // of the grid, or tasks on the CPU
  int splits = 1;           // parts that the keys are divided into
  int cluster = 1;          // sm90_decode*: blocks that share a part and merge it in shared memory
  int shares = 1;           // sm90_decode: of a part, each computed by itself: `cluster`, or more, which its blocks
                            // compute in turn
  int even_parts = 1;  // sm90_decode*: parts of the keys of a sequence, whatever its length; 0: that says how many,
                       // up to `splits`, or `teams` share them
  int teams = 0;       // sm90_decode*: of blocks that stay, one for each tile of a sequence's rows, and take about
                       // equal shares of all sequences' keys; 0: there are none
  int heads_per_section = 1;  // (batch, head) pairs whose tiles are scheduled together, longest tile first
  int section_slots = 0;      // sm90: tiles and empty places of such a section, which make whole rounds of the blocks
  int shared_memory = 0;      // bytes a block
  int64_t workspace = 0;      // bytes that the caller brings to launch()

  friend bool operator==(const Plan&, const Plan&) = default;
};

// Says in one or two sentences why `plan` was chosen for `problem` on `device`.
std::string explain(const Problem& problem, const DeviceProperties& device, const Plan& plan);

}  // namespace flashcore
