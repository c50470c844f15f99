// Runs the blocks of a launch: one fiber per thread, resumed in turn whenever what it waits for has
// happened. Fibers and their stacks live as long as the process and serve one block after another.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "races.h"
#include "switching.h"

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kScribbledBytes = 4096;

struct Fiber {
  explicit Fiber(bool watched) { stack.thread = watched ? new_thread() : nullptr; }
  ~Fiber() { end_thread(stack.thread); }

  std::unique_ptr<char[]> memory{new char[kStackBytes]};
  Stack stack{memory.get(), kStackBytes};
  ucontext_t start;
  jmp_buf state;
  bool started = false;
  bool done = false;
  // It can go on when *event differs from the value that it saw before waiting.
  const unsigned* event = nullptr;
  unsigned seen = 0;
  dim3 thread;
};

// Lanes of a warp meet in rounds. Two buffers are enough: to fill the next but one, every lane must
// have read the first.
struct Warp {
  unsigned lanes = 0;
  unsigned arrived = 0;
  unsigned round = 0;
  uint64_t values[2][kWarpSize];
};

// The order of blocks, and of the threads that can go on.
enum class Order { kForward, kReverse, kRandom };

Order named_order(const std::string& name) {
  return name == "reverse" ? Order::kReverse : name == "random" ? Order::kRandom : Order::kForward;
}

Order order_of_environment() {
  const char* name = std::getenv("MMFUSE_SHIM_ORDER");
  return named_order(name != nullptr ? name : "");
}

struct Variable {
  void* address;
  size_t bytes;
};

struct Launches {
  uint64_t count = 0;
  uint64_t most_shared_bytes = 0;
};

std::mutex launch_mutex;
std::map<const void*, Launches> launches;
// Dynamic shared memory that kernels may be launched with, where it was asked for.
std::map<const void*, size_t> permissions;
Order order = order_of_environment();
std::mt19937 random_bits;
std::vector<size_t> turns;
std::vector<Variable> static_shared;
// Fills memory that nobody has written: shared memory, and with `scribbles` a thread's stack.
int poison = 0xFF;
bool scribbles = false;

// A thread and its fibers, which run a block. One crew is enough, but to look for races, see
// races.h.
struct Crew {
  Worker worker;
  std::vector<std::unique_ptr<Fiber>> fibers;
  // The size that a kernel asked for and no more, so that a sanitizer sees what lies beyond.
  std::unique_ptr<char[]> shared_memory;
  Meetings meetings;

  bool watched() const;
};

// They live on when the process ends: a thread waits there.
Crew* const crews = new Crew[kCrews];
Crew* crew = crews;

bool Crew::watched() const { return this != crews + kUnwatched; }

char launch_begins;
std::vector<Warp> warps;
size_t running = 0;
unsigned barrier_arrived = 0;
unsigned barrier_round = 0;
unsigned threads = 0;
const std::function<void()>* kernel = nullptr;
std::string error;
size_t shared_bytes = 0;
jmp_buf scheduler;
Stack scheduler_stack;

// ucontext only makes a fiber's first step; the jumps spare its two system calls per switch.
void yield() {
  Fiber& fiber = *crew->fibers[running];
  if (_setjmp(fiber.state) == 0) {
    leave(fiber.stack, scheduler_stack);
    jump(scheduler, 1);
  }
  arrive(fiber.stack, scheduler_stack);
}

void wait_for(const unsigned& event, unsigned seen) {
  Fiber& fiber = *crew->fibers[running];
  fiber.event = &event;
  fiber.seen = seen;
  yield();
}

// Lets others go first, where all that this one waited for has happened.
void pause() {
  if (order != Order::kForward) yield();
}

void arrange(std::vector<size_t>& turns, size_t count) {
  turns.resize(count);
  std::iota(turns.begin(), turns.end(), size_t{0});
  if (order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), random_bits);
}

// Fills the part of the stack that the kernel's variables will take.
__attribute__((noinline)) void scribble() {
  char area[kScribbledBytes];
  std::memset(area, poison, kScribbledBytes);
  asm volatile("" : : "r"(area) : "memory");  // or the compiler leaves it out
}

void fiber_main() {
  arrive(crew->fibers[running]->stack, scheduler_stack);
  for (;;) {
    if (scribbles) scribble();
    if (crew->watched()) crew->meetings.enter(launch_begins);
    (*kernel)();
    if (crew->watched()) crew->meetings.leave();
    crew->fibers[running]->done = true;
    yield();
  }
}

void resume(size_t index) {
  running = index;
  Fiber& fiber = *crew->fibers[index];
  fiber.event = nullptr;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler) == 0) {
    leave(scheduler_stack, fiber.stack);
    if (fiber.started) jump(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.memory.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
  Stack left;
  arrive(scheduler_stack, left);
}

void prepare_block() {
  if (shared_bytes > 0) std::memset(crew->shared_memory.get(), poison, shared_bytes);
  for (const Variable& variable : static_shared) {
    std::memset(variable.address, poison, variable.bytes);
  }
  auto& fibers = crew->fibers;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>(crew->watched()));
  crew->meetings.begin_block();
  scheduler_stack.thread = crew->watched() ? this_thread() : nullptr;
  warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->done = false;
    fibers[i]->event = nullptr;
    fibers[i]->thread =
        dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    warps[i / kWarpSize].lanes |= 1u << i % kWarpSize;
  }
  barrier_arrived = 0;
}

