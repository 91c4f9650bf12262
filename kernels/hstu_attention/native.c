/* HSTU attention under every mask of mask.py, forward and backward, fused: a block of queries against the keys it sees.

   README.md has the maths. Keys are taken in chunks: the scores of a block and a chunk live in an array that stays in
   the cache; products run in registers. Every group of ROWS queries has its own ranges of keys, and nothing outside of
   them is computed but what shares a register with it, so that a window costs what it holds. Compiled once per machine
   by native.py, for numbers of REAL_BITS 32 or 64; no call allocates or keeps anything.

   n: length of a row. A, V: widths of queries/keys and of values; Ap, Vp: rounded up to whole vectors.
   All sums are formed in one order, ascending keys, whatever the number of threads (a thread takes whole rows of the
   batch) and whichever positions have a query: what is cached changes no bit of what is not. */

#include "native_mask.h"

/* Where the parts of a row are kept, for one head; heads follow each other. Transposed ones lie chunk by chunk, each
   [A or V][ld]: with ld a power of two all of a column would fall into one set of the cache. */
typedef struct {
    int64_t ld, chunks, Ap, Vp, head;
    REAL *kT, *v, *vT, *k, *q, *g, *dk, *dv;
} Packed;

INLINE REAL *part(REAL **next, int64_t size)
{
    REAL *here = *next;
    *next += (size + LANES - 1) / LANES * LANES;
    return here;
}

INLINE int64_t chunk_ld(int64_t n) { return vectors(least(n, KEYS)) * LANES + LANES; }

