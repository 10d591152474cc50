#include "bucket.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fused_opt::cuda {

DeviceBuffer::DeviceBuffer(const Machine& machine, size_t bytes)
    : machine_(machine),
      now_(bytes),
      last_(bytes),
      device_(static_cast<char*>(machine.allocate(bytes)), {&machine}),
      staging_(machine.stage(bytes), {&machine}) {}

DeviceBuffer::~DeviceBuffer() {
  if (!captured_) return;
  device_.release();  // never freed: the graph reads it, and its lifetime is not known
  staging_.release();
}

void DeviceBuffer::sync(size_t bytes, void* stream) {
  captured_ |= machine_.capturing(stream);
  size_t first = 0, last = bytes;
  if (!captured_) {
    if (!std::memcmp(now_.data(), last_.data(), bytes)) return;
    const auto same = [&](size_t at) { return !std::memcmp(&now_[at], &last_[at], 8); };
    while (first < last && same(first)) first += 8;
    while (last > first && same(last - 8)) last -= 8;
  }
  if (first == last) return;
  machine_.upload(staging_.get(), device() + first, &now_[first], last - first, stream);
  std::memcpy(&last_[first], &now_[first], last - first);
}

namespace {

// Lays out tables of 8-byte words one after the other.
struct Layout {
  char* base = nullptr;
  size_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    T* table = reinterpret_cast<T*>(base + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(T) + 7) / 8 * 8;
    return table;
  }
};

size_t step_bytes(size_t count) {
  return count * (sizeof(Now) + sizeof(Row));
}

constexpr int64_t kShardWords = sizeof(ShardLayout) / sizeof(int64_t);

Wanted unknown_gradient(const Layer& layer) {
  return is_known(layer.grad_norm2) ? 0 : kGradient;
}

}  // namespace

Bucket::Bucket(const Machine& machine, const char* rule, bool wide, const std::vector<Tensor>& tensors,
               const std::vector<Layer>& layers, const std::vector<float*>& steps, const std::vector<float*>& scalars,
               int groups)
    : machine_(machine),
      rule_(rule_index(rule)),
      wide_(wide),
      count_(static_cast<int64_t>(tensors.size())),
      memory_(nullptr, {&machine}),
      sums_(machine, step_bytes(tensors.size())),
      step_(machine, step_bytes(tensors.size())),
      counts_(groups),
      schedules_(groups),
      counts_staging_(machine.stage(sizeof(Counts)), {&machine}),
      told_(machine.share(tensors.size()), {&machine}) {
  std::vector<int64_t> first(1, 0);
  for (const Tensor& tensor : tensors) first.push_back(first.back() + chunks_of(tensor.numel));
  chunks_ = first.back();

  // Sizes and strides of those that are not flat are copied as well: every operand has strides. So is where shards lie.
  int64_t layout_words = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (!tensors[t].flat) layout_words += (4 + kMaxStates) * tensors[t].ndim;
    if (layers[t].shard) layout_words += 2 * tensors[t].ndim + kShardWords;
  }
  Entry* entries = nullptr;
  int64_t *firsts = nullptr, *layouts = nullptr;
  Layout layout;
  const auto lay_out = [&] {
    layout.bytes = 0;
    entries = layout.take<Entry>(count_);
    firsts = layout.take<int64_t>(count_ + 1);
    layouts = layout.take<int64_t>(layout_words);
    fixed_.norms = layout.take<Norms>(count_);
    fixed_.partial = layout.take<Norms>(chunks_);
    fixed_.ratios = layout.take<double>(count_);
    fixed_.agreeing = layout.take<double>(count_);
    fixed_.arrived = layout.take<uint64_t>(count_ + 1);
    fixed_.counts = layout.take<Counts>(groups);
    fixed_.stale = layout.take<uint64_t>(count_);
    norm2_ = layout.take<double>(1);
  };
  lay_out();
  memory_.reset(static_cast<char*>(machine.allocate(layout.bytes)));
  layout.base = memory_.get();
  lay_out();
  fixed_.entries = entries;
  fixed_.first = firsts;
  fixed_.count = count_;
  fixed_.told = told_.get();
  fixed_.chunks = chunks_;

  std::vector<Entry> filled(tensors.size());
  std::vector<int64_t> words;
  for (size_t t = 0; t < tensors.size(); ++t) {
    Entry& entry = filled[t];
    entry = {tensors[t], layers[t], steps[t], scalars.empty() ? nullptr : scalars[t]};
    const auto place = [&](const int64_t* from, int64_t n) {
      words.insert(words.end(), from, from + n);
      return layouts + words.size() - n;
    };
    const auto relocate = [&](const int64_t*& from) {
      if (from) from = place(from, tensors[t].ndim);
    };
    if (!tensors[t].flat || entry.layer.shard) relocate(entry.tensor.sizes);
    if (entry.layer.shard) {
      ShardLayout shard = *entry.layer.shard;
      relocate(shard.strides);
      int64_t of_shard[kShardWords];
      std::memcpy(of_shard, &shard, sizeof shard);
      entry.layer.shard = reinterpret_cast<const ShardLayout*>(place(of_shard, kShardWords));
    }
    if (tensors[t].flat) continue;
    for (Operand* operand : {&entry.tensor.p, &entry.tensor.g, &entry.tensor.average}) relocate(operand->strides);
    for (Operand& state : entry.tensor.states) relocate(state.strides);
  }
  const auto copy = [&](const auto& from, void* to) {
    if (from.empty()) return;
    const size_t bytes = from.size() * sizeof from[0];
    const Owned<Staging> staging(machine.stage(bytes), {&machine});
    machine.upload(staging.get(), to, from.data(), bytes, nullptr);
    double done;
    machine.download(&done, norm2_, sizeof done, nullptr);  // the stream of the steps may be another one
  };
  copy(filled, entries);
  copy(first, firsts);
  copy(words, layouts);
  copy(std::vector<double>(tensors.size(), 1), fixed_.ratios);
}

