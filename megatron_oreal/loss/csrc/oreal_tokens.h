// What is computed once a token, in float64: the joined statistics with the loss and its derivative, and the token
// weights with the coefficients of the loss. Vectors here are a hundred thousand times smaller than the logits.
#pragma once
#include "oreal_core.h"
#include "oreal_loss.h"

namespace oreal {

// ---- combine --------------------------------------------------------------------------------------------------------

struct CombineArguments {
  const Statistics* gathered;  // [ranks, rows]
  int64_t ranks, rows;
  double temperature;
  const uint8_t* active;
  bool has_coefficients;
  OrealCoefficients c;
  Statistics* state;
  float *logp, *entropy;
  double* terms;
};

OR_FN double product(double coefficient, double value) { return coefficient == 0 ? 0. : coefficient * value; }

struct TokenLoss {
  double positive, negative, kl, derivative;
};

// loss_t and dloss_t/dlogp_t; the table of oreal_loss.h at OrealCoefficients.
OR_FN TokenLoss token_loss(const OrealCoefficients& c, int64_t i, double logp) {
  const double positive = c.positive[i], negative = c.negative[i], kl = c.kl[i];
  const double ratio = logp - (c.old != nullptr ? static_cast<double>(c.old[i]) : logp);
  const double value = c.negative_form == OREAL_RATIO ? exp(ratio) : ratio;
  const double slope = c.negative_form == OREAL_RATIO ? value : 1.;
  const double delta = (c.anchor != nullptr ? static_cast<double>(c.anchor[i]) : logp) - logp;
  double kl_value = -delta, kl_slope = 1.;
  if (c.kl_type == OREAL_K2) {
    kl_value = delta * delta / 2;
    kl_slope = -delta;
  } else if (c.kl_type == OREAL_K3) {
    const double e = expm1(delta);
    kl_value = e - delta;
    kl_slope = -e;
  }
  TokenLoss t;
  t.positive = product(positive, -logp);
  t.negative = product(negative, value);
  t.kl = product(kl, kl_value);
  t.derivative = product(negative, slope) + product(kl, kl_slope) - positive;
  // The derivative of a token that has no log-probability is not known, even where the formula does not need it.
  if (logp != logp && (positive != 0 || negative != 0 || kl != 0)) t.derivative = logp;
  return t;
}

OR_FN void write_token(
    const CombineArguments& a, int64_t i, const Statistics& state, double entropy, const TokenLoss& loss) {
  if (a.state != nullptr) a.state[i] = state;
  if (a.logp != nullptr) a.logp[i] = state.xy;
  if (a.entropy != nullptr) a.entropy[i] = static_cast<float>(entropy);
  if (a.terms != nullptr) {
    a.terms[i] = loss.positive;
    a.terms[a.rows + i] = loss.negative;
    a.terms[2 * a.rows + i] = loss.kl;
  }
}

OR_FN void combine_row(const CombineArguments& a, int64_t i) {
  TokenLoss loss{0., 0., 0., 0.};
  if (a.active != nullptr && a.active[i] == 0) {
    write_token(a, i, Statistics{0.f, 1.f, 0.f, 0.f}, 0., loss);
    return;
  }
  float m = kFloor, xy = -INFINITY;
  for (int64_t r = 0; r < a.ranks; ++r) {
    const Statistics s = a.gathered[r * a.rows + i];
    m = max_nan(m, s.m);
    xy = max_nan(xy, s.xy);
  }
  double d = 0., t = 0.;
  for (int64_t r = 0; r < a.ranks; ++r) {
    const Statistics s = a.gathered[r * a.rows + i];
    const double shift = static_cast<double>(max_nan(s.m, kFloor)) - m, scale = exp(shift / a.temperature);
    const double scaled = scale * s.d;
    d += scaled;
    t += scale * s.t + scaled * shift;
  }
  const double log_sum = d > 0 ? log(d) : quiet_nan();  // no unmasked column, or NaN: no distribution
  const float logp = static_cast<float>((static_cast<double>(xy) - m) / a.temperature - log_sum);
  if (a.has_coefficients) loss = token_loss(a.c, i, logp);
  write_token(a, i, Statistics{m, static_cast<float>(d), static_cast<float>(loss.derivative), logp},
              log_sum - t / d / a.temperature, loss);
}

// ---- token weights --------------------------------------------------------------------------------------------------

constexpr int kWeightThreads = 512;
constexpr int kWeightItems = 4;  // consecutive tokens of a thread
constexpr int kDigits = 256;

struct WeightShared {
  double partial[2][kWeightThreads];
  int count[2][kDigits + 1];
  int digit, above, nan;
  long long last_equal;
};

// What a side (positives, negatives) needs of its sequence to scale a value.
struct TopRange {
  double low, high;
  long long last_equal;  // where low == high: the last position that is chosen
  bool none, nan;
};

OR_FN double sigmoid(double x) { return 1. / (1. + exp(-x)); }

OR_FN double above_threshold(double value, double threshold) {
  const double x = (value - threshold) / (1. - threshold);
  return x < 0. ? 0. : (x > 1. ? 1. : x);  // NaN stays
}

OR_FN double top_scaled(const TopRange& r, double value, int64_t position) {
  if (r.none) return 0.;
  if (r.nan) return quiet_nan();
  if (r.high == r.low) return value == r.low && position <= r.last_equal ? 1. : 0.;
  return value < r.low ? 0. : (value - r.low) / (r.high - r.low);
}

OR_FN double score_at(const OrealTokenWeights& w, int64_t i) {
  return w.dtype == OREAL_BF16 ? Group<uint16_t>::load(static_cast<const uint16_t*>(w.scores)[i])
                               : static_cast<const float*>(w.scores)[i];
}

// The weights are rounded to float before they are multiplied, as they are where they leave the library.
OR_FN void write_weights(const OrealTokenWeights& w, int64_t sequence, int64_t i, double positive, double negative) {
  const float plus = static_cast<float>(positive), minus = static_cast<float>(negative);
  const double* strength = w.strengths != nullptr ? w.strengths + 2 * sequence : nullptr;
  const float a = static_cast<float>((strength != nullptr ? strength[0] : 1.) * plus);
  const float b = static_cast<float>((strength != nullptr ? strength[1] : 1.) * minus);
  const float k = static_cast<float>(w.kl);
  if (w.positive_weight != nullptr) w.positive_weight[i] = plus;
  if (w.negative_weight != nullptr) w.negative_weight[i] = minus;
  if (w.positive != nullptr) w.positive[i] = a;
  if (w.negative != nullptr) w.negative[i] = b;
  if (w.kl_out != nullptr) w.kl_out[i] = k;
  if (w.active != nullptr) w.active[i] = a != 0.f || b != 0.f || k != 0.f;
}

// emit(position, inclusive prefix sum of value(position)), positions 0 .. count-1. The order of the additions depends on
// the position alone.
template <class Block, class Value, class Emit>
OR_FN void block_prefix_sums(Block& block, WeightShared& shared, int64_t count, Value value, Emit emit) {
  double carry = 0.;
  for (int64_t base = 0; base < count; base += kWeightThreads * kWeightItems) {
    block.each([&](int thread) {
      double sum = 0.;
      for (int k = 0; k < kWeightItems; ++k) {
        const int64_t p = base + thread * kWeightItems + k;
        if (p < count) sum += value(p);
      }
      shared.partial[0][thread] = sum;
    });
    int now = 0;
    for (int step = 1; step < kWeightThreads; step *= 2) {
      block.each([&](int thread) {
        const double mine = shared.partial[now][thread];
        shared.partial[1 - now][thread] = thread >= step ? shared.partial[now][thread - step] + mine : mine;
      });
      now = 1 - now;
    }
    const double total = shared.partial[now][kWeightThreads - 1];
    block.each([&](int thread) {
      double sum = carry + (thread > 0 ? shared.partial[now][thread - 1] : 0.);
      for (int k = 0; k < kWeightItems; ++k) {
        const int64_t p = base + thread * kWeightItems + k;
        if (p < count) emit(p, sum += value(p));
      }
    });
    carry += total;
  }
}

// The rank-th largest (from 1) of value(0 .. count-1), all in [0, 1]: their bits order like the numbers. Radix select.
template <class Block, class Value>
OR_FN double block_select(Block& block, WeightShared& shared, int64_t count, int64_t rank, Value value) {
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    block.each([&](int thread) {
      for (int b = thread; b <= kDigits; b += kWeightThreads) shared.count[0][b] = shared.count[1][b] = 0;
    });
    block.each([&](int thread) {
      for (int64_t p = thread; p < count; p += kWeightThreads) {
        const uint64_t key = double_bits(value(p));
        if (shift == 56 || key >> (shift + 8) == prefix) block.add(&shared.count[0][(key >> shift) & 255u], 1);
      }
    });
    int now = 0;  // count[now][b] becomes the number of keys whose digit is >= b
    for (int step = 1; step < kDigits; step *= 2) {
      block.each([&](int thread) {
        if (thread < kDigits)
          shared.count[1 - now][thread] =
              shared.count[now][thread] + (thread + step < kDigits ? shared.count[now][thread + step] : 0);
      });
      now = 1 - now;
    }
    block.each([&](int thread) {
      if (thread < kDigits && shared.count[now][thread] >= rank && shared.count[now][thread + 1] < rank) {
        shared.digit = thread;
        shared.above = shared.count[now][thread + 1];
      }
    });
    prefix = (prefix << 8) | static_cast<uint64_t>(shared.digit);
    rank -= shared.above;
    block.each([](int) {});  // everyone has read digit and above
  }
  return bits_double(prefix);
}

