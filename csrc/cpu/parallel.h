// parallel_for over torch's own threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// The entry point of GNU OpenMP. Weak: it resolves to the copy that torch has loaded, whose threads are awake right
// after a backward; a second pool would fight with them for the cores. Without it plain threads do.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace fused_opt::cpu {

// Set in the child of a fork, where the parent's pool does not exist and waiting for it would hang.
bool forked();

// Calls f(first, last) for runs that together are [0, n), begun in their order, on up to `threads` threads. The runs
// become shorter towards the end: long ones keep to neighbours, short ones finish together. With as many `shares` as
// there are elements each is a run.
template <class F>
void parallel_for(int64_t n, int threads, const F& f, int64_t shares = 0) {
  struct Shared {
    const F& f;
    const int64_t n, shares;
    std::atomic<int64_t> next{0};
    void work() {
      for (int64_t first = 0, last; first < n;) {
        last = first + std::max<int64_t>(1, (n - first) / shares);
        if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
        f(first, last);
        first = last;
      }
    }
  } shared{f, n, shares ? shares : 4 * std::max(threads, 1)};
  if (threads <= 1 || n <= 1 || forked()) {
    shared.work();
  } else if (GOMP_parallel) {
    GOMP_parallel([](void* s) { static_cast<Shared*>(s)->work(); }, &shared, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int k = 1; k < threads; ++k) others.emplace_back([&] { shared.work(); });
    shared.work();
    for (auto& other : others) other.join();
  }
}

}  // namespace fused_opt::cpu
