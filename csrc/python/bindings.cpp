// What Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <set>
#include <vector>

#include "../cuda/bucket.h"
#include "../cuda/host.h"
#include "bucket.h"
#include "looks.h"

namespace fused_opt {
namespace {

// The device of tensors that the CPU's kernels do not step: a GPU, or with number -1 the host that emulates one.
class Device {
 public:
  explicit Device(int number) : number_(number) {
    if (number_ >= 0) cuda::use(number_);
  }
  const cuda::Machine& machine() const { return number_ < 0 ? cuda::host() : cuda::gpu(); }
  // torch's current one; makes the GPU the current one of this thread.
  void* stream() const {
    void* stream = nullptr;
    if (number_ < 0) return stream;
    cuda::use(number_);
    if (exchange->current_stream(dlpack::kCUDA, number_, &stream)) throw py::error_already_set();
    return stream;
  }

 private:
  const int number_;
};

// Parameters on one device; all of them float64, or none. Addresses are those of tensors of one element on the device,
// 0 for none.
class DeviceBucket : public Bucket {
 public:
  DeviceBucket(const py::object& rule, const py::sequence& entries, const py::list& param_groups, const py::dict& state,
               int device)
      : Bucket(rule, entries, param_groups, state), device_(device) {
    steps_on_device_ = kRules[rule_].counts_steps;
    std::vector<float*> steps, scalars;
    int groups = 1;
    const auto address = [](const std::optional<Held>& held) {
      return held ? static_cast<float*>(held->view.data) : nullptr;
    };
    for (const Parameter& parameter : parameters_) {
      steps.push_back(address(parameter.step));
      scalars.push_back(address(parameter.scalar));
      groups = std::max(groups, parameter.group + 1);
    }
    const bool wide = !table_.tensors.empty() && table_.tensors[0].p.dtype == DType::kFloat64;
    bucket_ = std::make_unique<cuda::Bucket>(device_.machine(), kRules[rule_].name, wide, table_.tensors, table_.layers,
                                             steps, scalars, groups);
  }

  py::object collect_gradients(const py::list& param_groups, const std::optional<py::dict>& state) {
    bucket_->forget_sums();
    return Bucket::collect_gradients(param_groups, state);
  }

  // norm2 <- (add ? norm2 : 0) + the sum of squares of all gradients, without waiting for it.
  void sum_gradients(uintptr_t norm2, bool add) {
    cuda::DeviceScalars scalars;
    scalars.norm2 = reinterpret_cast<double*>(norm2);
    bucket_->sum_gradients(table_.tensors, table_.layers, scalars, add, device_.stream());
  }
  double grad_norm2() {
    void* const stream = device_.stream();
    py::gil_scoped_release unlocked;
    return bucket_->grad_norm2(table_.tensors, table_.layers, stream);
  }

  // What is on the device of a step's scale: a float32 that is not 0 where nothing shall be done, a float32 that the
  // gradients were multiplied with, and where they shall be clipped to the last of these, sum_gradients' float64.
  using Scalars = std::tuple<uintptr_t, uintptr_t, uintptr_t, double>;

  // Of shards, see cuda/bucket.h: three float64 for every tensor.
  void keep_norms(uintptr_t at) { bucket_->keep_norms(reinterpret_cast<Norms*>(at)); }
  void sum_norms(const py::list& args, const Scalars& scalars, bool gradients, bool directions) {
    read_args(args);
    bucket_->sum_norms(table_.tensors, table_.layers, args_, read(scalars), gradients, directions, device_.stream());
  }

