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
  float lse[kRows], delta[kRows];                // backward
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
// saves half a tile a strip, 15 % at 1024 keys.
inline Span trimmed(const Strip& s, std::int64_t j0, std::int64_t j1) {
  const std::int64_t start = s.first_key > j0 ? s.first_key : j0, stop = s.last_key < j1 ? s.last_key : j1;
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
  const std::int64_t group = c.q_heads / c.kv_heads;
  s.batch = b;
  s.rows = rows;
  s.vectors = static_cast<int>((rows + kLanes - 1) / kLanes);
  s.lanes = s.vectors * kLanes;
  s.first_key = c.kv_len;
  s.last_key = 0;
  for (int r = 0; r < kRows; ++r) {
    s.maximum[r] = -kInfinity;
    s.total[r] = s.slope[r] = s.delta[r] = 0.0f;
    s.lse[r] = kInfinity;  // recomputed weights of an unused lane: exp(-inf) = 0
    s.position[r] = 0;
    if (r >= rows) {
      s.head[r] = s.query[r] = 0;
      for (int k = 0; k < 2; ++k) s.start[k][r] = s.stop[k][r] = 0;
      continue;
    }
    const std::int64_t i = (first + r) % c.q_len, h = kv_head * group + (first + r) / c.q_len;
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

// Whether the tile [j0, j1) of the strip is skipped, partial or full.
inline State classify(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1) {
  bool any = false, every = true;
  if (j0 >= j1) return kSkip;
  for (int r = 0; r < s.rows; ++r) {
    if (c.mask_kind == TILEWISE_BITMAP) {
      for (std::int64_t j = j0; j < j1; j = j / 64 * 64 + 64) {
        const std::int32_t code = tile_code(c, s, r, j);
        any |= code != 0;
        every &= code == 1;
      }
      continue;
    }
    std::int64_t seen = 0;
    for (int k = 0; k < 2; ++k) {
      const std::int64_t low = s.start[k][r] > j0 ? s.start[k][r] : j0;
      const std::int64_t high = s.stop[k][r] < j1 ? s.stop[k][r] : j1;
      if (high > low) seen += high - low;
    }
    any |= seen > 0;
    every &= seen == j1 - j0;
  }
  return !any ? kSkip : every ? kFull : kPartial;
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

// Queries as columns: to[d][r] = factor * row r; zero in unused lanes.
inline void transpose_queries(const tilewise_tensor& t, const Strip& s, std::int64_t dim, float factor,
                              float* row, float* to) {
  for (int r = 0; r < kRows; ++r) {
    if (r >= s.rows) {
      for (std::int64_t d = 0; d < dim; ++d) to[d * kRows + r] = 0.0f;
      continue;
    }
    read_row(t, s.batch * t.stride[0] + s.head[r] * t.stride[1] + s.query[r] * t.stride[2], t.stride[3],
             dim, row);
    for (std::int64_t d = 0; d < dim; ++d) to[d * kRows + r] = factor * row[d];
  }
}

}  // namespace
