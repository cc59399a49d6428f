// Which kernels run: the best that this processor has, or what was asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lorasb {

const Kernels& kernels();

// Names of the instruction sets that this processor has, the best first.
std::vector<std::string> instruction_sets();

// Whether the processor multiplies tiles of bf16 (AMX).
bool has_matrix_tiles();

// Use one of them, or with "" the best again; false where there is none of that name.
bool use_instruction_set(const std::string& name);

}  // namespace lorasb
