// Vectors of the widest kind this machine has, written once for x86, ARM and anything that GCC or Clang compile for.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

constexpr int PAD = 32;    // columns are padded with zeros to a multiple of this
constexpr int PANEL = 4;   // rows that are stored, and multiplied, together
constexpr int IW = 2 * W;  // int8 columns per step
#if defined(__AVX512F__)
constexpr int VECTORS = 4;  // right-hand sides multiplied at once; PANEL * VECTORS sums must fit the registers
#else
constexpr int VECTORS = 2;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(2 * IW)));
typedef int8_t vb __attribute__((vector_size(IW)));

template <class V, class T>
static inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf load(const float* p) { return load_as<vf>(p); }

typedef struct {
  uint16_t bits;
} half;

// IEEE half to float, exact, subnormals included.
static inline float widen(half h) {
  uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff, bits;
  if (rest < 0x400) {  // subnormal: rest * 2^-24
    float f = (float)rest * 5.9604644775390625e-8f;
    memcpy(&bits, &f, 4);
  } else {
    bits = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline vf load(const half* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  typedef __fp16 vh __attribute__((vector_size(2 * W)));
  return __builtin_convertvector(load_as<vh>(p), vf);
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = widen(p[i]);
  return v;
#endif
}

// acc += a (int8) * b (int16), in int32: 2 * W products per call.
static inline vi dot_int(vi acc, const int8_t* a, const int16_t* b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512i wide = _mm512_cvtepi8_epi16(load_as<__m256i>(a)), x = load_as<__m512i>(b);
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, wide, x);
#else
  return (vi)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16(wide, x));
#endif
#elif defined(__AVX2__)
  __m256i wide = _mm256_cvtepi8_epi16(load_as<__m128i>(a)), x = load_as<__m256i>(b);
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(wide, x));
#else
  typedef int8_t qb __attribute__((vector_size(W)));
  typedef int16_t qs __attribute__((vector_size(2 * W)));
  for (int i = 0; i < IW; i += W)
    acc += __builtin_convertvector(load_as<qb>(a + i), vi) * __builtin_convertvector(load_as<qs>(b + i), vi);
  return acc;
#endif
}

static inline float sum(vf v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
#endif
}

static inline int32_t sum(vi v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
#endif
}

// Four numbers of each of four rows become those of four columns; rows are from_row and to_row apart.
static inline void transpose4(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(__SSE__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_row);
  __m128 c = _mm_loadu_ps(from + 2 * from_row), d = _mm_loadu_ps(from + 3 * from_row);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_row, b);
  _mm_storeu_ps(to + 2 * to_row, c), _mm_storeu_ps(to + 3 * to_row, d);
#else
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) to[i * to_row + j] = from[j * from_row + i];
#endif
}

static inline vf all(float x) { return x - vf{}; }  // unlike x + 0, nothing to compute: -0 stays -0

// Largest of n numbers; NaNs are passed over.
static inline float largest(const float* p, int n) {
  vf most = all(-INFINITY);
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load(p + i);
    most = v > most ? v : most;
  }
  float m = -INFINITY;
  for (; i < n; i++) m = p[i] > m ? p[i] : m;
  for (int k = 0; k < W; k++) m = most[k] > m ? most[k] : m;
  return m;
}

// Largest absolute value of n numbers, n a multiple of W.
static inline float largest_size(const float* p, int n) {
  vf most = {};
  for (int i = 0; i < n; i += W) {
    const vf v = load(p + i), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
  }
  float m = 0;
  for (int k = 0; k < W; k++) m = most[k] > m ? most[k] : m;
  return m;
}

// e^x within 2 units in the last place (the polynomial of Cephes' expf); NaN stays NaN.
static inline vf exp(vf x) {
  const vf low = all(-87.3f), high = all(88.3f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds
  x = x < low ? low : x;
  x = x > high ? high : x;
  vf n = (x * 1.44269504f + magic) - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  vf y = p * r * r + r + 1.0f;
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  memcpy(&scale, &power, sizeof scale);
  return y * scale;
}

// Sum of a[i] * b[i] for any n.
static inline float dot(const float* a, const float* b, int n) {
  vf acc = {};
  int i = 0;
  for (; i + W <= n; i += W) acc += load(a + i) * load(b + i);
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return sum(acc) + rest;
}
