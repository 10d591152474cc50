// Python's tensors: read through DLPack's exchange API, and read again in every step.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "../rules.h"
#include "../table.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

const dlpack::ExchangeAPI* exchange = nullptr;

// An attribute of torch.Tensor that is written in C: its getter, found once and not by name for every tensor.
class Attribute {
 public:
  void find(const py::object& tensor_type, const char* name) {
    const py::object found = tensor_type.attr(name);
    if (!Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type))
      throw py::import_error("torch.Tensor." + std::string(name) + " is not the attribute that it was");
    descriptor_ = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  }
  py::object operator()(PyObject* tensor) const {
    PyObject* const value = descriptor_->get(tensor, descriptor_->closure);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  const PyGetSetDef* descriptor_ = nullptr;
};
Attribute grad_of, version_of;
PyTypeObject* plain_types[2] = {};

// Autograd's count of writes to a tensor.
int64_t version_now(const py::object& tensor) {
  return PyLong_AsLongLong(version_of(tensor.ptr()).ptr());
}

// Tells whether a tensor was written by anyone but the steps, from autograd's count of writes.
class Writes {
 public:
  // After a step, which has counted one write. Reading the count takes a Python number; where the last step has added
  // one, it is taken to be one more. If anything else was written, or another view of the same buffer, which shares the
  // count, then the count is higher, and `by_others` will say so.
  void expect(const py::object& tensor) {
    const int64_t next = expected_ + 1;
    expected_ = by_one_ ? next : version_now(tensor);
    by_one_ = expected_ == next;
  }
  void forget() { *this = Writes(); }
  bool expects() const { return expected_ != kNothing; }
  // Since the last call of `expect`.
  bool by_others(const py::object& tensor) {
    const bool as_expected = version_now(tensor) == expected_;
    by_one_ &= as_expected;
    return !as_expected;
  }

 private:
  static constexpr int64_t kNothing = -2;  // one more is no count, either
  int64_t expected_ = kNothing;
  bool by_one_ = false;  // the last step has added one
};

// Whether its data pointer is that of its elements; that of a subclass may not be.
bool is_plain(PyObject* tensor) {
  return Py_IS_TYPE(tensor, plain_types[0]) || Py_IS_TYPE(tensor, plain_types[1]);
}

// Whether its elements are the negatives of what lies in memory.
bool is_negated(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name)).ptr() == Py_True;
}

