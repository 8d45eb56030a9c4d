// From tensors to the pointers kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include "../ops/rules.h"
#include "kernels/kernels.h"

namespace onebit::cpu {

// int32 and uint32 hold the same words.
inline const uint32_t* words_of(const Tensor& packed) {
  return static_cast<const uint32_t*>(packed.const_data_ptr());
}

// The three tensors of a weight, contiguous and kept alive, as kernels see them.
class WeightTensors {
 public:
  WeightTensors(const Tensor& packed,
                const Tensor& scales,
                const OptionalTensor& biases,
                int64_t group_size)
      : packed_(packed.contiguous()),
        scales_(scales.contiguous()),
        biases_(biases ? biases->contiguous() : Tensor()),
        group_size_(group_size) {}

  // Matrix `index` of the leading dimensions, or all of them as one stack of rows.
  Weights matrix(int64_t index, int64_t rows) const {
    const int64_t words = packed_.size(-1), groups = words * kWordBits / group_size_;
    const auto offset = [&](const Tensor& t) {
      return static_cast<const char*>(t.const_data_ptr()) +
             index * rows * groups * t.element_size();
    };
    return {words_of(packed_) + index * rows * words,
            offset(scales_),
            biases_.defined() ? offset(biases_) : nullptr,
            dtype_of(scales_),
            rows,
            words * kWordBits,
            int(group_size_)};
  }

 private:
  Tensor packed_, scales_, biases_;
  int64_t group_size_;
};

}  // namespace onebit::cpu
