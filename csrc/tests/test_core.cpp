// Tests of the core without Python. Run by ctest; tests/test_cpp.py builds and runs them under sanitizers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/step.h"
#include "../noise.h"
#include "../types.h"
#include "check.h"

using namespace fused_opt;

namespace {

// A model of float32 tensors with the states of a rule, all flat.
struct Model {
  std::vector<std::vector<float>> p, g, states[kMaxStates], average;
  cpu::Table table;

  Model(const std::vector<size_t>& sizes, int count) {
    for (auto* all : {&p, &g, &average}) all->reserve(sizes.size());
    for (size_t t = 0; t < sizes.size(); ++t) {
      p.push_back(randn(sizes[t], 3 * t));
      g.push_back(randn(sizes[t], 3 * t + 1));
      average.emplace_back(sizes[t]);
      Tensor tensor;
      tensor.p.data = p[t].data();
      tensor.g.data = g[t].data();
      tensor.average.data = average[t].data();
      tensor.ndim = 2;
      tensor.numel = static_cast<int64_t>(sizes[t]);
      tensor.active = true;
      for (int s = 0; s < count; ++s) {
        states[s].emplace_back(sizes[t]);
        tensor.states[s].data = states[s].back().data();
      }
      table.tensors.push_back(tensor);
      table.layers.emplace_back();
      table.layers.back().index = static_cast<uint32_t>(t);
    }
    table.args.resize(1);
    table.cut();
  }
};

const std::vector<size_t> kSizes = {0, 1, 7, 511, 512, 513, 16383, 16384, 16385, 70000};

void philox_known_answers() {
  const uint32_t cases[][10] = {
      // counter, key, words: Random123's known-answer file
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1},
  };
  for (const auto& c : cases) {
    uint64_t w[4] = {c[0], c[1], c[2], c[3]};
    philox<OneLane>(w[0], w[1], w[2], w[3], c[4], c[5]);
    for (int k = 0; k < 4; ++k) CHECK(static_cast<uint32_t>(w[k]) == c[6 + k]);
  }
}

void box_muller_is_exact_to_float32() {
  std::mt19937 generator(0);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t w0 = i < 10   ? static_cast<uint32_t>(i) << 8
                        : i < 20 ? ~(static_cast<uint32_t>(i - 10) << 8)
                                 : generator();
    const uint32_t w1 = generator();
    float z0, z1;
    box_muller(w0, w1, z0, z1);
    const double r = std::sqrt(-2 * std::log(((w0 >> 9) + 0.5) * 0x1p-23));
    const double angle = static_cast<int32_t>(w1 << 2) * 0x1p-32 * 1.5707963267948966;
    double c = r * std::cos(angle) * (w1 >> 31 ? -1 : 1), s = r * std::sin(angle);
    if (w1 >> 30 & 1) std::swap(c, s);
    CHECK(std::fabs(z0 - c) <= 3e-7 * (1 + r));
    CHECK(std::fabs(z1 - s) <= 3e-7 * (1 + r));
  }
}

void every_instruction_set_draws_the_same_noise() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    const uint64_t begin = (uint64_t{1} << 32) - 100;  // both words of the counter
    std::vector<float> z(4 * 256);
    set.normal(0x123456789ABCDEF0, 5, 6, begin, 256, z.data());
    for (uint64_t k = 0; k < 256; ++k) {
      uint64_t w[4] = {(begin + k) & 0xFFFFFFFF, (begin + k) >> 32, 5, 6};
      philox<OneLane>(w[0], w[1], w[2], w[3], 0x9ABCDEF0, 0x12345678);
      for (int pair = 0; pair < 2; ++pair) {
        float z0, z1;
        box_muller(static_cast<uint32_t>(w[2 * pair]), static_cast<uint32_t>(w[2 * pair + 1]), z0, z1);
        CHECK(std::fabs(z[4 * k + 2 * pair] - z0) < 2e-6f);
        CHECK(std::fabs(z[4 * k + 2 * pair + 1] - z1) < 2e-6f);
      }
    }
  }
}

