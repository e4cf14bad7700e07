// Causal attention of one head, from its share of the q/k/v matrix to its share of the output and back: QK-norm, rotation
// and softmax inside, nothing of size T x T kept. As in FlashAttention (Dao et al. 2022), the way back computes the
// probabilities again, from the logarithm of each row's sum.

#pragma once

#include <vector>

#include "products.h"
#include "rows.h"

constexpr float NOWHERE = -1e30f;  // the score of what is not seen, where it goes through exp with the rest
constexpr int BAND = 8;            // rows that go into panels together: divides COLUMNS and QUERIES
constexpr int QUERIES = 32;        // a block of rows; its keys end at its last row's own

static inline vf greater(vf a, vf b) { return b > a ? b : a; }  // NaNs in b are passed over

static inline float greatest(vf v) {
  float most = v[0];
  for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
  return most;
}

constexpr int LINE = 16;  // floats of a cache line; what begins at one has no vector in two

static inline float* aligned(float* p) { return p + (LINE - ((uintptr_t)p / sizeof(float)) % LINE) % LINE; }

// The two of each pair, the other way round.
static inline vf swapped(vf v) {
  typedef uint64_t pairs __attribute__((vector_size(4 * W)));
  pairs p;
  memcpy(&p, &v, sizeof p);
  p = p << 32 | p >> 32;
  memcpy(&v, &p, sizeof p);
  return v;
}

// Rows are padded with zeros to whole vectors: Dp numbers.
struct Attention {
  const int64_t B, T, H, D, Dp = (D + W - 1) / W * W;
  const float eps;
  const float* qkv;      // (B, T, 3, H, D)
  const int32_t* first;  // (B, T): the first position that each sees; null = 0
  const bool normed;
  std::vector<float> tables;
  float* weights[2];       // (Dp) of q's and k's norm; ones without
  float *cosines, *sines;  // (T, Dp): both of a pair; the sine of its first is negative

  Attention(int64_t B, int64_t T, int64_t H, int64_t D, float eps, const float* qkv, const float* q_norm,
            const float* k_norm, const float* sin, const float* cos, const int32_t* first)
      : B(B), T(T), H(H), D(D), eps(eps), qkv(qkv), first(first), normed(q_norm), tables(2 * (T + 1) * Dp + LINE) {
    weights[0] = aligned(tables.data()), weights[1] = weights[0] + Dp;
    cosines = weights[1] + Dp, sines = cosines + T * Dp;
    for (int which : {0, 1}) {
      std::fill(weights[which], weights[which] + Dp, 1.0f);
      if (normed) memcpy(weights[which], which ? k_norm : q_norm, D * sizeof(float));
    }
    for (int64_t t = 0; t < T; t++)
      for (int64_t j = 0; j < D / 2; j++) {
        float *c = cosines + t * Dp + 2 * j, *s = sines + t * Dp + 2 * j;
        c[0] = c[1] = cos[t * (D / 2) + j];
        s[1] = sin[t * (D / 2) + j];
        s[0] = -s[1];
      }
  }

  int64_t padded_T() const { return (T + COLUMNS - 1) / COLUMNS * COLUMNS; }
  int64_t row(int64_t b, int64_t t, int which, int64_t h) const { return (((b * T + t) * 3 + which) * H + h) * D; }
  int64_t first_of(int64_t b, int64_t t) const { return first ? first[b * T + t] : 0; }

  // Numbers i to i + W of a row of D.
  vf part(const float* row, int64_t i) const {
    if (i + W <= D) return load(row + i);
    vf v = {};
    memcpy(&v, row + i, (D - i) * sizeof(float));
    return v;
  }

  // Writes numbers i to i + W of a row of D.
  void put(float* row, int64_t i, vf v) const {
    if (i + W <= D) return store(row + i, v);
    memcpy(row + i, &v, (D - i) * sizeof(float));
  }

  // Rows of one head lie far apart, so no processor guesses which comes next: ask for the row after some more.
  template <int write>
  void ask_ahead(const float* row, int64_t shares = 3) const {
    for (int64_t i = 0; i < D; i += LINE) __builtin_prefetch(row + 8 * shares * H * D + i, write);
  }

  float inverse_rms(const float* row) const {
    vf squares = {};
    for (int64_t i = 0; i < D; i += W) squares += part(row, i) * part(row, i);
    return 1 / std::sqrt(sum(squares) / (float)D + eps);
  }

  // Query (which = 0) or key (1), times `factor`: normed and rotated into `to` (Dp).
  void turned(int64_t b, int64_t t, int which, int64_t h, float factor, float* to) const {
    const float *from = qkv + row(b, t, which, h), *w = weights[which];
    const float *c = cosines + t * Dp, *s = sines + t * Dp;
    ask_ahead<0>(from);
    const vf scale = all(normed ? inverse_rms(from) * factor : factor);
    for (int64_t i = 0; i < Dp; i += W) {
      const vf x = part(from, i) * scale * load(w + i);
      store(to + i, x * load(c + i) + swapped(x) * load(s + i));
    }
  }

