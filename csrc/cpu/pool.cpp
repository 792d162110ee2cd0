#include "cpu/pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace vispec::cpu {
namespace {

struct Job {
  const std::function<void(int64_t)>* body;
  int64_t count;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) (*body)(i);
  }
};

class Pool {
 public:
  bool try_run(int64_t count, int helpers, const std::function<void(int64_t)>& body) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    Job job;
    job.body = &body;
    job.count = count;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int started = static_cast<int>(workers_.size()); started < helpers; ++started)
        workers_.emplace_back([this] { serve(); });
      job_ = &job;
      places_ = helpers;
    }
    wake_.notify_all();
    job.work();
    {
      // From here on no worker can join; those that did are waited for.
      std::unique_lock<std::mutex> lock(mutex_);
      job_ = nullptr;
      done_.wait(lock, [this] { return active_ == 0; });
    }
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return job_ != nullptr && places_ > 0; });
      Job* job = job_;
      --places_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int places_ = 0, active_ = 0;
};

std::atomic<int> thread_count{1};
std::atomic<Pool*> shared_pool{nullptr};
std::atomic<pid_t> pool_process{0};

// The pool is never destroyed: its threads may outlive static destruction. After a fork the child has the
// object without the threads, so it gets a new one; the old one is left alone, since its mutex may be held
// for ever.
Pool& pool() {
  static std::mutex creation;
  const pid_t process = getpid();
  if (pool_process.load() != process) {
    std::lock_guard<std::mutex> lock(creation);
    if (pool_process.load() != process) {
      shared_pool.store(new Pool);
      pool_process.store(process);
    }
  }
  return *shared_pool.load();
}

}  // namespace

void set_num_threads(int count) { thread_count.store(std::clamp(count, 1, 256)); }
int num_threads() { return thread_count.load(); }

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads(), count)) - 1;
  if (helpers > 0 && pool().try_run(count, helpers, body)) return;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace vispec::cpu
