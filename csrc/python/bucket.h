// A bucket keeps what a step needs of Python's tensors until something moves.
#pragma once
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/step.h"
#include "looks.h"
#include "step_args.h"
#include "view.h"

namespace fused_opt {
namespace {

// One parameter, as a ParamEntry of backends/interface.py names what it has.
struct Parameter {
  explicit Parameter(const py::handle& entry)
      : tensor(entry.attr("tensor")),
        group(entry.attr("group").cast<int>()),
        states_are_new(entry.attr("states_are_new").cast<bool>()),
        exclusive(entry.attr("exclusive").cast<bool>()),
        noisy(entry.attr("noisy").cast<bool>()),
        earlier(entry.attr("earlier").cast<int>()),
        p(tensor) {
    if (const py::object given = entry.attr("states"); !given.is_none())
      for (const auto& state : given) states.emplace_back(state);
    for (const auto& given : py::list(entry.attr("scales"))) {
      scales.emplace_back();
      if (!given.is_none()) scales.back().emplace(given);
    }
    if (const py::object given = entry.attr("step"); !given.is_none()) step.emplace(given);
    if (const py::object given = entry.attr("scalar"); !given.is_none()) scalar.emplace(given);
    if (const py::object given = entry.attr("average"); !given.is_none()) average.emplace(given);
    if (const py::object given = entry.attr("exact"); !given.is_none()) exact.emplace(given);
    if (const py::object given = tensor.attr("grad"); !given.is_none()) g.emplace(given);
  }
  FUSED_OPT_FN void prefetch(bool with_states) const {
    p.prefetch(tensor.ptr());
    if (g) g->prefetch(gradient);
    if (!with_states) return;
    for (const Held& held : states) held.prefetch();
    if (step) step->prefetch();
    if (scalar) scalar->prefetch();
  }

  py::object tensor;
  int group;
  bool states_are_new;  // made for the coming step
  bool exclusive;       // no other parameter shares its memory
  bool noisy;           // noise counts its elements in row-major order
  int earlier;          // how often its parameter is stepped before it in the same step
  View p;
  std::vector<Held> states;
  std::vector<std::optional<Held>> scales;  // of states in 8 bits, by state
  std::optional<Held> step, scalar, average, exact;
  std::optional<View> g;         // none: it had no gradient when the bucket was made
  PyObject* gradient = nullptr;  // the last one, which is most often the next one, too: to prefetch, never to follow
  double count = 0, scalar_now = 1;
  bool stepped = false;  // in the last step
  Writes writes;         // since the last step
};

// What is the same on every device.
class Bucket {
 public:
  // As in backends/interface.py.
  Bucket(const py::object& rule, const py::sequence& entries, const py::list& param_groups, const py::dict& state)
      : rule_(check_rule(rule)), seen_(param_groups, state) {
    parameters_.reserve(entries.size());
    for (const auto& entry : entries) {
      Parameter& parameter = parameters_.emplace_back(entry);
      if (!parameter.states.empty() && static_cast<int>(parameter.states.size()) != kRules[rule_].states)
        throw py::value_error("a parameter has " + std::to_string(parameter.states.size()) + " states, and rule '" +
                              kRules[rule_].name + "' takes " + std::to_string(kRules[rule_].states));
      Layer& layer = table_.layers.emplace_back();
      layer.index = entry.attr("index").cast<uint32_t>();
      layer.lr_scale = entry.attr("lr_scale").cast<double>();
      layer.decay_scale = entry.attr("decay_scale").cast<double>();
      if (const py::object layout = entry.attr("layout"); !layout.is_none()) {
        auto& [shard, strides] = shards_.emplace_back();
        strides = layout.attr("strides").cast<std::vector<int64_t>>();
        shard = {layout.attr("offset").cast<int64_t>(), layout.attr("run").cast<int64_t>(),
                 layout.attr("elsewhere").cast<int64_t>(), strides.data()};
        layer.shard = &shard;
      }
    }
    for (size_t t = 0; t < parameters_.size(); ++t) {
      const Parameter& parameter = parameters_[t];
      Tensor tensor;
      tensor.p = parameter.p.operand();
      tensor.numel = parameter.p.numel();
      tensor.ndim = parameter.p.ndim;
      tensor.sizes = parameter.p.sizes();
      // Only of those that are written is anything asked of their layout.
      const bool in_order = !parameter.noisy || parameter.p.contiguous();
      tensor.flat = parameter.p.dense();
      const auto add = [&](const View& view) {
        tensor.flat &= view.same_strides(parameter.p);
        return view.operand();
      };
      for (size_t s = 0; s < parameter.states.size(); ++s) tensor.states[s] = add(parameter.states[s].view);
      for (size_t s = 0; s < parameter.scales.size(); ++s)
        if (parameter.scales[s]) tensor.scales[s] = static_cast<float*>(parameter.scales[s]->view.data);
      if (parameter.average) tensor.average = add(parameter.average->view);
      if (parameter.exact) {
        if (!parameter.exact->view.same_strides(parameter.p))
          throw py::value_error("exact weights must lie in memory as their parameter");
        tensor.exact = parameter.exact->view.operand();
      }
      if (parameter.g) tensor.g = add(*parameter.g);
      if (tensor.flat && !in_order) tensor.flat = walk_as_it_lies(parameter.p, tensor, table_.layers[t]);
      table_.tensors.push_back(tensor);
      everything_.append(parameter.tensor);
    }
    table_.cut();
  }

