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
  // plan(self) calls take() for each array; it runs twice, first to count and then to place them.
  template <class Plan>
  void lay_out(const Plan& plan) {
    used_ = 0;
    placing_ = false;
    plan(*this);
    if (used_ > size_) grow(used_);
    used_ = 0;
    placing_ = true;
    plan(*this);
  }
  // n objects on cache lines of their own.
  template <class T>
  void take(T*& array, std::int64_t n) {
    if (placing_) array = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  void grow(std::size_t bytes) {
    memory_.reset();
    size_ = 0;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    memory_.reset(static_cast<char*>(p));
    size_ = bytes;
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  std::size_t size_ = 0, used_ = 0;
  bool placing_ = false;
};

inline Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

// What the tasks of a call share, owned by the calling thread, whose own tasks use scratch().
inline Scratch& shared_scratch() {
  thread_local Scratch memory;
  return memory;
}

// Below 2 MFLOP, some 10 us, waking the other threads costs more than they save.
inline int useful_threads(const tilewise_call& c) {
  const double work = 2.0 * static_cast<double>(c.batch * c.q_heads * c.q_len) *
                      static_cast<double>(c.kv_len * (c.head_dim + c.v_dim));
  return work < 2e6 ? 1 : c.threads;
}

template <class Task>
struct Pool {
  const Task& task;
  std::int64_t tasks;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};

  static void run(std::int64_t, std::int64_t, void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    [[maybe_unused]] const Session session{};
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
