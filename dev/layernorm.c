/* layernorm.c - layer norm over channels, forward and backward: from the textbook's loops to train_vivim.c's.

   Build:  make dev/layernorm
   Run:    dev/layernorm                             both ladders on stage 1 of b3: 20480 rows of 64
           dev/layernorm all --channels 512 --batch 8

   out = (inp - mean) rstd weight + bias, rstd = 1/sqrt(var + 1e-5), mean and var over the C channels of a row. Each number is
   read and written once: what a copy moves in that time is the limit (the column "of copy"). The arithmetic limit is that of
   multiply-adds, of which a number needs 5 forward and 10 backward.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, ns per (token, channel) (percent of the copy):
   forward: 0  0.876 (94)    1  1.59 (51)    2  4.34 (19)    3  0.818 (100)    4  1.03 (80)    5  0.803 (102)
   backward: 0  1.08 (113)    1  1.7 (72)    2  0.988 (124)    3  1.61 (76) */
#define VIVIM_PROGRAM "layernorm"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"

// ---------------------------------------------------------------------------------------------------------------------
// forward: out, inp (rows, C); mean, rstd (rows); weight, bias (C)

enum { OUT, OUT_MEAN, OUT_RSTD, IN_INP, IN_WEIGHT, IN_BIAS };

static void forward_ships(float *const *t, const Sizes *s) {
    layernorm_forward(t[OUT], t[OUT_MEAN], t[OUT_RSTD], t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], (int)tokens_of(s), s->C);
}

// (x - m) rstd weight + bias
static void normalise(float *RESTRICT o, const float *RESTRICT x, float m, float rstd, float *const *t, int C) {
    const float *RESTRICT weight = t[IN_WEIGHT], *RESTRICT bias = t[IN_BIAS];
    #pragma omp simd
    for (int c = 0; c < C; c++) o[c] = (x[c] - m) * rstd * weight[c] + bias[c];
}

// 1: mean, then variance, then the result; sums one number after the other
static void forward_textbook(float *const *t, const Sizes *s) {
    for (size_t r = 0; r < tokens_of(s); r++) {
        const float *x = t[IN_INP] + r * s->C;
        float mean = 0.0f, var = 0.0f;
        for (int c = 0; c < s->C; c++) mean += x[c];
        mean /= (float)s->C;
        for (int c = 0; c < s->C; c++) var += (x[c] - mean) * (x[c] - mean);
        t[OUT_MEAN][r] = mean, t[OUT_RSTD][r] = 1.0f / sqrtf(var / (float)s->C + 1e-5f);
        normalise(t[OUT] + r * s->C, x, mean, t[OUT_RSTD][r], t, s->C);
    }
}

// 2: Welford's running mean and variance: one pass, but a division for each number
static void forward_welford(float *const *t, const Sizes *s) {
    #pragma omp parallel for schedule(static)
    for (size_t r = 0; r < tokens_of(s); r++) {
        const float *x = t[IN_INP] + r * s->C;
        float mean = 0.0f, squares = 0.0f;
        for (int c = 0; c < s->C; c++) {
            float before = x[c] - mean;
            mean += before / (float)(c + 1);
            squares += before * (x[c] - mean);
        }
        t[OUT_MEAN][r] = mean, t[OUT_RSTD][r] = 1.0f / sqrtf(squares / (float)s->C + 1e-5f);
        normalise(t[OUT] + r * s->C, x, mean, t[OUT_RSTD][r], t, s->C);
    }
}

// 3: sum and sum of squares together, in vectors: one pass, but var = mean(x^2) - mean^2 loses digits where the mean is large
static void forward_squares(float *const *t, const Sizes *s) {
    #pragma omp parallel for schedule(static)
    for (size_t r = 0; r < tokens_of(s); r++) {
        const float *x = t[IN_INP] + r * s->C;
        float sum = 0.0f, squares = 0.0f, mean;
        #pragma omp simd reduction(+ : sum, squares)
        for (int c = 0; c < s->C; c++) sum += x[c], squares += x[c] * x[c];
        mean = sum / (float)s->C;
        t[OUT_MEAN][r] = mean, t[OUT_RSTD][r] = 1.0f / sqrtf(squares / (float)s->C - mean * mean + 1e-5f);
        normalise(t[OUT] + r * s->C, x, mean, t[OUT_RSTD][r], t, s->C);
    }
}

