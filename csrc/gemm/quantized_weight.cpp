#include "gemm/quantized_weight.h"

#include <ATen/Parallel.h>

#include <limits>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), "expected ", name, " on the CPU, got it on ", tensor.device(),
                    ": move the weight and its statistics together, with model.to(...)");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "expected ", name, " in ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "expected ", name, " in one piece, got strides ", tensor.strides());
}

void check_length(const at::Tensor& tensor, const char* name, int64_t length) {
  TORCH_CHECK_VALUE(tensor.numel() == length, "expected ", length, " entries of ", name, ", got ", tensor.numel(),
                    ": the packed weight, its statistics and its shape do not belong together");
}

// The factor by which a table is multiplied before its entries are rounded to bf16. Of 4096 factors between 1 and 2
// these leave the least error: 6e-4 in NF4's entries, where 1 leaves 1.1e-3, and none in FP4's.
float choose_balance(const float* table) {
  float best = 1.0f, least = std::numeric_limits<float>::infinity();
  for (const float factor : {1.0f, 1.43701171875f, 1.0078125f}) {
    float error = 0.0f;
    for (int i = 0; i < 16; ++i) {
      const float value = factor * table[i], rounded = static_cast<float>(at::BFloat16(value));
      const float difference = (rounded - value) / factor;
      error += difference * difference;
    }
    if (error < least) {
      least = error;
      best = factor;
    }
  }
  return best;
}

void unpack_nested(at::TensorList tensors, int64_t block2, int64_t blocks, Packed& w) {
  TORCH_CHECK_VALUE(block2 > 0, "expected a positive block size of nested statistics, got ", block2);
  check_tensor(tensors[1], "absmax (nested statistics)", at::kByte);
  check_tensor(tensors[3], "nested absmax", at::kFloat);
  check_tensor(tensors[4], "the nested table", at::kFloat);
  check_tensor(tensors[5], "the nested offset", at::kFloat);
  check_length(tensors[3], "nested absmax", ceil_div(blocks, block2));
  check_length(tensors[4], "the nested table", 256);
  check_length(tensors[5], "the nested offset", 1);
  w.absmax8 = tensors[1].const_data_ptr<uint8_t>();
  w.absmax2 = tensors[3].const_data_ptr<float>();
  w.table2 = tensors[4].const_data_ptr<float>();
  w.offset = *tensors[5].const_data_ptr<float>();
  w.block2 = block2;
  w.shift2 = (block2 & (block2 - 1)) == 0 ? __builtin_ctzll(static_cast<unsigned long long>(block2)) : -1;
}

Packed unpack_codes(at::TensorList tensors, Packed w) {
  check_tensor(tensors[0], "the weight", at::kChar);
  check_tensor(tensors[1], "its row scales", at::kFloat);
  check_length(tensors[0], "the weight", w.rows * w.columns);
  check_length(tensors[1], "its row scales", w.rows);
  w.codes = tensors[0].const_data_ptr<int8_t>();
  w.scales = tensors[1].const_data_ptr<float>();
  return w;
}

}  // namespace

