// What a bucket needs of the device that its tensors are on: a GPU (gpu.cu), or for tests the host that emulates one
// (host.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "table.h"

namespace fused_opt::cuda {

struct Staging;  // memory that a copy may still be reading when the next one is prepared

// A kernel by rule, in the order of kRules; `wide`: float64 arithmetic. Everything goes to a stream in its order.
// Errors are std::runtime_error in words.
struct Machine {
  void* (*allocate)(size_t bytes);   // filled with 0
  void (*release)(void* memory);     // after everything that reads it
  uint64_t* (*share)(size_t words);  // of the host, which the device writes; filled with 0
  void (*unshare)(uint64_t*);        // once nothing writes it
  Staging* (*stage)(size_t bytes);
  void (*unstage)(Staging*);
  void (*upload)(Staging*, void* to, const void* from, size_t bytes, void* stream);  // `from` may change at once
  void (*clear)(void* memory, size_t bytes, void* stream);
  void (*download)(void* to, const void* from, size_t bytes, void* stream);  // waits for the stream
  bool (*capturing)(void* stream);  // into a graph, whose replays read the same memory again
  void (*update)(int rule, bool wide, const Launch&, void* stream);
  void (*norms)(int rule, bool wide, const Launch&, void* stream);
  void (*accumulate)(bool wide, const Accumulation&, void* stream);
};

// Memory that ends with its owner.
struct Release {
  const Machine* machine;
  void operator()(char* memory) const { machine->release(memory); }
  void operator()(Staging* staging) const { machine->unstage(staging); }
  void operator()(uint64_t* words) const { machine->unshare(words); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;

const Machine& host();
const Machine& gpu();  // once unavailable() is empty
void use(int device);  // makes a GPU the one that `gpu` is
// Why the GPU of that number, or any for -1, cannot be used, or nothing. Leaves it the one that `gpu` is.
std::string unavailable(int device);

}  // namespace fused_opt::cuda
