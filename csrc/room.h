// Memory that a thread keeps for what it works on, in huge pages where the system has them.
#pragma once

#include <cstddef>

namespace lorasb {

constexpr size_t kHugePage = size_t{2} << 20;  // bytes

// Fresh memory of many pages costs more to be given than to be written: ask for it in huge ones.
void want_huge_pages(void* memory, size_t size);

// At least `size` bytes, aligned to a page; whatever was in them is gone, and so they are at this thread's next call.
void* kept_room(size_t size);

}  // namespace lorasb
