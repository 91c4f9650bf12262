/* Vectors of a processor, and products of small matrices held in registers: what the kernels in C are written in.

   GCC's or clang's vector extension only. REAL_BITS is 32 or 64. */

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
#define EXP exp
#define SQRT sqrt
#else
typedef float REAL;
typedef int32_t WHOLE;
#define EXP expf
#define SQRT sqrtf
#endif

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef WHOLE whole __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(REAL_BITS / 8))); /* anywhere in memory */
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 6, VECS = VECTOR_BYTES == 64 ? 4 : 2 };

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
            sum[r][v] = add ? *(loose *)(c + r * ldc + v * LANES) : (vec){0};
    for (int64_t l = 0; l < length; l++) {
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            const vec b_v = *(const loose *)(b + l * ldb + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[r][v] += a[r * ar + l * al] * b_v;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++)
            *(loose *)(c + r * ldc + v * LANES) = sum[r][v];
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
