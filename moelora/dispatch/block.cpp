// The experts of an FFN block on a CPU, in float32; block_compiled.py calls this through a plain C interface.
//
// As in slots.cpp, every thread owns a range of columns. Sums over columns are added up thread by thread, always in the
// same order.
//
// Shapes: T tokens, F width between the projections, E experts, R stacked rank, N occupied slots sorted by expert, Q the
// largest rank of an expert.

#include <omp.h>

#include <vector>

#include "slots.h"

struct Mix {
  Rows activated, multiplied, keep;
  const float *low_activated, *low_multiplied;  // (N, Q), scaled
  Factors B_activated, B_multiplied, A_down;
  const float* weight;  // (N)
  int64_t columns, formula, threads;
};
struct MixGradients {
  const float *d_mix, *d_down;              // (T, F); (N, Q) by the unweighted, scaled activations of A_down
  float *d_activated, *d_multiplied;        // (T, F), zero before
  float *d_low_activated, *d_low_multiplied;  // (N, Q) by the unscaled activations
  float *d_B_activated, *d_B_multiplied;    // (F, R)
  float *d_A_down;                          // (R, F)
  float *d_weight;                          // (N)
};

namespace {

template <int FORMULA>
void forward_rows(const Mix& x, const Slots& s, int64_t n0, int rows, int64_t c0, int columns, Buffer& p, Buffer& u,
                  float* mix) {
  for (int i = 0; i < rows; i++) {
    int64_t t = s.token[n0 + i];
    const float w = x.weight[n0 + i];
    const float* keep = x.keep.data ? x.keep.data + t * x.keep.stride + c0 : nullptr;
    float *pi = p.row[i], *ui = u.row[i], *to = mix + t * x.columns + c0;
    const bool gated = x.multiplied.data, down = x.A_down.data;
    for_vectors(columns, [&](int c, int count) {
      V a = activate<FORMULA>(load(pi + c, count), nullptr);
      if (gated) a *= load(ui + c, count);
      store(to + c, load(to + c, count) + w * a, count);
      if (down) store(pi + c, keep ? a * load(keep + c, count) : a, count);
    });
  }
}

// p and u become the gradients of the pre-activations, a the activation that A_down saw; v holds d_mix + d_down A_down, or
// without d_mix where a mask comes between.
template <int FORMULA>
void backward_rows(const Mix& x, const Slots& s, const MixGradients& g, int64_t n0, int rows, int64_t c0, int columns,
                   Buffer& p, Buffer& u, Buffer& v, Buffer& a, float* d_weight, int64_t step) {
  for (int i = 0; i < rows; i++) {
    int64_t t = s.token[n0 + i], at = t * x.columns + c0;
    const float w = x.weight[n0 + i];
    const float* keep = x.keep.data ? x.keep.data + t * x.keep.stride + c0 : nullptr;
    const bool gated = x.multiplied.data, down = x.A_down.data;
    float *pi = p.row[i], *ui = u.row[i], *vi = v.row[i], *ai = a.row[i];
    V dot{};
    for_vectors(columns, [&](int c, int count) {
      V slope, act = activate<FORMULA>(load(pi + c, count), &slope), y = act, d = load(vi + c, count), k = splat(1.f);
      if (keep) d = load(g.d_mix + at + c, count) + (k = load(keep + c, count)) * d;
      V other{};
      if (gated) y *= other = load(ui + c, count);
      dot += y * d;
      if (down) store(ai + c, k * y, count);
      d *= w;
      if (gated) {
        store(ui + c, d * act, count);
        store(g.d_multiplied + at + c, load(g.d_multiplied + at + c, count) + d * act, count);
        d *= other;
      }
      d *= slope;
      store(pi + c, d, count);
      store(g.d_activated + at + c, load(g.d_activated + at + c, count) + d, count);
    });
    d_weight[i * step] += total(dot);
  }
}

// The factors of one expert in one block of columns.
struct Experts {
  const Mix& x;
  int count;
  int64_t ranks, first;
  float *B_activated, *B_multiplied, *A_down;

