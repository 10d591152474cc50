// The one file that knows Python: tensors come in through DLPack's exchange API, and a Plan keeps what a step needs to
// know of them until something moves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cpu/step.h"
#include "dlpack.h"
#include "rules.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

const dlpack::ExchangeAPI* exchange = nullptr;

// An attribute of torch.Tensor that is written in C: its getter, found once and not by name for every tensor.
class Attribute {
 public:
  void find(const py::object& tensor_type, const char* name) {
    const py::object found = tensor_type.attr(name);
    if (!Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type))
      throw py::import_error("torch.Tensor." + std::string(name) + " is not the attribute that it was");
    descriptor_ = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  }
  py::object operator()(PyObject* tensor) const {
    PyObject* const value = descriptor_->get(tensor, descriptor_->closure);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  const PyGetSetDef* descriptor_ = nullptr;
};
Attribute grad_of, version_of;

void connect(const py::object& tensor_type) {
  exchange = static_cast<const dlpack::ExchangeAPI*>(
      PyCapsule_GetPointer(tensor_type.attr("__dlpack_c_exchange_api__").ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  if (exchange->major != 1)
    throw py::import_error("this torch speaks DLPack " + std::to_string(exchange->major) +
                           ", and 1 is understood here");
  grad_of.find(tensor_type, "grad");
  version_of.find(tensor_type, "_version");
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
    ndim = now.ndim;
    implementation_ = now.shape;
    if (ndim > kFew) many_ = std::make_unique<int64_t[]>(2 * ndim);
    int64_t* layout = many_ ? many_.get() : few_;
    for (int d = 0; d < ndim; ++d) {
      layout[d] = now.shape[d];
      // The stride of a dimension of one element means nothing, and libraries differ in what they write there.
      layout[ndim + d] = now.shape[d] == 1 ? 0 : now.strides[d];
    }
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
    if (!type || *type != dtype || now.device.type != device_.type || now.device.id != device_.id || now.ndim != ndim)
      return false;
    for (int d = 0; d < ndim; ++d)
      if (now.shape[d] != sizes()[d] || (now.shape[d] != 1 && now.strides[d] != strides()[d])) return false;
    return true;
  }
  bool unmoved(PyObject* tensor) const {
    void* where = nullptr;
    return matches(tensor, &where) && where == data;
  }

  // Asks the cache for what a look at the tensor will read; an address that has become stale does no harm.
  FUSED_OPT_FN void prefetch(PyObject* tensor) const {
    __builtin_prefetch(tensor);
    __builtin_prefetch(implementation_ - 8);
    __builtin_prefetch(implementation_);
    __builtin_prefetch(implementation_ + 8);
  }

  const int64_t* sizes() const { return many_ ? many_.get() : few_; }
  const int64_t* strides() const { return sizes() + ndim; }
  bool same_strides(const View& other) const {
    return ndim == other.ndim && std::equal(strides(), strides() + ndim, other.strides());
  }
  int64_t numel() const { return std::accumulate(sizes(), sizes() + ndim, int64_t{1}, std::multiplies<>()); }

  // Whether the elements fill one stretch of memory: in row-major order, or in whatever order.
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = ndim; d-- > 0;) {
      if (sizes()[d] != 1 && strides()[d] != expected) return false;
      expected *= sizes()[d];
    }
    return true;
  }
  bool dense() const {
    std::vector<int> order(ndim);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return strides()[a] < strides()[b]; });
    int64_t expected = 1;
    for (const int d : order) {
      if (sizes()[d] == 1) continue;
      if (strides()[d] != expected) return false;
      expected *= sizes()[d];
    }
    return true;
  }

  Operand operand() const { return {data, dtype, strides()}; }

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t ndim = 0;

 private:
  static void* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  static constexpr int kFew = 5;

  dlpack::Device device_{};
  const int64_t* implementation_ = nullptr;  // where torch keeps the sizes, inside the tensor's implementation
  // Sizes, then strides. Most tensors have few dimensions, and a look at one should cost one line of the cache.
  int64_t few_[2 * kFew] = {};
  std::unique_ptr<int64_t[]> many_;
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
  FUSED_OPT_FN void prefetch() const { view.prefetch(object.ptr()); }

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
  std::optional<Held> step, average;
  std::optional<View> g;  // none: it had no gradient when the plan was made
  double count = 0;
  int64_t version = -1;  // autograd's count of writes, as the last step left it

  FUSED_OPT_FN void prefetch() const {
    p.prefetch(tensor.ptr());
    for (const Held& held : states) held.prefetch();

    if (step) step->prefetch();
  }
};

