// float16 and float32 numbers as sums of bfloat16 numbers, which tile registers multiply.
//
// x0 is the bfloat16 number nearest to x, x1 the one nearest to x - x0, x2 the one nearest to what then is left.
// Each takes 8 bits of x's significand (its sign counts as one), so x0 + x1 is a float16 number, with 11 bits, and
// x0 + x1 + x2 one of float32, with 24, exactly; |x1| <= 2^-8 |x|, |x2| <= 2^-16 |x|. Two parts of a float32 tile,
// P or dS, leave 2^-16 of it. A product of such sums has N^2 products, of which those of x_m y_n with m + n < N
// are added up. What is left out is at most
//
//   N = 2: x1 y1, 2^-16 |x y|, and as much again for a tile: 1/16 of the rounding of a float16 number, 2^-11;
//   N = 3: x1 y2 + x2 y1 + x2 y2, 2.01 * 2^-24 |x y|, as much as two roundings of a float32 product. That is
//          where all parts are as large as they can be: in products of normally distributed numbers the root of
//          the mean square is 1/10 of one rounding, and 1/170 of one of float16 for N = 2.
//
// Tile registers take subnormal numbers for 0, so parts below 2^-126 are lost, and inf - inf is NaN. Hence only
// calls whose numbers are finite and of ordinary size come here (parts_tasks.h).

namespace {

template <int N>
inline std::uint32_t* part(Parts<N>* x, int n) {
  return reinterpret_cast<std::uint32_t*>(x) + n * kLanes;
}

// kLanes elements from the two numbers of each.
template <int N>
inline void split_pairs(Vec even, Vec odd, Parts<N>* to) {
  for (int n = 0; n < N; ++n) {
    const IntVec words = pair_words(even, odd);
    store_words(part(to, n), words);
    even -= from_bits(words << 16);
    odd -= from_bits(words & static_cast<std::int32_t>(0xffff0000));
  }
}

// kLanes elements from 2 * kLanes numbers in a row, or from the first half of them and zeros.
template <int N>
inline void split_row(const float* from, bool whole, Parts<N>* to) {
  Vec half[2] = {load(from), whole ? load(from + kLanes) : Vec{}};
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 2; ++i) {
      auto* words = reinterpret_cast<std::uint16_t*>(part(to, n)) + i * kLanes;
      store_bfloat(words, half[i]);
      half[i] -= load_bfloat(words);
    }
}

template <int N>
inline void read_elements(const tilewise_tensor& t, std::int64_t offset, std::int64_t stride, std::int64_t n,
                          Parts<N>* to, std::int64_t count) {
  alignas(64) float numbers[2 * kLanes];
  for (std::int64_t p = 0; p < count; p += kLanes) {
    read_row(t, offset + 2 * p * stride, stride, clamp(n - 2 * p, 0, 2 * kLanes), numbers, 2 * kLanes);
    split_row(numbers, true, to + p);
  }
}

template <int N>
inline void transpose_elements(const Parts<N>* from, std::int64_t from_row, std::int64_t count, Parts<N>* to,
                               std::int64_t to_row) {
  for (std::int64_t p = 0; p < count; p += kLanes)
    for (int n = 0; n < N; ++n)
      transpose_words(part(from + p, n), from_row * N, kLanes, part(to + p * to_row, n), to_row * N);
}

// See operands.h and rows.h: the operands of the tile products, whose inner dimensions end in zeros.
template <int N>
inline Right<Parts<N>> key_columns(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b,
                                   std::int64_t head, std::int64_t j0, std::int64_t j1, std::int64_t dim,
                                   Parts<N>* buffer, float*) {
  const std::int64_t width = padded(dim), count = elements<Parts<N>>(j1 - j0);
  alignas(64) float rows[2][kLanes] = {};
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t d = 0; d < width; d += kLanes) {
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t j = j0 + 2 * p + i, numbers = j < j1 ? clamp(dim - d, 0, kLanes) : 0;
        const std::int64_t offset = j < j1 ? key_offset(c, t, b, head, j) + d * t.stride[3] : 0;
        read_row(t, offset, t.stride[3], numbers, rows[i], kLanes);
      }
      split_pairs(load(rows[0]), load(rows[1]), buffer + p * width + d);
    }
  return {buffer, width};
}