  // See Bucket.collect_gradients in backends/interface.py.
  py::object collect_gradients(const py::list& param_groups, const std::optional<py::dict>& state) {
    if (!seen_.unchanged(param_groups, state)) return py::none();
    constexpr size_t kAhead = 2;
    keys_.clear();
    rows_.clear();
    active_ = 0;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Parameter& parameter = parameters_[t];
      Tensor& tensor = table_.tensors[t];
      if (t + kAhead < parameters_.size()) parameters_[t + kAhead].prefetch(state.has_value());
      const py::object grad = grad_of(parameter.tensor.ptr());
      parameter.gradient = grad.ptr();
      Layer& layer = table_.layers[t];
      layer.grad_norm2 = layer.part_norms = layer.direction_norm2 = layer.agreeing = kUnknown;
      tensor.active = !grad.is_none();
      if (!tensor.active) continue;
      ++active_;
      if (is_known(layer.weight_norm2) && parameter.writes.by_others(parameter.tensor)) layer.weight_norm2 = kUnknown;
      if (!parameter.g || !is_plain(grad.ptr()) || !parameter.g->matches(grad.ptr(), &tensor.g.data) ||
          !parameter.p.unmoved(parameter.tensor.ptr()) || (state && !states_are_unmoved(parameter)))
        return py::none();
      read_states(parameter);
      // Lazy negations are views of complex numbers, .conj().imag, whose elements have others between them.
      if ((!tensor.flat || tensor.numel == 1) && is_negated(grad.ptr())) return py::none();
      const Key key{parameter.group, parameter.count, parameter.scalar_now, parameter.scalar ? parameter.earlier : 0};
      size_t row = tensor.args;  // most often where it was
      if (row >= keys_.size() || keys_[row] != key) row = row_of(key);
      tensor.args = static_cast<int32_t>(row);
    }
    if (!told_ || keys_ != told_keys_) told_ = py::cast(told_keys_ = keys_);
    return told_;
  }

  // See backends/interface.py: PartNorms or None for every parameter.
  void set_part_norms(const py::sequence& norms) {
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (const py::object known = norms[t]; !known.is_none())
        std::tie(table_.layers[t].part_norms, table_.layers[t].grad_norm2) = known.cast<std::pair<double, double>>();
  }

  // The places of the parameters that are walked element by element, for tests.
  std::vector<size_t> strided() const {
    std::vector<size_t> places;
    for (size_t t = 0; t < table_.tensors.size(); ++t)
      if (!table_.tensors[t].flat) places.push_back(t);
    return places;
  }

  // The states, averages and counts that `run` writes.
  py::list written_states() const {
    py::list list;
    const auto add = [&](const std::optional<Held>& held) {
      if (held) list.append(held->object);
    };
    for (size_t t = 0; t < parameters_.size(); ++t) {
      if (!table_.tensors[t].active) continue;
      for (const Held& state : parameters_[t].states) list.append(state.object);
      for (const std::optional<Held>& held : parameters_[t].scales) add(held);
      add(parameters_[t].step);
      add(parameters_[t].scalar);
      add(parameters_[t].average);
      add(parameters_[t].exact);
    }
    return list;
  }

