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
//   k (6 streams are no problem); where they do not (dweight = dout^T inp) it is packed into panels [k][MR].
// Passes: the sum over k is cut into passes of at most KC steps, each a product that adds to C. 6 rows of A (12 KiB) then
//   stay in L1 while the panels of B (1 MiB at most) stream past them from L2; then the next 6 rows.
// Threads: a tile of C is the work of one thread, in the order of k. Where C is too small to share (dweight: a sum over
//   all tokens into a small matrix), the sum is cut into slices, each with a C of its own, added in order at the end.

#ifdef __AVX512F__
enum { MR = 6, NR = 64, LANES = 16 };  // LANES: the last panel is as narrow as it can be in steps of one vector
#else
enum { MR = 6, NR = 16, LANES = 8 };    // 12 of 16 AVX2 registers, 24 of 32 NEON registers
#endif
enum { KC = 512, IN_PLACE = 128 };    // A^T is not packed if its rows are this short: step k + 1 is on the next lines

// The product without transposes: A(i,k) stands at A[i * A_row + k * A_col] and one of the strides is 1; B(k,j) likewise.
typedef struct {
    float *C, *A_panels, *B_panels;  // C (M, N); packed operands of a pass, A_panels NULL if A is read in place
    const float *A, *B, *bias;       // (M, K), (K, N), (N) or NULL
    size_t ldc, A_row, A_col, B_row, B_col;
    int M, N, K, accumulate;
} Product;

static inline int round_up(int n, int step) { return ceil_div(n, step) * step; }

// columns j0 .. j0+NR of B become a panel [k][NR]; the last is only as wide as needed, in steps of LANES, filled with zeros
static void pack_B(const Product *p, int j0) {
    int w = min_int(NR, p->N - j0), width = round_up(w, LANES), k = 0;
    const float *b = p->B + j0 * p->B_col;
    float *RESTRICT panel = p->B_panels + (size_t)j0 * p->K;
    if (w < width) memset(panel, 0, (size_t)p->K * width * sizeof(float));
    if (p->B_col == 1)  // rows stay rows
        for (; k < p->K; k++) memcpy(panel + (size_t)k * width, b + k * p->B_row, (size_t)w * sizeof(float));
    for (; k + 16 <= p->K; k += 16)  // transposed, a cache line at a time
        for (int j = 0; j < w; j++)
            for (int l = k; l < k + 16; l++) panel[(size_t)l * width + j] = b[j * p->B_col + l];
    for (; k < p->K; k++)
        for (int j = 0; j < w; j++) panel[(size_t)k * width + j] = b[j * p->B_col + k];
}

// rows i0 .. i1 of a transposed A become panels [k][MR], 16 steps at a time: all of the lines touched are used at once
static void pack_A(const Product *p, int i0, int i1) {
    for (int k0 = 0; k0 < p->K; k0 += 16)
        for (int i = i0; i < i1; i += MR)
            for (int k = k0; k < min_int(k0 + 16, p->K); k++) {
                float *panel = p->A_panels + (size_t)i * p->K + (size_t)k * MR;
                if (i + MR <= i1) memcpy(panel, p->A + i + k * p->A_col, MR * sizeof(float));  // constant size: two moves
                else memcpy(panel, p->A + i + k * p->A_col, (size_t)(i1 - i) * sizeof(float));
            }
}

