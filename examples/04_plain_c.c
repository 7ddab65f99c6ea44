/* Sliding-window attention from C99. */
#include <heed/heed.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 1, SEQLEN = 64, HEADS = 2, HEAD_DIM = 16, WINDOW = 4 };
enum { SIZE = BATCH * SEQLEN * HEADS * HEAD_DIM };

static float q[SIZE], k[SIZE], v[SIZE], out[SIZE];

static int failed(heed_status status) {
  if (status.code == HEED_OK) return 0;
  fprintf(stderr, "%s\n", status.message);
  return 1;
}

int main(void) {
  heed_forward_problem problem = HEED_FORWARD_PROBLEM_INIT;
  heed_plan plan = HEED_PLAN_INIT;
  heed_workspace workspace = HEED_WORKSPACE_INIT;
  heed_device device;
  char text[256];
  char* memory;
  double row = 0;
  int i;

  /* Equal keys: every row is the mean of the values it sees. */
  for (i = 0; i < SIZE; ++i) {
    q[i] = 1.0f;
    k[i] = 0.5f;
    v[i] = (float)(i / (HEADS * HEAD_DIM));
  }
  problem.q = heed_dense(q, HEED_F32, BATCH, SEQLEN, HEADS, HEAD_DIM);
  problem.k = heed_dense(k, HEED_F32, BATCH, SEQLEN, HEADS, HEAD_DIM);
  problem.v = heed_dense(v, HEED_F32, BATCH, SEQLEN, HEADS, HEAD_DIM);
  problem.out = heed_dense(out, HEED_F32, BATCH, SEQLEN, HEADS, HEAD_DIM);
  problem.band = heed_sliding_window(WINDOW);

  if (failed(heed_device_cpu(&device))) return 1;
  if (failed(heed_plan_forward(&problem, &device, NULL, &plan))) return 1;
  heed_describe_plan(&plan, text, sizeof text);
  printf("heed %s: %s\n", heed_version(), text);

  memory = malloc(plan.workspace_bytes + HEED_WORKSPACE_ALIGNMENT);
  if (memory == NULL) return 1;
  workspace.bytes = plan.workspace_bytes;
  workspace.data = memory + (HEED_WORKSPACE_ALIGNMENT - (size_t)memory % HEED_WORKSPACE_ALIGNMENT) %
                                HEED_WORKSPACE_ALIGNMENT;
  if (failed(heed_run_forward(&plan, &problem, workspace, NULL))) return 1;
  free(memory);

  row = out[SIZE - 1];
  printf("the last row sees keys %d to %d; their mean is %g\n", SEQLEN - 1 - WINDOW, SEQLEN - 1,
         row);
  return fabs(row - (SEQLEN - 1 - WINDOW / 2.0)) < 1e-4 ? 0 : 1;
}
