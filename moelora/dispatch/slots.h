// What Python hands over, and walks over slots and columns; see slots.cpp for the shapes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Occupied slots, sorted by expert. token (N); offset (E + 1) into N; edge (E + 1) into R; width is Q.
struct Slots {
  const int64_t *token, *offset, *edge;
  int64_t experts, width;
};
// Stacked factors of the experts as (R, C) with any strides; data is null where a projection has no experts.
struct Factors {
  const float* data;
  int64_t rank_stride, column_stride;
  const float* scale;  // (R)
};
// A matrix of tokens (T, C), columns next to each other.
struct Rows {
  const float* data;
  int64_t stride;
};

namespace {

struct Range {
  int64_t first, last;
};
// Columns of one thread: whole pairs of vectors, as even as that allows.
Range share(int64_t columns, int thread, int threads) {
  int64_t units = (columns + 2 * W - 1) / (2 * W);
  return {std::min(columns, units * thread / threads * 2 * W), std::min(columns, units * (thread + 1) / threads * 2 * W)};
}

// to[c, r] = from[r, c], rows from_stride and to_stride apart; eight by eight where it goes.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  typedef float E __attribute__((vector_size(32)));
  typedef float Any __attribute__((vector_size(32), aligned(4), may_alias));
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8)
    for (int64_t c = 0; c < whole_columns; c += 8) {
      E a[8], b[8];
      for (int i = 0; i < 8; i++) a[i] = *reinterpret_cast<const Any*>(from + (r + i) * from_stride + c);
      for (int i = 0; i < 8; i += 2) {  // pairs of neighbours
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      for (int i = 0; i < 8; i += 4)  // fours
        for (int j = 0; j < 2; j++) {
          a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      for (int j = 0; j < 4; j++) {  // halves
        Any* low = reinterpret_cast<Any*>(to + (c + j) * to_stride + r);
        Any* high = reinterpret_cast<Any*>(to + (c + j + 4) * to_stride + r);
        *low = __builtin_shufflevector(a[j], a[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *high = __builtin_shufflevector(a[j], a[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
}

// The columns [first, first + count) of one expert's factors, row by row, COLS apart, zeros to the end of a vector.
void pack(const Factors& m, int64_t edge, int64_t ranks, int64_t first, int count, float* tile) {
  const float* from = m.data + edge * m.rank_stride + first * m.column_stride;
  if (m.column_stride == 1) {
    for (int64_t q = 0; q < ranks; q++) std::memcpy(tile + q * COLS, from + q * m.rank_stride, sizeof(float) * count);
  } else {
    transpose(from, m.column_stride, count, ranks, tile, COLS);
  }
  for (int64_t q = 0; count % W && q < ranks; q++)
    std::memset(tile + q * COLS + count, 0, sizeof(float) * (W - count % W));
}

void unpack(const float* tile, int64_t ranks, int count, float* to, int64_t rank_stride, int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t q = 0; q < ranks; q++) std::memcpy(to + q * rank_stride, tile + q * COLS, sizeof(float) * count);
  } else {
    transpose(tile, COLS, ranks, count, to, column_stride);
  }
}

int64_t largest_rank(const Slots& s) {
  int64_t most = 1;
  for (int64_t e = 0; e < s.experts; e++) most = std::max(most, s.edge[e + 1] - s.edge[e]);
  return most;
}

// body(expert, its edge in R, its rank, first column, columns) for every expert and block of this thread's columns.
template <class Body>
void for_blocks(const Slots& s, Range own, Body body) {
  for (int64_t c = own.first; c < own.last; c += COLS)
    for (int64_t e = 0; e < s.experts; e++)
      body(e, s.edge[e], s.edge[e + 1] - s.edge[e], c, static_cast<int>(std::min<int64_t>(COLS, own.last - c)));
}
// body(first slot, slots) for every group of an expert's slots.
template <class Body>
void for_groups(const Slots& s, int64_t e, Body body) {
  for (int64_t n = s.offset[e]; n < s.offset[e + 1]; n += ROWS)
    body(n, static_cast<int>(std::min<int64_t>(ROWS, s.offset[e + 1] - n)));
}

struct Buffer {  // ROWS rows of a tile, and pointers to them
  float* row[ROWS];
  explicit Buffer(float* start) {
    for (int i = 0; i < ROWS; i++) row[i] = start + i * COLS;
  }
};

}  // namespace
