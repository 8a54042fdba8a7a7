/* matmul.h - the matrix product of train_vivim.c: what cuBLAS is to train_vivim.cu. Header only.

   Included by train_vivim.c, section 4, whose memory functions and macros it uses. The two functions to call are at the end:
   matmul (all threads) and matmul_serial (the calling thread). */
#ifndef VIVIM_MATMUL_H
#define VIVIM_MATMUL_H

// C = [C +] op(A) op(B) + bias. Nearly all the arithmetic is here: a linear layer is one product forward, two backward.
// Tile: the innermost loop multiplies a column of MR numbers of A with a row of NR numbers of B (an outer product) and adds
//   it to an MR x NR tile of C that never leaves the registers: MR + NR loads feed MR * NR multiply-adds. With AVX-512,
//   6 x 64 takes 24 of 32 registers, a row of B 4 and a number of A, broadcast, one: more would spill.
// Packing: at every step k the tile wants NR neighbours of row k of B. In memory the next row is a whole matrix row away,
//   or the matrix lies the other way round, as weight (N, K) does. So B is first copied into panels [k][NR], read from
//   beginning to end: no cache line or page is touched for a few numbers only. A is read in place where its rows run along
//   k (6 streams are no problem); where they do not (dweight = dout^T inp) each block of it is packed into panels [k][MR].
// Blocks: C is cut into blocks of at most MC rows and NC columns, the sum over k into passes of at most KC steps, each a
//   product that adds to C. 6 rows of A (12 KiB) then stay in L1 while the panels of B (1 MiB at most) stream past them
//   from L2; then the next 6 rows.
// Threads: a block of C is the work of one thread, in the order of k; B is packed by all threads for all, or, where C has few
//   rows, by each for itself, with columns of its own. Where C is too small to share (dweight: a sum over
//   all tokens into a small matrix), the sum is cut into slices, each with a C of its own, added in order at the end.

#if defined(VIVIM_AMX)  // make AMX=1 or 3: matmul_amx.h, which has its own panels, of so many bfloat16 for each number
enum { PARTS = VIVIM_AMX, MR = 32, NR = 32, LANES = 32, K_STEP = 32, KC = PARTS == 1 ? 2048 : 512 };
typedef uint16_t Packed;
#elif defined(__AVX512F__)
enum { MR = 6, NR = 64, LANES = 16 };  // LANES: the last panel is as narrow as it can be in steps of one vector
#else
enum { MR = 6, NR = 16, LANES = 8 };    // 12 of 16 AVX2 registers, 24 of 32 NEON registers
#endif
#ifndef VIVIM_AMX
enum { PARTS = 1, K_STEP = 1, KC = 512 };  // steps of a pass: a multiple of, at most
typedef float Packed;
#endif
enum { MC = 192, NC = 512 };  // rows and columns of a block: at most

// The product without transposes: A(i,k) stands at A[i * A_row + k * A_col] and one of the strides is 1; B(k,j) likewise.
typedef struct {
    float *C; Packed *B_panels;  // C (M, N); all of op(B), packed
    const float *A, *B, *bias;   // (M, K), (K, N), (N) or NULL
    size_t ldc, A_row, A_col, B_row, B_col;
    int M, N, K, accumulate, packed;  // packed: A is panels [k][MR]
} Product;

static inline int round_up(int n, int step) { return ceil_div(n, step) * step; }
static inline int cut_evenly(int n, int most, int step) { return round_up(ceil_div(n, ceil_div(n, most)), step); }

// steps k0 .. k0+K of a product as a product of their own
static Product product_steps(const Product *p, int k0, int K) {
    Product q = *p;
    q.A += k0 * p->A_col, q.B += k0 * p->B_row, q.K = min_int(K, p->K - k0);
    if (q.B_panels) q.B_panels += (size_t)k0 * round_up(p->N, LANES) * PARTS;
    if (k0 > 0) q.accumulate = 1, q.bias = NULL;
    return q;
}

