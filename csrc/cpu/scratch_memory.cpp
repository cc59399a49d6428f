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

constexpr size_t kMaxSpare = size_t{64} << 20;  // bytes that may stay allocated while unused

size_t whole_pages(size_t size) { return (size + kHugePage - 1) / kHugePage * kHugePage; }

// Directly from the system where possible: memory that the allocator reuses is already backed by small pages. mmap
// aligns only to 4 KiB, so one more huge page is mapped, and what is outside the aligned part is unmapped.
void* huge_pages(size_t size) {
#ifdef __linux__
  const size_t mapped = size + kHugePage;
  char* base = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  TORCH_CHECK(base != MAP_FAILED, "no memory for ", size, " bytes of a weight");
  const size_t before = (kHugePage - reinterpret_cast<size_t>(base) % kHugePage) % kHugePage;
  if (before > 0) munmap(base, before);
  munmap(base + before + size, kHugePage - before);
  madvise(base + before, size, MADV_HUGEPAGE);
  return base + before;
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

// One unused allocation, shared by all threads.
std::mutex spare_mutex;
void* spare = nullptr;
size_t spare_size = 0;

}  // namespace

size_t last_cache_size() {
  // A virtual machine may report all of a socket's cache, which it shares with others.
  constexpr size_t kShare = size_t{32} << 20;
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (reported > 0) return std::min(static_cast<size_t>(reported), kShare);
#endif
  return kShare;
}

void* thread_scratch(size_t size, Scratch use) {
  struct Allocation {
    void* memory = nullptr;
    size_t size = 0;
    ~Allocation() { free_pages(memory, size); }
  };
  thread_local std::array<Allocation, 2> allocations;
  Allocation& scratch = allocations[static_cast<size_t>(use)];
  if (scratch.size < size) {  // it grows and never shrinks; the old contents are not needed
    free_pages(std::exchange(scratch.memory, nullptr), std::exchange(scratch.size, 0));
    scratch.memory = huge_pages(whole_pages(size));
    scratch.size = whole_pages(size);
  }
  return scratch.memory;
}

void* borrow_pages(size_t size) {
  size = whole_pages(size);
  {
    const std::lock_guard<std::mutex> lock(spare_mutex);
    if (spare != nullptr && spare_size == size) return std::exchange(spare, nullptr);
  }
  return huge_pages(size);
}

void return_pages(void* memory, size_t size) {
  size = whole_pages(size);
  if (size <= kMaxSpare) {  // it becomes the spare one, and the former spare one is freed
    const std::lock_guard<std::mutex> lock(spare_mutex);
    std::swap(spare, memory);
    std::swap(spare_size, size);
  }
  free_pages(memory, size);
}

}  // namespace lorasb
