// The online softmax of a tile of scores (FlashAttention-2, Algorithm 1, line 9): m and l of each row, and
// weights in place of the scores.

namespace {

// P = 2^(S unit - m) in place of S. Four sums of 32 err less than one of 128, and so does l.
inline Vec exponentiate(float* tile, std::int64_t keys, Vec unit, Vec shift) {
  Vec total[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
  const auto weight = [&](std::int64_t j) {
    const Vec p = exp2_vec(load(tile + j * kRows) * unit - shift);
    store(tile + j * kRows, p);
    return p;
  };
  std::int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += weight(j + i);
  }
  for (; j < keys; ++j) total[0] += weight(j);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// P rounded to pairs: the tile itself stays S.
inline Vec exponentiate(const float* tile, std::int64_t keys, Vec unit, Vec shift, Pair* weights) {
  Vec total[2] = {Vec{}, Vec{}};
  for (std::int64_t j = 0; j < keys; j += 2) {
    const Vec even = exp2_vec(load(tile + j * kRows) * unit - shift);
    const Vec odd = j + 1 < keys ? exp2_vec(load(tile + (j + 1) * kRows) * unit - shift) : Vec{};
    total[0] += even;
    total[1] += odd;
    store_words(weights + j / 2 * kRows, pair_words(even, odd));
  }
  for (std::int64_t p = (keys + 1) / 2; p < elements<Pair>(keys); ++p) store_words(weights + p * kRows, IntVec{});
  return total[0] + total[1];
}
// Floats are not packed.
inline Vec exponentiate(float* tile, std::int64_t keys, Vec unit, Vec shift, float*) {
  return exponentiate(tile, keys, unit, shift);
}

inline Vec tile_maximum(const float* tile, std::int64_t keys) {
  Vec highest[2] = {all(-kInfinity), all(-kInfinity)};  // two chains hide the latency of the maximum
  std::int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
    highest[0] = larger(load(tile + j * kRows), highest[0]);
    highest[1] = larger(load(tile + (j + 1) * kRows), highest[1]);
  }
  if (j < keys) highest[0] = larger(load(tile + j * kRows), highest[0]);
  return larger(highest[0], highest[1]);
}

// S unit - m is one multiply-add, in which m carries its own rounding: an error that all weights of a row
// share, so that it cancels, as long as 2^error is a number. Rows with a larger m are scaled first.
constexpr float kLargestShift = 4194304.0f;  // 2^22: the error is at most 1/4

inline IntVec is_large(Vec maximum) {
  return (maximum > kLargestShift) | ((maximum < -kLargestShift) & (maximum != -kInfinity));
}

// The unit that is left for each row, after those that need it have been scaled.
inline Vec scale_large(float* tile, std::int64_t keys, Vec unit, Vec maximum) {
  const IntVec large = is_large(maximum);
  if (!is_any(large)) return unit;
  const Vec factor = large ? unit : all(1.0f);
  for (std::int64_t j = 0; j < keys; ++j) store(tile + j * kRows, load(tile + j * kRows) * factor);
  return large ? all(1.0f) : unit;
}

// m and l of kLanes rows after a tile, and rescale = 2^(m_old - m_new). True if any is not 1. l is summed as
// Kahan does: a running sum of the 128 tiles of 16,384 keys would err by more than all else in a row.
inline bool update_state(Strip& s, int v, Vec maximum, Vec shrink, Vec total, float* rescale) {
  const Vec kept = load(s.total + v) * shrink, added = load(s.total_rest + v) * shrink + total;
  const Vec sum = kept + added;
  store(s.maximum + v, maximum);
  store(s.total + v, sum);
  store(s.total_rest + v, added - (sum - kept));
  store(rescale, shrink);
  return is_any(shrink != 1.0f);
}

// m, l and P = 2^(S unit - m); the result as of update_state. P is left in `weights`, or in the tile if that
// is null.
template <class E>
inline bool online_softmax_update(Strip& s, float* tile, std::int64_t keys, float unit_of_call, float* rescale,
                                  E* weights) {
  bool changed = false;
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec before = load(s.maximum + v);
    const Vec maximum = larger(tile_maximum(tile + v, keys) * all(unit_of_call), before);
    const Vec unit = scale_large(tile + v, keys, all(unit_of_call), maximum);
    // A row that has seen no key keeps m = -inf; -inf - (-inf) would be NaN.
    const Vec shift = maximum == -kInfinity ? all(0.0f) : maximum;
    const Vec shrink = exp2_vec(before - shift);
    const Vec total = weights ? exponentiate(tile + v, keys, unit, shift, weights + v)
                              : exponentiate(tile + v, keys, unit, shift);
    changed |= update_state(s, v, maximum, shrink, total, rescale + v);
  }
  return changed;
}

