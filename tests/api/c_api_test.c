/* The C API from C99: defaults, a forward and a backward pass, errors, texts, the caller's threads.
 */
#include <heed/heed.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 2, SEQLEN = 5, HEADS_Q = 4, HEADS_K = 2, DIM = 8 };
enum { ROWS_Q = BATCH * SEQLEN * HEADS_Q, ROWS_K = BATCH * SEQLEN * HEADS_K };

static float q[ROWS_Q * DIM], k[ROWS_K * DIM], v[ROWS_K * DIM], out[ROWS_Q * DIM], lse[ROWS_Q];
static float dout[ROWS_Q * DIM], dq[ROWS_Q * DIM], dk[ROWS_K * DIM], dv[ROWS_K * DIM];

static int failures = 0;

static void expect_at(int line, int truth, const char* what) {
  if (truth) return;
  printf("c_api_test.c:%d: %s\n", line, what);
  ++failures;
}
#define EXPECT(truth) expect_at(__LINE__, (truth) != 0, #truth)

static void expect_status(int line, heed_status status, int code, const char* part) {
  if (status.code == code && strstr(status.message, part) != NULL) return;
  printf("c_api_test.c:%d: got %d \"%s\", expected %d \"%s\"\n", line, (int)status.code,
         status.message, code, part);
  ++failures;
}
#define EXPECT_OK(status) expect_status(__LINE__, status, HEED_OK, "")
#define EXPECT_INVALID(status, part) expect_status(__LINE__, status, HEED_INVALID, part)

static void fill(float* values, int count, int seed) {
  int i;
  for (i = 0; i < count; ++i) values[i] = (float)sin(seed + 1.7 * i);
}

static heed_forward_problem forward_problem(void) {
  heed_forward_problem p = HEED_FORWARD_PROBLEM_INIT;
  p.q = heed_dense(q, HEED_F32, BATCH, SEQLEN, HEADS_Q, DIM);
  p.k = heed_dense(k, HEED_F32, BATCH, SEQLEN, HEADS_K, DIM);
  p.v = heed_dense(v, HEED_F32, BATCH, SEQLEN, HEADS_K, DIM);
  p.out = heed_dense(out, HEED_F32, BATCH, SEQLEN, HEADS_Q, DIM);
  p.lse = lse;
  p.band = heed_causal();
  return p;
}

static heed_backward_problem backward_problem(const heed_forward_problem* forward) {
  heed_backward_problem p = HEED_BACKWARD_PROBLEM_INIT;
  p.forward = forward;
  p.dout = heed_dense(dout, HEED_F32, BATCH, SEQLEN, HEADS_Q, DIM);
  p.dq = heed_dense(dq, HEED_F32, BATCH, SEQLEN, HEADS_Q, DIM);
  p.dk = heed_dense(dk, HEED_F32, BATCH, SEQLEN, HEADS_K, DIM);
  p.dv = heed_dense(dv, HEED_F32, BATCH, SEQLEN, HEADS_K, DIM);
  return p;
}

static char memory[1 << 22];
static heed_workspace scratch(void) {
  heed_workspace w;
  size_t skip = (HEED_WORKSPACE_ALIGNMENT - (size_t)memory % HEED_WORKSPACE_ALIGNMENT) %
                HEED_WORKSPACE_ALIGNMENT;
  w.data = memory + skip;
  w.bytes = sizeof memory - skip;
  return w;
}

static void test_views(void) {
  const heed_tensor dense = heed_dense(q, HEED_BF16, 2, 3, 4, 5);
  const heed_tensor packed = heed_packed(q, HEED_F16, 7, 4, 5);
  EXPECT(dense.rank == 4 && dense.dtype == HEED_BF16 && dense.stride[0] == 60);
  EXPECT(dense.stride[1] == 20 && dense.stride[2] == 5 && dense.stride[3] == 1);
  EXPECT(packed.rank == 3 && packed.shape[0] == 7 && packed.stride[0] == 20);
  EXPECT(heed_full().left == HEED_UNBOUNDED && heed_full().right == HEED_UNBOUNDED);
  EXPECT(heed_sliding_window(9).left == 9 && heed_sliding_window(9).right == 0);
  EXPECT(heed_chunked(16).chunk == 16 && heed_causal().right == 0);
  EXPECT(strcmp(heed_version(), HEED_VERSION) == 0);
}

static void test_passes(void) {
  heed_device device;
  heed_plan plan = HEED_PLAN_INIT;
  heed_options options = HEED_OPTIONS_INIT;
  const heed_forward_problem forward = forward_problem();
  const heed_backward_problem backward = backward_problem(&forward);
  double sum_dv = 0, sum_dout = 0;
  char text[256], whole[256];
  size_t length;
  int i;

  EXPECT_OK(heed_device_cpu(&device));
  EXPECT(device.units >= 1);
  options.force = "scalar";
  EXPECT_OK(heed_plan_forward(&forward, &device, &options, &plan));
  length = heed_describe_plan(&plan, whole, sizeof whole);
  EXPECT(strstr(whole, "scalar/") == whole && length == strlen(whole));
  EXPECT(heed_describe_plan(&plan, text, 7) == length && strcmp(text, "scalar") == 0);
  EXPECT(heed_describe_plan(&plan, NULL, 0) == length);
  EXPECT(heed_explain_forward(&forward, &device, &options, text, sizeof text) > 0);
  EXPECT(strstr(text, "scalar/") == text);

  EXPECT_OK(heed_run_forward(&plan, &forward, scratch(), NULL));
  EXPECT(fabs(out[0] - v[0]) < 1e-6);
  EXPECT_OK(heed_forward(&forward, scratch(), NULL, NULL));
  EXPECT(fabs(out[0] - v[0]) < 1e-6);

  EXPECT_OK(heed_plan_backward(&backward, &device, NULL, &plan));
  EXPECT_OK(heed_run_backward(&plan, &backward, scratch(), NULL));
  EXPECT_OK(heed_backward(&backward, scratch(), NULL, NULL));
  EXPECT(heed_explain_backward(&backward, &device, NULL, text, sizeof text) > 0);
  for (i = 0; i < ROWS_K * DIM; ++i) sum_dv += dv[i];
  for (i = 0; i < ROWS_Q * DIM; ++i) sum_dout += dout[i];
  EXPECT(fabs(sum_dv - sum_dout) < 1e-4);
}

