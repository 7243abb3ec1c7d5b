/* One token of each row on a CPU. It calculates in float32; bfloat16 is widened where it is read and rounded where it is
   written. `layer_step` and `linear_step` return 0, or what is wrong, and then have written nothing. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NO_MEMORY = 1, NO_SLOT = 2 };
enum { BF16_TOKEN = 1, BF16_ROPE = 2, BF16_MAPS = 4, BF16_SLOTS = 8, SIGNED_MAP = 16, ROTATED_MEMORY = 32, GATE_OF_X = 64,
       BF16_GATES = 128 };

/* --- numbers ------------------------------------------------------------------------------------------------------- */
static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline uint16_t narrow(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* no number stays none */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void rounded(float *x, int64_t n, int64_t bf16) {
    for (int64_t j = 0; bf16 && j < n; j++) x[j] = widen(narrow(x[j]));
}

/* n numbers from position `at`: where they are, or widened in `room` */
static inline const float *read_row(const void *from, int64_t at, int64_t n, int64_t bf16, float *room) {
    if (!bf16) return (const float *)from + at;
    const uint16_t *x = (const uint16_t *)from + at;
    for (int64_t j = 0; j < n; j++) room[j] = widen(x[j]);
    return room;
}

static inline void write_row(void *to, int64_t at, int64_t n, int64_t bf16, const float *x) {
    if (!bf16) memcpy((float *)to + at, x, n * sizeof *x);
    else for (int64_t j = 0; j < n; j++) ((uint16_t *)to)[at + j] = narrow(x[j]);
}

static inline float dot(const float *x, const float *y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j] * y[j];
    return sum;
}

/* e^x for x <= 0, in a form that compilers vectorise: 2^n e^r with |r| <= ln(2) / 2 and the series of e^r to r^7 / 7! */
static inline float exp_of(float x) {
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r / 5040))))));
    int32_t bits = (int32_t)((uint32_t)((int32_t)n + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87 ? 0 : series * power;
}

/* softmax of n numbers in place */
static inline void softmax(float *x, int64_t n) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; j++) largest = x[j] > largest ? x[j] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j] = exp_of(x[j] - largest);
    for (int64_t j = 0; j < n; j++) x[j] /= sum;
}

/* --- a hybrid layer: RoPE, feature maps, gates, mLSTM, window attention and their mix ----------------------------------

   What it calculates is `layer_step_torch` in layer.py. B rows, D hidden size, H query heads, G key/value heads, R = H / G,
   K head dim, P columns of a feature map, F features, S sinks. A group of R query heads is one unit of work: it reads its
   keys and values once. */

struct token {
    const void *x, *raw_q, *raw_k, *v, *q, *k, *cos, *sin; /* of the token; raw: before QK-norm */
    const void *q_map, *k_map;                             /* [H, K, P] */
    const void *i_weight, *f_weight, *f_bias, *o_weight, *o_bias;
    float *C, *n, *m; /* [B, H, F, K], [B, H, F], [B, H] */
    void *keys, *values, *out; /* [B, G, slots, K], twice; [B, H, K] */
    const int64_t *index; /* [B], -1 at padding */
    int64_t *count;       /* [B] */
    const int64_t *where; /* [B], the row of C, n, m, keys and values that is the token's; or none: its own number */
    int64_t B, D, H, G, K, P, slots, sinks, rope_rows, rope_dim, flags;
    int64_t C_row, n_row, m_row, slots_row; /* numbers from one row to the next */
    float scale, forget_all;
};

/* phi[F] = softmax(x P) or, if signed, softmax([x P, -x P]) */
static inline void features(const struct token *a, const float *x, const void *map, int64_t h, int64_t K, float *phi, float *room) {
    const int64_t P = a->P, both = a->flags & SIGNED_MAP;
    memset(phi, 0, P * sizeof *phi);
    for (int64_t j = 0; j < K; j++) {
        const float *row = read_row(map, (h * K + j) * P, P, a->flags & BF16_MAPS, room);
        const float y = x[j];
        for (int64_t p = 0; p < P; p++) phi[p] += y * row[p];
    }
    for (int64_t p = 0; both && p < P; p++) phi[P + p] = -phi[p];
    softmax(phi, both ? 2 * P : P);
    rounded(phi, both ? 2 * P : P, a->flags & BF16_TOKEN);
}

/* the first `dim` numbers of x; the others are taken as they are */
static inline void rotate(const float *x, const float *cos, const float *sin, int64_t dim, int64_t K, int64_t bf16, float *y) {
    const int64_t half = dim / 2;
    for (int64_t j = 0; j < half; j++) {
        y[j] = x[j] * cos[j] - x[half + j] * sin[j];
        y[half + j] = x[half + j] * cos[half + j] + x[j] * sin[half + j];
    }
    for (int64_t j = dim; j < K; j++) y[j] = x[j];
    rounded(y, K, bf16);
}

