/* heed in C99: exact softmax attention, forward and backward, over the functions of heed.hpp.
 *
 *   heed_forward_problem problem = HEED_FORWARD_PROBLEM_INIT;
 *   problem.q = heed_dense(q, HEED_F32, batch, seqlen_q, heads_q, head_dim);
 *   ...                                             k, v and out likewise
 *   problem.band = heed_causal();
 *   heed_status status = heed_forward(&problem, workspace, NULL, NULL);
 *   if (status.code != HEED_OK) fprintf(stderr, "%s\n", status.message);
 *
 * Nothing here owns, allocates or keeps memory. Start every struct from its _INIT macro: zero is
 * not always the default. Only structs that begin with `size` will ever grow, at their end: by
 * `size` the library tells which header its caller was compiled with. Functions may be called from
 * any thread. */
#ifndef HEED_HEED_H
#define HEED_HEED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- results ---- */

typedef enum heed_code {
  HEED_OK = 0,
  HEED_INVALID = 1,     /* the request contradicts itself: another value is needed */
  HEED_UNSUPPORTED = 2, /* a legal request that no kernel of this build or device serves */
  HEED_DEVICE = 3       /* the device or its driver failed, or is missing */
} heed_code;

#define HEED_MESSAGE_BYTES 508

typedef struct heed_status {
  int32_t code;                     /* heed_code */
  char message[HEED_MESSAGE_BYTES]; /* one sentence: field, value, allowed values; "" when ok */
} heed_status;

#define HEED_VERSION "0.1.0"
/* HEED_VERSION of the library that runs. */
const char* heed_version(void);

/* ---- tensors ---- */

typedef enum heed_dtype {
  HEED_F32 = 0,
  HEED_BF16 = 1,
  HEED_F16 = 2,
  HEED_F64 = 3,
  HEED_BOOL = 4 /* bias only: one byte, 0 hides the key */
} heed_dtype;

/* A view of the caller's memory. Rank 4: [batch, seqlen, heads, head_dim]; rank 3 (packed):
 * [total tokens, heads, head_dim]. Strides count elements; the last one is 1, the others are free,
 * but not negative. data == NULL: no tensor. */
typedef struct heed_tensor {
  void* data;    /* aligned to its element; inputs are never written */
  int32_t dtype; /* heed_dtype */
  int32_t rank;  /* 3 or 4 */
  int64_t shape[4];
  int64_t stride[4];
} heed_tensor;

#define HEED_TENSOR_INIT                            \
  {                                                 \
    NULL, HEED_F32, 4, {0, 0, 0, 0}, { 0, 0, 0, 0 } \
  }

/* Row-major views of densely stored tensors. */
heed_tensor heed_dense(const void* data, heed_dtype dtype, int64_t batch, int64_t seqlen,
                       int64_t heads, int64_t head_dim);
heed_tensor heed_packed(const void* data, heed_dtype dtype, int64_t total, int64_t heads,
                        int64_t head_dim);

/* ---- the problem: everything that changes the answer ----
 *
 *   S = scale * q k^T,   S = softcap * tanh(S / softcap) when softcap > 0,   S += bias,
 *   P = softmax over the visible keys (and the sink),   out = dropout(P) v. */

#define HEED_UNBOUNDED (1 << 30)

/* Row i of an entry stands at position = i + seqlen_k - seqlen_q among its keys (the last row at
 * the last key) and sees key j iff position - left <= j <= position + right
 * and, when chunk > 0, j >= floor(position / chunk) * chunk. */
typedef struct heed_band {
  int32_t left;  /* keys, 0 to HEED_UNBOUNDED (no limit) */
  int32_t right; /* keys, 0 to HEED_UNBOUNDED (no limit) */
  int32_t chunk; /* keys; 0: not chunked */
} heed_band;

#define HEED_BAND_INIT \
  { HEED_UNBOUNDED, HEED_UNBOUNDED, 0 }

heed_band heed_full(void);
heed_band heed_causal(void);
/* A row sees itself and the `keys_back` keys before it. */
heed_band heed_sliding_window(int32_t keys_back);
/* A row sees the keys of its own chunk up to itself. */
heed_band heed_chunked(int32_t chunk);

typedef struct heed_score {
  int32_t has_scale; /* 0: scale is 1 / sqrt(head_dim) */
  float scale;       /* finite; read when has_scale != 0 */
  float softcap;     /* finite, at least 0; 0: none */
} heed_score;

#define HEED_SCORE_INIT \
  { 0, 0.0f, 0.0f }

/* Where each batch entry's tokens are, in arrays on the device that runs the kernel. A CPU refuses
 * a bad value by name; a GPU clamps it.
 *
 *   dense    all NULL: entry b owns row b of the tensor.
 *   packed   cu_seqlens: entry b owns tokens [cu_seqlens[b], cu_seqlens[b + 1]) of a rank 3 tensor.
 *   padded   start: entry b's tokens begin at slot start[b] of row b.
 *   seqused  on top of any: the entry has seqused[b] tokens from its first one on. */
