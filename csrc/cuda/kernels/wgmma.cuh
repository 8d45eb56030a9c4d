// The warpgroup product: 64 rows of A in registers, n columns of B in shared memory, sums in float.
// Macros because an asm statement names every register. Of instructions.cuh.
#pragma once

#if ONEBIT_X_IS_HALF
#define ONEBIT_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#else
#define ONEBIT_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#endif

#define ONEBIT_D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define ONEBIT_D1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ONEBIT_D2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ONEBIT_D3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ONEBIT_D4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define ONEBIT_D5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define ONEBIT_D6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define ONEBIT_D7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define ONEBIT_SUMS(d, o)                                                                         \
  "+f"(d[o + 0]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), \
      "+f"(d[o + 6]), "+f"(d[o + 7]), "+f"(d[o + 8]), "+f"(d[o + 9]), "+f"(d[o + 10]),            \
      "+f"(d[o + 11]), "+f"(d[o + 12]), "+f"(d[o + 13]), "+f"(d[o + 14]), "+f"(d[o + 15])

// d [n / 2] (+)= a [4] . B, where `keep` 0 starts from zeros.
template <int n>
struct Wgmma;
template <>
struct Wgmma<32> {
  static __device__ __forceinline__ void multiply(float (&d)[16],
                                                  const uint32_t* a,
                                                  uint64_t b,
                                                  int keep) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %21, 0;" ONEBIT_WGMMA(
                     32) "{" ONEBIT_D0
                         "},"
                         "{%16,%17,%18,%19}, %20, keep, 1, 1, 0; }"
                 : ONEBIT_SUMS(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
  }
};
template <>
struct Wgmma<64> {
  static __device__ __forceinline__ void multiply(float (&d)[32],
                                                  const uint32_t* a,
                                                  uint64_t b,
                                                  int keep) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %37, 0;" ONEBIT_WGMMA(
                     64) "{" ONEBIT_D0 "," ONEBIT_D1
                         "},"
                         "{%32,%33,%34,%35}, %36, keep, 1, 1, 0; }"
                 : ONEBIT_SUMS(d, 0), ONEBIT_SUMS(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
  }
};
template <>
struct Wgmma<128> {
  static __device__ __forceinline__ void multiply(float (&d)[64],
                                                  const uint32_t* a,
                                                  uint64_t b,
                                                  int keep) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %69, 0;" ONEBIT_WGMMA(
                     128) "{" ONEBIT_D0 "," ONEBIT_D1 "," ONEBIT_D2 "," ONEBIT_D3
                          "},"
                          "{%64,%65,%66,%67}, %68, keep, 1, 1, 0; }"
                 : ONEBIT_SUMS(d, 0), ONEBIT_SUMS(d, 16), ONEBIT_SUMS(d, 32), ONEBIT_SUMS(d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
  }
};
template <>
struct Wgmma<256> {
  static __device__ __forceinline__ void multiply(float (&d)[128],
                                                  const uint32_t* a,
                                                  uint64_t b,
                                                  int keep) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %133, 0;" ONEBIT_WGMMA(
                     256) "{" ONEBIT_D0 "," ONEBIT_D1 "," ONEBIT_D2 "," ONEBIT_D3 "," ONEBIT_D4
                          "," ONEBIT_D5 "," ONEBIT_D6 "," ONEBIT_D7
                          "},"
                          "{%128,%129,%130,%131}, %132, keep, 1, 1, 0; }"
                 : ONEBIT_SUMS(d, 0), ONEBIT_SUMS(d, 16), ONEBIT_SUMS(d, 32), ONEBIT_SUMS(d, 48),
                   ONEBIT_SUMS(d, 64), ONEBIT_SUMS(d, 80), ONEBIT_SUMS(d, 96), ONEBIT_SUMS(d, 112)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
  }
};

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups run. The products read `a` until then: naming it here keeps
// its registers from being used for something else.
template <int pending, int count>
__device__ __forceinline__ void wgmma_wait(uint32_t (&a)[count]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  ONEBIT_UNROLL
  for (int i = 0; i < count; i++) pin(a[i]);
}

// B [rows, 64] of 16 bits, in rows of 128 bytes swizzled as the copy engine writes them.
__device__ __forceinline__ uint64_t tile_descriptor(const void* shared) {
  const uint32_t address = shared_address(shared);
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