void connect(const py::object& tensor_type) {
  exchange = static_cast<const dlpack::ExchangeAPI*>(
      PyCapsule_GetPointer(tensor_type.attr("__dlpack_c_exchange_api__").ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  if (exchange->major != 1)
    throw py::import_error("this torch speaks DLPack " + std::to_string(exchange->major) +
                           ", and 1 is understood here");
  grad_of.find(tensor_type, "grad");
  version_of.find(tensor_type, "_version");
  plain_types[0] = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  plain_types[1] = reinterpret_cast<PyTypeObject*>(py::module_::import("torch.nn").attr("Parameter").ptr());
}

std::optional<DType> dtype_of(const dlpack::DataType& type) {
  if (type.code == dlpack::kFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == dlpack::kFloat && type.bits == 64) return DType::kFloat64;
  if (type.code == dlpack::kFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == dlpack::kBFloat && type.bits == 16) return DType::kBFloat16;
  if (type.code == dlpack::kInt && type.bits == 16) return DType::kInt16;
  if (type.code == dlpack::kInt && type.bits == 8) return DType::kInt8;
  if (type.code == dlpack::kUInt && type.bits == 8) return DType::kUInt8;
  return std::nullopt;
}

// A tensor as it was when the plan was made.
class View {
 public:
  explicit View(const py::handle& tensor) {
    dlpack::Tensor now;
    if (exchange->tensor_from_object(tensor.ptr(), &now)) throw py::error_already_set();
    const auto type = dtype_of(now.dtype);
    if (!type)
      throw py::type_error("a dtype that no kernel knows reached a plan: " +
                           py::repr(tensor.attr("dtype")).cast<std::string>());
    dtype = *type;
    data = address(now);
    device = now.device;
    ndim = now.ndim;
    if (ndim > kMaxDimensions)
      throw py::value_error("a tensor of " + std::to_string(ndim) + " dimensions reached a bucket; " +
                            std::to_string(kMaxDimensions) + " are the most");
    implementation_ = now.shape;
    if (ndim > kFew) many_ = std::make_unique<int64_t[]>(2 * ndim);
    int64_t* layout = many_ ? many_.get() : few_;
    for (int d = 0; d < ndim; ++d) {
      layout[d] = now.shape[d];
      // The stride of a dimension of one element means nothing, and libraries differ in what they write there.
      layout[ndim + d] = now.shape[d] == 1 ? 0 : now.strides[d];
    }
  }

  // Whether the tensor is still laid out like this; `where` receives its address.
  bool matches(PyObject* tensor, void** where) const {
    dlpack::Tensor now;
    if (exchange->tensor_from_object(tensor, &now)) {
      PyErr_Clear();
      return false;
    }
    *where = address(now);
    if (!*where && data) return false;  // zeros without memory
    const auto type = dtype_of(now.dtype);
    if (!type || *type != dtype || now.device.type != device.type || now.device.id != device.id || now.ndim != ndim)
      return false;
    for (int d = 0; d < ndim; ++d)
      if (now.shape[d] != sizes()[d] || (now.shape[d] != 1 && now.strides[d] != strides()[d])) return false;
    return true;
  }
  bool unmoved(PyObject* tensor) const {
    void* where = nullptr;
    return matches(tensor, &where) && where == data;
  }

  // Prefetches what reading the tensor will touch; a stale address does no harm.
  FUSED_OPT_FN void prefetch(PyObject* tensor) const {
    __builtin_prefetch(tensor);
    __builtin_prefetch(implementation_ - 8);
    __builtin_prefetch(implementation_);
    __builtin_prefetch(implementation_ + 8);
    __builtin_prefetch(implementation_ + 16);
  }

  const int64_t* sizes() const { return many_ ? many_.get() : few_; }
  const int64_t* strides() const { return sizes() + ndim; }
  bool same_strides(const View& other) const {
    return ndim == other.ndim && std::equal(strides(), strides() + ndim, other.strides());
  }
  int64_t numel() const { return std::accumulate(sizes(), sizes() + ndim, int64_t{1}, std::multiplies<>()); }

  // The dimensions by their strides, smallest first; those of one element, whose stride means nothing, last.
  std::vector<int> order() const {
    std::vector<int> order(ndim);
    std::iota(order.begin(), order.end(), 0);
    const auto key = [&](int d) { return std::make_pair(sizes()[d] == 1, strides()[d]); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
    return order;
  }
  std::vector<int64_t> contiguous_strides() const {
    std::vector<int64_t> contiguous(ndim, 1);
    for (int d = ndim - 1; d-- > 0;) contiguous[d] = contiguous[d + 1] * sizes()[d + 1];
    return contiguous;
  }

  // Whether the elements fill one contiguous range of memory: in row-major order, or in any order.
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = ndim; d-- > 0;) {
      if (sizes()[d] != 1 && strides()[d] != expected) return false;
      expected *= sizes()[d];
    }
    return true;
  }
  bool dense() const {
    int64_t expected = 1;
    for (const int d : order()) {
      if (sizes()[d] == 1) continue;
      if (strides()[d] != expected) return false;
      expected *= sizes()[d];
    }
    return true;
  }

  Operand operand() const { return {data, dtype, strides()}; }

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t ndim = 0;
  dlpack::Device device{};

 private:
  static void* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  static constexpr int kFew = 5;

  const int64_t* implementation_ = nullptr;  // where torch keeps the sizes, inside the tensor's implementation
  // Sizes, then strides. Most tensors have few dimensions, and reading one should cost one cache line.
  int64_t few_[2 * kFew] = {};
  std::unique_ptr<int64_t[]> many_;
};

// A state tensor of a plan. It holds a second reference to the implementation: as long as Python's is the only one,
// every DLPack read moves it to C++ and back, at three times the cost.
struct Held {
  explicit Held(const py::handle& tensor) : object(py::reinterpret_borrow<py::object>(tensor)), view(tensor) {
    dlpack::Managed* managed = nullptr;
    if (exchange->managed_from_object(tensor.ptr(), &managed)) throw py::error_already_set();
    second.reset(managed, [](dlpack::Managed* m) { m->release(m); });
  }
  bool unmoved() const { return view.unmoved(object.ptr()); }
  FUSED_OPT_FN void prefetch() const { view.prefetch(object.ptr()); }

  py::object object;
  View view;
  std::shared_ptr<dlpack::Managed> second;
};

}  // namespace
}  // namespace fused_opt