  Experts(const Mix& x, int64_t edge, int64_t ranks, int64_t first, int count, float* b, float* b2, float* a)
      : x(x), count(count), ranks(ranks), first(first), B_activated(b), B_multiplied(b2), A_down(a) {
    if (x.B_activated.data) pack(x.B_activated, edge, ranks, first, count, b);
    if (x.B_multiplied.data) pack(x.B_multiplied, edge, ranks, first, count, b2);
    if (x.A_down.data) pack(x.A_down, edge, ranks, first, count, a);
  }

  // Rows of tokens lie far apart, so the next group's are fetched while this one is worked on.
  void fetch(const Slots& s, const float* data, int64_t stride, int64_t n) const {
    const int64_t last = std::min(n + 2 * ROWS, s.offset[s.experts]);
    for (int64_t m = n + ROWS; data && m < last; m++)
      for (int c = 0; c < count; c += 16) __builtin_prefetch(data + s.token[m] * stride + first + c);
  }

  void pre_activations(const Slots& s, int64_t n, int rows, Buffer& p, Buffer& u) const {
    fetch(s, x.activated.data, x.activated.stride, n);
    fetch(s, x.multiplied.data, x.multiplied.stride, n);
    half(s, x.activated, x.low_activated, B_activated, n, rows, p);
    if (x.multiplied.data) half(s, x.multiplied, x.low_multiplied, B_multiplied, n, rows, u);
  }

  void half(const Slots& s, const Rows& frozen, const float* low, const float* b, int64_t n, int rows, Buffer& to) const {
    const float* from[ROWS];
    for (int i = 0; i < rows; i++) from[i] = frozen.data + s.token[n + i] * frozen.stride + first;
    expand(rows, low ? ranks : 0, low + n * s.width, s.width, 1, b, from, to.row, count);
  }
};

template <class Run>
void with_formula(int64_t formula, Run run) {
  if (formula == SILU) run(std::integral_constant<int, SILU>{});
  if (formula == GELU) run(std::integral_constant<int, GELU>{});
  if (formula == GELU_TANH) run(std::integral_constant<int, GELU_TANH>{});
}

// y[n, q] = w_n scale_q sum over threads of parts[thread][n][first + q], zero beyond an expert's rank.
void add_parts(const Slots& s, const float* parts, int threads, int64_t step, int64_t first, const float* scale,
               const float* weight, float* y) {
  const int64_t slots = s.offset[s.experts], Q = s.width;
  for (int64_t e = 0; e < s.experts; e++) {
#pragma omp for schedule(static) nowait
    for (int64_t n = s.offset[e]; n < s.offset[e + 1]; n++)
      for (int64_t q = 0; q < Q; q++) {
        float sum = 0;
        if (q < s.edge[e + 1] - s.edge[e]) {
          for (int k = 0; k < threads; k++) sum += parts[(k * slots + n) * step + first + q];
          sum *= scale[s.edge[e] + q];
        }
        y[n * Q + q] = weight ? sum * weight[n] : sum;
      }
  }
}

}  // namespace

extern "C" {

// mix (T, F), zero before, += w_n a_n, and down[n, q] = w_n scale_q A_down,e[q] a_n, kept by the mask; see compiled.py.
void moelora_mix_forward(const Slots* s, const Mix* x, float* mix, float* down) {
  const int64_t Q = s->width, most = largest_rank(*s), slots = s->offset[s->experts];
  std::vector<float> parts(x->A_down.data ? x->threads * slots * Q : 0);
#pragma omp parallel num_threads(x->threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    std::vector<float> memory((3 * most + 2 * ROWS) * COLS);
    float *b = memory.data(), *b2 = b + most * COLS, *a = b2 + most * COLS, *rest = a + most * COLS;
    Buffer p(rest), u(rest + ROWS * COLS);
    float* part = parts.data() + thread * slots * Q;
    for_blocks(*s, share(x->columns, thread, threads),
               [&](int64_t e, int64_t edge, int64_t ranks, int64_t c0, int count) {
      if (s->offset[e] == s->offset[e + 1]) return;
      Experts own{*x, edge, ranks, c0, count, b, b2, a};
      for_groups(*s, e, [&](int64_t n, int rows) {
        own.pre_activations(*s, n, rows, p, u);
        with_formula(x->formula, [&](auto f) { forward_rows<f.value>(*x, *s, n, rows, c0, count, p, u, mix); });
        if (x->A_down.data) reduce(rows, p.row, ranks, a, part + n * Q, Q, count);
      });
    });
    if (x->A_down.data) {
#pragma omp barrier
      add_parts(*s, parts.data(), threads, Q, 0, x->A_down.scale, x->weight, down);
    }
  }
}