 protected:
  // Calls `counts`, which counts a write for autograd, with the parameters that a step writes.
  void count_writes(const py::function& counts) const {
    if (active_ == parameters_.size()) {
      counts(everything_);
      return;
    }
    py::list list;
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (table_.tensors[t].active) list.append(parameters_[t].tensor);
    counts(list);
  }

  // Keeps what the next step needs of a parameter that this one has stepped, or not.
  static void remember(Parameter& parameter, Layer& layer, bool stepped) {
    parameter.stepped = stepped;
    if (!stepped) return;
    parameter.states_are_new = false;
    if (!parameter.exclusive) layer.weight_norm2 = kUnknown;
    if (is_known(layer.weight_norm2)) parameter.writes.expect(parameter.tensor);
  }

  // Whether a step's arguments are the objects that were kept last; if not, none are kept any more.
  bool are_kept(const py::list& args) {
    if (args.size() != keys_.size()) throw py::value_error("one StepArgs for every key of collect_gradients()");
    const auto is = [](const auto& given, const auto& kept) { return given.ptr() == kept.ptr(); };
    if (std::equal(args.begin(), args.end(), kept_.begin(), kept_.end(), is)) return true;
    kept_.clear();
    return false;
  }
  void keep(const py::list& args) {
    for (const auto& of_row : args) kept_.push_back(py::reinterpret_borrow<py::object>(of_row));
  }

  // Ratios, and NaN for parameters that the last step has left alone.
  std::vector<double> of_stepped(std::vector<double> ratios) const {
    for (size_t t = 0; t < parameters_.size(); ++t)
      if (!parameters_[t].stepped) ratios[t] = std::numeric_limits<double>::quiet_NaN();
    return ratios;
  }

  // Whether a parameter's states are where they were.
  static bool states_are_unmoved(const Parameter& parameter) {
    const auto unmoved = [](const std::optional<Held>& held) { return !held || held->unmoved(); };
    return std::all_of(parameter.states.begin(), parameter.states.end(), [](const Held& h) { return h.unmoved(); }) &&
           std::all_of(parameter.scales.begin(), parameter.scales.end(), unmoved) && unmoved(parameter.average) &&
           unmoved(parameter.exact) && unmoved(parameter.step) && unmoved(parameter.scalar);
  }

  // Finds out which step of a parameter is to come.
  void read_states(Parameter& parameter) const {
    if (!parameter.step) {
      parameter.count = parameter.states_are_new ? 1 : 2;
      return;
    }
    const View& view = parameter.step->view;
    parameter.count = steps_on_device_                ? kUnknown
                      : view.dtype == DType::kFloat64 ? *static_cast<double*>(view.data) + 1 + parameter.earlier
                                                      : *static_cast<float*>(view.data) + 1.0 + parameter.earlier;
    if (parameter.scalar && !steps_on_device_) parameter.scalar_now = *static_cast<float*>(parameter.scalar->view.data);
  }

  // As StepKey in backends/interface.py.
  using Key = std::tuple<int, double, double, int>;

  // The row of a key.
  size_t row_of(const Key& key) {
    const auto [found, is_new] = rows_.emplace(key, keys_.size());
    if (is_new) keys_.push_back(key);
    return found->second;
  }

  // Puts sizes, and the places that noise is keyed by, into the order of a dense tensor's memory. False: too many
  // elements are in another order.
  bool walk_as_it_lies(const View& p, Tensor& tensor, Layer& layer) {
    const std::vector<int64_t> in_order = p.contiguous_strides();
    const int64_t* in_whole = layer.shard ? layer.shard->strides : in_order.data();
    ShardLayout layout = layer.shard ? *layer.shard : ShardLayout{};
    layout.run = 1;
    std::vector<int64_t> numbers(2 * p.ndim);
    int64_t elements = 1, reach = 0;  // of the innermost dimensions of memory: how many, and how far apart in the whole
    int place = p.ndim;
    for (const int d : p.order()) {
      numbers[--place] = in_whole[d];
      numbers[p.ndim + place] = p.sizes()[d];
      elements *= p.sizes()[d];
      reach += (p.sizes()[d] - 1) * in_whole[d];
      if (!layout.slab && reach == elements - 1 && (elements >= kLeastInSlab || place == 0)) layout.slab = elements;
    }
    if (!layout.slab || layout.slab > kMostInSlab) return false;
    auto& [kept, of_kept] = shards_.emplace_back(layout, std::move(numbers));
    kept.strides = of_kept.data();
    tensor.sizes = of_kept.data() + p.ndim;
    layer.shard = &kept;
    return true;
  }
  static constexpr int64_t kLeastInSlab = 512;  // below, drawing them costs more than what they are

