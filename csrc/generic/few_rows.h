// The two products of the forward for the few query rows of a decoding step, which read each key and value
// once, where it lies: memory sets the pace, so nothing is packed or copied. A row of keys is read in whole
// vectors along head_dim and multiplied by up to kGroup query rows; kLanes such sums are added up by one tree.

namespace {

constexpr std::int64_t kFewRows = 8;     // rows of a kv head, q_heads / kv_heads * q_len
constexpr std::int64_t kAhead = 32;      // rows asked for in advance: 8 KB at head_dim 128 in bfloat16
constexpr std::int64_t kBlockKeys = 32;  // keys whose values are added to O at once

struct Half {
  std::uint16_t word;
};
struct Bfloat {
  std::uint16_t word;
};
inline Vec load_numbers(const float* p) { return load(p); }
inline Vec load_numbers(const Half* p) { return load_half(&p->word); }
inline Vec load_numbers(const Bfloat* p) { return load_bfloat(&p->word); }

inline bool has_few_rows(const tilewise_call& c) { return c.q_heads / c.kv_heads * c.q_len <= kFewRows; }

// Whether keys and values can be read in whole vectors where they lie; otherwise they are packed as ever.
template <class E>
inline bool reads_in_place(const tilewise_call& c) {
  return has_few_rows(c) && c.keep_factor == 0.0f && c.k.dtype == c.v.dtype && c.k.stride[3] == 1 &&
         c.v.stride[3] == 1 && c.head_dim % (kLanes * kWidth<E>) == 0 && c.v_dim % kLanes == 0;
}

// The rows of a tile of keys or values; behind the last stands one of zeros, which completes a pair. ahead(j) is
// the row kAhead further, also of the tiles that follow: asking for it there does no harm if it does not exist.
// Addresses are reckoned, not looked up: from an array they cost a fifth of the speed.
template <class N>
struct EvenRows {
  const N *first, *zeros;
  std::int64_t step, count;
  EvenRows(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b, std::int64_t head, Span span,
           const void* none)
      : first(static_cast<const N*>(t.data) + key_offset(c, t, b, head, span.start)),
        zeros(static_cast<const N*>(none)), step(t.stride[2]), count(span.stop - span.start) {}
  const N* at(std::int64_t j) const { return j < count ? first + j * step : zeros; }
  const N* ahead(std::int64_t j) const { return first + (j + kAhead) * step; }
};

// The same where keys lie in pages.
template <class N>
struct PagedRows {
  const N* rows[kKeys + kAhead + 1];
  PagedRows(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b, std::int64_t head, Span span,
            const void* none) {
    const std::int64_t count = span.stop - span.start;
    for (std::int64_t j = 0; j < count + kAhead; ++j) {
      const std::int64_t key = span.start + j < c.kv_len ? span.start + j : c.kv_len - 1;
      rows[j < count ? j : j + 1] = static_cast<const N*>(t.data) + key_offset(c, t, b, head, key);
    }
    rows[count] = static_cast<const N*>(none);
  }
  const N* at(std::int64_t j) const { return rows[j]; }
  const N* ahead(std::int64_t j) const { return rows[j + kAhead]; }
};
template <class N>
inline void ask_for(const N* row, std::int64_t dim) {
  constexpr std::int64_t line = 64 / sizeof(N);
  for (std::int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d, 0, 3);
}

// Lane i of the result is what `both` makes of the lanes of x[i].
template <int Count = kLanes, class F>
__attribute__((always_inline)) inline Vec across_lanes(const Vec* x, const F& both) {
  if constexpr (Count == 1) {
    return x[0];
  } else {
    Vec half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) {
      const IntVec a = bits(x[i]), b = bits(x[i + Count / 2]);
      half[i] = both(from_bits(zip_low(a, b)), from_bits(zip_high(a, b)));
    }
    return across_lanes<Count / 2>(half, both);
  }
}

template <class E, class N>
inline Vec multiply_numbers(const E* query, const N* key, Vec sum) {
  if constexpr (kWidth<E> == 2) {
    return dot(load_words(query), load_words(key), sum);
  } else {
    return load(query) * load_numbers(key) + sum;
  }
}

