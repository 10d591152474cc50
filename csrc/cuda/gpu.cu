// What a bucket needs from the CUDA runtime; the kernels are in kernels.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
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
        launch((wide ? kWideUpdates : argument.rounds ? kRoundingUpdates : kUpdates)[rule], argument, stream);
      },
      [](int rule, bool wide, const Launch& argument, void* stream) {
        launch((wide ? kWideNorms : kNorms)[rule], argument, stream);
      },
      [](bool wide, const Accumulation& work, void* stream) { launch(kAccumulations[wide], work, stream); },
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
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kUpdates[0]);
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
