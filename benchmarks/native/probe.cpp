// SPDX-License-Identifier: Apache-2.0
// What the machine can do at best: multiply-adds per second, read bandwidth by working set, and how
// long a cache line takes from one core to another.
// Compiled on demand for the machine it runs on; called from benchmarks/probe.py.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTER "+v"
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define REGISTER "+x"
#elif defined(__x86_64__)
#define VECTOR_BYTES 16
#define REGISTER "+x"
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define REGISTER "+w"
#else
#error "no vector registers known for this processor"
#endif

namespace {

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int kLanes = VECTOR_BYTES / sizeof(T);
};

// More chains than latency times ports of any core so far, in registers of the smallest file.
constexpr int kChains = 12;

// Not inlined: where a processor has 16 registers, compilers keep sums of inlined copies in memory.
template <typename T>
__attribute__((noinline)) void multiply_add(long rounds) {
  using V = typename Vector<T>::type;
  V sums[kChains] = {}, a = {}, b = {};
  a += T(0.999);
  b += T(1e-5);
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) {
      sums[c] = a * sums[c] + b;
      asm volatile("" : REGISTER(sums[c]));
    }
  }
}

#if defined(__AVX512BF16__)
__attribute__((noinline)) void dot_bfloat16(long rounds) {
  __m512 sums[kChains] = {};
  __m512bh a = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) {
      sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
      asm volatile("" : "+v"(sums[c]));
    }
  }
}
#endif

// Once over the floats, many vectors abreast; from the last to the first if `back`.
void read_all(const float* data, size_t count, bool back) {
  using V = Vector<float>::type;
  constexpr int kAbreast = 8;
  constexpr size_t kFloats = kAbreast * Vector<float>::kLanes;
  V sums[kAbreast] = {};
  for (size_t i = 0; i + kFloats <= count; i += kFloats) {
    const float* from = data + (back ? count - kFloats - i : i);
#pragma GCC unroll 8
    for (int k = 0; k < kAbreast; k++) {
      V value;
      std::memcpy(&value, from + k * Vector<float>::kLanes, sizeof value);
      sums[k] += value;
    }
  }
  for (V& sum : sums) asm volatile("" : REGISTER(sum));
}

// Seconds from the moment all threads are there to the moment the last is done.
template <typename Body>
double run_on(int threads, const Body& body) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> here{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> team;
  for (int t = 1; t < threads; t++) {
    team.emplace_back([&, t] {
      here.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      body(t);
    });
  }
  while (here.load() < threads - 1) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  body(0);
  for (std::thread& thread : team) thread.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr int kRuns = 10;

// The best of so many runs of about `seconds` each: work(t, n) does n units of work on thread t.
// Short ones, so that some fall between two interruptions by other processes.
template <typename Work>
double best_rate(int threads, double seconds, double per_unit, const Work& work, int runs = kRuns) {
  long units = 1;
  double taken = run_on(threads, [&](int t) { work(t, units); });
  while (taken < seconds / 2) {
    units *= 2;
    taken = run_on(threads, [&](int t) { work(t, units); });
  }
  double best = taken;
  for (int run = 0; run < runs; run++) {
    const double again = run_on(threads, [&](int t) { work(t, units); });
    if (again < best) best = again;
  }
  return threads * per_unit * units / best;
}

// Keeps the calling thread on the index-th of the processors that it may use.
void stay_on(int index) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
#endif
}

// A number that the first two processors write in turns: seconds from a write to the other's
// answer, halved. On a thread of its own, so that nobody else is kept on a processor.
double exchange(long turns) {
  alignas(128) std::atomic<long> number{0};
  double taken = 0;
  std::thread([&] {
    taken = run_on(2, [&](int t) {
      stay_on(t);
      for (long n = t; n < 2 * turns; n += 2) {
        while (number.load(std::memory_order_acquire) != n) {
        }
        number.store(n + 1, std::memory_order_release);
      }
    });
  }).join();
  return taken / static_cast<double>(2 * turns);
}

}  // namespace

// Floating-point operations per second; kind 0: float32, 1: float64, 2: bfloat16 products into
// float32 sums. 0 where the processor has no such instruction.
extern "C" double peak_flops(int kind, int threads, double seconds) {
  constexpr long kRounds = 1000;
  const double chains = 2.0 * kChains * kRounds;
  if (kind == 0) {
    return best_rate(threads, seconds, chains * Vector<float>::kLanes,
                     [](int, long n) { multiply_add<float>(n * kRounds); });
  }
  if (kind == 1) {
    return best_rate(threads, seconds, chains * Vector<double>::kLanes,
                     [](int, long n) { multiply_add<double>(n * kRounds); });
  }
#if defined(__AVX512BF16__)
  if (kind == 2) {
    return best_rate(threads, seconds, chains * 32, [](int, long n) { dot_bfloat16(n * kRounds); });
  }
#endif
  return 0;
}

// Bytes per second read by all threads together, each from a block of its own; 0 if out of memory.
// The better of two orders: always forwards, which a cache that drops what was used longest ago
// never serves once the block is larger than it, and to and fro, where it serves the end of the
// last pass.
extern "C" double read_bandwidth(int threads, size_t bytes_per_thread, double seconds) {
  const size_t block = bytes_per_thread / 4096 * 4096, distance = block + 4096;
  char* data = static_cast<char*>(std::aligned_alloc(4096, distance * threads));
  if (data == nullptr || block == 0) return 0;
  std::memset(data, 0, distance * threads);
  double best = 0;
  for (const bool turning : {false, true}) {
    const auto read = [=](int t, long n) {
      const float* mine = reinterpret_cast<const float*>(data + t * distance);
      for (long k = 0; k < n; k++) {
        read_all(mine, block / sizeof(float), turning && k % 2 == 1);
        asm volatile("" ::: "memory");
      }
    };
    best = std::max(best, best_rate(threads, seconds, static_cast<double>(block), read, kRuns / 2));
  }
  std::free(data);
  return best;
}

// The best of some short runs: in others something came between.
extern "C" double exchange_seconds() {
  constexpr long kTurns = 5000;
  double best = exchange(kTurns);
  for (int repeat = 0; repeat < 9; repeat++) {
    const double again = exchange(kTurns);
    if (again < best) best = again;
  }
  return best;
}
