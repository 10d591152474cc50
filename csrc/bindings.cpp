// The one file that knows Python: tensors come in through DLPack's exchange API, and a Plan keeps what a step needs to
// know of them until something moves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cpu/step.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

const dlpack::ExchangeAPI* exchange = nullptr;

void connect(const py::object& tensor_type) {
  exchange = static_cast<const dlpack::ExchangeAPI*>(
      PyCapsule_GetPointer(tensor_type.attr("__dlpack_c_exchange_api__").ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  if (exchange->major != 1)
    throw py::import_error("this torch speaks DLPack " + std::to_string(exchange->major) +
                           ", and 1 is understood here");
}

std::optional<DType> dtype_of(const dlpack::DataType& type) {
  if (type.code == dlpack::kFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == dlpack::kFloat && type.bits == 64) return DType::kFloat64;
  if (type.code == dlpack::kFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == dlpack::kBFloat && type.bits == 16) return DType::kBFloat16;
  return std::nullopt;
}

// A tensor as it was when the plan was made.
class View {
 public:
  explicit View(const py::handle& tensor) {
    dlpack::Tensor now;
    if (exchange->tensor_from_object(tensor.ptr(), &now)) throw py::error_already_set();
    const auto type = dtype_of(now.dtype);
    if (!type)
      throw py::type_error("a dtype that no kernel knows reached a plan: " +
                           py::repr(tensor.attr("dtype")).cast<std::string>());
    dtype = *type;
    data = address(now);
    device_ = now.device;
    sizes.assign(now.shape, now.shape + now.ndim);
    strides.assign(now.strides, now.strides + now.ndim);
    // The stride of a dimension of one element means nothing, and libraries differ in what they write there.
    for (int d = 0; d < now.ndim; ++d)
      if (sizes[d] == 1) strides[d] = 0;
  }

  // Whether the tensor is still laid out like this; `where` receives its address.
  bool matches(PyObject* tensor, void** where) const {
    dlpack::Tensor now;
    if (exchange->tensor_from_object(tensor, &now)) {
      PyErr_Clear();
      return false;
    }
    *where = address(now);
    const auto type = dtype_of(now.dtype);
    if (!type || *type != dtype || now.device.type != device_.type || now.device.id != device_.id ||
        now.ndim != static_cast<int32_t>(sizes.size()))
      return false;
    for (int d = 0; d < now.ndim; ++d)
      if (now.shape[d] != sizes[d] || (sizes[d] != 1 && now.strides[d] != strides[d])) return false;
    return true;
  }
  bool unmoved(PyObject* tensor) const {
    void* where = nullptr;
    return matches(tensor, &where) && where == data;
  }

  int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()); }

  // Whether the elements fill one stretch of memory, in whatever order.
  bool dense() const {
    std::vector<size_t> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
    int64_t expected = 1;
    for (const size_t d : order) {
      if (sizes[d] == 1) continue;
      if (strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  Operand operand() const { return {data, dtype, strides.data()}; }

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> sizes, strides;

 private:
  static void* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  dlpack::Device device_{};
};

// A state tensor of a plan. It holds a second reference to the implementation: as long as Python's is the only one,
// every look at a tensor takes it from there and gives it back, at three times the price.
struct Held {
  explicit Held(const py::handle& tensor) : object(py::reinterpret_borrow<py::object>(tensor)), view(tensor) {
    dlpack::Managed* managed = nullptr;
    if (exchange->managed_from_object(tensor.ptr(), &managed)) throw py::error_already_set();
    second.reset(managed, [](dlpack::Managed* m) { m->release(m); });
  }
  bool unmoved() const { return view.unmoved(object.ptr()); }

  py::object object;
  View view;
  std::shared_ptr<dlpack::Managed> second;
};

// One parameter of a plan.
struct Parameter {
  py::object tensor;
  int group;
  bool fresh;  // its states were made for the coming step
  View p;
  std::vector<Held> states;
  std::optional<Held> step;
  std::optional<View> g;  // none: it had no gradient when the plan was made
  double count = 0;
};

class Plan {
 public:
  // parameters: (tensor, gradient or None, group, fresh, states or None, step tensor or None), in the rule's order of
  // states.
  Plan(const std::string& rule, const std::optional<std::string>& instruction_set, const py::list& parameters,
       const py::list& param_groups, const py::dict& state) {
    const cpu::InstructionSet* set = cpu::choose(instruction_set ? instruction_set->c_str() : nullptr);
    if (!set) throw py::value_error("this processor does not run the instruction set '" + *instruction_set + "'");
    kernel_ = set->find(rule.c_str());
    if (!kernel_) throw py::value_error("no rule '" + rule + "' in the native backend");
    parameters_.reserve(parameters.size());
    for (const auto& item : parameters) {
      const auto row = py::cast<py::tuple>(item);
      Parameter parameter{row[0], row[2].cast<int>(), row[3].cast<bool>(), View(row[0]), {}, {}, {}};
      if (!row[4].is_none())
        for (const auto& s : row[4]) parameter.states.emplace_back(s);
      if (!row[5].is_none()) parameter.step.emplace(row[5]);
      if (!row[1].is_none()) parameter.g.emplace(row[1]);
      parameters_.push_back(std::move(parameter));
    }
    for (const Parameter& parameter : parameters_) {
      Tensor tensor;
      tensor.p = parameter.p.operand();
      tensor.numel = parameter.p.numel();
      tensor.ndim = static_cast<int32_t>(parameter.p.sizes.size());
      tensor.sizes = parameter.p.sizes.data();
      tensor.flat = parameter.p.dense();
      const auto add = [&](const View& view) {
        tensor.flat &= view.strides == parameter.p.strides;
        return view.operand();
      };
      for (size_t s = 0; s < parameter.states.size(); ++s) tensor.states[s] = add(parameter.states[s].view);
      if (parameter.g) tensor.g = add(*parameter.g);
      table_.tensors.push_back(tensor);
      everything_.append(parameter.tensor);
    }
    table_.layers.resize(parameters_.size());
    table_.cut();
    visit(param_groups, state, [&](PyObject* object) {
      seen_.push_back(py::reinterpret_borrow<py::object>(object));
      return true;
    });
  }

  // Finds this step's gradients. None where something has changed and the plan must be made anew; otherwise the
  // distinct (group, step count) pairs for which `run` wants a row of coefficients.
  py::object gather(const py::list& param_groups, const py::dict& state) {
    size_t next = 0;
    const bool unchanged = visit(
        param_groups, state, [&](PyObject* object) { return next < seen_.size() && seen_[next++].ptr() == object; });
    if (!unchanged || next != seen_.size()) return py::none();
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    keys_.clear();
    active_ = 0;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Parameter& parameter = parameters_[t];
      Tensor& tensor = table_.tensors[t];
      const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter.tensor.ptr(), grad_name));
      if (!grad) throw py::error_already_set();
      tensor.active = !grad.is_none();
      if (!tensor.active) continue;
      ++active_;
      if (!parameter.g || !parameter.g->matches(grad.ptr(), &tensor.g.data) ||
          !parameter.p.unmoved(parameter.tensor.ptr()))
        return py::none();
      for (const Held& held : parameter.states)
        if (!held.unmoved()) return py::none();
      if (parameter.step) {
        if (!parameter.step->unmoved()) return py::none();
        const View& view = parameter.step->view;
        parameter.count =
            view.dtype == DType::kFloat64 ? *static_cast<double*>(view.data) : *static_cast<float*>(view.data);
        parameter.count += 1;
      } else {
        parameter.count = parameter.fresh ? 1 : 2;
      }
      const std::pair<int, double> key{parameter.group, parameter.count};
      size_t row = tensor.group;  // most often where it was
      if (row >= keys_.size() || keys_[row] != key) row = std::find(keys_.begin(), keys_.end(), key) - keys_.begin();
      if (row == keys_.size()) keys_.push_back(key);
      tensor.group = static_cast<int32_t>(row);
    }
    return py::cast(keys_);
  }

  // rows: for every pair that `gather` returned: learning rate, gradient scale, the rule's coefficients.
  void run(const py::list& rows, int threads) {
    if (rows.size() != keys_.size())
      throw py::value_error("one row of coefficients for every pair that gather() returned");
    table_.groups.assign(rows.size(), Group{});
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto row = py::cast<std::vector<double>>(rows[r]);
      if (row.size() < 2 || row.size() > 2 + kMaxCoefficients)
        throw py::value_error("a row of coefficients of the wrong length");
      Group& group = table_.groups[r];
      group.lr = row[0];
      group.grad_scale = row[1];
      std::copy(row.begin() + 2, row.end(), group.rule);
    }
    {
      py::gil_scoped_release unlocked;
      cpu::step(*kernel_, table_, threads);
    }
    for (size_t t = 0; t < parameters_.size(); ++t) {
      if (!table_.tensors[t].active) continue;
      Parameter& parameter = parameters_[t];
      parameter.fresh = false;
      if (!parameter.step) continue;
      const View& view = parameter.step->view;
      if (view.dtype == DType::kFloat64)
        *static_cast<double*>(view.data) = parameter.count;
      else
        *static_cast<float*>(view.data) = static_cast<float>(parameter.count);
    }
  }

  // The parameters that `run` writes.
  py::list touched() const {
    if (active_ == parameters_.size()) return everything_;
    py::list list;
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (table_.tensors[t].active) list.append(parameters_[t].tensor);
    return list;
  }

  void scale(size_t index, double lr, double weight_decay) { table_.layers.at(index) = {lr, weight_decay}; }

 private:
  // Calls f on every object whose replacement would make the plan stale, until it returns false.
  template <class F>
  static bool visit(const py::list& param_groups, const py::dict& state, const F& f) {
    static PyObject* const params_name = PyUnicode_InternFromString("params");
    for (const auto& group : param_groups) {
      PyObject* params = PyDict_GetItemWithError(group.ptr(), params_name);
      if (!params || !PyList_Check(params)) return false;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
        if (!f(PyList_GET_ITEM(params, i))) return false;
    }
    PyObject *key, *value, *name, *tensor;
    for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
      if (!f(key) || !f(value)) return false;
      if (!PyDict_Check(value)) continue;
      for (Py_ssize_t j = 0; PyDict_Next(value, &j, &name, &tensor);)
        if (!f(name) || !f(tensor)) return false;
    }
    return true;
  }

  const cpu::Kernel* kernel_;
  std::vector<Parameter> parameters_;
  cpu::Table table_;
  std::vector<py::object> seen_;
  std::vector<std::pair<int, double>> keys_;
  size_t active_ = 0;
  py::list everything_;
};

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
  m.def("dense", [](const py::object& tensor) { return View(tensor).dense(); });
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::optional<std::string>&, const py::list&, const py::list&,
                    const py::dict&>())
      .def("gather", &Plan::gather)
      .def("run", &Plan::run)
      .def("touched", &Plan::touched)
      .def("scale", &Plan::scale);
}