void moelora_mix_backward(const Slots* s, const Mix* x, const MixGradients* g) {
  // Of every slot: the gradients of its two low-rank activations, and that of its weight.
  const int64_t Q = s->width, most = largest_rank(*s), slots = s->offset[s->experts], step = 2 * Q + 1;
  const float zeros[COLS] = {};
  std::vector<float> parts(x->threads * slots * step);
#pragma omp parallel num_threads(x->threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t tile = most * COLS, total_rank = s->edge[s->experts];
    std::vector<float> memory(6 * tile + 4 * ROWS * COLS + ROWS * Q);
    float *b = memory.data(), *sum = b + 3 * tile, *rest = sum + 3 * tile, *weighted = rest + 4 * ROWS * COLS;
    Buffer p(rest), u(rest + ROWS * COLS), v(rest + 2 * ROWS * COLS), a(rest + 3 * ROWS * COLS);
    std::vector<float*> sums(3 * most);
    for (int64_t q = 0; q < 3 * most; q++) sums[q] = sum + q * COLS;
    float* part = parts.data() + thread * slots * step;
    for_blocks(*s, share(x->columns, thread, threads),
               [&](int64_t e, int64_t edge, int64_t ranks, int64_t c0, int count) {
      std::memset(sum, 0, sizeof(float) * 3 * tile);
      Experts own{*x, edge, ranks, c0, count, b, b + tile, b + 2 * tile};
      const int r = static_cast<int>(ranks);
      for_groups(*s, e, [&](int64_t n, int rows) {
        float* to = part + n * step;
        own.pre_activations(*s, n, rows, p, u);
        const float* from[ROWS];
        for (int i = 0; i < rows; i++) from[i] = x->keep.data ? zeros : g->d_mix + s->token[n + i] * x->columns + c0;
        expand(rows, x->A_down.data ? ranks : 0, g->d_down + n * Q, Q, 1, own.A_down, from, v.row, count);
        if (x->A_down.data) {
          for (int64_t i = 0; i < rows * Q; i++) weighted[i] = g->d_down[n * Q + i] * x->weight[n + i / Q];
        }
        with_formula(x->formula, [&](auto f) {
          backward_rows<f.value>(*x, *s, *g, n, rows, c0, count, p, u, v, a, to + 2 * Q, step);
        });
        if (x->A_down.data) expand(r, rows, weighted, 1, Q, a.row[0], &sums[2 * most], &sums[2 * most], count);
        if (x->B_activated.data) {
          reduce(rows, p.row, ranks, own.B_activated, to, step, count);
          expand(r, rows, x->low_activated + n * Q, 1, Q, p.row[0], &sums[0], &sums[0], count);
        }
        if (x->B_multiplied.data) {
          reduce(rows, u.row, ranks, own.B_multiplied, to + Q, step, count);
          expand(r, rows, x->low_multiplied + n * Q, 1, Q, u.row[0], &sums[most], &sums[most], count);
        }
      });
      if (x->B_activated.data) unpack(sum, ranks, count, g->d_B_activated + edge + c0 * total_rank, 1, total_rank);
      if (x->B_multiplied.data)
        unpack(sum + tile, ranks, count, g->d_B_multiplied + edge + c0 * total_rank, 1, total_rank);
      if (x->A_down.data) unpack(sum + 2 * tile, ranks, count, g->d_A_down + edge * x->columns + c0, x->columns, 1);
    });
#pragma omp barrier
    if (x->B_activated.data)
      add_parts(*s, parts.data(), threads, step, 0, x->B_activated.scale, nullptr, g->d_low_activated);
    if (x->B_multiplied.data)
      add_parts(*s, parts.data(), threads, step, Q, x->B_multiplied.scale, nullptr, g->d_low_multiplied);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < slots; n++) {
      g->d_weight[n] = 0;
      for (int k = 0; k < threads; k++) g->d_weight[n] += parts[(k * slots + n) * step + 2 * Q];
    }
  }
}

}  // extern "C"