  // The way back of `turned`: gradient g (Dp), times `factor`, becomes that of the share of qkv; adds to grad_norm (Dp).
  void turned_back(int64_t b, int64_t t, int which, int64_t h, float factor, float* g, float* grad_qkv,
                   float* grad_norm) const {
    const int64_t at = row(b, t, which, h);
    const float *from = qkv + at, *w = weights[which];
    const float *c = cosines + t * Dp, *s = sines + t * Dp;
    ask_ahead<0>(from), ask_ahead<1>(grad_qkv + at);
    const float inverse = normed ? inverse_rms(from) : 1;
    vf shared = {};
    for (int64_t i = 0; i < Dp; i += W) {
      const vf turned = load(g + i) * factor, back = turned * load(c + i) - swapped(turned) * load(s + i);
      if (normed) {
        const vf product = back * part(from, i);
        shared += product * load(w + i);
        store(grad_norm + i, load(grad_norm + i) + product * inverse);
      }
      store(g + i, back);
    }
    const float mean = normed ? sum(shared) * inverse * inverse / (float)D : 0;
    for (int64_t i = 0; i < D; i += W) {
      vf x = load(g + i);
      if (normed) x = (x * load(w + i) - part(from, i) * mean) * inverse;
      put(grad_qkv + at, i, x);
    }
  }
};

// One thread's own memory. Panels are matrices transposed, COLUMNS positions at a time, as products read them: (panel, Dp,
// COLUMNS).
struct Head {
  const Attention& a;
  const int64_t b, h, T, D, Dp, Tp, Sp;
  float *keys, *key_panels, *values, *value_panels, *grad_keys, *grad_values;  // values: on the way there only
  float *queries, *grads, *out, *scores, *grad_scores;

  Head(const Attention& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), T(a.T), D(a.D), Dp(a.Dp), Tp(a.padded_T()), Sp(Tp + LINE) {
    static thread_local std::vector<float> memory;
    const int64_t whole = Tp * Dp, block = QUERIES * Dp, square = QUERIES * Sp;
    const size_t size = 5 * whole + 3 * block + 2 * square + LINE;
    if (D < Dp || T < Tp || memory.size() != size) memory.assign(size, 0.0f);  // what pads stays zero otherwise
    float* next = aligned(memory.data());
    for (float** p : {&keys, &key_panels, &value_panels, &grad_keys, &grad_values}) *p = next, next += whole;
    for (float** p : {&queries, &grads, &out}) *p = next, next += block;
    for (float** p : {&scores, &grad_scores}) *p = next, next += square;
    values = value_panels;
  }

  // Rows t to t + n (n <= BAND, t a multiple of it) of a head, Dp apart, into its panels.
  void into_panels(float* panels, const float* rows, int64_t t, int n) const {
    float* to = panels + t / COLUMNS * Dp * COLUMNS + t % COLUMNS;
    int r = 0;
    for (; r + 4 <= n; r += 4)
      for (int64_t d = 0; d < Dp; d += 4) transpose4(rows + r * Dp + d, Dp, to + d * COLUMNS + r, COLUMNS);
    for (; r < n; r++)
      for (int64_t d = 0; d < Dp; d++) to[d * COLUMNS + r] = rows[r * Dp + d];
  }

  void read_keys() {
    for (int64_t t = 0; t < T; t += BAND) {
      const int n = (int)std::min<int64_t>(BAND, T - t);
      for (int i = 0; i < n; i++) a.turned(b, t + i, 1, h, 1, keys + (t + i) * Dp);
      into_panels(key_panels, keys + t * Dp, t, n);
    }
  }

  void read_values(bool panels) {
    for (int64_t t = 0; t < T; t += BAND) {
      const int n = (int)std::min<int64_t>(BAND, T - t);
      float* rows = panels ? queries : values + t * Dp;  // the former are not read yet
      for (int i = 0; i < n; i++) {
        const float* from = a.qkv + a.row(b, t + i, 2, h);
        a.ask_ahead<0>(from);
        memcpy(rows + i * Dp, from, D * sizeof(float));
      }
      if (panels) into_panels(value_panels, rows, t, n);
    }
  }

