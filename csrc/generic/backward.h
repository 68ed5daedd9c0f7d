// FlashAttention-2 backward (Dao, 2023, Algorithm 2) on strips, five tile products a tile:
//
//   S^T = K Q^T     P^T = exp(S^T - lse)     dV += P^T dO
//   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK += dS^T Q   dQ += dS K
//
// A task owns the keys of one chunk of one kv head, and every query that sees them: dK and dV are summed
// by it alone, and dQ too if there is one chunk. With more chunks each writes its own part of dQ, and the
// parts are added in order. The number of chunks depends on the problem alone, so the result does not
// depend on the threads.

namespace {

struct BackwardSpace {
  float *keys, *values, *row, *queries_t, *queries, *d_out_t, *d_out, *d_q, *weights, *capped, *dropped,
      *d_scores, *d_k, *d_v;
};

inline BackwardSpace backward_space(const tilewise_call& c, std::int64_t chunk) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), tile = kKeys * kRows;
  BackwardSpace w;
  float** const fields[] = {&w.keys,  &w.values, &w.row,     &w.queries_t, &w.queries,  &w.d_out_t, &w.d_out,
                            &w.d_q,   &w.weights, &w.capped, &w.dropped,   &w.d_scores, &w.d_k,     &w.d_v};
  const std::int64_t sizes[] = {kKeys * width,    kKeys * v_width,   width > v_width ? width : v_width,
                                width * kRows,    kRows * width,     v_width * kRows,
                                kRows * v_width,  kRows * width,     tile,
                                tile,             tile,              tile,
                                chunk * width,    chunk * v_width};
  std::size_t total = 0;
  for (std::int64_t size : sizes) total += Scratch::aligned(size);
  Scratch& memory = scratch();
  memory.reserve(total);
  for (int i = 0; i < 14; ++i) *fields[i] = memory.take(sizes[i]);
  return w;
}

// to[r][d] = from[d][r]: the queries as rows again, so that a strip is read from memory once.
inline void rows_of(const float* from, std::int64_t dim, std::int64_t width, float* to) {
  for (int r = 0; r < kRows; ++r) {
    for (std::int64_t d = 0; d < dim; ++d) to[r * width + d] = from[d * kRows + r];
    for (std::int64_t d = dim; d < width; ++d) to[r * width + d] = 0.0f;
  }
}

// C += A B over visible pairs only, where B holds an inf or NaN that some pair must not meet. With
// by_key, C has a row per key and B a row per query; else the reverse.
inline void careful_product(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                            const float* a, const float* b, std::int64_t b_row, float* to,
                            std::int64_t to_row, std::int64_t dim, bool by_key) {
  for (std::int64_t j = j0; j < j1; ++j)
    for (int r = 0; r < s.rows; ++r) {
      if (!visible(c, s, r, j)) continue;
      const float factor = a[(j - j0) * kRows + r];
      const float* from = b + (by_key ? r : j - j0) * b_row;
      float* target = to + (by_key ? j - j0 : r) * to_row;
      for (std::int64_t d = 0; d < dim; ++d) target[d] += factor * from[d];
    }
}

inline void recompute_weights(const Strip& s, std::int64_t keys, float* tile) {
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec lse = load(s.lse + v);
    for (std::int64_t j = 0; j < keys; ++j) {
      float* at = tile + j * kRows + v;
      store(at, exp2_vec((load(at) - lse) * kLog2E));
    }
  }
}

// dS = P (dP - delta), and 0 where P is exactly 0: dP may be inf or NaN for a hidden key.
inline void score_gradient(const Strip& s, std::int64_t keys, const float* weights, float* d_scores,
                           bool partial) {
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec delta = load(s.delta + v);
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t at = j * kRows + v;
      const Vec p = load(weights + at), d = p * (load(d_scores + at) - delta);
      store(d_scores + at, partial ? (p == 0.0f ? all(0.0f) : d) : d);
    }
  }
}

inline void bias_gradients(const tilewise_call& c, const Strip& s, std::int64_t chunk, std::int64_t j0,
                           std::int64_t j1, const float* d_scores) {
  for (int r = 0; r < s.rows; ++r) {
    const std::int64_t part = (s.batch * c.q_heads + s.head[r]) * c.chunks + chunk;
    if (c.d_alibi) {
      float sum = 0.0f;
      for (std::int64_t j = j0; j < j1; ++j) {
        const std::int64_t apart = s.position[r] - j;
        sum -= d_scores[(j - j0) * kRows + r] * static_cast<float>(apart < 0 ? -apart : apart);
      }
      c.d_alibi[part * c.q_len + s.query[r]] += sum;
    }
    if (c.d_bias) {
      const std::int64_t* stride = c.d_bias_stride;
      float* row = c.d_bias + s.batch * stride[0] + s.head[r] * stride[1] + s.query[r] * stride[2] +
                   chunk * stride[4];
      for (std::int64_t j = j0; j < j1; ++j) row[j * stride[3]] += d_scores[(j - j0) * kRows + r];
    }
    if (c.d_relative_bias) {
      float* table = c.d_relative_bias + part * c.relative_entries;
      for (std::int64_t j = j0; j < j1; ++j)
        table[relative_entry(c, s, r, j)] += d_scores[(j - j0) * kRows + r];
    }
  }
}

