// Reads the gradients of a list of parameters as Python has them, by DLPack's exchange interface:
// no header of PyTorch, and none of its layouts.
#pragma once

#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "python/overlaps.h"

namespace mmfuse::python {

// The layout of DLPack 1; what is not used has no type.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManaged {
  uint32_t major, minor;
  void* context;
  void (*free)(DLManaged* self);
  uint64_t flags;
  DLTensor tensor;
};

struct DLExchange {
  uint32_t major, minor;
  void *older, *allocate, *managed;
  int (*to_python)(DLManaged* tensor, void** out);
  int (*read)(void* object, DLTensor* out);  // borrows; waits for no device
  void* stream;
};

constexpr int32_t kCPU = 1, kCUDA = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4;
// A row of a table, as `glue/table.h` reads it: data, number of elements, dtypes, stream id,
// channels and spatial size of a row order, and the data of parameter and anchor, 0 without them.
constexpr int64_t kRow = 8;
// `glue/tensors.h` has it, too.
constexpr int64_t kLongestRow = int64_t{1} << 20;

// A reference that ends with its scope.
class Object {
 public:
  explicit Object(PyObject* object = nullptr) : object_(object) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

inline bool is_contiguous(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

inline int64_t numel_of(const DLTensor& tensor) {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.ndim; ++d) count *= tensor.shape[d];
  return count;
}

// True if the tensor is in channels_last, with rows that the kernels can have; as `row_order` of
// `glue/tensors.h` has it.
inline bool is_channels_last(const DLTensor& tensor) {
  if ((tensor.ndim != 4 && tensor.ndim != 5) || tensor.strides == nullptr) return false;
  int64_t expected = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    const int32_t d = i == 0 ? 1 : i == tensor.ndim - 1 ? 0 : tensor.ndim - i;
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return numel_of(tensor) <= kLongestRow * tensor.shape[0];
}

inline bool is_of_shape(const DLTensor& tensor, const DLTensor& other) {
  return tensor.ndim == other.ndim &&
         std::equal(tensor.shape, tensor.shape + tensor.ndim, other.shape);
}

inline int64_t data_of(const DLTensor& tensor) {
  return reinterpret_cast<int64_t>(static_cast<char*>(tensor.data) + tensor.byte_offset);
}

inline bool dtype_of(const DLTensor& tensor, DType* out) {
  if (tensor.lanes != 1) return false;
  if (tensor.code == kBFloat && tensor.bits == 16) return *out = DType::kBFloat16, true;
  if (tensor.code != kFloat) return false;
  if (tensor.bits == 32) return *out = DType::kFloat32, true;
  if (tensor.bits == 64) return *out = DType::kFloat64, true;
  if (tensor.bits == 16) return *out = DType::kFloat16, true;
  return false;
}

// An attribute that plain tensors and parameters have from C; to look it up by name takes as long
// again as to get it.
struct Attribute {
  PyObject* name = nullptr;
  const PyGetSetDef* own = nullptr;  // null where the two classes have it from elsewhere

  void find(PyObject* tensor_type, PyObject* parameter_type, const char* called) {
    name = PyUnicode_InternFromString(called);
    const Object of_tensor(PyObject_GetAttr(tensor_type, name));
    const Object of_parameter(PyObject_GetAttr(parameter_type, name));
    if (!of_tensor || !of_parameter) return PyErr_Clear();
    if (Py_TYPE(of_tensor.get()) != &PyGetSetDescr_Type) return;
    if (of_tensor.get() != of_parameter.get()) return;
    own = reinterpret_cast<PyGetSetDescrObject*>(of_tensor.get())->d_getset;  // a static table's
  }

  // `plain`: the object is of one of the two classes itself. A new reference, or null.
  PyObject* of(PyObject* object, bool plain) const {
    if (plain && own != nullptr) return own->get(object, own->closure);
    return PyObject_GetAttr(object, name);
  }
};

// Looked up once: PyTorch's type of tensors and how they are read.
struct Reader {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const DLExchange* exchange = nullptr;
  Attribute grad, requires_grad, version;
  PyObject *numel, *is_neg;

  // False where this PyTorch has no such interface, or one of another major version.
  bool find(PyObject* tensor_type, PyObject* parameter_type) {
    const Object capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
    void* found = capsule ? PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api") : nullptr;
    if (found == nullptr) return PyErr_Clear(), false;
    exchange = static_cast<const DLExchange*>(found);
    if (exchange->major != 1 || exchange->read == nullptr) return false;
    Py_INCREF(tensor_type);
    Py_INCREF(parameter_type);
    tensor = reinterpret_cast<PyTypeObject*>(tensor_type);
    parameter = reinterpret_cast<PyTypeObject*>(parameter_type);
    grad.find(tensor_type, parameter_type, "grad");
    requires_grad.find(tensor_type, parameter_type, "requires_grad");
    version.find(tensor_type, parameter_type, "_version");
    numel = PyUnicode_InternFromString("numel");
    is_neg = PyUnicode_InternFromString("is_neg");
    return true;
  }

  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter;
  }
};

