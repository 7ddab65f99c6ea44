// Threads of the caller: every worker runs once, and no result depends on how many there are.
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "api/small_problem.hpp"
#include "cpu/executor.hpp"
#include "registry.hpp"

namespace heed::test {
namespace {

class CountingExecutor : public Executor {
 public:
  CountingExecutor(int workers, bool in_turn) : workers_(workers), in_turn_(in_turn) {}
  int concurrency() const override { return workers_; }
  void run(int workers, void (*body)(void* context, int worker), void* context) override {
    ++calls;
    most = std::max(most, workers);
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker) {
      threads.emplace_back(body, context, worker);
      if (in_turn_) threads.back().join();
    }
    if (!in_turn_)
      for (std::thread& thread : threads) thread.join();
  }

  int calls = 0;
  int most = 0;

 private:
  int workers_;
  bool in_turn_;
};

const Sizes kSizes{.batch = 2,
                   .seqlen_q = 210,
                   .seqlen_k = 230,
                   .heads_q = 4,
                   .heads_k = 2,
                   .head_dim = 24,
                   .head_dim_v = 24};

std::vector<float> everything(const SmallProblem& small) {
  std::vector<float> all;
  for (const auto* part : {&small.out, &small.lse, &small.dq, &small.dk, &small.dv})
    all.insert(all.end(), part->begin(), part->end());
  return all;
}

std::vector<float> results(const Device& device, Queue queue) {
  SmallProblem small(kSizes);
  small.forward.band = kCausal;
  EXPECT_EQ(plan_and_run(small.forward, device, {}, queue).message(), "");
  EXPECT_EQ(plan_and_run(small.backward, device, {}, queue).message(), "");
  return everything(small);
}

TEST(Executors, ResultsDoNotDependOnTheWorkers) {
  for (Device device : cpu_devices()) {
    SCOPED_TRACE(name_of(device.arch));
    device.units = 1;
    const std::vector<float> expected = results(device, {});
    for (const int workers : {1, 2, 3, 7})
      for (const bool in_turn : {false, true}) {
        CountingExecutor executor(workers, in_turn);
        device.units = workers;
        const std::vector<float> got = results(device, executor);
        EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * 4), 0)
            << workers << " workers" << (in_turn ? " in turn" : "");
        EXPECT_LE(executor.most, workers);
        if (workers > 1 && device.arch != Arch::reference) {
          EXPECT_GT(executor.calls, 0);
        }
      }
  }
}

// Few queries: the keys are split into parts, which a worker prepares before it takes them.
TEST(Executors, ADecodeDoesNotDependOnTheWorkers) {
  const Sizes sizes{.batch = 2,
                    .seqlen_q = 2,
                    .seqlen_k = 2600,
                    .heads_q = 8,
                    .heads_k = 2,
                    .head_dim = 24,
                    .head_dim_v = 24};
  for (Device device : cpu_devices()) {
    SCOPED_TRACE(name_of(device.arch));
    std::vector<float> expected;
    for (const int workers : {1, 2, 3, 7}) {
      SmallProblem small(sizes);
      small.forward.band = kCausal;
      device.units = workers;
      CountingExecutor executor(workers, false);
      EXPECT_EQ(plan_and_run(small.forward, device, {}, executor).message(), "");
      if (device.arch != Arch::reference) {
        const auto made = plan(small.forward, device);
        ASSERT_TRUE(made.ok());
        EXPECT_EQ(made->splits, 5);  // else the test proves little
      }
      if (expected.empty()) expected = everything(small);
      EXPECT_EQ(everything(small), expected) << workers << " workers";
    }
  }
}

// A plan for more workers than the executor runs at once still gives every worker its turn.
TEST(Executors, MayBeSmallerThanThePlan) {
  const Device device{.arch = Device::cpu()->arch, .units = 4};
  CountingExecutor one(1, true);
  EXPECT_EQ(results(device, one), results({.arch = device.arch, .units = 1}, {}));
}