static void test_errors(void) {
  heed_forward_problem forward = forward_problem();
  heed_backward_problem backward = backward_problem(&forward);
  heed_options options = HEED_OPTIONS_INIT;
  heed_device device;
  heed_plan plan = HEED_PLAN_INIT;
  heed_workspace none = HEED_WORKSPACE_INIT;
  char text[200];

  EXPECT_OK(heed_device_cpu(&device));
  EXPECT_INVALID(heed_device_cpu(NULL), "device = null must point to a struct");
  EXPECT_INVALID(heed_forward(NULL, none, NULL, NULL), "problem = null must point to a struct");
  EXPECT_INVALID(heed_plan_forward(&forward, NULL, NULL, &plan), "device = null");
  EXPECT_INVALID(heed_plan_forward(&forward, &device, NULL, NULL), "plan = null");
  EXPECT_INVALID(heed_run_forward(NULL, &forward, none, NULL), "plan = null");
  EXPECT_INVALID(heed_run_forward(&plan, &forward, none, NULL), "plan.row");
  EXPECT(strcmp((heed_describe_plan(&plan, text, sizeof text), text), "no plan") == 0);

  forward.size = 8;
  EXPECT_INVALID(heed_forward(&forward, none, NULL, NULL), "problem.size = 8 must be ");
  EXPECT_INVALID(heed_backward(&backward, none, NULL, NULL), "problem.forward.size = 8 must be ");
  forward.size = sizeof forward;
  backward.forward = NULL;
  EXPECT_INVALID(heed_backward(&backward, none, NULL, NULL), "problem.forward = null");
  options.size = 0;
  EXPECT_INVALID(heed_forward(&forward, none, NULL, &options), "options.size = 0 must be ");
  device.arch = 99;
  EXPECT_INVALID(heed_plan_forward(&forward, &device, NULL, &plan),
                 "device.arch = 99 must be in [0, 11]");

  forward.q.dtype = 1000;
  EXPECT_INVALID(heed_forward(&forward, none, NULL, NULL), "q.dtype = ");
  forward = forward_problem();
  forward.k.shape[2] = forward.v.shape[2] = 3;
  EXPECT_INVALID(heed_forward(&forward, none, NULL, NULL),
                 "q.heads = 4 must be a multiple of k.heads = 3");
  forward = forward_problem();
  forward.score.has_scale = 1;
  forward.score.scale = (float)NAN;
  EXPECT_INVALID(heed_forward(&forward, none, NULL, NULL), "score.scale = nan must be finite");
}

static int calls = 0;
static int concurrency(void* user) { return *(int*)user; }
static void run_in_turn(void* user, int workers, void (*body)(void* context, int worker),
                        void* context) {
  int worker;
  (void)user;
  ++calls;
  for (worker = 0; worker < workers; ++worker) body(context, worker);
}

/* Planning needs no GPU; a queue must be of the plan's kind. */
static void test_gpu(void) {
  const heed_forward_problem forward = forward_problem();
  heed_device gpu = {HEED_SM90, 132, 0};
  heed_device device;
  heed_plan plan = HEED_PLAN_INIT;
  heed_queue queue = HEED_QUEUE_INIT;

  expect_status(__LINE__, heed_plan_forward(&forward, &gpu, NULL, &plan), HEED_UNSUPPORTED, "sm90");
  EXPECT_INVALID(heed_device_cuda(-1, NULL), "device = null");
  EXPECT(heed_device_cuda(0, &device).code != HEED_OK || device.arch >= HEED_SM80);
  EXPECT_OK(heed_device_cpu(&device));
  EXPECT(device.smem_bytes == 0);
  EXPECT_OK(heed_plan_forward(&forward, &device, NULL, &plan));
  EXPECT(plan.deterministic == 1);
  queue.on_gpu = 1;
  EXPECT_INVALID(heed_run_forward(&plan, &forward, scratch(), &queue), "queue is a CUDA stream");
}

static void test_executor(void) {
  const heed_forward_problem forward = forward_problem();
  heed_executor executor;
  heed_queue queue = HEED_QUEUE_INIT;
  int threads = 3;

  executor.user = &threads;
  executor.concurrency = concurrency;
  executor.run = run_in_turn;
  queue.executor = &executor;
  EXPECT_OK(heed_forward(&forward, scratch(), &queue, NULL));
  EXPECT(calls > 0);
  executor.run = NULL;
  EXPECT_INVALID(heed_forward(&forward, scratch(), &queue, NULL), "queue.executor.run = null");
}

int main(void) {
  fill(q, ROWS_Q * DIM, 1);
  fill(k, ROWS_K * DIM, 2);
  fill(v, ROWS_K * DIM, 3);
  fill(dout, ROWS_Q * DIM, 4);
  test_views();
  test_passes();
  test_errors();
  test_executor();
  test_gpu();
  printf(failures == 0 ? "c_api_test: passed\n" : "c_api_test: FAILED\n");
  return failures == 0 ? 0 : 1;
}
