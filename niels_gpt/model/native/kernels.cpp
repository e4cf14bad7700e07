// What a training step computes between its matrix products, one pass over memory each. All float32 and contiguous.
// A number that is not finite stays so. Sums over rows are added up in an order that depends on the shape alone.

#include <vector>

#include "attention.h"
#include "random.h"
#include "threads.h"

// Sums of each part, (parts, n), into out.
static void add_up(const std::vector<float>& sums, int parts, int64_t n, float* __restrict out) {
  memset(out, 0, n * sizeof(float));
  for (int part = 0; part < parts; part++)
    for (int64_t i = 0; i < n; i++) out[i] += sums[part * n + i];
}

extern "C" {

void use_threads(void* region, int count) {
  threads.region = (Region)region;
  threads.count = count;
}

// y = x inverse w with inverse = 1 / sqrt(mean(x^2) + eps), for each of `rows` rows of C.
void rmsnorm(const float* x, const float* w, float* y, float* inverse, int64_t rows, int64_t C, float eps) {
  share_rows(rows, parts_of(rows, C), [=](int, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const float* __restrict from = x + row * C;
      float* __restrict to = y + row * C;
      const float scale = inverse[row] = inverse_rms(from, C, eps);
      for (int64_t i = 0; i < C; i++) to[i] = from[i] * scale * w[i];
    }
  });
}

// dx = inverse (g w - x mean(g w x) inverse^2), dw = sum of g x inverse.
void rmsnorm_backward(const float* g, const float* x, const float* w, const float* inverse, float* grad_x, float* grad_w,
                      int64_t rows, int64_t C) {
  const int n = parts_of(rows, C);
  std::vector<float> sums(n * C);
  share_rows(rows, n, [=, &sums](int part, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const int64_t at = row * C;
      norm_row_backward(g + at, x + at, w, inverse[row], grad_x + at, &sums[part * C], C);
    }
  });
  add_up(sums, n, C, grad_w);
}

// y = silu(gate) value, n numbers.
void swiglu(const float* gate, const float* value, float* y, int64_t n) {
  share_rows(n, parts_of(n, 1), [=](int, int64_t first, int64_t end) {
    const float *__restrict a = gate, *__restrict b = value;
    float* __restrict to = y;
    for (int64_t i = first; i < end; i++) to[i] = a[i] * b[i] / (1 + exponential(-a[i]));
  });
}

void swiglu_backward(const float* g, const float* gate, const float* value, float* grad_gate, float* grad_value,
                     int64_t n) {
  share_rows(n, parts_of(n, 1), [=](int, int64_t first, int64_t end) {
    const float *__restrict grad = g, *__restrict a = gate, *__restrict b = value;
    float *__restrict da = grad_gate, *__restrict db = grad_value;
    for (int64_t i = first; i < end; i++) {
      const float s = 1 / (1 + exponential(-a[i])), silu = a[i] * s;
      db[i] = grad[i] * silu;
      da[i] = grad[i] * b[i] * (s + silu * (1 - s));
    }
  });
}

// y = x scale where this number's random bits reach `dropped`, else x 0.
void dropout(const float* x, float* y, uint64_t key, uint32_t dropped, float scale, int64_t n) {
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  share_rows(blocks, parts_of(blocks, BLOCK), [=](int, int64_t first, int64_t end) {
    uint32_t bits[BLOCK];
    for (int64_t block = first; block < end; block++) {
      random_block(key, block, bits);
      const float* __restrict from = x + block * BLOCK;
      float* __restrict to = y + block * BLOCK;
      const int64_t there = std::min<int64_t>(BLOCK, n - block * BLOCK);
      for (int64_t i = 0; i < there; i++) to[i] = from[i] * (bits[i] < dropped ? 0.0f : scale);
    }
  });
}

// (B, T, 3, H, D) -> y (B, T, H, D) and logsum (B, H, T); see attention.h. backward: grad_norms (2, D).
void attention(const float* qkv, const float* q_norm, const float* k_norm, const float* sin, const float* cos,
               const int32_t* first, float* y, float* logsum, int64_t B, int64_t T, int64_t H, int64_t D, float eps) {
  const Attention a(B, T, H, D, eps, qkv, q_norm, k_norm, sin, cos, first);
  share((int)(B * H), [&](int i) { Head(a, i / H, i % H).forward(y, logsum + i * T); });
}

void attention_backward(const float* grad, const float* qkv, const float* q_norm, const float* k_norm, const float* sin,
                        const float* cos, const int32_t* first, const float* y, const float* logsum, float* grad_qkv,
                        float* grad_norms, int64_t B, int64_t T, int64_t H, int64_t D, float eps) {
  const Attention a(B, T, H, D, eps, qkv, q_norm, k_norm, sin, cos, first);
  std::vector<float> sums(q_norm ? B * H * 2 * a.Dp : 0);
  share((int)(B * H), [&](int i) {
    Head(a, i / H, i % H).backward(grad, y, logsum + i * T, grad_qkv, q_norm ? &sums[i * 2 * a.Dp] : nullptr);
  });
  if (!q_norm) return;
  std::vector<float> both(2 * a.Dp);
  add_up(sums, (int)(B * H), 2 * a.Dp, both.data());
  for (int which : {0, 1}) memcpy(grad_norms + which * D, &both[which * a.Dp], D * sizeof(float));
}

// Rows of V logits become softmax - one-hot(target), the gradient of their nats, which go into `nats`.
void cross_entropy(float* logits, const int64_t* target, float* nats, int64_t rows, int64_t V) {
  share_rows(rows, parts_of(rows, V), [=](int, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      float* __restrict p = logits + row * V;
      const float most = largest_of(p, V), wanted = p[target[row]], Z = exponentials(p, V, most);
      const float scale = 1 / Z;
      for (int64_t i = 0; i < V; i++) p[i] *= scale;
      p[target[row]] -= 1;
      nats[row] = std::log(Z) + (most - wanted);
    }
  });
}
}