// columns j0 .. j0+N likewise
static Product product_columns(const Product *p, int j0, int N) {
    Product q = *p;
    q.C += j0, q.B += j0 * p->B_col, q.N = min_int(N, p->N - j0);
    if (q.bias) q.bias += j0;
    return q;
}

#ifdef VIVIM_AMX
#include "matmul_amx.h"
#else
// columns j0 .. j0+NR of B become a panel [k][NR]; the last is only as wide as needed, in steps of LANES, filled with zeros
static void pack_B(const Product *p, int j0) {
    int w = min_int(NR, p->N - j0), width = round_up(w, LANES), k = 0;
    const float *b = p->B + j0 * p->B_col;
    float *RESTRICT panel = p->B_panels + (size_t)j0 * p->K;
    if (w < width) memset(panel, 0, (size_t)p->K * width * sizeof(float));
    if (p->B_col == 1)  // rows stay rows
        for (; k < p->K; k++) {
            for (int j = 0; j < w; j += 16) PREFETCH(b + (k + 16) * p->B_row + j);
            memcpy(panel + (size_t)k * width, b + k * p->B_row, (size_t)w * sizeof(float));
        }
    for (; k + 16 <= p->K; k += 16) {  // transposed, a cache line at a time, in groups of four columns: one store each
        int j = 0;
        for (; j + 4 <= w; j += 4)
            for (int l = k; l < k + 16; l++) {
                const float *from = b + j * p->B_col + l;
                float *to = panel + (size_t)l * width + j;
                to[0] = from[0], to[1] = from[p->B_col], to[2] = from[2 * p->B_col], to[3] = from[3 * p->B_col];
            }
        for (; j < w; j++)
            for (int l = k; l < k + 16; l++) panel[(size_t)l * width + j] = b[j * p->B_col + l];
    }
    for (; k < p->K; k++)
        for (int j = 0; j < w; j++) panel[(size_t)k * width + j] = b[j * p->B_col + k];
}

// t (MR, width) += the column a[row[0..MR]] times the row b (width)
ALWAYS_INLINE void outer_product(const int width, float (*RESTRICT t)[NR], const float *RESTRICT a, const size_t *RESTRICT row,
                                 const float *RESTRICT b) {
    const float x[MR] = {a[row[0]], a[row[1]], a[row[2]], a[row[3]], a[row[4]], a[row[5]]};
    UNROLL
    for (int i = 0; i < MR; i++)
        #pragma omp simd
        for (int j = 0; j < width; j++) t[i][j] += x[i] * b[j];
}

// The kernel: c (MR, width) = [c +] bias + sum_k a(:,k) b(k,:); row i of a begins at a + row[i]. width is constant at every
// call, as a_col is: the compiler unrolls the rows, vectorises the columns and keeps the whole of t in registers.
// While it computes it asks memory for what the next rows of tiles will want: next_c (MR, width), which is as cold as c was,
// and one row of A, next_a (the tiles beside this one ask for the others). A few lines at a time: all at once would hold up b.
ALWAYS_INLINE void tile(const int width, float *RESTRICT c, size_t ldc, const float *RESTRICT a, const size_t *RESTRICT row,
                        const size_t a_col, const float *RESTRICT b, const float *RESTRICT bias, int kc, int accumulate,
                        const float *next_a, const float *next_c, size_t ld_next) {
    const size_t r[MR] = {row[0], row[1], row[2], row[3], row[4], row[5]};  // MR is 6
    float t[MR][NR];
    for (int i = 0; i < MR; i++)
        #pragma omp simd
        for (int j = 0; j < width; j++) t[i][j] = (accumulate ? c[i * ldc + j] : 0.0f) + (bias ? bias[j] : 0.0f);
    for (int i = 0, k = 0; i < MR; i++) {
        PREFETCH(next_a + 2 * k);
        for (int j = 0; j < width; j += LANES) PREFETCH_WRITE(next_c + i * ld_next + j);
        for (int end = kc / 2 * (i + 1) / MR; k < end; k++)
            for (int step = 0; step < 2; step++, a += a_col, b += width) outer_product(width, t, a, r, b);
    }
    if (kc % 2) outer_product(width, t, a, r, b);
    for (int i = 0; i < MR; i++)
        #pragma omp simd
        for (int j = 0; j < width; j++) c[i * ldc + j] = t[i][j];
}