// One side's range; value(p) of the sequence's qualities, none of them NaN.
template <class Block, class Value>
OR_FN TopRange block_top_range(Block& block, WeightShared& shared, int64_t count, double ratio, Value value) {
  const int64_t chosen = static_cast<int64_t>(floor(static_cast<double>(count) * ratio));
  TopRange r{0., 0., -1, chosen == 0, shared.nan != 0};
  if (r.none || r.nan) return r;
  r.low = block_select(block, shared, count, chosen, value);
  r.high = block_select(block, shared, count, 1, value);
  if (r.high == r.low) {
    block_prefix_sums(
        block, shared, count, [&](int64_t p) { return value(p) == r.low ? 1. : 0.; },
        [&](int64_t p, double equal) {
          if (equal == static_cast<double>(chosen) && value(p) == r.low) shared.last_equal = p;
        });
    r.last_equal = shared.last_equal;
    block.each([](int) {});
  }
  return r;
}

// All tokens of one sequence.
template <class Block>
OR_FN void block_token_weights(Block& block, WeightShared& shared, const OrealTokenWeights& w, int64_t sequence) {
  const int64_t start = w.cu_seqlens[sequence], count = w.cu_seqlens[sequence + 1] - start;
  if (w.scores == nullptr) {
    block.each([&](int thread) {
      for (int64_t p = thread; p < count; p += kWeightThreads) write_weights(w, sequence, start + p, 1., 1.);
    });
    return;
  }
  const bool topk = w.rescale == OREAL_TOPK;
  block.each([&](int thread) {
    if (thread == 0) shared.nan = 0;
  });
  auto quality = [&](int64_t p, double q) {
    if (!topk) {
      write_weights(w, sequence, start + p, above_threshold(q, w.positive_cut), above_threshold(1. - q, w.negative_cut));
      return;
    }
    w.scratch[start + p] = q;
    if (q != q) block.add(&shared.nan, 1);
  };
  if (w.mode == OREAL_RELEASED) {
    // relative to the first score, so that equal scores have exactly equal means
    const double first = score_at(w, start);
    block_prefix_sums(
        block, shared, count, [&](int64_t p) { return score_at(w, start + p) - first; },
        [&](int64_t p, double sum) { quality(p, sigmoid(first + sum / static_cast<double>(p + 1))); });
  } else {
    block.each([&](int thread) {
      for (int64_t p = thread; p < count; p += kWeightThreads) quality(p, sigmoid(score_at(w, start + p)));
    });
  }
  if (!topk) return;
  const double* q = w.scratch + start;
  const TopRange plus = block_top_range(block, shared, count, w.positive_cut, [&](int64_t p) { return q[p]; });
  const TopRange minus = block_top_range(block, shared, count, w.negative_cut, [&](int64_t p) { return 1. - q[p]; });
  block.each([&](int thread) {
    for (int64_t p = thread; p < count; p += kWeightThreads)
      write_weights(w, sequence, start + p, top_scaled(plus, q[p], p), top_scaled(minus, 1. - q[p], p));
  });
}

}  // namespace oreal
