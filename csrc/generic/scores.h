// Step scores: one tile [keys][kRows] of them, from product to biases; and dropout. Scores are kept in units
// of log 2, as score * log2(e), so that a softmax needs 2^x; a tile times unit(c) is in those units.

namespace {

// tanh to 2 ulp: an odd polynomial where 1 - 2 / (e^2x + 1) would cancel.
inline Vec tanh_vec(Vec x) {
  const Vec a = magnitude(x), u = x * x;
  Vec p = all(2.06464762e-3f);
  p = p * u - 8.09194893e-3f;
  p = p * u + 2.16663387e-2f;
  p = p * u - 5.39405607e-2f;
  p = p * u + 1.33331582e-1f;
  p = p * u - 3.33333284e-1f;
  const Vec near_zero = x + x * u * p;
  const Vec capped = a > 15.0f ? all(15.0f) : a;
  const Vec e = exp2_vec(capped * (2 * kLog2E));
  const Vec far = 1.0f - 2.0f / (e + 1.0f);
  const Vec with_sign = from_bits((bits(far) & 0x7fffffff) | (bits(x) & (std::int32_t)0x80000000));
  return a < 0.625f ? near_zero : with_sign;
}

inline void soft_cap(float* tile, std::int64_t count, float softcap) {
  for (std::int64_t i = 0; i < count; i += kLanes)
    store(tile + i, tanh_vec(load(tile + i) / softcap) * (softcap * kLog2E));
}

// A finite bias stays finite in units of log 2: people hide keys with the lowest float, and a row that has
// nothing else spreads evenly.
inline Vec in_units(Vec natural) {
  const Vec x = natural * kLog2E;
  const Vec low = (x == -kInfinity) & (natural != -kInfinity) ? all(-kLargest) : x;
  return (low == kInfinity) & (natural != kInfinity) ? all(kLargest) : low;
}

// The entries of [j0, j1) whose place in the relative bias, j + shift, exists; the others are masked.
inline Span relative_span(const tilewise_call& c, std::int64_t shift, std::int64_t j0, std::int64_t j1) {
  const std::int64_t start = clamp(-shift, j0, j1);
  return {start, clamp(c.relative_entries - shift, start, j1)};
}

inline std::int64_t relative_shift(const tilewise_call& c, const Strip& s, int r) {
  return c.relative_zero - s.position[r];
}

// Bias and relative bias are stored by query: the rows of kLanes queries are summed, then transposed.
inline void add_stored_biases(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                              float* tile) {
  alignas(64) float by_query[kLanes * kKeys], by_key[kKeys * kLanes];
  const std::int64_t keys = j1 - j0;
  for (int v = 0; v < s.lanes; v += kLanes) {
    std::memset(by_query, 0, sizeof by_query);
    for (int r = v; r < v + kLanes && r < s.rows; ++r) {
      float* row = by_query + (r - v) * kKeys;
      if (c.bias.data)
        read_row(c.bias, query_offset(c.bias, s, r) + j0 * c.bias.stride[3], c.bias.stride[3], keys, row, keys);
      if (c.relative_bias) {
        const std::int64_t shift = relative_shift(c, s, r);
        const Span span = relative_span(c, shift, j0, j1);
        const float* table = c.relative_bias + s.head[r] * c.relative_entries;
        for (std::int64_t j = span.start; j < span.stop; ++j) row[j - j0] += table[j + shift];
      }
    }
    transpose_words(by_query, kKeys, keys, by_key, kLanes);
    for (std::int64_t j = 0; j < keys; ++j) {
      float* at = tile + j * kRows + v;
      store(at, load(at) + in_units(load(by_key + j * kLanes)));
    }
  }
}

inline void add_biases(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                       float* tile) {
  if (c.bias.data || c.relative_bias) add_stored_biases(c, s, j0, j1, tile);
  if (c.alibi.data) {
    for (int v = 0; v < s.lanes; v += kLanes) {
      const Vec slope = load(s.slope + v) * kLog2E;
      for (std::int64_t j = j0; j < j1; ++j) {
        const IntVec apart = load_int(s.position + v) - static_cast<std::int32_t>(j);
        float* at = tile + (j - j0) * kRows + v;
        store(at, load(at) - slope * magnitude(to_float(apart)));
      }
    }
  }
}

// What a product is multiplied by before it stands in a tile, and what the softmax multiplies a tile by.
// Where nothing is added to the products they stand there as they are: scaled within the multiply-add that
// subtracts the maximum they are rounded once less.
struct Scaling {
  float product, unit;
};
inline bool has_bias(const tilewise_call& c) { return c.bias.data || c.relative_bias || c.alibi.data; }
inline Scaling scaling(const tilewise_call& c) {
  const float factor = c.scale * kLog2E, size = std::fabs(factor);
  if (c.softcap != 0.0f) return {c.scale, 1.0f};
  if (!has_bias(c) && size > 1e-30f && size < 1e30f) return {std::copysign(1.0f, factor), size};
  return {factor, 1.0f};
}

// From scaled products to scores. `capped` keeps the capped products for the derivative, if not null.
inline void cap_and_bias(const tilewise_call& c, const Strip& s, Span span, float* tile, float* capped) {
  const std::int64_t keys = span.stop - span.start;
  if (c.softcap != 0.0f) {
    soft_cap(tile, keys * kRows, c.softcap);
    if (capped) std::memcpy(capped, tile, static_cast<std::size_t>(keys * kRows) * sizeof(float));
  }
  add_biases(c, s, span.start, span.stop, tile);
}

// S^T = K Q^T, capped and biased.
template <class E>
inline void scores(const tilewise_call& c, const Strip& s, Span span, Left<E> k, Right<E> q, float* tile,
                   float* capped) {
  const std::int64_t keys = span.stop - span.start;
  // Chains of 32: an error of a score is one of its weight, e^S, too. They cost about 1 % of a forward.
  matmul(keys, s.vectors, elements<E>(c.head_dim), k, q, tile, kRows, {scaling(c).product, false, 32});
  cap_and_bias(c, s, span, tile, capped);
}

// Philox 4x32-10 for four keys of kLanes queries of the strip, from lane v on.
inline void philox(const tilewise_call& c, const Strip& s, int v, std::uint32_t quad, IntVec words[4]) {
  IntVec c0 = all_int(static_cast<std::int32_t>(quad)), c1{}, c2{};
  IntVec c3 = all_int(static_cast<std::int32_t>(s.batch));
  for (int lane = 0; lane < kLanes; ++lane) {
    c1[lane] = static_cast<std::int32_t>(s.query[v + lane]);
    c2[lane] = static_cast<std::int32_t>(s.head[v + lane]);
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(c.seed), k1 = static_cast<std::uint32_t>(c.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = multiply_wide(c0, 0xD2511F53u), p1 = multiply_wide(c2, 0xCD9E8D57u);
    c0 = p1.high ^ c1 ^ all_int(static_cast<std::int32_t>(k0));
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ all_int(static_cast<std::int32_t>(k1));
    c3 = p0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Multiply from by keep_factor where an entry is kept and by 0 where it is dropped, into to. A word is
// compared as an unsigned number: with its top bit flipped, the signed comparison says the same.
inline void drop(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1, const float* from,
                 float* to) {
  constexpr std::int32_t flip = std::numeric_limits<std::int32_t>::min();
  const IntVec least = all_int(static_cast<std::int32_t>(c.keep_threshold) ^ flip);
  const Vec kept = all(c.keep_factor);
  for (int v = 0; v < s.lanes; v += kLanes) {
    IntVec words[4];
    for (std::int64_t j = j0; j < j1; ++j) {
      if (j == j0 || j % 4 == 0) philox(c, s, v, static_cast<std::uint32_t>(j / 4), words);
      const std::int64_t at = (j - j0) * kRows + v;
      store(to + at, load(from + at) * ((words[j % 4] ^ flip) >= least ? kept : all(0.0f)));
    }
  }
}

}  // namespace