Group read_row(const py::tuple& row) {
  Group group;
  group.lr = row[0].cast<double>();
  group.grad_scale = row[1].cast<double>();
  const auto rule = row[2].cast<std::vector<double>>();
  if (rule.size() > kMaxCoefficients) throw py::value_error("more coefficients than a rule can have");
  std::copy(rule.begin(), rule.end(), group.rule);
  if (!row[3].is_none()) {
    const auto ratio = row[3].cast<std::tuple<int, double, double, double, int>>();
    group.ratio = static_cast<Ratio>(std::get<0>(ratio));
    std::tie(std::ignore, group.coefficient, group.cap, group.eps, group.exempt) = ratio;
  }
  if (!row[4].is_none())
    std::tie(group.sigma, group.relative, group.seed, group.t) =
        row[4].cast<std::tuple<double, bool, uint64_t, uint32_t>>();
  if (!row[5].is_none())
    std::tie(group.add, group.share, group.fresh, group.write_back) =
        row[5].cast<std::tuple<double, double, bool, bool>>();
  return group;
}

class Plan {
 public:
  // parameters: tuples of tensor, gradient or None, group, fresh, states in the rule's order or None, step tensor or
  // None, average or None, index of the parameter, multipliers of learning rate and weight decay, None or a shard's
  // offset, run, elsewhere and strides (see Place). `ordered`: the noise counts elements in row-major order, and so
  // must whoever walks them.
  Plan(const std::string& rule, const std::optional<std::string>& instruction_set, const py::list& parameters,
       const py::list& param_groups, const py::dict& state, bool ordered) {
    const cpu::InstructionSet* set = cpu::choose(instruction_set ? instruction_set->c_str() : nullptr);
    if (!set) throw py::value_error("this processor does not run the instruction set '" + *instruction_set + "'");
    kernel_ = set->find(rule.c_str());
    if (!kernel_) throw py::value_error("no rule '" + rule + "' in the native backend");
    parameters_.reserve(parameters.size());
    for (const auto& item : parameters) {
      const auto row = py::cast<py::tuple>(item);
      Parameter parameter{row[0], row[2].cast<int>(), row[3].cast<bool>(), View(row[0]), {}, {}, {}, {}};
      if (!row[4].is_none())
        for (const auto& s : row[4]) parameter.states.emplace_back(s);
      if (!row[5].is_none()) parameter.step.emplace(row[5]);
      if (!row[6].is_none()) parameter.average.emplace(row[6]);
      if (!row[1].is_none()) parameter.g.emplace(row[1]);
      Layer layer;
      layer.index = row[7].cast<uint32_t>();
      layer.lr_scale = row[8].cast<double>();
      layer.decay_scale = row[9].cast<double>();
      if (!row[10].is_none()) {
        auto& [place, strides] = places_.emplace_back();
        std::tie(place.offset, place.run, place.elsewhere, strides) =
            row[10].cast<std::tuple<int64_t, int64_t, int64_t, std::vector<int64_t>>>();
        place.strides = strides.data();
        layer.place = &place;
      }
      table_.layers.push_back(layer);
      parameters_.push_back(std::move(parameter));
    }
    for (const Parameter& parameter : parameters_) {
      Tensor tensor;
      tensor.p = parameter.p.operand();
      tensor.numel = parameter.p.numel();
      tensor.ndim = parameter.p.ndim;
      tensor.sizes = parameter.p.sizes();
      tensor.flat = ordered ? parameter.p.contiguous() : parameter.p.dense();
      const auto add = [&](const View& view) {
        tensor.flat &= view.same_strides(parameter.p);
        return view.operand();
      };
      for (size_t s = 0; s < parameter.states.size(); ++s) tensor.states[s] = add(parameter.states[s].view);
      if (parameter.average) tensor.average = add(parameter.average->view);
      if (parameter.g) tensor.g = add(*parameter.g);
      table_.tensors.push_back(tensor);
      everything_.append(parameter.tensor);
    }
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
    constexpr size_t kAhead = 1;
    keys_.clear();
    active_ = 0;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Parameter& parameter = parameters_[t];
      Tensor& tensor = table_.tensors[t];
      if (t + kAhead < parameters_.size()) parameters_[t + kAhead].prefetch();
      const py::object grad = grad_of(parameter.tensor.ptr());
      Layer& layer = table_.layers[t];
      layer.grad_norm2 = layer.part_norms = layer.direction_norm2 = -1;
      tensor.active = !grad.is_none();
      if (!tensor.active) continue;
      ++active_;
      if (layer.weight_norm2 >= 0 && PyLong_AsLongLong(version_of(parameter.tensor.ptr()).ptr()) != parameter.version)
        layer.weight_norm2 = -1;
      if (!parameter.g || !parameter.g->matches(grad.ptr(), &tensor.g.data) ||
          !parameter.p.unmoved(parameter.tensor.ptr()))
        return py::none();
      for (const Held& held : parameter.states)
        if (!held.unmoved()) return py::none();
      if (parameter.average && !parameter.average->unmoved()) return py::none();
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

  // What is known of the gradients before anybody reads them: for every parameter None, or the sum of the norms of its
  // parts and the squared norm of their sum, -1 where it is not known.
  void know(const py::list& norms) {
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (const py::object known = norms[t]; !known.is_none())
        std::tie(table_.layers[t].part_norms, table_.layers[t].grad_norm2) = known.cast<std::pair<double, double>>();
  }

  // The sum of squares of all gradients, as they lie in memory.
  double grad_norm2(int threads) {
    py::gil_scoped_release unlocked;
    return cpu::grad_norm2(*kernel_, table_, threads);
  }

  // For every parameter the squared norms of weights, gradient and direction that a step with these rows wants, of all
  // gradients where `gradients` says so, and of directions where `directions` does; what was not asked for is -1, or
  // what is known. Of shards they are to be added up, and handed back.
  std::vector<std::tuple<double, double, double>> norms(const py::list& rows, bool gradients, bool directions,
                                                        int threads) {
    read_rows(rows);
    {
      py::gil_scoped_release unlocked;
      cpu::norms(*kernel_, table_, gradients, directions, threads);
    }
    std::vector<std::tuple<double, double, double>> found;
    for (const Layer& layer : table_.layers)
      found.emplace_back(layer.weight_norm2, layer.grad_norm2, layer.direction_norm2);
    return found;
  }
  void know_norms(const std::vector<std::tuple<double, double, double>>& norms) {
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Layer& layer = table_.layers[t];
      std::tie(layer.weight_norm2, layer.grad_norm2, layer.direction_norm2) = norms.at(t);
    }
  }

