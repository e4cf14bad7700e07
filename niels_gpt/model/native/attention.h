// Causal attention of one head, from its share of the q/k/v matrix to its share of the output and back: QK-norm, rotation
// and softmax inside, nothing of size T x T kept. As in FlashAttention (Dao et al. 2022), the way back computes the
// probabilities again, from the logarithm of each row's sum.

#pragma once

#include <vector>

#include "products.h"
#include "rows.h"

constexpr int QUERIES = 32;  // a block of rows; its keys end at its last row's own

struct Attention {
  int64_t B, T, H, D;
  float eps;
  const float* qkv;               // (B, T, 3, H, D)
  const float *q_norm, *k_norm;   // (D), both null without QK-norm
  const float *sin, *cos;         // (T, D / 2)
  const int32_t* first;           // (B, T): the first position that each sees; null = 0

  int64_t padded_D() const { return (D + W - 1) / W * W; }
  int64_t padded_T() const { return (T + COLUMNS - 1) / COLUMNS * COLUMNS; }
  int64_t row(int64_t b, int64_t t, int which, int64_t h) const { return (((b * T + t) * 3 + which) * H + h) * D; }
  int64_t first_of(int64_t b, int64_t t) const { return first ? first[b * T + t] : 0; }

  // Query (which = 0) or key (1): normed and rotated into `to`; returns 1 / rms.
  float turned(int64_t b, int64_t t, int which, int64_t h, float* __restrict to) const {
    const float *__restrict from = qkv + row(b, t, which, h), *__restrict w = which ? k_norm : q_norm;
    const float *__restrict s = sin + t * (D / 2), *__restrict c = cos + t * (D / 2);
    const float scale = w ? inverse_rms(from, D, eps) : 1;
    for (int64_t j = 0; j < D / 2; j++) {
      const float even = w ? from[2 * j] * scale * w[2 * j] : from[2 * j];
      const float odd = w ? from[2 * j + 1] * scale * w[2 * j + 1] : from[2 * j + 1];
      to[2 * j] = even * c[j] - odd * s[j];
      to[2 * j + 1] = even * s[j] + odd * c[j];
    }
    return scale;
  }

  // The way back of `turned`: gradient g becomes that of the share of qkv, in `to`; adds to the gradient of the norm.
  void turned_back(int64_t b, int64_t t, int which, int64_t h, float* __restrict g, float* __restrict to,
                   float* __restrict grad_norm) const {
    const float *__restrict from = qkv + row(b, t, which, h), *__restrict w = which ? k_norm : q_norm;
    const float *__restrict s = sin + t * (D / 2), *__restrict c = cos + t * (D / 2);
    for (int64_t j = 0; j < D / 2; j++) {
      const float even = g[2 * j], odd = g[2 * j + 1];
      g[2 * j] = even * c[j] + odd * s[j];
      g[2 * j + 1] = odd * c[j] - even * s[j];
    }
    if (w)
      norm_row_backward(g, from, w, inverse_rms(from, D, eps), to, grad_norm, D);
    else
      memcpy(to, g, D * sizeof(float));
  }
};

// One thread's own memory. Rows are padded with zeros to whole vectors; panels are matrices transposed, COLUMNS
// positions at a time, as products read them: (panel, D, COLUMNS).
struct Head {
  const Attention& a;
  const int64_t b, h, T, D, Dp, Tp;
  float *keys, *key_panels, *values, *value_panels, *grad_keys, *grad_values;  // values: on the way there only
  float *queries, *grads, *out, *scores, *grad_scores;

  Head(const Attention& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), T(a.T), D(a.D), Dp(a.padded_D()), Tp(a.padded_T()) {
    static thread_local std::vector<float> memory;
    const int64_t whole = Tp * Dp, block = QUERIES * Dp, square = QUERIES * Tp;
    memory.assign(5 * whole + 3 * block + 2 * square, 0.0f);
    float* next = memory.data();
    for (float** p : {&keys, &key_panels, &value_panels, &grad_keys, &grad_values}) *p = next, next += whole;
    for (float** p : {&queries, &grads, &out}) *p = next, next += block;
    for (float** p : {&scores, &grad_scores}) *p = next, next += square;
    values = value_panels;
  }

  static void into_panel(float* panels, const float* row, int64_t t, int64_t D, int64_t Dp) {
    float* to = panels + t / COLUMNS * Dp * COLUMNS + t % COLUMNS;
    for (int64_t d = 0; d < D; d++) to[d * COLUMNS] = row[d];
  }

  void read_keys() {
    for (int64_t t = 0; t < T; t++) {
      a.turned(b, t, 1, h, keys + t * Dp);
      into_panel(key_panels, keys + t * Dp, t, D, Dp);
    }
  }

  void read_values(bool panels) {
    for (int64_t t = 0; t < T; t++) {
      const float* from = a.qkv + a.row(b, t, 2, h);
      if (panels)
        into_panel(value_panels, from, t, D, Dp);
      else
        memcpy(values + t * Dp, from, D * sizeof(float));
    }
  }

