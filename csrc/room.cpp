#include "room.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lorasb {

void want_huge_pages(void* memory, size_t size) {
#ifdef __linux__
  const size_t begin = reinterpret_cast<size_t>(memory);
  const size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, end = (begin + size) / kHugePage * kHugePage;
  if (first + kHugePage <= end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void* kept_room(size_t size) {
  thread_local std::unique_ptr<char, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local size_t room = 0;
  const size_t wanted = (size + kHugePage - 1) / kHugePage * kHugePage;
  if (room < wanted) {
    kept.reset(static_cast<char*>(std::aligned_alloc(kHugePage, wanted)));
    room = kept ? wanted : 0;
    TORCH_CHECK(kept, "no memory for ", wanted, " bytes of a weight at work");
    want_huge_pages(kept.get(), wanted);
  }
  return kept.get();
}

}  // namespace lorasb