// 4: 16 rows at a time: their 16 divisions and roots are one vector, and the processor works on several rows at once
static void forward_rows(float *const *t, const Sizes *s) {
    enum { ROWS = 16 };
    int C = s->C, rows = (int)tokens_of(s);
    #pragma omp parallel for schedule(static)
    for (int r0 = 0; r0 < rows; r0 += ROWS) {
        float mean[ROWS], var[ROWS];
        int n = min_int(ROWS, rows - r0);
        for (int i = 0; i < ROWS; i++) {
            const float *x = t[IN_INP] + (size_t)(r0 + min_int(i, n - 1)) * C;
            float sum = 0.0f, squares = 0.0f;
            #pragma omp simd reduction(+ : sum)
            for (int c = 0; c < C; c++) sum += x[c];
            mean[i] = sum / (float)C;
            #pragma omp simd reduction(+ : squares)
            for (int c = 0; c < C; c++) squares += (x[c] - mean[i]) * (x[c] - mean[i]);
            var[i] = squares;
        }
        #pragma omp simd
        for (int i = 0; i < ROWS; i++) var[i] = 1.0f / sqrtf(var[i] / (float)C + 1e-5f);
        for (int i = 0; i < n; i++) {
            size_t r = (size_t)(r0 + i);
            t[OUT_MEAN][r] = mean[i], t[OUT_RSTD][r] = var[i];
            normalise(t[OUT] + r * C, t[IN_INP] + r * C, mean[i], var[i], t, C);
        }
    }
}

// 5: the number of channels is a constant for the compiler: a row stays in registers over all three loops
ALWAYS_INLINE void one_row(float *const *t, size_t r, const int C) {
    const float *RESTRICT x = t[IN_INP] + r * C;
    float sum = 0.0f, var = 0.0f, mean, rstd;
    #pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c];
    mean = sum / (float)C;
    #pragma omp simd reduction(+ : var)
    for (int c = 0; c < C; c++) var += (x[c] - mean) * (x[c] - mean);
    rstd = 1.0f / sqrtf(var / (float)C + 1e-5f);
    t[OUT_MEAN][r] = mean, t[OUT_RSTD][r] = rstd;
    normalise(t[OUT] + r * C, x, mean, rstd, t, C);
}
static void forward_constant(float *const *t, const Sizes *s) {
    #pragma omp parallel for schedule(static)
    for (size_t r = 0; r < tokens_of(s); r++)
        switch (s->C) {
            case 32: one_row(t, r, 32); break;
            case 64: one_row(t, r, 64); break;
            case 128: one_row(t, r, 128); break;
            case 256: one_row(t, r, 256); break;
            default: one_row(t, r, s->C);
        }
}

static const LabKernel FORWARD[] = {
    {forward_ships, "ships: mean, variance, result, each in vectors, threads over rows", NULL},
    {forward_textbook, "textbook: the same, sums one number after the other", NULL},
    {forward_welford, "Welford's running mean and variance", NULL},
    {forward_squares, "sum and sum of squares in one pass", NULL},
    {forward_rows, "0, 16 rows at a time", NULL},
    {forward_constant, "0, C a constant", NULL},
    {NULL, NULL, NULL}
};

static void forward_tensors(Lab *lab, const Sizes *s) {
    size_t rows = tokens_of(s), C = (size_t)s->C;
    lab_out(lab, OUT, "out", rows * C, 1e-10);
    lab_out(lab, OUT_MEAN, "mean", rows, 1e-12);
    lab_out(lab, OUT_RSTD, "rstd", rows, 1e-10);
    lab_in(lab, IN_INP, "inp", rows * C, -1, 3);
    lab_in(lab, IN_WEIGHT, "weight", C, -1, 1);
    lab_in(lab, IN_BIAS, "bias", C, -1, 1);
}

