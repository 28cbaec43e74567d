// What the kernels need of CUDA, for the host. A warp is 32 fibers; see host_cuda.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <ucontext.h>
using std::fabs;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
#define SHARED_WORDS(name) unsigned* name = host_shared

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx, blockDim;
static unsigned* host_shared;

template <typename T>
static void atomicAdd(T* p, T v) {
  *p += v;
}
template <typename T>
static void atomicMin(T* p, T v) {
  if (v < *p) *p = v;
}
template <typename T>
static void atomicMax(T* p, T v) {
  if (v > *p) *p = v;
}
static int __popc(unsigned x) { return __builtin_popcount(x); }
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)((((unsigned long long)high << 32) | low) >> (shift & 31));
}

// ---- a warp of fibers

enum { HOST_LANES = 32, HOST_STACK_BYTES = 1 << 17, HOST_DONE = -1 };

static struct Fiber {
  ucontext_t context;
  void* at[5];
  bool made;
  int barrier;  // the line of the barrier it waits at, or HOST_DONE
} host_fibers[HOST_LANES];
static ucontext_t host_first;
static void* host_scheduler[5];
static int host_lane;
static const std::function<void()>* host_body;

// The compiler's own jumps: a sanitizer takes the C library's for the end of a stack. Nothing may be
// known to callers of what these functions do to registers: other fibers run inside of them.
#define HOST_JUMPS __attribute__((noipa, no_sanitize("address", "undefined")))

HOST_JUMPS static void host_jump(void** to) { __builtin_longjmp(to, 1); }

// Gives the turn back; comes back with the next one.
HOST_JUMPS static void host_wait(int barrier) {
  Fiber& me = host_fibers[host_lane];
  me.barrier = barrier;
  if (!__builtin_setjmp(me.at)) host_jump(host_scheduler);
}

static void host_fiber() {
  for (;;) {
    (*host_body)();
    host_wait(HOST_DONE);
  }
}

HOST_JUMPS static void host_turn(int lane) {
  Fiber& fiber = host_fibers[lane];
  host_lane = lane;
  threadIdx.x = (unsigned)lane;
  if (__builtin_setjmp(host_scheduler)) return;
  if (fiber.made) host_jump(fiber.at);
  fiber.made = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = malloc(HOST_STACK_BYTES);
  fiber.context.uc_stack.ss_size = HOST_STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, host_fiber, 0);
  swapcontext(&host_first, &fiber.context);
}

static void host_run_warp() {
  static bool backwards;
  for (;;) {
    for (int i = 0; i < HOST_LANES; ++i) host_turn(backwards ? HOST_LANES - 1 - i : i);
    backwards = !backwards;
    const int barrier = host_fibers[0].barrier;
    for (const Fiber& fiber : host_fibers) {
      if (fiber.barrier != barrier) {
        fprintf(stderr, "lanes came to different barriers: %d, %d\n", barrier, fiber.barrier);
        abort();
      }
    }
    if (barrier == HOST_DONE) return;
  }
}

#define __syncwarp() host_wait(__LINE__)

template <typename T>
static T host_exchange(T value, int apart, int line) {
  static T given[HOST_LANES];
  const int lane = host_lane;
  given[lane] = value;
  host_wait(line);
  const T other = given[lane ^ apart];
  host_wait(line);
  return other;
}

#define __shfl_xor_sync(lanes, value, apart) host_exchange(value, apart, __LINE__)

static void host_launch(unsigned grid, unsigned block, unsigned shared_bytes,
                        const std::function<void()>& body) {
  blockDim.x = block;
  host_body = &body;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    if (block == HOST_LANES) {
      host_shared = (unsigned*)malloc(shared_bytes);
      host_run_warp();
      free(host_shared);
    } else {
      for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) body();
    }
  }
}
