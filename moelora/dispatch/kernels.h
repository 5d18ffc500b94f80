// Vectors of floats, activations, and matrix products of which one side has few ranks; see block.cpp for the shapes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int ROWS = 16, COLS = 256;
#ifdef __AVX512F__
constexpr int W = 16;  // floats in a vector
#else
constexpr int W = 8;
#endif
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, V x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline V splat(float x) { return V{} + x; }
inline float total(V x) {
  float sum = 0;
  for (int i = 0; i < W; i++) sum += x[i];
  return sum;
}
inline V load(const float* from, int count) {
  if (count == W) return load(from);
  V x{};
  std::memcpy(&x, from, sizeof(float) * count);
  return x;
}
inline void store(float* to, V x, int count) {
  if (count == W) return store(to, x);
  std::memcpy(to, &x, sizeof(float) * count);
}
// Calls body(column, how many) for vectors of columns; the last may be short.
template <class Body>
inline void for_vectors(int columns, Body body) {
  int c = 0;
  for (; c + W <= columns; c += W) body(c, W);
  if (c < columns) body(c, columns - c);
}

// ---- activations --------------------------------------------------------------------------------------------------

inline V exponential(V x) {  // 2^n e^r with |r| <= ln(2) / 2, and the series of e^r
  x = x < -87.f ? splat(-87.f) : x;
  x = x > 88.f ? splat(88.f) : x;
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  V n = (x * 1.44269504f + shift) - shift;
  V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  V e = splat(1.f / 5040);
  for (float next : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) e = e * r + next;
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  return e * (V)power;
}
inline V sigmoid(V x) { return 1.f / (1.f + exponential(-x)); }

enum Formula { SILU, GELU, GELU_TANH };

// P(X <= x) of the normal distribution. erfc(t) = exp(-t Q(t)); Q is our own least-maximum fit on [0, 6], whose error in
// erfc is below 2e-9.
inline V normal_cdf(V x) {
  V t = (x < 0.f ? -x : x) * 0.70710678f;
  t = t > 6.f ? splat(6.f) : t;
  V q = splat(7.378461646e-07f);
  for (float next : {-1.552736285e-05f, 1.373013074e-04f, -6.579284673e-04f, 1.667963923e-03f, -1.293716923e-04f,
                     -1.918544993e-02f, 1.027915180e-01f, 6.366170049e-01f, 1.128379345f})
    q = q * t + next;
  V tail = 0.5f * exponential(-t * q);
  return x < 0.f ? tail : 1.f - tail;
}

template <int FORMULA>
inline V activate(V x, V* slope) {
  if (FORMULA == GELU) {
    V cdf = normal_cdf(x);
    if (slope) *slope = cdf + x * (0.398942280f * exponential(-0.5f * x * x));
    return x * cdf;
  }
  // The tanh form of GELU is x sigmoid(2 k (x + 0.044715 x^3)) with k = sqrt(2 / pi).
  const float k = FORMULA == SILU ? 1.f : 1.59576912f, cubic = FORMULA == SILU ? 0.f : 0.044715f;
  V s = sigmoid(k * x + (k * cubic) * x * x * x);
  V y = x * s;
  if (slope) *slope = s + y * (1.f - s) * (k + (3.f * k * cubic) * x * x);
  return y;
}

// ---- products with few ranks --------------------------------------------------------------------------------------

// to[i] = from[i] + sum_k h[i, k] b[k] for M rows; h has the strides hi and hk.
template <int M>
void expand_rows(int64_t depth, const float* h, int64_t hi, int64_t hk, const float* b, const float* const* from,
                 float* const* to, int columns) {
  auto tile = [&](auto vectors, int c, int count) {
    constexpr int K = decltype(vectors)::value;
    V sum[M][K];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < K; j++) sum[i][j] = load(from[i] + c + j * W, K == 1 ? count : W);
    for (int64_t k = 0; k < depth; k++) {
      V row[K];
      for (int j = 0; j < K; j++) row[j] = load(b + k * COLS + c + j * W);
      for (int i = 0; i < M; i++)
        for (int j = 0; j < K; j++) sum[i][j] += h[i * hi + k * hk] * row[j];
    }
    for (int i = 0; i < M; i++)
      for (int j = 0; j < K; j++) store(to[i] + c + j * W, sum[i][j], K == 1 ? count : W);
  };
  int c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) tile(std::integral_constant<int, 2>{}, c, W);
  for (; c < columns; c += W) tile(std::integral_constant<int, 1>{}, c, std::min(W, columns - c));
}

// The same for any number of rows. The rows of b lie COLS apart and may be read to the end of their last vector.
void expand(int rows, int64_t depth, const float* h, int64_t hi, int64_t hk, const float* b, const float* const* from,
            float* const* to, int columns) {
  int i = 0;
  for (; i + 4 <= rows; i += 4) expand_rows<4>(depth, h + i * hi, hi, hk, b, from + i, to + i, columns);
  for (; i < rows; i++) expand_rows<1>(depth, h + i * hi, hi, hk, b, from + i, to + i, columns);
}

template <int M, int K>
void reduce_tile(const float* const* rows, const float* b, float* y, int64_t yi, int columns) {
  V sum[M][K] = {};
  for_vectors(columns, [&](int c, int count) {
    V x[M];
    for (int i = 0; i < M; i++) x[i] = load(rows[i] + c, count);
    for (int q = 0; q < K; q++) {
      V other = load(b + q * COLS + c, count);
      for (int i = 0; i < M; i++) sum[i][q] += x[i] * other;
    }
  });
  for (int i = 0; i < M; i++)
    for (int q = 0; q < K; q++) y[i * yi + q] += total(sum[i][q]);
}

// y[i, q] += sum_c rows[i][c] b[q, c].
void reduce(int count, const float* const* rows, int64_t ranks, const float* b, float* y, int64_t yi, int columns) {
  for (int i = 0; i < count;) {
    int m = count - i >= 4 ? 4 : 1;
    for (int64_t q = 0; q < ranks;) {
      int k = ranks - q >= 2 ? 2 : 1;
      auto run = m == 4 ? (k == 2 ? reduce_tile<4, 2> : reduce_tile<4, 1>)
                        : (k == 2 ? reduce_tile<1, 2> : reduce_tile<1, 1>);
      run(rows + i, b + q * COLS, y + i * yi + q, yi, columns);
      q += k;
    }
    i += m;
  }
}

}  // namespace
