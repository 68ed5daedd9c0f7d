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

template <class E>
struct BackwardSpace {
  E *keys, *tile_keys, *values, *key_columns;
  E *query_rows, *d_out_rows, *queries_t, *queries, *d_out_t, *d_out, *operand;
  float *row, *d_q, *weights, *capped, *dropped, *d_scores, *d_k, *d_v;
  float *d_q_sum, *d_k_sum, *d_v_sum;  // of runs
};

template <class E>
inline BackwardSpace<E> backward_space(const tilewise_call& c, std::int64_t chunk) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), tile = kKeys * kRows;
  const std::int64_t words = row_words<E>(c.head_dim), v_words = row_words<E>(c.v_dim);
  const bool copies_keys = !is_in_place<E>(c, c.k, c.head_dim), copies_values = !is_in_place<E>(c, c.v, c.v_dim);
  BackwardSpace<E> w;
  scratch().lay_out([&](auto& memory) {
    memory.take(w.keys, copies_keys ? chunk * words : 0);
    memory.take(w.tile_keys, copies_keys ? kKeys * words : 0);
    memory.take(w.values, copies_values ? chunk * v_words : 0);
    memory.take(w.key_columns, elements<E>(chunk) * width);
    memory.take(w.query_rows, kRows * words);
    memory.take(w.d_out_rows, kRows * v_words);
    memory.take(w.queries_t, elements<E>(c.head_dim) * kRows);
    memory.take(w.queries, elements<E>(kRows) * width);
    memory.take(w.d_out_t, elements<E>(c.v_dim) * kRows);
    memory.take(w.d_out, elements<E>(kRows) * v_width);
    memory.take(w.operand, tile);
    for (float** array : {&w.weights, &w.capped, &w.dropped, &w.d_scores}) memory.take(*array, tile);
    memory.take(w.row, width > v_width ? width : v_width);
    memory.take(w.d_q, kRows * width);
    memory.take(w.d_k, chunk * width);
    memory.take(w.d_v, chunk * v_width);
    memory.take(w.d_q_sum, kRows * width);
    memory.take(w.d_k_sum, chunk * width);
    memory.take(w.d_v_sum, chunk * v_width);
  });
  return w;
}

inline void clear(float* array, std::int64_t count) {
  std::memset(array, 0, static_cast<std::size_t>(count) * sizeof(float));
}

// The keys and values of a chunk, loaded once for all the queries that see them.
template <class E>
struct Chunk {
  std::int64_t index, start, kv_head;
  Left<E> k, v;      // [key][dim]
  Right<E> k_right;  // inner dimension: the keys
};

// A strip of queries, as the four operands that the products need.
template <class E>
struct Queries {
  Right<E> q_t, d_out_t;  // inner dimension: head_dim, v_dim
  Right<E> q, d_out;      // inner dimension: the queries
  bool q_finite, d_out_finite;
};

// C += A B over visible pairs only, where B holds an inf or NaN that some pair must not meet. With
// by_key, C has a row per key and B a row per query; else the reverse.
inline void careful_product(const tilewise_call& c, const Strip& s, Span span, const float* a,
                            const tilewise_tensor& b, std::int64_t kv_head, float* to, std::int64_t to_row,
                            std::int64_t dim, bool by_key) {
  for (std::int64_t j = span.start; j < span.stop; ++j)
    for (int r = 0; r < s.rows; ++r) {
      if (!visible(c, s, r, j)) continue;
      const float factor = a[(j - span.start) * kRows + r];
      const std::int64_t from = by_key ? query_offset(b, s, r) : key_offset(c, b, s.batch, kv_head, j);
      float* target = to + (by_key ? j - span.start : r) * to_row;
      for (std::int64_t d = 0; d < dim; ++d) target[d] += factor * element(b, from + d * b.stride[3]);
    }
}

