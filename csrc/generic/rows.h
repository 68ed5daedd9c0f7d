// Reading tensors of any dtype and strides as rows of floats, and writing them back.

namespace {

struct Rows {
  const float* data;
  std::int64_t stride;
  Rows from(std::int64_t row) const { return {data + row * stride, stride}; }
};

inline std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

// n numbers that stand `stride` apart, as floats; zeros up to a whole number of vectors.
inline void read_row(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                     float* to) {
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
  for (; i < padded(n); ++i) to[i] = 0.0f;
}

inline void write_row(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                      const float* from) {
  if (t.dtype == TILEWISE_FLOAT32 && stride == 1) {
    std::memcpy(static_cast<float*>(t.data) + offset, from, static_cast<std::size_t>(n) * 4);
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) put(t, offset + i * stride, from[i]);
}

inline bool all_finite(const float* p, std::int64_t stride, std::int64_t rows, std::int64_t n) {
  for (std::int64_t i = 0; i < rows; ++i) {
    std::int32_t broken = 0;  // exponent bits all ones: inf or NaN
    for (std::int64_t d = 0; d < n; ++d) {
      std::int32_t word;
      std::memcpy(&word, p + i * stride + d, sizeof word);
      broken |= (word & 0x7f800000) == 0x7f800000;
    }
    if (broken) return false;
  }
  return true;
}

// Where key j of a sequence lies: in the cache itself, or in the page that the table names.
inline std::int64_t key_offset(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                               std::int64_t head, std::int64_t j) {
  if (c.page_table == nullptr) return b * t.stride[0] + head * t.stride[1] + j * t.stride[2];
  std::int64_t page = c.page_table[b * c.page_table_stride + j / c.page_size];
  page = page < 0 ? 0 : page >= c.pages ? c.pages - 1 : page;  // only pages beyond the length can be wrong
  return page * t.stride[0] + j % c.page_size * t.stride[1] + head * t.stride[2];
}

// Keys (or values) [j0, j1): in place where they are already rows of floats that may be read in whole
// vectors, else converted into `buffer`.
inline Rows key_rows(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b, std::int64_t head,
                     std::int64_t j0, std::int64_t j1, std::int64_t dim, bool whole_vectors,
                     float* buffer) {
  if (t.dtype == TILEWISE_FLOAT32 && t.stride[3] == 1 && c.page_table == nullptr &&
      (!whole_vectors || dim % kLanes == 0)) {
    return {static_cast<const float*>(t.data) + key_offset(c, t, b, head, j0), t.stride[2]};
  }
  const std::int64_t width = padded(dim);
  for (std::int64_t j = j0; j < j1; ++j)
    read_row(t, key_offset(c, t, b, head, j), t.stride[3], dim, buffer + (j - j0) * width);
  return {buffer, width};
}

}  // namespace
