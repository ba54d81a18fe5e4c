// Arithmetic of one row's softmax statistics and gradient: one text for nvcc (device code) and for g++ (the host build).
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define OR_FN __device__ __forceinline__
#else
#define OR_FN inline
#endif

namespace oreal {

constexpr int kGroup = 8;  // columns that one thread takes at a time: 16 bytes of bf16

// Logits at or below this are masked columns. Finite, so that x - m of a masked column times its factor 0 is 0; far
// enough from -FLT_MAX that x - m does not overflow for m < 2.5e38; its bf16 bits are 0xfe80.
constexpr float kFloor = -8.507059173023462e37f;  // -2^126
constexpr uint32_t kFloorBf16 = 0xfe80u;
constexpr uint32_t kFloorBf16x2 = 0xfe80fe80u;
constexpr double kLog2e = 1.4426950408889634;

// ---- primitives -----------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

OR_FN float max_nan(float a, float b) {  // fmaxf would hide a NaN
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

OR_FN float exp2_fast(float x) {  // 2 ulp; exactly 1 at 0, exactly 0 at -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

OR_FN uint32_t max2_nan(uint32_t a, uint32_t b) {  // of two bf16 pairs, exact
  uint32_t y;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

OR_FN uint32_t round_bf16x2(float low, float high) {  // to nearest even
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

OR_FN float bits_float(uint32_t bits) { return __uint_as_float(bits); }
OR_FN float quiet_nan() { return __uint_as_float(0x7fc00000u); }
OR_FN uint64_t double_bits(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
OR_FN double bits_double(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

#else

inline float max_nan(float a, float b) { return (a != a || b != b) ? NAN : (a > b ? a : b); }
inline float exp2_fast(float x) { return ::exp2f(x); }
template <class To, class From>
inline To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float bits_float(uint32_t bits) { return bit_copy<float>(bits); }
inline float quiet_nan() { return NAN; }
inline uint64_t double_bits(double x) { return bit_copy<uint64_t>(x); }
inline double bits_double(uint64_t bits) { return bit_copy<double>(bits); }
inline uint32_t round_bf16(float x) {
  const uint32_t u = bit_copy<uint32_t>(x);
  return x != x ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
inline uint32_t round_bf16x2(float low, float high) { return round_bf16(low) | (round_bf16(high) << 16); }
inline uint32_t max2_nan(uint32_t a, uint32_t b) {
  const float low = max_nan(bits_float(a << 16), bits_float(b << 16));
  const float high = max_nan(bits_float(a & 0xffff0000u), bits_float(b & 0xffff0000u));
  return round_bf16x2(low, high);
}

#endif

// ---- eight columns --------------------------------------------------------------------------------------------------

// E is the storage type of a logit: uint16_t holds the bits of a bf16.
template <class E>
struct Group;

template <>
struct alignas(16) Group<uint16_t> {
  uint32_t w[kGroup / 2];

  OR_FN static float load(uint16_t e) { return bits_float(static_cast<uint32_t>(e) << 16); }
  OR_FN static uint16_t store(float x) { return static_cast<uint16_t>(round_bf16x2(x, 0.f)); }
  OR_FN static uint16_t floor_element() { return static_cast<uint16_t>(kFloorBf16); }
  OR_FN float first(int pair) const { return bits_float(w[pair] << 16); }
  OR_FN float second(int pair) const { return bits_float(w[pair] & 0xffff0000u); }
  OR_FN void floor() {
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) w[i] = max2_nan(w[i], kFloorBf16x2);
  }
  OR_FN void set_pair(int pair, float a, float b) { w[pair] = round_bf16x2(a, b); }
  OR_FN void set_element(int i, uint16_t e) {
    const uint32_t bits = e;
    w[i >> 1] = (i & 1) ? (w[i >> 1] & 0xffffu) | (bits << 16) : (w[i >> 1] & 0xffff0000u) | bits;
  }
  OR_FN uint16_t element(int i) const { return static_cast<uint16_t>(w[i >> 1] >> ((i & 1) * 16)); }
};

template <>
struct alignas(16) Group<float> {
  float x[kGroup];

  OR_FN static float load(float e) { return e; }
  OR_FN static float store(float v) { return v; }
  OR_FN static float floor_element() { return kFloor; }
  OR_FN float first(int pair) const { return x[2 * pair]; }
  OR_FN float second(int pair) const { return x[2 * pair + 1]; }
  OR_FN void floor() {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = max_nan(x[i], kFloor);
  }
  OR_FN void set_pair(int pair, float a, float b) {
    x[2 * pair] = a;
    x[2 * pair + 1] = b;
  }
  OR_FN void set_element(int i, float e) { x[i] = e; }
  OR_FN float element(int i) const { return x[i]; }
};

// A whole group from or to memory that is aligned to 16 bytes. Every logit is read once and written once: stream them.
#if defined(__CUDACC__)
OR_FN void load_vectors(Group<uint16_t>& g, const uint16_t* from) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from));
  g.w[0] = v.x, g.w[1] = v.y, g.w[2] = v.z, g.w[3] = v.w;
}
OR_FN void load_vectors(Group<float>& g, const float* from) {
  const float4* p = reinterpret_cast<const float4*>(from);
  const float4 a = __ldcs(p), b = __ldcs(p + 1);
  g.x[0] = a.x, g.x[1] = a.y, g.x[2] = a.z, g.x[3] = a.w;
  g.x[4] = b.x, g.x[5] = b.y, g.x[6] = b.z, g.x[7] = b.w;
}
OR_FN void store_vectors(uint16_t* to, const Group<uint16_t>& g) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(g.w[0], g.w[1], g.w[2], g.w[3]));
}
OR_FN void store_vectors(float* to, const Group<float>& g) {
  float4* p = reinterpret_cast<float4*>(to);
  __stcs(p, make_float4(g.x[0], g.x[1], g.x[2], g.x[3]));
  __stcs(p + 1, make_float4(g.x[4], g.x[5], g.x[6], g.x[7]));
}
#else
template <class E>
inline void load_vectors(Group<E>& g, const E* from) {
  std::memcpy(static_cast<void*>(&g), from, sizeof(g));
}
template <class E>
inline void store_vectors(E* to, const Group<E>& g) {
  std::memcpy(static_cast<void*>(to), &g, sizeof(g));
}
#endif

template <int COUNT>
OR_FN float groups_max(const Group<uint16_t> (&v)[COUNT]) {
  uint32_t m = kFloorBf16x2;
#pragma unroll
  for (int u = 0; u < COUNT; ++u)
    m = max2_nan(m, max2_nan(max2_nan(v[u].w[0], v[u].w[1]), max2_nan(v[u].w[2], v[u].w[3])));
  return max_nan(bits_float(m << 16), bits_float(m & 0xffff0000u));
}

template <int COUNT>
OR_FN float groups_max(const Group<float> (&v)[COUNT]) {
  float m = kFloor;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) m = max_nan(m, v[u].x[i]);
  }
  return m;
}