// P = 2^(S unit - lse). Lanes without a query get 0: their scores are 0, or NaN beside an infinite key.
inline void recompute_weights(const Strip& s, std::int64_t keys, float unit_of_call, float* tile) {
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec lse = load(s.lse + v), rest = load(s.lse_rest + v);
    const Vec unit = scale_large(tile + v, keys, all(unit_of_call), lse == kInfinity ? all(0.0f) : lse);
    const bool whole = v + kLanes <= s.rows;
    const IntVec used = lane_index() + v < static_cast<std::int32_t>(s.rows);
    for (std::int64_t j = 0; j < keys; ++j) {
      float* at = tile + j * kRows + v;
      const Vec p = exp2_vec(load(at) * unit - lse - rest);
      store(at, whole ? p : used ? p : all(0.0f));
    }
  }
}

// What drop() did to P, done to dP: an entry was dropped if nothing is left of its weight. So it seems, too, where
// P is 0, and then dS = P (dP - delta) is 0 either way.
inline void drop_alike(const Strip& s, std::int64_t keys, float keep_factor, const float* dropped, float* d_weights) {
  for (int v = 0; v < s.lanes; v += kLanes)
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t at = j * kRows + v;
      store(d_weights + at, load(d_weights + at) * (load(dropped + at) == 0.0f ? all(0.0f) : all(keep_factor)));
    }
}

// dS = P (dP - delta), and 0 where P is exactly 0: dP may be inf or NaN for a hidden key.
inline void score_gradient(const Strip& s, std::int64_t keys, const float* weights, float* d_scores,
                           bool partial) {
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec delta = load(s.delta + v);
    const bool guarded = partial || v + kLanes > s.rows;
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t at = j * kRows + v;
      const Vec p = load(weights + at), d = p * (load(d_scores + at) - delta);
      store(d_scores + at, guarded ? (p == 0.0f ? all(0.0f) : d) : d);
    }
  }
}

// d tanh: dS before the cap, from the capped score.
inline void cap_gradient(const tilewise_call& c, std::int64_t count, const float* capped, float* d_scores) {
  const float inverse = 1.0f / (c.softcap * kLog2E);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec ratio = load(capped + i) * inverse, d = load(d_scores + i);
    const Vec slope = d * (1.0f - ratio * ratio);
    store(d_scores + i, d == 0.0f ? all(0.0f) : slope);
  }
}

// Sums of one query's dS over the keys [j0, j1), for each bias that has a gradient.
inline void add_bias_gradients(const tilewise_call& c, const Strip& s, int r, std::int64_t chunk,
                               std::int64_t j0, std::int64_t j1, const float* row) {
  const std::int64_t part = (s.batch * c.q_heads + s.head[r]) * c.chunks + chunk;
  if (c.d_alibi) {
    float sum = 0.0f;
    for (std::int64_t j = j0; j < j1; ++j) {
      const std::int64_t apart = s.position[r] - j;
      sum -= row[j - j0] * static_cast<float>(apart < 0 ? -apart : apart);
    }
    c.d_alibi[part * c.q_len + s.query[r]] += sum;
  }
  if (c.d_bias) {
    const std::int64_t* stride = c.d_bias_stride;
    float* to = c.d_bias + s.batch * stride[0] + s.head[r] * stride[1] + s.query[r] * stride[2] +
                j0 * stride[3] + chunk * stride[4];
    if (stride[3] == 1) {
      for (std::int64_t j = 0; j < j1 - j0; ++j) to[j] += row[j];
    } else {
      for (std::int64_t j = 0; j < j1 - j0; ++j) to[j * stride[3]] += row[j];
    }
  }
  if (c.d_relative_bias) {
    const std::int64_t shift = relative_shift(c, s, r);
    const Span span = relative_span(c, shift, j0, j1);
    float* table = c.d_relative_bias + part * c.relative_entries;
    for (std::int64_t j = span.start; j < span.stop; ++j) table[j + shift] += row[j - j0];
  }
}

