// Models, rules and settings that the kernels for GPUs are tried on.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/step.h"
#include "../cuda/bucket.h"
#include "check.h"

namespace {

using namespace fused_opt;

// Tensors of one dtype each for p, g, states and average, at an offset of their memory, between words that must stay.
struct Storage {
  DType p, g, state, average;
  int64_t offset;  // in elements
  bool strided;
};

struct Model {
  std::vector<std::vector<char>> memory;
  std::vector<std::array<int64_t, 6>> layouts;
  cpu::Table table;
  std::vector<float> counts;
  std::vector<float*> steps;

  Model(const std::vector<int64_t>& sizes, int states, const Storage& kind, bool whole = false) {
    layouts.resize(sizes.size());
    counts.assign(sizes.size(), 0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      Tensor tensor;
      tensor.numel = sizes[t];
      tensor.active = true;
      tensor.ndim = 2;
      tensor.flat = !kind.strided;
      const int64_t rows = kind.strided ? 3 : 1, columns = sizes[t] / rows;
      tensor.numel = rows * columns;
      layouts[t] = {rows, columns, columns, 1, 1, rows};
      tensor.sizes = layouts[t].data();
      const unsigned seed = static_cast<unsigned>(10 * t);
      tensor.p = operand(kind.p, tensor.numel, kind.offset, seed, whole, layouts[t].data() + 2);
      tensor.g = operand(kind.g, tensor.numel, kind.offset, seed + 1, whole, layouts[t].data() + 4);
      for (int s = 0; s < states; ++s)
        tensor.states[s] = operand(kind.state, tensor.numel, kind.offset, seed + 2 + s, whole, layouts[t].data() + 2);
      tensor.average = operand(kind.average, tensor.numel, kind.offset, seed + 6, whole, layouts[t].data() + 4);
      table.tensors.push_back(tensor);
      table.layers.emplace_back();
      table.layers.back().index = static_cast<uint32_t>(3 * t);
      table.layers.back().lr_scale = 1 + 0.25 * static_cast<double>(t % 3);
      table.layers.back().decay_scale = t % 2 ? 0.5 : 1;
      steps.push_back(&counts[t]);
    }
    table.args.resize(1);
    table.cut();
  }