// The kernel: c (MR, width) = [c +] bias + sum_k a(:,k) b(k,:); row i of a begins at a + row[i]. width is constant at every
// call: the compiler unrolls the rows, vectorises the columns and keeps the whole of t in registers.
ALWAYS_INLINE void tile(const int width, float *RESTRICT c, size_t ldc, const float *RESTRICT a, const size_t *RESTRICT row,
                        size_t a_col, const float *RESTRICT b, const float *RESTRICT bias, int kc, int accumulate) {
    // MR is 6: six scalars, because an array of them would be read from memory at every step
    const size_t r0 = row[0], r1 = row[1], r2 = row[2], r3 = row[3], r4 = row[4], r5 = row[5];
    float t[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < width; j += LANES) PREFETCH_WRITE(c + i * ldc + j);  // C is cold: ask for all of it at once
    for (int i = 0; i < MR; i++)
        #pragma omp simd
        for (int j = 0; j < width; j++) t[i][j] = (accumulate ? c[i * ldc + j] : 0.0f) + (bias ? bias[j] : 0.0f);
    for (int k = 0; k < kc; k++, a += a_col, b += width) {
        const float x[MR] = {a[r0], a[r1], a[r2], a[r3], a[r4], a[r5]};
        UNROLL
        for (int i = 0; i < MR; i++)
            #pragma omp simd
            for (int j = 0; j < width; j++) t[i][j] += x[i] * b[j];
    }
    for (int i = 0; i < MR; i++)
        #pragma omp simd
        for (int j = 0; j < width; j++) c[i * ldc + j] = t[i][j];
}

// The tile of C at (i0, j0). At the edges, where only m rows and w columns of it exist, a whole one is computed in a buffer
// and the part that exists added; rows of A that do not exist repeat the last one.
static void product_tile(const Product *p, int i0, int j0) {
    int m = min_int(MR, p->M - i0), w = min_int(NR, p->N - j0), width = round_up(w, LANES), K = p->K;
    int ragged = m < MR || w < width, add = p->accumulate && !ragged;
    const float *a = p->A_panels ? p->A_panels + (size_t)i0 * K : p->A + i0 * p->A_row, *b = p->B_panels + (size_t)j0 * K;
    const float *bias = p->bias ? p->bias + j0 : NULL, *bias_to = ragged ? NULL : bias;
    size_t a_row = p->A_panels ? 1 : p->A_row, a_col = p->A_panels ? (size_t)MR : p->A_col, row[MR];
    size_t ldc = p->ldc, ldto = ragged ? (size_t)NR : ldc;
    float buffer[MR * NR], *c = p->C + i0 * ldc + j0, *to = ragged ? buffer : c;
    for (int i = 0; i < MR; i++) row[i] = (size_t)min_int(i, m - 1) * a_row;
    switch (width / LANES) {
        case 1: tile(1 * LANES, to, ldto, a, row, a_col, b, bias_to, K, add); break;
        case 2: tile(2 * LANES, to, ldto, a, row, a_col, b, bias_to, K, add); break;
#ifdef __AVX512F__
        case 3: tile(3 * LANES, to, ldto, a, row, a_col, b, bias_to, K, add); break;
        case 4: tile(4 * LANES, to, ldto, a, row, a_col, b, bias_to, K, add); break;
#endif
    }
    for (int i = 0; ragged && i < m; i++)
        for (int j = 0; j < w; j++)
            c[i * ldc + j] = (p->accumulate ? c[i * ldc + j] : 0.0f) + (bias ? bias[j] : 0.0f) + buffer[i * NR + j];
}

// steps k0 .. k0+K of a product as a product of their own
static Product product_steps(const Product *p, int k0, int K) {
    Product q = *p;
    q.A += k0 * p->A_col, q.B += k0 * p->B_row, q.K = min_int(K, p->K - k0);
    if (k0 > 0) q.accumulate = 1, q.bias = NULL;
    return q;
}

// cuts the sum into equal passes, makes room for the panels of one (free B_panels afterwards), returns its steps
static int product_passes(Product *p) {
    int depth = ceil_div(p->K, ceil_div(p->K, KC)), in_place = p->A_col <= IN_PLACE;
    size_t B_size = (size_t)round_up(p->N, LANES) * depth, A_size = in_place ? 0 : (size_t)round_up(p->M, MR) * depth;
    p->B_panels = malloc_floats(A_size + B_size);
    p->A_panels = in_place ? NULL : p->B_panels + B_size;
    return depth;
}

