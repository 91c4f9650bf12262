/* HSTU attention of plain causal rows, forward and backward, fused: a block of queries against all keys it sees.

   README.md has the maths. Scores of one block live in an array that stays in the cache; products run in registers, and
   nothing above the diagonal is computed but what shares a register with it. Compiled once per machine by native.py,
   for numbers of REAL_BITS 32 or 64, with GCC's or clang's vector extension only; no call allocates or keeps anything.

   n: length of a row. A, V: widths of queries/keys and of values; Ap, Vp: rounded up to whole vectors; np: n likewise.
   All sums are formed in one order, whatever the number of threads: a thread takes whole rows of the batch. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if REAL_BITS == 64
typedef double REAL;
typedef int64_t WHOLE;
#else
typedef float REAL;
typedef int32_t WHOLE;
#endif

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef WHOLE whole __attribute__((vector_size(VECTOR_BYTES), may_alias));
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 6, VECS = VECTOR_BYTES == 64 ? 4 : 2, QUERIES = 48 }; /* QUERIES is a multiple of ROWS */

INLINE int64_t vectors(int64_t n) { return (n + LANES - 1) / LANES; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* c[r][v] = (or +=) sum over l of a[r * ar + l * al] * b[l][v], for R rows and N vectors known when compiled. */
INLINE void product(const int R, const int N, REAL *c, int64_t ldc, const REAL *a, int64_t ar, int64_t al,
                    const REAL *b, int64_t ldb, int64_t length, int add)
{
    vec sum[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++)
            sum[r][v] = add ? *(vec *)(c + r * ldc + v * LANES) : (vec){0};
    for (int64_t l = 0; l < length; l++) {
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            const vec b_v = *(const vec *)(b + l * ldb + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[r][v] += a[r * ar + l * al] * b_v;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++)
            *(vec *)(c + r * ldc + v * LANES) = sum[r][v];
}

/* The same for up to ROWS rows and any number of vectors. */
static void rows_product(REAL *c, int64_t ldc, const REAL *a, int64_t ar, int64_t al, const REAL *b, int64_t ldb,
                         int64_t num_rows, int64_t num_vectors, int64_t length, int add)
{
    int64_t v = 0;
#define COLUMNS(N)                                                                                                    \
    if (num_rows == ROWS)                                                                                              \
        product(ROWS, N, c + v * LANES, ldc, a, ar, al, b + v * LANES, ldb, length, add);                              \
    else                                                                                                               \
        for (int64_t r = 0; r < num_rows; r++)                                                                         \
            product(1, N, c + r * ldc + v * LANES, ldc, a + r * ar, ar, al, b + v * LANES, ldb, length, add);
    for (; v + VECS <= num_vectors; v += VECS) { COLUMNS(VECS) }
#if VECTOR_BYTES == 64
    if (v + 2 <= num_vectors) {
        COLUMNS(2)
        v += 2;
    }
#endif
    for (; v < num_vectors; v++) { COLUMNS(1) }
#undef COLUMNS
}

/* a where the mask is set, else b. */
INLINE vec choice(whole mask, vec a, vec b) { return (vec)((mask & (whole)a) | (~mask & (whole)b)); }

INLINE vec exponential(vec x)
{
#if REAL_BITS == 64
    for (int lane = 0; lane < LANES; lane++)
        x[lane] = exp(x[lane]);
    return x;
#else
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 87.0f, magic = (vec){0} + 12582912.0f;
    x = choice(x < low, low, choice(x > high, high, x)); /* NaN stays NaN */
    const vec n = (x * 1.44269504f + magic) - magic;     /* to the nearest whole number */
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = (vec){0} + 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return y * (vec)((__builtin_convertvector(n, whole) + 127) << 23); /* times 2^n, put into the exponent's bits */
#endif
}

/* Everything of one call. Pointers may be NULL where there is no bias, or no backward pass. */
typedef struct {
    const REAL *q, *k, *v, *grad;      /* grad: of the output, contiguous [L][H][V] */
    REAL *out, *dq, *dk, *dv;          /* contiguous [L][H][A or V]; out: one for each query */
    const int64_t *offsets;            /* B + 1 */
    const int64_t *query_offsets;      /* B + 1, if only the last positions of each row have a query; forward only */
    const int64_t *rows;               /* the rows of the batch to compute */
    const int64_t *key_times_s, *query_times_s;
    const int64_t *bucket_from_s;      /* shortest gap of each bucket, num_buckets + 1, then one that none reaches */
    const REAL *position_weight, *time_weight;
    double *dposition, *dtime;         /* added to */
    REAL *scratch;                     /* aligned; native.py says how much */
    int64_t num_rows, heads, A, V, max_len;
    int64_t q_position, q_head, k_position, k_head, v_position, v_head; /* strides, in numbers */
    double alpha;
} Call;

/* Where the parts of a row are kept, for one head; heads follow each other. */
typedef struct {
    int64_t np, Ap, Vp, head;
    REAL *kT, *v, *vT, *k, *q, *g, *dk, *dv;
} Packed;

INLINE REAL *part(REAL **next, int64_t size)
{
    REAL *here = *next;
    *next += (size + LANES - 1) / LANES * LANES;
    return here;
}

static Packed layout(const Call *call, int64_t n, REAL **next)
{
    Packed p = {.np = vectors(n) * LANES, .Ap = vectors(call->A) * LANES, .Vp = vectors(call->V) * LANES};
    REAL *start = *next, *end = *next;
    p.kT = part(&end, call->A * p.np);
    p.v = part(&end, n * p.Vp);
    if (call->grad) {
        p.vT = part(&end, call->V * p.np);
        p.k = part(&end, n * p.Ap);
        p.q = part(&end, n * p.Ap);
        p.g = part(&end, n * p.Vp);
        p.dk = part(&end, n * p.Ap);
        p.dv = part(&end, n * p.Vp);
    }
    p.head = end - start;
    *next = start + p.head * call->heads;
    return p;
}

/* to[i][0..width) = factor * from[i][..], zeros up to ld. */
static void pack(REAL *to, int64_t ld, const REAL *from, int64_t stride, int64_t n, int64_t width, REAL factor)
{
    for (int64_t i = 0; i < n; i++) {
        for (int64_t w = 0; w < width; w++)
            to[i * ld + w] = factor * from[i * stride + w];
        for (int64_t w = width; w < ld; w++)
            to[i * ld + w] = 0;
    }
}

/* to[w][i] = factor * from[i][w], zeros behind n. */
static void pack_transposed(REAL *to, int64_t np, const REAL *from, int64_t stride, int64_t n, int64_t width,
                            REAL factor)
{
    for (int64_t i0 = 0; i0 < n; i0 += LANES)
        for (int64_t w = 0; w < width; w++)
            for (int64_t i = i0; i < i0 + LANES; i++)
                to[w * np + i] = i < n ? factor * from[i * stride + w] : 0;
}

static void pack_row(const Call *call, const Packed *p, int64_t first, int64_t n)
{
    const REAL alpha = (REAL)call->alpha, share = (REAL)1 / (REAL)call->max_len;
    for (int64_t h = 0; h < call->heads; h++) {
        const REAL *q = call->q + first * call->q_position + h * call->q_head;
        const REAL *k = call->k + first * call->k_position + h * call->k_head;
        const REAL *v = call->v + first * call->v_position + h * call->v_head;
        const int64_t at = h * p->head;
        pack_transposed(p->kT + at, p->np, k, call->k_position, n, call->A, alpha);
        pack(p->v + at, p->Vp, v, call->v_position, n, call->V, 1);
        if (!call->grad)
            continue;
        pack_transposed(p->vT + at, p->np, v, call->v_position, n, call->V, 1);
        pack(p->k + at, p->Ap, k, call->k_position, n, call->A, alpha);
        pack(p->q + at, p->Ap, q, call->q_position, n, call->A, alpha);
        pack(p->g + at, p->Vp, call->grad + (first * call->heads + h) * call->V, call->heads * call->V, n, call->V,
             share);
        memset(p->dk + at, 0, sizeof(REAL) * n * p->Ap);
        memset(p->dv + at, 0, sizeof(REAL) * n * p->Vp);
    }
}

/* A row of n positions, the first packed at `first`. The query of position i is packed at query_base + i; positions
   before first_query have none. */
typedef struct {
    int64_t first, n, query_base, first_query;
} Row;

/* bias[r][j] of queries i = first_query + r and the keys j <= i, and the bucket of each pair. Going back in time a gap
   hardly ever shrinks, so its bucket is found from the one before it. */
static void fill_bias(const Call *call, const Row *row, int64_t first_query, int64_t num_queries, REAL *bias,
                      uint16_t *bucket, int64_t ld)
{
    const int64_t *from_s = call->bucket_from_s, *key_s = call->key_times_s + row->first;
    for (int64_t r = 0; r < num_queries; r++) {
        const int64_t i = first_query + r, query_s = call->query_times_s[row->query_base + i];
        const REAL *position = call->position_weight + call->max_len - 1 - i;
        int64_t c = 0;
        for (int64_t j = i; j >= 0; j--) {
            const int64_t gap_s = query_s > key_s[j] ? query_s - key_s[j] : key_s[j] - query_s;
            while (gap_s >= from_s[c + 1])
                c++;
            while (gap_s < from_s[c])
                c--;
            bucket[r * ld + j] = (uint16_t)c;
            bias[r * ld + j] = position[j] + call->time_weight[c];
        }
        for (int64_t j = i + 1; j < vectors(i + 1) * LANES; j++)
            bias[r * ld + j] = 0;
    }
}

/* Queries of one block: where they start, how many, and how many keys those of a group of ROWS see. */
typedef struct {
    int64_t first, num, np;
} Block;

INLINE int64_t group_end(const Block *block, int64_t r) { return block->first + least(r + ROWS, block->num); }

/* score[r][j] = q . k for all a group of rows sees together. */
static void scores(const Block *block, REAL *score, const REAL *q, int64_t q_stride, const REAL *kT, int64_t A)
{
    for (int64_t r = 0; r < block->num; r += ROWS)
        rows_product(score + r * block->np, block->np, q + (block->first + r) * q_stride, q_stride, 1, kT, block->np,
                     least(ROWS, block->num - r), vectors(group_end(block, r)), A, 0);
}

/* 0 in the lanes of keys after i; lanes: 0, 1, 2, ... */
INLINE vec visible(vec x, int64_t j, int64_t i, whole lanes) { return (vec)((whole)x & (lanes <= (WHOLE)(i - j))); }

/* Scores into weights silu(score + bias), 0 where a query does not see; with slope also slope *= silu'(score + bias). */
INLINE void weigh(const Block *block, REAL *score, REAL *slope, const REAL *bias)
{
    whole lanes;
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = lane;
    for (int64_t r = 0; r < block->num; r++) {
        const int64_t i = block->first + r, end = vectors(i + 1) * LANES;
        const int64_t zeros_to = vectors(group_end(block, r / ROWS * ROWS)) * LANES;
        for (int64_t j = 0; j < end; j += LANES) {
            vec *at = (vec *)(score + r * block->np + j);
            vec s = *at;
            if (bias)
                s += *(const vec *)(bias + r * block->np + j);
            const vec sigma = 1 / (1 + exponential(-s));
            *at = visible(s * sigma, j, i, lanes);
            if (slope) {
                vec *slope_at = (vec *)(slope + r * block->np + j);
                *slope_at = visible(*slope_at * sigma * (1 + s * (1 - sigma)), j, i, lanes);
            }
        }
        for (int64_t j = end; j < zeros_to; j += LANES) {
            *(vec *)(score + r * block->np + j) = (vec){0};
            if (slope)
                *(vec *)(slope + r * block->np + j) = (vec){0};
        }
    }
}

/* to[r][..] = sum over the keys seen of weight[r][j] * from[j][..], written as `width` numbers a position. */
static void sum_over_keys(const Block *block, REAL *to, int64_t to_stride, int64_t width, const REAL *weight,
                          const REAL *from, int64_t ld, REAL factor, REAL *sums)
{
    for (int64_t r = 0; r < block->num; r += ROWS) {
        const int64_t num_rows = least(ROWS, block->num - r);
        rows_product(sums, ld, weight + r * block->np, block->np, 1, from, ld, num_rows, ld / LANES,
                     group_end(block, r), 0);
        for (int64_t row = 0; row < num_rows; row++)
            for (int64_t w = 0; w < width; w++)
                to[(block->first + r + row) * to_stride + w] = factor * sums[row * ld + w];
    }
}

/* to[j][..] += sum over the block's queries from j on of weight[r][j] * from[first + r][..]. */
static void add_over_queries(const Block *block, REAL *to, const REAL *weight, const REAL *from, int64_t ld)
{
    const int64_t num_keys = block->first + block->num;
    for (int64_t j = 0; j < num_keys; j += ROWS) {
        const int64_t r = j > block->first ? j - block->first : 0;
        rows_product(to + j * ld, ld, weight + r * block->np + j, 1, block->np, from + (block->first + r) * ld, ld,
                     least(ROWS, num_keys - j), ld / LANES, block->num - r, 1);
    }
}

/* What a block's ds adds to the gradients of both tables. by_distance: REAL[2 max_len - 1] of the row so far. */
static void add_bias_gradients(const Call *call, const Block *block, const REAL *ds, const uint16_t *bucket,
                               REAL *by_distance)
{
    for (int64_t r = 0; r < block->num; r++) {
        const int64_t i = block->first + r;
        const REAL *ds_r = ds + r * block->np;
        const uint16_t *bucket_r = bucket + r * block->np;
        REAL *distance = by_distance + call->max_len - 1 - i;
        for (int64_t j = 0; j <= i; j++)
            distance[j] += ds_r[j];
        /* Neighbours share a bucket, so one sum runs until it changes. */
        double sum = 0;
        int64_t c = bucket_r[0];
        for (int64_t j = 0; j <= i; j++) {
            if (bucket_r[j] != c) {
                call->dtime[c] += sum;
                c = bucket_r[j];
                sum = 0;
            }
            sum += (double)ds_r[j];
        }
        call->dtime[c] += sum;
    }
}

typedef struct {
    REAL *score, *slope, *bias, *ds, *sums, *by_distance;
    uint16_t *bucket;
} Tiles;

static void forward_block(const Call *call, const Packed *p, const Tiles *t, const Block *block, int64_t query_base)
{
    for (int64_t h = 0; h < call->heads; h++) {
        const int64_t at = h * p->head;
        scores(block, t->score, call->q + query_base * call->q_position + h * call->q_head, call->q_position,
               p->kT + at, call->A);
        if (t->bias)
            weigh(block, t->score, 0, t->bias);
        else
            weigh(block, t->score, 0, 0);
        sum_over_keys(block, call->out + (query_base * call->heads + h) * call->V, call->heads * call->V, call->V,
                      t->score, p->v + at, p->Vp, (REAL)1 / (REAL)call->max_len, t->sums);
    }
}

static void backward_block(const Call *call, const Packed *p, const Tiles *t, const Block *block, int64_t first)
{
    for (int64_t h = 0; h < call->heads; h++) {
        const int64_t at = h * p->head;
        scores(block, t->score, call->q + first * call->q_position + h * call->q_head, call->q_position, p->kT + at,
               call->A);
        scores(block, t->slope, p->g + at, p->Vp, p->vT + at, call->V);
        if (t->bias)
            weigh(block, t->score, t->slope, t->bias);
        else
            weigh(block, t->score, t->slope, 0);
        sum_over_keys(block, call->dq + (first * call->heads + h) * call->A, call->heads * call->A, call->A, t->slope,
                      p->k + at, p->Ap, 1, t->sums);
        add_over_queries(block, p->dk + at, t->slope, p->q + at, p->Ap);
        add_over_queries(block, p->dv + at, t->score, p->g + at, p->Vp);
        if (!t->bias)
            continue;
        for (int64_t r = 0; r < block->num; r++)
            for (int64_t j = 0; j <= block->first + r; j++)
                t->ds[r * block->np + j] = t->slope[r * block->np + j] + (h ? t->ds[r * block->np + j] : 0);
    }
    if (t->bias)
        add_bias_gradients(call, block, t->ds, t->bucket, t->by_distance);
}

static void put_key_gradients(const Call *call, const Packed *p, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < call->heads; h++) {
            const int64_t at = (first + i) * call->heads + h;
            memcpy(call->dk + at * call->A, p->dk + h * p->head + i * p->Ap, sizeof(REAL) * call->A);
            memcpy(call->dv + at * call->V, p->dv + h * p->head + i * p->Vp, sizeof(REAL) * call->V);
        }
}

static void one_row(const Call *call, const Row *row)
{
    const int64_t first = row->first, n = row->n;
    REAL *next = call->scratch;
    const Packed p = layout(call, n, &next);
    Tiles t = {.score = part(&next, QUERIES * p.np), .sums = part(&next, ROWS * (p.Ap > p.Vp ? p.Ap : p.Vp))};
    if (call->grad)
        t.slope = part(&next, QUERIES * p.np);
    if (call->time_weight) {
        t.bias = part(&next, QUERIES * p.np);
        t.bucket = (uint16_t *)part(&next, QUERIES * p.np);
        if (call->grad) {
            t.ds = part(&next, QUERIES * p.np);
            t.by_distance = part(&next, 2 * call->max_len - 1);
            memset(t.by_distance, 0, sizeof(REAL) * (2 * call->max_len - 1));
        }
    }
    pack_row(call, &p, first, n);
    for (int64_t i = row->first_query; i < n; i += QUERIES) {
        const Block block = {.first = i, .num = least(QUERIES, n - i), .np = p.np};
        if (t.bias)
            fill_bias(call, row, i, block.num, t.bias, t.bucket, p.np);
        if (call->grad)
            backward_block(call, &p, &t, &block, first);
        else
            forward_block(call, &p, &t, &block, row->query_base);
    }
    if (!call->grad)
        return;
    put_key_gradients(call, &p, first, n);
    if (t.bias)
        for (int64_t d = 0; d < 2 * call->max_len - 1; d++)
            call->dposition[d] += (double)t.by_distance[d];
}

/* Scratch of a call in numbers of REAL, for rows of at most n. */
int64_t hstu_attention_scratch(int64_t n, int64_t heads, int64_t A, int64_t V, int64_t max_len)
{
    const int64_t np = vectors(n) * LANES, Ap = vectors(A) * LANES, Vp = vectors(V) * LANES;
    return heads * ((A + V) * np + 3 * n * Ap + 3 * n * Vp + 8 * LANES) + 6 * QUERIES * np + ROWS * (Ap + Vp) +
           2 * max_len + 16 * LANES;
}

/* The forward pass where call->grad is NULL, else the backward pass. */
void hstu_attention_run(const Call *call)
{
    for (int64_t r = 0; r < call->num_rows; r++) {
        const int64_t b = call->rows[r], first = call->offsets[b], n = call->offsets[b + 1] - first;
        Row row = {.first = first, .n = n, .query_base = first, .first_query = 0};
        if (call->query_offsets) {
            row.first_query = n - (call->query_offsets[b + 1] - call->query_offsets[b]);
            row.query_base = call->query_offsets[b] - row.first_query;
        }
        if (row.first_query < n)
            one_row(call, &row);
    }
}