static LabWork forward_work(const Sizes *s) {
    double rows = (double)tokens_of(s), n = rows * s->C;
    LabWork w = {4 * (2 * n + 2 * rows + 2.0 * s->C), 10 * n, n};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: dinp, dout, inp (rows, C); dweight, dbias, weight (C); mean, rstd (rows). With n = (inp - mean) rstd and
// dn = dout weight: dinp = rstd (dn - mean_c(dn) - n mean_c(dn n)),  dweight += sum_rows dout n,  dbias += sum_rows dout

enum { OUT_DINP, ADD_DWEIGHT, ADD_DBIAS, IN_DOUT, IN_X, IN_W, IN_MEAN, IN_RSTD };

static void backward_ships(float *const *t, const Sizes *s) {
    layernorm_backward(t[OUT_DINP], t[ADD_DWEIGHT], t[ADD_DBIAS], t[IN_DOUT], NULL, t[IN_X], t[IN_W], t[IN_MEAN], t[IN_RSTD],
                       (int)tokens_of(s), s->C);
}

// 1: sums one number after the other
static void backward_textbook(float *const *t, const Sizes *s) {
    int C = s->C;
    for (size_t r = 0; r < tokens_of(s); r++) {
        const float *x = t[IN_X] + r * C, *dout = t[IN_DOUT] + r * C;
        float m = t[IN_MEAN][r], rstd = t[IN_RSTD][r], dn_mean = 0.0f, dn_n_mean = 0.0f;
        for (int c = 0; c < C; c++) {
            float n = (x[c] - m) * rstd, dn = dout[c] * t[IN_W][c];
            dn_mean += dn / (float)C, dn_n_mean += dn * n / (float)C;
            t[ADD_DWEIGHT][c] += dout[c] * n, t[ADD_DBIAS][c] += dout[c];
        }
        for (int c = 0; c < C; c++) {
            float n = (x[c] - m) * rstd, dn = dout[c] * t[IN_W][c];
            t[OUT_DINP][r * C + c] = rstd * (dn - dn_mean - n * dn_n_mean);
        }
    }
}

// 2: 0 with C a constant, as forward's 5
ALWAYS_INLINE void one_row_backward(float *RESTRICT dweight, float *RESTRICT dbias, float *const *t, size_t r, const int C) {
    const float *RESTRICT x = t[IN_X] + r * C, *RESTRICT dout = t[IN_DOUT] + r * C, *RESTRICT weight = t[IN_W];
    float *RESTRICT dinp = t[OUT_DINP] + r * C, m = t[IN_MEAN][r], rstd = t[IN_RSTD][r], dn_mean = 0.0f, dn_n_mean = 0.0f;
    #pragma omp simd reduction(+ : dn_mean, dn_n_mean)
    for (int c = 0; c < C; c++) {
        float n = (x[c] - m) * rstd, dn = dout[c] * weight[c];
        dn_mean += dn, dn_n_mean += dn * n;
        dweight[c] += dout[c] * n, dbias[c] += dout[c];
    }
    dn_mean /= (float)C, dn_n_mean /= (float)C;
    #pragma omp simd
    for (int c = 0; c < C; c++) dinp[c] = rstd * (dout[c] * weight[c] - dn_mean - (x[c] - m) * rstd * dn_n_mean);
}

static void add_slices(float *const *t, float *partial, int C) {
    slices_sum(partial, (size_t)2 * C);
    for (int c = 0; c < C; c++) t[ADD_DWEIGHT][c] += partial[c], t[ADD_DBIAS][c] += partial[C + c];
    free(partial);
}

static void backward_constant(float *const *t, const Sizes *s) {
    float *partial = slices_alloc((size_t)2 * s->C);
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *dweight = partial + (size_t)slice * 2 * s->C, *dbias = dweight + s->C;
        for (size_t r = slice_start(tokens_of(s), slice); r < slice_start(tokens_of(s), slice + 1); r++)
            switch (s->C) {
                case 32: one_row_backward(dweight, dbias, t, r, 32); break;
                case 64: one_row_backward(dweight, dbias, t, r, 64); break;
                case 128: one_row_backward(dweight, dbias, t, r, 128); break;
                case 256: one_row_backward(dweight, dbias, t, r, 256); break;
                default: one_row_backward(dweight, dbias, t, r, s->C);
            }
    }
    add_slices(t, partial, s->C);
}