  // args: with rates and decays that may be tensors. known: where the norms of whole tensors are, or 0. counts: see
  // count_writes.
  void run(const py::list& args, const Scalars& scalars, uintptr_t known, const py::function& counts) {
    count_writes(counts);
    read_args(args);
    bucket_->run(table_.tensors, table_.layers, args_, read(scalars), device_.stream(),
                 reinterpret_cast<const Norms*>(known));
    for (size_t t = 0; t < parameters_.size(); ++t)
      remember(parameters_[t], table_.layers[t], table_.tensors[t].active);
  }
  std::vector<double> ratios() const { return of_stepped(bucket_->ratios(device_.stream())); }
  bool capturing() const { return bucket_->capturing(device_.stream()); }
  // Of every group in captured steps: its number, steps that replays have added since the last call, samples, periods.
  std::vector<std::tuple<int, int64_t, int64_t, int64_t>> counts() {
    const std::vector<Counts> found = bucket_->counts(device_.stream());
    std::vector<std::tuple<int, int64_t, int64_t, int64_t>> of_groups;
    for (const int g : captured_) of_groups.emplace_back(g, found[g].steps, found[g].samples, found[g].periods);
    return of_groups;
  }

 private:
  void read_args(const py::list& args) {
    if (are_kept(args)) return;
    void* const stream = device_.stream();
    args_.clear();
    bool fixed = true;  // no rate is in a tensor, which may move, and no count is told
    const bool capturing = bucket_->capturing(stream);
    std::set<int> groups;
    for (const auto& of_row : args) {
      const int group = std::get<0>(keys_[args_.size()]);
      cuda::Row& row = args_.emplace_back();
      row.args = read_step_args(of_row, kRules[rule_], &row.lr, &row.decay);
      const std::optional<Counts> counts = read_schedule(of_row, row.args, row.schedule);
      fixed &= !counts && !row.lr.data && !row.decay.data;
      if (!counts) continue;
      row.group = group;
      row.advances = groups.insert(group).second;
      if (capturing) captured_.insert(group);
      if (is_known(static_cast<double>(counts->steps))) bucket_->set_counts(group, row.schedule, *counts, stream);
    }
    if (fixed) keep(args);
  }
  static cuda::DeviceScalars read(const Scalars& scalars) {
    const auto [found_inf, grad_scale, norm2, max_norm] = scalars;
    return {reinterpret_cast<const float*>(found_inf), reinterpret_cast<const float*>(grad_scale),
            reinterpret_cast<double*>(norm2), max_norm};
  }

  const Device device_;
  std::vector<cuda::Row> args_;
  std::set<int> captured_;  // groups that graphs count
  std::unique_ptr<cuda::Bucket> bucket_;
};

// total += part (or nothing, where total is None), with the sums of squares of the part and of the new total.
class Summand {
 public:
  Summand(const py::object& total, const py::object& part) : g_(part), p_(total.is_none() ? part : total) {
    tensor.g = g_.operand();
    tensor.p = p_.operand();
    if (total.is_none()) tensor.p.data = nullptr;
    tensor.numel = g_.numel();
    tensor.ndim = g_.ndim;
    tensor.sizes = g_.sizes();
    tensor.flat = g_.dense() && g_.same_strides(p_);
  }
  Tensor tensor;

 private:
  const View g_, p_;
};

std::pair<double, double> accumulate(const py::object& total, const py::object& part, int threads,
                                     const std::optional<std::string>& instruction_set) {
  const Summand summand(total, part);
  const cpu::InstructionSet* set = cpu::choose(instruction_set ? instruction_set->c_str() : nullptr);
  if (!set) throw py::value_error("this processor does not run the instruction set '" + *instruction_set + "'");
  py::gil_scoped_release unlocked;
  const cpu::Sums sums = cpu::accumulate(*set, summand.tensor, threads);
  return {sums.part2, sums.total2};
}

// The same on a GPU or the host in its place, where `scratch` holds as many zeros as `scratch_words` says; the sums
// will be its first two numbers. False: their strides differ, and nothing was done.
bool accumulate_on_device(int device, const py::object& total, const py::object& part, const py::object& scratch) {
  const Summand summand(total, part);
  if (!summand.tensor.flat) return false;
  const Device where(device);
  cuda::accumulate(where.machine(), summand.tensor, View(scratch).data, where.stream());
  return true;
}

}  // namespace
}  // namespace fused_opt

