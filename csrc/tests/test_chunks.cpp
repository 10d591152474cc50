// Tests of which block and which thread of a GPU takes what, and in which order their sums are added.
#include <algorithm>
#include <functional>

#include "../cuda/body.h"
#include "check.h"

using namespace fused_opt;

namespace {

void every_chunk_is_taken_once_and_belongs_to_its_tensor() {
  std::mt19937_64 generator(0);
  const std::vector<std::vector<int64_t>> models = {
      {1},
      {0},
      {0, 0, 1, 0},
      {1, 4095, 4096, 4097, 0, 70000},
      {(int64_t{1} << 33) + 5, 3, int64_t{1} << 31, 0},  // more elements, and of all tensors chunks, than 32 bits count
      {int64_t{1} << 46, 7},
  };
  for (const auto& sizes : models) {
    std::vector<int64_t> first(1, 0);
    for (const int64_t n : sizes) first.push_back(first.back() + cuda::chunks_of(n));
    const int64_t chunks = first.back(), count = static_cast<int64_t>(sizes.size());
    for (int64_t t = 0; t < count; ++t) {
      CHECK(cuda::find(first.data(), count, first[t]) == t);
      CHECK(cuda::find(first.data(), count, first[t + 1] - 1) == t);
      CHECK((first[t + 1] - first[t]) * cuda::kChunk >= sizes[t]);
      CHECK((first[t + 1] - first[t] - 1) * cuda::kChunk < std::max<int64_t>(sizes[t], 1));
    }
    for (const int64_t blocks : {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{1056}}) {
      CHECK(cuda::first_chunk(chunks, 0, blocks) == 0);
      CHECK(cuda::first_chunk(chunks, blocks, blocks) == chunks);
      int64_t least = chunks, most = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t share = cuda::first_chunk(chunks, b + 1, blocks) - cuda::first_chunk(chunks, b, blocks);
        least = std::min(least, share);
        most = std::max(most, share);
      }
      CHECK(least >= 0 && most - least <= 1);
    }
  }
  std::vector<int64_t> first(1, 0), owner;
  for (int64_t t = 0; t < 5000; ++t) {
    const int64_t chunks = 1 + static_cast<int64_t>(generator() % 3);
    owner.insert(owner.end(), chunks, t);
    first.push_back(first.back() + chunks);
  }
  for (size_t chunk = 0; chunk < owner.size(); ++chunk)
    CHECK(cuda::find(first.data(), 5000, static_cast<int64_t>(chunk)) == owner[chunk]);
}

void groups_begin_where_those_of_all_operands_are_aligned() {
  alignas(16) char memory[64];
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  for (const DType a : dtypes)
    for (const DType b : dtypes)
      for (int64_t at_a = 0; at_a < 16; at_a += size_of(a))
        for (int64_t at_b = 0; at_b < 16; at_b += size_of(b)) {
          const Operand operands[] = {{memory + at_a, a, nullptr}, {memory + at_b, b, nullptr}, {}};
          const int head = cuda::peel<float>(operands, true);
          CHECK(cuda::peel<float>(operands, false) == -1);
          int expected = -1;  // the first of four elements where both are, and no float64 among them
          for (int h = 3; h >= 0; --h)
            if ((at_a / size_of(a) + h) % 4 == 0 && (at_b / size_of(b) + h) % 4 == 0) expected = h;
          if (a == DType::kFloat64 || b == DType::kFloat64) expected = -1;
          CHECK(head == expected);
          for (int32_t n = 0; n < 40; ++n) {
            const cuda::Span span = cuda::span<float>(n, head);
            CHECK(0 <= span.first && span.first <= span.last && span.last <= n);
            CHECK((span.last - span.first) % 8 == 0);
            if (span.last > span.first) CHECK(span.first == head);
            if (head >= 0 && n >= head + 8) CHECK(n - span.last < 8);
          }
        }
  const Operand wide[] = {{memory + 8, DType::kFloat64, nullptr}, {memory + 4, DType::kFloat32, nullptr}};
  CHECK(cuda::peel<double>(wide, true) == 1);
}

// A warp's request has no gaps where each lane's group begins where its neighbour's ends.
template <class T>
void taken_once_and_by_neighbours(int32_t n, int head) {
  constexpr int kGroup = cuda::kGroup<T>;
  std::vector<int> taken(n, 0);
  std::vector<int64_t> before, groups;  // of the thread before, in its order, and of this one
  for (int thread = 0; thread < cuda::kThreads; ++thread) {
    const auto fetch = [&](int64_t i, cuda::Raw<16>*) { groups.push_back(i - 100); };
    const auto work = [&](auto count, int64_t i, const cuda::Raw<16>*) {
      for (int k = 0; k < count; ++k) ++taken.at(i - 100 + k);
    };
    groups.clear();
    cuda::for_each<T, 1>(100, n, head, thread, fetch, work);
    CHECK(groups.size() % 2 == 0);
    for (size_t k = 0; k < groups.size(); ++k) {
      CHECK(groups[k] % kGroup == head);
      CHECK(thread == 0 || groups[k] == before.at(k) + kGroup);
    }
    before = groups;
  }
  CHECK(taken == std::vector<int>(n, 1));
}

void every_element_is_taken_once_and_neighbours_by_neighbours() {
  for (const int32_t n : {0, 1, 3, 4, 7, 8, 9, 127, 1020, 1023, 1024, 1025, 4095, 4096, 10000})
    for (int head = -1; head < 4; ++head) {
      taken_once_and_by_neighbours<float>(n, head);
      if (head < 2) taken_once_and_by_neighbours<double>(n, head);
    }
}

void many_partial_sums_are_added_in_an_order_that_only_their_number_decides() {
  struct {
    void all_threads(const std::function<void(int)>& f) const {
      for (int thread = 0; thread < cuda::kThreads; ++thread) f(thread);
    }
  } block;
  for (const int64_t n : {0, 1, 127, 128, 129, 1023, 1024, 1025, 5000}) {
    std::vector<double> values;
    for (const float x : randn(static_cast<size_t>(n), 0)) values.push_back(x / 3.0);  // sums of them round
    std::vector<double> expected(cuda::kThreads, 0);
    for (int64_t k = 0; k < n; ++k) expected[k % cuda::kThreads] += values[k];
    for (int width = cuda::kThreads / 2; width; width /= 2)
      for (int k = 0; k < width; ++k) expected[k] += expected[k + width];
    Norms lanes[cuda::kThreads];
    cuda::sum_all(block, lanes, n, [&](int64_t k) { return Norms{values.at(k), -values.at(k), 1}; });
    CHECK(lanes[0].weight2 == expected[0] && lanes[0].grad2 == -expected[0]);
    CHECK(lanes[0].direction2 == static_cast<double>(n));
  }
}

}  // namespace

int main() {
  every_chunk_is_taken_once_and_belongs_to_its_tensor();
  groups_begin_where_those_of_all_operands_are_aligned();
  every_element_is_taken_once_and_neighbours_by_neighbours();
  many_partial_sums_are_added_in_an_order_that_only_their_number_decides();
  std::puts("all C++ tests of who does what on a GPU hold");
}
