/* All layers of HSTU for the newest positions of rows whose older keys and values are kept: one position at a time, since
   there are few of them, and one request after the other asks for one.

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
    double alpha, eps;
} Call;

/* Scratch of a call in numbers of REAL. */
int64_t hstu_decode_scratch(int64_t D, int64_t heads, int64_t A, int64_t V, int64_t max_len)
{
    const int64_t G = heads * V;
    return D + (2 * G + 2 * heads * A) + 4 * G + 2 * max_len + 8 * LANES;
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

/* score[j] = bias of the query of place i, asked at query_s, and the keys 0..i. Going back in time a gap hardly ever
   shrinks, so its bucket is found from the one before it. */
static void fill_bias(const Call *call, const Layer *layer, REAL *score, const int64_t *key_s, int64_t i, int64_t query_s)
{
    const int64_t *from_s = call->bucket_from_s;
    const REAL *position = layer->position_weight + call->max_len - 1 - i;
    int64_t c = 0;
    for (int64_t j = i; j >= 0; j--) {
        const int64_t gap_s = query_s > key_s[j] ? query_s - key_s[j] : key_s[j] - query_s;
        while (gap_s >= from_s[c + 1])
            c++;
        while (gap_s < from_s[c])
            c--;
        score[j] = position[j] + layer->time_weight[c];
    }
}

/* o = attention of one query over the keys 0..i of its row, of one head. score: bias, or zeros; overwritten. */
static void attend(const Call *call, REAL *o, const REAL *q, const REAL *keys, REAL *score, int64_t i, int64_t head)
{
    const int64_t stride = call->heads * (call->A + call->V);
    const REAL *k = keys + head * call->A, *v = keys + call->heads * call->A + head * call->V;
    const REAL alpha = (REAL)call->alpha;
    for (int64_t j = 0; j <= i; j++)
        score[j] += alpha * dot(q + head * call->A, k + j * stride, call->A);
    silu(score, i + 1, (REAL)call->max_len);
    for (int64_t w = 0; w < call->V; w++)
        o[w] = 0;
    add_product(o, score, v, stride, i + 1, call->V);
}

/* One layer for the position i of a row: x becomes the next layer's; its keys and values are kept. keys, key_s: of the
   row's first position. */
static void one_position(const Call *call, const Layer *layer, REAL *x, REAL *keys, const int64_t *key_s, int64_t i,
                         int64_t query_s)
{
    const int64_t D = call->D, G = call->heads * call->V, QK = call->heads * call->A, E = 2 * G + 2 * QK;
    REAL *normed = call->scratch, *entered = normed + D, *o = entered + E + LANES, *y = o + G, *bias = y + 3 * G;
    REAL *score = bias + call->max_len + LANES;
    normalise(normed, x, D, (REAL)call->eps, layer->input_scale, layer->input_shift);
    for (int64_t e = 0; e < E; e++)
        entered[e] = 0;
    add_product(entered, normed, layer->uvqk, E, D, E);
    if (call->gate_only) { /* not by whole vectors: behind u comes v */
        for (int64_t e = 0; e < G; e++)
            entered[e] = entered[e] / (1 + EXP(-entered[e]));
    } else {
        silu(entered, E, 1);
    }
    const REAL *u = entered, *v = u + G, *q = v + G, *k = q + QK;
    REAL *own = keys + i * (QK + G);
    for (int64_t w = 0; w < QK; w++)
        own[w] = k[w];
    for (int64_t w = 0; w < G; w++)
        own[QK + w] = v[w];
    if (layer->time_weight)
        fill_bias(call, layer, bias, key_s, i, query_s);
    for (int64_t head = 0; head < call->heads; head++) {
        for (int64_t j = 0; j <= i; j++)
            score[j] = layer->time_weight ? bias[j] : 0;
        attend(call, o + head * call->V, q, keys, score, i, head);
    }
    REAL *gated = call->concat ? y + 2 * G : y;
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
    add_product(x, y, layer->output, D, call->concat ? 3 * G : G, D);
}

void hstu_decode_run(const Call *call)
{
    const int64_t width = call->heads * (call->A + call->V);
    for (int64_t b = 0; b < call->num_rows; b++) {
        const int64_t first = call->offsets[b], n = call->offsets[b + 1] - first;
        const int64_t first_query = call->query_offsets[b], num_new = call->query_offsets[b + 1] - first_query;
        for (int64_t l = 0; l < call->num_layers; l++)
            for (int64_t m = 0; m < num_new; m++)
                one_position(call, call->layers + l, call->x + (first_query + m) * call->D,
                             call->kept + (l * call->num_positions + first) * width, call->key_times_s + first,
                             n - num_new + m, call->query_times_s[first_query + m]);
    }
}
