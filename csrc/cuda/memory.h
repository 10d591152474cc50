// How elements come from memory and go back, the same on the host and on a GPU.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../types.h"
#include "table.h"

namespace fused_opt::cuda {

template <int bytes>
struct Plain;
#ifdef __CUDACC__
template <>
struct Plain<2> {
  using type = unsigned short;
};
template <>
struct Plain<4> {
  using type = unsigned int;
};
template <>
struct Plain<8> {
  using type = unsigned long long;
};
template <>
struct Plain<16> {
  using type = uint4;
};
#endif

// Past the first cache: nothing here is read twice by the same processor, and what another one wrote is seen.
template <class T>
FUSED_OPT_FN T fetch(const T* at) {
#ifdef __CUDA_ARCH__
  return __builtin_bit_cast(T, __ldcg(reinterpret_cast<const typename Plain<sizeof(T)>::type*>(at)));
#else
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
#endif
}
template <class T>
FUSED_OPT_FN void put(T* at, T value) {
#ifdef __CUDA_ARCH__
  using Word = typename Plain<sizeof(T)>::type;
  __stcg(reinterpret_cast<Word*>(at), __builtin_bit_cast(Word, value));
#else
  std::memcpy(at, &value, sizeof value);
#endif
}

// A group of elements as it is stored, in the lower bytes of a Raw<16>.
template <int bytes>
struct alignas(bytes) Raw {
  uint32_t words[bytes / 4];
};

// Where element i of every operand is: of p, g, the states, the average. Groups are of flat tensors.
template <int V, size_t... S>
FUSED_OPT_FN void locate(const Tensor& x, int64_t i, int64_t (&at)[3 + sizeof...(S)], std::index_sequence<S...>) {
  FUSED_OPT_UNROLL
  for (int64_t& offset : at) offset = V > 1 || x.flat ? i : 0;
  if constexpr (V == 1) {
    FUSED_OPT_ROLLED
    for (int d = x.flat ? 0 : x.ndim; d-- > 0;) {
      const int64_t rest = i / x.sizes[d], k = i - rest * x.sizes[d];
      at[0] += k * x.p.strides[d];
      at[1] += k * x.g.strides[d];
      ((at[2 + S] += k * x.states[S].strides[d]), ...);
      if (x.average.data) at[2 + sizeof...(S)] += k * x.average.strides[d];
      i = rest;
    }
  }
}

template <int bytes>
FUSED_OPT_FN void fetch_as(const char* at, Raw<16>& raw) {
  const auto stored = fetch(reinterpret_cast<const Raw<bytes>*>(at));
  std::memcpy(&raw, &stored, bytes);
}

// V elements from offset i on: a group, or one. `fetch_raw` only loads a group, so that the loads of all operands are
// in flight before the first is converted; a single element is loaded where it is converted.
template <int V>
FUSED_OPT_FN void fetch_raw(const Operand& operand, int64_t i, Raw<16>& raw) {
  if constexpr (V > 1) {
    const int64_t size = size_of(operand.dtype);
    const char* at = static_cast<const char*>(operand.data) + i * size;
    if (size * V == 16)
      fetch_as<16>(at, raw);
    else if (size * V == 8)
      fetch_as<8>(at, raw);
    else if constexpr (V == 2)
      fetch_as<4>(at, raw);
  }
}

template <int V, class T>
FUSED_OPT_FN void convert(const Operand& operand, int64_t i, const Raw<16>& raw, T (&x)[V]) {
  with_type(operand.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    if constexpr (V == 1) {
      x[0] = static_cast<T>(widen(fetch(static_cast<const Element*>(operand.data) + i)));
    } else if constexpr (sizeof(Element[V]) <= sizeof raw) {
      Element elements[V];
      std::memcpy(&elements, &raw, sizeof elements);
      FUSED_OPT_UNROLL
      for (int k = 0; k < V; ++k) x[k] = static_cast<T>(widen(elements[k]));
    }
  });
}

// The same of the parameter, and of what it is the rounding of: an int16 goes to the upper bytes of a bfloat16's
// Raw<16>, a float32 is loaded where it is converted.
template <int V>
FUSED_OPT_FN void fetch_weights(const Tensor& tensor, int64_t i, Raw<16>& raw) {
  fetch_raw<V>(tensor.p, i, raw);
  if constexpr (V == 4)
    if (tensor.exact.data && tensor.exact.dtype == DType::kInt16) {
      const auto low = fetch(reinterpret_cast<const Raw<8>*>(static_cast<const int16_t*>(tensor.exact.data) + i));
      std::memcpy(&raw.words[2], &low, 8);
    }
}