// The tile of C at (i0, j0). At the edges, where only m rows and w columns of it exist, a whole one is computed in a buffer;
// rows of A that do not exist repeat the last one. Each number begins as it would elsewhere: where the edges are, no bit shows.
ALWAYS_INLINE void tile_at(const Product *p, int i0, int j0, const int width, const size_t a_col) {
    int m = min_int(MR, p->M - i0), w = min_int(NR, p->N - j0), K = p->K;
    const float *a = p->A + i0 * p->A_row, *b = p->B_panels + (size_t)j0 * K, *bias = p->bias ? p->bias + j0 : NULL;
    const float *next_a = a + (MR + j0 / NR % MR) * p->A_row;
    size_t ldc = p->ldc, row[MR];
    float *c = p->C + i0 * ldc + j0, buffer[MR * NR];
    int ragged = m < MR || w < width;
    for (int i = 0; i < MR; i++) row[i] = (size_t)min_int(i, m - 1) * (p->packed ? 1 : p->A_row);
    for (int i = 0; ragged && i < MR; i++)
        for (int j = 0; j < width; j++)
            buffer[i * NR + j] = i >= m || j >= w ? 0.0f : (p->accumulate ? c[i * ldc + j] : 0.0f) + (bias ? bias[j] : 0.0f);
    tile(width, ragged ? buffer : c, ragged ? (size_t)NR : ldc, a, row, a_col, b, ragged ? NULL : bias, K,
         p->accumulate || ragged, next_a, c + MR * ldc, ldc);
    for (int i = 0; ragged && i < m; i++)
        for (int j = 0; j < w; j++) c[i * ldc + j] = buffer[i * NR + j];
}

// the same with its constants
ALWAYS_INLINE void tile_of_width(const Product *p, int i0, int j0, const int width) {
    if (p->packed) tile_at(p, i0, j0, width, MR);
    else tile_at(p, i0, j0, width, 1);
}
static void product_tile(const Product *p, int i0, int j0) {
    switch (ceil_div(min_int(NR, p->N - j0), LANES)) {
        case 1: tile_of_width(p, i0, j0, 1 * LANES); break;
        case 2: tile_of_width(p, i0, j0, 2 * LANES); break;
#ifdef __AVX512F__
        case 3: tile_of_width(p, i0, j0, 3 * LANES); break;
        case 4: tile_of_width(p, i0, j0, 4 * LANES); break;
#endif
    }
}

// rows i0 .. i1 of a transposed A become panels [k][MR], 16 steps at a time: all of the lines touched are used at once
static void pack_A(const Product *p, int i0, int i1, float *panels) {
    for (int k0 = 0; k0 < p->K; k0 += 16)
        for (int i = i0; i < i1; i += MR) {
            float *panel = panels + (size_t)(i - i0) * p->K; const float *a = p->A + i;
            for (int k = k0; k < min_int(k0 + 16, p->K); k++) {
                PREFETCH(a + (k + 16) * p->A_col);
                if (i + MR <= i1) memcpy(panel + k * MR, a + k * p->A_col, MR * sizeof(float));  // constant size: two moves
                else memcpy(panel + k * MR, a + k * p->A_col, (size_t)(i1 - i) * sizeof(float));
            }
        }
}