  Operand operand(DType dtype, int64_t n, int64_t offset, unsigned seed, bool whole, const int64_t* strides) {
    const std::vector<float> values = randn(static_cast<size_t>(n + 24), seed);
    memory.emplace_back((n + 24) * size_of(dtype) + 16);
    // An address of its own, whatever the allocator gives: 16 bytes, then the offset.
    char* data = memory.back().data();
    data += (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
    for (int64_t i = 0; i < n + 24; ++i) {
      float value = whole ? std::round(values[i] * 4) / 4 : values[i];
      const unsigned state = seed % 10 - 2;
      if (state < 4) value = std::fabs(value);  // second moments are among them
      if (state == 0) value += 4;               // and where there is a variance, they exceed the square of the mean
      if (dtype == DType::kFloat64) {
        const double wide = whole ? value : value + 1e-9 * value;
        std::memcpy(data + 8 * i, &wide, 8);
      } else if (dtype == DType::kFloat32) {
        std::memcpy(data + 4 * i, &value, 4);
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t half = dtype == DType::kBFloat16 ? static_cast<uint16_t>(bits >> 16)
                                                        : __builtin_bit_cast(uint16_t, static_cast<Float16>(value));
        std::memcpy(data + 2 * i, &half, 2);
      }
    }
    return {data + offset * size_of(dtype), dtype, strides};
  }
};

const std::vector<int64_t> kSizes = {0, 1, 3, 7, 8, 9, 15, 33, 4095, 4096, 4097, 9001};

StepArgs args_of(const std::string& rule) {
  StepArgs args;
  args.lr = 0.1;
  args.grad_scale = -0.5;
  args.coupled_decay = 0.01;
  args.decoupled_decay = 0.02;
  const std::vector<double> sgd = {0.9, 0.7, 1}, adam = {0.1, 0.999, 0.001, 0.9, 0.968, 1e-8},
                            longest = {0.1, 0.999, 0.001, 0.1, 0.9, 1, 0.5, 1e-3};
  const bool is_longest = kRules[rule_index(rule.c_str())].coefficients == static_cast<int>(longest.size());
  const auto& some = rule.find("sgd") != std::string::npos ? sgd : is_longest ? longest : adam;
  std::copy(some.begin(), some.end(), args.coefficients);
  return args;
}

struct Case {
  std::string name;
  void (*change)(StepArgs&);
};
const std::vector<Case> kPlain = {
    {"plain", [](StepArgs&) {}},
    {"noise",
     [](StepArgs& args) {
       args.sigma = 0.01;
       args.seed = 0x123456789ABCDEF0;
       args.noise_step = 7;
     }},
    {"average", [](StepArgs& args) { args.add = 0.25, args.share = 1; }},
    {"fresh average", [](StepArgs& args) { args.add = 1, args.share = 1, args.restart = true; }},
    {"written back", [](StepArgs& args) { args.sigma = 0.01, args.add = 0.5, args.share = 1, args.write_back = true; }},
    {"masks", [](StepArgs& args) { args.cautious_update = args.cautious_decay = args.scaled = true; }},
    {"independent decay and an unscaled mask",
     [](StepArgs& args) { args.decoupled_decay = 0, args.independent_decay = 0.02, args.cautious_update = true; }},
    {"followed", [](StepArgs& args) { args.add = 0.5, args.share = 1, args.follow = 0.75; }},
};
const std::vector<Case> kNormed = {
    {"lars", [](StepArgs& args) { args.kind = Kind::kLARS, args.cap = 10, args.exempt = -1; }},
    {"clars", [](StepArgs& args) { args.kind = Kind::kCLARS, args.cap = 10, args.eps = 1e-6; }},
    {"lamb", [](StepArgs& args) { args.kind = Kind::kLAMB, args.cap = INFINITY; }},
    {"relative noise", [](StepArgs& args) { args.sigma = 0.01, args.relative = true; }},
    {"lamb with a scaled mask",
     [](StepArgs& args) { args.kind = Kind::kLAMB, args.cap = INFINITY, args.cautious_update = args.scaled = true; }},
};
const DType F32 = DType::kFloat32, F64 = DType::kFloat64, B16 = DType::kBFloat16, F16 = DType::kFloat16;
const std::vector<Storage> kStorages = {
    {F32, F32, F32, F32, 0, false}, {B16, B16, B16, F32, 0, false}, {F16, F16, F32, F32, 0, false},
    {F64, F64, F64, F64, 0, false}, {B16, F32, F32, F32, 3, false}, {F32, F32, F32, F32, 1, false},
    {F64, F32, F64, F64, 1, false}, {F32, F64, F32, F32, 0, false}, {F32, B16, F32, F64, 2, true},
};

inline bool same_memory(const Model& a, const Model& b) {
  return a.memory == b.memory;
}

// What the GPU's source makes of a model, in some steps.
inline void step_as_gpu(Model& model, const char* rule, int steps,
                        const std::vector<cuda::DeviceScalars>& scalars = {{}}, bool counted = false) {
  const bool wide = model.table.tensors[0].p.dtype == F64;
  std::vector<float*> nobody(model.steps.size(), nullptr);
  cuda::Bucket plan(cuda::host(), rule, wide, model.table.tensors, model.table.layers, counted ? model.steps : nobody);
  for (int k = 0; k < steps; ++k) {
    for (Layer& layer : model.table.layers) layer.grad_norm2 = -1;
    std::vector<cuda::Row> rows;
    for (const StepArgs& args : model.table.args) rows.push_back({args, {}});
    plan.run(model.table.tensors, model.table.layers, rows, scalars[k % scalars.size()], nullptr);
  }
  const std::vector<double> ratios = plan.ratios(nullptr);
  for (size_t t = 0; t < ratios.size(); ++t) model.table.layers[t].ratio = ratios[t];
}

}  // namespace
