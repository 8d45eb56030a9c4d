// What the emulated instructions.cuh stands on. Compiled without hooks: tensor_cores.cpp and
// copies.cpp say themselves what memory they touch.
#pragma once
#include "kernel_abi.h"

namespace emu {

// buffer(1) of every launch.
struct LaunchInfo {
  uint32_t shared_bytes;  // dynamic
  uint32_t pointers;      // how many
  uint32_t values[64];    // their offsets in the argument

  static LaunchInfo& get() { return *reinterpret_cast<LaunchInfo*>(dispatch().buffer[1]); }
};
// A thread begins: it has asked for nothing.
void start_thread();

// An address in shared memory, counted from a multiple of 1024 bytes below the dynamic part, or
// below a variable where there is none.
void use_window(void* dynamic);
uint32_t shared_address(const void* p);
char* shared_pointer(uint32_t address);

// prmt: byte i of the result is byte s of {x, y}, or, where the top bit of s is set, its sign.
uint32_t permute(uint32_t x, uint32_t y, uint32_t selector);
float float_of(uint16_t bits, bool is_half);
// The lesser of two 16-bit floats, NaN loses; what conversions make of NaN.
uint16_t min_of(uint16_t a, uint16_t b, bool is_half);
constexpr uint16_t kNaN = 0x7fff;

// Registers of the lanes of a warp, 64 bytes from one to the next: what one lane gets.
struct Mma {
  uint32_t a[4], b[2];
};
struct Bmma {
  uint32_t a[2], b;
};
void mma(float (&d)[4], const unsigned char* lanes, uint32_t lane, bool is_half);
void bmma(int (&d)[4], const unsigned char* lanes, uint32_t lane);

// wgmma runs when it is waited for: what is written to its registers before, it sees.
void wgmma_fence();
void wgmma(int n, float* d, const uint32_t* a, uint64_t b, bool keep, bool is_half);
void wgmma_commit();
void wgmma_wait(int pending, int line, const char* file);

// cp.async, likewise.
void copy(uint32_t to, const void* from, bool inside, void* pc);
void commit_copies();
void wait_for_copies(int pending, void* pc);

// mbarrier; a box arrives when nothing else can happen, or at random.
void barrier_init(uint64_t* barrier, uint32_t count);
void barrier_arrive(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity, int line, const char* file);

// What a TensorMap holds here; tests/cuda/emulated.py makes it.
struct Map {
  char* data;
  uint64_t rank, element, swizzle;  // bytes of an element; 0, 64 or 128
  uint64_t sizes[4], strides[3], box[4];
};
void copy_box(void* to, const Map& map, uint64_t* full, const int (&first)[4], void* pc);

}  // namespace emu
