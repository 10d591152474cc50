// What a backend without C++ asks of its tensors in every step, in one call.
#pragma once
#include <optional>
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

}  // namespace
}  // namespace fused_opt