inline void bias_gradients(const tilewise_call& c, const Strip& s, std::int64_t chunk, Span span,
                           const float* d_scores) {
  alignas(64) float by_query[kLanes * kKeys];
  const std::int64_t keys = span.stop - span.start;
  for (int v = 0; v < s.lanes; v += kLanes) {
    for (std::int64_t j = 0; j < keys; j += kLanes)  // rows beyond the last key are room in the tile
      transpose_words(d_scores + j * kRows + v, kRows, kLanes, by_query + j, kKeys);
    for (int r = v; r < v + kLanes && r < s.rows; ++r)
      add_bias_gradients(c, s, r, chunk, span.start, span.stop, by_query + (r - v) * kKeys);
  }
}

template <class E>
inline Queries<E> load_queries(const tilewise_call& c, Strip& s, const BackwardSpace<E>& w) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim);
  query_rows(c.q, s, c.head_dim, w.query_rows);
  query_rows(c.d_out, s, c.v_dim, w.d_out_rows);
  query_columns(w.query_rows, s, c.head_dim, w.queries_t);
  query_columns(w.d_out_rows, s, c.v_dim, w.d_out_t);
  for (int r = 0; r < s.rows; ++r) {
    const std::int64_t at = (s.batch * c.q_heads + s.head[r]) * c.q_len + s.query[r];
    // A row without any weight has lse = -inf; +inf makes its recomputed weights 0.
    const double lse = c.lse[at] == -kInfinity ? kInfinity : c.lse[at] * kExactLog2E;
    s.lse[r] = static_cast<float>(lse);
    s.lse_rest[r] = std::isfinite(s.lse[r]) ? static_cast<float>(lse - s.lse[r]) : 0.0f;
    s.delta[r] = c.delta[at];
  }
  clear(w.d_q, kRows * width);
  Queries<E> q{{w.queries_t, kRows}, {w.d_out_t, kRows}, {}, {}, false, false};
  q.q = interleaved(reinterpret_cast<const Number<E>*>(w.query_rows), row_words<E>(c.head_dim) * kWidth<E>,
                    s.rows, width, w.queries);
  q.d_out = interleaved(reinterpret_cast<const Number<E>*>(w.d_out_rows), row_words<E>(c.v_dim) * kWidth<E>,
                        s.rows, v_width, w.d_out);
  q.q_finite = all_finite(q.q, s.rows, c.head_dim);
  q.d_out_finite = all_finite(q.d_out, s.rows, c.v_dim);
  return q;
}

// Beyond this the rounding of lse to a float, which P = e^(S - lse) turns into a factor, is more than 2^-8.
constexpr float kLargestLse = 65536.0f;

// For a strip with such rows m and l are found again, as the forward finds them: lse = m + log2(l), of which
// lse_rest keeps the second term. One more product, over all the keys that the strip sees.
template <class E>
inline void settle_large_rows(const tilewise_call& c, Strip& s, const Queries<E>& q, std::int64_t kv_head,
                              const BackwardSpace<E>& w) {
  const auto is_large = [&](int r) { return std::isfinite(s.lse[r]) && std::fabs(s.lse[r]) > kLargestLse; };
  bool any = false;
  for (int r = 0; r < s.rows; ++r) any |= is_large(r);
  if (!any) return;
  initial_state(c, s, w.d_q, padded(c.head_dim), true);
  for (std::int64_t j0 = s.first_key / kKeys * kKeys; j0 < s.last_key; j0 += kKeys) {
    const std::int64_t j1 = j0 + kKeys < c.kv_len ? j0 + kKeys : c.kv_len;
    const Span span = trimmed<E>(s, j0, j1);
    const State state = classify(c, s, span.start, span.stop);
    if (state == kSkip) continue;
    const Left<E> k = key_rows(c, c.k, s.batch, kv_head, j0, j1, c.head_dim, w.tile_keys);
    scores(c, s, span, k.from(span.start - j0), q.q_t, w.weights, nullptr);
    if (state == kPartial) mask_tile(c, s, span.start, span.stop, w.weights);
    alignas(64) float rescale[kRows];
    online_softmax_update<E>(s, w.weights, span.stop - span.start, scaling(c).unit, rescale, nullptr);
  }
  for (int r = 0; r < s.rows; ++r) {
    if (!is_large(r)) continue;
    s.lse[r] = s.maximum[r];
    s.lse_rest[r] = static_cast<float>(std::log2(static_cast<double>(s.total[r]) + s.total_rest[r]));
  }
}

