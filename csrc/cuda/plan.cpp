#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fused_opt::cuda {

Mirror::Mirror(const Machine& machine, size_t bytes)
    : machine_(machine),
      now_(bytes),
      last_(bytes),
      device_(static_cast<char*>(machine.allocate(bytes))),
      staging_(machine.stage(bytes)) {}

Mirror::~Mirror() {
  if (captured_) return;  // the graph reads it for as long as it lives, and nobody says how long that is
  machine_.release(device_);
  machine_.unstage(staging_);
}

void Mirror::follow(size_t bytes, void* stream) {
  captured_ |= machine_.capturing(stream);
  size_t first = 0, last = bytes;
  if (!captured_) {
    const auto same = [&](size_t at) { return !std::memcmp(&now_[at], &last_[at], 8); };
    while (first < last && same(first)) first += 8;
    while (last > first && same(last - 8)) last -= 8;
  }
  if (first == last) return;
  machine_.upload(staging_, device_ + first, &now_[first], last - first, stream);
  std::memcpy(&last_[first], &now_[first], last - first);
}

namespace {

// Places tables of 8-byte words one after the other.
struct Places {
  char* base = nullptr;
  size_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(base + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(T) + 7) / 8 * 8;
    return place;
  }
};

size_t step_bytes(size_t count) {
  return count * (sizeof(Now) + sizeof(Row));
}

}  // namespace

Plan::Plan(const Machine& machine, const char* rule, bool wide, const std::vector<Tensor>& tensors,
           const std::vector<Layer>& layers, const std::vector<float*>& steps)
    : machine_(machine),
      rule_(rule_index(rule)),
      wide_(wide),
      count_(static_cast<int64_t>(tensors.size())),
      sums_(machine, step_bytes(tensors.size())),
      step_(machine, step_bytes(tensors.size())) {
  std::vector<int64_t> first(1, 0);
  for (const Tensor& tensor : tensors) first.push_back(first.back() + pieces_of(tensor.numel));
  pieces_ = first.back();

  // Sizes and strides of those that are not flat go along: every operand has strides.
  int64_t layout_words = 0;
  for (const Tensor& tensor : tensors)
    if (!tensor.flat) layout_words += (4 + kMaxStates) * tensor.ndim;
  Entry* entries = nullptr;
  int64_t *firsts = nullptr, *layouts = nullptr;
  Places places;
  const auto place = [&] {
    places.bytes = 0;
    entries = places.take<Entry>(count_);
    firsts = places.take<int64_t>(count_ + 1);
    layouts = places.take<int64_t>(layout_words);
    fixed_.norms = places.take<Norms>(count_);
    fixed_.partial = places.take<Norms>(pieces_);
    fixed_.ratios = places.take<double>(count_);
    fixed_.arrived = places.take<uint64_t>(count_ + 1);
    norm2_ = places.take<double>(1);
  };
  place();
  memory_ = static_cast<char*>(machine.allocate(places.bytes));
  places.base = memory_;
  place();
  fixed_.entries = entries;
  fixed_.first = firsts;
  fixed_.count = count_;
  fixed_.pieces = pieces_;

  std::vector<Entry> filled(tensors.size());
  std::vector<int64_t> words;
  for (size_t t = 0; t < tensors.size(); ++t) {
    Entry& entry = filled[t];
    entry = {tensors[t], layers[t], steps[t]};
    if (tensors[t].flat) continue;
    const auto relocate = [&](const int64_t*& from) {
      if (!from) return;
      const int64_t* to = layouts + words.size();
      words.insert(words.end(), from, from + tensors[t].ndim);
      from = to;
    };
    relocate(entry.tensor.sizes);
    for (Operand* operand : {&entry.tensor.p, &entry.tensor.g, &entry.tensor.average}) relocate(operand->strides);
    for (Operand& state : entry.tensor.states) relocate(state.strides);
  }
  const auto copy = [&](const auto& from, void* to) {
    if (from.empty()) return;
    const size_t bytes = from.size() * sizeof from[0];
    Staging* staging = machine.stage(bytes);
    machine.upload(staging, to, from.data(), bytes, nullptr);
    double done;
    machine.download(&done, norm2_, sizeof done, nullptr);  // the stream of the steps may be another one
    machine.unstage(staging);
  };
  copy(filled, entries);
  copy(first, firsts);
  copy(words, layouts);
  copy(std::vector<double>(tensors.size(), 1), fixed_.ratios);
}

Plan::~Plan() {
  if (!sums_.captured() && !step_.captured()) machine_.release(memory_);
}