  // Rows `start` to `end` of queries, times 1 / sqrt(D).
  void read_queries(int64_t start, int64_t end) {
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t t = start; t < end; t++) {
      float* to = queries + (t - start) * Dp;
      a.turned(b, t, 0, h, to);
      for (int64_t d = 0; d < D; d++) to[d] *= scale;
    }
  }

  // The first position that any of these rows sees, down to a whole panel.
  int64_t lowest(int64_t start, int64_t end) const {
    int64_t low = start;
    for (int64_t t = start; t < end; t++) low = std::min(low, a.first_of(b, t));
    return low / COLUMNS * COLUMNS;
  }

  // to (rows, Tp)[low:end] = left (rows, Dp) times the panels from `low` on.
  void against(const float* left, const float* panels, float* to, int rows, int64_t low, int64_t end) {
    for (int64_t t = low; t < end; t += COLUMNS)
      multiply({left, Dp, 1}, panels + t * Dp, COLUMNS, to + t, Tp, rows, COLUMNS, (int)Dp, false);
  }

  // y: this head's share of (B, T, H, D); logsum (T).
  void forward(float* y, float* logsum) {
    read_keys();
    read_values(false);
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), low = lowest(start, end);
      const int rows = (int)(end - start);
      read_queries(start, end);
      against(queries, key_panels, scores, rows, low, end);
      float sums[QUERIES];
      for (int64_t t = start; t < end; t++) {
        float* p = scores + (t - start) * Tp;
        const int64_t from = a.first_of(b, t), n = t + 1 - from;
        const float most = largest_of(p + from, n), Z = exponentials(p + from, n, most);
        logsum[t] = most + std::log(Z);
        sums[t - start] = Z;
        std::fill(p + low, p + from, 0.0f);
        std::fill(p + t + 1, p + end, 0.0f);
      }
      multiply({scores + low, Tp, 1}, values + low * Dp, Dp, out, Dp, rows, (int)Dp, (int)(end - low), false);
      for (int64_t t = start; t < end; t++) {
        const float scale = 1 / sums[t - start];
        float* to = y + ((b * T + t) * a.H + h) * D;
        for (int64_t d = 0; d < D; d++) to[d] = out[(t - start) * Dp + d] * scale;
      }
    }
  }

  // grad, y: as y above. grad_qkv: like qkv. grad_norms (2, D), added to; null without QK-norm.
  void backward(const float* grad, const float* y, const float* logsum, float* grad_qkv, float* grad_norms) {
    read_keys();
    read_values(true);
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), low = lowest(start, end), n = end - low;
      const int rows = (int)(end - start);
      read_queries(start, end);
      for (int64_t t = start; t < end; t++)
        memcpy(grads + (t - start) * Dp, grad + ((b * T + t) * a.H + h) * D, D * sizeof(float));
      against(queries, key_panels, scores, rows, low, end);
      against(grads, value_panels, grad_scores, rows, low, end);
      for (int64_t t = start; t < end; t++) probabilities(t, t - start, low, end, y, logsum[t]);
      const Left P = {scores + low, 1, Tp}, dS = {grad_scores + low, 1, Tp};  // both transposed
      multiply(P, grads, Dp, grad_values + low * Dp, Dp, (int)n, (int)Dp, rows, true);
      multiply(dS, queries, Dp, grad_keys + low * Dp, Dp, (int)n, (int)Dp, rows, true);
      multiply({grad_scores + low, Tp, 1}, keys + low * Dp, Dp, out, Dp, rows, (int)Dp, (int)n, false);
      for (int64_t t = start; t < end; t++) {
        float* g = out + (t - start) * Dp;
        for (int64_t d = 0; d < D; d++) g[d] *= scale;
        a.turned_back(b, t, 0, h, g, grad_qkv + a.row(b, t, 0, h), grad_norms);
      }
    }
    for (int64_t t = 0; t < T; t++) {
      a.turned_back(b, t, 1, h, grad_keys + t * Dp, grad_qkv + a.row(b, t, 1, h), grad_norms ? grad_norms + D : nullptr);
      memcpy(grad_qkv + a.row(b, t, 2, h), grad_values + t * Dp, D * sizeof(float));
    }
  }

  // Row t, the block's row r: scores S and grad_scores dP become P and dS = P (dP - sum(g y)).
  void probabilities(int64_t t, int64_t r, int64_t low, int64_t end, const float* y, float logsum) {
    float *__restrict p = scores + r * Tp, *__restrict ds = grad_scores + r * Tp;
    const int64_t from = a.first_of(b, t);
    const float shared = dot(grads + r * Dp, y + ((b * T + t) * a.H + h) * D, D);
    std::fill(p + low, p + from, 0.0f), std::fill(ds + low, ds + from, 0.0f);
    std::fill(p + t + 1, p + end, 0.0f), std::fill(ds + t + 1, ds + end, 0.0f);
    for (int64_t i = from; i <= t; i++) {
      p[i] = exponential(p[i] - logsum);
      ds[i] = p[i] * (ds[i] - shared);
    }
  }
};
