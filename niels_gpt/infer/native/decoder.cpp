// One decoding step of the whole model, for one or more sequences, by a team of threads: what model/gpt.py computes for
// the newest position of each. Keys and values live in the caller's cache, which PyTorch reads and writes as well.

#include <vector>

#include "matrix.h"
#include "team.h"

struct Shape {
  int32_t V, T, C, L, H, d_ff, layernorm, gelu, qk_norm;
  float eps;
};

struct Norm {
  const float *weight, *bias;  // bias: LayerNorm only
};

struct Layer {
  Norm ln1, ln2;
  const float *q_norm, *k_norm;  // null without QK-norm
  Matrix qkv, proj, up, down;    // up: the MLP's first matrix; the gate's rows and then the value's for SwiGLU
};

struct Job {  // one call of decoder_step
  int B;
  const int32_t* positions;
  float *k, *v;
  const int64_t* rows;  // (B): where in k and v each sequence's first layer begins
  int64_t layer_stride, head_stride;
  float *logits, *stats;
};

struct Scratch {  // one thread's own
  std::vector<float> x, inside, scores, y;
  Operand in;
};

struct Decoder {
  static constexpr int STAGES = 5;  // of a layer
  Shape s;
  int D, width, hidden;  // padded C and padded width of the MLP's inside
  Arena arena;
  std::vector<Layer> layers;
  Norm ln_f;
  Matrix head;
  const float *emb, *sin, *cos;
  std::vector<float> copies;  // norms and biases
  std::vector<float> h, qkv, mixed, inner;
  std::vector<Scratch> own;
  Job job;
  Team team;

  Decoder(int threads, int layers) : own(threads), team(threads, STAGES * layers + 2) {}

  void run(int me);
  void normalize(const Norm& norm, const float* x, float* y) const;
  void normalize_all(const Norm& norm, Scratch& own) const;
  void gate_all(Scratch& own) const;
  void attend(int b, int head, int layer, Scratch& s);
  void statistics(int b);
  template <class Arrange, class Put>
  void apply(int stage, const Matrix& m, Scratch& own, Arrange arrange, Put put);
};

void Decoder::normalize(const Norm& norm, const float* x, float* y) const {
  const int C = s.C;
  float mean = 0;
  if (s.layernorm) {
    vf total = {};
    for (int c = 0; c < width; c += W) total += load(x + c);  // the padding is zero
    mean = sum(total) / C;
  }
  float square = 0;
  for (int c = 0; c < C; c++) y[c] = x[c] - mean;
  square = dot(y, y, C);
  const float inverse = 1 / sqrtf(square / C + s.eps);
  for (int c = 0; c < C; c++) y[c] = y[c] * inverse * norm.weight[c];
  if (norm.bias)
    for (int c = 0; c < C; c++) y[c] += norm.bias[c];
}

// Every thread does this for itself: cheaper than waiting for each other.
void Decoder::normalize_all(const Norm& norm, Scratch& own) const {
  for (int b = 0; b < job.B; b++) {
    float* y = &own.x[(size_t)b * width];
    normalize(norm, &h[(size_t)b * width], y);
    own.in.x[b] = y;
  }
}

// A stage of the team: put(b, row, y) for every row of m times every right-hand side, which arrange() has lined up in
// own.in.
template <class Arrange, class Put>
void Decoder::apply(int stage, const Matrix& m, Scratch& own, Arrange arrange, Put put) {
  const int B = job.B;
  const float* y = own.y.data();
  const auto prepare = [&] {
    arrange();
    if (m.kind == INT8) own.in.quantize(m, B);
  };
  team.stage(stage, m.panels, prepare, [&](int panel) {
    multiply_panel(m, panel, own.in, B, own.y.data());
    const int first = panel * PANEL, n = m.rows - first < PANEL ? m.rows - first : PANEL;
    for (int b = 0; b < B; b++)
      for (int r = 0; r < n; r++) put(b, first + r, y[b * PANEL + r] + (m.bias ? m.bias[first + r] : 0));
  });
}