Bucket::~Bucket() {
  if (!sums_.captured() && !step_.captured()) {
    memory_.reset();  // waits for the GPU, which writes told_
    return;
  }
  memory_.release();
  told_.release();
}

// `wants(tensor, args, layer)`: the norms that are to be summed first.
template <class Wants>
Launch Bucket::launch(DeviceBuffer& buffer, const std::vector<Tensor>& tensors, const std::vector<Layer>& layers,
                      const std::vector<Row>& rows, const DeviceScalars& scalars, void* stream,
                      std::pair<Wanted, Wanted>* passes, const Wants& wants) {
  if (rows.size() > tensors.size()) throw std::invalid_argument("more rows of arguments than tensors");
  auto* now = reinterpret_cast<Now*>(buffer.now());
  const bool capturing = machine_.capturing(stream);
  Launch launch = fixed_;
  launch.scalars = scalars;
  launch.known = launch.norms;
  bool any = false, scaled_directions = false;
  for (size_t t = 0; t < tensors.size(); ++t) {
    now[t] = Now();
    if (!tensors[t].active) continue;
    ++launch.active;
    now[t].g = tensors[t].g.data;
    Layer layer = layers[t];
    now[t].row = rows.size() == 1 ? 0 : tensors[t].args;
    now[t].part_norms = layer.part_norms;
    now[t].grad_norm2 = layer.grad_norm2;
    if (__atomic_load_n(&told_.get()[t], __ATOMIC_RELAXED)) layer.weight_norm2 = kUnknown;
    now[t].wanted = wants(tensors[t], rows[now[t].row].args, layer) & ~summed_;
    // In a graph the device decides, at every replay, whether the weights must be summed first.
    any |= now[t].wanted != 0 || (capturing && carries_norm(tensors[t], rows[now[t].row].args));
    scaled_directions |= needs_scaled_direction(now[t].wanted);
  }
  *passes = any ? fused_opt::passes(scaled_directions) : std::pair(Wanted{0}, Wanted{0});
  if (!launch.active) return launch;
  char* of_rows = buffer.now() + tensors.size() * sizeof(Now);
  std::memcpy(of_rows, rows.data(), rows.size() * sizeof(Row));
  buffer.sync(tensors.size() * sizeof(Now) + rows.size() * sizeof(Row), stream);
  launch.now = reinterpret_cast<const Now*>(buffer.device());
  launch.rows = reinterpret_cast<const Row*>(buffer.device() + tensors.size() * sizeof(Now));
  return launch;
}

void Bucket::sum_gradients(const std::vector<Tensor>& tensors, const std::vector<Layer>& layers,
                           const DeviceScalars& scalars, bool add, void* stream) {
  std::pair<Wanted, Wanted> passes;
  summed_ = 0;
  if (tensors.empty()) {
    if (!add) machine_.clear(scalars.norm2, sizeof(double), stream);
    return;
  }
  Launch launch =
      this->launch(sums_, tensors, layers, {Row()}, {}, stream, &passes,
                   [](const Tensor&, const StepArgs&, const Layer& layer) { return unknown_gradient(layer); });
  launch.scalars.norm2 = scalars.norm2;
  launch.total = true;
  launch.add = add;
  launch.ratios = nullptr;
  summed_ = kGradient;
  if (launch.active) return machine_.norms(rule_, wide_, launch, stream);
  if (!add) machine_.clear(scalars.norm2, sizeof(double), stream);
}

