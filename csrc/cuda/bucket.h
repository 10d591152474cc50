// A plan's tensors on one GPU: tables in its memory, and what of them is new in a step.
#pragma once
#include <utility>
#include <vector>

#include "machine.h"
#include "table.h"

namespace fused_opt::cuda {

// A buffer in device memory that mirrors one of the host: sync() copies only what has changed since the last time.
class DeviceBuffer {
 public:
  DeviceBuffer(const Machine&, size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  char* now() { return now_.data(); }  // write the new contents, then sync()
  char* device() const { return device_.get(); }
  void sync(size_t bytes, void* stream);
  bool captured() const { return captured_; }

 private:
  const Machine& machine_;
  std::vector<char> now_, last_;
  Owned<char> device_;
  Owned<Staging> staging_;
  bool captured_ = false;  // a graph's replays write it, too: its contents are no longer known
};

// The tensors and layers that the functions take are those of the constructor, as the step's host sees them: whether a
// gradient is there and where, which row, and norms that are known. A `weight_norm2` of 0 means that it is known on the
// device.
class Bucket {
 public:
  // steps, scalars: where the count of every tensor and its rule's scalar are, or null. All arithmetic is in float64
  // (`wide`) or in float32.
  Bucket(const Machine&, const char* rule, bool wide, const std::vector<Tensor>&, const std::vector<Layer>&,
         const std::vector<float*>& steps, const std::vector<float*>& scalars = {}, int groups = 1);
  ~Bucket();
  Bucket(const Bucket&) = delete;

  // scalars.norm2 <- (add ? scalars.norm2 : 0) + the sum of squares of the gradients.
  void sum_gradients(const std::vector<Tensor>&, const std::vector<Layer>&, const DeviceScalars&, bool add,
                     void* stream);
  double grad_norm2(const std::vector<Tensor>&, const std::vector<Layer>&, void* stream);  // waits
  void run(const std::vector<Tensor>&, std::vector<Layer>&, const std::vector<Row>&, const DeviceScalars&,
           void* stream);
  std::vector<double> ratios(void* stream) const;  // waits

  // Tells the device what the host counted of a group, if that is other than what it has counted itself. Before `run`.
  void set_counts(int group, const Schedule&, const Counts&, void* stream);
  // What the device has counted; `steps`: how many beyond those of the host's calls of `run`, by replays. Waits.
  std::vector<Counts> counts(void* stream);
  bool capturing(void* stream) const { return machine_.capturing(stream); }

 private:
  Launch launch(DeviceBuffer&, const std::vector<Tensor>&, const std::vector<Layer>&, const std::vector<Row>&,
                const DeviceScalars&, void* stream, std::pair<Wanted, Wanted>* passes, bool gradients);

  const Machine& machine_;
  const int rule_;
  const bool wide_;
  const int64_t count_;
  int64_t chunks_ = 0;
  Owned<char> memory_;
  Launch fixed_{};  // the addresses of the tables
  double* norm2_;
  DeviceBuffer sums_, step_;         // Now and Row of every tensor: for the sums of gradients alone, and for a step
  bool summed_ = false;              // the gradients of the coming step
  std::vector<Counts> counts_;       // of the groups: as the device must have them after what the host has queued
  std::vector<Schedule> schedules_;  // by which their `due` was counted
  Owned<Staging> counts_staging_;
  Owned<uint64_t> told_;  // of every tensor, whether the device found its carried norm wrong
};

// total += part, and the sums of both squares; `scratch`: 8 * scratch_words(numel) bytes of zeros on the device.
int64_t scratch_words(int64_t numel);
void accumulate(const Machine&, const Tensor&, void* scratch, void* stream);

}  // namespace fused_opt::cuda
