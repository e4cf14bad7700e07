// Small matrix products out of a thread's own cache, for attention: no packing, no threads, any number of rows.

#pragma once

#include "simd.h"

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int COLUMNS = 4 * W;  // of a tile: 4 rows of 4 vectors of sums fit 32 registers
#else
constexpr int COLUMNS = 2 * W;
#endif
constexpr int ROWS = 4;
constexpr int DEPTH = 64;  // terms of a sum before the next columns: what they read of B stays in the first-level cache

// A(m, k) is a[m * row + k * column], whichever way it lies in memory.
struct Left {
  const float* a;
  int64_t row, column;
};

template <int R, int C>
static inline void tile(Left A, const float* b, int64_t b_row, float* c, int64_t c_row, int K, bool add) {
  vf sums[R][C];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) sums[r][v] = add ? load(c + r * c_row + v * W) : vf{};
  for (int k = 0; k < K; k++) {
    vf right[C];
    for (int v = 0; v < C; v++) right[v] = load(b + k * b_row + v * W);
    for (int r = 0; r < R; r++) {
      const vf left = all(A.a[r * A.row + k * A.column]);
      for (int v = 0; v < C; v++) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < C; v++) store(c + r * c_row + v * W, sums[r][v]);
}

template <int C>
static inline void rows_of_tiles(Left A, const float* b, int64_t b_row, float* c, int64_t c_row, int M, int K, bool add) {
  int m = 0;
  for (; m + ROWS <= M; m += ROWS) tile<ROWS, C>({A.a + m * A.row, A.row, A.column}, b, b_row, c + m * c_row, c_row, K, add);
  for (; m < M; m++) tile<1, C>({A.a + m * A.row, A.row, A.column}, b, b_row, c + m * c_row, c_row, K, add);
}

// C (M, N) = A (M, K) B (K, N), or C += A B; rows of B and C are b_row and c_row apart, N is a multiple of W.
static void multiply(Left A, const float* b, int64_t b_row, float* c, int64_t c_row, int M, int N, int K, bool add) {
  for (int k = 0; k < K; k += DEPTH) {
    const int depth = K - k < DEPTH ? K - k : DEPTH;
    const Left part = {A.a + k * A.column, A.row, A.column};
    const float* from = b + k * b_row;
    int n = 0;
    for (; n + COLUMNS <= N; n += COLUMNS)
      rows_of_tiles<COLUMNS / W>(part, from + n, b_row, c + n, c_row, M, depth, add || k);
    for (; n < N; n += W) rows_of_tiles<1>(part, from + n, b_row, c + n, c_row, M, depth, add || k);
  }
}
