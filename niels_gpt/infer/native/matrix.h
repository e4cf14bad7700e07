// A weight matrix packed for reading it once per token: panels of four rows, columns interleaved vector by vector, so
// that a core reads one long stream. float32, float16, or int8 with a scale per row.

#pragma once

#include <cstdlib>
#include <vector>

#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum Kind { FP32 = 0, FP16 = 1, INT8 = 2 };

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// All packed weights in one piece, on huge pages where Linux has them: a tenth faster to stream.
struct Arena {
  char* base = nullptr;
  size_t size = 0, used = 0;

  bool reserve(size_t bytes) {
    const size_t huge = 2 << 20;
    size = (bytes + huge - 1) / huge * huge;
    if (posix_memalign((void**)&base, huge, size)) return false;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(base, size, MADV_HUGEPAGE);
#endif
    return true;
  }
  void* take(size_t bytes) {
    void* p = base + used;
    used += (bytes + 63) / 64 * 64;
    return p;
  }
  ~Arena() { free(base); }
};

struct Matrix {
  int rows = 0, cols = 0, width = 0, panels = 0;  // width: padded columns
  Kind kind = FP32;
  void* data = nullptr;
  float* scale = nullptr;      // int8: one per row
  const float* bias = nullptr;  // may be null
  int limit = 0;               // int8: largest activation whose sums cannot overflow int32

  static size_t element(Kind kind) { return kind == FP32 ? 4 : kind == FP16 ? 2 : 1; }

  static size_t bytes(int rows, int cols, Kind kind) {
    size_t n = (size_t)padded(rows, PANEL) * padded(cols, PAD) * element(kind);
    return (n + 63) / 64 * 64 + (kind == INT8 ? (padded(rows, PANEL) * sizeof(float) + 63) / 64 * 64 : 0);
  }

  void shape(int rows_, int cols_, Kind kind_, Arena& arena) {
    rows = rows_, cols = cols_, kind = kind_;
    width = padded(cols, PAD), panels = padded(rows, PANEL) / PANEL;
    size_t n = (size_t)panels * PANEL * width;
    data = arena.take(n * element(kind));
    if (kind == INT8) scale = (float*)arena.take((size_t)panels * PANEL * sizeof(float));
    long most = 2147483647L / 127 / width;
    limit = most < 32767 ? (int)most : 32767;
  }

  // Copy rows [first, first + n) from a plain (n, cols) matrix.
  void fill(int first, int n, const float* source) {
    for (int r = first; r < first + n; r++) {
      const float* row = source + (size_t)(r - first) * cols;
      if (kind == FP32) spread<float, W>(r, row, [](float x) { return x; });
      if (kind == FP16) spread<half, W>(r, row, narrow);
      if (kind == INT8) {
        float most = 0;
        for (int c = 0; c < cols; c++) most = fabsf(row[c]) > most ? fabsf(row[c]) : most;
        scale[r] = most / 127;
        const float factor = most > 0 ? 127 / most : 0;
        spread<int8_t, IW>(r, row, [factor](float x) { return (int8_t)(int32_t)(x * factor + (x < 0 ? -0.5f : 0.5f)); });
      }
    }
  }

 private:
  template <class T, int STEP, class Convert>
  void spread(int r, const float* row, Convert convert) {
    T* to = (T*)data + (size_t)(r / PANEL) * PANEL * width + (r % PANEL) * STEP;
    for (int c = 0; c < cols; c += STEP, to += PANEL * STEP) {
      const int n = cols - c < STEP ? cols - c : STEP;
      for (int i = 0; i < n; i++) to[i] = convert(row[c + i]);
    }
  }

