// Products of a warp and of a warpgroup, register by register as the PTX ISA lays fragments out.
// Lane = 4 g + t. 16-bit values lie in pairs in a register, the lower column first.
//
//   m16n8k16   a0 [g, 2t]  a1 [g + 8, 2t]  a2 [g, 2t + 8]  a3 [g + 8, 2t + 8]
//              b0 [2t, g]  b1 [2t + 8, g]  d0 d1 [g, 2t]   d2 d3 [g + 8, 2t]
//   m16n8k128  a0 [g, 32t]  a1 [g + 8, 32t]  b [32t, g], a bit each; d as above
//   m64nNk16   warp w of the warpgroup has rows 16 w: a as above, d of columns 8 j from d[4 j] on;
//              b in shared memory, by a descriptor
#include <cstring>
#include <deque>
#include <vector>

#include "hardware.h"
#include "scalar.h"

namespace emu {

float float_of(uint16_t bits, bool is_half) {
  return is_half ? half_to_float(bits) : bfloat_to_float(bits);
}

uint16_t min_of(uint16_t a, uint16_t b, bool is_half) {
  const float x = float_of(a, is_half), y = float_of(b, is_half);
  if (x != x) return y != y ? kNaN : b;
  if (y != y) return a;
  if (x == y) return a & 0x8000 ? a : b;
  return x < y ? a : b;
}

uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = selector >> 4 * i & 15;
    const uint32_t byte = bytes >> 8 * (s & 7) & 255;
    result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

namespace {

template <class T>
T lane_of(const unsigned char* lanes, uint32_t lane) {
  T value;
  memcpy(&value, lanes + kSlotBytes * lane, sizeof value);
  return value;
}

float value_of(uint32_t pair, int which, bool is_half) {
  return float_of(static_cast<uint16_t>(pair >> 16 * which), is_half);
}

// Row g (+ 8) of A, 16 columns, out of the registers of the four lanes that have it.
void row_of(float (&row)[16], const uint32_t (&a)[4][4], int upper, bool is_half) {
  for (int t = 0; t < 4; t++) {
    for (int i = 0; i < 4; i++) {
      row[2 * t + (i & 1) + 8 * (i >> 1)] = value_of(a[t][upper + 2 * (i >> 1)], i & 1, is_half);
    }
  }
}

}  // namespace

void mma(float (&d)[4], const unsigned char* lanes, uint32_t lane, bool is_half) {
  const uint32_t g = lane >> 2, t = lane & 3;
  uint32_t a[4][4];
  for (uint32_t i = 0; i < 4; i++) memcpy(a[i], lane_of<Mma>(lanes, 4 * g + i).a, sizeof a[i]);
  for (int upper = 0; upper < 2; upper++) {
    float row[16];
    row_of(row, a, upper, is_half);
    for (uint32_t e = 0; e < 2; e++) {
      float sum = d[2 * upper + e];
      for (uint32_t k = 0; k < 16; k++) {
        const uint32_t owner = 4 * (2 * t + e) + k % 8 / 2;
        sum += row[k] * value_of(lane_of<Mma>(lanes, owner).b[k / 8], k & 1, is_half);
      }
      d[2 * upper + e] = sum;
    }
  }
}

void bmma(int (&d)[4], const unsigned char* lanes, uint32_t lane) {
  const uint32_t g = lane >> 2, t = lane & 3;
  for (uint32_t i = 0; i < 4; i++) {
    d[i] = 0;
    for (uint32_t word = 0; word < 4; word++) {
      const uint32_t row = lane_of<Bmma>(lanes, 4 * g + word).a[i >> 1];
      const uint32_t column = lane_of<Bmma>(lanes, 4 * (2 * t + (i & 1)) + word).b;
      d[i] += __builtin_popcount(row & column);
    }
  }
}

// --- wgmma ---

namespace {

struct Product {
  int n;
  float* d;
  const uint32_t* a;
  uint64_t b;
  bool keep, is_half;
};
struct Queue {
  bool fenced;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};
Queue queues[1024];
Queue& mine() { return queues[thread_state().index]; }

// B [n, 16] in rows of 128 bytes; in a block of 8 rows, 16-byte parts are swapped by row.
char* row_of_b(uint64_t descriptor, uint32_t row, uint32_t part) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + part * 16;
  return shared_pointer(address ^ (address >> 7 & 7) << 4);
}

constexpr uint32_t kWgmmaOperation = 100;

void run(const Product& p, int line, const char* file) {
  const uint32_t lane = thread_state().lane, g = lane >> 2, t = lane & 3;
  for (int i = lane; i < 2 * p.n; i += 32) {
    check_access(row_of_b(p.b, i / 2, i % 2), 16, false, __builtin_return_address(0));
  }
  const unsigned char* lanes = simd_exchange(p.a, 16, kWgmmaOperation, line, file, nullptr);
  struct Registers {
    uint32_t a[4];
  };
  uint32_t a[4][4];
  for (uint32_t i = 0; i < 4; i++) {
    memcpy(a[i], lane_of<Registers>(lanes, 4 * g + i).a, sizeof a[i]);
  }
  float row[2][16];
  for (int upper = 0; upper < 2; upper++) row_of(row[upper], a, upper, p.is_half);
  for (int i = 0; i < p.n / 2; i++) {
    const uint32_t column = i / 4 * 8 + 2 * t + (i & 1);
    float sum = p.keep ? p.d[i] : 0;
    for (uint32_t k = 0; k < 16; k++) {
      uint16_t bits;
      memcpy(&bits, row_of_b(p.b, column, k / 8) + k % 8 * 2, sizeof bits);
      sum += row[i >> 1 & 1][k] * float_of(bits, p.is_half);
    }
    p.d[i] = sum;
  }
}

}  // namespace

void wgmma_start_thread() { mine() = {}; }
void wgmma_fence() { mine().fenced = true; }
void wgmma(int n, float* d, const uint32_t* a, uint64_t b, bool keep, bool is_half) {
  if (!mine().fenced) fail("wgmma without a fence after registers were written");
  if (b >> 62 != 1) fail("a descriptor that is not of rows of 128 bytes");
  mine().open.push_back({n, d, a, b, keep, is_half});
}
void wgmma_commit() {
  mine().committed.push_back(std::move(mine().open));
  mine().open.clear();
  mine().fenced = false;
}
void wgmma_wait(int pending, int line, const char* file) {
  Queue& queue = mine();
  while (queue.committed.size() > static_cast<size_t>(pending)) {
    const std::vector<Product> products = std::move(queue.committed.front());
    queue.committed.pop_front();
    for (const Product& p : products) run(p, line, file);
  }
}

}  // namespace emu