double Bucket::grad_norm2(const std::vector<Tensor>& tensors, const std::vector<Layer>& layers, void* stream) {
  DeviceScalars scalars;
  scalars.norm2 = norm2_;
  sum_gradients(tensors, layers, scalars, false, stream);
  double norm2;
  machine_.download(&norm2, norm2_, sizeof norm2, stream);
  return norm2;
}

void Bucket::sum_norms(const std::vector<Tensor>& tensors, const std::vector<Layer>& layers,
                       const std::vector<Row>& rows, const DeviceScalars& scalars, bool gradients, bool directions,
                       void* stream) {
  std::pair<Wanted, Wanted> passes;
  Launch launch = this->launch(sums_, tensors, layers, rows, scalars, stream, &passes,
                               [&](const Tensor& tensor, const StepArgs& args, const Layer& layer) {
                                 return (wanted(tensor, args, layer) & ~(directions ? 0 : kDirection)) |
                                        (gradients ? unknown_gradient(layer) : 0);
                               });
  launch.ratios = nullptr;
  launch.among = passes.first;  // a mask of a shard is not scaled
  if (passes.first) machine_.norms(rule_, wide_, launch, stream);
  summed_ |= kWeight | kGradient | (directions ? kDirection : 0);
}

void Bucket::run(const std::vector<Tensor>& tensors, std::vector<Layer>& layers, const std::vector<Row>& rows,
                 const DeviceScalars& scalars, void* stream, const Norms* known) {
  for (const Row& row : rows)
    if (row.group < 0 && (row.args.sigma != 0 || averages(row.args)) && machine_.capturing(stream))
      throw std::runtime_error(
          "a step whose noise or averaging is a class of your own, or ScheduleFree, cannot be captured in a CUDA "
          "graph: "
          "every replay would repeat what Python computed for this step. The others of fused_opt are computed on the "
          "GPU, and can be; or step outside of the graph");
  std::pair<Wanted, Wanted> passes;
  Launch launch = this->launch(step_, tensors, layers, rows, scalars, stream, &passes, wanted);
  summed_ = 0;
  if (!launch.active) return;
  for (const Wanted among : {passes.first, passes.second}) {
    if (!among) continue;
    Launch sums = launch;
    sums.ratios = nullptr;
    sums.among = among;
    machine_.norms(rule_, wide_, sums, stream);
  }
  if (std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.advances; }))
    launch.counting = static_cast<int64_t>(rows.size());
  if (known) launch.known = known;
  launch.rounds = std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.args.stochastic; });
  machine_.update(rule_, wide_, launch, stream);
  for (const Row& row : rows)
    if (row.advances && !machine_.capturing(stream)) advance(row.schedule, counts_[row.group]);
  for (size_t t = 0; t < tensors.size(); ++t)
    if (tensors[t].active) layers[t].weight_norm2 = carries_norm(tensors[t], rows[tensors[t].args].args) ? 0 : kUnknown;
}

std::vector<double> Bucket::ratios(void* stream) const {
  std::vector<double> ratios(count_);
  if (count_) machine_.download(ratios.data(), fixed_.ratios, ratios.size() * sizeof(double), stream);
  return ratios;
}

void Bucket::set_counts(int group, const Schedule& schedule, const Counts& now, void* stream) {
  Counts& known = counts_[group];
  if (known.steps == now.steps && known.samples == now.samples && known.periods == now.periods &&
      !std::memcmp(&schedules_[group], &schedule, sizeof schedule))
    return;
  if (machine_.capturing(stream))
    throw std::runtime_error(
        "a step with noise or averaging is captured in a CUDA graph, and what it counts was changed since the last "
        "step: "
        "the graph would set it back in every replay. Step once outside of the graph before the capture");
  known = now;
  schedules_[group] = schedule;
  count_due(schedule, known);
  machine_.upload(counts_staging_.get(), fixed_.counts + group, &known, sizeof known, stream);
}

std::vector<Counts> Bucket::counts(void* stream) {
  std::vector<Counts> found(counts_.size());
  machine_.download(found.data(), fixed_.counts, found.size() * sizeof(Counts), stream);
  for (size_t g = 0; g < found.size(); ++g) {
    const int64_t known = counts_[g].steps;
    counts_[g] = found[g];
    found[g].steps -= known;
  }
  return found;
}

int64_t scratch_words(int64_t numel) {
  return 3 + chunks_of(numel) * static_cast<int64_t>(sizeof(Norms) / 8);  // the sums, a counter, partial sums
}

void accumulate(const Machine& machine, const Tensor& tensor, void* scratch, void* stream) {
  auto* words = static_cast<double*>(scratch);
  Accumulation work{tensor, chunks_of(tensor.numel), reinterpret_cast<Norms*>(words + 3), words,
                    reinterpret_cast<uint64_t*>(words + 2)};
  machine.accumulate(sums_in_float64(tensor), work, stream);
}

}  // namespace fused_opt::cuda
