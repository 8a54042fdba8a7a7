/* matmul.c - the matrix products of a stage, forward, dX and dW: from three loops to dev/matmul.h, and OpenBLAS beside them.

   Build:  make dev/matmul
   Run:    dev/matmul 0,8 --preset b3.1 --threads 1                  what ships and OpenBLAS, on all products of the stage
           dev/matmul all --rows 1000 --outputs 96 --inputs 300      one linear layer: its three products

   A layer out (M, N) = inp (M, K) weight (N, K)^T is    forward  C (M, N) = A (M, K) B^T    B = weight (N, K)
                                                         dX       C (M, K) = A (M, N) B      A = dout, B = weight
                                                         dW       C (N, K) += A^T B          A = dout (M, N), B = inp (M, K)
   The last column says how many percent of OpenBLAS's speed a version has, where libopenblas is found.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, GFLOP/s (percent of the limit):
   forward: 0  103 (62)    1  1.81 (1)    2  33 (20)    3  77.3 (47)    4  101 (61)    5  103 (62)    6  103 (62)
   7  104 (63)
   dX: 0  108 (65)    1  1.46 (1)    2  24.6 (15)    3  72.7 (44)    4  95.7 (58)    5  99.7 (60)    6  97.3 (59)
   7  97.5 (59)
   dW: 0  80 (48)    1  0.26 (0)    2  6.65 (4)    3  18.5 (11)    4  77.9 (47)    5  67.8 (41)    6  82.9 (50)
   7  80.2 (48) */
#define VIVIM_PROGRAM "matmul"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"
#include <dlfcn.h>

enum { OUT_C, IN_A, IN_B };

// A(i,k) = A[i * a_row + k * a_col], B(k,j) = B[k * b_row + j * b_col]; rows of C follow each other
typedef struct { float *C; const float *A, *B; size_t a_row, a_col, b_row, b_col; int M, N, K, add; } Gemm;

static Gemm gemm_of(float *const *t, const Sizes *s) {
    size_t M = (size_t)s->M, N = (size_t)s->cols, K = (size_t)s->K;
    Gemm g = {t[OUT_C], t[IN_A], t[IN_B], s->transA ? 1 : K, s->transA ? M : 1, s->transB ? 1 : N, s->transB ? K : 1,
              s->M, s->cols, s->K, s->accumulate};
    return g;
}
static int lda_of(const Sizes *s) { return s->transA ? s->M : s->K; }
static int ldb_of(const Sizes *s) { return s->transB ? s->K : s->cols; }

static void matmul_ships(float *const *t, const Sizes *s) {
    matmul(t[OUT_C], s->cols, t[IN_A], lda_of(s), s->transA, t[IN_B], ldb_of(s), s->transB, NULL, s->M, s->cols, s->K,
           s->accumulate);
}

// 1: C(i,j) = sum_k A(i,k) B(k,j)
static void matmul_textbook(float *const *t, const Sizes *s) {
    Gemm g = gemm_of(t, s);
    for (int i = 0; i < g.M; i++)
        for (int j = 0; j < g.N; j++) {
            float sum = g.add ? g.C[(size_t)i * g.N + j] : 0.0f;
            for (int k = 0; k < g.K; k++) sum += g.A[i * g.a_row + k * g.a_col] * g.B[k * g.b_row + j * g.b_col];
            g.C[(size_t)i * g.N + j] = sum;
        }
}

// op(B) as rows: (K, N)
static float *rows_of_B(const Gemm *g) {
    float *rows = lab_floats((size_t)g->K * g->N);
    #pragma omp parallel for schedule(static)
    for (int k = 0; k < g->K; k++)
        for (int j = 0; j < g->N; j++) rows[(size_t)k * g->N + j] = g->B[k * g->b_row + j * g->b_col];
    return rows;
}

// 2: the sum over k outside the columns: row k of B, times one number, is added to row i of C, a vector at a time
static void matmul_rows(float *const *t, const Sizes *s) {
    Gemm g = gemm_of(t, s);
    float *rows = rows_of_B(&g);
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < g.M; i++) {
        float *RESTRICT c = g.C + (size_t)i * g.N;
        if (!g.add) memset(c, 0, (size_t)g.N * sizeof(float));
        for (int k = 0; k < g.K; k++) {
            const float a = g.A[i * g.a_row + k * g.a_col], *RESTRICT b = rows + (size_t)k * g.N;
            #pragma omp simd
            for (int j = 0; j < g.N; j++) c[j] += a * b[j];
        }
    }
    free(rows);
}

