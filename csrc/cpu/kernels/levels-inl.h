// Body of the level kernels, included once per instruction set inside its target region, after a
// constant kVectorBytes. No std:: function may be called here: the linker could keep this file's
// copy, compiled for an instruction set that not every machine has.

#include "best_cut-inl.h"

// --- Storage <-> arithmetic ---

template <class Real>
void load(const void* data, DType dtype, int64_t offset, int count, Real* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(data) + offset;
    for (int i = 0; i < count; ++i) out[i] = static_cast<Real>(to_float(from[i]));
  });
}

template <class Real>
void store(const Real* values, int count, void* data, DType dtype, int64_t offset) {
  with_type(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(data) + offset;
    for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(*to) == sizeof(double)) {
        to[i] = values[i];
      } else {
        from_float(static_cast<float>(values[i]), to[i]);
      }
    }
  });
}

// --- Vectors along a group ---

template <class Real>
constexpr int kWidth = kVectorBytes / int(sizeof(Real));

template <class Real>
inline Vector<Real>& at(Real* values, int i) {
  return *reinterpret_cast<Vector<Real>*>(values + i);
}
template <class Real>
inline const Vector<Real>& at(const Real* values, int i) {
  return *reinterpret_cast<const Vector<Real>*>(values + i);
}

// The sum of term(i), a vector of values [i, i + width), over a group: in kLanes partial sums, the
// same order on every instruction set. Vectors are written out because GCC 12 miscompiles the plain
// loop `lanes[l] += a[l] > b ? c[l] : 0` for AVX2 at -O3.
template <class Real, class Term>
inline Real sum(int size, Term term) {
  constexpr int kVectors = kLanes / kWidth<Real>;
  Vector<Real> partial[kVectors] = {};
  for (int i = 0; i < size; i += kLanes) {
    for (int v = 0; v < kVectors; ++v) partial[v] += term(i + v * kWidth<Real>);
  }
  alignas(64) Real lanes[kLanes];
  for (int v = 0; v < kVectors; ++v) at(lanes, v * kWidth<Real>) = partial[v];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// values[i] = f(i), a vector at a time.
template <class Real, class F>
inline void fill(Real* values, int size, F f) {
  for (int i = 0; i < size; i += kWidth<Real>) at(values, i) = f(i);
}

template <class Real>
inline Vector<Real> magnitude(const Vector<Real>& v) {
  return v < 0 ? -v : v;
}

template <class Real>
inline Vector<Real> sign_of(const Vector<Real>& v) {
  const Vector<Real> zero{}, one = zero + 1;
  return (v > 0 ? one : zero) - (v < 0 ? one : zero);
}

// --- Levels of kLanes groups ---

template <class Real>
struct Levels {
  Real origin, threshold, low, high;

  bool bit(Real v) const { return v - origin > threshold; }
  // a where the bit is set, b elsewhere.
  Vector<Real> select(const Vector<Real>& v, const Vector<Real>& a, const Vector<Real>& b) const {
    return v - origin > threshold ? a : b;
  }
};

template <class Real>
struct Tile {
  int size, count;  // values per group, groups in use
  alignas(64) Real values[kLanes][kMaxGroup];
  alignas(64) Real importance[kLanes][kMaxGroup];
  Levels<Real> levels[kLanes];
};

template <class Real>
Levels<Real> minmax_levels(const Real* v, int size) {
  Real low = v[0], high = v[0];
  for (int i = 1; i < size; ++i) {
    low = v[i] < low ? v[i] : low;
    high = v[i] > high ? v[i] : high;
  }
  return {low, (high - low) * Real(0.5), low, high};
}

template <class Real>
Levels<Real> sign_levels(const Real* v, const Real* importance, int size) {
  const Real mass = sum<Real>(size, [&](int i) { return at(importance, i); });
  const Real total =
      sum<Real>(size, [&](int i) { return at(importance, i) * magnitude<Real>(at(v, i)); });
  return {0, 0, -total / mass, total / mass};
}

template <class Real>
Levels<Real> mean_levels(const Real* v, int size) {
  const Real mean = sum<Real>(size, [&](int i) { return at(v, i); }) / size;
  const Real deviation =
      sum<Real>(size, [&](int i) { return magnitude<Real>(at(v, i) - mean); }) / size;
  return {mean, 0, mean - deviation, mean + deviation};
}

template <class Real>
void transpose(const Real (&from)[kLanes][kMaxGroup], int size, Lanes<Real>& to) {
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < size; ++i) to.values[i][l] = from[l][i];
  }
}

template <class Real>
void optimal_levels(Tile<Real>& tile, bool weighted) {
  Lanes<Real> lanes, weights;
  Cuts<Real> cuts;
  transpose(tile.values, tile.size, lanes);
  if (weighted) {
    transpose(tile.importance, tile.size, weights);
    best_cuts<Real, true>(lanes, &weights, tile.size, cuts);
  } else {
    best_cuts<Real, false>(lanes, nullptr, tile.size, cuts);
  }
  for (int l = 0; l < tile.count; ++l) {
    tile.levels[l] = {0, cuts.threshold[l], cuts.low[l], cuts.high[l]};
  }
}