struct QueryState {
  bool queries_finite, d_out_finite;
};

inline QueryState load_queries(const tilewise_call& c, Strip& s, const BackwardSpace& w) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim);
  transpose_queries(c.q, s, c.head_dim, c.scale, w.row, w.queries_t);
  transpose_queries(c.d_out, s, c.v_dim, 1.0f, w.row, w.d_out_t);
  rows_of(w.queries_t, c.head_dim, width, w.queries);
  rows_of(w.d_out_t, c.v_dim, v_width, w.d_out);
  for (int r = 0; r < s.rows; ++r) {
    const std::int64_t at = (s.batch * c.q_heads + s.head[r]) * c.q_len + s.query[r];
    // A row without any weight has lse = -inf; +inf makes its recomputed weights 0.
    s.lse[r] = c.lse[at] == -kInfinity ? kInfinity : c.lse[at];
    s.delta[r] = c.delta[at];
  }
  std::memset(w.d_q, 0, static_cast<std::size_t>(kRows * width) * sizeof(float));
  return {all_finite(w.queries, width, s.rows, c.head_dim), all_finite(w.d_out, v_width, s.rows, c.v_dim)};
}

inline void backward_tile(const tilewise_call& c, const Strip& s, QueryState q, const BackwardSpace& w,
                          std::int64_t chunk, std::int64_t chunk_start, std::int64_t j0, std::int64_t j1,
                          bool partial) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), keys = j1 - j0;
  const std::int64_t b = s.batch, kv_head = s.head[0] / (c.q_heads / c.kv_heads);
  float *d_k = w.d_k + (j0 - chunk_start) * width, *d_v = w.d_v + (j0 - chunk_start) * v_width;
  const Rows k = key_rows(c, c.k, b, kv_head, j0, j1, c.head_dim, true, w.keys);
  const Rows v = key_rows(c, c.v, b, kv_head, j0, j1, c.v_dim, false, w.values);
  matmul(keys, s.vectors, c.head_dim, {k.data, k.stride, 1}, w.queries_t, kRows, w.weights, kRows, false);
  if (c.softcap != 0.0f) {
    soft_cap(w.weights, keys * kRows, c.softcap);
    std::memcpy(w.capped, w.weights, static_cast<std::size_t>(keys * kRows) * sizeof(float));
  }
  add_biases(c, s, j0, j1, w.weights);
  if (partial) mask_tile(c, s, j0, j1, w.weights);
  recompute_weights(s, keys, w.weights);
  const float* dropped = w.weights;
  if (c.keep_factor != 0.0f) {
    drop(c, s, j0, j1, w.weights, w.dropped);
    dropped = w.dropped;
  }
  if (partial && !q.d_out_finite) {
    careful_product(c, s, j0, j1, dropped, w.d_out, v_width, d_v, v_width, c.v_dim, true);
  } else {
    matmul(keys, v_width / kLanes, s.rows, {dropped, kRows, 1}, w.d_out, v_width, d_v, v_width, true);
  }
  matmul(keys, s.vectors, c.v_dim, {v.data, v.stride, 1}, w.d_out_t, kRows, w.d_scores, kRows, false);
  if (c.keep_factor != 0.0f) drop(c, s, j0, j1, w.d_scores, w.d_scores);
  score_gradient(s, keys, w.weights, w.d_scores, partial);
  if (c.d_alibi || c.d_bias || c.d_relative_bias) bias_gradients(c, s, chunk, j0, j1, w.d_scores);
  if (c.softcap != 0.0f) {
    const float inverse = 1.0f / c.softcap;
    for (std::int64_t i = 0; i < keys * kRows; i += kLanes) {
      const Vec ratio = load(w.capped + i) * inverse, d = load(w.d_scores + i);
      const Vec slope = d * (1.0f - ratio * ratio);
      store(w.d_scores + i, d == 0.0f ? all(0.0f) : slope);
    }
  }
  if (partial && !q.queries_finite) {
    careful_product(c, s, j0, j1, w.d_scores, w.queries, width, d_k, width, c.head_dim, true);
  } else {
    matmul(keys, width / kLanes, s.rows, {w.d_scores, kRows, 1}, w.queries, width, d_k, width, true);
  }
  if (partial && !all_finite(k.data, k.stride, keys, c.head_dim)) {
    careful_product(c, s, j0, j1, w.d_scores, k.data, k.stride, w.d_q, width, c.head_dim, false);
  } else {
    matmul(s.rows, width / kLanes, keys, {w.d_scores, 1, kRows}, k.data, k.stride, w.d_q, width, true);
  }
}