TEST(Executors, OneLineCallUsesTheCallersThreads) {
  SmallProblem small(kSizes);
  CountingExecutor executor(3, false);
  Scratch scratch(1 << 24);
  EXPECT_EQ(forward(small.forward, scratch.workspace(), executor).message(), "");
  EXPECT_GT(executor.calls, 0);
  EXPECT_LE(executor.most, 3);
}

TEST(Executors, PoolRunsEveryWorkerOnce) {
  Executor& pool = Executor::pool();
  EXPECT_GE(pool.concurrency(), 1);
  for (const int workers : {0, 1, 2, 5, 64}) {
    std::array<std::atomic<int>, 64> runs{};
    pool.run(
        workers,
        [](void* context, int worker) { ++static_cast<std::atomic<int>*>(context)[worker]; },
        runs.data());
    for (int worker = 0; worker < 64; ++worker)
      EXPECT_EQ(runs[static_cast<std::size_t>(worker)], worker < workers ? 1 : 0);
  }
}

// One task of the first stage takes long: whoever is done with the rest has to wait for it.
TEST(Stages, StartWhenTheOnesBeforeHaveEnded) {
  for (const int workers : {1, 2, 5})
    for (const bool in_turn : {false, true}) {
      SCOPED_TRACE(std::to_string(workers) + " workers" + (in_turn ? " in turn" : ""));
      CountingExecutor executor(workers, in_turn);
      std::array<std::atomic<int>, 7> first{};
      std::atomic<int> ended = 0, second = 0;
      cpu::run_stages(
          executor, workers,
          cpu::Stage{7,
                     [&](std::int64_t task, int worker) {
                       EXPECT_LT(worker, workers);
                       if (task == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
                       ++first[static_cast<std::size_t>(task)];
                       ++ended;
                     }},
          cpu::Stage{0, [](std::int64_t, int) { ADD_FAILURE() << "a stage without tasks"; }},
          cpu::Stage{3, [&](std::int64_t task, int) {
                       EXPECT_EQ(ended, 7);
                       second += 1 << (8 * task);
                     }});
      for (const auto& runs : first) EXPECT_EQ(runs, 1);
      EXPECT_EQ(second, 0x010101);
      EXPECT_EQ(executor.calls, workers > 1 ? 1 : 0);
    }
}

// A body that computes its worker's tasks itself: what it was told comes next is what it gets.
TEST(Stages, ABodyMayTakeItsTasksItself) {
  for (const int workers : {1, 2, 5})
    for (const bool in_turn : {false, true}) {
      SCOPED_TRACE(std::to_string(workers) + " workers" + (in_turn ? " in turn" : ""));
      CountingExecutor executor(workers, in_turn);
      std::array<std::atomic<int>, 9> runs{};
      std::atomic<int> before = 0, ended = 0, after = 0;
      cpu::run_stages(executor, workers, cpu::Stage{4, [&](std::int64_t, int) { ++before; }},
                      cpu::Stage{9,
                                 [&](cpu::StageTasks& tasks, int worker) {
                                   EXPECT_LT(worker, workers);
                                   std::int64_t expected = tasks.task();
                                   bool more = true;
                                   while (more) {
                                     EXPECT_EQ(before, 4);
                                     EXPECT_EQ(tasks.task(), expected);
                                     ++runs[static_cast<std::size_t>(tasks.task())];
                                     ++ended;
                                     const bool has_next = tasks.has_next();
                                     if (has_next) expected = tasks.next();
                                     more = tasks.finish();
                                     EXPECT_EQ(more, has_next);
                                   }
                                 }},
                      cpu::Stage{3, [&](std::int64_t, int) {
                                   EXPECT_EQ(ended, 9);
                                   ++after;
                                 }});
      for (const auto& of_task : runs) EXPECT_EQ(of_task, 1);
      EXPECT_EQ(after, 3);
    }
}

const Device& two_workers() {
  static const Device device{.arch = Device::cpu()->arch, .units = 2};
  return device;
}

// Returns when two workers are in it at the same time.
void meet(void* context, int /*worker*/) {
  auto& arrived = *static_cast<std::atomic<int>*>(context);
  ++arrived;
  while (arrived < 2) std::this_thread::yield();
}

TEST(Executors, CallsFromManyThreadsAtOnce) {
  const std::vector<float> expected = results(two_workers(), {});
  std::array<std::vector<float>, 16> got;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < got.size(); ++i)
    threads.emplace_back([&result = got[i], i] {
      CountingExecutor own(2, false);
      // Some with the pool, some with threads of their own; each plans too.
      result = results(two_workers(), i % 4 == 3 ? Queue(own) : Queue());
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::vector<float>& result : got) EXPECT_EQ(result, expected);
}

TEST(Executors, ACallInsideThePool) {
  const std::vector<float> expected = results(two_workers(), {});
  std::array<std::vector<float>, 4> got;
  Executor::pool().run(
      static_cast<int>(got.size()),
      [](void* context, int worker) {
        static_cast<std::vector<float>*>(context)[worker] = results(two_workers(), {});
      },
      got.data());
  for (const std::vector<float>& result : got) EXPECT_EQ(result, expected);
}

// Ends a forked child that hangs.
constexpr unsigned kHangSeconds = 300;

// Calls body in a forked child, which must end with status 0.
template <class Body>
void expect_child(const Body& body) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(kHangSeconds);
    body();
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

TEST(Processes, AForkedChildHasThreadsOfItsOwn) {
  const std::vector<float> expected = results(two_workers(), {});
  expect_child([&] {
    EXPECT_EQ(results(two_workers(), {}), expected);
    std::atomic<int> arrived{0};
    if (Executor::pool().concurrency() >= 2) Executor::pool().run(2, meet, &arrived);
    expect_child([&] { EXPECT_EQ(results(two_workers(), {}), expected); });
  });
  EXPECT_EQ(results(two_workers(), {}), expected);
}

TEST(Processes, AChildForkedWhileThePoolRuns) {
  const std::vector<float> expected = results(two_workers(), {});
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0};
  std::thread other([&] {
    for (; !stop; ++calls)
      Executor::pool().run(
          2, [](void* /*context*/, int /*worker*/) {}, nullptr);
  });
  for (int i = 0; i < 10; ++i) {
    for (const int seen = calls; calls == seen;) std::this_thread::yield();
    expect_child([&] { EXPECT_EQ(results(two_workers(), {}), expected); });
  }
  stop = true;
  other.join();
}

TEST(Processes, AnExitWhileThePoolRuns) {
  expect_child([] {
    std::atomic<int> calls{0};
    std::thread([&calls] {
      SmallProblem small(kSizes);
      const Plan made = plan(small.forward, two_workers()).value();
      Scratch scratch(made.workspace_bytes);
      for (;; ++calls) EXPECT_TRUE(run(made, small.forward, scratch.workspace()).ok());
    }).detach();
    while (calls < 3) std::this_thread::yield();
    std::exit(0);
  });
}

TEST(Processes, WithoutMoreThreadsTheCallerDoesTheWork) {
  const std::vector<float> expected = results(two_workers(), {});
  expect_child([&] {
    pthread_attr_t stack_too_large;
    pthread_attr_init(&stack_too_large);
    ASSERT_EQ(pthread_attr_setstacksize(&stack_too_large, std::size_t{1} << 60), 0);
    ASSERT_EQ(pthread_setattr_default_np(&stack_too_large), 0);
    EXPECT_THROW(std::thread([] {}).join(), std::system_error);
    EXPECT_EQ(results(two_workers(), {}), expected);
  });
}

}  // namespace
}  // namespace heed::test