// ---- statistics of a set of columns ---------------------------------------------------------------------------------

// m = max x, d = sum e^((x-m)/T), t = sum e^((x-m)/T) (x-m), xy = x[label] or -inf. x in raw units: scaling by 1/T
// before subtracting would round m and x differently at |x| ~ 1e4.
struct alignas(16) Statistics {
  float m, d, t, xy;
};

OR_FN Statistics no_columns() { return Statistics{kFloor, 0.f, 0.f, -INFINITY}; }

// By how much a partial sum with maximum `from` is shifted when the maximum becomes `to`; finite, or NaN.
OR_FN float shift_between(float from, float to) { return max_nan(from - to, -FLT_MAX); }

// s2 = log2(e)/T. NaN anywhere survives in d.
OR_FN Statistics merge(const Statistics& a, const Statistics& b, float s2) {
  const float m = max_nan(a.m, b.m);
  const float da = shift_between(a.m, m), db = shift_between(b.m, m);
  const float ca = exp2_fast(da * s2), cb = exp2_fast(db * s2);
  const float ad = a.d * ca, bd = b.d * cb;
  return Statistics{m, ad + bd, fmaf(ca, a.t, ad * da) + fmaf(cb, b.t, bd * db), max_nan(a.xy, b.xy)};
}

// Take COUNT groups into the running statistics: one rescaling for all their columns. The groups are used up.
template <int COUNT, class E>
OR_FN void fold(Statistics& s, Group<E> (&v)[COUNT], float s2) {
  const float m = max_nan(s.m, groups_max(v));
  const float shift = shift_between(s.m, m);
  const float c = exp2_fast(shift * s2);
  float d0 = s.d * c, d1 = 0.f;
  float t0 = fmaf(c, s.t, d0 * shift), t1 = 0.f;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    v[u].floor();
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const float a = v[u].first(i) - m, b = v[u].second(i) - m;
      const float ea = exp2_fast(a * s2), eb = exp2_fast(b * s2);
      d0 += ea;
      d1 += eb;
      t0 = fmaf(ea, a, t0);
      t1 = fmaf(eb, b, t1);
    }
  }
  s.m = m;
  s.d = d0 + d1;
  s.t = t0 + t1;
}

// ---- gradient of a set of columns -----------------------------------------------------------------------------------

// g (onehot - softmax)/T of one row is k 2^((x-m) s2) everywhere but at the label.
struct RowGradient {
  float m, k, s2;
  float factor;   // g grad_out / T; 0: the row is written without being read
  float logp;
  int64_t label;  // column of the label in this shard, or -1
};

// factor (1 - p_y) without cancellation, before any rounding to bf16.
OR_FN float label_entry(const RowGradient& r) { return -r.factor * expm1f(r.logp); }

OR_FN float column_entry(const RowGradient& r, float x) { return r.k * exp2_fast((x - r.m) * r.s2); }

// The entries of a group; the label's, if it is in there, is not yet right.
template <class E>
OR_FN Group<E> gradient_group(const RowGradient& r, const Group<E>& v) {
  Group<E> out;
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) out.set_pair(i, column_entry(r, v.first(i)), column_entry(r, v.second(i)));
  return out;
}

}  // namespace oreal
