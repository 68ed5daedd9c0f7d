// Step scores: what is added to scale * q.k, on one tile [keys][kRows]; and dropout.

namespace {

inline void soft_cap(float* tile, std::int64_t count, float softcap) {
  for (std::int64_t i = 0; i < count; i += kLanes)
    store(tile + i, tanh_vec(load(tile + i) / softcap) * softcap);
}

inline std::int64_t relative_entry(const tilewise_call& c, const Strip& s, int r, std::int64_t j) {
  // Only masked entries lie outside the table.
  return clamp(j - s.position[r] + c.relative_zero, 0, c.relative_entries - 1);
}

inline void add_biases(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                       float* tile) {
  if (c.bias.data) {
    const tilewise_tensor& t = c.bias;
    for (int r = 0; r < s.rows; ++r) {
      const std::int64_t at = s.batch * t.stride[0] + s.head[r] * t.stride[1] + s.query[r] * t.stride[2];
      for (std::int64_t j = j0; j < j1; ++j)
        tile[(j - j0) * kRows + r] += element(t, at + j * t.stride[3]);
    }
  }
  if (c.alibi.data) {
    for (std::int64_t j = j0; j < j1; ++j)
      for (int v = 0; v < s.lanes; v += kLanes) {
        const IntVec apart = load_int(s.position + v) - static_cast<std::int32_t>(j);
        float* at = tile + (j - j0) * kRows + v;
        store(at, load(at) - load(s.slope + v) * magnitude(to_float(apart)));
      }
  }
  if (c.relative_bias) {
    for (int r = 0; r < s.rows; ++r) {
      const float* table = c.relative_bias + s.head[r] * c.relative_entries;
      for (std::int64_t j = j0; j < j1; ++j)
        tile[(j - j0) * kRows + r] += table[relative_entry(c, s, r, j)];
    }
  }
}

// Philox 4x32-10 for four keys of every query of the strip; the lanes make it vector code.
inline void philox(const tilewise_call& c, const Strip& s, std::uint32_t quad, std::uint32_t words[4][kRows]) {
  std::uint32_t c0[kRows], c1[kRows], c2[kRows], c3[kRows];
  for (int r = 0; r < kRows; ++r) {
    c0[r] = quad;
    c1[r] = static_cast<std::uint32_t>(s.query[r]);
    c2[r] = static_cast<std::uint32_t>(s.head[r]);
    c3[r] = static_cast<std::uint32_t>(s.batch);
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(c.seed), k1 = static_cast<std::uint32_t>(c.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int r = 0; r < kRows; ++r) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[r], p1 = std::uint64_t{0xCD9E8D57u} * c2[r];
      c0[r] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[r] ^ k0;
      c1[r] = static_cast<std::uint32_t>(p1);
      c2[r] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[r] ^ k1;
      c3[r] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int r = 0; r < kRows; ++r) {
    words[0][r] = c0[r];
    words[1][r] = c1[r];
    words[2][r] = c2[r];
    words[3][r] = c3[r];
  }
}

// Multiply from by keep_factor where an entry is kept and by 0 where it is dropped, into to.
inline void drop(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1, const float* from,
                 float* to) {
  std::uint32_t words[4][kRows];
  for (std::int64_t j = j0; j < j1; ++j) {
    if (j == j0 || j % 4 == 0) philox(c, s, static_cast<std::uint32_t>(j / 4), words);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t at = (j - j0) * kRows + r;
      to[at] = from[at] * (words[j % 4][r] >= c.keep_threshold ? c.keep_factor : 0.0f);
    }
  }
}

}  // namespace
