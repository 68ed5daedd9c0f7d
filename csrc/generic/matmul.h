// The one tile product: C [m x n] (+)= A [m x k] B [k x n], everything in float.
//
// Lanes run along n. A is read one number at a time and broadcast, so it may have any strides: a
// transposed operand costs nothing. B and C have rows of whole vectors. Accumulators stay in registers:
// with AVX-512 8 x 3 or 6 x 4 vectors, 24 multiply-adds for 10 or 11 loads. They start from 0 and are added
// to C at the end: over 4096 keys that errs a quarter as much as one running sum (8e-8 against 3.3e-7).

namespace {

struct Left {
  const float* data;
  std::int64_t row, column;  // strides
};

template <int Rows, int Vectors>
inline void tile_product(Left a, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                         std::int64_t k, bool accumulate) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vec{};
  for (std::int64_t p = 0; p < k; ++p) {
    Vec right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + p * b_row + j * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) {
      const Vec left = all(a.data[i * a.row + p * a.column]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = left * right[j] + sum[i][j];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* at = c + i * c_row + j * kLanes;
      store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
    }
}

// The rows left over below a multiple of the block: found by halving, so that few sizes are compiled.
template <int Rows, int Vectors>
void product_rows(std::int64_t m, std::int64_t k, Left a, const float* b, std::int64_t b_row, float* c,
                  std::int64_t c_row, bool accumulate) {
  std::int64_t i = 0;
  for (; i + Rows <= m; i += Rows) {
    tile_product<Rows, Vectors>({a.data + i * a.row, a.row, a.column}, b, b_row, c + i * c_row, c_row, k,
                                accumulate);
  }
  if constexpr (Rows > 1) {
    if (i < m)
      product_rows<(Rows + 1) / 2, Vectors>(m - i, k, {a.data + i * a.row, a.row, a.column}, b, b_row,
                                            c + i * c_row, c_row, accumulate);
  }
}

// n counts vectors.
void matmul(std::int64_t m, std::int64_t n, std::int64_t k, Left a, const float* b, std::int64_t b_row,
            float* c, std::int64_t c_row, bool accumulate) {
  for (std::int64_t j = 0; j < n;) {
    const std::int64_t left = n - j;
    const float* bj = b + j * kLanes;
    float* cj = c + j * kLanes;
    if constexpr (kPanelVectors >= 4) {
      if (left >= 4) {
        product_rows<kAccumulators / 4, 4>(m, k, a, bj, b_row, cj, c_row, accumulate);
        j += 4;
        continue;
      }
      if (left == 3) {
        product_rows<kAccumulators / 3, 3>(m, k, a, bj, b_row, cj, c_row, accumulate);
        j += 3;
        continue;
      }
    }
    if (left >= 2) {
      product_rows<kAccumulators / 2, 2>(m, k, a, bj, b_row, cj, c_row, accumulate);
      j += 2;
    } else {
      product_rows<kAccumulators, 1>(m, k, a, bj, b_row, cj, c_row, accumulate);
      j += 1;
    }
  }
}

}  // namespace
