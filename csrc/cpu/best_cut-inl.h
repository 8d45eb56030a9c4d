// Where to cut a group in two: part of levels-inl.h, and under the same rules.
//
// kLanes groups are sorted side by side by a sorting network, one compare-exchange of two vectors
// at a time: no branch depends on the data.

constexpr int kLanes = 16;  // floats of a zmm register
constexpr int kMaxGroup = 128;

struct Exchange {
  uint8_t low, high;
};

// Batcher's merge-exchange network: 191, 543 or 1471 compare-exchanges for 32, 64 or 128 values.
struct SortingNetwork {
  Exchange steps[1471] = {};
  int count = 0;

  constexpr explicit SortingNetwork(int size) {
    for (int p = 1; p < size; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int j = k % p; j + k < size; j += 2 * k) {
          for (int i = j; i < j + k && i + k < size; ++i) {
            if (i / (2 * p) == (i + k) / (2 * p)) {
              steps[count++] = {uint8_t(i), uint8_t(i + k)};
            }
          }
        }
      }
    }
  }
};

constexpr SortingNetwork kSort32(32), kSort64(64), kSort128(128);

inline const SortingNetwork& sorting_network(int size) {
  return size == 32 ? kSort32 : size == 64 ? kSort64 : kSort128;
}

// Vectors of the instruction set (kVectorBytes); a comparison gives a mask, `mask ? a : b` selects.
// Written out because GCC 12 left plain loops over lanes scalar: 80 MB/s instead of 1 GB/s.
template <class Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

// kLanes groups side by side: row(i)[v] holds value i of the groups of vector v.
template <class Real>
struct Lanes {
  static constexpr int kVectors = kLanes * sizeof(Real) / kVectorBytes;
  alignas(64) Real values[kMaxGroup][kLanes];

  Vector<Real>* row(int i) { return reinterpret_cast<Vector<Real>*>(values[i]); }
};

template <class Real>
void sort_lanes(Lanes<Real>& lanes, int size) {
  const SortingNetwork& network = sorting_network(size);
  for (int i = 0; i < network.count; ++i) {
    Vector<Real>* low = lanes.row(network.steps[i].low);
    Vector<Real>* high = lanes.row(network.steps[i].high);
    for (int v = 0; v < Lanes<Real>::kVectors; ++v) {
      const Vector<Real> a = low[v], b = high[v];
      low[v] = a < b ? a : b;
      high[v] = a < b ? b : a;
    }
  }
}

template <class Real>
void sort_lanes(Lanes<Real>& lanes, Lanes<Real>& weights, int size) {
  const SortingNetwork& network = sorting_network(size);
  for (int i = 0; i < network.count; ++i) {
    const Exchange e = network.steps[i];
    Vector<Real>*low = lanes.row(e.low), *high = lanes.row(e.high);
    Vector<Real>*low_weight = weights.row(e.low), *high_weight = weights.row(e.high);
    for (int v = 0; v < Lanes<Real>::kVectors; ++v) {
      const Vector<Real> a = low[v], b = high[v], p = low_weight[v], q = high_weight[v];
      low[v] = a < b ? a : b;
      high[v] = a < b ? b : a;
      low_weight[v] = a < b ? p : q;
      high_weight[v] = a < b ? q : p;
    }
  }
}

// thresholds[l]: the value at or below which group l is cut in two with the least squared error.
// With the mean taken away the two sides sum to s and -s, and the error falls by
// s^2 (1 / n_low + 1 / n_high): one running sum decides. Sorts lanes.
template <class Real>
void best_cuts(Lanes<Real>& lanes, int size, Real* thresholds) {
  sort_lanes(lanes, size);
  for (int v = 0; v < Lanes<Real>::kVectors; ++v) {
    Vector<Real> mean{}, below{};
    for (int i = 0; i < size; ++i) mean += lanes.row(i)[v];
    mean /= Real(size);
    Vector<Real> best = mean * 0 - 1, threshold = lanes.row(0)[v];
    for (int i = 0; i + 1 < size; ++i) {
      const Vector<Real> value = lanes.row(i)[v];
      below += value - mean;
      const Vector<Real> score = below * below * (1 / (Real(i + 1) * Real(size - 1 - i)));
      threshold = score > best ? value : threshold;
      best = score > best ? score : best;
    }
    reinterpret_cast<Vector<Real>*>(thresholds)[v] = threshold;
  }
}

// The same with the importance of every value, in an order that follows the sort.
template <class Real>
void best_cuts(Lanes<Real>& lanes, Lanes<Real>& weights, int size, Real* thresholds) {
  sort_lanes(lanes, weights, size);
  for (int v = 0; v < Lanes<Real>::kVectors; ++v) {
    Vector<Real> mean{}, total{}, below{}, mass{};
    for (int i = 0; i < size; ++i) {
      mean += lanes.row(i)[v] * weights.row(i)[v];
      total += weights.row(i)[v];
    }
    mean /= total;
    Vector<Real> best = mean * 0 - 1, threshold = lanes.row(0)[v];
    for (int i = 0; i + 1 < size; ++i) {
      const Vector<Real> value = lanes.row(i)[v], weight = weights.row(i)[v];
      below += (value - mean) * weight;
      mass += weight;
      // A side without importance divides 0 by 0: NaN is never better.
      const Vector<Real> score = below * below / (mass * (total - mass));
      threshold = score > best ? value : threshold;
      best = score > best ? score : best;
    }
    reinterpret_cast<Vector<Real>*>(thresholds)[v] = threshold;
  }
}
