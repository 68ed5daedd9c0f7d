// Runs a CUDA kernel on a CPU, one block after the other, to judge its arithmetic and its barriers.
//
// Every thread of a block is a coroutine that runs until a barrier. Threads run in turn, and a warp runs
// as far ahead of the others as the barriers let it: in ascending or in descending order, so that of two
// warps which race, each comes first once. Shared memory starts as NaN. Nothing here is fast, and the
// order within a warp, memory alignment and bank conflicts are not modelled.
//
// Compile with -DKERNEL='"file.cu"'. Needs ucontext and ELF sections: Linux.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace on_cpu {

enum class State { ready, at_warp, at_block, done };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  State state = State::ready;
};

std::vector<Thread> threads;
ucontext_t scheduler;
int current;
std::function<void()> kernel;
// Two sets: a thread that is one exchange ahead must not overwrite what the others still read.
std::vector<float> exchanged[2];
std::vector<int> parity;
constexpr int warp_size = 32;

void wait_at(State barrier) {
  threads[current].state = barrier;
  swapcontext(&threads[current].context, &scheduler);
}

float exchange(float x, int lane) {
  const int self = current, first = self / warp_size * warp_size;
  std::vector<float>& set = exchanged[parity[self] ^= 1];
  set[self] = x;
  wait_at(State::at_warp);
  return set[first + lane % warp_size];
}

}  // namespace on_cpu

struct Index {
  int x = 0, y = 0;
};
Index threadIdx, blockIdx;

#define __global__
#define __device__ static
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory[], __stop_shared_memory[];

static void __syncthreads() { on_cpu::wait_at(on_cpu::State::at_block); }
static float __shfl_xor_sync(unsigned, float x, int apart) {
  return on_cpu::exchange(x, (on_cpu::current % on_cpu::warp_size) ^ apart);
}
static float __shfl_sync(unsigned, float x, int lane) { return on_cpu::exchange(x, lane); }
static float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#include KERNEL

namespace on_cpu {

void start() {
  kernel();
  threads[current].state = State::done;
}

bool all(int first, int count, State a, State b) {
  for (int t = first; t < first + count; ++t) {
    if (threads[t].state != a && threads[t].state != b) return false;
  }
  return true;
}

// Runs one warp until each of its threads waits for other warps, or is done.
void run_warp(int first, bool descending) {
  do {
    for (int lane = 0; lane < warp_size; ++lane) {
      current = first + (descending ? warp_size - 1 - lane : lane);
      if (threads[current].state != State::ready) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &threads[current].context);
    }
    if (!all(first, warp_size, State::at_warp, State::at_warp)) return;
    for (int t = first; t < first + warp_size; ++t) threads[t].state = State::ready;
  } while (true);
}

// False if a barrier is not reached by all threads that it waits for.
bool run_block(int count, bool descending) {
  std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  for (Thread& thread : threads) {
    thread.state = State::ready;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  const int warps = count / warp_size;
  while (!all(0, count, State::done, State::done)) {
    for (int w = 0; w < warps; ++w) run_warp((descending ? warps - 1 - w : w) * warp_size, descending);
    if (!all(0, count, State::at_block, State::done)) return false;
    for (Thread& thread : threads) {
      if (thread.state == State::at_block) thread.state = State::ready;
    }
  }
  return true;
}

}  // namespace on_cpu

// The kernel's launch, with its arguments; 0, or 1 if a barrier is not reached by all.
extern "C" int launch(const float* q, const float* k, const float* v, float* out, float* lse, int heads,
                      int q_len, int kv_len, float scale, int descending) {
  using namespace on_cpu;
  kernel = [=] { attention(q, k, v, out, lse, q_len, kv_len, scale); };
  const int count = WARPS * LANES;
  threads = std::vector<Thread>(count);
  exchanged[0] = exchanged[1] = std::vector<float>(count);
  parity = std::vector<int>(count);
  const int blocks = (q_len + BLOCK_Q - 1) / BLOCK_Q;
  for (int b = 0; b < blocks * heads; ++b) {
    blockIdx.x = b % blocks, blockIdx.y = b / blocks;
    if (!run_block(count, descending)) return 1;
  }
  return 0;
}