// One pass over rows i0 .. i1 and columns j0 .. j1 of C. panels: those rows of A^T, packed; NULL: A is read in place
static void product_block(Product p, int i0, int i1, int j0, int j1, const float *panels) {
    p.packed = panels != NULL;
    p.A = panels ? panels : p.A + i0 * p.A_row;
    p.A_row = panels ? (size_t)p.K : p.A_row, p.A_col = panels ? (size_t)MR : p.A_col;
    p.C += i0 * p.ldc, p.M = i1 - i0;
    for (int i = 0; i < p.M; i += MR)
        for (int j = j0; j < j1; j += NR) product_tile(&p, i, j);
}

// workspace, in floats: for packed B, and, per thread, for a block of packed A^T
static size_t packed_B(const Product *p) { return (size_t)round_up(p->N, LANES) * p->K; }
static size_t packed_A(const Product *p) { return p->A_col > 1 ? (size_t)round_up(MC, MR) * min_int(p->K, KC) : 0; }
#endif

// on the calling thread, in a workspace of so many floats: a block of B, which stays in L2 for all rows, and one of A^T. What
// is enough for p is so for a part of it, though that may be cut into larger blocks
static size_t serial_workspace(const Product *p) {
    Product block = *p;
    block.K = min_int(p->K, KC), block.N = min_int(p->N, NC);
    return packed_B(&block) + packed_A(&block);
}
static void product_serial(Product p, float *workspace) {
    int depth = cut_evenly(p.K, KC, K_STEP), columns = cut_evenly(p.N, NC, NR);
    for (int k0 = 0; k0 < p.K; k0 += depth)
        for (int j0 = 0; j0 < p.N; j0 += columns) {
            Product pass = product_steps(&p, k0, depth), q = product_columns(&pass, j0, columns);
            Packed *panels = packed_A(&q) ? (Packed *)(void *)(workspace + packed_B(&q)) : NULL;
            q.B_panels = (Packed *)(void *)workspace;
            for (int j = 0; j < q.N; j += NR) pack_B(&q, j);
            for (int i0 = 0, i1; i0 < p.M; i0 = i1) {
                i1 = min_int(i0 + MC, p.M);
                if (panels) pack_A(&q, i0, i1, panels);
                product_block(q, i0, i1, 0, q.N, panels);
            }
        }
}

static Arena product_workspace;  // of the two functions below, which one thread calls at a time. Huge pages

static int max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int this_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The blocks leave some 32 pieces for the threads, and 4 or a multiple of 8 blocks of rows, equal but for a tile: no thread has
// more to do than another. Static: a thread has the same pieces in every pass, so nobody waits between passes (nowait). Pieces
// of the same rows follow each other: A^T is packed once for them.
static void product_tiled(Product p) {
    int depth = cut_evenly(p.K, KC, K_STEP), tiles = ceil_div(p.M, MR);
    int blocks = ceil_div(p.M, min_int(max_int(ceil_div(p.M, 4), 48), MC));
    if (blocks > 4) blocks = round_up(blocks, 8);
    int columns = max_int(min_int(blocks * ceil_div(p.N, NR) / 32, NC / NR), 1) * NR;
    size_t size_B = packed_B(&p), size_A = packed_A(&p);
    arena_reserve(&product_workspace, (size_B + size_A * (size_t)max_threads()) * sizeof(float));
    float *workspace = (float *)(void *)product_workspace.base;
    p.B_panels = (Packed *)(void *)workspace;
    #pragma omp parallel
    {
        Packed *panels = size_A ? (Packed *)(void *)(workspace + size_B + size_A * (size_t)this_thread()) : NULL;
        #pragma omp for schedule(static) collapse(2)
        for (int k0 = 0; k0 < p.K; k0 += depth)
            for (int j = 0; j < p.N; j += NR) {
                Product q = product_steps(&p, k0, depth);
                pack_B(&q, j);
            }
        for (int k0 = 0; k0 < p.K; k0 += depth) {
            Product q = product_steps(&p, k0, depth); int packed = -1;
            #pragma omp for schedule(static) collapse(2) nowait
            for (int block = 0; block < blocks; block++)
                for (int j = 0; j < p.N; j += columns) {
                    int i = MR * (int)((int64_t)tiles * block / blocks);
                    int i1 = min_int(MR * (int)((int64_t)tiles * (block + 1) / blocks), p.M);
                    if (panels && block != packed) pack_A(&q, i, i1, panels);
                    packed = block;
                    product_block(q, i, i1, j, min_int(j + columns, p.N), panels);
                }
        }
    }
}