// Interleaved pairs (2j, 2j+1), turned by the position's angle; before that the head's own RMSNorm, where there is one.
static void place(float* x, const float* weight, const float* sin, const float* cos, int D, float eps) {
  if (weight) {
    const float inverse = 1 / sqrtf(dot(x, x, D) / D + eps);
    for (int d = 0; d < D; d++) x[d] *= inverse * weight[d];
  }
  for (int j = 0; j < D / 2; j++) {
    const float even = x[2 * j], odd = x[2 * j + 1];
    x[2 * j] = even * cos[j] - odd * sin[j];
    x[2 * j + 1] = even * sin[j] + odd * cos[j];
  }
}

void Decoder::attend(int b, int head, int layer, Scratch& own) {
  const Layer& l = layers[layer];
  const int t = job.positions[b];
  float* q = &qkv[(size_t)b * 3 * s.C + head * D];
  float *k = q + s.C, *v = k + s.C;
  const float *sines = sin + (size_t)t * (D / 2), *cosines = cos + (size_t)t * (D / 2);
  place(q, l.q_norm, sines, cosines, D, s.eps);
  place(k, l.k_norm, sines, cosines, D, s.eps);
  const int64_t at = job.rows[b] + layer * job.layer_stride + head * job.head_stride;
  float *keys = job.k + at, *values = job.v + at;
  memcpy(keys + (size_t)t * D, k, D * sizeof(float));
  memcpy(values + (size_t)t * D, v, D * sizeof(float));

  float* p = own.scores.data();
  const float scale = 1 / sqrtf((float)D);
  for (int i = 0; i <= t; i++) p[i] = dot(q, keys + (size_t)i * D, D) * scale;
  const float most = largest(p, t + 1);
  for (int i = t + 1; i < padded(t + 1, W); i++) p[i] = -INFINITY;
  vf total = {};
  for (int i = 0; i <= t; i += W) {
    const vf e = exp(load(p + i) - most);
    store(p + i, e);
    total += e;
  }
  const float inverse = 1 / sum(total);
  float* out = &mixed[(size_t)b * width + head * D];
  for (int d = 0; d < D; d++) out[d] = 0;
  int d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {  // four sums at a time stay in registers
    vf a[4] = {};
    for (int i = 0; i <= t; i++)
      for (int n = 0; n < 4; n++) a[n] += p[i] * load(values + (size_t)i * D + d + n * W);
    for (int n = 0; n < 4; n++) store(out + d + n * W, a[n]);
  }
  for (int i = 0; i <= t && d < D; i++)
    for (int e = d; e < D; e++) out[e] += p[i] * values[(size_t)i * D + e];
  for (int e = 0; e < D; e++) out[e] *= inverse;
}

// (log of the sum of exponentials, entropy in nats) of one row of logits.
void Decoder::statistics(int b) {
  const float* x = job.logits + (size_t)b * s.V;
  const float most = largest(x, s.V);
  vf totals = {}, weights = {};  // of e^d and of d e^d with d = x - most
  int i = 0;
  for (; i + W <= s.V; i += W) {
    const vf d = load(x + i) - most, e = exp(d);
    totals += e, weights += e * d;
  }
  double total = sum(totals), weighted = sum(weights);
  for (; i < s.V; i++) {
    const float d = x[i] - most, e = expf(d);
    total += e, weighted += e * d;
  }
  job.stats[2 * b] = (float)(most + log(total));
  job.stats[2 * b + 1] = (float)(log(total) - weighted / total);
}

