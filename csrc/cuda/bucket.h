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
  // Of shards: keeps the norms of the tensors at an address on the device, with zeros to begin with, where they can be
  // added up over processes. `sum_norms` puts there what the coming step needs, as cpu::norms() does; `run` goes by
  // `known` instead, if it is given.
  void keep_norms(Norms* at) { fixed_.norms = at; }
  void sum_norms(const std::vector<Tensor>&, const std::vector<Layer>&, const std::vector<Row>&, const DeviceScalars&,
                 bool gradients, bool directions, void* stream);
  void run(const std::vector<Tensor>&, std::vector<Layer>&, const std::vector<Row>&, const DeviceScalars&, void* stream,
           const Norms* known = nullptr);
  void forget_sums() { summed_ = 0; }              // of a step that was not made
  std::vector<double> ratios(void* stream) const;  // waits

  // Tells the device what the host counted of a group, if that is other than what it has counted itself. Before `run`.
  void set_counts(int group, const Schedule&, const Counts&, void* stream);
  // What the device has counted; `steps`: how many beyond those of the host's calls of `run`, by replays. Waits.
  std::vector<Counts> counts(void* stream);
  bool capturing(void* stream) const { return machine_.capturing(stream); }

 private:
  template <class Wants>
  Launch launch(DeviceBuffer&, const std::vector<Tensor>&, const std::vector<Layer>&, const std::vector<Row>&,
                const DeviceScalars&, void* stream, std::pair<Wanted, Wanted>* passes, const Wants& wants);

  const Machine& machine_;
  const int rule_;
  const bool wide_;
  const int64_t count_;
  int64_t chunks_ = 0;
  Owned<char> memory_;
  Launch fixed_{};  // the addresses of the tables
  double* norm2_;
  DeviceBuffer sums_, step_;  // Now and Row of every tensor: for sums ahead of a step, and for the step
  Wanted summed_ = 0;  // what of the coming step's norms is on the device already, for every tensor that wants it
  std::vector<Counts> counts_;       // of the groups: as the device must have them after what the host has queued
  std::vector<Schedule> schedules_;  // by which their `due` was counted
  Owned<Staging> counts_staging_;
  Owned<uint64_t> told_;  // of every tensor, whether the device found its carried norm wrong
};

// total += part, and the sums of both squares; `scratch`: 8 * scratch_words(numel) bytes of zeros on the device.
int64_t scratch_words(int64_t numel);
void accumulate(const Machine&, const Tensor&, void* scratch, void* stream);

}  // namespace fused_opt::cuda
