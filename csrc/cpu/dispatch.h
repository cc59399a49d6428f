// Which kernels run: the best that this processor has, or what was asked for.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace lorasb {

constexpr const char* kCapVariable = "LORASB_MAX_CPU_ISA";

const Kernels& kernels();

// Names of the instruction sets that this processor has, the best first.
std::vector<std::string> instruction_sets();

// Whether the processor multiplies tiles of bf16 (AMX).
bool has_matrix_tiles();

// Whether the processor multiplies fp16 (AVX512-FP16), and torch with it.
bool multiplies_fp16();

// Use one of them, or with "" the best again; false where there is none of that name.
bool use_instruction_set(const std::string& name);

}  // namespace lorasb
