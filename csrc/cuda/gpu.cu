// The kernels on a GPU, and the calls of the CUDA runtime that a bucket needs.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "body.h"
#include "machine.h"

namespace fused_opt::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next call that checks would report it
  if (error == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string("CUDA could not ") + what + ": " + cudaGetErrorString(error));
}

// Memory may be allocated and freed while a stream is captured into a graph.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

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

template <class T>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(const __grid_constant__ Accumulation work) {
  __shared__ alignas(16) unsigned char lanes[kThreads * sizeof(Norms)];
  __shared__ bool last;
  accumulate<T>(Block(), work, reinterpret_cast<Norms*>(lanes), last);
}

// Launches as many blocks as can be on the GPU at once, or as there are chunks.
template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, void* stream) {
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), "say which GPU is used");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "look at the GPU");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), "look at a kernel");
  const int64_t grid = std::min<int64_t>(argument.chunks, static_cast<int64_t>(processors) * std::max(blocks, 1));
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(argument);
  check(cudaGetLastError(), "launch a kernel");
}

using Kernel = void (*)(Launch);
#define FUSED_OPT_UPDATE(name, Rule) \
  {update_kernel<Rule, float, false>, update_kernel<Rule, float, true>, update_kernel<Rule, double, true>},
#define FUSED_OPT_NORMS(name, Rule) {norms_kernel<Rule, float>, norms_kernel<Rule, double>},
constexpr Kernel kUpdate[][3] = {FUSED_OPT_RULES(FUSED_OPT_UPDATE)};
constexpr Kernel kNorms[][2] = {FUSED_OPT_RULES(FUSED_OPT_NORMS)};

bool capturing(void* stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "look at a stream");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

// Pinned memory in turns: a copy of some steps ago is done when its turn comes again.
struct Staging {
  struct Turn {
    void* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };
  explicit Staging(size_t bytes) : bytes(bytes) {}
  ~Staging() {
    const Relaxed relaxed;
    for (const Turn& turn : turns) {
      if (turn.copied) cudaEventSynchronize(turn.copied);
      if (turn.copied) cudaEventDestroy(turn.copied);
      cudaFreeHost(turn.memory);
    }
    cudaGetLastError();
  }
  void* pin() const {
    const Relaxed relaxed;
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "pin memory");
    return memory;
  }
  const size_t bytes;
  Turn turns[8];
  size_t next = 0;
};

namespace {

void upload(Staging* staging, void* to, const void* from, size_t bytes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (capturing(stream)) {  // the graph reads the memory at every replay: it is never freed
    void* const memory = staging->pin();
    std::memcpy(memory, from, bytes);
    return check(cudaMemcpyAsync(to, memory, bytes, cudaMemcpyHostToDevice, on), "copy to the GPU");
  }
  Staging::Turn& turn = staging->turns[staging->next++ % 8];
  if (!turn.memory) {
    turn.memory = staging->pin();
    check(cudaEventCreateWithFlags(&turn.copied, cudaEventDisableTiming), "make an event");
  } else {
    check(cudaEventSynchronize(turn.copied), "wait for a copy");
  }
  std::memcpy(turn.memory, from, bytes);
  check(cudaMemcpyAsync(to, turn.memory, bytes, cudaMemcpyHostToDevice, on), "copy to the GPU");
  check(cudaEventRecord(turn.copied, on), "record an event");
}

void* allocate(size_t bytes) {
  const Relaxed relaxed;
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<size_t>(bytes, 1)), "allocate memory");
  std::unique_ptr<void, cudaError_t (*)(void*)> owned(memory, cudaFree);
  check(cudaMemset(memory, 0, bytes), "clear memory");
  check(cudaStreamSynchronize(nullptr), "clear memory");
  return owned.release();
}

uint64_t* share(size_t words) {
  const Relaxed relaxed;
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, (words + 1) * sizeof(uint64_t), cudaHostAllocMapped), "pin memory");
  std::memset(memory, 0, (words + 1) * sizeof(uint64_t));
  return static_cast<uint64_t*>(memory);
}

}  // namespace

const Machine& gpu() {
  static const Machine machine = {
      allocate,
      [](void* memory) {  // waits for the GPU; an error now is one of a process that ends
        const Relaxed relaxed;
        cudaFree(memory);
        cudaGetLastError();
      },
      share,
      [](uint64_t* words) {
        const Relaxed relaxed;
        cudaFreeHost(words);
        cudaGetLastError();
      },
      [](size_t bytes) { return new Staging(bytes); },
      [](Staging* staging) { delete staging; },
      upload,
      [](void* memory, size_t bytes, void* stream) {
        check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clear memory");
      },
      [](void* to, const void* from, size_t bytes, void* stream) {
        const auto on = static_cast<cudaStream_t>(stream);
        if (capturing(stream))
          throw std::runtime_error(
              "a step that is captured in a CUDA graph cannot wait for the GPU, as nonfinite='skip' and 'raise' and "
              "track_parts must. Take such steps outside of the graph");
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on), "copy from the GPU");
        check(cudaStreamSynchronize(on), "wait for the GPU");
      },
      capturing,
      [](int rule, bool wide, const Launch& argument, void* stream) {
        launch(kUpdate[rule][wide ? 2 : argument.rounds], argument, stream);
      },
      [](int rule, bool wide, const Launch& argument, void* stream) { launch(kNorms[rule][wide], argument, stream); },
      [](bool wide, const Accumulation& work, void* stream) {
        launch(wide ? accumulate_kernel<double> : accumulate_kernel<float>, work, stream);
      },
  };
  return machine;
}

void use(int device) {
  check(cudaSetDevice(device), "use the GPU");
}

std::string unavailable(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= 0) {
    cudaFuncAttributes attributes;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, update_kernel<SGD, float, false>);
  }
  cudaGetLastError();
  switch (error) {
    case cudaSuccess:
      return count ? "" : "there is no NVIDIA GPU";
    case cudaErrorNoDevice:
      return "there is no NVIDIA GPU";
    case cudaErrorInsufficientDriver:
      return "there is no NVIDIA driver, or one too old for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
             std::to_string(CUDART_VERSION % 1000 / 10);
    case cudaErrorNoKernelImageForDevice:
      return "it was built for other GPUs than this one; set CUDAARCHS to its compute capability and reinstall";
    default:
      return std::string("CUDA does not start: ") + cudaGetErrorString(error);
  }
}

}  // namespace fused_opt::cuda