// S^T, P^T, and dV += P^T dO.
template <class E>
inline void value_gradient(const tilewise_call& c, const Strip& s, const Queries<E>& q, const Chunk<E>& chunk,
                           const BackwardSpace<E>& w, Span span, bool partial) {
  const std::int64_t v_width = padded(c.v_dim), keys = span.stop - span.start, j = span.start - chunk.start;
  float* d_v = w.d_v + j * v_width;
  scores(c, s, span, chunk.k.from(j), q.q_t, w.weights, w.capped);
  if (partial) mask_tile(c, s, span.start, span.stop, w.weights);
  recompute_weights(s, keys, scaling(c).unit, w.weights);
  const float* dropped = w.weights;
  if (c.keep_factor != 0.0f) {
    drop(c, s, span.start, span.stop, w.weights, w.dropped);
    dropped = w.dropped;
  }
  if (partial && !q.d_out_finite) {
    careful_product(c, s, span, dropped, c.d_out, chunk.kv_head, d_v, v_width, c.v_dim, true);
  } else {
    const Left<E> p = along_queries(dropped, kRows, keys, s.lanes, w.operand);
    matmul(keys, v_width / kLanes, elements<E>(s.rows), p, q.d_out, d_v, v_width, {1.0f, true});
  }
}

// dP^T, dS^T, and with it dK and dQ.
template <class E>
inline void key_gradient(const tilewise_call& c, const Strip& s, const Queries<E>& q, const Chunk<E>& chunk,
                         const BackwardSpace<E>& w, Span span, bool partial) {
  const std::int64_t width = padded(c.head_dim), keys = span.stop - span.start, j = span.start - chunk.start;
  float* d_k = w.d_k + j * width;
  matmul(keys, s.vectors, elements<E>(c.v_dim), chunk.v.from(j), q.d_out_t, w.d_scores, kRows, {1.0f, false});
  if (c.keep_factor != 0.0f) drop_alike(s, keys, c.keep_factor, w.dropped, w.d_scores);
  score_gradient(s, keys, w.weights, w.d_scores, partial);
  if (c.d_alibi || c.d_bias || c.d_relative_bias) bias_gradients(c, s, chunk.index, span, w.d_scores);
  if (c.softcap != 0.0f) cap_gradient(c, keys * kRows, w.capped, w.d_scores);
  if (partial && !q.q_finite) {
    careful_product(c, s, span, w.d_scores, c.q, chunk.kv_head, d_k, width, c.head_dim, true);
  } else {
    const Left<E> d = along_queries(w.d_scores, kRows, keys, s.lanes, w.operand);
    matmul(keys, width / kLanes, elements<E>(s.rows), d, q.q, d_k, width, {1.0f, true});
  }
  const Right<E> k = chunk.k_right.from(j);
  if (partial && !all_finite(k, keys, c.head_dim)) {
    careful_product(c, s, span, w.d_scores, c.k, chunk.kv_head, w.d_q, width, c.head_dim, false);
  } else {
    const Left<E> d = along_keys(w.d_scores, kRows, keys, s.lanes, w.operand);
    matmul(s.rows, width / kLanes, elements<E>(keys), d, k, w.d_q, width, {1.0f, true});
  }
}