Launch Plan::launch(Mirror& mirror, const std::vector<Tensor>& tensors, const std::vector<Layer>& layers,
                    const std::vector<Row>& rows, const Signals& signals, void* stream, bool* any, bool gradients) {
  auto* now = reinterpret_cast<Now*>(mirror.now());
  Launch launch = fixed_;
  launch.signals = signals;
  for (size_t t = 0; t < tensors.size(); ++t) {
    now[t] = Now();
    if (!tensors[t].active) continue;
    ++launch.active;
    Layer layer = layers[t];
    now[t].g = tensors[t].g.data;
    now[t].row = gradients ? 0 : tensors[t].group;
    now[t].part_norms = layer.part_norms;
    now[t].grad_norm2 = layer.grad_norm2;
    if (summed_ && layer.grad_norm2 == -1) layer.grad_norm2 = 0;  // on the device
    const Wanted sums = wanted(tensors[t], rows[now[t].row].group, layer);
    const bool grad = gradients ? layer.grad_norm2 == -1 : sums.grad;
    now[t].wanted = sums.weight * kWeight | grad * kGrad | sums.direction * kDirection;
    *any |= now[t].wanted != 0;
  }
  char* of_rows = mirror.now() + tensors.size() * sizeof(Now);
  std::memcpy(of_rows, rows.data(), rows.size() * sizeof(Row));
  if (launch.active) mirror.follow(tensors.size() * sizeof(Now) + rows.size() * sizeof(Row), stream);
  launch.now = reinterpret_cast<const Now*>(mirror.device());
  launch.rows = reinterpret_cast<const Row*>(mirror.device() + tensors.size() * sizeof(Now));
  return launch;
}

void Plan::sum_gradients(const std::vector<Tensor>& tensors, const std::vector<Layer>& layers, const Signals& signals,
                         bool add, void* stream) {
  bool any = false;
  summed_ = false;
  Launch launch = this->launch(sums_, tensors, layers, {Row()}, {}, stream, &any, true);
  launch.signals.norm2 = signals.norm2;
  launch.total = true;
  launch.add = add;
  launch.ratios = nullptr;
  summed_ = true;
  if (launch.active) return machine_.norms(rule_, wide_, launch, stream);
  if (!add) machine_.clear(signals.norm2, sizeof(double), stream);
}

double Plan::grad_norm2(const std::vector<Tensor>& tensors, const std::vector<Layer>& layers, void* stream) {
  Signals signals;
  signals.norm2 = norm2_;
  sum_gradients(tensors, layers, signals, false, stream);
  double norm2;
  machine_.download(&norm2, norm2_, sizeof norm2, stream);
  return norm2;
}

void Plan::run(const std::vector<Tensor>& tensors, std::vector<Layer>& layers, const std::vector<Row>& rows,
               const Signals& signals, void* stream) {
  for (const Row& row : rows)
    if ((row.group.sigma != 0 || averages(row.group)) && machine_.capturing(stream))
      throw std::runtime_error(
          "a step with noise or averaging cannot be captured in a CUDA graph: every replay would draw the same "
          "numbers, or "
          "take the same sample. Step outside of the graph, or set noise and averaging of the groups to None");
  bool any = false;
  Launch launch = this->launch(step_, tensors, layers, rows, signals, stream, &any, false);
  summed_ = false;
  if (!launch.active) return;
  if (any) {
    Launch sums = launch;
    sums.ratios = nullptr;
    machine_.norms(rule_, wide_, sums, stream);
  }
  machine_.update(rule_, wide_, launch, stream);
  for (size_t t = 0; t < tensors.size(); ++t)
    if (tensors[t].active) layers[t].weight_norm2 = carries_norm(tensors[t], rows[tensors[t].group].group) ? 0 : -1;
}

std::vector<double> Plan::ratios(void* stream) const {
  std::vector<double> ratios(count_);
  if (count_) machine_.download(ratios.data(), fixed_.ratios, ratios.size() * sizeof(double), stream);
  return ratios;
}

int64_t scratch_words(int64_t numel) {
  return 3 + pieces_of(numel) * static_cast<int64_t>(sizeof(Norms) / 8);  // the sums, a counter, partial sums
}

void accumulate(const Machine& machine, const Tensor& tensor, void* scratch, void* stream) {
  auto* words = static_cast<double*>(scratch);
  Accumulation work{tensor, pieces_of(tensor.numel), reinterpret_cast<Norms*>(words + 3), words,
                    reinterpret_cast<uint64_t*>(words + 2)};
  machine.accumulate(tensor.g.dtype == DType::kFloat64, work, stream);
}

}  // namespace fused_opt::cuda