PYBIND11_MODULE(_native, m) {
  using namespace fused_opt;
  m.doc() = "The native backend's core.";
  m.def(
      "connect",
      [](const py::object& tensor_type, const py::object& interface) {
        connect(tensor_type);
        check_named_tuples(interface);
      },
      "Learns from torch.Tensor how to read tensors; checks what is read by position.");
  m.def("rules", [] {
    std::vector<std::string> names;
    for (const RuleShape& rule : kRules) names.emplace_back(rule.name);
    return names;
  });
  m.def("check_rule", check_rule, "Raises where a rule of Python's promises what its kernel does not keep.");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : cpu::instruction_sets())
      if (set.runs_here()) names.emplace_back(set.name);
    return names;
  });
  m.def("accumulate", accumulate, py::arg("total"), py::arg("part"), py::arg("threads"),
        py::arg("instruction_set") = std::nullopt);
  m.def("accumulate_on_device", accumulate_on_device);
  m.def("scratch_words", cuda::scratch_words);
  m.def(
      "set_host_blocks", [](int64_t blocks) { cuda::host_blocks = blocks; },
      "How many blocks the host that emulates a GPU runs; with 0 a launch does nothing, so that a step is the host's "
      "part alone.");
  m.def("unavailable", cuda::unavailable, "Why a GPU cannot be used (-1: any GPU), or an empty string.");
  py::class_<Seen>(m, "Seen").def(py::init<const py::list&, const py::dict&>()).def("unchanged", &Seen::unchanged);
  py::class_<Looks>(m, "Looks")
      .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&>())
      .def("gradients", &Looks::gradients)
      .def("here", &Looks::here)
      .def("remember", &Looks::remember)
      .def("written", &Looks::written);
  py::class_<Watch>(m, "Watch").def(py::init<py::set>()).def("keep", &Watch::keep).def("unchanged", &Watch::unchanged);
  py::class_<Bucket>(m, "Bucket")
      .def("collect_gradients", &Bucket::collect_gradients)
      .def("set_part_norms", &Bucket::set_part_norms)
      .def("strided", &Bucket::strided)
      .def("written_states", &Bucket::written_states);
  py::class_<CPUBucket, Bucket>(m, "CPUBucket")
      .def(py::init<const py::object&, const py::sequence&, const py::list&, const py::dict&,
                    const std::optional<std::string>&>())
      .def("run", &CPUBucket::run)
      .def("norms", &CPUBucket::norms)
      .def("set_norms", &CPUBucket::set_norms)
      .def("grad_norm2", &CPUBucket::grad_norm2)
      .def("ratios", &CPUBucket::ratios);
  py::class_<DeviceBucket, Bucket>(m, "DeviceBucket")
      .def(py::init<const py::object&, const py::sequence&, const py::list&, const py::dict&, int>())
      .def("collect_gradients", &DeviceBucket::collect_gradients)
      .def("keep_norms", &DeviceBucket::keep_norms)
      .def("sum_norms", &DeviceBucket::sum_norms)
      .def("sum_gradients", &DeviceBucket::sum_gradients)
      .def("grad_norm2", &DeviceBucket::grad_norm2)
      .def("run", &DeviceBucket::run)
      .def("capturing", &DeviceBucket::capturing)
      .def("counts", &DeviceBucket::counts)
      .def("ratios", &DeviceBucket::ratios);
  py::class_<cuda::HostGraph>(m, "HostGraph", py::module_local(),
                              "For tests: what a CUDA graph is, of steps with the host in a GPU's place.")
      .def(py::init<>())
      .def("begin", &cuda::HostGraph::begin)
      .def("end", &cuda::HostGraph::end)
      .def("replay", &cuda::HostGraph::replay);
}
