// FlashAttention-2's Algorithm 1 (Dao, 2023, arXiv:2307.08691) in float32; rung08_cuda.py is the text.
//
// A warp owns ROWS rows of queries. For the scores a lane is a key of the tile; for the output it is a
// column of V, and of the next 32. Scores, weights, maxima, sums and the output stay in registers.

constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int ROWS = 8;  // a number read from K or V serves so many rows
constexpr int BLOCK_Q = WARPS * ROWS;
constexpr int BLOCK_KV = LANES;
constexpr int DIM = HEAD_DIM;  // the compiler's command line gives it
constexpr int COLUMNS = DIM / LANES;
constexpr int PITCH = DIM + 1;  // odd: lanes that read one column of 32 rows hit 32 different banks
constexpr unsigned ALL = 0xffffffff;
static_assert(DIM % LANES == 0, "a lane owns whole columns of the output");

__device__ float infinity() { return __int_as_float(0x7f800000); }

__device__ float warp_max(float x) {
  for (int apart = LANES / 2; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, apart));
  return x;
}

__device__ float warp_sum(float x) {
  for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL, x, apart);
  return x;
}

// Rows [first, first + BLOCK) of x to shared memory, by all threads together; zeros beyond the end.
template <int BLOCK, int STRIDE>
__device__ void load_tile(float (&tile)[BLOCK][STRIDE], const float* x, int first, int length) {
  for (int at = threadIdx.x; at < BLOCK * DIM; at += WARPS * LANES) {
    const int row = at / DIM, column = at % DIM;
    const bool live = first + row < length;
    tile[row][column] = live ? x[static_cast<long long>(first + row) * DIM + column] : 0.0f;
  }
}

// s[r] = scale (q[r] . k[lane]), line 8. All lanes read the same number of q, which costs one read.
__device__ void scores(float (&s)[ROWS], const float (*q)[DIM], const float* k, float scale) {
  for (float& score : s) score = 0.0f;
#pragma unroll 8
  for (int d = 0; d < DIM; ++d) {
    for (int r = 0; r < ROWS; ++r) s[r] += q[r][d] * k[d];
  }
  for (float& score : s) score *= scale;
}

// A key beyond the end has no weight.
__device__ void mask_tile(float (&s)[ROWS], bool live) {
  for (float& score : s) score = live ? score : -infinity();
}

// Line 9. s becomes the weights; each lane sums those of its own keys, and the warp adds up at the end.
__device__ void online_softmax_update(float (&s)[ROWS], float (&m)[ROWS], float (&l)[ROWS],
                                      float (&shrink)[ROWS]) {
  for (int r = 0; r < ROWS; ++r) {
    const float m_new = fmaxf(m[r], warp_max(s[r]));
    shrink[r] = expf(m[r] - m_new);
    s[r] = expf(s[r] - m_new);
    l[r] = l[r] * shrink[r] + s[r];
    m[r] = m_new;
  }
}

// Line 10: out = shrink out + p V. The weight of key j is lane j's; it hands it to the others.
__device__ void accumulate(float (&out)[ROWS][COLUMNS], const float (&p)[ROWS],
                           const float (&shrink)[ROWS], const float (&v)[BLOCK_KV][DIM], int lane) {
  for (int r = 0; r < ROWS; ++r) {
    for (float& x : out[r]) x *= shrink[r];
  }
#pragma unroll 4
  for (int j = 0; j < BLOCK_KV; ++j) {
    for (int r = 0; r < ROWS; ++r) {
      const float weight = __shfl_sync(ALL, p[r], j);
      for (int c = 0; c < COLUMNS; ++c) out[r][c] += weight * v[j][c * LANES + lane];
    }
  }
}

// Lines 12 to 15: the only writes to global memory. One lane writes lse.
__device__ void finish(float* out_rows, float* lse_rows, const float (&out)[ROWS][COLUMNS],
                       const float (&m)[ROWS], const float (&l)[ROWS], int rows, int lane) {
  for (int r = 0; r < ROWS; ++r) {
    const float total = warp_sum(l[r]);
    if (r < rows) {
      for (int c = 0; c < COLUMNS; ++c) out_rows[r * DIM + c * LANES + lane] = out[r][c] / total;
      if (lane == 0) lse_rows[r] = m[r] + logf(total);
    }
  }
}

// q and out [heads, q_len, DIM], k and v [heads, kv_len, DIM], lse [heads, q_len], kv_len >= 1.
// Grid: blocks of BLOCK_Q queries, heads.
extern "C" __global__ void __launch_bounds__(WARPS * LANES)
    attention(const float* q, const float* k, const float* v, float* out, float* lse, int q_len,
              int kv_len, float scale) {
  __shared__ __align__(16) float q_tile[BLOCK_Q][DIM];
  __shared__ __align__(16) float k_tile[BLOCK_KV][PITCH];
  __shared__ __align__(16) float v_tile[BLOCK_KV][DIM];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const long long head = blockIdx.y;
  const int first_row = blockIdx.x * BLOCK_Q, mine = first_row + warp * ROWS;
  q += head * q_len * DIM;
  k += head * kv_len * DIM;
  v += head * kv_len * DIM;

  float out_rows[ROWS][COLUMNS] = {}, m[ROWS], l[ROWS] = {};
  for (float& maximum : m) maximum = -infinity();
  load_tile(q_tile, q, first_row, q_len);
  for (int first = 0; first < kv_len; first += BLOCK_KV) {
    __syncthreads();  // every warp is done with the last tile
    load_tile(k_tile, k, first, kv_len);
    load_tile(v_tile, v, first, kv_len);
    __syncthreads();  // every thread has written its part of this one
    float s[ROWS], shrink[ROWS];
    scores(s, &q_tile[warp * ROWS], k_tile[lane], scale);
    mask_tile(s, first + lane < kv_len);
    online_softmax_update(s, m, l, shrink);
    accumulate(out_rows, s, shrink, v_tile, lane);
  }
  const long long row = head * q_len + mine;
  finish(out + row * DIM, lse + row, out_rows, m, l, q_len - mine, lane);
}
