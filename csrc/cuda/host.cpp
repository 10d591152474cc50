// The kernels' source on the host, for tests: blocks one after the other, or each on a thread of its own.
#include "host.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "body.h"
#include "machine.h"

namespace fused_opt::cuda {

std::atomic<int64_t> host_blocks{3};
std::atomic<bool> host_threads{false};

namespace {

struct Block {
  int64_t block_, blocks_;
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  template <class F>
  void all_threads(const F& f) const {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
  template <class F>
  void one_thread(const F& f) const {
    f();
  }
  bool arrive(uint64_t* counter, int64_t n, int64_t all) const {
    if (static_cast<int64_t>(__atomic_add_fetch(counter, n, __ATOMIC_ACQ_REL)) != all) return false;
    __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
    return true;
  }
};

template <class F>
void run(const F& block) {
  const int64_t blocks = host_blocks;
  if (!host_threads) {
    for (int64_t b = blocks; b-- > 0;) block(Block{b, blocks});  // backwards: the order must not matter
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t b = 0; b < blocks; ++b) threads.emplace_back([&block, b, blocks] { block(Block{b, blocks}); });
  for (auto& thread : threads) thread.join();
}

template <template <class> class Rule, class T>
void update_as(const Launch& launch) {
  run([&](const Block& block) {
    Shared<Rule<T>, T> shared;
    update<Rule, T, true>(block, launch, shared);
  });
}
template <template <class> class Rule, class T>
void norms_as(const Launch& launch) {
  run([&](const Block& block) {
    Shared<Rule<T>, T> shared;
    norms<Rule, T>(block, launch, shared);
  });
}
template <class T>
void accumulate_as(const Accumulation& work) {
  run([&](const Block& block) {
    Norms lanes[kThreads];
    bool last = false;
    accumulate<T>(block, work, lanes, last);
  });
}

using Kernel = void (*)(const Launch&);
#define FUSED_OPT_UPDATE(name, Rule) {update_as<Rule, float>, update_as<Rule, double>},
#define FUSED_OPT_NORMS(name, Rule) {norms_as<Rule, float>, norms_as<Rule, double>},
constexpr Kernel kUpdate[][2] = {FUSED_OPT_RULES(FUSED_OPT_UPDATE)};
constexpr Kernel kNorms[][2] = {FUSED_OPT_RULES(FUSED_OPT_NORMS)};

thread_local std::vector<std::function<void()>>* recording = nullptr;

template <class F>
void issue(const F& work) {
  if (recording)
    recording->push_back(work);
  else
    work();
}

}  // namespace

void HostGraph::begin() {
  recorded_.clear();
  recording = &recorded_;
}
void HostGraph::end() {
  recording = nullptr;
}
void HostGraph::replay() const {
  for (const auto& work : recorded_) work();
}

const Machine& host() {
  static const Machine machine = {
      [](size_t bytes) { return std::calloc(bytes, 1); },
      [](void* memory) { std::free(memory); },
      [](size_t words) { return static_cast<uint64_t*>(std::calloc(words + 1, 8)); },
      [](uint64_t* words) { std::free(words); },
      [](size_t) { return static_cast<Staging*>(nullptr); },
      [](Staging*) {},
      [](Staging*, void* to, const void* from, size_t bytes, void*) {
        const auto* first = static_cast<const char*>(from);
        issue(
            [to, pinned = std::vector<char>(first, first + bytes)] { std::memcpy(to, pinned.data(), pinned.size()); });
      },
      [](void* memory, size_t bytes, void*) { issue([=] { std::memset(memory, 0, bytes); }); },
      [](void* to, const void* from, size_t bytes, void*) {
        if (recording) throw std::runtime_error("a step that is captured in a graph cannot wait for the GPU");
        std::memcpy(to, from, bytes);
      },
      [](void*) { return recording != nullptr; },
      [](int rule, bool wide, const Launch& launch, void*) { issue([=] { kUpdate[rule][wide](launch); }); },
      [](int rule, bool wide, const Launch& launch, void*) { issue([=] { kNorms[rule][wide](launch); }); },
      [](bool wide, const Accumulation& work, void*) { (wide ? accumulate_as<double> : accumulate_as<float>)(work); },
  };
  return machine;
}

#ifndef FUSED_OPT_CUDA
std::string unavailable(int) {
  return "it was built without nvcc; reinstall where the CUDA toolkit's nvcc is on the PATH";
}
const Machine& gpu() {
  return host();  // never called: see unavailable()
}
void use(int) {}
#endif

}  // namespace fused_opt::cuda