template <int V>
FUSED_OPT_FN void convert_exact(const Tensor& tensor, int64_t i, const Raw<16>& raw, float (&x)[V]) {
  if (tensor.exact.dtype == DType::kInt16) {
    uint16_t high[V];
    int16_t low[V];
    if constexpr (V == 1) {
      high[0] = fetch(static_cast<const uint16_t*>(tensor.p.data) + i);
      low[0] = static_cast<int16_t>(fetch(static_cast<const uint16_t*>(tensor.exact.data) + i));
    } else {
      std::memcpy(&high, &raw.words[0], sizeof high);
      std::memcpy(&low, &raw.words[2], sizeof low);
    }
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) x[k] = join({high[k]}, low[k]);
    return;
  }
  convert(tensor.p, i, raw, x);
  Raw<16> stored{};
  float exact[V];
  fetch_raw<V>(tensor.exact, i, stored);
  convert(tensor.exact, i, stored, exact);
  FUSED_OPT_UNROLL
  for (int k = 0; k < V; ++k) x[k] = widen(narrow<Float16>(exact[k])) == x[k] ? exact[k] : x[k];
}

template <int V, class T>
FUSED_OPT_FN void convert_weights(const Tensor& tensor, int64_t i, const Raw<16>& raw, T (&x)[V]) {
  if constexpr (std::is_same_v<T, float>)
    if (tensor.exact.data) return convert_exact(tensor, i, raw, x);
  convert(tensor.p, i, raw, x);
}

// Leaves in x what was stored. `narrowed(null pointer of an element type, x[k], k)`: an element.
template <int V, class T, class Narrow>
FUSED_OPT_FN void store(const Operand& operand, int64_t i, T (&x)[V], const Narrow& narrowed) {
  with_type(operand.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    Element elements[V];
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) {
      elements[k] = narrowed(type, x[k], k);
      x[k] = static_cast<T>(widen(elements[k]));
    }
    auto* data = static_cast<Element*>(operand.data);
    if constexpr (V == 1) {
      put(data + i, elements[0]);
    } else if constexpr (sizeof elements <= 16) {
      Raw<sizeof elements> raw;
      std::memcpy(&raw, &elements, sizeof elements);
      put(reinterpret_cast<Raw<sizeof elements>*>(data + i), raw);
    }
  });
}
template <int V, class T>
FUSED_OPT_FN void store(const Operand& operand, int64_t i, T (&x)[V]) {
  store(operand, i, x, [](auto* type, T value, int) { return narrow<std::remove_pointer_t<decltype(type)>>(value); });
}
// The same at random, of what has 16 bits.
template <int V, class T>
FUSED_OPT_FN void store_at_random(const Operand& operand, int64_t i, T (&x)[V], const uint32_t (&words)[V], int place) {
  store(operand, i, x, [&](auto* type, T value, int k) {
    using Element = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(Element) == 2)
      return narrow_at_random<Element>(static_cast<float>(value), rounding_bits(words[k], place));
    else
      return narrow<Element>(value);
  });
}

// Leaves x as it is, which is kept.
template <int V>
FUSED_OPT_FN void store_exact(const Tensor& tensor, int64_t i, float (&x)[V]) {
  if (tensor.exact.dtype == DType::kInt16) {
    uint16_t high[V], low[V];
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) {
      const Split parts = split(x[k]);
      high[k] = parts.high.bits, low[k] = static_cast<uint16_t>(parts.low);
    }
    auto *upper = static_cast<uint16_t*>(tensor.p.data) + i, *lower = static_cast<uint16_t*>(tensor.exact.data) + i;
    if constexpr (V == 1) {
      put(upper, high[0]);
      put(lower, low[0]);
    } else {
      Raw<sizeof high> raw;
      std::memcpy(&raw, &high, sizeof high);
      put(reinterpret_cast<Raw<sizeof high>*>(upper), raw);
      std::memcpy(&raw, &low, sizeof low);
      put(reinterpret_cast<Raw<sizeof low>*>(lower), raw);
    }
    return;
  }
  store(tensor.exact, i, x);
  float seen[V];
  FUSED_OPT_UNROLL
  for (int k = 0; k < V; ++k) seen[k] = x[k];
  store(tensor.p, i, seen);
}

}  // namespace fused_opt::cuda
