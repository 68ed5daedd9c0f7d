// FlashAttention-2 forward (Dao, 2023, Algorithm 1): the steps of backends/tiled.py, on strips.
//
// Per tile of kKeys keys: S^T = K Q^T with lanes along the queries, softmax in place, O += P V with P
// read through its strides. Neither K nor V is packed or transposed; float32 ones are read in place.

namespace {

constexpr std::int64_t kStripsPerTask = 5;  // strips that share the keys and values they read

struct ForwardSpace {
  float *keys, *values, *row, *queries, *scores, *out;
  Strip* strips;
};

inline ForwardSpace forward_space(const tilewise_call& c) {
  const std::int64_t width = padded(c.head_dim), v_width = padded(c.v_dim), n = kStripsPerTask;
  const std::int64_t sizes[] = {kKeys * width,          kKeys * v_width, width > v_width ? width : v_width,
                                n * c.head_dim * kRows, kKeys * kRows,   n * kRows * v_width,
                                n * static_cast<std::int64_t>(sizeof(Strip) / sizeof(float))};
  std::size_t total = 0;
  for (std::int64_t size : sizes) total += Scratch::aligned(size);
  Scratch& memory = scratch();
  memory.reserve(total);
  ForwardSpace w;
  w.keys = memory.take(sizes[0]);
  w.values = memory.take(sizes[1]);
  w.row = memory.take(sizes[2]);
  w.queries = memory.take(sizes[3]);
  w.scores = memory.take(sizes[4]);
  w.out = memory.take(sizes[5]);
  w.strips = reinterpret_cast<Strip*>(memory.take(sizes[6]));
  return w;
}

// m, l and P = exp(S - m) in place of S; rescale[r] = exp(m_old - m_new). True if any is not 1.
inline bool online_softmax_update(Strip& s, float* tile, std::int64_t keys, float* rescale) {
  bool changed = false;
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec before = load(s.maximum + v);
    Vec maximum = before;
    for (std::int64_t j = 0; j < keys; ++j) maximum = larger(maximum, load(tile + j * kRows + v));
    // A row that has seen no key keeps m = -inf; -inf - (-inf) would be NaN.
    const Vec shift = maximum == -kInfinity ? all(0.0f) : maximum;
    const Vec shrink = exp2_vec((before - shift) * kLog2E);
    Vec total = Vec{};
    for (std::int64_t j = 0; j < keys; ++j) {
      const Vec p = exp2_vec((load(tile + j * kRows + v) - shift) * kLog2E);
      total += p;
      store(tile + j * kRows + v, p);
    }
    store(s.maximum + v, maximum);
    store(s.total + v, load(s.total + v) * shrink + total);
    store(rescale + v, shrink);
    for (int r = v; r < v + kLanes; ++r) changed |= rescale[r] != 1.0f;
  }
  return changed;
}

// O += P V where some hidden key's value is inf or NaN: only what is visible takes part.
inline void accumulate_visible(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                               const float* tile, Rows v, float* out, std::int64_t width) {
  for (int r = 0; r < s.rows; ++r)
    for (std::int64_t j = j0; j < j1; ++j) {
      if (!visible(c, s, r, j)) continue;
      const float p = tile[(j - j0) * kRows + r];
      for (std::int64_t d = 0; d < c.v_dim; ++d)
        out[r * width + d] += p * v.data[(j - j0) * v.stride + d];
    }
}

inline void finish(const tilewise_call& c, Strip& s, float* out, std::int64_t width) {
  const tilewise_tensor& t = c.out;
  for (int r = 0; r < s.rows; ++r) {
    const float l = s.total[r], inverse = l == 0.0f ? 1.0f : 1.0f / l;
    float* row = out + r * width;
    for (std::int64_t d = 0; d < c.v_dim; ++d) row[d] *= inverse;
    write_row(t, s.batch * t.stride[0] + s.head[r] * t.stride[1] + s.query[r] * t.stride[2], t.stride[3],
              c.v_dim, row);
    const float m = s.maximum[r];
    c.lse[(s.batch * c.q_heads + s.head[r]) * c.q_len + s.query[r]] = m == kInfinity ? m : m + std::log(l);
  }
}

inline void initial_state(const tilewise_call& c, Strip& s, float* out, std::int64_t width) {
  std::memset(out, 0, static_cast<std::size_t>(kRows * width) * sizeof(float));
  if (c.sinks == nullptr) return;
  for (int r = 0; r < s.rows; ++r) {  // a sink is a key seen first: m = sink, l = 1
    const float sink = c.sinks[s.head[r]];
    s.maximum[r] = sink;
    s.total[r] = sink == -kInfinity ? 0.0f : sink - sink + 1.0f;  // NaN for a sink of NaN or inf
  }
}