// Loads groups [begin, begin + count) and chooses their levels.
template <class Real>
void load_tile(const LevelsArgs& args, int64_t begin, int count, Tile<Real>& tile) {
  const int size = args.group_size;
  tile.size = size;
  tile.count = count;
  for (int l = 0; l < kLanes; ++l) {
    Real* importance = tile.importance[l];
    for (int i = 0; i < size; ++i) importance[i] = 1;
    if (l >= count) {
      for (int i = 0; i < size; ++i) tile.values[l][i] = 0;
      continue;
    }
    load(args.w, args.dtype, (begin + l) * size, size, tile.values[l]);
    if (!args.importance) continue;
    const float* from = args.importance + (begin + l) % args.period * size;
    Real mass = 0;
    for (int i = 0; i < size; ++i) mass += from[i];
    if (mass > 0) {  // a group that matters to nobody is cut as if all its values mattered
      for (int i = 0; i < size; ++i) importance[i] = from[i];
    }
  }
  if (args.rule == Rule::kOptimal) return optimal_levels(tile, args.importance != nullptr);
  for (int l = 0; l < count; ++l) {
    const Real* v = tile.values[l];
    tile.levels[l] = args.rule == Rule::kMinMax ? minmax_levels(v, size)
                     : args.rule == Rule::kSign ? sign_levels(v, tile.importance[l], size)
                                                : mean_levels(v, size);
  }
}

// Calls visit(tile, first group) for every tile of groups [begin, end).
template <class Real, class Visit>
void for_each_tile(const LevelsArgs& args, int64_t begin, int64_t end, Visit visit) {
  Tile<Real> tile;
  for (int64_t group = begin; group < end; group += kLanes) {
    const int count = end - group < kLanes ? int(end - group) : kLanes;
    load_tile(args, group, count, tile);
    visit(tile, group);
  }
}

// --- The functions of the table ---

template <class Real>
void quantize_as(const LevelsArgs& args, const QuantizeLevelsOut& out, int64_t begin, int64_t end) {
  for_each_tile<Real>(args, begin, end, [&](const Tile<Real>& tile, int64_t group) {
    for (int l = 0; l < tile.count; ++l) {
      const Levels<Real> levels = tile.levels[l];
      uint32_t* words = out.packed + (group + l) * (tile.size / kWordBits);
      for (int i = 0; i < tile.size; i += kWordBits) {
        uint32_t word = 0;
        for (int j = 0; j < kWordBits; ++j) {
          word |= uint32_t(levels.bit(tile.values[l][i + j])) << j;
        }
        words[i / kWordBits] = word;
      }
      const Real scale = levels.high - levels.low;
      store(&scale, 1, out.scales, args.dtype, group + l);
      store(&levels.low, 1, out.biases, args.dtype, group + l);
    }
  });
}

template <class Real>
void fake_quantize_as(
    const LevelsArgs& args, void* out, DType out_dtype, int64_t begin, int64_t end) {
  for_each_tile<Real>(args, begin, end, [&](const Tile<Real>& tile, int64_t group) {
    alignas(64) Real result[kMaxGroup];
    for (int l = 0; l < tile.count; ++l) {
      const Levels<Real> levels = tile.levels[l];
      const Vector<Real> high = Vector<Real>{} + levels.high, low = Vector<Real>{} + levels.low;
      fill(result, tile.size,
           [&](int i) { return levels.select(at(tile.values[l], i), high, low); });
      store(result, tile.size, out, out_dtype, (group + l) * tile.size);
    }
  });
}

// Adds to grad [size] what flows through the levels of one group.
template <class Real>
void add_level_gradient(
    Rule rule, const Levels<Real>& levels, const Real* v, int size, Real* grad) {
  using V = Vector<Real>;
  const V zero{}, one = zero + 1;
  const Real total = sum<Real>(size, [&](int i) { return at(grad, i); });
  const Real high =
      sum<Real>(size, [&](int i) { return levels.select(at(v, i), at(grad, i), zero); });
  const Real low = total - high;
  const Real n = Real(size);
  switch (rule) {
    case Rule::kMinMax: {
      int lowest = 0, highest = 0;
      for (int i = 1; i < size; ++i) {
        lowest = v[i] < v[lowest] ? i : lowest;
        highest = v[i] > v[highest] ? i : highest;
      }
      grad[lowest] += low;
      grad[highest] += high;
      return;
    }
    case Rule::kSign: {
      const Real slope = (high - low) / n;
      fill(grad, size, [&](int i) { return at(grad, i) + slope * sign_of<Real>(at(v, i)); });
      return;
    }
    case Rule::kMean: {
      const Real mean = levels.origin, slope = (high - low) / n;
      const Real balance =
          sum<Real>(size, [&](int i) { return sign_of<Real>(at(v, i) - mean); }) / n;
      const Real shift = total / n - slope * balance;
      fill(grad, size,
           [&](int i) { return at(grad, i) + (shift + slope * sign_of<Real>(at(v, i) - mean)); });
      return;
    }
    case Rule::kOptimal: {
      const Real above = sum<Real>(size, [&](int i) { return levels.select(at(v, i), one, zero); });
      const V to_high = zero + (above > 0 ? high / above : 0);
      const V to_low = zero + (above < n ? low / (n - above) : 0);
      fill(grad, size,
           [&](int i) { return at(grad, i) + levels.select(at(v, i), to_high, to_low); });
      return;
    }
  }
}

