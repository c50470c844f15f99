// A launch as ThreadSanitizer sees it, in the build that looks for races (MMFUSE_RACES).
//
// Each thread of a block is a thread to the sanitizer, which counts two accesses as a race unless
// one of these orders them: a launch comes after all that the host and earlier launches did; a
// __syncthreads orders the threads of its block. Nothing else does. By CUDA's programming guide
// shuffles and votes order no memory; no kernel here has a __syncwarp, and the shim has none.
//
// Blocks are not ordered either. There are two crews, each an operating system's thread with fibers
// and shared memory of its own. The blocks of one crew reuse its fibers (to make a sanitizer's
// thread anew for each block takes long) and are therefore ordered. A block's crew is the parity of
// the ones in its number: whatever distance two blocks have, some pairs of it are of both crews.
// Of a large grid only the first and the last blocks are watched, because most of the time goes
// into the sanitizer's clocks; a third crew does the others, whose accesses nobody sees.
#pragma once

#include <cstddef>
#include <functional>

#if defined(MMFUSE_RACES)
#include <sanitizer/tsan_interface.h>

#include <condition_variable>
#include <mutex>
#include <thread>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
}
#endif

namespace cuda_on_cpu {

#if defined(MMFUSE_RACES)

constexpr size_t kCrews = 3;
// Its blocks are not watched: the sanitizer takes all of their threads for the crew's own.
constexpr size_t kUnwatched = 2;
constexpr size_t kWatchedEnd = 4;

inline size_t crew_of(size_t block, size_t blocks) {
  const bool end = block < kWatchedEnd || block + kWatchedEnd >= blocks;
  return end ? __builtin_popcountll(block) % 2 : kUnwatched;
}

// An operating system's thread that does one thing at a time while the caller waits.
class Worker {
 public:
  // Its locks order the caller and the thread, but not the fibers, which are threads to themselves.
  void run(const std::function<void()>& work) {
    if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = &work;
    changed_.notify_all();
    changed_.wait(lock, [this] { return work_ == nullptr; });
  }

 private:
  void serve() {
    // The shim's own work is none of the kernels'.
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    // All of the library's thread-local memory is made here, and not by a kernel's first access.
    static thread_local volatile char first;
    first = 1;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return work_ != nullptr; });
      (*work_)();
      work_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void()>* work_ = nullptr;
  std::thread thread_;
};

inline void* new_thread() { return __tsan_create_fiber(0); }
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void end_thread(void* thread) {
  if (thread != nullptr) __tsan_destroy_fiber(thread);
}
inline void release(char& object) { __tsan_release(&object); }
inline void acquire(char& object) { __tsan_acquire(&object); }

#else

constexpr size_t kCrews = 1;

constexpr size_t kUnwatched = 1;

inline size_t crew_of(size_t, size_t) { return 0; }

class Worker {
 public:
  void run(const std::function<void()>& work) { work(); }
};

inline void* new_thread() { return nullptr; }
inline void* this_thread() { return nullptr; }
inline void end_thread(void*) {}
inline void release(char&) {}
inline void acquire(char&) {}

#endif

// The meetings that order the threads of a crew's blocks. Two of each: a thread that is already on
// its way to the next meeting must not be taken to have been at the last one.
class Meetings {
 public:
  void begin_launch() { blocks_ = 0; }
  void begin_block() { ++blocks_; }

  // Called by each thread, before its first access and after its last one. The launch comes after
  // all blocks of earlier ones.
  void enter(char& launch) { acquire(blocks_ == 1 ? launch : ends_[(blocks_ - 1) % 2]); }
  void leave() { release(ends_[blocks_ % 2]); }

  // Called by each thread, when it comes to a barrier and when it goes on.
  void come(unsigned round) { release(rounds_[round % 2]); }
  void go(unsigned round) { acquire(rounds_[round % 2]); }

  // Called by the host after a launch.
  void end_launch() {
    acquire(ends_[0]);
    acquire(ends_[1]);
  }

 private:
  unsigned blocks_ = 0;  // of this launch
  char ends_[2];
  char rounds_[2];
};

}  // namespace cuda_on_cpu
