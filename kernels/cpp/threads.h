// Work for the threads of XLA's pool.

#ifndef KERNELS_CPP_THREADS_H_
#define KERNELS_CPP_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace kernels {

// Calls work(0) .. work(count - 1) in this thread and in free threads of the pool. It waits only
// for calls that have begun, so that it may itself run in one of the pool's threads.
inline void InParallel(xla::ffi::ThreadPool& pool, int64_t count,
                       std::function<void(int64_t)> work) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  const std::function<void()> help = [progress, count, work] {
    for (int64_t i; (i = progress->next++) < count;) {
      work(i);
      std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == count) progress->all_done.notify_all();
    }
  };
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); ++i) pool.Schedule(std::function<void()>(help));
  help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
}

}  // namespace kernels

#endif  // KERNELS_CPP_THREADS_H_