inline void store_d_q(const tilewise_call& c, const Strip& s, std::int64_t chunk, const float* d_q) {
  const std::int64_t width = padded(c.head_dim);
  for (int r = 0; r < s.rows; ++r) {
    const float* row = d_q + r * width;
    if (c.chunks == 1) {
      write_row(c.d_q, query_offset(c.d_q, s, r), c.d_q.stride[3], c.head_dim, row, c.scale);
      continue;
    }
    const std::int64_t at = ((chunk * c.batch + s.batch) * c.q_heads + s.head[r]) * c.q_len + s.query[r];
    float* to = c.d_q_parts + at * c.head_dim;
    for (std::int64_t d = 0; d < c.head_dim; ++d) to[d] = row[d] * c.scale;
  }
}

template <class E>
void backward_task(const tilewise_call& c, std::int64_t b, std::int64_t kv_head, std::int64_t index,
                   std::int64_t start, std::int64_t stop) {
  const BackwardSpace<E> w = backward_space<E>(c, stop - start);
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), length = stop - start;
  const std::int64_t rows = c.q_heads / c.kv_heads * c.q_len;
  const bool queries_in_runs = rows > kRunLength * kRows, keys_in_runs = length > kRunLength * kKeys;
  clear(w.d_k, length * width);
  clear(w.d_v, length * v_width);
  if (queries_in_runs) {
    clear(w.d_k_sum, length * width);
    clear(w.d_v_sum, length * v_width);
  }
  Chunk<E> chunk{index, start, kv_head, {}, {}, {}};
  if (start < stop) {
    chunk.k = key_rows(c, c.k, b, kv_head, start, stop, c.head_dim, w.keys);
    chunk.v = key_rows(c, c.v, b, kv_head, start, stop, c.v_dim, w.values);
    chunk.k_right = key_columns(c, c.k, b, kv_head, start, stop, c.head_dim, w.key_columns, w.row);
  }
  Strip s;
  for (std::int64_t first = 0; first < rows; first += kRows) {
    set_strip(c, s, b, kv_head, first, rows - first < kRows ? rows - first : kRows);
    const std::int64_t low = s.first_key > start ? s.first_key : start;
    const std::int64_t high = s.last_key < stop ? s.last_key : stop;
    if (low >= high) {
      clear(w.d_q, kRows * width);
    } else {
      const Queries<E> q = load_queries(c, s, w);
      settle_large_rows(c, s, q, kv_head, w);
      if (keys_in_runs) clear(w.d_q_sum, kRows * width);
      for (std::int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
        const Span span = trimmed<E>(s, j0, j0 + kKeys < stop ? j0 + kKeys : stop);
        const State state = classify(c, s, span.start, span.stop);
        if (state != kSkip) {
          value_gradient(c, s, q, chunk, w, span, state == kPartial);
          key_gradient(c, s, q, chunk, w, span, state == kPartial);
        }
        if (keys_in_runs && j0 / kKeys % kRunLength == kRunLength - 1) add_run(w.d_q, w.d_q_sum, kRows * width);
      }
      if (keys_in_runs) add_run(w.d_q_sum, w.d_q, kRows * width);
    }
    store_d_q(c, s, index, w.d_q);
    if (queries_in_runs && (first / kRows % kRunLength == kRunLength - 1 || first + kRows >= rows)) {
      add_run(w.d_k, w.d_k_sum, length * width);
      add_run(w.d_v, w.d_v_sum, length * v_width);
    }
  }
  const float* d_k = queries_in_runs ? w.d_k_sum : w.d_k;
  const float* d_v = queries_in_runs ? w.d_v_sum : w.d_v;
  for (std::int64_t j = start; j < stop; ++j) {
    const std::int64_t i = j - start;
    write_row(c.d_k, key_offset(c, c.d_k, b, kv_head, j), c.d_k.stride[3], c.head_dim, d_k + i * width, c.scale);
    write_row(c.d_v, key_offset(c, c.d_v, b, kv_head, j), c.d_v.stride[3], c.v_dim, d_v + i * v_width, 1.0f);
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
  write_row(t, b * t.stride[0] + h * t.stride[1] + i * t.stride[2], t.stride[3], n, sum, 1.0f);
}

