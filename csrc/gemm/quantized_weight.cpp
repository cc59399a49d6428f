#include "gemm/quantized_weight.h"

#include <ATen/Parallel.h>

#include <limits>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

// Checks a tensor and returns its elements.
template <typename T>
const T* elements_of(const Tensor& tensor, const char* name, int64_t length) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), "expected ", name, " on the CPU, got it on ", tensor.device(),
                    ": move the weight and its statistics together, with model.to(...)");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "expected ", name, " in ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "expected ", name, " to be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.numel() == length, "expected ", length, " entries of ", name, ", got ", tensor.numel(),
                    ": the packed weight, its statistics and its shape do not match");
  return tensor.const_data_ptr<T>();
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
  w.absmax8 = elements_of<uint8_t>(tensors[1], "absmax (nested statistics)", blocks);
  w.absmax2 = elements_of<float>(tensors[3], "nested absmax", ceil_div(blocks, block2));
  w.table2 = elements_of<float>(tensors[4], "the nested table", 256);
  w.offset = *elements_of<float>(tensors[5], "the nested offset", 1);
  w.block2 = block2;
  w.shift2 = (block2 & (block2 - 1)) == 0 ? __builtin_ctzll(static_cast<unsigned long long>(block2)) : -1;
}

// Memory for all of a weight, reused: fresh pages would take longer than decoding into them.
Tensor allocate_weight(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const size_t size = rows * columns * options.dtype().itemsize();
  if (size < kHugePage) return at::empty({rows, columns}, options);
  void* memory = borrow_pages(size);
  return at::from_blob(memory, {rows, columns}, [size](void* pages) { return_pages(pages, size); }, options);
}

}  // namespace

Packed unpack(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(tensors.size() == 2 || tensors.size() == 3 || tensors.size() == 6,
                    "expected 2, 3 or 6 tensors of a quantized weight, got ", tensors.size());
  TORCH_CHECK_VALUE(layout.size() == 3, "expected [block, nested block, rounding], got ", layout);
  TORCH_CHECK_VALUE(layout[2] >= 0 && layout[2] <= 2, "expected a rounding of 0, 1 or 2, got ", layout[2]);
  // At most 2^46 elements, so that sizes in bytes and numbers of elements cannot overflow.
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0 && (columns == 0 || rows <= (int64_t{1} << 46) / columns),
                    "expected a weight of a possible shape, got [", rows, ", ", columns, "]");
  Packed w;
  w.rows = rows;
  w.columns = columns;
  w.rounding = static_cast<Rounding>(layout[2]);
  if (tensors.size() == 2) {
    w.codes = elements_of<int8_t>(tensors[0], "the weight", rows * columns);
    w.scales = elements_of<float>(tensors[1], "its row scales", rows);
    return w;
  }
  w.block = layout[0];
  // Even blocks begin at byte boundaries.
  TORCH_CHECK_VALUE(w.block >= 2 && w.block % 2 == 0, "expected an even block size, got ", w.block);
  const int64_t blocks = ceil_div(rows * columns, w.block);
  w.bytes = elements_of<uint8_t>(tensors[0], "the packed weight", ceil_div(rows * columns, 2));
  w.table = elements_of<float>(tensors[2], "the table", 16);
  w.balance = choose_balance(w.table);
  if (tensors.size() == 6) {
    unpack_nested(tensors, layout[1], blocks, w);
  } else {
    w.absmax = elements_of<float>(tensors[1], "absmax", blocks);
  }
  return w;
}

void decode_panel(const Packed& w, Range rows, Range columns, Tensor& panel) {
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
    return over_rows(rows.size() * width, 1, kTaskElements,
                     [&](int64_t low, int64_t high) { decode(rows.begin * width + low, high - low, low); });
  }
  at::parallel_for(rows.begin, rows.end, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) decode(r * w.columns + columns.begin, width, (r - rows.begin) * width);
  });
}

Tensor dequantize(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns, at::ScalarType dtype) {
  const Packed w = unpack(tensors, layout, rows, columns);
  const bool direct = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_TYPE(direct || dtype == at::kDouble, "expected fp64, fp32, bf16 or fp16 to dequantize to, got ", dtype);
  Tensor out = allocate_weight(rows, columns, tensors[0].options().dtype(direct ? dtype : at::kFloat));
  if (dtype == at::kBFloat16 && kernels().stream_bf16 != nullptr && out.nbytes() >= last_cache_size()) {
    // Pages are aligned, and tasks are full cache lines, as non-temporal stores require.
    uint16_t* dst = mutable_bits(out);
    over_rows(rows * columns, 1, kTaskElements,
              [&](int64_t low, int64_t high) { kernels().stream_bf16(w, low, high - low, dst + low); });
    return out;
  }
  decode_panel(w, {0, rows}, {0, columns}, out);
  return direct ? out : out.to(dtype);
}

}  // namespace lorasb
