// How the host emulates a GPU. Results must not depend on these settings.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace fused_opt::cuda {

extern std::atomic<int64_t> host_blocks;
extern std::atomic<bool> host_threads;  // a thread for every block

// A CUDA graph's stand-in: between begin() and end() this thread's launches, copies and clears are recorded, with the
// arguments and memory that they are given, and not done.
class HostGraph {
 public:
  void begin();
  void end();
  void replay() const;

 private:
  std::vector<std::function<void()>> recorded_;
};

}  // namespace fused_opt::cuda
