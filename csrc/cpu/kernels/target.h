// Code for one instruction set inside an ordinary build: no -march, a target region per kernel
// file. Include every standard header before the region: an inline std function compiled for
// AVX-512 could be the copy the linker keeps for the whole program.
#pragma once

#if defined(__clang__)
#define ONEBIT_PRAGMA(text) _Pragma(#text)
#define ONEBIT_TARGET_BEGIN(isa) \
  ONEBIT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ONEBIT_TARGET_END _Pragma("clang attribute pop")
#define ONEBIT_UNROLL _Pragma("unroll")
#define ONEBIT_NO_UNROLL _Pragma("nounroll")
#else
#define ONEBIT_PRAGMA(text) _Pragma(#text)
#if !defined(ONEBIT_TARGET_BEGIN)  // tests compile AVX-512 for machines without
#define ONEBIT_TARGET_BEGIN(isa) _Pragma("GCC push_options") ONEBIT_PRAGMA(GCC target(isa))
#endif
#define ONEBIT_TARGET_END _Pragma("GCC pop_options")
#define ONEBIT_UNROLL _Pragma("GCC unroll 32")
#define ONEBIT_NO_UNROLL _Pragma("GCC unroll 1")
#endif

#define ONEBIT_INLINE inline __attribute__((always_inline))

// A vector as an operand of asm that is read and written.
#if defined(__aarch64__)
#define ONEBIT_VECTOR(v) "+w"(v)
#else
#define ONEBIT_VECTOR(v) "+x"(v)
#endif
