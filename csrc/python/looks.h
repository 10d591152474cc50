// What Python asks in every step, in one call: of a backend's tensors, and of the parameter groups.
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "view.h"

namespace fused_opt {
namespace {

class Looks {
 public:
  // parameters: each has a gradient. others: what else must not move.
  Looks(const std::vector<py::object>& parameters, const std::vector<py::object>& others) {
    for (const py::object& parameter : parameters)
      parameters_.push_back({parameter, View(parameter), View(parameter.attr("grad"))});
    for (const py::object& other : others) others_.emplace_back(other);
  }

  // The address of every gradient, None where there is none; or nothing: a tensor has moved, or lies otherwise.
  std::optional<py::list> gradients() const {
    for (const Held& other : others_)
      if (!other.unmoved()) return std::nullopt;
    py::list found(parameters_.size());
    for (size_t t = 0; t < parameters_.size(); ++t) {
      const auto& [parameter, p, g] = parameters_[t];
      const py::object grad = grad_of(parameter.ptr());
      void* where = nullptr;
      if (!p.unmoved(parameter.ptr())) return std::nullopt;
      if (grad.is_none()) {
        found[t] = py::none();
        continue;
      }
      if (!is_plain(grad.ptr()) || !g.matches(grad.ptr(), &where)) return std::nullopt;
      // Lazy negations are views of complex numbers, whose elements have others between them: seen in a single one
      // alone.
      if (g.numel() == 1 && is_negated(grad.ptr())) return std::nullopt;
      found[t] = reinterpret_cast<intptr_t>(where);
    }
    return found;
  }

 private:
  struct Parameter {
    py::object tensor;
    View p, g;
  };
  std::vector<Parameter> parameters_;
  std::vector<Held> others_;
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
  bool unchanged(const std::vector<py::dict>& groups) const {
    if (kept_.empty() || groups.size() != kept_.size()) return false;
    for (size_t g = 0; g < kept_.size(); ++g) {
      if (groups[g].size() != kept_[g].size()) return false;
      PyObject *key, *value;
      Py_ssize_t place = 0;
      for (const auto& [kept_key, kept_value] : kept_[g])
        if (!PyDict_Next(groups[g].ptr(), &place, &key, &value) || key != kept_key.ptr() ||
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
