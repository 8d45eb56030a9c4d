// Tiles of weights in threadgroup memory: the two levels of a group, and how far rows are apart.
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
