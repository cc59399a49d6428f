#include "room.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lorasb {
namespace {

constexpr size_t kMostKept = size_t{64} << 20;

size_t whole_pages(size_t size) { return (size + kHugePage - 1) / kHugePage * kHugePage; }

void* huge_pages(size_t size) {
  void* memory = std::aligned_alloc(kHugePage, size);
  TORCH_CHECK(memory != nullptr, "no memory for ", size, " bytes of a weight");
  want_huge_pages(memory, size);
  return memory;
}

// One piece of memory without a user.
std::mutex guard;
void* spare = nullptr;
size_t spare_size = 0;

}  // namespace

size_t last_cache_size() {
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (found > 0) return static_cast<size_t>(found);
#endif
  return size_t{32} << 20;
}

void want_huge_pages(void* memory, size_t size) {
#ifdef __linux__
  const size_t begin = reinterpret_cast<size_t>(memory);
  const size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, end = (begin + size) / kHugePage * kHugePage;
  if (first + kHugePage <= end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void* kept_room(size_t size) {
  thread_local std::unique_ptr<void, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local size_t room = 0;
  if (room < size) {
    room = 0;
    kept.reset();
    kept.reset(huge_pages(whole_pages(size)));
    room = whole_pages(size);
  }
  return kept.get();
}

void* lent_room(size_t size) {
  size = whole_pages(size);
  {
    const std::lock_guard<std::mutex> lock(guard);
    if (spare != nullptr && spare_size == size) return std::exchange(spare, nullptr);
  }
  return huge_pages(size);
}

void return_room(void* memory, size_t size) {
  size = whole_pages(size);
  if (size <= kMostKept) {
    const std::lock_guard<std::mutex> lock(guard);
    std::swap(spare, memory);
    spare_size = size;
  }
  std::free(memory);
}

}  // namespace lorasb
