// heed's own thread pool: workers that sleep between calls, and a caller that works along.
#include "cpu/executor.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace heed {
namespace {

int default_threads() {
  if (const char* text = std::getenv("HEED_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1) return std::min(n, 1024);
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// std::condition_variable::wait, compiled by GCC 12, is the one symbol that libstdc++ 11 lacks.
class Signal {
 public:
  Signal() = default;
  Signal(const Signal&) = delete;
  Signal& operator=(const Signal&) = delete;
  ~Signal() { pthread_cond_destroy(&condition_); }

  template <class Predicate>
  void wait(std::unique_lock<std::mutex>& lock, const Predicate& until) {
    while (!until()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
  }
  void notify_one() { pthread_cond_signal(&condition_); }
  void notify_all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Pool final : public Executor {
 public:
  int concurrency() const override { return concurrency_; }

  void run(int workers, void (*body)(void*, int), void* context) override {
    // A second caller and a nested call do all the work themselves, and everyone does at the end.
    std::unique_lock use(in_use_, std::defer_lock);
    if (workers <= 1 || inside_ || !use.try_lock() || !offer(workers, body, context)) {
      for (int w = 0; w < workers; ++w) body(context, w);
      return;
    }
    inside_ = true;
    body(context, 0);
    std::unique_lock lock(mutex_);
    while (next_ < end_) run_one(lock);
    done_.wait(lock, [this] { return pending_ == 0; });
    inside_ = false;
  }

  // The end of the process, or of the library in it. Nobody waits for himself.
  void stop() {
    if (inside_) return;
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
    threads_.clear();
  }

  // In a forked child, whose only thread is the caller: forgets the parent's threads and the locks
  // that they may hold. Threads of its own start when they are first wanted.
  void begin_child() {
    new (&left_behind_) std::vector<std::thread>(std::move(threads_));  // neither joined nor freed
    new (&in_use_) std::mutex;
    new (&mutex_) std::mutex;
    new (&wake_) Signal;
    new (&done_) Signal;
    next_ = end_ = pending_ = 0;
  }

 private:
  // Puts the workers after the first where threads find them, unless there are none any more.
  bool offer(int workers, void (*body)(void*, int), void* context) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return false;
      while (static_cast<int>(threads_.size()) < std::min(workers, concurrency_) - 1)
        if (!start_thread()) break;
      body_ = body;
      context_ = context;
      next_ = 1;
      end_ = workers;
      pending_ = workers - 1;
    }
    wake_.notify_all();
    return true;
  }

  // Where the system has no more threads, those there are do all the work.
  bool start_thread() {
    try {
      threads_.emplace_back([this] { serve(); });
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

  // Takes the next worker index; called and returns with the lock held.
  void run_one(std::unique_lock<std::mutex>& lock) {
    const int worker = next_++;
    const auto body = body_;
    void* const context = context_;
    lock.unlock();
    body(context, worker);
    lock.lock();
    if (--pending_ == 0) done_.notify_one();
  }

  void serve() {
    inside_ = true;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || next_ < end_; });
      if (stop_) return;
      run_one(lock);
    }
  }

  static thread_local bool inside_;

  const int concurrency_ = default_threads();
  std::vector<std::thread> threads_, left_behind_;
  std::mutex in_use_;
  std::mutex mutex_;
  Signal wake_, done_;
  bool stop_ = false;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int next_ = 0;
  int end_ = 0;
  int pending_ = 0;
};

thread_local bool Pool::inside_ = false;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void cpu::wait_for(const std::atomic<std::int64_t>& done, std::int64_t tasks) {
  constexpr int kPauses = 4096;  // some 100 us; then whoever was to finish may want this core
  for (int i = 0; done.load(std::memory_order_acquire) < tasks; ++i) {
    if (i < kPauses) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

Executor& Executor::pool() {
  // Never destroyed, because the caller's threads may compute until the last moment.
  static Pool& pool = []() -> Pool& {
    static Pool& made = *new Pool;
    pthread_atfork(nullptr, nullptr, [] { made.begin_child(); });
    static const struct Ending {
      ~Ending() { made.stop(); }
    } ending;
    return made;
  }();
  return pool;
}

}  // namespace heed
