// Which calls multiply float16 and float32 numbers in parts, on tile registers; the others multiply floats.

namespace {

// Rows of q, k, v and dO whose largest number lies between these, or is 0, have products of ordinary size: what is
// lost because it would be subnormal, less than 2^-125 of a factor, is then below a rounding of the row's own
// products, or of dS, and no part or sum overflows. Rows of float16 numbers always lie there, unless one is inf or
// NaN.
constexpr float kLeastInRow = 9.094947017729282e-13f;  // 2^-40
constexpr float kMostInRow = 1073741824.0f;            // 2^30

// The largest magnitude among n numbers, as the bits of a float: inf and NaN count as larger than all others.
inline std::int32_t largest_bits(const tilewise_tensor& t, std::int64_t offset, std::int64_t n) {
  constexpr std::int64_t block = 64;
  alignas(64) float numbers[block];
  IntVec most{};
  for (std::int64_t d = 0; d < n; d += block) {
    const std::int64_t count = n - d < block ? n - d : block;
    read_row(t, offset + d * t.stride[3], t.stride[3], count, numbers, padded(count));
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const IntVec size = bits(magnitude(load(numbers + i)));
      most = size > most ? size : most;
    }
  }
  std::int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

// Whether that of each row [batch, heads, len] is 0 or lies between least and kMostInRow. offset(b, h, i) says
// where a row of `dim` numbers begins.
template <class Offset>
bool are_ordinary(const tilewise_call& c, tilewise_parallel_for parallel_for, const tilewise_tensor& t,
                  std::int64_t heads, std::int64_t len, std::int64_t dim, float least, const Offset& offset) {
  const std::int64_t rows = c.batch * heads * len, block = 256;
  const std::int32_t low = bits(all(least))[0], high = bits(all(kMostInRow))[0];
  std::atomic<bool> ordinary{true};
  const auto judge = [&](std::int64_t n) {
    const std::int64_t stop = (n + 1) * block < rows ? (n + 1) * block : rows;
    for (std::int64_t row = n * block; row < stop && ordinary; ++row) {
      const std::int32_t most = largest_bits(t, offset(row / len / heads, row / len % heads, row % len), dim);
      if (most != 0 && (most < low || most > high)) ordinary = false;
    }
  };
  return run_tasks((rows + block - 1) / block, useful_threads(c), parallel_for, judge) && ordinary;
}

// How many parts a call's numbers are multiplied in: 2, 3, or 0 where they are multiplied as floats. That is where
// queries are too few to fill a tile, and where a number is not ordinary. bfloat16 numbers have no parts. Of the
// backward out and d_lse count too: dS is then finite, as P is.
inline int parts_of(const tilewise_call& c, tilewise_parallel_for parallel_for, bool backward) {
  const bool bfloats = takes_pairs(c) && (!backward || c.d_out.dtype == TILEWISE_BFLOAT16);
  if (bfloats || c.q_heads / c.kv_heads * c.q_len < kTileRows) return 0;
  const auto query_rows_are = [&](const tilewise_tensor& t, std::int64_t dim, float least) {
    return are_ordinary(c, parallel_for, t, c.q_heads, c.q_len, dim, least,
                        [&](std::int64_t b, std::int64_t h, std::int64_t i) {
                          return b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
                        });
  };
  const auto key_rows_are = [&](const tilewise_tensor& t, std::int64_t dim) {
    return are_ordinary(c, parallel_for, t, c.kv_heads, c.kv_len, dim, kLeastInRow,
                        [&](std::int64_t b, std::int64_t h, std::int64_t j) { return key_offset(c, t, b, h, j); });
  };
  if (!query_rows_are(c.q, c.head_dim, kLeastInRow) || !key_rows_are(c.k, c.head_dim) ||
      !key_rows_are(c.v, c.v_dim))
    return 0;
  bool is_float = c.out.dtype == TILEWISE_FLOAT32;
  for (const tilewise_tensor* t : {&c.q, &c.k, &c.v}) is_float |= t->dtype == TILEWISE_FLOAT32;
  if (!backward) return is_float ? 3 : 2;
  if (!query_rows_are(c.out, c.v_dim, 0.0f) || !query_rows_are(c.d_out, c.v_dim, kLeastInRow)) return 0;
  if (c.d_lse) {
    const std::int64_t* stride = c.d_lse_stride;
    const tilewise_tensor d_lse{const_cast<float*>(c.d_lse), {stride[0], stride[1], stride[2], 0}, TILEWISE_FLOAT32};
    if (!query_rows_are(d_lse, 1, 0.0f)) return 0;
  }
  return is_float || c.d_out.dtype == TILEWISE_FLOAT32 ? 3 : 2;
}

bool run_forward_in_parts(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const int parts = parts_of(c, parallel_for, false);
  return parts == 3   ? forward_of<Parts<3>>(c, parallel_for)
         : parts == 2 ? forward_of<Parts<2>>(c, parallel_for)
                      : run_forward(c, parallel_for);
}

bool run_backward_in_parts(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const int parts = parts_of(c, parallel_for, true);
  return parts == 3   ? backward_of<Parts<3>>(c, parallel_for)
         : parts == 2 ? backward_of<Parts<2>>(c, parallel_for)
                      : run_backward(c, parallel_for);
}

}  // namespace
