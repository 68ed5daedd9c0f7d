// How a forward call is cut into tasks: by strips, and where those are few, by keys too.
//
// Few queries over many keys (decoding): one strip's keys are cut into runs, which are tasks of their own and
// are merged by their maxima and sums (Flash-Decoding). Where they are cut depends on the problem alone.

namespace {

constexpr std::int64_t kRun = 8 * kKeys;        // keys of a run: half a megabyte at head_dim 128 in bfloat16
constexpr std::int64_t kEnoughStrips = 16;      // with so many strips every thread has work without a cut

inline std::int64_t strips_of(const tilewise_call& c) {
  return (c.q_heads / c.kv_heads * c.q_len + kRows - 1) / kRows;
}

inline bool is_split(const tilewise_call& c) {
  return c.kv_len > kRun && c.batch * c.kv_heads * strips_of(c) < kEnoughStrips;
}

// What one run found for one strip.
struct Partial {
  Strip strip;
  float* out;  // [kRows][padded(v_dim)], not divided
};

// O, m and l of the runs as if one had seen all keys, in the order of the keys, into the first.
inline void merge(Partial* runs, std::int64_t count, std::int64_t width) {
  Strip& s = runs[0].strip;
  for (int r = 0; r < s.rows; ++r) {
    float m = -kInfinity;
    double l = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
      const float other = runs[i].strip.maximum[r];
      m = other > m || other != other ? other : m;
    }
    const float shift = m == -kInfinity ? 0.0f : m;
    float* out = runs[0].out + r * width;
    for (std::int64_t i = 0; i < count; ++i) {
      const float factor = std::exp2(runs[i].strip.maximum[r] - shift);
      const float* part = runs[i].out + r * width;
      l += (static_cast<double>(runs[i].strip.total[r]) + runs[i].strip.total_rest[r]) * factor;
      if (i == 0) {
        for (std::int64_t d = 0; d < width; ++d) out[d] = part[d] * factor;
      } else if (factor != 0.0f) {
        for (std::int64_t d = 0; d < width; ++d) out[d] += part[d] * factor;
      }
    }
    s.maximum[r] = m;
    s.total[r] = static_cast<float>(l);
    s.total_rest[r] = static_cast<float>(l - s.total[r]);
  }
}

template <class E>
bool split_forward(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const std::int64_t strips = strips_of(c), heads = c.batch * c.kv_heads, rows = c.q_heads / c.kv_heads * c.q_len;
  const std::int64_t runs = (c.kv_len + kRun - 1) / kRun, width = padded(c.v_dim);
  Partial* partials = nullptr;
  float* out = nullptr;
  try {
    shared_scratch().lay_out([&](Scratch& memory) {
      memory.take(partials, heads * strips * runs);
      memory.take(out, heads * strips * runs * kRows * width);
    });
  } catch (const std::bad_alloc&) {
    return false;
  }
  const bool done = run_tasks(heads * strips * runs, useful_threads(c), parallel_for, [&](std::int64_t task) {
    const std::int64_t run = task % runs, strip = task / runs % strips, head = task / runs / strips;
    const std::int64_t first = strip * kRows, stop = (run + 1) * kRun < c.kv_len ? (run + 1) * kRun : c.kv_len;
    const ForwardSpace<E> w = forward_space<E>(c);
    forward_strips(c, w, head / c.kv_heads, head % c.kv_heads, first, rows - first < kRows ? rows - first : kRows,
                   {run * kRun, stop});
    Partial& p = partials[task];
    p.strip = w.strips[0];
    p.out = out + task * kRows * width;
    std::memcpy(p.out, w.out, static_cast<std::size_t>(p.strip.rows * width) * sizeof(float));
  });
  return done && run_tasks(heads * strips, useful_threads(c), parallel_for, [&](std::int64_t task) {
           Partial* const mine = partials + task * runs;
           merge(mine, runs, width);
           finish(c, mine[0].strip, mine[0].out, width);
         });
}

template <class E>
bool forward_of(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  const std::int64_t rows = c.q_heads / c.kv_heads * c.q_len, heads = c.batch * c.kv_heads;
  const std::int64_t v_width = padded(c.v_dim);
  if (is_split(c)) return split_forward<E>(c, parallel_for);
  // Fewer strips a task where there would be too few tasks to share out.
  std::int64_t strips = kStripsPerTask;
  while (strips > 1 && heads * ((rows + strips * kRows - 1) / (strips * kRows)) < 4 * c.threads) --strips;
  const std::int64_t size = strips * kRows, blocks = (rows + size - 1) / size;
  return run_tasks(heads * blocks, useful_threads(c), parallel_for, [&](std::int64_t task) {
    // Last rows first: under a causal mask they see the most keys.
    const std::int64_t block = blocks - 1 - task / heads, head = task % heads, first = block * size;
    const std::int64_t count = rows - first < size ? rows - first : size;
    const ForwardSpace<E> w = forward_space<E>(c);
    forward_strips(c, w, head / c.kv_heads, head % c.kv_heads, first, count, {0, c.kv_len});
    for (std::int64_t n = 0; n * kRows < count; ++n) finish(c, w.strips[n], w.out + n * kRows * v_width, v_width);
  });
}

bool run_forward(const tilewise_call& c, tilewise_parallel_for parallel_for) {
  return takes_pairs(c) ? forward_of<Lowest>(c, parallel_for) : forward_of<float>(c, parallel_for);
}

}  // namespace
