/* What one call is about, and which keys its queries see: mask.py in ranges, for blocks of queries and chunks of keys. */

#include "native_vectors.h"

enum { QUERIES = 48, KEYS = 512, GROUPS = QUERIES / ROWS }; /* KEYS: of a chunk, whole vectors */

/* Everything of one call. Pointers may be NULL where there is no bias, or no backward pass. */
typedef struct {
    const REAL *q, *k, *v, *grad;      /* grad: of the output, contiguous [M][H][V] */
    REAL *out, *dq, *dk, *dv;          /* contiguous [M or L][H][A or V]; out and dq: one for each query */
    const int64_t *offsets;            /* B + 1 */
    const int64_t *query_offsets;      /* B + 1, if only the last positions of each row have a query */
    const int64_t *num_targets;        /* B, if rows end in targets */
    const int64_t *rows;               /* the rows of the batch to compute */
    const int64_t *key_times_s, *query_times_s;
    const int64_t *bucket_from_s;      /* shortest gap of each bucket, num_buckets + 1, then one that none reaches */
    const REAL *position_weight, *time_weight;
    double *dposition, *dtime;         /* added to */
    REAL *scratch;                     /* aligned; hstu_attention_scratch says how much */
    int64_t num_rows, heads, A, V, max_len;
    int64_t contextual_len, max_attn_len, min_full_attn_len, num_oldest_keys; /* of AttentionMask; max_attn_len: -1 for no limit */
    int64_t q_position, q_head, k_position, k_head, v_position, v_head; /* strides, in numbers */
    double alpha;
} Call;

/* A row of n positions, the first packed at `first`; those from first_query on have queries, packed from `queries` on.
   history: index of its first target, n without any. shift: contextual positions that stand at the place of another. */
typedef struct {
    int64_t first, n, first_query, queries, history, shift;
} Row;

/* Where an index stands, see mask.py. */
INLINE int64_t place(const Row *row, int64_t index)
{
    const int64_t from_context = index > row->shift ? index - row->shift : 0;
    return least(from_context, row->history - row->shift);
}

INLINE int places_are_indices(const Row *row) { return row->shift == 0 && row->history == row->n; }

/* The keys that one query sees: [0, oldest), [low, end) and itself. oldest <= low <= end. */
typedef struct {
    int64_t oldest, low, end;
} Sight;

static Sight sight(const Call *call, const Row *row, int64_t i)
{
    if (i < call->contextual_len)
        return (Sight){0, 0, row->history};
    Sight seen = {0, 0, least(i + 1, row->history)};
    if (call->max_attn_len < 0)
        return seen;
    const int64_t at = place(row, i), end_place = row->history - row->shift;
    if (call->min_full_attn_len && at >= end_place - call->min_full_attn_len)
        return seen;
    if (at > call->max_attn_len)
        seen.low = at - call->max_attn_len + row->shift;
    seen.oldest = least(call->num_oldest_keys, seen.low);
    return seen;
}

/* Up to three ranges of keys, ascending; they start at whole vectors, and no two touch the same one. */
typedef struct {
    int64_t from[3], to[3];
    int num;
} Ranges;

static void add_range(Ranges *ranges, int64_t from, int64_t to)
{
    if (from >= to)
        return;
    from = from / LANES * LANES;
    if (ranges->num && from < vectors(ranges->to[ranges->num - 1]) * LANES) {
        if (to > ranges->to[ranges->num - 1])
            ranges->to[ranges->num - 1] = to;
        return;
    }
    ranges->from[ranges->num] = from;
    ranges->to[ranges->num++] = to;
}

/* What any of the queries [first, last] sees. */
static Ranges ranges_of(const Call *call, const Row *row, int64_t first, int64_t last)
{
    Sight seen = sight(call, row, first);
    for (int64_t i = first + 1; i <= last; i++) {
        const Sight one = sight(call, row, i);
        seen.oldest = one.oldest > seen.oldest ? one.oldest : seen.oldest;
        seen.low = least(one.low, seen.low);
        seen.end = one.end > seen.end ? one.end : seen.end;
    }
    Ranges ranges = {.num = 0};
    add_range(&ranges, 0, least(seen.oldest, seen.low));
    add_range(&ranges, seen.low, seen.end);
    add_range(&ranges, first > row->history ? first : row->history, last + 1); /* targets see themselves */
    return ranges;
}

/* Queries of one block: index of the first, how many, what each sees, and what each group of ROWS sees. */
typedef struct {
    int64_t first, num;
    Sight sights[QUERIES];
    Ranges groups[GROUPS];
} Block;

static void set_block(const Call *call, const Row *row, int64_t first, Block *block)
{
    block->first = first;
    block->num = least(QUERIES, row->n - first);
    for (int64_t r = 0; r < block->num; r++) {
        block->sights[r] = sight(call, row, first + r);
        if (r % ROWS == 0)
            block->groups[r / ROWS] = ranges_of(call, row, first + r, first + least(r + ROWS, block->num) - 1);
    }
}

/* One chunk of keys as a block sees it. first, end: its keys; low, high: those of it that some query sees lie between;
   parts: of each group's ranges, what is in it (from whole vectors on). */
typedef struct {
    int64_t first, end, low, high, ld;
    Ranges parts[GROUPS];
} Chunk;

/* 0 if no query of the block sees any of it. */
static int set_chunk(const Block *block, int64_t n, int64_t ld, int64_t number, Chunk *chunk)
{
    *chunk = (Chunk){.first = number * KEYS, .end = least((number + 1) * KEYS, n), .ld = ld};
    chunk->low = chunk->end;
    chunk->high = chunk->first;
    for (int64_t r = 0; r < block->num; r += ROWS) {
        const Ranges *seen = &block->groups[r / ROWS];
        Ranges *in_chunk = &chunk->parts[r / ROWS];
        for (int s = 0; s < seen->num; s++) {
            const int64_t from = seen->from[s] > chunk->first ? seen->from[s] : chunk->first;
            const int64_t to = least(seen->to[s], chunk->end);
            if (from >= to)
                continue;
            in_chunk->from[in_chunk->num] = from;
            in_chunk->to[in_chunk->num++] = to;
            chunk->low = least(chunk->low, from);
            chunk->high = to > chunk->high ? to : chunk->high;
        }
    }
    return chunk->low < chunk->high;
}

/* For r: first row of each group, num_rows: of it, from, to: keys of each of its parts of the chunk. */
#define EACH_PART(block, chunk)                                                                                        \
    for (int64_t r = 0, num_rows; num_rows = least(ROWS, (block)->num - r), r < (block)->num; r += ROWS)               \
        for (int64_t s = 0, from, to; next_part(&(chunk)->parts[r / ROWS], s, &from, &to); s++)

/* The keys of a chunk that the query i sees, without what only shares a vector with them: the oldest, the near, itself.
   A part is empty where `to` is not above `from`. */
typedef struct {
    int64_t from[3], to[3];
} Parts;

static Parts parts_of(const Sight *seen, int64_t i, const Chunk *chunk)
{
    Parts parts = {{0, seen->low, i}, {seen->oldest, seen->end, i < seen->end ? i : i + 1}};
    for (int s = 0; s < 3; s++) {
        parts.from[s] = parts.from[s] > chunk->first ? parts.from[s] : chunk->first;
        parts.to[s] = least(parts.to[s], chunk->end);
    }
    return parts;
}

INLINE int next_part(const Ranges *parts, int64_t s, int64_t *from, int64_t *to)
{
    if (s >= parts->num)
        return 0;
    *from = parts->from[s];
    *to = parts->to[s];
    return 1;
}