// Where C has few rows, copying B is much of the work: a thread takes columns of its own and copies what only it will read,
// into its own L2. All read the whole of A.
static int shares_columns(const Product *p) {
    return p->N >= max_int(256, NR * max_threads()) && p->K >= 64 && p->M < 4 * p->N;
}
static void product_shared(Product p) {
    int columns = cut_evenly(p.N, ceil_div(p.N, max_threads()), LANES);
    Product widest = product_columns(&p, 0, columns);
    size_t work = serial_workspace(&widest);
    arena_reserve(&product_workspace, work * (size_t)max_threads() * sizeof(float));
    #pragma omp parallel for schedule(static)
    for (int j = 0; j < p.N; j += columns)
        product_serial(product_columns(&p, j, columns), (float *)(void *)product_workspace.base + work * (size_t)this_thread());
}

// a long sum into a small C: slices of the sum, the first into C, the others each into a C of its own, then added in order
static void product_sliced(Product p, int slices) {
    int depth = ceil_div(p.K, slices);
    size_t outputs = (size_t)p.M * p.N, cache_line = 16;
    Product first = product_steps(&p, 0, depth);
    size_t work = serial_workspace(&first);
    slices = ceil_div(p.K, depth);
    size_t partials = (slices * outputs + cache_line - 1) / cache_line * cache_line;
    arena_reserve(&product_workspace, (partials + work * (size_t)max_threads()) * sizeof(float));
    float *partial = (float *)(void *)product_workspace.base;  // (slices, M, N)
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (int s = 0; s < slices; s++) {
            Product q = product_steps(&p, s * depth, depth);
            if (s > 0) q.C = partial + s * outputs, q.ldc = (size_t)p.N, q.accumulate = 0;
            product_serial(q, partial + partials + work * (size_t)this_thread());
        }
        #pragma omp for schedule(static)
        for (int i = 0; i < p.M; i++)
            for (int s = 1; s < slices; s++)
                for (int j = 0; j < p.N; j++) p.C[i * p.ldc + j] += partial[s * outputs + (size_t)i * p.N + j];
    }
}

static Product product(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                       const float *bias, int M, int N, int K, int accumulate) {
    size_t a = (size_t)lda, b = (size_t)ldb, A_row = transA ? 1 : a, A_col = transA ? a : 1;
    Product p = {C, NULL, A, B, bias, (size_t)ldc, A_row, A_col, transB ? 1 : b, transB ? b : 1, M, N, K, accumulate, 0};
    return p;
}

// C (M, N) = [C +] op(A) (M, K) op(B) (K, N) + bias (N or NULL). op(A) is A (M, K), or the transpose of A (K, M) if transA;
// rows of A begin lda floats apart; B and C likewise. On the calling thread, for use inside parallel loops:
static void matmul_serial(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                          const float *bias, int M, int N, int K, int accumulate) {
    Product p = product(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate);
    float *workspace = malloc_floats(serial_workspace(&p));
    product_serial(p, workspace);
    free(workspace);
}

// the same on all threads
static void matmul(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                   const float *bias, int M, int N, int K, int accumulate) {
    Product p = product(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate);
    int slices = min_int(32, K / 512);                 // shorter ones cost more to add than they gain
    if ((double)M * N * K < 500e3)  // ten microseconds: not worth waking the other threads
        matmul_serial(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate);
    else if (slices >= 4 && (int64_t)M * N <= 128 * 1024)  // a C each fits into L2, and there are enough to share
        product_sliced(p, slices);
    else if (shares_columns(&p)) product_shared(p);
    else product_tiled(p);
}

#endif