// Of a shard whose places go beyond 2^32 in the middle of a block.
void every_instruction_set_rounds_by_the_same_bits() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    Model model({1000}, 0);
    std::vector<BFloat16> p(1000);
    const ShardLayout shard{(int64_t{1} << 32) - 300, 1000};
    model.table.tensors[0].p = {p.data(), DType::kBFloat16};
    model.table.layers[0].shard = &shard;
    StepArgs& args = model.table.args[0];
    args.lr = 1;
    args.stochastic = true;
    args.rounding_seed = 0x123456789ABCDEF0;
    args.noise_step = 6;
    cpu::step(kernel_of(set, "sgd"), model.table, 2);
    const RoundingKey key = rounding_key({args.rounding_seed, 0, 6}, 0);
    for (size_t i = 0; i < p.size(); ++i) {
      const uint32_t word = rounding_word(shard.offset + static_cast<int64_t>(i), key);
      CHECK(p[i].bits == narrow_at_random<BFloat16>(-model.g[0][i], rounding_bits(word, 0)).bits);
    }
  }
}

// The step against the rule applied to one element at a time.
void a_step_is_the_rule_applied_to_every_element() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    Model model(kSizes, 2), expected(kSizes, 2);
    StepArgs& args = model.table.args[0];
    args.lr = 0.1;
    args.grad_scale = -0.5;
    args.coupled_decay = 0.02;
    args.decoupled_decay = 0.01;
    const double coefficients[] = {0.1, 0.999, 0.001, 10, 31.6, 1e-8};
    std::memcpy(args.coefficients, coefficients, sizeof coefficients);
    for (int repeat = 0; repeat < 2; ++repeat) {
      cpu::step(kernel_of(set, "adam"), model.table, 2);
      const Adam<float> adam{0.1f, 0.999f, 0.001f, 10, 31.6f, 1e-8f};
      for (size_t t = 0; t < kSizes.size(); ++t)
        for (size_t i = 0; i < kSizes[t]; ++i) {
          float& p = expected.p[t][i];
          const float g = -0.5f * expected.g[t][i] + 0.02f * p;
          p -= 0.1f * (adam(g, expected.states[0][t][i], expected.states[1][t][i]) + 0.01f * p);
          CHECK(std::fabs(model.p[t][i] - p) <= 1e-6f * (1 + std::fabs(p)));
          CHECK(std::fabs(model.states[1][t][i] - expected.states[1][t][i]) <= 1e-7f);
        }
    }
  }
}

void threads_change_no_bit() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    std::vector<std::vector<float>> results[2];
    for (int threads : {1, 3}) {
      Model model(kSizes, 1);
      StepArgs& args = model.table.args[0];
      args.lr = 0.1;
      args.coupled_decay = 0.1;
      args.coefficients[0] = 0.9;
      args.coefficients[1] = 1;
      args.kind = Kind::kLARS;
      args.cap = 10;
      args.sigma = 0.1;
      args.relative = true;
      args.add = 0.5;
      args.share = 1;
      for (int repeat = 0; repeat < 3; ++repeat) {
        for (Layer& layer : model.table.layers) layer.grad_norm2 = -1;
        cpu::grad_norm2(kernel_of(set, "momentum_sgd"), model.table, threads);
        cpu::step(kernel_of(set, "momentum_sgd"), model.table, threads);
      }
      results[threads == 3] = model.p;
      results[threads == 3].insert(results[threads == 3].end(), model.average.begin(), model.average.end());
    }
    CHECK(results[0] == results[1]);
  }
}

void a_carried_norm_is_the_norm_of_what_was_stored() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    Model model(kSizes, 0);
    StepArgs& args = model.table.args[0];
    args.lr = 0.1;
    args.kind = Kind::kCLARS;
    args.cap = 10;
    cpu::step(kernel_of(set, "sgd"), model.table, 2);
    for (size_t t = 0; t < kSizes.size(); ++t) {
      if (!kSizes[t]) continue;
      double sum = 0;
      for (float p : model.p[t]) sum += static_cast<double>(p) * p;
      CHECK(std::fabs(model.table.layers[t].weight_norm2 - sum) <= 1e-12 * sum);
      const double carried = model.table.layers[t].weight_norm2;
      model.table.layers[t].weight_norm2 = -1;
      model.table.layers[t].grad_norm2 = -1;
      args.lr = 0;
      cpu::step(kernel_of(set, "sgd"), model.table, 1);  // sums anew, bit for bit
      CHECK(model.table.layers[t].weight_norm2 == carried);
      args.lr = 0.1;
    }
  }
}

