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

// One cut per lane: bit = value > threshold.
template <class Real>
struct Cuts {
  alignas(64) Real threshold[kLanes], low[kLanes], high[kLanes];
};

template <class Real>
inline void put(Real* lanes, int v, const Vector<Real>& values) {
  reinterpret_cast<Vector<Real>*>(lanes)[v] = values;
}

// The cut of each group with the least squared error, and the means of its two sides. With the mean
// taken away the sides sum to s and -s, and the error falls by s^2 (1 / mass_low + 1 / mass_high):
// one running sum decides. Sorts lanes, and weights along with them; weights are null when all are
// equal.
template <class Real, bool kWeighted>
void best_cuts(Lanes<Real>& lanes, Lanes<Real>* weights, int size, Cuts<Real>& cuts) {
  using V = Vector<Real>;
  if constexpr (kWeighted) {
    sort_lanes(lanes, *weights, size);
  } else {
    sort_lanes(lanes, size);
  }
  for (int v = 0; v < Lanes<Real>::kVectors; ++v) {
    const V one = V{} + 1;
    const auto value = [&](int i) -> V { return lanes.row(i)[v]; };
    const auto weight = [&](int i) -> V {
      if constexpr (kWeighted) return weights->row(i)[v];
      return one;
    };
    V mean{}, total{};
    for (int i = 0; i < size; ++i) {
      mean += value(i) * weight(i);
      total += weight(i);
    }
    mean /= total;

    V below{}, mass{}, best = V{} - 1, threshold = value(0);
    for (int i = 0; i + 1 < size; ++i) {
      below += (value(i) - mean) * weight(i);
      mass += weight(i);
      // No cut leaves a side without importance: its sum is rounding, divided by 0. (When it is the
      // lower one, 0 / 0: NaN is never better.)
      const V rest = total - mass;
      const V score = kWeighted ? (rest > 0 ? below * below / (mass * rest) : V{} - 1)
                                : below * below * (1 / (Real(i + 1) * Real(size - 1 - i)));
      threshold = score > best ? value(i) : threshold;
      best = score > best ? score : best;
    }

    // Means are taken from the outermost value on: a side of equal values keeps them exactly, so
    // weights that are already binary lose nothing.
    const V lowest = value(0), highest = value(size - 1);
    V above{}, under{}, high_mass{};
    for (int i = 0; i < size; ++i) {
      const V high = value(i) > threshold ? weight(i) : V{};
      above += (value(i) - lowest) * (weight(i) - high);
      under += (highest - value(i)) * high;
      high_mass += high;
    }
    const V low_mass = total - high_mass;
    const V low = lowest + above / low_mass, high = highest - under / high_mass;
    // A side without importance takes the other's level.
    put(cuts.threshold, v, threshold);
    put(cuts.low, v, V(low_mass > 0 ? low : high));
    put(cuts.high, v, V(high_mass > 0 ? high : low));
  }
}
