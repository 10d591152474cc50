// What Python asks in every step, in one call: of a backend's tensors, and of the parameter groups.
#pragma once
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "view.h"

namespace fused_opt {
namespace {

// The objects in parameter groups and states.
class Seen {
 public:
  Seen(const py::list& param_groups, const py::dict& state) {
    const auto see = [&](PyObject* object) {
      seen_.push_back(py::reinterpret_borrow<py::object>(object));
      return true;
    };
    visit(param_groups, see);
    in_groups_ = seen_.size();
    visit(state, see);
  }

  // Whether they are the same ones. No state: it is not looked at.
  bool unchanged(const py::list& param_groups, const std::optional<py::dict>& state) const {
    size_t next = 0;
    const auto seen = [&](PyObject* object) { return next < seen_.size() && seen_[next++].ptr() == object; };
    return visit(param_groups, seen) && (!state || visit(*state, seen)) && next == (state ? seen_.size() : in_groups_);
  }

 private:
  // Calls f on every object whose replacement makes a plan stale, until it returns false.
  template <class F>
  static bool visit(const py::list& param_groups, const F& f) {
    static PyObject* const params_name = PyUnicode_InternFromString("params");
    for (const auto& group : param_groups) {
      PyObject* params = PyDict_GetItemWithError(group.ptr(), params_name);
      if (!params || !PyList_Check(params) || !f(group.ptr())) return false;  // the group: where its parameters begin
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
        if (!f(PyList_GET_ITEM(params, i))) return false;
    }
    return true;
  }
  template <class F>
  static bool visit(const py::dict& state, const F& f) {
    PyObject *key, *value, *name, *tensor;
    for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
      if (!f(key) || !f(value)) return false;
      if (!PyDict_Check(value)) continue;
      for (Py_ssize_t j = 0; PyDict_Next(value, &j, &name, &tensor);)
        if (!f(name) || !f(tensor)) return false;
    }
    return true;
  }

  std::vector<py::object> seen_;  // in the groups, then in the state
  size_t in_groups_ = 0;
};

// Where a backend's tensors are.
class Looks {
 public:
  // parameters: each has a gradient. others: what else must not move.
  Looks(const std::vector<py::object>& parameters, const std::vector<py::object>& others) {
    for (const py::object& parameter : parameters)
      parameters_.push_back({parameter, View(parameter), View(parameter.attr("grad"))});
    for (const py::object& other : others) others_.emplace_back(other);
  }

  // The address of every gradient as int64, in the object of before where all are as before; or None: a tensor has
  // moved, or lies otherwise; with_others: of the others, too.
  py::object gradients(bool with_others) {
    const py::object before = std::exchange(told_, py::none());
    if (with_others)
      for (const Held& other : others_)
        if (!other.unmoved()) return py::none();
    std::vector<intptr_t> found(parameters_.size());
    for (size_t t = 0; t < parameters_.size(); ++t) {
      const Parameter& parameter = parameters_[t];
      const py::object grad = grad_of(parameter.tensor.ptr());
      if (!parameter.p.unmoved(parameter.tensor.ptr())) return py::none();
      if (grad.is_none()) {
        found[t] = kNowhere;
        continue;
      }
      void* where = nullptr;
      if (!is_plain(grad.ptr()) || !parameter.g.matches(grad.ptr(), &where)) return py::none();
      // Lazy negations are views of complex numbers, whose elements have others between them: seen in a single one
      // alone.
      if (parameter.g.numel() == 1 && is_negated(grad.ptr())) return py::none();
      found[t] = reinterpret_cast<intptr_t>(where);
    }
    if (!before.is_none() && found == found_) return told_ = before;
    found_ = std::move(found);
    return told_ = py::bytes(reinterpret_cast<const char*>(found_.data()), sizeof(intptr_t) * found_.size());
  }
  // Which parameters had one then; nothing: all.
  std::optional<std::vector<bool>> here() const {
    std::vector<bool> here;
    for (const intptr_t address : found_) here.push_back(address != kNowhere);
    if (std::all_of(here.begin(), here.end(), [](bool one) { return one; })) return std::nullopt;
    return here;
  }

  // Remember some parameters' weights as a step has left them.
  void remember(const py::list& which) {
    if (which.size() != parameters_.size()) throw py::value_error("one bool for every parameter");
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (PyList_GET_ITEM(which.ptr(), t) == Py_True)
        parameters_[t].writes.expect(parameters_[t].tensor);
      else
        parameters_[t].writes.forget();
  }
  // The places of those of them to which autograd has counted a write since then.
  std::vector<size_t> written() {
    std::vector<size_t> places;
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (parameters_[t].writes.expects() && parameters_[t].writes.by_others(parameters_[t].tensor))
        places.push_back(t);
    return places;
  }

 private:
  static constexpr intptr_t kNowhere = -1;  // in place of the address of a gradient that is not there
  struct Parameter {
    py::object tensor;
    View p, g;
    Writes writes;
  };
  std::vector<Parameter> parameters_;
  std::vector<Held> others_;
  std::vector<intptr_t> found_;
  py::object told_ = py::none();  // the same as Python's
};

// Tells whether groups still say what they said: whether every value is the same object, but for those of some keys.
class Watch {
 public:
  explicit Watch(py::set left_out) : left_out_(std::move(left_out)) {}

  void keep(const std::vector<py::dict>& groups) {
    kept_.clear();
    for (const py::dict& group : groups) {
      auto& items = kept_.emplace_back();
      for (const auto& [key, value] : group)
        items.emplace_back(py::reinterpret_borrow<py::object>(key),
                           left_out_.contains(key) ? py::object() : py::reinterpret_borrow<py::object>(value));
    }
  }
  // False where nothing was kept.
  bool unchanged(const py::list& groups) const {
    if (kept_.empty() || groups.size() != kept_.size()) return false;
    for (size_t g = 0; g < kept_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), g);
      if (!PyDict_Check(group) || PyDict_GET_SIZE(group) != static_cast<Py_ssize_t>(kept_[g].size())) return false;
      PyObject *key, *value;
      Py_ssize_t place = 0;
      for (const auto& [kept_key, kept_value] : kept_[g])
        if (!PyDict_Next(group, &place, &key, &value) || key != kept_key.ptr() ||
            (kept_value && value != kept_value.ptr()))
          return false;
    }
    return true;
  }

 private:
  const py::set left_out_;
  std::vector<std::vector<std::pair<py::object, py::object>>> kept_;  // no value: of a key that is left out
};

}  // namespace
}  // namespace fused_opt
