// FlashAttention-2 forward (Dao, 2023, Algorithm 1): the steps of backends/tiled.py, on strips.
//
// Per tile of kKeys keys: S^T = K Q^T with lanes along the queries, softmax in place, O += P V with P
// read through its strides. Float operands are used in place; for pairs P is rounded to bfloat16 and V's
// rows are interleaved two by two.

namespace {

constexpr std::int64_t kStripsPerTask = 5;  // strips that share the keys and values they read

template <class E>
struct ForwardSpace {
  E *keys, *values, *query_rows, *queries, *weights;
  float *row, *scores, *out;
  Strip* strips;
};

template <class E>
inline ForwardSpace<E> forward_space(const tilewise_call& c) {
  const std::int64_t v_width = padded(c.v_dim), n = kStripsPerTask;
  ForwardSpace<E> w;
  scratch().lay_out([&](auto& memory) {
    memory.take(w.keys, kKeys * row_words<E>(c.head_dim));
    memory.take(w.values, kKeys * v_width);
    memory.take(w.query_rows, kRows * row_words<E>(c.head_dim));
    memory.take(w.queries, n * elements<E>(c.head_dim) * kRows);
    memory.take(w.weights, kKeys * kRows);
    memory.take(w.row, v_width);
    memory.take(w.scores, kKeys * kRows);
    memory.take(w.out, n * kRows * v_width);
    memory.take(w.strips, n);
  });
  return w;
}

// P = 2^(S - m) in place of S.
inline Vec exponentiate(float* tile, std::int64_t keys, Vec shift) {
  Vec total = Vec{};
  for (std::int64_t j = 0; j < keys; ++j) {
    const Vec p = exp2_vec(load(tile + j * kRows) - shift);
    total += p;
    store(tile + j * kRows, p);
  }
  return total;
}

// P rounded to pairs: the tile itself stays S.
inline Vec exponentiate(const float* tile, std::int64_t keys, Vec shift, Pair* weights) {
  Vec total[2] = {Vec{}, Vec{}};
  for (std::int64_t j = 0; j < keys; j += 2) {
    const Vec even = exp2_vec(load(tile + j * kRows) - shift);
    const Vec odd = j + 1 < keys ? exp2_vec(load(tile + (j + 1) * kRows) - shift) : Vec{};
    total[0] += even;
    total[1] += odd;
    store_words(weights + j / 2 * kRows, pair_words(even, odd));
  }
  return total[0] + total[1];
}
// Floats are not packed.
inline Vec exponentiate(float* tile, std::int64_t keys, Vec shift, float*) {
  return exponentiate(tile, keys, shift);
}

inline Vec tile_maximum(const float* tile, std::int64_t keys, Vec before) {
  Vec highest[2] = {before, before};  // two chains hide the latency of the maximum
  std::int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
    highest[0] = larger(load(tile + j * kRows), highest[0]);
    highest[1] = larger(load(tile + (j + 1) * kRows), highest[1]);
  }
  if (j < keys) highest[0] = larger(load(tile + j * kRows), highest[0]);
  return larger(highest[0], highest[1]);
}

// m, l and P = 2^(S - m); rescale[r] = 2^(m_old - m_new). True if any is not 1. P is left in `weights`, or
// in the tile if that is null.
template <class E>
inline bool online_softmax_update(Strip& s, float* tile, std::int64_t keys, float* rescale, E* weights) {
  bool changed = false;
  for (int v = 0; v < s.lanes; v += kLanes) {
    const Vec before = load(s.maximum + v), maximum = tile_maximum(tile + v, keys, before);
    // A row that has seen no key keeps m = -inf; -inf - (-inf) would be NaN.
    const Vec shift = maximum == -kInfinity ? all(0.0f) : maximum;
    const Vec shrink = exp2_vec(before - shift);
    const Vec total = weights ? exponentiate(tile + v, keys, shift, weights + v) : exponentiate(tile + v, keys, shift);
    store(s.maximum + v, maximum);
    store(s.total + v, load(s.total + v) * shrink + total);
    store(rescale + v, shrink);
    changed |= is_any(shrink != 1.0f);
  }
  return changed;
}

// O += P V where some hidden key's value is inf or NaN: only what is visible takes part.
inline void accumulate_visible(const tilewise_call& c, const Strip& s, std::int64_t j0, std::int64_t j1,
                               const float* tile, std::int64_t kv_head, float* out, std::int64_t width) {
  for (int r = 0; r < s.rows; ++r)
    for (std::int64_t j = j0; j < j1; ++j) {
      if (!visible(c, s, r, j)) continue;
      const float p = tile[(j - j0) * kRows + r];
      const std::int64_t at = key_offset(c, c.v, s.batch, kv_head, j);
      for (std::int64_t d = 0; d < c.v_dim; ++d) out[r * width + d] += p * element(c.v, at + d * c.v.stride[3]);
    }
}

inline void finish(const tilewise_call& c, const Strip& s, const float* out, std::int64_t width) {
  for (int r = 0; r < s.rows; ++r) {
    const float l = s.total[r], inverse = l == 0.0f ? 1.0f : 1.0f / l;
    write_row(c.out, query_offset(c.out, s, r), c.out.stride[3], c.v_dim, out + r * width, inverse);
    const double m = s.maximum[r], lse = m == kInfinity ? m : (m + std::log2(static_cast<double>(l))) / kLog2E;
    c.lse[(s.batch * c.q_heads + s.head[r]) * c.q_len + s.query[r]] = static_cast<float>(lse);
  }
}

