// The one tile product: C [m x n] (+)= A [m x k] B [k x n], sums in float.
//
// Lanes run along n. A is read one element at a time and broadcast, so it may have any strides: a
// transposed operand costs nothing. B and C have rows of whole vectors. Accumulators stay in registers:
// with AVX-512 8 x 3 or 6 x 4 vectors, 24 multiply-adds for 10 or 11 loads. They start from 0 and are added
// to C at the end: over 4096 keys that errs a quarter as much as one running sum (8e-8 against 3.3e-7).

namespace {

inline Vec multiply_add(const float* left, const float* right, Vec sum) {
  return all(*left) * load(right) + sum;
}

// A template, so that it is compiled only in families with a dot product.
template <class P>
inline Vec multiply_add(const P* left, const P* right, Vec sum) {
  return dot(all_int(static_cast<std::int32_t>(left->word)), load_words(right), sum);
}

// What becomes of the sums: C = factor * sum, or C += sum.
struct Store {
  float factor;
  bool accumulate;
};

template <int Rows, int Vectors, class E>
inline void tile_product(Left<E> a, Right<E> b, float* c, std::int64_t c_row, std::int64_t k, Store how) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vec{};
  for (std::int64_t p = 0; p < k; ++p) {
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j)
        sum[i][j] = multiply_add(a.data + i * a.row + p * a.column, b.data + p * b.row + j * kLanes, sum[i][j]);
  }
  const Vec factor = all(how.factor);
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* at = c + i * c_row + j * kLanes;
      store(at, how.accumulate ? load(at) + sum[i][j] : sum[i][j] * factor);
    }
}

// The rows left over below a multiple of the block: found by halving, so that few sizes are compiled.
template <int Rows, int Vectors, class E>
void product_rows(std::int64_t m, std::int64_t k, Left<E> a, Right<E> b, float* c, std::int64_t c_row,
                  Store how) {
  std::int64_t i = 0;
  for (; i + Rows <= m; i += Rows) tile_product<Rows, Vectors>(a.from(i), b, c + i * c_row, c_row, k, how);
  if constexpr (Rows > 1) {
    if (i < m)
      product_rows<(Rows + 1) / 2, Vectors>(m - i, k, a.from(i), b, c + i * c_row, c_row, how);
  }
}

// n counts vectors, k elements.
template <class E>
void matmul(std::int64_t m, std::int64_t n, std::int64_t k, Left<E> a, Right<E> b, float* c,
            std::int64_t c_row, Store how) {
  if constexpr (kTiles && kWidth<E> == 2) {
    const std::int64_t done = tile_matmul(m, n, k, a, b, c, c_row, how);
    if (done == m) return;
    m -= done;
    a = a.from(done);
    c += done * c_row;
  }
  for (std::int64_t j = 0; j < n;) {
    const std::int64_t left = n - j;
    const Right<E> bj{b.data + j * kLanes, b.row};
    float* cj = c + j * kLanes;
    if constexpr (kPanelVectors >= 4) {
      if (left >= 4) {
        product_rows<kAccumulators / 4, 4>(m, k, a, bj, cj, c_row, how);
        j += 4;
        continue;
      }
      if (left == 3) {
        product_rows<kAccumulators / 3, 3>(m, k, a, bj, cj, c_row, how);
        j += 3;
        continue;
      }
    }
    if (left >= 2) {
      product_rows<kAccumulators / 2, 2>(m, k, a, bj, cj, c_row, how);
      j += 2;
    } else {
      product_rows<8, 1>(m, k, a, bj, cj, c_row, how);
      j += 1;
    }
  }
}

}  // namespace
