// The named tuples and the rule of backends/interface.py and rule.py, as C++ reads them.
#pragma once
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../schedule.h"
#include "../table.h"
#include "view.h"

namespace fused_opt {
namespace {

// Named tuples are read by position, which is what costs least; that their members are these is checked once.
const std::pair<const char*, std::vector<std::string>> kNamedTuples[] = {
    {"StepArgs",
     {"lr", "grad_scale", "coupled_decay", "decoupled_decay", "independent_decay", "coefficients", "ratio", "noise",
      "fold", "cautious", "rounding", "counted"}},
    {"RatioArgs", {"kind", "coefficient", "cap", "eps", "exempt"}},
    {"NoiseArgs", {"sigma", "relative", "seed", "step"}},
    {"Fold", {"add", "share", "restart", "write_back", "follow"}},
    {"CautiousArgs", {"update", "decay", "scaled"}},
    {"RoundingArgs", {"seed", "step"}},
    {"Schedule",
     {"sigma", "temperature", "decay", "cycle", "relative", "noise_seed", "average", "start", "period", "interval",
      "window", "probability", "beta", "seed", "warmup"}},
    {"Counted", {"schedule", "steps", "samples", "periods"}},
    {"Norms", {"weight2", "grad2", "direction2"}},
    {"PartNorms", {"sum_of_norms", "grad2"}},
};

void check_named_tuples(const py::object& interface) {
  for (const auto& [name, members] : kNamedTuples)
    if (interface.attr(name).attr("_fields").cast<std::vector<std::string>>() != members)
      throw py::import_error(std::string(name) + " has other members here than in backends/interface.py");
  const std::pair<const char*, Kind> kinds[] = {{"LARS", Kind::kLARS}, {"CLARS", Kind::kCLARS}, {"LAMB", Kind::kLAMB}};
  for (const auto& [name, kind] : kinds)
    if (interface.attr("Kind").attr(name).cast<int>() != static_cast<int>(kind))
      throw py::import_error(std::string(name) + " is another kind here than in backends/interface.py");
  const std::pair<const char*, Average> averages[] = {
      {"MEAN", Average::kMean}, {"EXPONENTIAL", Average::kExponential}, {"MOMENTUM", Average::kMomentum}};
  for (const auto& [name, average] : averages)
    if (interface.attr("Average").attr(name).cast<int>() != static_cast<int>(average))
      throw py::import_error(std::string(name) + " is another average here than in backends/interface.py");
}

// The place in kRules of Python's rule, after checking that it matches the kernels'.
int check_rule(const py::object& rule) {
  const auto name = rule.attr("name").cast<std::string>();
  const int index = rule_index(name.c_str());
  if (index < 0) throw py::value_error("there is no rule '" + name + "' in csrc/rules.h");
  const RuleShape& shape = kRules[index];
  const auto states = static_cast<int>(py::len(rule.attr("states")));
  const auto coefficients = rule.attr("coefficient_count").cast<int>();
  const auto counts_steps = rule.attr("counts_steps").cast<bool>();
  const bool keeps_scalar = py::len(rule.attr("scalar")) > 0;
  const auto words = [](int states, int coefficients, bool counts_steps, bool keeps_scalar) {
    return std::to_string(states) + " states and " + std::to_string(coefficients) + " coefficients, and " +
           (counts_steps ? "counts steps" : "counts no steps") + (keeps_scalar ? " and keeps a scalar" : "");
  };
  if (states != shape.states || coefficients != shape.coefficients || counts_steps != shape.counts_steps ||
      keeps_scalar != shape.keeps_scalar)
    throw std::runtime_error("rule '" + name + "' has " + words(states, coefficients, counts_steps, keeps_scalar) +
                             " in Python; in " + "csrc/rules.h it has " +
                             words(shape.states, shape.coefficients, shape.counts_steps, shape.keeps_scalar));
  return index;
}

// `lr`, `decay`: receive the rate and the decay if they are tensors, and the decay in the arguments is 1 then; null
// where they may not be tensors.
StepArgs read_step_args(const py::handle& given, const RuleShape& rule, Operand* lr = nullptr,
                        Operand* decay = nullptr) {
  const auto row = py::reinterpret_borrow<py::tuple>(given);
  StepArgs args;
  const auto number = [&](int place, Operand* tensor, double instead) {
    if (!tensor || PyFloat_Check(row[place].ptr())) return row[place].cast<double>();
    *tensor = View(row[place]).operand();
    return instead;
  };
  args.lr = number(0, lr, 0);
  args.grad_scale = row[1].cast<double>();
  args.coupled_decay = number(2, decay, 1);
  args.decoupled_decay = number(3, decay, 1);
  args.independent_decay = number(4, decay, 1);
  const auto coefficients = row[5].cast<std::vector<double>>();
  if (static_cast<int>(coefficients.size()) != rule.coefficients)
    throw py::value_error("rule '" + std::string(rule.name) + "' takes " + std::to_string(rule.coefficients) +
                          " coefficients, and was given " + std::to_string(coefficients.size()));
  std::copy(coefficients.begin(), coefficients.end(), args.coefficients);
  if (!row[6].is_none()) {
    int kind;
    std::tie(kind, args.coefficient, args.cap, args.eps, args.exempt) =
        row[6].cast<std::tuple<int, double, double, double, int>>();
    args.kind = static_cast<Kind>(kind);
  }
  if (!row[7].is_none())
    std::tie(args.sigma, args.relative, args.seed, args.noise_step) =
        row[7].cast<std::tuple<double, bool, uint64_t, uint32_t>>();
  if (!row[8].is_none())
    std::tie(args.add, args.share, args.restart, args.write_back, args.follow) =
        row[8].cast<std::tuple<double, double, bool, bool, double>>();
  if (!row[9].is_none())
    std::tie(args.cautious_update, args.cautious_decay, args.scaled) = row[9].cast<std::tuple<bool, bool, bool>>();
  if (args.stochastic = !row[10].is_none(); args.stochastic)
    std::tie(args.rounding_seed, args.noise_step) = row[10].cast<std::tuple<uint64_t, uint32_t>>();
  return args;
}

// Where a step's arguments say that the device counts: what of noise and average does not depend on the counts, and the
// counts as the host knows them, negative where it does not say.
std::optional<Counts> read_schedule(const py::handle& given, StepArgs& args, Schedule& schedule) {
  const auto counted = py::reinterpret_borrow<py::tuple>(given)[11].cast<py::object>();
  if (counted.is_none()) return std::nullopt;
  const py::tuple all = counted.cast<py::tuple>(), row = all[0].cast<py::tuple>();
  schedule.sigma = args.sigma = row[0].cast<double>();
  schedule.temperature = row[1].cast<bool>();
  schedule.decay = row[2].cast<bool>();
  schedule.cycle = row[3].cast<int64_t>();
  args.relative = row[4].cast<bool>();
  args.seed = row[5].cast<uint64_t>();
  schedule.average = static_cast<Average>(row[6].cast<int64_t>());
  schedule.start = row[7].cast<int64_t>();
  schedule.period = row[8].cast<int64_t>();
  schedule.interval = row[9].cast<int64_t>();
  schedule.window = row[10].cast<double>();
  schedule.probability = row[11].cast<double>();
  schedule.beta = row[12].cast<double>();
  schedule.seed = row[13].cast<uint64_t>();
  schedule.warmup = row[14].cast<bool>();
  return Counts{all[1].cast<int64_t>(), all[2].cast<int64_t>(), all[3].cast<int64_t>(), 0};
}

}  // namespace
}  // namespace fused_opt