// `row` counts bfloat16 numbers of one part.
template <int N>
inline Right<Parts<N>> interleaved(const std::uint16_t* rows, std::int64_t row, std::int64_t count,
                                   std::int64_t width, Parts<N>* to) {
  alignas(64) static constexpr std::uint16_t kZeros[kLanes] = {};
  for (std::int64_t p = 0; p < elements<Parts<N>>(count); ++p)
    for (std::int64_t d = 0; d < width; d += kLanes)
      for (int n = 0; n < N; ++n) {
        // Where part n of the kLanes numbers from d on stands: a vector holds 2 * kLanes of them.
        const std::int64_t at = d / (2 * kLanes) * (2 * kLanes * N) + n * 2 * kLanes + d % (2 * kLanes);
        const auto numbers = [&](std::int64_t i) { return i < count ? rows + i * row * N + at : kZeros; };
        const IntVec even = bits(load_bfloat(numbers(2 * p))), odd = bits(load_bfloat(numbers(2 * p + 1)));
        store_words(part(to + p * width + d, n), odd | ((even >> 16) & 0xffff));
      }
  return {to, width};
}

template <int N>
inline Left<Parts<N>> along_keys(const float* tile, std::int64_t row, std::int64_t keys, int lanes, Parts<N>* to) {
  for (std::int64_t p = 0; p < elements<Parts<N>>(keys); ++p)
    for (int v = 0; v < lanes; v += kLanes) {
      const auto key = [&](std::int64_t j) { return j < keys ? load(tile + j * row + v) : Vec{}; };
      split_pairs(key(2 * p), key(2 * p + 1), to + p * row + v);
    }
  return along_packed_keys(to, row, keys, lanes);
}

template <int N>
inline Left<Parts<N>> along_queries(const float* tile, std::int64_t row, std::int64_t keys, int lanes,
                                    Parts<N>* to) {
  const std::int64_t count = elements<Parts<N>>(lanes);
  for (std::int64_t j = 0; j < keys; ++j)
    for (std::int64_t p = 0; p < count; p += kLanes)
      split_row(tile + j * row + 2 * p, lanes - 2 * p > kLanes, to + j * count + p);
  return {to, count, 1};
}

// The weights are rounded to floats before they are split.
template <int N>
inline Vec exponentiate(float* tile, std::int64_t keys, Vec unit, Vec shift, Parts<N>*) {
  return exponentiate(tile, keys, unit, shift);
}
template <int N>
inline Left<Parts<N>> weights_along_keys(const float* tile, Parts<N>* weights, std::int64_t keys, int lanes) {
  return along_keys(tile, kRows, keys, lanes, weights);
}

// Of a call that comes here all numbers are.
template <int N>
inline bool all_finite(Right<Parts<N>>, std::int64_t, std::int64_t) {
  return true;
}

// The rows that do not fill a tile, in multiply-adds: the parts add up to the numbers again.
template <int N>
inline Vec multiply_add(Left<Parts<N>> a, std::int64_t i, std::int64_t p, const Parts<N>* right, Vec sum) {
  const std::uint32_t* left = part(a.data + i * a.row + p / kLanes * kLanes, 0) + p % kLanes;
  float left_even = 0.0f, left_odd = 0.0f;
  Vec even{}, odd{};
  for (int n = N - 1; n >= 0; --n) {
    left_even += bfloat_to_float(static_cast<std::uint16_t>(left[n * kLanes]));
    left_odd += bfloat_to_float(static_cast<std::uint16_t>(left[n * kLanes] >> 16));
    const IntVec words = load_words(part(right, n));
    even += from_bits(words << 16);
    odd += from_bits(words & static_cast<std::int32_t>(0xffff0000));
  }
  return all(left_odd) * odd + (all(left_even) * even + sum);
}

}  // namespace
