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
  float *row, *scores, *few_scores, *out, *out_run;
  E* few_weights;
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
    memory.take(w.few_scores, kFewRows * kKeys);
    memory.take(w.few_weights, kFewRows * elements<E>(kKeys));
    for (float** array : {&w.out, &w.out_run}) memory.take(*array, n * kRows * v_width);
    memory.take(w.strips, n);
  });
  return w;
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
    const double m = s.maximum[r], sum = static_cast<double>(l) + s.total_rest[r];
    const double lse = m == kInfinity ? m : (m + std::log2(sum)) / kExactLog2E;
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

// Adds to `run`; `sum` holds the runs before it, or is null.
template <class E>
void forward_tile(const tilewise_call& c, Strip& s, const ForwardSpace<E>& w, Span span, bool partial, Left<E> k,
                  Right<E> v, std::int64_t kv_head, const E* queries, float* run, float* sum) {
  const std::int64_t keys = span.stop - span.start, v_width = padded(c.v_dim);
  scores(c, s, span, k, Right<E>{queries, kRows}, w.scores, nullptr);
  if (partial) mask_tile(c, s, span.start, span.stop, w.scores);
  const bool careful = partial && !all_finite(v, keys, c.v_dim), packs = !careful && c.keep_factor == 0.0f;
  alignas(64) float rescale[kRows];
  if (online_softmax_update(s, w.scores, keys, scaling(c).unit, rescale, packs ? w.weights : nullptr)) {
    rescale_rows(s.rows, rescale, run, v_width);
    if (sum) rescale_rows(s.rows, rescale, sum, v_width);
  }
  if (c.keep_factor != 0.0f) drop(c, s, span.start, span.stop, w.scores, w.scores);
  if (careful) {
    accumulate_visible(c, s, span.start, span.stop, w.scores, kv_head, run, v_width);
  } else {
    const Left<E> p = packs ? weights_along_keys(w.scores, w.weights, keys, s.lanes)
                            : along_keys(w.scores, kRows, keys, s.lanes, w.weights);
    matmul(s.rows, v_width / kLanes, elements<E>(keys), p, v, run, v_width, {1.0f, true});
  }
}