Packed unpack(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(tensors.size() == 2 || tensors.size() == 3 || tensors.size() == 6,
                    "expected 2, 3 or 6 tensors of a quantized weight, got ", tensors.size());
  TORCH_CHECK_VALUE(layout.size() == 3, "expected [block, nested block, rounding], got ", layout);
  TORCH_CHECK_VALUE(layout[2] >= 0 && layout[2] <= 2, "expected a rounding of 0, 1 or 2, got ", layout[2]);
  // 2^46 elements: sizes in bytes and numbers of elements cannot overflow.
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0 && (columns == 0 || rows <= (int64_t{1} << 46) / columns),
                    "expected a weight of a possible shape, got [", rows, ", ", columns, "]");
  Packed w;
  w.rows = rows;
  w.columns = columns;
  w.rounding = static_cast<Rounding>(layout[2]);
  if (tensors.size() == 2) return unpack_codes(tensors, w);
  w.block = layout[0];
  // Even blocks begin at whole bytes.
  TORCH_CHECK_VALUE(w.block >= 2 && w.block % 2 == 0, "expected an even block size, got ", w.block);
  const int64_t blocks = ceil_div(rows * columns, w.block);
  check_tensor(tensors[0], "the packed weight", at::kByte);
  check_tensor(tensors[2], "the table", at::kFloat);
  check_length(tensors[0], "the packed weight", ceil_div(rows * columns, 2));
  check_length(tensors[1], "absmax", blocks);
  check_length(tensors[2], "the table", 16);
  w.bytes = tensors[0].const_data_ptr<uint8_t>();
  w.table = tensors[2].const_data_ptr<float>();
  w.balance = choose_balance(w.table);
  if (tensors.size() == 6) {
    unpack_nested(tensors, layout[1], blocks, w);
  } else {
    check_tensor(tensors[1], "absmax", at::kFloat);
    w.absmax = tensors[1].const_data_ptr<float>();
  }
  return w;
}

void decode_panel(const Packed& w, Range rows, Range columns, at::Tensor& panel) {
  const Kernels& k = kernels();
  const auto decode = [&](int64_t first, int64_t count, int64_t offset) {
    if (panel.scalar_type() == at::kFloat) {
      k.decode_f32(w, first, count, panel.mutable_data_ptr<float>() + offset);
    } else if (panel.scalar_type() == at::kBFloat16) {
      k.decode_bf16(w, first, count, mutable_bits(panel) + offset);
    } else {
      k.decode_f16(w, first, count, reinterpret_cast<uint16_t*>(panel.mutable_data_ptr<at::Half>()) + offset);
    }
  };
  const int64_t width = columns.size();
  if (width == w.columns) {  // one run of elements; tasks begin at even ones, as kTaskElements is even
    const int64_t start = rows.begin * width, count = rows.size() * width;
    at::parallel_for(0, ceil_div(count, kTaskElements), 1, [&](int64_t begin, int64_t end) {
      const int64_t low = begin * kTaskElements, high = std::min(end * kTaskElements, count);
      decode(start + low, high - low, low);
    });
    return;
  }
  at::parallel_for(rows.begin, rows.end, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) decode(r * w.columns + columns.begin, width, (r - rows.begin) * width);
  });
}

namespace {

// A whole weight: fresh pages would take longer than decoding into them.
at::Tensor allocate_weight(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const size_t size = rows * columns * options.dtype().itemsize();
  if (size < kHugePage) return at::empty({rows, columns}, options);
  void* memory = borrow_pages(size);
  return at::from_blob(memory, {rows, columns}, [size](void* pages) { return_pages(pages, size); }, options);
}

}  // namespace

at::Tensor dequantize(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns,
                      at::ScalarType dtype) {
  const Packed w = unpack(tensors, layout, rows, columns);
  const bool direct = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_TYPE(direct || dtype == at::kDouble, "expected fp64, fp32, bf16 or fp16 to dequantize to, got ", dtype);
  at::Tensor out = allocate_weight(rows, columns, tensors[0].options().dtype(direct ? dtype : at::kFloat));
  if (dtype == at::kBFloat16 && kernels().stream_bf16 != nullptr && out.nbytes() >= last_cache_size()) {
    // Pages are aligned and tasks whole cache lines, which non-temporal stores need.
    uint16_t* dst = mutable_bits(out);
    const int64_t count = rows * columns;
    at::parallel_for(0, ceil_div(count, kTaskElements), 1, [&](int64_t begin, int64_t end) {
      const int64_t low = begin * kTaskElements, high = std::min(end * kTaskElements, count);
      kernels().stream_bf16(w, low, high - low, dst + low);
    });
    return out;
  }
  decode_panel(w, {0, rows}, {0, columns}, out);
  return direct ? out : out.to(dtype);
}

}  // namespace lorasb
