// Runs calls of the C ABI that come in as bytes: the kernels on another processor under an emulator, or
// under a sanitizer, without a Python that would have to run there too.
//
//   tilewise-check --features
//   tilewise-check --isa NAME [--threads T] [--callers N] < calls > results
//
// Each call is run with T threads made for it. N callers take calls from the input and run them at the
// same time. A number is a 64-bit integer of this machine's byte order, which has to be the sender's.
//
//   call    direction (0 forward, 1 backward), sizeof(tilewise_call), P, A,
//           the tilewise_call, with any bytes where it has pointers,
//           P times: offset of a pointer in the tilewise_call, number of its array, offset in that array,
//           A times: size of an array in bytes; A times: its bytes
//   result  number of the call, 0 if it ran or 1, length of a text, the text: the family that ran or why
//           the call was refused; then, if it ran, the bytes of all arrays
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../api.h"

namespace {

// AddressSanitizer sees every access beyond an array if nothing of ours lies there; without it, bytes on
// both sides show at least what was written.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 0;
#else
constexpr std::size_t kGuard = 64;
#endif
constexpr unsigned char kGuardByte = 0xa5;
constexpr std::int64_t kMost = std::int64_t{1} << 30;  // a count or size beyond this is no call of ours

void read_bytes(void* to, std::size_t size) {
  if (std::fread(to, 1, size, stdin) != size) throw std::runtime_error("the input ends within a call");
}

std::int64_t read_number() {
  std::int64_t number;
  read_bytes(&number, sizeof number);
  return number;
}

std::size_t read_size() {
  const std::int64_t size = read_number();
  if (size < 0 || size > kMost) throw std::runtime_error("the input is not a sequence of calls");
  return static_cast<std::size_t>(size);
}

void write_bytes(const void* from, std::size_t size) {
  if (std::fwrite(from, 1, size, stdout) != size) throw std::runtime_error("a result cannot be written");
}

void write_number(std::int64_t number) { write_bytes(&number, sizeof number); }

class Array {
 public:
  explicit Array(std::size_t size) : size_(size) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size + 2 * kGuard) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(p));
    std::memset(memory_.get(), kGuardByte, size + 2 * kGuard);
  }
  unsigned char* data() { return memory_.get() + kGuard; }
  std::size_t size() const { return size_; }
  bool is_guarded() const {
    for (std::size_t i = 0; i < kGuard; ++i)
      if (memory_[i] != kGuardByte || memory_[kGuard + size_ + i] != kGuardByte) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char[], Free> memory_;
  std::size_t size_;
};

struct Request {
  std::int64_t number = 0;
  bool backward = false;
  tilewise_call call{};
  std::vector<Array> arrays;
};

// False at the end of the input.
bool read_request(Request& request) {
  std::int64_t direction;
  const std::size_t got = std::fread(&direction, 1, sizeof direction, stdin);
  if (got == 0 && std::feof(stdin)) return false;
  if (got != sizeof direction) throw std::runtime_error("the input ends within a call");
  request.backward = direction == 1;
  if (read_size() != sizeof request.call) throw std::runtime_error("the calls are laid out in another way");
  const std::size_t pointers = read_size(), arrays = read_size();
  read_bytes(&request.call, sizeof request.call);
  std::vector<std::size_t> places(3 * pointers);
  for (std::size_t& place : places) place = read_size();
  std::vector<std::size_t> sizes(arrays);
  for (std::size_t& size : sizes) size = read_size();
  for (const std::size_t size : sizes) {
    request.arrays.emplace_back(size);
    read_bytes(request.arrays.back().data(), size);
  }
  for (std::size_t i = 0; i < places.size(); i += 3) {
    if (places[i] > sizeof request.call - sizeof(void*) || places[i + 1] >= arrays ||
        places[i + 2] >= sizes[places[i + 1]])
      throw std::runtime_error("a pointer leads nowhere");
    const void* target = request.arrays[places[i + 1]].data() + places[i + 2];
    std::memcpy(reinterpret_cast<char*>(&request.call) + places[i], &target, sizeof target);
  }
  return true;
}

void write_result(Request& request, bool ran, const std::string& text) {
  write_number(request.number);
  write_number(ran ? 0 : 1);
  write_number(static_cast<std::int64_t>(text.size()));
  write_bytes(text.data(), text.size());
  if (ran)
    for (Array& array : request.arrays) write_bytes(array.data(), array.size());
  if (std::fflush(stdout) != 0) throw std::runtime_error("a result cannot be written");
}

struct Options {
  std::string isa;
  std::int32_t threads = 1, callers = 1;
};

// Takes calls until there are no more. Another caller may be inside the kernels meanwhile.
void serve(const Options& options, std::mutex& input, std::mutex& output, std::int64_t& count) {
  for (;;) {
    Request request;
    {
      const std::lock_guard<std::mutex> lock(input);
      if (!read_request(request)) return;
      request.number = count++;
    }
    request.call.threads = options.threads;
    const auto run = request.backward ? &tilewise_backward : &tilewise_forward;
    const bool ran = run(&request.call, options.isa.c_str()) == 0;
    const std::string text = ran ? tilewise_last_isa() : tilewise_error();
    for (const Array& array : request.arrays)
      if (!array.is_guarded()) throw std::runtime_error("the kernels wrote outside of an array");
    const std::lock_guard<std::mutex> lock(output);
    write_result(request, ran, text);
  }
}

// What goes wrong in one caller ends the program: the calls that follow could not be trusted.
void serve_or_exit(const Options& options, std::mutex& input, std::mutex& output, std::int64_t& count) {
  try {
    serve(options, input, output, count);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tilewise-check: %s\n", error.what());
    std::_Exit(1);
  }
}

// The library's parallel_for: a thread for each of [begin, end).
int run_on_threads(std::int64_t begin, std::int64_t end, std::int64_t, tilewise_range func, void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t i = begin + 1; i < end; ++i) threads.emplace_back(func, i, i + 1, context);
  if (begin < end) func(begin, begin + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--isa") {
      options.isa = argv[i + 1];
    } else if (name == "--threads") {
      options.threads = std::atoi(argv[i + 1]);
    } else if (name == "--callers") {
      options.callers = std::atoi(argv[i + 1]);
    } else {
      return false;
    }
  }
  return argc % 2 == 1 && !options.isa.empty() && options.threads >= 1 && options.callers >= 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--features") == 0) {
    std::printf("features: %s\nisas: %s\n", tilewise_cpu_features(), tilewise_isas());
    return 0;
  }
  Options options;
  if (!parse(argc, argv, options)) {
    std::fputs("usage: tilewise-check --features | --isa NAME [--threads T] [--callers N] < calls\n", stderr);
    return 2;
  }
  if (options.threads > 1) tilewise_set_parallel_for(&run_on_threads);
  std::mutex input, output;
  std::int64_t count = 0;
  std::vector<std::thread> callers;
  for (std::int32_t i = 1; i < options.callers; ++i)
    callers.emplace_back([&] { serve_or_exit(options, input, output, count); });
  serve_or_exit(options, input, output, count);
  for (std::thread& caller : callers) caller.join();
  return 0;
}
