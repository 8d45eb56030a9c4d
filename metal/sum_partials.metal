// y[i] = sum over splits s of partial[s, i], in order: the second half of a product split over k.
#include "common.h"

template <typename T>
[[kernel]] void sum_partials(const device float* partial [[buffer(0)]],  // [splits, count]
                             device T* y [[buffer(1)]],                  // [count]
                             constant SumParams& p [[buffer(2)]],
                             uint group [[threadgroup_position_in_grid]],
                             uint thread_index [[thread_index_in_threadgroup]]) {
  const uint i = group * kSumThreads + thread_index;
  if (i >= p.count) return;
  float sum = 0;
  for (uint s = 0; s < p.splits; s++) sum += partial[s * p.count + i];
  y[i] = T(sum);
}

ONEBIT_INSTANTIATE("sum_partials_float", sum_partials<float>)
ONEBIT_INSTANTIATE("sum_partials_half", sum_partials<half>)
ONEBIT_INSTANTIATE("sum_partials_bfloat", sum_partials<bfloat>)