// forward_tile for few rows: the same steps, on keys and values where they lie. Where scores are but products,
// and no key is hidden, they stay in rows; the lanes without a row of a strip's tile hold zeros.
template <class E, class Rows>
void few_rows_tile(const tilewise_call& c, Strip& s, const ForwardSpace<E>& w, Span span, bool partial,
                   const Rows& k, const Rows& v, std::int64_t kv_head, float* run, float* sum) {
  const std::int64_t keys = span.stop - span.start, v_width = padded(c.v_dim), words = row_words<E>(c.head_dim);
  each_group(s.rows, [&](auto count, std::int64_t r) {
    score_rows<decltype(count)::value>(k, keys, w.query_rows + r * words, words, c.head_dim, scaling(c).product,
                                       w.few_scores + r * kKeys);
  });
  const bool plain = !partial && c.softcap == 0.0f && !has_bias(c);
  const bool careful = partial && !all_finite(v, keys, c.v_dim);
  alignas(64) float rescale[kRows];
  bool changed;
  Weights<E> weights{w.few_weights, 1, elements<E>(kKeys)};
  if (plain) {
    changed = row_softmax_update(s, w.few_scores, keys, scaling(c).unit, rescale, w.few_weights);
  } else {
    for (std::int64_t j = 0; j < keys; ++j)
      for (int r = 0; r < s.lanes; ++r) w.scores[j * kRows + r] = r < s.rows ? w.few_scores[r * kKeys + j] : 0.0f;
    cap_and_bias(c, s, span, w.scores, nullptr);
    if (partial) mask_tile(c, s, span.start, span.stop, w.scores);
    E* const packed = careful || kWidth<E> == 1 ? nullptr : w.weights;
    changed = online_softmax_update(s, w.scores, keys, scaling(c).unit, rescale, packed);
    weights = {packed, kRows, 1};
  }
  if constexpr (kWidth<E> == 1) weights.at = plain ? w.few_scores : w.scores;
  if (changed) {
    rescale_rows(s.rows, rescale, run, v_width);
    if (sum) rescale_rows(s.rows, rescale, sum, v_width);
  }
  if (careful) {
    accumulate_visible(c, s, span.start, span.stop, w.scores, kv_head, run, v_width);
    return;
  }
  each_group(s.rows, [&](auto count, std::int64_t r) {
    value_rows<decltype(count)::value>(v, keys, weights.from(r), c.v_dim, run + r * v_width, v_width);
  });
}
template <class E, class N>
void few_rows_tile(const tilewise_call& c, Strip& s, const ForwardSpace<E>& w, Span span, bool partial,
                   std::int64_t kv_head, float* run, float* sum) {
  const auto run_on = [&](const auto& k) {
    const std::decay_t<decltype(k)> v(c, c.v, s.batch, kv_head, span, w.row);
    few_rows_tile(c, s, w, span, partial, k, v, kv_head, run, sum);
  };
  if (c.page_table) {
    run_on(PagedRows<N>(c, c.k, s.batch, kv_head, span, w.row));
  } else {
    run_on(EvenRows<N>(c, c.k, s.batch, kv_head, span, w.row));
  }
}
template <class E>
void few_rows_tile(const tilewise_call& c, Strip& s, const ForwardSpace<E>& w, Span span, bool partial,
                   std::int64_t kv_head, float* run, float* sum) {
  if constexpr (kWidth<E> == 2) {
    few_rows_tile<E, Bfloat>(c, s, w, span, partial, kv_head, run, sum);
  } else {
    if (c.k.dtype == TILEWISE_FLOAT32) few_rows_tile<E, float>(c, s, w, span, partial, kv_head, run, sum);
    if (c.k.dtype == TILEWISE_FLOAT16) few_rows_tile<E, Half>(c, s, w, span, partial, kv_head, run, sum);
    if (c.k.dtype == TILEWISE_BFLOAT16) few_rows_tile<E, Bfloat>(c, s, w, span, partial, kv_head, run, sum);
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
  const std::int64_t strips = (rows + kRows - 1) / kRows, size = kRows * v_width;
  const bool in_runs = keys.stop - keys.start > kRunLength * kKeys;
  const bool in_place = reads_in_place<E>(c);
  if (in_place) {
    std::memset(w.few_scores, 0, kFewRows * kKeys * sizeof(float));
    std::memset(w.few_weights, 0, static_cast<std::size_t>(kFewRows * elements<E>(kKeys)) * sizeof(E));
    std::memset(w.row, 0, static_cast<std::size_t>(v_width) * sizeof(float));
  }
  const auto run = [&](std::int64_t n) { return (in_runs ? w.out_run : w.out) + n * size; };
  std::int64_t low = keys.stop, high = keys.start;
  for (std::int64_t n = 0; n < strips; ++n) {
    Strip& s = w.strips[n];
    const std::int64_t left = rows - n * kRows;
    set_strip(c, s, b, kv_head, first + n * kRows, left < kRows ? left : kRows);
    query_rows(c.q, s, c.head_dim, w.query_rows);
    query_columns(w.query_rows, s, c.head_dim, w.queries + n * column);
    initial_state(c, s, w.out + n * size, v_width, keys.start == 0);
    if (in_runs) std::memset(run(n), 0, static_cast<std::size_t>(s.rows * v_width) * sizeof(float));
    if (s.first_key < low) low = s.first_key;
    if (s.last_key > high) high = s.last_key;
  }
  low = clamp(low, keys.start, keys.stop);
  high = clamp(high, keys.start, keys.stop);
  // Tiles start at multiples of kKeys whatever the strips beside, so results do not depend on grouping.
  for (std::int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
    const std::int64_t j1 = j0 + kKeys < keys.stop ? j0 + kKeys : keys.stop;
    if (strips == 1 && !in_place && j1 < high) {
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
      float* const sum = in_runs ? w.out + n * size : nullptr;
      if constexpr (kParts<E> == 1) {
        if (in_place) {
          few_rows_tile(c, s, w, span, state == kPartial, kv_head, run(n), sum);
          continue;
        }
      }
      if (k.data == nullptr) {
        k = key_rows(c, c.k, b, kv_head, j0, j1, c.head_dim, w.keys);
        v = key_columns(c, c.v, b, kv_head, j0, j1, c.v_dim, w.values, w.row);
      }
      forward_tile(c, s, w, span, state == kPartial, k.from(span.start - j0), v.from(span.start - j0), kv_head,
                   w.queries + n * column, run(n), sum);
    }
    const bool ends_run = j0 / kKeys % kRunLength == kRunLength - 1 || j1 >= high;
    if (in_runs && ends_run)
      for (std::int64_t n = 0; n < strips; ++n) add_run(run(n), w.out + n * size, w.strips[n].rows * v_width);
  }
}

}  // namespace