// A kernel reads it soon. Of many small tensors this takes the wait for each one's first bytes and
// for its page's address, while the next ones are looked at.
inline void prefetch_head(const char* data) {
#if defined(__GNUC__)
  for (int line = 0; line < 4; ++line) __builtin_prefetch(data + 64 * line, 1);
#endif
}

enum class Found { kPlain, kOther, kError };

// A method without arguments that returns a number or a truth value; -1 and an error, if there is.
inline long ask(PyObject* object, PyObject* method) {
  const Object answer(PyObject_CallMethodNoArgs(object, method));
  return answer ? PyLong_AsLong(answer.get()) : -1;
}

// Looks at one tensor: its order in memory, which is contiguous if `channels` is 1, and its dtype.
// Whatever a kernel could not take as it is, is other.
inline Found look_at(const Reader& reader, PyObject* tensor, DLTensor* out, DType* dtype,
                     bool* last) {
  if (reader.exchange->read(tensor, out) != 0) return PyErr_Clear(), Found::kOther;
  if (out->device_type != kCPU && out->device_type != kCUDA) return Found::kOther;
  const int64_t count = numel_of(*out);
  if (!dtype_of(*out, dtype) || count == 0 || out->data == nullptr) return Found::kOther;
  *last = !is_contiguous(*out);
  if (*last && !is_channels_last(*out)) return Found::kOther;
  // The negative view that an imaginary part is has gaps, unless it is of one element.
  if (count == 1) {
    const long negated = ask(tensor, reader.is_neg);
    if (negated != 0) return negated < 0 ? Found::kError : Found::kOther;
  }
  return Found::kPlain;
}

inline bool is_on_device_of(const DLTensor& tensor, const DLTensor& other) {
  return tensor.device_type == other.device_type && tensor.device_id == other.device_id;
}

// Reads one gradient into a row of the table.
inline Found read_gradient(const Reader& reader, PyObject* grad, DLTensor* one, DLTensor* first,
                           int64_t* row) {
  if (Py_TYPE(grad) != reader.tensor) return Found::kOther;
  DType dtype;
  bool last;
  const Found found = look_at(reader, grad, one, &dtype, &last);
  if (found != Found::kPlain) return found;
  if (first->data == nullptr) *first = *one;
  if (!is_on_device_of(*one, *first)) return Found::kOther;
  row[0] = data_of(*one);
  if (one->device_type == kCPU) prefetch_head(reinterpret_cast<const char*>(row[0]));
  row[1] = numel_of(*one);
  row[2] = static_cast<int64_t>(dtype);
  row[4] = last ? one->shape[1] : 1;
  row[5] = last ? row[1] / one->shape[0] / one->shape[1] : 1;
  row[6] = row[7] = 0;
  return Found::kPlain;
}

// Adds a parameter (k = 0) or its anchor (k = 1) to the row of its gradient, if both lie alike.
inline Found read_beside(const Reader& reader, PyObject* tensor, const DLTensor& grad, int k,
                         int64_t* row) {
  if (!reader.is_plain(tensor)) return Found::kOther;
  DLTensor one;
  DType dtype;
  bool last;
  const Found found = look_at(reader, tensor, &one, &dtype, &last);
  if (found != Found::kPlain) return found;
  if (!is_on_device_of(one, grad) || !is_of_shape(one, grad) || last != !is_contiguous(grad)) {
    return Found::kOther;
  }
  row[2] |= static_cast<int64_t>(dtype) << (8 * (k + 1));
  row[6 + k] = data_of(one);
  return Found::kPlain;
}

// A table as a tensor of PyTorch, which frees it. Not by torch.empty: that is an operator.
struct Table {
  DLManaged managed{};
  int64_t shape[2], strides[2];
  std::vector<int64_t> numbers;

  // The last one that was freed: a step's table is the next one's, with no work for malloc.
  inline static std::atomic<Table*> last{nullptr};

  static std::unique_ptr<Table> of_rows(Py_ssize_t count) {
    std::unique_ptr<Table> table(last.exchange(nullptr));
    if (!table) table = std::make_unique<Table>();
    table->managed = {};
    table->numbers.resize(count * kRow);
    return table;
  }

  // Whatever thread lets go of it runs this.
  static void free(DLManaged* managed) {
    delete last.exchange(static_cast<Table*>(managed->context));
  }
};

inline PyObject* to_python(const Reader& reader, std::unique_ptr<Table> table) {
  table->shape[0] = static_cast<int64_t>(table->numbers.size()) / kRow;
  table->shape[1] = table->strides[0] = kRow;
  table->strides[1] = 1;
  table->managed.major = 1;
  table->managed.context = table.get();
  table->managed.free = Table::free;
  table->managed.tensor = {table->numbers.data(), kCPU,           0, 2, kInt, 64, 1,
                           table->shape,          table->strides, 0};
  void* made = nullptr;
  // After an error nobody knows if PyTorch has freed it.
  DLManaged* given = &table.release()->managed;
  if (reader.exchange->to_python(given, &made) != 0) return nullptr;
  return static_cast<PyObject*>(made);
}

inline bool append_number(PyObject* list, Py_ssize_t number) {
  const Object made(PyLong_FromSsize_t(number));
  return made && PyList_Append(list, made.get()) == 0;
}