/* The mLSTM of head h in row `at`: writes phi_k and v with the gates i and log f, reads phi_q into y[K] */
static inline void memory(const struct token *a, int64_t at, int64_t h, int64_t F, int64_t K, float i, float log_f, const float *phi_q,
                          const float *phi_k, const float *v, float *y) {
    float *C = a->C + at * a->C_row + h * F * K, *n = a->n + at * a->n_row + h * F, *m = a->m + at * a->m_row + h, den = 0;
    const float kept = log_f + *m, new_m = kept > i || isnan(kept) ? kept : i; /* what is no number stays none */
    const float base = fmaxf(new_m, -FLT_MAX);                                 /* finite, also where nothing has been written */
    const float decay = expf(*m - base + log_f), write = expf(i - base);
    *m = new_m;
    memset(y, 0, K * sizeof *y);
    for (int64_t f = 0; f < F; f++) {
        const float q = phi_q[f], k = phi_k[f] * write;
        float *row = C + f * K;
        n[f] = n[f] * decay + k;
        den += q * n[f];
        for (int64_t j = 0; j < K; j++) {
            row[j] = row[j] * decay + k * v[j];
            y[j] += q * row[j];
        }
    }
    const float over = fabsf(den) < FLT_MIN ? 0 : 1 / den;
    for (int64_t j = 0; j < K; j++) y[j] *= over;
}

/* Softmax attention of the group's R queries to its first `visible` slots, which begin `at` so many numbers, into y[R, K]; scores is [R, visible] */
static inline void window(const struct token *a, int64_t at, int64_t visible, int64_t R, int64_t K, const float *q, float *scores, float *y,
                          float *room) {
    const int64_t bf16 = a->flags & BF16_SLOTS;
    for (int64_t s = 0; s < visible; s++) {
        const float *key = read_row(a->keys, at + s * K, K, bf16, room);
        for (int64_t r = 0; r < R; r++) scores[r * visible + s] = dot(q + r * K, key, K) * a->scale;
    }
    for (int64_t r = 0; r < R && visible; r++) softmax(scores + r * visible, visible);
    memset(y, 0, R * K * sizeof *y);
    for (int64_t s = 0; s < visible; s++) {
        const float *value = read_row(a->values, at + s * K, K, bf16, room);
        for (int64_t r = 0; r < R; r++) {
            const float weight = scores[r * visible + s];
            for (int64_t j = 0; j < K; j++) y[r * K + j] += weight * value[j];
        }
    }
}

static int64_t room_of(const struct token *a) {
    const int64_t R = a->H / a->G, K = a->K, P = a->P;
    const int64_t widest = a->D > P ? a->D : P;
    return widest + (4 * R + 7) * K + 4 * P + (K > P ? K : P) + a->D + 3 * K + R * a->slots;
}

