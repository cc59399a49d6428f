#include "cpu/scratch_memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
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

// Fresh from the system where that is possible: what the allocator has at hand lies in small pages already.
void* huge_pages(size_t size) {
#ifdef __linux__
  const size_t more = size + kHugePage;
  char* found = static_cast<char*>(mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  TORCH_CHECK(found != MAP_FAILED, "no memory for ", size, " bytes of a weight");
  const size_t before = (kHugePage - reinterpret_cast<size_t>(found) % kHugePage) % kHugePage;
  if (before > 0) munmap(found, before);
  if (before < kHugePage) munmap(found + before + size, kHugePage - before);
  want_huge_pages(found + before, size);
  return found + before;
#else
  void* memory = std::aligned_alloc(kHugePage, size);
  TORCH_CHECK(memory != nullptr, "no memory for ", size, " bytes of a weight");
  return memory;
#endif
}

void free_pages(void* memory, size_t size) {
#ifdef __linux__
  if (memory != nullptr) munmap(memory, size);
#else
  std::free(memory);
#endif
}

// One piece of memory without a user.
std::mutex guard;
void* spare = nullptr;
size_t spare_size = 0;

}  // namespace

size_t last_cache_size() {
  constexpr size_t kShare = size_t{32} << 20;  // a virtual machine may report all of a cache that it shares with others
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (found > 0) return std::min(static_cast<size_t>(found), kShare);
#endif
  return kShare;
}

void want_huge_pages(void* memory, size_t size) {
#ifdef __linux__
  const size_t begin = reinterpret_cast<size_t>(memory);
  const size_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, end = (begin + size) / kHugePage * kHugePage;
  if (first + kHugePage <= end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void* kept_room(size_t size, Keeps keeps) {
  struct Kept {
    void* memory = nullptr;
    size_t size = 0;
    ~Kept() { free_pages(memory, size); }
  };
  thread_local std::array<Kept, 2> all;
  Kept& kept = all[static_cast<size_t>(keeps)];
  if (kept.size < size) {
    free_pages(std::exchange(kept.memory, nullptr), std::exchange(kept.size, 0));
    kept.memory = huge_pages(whole_pages(size));
    kept.size = whole_pages(size);
  }
  return kept.memory;
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
    std::swap(spare_size, size);
  }
  free_pages(memory, size);
}

}  // namespace lorasb