void run_block() {
  prepare_block();
  arrange(turns, threads);
  for (unsigned left = threads; left > 0;) {
    bool stuck = true;
    for (const size_t i : turns) {
      const Fiber& fiber = *crew->fibers[i];
      if (fiber.done || (fiber.event != nullptr && *fiber.event == fiber.seen)) continue;
      stuck = false;
      // Some rest, so that others get ahead of them by more than one step.
      if (order == Order::kRandom && random_bits() % 2 == 0) continue;
      resume(i);
      if (fiber.done) --left;
    }
    if (stuck) error = "some threads wait at a barrier or warp operation that others skipped";
    if (!error.empty()) return;
  }
}

}  // namespace

void barrier() {
  const unsigned round = barrier_round;
  if (crew->watched()) crew->meetings.come(round);
  if (++barrier_arrived < threads) {
    wait_for(barrier_round, round);
  } else {
    barrier_arrived = 0;
    ++barrier_round;
    pause();
  }
  if (crew->watched()) crew->meetings.go(round);
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Warp& warp = warps[running / kWarpSize];
  if (mask != warp.lanes) error = "a warp operation names other lanes than the warp has";
  const unsigned round = warp.round;
  uint64_t* values = warp.values[round % 2];
  values[running % kWarpSize] = value;
  warp.arrived |= 1u << running % kWarpSize;
  if (warp.arrived != warp.lanes) {
    wait_for(warp.round, round);
  } else {
    warp.arrived = 0;
    ++warp.round;
    pause();
  }
  return values;
}

void* dynamic_shared() { return crew->shared_memory.get(); }

bool permit_shared(const void* function, size_t bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  error.clear();
  const auto before = permissions.find(function);
  if (before != permissions.end() && bytes < before->second) {
    error = "a permission that another thread may need is taken back";
  }
  if (bytes > kSharedBytes - kStaticBytes) error = "more shared memory than a block may have";
  if (!error.empty()) return false;
  permissions[function] = bytes;
  return true;
}

bool run(const void* function, dim3 grid, dim3 block, size_t bytes,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  Launches& mine = launches[function];
  ++mine.count;
  mine.most_shared_bytes = std::max<uint64_t>(mine.most_shared_bytes, bytes);
  error.clear();
  const auto asked = permissions.find(function);
  const size_t most = asked == permissions.end() ? kFreeSharedBytes - kStaticBytes : asked->second;
  if (bytes > most) error = "more dynamic shared memory than was asked for";
  if (!error.empty()) return false;
  shared_bytes = bytes;
  for (size_t i = 0; i < kCrews; ++i) {
    crews[i].shared_memory.reset(new char[bytes]);
    crews[i].meetings.begin_launch();
  }
  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  kernel = &body;
  std::vector<size_t> blocks;
  arrange(blocks, size_t{grid.x} * grid.y * grid.z);
  release(launch_begins);
  for (const size_t i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    crew = &crews[crew_of(i, blocks.size())];
    crew->worker.run(run_block);
    if (error.empty()) continue;
    // Fibers that stopped half-way cannot serve another block.
    crew->fibers.clear();
    return false;
  }
  for (size_t i = 0; i < kCrews; ++i) crews[i].meetings.end_launch();
  return true;
}

const char* failure() { return error.c_str(); }

}  // namespace cuda_on_cpu

// The functions that launches.py calls.
extern "C" {

// Stores the kernels that have been launched, how often, and the most dynamic shared memory that
// each has had; returns how many these are.
size_t shim_launches(const void** kernels, uint64_t* counts, uint64_t* shared_bytes,
                     size_t capacity) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  size_t i = 0;
  for (const auto& [kernel, all] : cuda_on_cpu::launches) {
    if (i < capacity) {
      kernels[i] = kernel;
      counts[i] = all.count;
      shared_bytes[i] = all.most_shared_bytes;
    }
    ++i;
  }
  return i;
}

// Takes back what kernels have been permitted, as in a new process.
void shim_forget_permissions() {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  cuda_on_cpu::permissions.clear();
}

// Sets the order, "forward", "reverse" or "random"; a seed gives one and the same random order.
void shim_set_order(const char* name, uint32_t seed) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  cuda_on_cpu::order = cuda_on_cpu::named_order(name);
  cuda_on_cpu::random_bits.seed(seed);
}

// Before each block shared memory is filled with this byte, and the threads' stacks if it says so.
void shim_set_poison(int byte, bool stacks) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  cuda_on_cpu::poison = byte;
  cuda_on_cpu::scribbles = stacks;
}

// Fills these variables, which are declared __shared__, as well.
void shim_poison_shared(void* const* addresses, const size_t* bytes, size_t count) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  cuda_on_cpu::static_shared.clear();
  for (size_t i = 0; i < count; ++i) {
    cuda_on_cpu::static_shared.push_back({addresses[i], bytes[i]});
  }
}

}  // extern "C"
