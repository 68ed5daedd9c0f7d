// Reading tensors of any dtype and strides as rows of numbers, and writing them back.

namespace {

inline float element(const tilewise_tensor& t, std::int64_t offset) {
  if (t.dtype == TILEWISE_FLOAT32) return static_cast<const float*>(t.data)[offset];
  const std::uint16_t word = static_cast<const std::uint16_t*>(t.data)[offset];
  return t.dtype == TILEWISE_FLOAT16 ? half_to_float(word) : bfloat_to_float(word);
}

inline void put(const tilewise_tensor& t, std::int64_t offset, float x) {
  if (t.dtype == TILEWISE_FLOAT32) {
    static_cast<float*>(t.data)[offset] = x;
  } else {
    static_cast<std::uint16_t*>(t.data)[offset] =
        t.dtype == TILEWISE_FLOAT16 ? float_to_half(x) : float_to_bfloat(x);
  }
}

// The element type of bfloat16 calls: pairs in families with a dot product for them.
using Lowest = std::conditional_t<kPairs, Pair, float>;
inline bool takes_pairs(const tilewise_call& c) {
  return c.q.dtype == TILEWISE_BFLOAT16 && c.k.dtype == TILEWISE_BFLOAT16 && c.v.dtype == TILEWISE_BFLOAT16;
}

// n numbers that stand `stride` apart, then zeros up to `width`: as floats from any dtype, or as the
// bfloat16 numbers that they are.
inline void read_row(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                     float* to, std::int64_t width) {
  std::int64_t i = 0;
  if (stride == 1) {
    const std::int64_t whole = n / kLanes * kLanes;
    if (t.dtype == TILEWISE_FLOAT32) {
      std::memcpy(to, static_cast<const float*>(t.data) + offset, static_cast<std::size_t>(n) * 4);
      i = n;
    } else if (t.dtype == TILEWISE_FLOAT16) {
      const std::uint16_t* p = static_cast<const std::uint16_t*>(t.data) + offset;
      for (; i < whole; i += kLanes) store(to + i, load_half(p + i));
    } else {
      const std::uint16_t* p = static_cast<const std::uint16_t*>(t.data) + offset;
      for (; i < whole; i += kLanes) store(to + i, load_bfloat(p + i));
    }
  }
  for (; i < n; ++i) to[i] = element(t, offset + i * stride);
  for (; i < width; ++i) to[i] = 0.0f;
}
inline void read_row(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                     std::uint16_t* to, std::int64_t width) {
  const std::uint16_t* from = static_cast<const std::uint16_t*>(t.data) + offset;
  if (stride == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * 2);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  }
  std::memset(to + n, 0, static_cast<std::size_t>(width - n) * 2);
}

// The same as `count` elements.
template <class E>
inline void read_elements(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                          E* to, std::int64_t count) {
  read_row(t, offset, stride, n, reinterpret_cast<Number<E>*>(to), count * kWidth<E>);
}

// factor * from.
inline void write_row(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                      const float* from, float factor) {
  std::int64_t i = 0;
  if (stride == 1) {
    const std::int64_t whole = n / kLanes * kLanes;
    if (t.dtype == TILEWISE_FLOAT32) {
      float* p = static_cast<float*>(t.data) + offset;
      for (; i < whole; i += kLanes) store(p + i, load(from + i) * factor);
    } else if (t.dtype == TILEWISE_BFLOAT16) {
      std::uint16_t* p = static_cast<std::uint16_t*>(t.data) + offset;
      for (; i < whole; i += kLanes) store_bfloat(p + i, load(from + i) * factor);
    }
  }
  for (; i < n; ++i) put(t, offset + i * stride, from[i] * factor);
}

// Where key j of a sequence lies: in the cache itself, or in the page that the table names.
inline std::int64_t key_offset(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                               std::int64_t head, std::int64_t j) {
  if (c.page_table == nullptr) return b * t.stride[0] + head * t.stride[1] + j * t.stride[2];
  std::int64_t page = c.page_table[b * c.page_table_stride + j / c.page_size];
  page = page < 0 ? 0 : page >= c.pages ? c.pages - 1 : page;  // only pages beyond the length can be wrong
  return page * t.stride[0] + j % c.page_size * t.stride[1] + head * t.stride[2];
}

// Whether the keys (or values) of a head can be used where they lie, as rows of elements of type E.
template <class E>
inline bool is_in_place(const tilewise_call& c, const tilewise_tensor& t, std::int64_t dim) {
  const int dtype = kWidth<E> == 1 ? TILEWISE_FLOAT32 : TILEWISE_BFLOAT16;
  const bool whole = elements<E>(dim) * kWidth<E> == dim && t.stride[2] % kWidth<E> == 0;
  return kParts<E> == 1 && t.dtype == dtype && t.stride[3] == 1 && whole && c.page_table == nullptr;
}

// Step load_tile: keys (or values) [j0, j1) as a left operand whose inner dimension is dim, in place if
// possible, else copied to `buffer` [j1 - j0][row_words(dim)].
template <class E>
inline Left<E> key_rows(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b, std::int64_t head,
                        std::int64_t j0, std::int64_t j1, std::int64_t dim, E* buffer) {
  if (is_in_place<E>(c, t, dim)) {
    const auto* first = static_cast<const Number<E>*>(t.data) + key_offset(c, t, b, head, j0);
    return {reinterpret_cast<const E*>(first), t.stride[2] / kWidth<E>, 1};
  }
  const std::int64_t words = row_words<E>(dim);
  for (std::int64_t j = j0; j < j1; ++j)
    read_elements(t, key_offset(c, t, b, head, j), t.stride[3], dim, buffer + (j - j0) * words, words);
  return {buffer, words, 1};
}

// The same as a right operand whose inner dimension are the keys, in `buffer` [elements(j1 - j0)]
// [padded(dim)] unless it is usable in place. `row` has room for two rows.
inline Right<float> key_columns(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                                std::int64_t head, std::int64_t j0, std::int64_t j1, std::int64_t dim,
                                float* buffer, float*) {
  const std::int64_t width = padded(dim);
  if (dim == width && is_in_place<float>(c, t, dim))
    return {static_cast<const float*>(t.data) + key_offset(c, t, b, head, j0), t.stride[2]};
  for (std::int64_t j = j0; j < j1; ++j)
    read_row(t, key_offset(c, t, b, head, j), t.stride[3], dim, buffer + (j - j0) * width, width);
  return {buffer, width};
}
inline Right<Pair> key_columns(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                               std::int64_t head, std::int64_t j0, std::int64_t j1, std::int64_t dim,
                               Pair* buffer, float* row) {
  const std::int64_t width = padded(dim);
  const bool direct = dim == width && t.stride[3] == 1;
  auto* copy = reinterpret_cast<std::uint16_t*>(row);
  for (std::int64_t j = j0; j < j0 + 2 * elements<Pair>(j1 - j0); j += 2) {
    const std::uint16_t* rows[2] = {nullptr, nullptr};
    for (int i = 0; i < 2 && j + i < j1; ++i) {
      const std::int64_t offset = key_offset(c, t, b, head, j + i);
      rows[i] = static_cast<const std::uint16_t*>(t.data) + offset;
      if (direct) continue;
      read_row(t, offset, t.stride[3], dim, copy + i * width, width);
      rows[i] = copy + i * width;
    }
    interleave(rows[0], rows[1], width, buffer + (j - j0) / 2 * width);
  }
  return {buffer, width};
}

}  // namespace
