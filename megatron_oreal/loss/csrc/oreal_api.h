// The C functions of oreal_loss.h: argument checks and the choice of a kernel. Included once by each build, which
// provides oreal::launch_*(...), oreal::probe() and OREAL_DEVICE.
#pragma once
#include <algorithm>

#include "oreal_rows.h"
#include "oreal_tokens.h"

#ifndef OREAL_BUILD
#define OREAL_BUILD "archs=none sources=none nvcc=none"
#endif

namespace oreal {

constexpr int64_t kMaxRows = 0x7fffffff;

inline bool aligned_to(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int check_logits(const OrealLogits* x, const int64_t* labels, const void* per_row) {
  const bool sizes = x != nullptr && x->rows >= 0 && x->rows <= kMaxRows && x->width >= 0 && x->width <= kMaxRows &&
                     x->stride >= x->width && x->vocab_start >= 0 && x->vocab_size > 0 && x->temperature > 0 &&
                     (x->dtype == OREAL_BF16 || x->dtype == OREAL_FP32);
  if (!sizes) return OREAL_EARGUMENT;
  if (x->rows == 0) return 0;
  if ((x->data == nullptr && x->width > 0) || labels == nullptr || per_row == nullptr) return OREAL_EARGUMENT;
  const bool aligned = aligned_to(x->data, x->dtype == OREAL_BF16 ? 2 : 4) && aligned_to(per_row, sizeof(Statistics));
  return aligned ? 0 : OREAL_EALIGNMENT;
}

// Columns of the shard that are in the vocabulary.
inline int64_t valid_columns(const OrealLogits& x) {
  return std::min(std::max<int64_t>(x.vocab_size - x.vocab_start, 0), x.width);
}

// Whether every row starts on a 16-byte boundary.
inline bool rows_aligned(const OrealLogits& x) {
  const int64_t element = x.dtype == OREAL_BF16 ? 2 : 4;
  return aligned_to(x.data, 16) && (x.rows == 1 || x.stride * element % 16 == 0);
}

inline int check_weights(const OrealTokenWeights* w) {
  const bool sizes = w != nullptr && w->tokens >= 0 && w->sequences >= 0 && w->sequences <= kMaxRows &&
                     w->tokens >= w->sequences && (w->dtype == OREAL_BF16 || w->dtype == OREAL_FP32) &&
                     (w->mode == OREAL_RELEASED || w->mode == OREAL_PAPER) &&
                     (w->rescale == OREAL_THRESHOLD || w->rescale == OREAL_TOPK);
  if (!sizes) return OREAL_EARGUMENT;
  if (w->sequences == 0) return w->tokens == 0 ? 0 : OREAL_EARGUMENT;
  const bool topk = w->rescale == OREAL_TOPK;
  const double limit = topk ? 1. : std::nextafter(1., 0.);
  const bool cuts = w->positive_cut >= 0 && w->positive_cut <= limit && w->negative_cut >= 0 && w->negative_cut <= limit;
  const bool scratch = w->scores == nullptr || !topk || w->scratch != nullptr;
  return w->cu_seqlens != nullptr && cuts && scratch ? 0 : OREAL_EARGUMENT;
}

}  // namespace oreal

extern "C" {

int oreal_abi_version(void) { return OREAL_ABI_VERSION; }

const char* oreal_build_info(void) { return "device=" OREAL_DEVICE " " OREAL_BUILD; }

int oreal_probe(void) { return oreal::probe(); }

int oreal_row_statistics(const OrealLogits* logits, const int64_t* labels, const uint8_t* active, float* statistics,
                         int32_t* status, void* stream) {
  using namespace oreal;
  if (const int code = check_logits(logits, labels, statistics)) return code;
  if (logits->rows == 0) return 0;
  const StatisticsArguments a{*logits, valid_columns(*logits), static_cast<float>(kLog2e / logits->temperature),
                              labels,  active, reinterpret_cast<Statistics*>(statistics), status};
  const bool fast = rows_aligned(*logits);
  if (logits->dtype == OREAL_BF16)
    return fast ? launch_statistics<uint16_t, true>(a, stream) : launch_statistics<uint16_t, false>(a, stream);
  return fast ? launch_statistics<float, true>(a, stream) : launch_statistics<float, false>(a, stream);
}

int oreal_combine(const float* gathered, int64_t ranks, int64_t rows, double temperature, const uint8_t* active,
                  const OrealCoefficients* coefficients, float* row_state, float* logp, float* entropy, double* terms,
                  void* stream) {
  using namespace oreal;
  if (ranks < 1 || rows < 0 || rows > kMaxRows || !(temperature > 0)) return OREAL_EARGUMENT;
  if (rows == 0) return 0;
  if (gathered == nullptr) return OREAL_EARGUMENT;
  if (!aligned_to(gathered, sizeof(Statistics)) || !aligned_to(row_state, sizeof(Statistics))) return OREAL_EALIGNMENT;
  CombineArguments a{reinterpret_cast<const Statistics*>(gathered), ranks, rows, temperature, active, false, {},
                     reinterpret_cast<Statistics*>(row_state), logp, entropy, terms};
  if (coefficients != nullptr) {
    const OrealCoefficients& c = *coefficients;
    const bool complete = c.positive != nullptr && c.negative != nullptr && c.kl != nullptr && c.kl_type >= OREAL_K1 &&
                          c.kl_type <= OREAL_K3 &&
                          (c.negative_form == OREAL_RATIO || c.negative_form == OREAL_LOG_RATIO);
    if (!complete) return OREAL_EARGUMENT;
    a.has_coefficients = true;
    a.c = c;
  }
  return launch_combine(a, stream);
}

int oreal_gradient(const OrealLogits* logits, const int64_t* labels, const float* row_state, const double* grad_out,
                   void* stream) {
  using namespace oreal;
  if (const int code = check_logits(logits, labels, row_state)) return code;
  if (logits->rows == 0 || logits->width == 0) return 0;
  const GradientArguments a{*logits,
                            valid_columns(*logits),
                            static_cast<float>(kLog2e / logits->temperature),
                            static_cast<float>(1. / logits->temperature),
                            labels,
                            reinterpret_cast<const Statistics*>(row_state),
                            grad_out};
  const bool fast = rows_aligned(*logits);
  if (logits->dtype == OREAL_BF16)
    return fast ? launch_gradient<uint16_t, true>(a, stream) : launch_gradient<uint16_t, false>(a, stream);
  return fast ? launch_gradient<float, true>(a, stream) : launch_gradient<float, false>(a, stream);
}

int oreal_token_weights(const OrealTokenWeights* weights, void* stream) {
  using namespace oreal;
  if (const int code = check_weights(weights)) return code;
  return weights->sequences == 0 ? 0 : launch_token_weights(*weights, stream);
}

}  // extern "C"