// 3: a tile of 4 rows and 2 vectors of C stays in registers for the whole sum: C is touched once, a row of B serves 4 rows
static void matmul_registers(float *const *t, const Sizes *s) {
    enum { ROWS = 4, COLS = 2 * LANES };
    Gemm g = gemm_of(t, s);
    float *rows = rows_of_B(&g);
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < g.M; i += ROWS)
        for (int j = 0; j < g.N; j += COLS) {
            float sum[ROWS][COLS] = {{0.0f}};
            int m = min_int(ROWS, g.M - i), n = min_int(COLS, g.N - j);
            const float *a = g.A + i * g.a_row;
            size_t next = m == ROWS ? g.a_row : 0;  // at the lower edge the first row is computed four times
            for (int k = 0; n == COLS && k < g.K; k++) {
                const float *RESTRICT b = rows + (size_t)k * g.N + j, x[ROWS] = {a[k * g.a_col], a[k * g.a_col + next],
                    a[k * g.a_col + 2 * next], a[k * g.a_col + 3 * next]};
                UNROLL
                for (int r = 0; r < ROWS; r++)
                    #pragma omp simd
                    for (int l = 0; l < COLS; l++) sum[r][l] += x[r] * b[l];
            }
            for (int r = 0; (n < COLS || m < ROWS) && r < m; r++)  // edges: plain
                for (int l = 0; l < n; l++) {
                    sum[r][l] = 0.0f;
                    for (int k = 0; k < g.K; k++) sum[r][l] += a[r * g.a_row + k * g.a_col] * rows[(size_t)k * g.N + j + l];
                }
            for (int r = 0; r < m; r++)
                for (int l = 0; l < n; l++) {
                    float *c = g.C + (size_t)(i + r) * g.N + j + l;
                    *c = (g.add ? *c : 0.0f) + sum[r][l];
                }
        }
    free(rows);
}

static Product product_of(float *const *t, const Sizes *s) {
    return product(t[OUT_C], s->cols, t[IN_A], lda_of(s), s->transA, t[IN_B], ldb_of(s), s->transB, NULL, s->M, s->cols, s->K,
                   s->accumulate);
}

// 4: 6 rows and 4 vectors, B in panels that are read from beginning to end, the sum in passes that stay in L2
static void matmul_panels(float *const *t, const Sizes *s) {
    matmul_serial(t[OUT_C], s->cols, t[IN_A], lda_of(s), s->transA, t[IN_B], ldb_of(s), s->transB, NULL, s->M, s->cols, s->K,
                  s->accumulate);
}

// 5: the same on all threads, which share the blocks of C
static void matmul_blocks(float *const *t, const Sizes *s) { product_tiled(product_of(t, s)); }

// 6: threads share the sum: each has a C of its own
static void matmul_slices(float *const *t, const Sizes *s) {
    product_sliced(product_of(t, s), max_int(1, min_int(32, s->K / 512)));
}

// 7: threads share the columns, and each packs its own
static void matmul_columns(float *const *t, const Sizes *s) { product_shared(product_of(t, s)); }

// 8: OpenBLAS, found when the program runs
typedef void (*Sgemm)(int order, int transA, int transB, int M, int N, int K, float alpha, const float *A, int lda,
                      const float *B, int ldb, float beta, float *C, int ldc);
static Sgemm openblas(void) {
    static int looked = 0;
    static Sgemm sgemm = NULL;
    static void (*set_their_threads)(int) = NULL;
    if (!looked) {
        setenv("OPENBLAS_THREAD_TIMEOUT", "16", 0);  // its threads, waiting, spin for 2^16 cycles, not for 2^26: others follow
#if defined(__AVX512F__)
        setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);  // on a processor younger than itself it takes its oldest kernels
#elif defined(__AVX2__)
        setenv("OPENBLAS_CORETYPE", "Haswell", 0);
#endif
        void *library = dlopen("libopenblas.so.0", RTLD_NOW);
        looked = 1;
        if (library) {
            *(void **)(void *)&sgemm = dlsym(library, "cblas_sgemm");
            *(void **)(void *)&set_their_threads = dlsym(library, "openblas_set_num_threads");
        }
    }
    if (sgemm && set_their_threads) set_their_threads(lab_threads());
    return sgemm;
}
static int have_openblas(void) { return openblas() != NULL; }
static void matmul_openblas(float *const *t, const Sizes *s) {
    enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
    openblas()(ROW_MAJOR, s->transA ? TRANS : NO_TRANS, s->transB ? TRANS : NO_TRANS, s->M, s->cols, s->K, 1.0f, t[IN_A],
               lda_of(s), t[IN_B], ldb_of(s), s->accumulate ? 1.0f : 0.0f, t[OUT_C], s->cols);
}

