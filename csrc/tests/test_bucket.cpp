// Tests of what a plan for GPUs sends there: copies and launches.
#include <cstring>
#include <stdexcept>

#include "../cuda/bucket.h"
#include "models.h"

namespace {

std::vector<size_t> copied;
bool in_capture = false;
std::vector<std::vector<double>> memory;  // outlives what was captured, which nobody gives back

cuda::Machine recording() {
  cuda::Machine machine = cuda::host();
  machine.allocate = [](size_t bytes) -> void* { return memory.emplace_back(bytes / 8 + 1).data(); };
  machine.release = [](void*) {};
  machine.share = [](size_t words) {
    return reinterpret_cast<uint64_t*>(memory.emplace_back(std::vector<double>(words + 1)).data());
  };
  machine.unshare = [](uint64_t*) {};
  machine.capturing = [](void*) { return in_capture; };
  return machine;
}

void only_what_changed_is_copied_until_a_graph_writes_too() {
  cuda::Machine machine = recording();
  machine.upload = [](cuda::Staging*, void* to, const void* from, size_t bytes, void*) {
    copied.push_back(bytes);
    std::memcpy(to, from, bytes);
  };
  const auto copies = [&](cuda::DeviceBuffer& buffer, std::vector<size_t> expected) {
    copied.clear();
    buffer.sync(800, nullptr);
    CHECK(copied == expected);
    CHECK(!std::memcmp(buffer.now(), buffer.device(), 800));
  };
  cuda::DeviceBuffer buffer(machine, 1000);
  copies(buffer, {});
  buffer.now()[400] = buffer.now()[423] = 1;
  copies(buffer, {24});
  copies(buffer, {});
  buffer.now()[0] = buffer.now()[799] = 1;
  copies(buffer, {800});
  in_capture = true;
  copies(buffer, {800});
  in_capture = false;
  copies(buffer, {800});
  CHECK(buffer.captured());
}

cuda::Entry filled;  // the first that was copied

void what_a_layer_refers_to_is_on_the_device() {
  cuda::Machine machine = recording();
  machine.upload = [](cuda::Staging*, void* to, const void* from, size_t bytes, void*) {
    copied.push_back(bytes);
    std::memcpy(to, from, bytes);
    if (copied.size() == 1) std::memcpy(&filled, from, sizeof filled);
  };
  copied.clear();
  Model model({7}, 0, kStorages[0]);
  const int64_t strides[] = {9, 1};
  const ShardLayout shard{3, 7, 11, strides};
  model.table.layers[0].index = 5;
  model.table.layers[0].shard = &shard;
  const cuda::Bucket plan(machine, "sgd", false, model.table.tensors, model.table.layers, {nullptr});
  CHECK(copied[0] == sizeof(cuda::Entry) && filled.layer.index == 5);
  const ShardLayout& there = *filled.layer.shard;  // the host emulates the device
  CHECK(&there != &shard && there.offset == 3 && there.run == 7 && there.elsewhere == 11);
  CHECK(there.strides != strides && there.strides[0] == 9 && there.strides[1] == 1);
  CHECK(filled.tensor.sizes != model.table.tensors[0].sizes && filled.tensor.sizes[1] == 7);
}

// ---- what fails

int live = 0, until_failure = 0;

void may_fail() {
  if (until_failure-- == 0) throw std::runtime_error("refused");
}

void a_bucket_that_cannot_be_made_keeps_no_memory() {
  cuda::Machine machine = recording();
  machine.allocate = [](size_t bytes) {
    may_fail();
    ++live;
    return recording().allocate(bytes);
  };
  machine.release = [](void*) { --live; };
  machine.share = [](size_t words) {
    may_fail();
    ++live;
    return cuda::host().share(words);
  };
  machine.unshare = [](uint64_t* words) {
    --live;
    cuda::host().unshare(words);
  };
  machine.stage = [](size_t) {
    may_fail();
    return reinterpret_cast<cuda::Staging*>(&++live);
  };
  machine.unstage = [](cuda::Staging*) { --live; };
  machine.upload = [](cuda::Staging*, void* to, const void* from, size_t bytes, void*) {
    may_fail();
    std::memcpy(to, from, bytes);
  };
  const Model model(kSizes, 1, kStorages[8]);
  bool made = false;
  int failures = 0;
  while (!made) {
    until_failure = failures;
    try {
      const cuda::Bucket plan(machine, "momentum_sgd", false, model.table.tensors, model.table.layers,
                              std::vector<float*>(kSizes.size(), nullptr));
      made = true;
      CHECK(live == 7);  // the tables; two buffers and what they and the counts are staged in; words for the host
    } catch (const std::runtime_error&) {
      ++failures;
    }
    CHECK(live == 0);
  }
  CHECK(failures == 3 + 3 + 1 + 4 * 2);  // allocations, staging, words for the host, and four tables staged and copied
}

// ---- what is launched

int updates = 0, sums = 0;

void a_step_is_one_launch_where_norms_are_carried() {
  cuda::Machine machine = recording();
  machine.update = [](int rule, bool wide, const cuda::Launch& launch, void* stream) {
    ++updates;
    cuda::host().update(rule, wide, launch, stream);
  };
  machine.norms = [](int rule, bool wide, const cuda::Launch& launch, void* stream) {
    ++sums;
    cuda::host().norms(rule, wide, launch, stream);
  };
  const auto launches = [&](const Case& some, bool clips, bool parts, std::vector<int> expected) {
    Model model(kSizes, 1, kStorages[0]);
    StepArgs& args = model.table.args[0] = args_of("momentum_sgd");
    some.change(args);
    cuda::Bucket plan(machine, "momentum_sgd", false, model.table.tensors, model.table.layers,
                      std::vector<float*>(kSizes.size(), nullptr));
    for (size_t step = 0; step < expected.size(); ++step) {
      updates = sums = 0;
      for (Layer& layer : model.table.layers) {
        layer.grad_norm2 = -1;
        if (parts) layer.part_norms = 2;
      }
      cuda::DeviceScalars scalars;
      double norm2 = 0;
      if (clips) {
        scalars.norm2 = &norm2;
        scalars.max_norm = 1;
        plan.sum_gradients(model.table.tensors, model.table.layers, scalars, false, nullptr);
      }
      plan.run(model.table.tensors, model.table.layers, {{args, {}}}, scalars, nullptr);
      CHECK(updates == 1);
      CHECK(sums == expected[step]);
    }
    for (Tensor& tensor : model.table.tensors) tensor.active = false;
    double norm2 = 5;
    cuda::DeviceScalars scalars;
    scalars.norm2 = &norm2;
    plan.sum_gradients(model.table.tensors, model.table.layers, scalars, true, nullptr);
    CHECK(norm2 == 5);
    plan.sum_gradients(model.table.tensors, model.table.layers, scalars, false, nullptr);
    CHECK(norm2 == 0);
    plan.run(model.table.tensors, model.table.layers, {{args, {}}}, scalars, nullptr);
    plan.run(model.table.tensors, model.table.layers, {}, scalars, nullptr);
    CHECK(updates == 1);  // still of the last one: nothing to step is no launch
    in_capture = true;
    for (Tensor& tensor : model.table.tensors) tensor.active = true;
    bool refused = false;
    try {
      plan.run(model.table.tensors, model.table.layers, {{args, {}}}, {}, nullptr);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    in_capture = false;
    CHECK(refused == (args.sigma != 0 || averages(args)));
  };
  launches(kPlain[0], false, false, {0, 0});
  launches(kPlain[4], false, false, {0, 0});
  launches(kPlain[0], true, false, {1, 1});
  launches(kNormed[0], false, false, {1, 1});  // LARS: the gradient's norm
  launches(kNormed[1], false, true, {1, 0});   // CLARS: the weights' norm once, then it is carried
  launches(kNormed[0], true, false, {2, 1});   // the norm that clips serves the ratio
  launches(kNormed[3], false, false, {1, 0});
  launches(kNormed[4], false, false, {2, 2});  // LAMB of a mask: its scale is counted before the direction's norm
  launches(kPlain[5], false, false, {1, 1});
}

}  // namespace

int main() {
  only_what_changed_is_copied_until_a_graph_writes_too();
  what_a_layer_refers_to_is_on_the_device();
  a_bucket_that_cannot_be_made_keeps_no_memory();
  a_step_is_one_launch_where_norms_are_carried();
  std::puts("all C++ tests of plans for GPUs hold");
}