inline void store_d_q(const tilewise_call& c, const Strip& s, std::int64_t chunk, const float* d_q) {
  const std::int64_t width = padded(c.head_dim);
  const tilewise_tensor& t = c.d_q;
  for (int r = 0; r < s.rows; ++r) {
    float* row = const_cast<float*>(d_q) + r * width;
    for (std::int64_t d = 0; d < c.head_dim; ++d) row[d] *= c.scale;
    if (c.chunks == 1) {
      const std::int64_t at = s.batch * t.stride[0] + s.head[r] * t.stride[1] + s.query[r] * t.stride[2];
      write_row(t, at, t.stride[3], c.head_dim, row);
    } else {
      const std::int64_t at = ((chunk * c.batch + s.batch) * c.q_heads + s.head[r]) * c.q_len + s.query[r];
      std::memcpy(c.d_q_parts + at * c.head_dim, row, static_cast<std::size_t>(c.head_dim) * sizeof(float));
    }
  }
}

void backward_task(const tilewise_call& c, std::int64_t b, std::int64_t kv_head, std::int64_t chunk,
                   std::int64_t start, std::int64_t stop) {
  const BackwardSpace w = backward_space(c, stop - start);
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), length = stop - start;
  const std::int64_t rows = c.q_heads / c.kv_heads * c.q_len;
  std::memset(w.d_k, 0, static_cast<std::size_t>(length * width) * sizeof(float));
  std::memset(w.d_v, 0, static_cast<std::size_t>(length * v_width) * sizeof(float));
  Strip s;
  for (std::int64_t first = 0; first < rows; first += kRows) {
    set_strip(c, s, b, kv_head, first, rows - first < kRows ? rows - first : kRows);
    const std::int64_t low = s.first_key > start ? s.first_key : start;
    const std::int64_t high = s.last_key < stop ? s.last_key : stop;
    if (low >= high && c.chunks > 1) {
      std::memset(w.d_q, 0, static_cast<std::size_t>(kRows * width) * sizeof(float));
      store_d_q(c, s, chunk, w.d_q);
      continue;
    }
    const QueryState q = load_queries(c, s, w);
    for (std::int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
      const Span span = trimmed(s, j0, j0 + kKeys < stop ? j0 + kKeys : stop);
      const State state = classify(c, s, span.start, span.stop);
      if (state != kSkip) backward_tile(c, s, q, w, chunk, start, span.start, span.stop, state == kPartial);
    }
    store_d_q(c, s, chunk, w.d_q);
  }
  for (std::int64_t j = start; j < stop; ++j) {  // the queries carried the scale into dK
    const std::int64_t i = j - start;
    write_row(c.d_k, b * c.d_k.stride[0] + kv_head * c.d_k.stride[1] + j * c.d_k.stride[2], c.d_k.stride[3],
              c.head_dim, w.d_k + i * width);
    write_row(c.d_v, b * c.d_v.stride[0] + kv_head * c.d_v.stride[1] + j * c.d_v.stride[2], c.d_v.stride[3],
              c.v_dim, w.d_v + i * v_width);
  }
}

// dQ = the sum of its parts, always in the same order.
void add_parts(const tilewise_call& c, std::int64_t row) {
  const std::int64_t rows = c.batch * c.q_heads * c.q_len, n = c.head_dim;
  float* sum = c.d_q_parts + row * n;
  for (std::int64_t part = 1; part < c.chunks; ++part)
    for (std::int64_t d = 0; d < n; ++d) sum[d] += c.d_q_parts[(part * rows + row) * n + d];
  const std::int64_t i = row % c.q_len, h = row / c.q_len % c.q_heads, b = row / c.q_len / c.q_heads;
  const tilewise_tensor& t = c.d_q;
  write_row(t, b * t.stride[0] + h * t.stride[1] + i * t.stride[2], t.stride[3], n, sum);
}

bool run_backward(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const std::int64_t heads = c.batch * c.kv_heads;
  const std::int64_t tiles = (c.kv_len + kKeys - 1) / kKeys;
  const std::int64_t size = (tiles + c.chunks - 1) / c.chunks * kKeys;
  const auto run_part = [&](std::int64_t head, std::int64_t chunk) {
    const std::int64_t start = chunk * size < c.kv_len ? chunk * size : c.kv_len;
    const std::int64_t stop = start + size < c.kv_len ? start + size : c.kv_len;
    backward_task(c, head / c.kv_heads, head % c.kv_heads, chunk, start, stop);
  };
  // First chunks first: under a causal mask the most queries see them. A bias shared between heads is
  // summed by one task per chunk, head after head: no atomic adds, no copy of the bias per head.
  const bool done =
      c.d_bias_shared
          ? run_tasks(c.chunks, c.threads, parallel_for,
                      [&](std::int64_t chunk) {
                        for (std::int64_t head = 0; head < heads; ++head) run_part(head, chunk);
                      })
          : run_tasks(heads * c.chunks, c.threads, parallel_for,
                      [&](std::int64_t task) { run_part(task % heads, task / heads); });
  if (!done || c.chunks == 1) return done;
  const std::int64_t rows = c.batch * c.q_heads * c.q_len, block = 64;
  return run_tasks((rows + block - 1) / block, c.threads, parallel_for, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (std::int64_t row = task * block; row < stop; ++row) add_parts(c, row);
  });
}

}  // namespace
