// Memory from `new`, for a program without an operating system.
//
// Blocks lie one after the other above the program's own data. A freed one is used again when those
// above it have been freed as well: pictures come and go above the weights, and what a layer needs
// for a moment above the picture.

#ifndef KERNELS_WASM_MEMORY_H_
#define KERNELS_WASM_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <new>

extern "C" char __heap_base;  // from the linker

namespace kernels {

struct alignas(64) Header {  // 64: as much as any type needs
  Header* before;
  bool is_free;
};

inline Header* highest = nullptr;
inline uintptr_t heap_end = (reinterpret_cast<uintptr_t>(&__heap_base) + 63) / 64 * 64;

// Traps if there is no more memory.
inline void* Allocate(size_t size) {
  constexpr uintptr_t PAGE = 65536;
  const uintptr_t start = heap_end, stop = start + sizeof(Header) + (size + 63) / 64 * 64;
  const uintptr_t pages = __builtin_wasm_memory_size(0), needed = (stop + PAGE - 1) / PAGE;
  if (stop < start || size > stop ||
      (needed > pages && __builtin_wasm_memory_grow(0, needed - pages) == SIZE_MAX))
    __builtin_trap();
  heap_end = stop;
  highest = new (reinterpret_cast<void*>(start)) Header{highest, false};
  return highest + 1;
}

inline void Free(void* block) {
  if (block == nullptr) return;
  static_cast<Header*>(block)[-1].is_free = true;
  for (; highest != nullptr && highest->is_free; highest = highest->before)
    heap_end = reinterpret_cast<uintptr_t>(highest);
}

}  // namespace kernels

void* operator new(size_t size) { return kernels::Allocate(size); }
void* operator new[](size_t size) { return kernels::Allocate(size); }
void* operator new(size_t size, std::align_val_t) { return kernels::Allocate(size); }
void* operator new[](size_t size, std::align_val_t) { return kernels::Allocate(size); }
void operator delete(void* block) noexcept { kernels::Free(block); }
void operator delete[](void* block) noexcept { kernels::Free(block); }
void operator delete(void* block, size_t) noexcept { kernels::Free(block); }
void operator delete[](void* block, size_t) noexcept { kernels::Free(block); }
void operator delete(void* block, std::align_val_t) noexcept { kernels::Free(block); }
void operator delete[](void* block, std::align_val_t) noexcept { kernels::Free(block); }
void operator delete(void* block, size_t, std::align_val_t) noexcept { kernels::Free(block); }
void operator delete[](void* block, size_t, std::align_val_t) noexcept { kernels::Free(block); }

#endif  // KERNELS_WASM_MEMORY_H_