void forward_tile(const tilewise_call& c, Strip& s, const ForwardSpace& w, Span span, bool partial, Rows k,
                  Rows v, const float* queries, float* out) {
  const std::int64_t keys = span.stop - span.start, v_width = padded(c.v_dim);
  matmul(keys, s.vectors, c.head_dim, {k.data, k.stride, 1}, queries, kRows, w.scores, kRows, false);
  if (c.softcap != 0.0f) soft_cap(w.scores, keys * kRows, c.softcap);
  add_biases(c, s, span.start, span.stop, w.scores);
  if (partial) mask_tile(c, s, span.start, span.stop, w.scores);
  alignas(64) float rescale[kRows];
  if (online_softmax_update(s, w.scores, keys, rescale)) {
    for (int r = 0; r < s.rows; ++r)
      for (std::int64_t d = 0; d < v_width; ++d) out[r * v_width + d] *= rescale[r];
  }
  if (c.keep_factor != 0.0f) drop(c, s, span.start, span.stop, w.scores, w.scores);
  if (partial && !all_finite(v.data, v.stride, keys, c.v_dim)) {
    accumulate_visible(c, s, span.start, span.stop, w.scores, v, out, v_width);
  } else {
    matmul(s.rows, v_width / kLanes, keys, {w.scores, 1, kRows}, v.data, v.stride, out, v_width, true);
  }
}

void forward_task(const tilewise_call& c, std::int64_t b, std::int64_t kv_head, std::int64_t first,
                  std::int64_t rows) {
  const ForwardSpace w = forward_space(c);
  const std::int64_t v_width = padded(c.v_dim);
  const std::int64_t strips = (rows + kRows - 1) / kRows;
  std::int64_t low = c.kv_len, high = 0;
  for (std::int64_t n = 0; n < strips; ++n) {
    Strip& s = w.strips[n];
    const std::int64_t left = rows - n * kRows;
    set_strip(c, s, b, kv_head, first + n * kRows, left < kRows ? left : kRows);
    transpose_queries(c.q, s, c.head_dim, c.scale, w.row, w.queries + n * c.head_dim * kRows);
    initial_state(c, s, w.out + n * kRows * v_width, v_width);
    if (s.first_key < low) low = s.first_key;
    if (s.last_key > high) high = s.last_key;
  }
  // Tiles start at multiples of kKeys whatever the strips beside, so results do not depend on grouping.
  for (std::int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
    const std::int64_t j1 = j0 + kKeys < c.kv_len ? j0 + kKeys : c.kv_len;
    Rows k_tile{}, v_tile{};
    for (std::int64_t n = 0; n < strips; ++n) {
      Strip& s = w.strips[n];
      const Span span = trimmed(s, j0, j1);
      const State state = classify(c, s, span.start, span.stop);
      if (state == kSkip) continue;
      if (k_tile.data == nullptr) {
        k_tile = key_rows(c, c.k, b, kv_head, j0, j1, c.head_dim, false, w.keys);
        v_tile = key_rows(c, c.v, b, kv_head, j0, j1, c.v_dim, true, w.values);
      }
      forward_tile(c, s, w, span, state == kPartial, k_tile.from(span.start - j0),
                   v_tile.from(span.start - j0), w.queries + n * c.head_dim * kRows,
                   w.out + n * kRows * v_width);
    }
  }
  for (std::int64_t n = 0; n < strips; ++n) finish(c, w.strips[n], w.out + n * kRows * v_width, v_width);
}

bool run_forward(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const std::int64_t rows = c.q_heads / c.kv_heads * c.q_len, heads = c.batch * c.kv_heads;
  // Fewer strips a task where there would be too few tasks to share out.
  std::int64_t strips = kStripsPerTask;
  while (strips > 1 && heads * ((rows + strips * kRows - 1) / (strips * kRows)) < 4 * c.threads) --strips;
  const std::int64_t size = strips * kRows, blocks = (rows + size - 1) / size;
  return run_tasks(heads * blocks, c.threads, parallel_for, [&](std::int64_t task) {
    // Last rows first: under a causal mask they see the most keys.
    const std::int64_t block = blocks - 1 - task / heads, head = task % heads, first = block * size;
    forward_task(c, head / c.kv_heads, head % c.kv_heads, first, rows - first < size ? rows - first : size);
  });
}

}  // namespace
