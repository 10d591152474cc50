// The kernels on a GPU. Each of their tables is a file of its own, so that several cores compile them at the same time:
// it takes one core minutes.
#pragma once
#include <cuda_runtime.h>

#include "body.h"

namespace fused_opt::cuda {

// By rule, in the order of kRules.
constexpr int kCount = sizeof kRules / sizeof *kRules;
using Kernel = void (*)(Launch);
extern const Kernel kUpdates[kCount], kRoundingUpdates[kCount], kWideUpdates[kCount];
extern const Kernel kNorms[kCount], kWideNorms[kCount];
extern void (*const kAccumulations[2])(Accumulation);  // in float32, in float64

namespace {

// Where a thread of a kernel is. Its functions are for kernels alone; nvcc wants to see them on both sides.
struct Block {
#ifdef __CUDA_ARCH__
  __device__ int64_t block() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }
  template <class F>
  __device__ void all_threads(const F& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  __device__ void one_thread(const F& f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  // What this thread has written is seen by the thread that is told it is the last, whose block reads past its cache.
  __device__ bool arrive(uint64_t* counter, int64_t n, int64_t all) const {
    __threadfence();
    auto* count = reinterpret_cast<unsigned long long*>(counter);
    if (static_cast<int64_t>(atomicAdd(count, static_cast<unsigned long long>(n))) + n != all) return false;
    *count = 0;
    __threadfence();
    return true;
  }
#else
  __host__ int64_t block() const { return 0; }
  __host__ int64_t blocks() const { return 0; }
  template <class F>
  __host__ void all_threads(const F&) const {}
  template <class F>
  __host__ void one_thread(const F&) const {}
  __host__ bool arrive(uint64_t*, int64_t, int64_t) const { return false; }
#endif
};

// Blocks on a multiprocessor, at least: as many as every kernel's registers allow, for rules of up to so many states.
// With 16 warps of a momentum step 48 KB of loads are in flight on each, twice what full bandwidth needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFourBlocks = 0, kThreeBlocks = 2;  // with one state more this architecture's code would spill
#else
constexpr int kFourBlocks = 1, kThreeBlocks = 3;
#endif
template <class Rule, class T>
constexpr int kBlocks = sizeof(T) == 8 || Rule::kStates > kThreeBlocks ? 2
                        : Rule::kStates > kFourBlocks                  ? 3
                                                                       : 4;

template <template <class> class Rule, class T, bool rounds>
__global__ void __launch_bounds__(kThreads, (kBlocks<Rule<T>, T>))
    update_kernel(const __grid_constant__ Launch launch) {
  __shared__ alignas(16) unsigned char shared[sizeof(Shared<Rule<T>, T>)];
  update<Rule, T, rounds>(Block(), launch, *reinterpret_cast<Shared<Rule<T>, T>*>(shared));
}

template <template <class> class Rule, class T>
__global__ void __launch_bounds__(kThreads, (kBlocks<Rule<T>, T>)) norms_kernel(const __grid_constant__ Launch launch) {
  __shared__ alignas(16) unsigned char shared[sizeof(Shared<Rule<T>, T>)];
  norms<Rule, T>(Block(), launch, *reinterpret_cast<Shared<Rule<T>, T>*>(shared));
}

// Eight blocks, 64 registers: left to itself nvcc 13 spills one of float64 on sm_100.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) accumulate_kernel(const __grid_constant__ Accumulation work) {
  __shared__ alignas(16) unsigned char lanes[kThreads * sizeof(Norms)];
  __shared__ bool last;
  accumulate<T>(Block(), work, reinterpret_cast<Norms*>(lanes), last);
}

}  // namespace
}  // namespace fused_opt::cuda
