// Scratch memory that is reused, in huge pages where the system has them.
//
// A kernel that streams through fresh memory pays a page fault for every 4 KiB, which takes longer than writing them.
// Blocks of a weight and packed tokens are therefore in memory that each thread keeps until it ends; results as large
// as a full weight are borrowed from one spare allocation of the process.
#pragma once

#include <cstddef>

namespace lorasb {

constexpr size_t kHugePage = size_t{2} << 20;  // bytes

// Bytes of last-level cache to count on; a larger result is no longer in it by the time that it is read.
size_t last_cache_size();

// One allocation per thread and use: a thread may need both at once.
enum class Scratch : int { weight_block = 0, packed_tokens = 1 };

// At least `size` bytes of this thread, aligned to a huge page. Contents are undefined; the pointer is invalid after
// this thread's next call for the same use.
void* thread_scratch(size_t size, Scratch use);

// Memory for a result's tensor, in huge pages, until return_pages. The allocation that was returned last is kept and
// used again if it has the same size and at most 64 MiB.
void* borrow_pages(size_t size);
void return_pages(void* memory, size_t size);

}  // namespace lorasb
