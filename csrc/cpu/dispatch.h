// The choice of kernels: the best that this processor has, or requested ones.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace lorasb {

// The active table, for the entire process.
const Kernels& kernels();

// Names of the instruction sets that this processor has, the best first.
std::vector<std::string> instruction_sets();

// True if the processor has AMX for bf16, whatever LORASB_MAX_CPU_ISA says: the BLAS uses it in any case.
bool has_amx();

// True if the processor multiplies fp16 (AVX512-FP16), and torch with it; false under a cap.
bool multiplies_fp16();

// Switches to one of them, or with "" to the best again; raises a ValueError for any other name.
void use_instruction_set(const std::string& name);

}  // namespace lorasb
