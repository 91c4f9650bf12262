/* All layers of HSTU for the newest positions of rows whose older keys and values are kept: mostly one, asked for by one
   request after the other, and all of a row that is read for the first time.

   README.md has the maths. Compiled once per machine by kernels/native_build.py, for numbers of REAL_BITS 32 or 64; no
   call allocates or keeps anything. All sums are formed in one order.

   D: model width. H heads, A and V: widths of queries/keys and of values of one head, G = H * V. */


#include "native_vectors.h"

/* Weights of a layer; norm weights, biases and tables may be NULL where the model has none. */
typedef struct {
    const REAL *uvqk;                        /* [D][2 G + 2 H A] */
    const REAL *output, *output_bias;        /* [G, or 3 G][D], [D] */
    const REAL *input_scale, *input_shift;   /* [D] */
    const REAL *output_scale, *output_shift; /* [G] */
    const REAL *position_weight;             /* [2 max_len - 1] */
    const REAL *time_weight;
} Layer;

typedef struct {
    const Layer *layers;
    REAL *x;                /* [M][D], in and out */
    REAL *kept;             /* [layers][L][H A + H V], keys then values */
    const int64_t *offsets, *query_offsets;        /* B + 1 */
    const int64_t *key_times_s, *query_times_s;    /* L, M */
    const int64_t *bucket_from_s;                  /* shortest gap of each bucket, then one that none reaches */
    REAL *scratch;
    int64_t num_layers, num_rows, num_positions, D, heads, A, V, max_len, gate_only, concat;
    int64_t max_attn_len, min_full_attn_len, num_oldest_keys; /* of AttentionMask; max_attn_len: -1 for no limit */
    double alpha, eps;
} Call;

enum { MANY = 8 }; /* new positions of a row from which on transposing its keys costs less than it saves */

INLINE int64_t entered_width(const Call *call) { return 2 * call->heads * (call->A + call->V); }
INLINE int64_t keys_to(int64_t max_len) { return vectors(max_len) * LANES; }

/* Scratch of a call in numbers of REAL, for rows of at most num_new new positions. */
int64_t hstu_decode_scratch(int64_t D, int64_t heads, int64_t A, int64_t V, int64_t max_len, int64_t num_new)
{
    return (num_new + ROWS) * (D + 2 * heads * (A + V)) + ROWS * 4 * heads * V + 2 * ROWS * (keys_to(max_len) + LANES) +
           (num_new >= MANY ? heads * A * keys_to(max_len) : 0);
}

