// The tile product on tile registers (AMX): blocks of 16 rows by 2 or 3 vectors, 16 elements a step.
//
// Two blocks of 16 rows by 3 vectors take 6 registers for sums and 2 for operands: 4 loads for 3 products,
// and a load takes half as long as a product.
//
// Of N parts, those are multiplied whose places add up to less than N: 3 products of two parts, 6 of three
// (parts.h says what the others would add). The smallest come first, and from 0: they are then rounded at their
// own size, and the largest are added k / 16 times to sums of their size, not 6 times as often.
#include <utility>

namespace {

constexpr std::int64_t kTileRows = 16, kTileElements = 16;
constexpr int kLeftRegister = 6, kRightRegister = 7;

template <class F, int... I>
inline void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0) ... f(N - 1) with constants, which register numbers have to be.
template <int N, class F>
inline void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

template <class E>
inline const std::uint32_t* part(const E* x, int n) {
  return reinterpret_cast<const std::uint32_t*>(x) + n * kLanes;
}

// The sums of 16 rows by `Vectors` vectors, in the registers from `First` on.
template <int First, int Vectors, class E>
inline void multiply_tiles(Left<E> a, Right<E> b, const float* c, std::int64_t c_row, std::int64_t k, Store how) {
  constexpr int bytes = sizeof(E);
  unrolled<Vectors>([&](auto j) {
    if (how.accumulate && kParts<E> == 1) {
      tile_load<First + j()>(c + j() * kLanes, c_row * 4);
    } else {
      tile_zero<First + j()>();
    }
  });
  for (int places = kParts<E> - 1; places >= 0; --places)
    for (int n = 0; n <= places; ++n)
      for (std::int64_t p = 0; p < k; p += kTileElements) {
        tile_load<kLeftRegister>(part(a.data + p, n), a.row * bytes);
        unrolled<Vectors>([&](auto j) {
          tile_load<kRightRegister>(part(b.data + p * b.row + j() * kLanes, places - n), b.row * bytes);
          tile_dot<First + j(), kLeftRegister, kRightRegister>();
        });
      }
}

// C = factor * sums, or C += sums.
template <int First, int Vectors, class E>
inline void store_tiles(float* c, std::int64_t c_row, Store how) {
  unrolled<Vectors>([&](auto j) {
    float* to = c + j() * kLanes;
    if constexpr (kParts<E> == 1) {  // which has added to what C was
      tile_store<First + j()>(to, c_row * 4);
      if (how.accumulate || how.factor == 1.0f) return;
      for (int r = 0; r < kTileRows; ++r) store(to + r * c_row, load(to + r * c_row) * how.factor);
    } else {
      alignas(64) float sums[kTileRows * kLanes];
      tile_store<First + j()>(sums, kLanes * 4);
      for (int r = 0; r < kTileRows; ++r) {
        const Vec sum = load(sums + r * kLanes);
        store(to + r * c_row, how.accumulate ? load(to + r * c_row) + sum : sum * how.factor);
      }
    }
  });
}

// Blocks of 16 rows take two sets of registers in turn: a block is stored after the next one's products have been
// asked for, since a store waits for the products before it, and what comes after waits for the store.
template <int Vectors, class E>
void tile_rows(std::int64_t m, Left<E> a, Right<E> b, float* c, std::int64_t c_row, std::int64_t k, Store how) {
  const auto multiply = [&](auto first, std::int64_t i) {
    multiply_tiles<first(), Vectors>(a.from(i), b, c + i * c_row, c_row, k, how);
  };
  const auto put = [&](auto first, std::int64_t i) { store_tiles<first(), Vectors, E>(c + i * c_row, c_row, how); };
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, Vectors> odd;
  std::int64_t i = 0;
  for (; i < m; i += 2 * kTileRows) {
    multiply(even, i);
    if (i > 0) put(odd, i - kTileRows);
    if (i + kTileRows < m) multiply(odd, i + kTileRows);
    put(even, i);
  }
  if (m > 0 && m / kTileRows % 2 == 0) put(odd, m - kTileRows);
}

// As matmul, for the rows that fill tiles; returns how many those are.
template <class E>
std::int64_t tile_matmul(std::int64_t m, std::int64_t n, std::int64_t k, Left<E> a, Right<E> b, float* c,
                         std::int64_t c_row, Store how) {
  const std::int64_t rows = m / kTileRows * kTileRows;
  for (std::int64_t j = 0; j < n;) {
    const std::int64_t left = n - j;
    const Right<E> bj{b.data + j * kLanes, b.row};
    float* cj = c + j * kLanes;
    if (left == 3 || left > 4) {
      tile_rows<3>(rows, a, bj, cj, c_row, k, how);
      j += 3;
    } else if (left >= 2) {
      tile_rows<2>(rows, a, bj, cj, c_row, k, how);
      j += 2;
    } else {
      tile_rows<1>(rows, a, bj, cj, c_row, k, how);
      j += 1;
    }
  }
  return rows;
}

}  // namespace