void Decoder::run(int me) {
  Scratch& mine = own[me];
  const int B = job.B;
  const auto point_to = [&](const std::vector<float>& x, int wide) {
    for (int b = 0; b < B; b++) mine.in.x[b] = &x[(size_t)b * wide];
  };
  const auto add = [&](int b, int row, float y) { h[(size_t)b * width + row] += y; };
  int stage = 0;
  for (int i = 0; i < s.L; i++) {
    const Layer& l = layers[i];
    apply(stage++, l.qkv, mine, [&] { normalize_all(l.ln1, mine); },
          [&](int b, int row, float y) { qkv[(size_t)b * 3 * s.C + row] = y; });
    team.stage(stage++, B * s.H, [] {}, [&](int task) { attend(task / s.H, task % s.H, i, mine); });
    apply(stage++, l.proj, mine, [&] { point_to(mixed, width); }, add);
    apply(stage++, l.up, mine, [&] { normalize_all(l.ln2, mine); },
          [&](int b, int row, float y) {
            const bool value = row >= s.d_ff;  // SwiGLU's second half
            float* x = &inner[((size_t)2 * b + value) * hidden];
            x[value ? row - s.d_ff : row] = s.gelu ? 0.5f * y * (1 + erff(y * 0.70710678f)) : y;
          });
    apply(stage++, l.down, mine, [&] { s.gelu ? point_to(inner, 2 * hidden) : gate_all(mine); }, add);
  }
  apply(stage++, head, mine, [&] { normalize_all(ln_f, mine); },
        [&](int b, int row, float y) { job.logits[(size_t)b * s.V + row] = y; });
  team.stage(stage, B, [] {}, [&](int b) { statistics(b); });
}

// silu(gate) * value, by every thread into its own copy.
void Decoder::gate_all(Scratch& own) const {
  for (int b = 0; b < job.B; b++) {
    float* y = &own.inside[(size_t)b * hidden];
    const float *gate = &inner[(size_t)2 * b * hidden], *value = gate + hidden;
    for (int c = 0; c < hidden; c += W) {
      const vf g = load(gate + c);
      store(y + c, g / (1.0f + exp(-g)) * load(value + c));
    }
    own.in.x[b] = y;
  }
}