  // rows: for every pair that `gather` returned, what read_row() reads. Returns the places of the parameters whose
  // trust ratio could not be formed, because a norm is not finite.
  std::vector<size_t> run(const py::list& rows, int threads) {
    read_rows(rows);
    {
      py::gil_scoped_release unlocked;
      cpu::step(*kernel_, table_, threads);
    }
    std::vector<size_t> not_finite;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      if (!table_.tensors[t].active) continue;
      Parameter& parameter = parameters_[t];
      if (!table_.layers[t].finite) not_finite.push_back(t);
      parameter.fresh = false;
      if (table_.layers[t].weight_norm2 >= 0)  // the step's own write is counted after this
        parameter.version = PyLong_AsLongLong(version_of(parameter.tensor.ptr()).ptr()) + 1;
      if (!parameter.step) continue;
      const View& view = parameter.step->view;
      if (view.dtype == DType::kFloat64)
        *static_cast<double*>(view.data) = parameter.count;
      else
        *static_cast<float*>(view.data) = static_cast<float>(parameter.count);
    }
    return not_finite;
  }

  // The parameters that `run` writes.
  py::list touched() const {
    if (active_ == parameters_.size()) return everything_;
    py::list list;
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (table_.tensors[t].active) list.append(parameters_[t].tensor);
    return list;
  }

  // The trust ratio of every parameter in the last step.
  std::vector<double> ratios() const {
    std::vector<double> ratios;
    for (const Layer& layer : table_.layers) ratios.push_back(layer.ratio);
    return ratios;
  }

 private:
  void read_rows(const py::list& rows) {
    if (rows.size() != keys_.size()) throw py::value_error("one row for every pair that gather() returned");
    table_.groups.clear();
    for (const auto& row : rows) table_.groups.push_back(read_row(py::reinterpret_borrow<py::tuple>(row)));
  }

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
  std::deque<std::pair<Place, std::vector<int64_t>>> places_;  // which `table_` points to
  std::vector<py::object> seen_;
  std::vector<std::pair<int, double>> keys_;
  size_t active_ = 0;
  py::list everything_;
};

// total += part (or nothing, where total is None), with the sums of squares of the part and of the new total.
std::pair<double, double> accumulate(const py::object& total, const py::object& part, int threads) {
  const View g(part);
  const View p(total.is_none() ? part : total);
  Tensor tensor;
  tensor.g = g.operand();
  tensor.p = p.operand();
  if (total.is_none()) tensor.p.data = nullptr;
  tensor.numel = g.numel();
  tensor.ndim = g.ndim;
  tensor.sizes = g.sizes();
  tensor.flat = g.dense() && g.same_strides(p);
  const cpu::InstructionSet* set = cpu::choose();
  py::gil_scoped_release unlocked;
  const cpu::Sums sums = cpu::accumulate(*set, tensor, threads);
  return {sums.part2, sums.total2};
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
}