INLINE REAL total(vec sums)
{
    for (int half = (int)LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return sums[0];
}

INLINE REAL dot(const REAL *a, const REAL *b, int64_t n)
{
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sums += *(const loose *)(a + i) * *(const loose *)(b + i);
    REAL sum = total(sums);
    for (; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* to = scale * (x - mean) / sqrt(variance + eps) + shift; scale NULL: 1 and 0. */
static void normalise(REAL *to, const REAL *x, int64_t n, REAL eps, const REAL *scale, const REAL *shift)
{
    vec sums = {0};
    int64_t whole_to = n / LANES * LANES;
    for (int64_t i = 0; i < whole_to; i += LANES)
        sums += *(const loose *)(x + i);
    REAL sum = total(sums);
    for (int64_t i = whole_to; i < n; i++)
        sum += x[i];
    const REAL mean = sum / (REAL)n;
    for (int64_t i = 0; i < n; i++)
        to[i] = x[i] - mean;
    const REAL factor = 1 / SQRT(dot(to, to, n) / (REAL)n + eps);
    for (int64_t i = 0; i < n; i++)
        to[i] *= factor;
    if (scale)
        for (int64_t i = 0; i < n; i++)
            to[i] = to[i] * scale[i] + shift[i];
}

/* to[0..width) += sum over i of x[i] * rows[i][0..width), in the order of i; stride: from one row to the next. */
static void add_product(REAL *restrict to, const REAL *restrict x, const REAL *restrict rows, int64_t stride, int64_t n,
                        int64_t width)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const REAL *row = rows + i * stride;
        for (int64_t j = 0; j < width; j++)
            to[j] = to[j] + x[i] * row[j] + x[i + 1] * row[stride + j] + x[i + 2] * row[2 * stride + j] +
                    x[i + 3] * row[3 * stride + j];
    }
    for (; i < n; i++)
        for (int64_t j = 0; j < width; j++)
            to[j] += x[i] * rows[i * stride + j];
}

/* x = silu(x) / divisor of n numbers; up to the next whole vector more is overwritten. */
static void silu(REAL *x, int64_t n, REAL divisor)
{
    for (int64_t i = 0; i < n; i += LANES) {
        loose *at = (loose *)(x + i);
        const vec s = *at;
        *at = s / ((1 + exponential(-s)) * divisor);
    }
}

/* Keys that a query sees: [0, oldest) and [low, its own place], oldest <= low; see mask.py. */
typedef struct {
    int64_t oldest, low;
} Sight;

static Sight sight(const Call *call, int64_t i, int64_t n)
{
    if (call->max_attn_len < 0 || i <= call->max_attn_len || (call->min_full_attn_len && i >= n - call->min_full_attn_len))
        return (Sight){0, 0};
    const int64_t low = i - call->max_attn_len;
    return (Sight){least(call->num_oldest_keys, low), low};
}

/* bias[j] of the query of place i, asked at query_s, and the keys [from, to), whose buckets are found going back in time
   from *bucket on: a gap hardly ever shrinks. */
static void fill_bias(const Call *call, const Layer *layer, REAL *bias, const int64_t *key_s, int64_t i, int64_t query_s,
                      int64_t from, int64_t to, int64_t *bucket)
{
    const int64_t *from_s = call->bucket_from_s;
    const REAL *position = layer->position_weight + call->max_len - 1 - i;
    int64_t c = *bucket;
    for (int64_t j = to - 1; j >= from; j--) {
        const int64_t gap_s = query_s > key_s[j] ? query_s - key_s[j] : key_s[j] - query_s;
        while (gap_s >= from_s[c + 1])
            c++;
        while (gap_s < from_s[c])
            c--;
        bias[j] = position[j] + layer->time_weight[c];
    }
    *bucket = c;
}

INLINE int64_t score_stride(const Call *call) { return keys_to(call->max_len) + LANES; }

/* Where the parts of a call are kept. normed and entered: of all new positions of a row; the others: of ROWS. */
typedef struct {
    REAL *normed, *entered, *o, *y, *bias, *score, *kT;
} Scratch;

static Scratch scratch_of(const Call *call, int64_t num_new)
{
    const int64_t G = call->heads * call->V;
    Scratch s = {.entered = call->scratch}; /* first, since whole vectors of it are written */
    s.normed = s.entered + (num_new + ROWS) * entered_width(call);
    s.o = s.normed + (num_new + ROWS) * call->D;
    s.y = s.o + ROWS * G;
    s.bias = s.y + ROWS * 3 * G;
    s.score = s.bias + ROWS * score_stride(call);
    s.kT = num_new >= MANY ? s.score + ROWS * score_stride(call) : NULL;
    return s;
}

/* A row of n positions, num_new of them new: its keys and values in one layer, times, and what enters that layer. */
typedef struct {
    REAL *x, *kept;
    const int64_t *key_times_s, *query_times_s;
    int64_t n, num_new;
} Row;

/* entered = activated(norm(x) W) of every new position; their keys and values are kept. */
static void enter(const Call *call, const Layer *layer, const Row *row, const Scratch *s)
{
    const int64_t D = call->D, G = call->heads * call->V, QK = call->heads * call->A, E = entered_width(call);
    for (int64_t m = 0; m < row->num_new; m++)
        normalise(s->normed + m * D, row->x + m * D, D, (REAL)call->eps, layer->input_scale, layer->input_shift);
    if (E % LANES == 0)
        for (int64_t m = 0; m < row->num_new; m += ROWS)
            rows_product(s->entered + m * E, E, s->normed + m * D, D, 1, layer->uvqk, E, least(ROWS, row->num_new - m),
                         E / LANES, D, 0);
    else {
        memset(s->entered, 0, sizeof(REAL) * row->num_new * E);
        for (int64_t m = 0; m < row->num_new; m++)
            add_product(s->entered + m * E, s->normed + m * D, layer->uvqk, E, D, E);
    }
    if (!call->gate_only)
        silu(s->entered, row->num_new * E, 1);
    for (int64_t m = 0; m < row->num_new; m++) {
        REAL *u = s->entered + m * E, *v = u + G, *k = v + G + QK, *own = row->kept + (row->n - row->num_new + m) * (QK + G);
        if (call->gate_only) /* not by whole vectors: behind u comes v */
            for (int64_t w = 0; w < G; w++)
                u[w] = u[w] / (1 + EXP(-u[w]));
        memcpy(own, k, sizeof(REAL) * QK);
        memcpy(own + QK, v, sizeof(REAL) * G);
    }
    if (s->kT)
        for (int64_t j = 0; j < row->n; j++)
            for (int64_t w = 0; w < QK; w++)
                s->kT[w * keys_to(call->max_len) + j] = row->kept[j * (QK + G) + w];
}

/* o += attention of the queries of new positions m, m + 1, ... over the keys [from[r], to[r]) of their row, of one head. */
static void attend(const Call *call, const Row *row, const Scratch *s, int64_t m, int64_t num, int64_t head,
                   const int64_t *from, const int64_t *to, const REAL *bias)
{
    const int64_t A = call->A, V = call->V, G = call->heads * V, stride = call->heads * (A + V);
    const int64_t ld = keys_to(call->max_len), score_ld = score_stride(call), E = entered_width(call);
    const REAL *q = s->entered + m * E + 2 * G + head * A, *k = row->kept + head * A;
    const REAL *v = row->kept + call->heads * A + head * V;
    const REAL alpha = (REAL)call->alpha;
    int64_t low = from[0], high = to[0];
    for (int64_t r = 1; r < num; r++) {
        low = least(low, from[r]);
        high = -least(-high, -to[r]);
    }
    low = low / LANES * LANES; /* so that whole vectors end where a row of kT does */
    if (high <= low)
        return;
    if (s->kT)
        rows_product(s->score + low, score_ld, q, E, 1, s->kT + head * A * ld + low, ld, num, vectors(high - low), A, 0);
    else
        for (int64_t r = 0; r < num; r++)
            for (int64_t j = from[r]; j < to[r]; j++)
                s->score[r * score_ld + j] = dot(q + r * E, k + j * stride, A);
    for (int64_t r = 0; r < num; r++) {
        REAL *score = s->score + r * score_ld;
        for (int64_t j = from[r]; j < to[r]; j++)
            score[j] = alpha * score[j] + (bias ? bias[r * score_ld + j] : 0);
        silu(score + from[r], to[r] - from[r], (REAL)call->max_len);
        if (num == 1 || V % LANES) {
            add_product(s->o + r * G + head * V, score + from[r], v + from[r] * stride, stride, to[r] - from[r], V);
            continue;
        }
        for (int64_t j = low; j < from[r]; j++)
            score[j] = 0;
        for (int64_t j = to[r]; j < high; j++)
            score[j] = 0;
    }
    if (num > 1 && V % LANES == 0)
        rows_product(s->o + head * V, G, s->score + low, score_ld, 1, v + low * stride, stride, num, V / LANES, high - low,
                     1);
}

/* x of the new positions m, m + 1, ..., at most ROWS of them, become the next layer's. */
static void leave(const Call *call, const Layer *layer, const Row *row, const Scratch *s, int64_t m, int64_t num)
{
    const int64_t D = call->D, G = call->heads * call->V, Y = call->concat ? 3 * G : G;
    const REAL *bias = layer->time_weight ? s->bias : NULL;
    int64_t first[ROWS] = {0}, oldest[ROWS], low[ROWS], after[ROWS];
    for (int64_t r = 0; r < num; r++) {
        const int64_t i = row->n - row->num_new + m + r;
        const Sight seen = sight(call, i, row->n);
        oldest[r] = seen.oldest;
        low[r] = seen.low;
        after[r] = i + 1;
        if (bias) {
            REAL *own = s->bias + r * score_stride(call);
            int64_t bucket = 0;
            fill_bias(call, layer, own, row->key_times_s, i, row->query_times_s[m + r], low[r], i + 1, &bucket);
            fill_bias(call, layer, own, row->key_times_s, i, row->query_times_s[m + r], 0, oldest[r], &bucket);
        }
    }
    memset(s->o, 0, sizeof(REAL) * num * G);
    for (int64_t head = 0; head < call->heads; head++) {
        attend(call, row, s, m, num, head, first, oldest, bias);
        attend(call, row, s, m, num, head, low, after, bias);
    }
    for (int64_t r = 0; r < num; r++) {
        const REAL *u = s->entered + (m + r) * entered_width(call), *o = s->o + r * G;
        REAL *y = s->y + r * Y, *gated = y + Y - G, *x = row->x + (m + r) * D;
        normalise(gated, o, G, (REAL)call->eps, layer->output_scale, layer->output_shift);
        for (int64_t w = 0; w < G; w++)
            gated[w] *= u[w];
        if (call->concat)
            for (int64_t w = 0; w < G; w++) {
                y[w] = u[w];
                y[G + w] = o[w];
            }
        for (int64_t d = 0; d < D; d++)
            x[d] += layer->output_bias[d];
        if (D % LANES)
            add_product(x, y, layer->output, D, Y, D);
    }
    if (D % LANES == 0)
        rows_product(row->x + m * D, D, s->y, Y, 1, layer->output, D, num, D / LANES, Y, 1);
}

void hstu_decode_run(const Call *call)
{
    const int64_t width = call->heads * (call->A + call->V);
    for (int64_t b = 0; b < call->num_rows; b++) {
        const int64_t first = call->offsets[b], first_new = call->query_offsets[b];
        Row row = {.x = call->x + first_new * call->D,
                   .key_times_s = call->key_times_s + first,
                   .query_times_s = call->query_times_s + first_new,
                   .n = call->offsets[b + 1] - first,
                   .num_new = call->query_offsets[b + 1] - first_new};
        const Scratch s = scratch_of(call, row.num_new);
        for (int64_t l = 0; l < call->num_layers; l++) {
            row.kept = call->kept + (l * call->num_positions + first) * width;
            enter(call, call->layers + l, &row, &s);
            for (int64_t m = 0; m < row.num_new; m += ROWS)
                leave(call, call->layers + l, &row, &s, m, least(ROWS, row.num_new - m));
        }
    }
}
