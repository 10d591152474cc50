// The part of the DLPack C exchange API (dmlc/dlpack, version 1) that is used here: how to read a tensor's pointer,
// shape and strides without its library's headers.
#pragma once
#include <cstdint>

namespace fused_opt::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Owns a reference to the tensor's implementation.
struct Managed {
  uint32_t major, minor;
  void* context;
  void (*release)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeAPI {
  uint32_t major, minor;
  ExchangeAPI* previous;
  void* allocate;
  int (*managed_from_object)(void* object, Managed** out);
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0, or -1 with the Python error set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace fused_opt::dlpack
