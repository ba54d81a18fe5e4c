// The CUDA build: one block a row of logits, one block a sequence of scores, one thread a token.
//
// The sizes below may be set on the compiler's command line; benchmarks/gpu/kernels.py --tune compares them.
#include <cuda_runtime.h>

#define OREAL_DEVICE "cuda"

#include "oreal_rows.h"
#include "oreal_tokens.h"

#ifndef OREAL_STATISTICS_THREADS
#define OREAL_STATISTICS_THREADS 256
#endif
#ifndef OREAL_STATISTICS_BYTES  // that a thread has in flight
#define OREAL_STATISTICS_BYTES 128
#endif
#ifndef OREAL_GRADIENT_THREADS
#define OREAL_GRADIENT_THREADS 256
#endif
#ifndef OREAL_GRADIENT_BYTES
#define OREAL_GRADIENT_BYTES 64
#endif
#ifndef OREAL_GRADIENT_LAST_ROW_FIRST  // begins with the rows that the statistics pass has left in the L2 cache
#define OREAL_GRADIENT_LAST_ROW_FIRST 1
#endif

namespace oreal {
namespace {

constexpr int kCombineThreads = 128;
// Blocks on a multiprocessor, of 65,536 registers: enough of these for every variant's loads in flight, none spilled.
constexpr int kStatisticsBlocks = 65536 / (OREAL_STATISTICS_THREADS * 64);
constexpr int kGradientBlocks = 65536 / (OREAL_GRADIENT_THREADS * (OREAL_GRADIENT_BYTES / 2 + 32));

struct DeviceBlock {
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void warp(F f) const {
    if (threadIdx.x < 32) {
      f(static_cast<int>(threadIdx.x));
      __syncwarp();
    }
  }
  template <class F>
  __device__ __forceinline__ void one(F f) const {
    if (threadIdx.x == 0) f();
  }
  __device__ __forceinline__ void add(int* counter, int amount) const { atomicAdd(counter, amount); }
  __device__ __forceinline__ void set_bit(int32_t* word, int32_t bit) const { atomicOr(word, bit); }
};

template <class E>
constexpr int kStatisticsUnroll = OREAL_STATISTICS_BYTES / static_cast<int>(sizeof(Group<E>));
template <class E>
constexpr int kGradientUnroll = OREAL_GRADIENT_BYTES / static_cast<int>(sizeof(Group<E>));

template <class E, bool ALIGNED>
__global__ void __launch_bounds__(OREAL_STATISTICS_THREADS, kStatisticsBlocks) statistics_kernel(const StatisticsArguments a) {
  __shared__ Statistics shared[OREAL_STATISTICS_THREADS];
  DeviceBlock block;
  block_statistics<OREAL_STATISTICS_THREADS, kStatisticsUnroll<E>, E, ALIGNED>(
      block, shared, a, static_cast<int64_t>(blockIdx.x));
}

__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const CombineArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (i < a.rows) combine_row(a, i);
}

template <class E, bool ALIGNED>
__global__ void __launch_bounds__(OREAL_GRADIENT_THREADS, kGradientBlocks) gradient_kernel(const GradientArguments a) {
  const int64_t block = static_cast<int64_t>(blockIdx.x);
  const int64_t index = OREAL_GRADIENT_LAST_ROW_FIRST ? a.logits.rows - 1 - block : block;
  const Row<E, ALIGNED> row{static_cast<E*>(a.logits.data) + index * a.logits.stride};
  thread_gradient<OREAL_GRADIENT_THREADS, kGradientUnroll<E>>(static_cast<int>(threadIdx.x), row, a,
                                                                           row_gradient(a, index));
}

__global__ void __launch_bounds__(kWeightThreads, 1) weights_kernel(const OrealTokenWeights w) {
  __shared__ WeightShared shared;
  DeviceBlock block;
  block_token_weights(block, shared, w, static_cast<int64_t>(blockIdx.x));
}

unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

int launched() { return static_cast<int>(cudaGetLastError()); }

template <class E, bool ALIGNED>
int launch_statistics(const StatisticsArguments& a, void* stream) {
  statistics_kernel<E, ALIGNED>
      <<<grid(a.logits.rows), OREAL_STATISTICS_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launched();
}

int launch_combine(const CombineArguments& a, void* stream) {
  const int64_t blocks = (a.rows + kCombineThreads - 1) / kCombineThreads;
  combine_kernel<<<grid(blocks), kCombineThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launched();
}

template <class E, bool ALIGNED>
int launch_gradient(const GradientArguments& a, void* stream) {
  gradient_kernel<E, ALIGNED><<<grid(a.logits.rows), OREAL_GRADIENT_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launched();
}

int launch_token_weights(const OrealTokenWeights& w, void* stream) {
  weights_kernel<<<grid(w.sequences), kWeightThreads, 0, static_cast<cudaStream_t>(stream)>>>(w);
  return launched();
}

template <class... Kernel>
int first_error(Kernel*... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t found = cudaSuccess;
  // the runtime keeps the error for the next launched() to find: cudaGetLastError() takes it away
  ((found = found == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : found), ...);
  if (found != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<int>(found);
}

int probe() {
  return first_error(statistics_kernel<uint16_t, true>, statistics_kernel<uint16_t, false>,
                     statistics_kernel<float, true>, statistics_kernel<float, false>, gradient_kernel<uint16_t, true>,
                     gradient_kernel<uint16_t, false>, gradient_kernel<float, true>, gradient_kernel<float, false>,
                     combine_kernel, weights_kernel);
}

}  // namespace
}  // namespace oreal

#include "oreal_api.h"

extern "C" const char* oreal_error_string(int code) {
  if (code == OREAL_EARGUMENT) return "an argument that no kernel accepts (see oreal_loss.h)";
  if (code == OREAL_EALIGNMENT) return "a pointer that is not aligned to its elements";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