// 3: the sums over rows apart from the rest: dinp row by row, then dweight and dbias in a pass that reads all again
static void backward_apart(float *const *t, const Sizes *s) {
    int C = s->C;
    float *partial = slices_alloc((size_t)2 * C);
    #pragma omp parallel for schedule(static)
    for (size_t r = 0; r < tokens_of(s); r++) {
        const float *RESTRICT x = t[IN_X] + r * C, *RESTRICT dout = t[IN_DOUT] + r * C, *RESTRICT weight = t[IN_W];
        float *RESTRICT dinp = t[OUT_DINP] + r * C, m = t[IN_MEAN][r], rstd = t[IN_RSTD][r], dn_mean = 0.0f, dn_n_mean = 0.0f;
        #pragma omp simd reduction(+ : dn_mean, dn_n_mean)
        for (int c = 0; c < C; c++) dn_mean += dout[c] * weight[c], dn_n_mean += dout[c] * weight[c] * (x[c] - m) * rstd;
        dn_mean /= (float)C, dn_n_mean /= (float)C;
        #pragma omp simd
        for (int c = 0; c < C; c++) dinp[c] = rstd * (dout[c] * weight[c] - dn_mean - (x[c] - m) * rstd * dn_n_mean);
    }
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *RESTRICT dweight = partial + (size_t)slice * 2 * C, *RESTRICT dbias = dweight + C;
        for (size_t r = slice_start(tokens_of(s), slice); r < slice_start(tokens_of(s), slice + 1); r++)
            #pragma omp simd
            for (int c = 0; c < C; c++) {
                float dout = t[IN_DOUT][r * C + c];
                dweight[c] += dout * (t[IN_X][r * C + c] - t[IN_MEAN][r]) * t[IN_RSTD][r], dbias[c] += dout;
            }
    }
    add_slices(t, partial, C);
}

static const LabKernel BACKWARD[] = {
    {backward_ships, "ships: vectors, threads over 32 slices of the rows", NULL},
    {backward_textbook, "textbook: sums one number after the other", NULL},
    {backward_constant, "0, C a constant", NULL},
    {backward_apart, "dinp, then dweight and dbias in a pass of their own", NULL},
    {NULL, NULL, NULL}
};

static void backward_tensors(Lab *lab, const Sizes *s) {
    size_t rows = tokens_of(s), C = (size_t)s->C;
    lab_out(lab, OUT_DINP, "dinp", rows * C, 1e-10);
    lab_add(lab, ADD_DWEIGHT, "dweight", C, 1e-10);
    lab_add(lab, ADD_DBIAS, "dbias", C, 1e-10);
    lab_in(lab, IN_DOUT, "dout", rows * C, -1, 1);
    lab_in(lab, IN_X, "inp", rows * C, -1, 3);
    lab_in(lab, IN_W, "weight", C, -1, 1);
    lab_in(lab, IN_MEAN, "mean", rows, 0, 0);
    lab_in(lab, IN_RSTD, "rstd", rows, 0, 0);
}

// mean and rstd as forward leaves them
static void statistics(float *const *host, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    float *out = lab_floats(n);
    layernorm_forward(out, host[IN_MEAN], host[IN_RSTD], host[IN_X], host[IN_W], host[IN_W], (int)tokens_of(s), s->C);
    free(out);
}

static LabWork backward_work(const Sizes *s) {
    double rows = (double)tokens_of(s), n = rows * s->C;
    LabWork w = {4 * (3 * n + 2 * rows + 5.0 * s->C), 20 * n, n};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------

static const Option SIZES[] = {LAB_GRID, LAB_SIZE("channels", C, 65536, "of a row"), {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 67, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 1, 1, 17, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 1, 7, 43, 256, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 2, 3, 1, 769, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"layernorm_forward", FORWARD, forward_tensors, NULL, forward_ships, forward_work, "(token, channel)",
         "flop", cpu_flop_rate, NULL, 0},
        {"layernorm_backward", BACKWARD, backward_tensors, statistics, backward_ships, backward_work, "(token, channel)",
         "flop", cpu_flop_rate, NULL, 0},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {"Layer norm, on the CPU.", SIZES, NULL, LADDERS, CHECKS, &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