extern "C" {

// Reads all packed weights once with all threads and does nothing with them: what a token cannot be faster than.
float decoder_read(void* decoder) {
  Decoder& d = *(Decoder*)decoder;
  std::lock_guard<std::mutex> turn(d.team.turn);
  d.team.settle();
  const size_t piece = 1 << 14;  // bytes
  std::vector<vf> totals(d.team.size);
  d.team.run([&](int me) {
    d.team.stage(0, (int)(d.arena.used / piece), [] {}, [&](int i) {
      const float* p = (const float*)(d.arena.base + i * piece);
      vf sums[4] = {};
      for (size_t c = 0; c < piece / sizeof(float); c += 4 * W) {
        ask_ahead<4 * W * sizeof(float)>(p + c);
        for (int n = 0; n < 4; n++) sums[n] += load(p + c + n * W);
      }
      totals[me] += sums[0] + sums[1] + sums[2] + sums[3];
    });
  });
  float total = 0;
  for (const vf& t : totals) total += sum(t);
  return total;
}

int64_t decoder_bytes(const void* d) { return ((const Decoder*)d)->arena.used; }

void decoder_free(void* d) { delete (Decoder*)d; }

// tensors: emb, sin, cos, ln_f weight and bias, head; then per layer ln1 weight and bias, qkv, proj, q_norm, k_norm,
// ln2 weight and bias, gate and its bias (null: no gate), up and its bias, down and its bias. emb, sin and cos are read
// in place, the rest is copied. Null if the memory does not suffice.
void* decoder_new(const Shape* shape, const float* const* tensors, int kind_number, int threads) {
  const Shape s = *shape;
  const Kind kind = (Kind)kind_number;
  Decoder* d = new Decoder(threads, s.L);
  const int inside = s.gelu ? s.d_ff : 2 * s.d_ff;
  d->s = s, d->D = s.C / s.H, d->width = padded(s.C, PAD), d->hidden = padded(s.d_ff, PAD);
  const size_t per_layer = Matrix::bytes(3 * s.C, s.C, kind) + Matrix::bytes(s.C, s.C, kind) +
                           Matrix::bytes(inside, s.C, kind) + Matrix::bytes(s.C, s.d_ff, kind);
  if (!d->arena.reserve(per_layer * s.L + Matrix::bytes(s.V, s.C, kind))) {
    delete d;
    return nullptr;
  }
  memset(d->arena.base, 0, d->arena.size);
  d->copies.reserve((size_t)s.L * (4 * s.C + 2 * d->D + 2 * s.d_ff + s.C) + 2 * s.C);  // never grows: pointers stay
  auto copy = [&](const float* source, int n) -> const float* {
    if (!source) return nullptr;
    d->copies.insert(d->copies.end(), source, source + n);
    return d->copies.data() + d->copies.size() - n;
  };
  const float* const* next = tensors;
  d->emb = *next++, d->sin = *next++, d->cos = *next++;
  d->ln_f.weight = copy(*next++, s.C), d->ln_f.bias = copy(*next++, s.C);
  const float* head = *next++;
  d->layers.resize(s.L);
  for (Layer& l : d->layers) {
    l.ln1.weight = copy(*next++, s.C), l.ln1.bias = copy(*next++, s.C);
    l.qkv.shape(3 * s.C, s.C, kind, d->arena), l.qkv.fill(0, 3 * s.C, *next++);
    l.proj.shape(s.C, s.C, kind, d->arena), l.proj.fill(0, s.C, *next++);
    l.q_norm = copy(*next++, d->D), l.k_norm = copy(*next++, d->D);
    l.ln2.weight = copy(*next++, s.C), l.ln2.bias = copy(*next++, s.C);
    const float *gate = next[0], *gate_bias = next[1], *up = next[2], *up_bias = next[3];
    l.up.shape(inside, s.C, kind, d->arena);
    if (gate) l.up.fill(0, s.d_ff, gate);
    l.up.fill(gate ? s.d_ff : 0, s.d_ff, up);
    if (up_bias) {
      const float* bias = gate ? copy(gate_bias, s.d_ff) : nullptr;
      const float* rest = copy(up_bias, s.d_ff);
      l.up.bias = gate ? bias : rest;
    }
    l.down.shape(s.C, s.d_ff, kind, d->arena), l.down.fill(0, s.C, next[4]);
    l.down.bias = copy(next[5], s.C);
    next += 6;
  }
  d->head.shape(s.V, s.C, kind, d->arena), d->head.fill(0, s.V, head);
  return d;
}

// One token for each of B sequences. tokens, positions, rows: (B). k and v: float caches in which layer i of sequence
// b and head j begins at rows[b] + i * layer_stride + j * head_stride. Writes logits (B, V) and stats (B, 2): log of the
// sum of exponentials, entropy. Calls of several threads take turns.
void decoder_step(void* decoder, int B, const int32_t* tokens, const int32_t* positions, float* k, float* v,
                  const int64_t* rows, int64_t layer_stride, int64_t head_stride, float* logits, float* stats) {
  Decoder& d = *(Decoder*)decoder;
  std::lock_guard<std::mutex> turn(d.team.turn);
  d.team.settle();
  const Shape& s = d.s;
  if (d.h.size() < (size_t)B * d.width) {
    d.h.assign((size_t)B * d.width, 0), d.qkv.assign((size_t)B * 3 * s.C, 0), d.mixed.assign((size_t)B * d.width, 0);
    d.inner.assign((size_t)B * 2 * d.hidden, 0);
    for (Scratch& own : d.own) {
      own.x.assign((size_t)B * d.width, 0), own.inside.assign((size_t)B * d.hidden, 0);
      own.scores.assign(padded(s.T, W), 0), own.y.assign((size_t)B * PANEL, 0);
      own.in.x.resize(B);
    }
  }
  for (int b = 0; b < B; b++) memcpy(&d.h[(size_t)b * d.width], d.emb + (size_t)tokens[b] * s.C, s.C * sizeof(float));
  d.job = {B, positions, k, v, rows, layer_stride, head_stride, logits, stats};
  d.team.run([&d](int me) { d.run(me); });
}
}