// (gradients, their places or None for all, places of those that wait for one, whether one is
// float64, table, whether the table has parameters and anchors too); None where a gradient is not
// contiguous or in channels_last, dense, floating, not empty and on the device of the others, or is
// no plain tensor. `anchors` is a list of one for each parameter, or None. Null and an error, where
// Python has raised one.
inline PyObject* read_gradients(const Reader& reader, PyObject* parameters, PyObject* anchors) {
  const auto other = [] { return Py_NewRef(Py_None); };
  if (reader.exchange == nullptr || !PyList_CheckExact(parameters)) return other();
  const Py_ssize_t count = PyList_GET_SIZE(parameters);
  bool paired = PyList_CheckExact(anchors) && PyList_GET_SIZE(anchors) == count;
  auto table = Table::of_rows(count);
  int64_t* row = table->numbers.data();
  Object grads(PyList_New(count)), places(PyList_New(0)), waiting(PyList_New(0));
  if (!grads || !places || !waiting) return nullptr;
  DLTensor one, first{};
  bool wide = false;
  Py_ssize_t listed = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* parameter = PyList_GET_ITEM(parameters, i);
    const bool plain = reader.is_plain(parameter);
    const Object takes(reader.requires_grad.of(parameter, plain));
    if (!takes) return nullptr;
    if (takes.get() == Py_False) continue;
    Object grad(reader.grad.of(parameter, plain));
    if (!grad) return nullptr;
    if (grad.get() == Py_None) {
      const long elements = ask(parameter, reader.numel);
      if (elements < 0 || (elements > 0 && !append_number(waiting.get(), i))) return nullptr;
      continue;
    }
    const Found found = read_gradient(reader, grad.get(), &one, &first, row);
    if (found != Found::kPlain) return found == Found::kOther ? other() : nullptr;
    row[3] = i;
    wide = wide || row[2] == static_cast<int64_t>(DType::kFloat64);
    for (int k = 0; paired && k < 2; ++k) {
      PyObject* beside = k == 0 ? parameter : PyList_GET_ITEM(anchors, i);
      const Found second = read_beside(reader, beside, one, k, row);
      if (second == Found::kError) return nullptr;
      paired = second == Found::kPlain;
    }
    row += kRow;
    PyList_SET_ITEM(grads.get(), listed++, grad.release());
  }
  if (listed < count && PyList_SetSlice(grads.get(), listed, count, nullptr) != 0) return nullptr;
  for (Py_ssize_t t = 0; listed < count && t < listed; ++t) {
    const int64_t place = table->numbers[t * kRow + 3];
    if (!append_number(places.get(), static_cast<Py_ssize_t>(place))) return nullptr;
  }
  PyObject* ids = listed == count ? Py_None : places.get();
  table->numbers.resize(listed * kRow);
  const Object rows(to_python(reader, std::move(table)));
  if (!rows) return nullptr;
  PyObject* is_wide = wide ? Py_True : Py_False;
  PyObject* is_paired = paired ? Py_True : Py_False;
  return PyTuple_Pack(6, grads.get(), ids, waiting.get(), is_wide, rows.get(), is_paired);
}

// (whether one is float64, table) of lists of gradients and, each a list or None, of parameters and
// anchors; None where `read_gradients` has none, or a parameter or anchor does not lie as its
// gradient does, or, with `apart`, one that is written shares memory with another tensor.
inline PyObject* read_list(const Reader& reader, PyObject* grads, PyObject* params,
                           PyObject* anchors, bool apart = false) {
  const auto other = [] { return Py_NewRef(Py_None); };
  if (reader.exchange == nullptr || !PyList_CheckExact(grads)) return other();
  const Py_ssize_t count = PyList_GET_SIZE(grads);
  if (count == 0) return other();
  PyObject* beside[] = {params, anchors};
  for (PyObject* list : beside) {
    if (list == Py_None) continue;
    if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) != count) return other();
  }
  auto table = Table::of_rows(count);
  DLTensor one, first{};
  bool wide = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    int64_t* row = &table->numbers[i * kRow];
    PyObject* grad = PyList_GET_ITEM(grads, i);
    Found found = read_gradient(reader, grad, &one, &first, row);
    // A tensor of inference mode, which nobody may change, has none.
    if (found == Found::kPlain && !Object(reader.version.of(grad, true))) {
      return PyErr_Clear(), other();
    }
    wide = wide || row[2] == static_cast<int64_t>(DType::kFloat64);
    for (int k = 0; found == Found::kPlain && k < 2; ++k) {
      if (beside[k] == Py_None) continue;
      found = read_beside(reader, PyList_GET_ITEM(beside[k], i), one, k, row);
    }
    if (found != Found::kPlain) return found == Found::kOther ? other() : nullptr;
    row[3] = i;
  }
  if (apart && share_memory(table->numbers.data(), count, kRow)) return other();
  const Object rows(to_python(reader, std::move(table)));
  if (!rows) return nullptr;
  return PyTuple_Pack(2, wide ? Py_True : Py_False, rows.get());
}

}  // namespace mmfuse::python