void strides_and_narrow_types() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    // p is the transpose of a 37 x 53 matrix in bfloat16, g a matrix in row-major order in float32.
    const int64_t sizes[] = {53, 37}, transposed[] = {1, 53}, contiguous[] = {37, 1};
    std::vector<uint16_t> p(37 * 53);
    std::vector<float> g = randn(p.size(), 1);
    const auto widen = [](uint16_t bits) {
      const uint32_t word = static_cast<uint32_t>(bits) << 16;
      float value;
      std::memcpy(&value, &word, sizeof value);
      return value;
    };
    for (size_t i = 0; i < p.size(); ++i) p[i] = static_cast<uint16_t>(0x3F80 + i % 128);  // 1 to 2
    const std::vector<uint16_t> before = p;
    cpu::Table table;
    Tensor tensor;
    tensor.p = {p.data(), DType::kBFloat16, transposed};
    tensor.g = {g.data(), DType::kFloat32, contiguous};
    tensor.numel = 37 * 53;
    tensor.flat = false;
    tensor.ndim = 2;
    tensor.sizes = sizes;
    tensor.active = true;
    table.tensors.push_back(tensor);
    table.layers.resize(1);
    table.args.resize(1);
    table.args[0].lr = 0.25;
    table.cut();
    cpu::step(kernel_of(set, "sgd"), table, 2);
    for (int64_t i = 0; i < sizes[0]; ++i)
      for (int64_t j = 0; j < sizes[1]; ++j) {
        const float exact = widen(before[i + 53 * j]) - 0.25f * g[37 * i + j];
        CHECK(std::fabs(widen(p[i + 53 * j]) - exact) <= std::fabs(exact) * 0x1p-8f);
      }
  }
}

void accumulate_adds_and_sums_both_squares() {
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    std::vector<float> total = randn(50001, 0), part = randn(50001, 1), before = total;
    Tensor tensor;
    tensor.p.data = total.data();
    tensor.g.data = part.data();
    tensor.numel = 50001;
    const cpu::Sums sums = cpu::accumulate(set, tensor, 2);
    double part2 = 0, total2 = 0;
    for (size_t i = 0; i < part.size(); ++i) {
      CHECK(total[i] == before[i] + part[i]);
      part2 += static_cast<double>(part[i]) * part[i];
      total2 += static_cast<double>(total[i]) * total[i];
    }
    CHECK(std::fabs(sums.part2 - part2) <= 1e-12 * part2);
    CHECK(std::fabs(sums.total2 - total2) <= 1e-12 * total2);
  }
}

