// The one tile product: C [m x n] (+)= A [m x k] B [k x n], sums in float.
//
// Lanes run along n. A is read one element at a time and broadcast, so it may have any strides: a
// transposed operand costs nothing. B and C have rows of whole vectors. Accumulators stay in registers:
// with AVX-512 8 x 3 or 6 x 4 vectors, 24 multiply-adds for 10 or 11 loads.
//
// The error of a sum grows with the terms added one by one. So accumulators start from 0 and are added to C
// after some terms; and who adds many products to one C does so in runs (add_run).

namespace {

// sum + a[i][p] * right.
inline Vec multiply_add(Left<float> a, std::int64_t i, std::int64_t p, const float* right, Vec sum) {
  return all(a.data[i * a.row + p * a.column]) * load(right) + sum;
}

// A template, so that it is compiled only in families with a dot product.
template <class P>
inline Vec multiply_add(Left<P> a, std::int64_t i, std::int64_t p, const P* right, Vec sum) {
  const P& left = a.data[i * a.row + p * a.column];
  return dot(all_int(static_cast<std::int32_t>(left.word)), load_words(right), sum);
}

// What becomes of the sums: C = factor * sum, or C += sum (the factor is then 1). No more than `chain` floats
// are summed in one accumulator; bfloat16 products, whose operands are rounded, need no such care.
struct Store {
  float factor;
  bool accumulate;
  std::int64_t chain = 64;
};

// Inlined, and so is its caller: operands passed by value go through the stack, written as words and read as
// vectors, for which a processor waits until all before it is done. A call cost some 50 cycles, a block is 400.
template <int Rows, int Vectors, class E>
__attribute__((always_inline)) inline void tile_product(Left<E> a, Right<E> b, float* c, std::int64_t c_row,
                                                        std::int64_t k, Store how) {
  const Vec factor = all(how.factor);
  const std::int64_t chain = std::is_same_v<E, Pair> ? k : how.chain / kWidth<E>;
  std::int64_t p = 0;
  do {
    const std::int64_t stop = k - p < chain ? k : p + chain;
    const bool adds = how.accumulate || p > 0;
    Vec sum[Rows][Vectors];
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Vec{};
    for (; p < stop; ++p) {
#pragma GCC unroll 24
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j)
          sum[i][j] = multiply_add(a, i, p, b.data + p * b.row + j * kLanes, sum[i][j]);
    }
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        float* at = c + i * c_row + j * kLanes;
        store(at, adds ? load(at) + sum[i][j] * factor : sum[i][j] * factor);
      }
  } while (p < k);
}

// The rows left over below a multiple of the block: found by halving, so that few sizes are compiled.
template <int Rows, int Vectors, class E>
__attribute__((always_inline)) inline void product_rows(std::int64_t m, std::int64_t k, Left<E> a, Right<E> b,
                                                        float* c, std::int64_t c_row, Store how) {
  std::int64_t i = 0;
  for (; i + Rows <= m; i += Rows) tile_product<Rows, Vectors>(a.from(i), b, c + i * c_row, c_row, k, how);
  if constexpr (Rows > 1) {
    if (i < m)
      product_rows<(Rows + 1) / 2, Vectors>(m - i, k, a.from(i), b, c + i * c_row, c_row, how);
  }
}

// Products added to a run before it is added to the sum of the runs. 4096 terms are then summed in chains of
// 64, 16 and 4 instead of 64 and 64.
constexpr std::int64_t kRunLength = 8;

// sum += run; run = 0. Both hold whole vectors.
inline void add_run(float* run, float* sum, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    store(sum + i, load(sum + i) + load(run + i));
    store(run + i, Vec{});
  }
}

// n counts vectors, k elements.
template <class E>
void matmul(std::int64_t m, std::int64_t n, std::int64_t k, Left<E> a, Right<E> b, float* c,
            std::int64_t c_row, Store how) {
  if constexpr (kFills<E>) {
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