  // Rows `start` to `end` of queries, times 1 / sqrt(D).
  void read_queries(int64_t start, int64_t end) {
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t t = start; t < end; t++) a.turned(b, t, 0, h, scale, queries + (t - start) * Dp);
  }

  // The first position that any of these rows sees, down to a whole panel.
  int64_t lowest(int64_t start, int64_t end) const {
    int64_t low = start;
    for (int64_t t = start; t < end; t++) low = std::min(low, a.first_of(b, t));
    return low / COLUMNS * COLUMNS;
  }

  // to (rows, Sp)[low:end] = left (rows, Dp) times the panels from `low` on.
  void against(const float* left, const float* panels, float* to, int rows, int64_t low, int64_t end) {
    for (int64_t t = low; t < end; t += COLUMNS)
      multiply({left, Dp, 1}, panels + t * Dp, COLUMNS, to + t, Sp, rows, COLUMNS, (int)Dp, false);
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
        float* p = scores + (t - start) * Sp;
        const int64_t from = a.first_of(b, t), left = from / W * W, right = (t + W) / W * W;  // in whole vectors
        std::fill(p + left, p + from, NOWHERE);
        std::fill(p + t + 1, p + right, NOWHERE);
        vf largest = all(-INFINITY), total = {};
        for (int64_t i = left; i < right; i += W) largest = greater(largest, load(p + i));
        const vf most = all(greatest(largest));
        for (int64_t i = left; i < right; i += W) {
          const vf e = exp(load(p + i) - most);
          total += e;
          store(p + i, e);
        }
        std::fill(p + low, p + from, 0.0f);
        std::fill(p + t + 1, p + std::max(right, end), 0.0f);
        sums[t - start] = sum(total);
        logsum[t] = most[0] + std::log(sums[t - start]);
      }
      multiply({scores + low, Sp, 1}, values + low * Dp, Dp, out, Dp, rows, (int)Dp, (int)(end - low), false);
      for (int64_t t = start; t < end; t++) {
        const float scale = 1 / sums[t - start];
        float* to = y + ((b * T + t) * a.H + h) * D;
        a.ask_ahead<1>(to, 1);
        for (int64_t d = 0; d < D; d++) to[d] = out[(t - start) * Dp + d] * scale;
      }
    }
  }

  // grad, y: as y above. grad_qkv: like qkv. grad_norms (2, Dp), added to; null without QK-norm.
  void backward(const float* grad, const float* y, const float* logsum, float* grad_qkv, float* grad_norms) {
    read_keys();
    read_values(true);
    std::fill(grad_keys, grad_keys + 2 * Tp * Dp, 0.0f);  // and the values'
    const float scale = 1 / std::sqrt((float)D);
    for (int64_t start = 0; start < T; start += QUERIES) {
      const int64_t end = std::min(start + QUERIES, T), low = lowest(start, end), n = end - low;
      const int rows = (int)(end - start);
      read_queries(start, end);
      for (int64_t t = start; t < end; t++) {
        const int64_t at = ((b * T + t) * a.H + h) * D;
        a.ask_ahead<0>(grad + at, 1), a.ask_ahead<0>(y + at, 1);
        memcpy(grads + (t - start) * Dp, grad + at, D * sizeof(float));
      }
      against(queries, key_panels, scores, rows, low, end);
      against(grads, value_panels, grad_scores, rows, low, end);
      for (int64_t t = start; t < end; t++) probabilities(t, t - start, low, end, y, logsum[t]);
      const Left P = {scores + low, 1, Sp}, dS = {grad_scores + low, 1, Sp};  // both transposed
      multiply(P, grads, Dp, grad_values + low * Dp, Dp, (int)n, (int)Dp, rows, true);
      multiply(dS, queries, Dp, grad_keys + low * Dp, Dp, (int)n, (int)Dp, rows, true);
      multiply({grad_scores + low, Sp, 1}, keys + low * Dp, Dp, out, Dp, rows, (int)Dp, (int)n, false);
      for (int64_t t = start; t < end; t++) {
        a.turned_back(b, t, 0, h, scale, out + (t - start) * Dp, grad_qkv, grad_norms);
      }
    }
    for (int64_t t = 0; t < T; t++) {
      a.turned_back(b, t, 1, h, 1, grad_keys + t * Dp, grad_qkv, grad_norms ? grad_norms + Dp : nullptr);
      memcpy(grad_qkv + a.row(b, t, 2, h), grad_values + t * Dp, D * sizeof(float));
    }
  }

  // Row t, the block's row r: scores S and grad_scores dP become P and dS = P (dP - sum(g y)).
  void probabilities(int64_t t, int64_t r, int64_t low, int64_t end, const float* y, float logsum) {
    float *__restrict p = scores + r * Sp, *__restrict ds = grad_scores + r * Sp;
    const int64_t from = a.first_of(b, t), left = from / W * W, right = (t + W) / W * W;  // in whole vectors
    const vf shared = all(dot(grads + r * Dp, y + ((b * T + t) * a.H + h) * D, D));
    for (int64_t i = left; i < right; i += W) {
      const vf e = exp(load(p + i) - logsum);
      store(p + i, e);
      store(ds + i, e * (load(ds + i) - shared));
    }
    for (float* row : {p, ds}) {
      std::fill(row + low, row + from, 0.0f);
      std::fill(row + t + 1, row + std::max(right, end), 0.0f);
    }
  }
};