static Packed layout(const Call *call, int64_t n, int64_t num_queries, REAL **next)
{
    Packed p = {.ld = chunk_ld(n), .chunks = (n + KEYS - 1) / KEYS};
    p.Ap = vectors(call->A) * LANES;
    p.Vp = vectors(call->V) * LANES;
    REAL *start = *next, *end = *next;
    p.kT = part(&end, call->A * p.ld * p.chunks);
    p.v = part(&end, n * p.Vp);
    if (call->grad) {
        p.vT = part(&end, call->V * p.ld * p.chunks);
        p.k = part(&end, n * p.Ap);
        p.q = part(&end, num_queries * p.Ap);
        p.g = part(&end, num_queries * p.Vp);
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

/* to[chunk][w][i] = factor * from[chunk * KEYS + i][w], zeros behind n up to a whole vector. */
static void pack_transposed(REAL *to, const Packed *p, const REAL *from, int64_t stride, int64_t n, int64_t width,
                            REAL factor)
{
    for (int64_t i0 = 0; i0 < n; i0 += LANES) {
        REAL *chunk = to + i0 / KEYS * width * p->ld - i0 / KEYS * KEYS;
        for (int64_t w = 0; w < width; w++)
            for (int64_t i = i0; i < i0 + LANES; i++)
                chunk[w * p->ld + i] = i < n ? factor * from[i * stride + w] : 0;
    }
}

static void pack_row(const Call *call, const Packed *p, const Row *row)
{
    const REAL alpha = (REAL)call->alpha, share = (REAL)1 / (REAL)call->max_len;
    const int64_t n = row->n, num_queries = n - row->first_query;
    for (int64_t h = 0; h < call->heads; h++) {
        const REAL *q = call->q + row->queries * call->q_position + h * call->q_head;
        const REAL *k = call->k + row->first * call->k_position + h * call->k_head;
        const REAL *v = call->v + row->first * call->v_position + h * call->v_head;
        const int64_t at = h * p->head;
        pack_transposed(p->kT + at, p, k, call->k_position, n, call->A, alpha);
        pack(p->v + at, p->Vp, v, call->v_position, n, call->V, 1);
        if (!call->grad)
            continue;
        pack_transposed(p->vT + at, p, v, call->v_position, n, call->V, 1);
        pack(p->k + at, p->Ap, k, call->k_position, n, call->A, alpha);
        pack(p->q + at, p->Ap, q, call->q_position, num_queries, call->A, alpha);
        pack(p->g + at, p->Vp, call->grad + (row->queries * call->heads + h) * call->V, call->heads * call->V,
             num_queries, call->V, share);
        memset(p->dk + at, 0, sizeof(REAL) * n * p->Ap);
        memset(p->dv + at, 0, sizeof(REAL) * n * p->Vp);
    }
}

/* Bias and bucket of one query and the keys [from, to), the last first; returns the bucket of the first, and starts to
   look for that of the last at c. */
INLINE int64_t fill_part(const Call *call, const Row *row, const int is_plain, int64_t i, int64_t from, int64_t to,
                         int64_t c, REAL *bias, uint16_t *bucket)
{
    const int64_t *from_s = call->bucket_from_s, *key_s = call->key_times_s + row->first;
    const int64_t query_s = call->query_times_s[row->queries + i - row->first_query];
    const REAL *position = call->position_weight + call->max_len - 1 - place(row, i), *weight = call->time_weight;
    for (int64_t j = to - 1; j >= from; j--) {
        const int64_t gap_s = query_s > key_s[j] ? query_s - key_s[j] : key_s[j] - query_s;
        while (gap_s >= from_s[c + 1])
            c++;
        while (gap_s < from_s[c])
            c--;
        bucket[j] = (uint16_t)c;
        bias[j] = position[is_plain ? j : place(row, j)] + weight[c];
    }
    return c;
}

/* bias[r][j] of every pair that is seen, and its bucket. Going back in time a gap hardly ever shrinks, so its bucket is
   found from the one before it; of keys far from all queries, from the one of the query before. */
static void fill_bias(const Call *call, const Row *row, const Block *block, const Chunk *chunk, REAL *bias,
                      uint16_t *bucket)
{
    const int is_plain = places_are_indices(row);
    int64_t c = 0;
    for (int64_t r = 0; r < block->num; r++) {
        const int64_t i = block->first + r, at = r * chunk->ld - chunk->first;
        const Parts seen = parts_of(&block->sights[r], i, chunk);
        if (i < chunk->end)
            c = 0;
        for (int s = 2; s >= 0; s--)
            c = is_plain ? fill_part(call, row, 1, i, seen.from[s], seen.to[s], c, bias + at, bucket + at)
                         : fill_part(call, row, 0, i, seen.from[s], seen.to[s], c, bias + at, bucket + at);
    }
}

/* score[r][j] = q[r] . k[j] for the parts that each group sees. */
static void scores(const Block *block, const Chunk *chunk, REAL *score, const REAL *q, int64_t q_stride, const REAL *kT,
                   int64_t A)
{
    EACH_PART(block, chunk)
        rows_product(score + r * chunk->ld + from - chunk->first, chunk->ld, q + r * q_stride, q_stride, 1,
                     kT + from - chunk->first, chunk->ld, num_rows, vectors(to - from), A, 0);
}

/* All bits of the lanes whose keys, from j on, the query i sees. */
INLINE whole lanes_seen(const Sight *seen, int64_t i, int64_t j, whole lanes)
{
    const whole oldest = lanes < (WHOLE)(seen->oldest - j);
    const whole near = (lanes >= (WHOLE)(seen->low - j)) & (lanes < (WHOLE)(seen->end - j));
    return oldest | near | (lanes == (WHOLE)(i - j));
}

/* Scores into weights silu(score + bias), 0 where a query does not see; with slope, slope *= silu'(score + bias). */
INLINE void weigh(const Block *block, const Chunk *chunk, REAL *score, REAL *slope, const REAL *bias)
{
    whole lanes;
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = lane;
    EACH_PART(block, chunk)
        for (int64_t row = r; row < r + num_rows; row++) {
            const int64_t i = block->first + row, at = row * chunk->ld - chunk->first;
            const Sight seen = block->sights[row];
            for (int64_t j = from; j < to; j += LANES) {
                vec *weight_at = (vec *)(score + at + j), *slope_at = (vec *)(slope ? slope + at + j : 0);
                if (i < j && j >= seen.end) { /* behind all it sees */
                    *weight_at = (vec){0};
                    if (slope)
                        *slope_at = (vec){0};
                    continue;
                }
                vec x = *weight_at;
                if (bias)
                    x += *(const vec *)(bias + at + j);
                const vec sigma = 1 / (1 + exponential(-x));
                vec weight = x * sigma, steepness = x;
                if (slope)
                    steepness = *slope_at * sigma * (1 + x * (1 - sigma));
                if (j < seen.low || j + LANES > seen.end) {
                    const whole visible = lanes_seen(&seen, i, j, lanes);
                    weight = (vec)((whole)weight & visible);
                    steepness = (vec)((whole)steepness & visible);
                }
                *weight_at = weight;
                if (slope)
                    *slope_at = steepness;
            }
        }
}

/* sums[r][..] += sum over the keys seen of weight[r][j] * from[j][..]. */
static void sum_over_keys(const Block *block, const Chunk *chunk, REAL *sums, const REAL *weight, const REAL *keys,
                          int64_t ld)
{
    EACH_PART(block, chunk)
        rows_product(sums + r * ld, ld, weight + r * chunk->ld + from - chunk->first, chunk->ld, 1, keys + from * ld,
                     ld, num_rows, ld / LANES, to - from, 1);
}

/* Zeros between the parts of each group, as far as other groups reach. */
static void clear_between(const Block *block, const Chunk *chunk, REAL *weight)
{
    for (int64_t r = 0; r < block->num; r++) {
        const Ranges *parts = &chunk->parts[r / ROWS];
        REAL *row = weight + r * chunk->ld - chunk->first;
        int64_t from = chunk->low;
        for (int s = 0; s <= parts->num; s++) {
            const int64_t to = s < parts->num ? parts->from[s] : vectors(chunk->high) * LANES;
            if (to > from)
                memset(row + from, 0, sizeof(REAL) * (to - from));
            if (s < parts->num)
                from = vectors(parts->to[s]) * LANES;
        }
    }
}

/* Whether a group sees any of the keys [j, j + ROWS). */
INLINE int sees_any(const Ranges *parts, int64_t j)
{
    for (int s = 0; s < parts->num; s++)
        if (j < parts->to[s] && j + ROWS > parts->from[s])
            return 1;
    return 0;
}

/* to[j][..] += sum over the groups from the first to the last that sees j of weight[r][j] * queries[r][..]. */
static void add_over_queries(const Block *block, const Chunk *chunk, REAL *to, const REAL *weight, const REAL *queries,
                             int64_t ld)
{
    for (int64_t j = chunk->low; j < chunk->high; j += ROWS) {
        int64_t r = 0, end = (block->num + ROWS - 1) / ROWS * ROWS;
        while (r < end && !sees_any(&chunk->parts[r / ROWS], j))
            r += ROWS;
        while (end > r && !sees_any(&chunk->parts[end / ROWS - 1], j))
            end -= ROWS;
        if (r < end)
            rows_product(to + j * ld, ld, weight + r * chunk->ld + j - chunk->first, 1, chunk->ld, queries + r * ld, ld,
                         least(ROWS, chunk->high - j), ld / LANES, least(end, block->num) - r, 1);
    }
}

/* What a block's ds adds to the gradients of both tables. by_distance: REAL[2 max_len - 1] of the row so far. */
static void add_bias_gradients(const Call *call, const Row *row, const Block *block, const Chunk *chunk, const REAL *ds,
                               const uint16_t *bucket, REAL *by_distance)
{
    for (int64_t r = 0; r < block->num; r++) {
        const int64_t i = block->first + r, at = r * chunk->ld - chunk->first;
        const Parts seen = parts_of(&block->sights[r], i, chunk);
        REAL *distance = by_distance + call->max_len - 1 - place(row, i);
        for (int s = 0; s < 3; s++) {
            const int64_t from = seen.from[s], to = seen.to[s];
            if (from >= to)
                continue;
            if (places_are_indices(row))
                for (int64_t j = from; j < to; j++)
                    distance[j] += ds[at + j];
            else
                for (int64_t j = from; j < to; j++)
                    distance[place(row, j)] += ds[at + j];
            /* Neighbours share a bucket, so one sum runs until it changes. */
            double sum = 0;
            int64_t c = bucket[at + from];
            for (int64_t j = from; j < to; j++) {
                if (bucket[at + j] != c) {
                    call->dtime[c] += sum;
                    c = bucket[at + j];
                    sum = 0;
                }
                sum += (double)ds[at + j];
            }
            call->dtime[c] += sum;
        }
    }
}

/* score, slope, bias, bucket, ds: [QUERIES][ld] of a block and a chunk. sums: [heads][QUERIES][Ap or Vp] of a block. */
typedef struct {
    REAL *score, *slope, *bias, *ds, *sums, *by_distance;
    uint16_t *bucket;
} Tiles;

static void forward_chunk(const Call *call, const Packed *p, const Tiles *t, const Block *block, const Chunk *chunk,
                          int64_t query)
{
    for (int64_t h = 0; h < call->heads; h++) {
        const int64_t at = h * p->head;
        scores(block, chunk, t->score, call->q + query * call->q_position + h * call->q_head, call->q_position,
               p->kT + at + chunk->first / KEYS * call->A * p->ld, call->A);
        if (t->bias)
            weigh(block, chunk, t->score, 0, t->bias);
        else
            weigh(block, chunk, t->score, 0, 0);
        sum_over_keys(block, chunk, t->sums + h * QUERIES * p->Vp, t->score, p->v + at, p->Vp);
    }
}

static void backward_chunk(const Call *call, const Packed *p, const Tiles *t, const Row *row, const Block *block,
                           const Chunk *chunk)
{
    const int64_t number = chunk->first / KEYS, query = block->first - row->first_query;
    for (int64_t h = 0; h < call->heads; h++) {
        const int64_t at = h * p->head;
        scores(block, chunk, t->score, call->q + (row->queries + query) * call->q_position + h * call->q_head,
               call->q_position, p->kT + at + number * call->A * p->ld, call->A);
        scores(block, chunk, t->slope, p->g + at + query * p->Vp, p->Vp, p->vT + at + number * call->V * p->ld,
               call->V);
        if (t->bias)
            weigh(block, chunk, t->score, t->slope, t->bias);
        else
            weigh(block, chunk, t->score, t->slope, 0);
        sum_over_keys(block, chunk, t->sums + h * QUERIES * p->Ap, t->slope, p->k + at, p->Ap);
        clear_between(block, chunk, t->score);
        clear_between(block, chunk, t->slope);
        add_over_queries(block, chunk, p->dk + at, t->slope, p->q + at + query * p->Ap, p->Ap);
        add_over_queries(block, chunk, p->dv + at, t->score, p->g + at + query * p->Vp, p->Vp);
        if (!t->bias)
            continue;
        EACH_PART(block, chunk)
            for (int64_t in = r; in < r + num_rows; in++)
                for (int64_t j = in * chunk->ld + from - chunk->first; j < in * chunk->ld + to - chunk->first; j++)
                    t->ds[j] = t->slope[j] + (h ? t->ds[j] : 0);
    }
    if (t->bias)
        add_bias_gradients(call, row, block, chunk, t->ds, t->bucket, t->by_distance);
}

/* The sums of a block's queries, `width` numbers each, to where the packed query `query` and those after it are. */
static void put_sums(const Call *call, const Block *block, int64_t query, REAL *to, const REAL *sums, int64_t width,
                     int64_t ld, REAL factor)
{
    for (int64_t r = 0; r < block->num; r++)
        for (int64_t h = 0; h < call->heads; h++)
            for (int64_t w = 0; w < width; w++)
                to[((query + r) * call->heads + h) * width + w] = factor * sums[(h * QUERIES + r) * ld + w];
}

static void put_key_gradients(const Call *call, const Packed *p, const Row *row)
{
    for (int64_t i = 0; i < row->n; i++)
        for (int64_t h = 0; h < call->heads; h++) {
            const int64_t at = (row->first + i) * call->heads + h;
            memcpy(call->dk + at * call->A, p->dk + h * p->head + i * p->Ap, sizeof(REAL) * call->A);
            memcpy(call->dv + at * call->V, p->dv + h * p->head + i * p->Vp, sizeof(REAL) * call->V);
        }
}

static void one_block(const Call *call, const Packed *p, const Tiles *t, const Row *row, int64_t first)
{
    const int64_t ld = call->grad ? p->Ap : p->Vp, query = row->queries + first - row->first_query;
    Block block;
    Chunk chunk;
    set_block(call, row, first, &block);
    memset(t->sums, 0, sizeof(REAL) * call->heads * QUERIES * ld);
    for (int64_t number = 0; number < p->chunks; number++) {
        if (!set_chunk(&block, row->n, p->ld, number, &chunk))
            continue;
        if (t->bias)
            fill_bias(call, row, &block, &chunk, t->bias, t->bucket);
        if (call->grad)
            backward_chunk(call, p, t, row, &block, &chunk);
        else
            forward_chunk(call, p, t, &block, &chunk, query);
    }
    if (call->grad)
        put_sums(call, &block, query, call->dq, t->sums, call->A, ld, 1);
    else
        put_sums(call, &block, query, call->out, t->sums, call->V, ld, (REAL)1 / (REAL)call->max_len);
}

static void one_row(const Call *call, const Row *row)
{
    REAL *next = call->scratch;
    const Packed p = layout(call, row->n, row->n - row->first_query, &next);
    Tiles t = {.score = part(&next, QUERIES * p.ld)};
    t.sums = part(&next, call->heads * QUERIES * (p.Ap > p.Vp ? p.Ap : p.Vp));
    if (call->grad)
        t.slope = part(&next, QUERIES * p.ld);
    if (call->time_weight) {
        t.bias = part(&next, QUERIES * p.ld);
        t.bucket = (uint16_t *)part(&next, QUERIES * p.ld);
        if (call->grad) {
            t.ds = part(&next, QUERIES * p.ld);
            t.by_distance = part(&next, 2 * call->max_len - 1);
            memset(t.by_distance, 0, sizeof(REAL) * (2 * call->max_len - 1));
        }
    }
    pack_row(call, &p, row);
    for (int64_t i = row->first_query; i < row->n; i += QUERIES)
        one_block(call, &p, &t, row, i);
    if (!call->grad)
        return;
    put_key_gradients(call, &p, row);
    if (t.bias)
        for (int64_t d = 0; d < 2 * call->max_len - 1; d++)
            call->dposition[d] += (double)t.by_distance[d];
}

/* Scratch of a call in numbers of REAL, for rows of at most n. */
int64_t hstu_attention_scratch(int64_t n, int64_t heads, int64_t A, int64_t V, int64_t max_len)
{
    const int64_t Ap = vectors(A) * LANES, Vp = vectors(V) * LANES, ld = chunk_ld(n), chunks = (n + KEYS - 1) / KEYS;
    return heads * ((A + V) * ld * chunks + 3 * n * Ap + 3 * n * Vp + QUERIES * (Ap + Vp) + 8 * LANES) +
           5 * QUERIES * ld + 2 * max_len + 16 * LANES;
}

/* The forward pass where call->grad is NULL, else the backward pass. Rows without a query are left out. */
void hstu_attention_run(const Call *call)
{
    for (int64_t r = 0; r < call->num_rows; r++) {
        const int64_t b = call->rows[r], first = call->offsets[b], n = call->offsets[b + 1] - first;
        Row row = {.first = first, .n = n, .queries = first, .history = n};
        if (call->query_offsets) {
            row.queries = call->query_offsets[b];
            row.first_query = n - (call->query_offsets[b + 1] - row.queries);
        }
        if (call->num_targets)
            row.history -= call->num_targets[b];
        if (call->contextual_len > 1)
            row.shift = call->contextual_len - 1;
        if (row.first_query < n)
            one_row(call, &row);
    }
}
