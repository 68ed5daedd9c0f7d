// The two products of the forward for the few query rows of a decoding step, which read each key and value
// once, where it lies: memory sets the pace, so nothing is packed or copied. A row of keys is read in whole
// vectors along head_dim and multiplied by up to kGroup query rows; kLanes such sums are added up by one tree.

namespace {

constexpr std::int64_t kFewRows = 8;   // rows of a kv head, q_heads / kv_heads * q_len
constexpr std::int64_t kBlockKeys = 32;  // keys read at once: 8 KB at head_dim 128 in bfloat16

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

// The rows of a tile of keys or values. Beyond an odd last one stands a row of zeros, which completes a pair.
template <class N>
struct RowPointers {
  const N* at[kKeys + 1];
};
template <class N>
inline RowPointers<N> row_pointers(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                                   std::int64_t head, Span span, const void* zeros) {
  RowPointers<N> rows;
  for (std::int64_t j = span.start; j < span.stop; ++j)
    rows.at[j - span.start] = static_cast<const N*>(t.data) + key_offset(c, t, b, head, j);
  rows.at[span.stop - span.start] = static_cast<const N*>(zeros);
  return rows;
}

// Reads the rows [j, j1) once, in the order of memory: that is a stream to the processor, which then runs ahead
// of it; the products' several rows side by side are not, and what they ask for would come one by one.
template <class N>
inline void touch(const RowPointers<N>& rows, std::int64_t j, std::int64_t j1, std::int64_t dim) {
  for (; j < j1; ++j)
    for (std::int64_t d = 0; d < dim; d += 64 / static_cast<std::int64_t>(sizeof(N)))
      static_cast<void>(*reinterpret_cast<const volatile char*>(rows.at[j] + d));
}

// Lane i of the result is the sum over the lanes of x[i].
template <int Count = kLanes>
inline Vec add_lanes(const Vec* x) {
  if constexpr (Count == 1) {
    return x[0];
  } else {
    Vec half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) {
      const IntVec a = bits(x[i]), b = bits(x[i + Count / 2]);
      half[i] = from_bits(zip_low(a, b)) + from_bits(zip_high(a, b));
    }
    return add_lanes<Count / 2>(half);
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

// S^T for Rows query rows: tile[j][r] = factor * k_j q_r.
template <int Rows, class E, class N>
inline void score_rows(const RowPointers<N>& k, std::int64_t keys, const E* queries, std::int64_t words,
                       std::int64_t dim, float factor, float* tile) {
  constexpr int kGroup = kLanes / Rows;  // keys whose sums fill a vector
  for (std::int64_t j = 0; j < keys; j += kGroup) {
    Vec sum[kLanes];
    const N* row[kGroup];
    if (j % kBlockKeys == 0) touch(k, j, j + kBlockKeys < keys ? j + kBlockKeys : keys, dim);
#pragma GCC unroll 16
    for (int g = 0; g < kGroup; ++g) row[g] = k.at[j + g < keys ? j + g : keys - 1];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = Vec{};
    for (std::int64_t d = 0; d < dim; d += kLanes * kWidth<E>)
#pragma GCC unroll 16
      for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
          sum[g * Rows + r] = multiply_numbers(queries + r * words + d / kWidth<E>, row[g] + d, sum[g * Rows + r]);
    const Vec total = add_lanes(sum) * factor;
    alignas(64) float by_key[kLanes];
    store(by_key, total);
    for (int g = 0; g < kGroup && j + g < keys; ++g)
      std::memcpy(tile + (j + g) * kRows, by_key + g * Rows, Rows * sizeof(float));
  }
}

// kLanes columns of two rows of bfloat16 numbers, as pairs.
template <class N>
inline IntVec load_pairs(const N* even, const N* odd) {
  return bits(load_numbers(odd)) | ((bits(load_numbers(even)) >> 16) & 0xffff);
}

// The values of an element are one key's, or those of two keys.
template <class E, class N>
inline Vec accumulate_numbers(const E* weight, const N* even, const N* odd, Vec sum) {
  if constexpr (kWidth<E> == 2) {
    return dot(all_int(static_cast<std::int32_t>(weight->word)), load_pairs(even, odd), sum);
  } else {
    return *weight * load_numbers(even) + sum;
  }
}

// O += P V for Rows query rows; weights[p][r] holds the element p of row r.
template <int Rows, class E, class N>
inline void value_rows(const RowPointers<N>& v, std::int64_t keys, const E* weights, std::int64_t dim, float* out,
                       std::int64_t out_row) {
  constexpr int kVectors = Rows >= 8 ? 1 : 2;
  for (std::int64_t j0 = 0; j0 < keys; j0 += kBlockKeys) {
    const std::int64_t j1 = j0 + kBlockKeys < keys ? j0 + kBlockKeys : keys;
    touch(v, j0, j1, dim);
    for (std::int64_t d = 0; d < dim;) {
      const bool wide = d + kVectors * kLanes <= dim;
      const auto columns = [&](auto vectors) {
        constexpr int count = decltype(vectors)::value;
        Vec sum[Rows][count];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
          for (int i = 0; i < count; ++i) sum[r][i] = Vec{};
        for (std::int64_t j = j0; j < j1; j += kWidth<E>)
#pragma GCC unroll 2
          for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
              sum[r][i] = accumulate_numbers(weights + j / kWidth<E> * kRows + r, v.at[j] + d + i * kLanes,
                                             v.at[j + kWidth<E> - 1] + d + i * kLanes, sum[r][i]);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
          for (int i = 0; i < count; ++i) {
            float* at = out + r * out_row + d + i * kLanes;
            store(at, load(at) + sum[r][i]);
          }
        d += count * kLanes;
      };
      if (wide) {
        columns(std::integral_constant<int, kVectors>{});
      } else {
        columns(std::integral_constant<int, 1>{});
      }
    }
  }
}

template <class N>
inline bool all_finite(const RowPointers<N>& rows, std::int64_t count, std::int64_t dim) {
  IntVec broken{};
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < dim; d += kLanes)
      broken |= (bits(load_numbers(rows.at[j] + d)) & 0x7f800000) == 0x7f800000;
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
