// Tiles in threadgroup memory: how far rows are apart, rows of x, the two levels of a group and the
// words of a row.
#pragma once
#include "common.h"

// Elements from one row of a tile to the next: 16 bytes more than 32 elements, so that the 8 rows
// of a matrix start in different banks.
template <typename E>
constexpr uint stride_of() {
  return kWordBits + 16 / sizeof(E);
}

// What the two bits of a group stand for in a tile.
template <typename E>
struct TileLevels {
  E zero, one;
};
template <typename E>
inline TileLevels<E> tile_levels(Levels levels) {
  TileLevels<E> in_tile = {E(levels.bias), E(levels.scale + levels.bias)};
  return in_tile;
}

// A row of w is decoded by kThreads threads, each of which loads one of as many words; they hand
// them around. The tile of x takes a line of w out of the L1 before the next step, which then needs
// none.
template <uint kThreads>
inline uint hold_word(const device uint* row, uint first, uint end, uint thread_index) {
  const uint mine = first + thread_index % kThreads;
  return mine < end ? row[mine] : 0u;
}
// The word of step i.
template <uint kThreads>
inline uint held_word(uint held, uint i, uint thread_index) {
  const uint lane = thread_index % kLanes / kThreads * kThreads + i % kThreads;
  return simd_shuffle(held, ushort(lane));
}

// Rows of x that a thread loads four elements of, and where they start in x.
template <uint I>
struct XRows {
  uint start[I];
  bool inside[I];
};
inline uint x_row(uint thread_index, uint i) { return thread_index / 8 + 16 * i; }

// tile[:, :] = x[:, column .. column + 32), zeros for rows outside. Eight threads write a row, so
// that lanes share the lines of x and the banks.
template <typename E, uint I, typename T>
inline void load_x(
    threadgroup E* tile, const device T* x, XRows<I> rows, uint column, uint thread_index) {
  const uint part = thread_index % 8 * 4;
  ONEBIT_UNROLL
  for (uint i = 0; i < I; i++) {
    const device vec<T, 4>* from = (const device vec<T, 4>*)(x + rows.start[i] + column + part);
    const vec<E, 4> four = rows.inside[i] ? vec<E, 4>(*from) : vec<E, 4>(E(0.0f));
    *(threadgroup vec<E, 4>*)(tile + x_row(thread_index, i) * stride_of<E>() + part) = four;
  }
}
