// Vectors of floats of kBytes bytes, as GCC and Clang spell them: arithmetic is written with operators
// and compiled for whatever instruction set this translation unit is built for.
#include <cmath>
#include <limits>

namespace {

constexpr int kLanes = kBytes / 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

typedef float Vec __attribute__((vector_size(kBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kBytes)));
typedef std::uint16_t HalfWords __attribute__((vector_size(kBytes / 2)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline IntVec load_int(const std::int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec all(float x) { return Vec{} + x; }
inline IntVec all_int(std::int32_t x) { return IntVec{} + x; }
inline IntVec lane_index() {
  IntVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
inline bool is_any(IntVec v) {
  std::int32_t word = 0;
  for (int i = 0; i < kLanes; ++i) word |= v[i];
  return word != 0;
}
// Both halves of the 64-bit product of unsigned lanes.
struct Wide {
  IntVec low, high;
};
inline Wide multiply_wide_portable(IntVec a, std::uint32_t b) {
  Wide w;
  for (int i = 0; i < kLanes; ++i) {
    const std::uint64_t product = std::uint64_t{static_cast<std::uint32_t>(a[i])} * b;
    w.low[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(product));
    w.high[i] = static_cast<std::int32_t>(product >> 32);
  }
  return w;
}
inline IntVec bits(Vec v) { return (IntVec)v; }
inline Vec from_bits(IntVec v) { return (Vec)v; }

inline Vec magnitude(Vec v) { return from_bits(bits(v) & 0x7fffffff); }
inline Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }

// Lanes of a and b in turn: the first half of each, the second half of each.
#if defined(__clang__)
inline IntVec zip(IntVec a, IntVec b, int first) {
  IntVec v;
  for (int i = 0; i < kLanes / 2; ++i) {
    v[2 * i] = a[first + i];
    v[2 * i + 1] = b[first + i];
  }
  return v;
}
#else
inline IntVec zip(IntVec a, IntVec b, int first) {
  IntVec from;
  for (int i = 0; i < kLanes / 2; ++i) {
    from[2 * i] = first + i;
    from[2 * i + 1] = kLanes + first + i;
  }
  return __builtin_shuffle(a, b, from);
}
#endif
inline IntVec zip_low(IntVec a, IntVec b) { return zip(a, b, 0); }
inline IntVec zip_high(IntVec a, IntVec b) { return zip(a, b, kLanes / 2); }

inline Vec load_bfloat(const std::uint16_t* p) {
  HalfWords w;
  std::memcpy(&w, p, sizeof w);
  return from_bits(__builtin_convertvector(w, IntVec) << 16);
}

inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  std::uint32_t word = 0;
  if (rest >= 0x7c00u) {
    word = 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    word = (rest << 13) + (112u << 23);
  } else {  // subnormal: rest * 2^-24
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&word, &value, sizeof word);
  }
  word |= sign;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline float bfloat_to_float(std::uint16_t h) {
  const std::uint32_t word = static_cast<std::uint32_t>(h) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// Round to nearest, ties to even; NaN stays NaN.
inline std::uint16_t float_to_bfloat(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline std::uint16_t float_to_half(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const std::uint16_t sign = static_cast<std::uint16_t>((word >> 16) & 0x8000u);
  word &= 0x7fffffffu;
  std::uint32_t result;
  if (word > 0x7f800000u) {
    result = 0x7e00u;
  } else if (word >= 0x477ff000u) {  // rounds to 65520 or more
    result = 0x7c00u;
  } else if (word < 0x38800000u) {  // subnormal half: let the float adder round at 2^-24
    float value;
    std::memcpy(&value, &word, sizeof value);
    value += 0.5f;
    std::memcpy(&word, &value, sizeof word);
    result = word - 0x3f000000u;
  } else {
    result = (word - (112u << 23) + 0xfffu + ((word >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | result);
}

// Bit 16 up: the bfloat16 nearest to each lane, ties to even; NaN stays NaN.
inline IntVec bfloat_bits(Vec v) {
  const IntVec word = bits(v), rounded = word + 0x7fff + ((word >> 16) & 1);
  return (word & 0x7fffffff) > 0x7f800000 ? word | 0x400000 : rounded;
}
inline void store_bfloat_portable(std::uint16_t* p, Vec v) {
  typedef std::uint32_t Unsigned __attribute__((vector_size(kBytes)));
  const HalfWords words = __builtin_convertvector((Unsigned)bfloat_bits(v) >> 16, HalfWords);
  std::memcpy(p, &words, sizeof words);
}
// Lane by lane a pair of bfloat16 numbers, `even` in the low half.
inline IntVec pair_words_portable(Vec even, Vec odd) {
  return ((bfloat_bits(even) >> 16) & 0xffff) | (bfloat_bits(odd) & (std::int32_t)0xffff0000);
}

inline Vec load_half_portable(const std::uint16_t* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
}

// 2^t for t <= 127 to 1 ulp: t = n + f, |f| <= 1/2, degree-6 minimax polynomial (relative error 1.9e-9).
// Below 2^-126 the result is 0, so that no denormal slows what follows; NaN stays NaN.
inline Vec exp2_portable(Vec t) {
  t = t < -127.0f ? all(-127.0f) : t;
  const Vec shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const Vec f = t - (shifted - 12582912.0f);
  Vec p = all(1.534581242594868e-4f);
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return p * from_bits((bits(shifted) << 23) + 0x3f800000);
}

constexpr double kExactLog2E = 1.4426950408889634;
constexpr float kLog2E = static_cast<float>(kExactLog2E);

}  // namespace
