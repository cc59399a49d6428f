// Memory that a thread keeps for what it works on, in huge pages where the system has them.
#pragma once

#include <cstddef>

namespace lorasb {

constexpr size_t kHugePage = size_t{2} << 20;  // bytes

// Bytes of the last-level cache that one may count on; what this much is written at once is not in it when it is read.
size_t last_cache_size();

// Fresh memory of many pages costs more to be given than to be written: ask for it in huge ones.
void want_huge_pages(void* memory, size_t size);

// What a thread keeps memory for: a weight's pieces at work, and tokens in another order.
enum class Keeps : int { pieces = 0, tokens = 1 };

// At least `size` bytes, aligned to a page; whatever was in them is gone, and so they are at this thread's next call.
void* kept_room(size_t size, Keeps keeps = Keeps::pieces);

// Memory for a tensor, in huge pages, that goes back with `return_room`. What the last one left, if it is no more than
// 64 MiB, is kept and used again: the system takes longer to give pages than a kernel to fill them.
void* lent_room(size_t size);
void return_room(void* memory, size_t size);

}  // namespace lorasb
