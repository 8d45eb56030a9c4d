// The emulated form of csrc/cuda/kernels/instructions.cuh: the same functions, on hardware.h.
#pragma once
#include "../params.h"

#define ONEBIT_UNROLL
#define EMU_PC __builtin_return_address(0)
constexpr bool kHalves = ONEBIT_X_IS_HALF;

inline float float_of_half(uint16_t bits) { return emu::half_to_float(bits); }
inline uint16_t half_of_float(float v) { return v == v ? emu::float_to_half(v) : emu::kNaN; }
inline uint16_t bfloat_of_float(float v) { return v == v ? emu::float_to_bfloat(v) : emu::kNaN; }

inline uint32_t min_of_pairs(uint32_t a, uint32_t b, bool is_half) {
  return emu::min_of(a, b, is_half) | uint32_t(emu::min_of(a >> 16, b >> 16, is_half)) << 16;
}
inline uint32_t min_of_halves(uint32_t a, uint32_t b) { return min_of_pairs(a, b, true); }
inline uint32_t min_of_bfloats(uint32_t a, uint32_t b) { return min_of_pairs(a, b, false); }

inline uint32_t signs(uint32_t x, uint32_t y, uint32_t b) {
  return emu::permute(x, y, 0xcc88u + 0x1111u * b);
}

inline void mma(float (&d)[4],
                uint32_t a0,
                uint32_t a1,
                uint32_t a2,
                uint32_t a3,
                uint32_t b0,
                uint32_t b1,
                EMU_HERE) {
  const emu::Mma mine = {{a0, a1, a2, a3}, {b0, b1}};
  const auto lanes = emu::exchange(~0u, mine, emu::kMma, line, file);
  emu::mma(d, lanes.slots, emu::thread_state().lane, kHalves);
}
inline void bmma(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, EMU_HERE) {
  const emu::Bmma mine = {{a0, a1}, b};
  const auto lanes = emu::exchange(~0u, mine, emu::kBmma, line, file);
  emu::bmma(d, lanes.slots, emu::thread_state().lane);
}
// Lane l gives the address of row l % 8 of tile l / 8, and gets of each tile pair l % 4 of row
// l / 4.
inline void load_tiles(uint32_t (&b)[2][2], uint32_t from, EMU_HERE) {
  const uint4 row = *reinterpret_cast<const uint4*>(emu::shared_pointer(from));
  const auto lanes = emu::exchange(~0u, row, emu::kTiles, line, file);
  const uint32_t lane = emu::thread_state().lane;
  for (uint32_t tile = 0; tile < 4; tile++) {
    const uint4 of_tile = lanes[8 * tile + lane / 4];
    b[tile / 2][tile % 2] = lane % 4 == 0   ? of_tile.x
                            : lane % 4 == 1 ? of_tile.y
                            : lane % 4 == 2 ? of_tile.z
                                            : of_tile.w;
  }
}

inline uint32_t shared_address(const void* p) { return emu::shared_address(p); }

inline void copy(uint32_t to, const void* from, bool inside) {
  emu::copy(to, from, inside, EMU_PC);
}
inline void commit_copies() { emu::commit_copies(); }
template <int pending>
void wait_for_copies() {
  emu::wait_for_copies(pending, EMU_PC);
}

inline void barrier_init(uint64_t* barrier, uint32_t count) { emu::barrier_init(barrier, count); }
inline void publish_barriers() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emu::barrier_arrive(barrier, bytes);
}
inline void barrier_arrive(uint64_t* barrier) { emu::barrier_arrive(barrier, 0); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity, EMU_HERE) {
  emu::barrier_wait(barrier, parity, line, file);
}
inline void copy_box(
    void* to, const onebit::TensorMap* map, uint64_t* full, int x0, int x1, int x2, int x3) {
  emu::copy_box(to, *reinterpret_cast<const emu::Map*>(map), full, {x0, x1, x2, x3}, EMU_PC);
}
inline void copy_box(void* to, const onebit::TensorMap* map, uint64_t* full, int x0, int x1) {
  emu::copy_box(to, *reinterpret_cast<const emu::Map*>(map), full, {x0, x1, 0, 0}, EMU_PC);
}
template <int threads>
void barrier_of_some(EMU_HERE) {
  emu::partial_barrier(threads, line, file);
}

template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}
inline void pin(float&) {}
inline void pin(uint32_t&) {}

inline void let_next_start() {}
inline void wait_for_previous() { emu::previous_ended(); }

template <int n>
struct Wgmma {
  static void multiply(float (&d)[n / 2], const uint32_t* a, uint64_t b, int keep) {
    emu::wgmma(n, d, a, b, keep, kHalves);
  }
};
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int pending, int count>
void wgmma_wait(uint32_t (&)[count], EMU_HERE) {
  emu::wgmma_wait(pending, line, file);
}
// Start, rows of 128 bytes, 8 of them to the next block; swapped parts.
inline uint64_t tile_descriptor(const void* shared) {
  return uint64_t((shared_address(shared) & 0x3ffffu) >> 4) | uint64_t(1) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
