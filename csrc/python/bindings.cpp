// What Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "../cuda/plan.h"
#include "bucket.h"

namespace fused_opt {
namespace {

// Where tensors are that are not stepped by the CPU's kernels: on a GPU, or with number -1 on the host in its place.
class There {
 public:
  explicit There(int device) : device_(device) {
    if (device_ >= 0) cuda::use(device_);
  }
  const cuda::Machine& machine() const { return device_ < 0 ? cuda::host() : cuda::gpu(); }
  // torch's current one; makes the GPU the current one of this thread.
  void* stream() const {
    void* stream = nullptr;
    if (device_ < 0) return stream;
    cuda::use(device_);
    if (exchange->current_stream(dlpack::kCUDA, device_, &stream)) throw py::error_already_set();
    return stream;
  }

 private:
  const int device_;
};

// A plan of tensors on a GPU, or with device -1 on the host in its place; all of them float64, or none. Addresses are
// those of tensors of one element on the device, 0 for none.
class DevicePlan : public Plan {
 public:
  DevicePlan(const std::string& rule, int device, const py::list& parameters, const py::list& param_groups,
             const py::dict& state, bool ordered)
      : Plan(rule, std::nullopt, parameters, param_groups, state, ordered), there_(device) {
    counts_there_ = true;
    std::vector<float*> steps;
    for (const Parameter& parameter : parameters_)
      steps.push_back(parameter.step ? static_cast<float*>(parameter.step->view.data) : nullptr);
    const bool wide = !table_.tensors.empty() && table_.tensors[0].p.dtype == DType::kFloat64;
    plan_ = std::make_unique<cuda::Plan>(there_.machine(), rule.c_str(), wide, table_.tensors, table_.layers, steps);
  }

  // norm2 <- (add ? norm2 : 0) + the sum of squares of all gradients, without waiting for it.
  void sum_gradients(uintptr_t norm2, bool add) {
    cuda::Signals signals;
    signals.norm2 = reinterpret_cast<double*>(norm2);
    plan_->sum_gradients(table_.tensors, table_.layers, signals, add, there_.stream());
  }
  double grad_norm2() {
    void* const stream = there_.stream();
    py::gil_scoped_release unlocked;
    return plan_->grad_norm2(table_.tensors, table_.layers, stream);
  }

  // rows: as Plan::run takes them, with rates that may be tensors. What is on the device: a float32 that is not 0 where
  // nothing shall be done, a float32 that the gradients were multiplied with, and where they shall be clipped to
  // max_norm, sum_gradients' float64.
  void run(const py::list& rows, uintptr_t found_inf, uintptr_t grad_scale, uintptr_t norm2, double max_norm) {
    if (rows.size() != keys_.size()) throw py::value_error("one row for every pair that gather() returned");
    rows_.clear();
    for (const auto& row : rows) {
      cuda::Row& read = rows_.emplace_back();
      read.group = read_row(py::reinterpret_borrow<py::tuple>(row), &read.lr);
    }
    const cuda::Signals signals{reinterpret_cast<const float*>(found_inf), reinterpret_cast<const float*>(grad_scale),
                                reinterpret_cast<double*>(norm2), max_norm};
    plan_->run(table_.tensors, table_.layers, rows_, signals, there_.stream());
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (table_.tensors[t].active) remember(parameters_[t], table_.layers[t]);
  }
  std::vector<double> ratios() const { return plan_->ratios(there_.stream()); }

 private:
  const There there_;
  std::vector<cuda::Row> rows_;
  std::unique_ptr<cuda::Plan> plan_;
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

std::pair<double, double> accumulate(const py::object& total, const py::object& part, int threads) {
  const Summand summand(total, part);
  const cpu::InstructionSet* set = cpu::choose();
  py::gil_scoped_release unlocked;
  const cpu::Sums sums = cpu::accumulate(*set, summand.tensor, threads);
  return {sums.part2, sums.total2};
}

// The same on a GPU or the host in its place, where `scratch` holds as many zeros as `scratch_words` says; the sums
// will be its first two numbers. False: they do not lie alike in memory, and nothing was done.
bool accumulate_there(int device, const py::object& total, const py::object& part, const py::object& scratch) {
  const Summand summand(total, part);
  if (!summand.tensor.flat) return false;
  const There there(device);
  cuda::accumulate(there.machine(), summand.tensor, View(scratch).data, there.stream());
  return true;
}

}  // namespace
}  // namespace fused_opt

PYBIND11_MODULE(_native, m) {
  using namespace fused_opt;
  m.doc() = "The native backend's core.";
  m.def("connect", connect, "Learns from torch.Tensor how to read tensors.");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : cpu::instruction_sets())
      if (set.runs_here()) names.emplace_back(set.name);
    return names;
  });
  m.def("accumulate", accumulate);
  m.def("accumulate_there", accumulate_there);
  m.def("scratch_words", cuda::scratch_words);
  m.def("unavailable", cuda::unavailable, "Why a GPU cannot be used (-1: any GPU), or an empty string.");
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::optional<std::string>&, const py::list&, const py::list&,
                    const py::dict&, bool>())
      .def("gather", &Plan::gather)
      .def("run", &Plan::run)
      .def("touched", &Plan::touched)
      .def("know", &Plan::know)
      .def("norms", &Plan::norms)
      .def("know_norms", &Plan::know_norms)
      .def("grad_norm2", &Plan::grad_norm2)
      .def("ratios", &Plan::ratios);
  py::class_<DevicePlan, Plan>(m, "DevicePlan")
      .def(py::init<const std::string&, int, const py::list&, const py::list&, const py::dict&, bool>())
      .def("sum_gradients", &DevicePlan::sum_gradients)
      .def("grad_norm2", &DevicePlan::grad_norm2)
      .def("run", &DevicePlan::run)
      .def("ratios", &DevicePlan::ratios);
}