typedef struct heed_sequences {
  int64_t batch;               /* entries; needed when q is packed, else 0 or q's */
  const int32_t* cu_seqlens_q; /* [batch + 1], tokens, ascending */
  const int32_t* cu_seqlens_k; /* [batch + 1], tokens, ascending */
  const int32_t* start_q;      /* [batch], slots */
  const int32_t* start_k;      /* [batch], slots */
  const int32_t* seqused_q;    /* [batch], tokens */
  const int32_t* seqused_k;    /* [batch], tokens */
  int64_t max_seqlen_q;        /* tokens; packed: no entry is longer; 0: the total */
  int64_t max_seqlen_k;        /* tokens; likewise */
} heed_sequences;

#define HEED_SEQUENCES_INIT \
  { 0, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0 }

/* One key interval per query row, intersected with band and sequences. A slot is a token's index in
 * its row of the k tensor; for packed and paged k its index within the entry. */
typedef struct heed_key_intervals {
  const int32_t* rows;       /* [batch, seqlen_q, 2], packed [total_q, 2]: first and end slot */
  int64_t rows_batch_stride; /* int32 elements between batch entries; 0: shared */
  const uint32_t* bits;      /* [batch, bits_words]: bit j % 32 of word j / 32 = slot j valid */
  int64_t bits_batch_stride; /* words between batch entries; 0: shared */
  int64_t bits_words;        /* words per entry; slots past the last word are not valid */
} heed_key_intervals;

#define HEED_KEY_INTERVALS_INIT \
  { NULL, 0, NULL, 0, 0 }

/* Keys and values in pages: k and v are [num_pages, page_size, heads_k, head_dim]. Slot j of entry
 * b is row j % page_size of page page_table[b * max_pages + j / page_size]. Needs seqused_k. */
typedef struct heed_paged_kv {
  const int32_t* page_table; /* [batch, max_pages], page ids in [0, num_pages) */
  int64_t max_pages;         /* pages per entry */
} heed_paged_kv;

#define HEED_PAGED_KV_INIT \
  { NULL, 0 }

/* P_ij is kept, and divided by 1 - probability, iff word j % 4 of Philox-4x32-10 with key = *seed
 * and counter = (i, j / 4, head, batch entry) is at least floor(probability * 2^32). */
typedef struct heed_dropout {
  float probability;    /* in [0, 1) */
  const uint64_t* seed; /* [1], device memory; needed when probability > 0 */
} heed_dropout;

#define HEED_DROPOUT_INIT \
  { 0.0f, NULL }

typedef struct heed_forward_problem {
  size_t size;     /* sizeof(heed_forward_problem) */
  heed_tensor q;   /* [batch, seqlen_q, heads_q, head_dim] or packed [total_q, heads_q, head_dim] */
  heed_tensor k;   /* [batch, seqlen_k, heads_k, head_dim] or packed or pages */
  heed_tensor v;   /* as k, with head_dim_v */
  heed_tensor out; /* as q, with head_dim_v; written */
  float* lse; /* [batch, heads_q, seqlen_q], packed [heads_q, total_q]; written. Natural log, with
                 the sink; -inf for a row without keys. Optional. */
  heed_band band;
  heed_score score;
  heed_sequences sequences;
  heed_key_intervals intervals;
  heed_tensor bias;  /* [batch|1, heads_q|1, seqlen_q|1, seqlen_k], natural log; bool: 0 hides */
  const float* sink; /* [heads_q]: one more logit per row, natural log units, no value; optional */
  heed_paged_kv paged;
  heed_dropout dropout;
} heed_forward_problem;

#define HEED_FORWARD_PROBLEM_INIT                                                              \
  {                                                                                            \
    sizeof(heed_forward_problem), HEED_TENSOR_INIT, HEED_TENSOR_INIT, HEED_TENSOR_INIT,        \
        HEED_TENSOR_INIT, NULL, HEED_BAND_INIT, HEED_SCORE_INIT, HEED_SEQUENCES_INIT,          \
        HEED_KEY_INTERVALS_INIT, HEED_TENSOR_INIT, NULL, HEED_PAGED_KV_INIT, HEED_DROPOUT_INIT \
  }

/* Gradients of sum(out * dout) + sum(lse * dlse). */
typedef struct heed_backward_problem {
  size_t size;                         /* sizeof(heed_backward_problem) */
  const heed_forward_problem* forward; /* as it ran: its out and lse are only read */
  heed_tensor dout;                    /* as out */
  const float* dlse;                   /* as lse; optional */
  heed_tensor dq, dk, dv;              /* as q, k, v; written */
  heed_tensor dbias;                   /* as bias, HEED_F32; written; optional */
  float* dsink;                        /* [heads_q]; written; optional */
} heed_backward_problem;

#define HEED_BACKWARD_PROBLEM_INIT                                                 \
  {                                                                                \
    sizeof(heed_backward_problem), NULL, HEED_TENSOR_INIT, NULL, HEED_TENSOR_INIT, \
        HEED_TENSOR_INIT, HEED_TENSOR_INIT, HEED_TENSOR_INIT, NULL                 \
  }

/* ---- how it is computed: everything that changes only the speed ---- */