template <class Real>
void fake_quantize_backward_as(const LevelsArgs& args,
                               const void* grad,
                               DType grad_dtype,
                               void* grad_w,
                               int64_t begin,
                               int64_t end) {
  for_each_tile<Real>(args, begin, end, [&](const Tile<Real>& tile, int64_t group) {
    alignas(64) Real result[kMaxGroup];
    for (int l = 0; l < tile.count; ++l) {
      const int64_t offset = (group + l) * tile.size;
      load(grad, grad_dtype, offset, tile.size, result);
      add_level_gradient(args.rule, tile.levels[l], tile.values[l], tile.size, result);
      store(result, tile.size, grad_w, args.dtype, offset);
    }
  });
}

// A negative scale swaps the levels: the bit still picks the nearer one.
template <class Real>
struct AffineGroup {
  Real scale, bias;

  Vector<Real> select(const Vector<Real>& v, const Vector<Real>& a, const Vector<Real>& b) const {
    const Vector<Real> distance = v - bias;
    const Real half = scale * Real(0.5);
    return scale < 0 ? Vector<Real>(distance < half ? a : b)
                     : Vector<Real>(distance > half ? a : b);
  }
};

template <class Real>
AffineGroup<Real> affine_group(const AffineArgs& args, int64_t group) {
  AffineGroup<Real> affine;
  load(args.scales, args.level_dtype, group, 1, &affine.scale);
  load(args.biases, args.level_dtype, group, 1, &affine.bias);
  return affine;
}

template <class Real>
void fake_quantize_affine_as(
    const AffineArgs& args, void* out, DType out_dtype, int64_t begin, int64_t end) {
  alignas(64) Real v[kMaxGroup];
  for (int64_t group = begin; group < end; ++group) {
    const AffineGroup<Real> affine = affine_group<Real>(args, group);
    const Vector<Real> low = Vector<Real>{} + affine.bias, high = low + affine.scale;
    load(args.w, args.dtype, group * args.group_size, args.group_size, v);
    fill(v, args.group_size, [&](int i) { return affine.select(at(v, i), high, low); });
    store(v, args.group_size, out, out_dtype, group * args.group_size);
  }
}

template <class Real>
void fake_quantize_affine_backward_as(const AffineArgs& args,
                                      const void* grad,
                                      DType grad_dtype,
                                      void* grad_scales,
                                      void* grad_biases,
                                      int64_t begin,
                                      int64_t end) {
  alignas(64) Real v[kMaxGroup], g[kMaxGroup];
  const Vector<Real> zero{};
  const int size = args.group_size;
  for (int64_t group = begin; group < end; ++group) {
    const AffineGroup<Real> affine = affine_group<Real>(args, group);
    load(args.w, args.dtype, group * size, size, v);
    load(grad, grad_dtype, group * size, size, g);
    const Real bias = sum<Real>(size, [&](int i) { return at(g, i); });
    const Real scale =
        sum<Real>(size, [&](int i) { return affine.select(at(v, i), at(g, i), zero); });
    store(&scale, 1, grad_scales, args.level_dtype, group);
    store(&bias, 1, grad_biases, args.level_dtype, group);
  }
}

// float64 computes in float64, everything else in float32.
#include "descend-inl.h"

#define ONEBIT_BY_DTYPE(function)                                         \
  [](const auto& args, auto... rest) {                                    \
    return args.dtype == DType::kDouble ? function<double>(args, rest...) \
                                        : function<float>(args, rest...); \
  }

constexpr LevelKernels make_level_kernels() {
  return {ONEBIT_BY_DTYPE(quantize_as),
          ONEBIT_BY_DTYPE(fake_quantize_as),
          ONEBIT_BY_DTYPE(fake_quantize_backward_as),
          ONEBIT_BY_DTYPE(fake_quantize_affine_as),
          ONEBIT_BY_DTYPE(fake_quantize_affine_backward_as),
          &descend};
}

#undef ONEBIT_BY_DTYPE