static inline __attribute__((always_inline)) void group(const struct token *a, int64_t b, int64_t g, const int64_t K, float *room) {
    const int64_t R = a->H / a->G, D = a->D, P = a->P, F = a->flags & SIGNED_MAP ? 2 * P : P, slots = a->slots, S = a->sinks;
    const int64_t bf16 = a->flags & BF16_TOKEN, index = a->index[b], at_q = (b * a->H + g * R) * K, at_k = (b * a->G + g) * K;
    const int64_t rope_dim = a->rope_dim, rope = (a->rope_rows > 1 ? b : 0) * rope_dim, padding = index < 0;
    const int64_t at = a->where ? a->where[b] : b, at_slots = at * a->slots_row + g * slots * K;
#define TAKE(n) (room += (n), room - (n))
    const float *x = read_row(a->x, b * D, D, bf16, TAKE(D > P ? D : P));
    const float *raw_q = read_row(a->raw_q, at_q, R * K, bf16, TAKE(R * K)), *q = read_row(a->q, at_q, R * K, bf16, TAKE(R * K));
    const float *raw_k = read_row(a->raw_k, at_k, K, bf16, TAKE(K)), *k = read_row(a->k, at_k, K, bf16, TAKE(K));
    const float *v = read_row(a->v, at_k, K, bf16, TAKE(K));
    const float *cos = read_row(a->cos, rope, rope_dim, a->flags & BF16_ROPE, TAKE(K));
    const float *sin = read_row(a->sin, rope, rope_dim, a->flags & BF16_ROPE, TAKE(K));
    float *rotated_q = TAKE(R * K), *rotated_k = TAKE(K), *phi_q = TAKE(2 * P), *phi_k = TAKE(2 * P), *row = TAKE(K > P ? K : P), *gate = TAKE(D + 3 * K);
    float *near = TAKE(R * K), *far = TAKE(K), *scores = TAKE(R * slots);
#undef TAKE

    for (int64_t r = 0; r < R; r++) rotate(q + r * K, cos, sin, rope_dim, K, bf16, rotated_q + r * K);
    rotate(k, cos, sin, rope_dim, K, bf16, rotated_k);
    if (!padding) {
        const int64_t slot = at_slots + (index < slots ? index : (index - S) % (slots - S) + S) * K;
        write_row(a->keys, slot, K, a->flags & BF16_SLOTS, rotated_k);
        write_row(a->values, slot, K, a->flags & BF16_SLOTS, v);
    }
    window(a, at_slots, padding ? 0 : index < slots ? index + 1 : slots, R, K, rotated_q, scores, near, row);

    if (a->flags & ROTATED_MEMORY) q = rotated_q, k = rotated_k;
    for (int64_t r = 0; r < R; r++) {
        const int64_t h = g * R + r;
        features(a, q + r * K, a->q_map, h, K, phi_q, row);
        features(a, k, a->k_map, h, K, phi_k, row);
        const int64_t narrow_gates = a->flags & BF16_GATES;
        float i = dot(x, read_row(a->i_weight, h * D, D, narrow_gates, gate), D);
        float f = dot(x, read_row(a->f_weight, h * D, D, narrow_gates, gate), D) + *read_row(a->f_bias, h, 1, narrow_gates, gate);
        float o = *read_row(a->o_bias, h, 1, narrow_gates, gate);
        if (a->flags & GATE_OF_X) o += dot(x, read_row(a->o_weight, h * D, D, narrow_gates, gate), D);
        else {
            const float *weight = read_row(a->o_weight, h * 3 * K, 3 * K, narrow_gates, gate);
            o += dot(raw_q + r * K, weight, K) + dot(raw_k, weight + K, K) + dot(v, weight + 2 * K, K);
        }
        o = 1 / (1 + expf(-o));
        float log_f = f < 0 ? f - log1pf(expf(f)) : -log1pf(expf(-f));
        if (log_f <= a->forget_all || index == 0) log_f = -INFINITY; /* a document begins: everything is forgotten */
        if (padding) i = -INFINITY, log_f = 0;
        memory(a, at, h, F, K, i, log_f, phi_q, phi_k, v, far);
        for (int64_t j = 0; j < K; j++) far[j] = o * far[j] + (1 - o) * near[r * K + j];
        write_row(a->out, (b * a->H + h) * K, K, bf16, far);
    }
    if (!g && !padding) a->count[b] = index + 1;
}

int layer_step(const struct token *a, int threads) {
    const int64_t units = a->B * a->G, size = room_of(a);
    for (int64_t b = 0; b < a->B; b++)
        if (a->index[b] >= a->slots && a->slots <= a->sinks) return NO_SLOT;
    float *rooms = malloc(threads * size * sizeof *rooms);
    if (!rooms) return NO_MEMORY;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *room = rooms + thread * size;
        for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; unit++) {
            const int64_t b = unit / a->G, g = unit % a->G;
            if (a->K == 64) group(a, b, g, 64, room);
            else if (a->K == 128) group(a, b, g, 128, room);
            else group(a, b, g, a->K, room);
        }
    }
    free(rooms);
    return 0;
}

/* --- a linear map: y[rows, N] = x[rows, D] W^T + bias, W [N, D] read once ------------------------------------------- */

static inline float number(const void *from, int64_t at, const int bf16) {
    return bf16 ? widen(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

/* Products of one row of W with `rows` of x, four rows of x at a time */
static inline __attribute__((always_inline)) void products(const void *W, int64_t at, const float *x, int64_t rows, int64_t D, const int bf16,
                                                           float *y) {
    for (; rows >= 4; rows -= 4, x += 4 * D, y += 4) {
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t j = 0; j < D; j++) {
            const float w = number(W, at + j, bf16);
            a += w * x[j], b += w * x[D + j], c += w * x[2 * D + j], d += w * x[3 * D + j];
        }
        y[0] = a, y[1] = b, y[2] = c, y[3] = d;
    }
    for (; rows; rows--, x += D, y++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < D; j++) sum += number(W, at + j, bf16) * x[j];
        *y = sum;
    }
}

int linear_step(const void *x, const void *W, const void *bias, void *y, int64_t rows, int64_t N, int64_t D, int bf16, int threads) {
    float *wide = malloc((rows * D + threads * rows) * sizeof *wide);
    if (!wide) return NO_MEMORY;
    const float *in = read_row(x, 0, rows * D, bf16, wide);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *found = wide + rows * D + thread * rows, one;
        for (int64_t i = N * thread / threads; i < N * (thread + 1) / threads; i++) {
            if (bf16) products(W, i * D, in, rows, D, 1, found);
            else products(W, i * D, in, rows, D, 0, found);
            const float added = bias ? *read_row(bias, i, 1, bf16, &one) : 0;
            for (int64_t r = 0; r < rows; r++) found[r] += added, write_row(y, r * N + i, 1, bf16, found + r);
        }
    }
    free(wide);
    return 0;
}
