// Random bits as a function of (key, counter), so that no thread waits for another's and no mask has to be kept:
// Threefry 4x32-20 (Salmon et al. 2011), sixteen counters at once.

#pragma once

#include <cstdint>
#include <cstring>

typedef uint32_t vu __attribute__((vector_size(64)));
constexpr int LANES = sizeof(vu) / sizeof(uint32_t);
constexpr int BLOCK = 4 * LANES;  // numbers of sixteen counters

template <int by>
static inline vu rotated(vu x) {
  return x << by | x >> (32 - by);
}

template <int by, int other>
static inline void mix(vu& a, vu& b, vu& c, vu& d) {
  a += b, b = rotated<by>(b) ^ a;
  c += d, d = rotated<other>(d) ^ c;
}

// Numbers 64 i to 64 i + 63 of this key: number q of counter 16 i + j comes at 16 q + j.
static inline void random_block(uint64_t key, uint64_t i, uint32_t* out) {
  const uint32_t keys[5] = {(uint32_t)key, (uint32_t)(key >> 32), 0, 0,
                            0x1BD11BDA ^ (uint32_t)key ^ (uint32_t)(key >> 32)};
  const vu zero = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vu a = lane + (uint32_t)(i * LANES) + keys[0], b = zero + (uint32_t)(i * LANES >> 32) + keys[1], c = zero + keys[2],
     d = zero + keys[3];
  for (uint32_t r = 1; r <= 5; r++) {  // four rounds each
    if (r & 1) {
      mix<10, 26>(a, b, c, d), mix<11, 21>(a, d, c, b);
      mix<13, 27>(a, b, c, d), mix<23, 5>(a, d, c, b);
    } else {
      mix<6, 20>(a, b, c, d), mix<17, 11>(a, d, c, b);
      mix<25, 10>(a, b, c, d), mix<18, 20>(a, d, c, b);
    }
    a += keys[r % 5], b += keys[(r + 1) % 5], c += keys[(r + 2) % 5], d += keys[(r + 3) % 5] + r;
  }
  memcpy(out, &a, sizeof a), memcpy(out + LANES, &b, sizeof b);
  memcpy(out + 2 * LANES, &c, sizeof c), memcpy(out + 3 * LANES, &d, sizeof d);
}