  const int rule_;                // place in kRules
  bool steps_on_device_ = false;  // and so only the device has the count
  std::vector<Parameter> parameters_;
  cpu::Table table_;
  // What `table_` points to: where elements are, strides, and sizes of what is walked in another order.
  std::deque<std::pair<ShardLayout, std::vector<int64_t>>> shards_;
  const Seen seen_;
  std::vector<Key> keys_, told_keys_;
  py::object told_;               // told_keys_ as Python's
  std::map<Key, size_t> rows_;    // where keys_ has a key
  std::vector<py::object> kept_;  // arguments of the step before, where they say the same once more
  size_t active_ = 0;
  py::list everything_;
};

// Parameters that the CPU's kernels step.
class CPUBucket : public Bucket {
 public:
  CPUBucket(const py::object& rule, const py::sequence& entries, const py::list& param_groups, const py::dict& state,
            const std::optional<std::string>& instruction_set)
      : Bucket(rule, entries, param_groups, state) {
    const cpu::InstructionSet* set = cpu::choose(instruction_set ? instruction_set->c_str() : nullptr);
    if (!set) throw py::value_error("this processor does not run the instruction set '" + *instruction_set + "'");
    kernel_ = &set->kernels[rule_];
  }

  double grad_norm2(int threads) {
    py::gil_scoped_release unlocked;
    return cpu::grad_norm2(*kernel_, table_, threads);
  }

  std::vector<std::tuple<double, double, double>> norms(const py::list& args, bool gradients, bool directions,
                                                        int threads) {
    read_args(args);
    {
      py::gil_scoped_release unlocked;
      cpu::norms(*kernel_, table_, gradients, directions, threads);
    }
    std::vector<std::tuple<double, double, double>> found;
    for (const Layer& layer : table_.layers)
      found.emplace_back(layer.weight_norm2, layer.grad_norm2, layer.direction_norm2);
    return found;
  }
  void set_norms(const std::vector<std::tuple<double, double, double>>& norms) {
    for (size_t t = 0; t < parameters_.size(); ++t) {
      Layer& layer = table_.layers[t];
      std::tie(layer.weight_norm2, layer.grad_norm2, layer.direction_norm2) = norms.at(t);
    }
  }

  // counts: see count_writes. Returns the places of the parameters whose trust ratio could not be formed, because a
  // norm is not finite.
  std::vector<size_t> run(const py::list& args, int threads, const py::function& counts) {
    count_writes(counts);
    read_args(args);
    for (size_t t = 0; t < parameters_.size(); ++t) {  // now, while they are in the cache
      Parameter& parameter = parameters_[t];
      if (!table_.tensors[t].active || !parameter.step) continue;
      const View& view = parameter.step->view;
      if (view.dtype == DType::kFloat64)
        *static_cast<double*>(view.data) = parameter.count;
      else
        *static_cast<float*>(view.data) = static_cast<float>(parameter.count);
      if (!parameter.scalar) continue;
      const double* coefficients = table_.args[table_.tensors[t].args].coefficients;
      *static_cast<float*>(parameter.scalar->view.data) =
          static_cast<float>(coefficients[kRules[rule_].coefficients - 1]);
    }
    {
      py::gil_scoped_release unlocked;
      cpu::step(*kernel_, table_, threads);
    }
    std::vector<size_t> not_finite;
    for (size_t t = 0; t < parameters_.size(); ++t) {
      const bool stepped = table_.tensors[t].active;
      if (stepped && !table_.layers[t].finite) not_finite.push_back(t);
      remember(parameters_[t], table_.layers[t], stepped);
    }
    return not_finite;
  }

  std::vector<double> ratios() const {
    std::vector<double> ratios;
    for (const Layer& layer : table_.layers) ratios.push_back(layer.ratio);
    return of_stepped(ratios);
  }

 private:
  void read_args(const py::list& args) {
    if (are_kept(args)) return;
    table_.args.clear();
    for (const auto& of_row : args) table_.args.push_back(read_step_args(of_row, kRules[rule_]));
    keep(args);
  }

  const cpu::Kernel* kernel_;
};

}  // namespace
}  // namespace fused_opt
