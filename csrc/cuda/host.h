// How the host emulates a GPU. Results must not depend on these settings.
#pragma once
#include <atomic>
#include <cstdint>

namespace fused_opt::cuda {

extern std::atomic<int64_t> host_blocks;
extern std::atomic<bool> host_threads;  // a thread for every block

}  // namespace fused_opt::cuda