static const LabKernel KERNELS[] = {
    {matmul_ships, "ships: 5, 6, 7 or, if small, 4", NULL},
    {matmul_textbook, "textbook: three loops", NULL},
    {matmul_rows, "B in rows, the columns innermost, threads over rows of C", NULL},
    {matmul_registers, "4 x 2 vectors of C in registers", NULL},
    {matmul_panels, "6 x 4 vectors, B in panels, passes over k; one thread", NULL},
    {matmul_blocks, "4, blocks of C over threads", NULL},
    {matmul_slices, "4, slices of the sum over threads", NULL},
    {matmul_columns, "4, columns over threads", NULL},
    {matmul_openblas, "OpenBLAS", have_openblas},
    {NULL, NULL, NULL}
};

static void tensors(Lab *lab, const Sizes *s) {
    size_t M = (size_t)s->M, N = (size_t)s->cols, K = (size_t)s->K;
    if (s->accumulate) lab_add(lab, OUT_C, "C", M * N, 1e-10);
    else lab_out(lab, OUT_C, "C", M * N, 1e-10);
    lab_in(lab, IN_A, "A", M * K, -1, 1);
    lab_in(lab, IN_B, "B", K * N, -1, 1);
}

static LabWork work(const Sizes *s) {
    double M = s->M, N = s->cols, K = s->K;
    LabWork w = {4 * (M * K + K * N + M * N * (1 + s->accumulate)), 2 * M * N * K, M * N * K};
    return w;
}

// the products of the layers of a stage, three each; of one layer, if --rows, --outputs and --inputs are given
static int shape(Sizes *s, int i) {
    static const char *const PASS[] = {"forward", "dX", "dW"};
    int rows = (int)tokens_of(s), rows_k = s->B * s->T * s->Pk, C = s->C, R = dt_rank(C), x = R + 2 * s->N;
    struct { const char *name; int M, N, K; } layers[] = {
        {"query/proj", rows, C, C}, {"key/value", rows_k, C, C},
        {"sr", rows_k, C, (int)(rows / max_int(rows_k, 1)) * C}, {"fc1/in_proj", rows, 4 * C, C}, {"fc2", rows, C, 4 * C},
        {"x_proj", rows, x, 2 * C}, {"dt_proj", rows, 2 * C, R}, {"out_proj", rows, C, 2 * C}, {"decoder", rows, s->E, C}};
    int given = s->M > 0, layer = i / 3, count = (int)(sizeof layers / sizeof layers[0]);
    int M = given ? s->M : layers[layer % count].M, N = given ? s->cols : layers[layer % count].N;
    int K = given ? s->K : layers[layer % count].K;
    if (layer >= (given ? 1 : count)) return 0;
    s->M = M, s->cols = N, s->K = K, s->transA = s->transB = s->accumulate = 0;
    if (i % 3 == 0) s->transB = 1;
    else if (i % 3 == 1) s->cols = K, s->K = N;
    else s->M = N, s->cols = K, s->K = M, s->transA = s->accumulate = 1;
    snprintf(s->label, sizeof s->label, "%s %s %dx%dx%d", given ? "layer" : layers[layer].name, PASS[i % 3], s->M, s->cols,
             s->K);
    return 1;
}

static const Option SIZES[] = {
    LAB_SIZE("rows", M, 1 << 24, "M, rows of a layer's input and output; 0: all layers of the preset's stage"),
    LAB_SIZE("outputs", cols, 1 << 20, "N, columns of its output"),
    LAB_SIZE("inputs", K, 1 << 20, "K, columns of its input"),
    {NULL, NULL, NULL, 0, 0, 0, 0}
};

//    B T H W C N dirs heads Pk E   M cols K   transA transB accumulate
static const Sizes CHECKS[] = {
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 5, 3, 0, 1, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 13, 67, 31, 0, 0, 1, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 61, 130, 521, 1, 0, 1, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 37, 36, 2053, 1, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 257, 101, 67, 1, 1, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 301, 96, 640, 0, 1, 1, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"matmul", KERNELS, tensors, NULL, matmul_ships, work, "multiply-add", "flop", cpu_flop_rate, shape, 8},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {
        "Matrix products, on the CPU: all that a stage's linear layers do, forward and backward.", SIZES, NULL, LADDERS, CHECKS,
        &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
