// Tests of the kernels for GPUs on the host, where a loop plays their threads: the same source, so the same arithmetic.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "../cuda/body.h"
#include "../cuda/bucket.h"
#include "../cuda/host.h"
#include "models.h"

using namespace fused_opt;

namespace {

// ---- a step

// Of rules, storages and cases every pair is tried, and of all three together a third.
bool left_out(const RuleShape& rule, const Storage& kind, const Case& some, const std::vector<Case>& cases) {
  return ((&rule - kRules) + (&kind - kStorages.data()) + (&some - cases.data())) % 3 != 0;
}

void an_update_has_the_bits_of_the_cpus() {
  const cpu::InstructionSet& set = *cpu::choose("baseline");
  for (const RuleShape& rule : kRules)
    for (const Storage& kind : kStorages)
      for (const Case& some : kPlain) {
        if (left_out(rule, kind, some, kPlain)) continue;
        Model ours(kSizes, rule.states, kind), theirs(kSizes, rule.states, kind);
        for (Model* model : {&ours, &theirs}) {
          model->table.args[0] = args_of(rule.name);
          some.change(model->table.args[0]);
        }
        step_as_gpu(ours, rule.name, 2);
        for (int k = 0; k < 2; ++k) cpu::step(kernel_of(set, rule.name), theirs.table, 1);
        if (!same_memory(ours, theirs)) std::fprintf(stderr, "%s, %s\n", rule.name, some.name.c_str());
        CHECK(same_memory(ours, theirs));
      }
}

// Of quarters of whole numbers, float64 sums every order the same: then ratios have the same bits, too.
void norms_have_the_values_of_the_cpus() {
  const cpu::InstructionSet& set = *cpu::choose("baseline");
  for (const RuleShape& rule : kRules)
    for (const Storage& kind : kStorages)
      for (const Case& some : kNormed) {
        if (left_out(rule, kind, some, kNormed)) continue;
        Model ours(kSizes, rule.states, kind, true), theirs(kSizes, rule.states, kind, true);
        const bool exact = some.name.rfind("lamb", 0) != 0;
        for (Model* model : {&ours, &theirs}) {
          model->table.args[0] = args_of(rule.name);
          some.change(model->table.args[0]);
        }
        step_as_gpu(ours, rule.name, 1);
        cpu::step(kernel_of(set, rule.name), theirs.table, 1);
        if (exact) CHECK(same_memory(ours, theirs));
        for (size_t t = 0; t < kSizes.size(); ++t) {
          const double ratio = theirs.table.layers[t].ratio;
          CHECK(std::fabs(ours.table.layers[t].ratio - ratio) <= (exact ? 0 : 1e-13 * ratio));
        }
        if (!exact) continue;
        // The second step's weight norms are those that the first has carried, of numbers of every kind.
        Model again(kSizes, rule.states, kind, true);
        again.table.args[0] = theirs.table.args[0];
        step_as_gpu(again, rule.name, 2);
        for (Layer& layer : theirs.table.layers) layer.grad_norm2 = -1;
        cpu::step(kernel_of(set, rule.name), theirs.table, 1);
        for (size_t t = 0; t < kSizes.size(); ++t) {
          const double ratio = theirs.table.layers[t].ratio;
          CHECK(std::fabs(again.table.layers[t].ratio - ratio) <= 1e-12 * ratio);
        }
      }
}

void carried_norms_are_those_of_what_was_stored() {
  Model carried(kSizes, 1, kStorages[1]), anew(kSizes, 1, kStorages[1]);
  for (Model* model : {&carried, &anew}) {
    model->table.args[0] = args_of("momentum_sgd");
    kNormed[0].change(model->table.args[0]);
  }
  step_as_gpu(carried, "momentum_sgd", 3);
  for (int k = 0; k < 3; ++k) {
    for (Layer& layer : anew.table.layers) layer.weight_norm2 = -1;
    step_as_gpu(anew, "momentum_sgd", 1);
  }
  CHECK(same_memory(carried, anew));
}

// Of three rows or one: consecutive in the whole tensor or not, from a multiple of four on or not.
void shards_draw_as_the_cpus_do() {
  const cpu::InstructionSet& set = *cpu::choose("baseline");
  for (const Storage& kind : kStorages)
    for (const int64_t gap : {0, 1, 4})
      for (const int64_t offset : {0, 8, 2, 5}) {
        Model ours(kSizes, 1, kind), theirs(kSizes, 1, kind);
        std::vector<ShardLayout> shards(kSizes.size());
        std::vector<std::array<int64_t, 2>> strides(kSizes.size());
        for (Model* model : {&ours, &theirs}) {
          model->table.args[0] = args_of("momentum_sgd");
          kPlain[1].change(model->table.args[0]);
          for (size_t t = 0; t < kSizes.size(); ++t) {
            const Tensor& tensor = model->table.tensors[t];
            auto& layout = model->layouts[t];
            if (tensor.flat && tensor.numel % 3 == 0) layout[0] = 3, layout[1] = tensor.numel / 3;
            strides[t] = {layout[1] + gap, 1};
            shards[t] = {offset, std::max<int64_t>(1, gap ? layout[1] : tensor.numel), 7, strides[t].data()};
            model->table.layers[t].shard = &shards[t];
          }
        }
        step_as_gpu(ours, "momentum_sgd", 1);
        cpu::step(kernel_of(set, "momentum_sgd"), theirs.table, 1);
        CHECK(same_memory(ours, theirs));
      }
}

// What a step goes by where it is told norms, and that those of the shards are kept beside.
void norms_of_whole_tensors_are_taken_where_they_are_given() {
  Model ours({100, 50}, 1, kStorages[3]), theirs({100, 50}, 1, kStorages[3]);
  for (Model* model : {&ours, &theirs}) {
    model->table.args[0] = args_of("momentum_sgd");
    kNormed[0].change(model->table.args[0]);
  }
  const std::vector<cuda::Row> rows = {{ours.table.args[0], {}}};
  std::vector<Norms> kept(2), whole = {{9, 4, 0}, {16, 25, 0}};
  const auto steps = std::vector<float*>(2, nullptr);
  cuda::Bucket plan(cuda::host(), "momentum_sgd", true, ours.table.tensors, ours.table.layers, steps);
  plan.keep_norms(kept.data());
  plan.sum_norms(ours.table.tensors, ours.table.layers, rows, {}, false, true, nullptr);
  cpu::norms(kernel_of(*cpu::choose("baseline"), "momentum_sgd"), theirs.table, false, true, 1);
  for (size_t t = 0; t < 2; ++t) {
    Layer& layer = theirs.table.layers[t];
    CHECK(std::fabs(kept[t].weight2 - layer.weight_norm2) <= 1e-12 * layer.weight_norm2);
    CHECK(std::fabs(kept[t].grad2 - layer.grad_norm2) <= 1e-12 * layer.grad_norm2);
    layer.weight_norm2 = whole[t].weight2;
    layer.grad_norm2 = whole[t].grad2;
  }
  plan.run(ours.table.tensors, ours.table.layers, rows, {}, nullptr, whole.data());
  cpu::step(kernel_of(*cpu::choose("baseline"), "momentum_sgd"), theirs.table, 1);
  CHECK(same_memory(ours, theirs));
  for (size_t t = 0; t < 2; ++t) {
    double left = 0;
    const auto* p = static_cast<const double*>(ours.table.tensors[t].p.data);
    for (int64_t i = 0; i < ours.table.tensors[t].numel; ++i) left += p[i] * p[i];
    CHECK(std::fabs(kept[t].weight2 - left) <= 1e-12 * left && whole[t].weight2 == (t ? 16 : 9));
  }
}

void blocks_and_threads_change_no_bit() {
  std::vector<std::vector<char>> expected;
  for (const bool threads : {false, true})
    for (const int64_t blocks : {1, 2, 3, 7, 50}) {
      cuda::host_threads = threads;
      cuda::host_blocks = blocks;
      Model model(kSizes, 2, kStorages[0]);
      StepArgs& args = model.table.args[0] = args_of("adam");
      for (const Case& some : {kNormed[0], kPlain[4]}) some.change(args);
      args.relative = true;
      const float found_inf = 0, grad_scale = 8;
      double norm2 = 3;
      const cuda::DeviceScalars scalars{&found_inf, &grad_scale, &norm2, 0.5};
      cuda::Bucket plan(cuda::host(), "adam", false, model.table.tensors, model.table.layers, model.steps);
      for (int k = 0; k < 3; ++k) {
        for (Layer& layer : model.table.layers) layer.grad_norm2 = -1;
        plan.sum_gradients(model.table.tensors, model.table.layers, scalars, false, nullptr);
        plan.run(model.table.tensors, model.table.layers, {{args, {}}}, scalars, nullptr);
      }
      model.memory.emplace_back(reinterpret_cast<char*>(&norm2), reinterpret_cast<char*>(&norm2 + 1));
      if (expected.empty()) expected = model.memory;
      CHECK(model.memory == expected);
      CHECK(model.counts == std::vector<float>(kSizes.size(), 3));
    }
  cuda::host_threads = false;
  cuda::host_blocks = 3;
}

// ---- what only the device knows

void the_devices_coefficients_are_the_hosts() {
  for (const double beta1 : {0.0, 0.5, 0.9, 0.99999})
    for (const double beta2 : {0.0, 0.9, 0.999, 0.9999999})
      for (const double t : {1.0, 2.0, 3.0, 10.0, 1000.0, 123456.0, 16777216.0}) {
        double coefficients[] = {1 - beta1, beta2, 1 - beta2, beta1, beta2, 1e-8};
        Adam<float>::at_step(coefficients, t);
        const double first = 1 / (1 - std::pow(beta1, t)), second = 1 / std::sqrt(1 - std::pow(beta2, t));
        // an error of one unit of 1, over 1 - beta
        CHECK(std::fabs(coefficients[3] - first) <= first * (1e-13 + 2e-16 / (1 - beta1)));
        CHECK(std::fabs(coefficients[4] - second) <= second * (1e-13 + 2e-16 / (1 - beta2)));
      }
}

void steps_counted_on_the_device_are_those_counted_by_the_host() {
  Model ours(kSizes, 2, kStorages[0]), theirs(kSizes, 2, kStorages[0]);
  StepArgs& args = ours.table.args[0] = args_of("adam");
  ours.counts.assign(kSizes.size(), 41);
  step_as_gpu(ours, "adam", 2, {{}}, true);
  CHECK(ours.counts == std::vector<float>(kSizes.size(), 43));
  for (const double t : {42.0, 43.0}) {
    theirs.table.args[0] = args;
    Adam<float>::at_step(theirs.table.args[0].coefficients, t);
    step_as_gpu(theirs, "adam", 1);
  }
  CHECK(same_memory(ours, theirs));
}

void an_overflow_changes_and_counts_nothing() {
  const float none = 0, found = 1;
  Model ours(kSizes, 1, kStorages[0]), theirs(kSizes, 1, kStorages[0]);
  for (Model* model : {&ours, &theirs}) {
    model->table.args[0] = args_of("momentum_sgd");
    kNormed[0].change(model->table.args[0]);
  }
  step_as_gpu(ours, "momentum_sgd", 5, {{&found}, {&none}, {&found}, {&found}, {&none}}, true);
  step_as_gpu(theirs, "momentum_sgd", 2, {{}}, true);
  CHECK(same_memory(ours, theirs));
  CHECK(ours.counts == std::vector<float>(kSizes.size(), 2));
}

void scale_and_rate_come_from_the_device() {
  for (const double limit : {0.25, 1e9}) {
    const float scale = 8;
    double norm2 = 0;
    const float lr = 0.1f;
    Model ours(kSizes, 1, kStorages[0], true), theirs(kSizes, 1, kStorages[0], true);
    const StepArgs args = theirs.table.args[0] = args_of("momentum_sgd");
    const auto sum_of = [&](size_t t) {
      double sum = 0;
      for (int64_t i = 0; i < kSizes[t]; ++i)
        sum += std::pow(static_cast<float*>(theirs.table.tensors[t].g.data)[i], 2);
      return sum;
    };
    double expected = 17 - sum_of(3);
    for (size_t t = 0; t < kSizes.size(); ++t) expected += sum_of(t);

    cuda::Bucket plan(cuda::host(), "momentum_sgd", false, ours.table.tensors, ours.table.layers,
                      std::vector<float*>(kSizes.size(), nullptr));
    const cuda::DeviceScalars scalars{nullptr, &scale, &norm2, limit};
    StepArgs blank = args;
    blank.lr = -1;                         // not this one
    ours.table.layers[3].grad_norm2 = 17;  // known already
    plan.sum_gradients(ours.table.tensors, ours.table.layers, scalars, false, nullptr);
    CHECK(norm2 == expected);
    plan.run(ours.table.tensors, ours.table.layers, {{blank, {const_cast<float*>(&lr), F32, nullptr}}}, scalars,
             nullptr);
    const double norm = std::sqrt(norm2) * (1.0 / 8);
    CHECK(norm > 0.25);
    theirs.table.args[0].lr = lr;
    theirs.table.args[0].grad_scale *= 1.0 / 8 * std::min(1.0, limit / (norm + 1e-6));
    cpu::step(kernel_of(*cpu::choose("baseline"), "momentum_sgd"), theirs.table, 1);
    CHECK(same_memory(ours, theirs));

    ours.table.layers[3].grad_norm2 = -1;
    plan.sum_gradients(ours.table.tensors, ours.table.layers, scalars, true, nullptr);
    CHECK(norm2 == expected + expected - 17 + sum_of(3));  // added to what was there
  }
}

void tensors_without_a_gradient_are_left_alone() {
  Model ours(kSizes, 1, kStorages[0]), theirs(kSizes, 1, kStorages[0]);
  for (Model* model : {&ours, &theirs}) {
    model->table.args[0] = args_of("momentum_sgd");
    for (const size_t t : {1u, 5u, 11u}) {
      model->table.tensors[t].active = false;
      model->table.tensors[t].g.data = nullptr;
    }
  }
  step_as_gpu(ours, "momentum_sgd", 2, {{}}, true);
  for (int k = 0; k < 2; ++k) cpu::step(kernel_of(*cpu::choose("baseline"), "momentum_sgd"), theirs.table, 1);
  CHECK(same_memory(ours, theirs));
  for (size_t t = 0; t < kSizes.size(); ++t) CHECK(ours.counts[t] == (ours.table.tensors[t].active ? 2 : 0));
}

void accumulate_adds_and_sums_both_squares() {
  for (const Storage& kind : kStorages) {
    if (kind.strided) continue;
    for (const bool alone : {false, true})
      for (size_t t = 0; t < kSizes.size(); ++t) {
        Model ours({kSizes[t]}, 0, kind, true), theirs({kSizes[t]}, 0, kind, true);
        for (Model* model : {&ours, &theirs})
          if (alone) model->table.tensors[0].p.data = nullptr;
        std::vector<double> scratch(cuda::scratch_words(kSizes[t]));
        cuda::accumulate(cuda::host(), ours.table.tensors[0], scratch.data(), nullptr);
        const cpu::Sums sums = cpu::accumulate(*cpu::choose("baseline"), theirs.table.tensors[0], 1);
        CHECK(same_memory(ours, theirs));
        CHECK(scratch[0] == sums.part2 && scratch[1] == sums.total2);
      }
  }
}

}  // namespace

int main() {
  an_update_has_the_bits_of_the_cpus();
  norms_have_the_values_of_the_cpus();
  carried_norms_are_those_of_what_was_stored();
  shards_draw_as_the_cpus_do();
  norms_of_whole_tensors_are_taken_where_they_are_given();
  blocks_and_threads_change_no_bit();
  the_devices_coefficients_are_the_hosts();
  steps_counted_on_the_device_are_those_counted_by_the_host();
  an_overflow_changes_and_counts_nothing();
  scale_and_rate_come_from_the_device();
  tensors_without_a_gradient_are_left_alone();
  accumulate_adds_and_sums_both_squares();
  std::puts("all C++ tests of the kernels for GPUs hold");
}
