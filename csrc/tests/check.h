// What the tests share.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../cpu/step.h"

namespace {

void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: %s does not hold\n", file, line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __FILE__, __LINE__)

inline const fused_opt::cpu::Kernel& kernel_of(const fused_opt::cpu::InstructionSet& set, const char* rule) {
  return set.kernels[fused_opt::rule_index(rule)];
}

std::vector<float> randn(size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace
