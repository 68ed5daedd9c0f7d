// What a tile product multiplies: floats, or pairs of bfloat16 numbers, or sums of such pairs.
//
// A product sums along its inner dimension. An element is what one lane takes of it in one step: one
// float, or two bfloat16 numbers that are neighbours along that dimension, the first in the low half.
// Processors with bfloat16 dot products take a pair a lane at the rate of one float. Either is one 32-bit
// word, so moving and transposing operands is the same code for both.
#include <initializer_list>
#include <type_traits>

namespace {

struct __attribute__((packed, aligned(2))) Pair {
  std::uint32_t word;
};

// N pairs whose sum is two numbers of float16 or float32 (parts.h). kLanes elements are stored as N vectors, one
// of each part: whole vectors of elements have addresses, single elements have none.
template <int N>
struct Parts {
  std::uint32_t words[N];
};

template <class E>
struct Traits;
template <>
struct Traits<float> {
  using Number = float;
  static constexpr int kWidth = 1;  // numbers in an element
  static constexpr int kParts = 1;  // words in an element
};
template <>
struct Traits<Pair> {
  using Number = std::uint16_t;
  static constexpr int kWidth = 2, kParts = 1;
};
template <int N>
struct Traits<Parts<N>> {
  using Number = std::uint16_t;
  static constexpr int kWidth = 2, kParts = N;
};
template <class E>
using Number = typename Traits<E>::Number;
template <class E>
constexpr int kWidth = Traits<E>::kWidth;
template <class E>
constexpr int kParts = Traits<E>::kParts;

// n, up to a whole number of vectors.
inline std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Elements that hold n numbers. Those of tile registers end in zeros, whole vectors of them, so that every inner
// dimension fills the registers.
template <class E>
constexpr bool kFills = kTiles && kWidth<E> == 2;
template <class E>
inline std::int64_t elements(std::int64_t n) {
  const std::int64_t count = (n + kWidth<E> - 1) / kWidth<E>;
  return kFills<E> ? padded(count) : count;
}

// Elements of a row that holds n numbers and may be read in whole vectors.
template <class E>
inline std::int64_t row_words(std::int64_t n) {
  return padded(elements<E>(n));
}

// The left operand, read one element at a time, so it may have any strides.
template <class E>
struct Left {
  const E* data;
  std::int64_t row, column;
  Left from(std::int64_t i) const { return {data + i * row, row, column}; }
};

// The right operand: rows of whole vectors, one row per element of the inner dimension.
template <class E>
struct Right {
  const E* data;
  std::int64_t row;
  // From the i-th number of the inner dimension on; i is a multiple of the width.
  Right from(std::int64_t i) const { return {data + i / kWidth<E> * row, row}; }
};

inline IntVec load_words(const void* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_words(void* p, IntVec v) { std::memcpy(p, &v, sizeof v); }

// to[p][r] = from[r][p] for kLanes rows of `words` words; both may be read and written in whole vectors.
// log2(kLanes) perfect shuffles of kLanes vectors.
inline void transpose_words(const void* from, std::int64_t from_row, std::int64_t words, void* to,
                            std::int64_t to_row) {
  const auto* source = static_cast<const std::uint32_t*>(from);
  auto* target = static_cast<std::uint32_t*>(to);
  for (std::int64_t p = 0; p < words; p += kLanes) {
    IntVec x[kLanes], y[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) x[r] = load_words(source + r * from_row + p);
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < kLanes / 2; ++r) {
        y[2 * r] = zip_low(x[r], x[r + kLanes / 2]);
        y[2 * r + 1] = zip_high(x[r], x[r + kLanes / 2]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) x[r] = y[r];
    }
    if (words - p >= kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store_words(target + (p + r) * to_row, x[r]);
    } else {
      for (std::int64_t r = 0; r < words - p; ++r) store_words(target + (p + r) * to_row, x[r]);
    }
  }
}

template <class E>
inline void transpose_elements(const E* from, std::int64_t from_row, std::int64_t count, E* to,
                               std::int64_t to_row) {
  transpose_words(from, from_row, count, to, to_row);
}

// Two rows of bfloat16 numbers as one of pairs; a row that is not there counts as zeros.
inline void interleave(const std::uint16_t* even, const std::uint16_t* odd, std::int64_t width, Pair* to) {
  for (std::int64_t d = 0; d < width; d += kLanes) {
    const IntVec low = even ? bits(load_bfloat(even + d)) : IntVec{};
    const IntVec high = odd ? bits(load_bfloat(odd + d)) : IntVec{};
    store_words(to + d, high | ((low >> 16) & 0xffff));
  }
}

// Rows of numbers as a right operand whose inner dimension are the rows: as they are, or in pairs.
inline Right<float> interleaved(const float* rows, std::int64_t row, std::int64_t, std::int64_t, float*) {
  return {rows, row};
}
inline Right<Pair> interleaved(const std::uint16_t* rows, std::int64_t row, std::int64_t count,
                               std::int64_t width, Pair* to) {
  const auto number = [&](std::int64_t i) { return i < count ? rows + i * row : nullptr; };
  for (std::int64_t p = 0; p < elements<Pair>(count); ++p)
    interleave(number(2 * p), number(2 * p + 1), width, to + p * width);
  return {to, width};
}

// Pairs of keys [elements(keys)][row] as the left operand whose inner dimension are the keys. Tile registers
// want its rows unbroken: they are transposed into the room behind.
template <class E>
inline Left<E> along_packed_keys(E* packed, std::int64_t row, std::int64_t keys, int lanes) {
  const std::int64_t count = elements<E>(keys);
  if (!kFills<E>) return {packed, 1, row};
  E* to = packed + count * row;
  for (std::int64_t p = 0; p < count; p += kLanes) transpose_elements(packed + p * row, row, lanes, to + p, count);
  return {to, count, 1};
}

// A tile [keys][row] of floats as the left operand whose inner dimension are the keys.
inline Left<float> along_keys(const float* tile, std::int64_t row, std::int64_t, int, float*) {
  return {tile, 1, row};
}
inline Left<Pair> along_keys(const float* tile, std::int64_t row, std::int64_t keys, int lanes, Pair* to) {
  for (std::int64_t p = 0; p < elements<Pair>(keys); ++p)
    for (int v = 0; v < lanes; v += kLanes) {
      const auto key = [&](std::int64_t j) { return j < keys ? load(tile + j * row + v) : Vec{}; };
      store_words(to + p * row + v, pair_words(key(2 * p), key(2 * p + 1)));
    }
  return along_packed_keys(to, row, keys, lanes);
}

// The same tile as the left operand whose inner dimension are its columns, the queries.
inline Left<float> along_queries(const float* tile, std::int64_t row, std::int64_t, int, float*) {
  return {tile, row, 1};
}
inline Left<Pair> along_queries(const float* tile, std::int64_t row, std::int64_t keys, int lanes, Pair* to) {
  const std::int64_t words = elements<Pair>(row);
  for (std::int64_t j = 0; j < keys; ++j) {
    auto* numbers = reinterpret_cast<std::uint16_t*>(to + j * words);
    for (int v = 0; v < lanes; v += kLanes) store_bfloat(numbers + v, load(tile + j * row + v));
    for (std::int64_t v = lanes; v < 2 * elements<Pair>(lanes); v += kLanes) store_bfloat(numbers + v, Vec{});
  }
  return {to, words, 1};
}

// Whether none of the first n columns of `count` numbers is inf or NaN: exponent bits all ones.
inline bool all_finite(Right<float> b, std::int64_t count, std::int64_t n) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t broken = 0;
    for (std::int64_t d = 0; d < n; ++d) {
      std::int32_t word;
      std::memcpy(&word, b.data + i * b.row + d, sizeof word);
      broken |= (word & 0x7f800000) == 0x7f800000;
    }
    if (broken) return false;
  }
  return true;
}
inline bool all_finite(Right<Pair> b, std::int64_t count, std::int64_t n) {
  for (std::int64_t i = 0; i < elements<Pair>(count); ++i) {
    std::int32_t broken = 0;
    for (std::int64_t d = 0; d < n; ++d) {
      const std::uint32_t word = b.data[i * b.row + d].word;
      broken |= ((word & 0x7f800000u) == 0x7f800000u) | ((word & 0x7f80u) == 0x7f80u);
    }
    if (broken) return false;
  }
  return true;
}

}  // namespace
