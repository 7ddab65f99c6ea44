// How it is computed: plan() picks a kernel and its schedule, run() does it and decides nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "heed/problem.hpp"
#include "heed/status.hpp"

struct CUstream_st;

namespace heed {

struct KernelRow;

// Families in the order of the table; a kernel's arch is the least its device must have.
enum class Arch : std::uint8_t {
  reference,  // textbook fp64 loops, any CPU: the oracle
  scalar,     // the CPU kernels without any instruction beyond the baseline
  avx2,       // AVX2, FMA, F16C
  avx512,     // AVX-512 F, BW, DQ, VL
  avx512_bf16,
  amx_bf16,  // AMX tiles of bf16, beside avx512_bf16
  neon,      // aarch64
  neon_bf16,
  sm80,
  sm90,
  sm100,
  sm120,
};
const char* name_of(Arch arch);

struct Device {
  Arch arch = Arch::scalar;
  int units = 1;       // CPU: threads; GPU: multiprocessors
  int smem_bytes = 0;  // GPU: shared memory that a block can have; 0: the most that its arch has

  bool is_cpu() const { return arch < Arch::sm80; }
  // This machine's CPU, with as many threads as the default executor. HEED_FORCE_ISA=reference|
  // scalar|avx2|avx512|avx512_bf16|amx_bf16|neon|neon_bf16 lowers the instruction set; a set the
  // CPU lacks is an error.
  static Result<Device> cpu();
  // The GPU of that number; -1: the calling thread's current one. Asked once per GPU and process.
  static Result<Device> cuda(int ordinal = -1);
};

// Runs the parts of a CPU kernel. Results never depend on how many workers there are.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int concurrency() const = 0;
  // Calls body(context, worker) once for every worker in [0, workers), at the same time where it
  // can, and returns after all of them have. A body may wait for others that are running, never for
  // one that has not begun.
  virtual void run(int workers, void (*body)(void* context, int worker), void* context) = 0;

  // heed's own threads; HEED_NUM_THREADS sets how many.
  static Executor& pool();
};

// Where work is put: a CUDA stream of the current GPU, or an executor of the CPU (null: heed's own
// pool).
struct Queue {
  Queue() = default;
  // A null stream is the GPU's default stream.
  Queue(CUstream_st* cuda_stream)  // NOLINT(google-explicit-constructor)
      : on_gpu(true), stream(cuda_stream) {}
  Queue(Executor& cpu) : executor(&cpu) {}  // NOLINT(google-explicit-constructor)

  bool on_gpu = false;
  CUstream_st* stream = nullptr;
  Executor* executor = nullptr;
};

// Scratch memory of the caller, on the device that runs; contents before and after mean nothing.
struct Workspace {
  void* data = nullptr;  // aligned to kWorkspaceAlignment
  std::size_t bytes = 0;
};
inline constexpr std::size_t kWorkspaceAlignment = 64;

// Everything that changes only the speed, or the order of additions.
struct Options {
  int splits = 0;              // key splits of decode; 0: chosen from the shape
  bool deterministic = false;  // GPU backward: the same bits every time, slower; all else always is
  const char* force = nullptr;  // a kernel's name from `heed list`; HEED_FORCE_KERNEL does the same
};

// A decision: trivially copyable, made without reading device memory.
struct Plan {
  const KernelRow* row = nullptr;
  int workers = 1;  // CPU threads that have scratch space
  int splits = 1;   // parts of the keys that are computed apart and then merged
  std::size_t workspace_bytes = 0;
  bool deterministic = true;  // every sum in one order
};
// One line: kernel, workers, splits, workspace.
std::string describe(const Plan& plan);

Result<Plan> plan(const ForwardProblem& problem, const Device& device, const Options& options = {});
Result<Plan> plan(const BackwardProblem& problem, const Device& device,
                  const Options& options = {});
// The plan, and for every kernel that the table prefers to the chosen one why it does not serve.
std::string explain(const ForwardProblem& problem, const Device& device,
                    const Options& options = {});
std::string explain(const BackwardProblem& problem, const Device& device,
                    const Options& options = {});

// The problem must be the planned one up to the pointers and the contents of its arrays.
Status run(const Plan& plan, const ForwardProblem& problem, Workspace workspace, Queue queue = {});
Status run(const Plan& plan, const BackwardProblem& problem, Workspace workspace, Queue queue = {});

// plan + run on this machine's CPU, or on the current GPU where the queue is a stream. An empty
// workspace is allowed where the plan needs none; one that is too small is refused with the size it
// must have.
Status forward(const ForwardProblem& problem, Workspace workspace = {}, Queue queue = {},
               const Options& options = {});
Status backward(const BackwardProblem& problem, Workspace workspace = {}, Queue queue = {},
                const Options& options = {});

}  // namespace heed