// A matrix of 37 x 129, and the same one cut into boxes of rows and columns, one of them empty: what they draw and,
// told the norms of the whole, where they step, does not depend on the cut.
void shards_step_as_the_whole() {
  constexpr int64_t kRows = 37, kColumns = 129,
                    kBoxes[][4] = {
                        {0, 5, 0, kColumns},  // first row and the one after the last, columns likewise
                        {5, 5, 0, kColumns},
                        {5, kRows, 0, 50},
                        {5, kRows, 50, kColumns},
                    };
  const int64_t strides[] = {kColumns, 1};
  for (const Kind kind : {Kind::kNone, Kind::kLARS, Kind::kLAMB}) {
    Model whole({kRows * kColumns}, 1);
    std::vector<size_t> numels;
    for (const auto& box : kBoxes) numels.push_back(static_cast<size_t>((box[1] - box[0]) * (box[3] - box[2])));
    Model cut(numels, 1);
    int64_t sizes[4][2];
    ShardLayout shards[4];
    const auto each = [&](size_t b, const auto& f) {
      const auto& box = kBoxes[b];
      for (int64_t i = 0; i < sizes[b][0] * sizes[b][1]; ++i)
        f(static_cast<size_t>(i),
          static_cast<size_t>((box[0] + i / sizes[b][1]) * kColumns + box[2] + i % sizes[b][1]));
    };
    for (size_t b = 0; b < 4; ++b) {
      const auto& box = kBoxes[b];
      sizes[b][0] = box[1] - box[0];
      sizes[b][1] = box[3] - box[2];
      cut.table.tensors[b].sizes = sizes[b];
      Layer& layer = cut.table.layers[b];
      layer.index = 0;
      layer.shard = &shards[b];
      shards[b] = {box[0] * kColumns + box[2],
                   sizes[b][1] == kColumns ? std::max<int64_t>(1, sizes[b][0] * kColumns) : sizes[b][1],
                   kRows * kColumns - sizes[b][0] * sizes[b][1], strides};
      each(b, [&](size_t i, size_t k) {
        cut.p[b][i] = whole.p[0][k];
        cut.g[b][i] = whole.g[0][k];
      });
    }
    StepArgs args;
    args.lr = 0.1;
    args.coefficients[0] = 0.9;
    args.coefficients[1] = 1;
    args.sigma = 0.5;
    args.seed = 1234567890123;
    args.kind = kind;
    args.relative = kind != Kind::kNone;
    args.cap = 1e9;
    whole.table.args[0] = cut.table.args[0] = args;
    const cpu::Kernel& kernel = kernel_of(*cpu::choose(), "momentum_sgd");
    for (int t = 0; t < 3; ++t) {
      whole.table.args[0].noise_step = cut.table.args[0].noise_step = static_cast<uint32_t>(t);
      cpu::norms(kernel, cut.table, true, true, 2);
      Layer sum;
      sum.weight_norm2 = sum.grad_norm2 = sum.direction_norm2 = 0;
      for (const Layer& layer : cut.table.layers) {
        sum.weight_norm2 += layer.weight_norm2;
        sum.grad_norm2 += layer.grad_norm2;
        sum.direction_norm2 += layer.direction_norm2;
      }
      for (Layer& layer : cut.table.layers) {
        if (kind != Kind::kNone) layer.weight_norm2 = sum.weight_norm2;
        layer.grad_norm2 = sum.grad_norm2;
        if (kind == Kind::kLAMB) layer.direction_norm2 = sum.direction_norm2;
      }
      cpu::step(kernel, whole.table, 1);
      cpu::step(kernel, cut.table, 2);
      for (Layer& layer : cut.table.layers) layer.grad_norm2 = layer.direction_norm2 = -1;
      for (size_t b = 0; b < 4; ++b) {
        CHECK(std::fabs(cut.table.layers[b].ratio - whole.table.layers[0].ratio) <= 1e-12);
        each(b, [&](size_t i, size_t k) {
          const float bound = kind == Kind::kNone ? 0 : 1e-5f;
          CHECK(std::fabs(cut.p[b][i] - whole.p[0][k]) <= bound * std::fabs(whole.p[0][k]) + bound);
        });
      }
    }
  }
}

void every_number_is_handed_out_once() {
  for (const int64_t n : {0, 1, 2, 7, 31, 32, 1000})
    for (const int threads : {0, 1, 2, 5})
      for (const int64_t shares : {int64_t{0}, n}) {
        std::vector<std::atomic<int>> times(n);
        const auto take = [&](int64_t first, int64_t last) {
          CHECK(first < last && last <= (shares ? first + 1 : n));
          for (int64_t i = first; i < last; ++i) ++times[i];
        };
        cpu::parallel_for(n, threads, take, shares);
        for (const auto& count : times) CHECK(count == 1);
      }
}

void lookups_that_find_nothing() {
  CHECK(cpu::choose("no such instruction set") == nullptr);
  CHECK(rule_index("no such rule") == -1);
}

}  // namespace

int main() {
  philox_known_answers();
  box_muller_is_exact_to_float32();
  every_instruction_set_draws_the_same_noise();
  every_instruction_set_rounds_by_the_same_bits();
  a_step_is_the_rule_applied_to_every_element();
  threads_change_no_bit();
  a_carried_norm_is_the_norm_of_what_was_stored();
  strides_and_narrow_types();
  accumulate_adds_and_sums_both_squares();
  shards_step_as_the_whole();
  every_number_is_handed_out_once();
  lookups_that_find_nothing();
  std::puts("all C++ tests hold");
}
