// Products of tokens with the experts that they chose, on a CPU in float32; slots.py calls them through this plain C
// interface.
//
// Rows of tokens are worked on in tiles of ROWS slots of one expert by COLS columns, which stay near the core: nothing of
// the size slots x width exists. Every thread owns a range of columns, or of slots, so that sums need no locks and do not
// depend on timing.
//
// Shapes: T tokens, C columns of any matrix of tokens, E experts, K slots per token, R stacked rank, N occupied slots
// sorted by expert, Q the largest rank of an expert.

#include <omp.h>

#include <vector>

#include "slots.h"

extern "C" {

// Groups the (T, K) expert indices by expert, keeping their order; an index outside 0..E-1 marks an empty slot. Fills
// slot and token (T * K) and offset (E + 1).
void moelora_sort(const int64_t* index, int64_t tokens, int64_t slots, int64_t experts, int64_t* slot, int64_t* token,
                  int64_t* offset) {
  std::fill(offset, offset + experts + 1, 0);
  auto used = [&](int64_t n) { return index[n] >= 0 && index[n] < experts; };
  for (int64_t n = 0; n < tokens * slots; n++)
    if (used(n)) offset[index[n] + 1]++;
  for (int64_t e = 0; e < experts; e++) offset[e + 1] += offset[e];
  std::vector<int64_t> next(offset, offset + experts);
  for (int64_t n = 0; n < tokens * slots; n++)
    if (used(n)) {
      int64_t at = next[index[n]]++;
      slot[at] = n;
      token[at] = n / slots;
    }
}

int64_t moelora_any(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (x[i] != 0) return 1;
  return 0;
}

// out[t] += w B_e A_e x[t] for every slot of a few tokens, without sorting them. x (T, D), out (T, O), A (R, D) and
// B (O, R) have no gaps.
void moelora_few(const int64_t* index, const float* weight, int64_t tokens, int64_t slots, const int64_t* edge,
                 int64_t experts, const float* x, const float* A, const float* B, int64_t D, int64_t O, float* out) {
  const int64_t R = edge[experts];
  std::vector<float> low(R);
  for (int64_t n = 0; n < tokens * slots; n++) {
    if (index[n] < 0 || index[n] >= experts) continue;
    const float* own = x + n / slots * D;
    float* to = out + n / slots * O;
    const int64_t first = edge[index[n]], last = edge[index[n] + 1];
    for (int64_t q = first; q < last; q++) {
      V sum{};
      for_vectors(static_cast<int>(D), [&](int c, int count) {
        sum += load(A + q * D + c, count) * load(own + c, count);
      });
      low[q] = total(sum) * weight[n];
    }
    for (int64_t o = 0; o < O; o++) {
      float sum = 0;
      for (int64_t q = first; q < last; q++) sum += B[o * R + q] * low[q];
      to[o] += sum;
    }
  }
}

// y[n, q] = scale_q sum_c x[token n, c] m_e[q, c], zero beyond an expert's rank.
void moelora_to_ranks(const Slots* s, const Rows* x, int64_t columns, const Factors* m, float* y, int64_t threads) {
  const int64_t Q = s->width, most = largest_rank(*s), slots = s->offset[s->experts];
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> tile(most * COLS);
    int64_t first = slots * omp_get_thread_num() / omp_get_num_threads();
    int64_t last = slots * (omp_get_thread_num() + 1) / omp_get_num_threads();
    std::memset(y + first * Q, 0, sizeof(float) * (last - first) * Q);
    for (int64_t e = 0; e < s->experts; e++) {
      int64_t from = std::max(first, s->offset[e]), to = std::min(last, s->offset[e + 1]);
      int64_t edge = s->edge[e], ranks = s->edge[e + 1] - edge;
      for (int64_t c = 0; c < columns && from < to && ranks; c += COLS) {
        int count = static_cast<int>(std::min<int64_t>(COLS, columns - c));
        pack(*m, edge, ranks, c, count, tile.data());
        for (int64_t n = from; n < to; n += ROWS) {
          int rows = static_cast<int>(std::min<int64_t>(ROWS, to - n));
          const float* at[ROWS];
          for (int i = 0; i < rows; i++) at[i] = x->data + s->token[n + i] * x->stride + c;
          reduce(rows, at, ranks, tile.data(), y + n * Q, Q, count);
        }
      }
      for (int64_t n = from; n < to; n++)
        for (int64_t q = 0; q < ranks; q++) y[n * Q + q] *= m->scale[edge + q];
    }
  }
}

// out[token n, c] += sum_q y[n, q] m_e[q, c], and, where d_m is given, d_m_e[q, c] = sum_n y[n, q] x[token n, c]; d_m has
// the shape and the order of axes that m has. Either of out and d_m may be null.
void moelora_from_ranks(const Slots* s, const float* y, const Factors* m, float* out, const Rows* x, float* d_m,
                        int64_t columns, int64_t threads) {
  const int64_t Q = s->width, most = largest_rank(*s), total_rank = s->edge[s->experts];
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory((2 * most + ROWS) * COLS);
    float *tile = memory.data(), *sum = tile + most * COLS, *buffer = sum + most * COLS;
    const bool by_rank = m->column_stride == 1;
    std::vector<float*> sums(most);
    for (int64_t q = 0; q < most; q++) sums[q] = sum + q * COLS;
    for_blocks(*s, share(columns, omp_get_thread_num(), omp_get_num_threads()),
               [&](int64_t e, int64_t edge, int64_t ranks, int64_t c0, int count) {
      const bool idle = s->offset[e] == s->offset[e + 1];
      if (!ranks || (idle && !d_m)) return;
      if (out && !idle) pack(*m, edge, ranks, c0, count, tile);
      if (d_m) std::memset(sum, 0, sizeof(float) * ranks * COLS);
      for_groups(*s, e, [&](int64_t n, int rows) {
        float* to[ROWS];
        bool twice = false;  // a token that chose an expert twice: its two rows are one
        for (int i = 0; i < rows; i++) {
          int64_t t = s->token[n + i];
          twice |= i && t == s->token[n + i - 1];
          if (out) to[i] = out + t * columns + c0;
          if (d_m) std::memcpy(buffer + i * COLS, x->data + t * x->stride + c0, sizeof(float) * count);
        }
        for (int i = 0, step = twice ? 1 : rows; out && i < rows; i += step)
          expand(step, ranks, y + (n + i) * Q, Q, 1, tile, to + i, to + i, count);
        if (d_m) expand(static_cast<int>(ranks), rows, y + n * Q, 1, Q, buffer, sums.data(), sums.data(), count);
      });
      if (d_m) unpack(sum, ranks, count, d_m + (by_rank ? edge * columns + c0 : edge + c0 * total_rank),
                      by_rank ? columns : 1, by_rank ? 1 : total_rank);
    });
  }
}

}  // extern "C"