  // Float to IEEE half, to the nearest, ties to even; too large becomes infinity.
  static half narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) return {(uint16_t)(sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0))};
    if (bits < 0x38800000) {  // subnormal: a multiple of 2^-24
      float size;
      memcpy(&size, &bits, 4);
      return {(uint16_t)(sign | (uint16_t)lrintf(size * 16777216.0f))};
    }
    bits += 0xfff + (bits >> 13 & 1);
    return {(uint16_t)(sign | (bits - 0x38000000) >> 13)};
  }
};

// Right-hand sides as a matrix of one kind wants them: floats, or int16 with a scale each.
struct Operand {
  std::vector<const float*> x;
  std::vector<int16_t> q;
  std::vector<float> scale;

  void quantize(const Matrix& m, int B) {
    q.resize((size_t)B * m.width);
    scale.resize(B);
    for (int b = 0; b < B; b++) {
      const float most = largest_size(x[b], m.width);  // the padding is zero
      const float factor = most > 0 ? m.limit / most : 0;
      scale[b] = most / m.limit;
      int16_t* out = &q[(size_t)b * m.width];
      for (int c = 0; c < m.width; c++) {  // adding and taking away 1.5 * 2^23 rounds to a whole number
        const float whole = (x[b][c] * factor + 12582912.0f) - 12582912.0f;
        out[c] = (int16_t)(int32_t)whole;
      }
    }
  }
};

// Processors guess which memory comes next, but not beyond a page of 4 KiB: ask for it that far ahead.
template <int BYTES>
static inline void ask_ahead(const void* p) {
  for (int i = 0; i < BYTES; i += 64) __builtin_prefetch((const char*)p + 4096 + i);
}

// y[n][r] = row r of the panel times right-hand side n. Every sum has one order of addition, whatever N is, so that a
// request gets the same bits alone and in a batch.
template <class T, int N>
static inline void multiply(const Matrix& m, int panel, const Operand& in, int first, float* y) {
  const T* w = (const T*)m.data + (size_t)panel * PANEL * m.width;
  vf acc[N][PANEL] = {};
  for (int c = 0; c < m.width; c += W, w += PANEL * W) {
    ask_ahead<PANEL * W * sizeof(T)>(w);
    for (int r = 0; r < PANEL; r++) {
      const vf row = load(w + r * W);
      for (int n = 0; n < N; n++) acc[n][r] += row * load(in.x[first + n] + c);
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < PANEL; r++) y[n * PANEL + r] = sum(acc[n][r]);
}

template <int N>
static inline void multiply_int8(const Matrix& m, int panel, const Operand& in, int first, float* y) {
  const int8_t* w = (const int8_t*)m.data + (size_t)panel * PANEL * m.width;
  const int16_t* x = &in.q[(size_t)first * m.width];
  vi acc[N][PANEL] = {};
  for (int c = 0; c < m.width; c += IW, w += PANEL * IW)
    for (int r = 0; r < PANEL; r++)
      for (int n = 0; n < N; n++) acc[n][r] = dot_int(acc[n][r], w + r * IW, x + (size_t)n * m.width + c);
  for (int n = 0; n < N; n++)
    for (int r = 0; r < PANEL; r++)
      y[n * PANEL + r] = (float)sum(acc[n][r]) * (in.scale[first + n] * m.scale[panel * PANEL + r]);
}

template <int N>
static inline void multiply_some(const Matrix& m, int panel, const Operand& in, int first, float* y) {
  if (m.kind == FP32) multiply<float, N>(m, panel, in, first, y);
  if (m.kind == FP16) multiply<half, N>(m, panel, in, first, y);
  if (m.kind == INT8) multiply_int8<N>(m, panel, in, first, y);
}

// y (B, PANEL): the panel's rows times all B right-hand sides.
static void multiply_panel(const Matrix& m, int panel, const Operand& in, int B, float* y) {
  int b = 0;
  for (; b + VECTORS <= B; b += VECTORS) multiply_some<VECTORS>(m, panel, in, b, y + b * PANEL);
  for (; b < B; b++) multiply_some<1>(m, panel, in, b, y + b * PANEL);
}