// delta = rowsum(dO * O), less the gradient of lse (Algorithm 2, line 4), for some rows.
inline void row_deltas(const tilewise_call& c, std::int64_t first, std::int64_t stop) {
  const std::int64_t width = padded(c.v_dim);
  float *out = nullptr, *d_out = nullptr;
  scratch().lay_out([&](Scratch& memory) {
    memory.take(out, width);
    memory.take(d_out, width);
  });
  for (std::int64_t row = first; row < stop; ++row) {
    const std::int64_t i = row % c.q_len, h = row / c.q_len % c.q_heads, b = row / c.q_len / c.q_heads;
    const auto read = [&](const tilewise_tensor& t, float* to) {
      read_row(t, b * t.stride[0] + h * t.stride[1] + i * t.stride[2], t.stride[3], c.v_dim, to, width);
    };
    read(c.out, out);
    read(c.d_out, d_out);
    Vec sum{};
    for (std::int64_t d = 0; d < width; d += kLanes) sum += load(out + d) * load(d_out + d);
    double delta = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) delta += sum[lane];
    if (c.d_lse) delta -= c.d_lse[b * c.d_lse_stride[0] + h * c.d_lse_stride[1] + i * c.d_lse_stride[2]];
    c.delta[row] = static_cast<float>(delta);
  }
}

// task(first, stop) for all rows [batch, q_heads, q_len], some at a time.
template <class Task>
bool run_rows(const tilewise_call& c, tilewise_parallel_for parallel_for, const Task& task) {
  const std::int64_t rows = c.batch * c.q_heads * c.q_len, block = 256;
  return run_tasks((rows + block - 1) / block, useful_threads(c), parallel_for, [&](std::int64_t n) {
    task(n * block, (n + 1) * block < rows ? (n + 1) * block : rows);
  });
}

template <class E>
bool backward_of(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  if (!run_rows(c, parallel_for, [&](std::int64_t first, std::int64_t stop) { row_deltas(c, first, stop); }))
    return false;
  const std::int64_t heads = c.batch * c.kv_heads;
  const std::int64_t tiles = (c.kv_len + kKeys - 1) / kKeys;
  const std::int64_t size = (tiles + c.chunks - 1) / c.chunks * kKeys;
  const auto run_part = [&](std::int64_t head, std::int64_t chunk) {
    const std::int64_t start = chunk * size < c.kv_len ? chunk * size : c.kv_len;
    const std::int64_t stop = start + size < c.kv_len ? start + size : c.kv_len;
    backward_task<E>(c, head / c.kv_heads, head % c.kv_heads, chunk, start, stop);
  };
  // First chunks first: under a causal mask the most queries see them. A bias shared between heads is
  // summed by one task per chunk, head after head: no atomic adds, no copy of the bias per head.
  const bool done =
      c.d_bias_shared
          ? run_tasks(c.chunks, useful_threads(c), parallel_for,
                      [&](std::int64_t chunk) {
                        for (std::int64_t head = 0; head < heads; ++head) run_part(head, chunk);
                      })
          : run_tasks(heads * c.chunks, useful_threads(c), parallel_for,
                      [&](std::int64_t task) { run_part(task % heads, task / heads); });
  return done && (c.chunks == 1 || run_rows(c, parallel_for, [&](std::int64_t first, std::int64_t stop) {
                    for (std::int64_t row = first; row < stop; ++row) add_parts(c, row);
                  }));
}

bool run_backward(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const bool pairs = takes_pairs(c) && c.d_out.dtype == TILEWISE_BFLOAT16;
  return pairs ? backward_of<Lowest>(c, parallel_for) : backward_of<float>(c, parallel_for);
}

}  // namespace