inline void initial_state(const tilewise_call& c, Strip& s, float* out, std::int64_t width, bool with_sinks) {
  std::memset(out, 0, static_cast<std::size_t>(s.rows * width) * sizeof(float));
  if (c.sinks == nullptr || !with_sinks) return;
  for (int r = 0; r < s.rows; ++r) {  // a sink is a key seen first: m = sink, l = 1
    const float sink = c.sinks[s.head[r]];
    s.maximum[r] = in_units(all(sink))[0];
    s.total[r] = sink == -kInfinity ? 0.0f : sink - sink + 1.0f;  // NaN for a sink of NaN or inf
  }
}

// What exponentiate() left, as the left operand whose inner dimension are the keys.
inline Left<float> weights_along_keys(const float* tile, float*, std::int64_t, int) { return {tile, 1, kRows}; }
inline Left<Pair> weights_along_keys(const float*, Pair* weights, std::int64_t keys, int lanes) {
  return along_packed_keys(weights, kRows, keys, lanes);
}

template <class E>
void forward_tile(const tilewise_call& c, Strip& s, const ForwardSpace<E>& w, Span span, bool partial, Left<E> k,
                  Right<E> v, std::int64_t kv_head, const E* queries, float* out) {
  const std::int64_t keys = span.stop - span.start, v_width = padded(c.v_dim);
  scores(c, s, span, k, Right<E>{queries, kRows}, w.scores, nullptr);
  if (partial) mask_tile(c, s, span.start, span.stop, w.scores);
  const bool careful = partial && !all_finite(v, keys, c.v_dim), packs = !careful && c.keep_factor == 0.0f;
  alignas(64) float rescale[kRows];
  if (online_softmax_update(s, w.scores, keys, rescale, packs ? w.weights : nullptr)) {
    for (int r = 0; r < s.rows; ++r)
      if (rescale[r] != 1.0f)
        for (std::int64_t d = 0; d < v_width; ++d) out[r * v_width + d] *= rescale[r];
  }
  if (c.keep_factor != 0.0f) drop(c, s, span.start, span.stop, w.scores, w.scores);
  if (careful) {
    accumulate_visible(c, s, span.start, span.stop, w.scores, kv_head, out, v_width);
  } else {
    const Left<E> p = packs ? weights_along_keys(w.scores, w.weights, keys, s.lanes)
                            : along_keys(w.scores, kRows, keys, s.lanes, w.weights);
    matmul(s.rows, v_width / kLanes, elements<E>(keys), p, v, out, v_width, {1.0f, true});
  }
}

// Ask for the keys [j0, j1), so that memory works while the tile before is computed: with one strip a tile
// is used once, and the product's many short rows look to the processor like no stream.
inline void prefetch_rows(const tilewise_call& c, const tilewise_tensor& t, std::int64_t b, std::int64_t head,
                          std::int64_t j0, std::int64_t j1, std::int64_t dim) {
  if (t.stride[3] != 1) return;
  const std::int64_t size = t.dtype == TILEWISE_FLOAT32 ? 4 : 2;
  for (std::int64_t j = j0; j < j1; ++j) {
    const char* row = static_cast<const char*>(t.data) + key_offset(c, t, b, head, j) * size;
    for (std::int64_t at = 0; at < dim * size; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// Strips of one kv head from virtual row `first` on, over the keys of `keys`: O, m and l, not yet divided.
template <class E>
void forward_strips(const tilewise_call& c, const ForwardSpace<E>& w, std::int64_t b, std::int64_t kv_head,
                    std::int64_t first, std::int64_t rows, Span keys) {
  const std::int64_t v_width = padded(c.v_dim), column = elements<E>(c.head_dim) * kRows;
  const std::int64_t strips = (rows + kRows - 1) / kRows;
  std::int64_t low = keys.stop, high = keys.start;
  for (std::int64_t n = 0; n < strips; ++n) {
    Strip& s = w.strips[n];
    const std::int64_t left = rows - n * kRows;
    set_strip(c, s, b, kv_head, first + n * kRows, left < kRows ? left : kRows);
    query_rows(c.q, s, c.head_dim, w.query_rows);
    query_columns(w.query_rows, s, c.head_dim, w.queries + n * column);
    initial_state(c, s, w.out + n * kRows * v_width, v_width, keys.start == 0);
    if (s.first_key < low) low = s.first_key;
    if (s.last_key > high) high = s.last_key;
  }
  low = clamp(low, keys.start, keys.stop);
  high = clamp(high, keys.start, keys.stop);
  // Tiles start at multiples of kKeys whatever the strips beside, so results do not depend on grouping.
  for (std::int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
    const std::int64_t j1 = j0 + kKeys < keys.stop ? j0 + kKeys : keys.stop;
    if (strips == 1 && j1 < high) {
      const std::int64_t j2 = j1 + kKeys < high ? j1 + kKeys : high;
      prefetch_rows(c, c.k, b, kv_head, j1, j2, c.head_dim);
      prefetch_rows(c, c.v, b, kv_head, j1, j2, c.v_dim);
    }
    Left<E> k{};
    Right<E> v{};
    for (std::int64_t n = 0; n < strips; ++n) {
      Strip& s = w.strips[n];
      const Span span = trimmed<E>(s, j0, j1);
      const State state = classify(c, s, span.start, span.stop);
      if (state == kSkip) continue;
      if (k.data == nullptr) {
        k = key_rows(c, c.k, b, kv_head, j0, j1, c.head_dim, w.keys);
        v = key_columns(c, c.v, b, kv_head, j0, j1, c.v_dim, w.values, w.row);
      }
      forward_tile(c, s, w, span, state == kPartial, k.from(span.start - j0), v.from(span.start - j0), kv_head,
                   w.queries + n * column, w.out + n * kRows * v_width);
    }
  }
}

}  // namespace
