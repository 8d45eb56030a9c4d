// Coordinate descent on the bits of rows; see cpu/levels.h. Included by levels-inl.h.

// Columns whose flips are chosen on their own copy of the error before the rest of the row sees
// them: few flip, and what a flip costs is the pass over the row, so those of a block share it.
constexpr int kDescentBlock = 32;
// Rows that use the same block of moments while it is in the second-level cache.
constexpr int kDescentRows = 32;

template <class Real>
struct UnalignedVector {
  typedef Real type __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(Real))));
};

template <class Real>
struct Flips {
  int count = 0;
  int column[kDescentBlock];
  Real change[kDescentBlock];  // of w_hat
};

// Flip what lowers the loss, one column after the other. A flip moves w_hat by d = +-scale and the
// loss by d^2 moments[j, j] - 2 d error[j].
template <class Real>
Flips<Real> choose_flips(bool* bits,           // [k]
                         const Real* scales,   // [k / group_size]
                         const Real* moments,  // [k, k]
                         const Real* error,    // [k]
                         int64_t k,
                         int64_t begin,
                         int group_size) {
  Flips<Real> flips;
  Real local[kDescentBlock];
  for (int i = 0; i < kDescentBlock; ++i) local[i] = error[begin + i];
  const Real scale = scales[begin / group_size];  // groups are whole blocks
  for (int j = 0; j < kDescentBlock; ++j) {
    const Real* row = moments + (begin + j) * k + begin;
    const Real d = bits[begin + j] ? -scale : scale;
    if (!(2 * d * local[j] > d * d * row[j])) continue;
    bits[begin + j] = !bits[begin + j];
    flips.column[flips.count] = int(begin + j);
    flips.change[flips.count++] = d;
    for (int i = 0; i < kDescentBlock; ++i) local[i] -= d * row[i];
  }
  return flips;
}

// error[c, c + kVectors vectors) -= changes * moments.
template <int kVectors, class Real>
void subtract(const Flips<Real>& flips, const Real* moments, int64_t k, int64_t c, Real* error) {
  using Unaligned = typename UnalignedVector<Real>::type;
  Vector<Real> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = at(error, c + v * kWidth<Real>);
  for (int f = 0; f < flips.count; ++f) {
    const auto* row = reinterpret_cast<const Unaligned*>(moments + flips.column[f] * k + c);
    for (int v = 0; v < kVectors; ++v) sum[v] -= flips.change[f] * Vector<Real>(row[v]);
  }
  for (int v = 0; v < kVectors; ++v) at(error, c + v * kWidth<Real>) = sum[v];
}

template <class Real>
void descend_as(const DescentArgs& args, int64_t begin_row, int64_t end_row) {
  constexpr int kVectors = 8;
  constexpr int kChunk = kVectors * kWidth<Real>;
  const auto* moments = static_cast<const Real*>(args.moments);
  const auto* scales = static_cast<const Real*>(args.scales);
  const int64_t k = args.k;
  for (int64_t first = begin_row; first < end_row; first += kDescentRows) {
    const int count = int(end_row - first < kDescentRows ? end_row - first : kDescentRows);
    bool goes_on[kDescentRows];
    for (int i = 0; i < count; ++i) {
      goes_on[i] = true;
      args.flips[first + i] = 0;
    }
    for (int64_t sweep = 0; sweep < args.sweeps; ++sweep) {
      bool flipped[kDescentRows] = {}, any = false;
      for (int64_t begin = 0; begin < k; begin += kDescentBlock) {
        for (int i = 0; i < count; ++i) {
          if (!goes_on[i]) continue;
          const int64_t row = first + i;
          Real* error = static_cast<Real*>(args.error) + row * k;
          const auto flips =
              choose_flips<Real>(args.bits + row * k, scales + row * (k / args.group_size), moments,
                                 error, k, begin, args.group_size);
          if (!flips.count) continue;
          args.flips[row] += flips.count;
          flipped[i] = any = true;
          int64_t c = 0;
          for (; c + kChunk <= k; c += kChunk) subtract<kVectors>(flips, moments, k, c, error);
          for (; c < k; c += kWidth<Real>) subtract<1>(flips, moments, k, c, error);
        }
      }
      if (!any) break;
      for (int i = 0; i < count; ++i) goes_on[i] = flipped[i];
    }
  }
}

inline void descend(const DescentArgs& args, int64_t begin, int64_t end) {
  args.is_double ? descend_as<double>(args, begin, end) : descend_as<float>(args, begin, end);
}
