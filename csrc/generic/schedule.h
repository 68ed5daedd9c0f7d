// Work is cut into tasks that do not depend on the number of threads, so neither do the results; the
// threads pull tasks from a counter, because causal tasks differ in length.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

// Memory of one worker, kept by its thread from call to call and grown when a call needs more.
class Scratch {
 public:
  float* reserve(std::size_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      void* p = std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
      if (p == nullptr) throw std::bad_alloc();
      memory_.reset(static_cast<float*>(p));
      size_ = floats;
    }
    used_ = 0;
    return memory_.get();
  }
  // The next n floats, on a cache line of their own.
  float* take(std::int64_t n) {
    float* p = memory_.get() + used_;
    used_ += aligned(n);
    return p;
  }
  static std::size_t aligned(std::int64_t n) { return static_cast<std::size_t>((n + 15) / 16 * 16); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t size_ = 0, used_ = 0;
};

inline Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

template <class Task>
struct Pool {
  const Task& task;
  std::int64_t tasks;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};

  static void run(std::int64_t, std::int64_t, void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    try {
      for (std::int64_t t; !pool.failed && (t = pool.next.fetch_add(1)) < pool.tasks;) pool.task(t);
    } catch (const std::bad_alloc&) {
      pool.failed = true;
    }
  }
};

// task(0) ... task(tasks - 1), each once, on up to `threads` threads. False if memory ran out.
template <class Task>
bool run_tasks(std::int64_t tasks, int threads, tilewise_parallel_for parallel_for, const Task& task) {
  Pool<Task> pool{task, tasks};
  const std::int64_t workers = tasks < threads ? tasks : threads;
  if (parallel_for == nullptr || workers <= 1) {
    Pool<Task>::run(0, 1, &pool);
  } else {
    parallel_for(0, workers, 1, &Pool<Task>::run, &pool);
  }
  return !pool.failed;
}

}  // namespace
