// What a step's noise and averages are, from the counts of steps and samples: for devices that keep these, so that a
// step which the host has queued once, in a CUDA graph, goes on when it is replayed. The formulas are those of
// fused_opt/extras/noise.py and averaging.py, in the same order of operations.
#pragma once
#include <cstdint>

#include "noise.h"
#include "table.h"

namespace fused_opt {

enum class Average : int64_t { kNone, kMean, kExponential, kMomentum };  // as Average in backends/interface.py

// As Schedule in backends/interface.py. All words have 8 bytes: buckets compare them as memory.
struct Schedule {
  double sigma = 0;                    // of the noise, before what follows
  int64_t temperature = 0, decay = 0;  // whether it is one, and whether it falls with the steps
  int64_t cycle = 0;                   // steps of a cycle, or 0
  Average average = Average::kNone;
  int64_t start = 0, period = 0, interval = 1;  // period 0: it never ends
  double window = 0, probability = 1, beta = 0;
  uint64_t seed = 0;
  int64_t warmup = 0;  // whether beta rises to what it is
};

// Of a group.
struct Counts {
  int64_t steps = 0, samples = 0, periods = 0;
  int64_t due = 0;  // how many samples are taken in the period of the coming step, where the average needs it
};

// (1 + t)^0.275 by Newton's method for the 40th root of (1 + t)^11, from the logarithm that the bits of a double are:
// additions and multiplications alone have the same bits on every device. To rounding.
FUSED_OPT_FN double annealed(int64_t t) {
  constexpr int64_t kOne = 0x3FF0000000000000;
  const double n = static_cast<double>(t) + 1, n11 = power(n, 11);
  const auto bits = static_cast<double>(__builtin_bit_cast(int64_t, n) - kOne);
  double root = __builtin_bit_cast(double, static_cast<int64_t>(0.275 * bits) + kOne);
  for (int k = 0; k < 8; ++k) root *= (39 + n11 / power(root, 40)) / 40;
  return root;
}

// Of the sample that has n before it.
FUSED_OPT_FN double beta(const Schedule& s, int64_t n) {
  const double rising = static_cast<double>(1 + n) / static_cast<double>(10 + n);
  return s.warmup && rising < s.beta ? rising : s.beta;
}

// Whether a draw of step t succeeds.
FUSED_OPT_FN bool drawn(const Schedule& s, int64_t t) {
  if (s.probability == 1) return true;
  uint64_t c0 = 0, c1 = 0, c2 = 0xFFFFFFFF, c3 = static_cast<uint32_t>(t);
  philox<OneLane>(c0, c1, c2, c3, static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
  return static_cast<double>(static_cast<uint32_t>(c0)) * 0x1p-32 < s.probability;
}

// Whether the weights after step t, counted from 1, are a sample.
FUSED_OPT_FN bool sampled(const Schedule& s, int64_t t) {
  if (s.average == Average::kNone || t <= s.start) return false;
  const int64_t since = t - s.start, left = s.period ? (s.period - since % s.period) % s.period : since;
  return (!s.period || static_cast<double>(left) < s.window) && left % s.interval == 0 && drawn(s, t);
}

// Whether a period that has samples ends with step t.
FUSED_OPT_FN bool ends(const Schedule& s, int64_t t, int64_t samples) {
  return s.period && t > s.start && (t - s.start) % s.period == 0 && samples > 0;
}

// Counts the samples that are due in the period that the coming step is in.
FUSED_OPT_FN void count_due(const Schedule& s, Counts& counts) {
  if (s.average != Average::kMomentum || counts.steps < s.start) return;
  const int64_t last = s.start + ((counts.steps - s.start) / s.period + 1) * s.period;
  const auto floor = static_cast<int64_t>(s.window), steps = floor + (static_cast<double>(floor) < s.window);
  counts.due = 0;
  if (s.probability == 1)
    counts.due = steps ? (steps - 1) / s.interval + 1 : 0;
  else
    for (int64_t back = 0; back < steps; back += s.interval) counts.due += drawn(s, last - back);
}

// What the coming step does.
FUSED_OPT_FN void at_counts(const Schedule& s, const Counts& counts, double lr, StepArgs& args) {
  args.noise_step = static_cast<uint32_t>(counts.steps);
  args.sigma = s.temperature ? square_root(2 * lr * s.sigma) : s.sigma;
  if (s.decay) args.sigma /= annealed(counts.steps);
  if (s.cycle) args.sigma *= 1 - static_cast<double>(counts.steps % s.cycle) / static_cast<double>(s.cycle);
  const int64_t t = counts.steps + 1;
  const bool taken = sampled(s, t), first = counts.samples == 0;
  args.write_back = ends(s, t, counts.samples + taken);
  args.add = args.share = 0;
  args.restart = false;
  if (!taken) return;
  const auto due = static_cast<double>(counts.due);
  switch (s.average) {
    case Average::kNone:
      break;
    case Average::kMean:
      args.add = 1 / static_cast<double>(counts.samples + 1);
      args.share = 1;
      args.restart = first;
      break;
    case Average::kExponential:
      args.restart = first && counts.periods == 0;
      args.add = args.restart ? 1 : 1 - beta(s, counts.samples);
      args.share = 1;
      break;
    case Average::kMomentum:
      args.restart = first && counts.periods == 0;
      args.add = (counts.periods == 0 ? 1 : 1 - s.beta) / due;
      args.share = first && counts.periods != 0 ? due : 0;
      break;
  }
}

// Counts it.
FUSED_OPT_FN void advance(const Schedule& s, Counts& counts) {
  const int64_t t = ++counts.steps;
  counts.samples += sampled(s, t);
  if (ends(s, t, counts.samples)) {
    counts.samples = 0;
    ++counts.periods;
  }
  if (s.average == Average::kMomentum && t >= s.start && (t - s.start) % s.period == 0) count_due(s, counts);
}

}  // namespace fused_opt