// S for Rows query rows: tile[r][j] = factor * q_r k_j, in rows of kKeys.
template <int Rows, class E, class Keys>
inline void score_rows(const Keys& k, std::int64_t keys, const E* queries, std::int64_t words,
                       std::int64_t dim, float factor, float* tile) {
  constexpr int kGroup = kLanes / Rows;  // keys whose sums fill a vector
  for (std::int64_t j = 0; j < keys; j += kGroup) {
    Vec sum[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = Vec{};
#pragma GCC unroll 16
    for (int g = 0; g < kGroup; ++g) {  // key by key, as they lie
      const std::int64_t key = j + g < keys ? j + g : keys - 1;
      const auto* row = k.at(key);
      ask_for(k.ahead(key), dim);
      for (std::int64_t d = 0; d < dim; d += kLanes * kWidth<E>)
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
          sum[r * kGroup + g] =
              multiply_numbers(queries + r * words + d / kWidth<E>, row + d, sum[r * kGroup + g]);
    }
    const Vec total = across_lanes(sum, [](Vec a, Vec b) { return a + b; }) * factor;
    alignas(64) float by_row[kLanes];
    store(by_row, total);
    for (int r = 0; r < Rows; ++r) std::memcpy(tile + r * kKeys + j, by_row + r * kGroup, kGroup * sizeof(float));
  }
}

// Vectors columns of a row of values; or, as pairs, of two rows.
template <int Vectors, class E, class N>
inline void load_columns(const N* row, const N* second, IntVec columns[Vectors]) {
  if constexpr (kWidth<E> == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) columns[i] = bits(load_numbers(row + i * kLanes));
  } else if constexpr (Vectors == 1) {
    columns[0] = bits(load_numbers(second)) | ((bits(load_numbers(row)) >> 16) & 0xffff);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i += 2) interleave_words(row + i * kLanes, second + i * kLanes, columns + i);
  }
}

template <class E, class Words>
inline Vec multiply_columns(const E* weight, Words columns, Vec sum) {
  if constexpr (kWidth<E> == 2) {
    return dot(all_int(static_cast<std::int32_t>(weight->word)), columns, sum);
  } else {
    return *weight * from_bits(columns) + sum;
  }
}

// Weights of a tile: the element p of row r is at[p * step + r * row].
template <class E>
struct Weights {
  const E* at;
  std::int64_t step, row;
  Weights from(std::int64_t r) const { return {at + r * row, step, row}; }
};

// O += P V for Rows query rows and Vectors columns, over some keys. The first to read a row, of `ask` numbers, asks
// for one to come; for the others `ask` is 0.
template <int Rows, int Vectors, class E, class Values>
inline void value_columns(const Values& v, const Span& keys, const Weights<E>& weights, std::int64_t d, float* out,
                          std::int64_t out_row, std::int64_t ask) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) sum[r][i] = Vec{};
  for (std::int64_t j = keys.start; j < keys.stop; j += kWidth<E>) {
    ask_for(v.ahead(j), ask);
    if constexpr (kWidth<E> == 2) ask_for(v.ahead(j + 1), ask);
    IntVec values[Vectors];
    load_columns<Vectors, E>(v.at(j) + d, v.at(j + kWidth<E> - 1) + d, values);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const E* weight = weights.at + j / kWidth<E> * weights.step + r * weights.row;
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) sum[r][i] = multiply_columns(weight, values[i], sum[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      float* at = out + r * out_row + d + i * kLanes;
      store(at, load(at) + sum[r][i]);
    }
}

// The same for all columns. Few query rows at a time, so that there are registers for many columns, and the values
// of a key are read at a stretch: that is a stream to the processor, which then runs ahead of it.
template <int Rows, class E, class Values>
inline void value_rows(const Values& v, std::int64_t keys, Weights<E> weights, std::int64_t dim, float* out,
                       std::int64_t out_row) {
  constexpr int kTogether = Rows < 2 ? Rows : 2, kMost = kAccumulators >= 16 ? 8 : 4;
  for (std::int64_t j0 = 0; j0 < keys; j0 += kBlockKeys) {
    const Span block{j0, j0 + kBlockKeys < keys ? j0 + kBlockKeys : keys};
    for (std::int64_t d = 0; d < dim;) {
      const auto columns = [&](auto vectors) {
        for (int r = 0; r < Rows; r += kTogether)
          value_columns<kTogether, decltype(vectors)::value>(v, block, weights.from(r), d, out + r * out_row, out_row,
                                                             r + d == 0 ? dim : 0);
        d += decltype(vectors)::value * kLanes;
      };
      if (d + kMost * kLanes <= dim) {
        columns(std::integral_constant<int, kMost>{});
      } else if (d + 2 * kLanes <= dim) {
        columns(std::integral_constant<int, 2>{});
      } else {
        columns(std::integral_constant<int, 1>{});
      }
    }
  }
}

template <class Values>
inline bool all_finite(const Values& rows, std::int64_t count, std::int64_t dim) {
  IntVec broken{};
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < dim; d += kLanes)
      broken |= (bits(load_numbers(rows.at(j) + d)) & 0x7f800000) == 0x7f800000;
  return !is_any(broken);
}

// f with the number of rows as a constant: a power of two of at most kLanes, and from which row on.
template <class F>
inline void each_group(std::int64_t rows, const F& f) {
  constexpr int most = kLanes < kFewRows ? kLanes : kFewRows;
  std::int64_t r = 0;
  for (; rows - r > most / 2; r += most) f(std::integral_constant<int, most>{}, r);
  if (rows - r > 2) f(std::integral_constant<int, 4 < most ? 4 : most>{}, r);
  else if (rows - r == 2) f(std::integral_constant<int, 2>{}, r);
  else if (rows - r == 1) f(std::integral_constant<int, 1>{}, r);
}

}  // namespace
