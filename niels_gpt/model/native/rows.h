// Loops over one row of numbers. A number that is not finite stays so.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// e^x within 2 units in the last place (the polynomial of Cephes' expf); NaN stays NaN.
static inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return y * scale;
}

static inline float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// From g, the gradient of x inverse w, that of x: inverse (g w - x mean(g w x) inverse^2); adds g x inverse to grad_w.
static inline void norm_row_backward(const float* __restrict g, const float* __restrict x, const float* __restrict w,
                                     float inverse, float* __restrict grad_x, float* __restrict grad_w, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const float gx = g[i] * x[i];
    sum += gx * w[i];
    grad_w[i] += gx * inverse;
  }
  const float shared = sum * inverse * inverse / (float)n;
  for (int64_t i = 0; i < n; i++) grad_x[i] = inverse * (g[i] * w[i] - x[i] * shared);
}

static inline float inverse_rms(const float* x, int64_t n, float eps) {
  return 1 / std::sqrt(dot(x, x, n) / (float)n + eps);
}

static inline float largest_of(const float* __restrict x, int64_t n) {
  float most = x[0];
#pragma omp simd reduction(max : most)
  for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// x becomes e^(x - most); returns the sum.
static inline float exponentials(float* __restrict x, int64_t n, float most) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] = exponential(x[i] - most);
  return sum;
}
