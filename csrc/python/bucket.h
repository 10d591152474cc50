// A Plan keeps what a step needs to know of Python's tensors until something moves.
#pragma once
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/step.h"
#include "view.h"

namespace fused_opt {
namespace {

// One parameter of a plan.
struct Parameter {
  py::object tensor;
  int group;
  bool fresh;  // its states were made for the coming step
  View p;
  std::vector<Held> states;
  std::optional<Held> step, average;
  std::optional<View> g;         // none: it had no gradient when the plan was made
  PyObject* gradient = nullptr;  // the last one, which is most often the next one, too: to prefetch, never to follow
  double count = 0;
  int64_t version = -1;  // autograd's count of writes, as the last step left it

  FUSED_OPT_FN void prefetch() const {
    p.prefetch(tensor.ptr());
    if (g) g->prefetch(gradient);
    for (const Held& held : states) held.prefetch();
    if (step) step->prefetch();
  }
};

// `lr`: where to say that the rate is a tensor, if it may be one.
Group read_row(const py::tuple& row, Operand* lr = nullptr) {
  Group group;
  if (lr && !PyFloat_Check(row[0].ptr()))
    *lr = View(row[0]).operand();
  else
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
    constexpr size_t kAhead = 2;
    keys_.clear();
    active_ = 0;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Parameter& parameter = parameters_[t];
      Tensor& tensor = table_.tensors[t];
      if (t + kAhead < parameters_.size()) parameters_[t + kAhead].prefetch();
      const py::object grad = grad_of(parameter.tensor.ptr());
      parameter.gradient = grad.ptr();
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
        parameter.count = counts_there_                   ? INFINITY
                          : view.dtype == DType::kFloat64 ? *static_cast<double*>(view.data)
                                                          : *static_cast<float*>(view.data);
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
    for (size_t t = 0; t < parameters_.size(); ++t) {  // now, while the cache has them
      Parameter& parameter = parameters_[t];
      if (!table_.tensors[t].active || !parameter.step) continue;
      const View& view = parameter.step->view;
      if (view.dtype == DType::kFloat64)
        *static_cast<double*>(view.data) = parameter.count;
      else
        *static_cast<float*>(view.data) = static_cast<float>(parameter.count);
    }
    {
      py::gil_scoped_release unlocked;
      cpu::step(*kernel_, table_, threads);
    }
    std::vector<size_t> not_finite;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      if (!table_.tensors[t].active) continue;
      if (!table_.layers[t].finite) not_finite.push_back(t);
      remember(parameters_[t], table_.layers[t]);
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

 protected:
  // What the next step wants to know of a parameter that this one has stepped.
  static void remember(Parameter& parameter, const Layer& layer) {
    parameter.fresh = false;
    if (layer.weight_norm2 >= 0)  // the step's own write has been counted
      parameter.version = PyLong_AsLongLong(version_of(parameter.tensor.ptr()).ptr());
  }

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

  bool counts_there_ = false;  // steps are counted on the device: here they are infinite
  const cpu::Kernel* kernel_;
  std::vector<Parameter> parameters_;
  cpu::Table table_;
  std::deque<std::pair<Place, std::vector<int64_t>>> places_;  // which `table_` points to
  std::vector<py::object> seen_;
  std::vector<std::pair<int, double>> keys_;
  size_t active_ = 0;
  py::list everything_;
};

}  // namespace
}  // namespace fused_opt
