// The host build: the same rows, blocks and tokens on the CPU, one thread after another, behind the same C functions.
// For tests without a GPU. The sizes below may be set on the compiler's command line.
#define OREAL_DEVICE "cpu"
#define OREAL_BUILD "archs=host sources=host nvcc=none"

#include "oreal_rows.h"
#include "oreal_tokens.h"

#ifndef OREAL_THREADS
#define OREAL_THREADS 256
#endif
#ifndef OREAL_BYTES
#define OREAL_BYTES 128
#endif
#ifndef OREAL_LAST_THREAD_FIRST  // two orders with the same bits: no thread reads what another writes in its phase
#define OREAL_LAST_THREAD_FIRST 0
#endif

namespace oreal {
namespace {

template <int THREADS>
struct HostBlock {
  template <class F>
  static void run(int count, F f) {
    for (int i = 0; i < count; ++i) f(OREAL_LAST_THREAD_FIRST ? count - 1 - i : i);
  }
  template <class F>
  void each(F f) const {
    run(THREADS, f);
  }
  template <class F>
  void warp(F f) const {
    run(32, f);
  }
  template <class F>
  void one(F f) const {
    f();
  }
  void add(int* counter, int amount) const { *counter += amount; }
  void set_bit(int32_t* word, int32_t bit) const { *word |= bit; }
};

template <class E>
constexpr int kUnroll = OREAL_BYTES / static_cast<int>(sizeof(Group<E>));

template <class E, bool ALIGNED>
int launch_statistics(const StatisticsArguments& a, void*) {
  Statistics shared[OREAL_THREADS];
  HostBlock<OREAL_THREADS> block;
  for (int64_t row = 0; row < a.logits.rows; ++row)
    block_statistics<OREAL_THREADS, kUnroll<E>, E, ALIGNED>(block, shared, a, row);
  return 0;
}

int launch_combine(const CombineArguments& a, void*) {
  for (int64_t row = 0; row < a.rows; ++row) combine_row(a, row);
  return 0;
}

template <class E, bool ALIGNED>
int launch_gradient(const GradientArguments& a, void*) {
  for (int64_t index = 0; index < a.logits.rows; ++index) {
    const Row<E, ALIGNED> row{static_cast<E*>(a.logits.data) + index * a.logits.stride};
    const RowGradient r = row_gradient(a, index);
    HostBlock<OREAL_THREADS>::run(OREAL_THREADS, [&](int thread) {
      thread_gradient<OREAL_THREADS, kUnroll<E>>(thread, row, a, r);
    });
  }
  return 0;
}

int launch_token_weights(const OrealTokenWeights& w, void*) {
  static thread_local WeightShared shared;
  HostBlock<kWeightThreads> block;
  for (int64_t sequence = 0; sequence < w.sequences; ++sequence) block_token_weights(block, shared, w, sequence);
  return 0;
}

int probe() { return 0; }

}  // namespace
}  // namespace oreal

#include "oreal_api.h"

extern "C" const char* oreal_error_string(int code) {
  if (code == OREAL_EARGUMENT) return "an argument that no kernel accepts (see oreal_loss.h)";
  if (code == OREAL_EALIGNMENT) return "a pointer that is not aligned to its elements";
  return "unknown";
}
