/* The best rows of each query among a chunk of scores, and of all chunks before it.

   Of each query the K largest keys so far are kept, as a heap whose first is the least. A key orders as the result does:
   keys.py has the layout. Compiled once per machine by kernels/native_build.py; no call allocates or keeps anything. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const float *scores;                          /* [B][R] */
    const int64_t *excluded_offsets, *excluded;   /* B + 1; X rows, or NULL */
    uint64_t *left_out;                           /* scratch: a bit for each score, R / 64 words of each query */
    int64_t *best;                                /* [B][K], heaps */
    int64_t num_queries, num_rows, k, first_row;
} Chunk;

static const int64_t NOTHING = INT64_MIN;            /* LEFT_OUT */
static const int64_t NOT_A_NUMBER = -0x7F800002LL;   /* upper half */
static const int64_t LAST_ROW = 0xFFFFFFFFLL;
enum { STEP = 64 }; /* scores compared together */

static inline int64_t words(int64_t num_rows) { return (num_rows + 63) / 64; }

static inline int64_t upper_half(float score)
{
    int32_t bits;
    if (score != score)
        return NOT_A_NUMBER;
    score += 0.0f; /* -0.0 equals 0.0 */
    memcpy(&bits, &score, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

static inline int64_t key_of(float score, int64_t row) { return upper_half(score) * (1LL << 32) + (LAST_ROW - row); }

static inline float score_of(int64_t key)
{
    int32_t bits = (int32_t)(key >> 32);
    float score;
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    memcpy(&score, &bits, sizeof score);
    return score;
}

static inline int is_number(int64_t key) { return key >> 32 > NOT_A_NUMBER; } /* NOTHING is less than both */

/* The first of a heap becomes `key`, which is larger. */
static void replace_first(int64_t *heap, int64_t k, int64_t key)
{
    int64_t at = 0, child;
    while ((child = 2 * at + 1) < k) {
        child += child + 1 < k && heap[child + 1] < heap[child];
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = key;
}

static inline void offer(int64_t *heap, int64_t k, const uint64_t *left_out, float score, int64_t place, int64_t first_row)
{
    if (left_out[place / 64] >> place % 64 & 1)
        return;
    const int64_t key = key_of(score, first_row + place);
    if (key > heap[0])
        replace_first(heap, k, key);
}

static void take(const Chunk *chunk, int64_t query)
{
    const float *scores = chunk->scores + query * chunk->num_rows;
    const uint64_t *left_out = chunk->left_out + query * words(chunk->num_rows);
    int64_t *heap = chunk->best + query * chunk->k, place = 0;
    for (; place < chunk->num_rows && !is_number(heap[0]); place++)
        offer(heap, chunk->k, left_out, scores[place], place, chunk->first_row);
    /* From here on only a number above the last of the best can be among them: an equal one has a higher row. */
    for (; place + STEP <= chunk->num_rows; place += STEP) {
        const float worst = score_of(heap[0]);
        int any = 0;
        for (int i = 0; i < STEP; i++)
            any |= scores[place + i] > worst;
        if (any)
            for (int i = 0; i < STEP; i++)
                if (scores[place + i] > worst)
                    offer(heap, chunk->k, left_out, scores[place + i], place + i, chunk->first_row);
    }
    for (; place < chunk->num_rows; place++)
        offer(heap, chunk->k, left_out, scores[place], place, chunk->first_row);
}

static void leave_out(const Chunk *chunk, int64_t query)
{
    uint64_t *left_out = chunk->left_out + query * words(chunk->num_rows);
    for (int64_t i = chunk->excluded_offsets[query]; i < chunk->excluded_offsets[query + 1]; i++) {
        const int64_t place = chunk->excluded[i] - chunk->first_row;
        if (place >= 0 && place < chunk->num_rows)
            left_out[place / 64] |= 1ULL << place % 64;
    }
}

/* Take a chunk of scores into the best so far. */
void top_k_take(const Chunk *chunk)
{
    memset(chunk->left_out, 0, (size_t)(chunk->num_queries * words(chunk->num_rows)) * sizeof *chunk->left_out);
    for (int64_t query = 0; query < chunk->num_queries; query++) {
        if (chunk->excluded)
            leave_out(chunk, query);
        take(chunk, query);
    }
}

static int descending(const void *one, const void *other)
{
    const int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a < b) - (a > b);
}

/* Put the best in order, and read scores [B][K] and rows [B][K] from them. */
void top_k_read(int64_t *best, int64_t num_queries, int64_t k, float *scores, int64_t *rows)
{
    for (int64_t query = 0; query < num_queries; query++)
        qsort(best + query * k, (size_t)k, sizeof *best, descending);
    for (int64_t i = 0; i < num_queries * k; i++) {
        const int is_row = best[i] != NOTHING;
        scores[i] = is_row ? score_of(best[i]) : -__builtin_inff();
        rows[i] = is_row ? LAST_ROW - (best[i] & LAST_ROW) : -1;
    }
}
