/* C ABI of the loss kernels: plain pointers and sizes, no torch, no Python.
 *
 * Every function with a stream queues work on `stream` (a cudaStream_t; ignored by the host build) and returns at once: 0, or a code
 * that oreal_error_string() explains. Nothing allocates, synchronises, or keeps a pointer after the queued work is done.
 * All pointers are device pointers unless a comment says "host". All results are deterministic: fixed order of every
 * floating-point sum, no floating-point atomics. Runs may be captured in a CUDA graph.
 *
 * Notation, for one row (= one token): x the logits in raw units, T the temperature, m = max x, y the label,
 *   d = sum e^((x-m)/T)      t = sum e^((x-m)/T) (x-m)      logp = (x_y - m)/T - ln d      entropy = ln d - (t/d)/T
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define OREAL_ABI_VERSION 2

enum OrealDtype { OREAL_BF16 = 0, OREAL_FP32 = 1 };
enum OrealNegativeForm { OREAL_RATIO = 0, OREAL_LOG_RATIO = 1 };
enum OrealKlType { OREAL_K1 = 1, OREAL_K2 = 2, OREAL_K3 = 3 };
enum OrealMode { OREAL_RELEASED = 0, OREAL_PAPER = 1 };
enum OrealRescale { OREAL_THRESHOLD = 0, OREAL_TOPK = 1 };
enum OrealStatus { OREAL_LABEL_OUTSIDE = 1 };

/* Error codes of our own; every smaller positive one is a cudaError_t. */
#define OREAL_EARGUMENT 100001 /* a size, dtype, mode or pointer that no kernel accepts */
#define OREAL_EALIGNMENT 100002 /* a pointer that is not aligned to its element (statistics, rows: to 16 bytes) */

/* This rank's columns of the logits. Any width, stride and row alignment is right; rows on 16-byte boundaries are fast.
 * A logit <= -2^126 (-inf, the lowest bf16) is a masked column. A NaN or +inf makes the row's statistics NaN. */
typedef struct {
  void* data;          /* [rows, width] of dtype; row r starts at element r * stride */
  int64_t rows;        /* < 2^31 */
  int64_t width;       /* columns of this shard, padding included; < 2^31 */
  int64_t stride;      /* elements from one row to the next, >= width */
  int64_t vocab_start; /* global id of column 0 */
  int64_t vocab_size;  /* global ids from here on are padding: they take no part, their gradient is 0 */
  double temperature;  /* T > 0 */
  int32_t dtype;       /* OrealDtype */
} OrealLogits;

/* loss_t = -positive logp + negative f(logp - old) + kl k(anchor - logp); f(x) = e^x or x; k1 -x, k2 x^2/2, k3 e^x - x - 1.
 * A term whose coefficient is 0 is exactly 0 in value and derivative, whatever the log-probabilities are. */
typedef struct {
  const float* positive; /* [rows] */
  const float* negative; /* [rows] */
  const float* kl;       /* [rows] */
  const float* old;      /* [rows], or null: logp itself, constant */
  const float* anchor;   /* [rows], or null: logp itself, constant */
  int32_t negative_form; /* OrealNegativeForm */
  int32_t kl_type;       /* OrealKlType */
} OrealCoefficients;

/* Token weights and coefficients of a pack of whole sequences. */
typedef struct {
  const void* scores;        /* [tokens] of dtype; null: no reward model, every weight is 1 */
  const int64_t* cu_seqlens; /* [sequences + 1]: 0, ..., tokens; every sequence has at least one token */
  int64_t tokens;
  int64_t sequences;
  int32_t dtype;             /* OrealDtype of scores */
  int32_t mode;              /* OrealMode: q_t = sigmoid(running mean), or sigmoid(score) */
  int32_t rescale;           /* OrealRescale */
  double positive_cut;       /* threshold in [0, 1), or ratio in [0, 1] of topk */
  double negative_cut;
  double* scratch;           /* [tokens], overwritten; may be null unless rescale is topk and there are scores */
  const double* strengths;   /* [sequences, 2]: positive, negative; what multiplies the sequence's weights. Null: 1, 1 */
  double kl;                 /* coefficient of every token's KL term */
  float* positive_weight;    /* out [tokens], or null */
  float* negative_weight;    /* out [tokens], or null */
  float* positive;           /* out [tokens] = strength * weight, or null */
  float* negative;           /* out [tokens], or null */
  float* kl_out;             /* out [tokens] = kl, or null */
  uint8_t* active;           /* out [tokens]: 1 where a coefficient is not 0, or null */
} OrealTokenWeights;

int oreal_abi_version(void);

/* host: "device=cuda archs=80,90a,100a,90+ptx sources=<sha256/16> nvcc=13.0.88"; static storage. */
const char* oreal_build_info(void);

/* Whether the current device can run every kernel: loads each, launches none. A driver older than the toolkit, portable
 * code newer than the driver, or no code for the device is an error here, as it would be at the first launch. */
int oreal_probe(void);

/* host: one line; static storage. */
const char* oreal_error_string(int code);

/* One read of the shard: statistics [rows, 4] float = (m, d, t, x_y) of its valid columns; 16-byte aligned.
 * labels [rows]: global ids. x_y is -inf where another shard holds the label. No unmasked column: (-inf, 0, 0, x_y).
 * active [rows] or null: rows with 0 are not read and get (0, 1, 0, 0); their label is not looked at.
 * A label outside [0, vocab_size): x_y is NaN on every rank, so that the row's logp is NaN, and *status |=
 * OREAL_LABEL_OUTSIDE (status [1] or null; the caller zeroes it and reads it whenever it next waits for the device). */
int oreal_row_statistics(const OrealLogits* logits, const int64_t* labels, const uint8_t* active, float* statistics,
                         int32_t* status, void* stream);

/* Merge the shards' statistics in rank order and evaluate every token in float64. Same input bits, same output bits.
 * gathered [ranks, rows, 4] float, 16-byte aligned. active as above: rows with 0 get zeros everywhere.
 * row_state [rows, 4] float = (m, d, g, logp), g = dloss/dlogp, 16-byte aligned, or null.
 * logp, entropy [rows] float, or null. terms [3, rows] double = positive, negative, KL part of loss_t, or null.
 * coefficients may be null (log-probabilities only): g and terms are 0. A row without an unmasked column: logp is NaN. */
int oreal_combine(const float* gathered, int64_t ranks, int64_t rows, double temperature, const uint8_t* active,
                  const OrealCoefficients* coefficients, float* row_state, float* logp, float* entropy, double* terms,
                  void* stream);

/* Overwrite the shard with g grad_out (onehot - softmax)/T. grad_out: one double, or null for 1.
 * Rows with g grad_out = 0 are not read and become exactly 0, as does all padding. The label's entry,
 * -g grad_out expm1(logp)/T, is formed in float and rounded once. */
int oreal_gradient(const OrealLogits* logits, const int64_t* labels, const float* row_state, const double* grad_out,
                   void* stream);

/* Weights and coefficients, in float64 until the last rounding. A sequence's results do not depend on its neighbours.
 * Top-k: of a sequence's n values the floor(cut n) largest, the earlier of equal ones first, are scaled to [0, 1] by
 * their minimum and maximum, all 1 when these are equal; the rest 0. A NaN score makes the weights it enters NaN. */
int oreal_token_weights(const OrealTokenWeights* weights, void* stream);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