static void product_serial(Product p) {
    int depth = product_passes(&p);
    for (int k0 = 0; k0 < p.K; k0 += depth) {
        Product q = product_steps(&p, k0, depth);
        for (int j = 0; j < p.N; j += NR) pack_B(&q, j);
        if (p.A_panels) pack_A(&q, 0, p.M);
        for (int i = 0; i < p.M; i += MR)
            for (int j = 0; j < p.N; j += NR) product_tile(&q, i, j);
    }
    free(p.B_panels);
}

// C is cut into blocks of up to 192 rows, and of as many columns as leave 32 pieces and keep their panels of B within L2
// (sizes by trial on the products of b0 and b3)
static void product_tiled(Product p) {
    int depth = product_passes(&p), rows = round_up(min_int(max_int(p.M / 4, 48), 192), MR);
    int cols = max_int(min_int(ceil_div(p.M, rows) * ceil_div(p.N, NR) / 32, 512 / NR), 1) * NR;
    #pragma omp parallel
    for (int k0 = 0; k0 < p.K; k0 += depth) {
        Product q = product_steps(&p, k0, depth);
        #pragma omp for schedule(static) nowait
        for (int j = 0; j < p.N; j += NR) pack_B(&q, j);
        #pragma omp for schedule(static)
        for (int i = 0; i < (p.A_panels ? p.M : 0); i += rows) pack_A(&q, i, min_int(i + rows, p.M));
        #pragma omp for schedule(static) collapse(2)
        for (int i = 0; i < p.M; i += rows)
            for (int j = 0; j < p.N; j += cols)
                for (int ti = i; ti < min_int(i + rows, p.M); ti += MR)
                    for (int tj = j; tj < min_int(j + cols, p.N); tj += NR) product_tile(&q, ti, tj);
    }
    free(p.B_panels);
}

// a long sum into a small C: slices of the sum, the first into C, the others each into a C of its own, then added in order
static void product_sliced(Product p, int slices) {
    int depth = ceil_div(p.K, slices);
    size_t outputs = (size_t)p.M * p.N;
    float *partial = malloc_floats(slices * outputs);  // (slices, M, N)
    slices = ceil_div(p.K, depth);
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (int s = 0; s < slices; s++) {
            Product q = product_steps(&p, s * depth, depth);
            if (s > 0) q.C = partial + s * outputs, q.ldc = (size_t)p.N, q.accumulate = 0;
            product_serial(q);
        }
        #pragma omp for schedule(static)
        for (int i = 0; i < p.M; i++)
            for (int s = 1; s < slices; s++)
                for (int j = 0; j < p.N; j++) p.C[i * p.ldc + j] += partial[s * outputs + (size_t)i * p.N + j];
    }
    free(partial);
}

static Product product(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                       const float *bias, int M, int N, int K, int accumulate) {
    size_t a = (size_t)lda, b = (size_t)ldb, A_row = transA ? 1 : a, A_col = transA ? a : 1;
    Product p = {C, NULL, NULL, A, B, bias, (size_t)ldc, A_row, A_col, transB ? 1 : b, transB ? b : 1, M, N, K, accumulate};
    return p;
}

// C (M, N) = [C +] op(A) (M, K) op(B) (K, N) + bias (N or NULL). op(A) is A (M, K), or the transpose of A (K, M) if transA;
// rows of A begin lda floats apart; B and C likewise. On the calling thread, for use inside parallel loops:
static void matmul_serial(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                          const float *bias, int M, int N, int K, int accumulate) {
    product_serial(product(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate));
}

// the same on all threads
static void matmul(float *C, int ldc, const float *A, int lda, int transA, const float *B, int ldb, int transB,
                   const float *bias, int M, int N, int K, int accumulate) {
    Product p = product(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate);
    int slices = min_int(32, K / 512);                 // shorter ones cost more to add than they gain
    if ((double)M * N * K < 500e3) product_serial(p);  // ten microseconds: not worth waking the other threads
    else if (slices >= 4 && (int64_t)M * N <= 128 * 1024) product_sliced(p, slices);
    else product_tiled(p);
}

#endif
