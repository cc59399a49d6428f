// A device "second" that computes on the CPU. As on a GPU, an operation that mixes its tensors with the CPU's raises.
// After `remove_fp64` it has neither fp64 nor factorizations, as Apple's GPUs.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using Sizes = c10::SymIntArrayRef;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
bool has_fp64 = true;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* found = std::malloc(size ? size : 1);
    return {found, found, &std::free, c10::Device(KIND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} memory;

const struct Registered {
  Registered() {
    c10::SetAllocator(KIND, &memory);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
  }
} registered;

at::ScalarType checked(std::optional<at::ScalarType> dtype) {
  auto type = c10::dtype_or_default(dtype);
  TORCH_CHECK_TYPE(has_fp64 || type != at::kDouble, "this device has no float64");
  return type;
}

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, checked(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           KEYS, checked(dtype));
}

Tensor on_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  at::NoGradGuard guard;
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

Tensor copy_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

const Tensor& resize(const Tensor& tensor, Sizes size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const size_t bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (bytes > storage->nbytes()) {
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(larger));
    storage->set_nbytes(bytes);
  }
  return tensor;
}

Tensor as_strided(const Tensor& tensor, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(tensor, size, stride, offset);
}

Tensor view(const Tensor& tensor, Sizes size) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor& set_storage(Tensor& tensor, at::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  return at::native::set_storage_cpu_(tensor, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar scalar(const Tensor& tensor) { return on_cpu(tensor).item(); }

// Every other operation: on copies of its arguments on the CPU.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.operator_name().name;
  const auto is = [&](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  bool here = false, there = false;
  const auto see = [&](const Tensor& tensor) {
    here |= tensor.defined() && tensor.device().type() == KIND;
    there |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorList()) see(tensor);
  }
  TORCH_CHECK(!(here && there) || is("aten::index"), "expected all tensors to be on one device: ", name);
  const bool factors =
      is("aten::linalg_qr") || is("aten::linalg_inv") || is("aten::_linalg_svd") || is("aten::_linalg_eigh");
  TORCH_CHECK_NOT_IMPLEMENTED(has_fp64 || !factors, "this device has no ", name);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

extern "C" void remove_fp64() { has_fp64 = false; }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_and_resize);
  library.impl("resize_", resize);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("_local_scalar_dense", scalar);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}
