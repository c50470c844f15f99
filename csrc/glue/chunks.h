// Cuts a list of tensors into chunks and shares them out between PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

namespace mmfuse::cpu {

// Part of the results: sums are formed per chunk and merged in order, whatever thread did which.
constexpr int64_t kChunk = 32768;

struct Chunk {
  size_t tensor;
  int64_t begin;
  int64_t size;
};

// A list of `count` in memory that a thread keeps for its next call: so large a piece, new each
// time, has malloc tidy up in every step. One list of a type at a time.
template <typename of_t>
std::vector<of_t>& kept_list(size_t count) {
  static thread_local std::vector<of_t> list;
  list.assign(count, of_t{});
  return list;
}

// `slices` have a `size`, in elements; `step_of` one says how many make a chunk. One of these lists
// at a time.
template <typename slice_t, typename F>
const std::vector<Chunk>& make_chunks(const std::vector<slice_t>& slices, const F& step_of) {
  std::vector<Chunk>& chunks = kept_list<Chunk>(0);
  for (size_t t = 0; t < slices.size(); ++t) {
    const int64_t step = step_of(slices[t]);
    for (int64_t begin = 0; begin < slices[t].size; begin += step) {
      chunks.push_back({t, begin, std::min(step, slices[t].size - begin)});
    }
  }
  return chunks;
}

template <typename slice_t>
const std::vector<Chunk>& make_chunks(const std::vector<slice_t>& slices) {
  return make_chunks(slices, [](const slice_t&) { return kChunk; });
}

// How long a call takes on one thread, rather too little: a second thread that comes too late costs
// milliseconds where cores are busy, one that is missing some microseconds. A type of its own, so
// that nobody hands over a number of elements. benchmarks/NOTES.md has where the numbers are from.
struct Nanoseconds {
  double value;
};

inline Nanoseconds operator+(Nanoseconds a, Nanoseconds b) { return {a.value + b.value}; }
inline Nanoseconds operator*(double factor, Nanoseconds a) { return {factor * a.value}; }
constexpr Nanoseconds ns(double value) { return {value}; }

// Less than twice this stays on the calling thread.
constexpr double kNsForThread = 50000;
constexpr Nanoseconds kTask = ns(30);

inline int64_t threads_for(Nanoseconds cost) {
  const double shares = cost.value / kNsForThread;
  if (shares < 2) return 1;
  return static_cast<int64_t>(
      std::min(shares, static_cast<double>(torch::stable::get_num_threads())));
}

// f(i) for every i in [0, count), which together take `cost`. The next index goes to whichever
// thread is free: chunks differ in size, and other processes take cores away.
template <typename F>
void parallel_each(int64_t count, Nanoseconds cost, const F& f) {
  const int64_t threads = std::min(count, threads_for(cost + count * kTask));
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

template <typename F>
void parallel_each(const std::vector<Chunk>& chunks, Nanoseconds cost, const F& f) {
  parallel_each(static_cast<int64_t>(chunks.size()), cost,
                [&](int64_t i) { f(chunks[i], static_cast<size_t>(i)); });
}

// f(i, begin, end) for every stretch i of `step` of the numbers in [0, total), which together take
// `cost`.
template <typename F>
void parallel_steps(int64_t total, int64_t step, Nanoseconds cost, const F& f) {
  parallel_each((total + step - 1) / step, cost,
                [&](int64_t i) { f(i, i * step, std::min(total, (i + 1) * step)); });
}

// Adds in pairs, so that the rounding hardly grows with the count.
inline double pairwise_sum(const double* x, size_t count) {
  if (count <= 8) return std::accumulate(x, x + count, 0.0);
  const size_t half = count / 2;
  return pairwise_sum(x, half) + pairwise_sum(x + half, count - half);
}

// The sum of f(begin, end) over the same stretches.
template <typename F>
double sum_of_steps(int64_t total, int64_t step, Nanoseconds cost, const F& f) {
  std::vector<double> parts((total + step - 1) / step);
  parallel_steps(total, step, cost,
                 [&](int64_t i, int64_t begin, int64_t end) { parts[i] = f(begin, end); });
  return pairwise_sum(parts.data(), parts.size());
}

}  // namespace mmfuse::cpu