/* Kernel families. A device of one runs its kernels and those of the lesser ones of its kind. */
typedef enum heed_arch {
  HEED_REFERENCE = 0,
  HEED_SCALAR = 1,
  HEED_AVX2 = 2,
  HEED_AVX512 = 3,
  HEED_AVX512_BF16 = 4,
  HEED_AMX_BF16 = 5,
  HEED_NEON = 6,
  HEED_NEON_BF16 = 7,
  HEED_SM80 = 8,
  HEED_SM90 = 9,
  HEED_SM100 = 10,
  HEED_SM120 = 11
} heed_arch;

typedef struct heed_device {
  int32_t arch;  /* heed_arch */
  int32_t units; /* CPU: threads; GPU: multiprocessors */
  int32_t smem_bytes; /* GPU: shared memory that a block can have; 0: the most that its arch has */
} heed_device;

/* This machine's CPU. HEED_FORCE_ISA=reference|scalar|avx2|avx512|avx512_bf16|amx_bf16|neon|
   neon_bf16 lowers it. */
heed_status heed_device_cpu(heed_device* device);
/* The GPU of that number; -1: the calling thread's current one. */
heed_status heed_device_cuda(int32_t ordinal, heed_device* device);

typedef struct heed_options {
  size_t size;           /* sizeof(heed_options) */
  int32_t splits;        /* key splits of decode; 0: chosen from the shape */
  int32_t deterministic; /* GPU backward: the same bits every time; all else always is */
  const char* force;     /* a kernel's name from `heed list`, or NULL */
} heed_options;

#define HEED_OPTIONS_INIT \
  { sizeof(heed_options), 0, 0, NULL }

/* A decision: a value to copy and keep. */
typedef struct heed_plan {
  const void* row;        /* the kernel */
  int32_t workers;        /* CPU threads that have scratch space */
  int32_t splits;         /* parts of the keys that are computed apart and then merged */
  size_t workspace_bytes; /* what heed_workspace.bytes must be at least */
  int32_t deterministic;  /* every sum in one order */
} heed_plan;

#define HEED_PLAN_INIT \
  { NULL, 1, 1, 0, 1 }

/* Scratch memory of the caller, on the device that runs; its contents mean nothing. */
typedef struct heed_workspace {
  void* data;   /* aligned to HEED_WORKSPACE_ALIGNMENT */
  size_t bytes; /* at least heed_plan.workspace_bytes */
} heed_workspace;

#define HEED_WORKSPACE_INIT \
  { NULL, 0 }
#define HEED_WORKSPACE_ALIGNMENT 64

/* The caller's threads. `run` calls body(context, worker) once for every worker in [0, workers), at
 * the same time where it can, and returns after all of them have. A body may wait for others that are
 * running, never for one that has not begun. */
typedef struct heed_executor {
  void* user;
  int (*concurrency)(void* user); /* threads that `run` can use at the same time */
  void (*run)(void* user, int workers, void (*body)(void* context, int worker), void* context);
} heed_executor;

/* Where work is put. NULL in place of a queue: heed's own threads. */
typedef struct heed_queue {
  int32_t on_gpu;                /* 1: cuda_stream of the current GPU; 0: executor */
  void* cuda_stream;             /* cudaStream_t; NULL: the GPU's default stream */
  const heed_executor* executor; /* NULL: heed's own threads */
} heed_queue;

#define HEED_QUEUE_INIT \
  { 0, NULL, NULL }

/* ---- functions; options and queue may be NULL everywhere ---- */

/* Reads no device memory. */
heed_status heed_plan_forward(const heed_forward_problem* problem, const heed_device* device,
                              const heed_options* options, heed_plan* plan);
heed_status heed_plan_backward(const heed_backward_problem* problem, const heed_device* device,
                               const heed_options* options, heed_plan* plan);

/* The problem must be the planned one up to the pointers and the contents of its arrays. */
heed_status heed_run_forward(const heed_plan* plan, const heed_forward_problem* problem,
                             heed_workspace workspace, const heed_queue* queue);
heed_status heed_run_backward(const heed_plan* plan, const heed_backward_problem* problem,
                              heed_workspace workspace, const heed_queue* queue);

/* plan + run on this machine's CPU, or on the current GPU where queue.on_gpu is 1. */
heed_status heed_forward(const heed_forward_problem* problem, heed_workspace workspace,
                         const heed_queue* queue, const heed_options* options);
heed_status heed_backward(const heed_backward_problem* problem, heed_workspace workspace,
                          const heed_queue* queue, const heed_options* options);

/* Texts, written like snprintf: at most `bytes` with the closing 0; returns the length without it.
 */
size_t heed_describe_plan(const heed_plan* plan, char* text, size_t bytes);
size_t heed_explain_forward(const heed_forward_problem* problem, const heed_device* device,
                            const heed_options* options, char* text, size_t bytes);
size_t heed_explain_backward(const heed_backward_problem* problem, const heed_device* device,
                             const heed_options* options, char* text, size_t bytes);

#ifdef __cplusplus
}
#endif

#endif /* HEED_HEED_H */
