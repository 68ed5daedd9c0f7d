// A strip: the queries that share one vector-wide tile product. Lanes are queries, so the running
// maximum and sum are vertical operations, with nothing to add up across a vector.
//
// The query heads that share a kv head are laid end to end ("virtual rows" h * q_len + i), so that a
// strip of a grouped or single-query problem is still full.

namespace {

constexpr int kRows = kStripVectors * kLanes;
constexpr std::int64_t kKeys = 128;  // keys of a tile

enum State { kSkip = 0, kPartial = 1, kFull = 2 };

struct alignas(64) Strip {
  std::int32_t start[2][kRows], stop[2][kRows];  // visible runs of keys; empty for unused lanes
  std::int32_t position[kRows];                  // where the query stands in the key index
  float slope[kRows];                            // ALiBi
  float maximum[kRows], total[kRows];            // forward: m and l
  float total_rest[kRows];                       // what total lost to rounding
  float lse[kRows], lse_rest[kRows];             // backward: their sum is lse in units of log 2
  float delta[kRows];
  std::int64_t head[kRows], query[kRows];
  std::int64_t batch, rows;
  int vectors, lanes;  // that hold its rows: one query over a long cache does not pay for a full strip
  std::int64_t first_key, last_key;  // the keys that any of its queries may see
};

inline std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct Span {
  std::int64_t start, stop;
};

// The keys of [j0, j1) between the first and the last that the strip may see: at a causal diagonal this
// saves half a tile a strip, 15 % at 1024 keys. j0 is a multiple of the step: pairs are not torn apart, and
// tile registers stay full.
template <class E>
inline Span trimmed(const Strip& s, std::int64_t j0, std::int64_t j1) {
  constexpr std::int64_t step = kFills<E> ? 2 * kLanes : kWidth<E>;
  const std::int64_t start = s.first_key > j0 ? s.first_key / step * step : j0;
  const std::int64_t last = (s.last_key + step - 1) / step * step, stop = last < j1 ? last : j1;
  return {start, stop < start ? start : stop};
}

inline void set_runs(const tilewise_call& c, Strip& s, int r) {
  const std::int64_t i = s.query[r];
  for (int k = 0; k < 2; ++k) s.start[k][r] = s.stop[k][r] = 0;
  if (c.mask_kind == TILEWISE_BAND) {
    s.start[0][r] = static_cast<std::int32_t>(clamp(i + c.mask_low, 0, c.kv_len));
    s.stop[0][r] = static_cast<std::int32_t>(clamp(i + c.mask_high + 1, 0, c.kv_len));
  } else if (c.mask_kind == TILEWISE_RANGES) {
    const std::int64_t at = s.batch * c.mask_stride[0] + s.head[r] * c.mask_stride[1] + i * c.mask_runs;
    for (int k = 0; k < c.mask_runs; ++k) {
      s.start[k][r] = static_cast<std::int32_t>(clamp(c.mask_first[at + k], 0, c.kv_len));
      s.stop[k][r] = static_cast<std::int32_t>(clamp(c.mask_second[at + k], 0, c.kv_len));
    }
  } else {
    s.stop[0][r] = static_cast<std::int32_t>(c.kv_len);
  }
}

// Queries [first, first + rows) of the virtual rows of one kv head.
inline void set_strip(const tilewise_call& c, Strip& s, std::int64_t b, std::int64_t kv_head,
                      std::int64_t first, std::int64_t rows) {
  s.batch = b;
  s.rows = rows;
  s.vectors = static_cast<int>((rows + kLanes - 1) / kLanes);
  s.lanes = s.vectors * kLanes;
  s.first_key = c.kv_len;
  s.last_key = 0;
  std::int64_t i = first % c.q_len, h = kv_head * (c.q_heads / c.kv_heads) + first / c.q_len;
  for (int r = 0; r < s.lanes; ++r) {
    s.maximum[r] = -kInfinity;
    s.total[r] = s.total_rest[r] = s.slope[r] = s.delta[r] = s.lse_rest[r] = 0.0f;
    s.lse[r] = kInfinity;  // recomputed weights of an unused lane: exp(-inf) = 0
    s.position[r] = 0;
    s.head[r] = s.query[r] = 0;
    for (int k = 0; k < 2; ++k) s.start[k][r] = s.stop[k][r] = 0;
    if (r >= rows) continue;
    s.head[r] = h;
    s.query[r] = i;
    s.position[r] = static_cast<std::int32_t>(
        c.position ? c.position[b * c.position_stride + i] : i + c.kv_len - c.q_len);
    if (c.alibi.data)
      s.slope[r] = element(c.alibi, b * c.alibi.stride[0] + h * c.alibi.stride[1] + i * c.alibi.stride[2]);
    set_runs(c, s, r);
    for (int k = 0; k < 2; ++k) {
      if (s.start[k][r] >= s.stop[k][r]) continue;
      if (s.start[k][r] < s.first_key) s.first_key = s.start[k][r];
      if (s.stop[k][r] > s.last_key) s.last_key = s.stop[k][r];
    }
    if (++i == c.q_len) {
      i = 0;
      ++h;
    }
  }
}

inline std::int32_t tile_code(const tilewise_call& c, const Strip& s, int r, std::int64_t j) {
  const std::int64_t tiles = (c.kv_len + 63) / 64;
  return c.mask_first[s.batch * c.mask_stride[0] + s.head[r] * c.mask_stride[1] +
                      s.query[r] / 64 * tiles + j / 64];
}

inline bool visible(const tilewise_call& c, const Strip& s, int r, std::int64_t j) {
  if (c.mask_kind == TILEWISE_BITMAP) {
    const std::int64_t word = c.mask_words[std::int64_t{tile_code(c, s, r, j)} * 64 + s.query[r] % 64];
    return (word >> (j % 64)) & 1;
  }
  return (j >= s.start[0][r] && j < s.stop[0][r]) || (j >= s.start[1][r] && j < s.stop[1][r]);
}

inline State classify_bitmap(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1) {
  bool any = false, every = true;
  for (int r = 0; r < s.rows; ++r)
    for (std::int64_t j = j0; j < j1; j = j / 64 * 64 + 64) {
      const std::int32_t code = tile_code(c, s, r, j);
      any |= code != 0;
      every &= code == 1;
    }
  return !any ? kSkip : every ? kFull : kPartial;
}

inline IntVec overlap(const std::int32_t* start, const std::int32_t* stop, std::int32_t j0, std::int32_t j1) {
  const IntVec first = load_int(start), last = load_int(stop);
  const IntVec length = (last < j1 ? last : all_int(j1)) - (first > j0 ? first : all_int(j0));
  return length > 0 ? length : IntVec{};
}

// Whether the tile [j0, j1) of the strip is skipped, partial or full.
inline State classify(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1) {
  if (j0 >= j1) return kSkip;
  if (c.mask_kind == TILEWISE_BITMAP) return classify_bitmap(c, s, j0, j1);
  const auto first = static_cast<std::int32_t>(j0), last = static_cast<std::int32_t>(j1);
  const IntVec lane = lane_index();
  IntVec any{}, missing{};
  for (int v = 0; v < s.lanes; v += kLanes) {
    const IntVec seen = overlap(s.start[0] + v, s.stop[0] + v, first, last) +
                        overlap(s.start[1] + v, s.stop[1] + v, first, last);
    any |= seen;
    missing |= (lane + v < static_cast<std::int32_t>(s.rows)) & (seen != last - first);
  }
  return !is_any(any) ? kSkip : is_any(missing) ? kPartial : kFull;
}

// Step mask_tile: -inf where a key is hidden. tile is [j1 - j0][kRows].
inline void mask_tile(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1, float* tile) {
  if (c.mask_kind == TILEWISE_BITMAP) {
    for (std::int64_t j = j0; j < j1; ++j)
      for (int r = 0; r < s.rows; ++r)
        if (!visible(c, s, r, j)) tile[(j - j0) * kRows + r] = -kInfinity;
    return;
  }
  for (std::int64_t j = j0; j < j1; ++j) {
    const std::int32_t key = static_cast<std::int32_t>(j);
    for (int v = 0; v < s.lanes; v += kLanes) {
      const IntVec seen = ((load_int(s.start[0] + v) <= key) & (load_int(s.stop[0] + v) > key)) |
                          ((load_int(s.start[1] + v) <= key) & (load_int(s.stop[1] + v) > key));
      float* at = tile + (j - j0) * kRows + v;
      store(at, seen != 0 ? load(at) : all(-kInfinity));
    }
  }
}

inline std::int64_t query_offset(const tilewise_tensor& t, const Strip& s, int r) {
  return s.batch * t.stride[0] + s.head[r] * t.stride[1] + s.query[r] * t.stride[2];
}

// Step load_tile: the strip's queries (or output gradients) as rows of row_words(dim) words, zero in
// unused lanes.
template <class E>
inline void query_rows(const tilewise_tensor& t, const Strip& s, std::int64_t dim, E* to) {
  const std::int64_t words = row_words<E>(dim), used = s.rows < s.lanes ? s.rows : s.lanes;
  for (int r = 0; r < used; ++r)
    read_elements(t, query_offset(t, s, r), t.stride[3], dim, to + r * words, words);
  std::memset(to + used * words, 0, static_cast<std::size_t>((s.lanes - used) * words) * sizeof(E));
}

// Those rows as columns, to[elements(dim)][kRows]: a right operand whose inner dimension is dim.
template <class E>
inline void query_columns(const E* rows, const Strip& s, std::int64_t dim, E* to) {
  const std::int64_t words = row_words<E>(dim);
  for (int v = 0; v < s.lanes; v += kLanes)
    transpose_elements(rows + v * words, words, elements<E>(dim), to + v, kRows);
}

}  // namespace