// The same for few rows: S is [rows][kKeys], with lanes along the keys, since most would be idle along the rows.
// Floats are left in place; pairs in rows of kKeys / 2.

inline void put_weights(float* scores, float*, std::int64_t j, Vec p) { store(scores + j, p); }
inline void put_weights(float*, Pair* weights, std::int64_t j, Vec p) {
  store_bfloat(reinterpret_cast<std::uint16_t*>(weights) + j, p);
}

template <class E>
inline Vec exponentiate_row(float* scores, std::int64_t keys, Vec unit, Vec shift, E* weights) {
  Vec total[2] = {Vec{}, Vec{}};
  for (std::int64_t j = 0; j < keys; j += kLanes) {
    const Vec p = exp2_vec(load(scores + j) * unit - shift);
    total[j / kLanes % 2] += p;
    put_weights(scores, weights, j, p);
  }
  return total[0] + total[1];
}

inline Vec row_maximum(const float* scores, std::int64_t keys) {
  Vec highest = all(-kInfinity);
  for (std::int64_t j = 0; j < keys; j += kLanes) highest = larger(load(scores + j), highest);
  return highest;
}

// kLanes rows, or those that there are, from row v on.
template <class E>
inline bool row_softmax_update(Strip& s, int v, float* tile, std::int64_t keys, float unit_of_call, float* rescale,
                               E* weights) {
  const int rows = static_cast<int>(s.rows) - v < kLanes ? static_cast<int>(s.rows) - v : kLanes;
  Vec part[kLanes];
  for (int r = 0; r < kLanes; ++r) part[r] = r < rows ? row_maximum(tile + r * kKeys, keys) : all(-kInfinity);
  const Vec before = load(s.maximum + v);
  const Vec maximum = larger(across_lanes(part, larger) * all(unit_of_call), before);
  const Vec shift = maximum == -kInfinity ? all(0.0f) : maximum;
  const IntVec large = is_large(maximum);
  for (int r = 0; r < rows; ++r) {
    float* const row = tile + r * kKeys;
    for (std::int64_t j = 0; large[r] && j < keys; ++j) row[j] *= unit_of_call;
    part[r] = exponentiate_row(row, keys, all(large[r] ? 1.0f : unit_of_call), all(shift[r]),
                               weights + r * elements<E>(kKeys));
  }
  for (int r = rows; r < kLanes; ++r) part[r] = Vec{};
  const Vec total = across_lanes(part, [](Vec a, Vec b) { return a + b; });
  return update_state(s, v, maximum, exp2_vec(before - shift), total, rescale + v);
}

template <class E>
inline bool row_softmax_update(Strip& s, float* tile, std::int64_t keys, float unit, float* rescale, E* weights) {
  const std::int64_t whole = (keys + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t r = 0; r < s.rows; ++r)
    for (std::int64_t j = keys; j < whole; ++j) tile[r * kKeys + j] = -kInfinity;
  bool changed = false;
  for (int v = 0; v < s.lanes; v += kLanes)
    changed |= row_softmax_update(s, v, tile + v * kKeys, whole, unit, rescale, weights + v * elements<E>(kKeys));
  return changed;
}

// O *= rescale, row by row.
inline void rescale_rows(std::int64_t rows, const float* rescale, float* out, std::int64_t width) {
  for (std::int64_t r = 0; r < rows; ++r)
    if (rescale[r] != 1.0f)
      for (std::int64_t d = 0; d < width; ++d) out[r * width + d] *= rescale[r];
}

}  // namespace
