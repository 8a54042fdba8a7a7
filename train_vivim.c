/*
train_vivim.c: Vivim, a video vision Mamba for medical video segmentation, in one file of plain C99.

The whole model, forward and backward, its training, evaluation and data: a SegFormer encoder whose stages end in Mamba
layers that scan a clip along three orders, and a light decoder that turns four feature maps into one mask. In training a
boundary head on the first features learns the mask's edge, under a frozen network that pulls edges into place.
Paper: Yang et al., "Vivim: a Video Vision Mamba for Medical Video Segmentation", IEEE TCSVT 2025, arXiv 2401.14168.

Not in this file: reading images and videos (prepro/frames.c), synthetic data (prepro/phantom.c), the training of that
frozen network (prepro/affine.c); and in headers, included where they belong: files, frames, options (prepro/), exp and its
kin, random numbers (dev/elementary.h, random.h), the inner loops of products and depthwise convolutions (dev/matmul.h,
dwconv.h), --bench, --predict and validation (dev/bench.h, op_times.h, predict.h), memory, processes, threads (dev/memory.h,
parallel.h, threads.h), from options to models and shards (dev/setup.h).

Build and run:  make train_vivim && ./train_vivim          (./train_vivim --help lists every option)

READING ORDER
   1 utilities: errors, memory, fixed slices    9 bilinear upsampling
   2 elementary functions that vectorise       10 batch norm and the segmentation head
   3 counter-based random numbers              11 losses of mask and boundary, Adam
   4 matmul: the linear layers                 12 the model: tensor table, sublayers, decoder, forward, backward
   5 layer norm, GELU, ReLU, residual          13 the affine constraint, the whole loss, a training step
   6 convolutions: depthwise and dense         14 checkpoints
   7 attention                                 15 data: clips, augmentation, batches
   8 causal conv and the selective scan        16 metrics; 17 options, train, main

GLOSSARY (PyTorch and the Mamba paper use the same letters)
   B clips in a batch    T frames of a clip       H, W height and width of a grid    C channels
   P = H*W tokens of a frame      L = T*P tokens of a clip      rows = B*L tokens of a batch
   D d_inner = expand*C, width inside Mamba      N d_state = 16      R dt_rank = ceil(C/16)      K d_conv = 4
   Pk, rows_k tokens of the smaller grid that keys and values live on, of a frame and of a batch
   E decoder width       inp, out, weight, bias; dinp, dout, dweight, dbias their gradients of the loss
   rank, ranks: a process and their number, 0 and 1 unless several train together (dev/parallel.h)

CONVENTIONS
   Activations are channels-last: a stage's features are (B, T, H, W, C), the same memory as tokens (B, L, C) with
   l = t*P + h*W + w. So linear layers are matrix products over tokens, and everything else vectorises over channels.
   Weights keep PyTorch's shapes: a linear (out, in), a convolution (out, in, kh, kw).
   op_forward(out, what backward needs, inputs, weights, sizes). op_backward(dinp, dweight, dbias, dout, ...).
   A backward ADDS to the gradients of parameters and OVERWRITES the gradients of activations.
   Threads share work by fixed pieces, and sums over tokens are made in fixed slices: the number of threads never changes a
   bit of any result. test_vivim.c holds every function to PyTorch's numbers and to finite differences.
   Sections 1 - 11 are operations on plain arrays; the graph, in 12 and 13, says which follows which and touches no number
   itself: train_vivim.cu puts operations under it that run on a GPU. HOST_DEVICE: kernels call it too.
   floatX: the type of activations and of the weights that multiply them: float here, maybe a shorter one on a GPU. Losses,
   statistics, gradients of parameters, the scan's states are float everywhere.
*/
#if VIVIM_PART != 2  // train_vivim.cu includes this file in two parts: 1 all but the graph, 2 the graph
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // POSIX (mmap, sigaction, clock_gettime) and madvise
#endif
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "prepro/cli.h"
#include "prepro/enhance.h"
#include "prepro/overlay.h"
#include "prepro/png.h"
#include "prepro/resize.h"
#include "prepro/safetensors.h"
#include "prepro/shard.h"
#ifdef VIVIM_DOUBLE  // test_vivim.c compiles this file a second time with every float a double: exact finite differences
#include "dev/double.h"
#endif
#ifndef VIVIM_FLOATX
typedef float floatX;
#endif
#include "dev/parallel.h"  // parallel.rank, parallel.ranks; sum_over_ranks, parallel_sum: nothing for one process

// ---------------------------------------------------------------------------------------------------------------------
// 1 UTILITIES

// Both compilers that build this, gcc and clang, know these in C and in C++.
#define RESTRICT __restrict
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define PREFETCH_WRITE(address) __builtin_prefetch(address, 1)
#if defined(__clang__)  // unroll the next loop completely if its trip count is a constant
#pragma clang diagnostic ignored "-Wpass-failed"  // "loop not unrolled": true of the instances with run-time sizes, expected
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__NVCC__)  // its host compiler never sees this pragma
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__  // kernels of train_vivim.cu call these, too
#else
#define HOST_DEVICE
#endif

HOST_DEVICE static inline int min_int(int a, int b) { return a < b ? a : b; }
HOST_DEVICE static inline int max_int(int a, int b) { return a > b ? a : b; }
HOST_DEVICE static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

#include "dev/memory.h"  // malloc_check, malloc_floats: or the program ends; Arena: one block from which tensors are cut

static void zero_floats(float *x, size_t n) {  // n numbers
    if (n < 100000) {
        memset(x, 0, n * sizeof(float));
        return;
    }
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) x[i] = 0.0f;
}

static double seconds(void) {
    struct timespec now; clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double peak_mb(void) {  // of the memory that was in use at a time so far
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_maxrss / 1024.0;
}

// Sums over many rows (tokens) are made in SLICES fixed slices, each by one thread into numbers of its own, and the slices
// added in order: parallel, and the same bits for every number of threads.
enum { SLICES = 32 };

static size_t slice_start(size_t n, int slice) { return n * (size_t)slice / SLICES; }

// zeros for n sums of every slice: (SLICES, n)
static float *slices_alloc(size_t n) { return (float *)calloc_check(SLICES * n, sizeof(float)); }

// partial[i] = sum over slices of partial[slice*n + i]: the first slice becomes the sum of all
static void slices_sum(float *partial, size_t n) {
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++)
        for (int s = 1; s < SLICES; s++) partial[i] += partial[(size_t)s * n + i];
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 ELEMENTARY FUNCTIONS THAT VECTORISE
//
// exp2_simd(x) = 2^x, exp_simd(x) = e^x, log1p_simd(u) = log(1 + u) for 0 <= u <= 1 and normal_cdf_simd(x) = P(X <= x) of a
// standard normal X are branch-free polynomials, for libm's functions are calls that stop a loop from being vectorised. So
//     sigmoid(x) = 1/(1 + e^-x),   silu(x) = x sigmoid(x),   softplus(x) = log(1 + e^x),   gelu(x) = x P(X <= x)
// are sigmoid_simd, silu_simd, softplus_simd, gelu_simd, and silu_grad_simd, gelu_grad_simd derivatives. NaN stays NaN.
#include "dev/elementary.h"

// ---------------------------------------------------------------------------------------------------------------------
// 3 COUNTER-BASED RANDOM NUMBERS
//
// A random number is a hash of (seed, stream, step, index), not the next one of a sequence: any thread, a GPU, or a resumed
// run gets the same value without knowing what was drawn before it.
#include "dev/random.h"  // rng_key(seed, stream, step); rng_u32, rng_uniform, rng_normal: number i of a key

// ---------------------------------------------------------------------------------------------------------------------
// 4 MATMUL
//
// A linear layer is one matrix product forward and two backward: nearly all the arithmetic of the model. The product itself,
// cut into tiles that live in registers and panels that live in caches, is dev/matmul.h, as on a GPU it is cuBLAS:
//     matmul(C, ldc, A, lda, transA, B, ldb, transB, bias, M, N, K, accumulate)      C = [C +] op(A) op(B) + bias
// C (M, N), op(A) (M, K), op(B) (K, N); rows begin ld floats apart; trans: the transpose of what lies in memory; bias (N) or
// NULL. matmul_serial is the same on the calling thread, for use inside parallel loops.
#include "dev/matmul.h"

// F.linear(inp, weight, bias): out (M, N) = inp (M, K) weight (N, K)^T + bias (N); bias may be NULL
static void matmul_forward(float *out, const float *inp, const float *weight, const float *bias, int M, int N, int K) {
    matmul(out, N, inp, K, 0, weight, K, 1, bias, M, N, K, 0);
}

// sums (N) += column sums of x (M, N)
static void add_column_sums(float *sums, const float *x, int M, int N) {
    float *partial = slices_alloc((size_t)N);  // (SLICES, N)
    #pragma omp parallel for schedule(static) if ((int64_t)M * N > 100000)
    for (int s = 0; s < SLICES; s++)
        for (size_t i = slice_start((size_t)M, s); i < slice_start((size_t)M, s + 1); i++)
            #pragma omp simd
            for (int j = 0; j < N; j++) partial[(size_t)s * N + j] += x[i * N + j];
    slices_sum(partial, (size_t)N);
    for (int j = 0; j < N; j++) sums[j] += partial[j];
    free(partial);
}

// dinp (M, K) = dout (M, N) weight (N, K); dweight (N, K) += dout^T inp (M, K); dbias (N) += sum of dout; each may be NULL
static void matmul_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, int M, int N, int K) {
    if (dinp) matmul(dinp, K, dout, N, 0, weight, K, 0, NULL, M, K, N, 0);
    if (dweight) matmul(dweight, K, dout, N, 1, inp, K, 0, NULL, N, K, M, 1);
    if (dbias) add_column_sums(dbias, dout, M, N);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 LAYER NORM, GELU, RELU, RESIDUAL

// torch.nn.functional.layer_norm(inp, (C,), weight, bias, eps=1e-5)
// out, inp (rows, C); mean, rstd (rows) are kept for backward; weight, bias (C)
static void layernorm_forward(float *out, float *mean, float *rstd, const float *inp, const float *weight, const float *bias,
                              int rows, int C) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *RESTRICT x = inp + (size_t)r * C;
        float *RESTRICT o = out + (size_t)r * C, sum = 0.0f, var = 0.0f, m, s;
        #pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += x[c];
        m = sum / (float)C;
        #pragma omp simd reduction(+ : var)
        for (int c = 0; c < C; c++) var += (x[c] - m) * (x[c] - m);
        s = 1.0f / sqrtf(var / (float)C + 1e-5f);
        #pragma omp simd
        for (int c = 0; c < C; c++) o[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[r] = m, rstd[r] = s;
    }
}

// With n = (inp - mean) rstd and dn = dout * weight:
//   dinp = dresidual + rstd (dn - mean_c(dn) - n mean_c(dn n));  dweight += sum_rows dout n;  dbias += sum_rows dout
// dresidual (rows, C) is the gradient that reaches inp along the residual connection: NULL for none, may be dinp.
static void layernorm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *dresidual,
                               const float *inp, const float *weight, const float *mean, const float *rstd, int rows,
                               int C) {
    float *partial = slices_alloc((size_t)2 * C);  // (SLICES, {dweight, dbias}, C)
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *RESTRICT pw = partial + (size_t)slice * 2 * C, *RESTRICT pb = pw + C;
        for (size_t r = slice_start((size_t)rows, slice); r < slice_start((size_t)rows, slice + 1); r++) {
            const float *x = inp + r * C, *dy = dout + r * C, *res = dresidual ? dresidual + r * C : NULL;
            float *dx = dinp + r * C, m = mean[r], s = rstd[r], dn_mean = 0.0f, dn_n_mean = 0.0f;
            #pragma omp simd reduction(+ : dn_mean, dn_n_mean)
            for (int c = 0; c < C; c++) {
                float n = (x[c] - m) * s, dn = dy[c] * weight[c];
                dn_mean += dn; dn_n_mean += dn * n;
                pw[c] += dy[c] * n; pb[c] += dy[c];
            }
            dn_mean /= (float)C, dn_n_mean /= (float)C;
            #pragma omp simd
            for (int c = 0; c < C; c++)
                dx[c] = (res ? res[c] : 0.0f) + s * (dy[c] * weight[c] - dn_mean - (x[c] - m) * s * dn_n_mean);
        }
    }
    slices_sum(partial, (size_t)2 * C);
    for (int c = 0; c < C; c++) dweight[c] += partial[c], dbias[c] += partial[C + c];
    free(partial);
}

// torch.nn.functional.gelu, the exact one, x * cdf(x), is made with its input, in dwconv_forward (section 6), and not kept.
// Backward makes it again for the next layer's dweight: out = gelu(inp), dinp = dout * gelu'(inp); dinp may be dout. n numbers.
static void gelu_backward(float *out, float *dinp, const float *dout, const float *inp, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        float x = inp[i], dy = dout[i];
        out[i] = gelu_simd(x), dinp[i] = dy * gelu_grad_simd(x);
    }
}

// torch.relu_(x): n elements, in place; 0*x keeps NaN. Backward: dx = dx where the output y is positive, else 0.
static void relu_forward(float *x, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) x[i] = x[i] > 0.0f ? x[i] : 0.0f * x[i];
}

static void relu_backward(float *dx, const float *y, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) dx[i] = y[i] > 0.0f ? dx[i] : 0.0f * dx[i];
}

// out = x + scale * branch, n elements: a residual connection; x = NULL: scale * branch, which is its backward.
static void residual(float *out, const float *x, const float *branch, float scale, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) out[i] = (x ? x[i] : 0.0f) + scale * branch[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 CONVOLUTIONS

// Depthwise convolutions, 3x3 in each frame (kt = 1, MixFFN) or 3x3x3 in the clip (kt = 3, DSF): every channel has a kernel of
// its own. With s a token (t, h, w) and s + k its neighbour in tap k (up to kt/2 frames, a row, a column away), zeros outside:
//     out[s] = bias + sum_k weight[k] inp[s + k],   gelu[s] = F.gelu(out[s])                            (for each channel)
//     dinp[s + k] += weight[k] dout[s],   dweight[k] += sum_s dout[s] inp[s + k],   dbias += sum_s dout[s]
// dwconv_forward, dwconv_backward, vectorised over channels; taps_first, for section 8, too, transposes: weight (C, taps) -> (taps, C)
#include "dev/dwconv.h"

// col (frames*OH*OW, C*k*k) = the k x k patches of inp (frames, H, W, C), zeros outside; column (c*k + ky)*k + kx as in the
// weight's layout
static void im2col(float *col, const float *inp, int frames, int H, int W, int C, int OH, int OW, int k, int stride,
                   int pad) {
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < frames * OH; row++)
        for (int ox = 0; ox < OW; ox++) {
            float *to = col + ((size_t)row * OW + ox) * ((size_t)C * k * k);
            for (int ky = 0; ky < k; ky++)
                for (int kx = 0; kx < k; kx++) {
                    int y = row % OH * stride - pad + ky, x = ox * stride - pad + kx;
                    int inside = y >= 0 && y < H && x >= 0 && x < W;
                    const float *from = inside ? inp + (((size_t)(row / OH) * H + y) * W + x) * C : NULL;
                    for (int c = 0; c < C; c++) to[(c * k + ky) * k + kx] = from ? from[c] : 0.0f;
                }
        }
}

// the transpose of im2col: every input pixel sums the patch entries that it was copied to
static void col2im(float *dinp, const float *dcol, int frames, int H, int W, int C, int OH, int OW, int k, int stride,
                   int pad) {
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < frames * H; row++) {
        float *to = dinp + (size_t)row * W * C;
        memset(to, 0, sizeof(float) * (size_t)W * C);
        for (int ky = 0; ky < k; ky++) {
            int y = row % H + pad - ky, oy = y / stride;  // input row y is row ky of the patches at oy, if that is one
            if (y < 0 || y % stride != 0 || oy >= OH) continue;
            for (int ox = 0; ox < OW; ox++)
                for (int kx = 0; kx < k; kx++) {
                    int x = ox * stride - pad + kx;
                    const float *from = dcol + (((size_t)(row / H) * OH + oy) * OW + ox) * ((size_t)C * k * k);
                    if (x < 0 || x >= W) continue;
                    for (int c = 0; c < C; c++) to[(size_t)x * C + c] += from[(c * k + ky) * k + kx];
                }
        }
    }
}

// rows of a convolution's output for n rows of input; columns alike
static int conv_size(int n, int k, int stride, int pad) { return (n + 2 * pad - k) / stride + 1; }

// A dense convolution is a matrix product of patches with the kernels. As many of N frames are unfolded at a time as keep
// the patches (n floats per frame) within 16 MiB (or one frame's).
static int conv_chunk(int N, size_t n) { return max_int(1, min_int(N, (int)(4194304 / n))); }

// nn.Conv2d(C, O, k, stride, pad): out (N, OH, OW, O), inp (N, H, W, C), weight (O, C, k, k), bias (O)
static void conv_forward(float *out, const float *inp, const float *weight, const float *bias, int N, int H, int W, int C,
                         int O, int k, int stride, int pad) {
    int OH = conv_size(H, k, stride, pad), OW = conv_size(W, k, stride, pad), patch = C * k * k;
    int chunk = conv_chunk(N, (size_t)OH * OW * patch);
    float *col = malloc_floats((size_t)chunk * OH * OW * patch);
    for (int n = 0; n < N; n += chunk) {
        int frames = min_int(chunk, N - n);
        im2col(col, inp + (size_t)n * H * W * C, frames, H, W, C, OH, OW, k, stride, pad);
        matmul_forward(out + (size_t)n * OH * OW * O, col, weight, bias, frames * OH * OW, O, patch);
    }
    free(col);
}

// as the linear layer's backward on the patches; dinp may be NULL (the first layer's input needs no gradient)
static void conv_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                          const float *weight, int N, int H, int W, int C, int O, int k, int stride, int pad) {
    int OH = conv_size(H, k, stride, pad), OW = conv_size(W, k, stride, pad), patch = C * k * k;
    int chunk = conv_chunk(N, (size_t)OH * OW * patch);
    float *col = malloc_floats((size_t)chunk * OH * OW * patch);
    for (int n = 0; n < N; n += chunk) {
        int frames = min_int(chunk, N - n);
        im2col(col, inp + (size_t)n * H * W * C, frames, H, W, C, OH, OW, k, stride, pad);
        matmul_backward(NULL, dweight, dbias, dout + (size_t)n * OH * OW * O, col, NULL, frames * OH * OW, O, patch);
        if (dinp == NULL) continue;
        matmul_backward(col, NULL, NULL, dout + (size_t)n * OH * OW * O, NULL, weight, frames * OH * OW, O, patch);
        col2im(dinp + (size_t)n * H * W * C, col, frames, H, W, C, OH, OW, k, stride, pad);
    }
    free(col);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 ATTENTION
//
// Per frame and head: out = softmax(q k^T / sqrt(hd)) v, hd = C/heads. Vivim's keys and values live on a reduced grid of Pk
// pixels (64 per frame at 256 x 256), so a block of queries and all its scores fit in cache and the (P, Pk) matrix is never
// stored: backward computes it again.

enum { QUERY_BLOCK = 256 };  // queries at a time, their scores in L2

// backward's slices of a frame's P queries: of at least one block, for keys are packed once for each
static int query_slices(int P) { return max_int(1, min_int(8, P / QUERY_BLOCK)); }

// prob (n, Pk) = softmax over keys of scale * q k^T, for n <= QUERY_BLOCK queries; q, k rows of C floats (one head's columns). A
// row is a few vectors long and its maximum and sum wait for all of them: with a loop for each, many rows are under way.
static void attention_scores(float *prob, const float *q, const float *k, int n, int Pk, int C, int hd) {
    float scale = LOG2_E / sqrtf((float)hd), largest[QUERY_BLOCK], sum[QUERY_BLOCK];  // e^x = 2^(x LOG2_E)
    matmul_serial(prob, Pk, q, C, 0, k, C, 1, NULL, n, Pk, hd, 0);
    for (int i = 0; i < n; i++) {
        const float *s = prob + (size_t)i * Pk; float m = s[0];
        #pragma omp simd reduction(max : m)
        for (int j = 0; j < Pk; j++) m = s[j] > m ? s[j] : m;
        largest[i] = m;
    }
    for (int i = 0; i < n; i++) {
        float *RESTRICT s = prob + (size_t)i * Pk, m = largest[i], total = 0.0f;
        #pragma omp simd reduction(+ : total)
        for (int j = 0; j < Pk; j++) {
            s[j] = exp2_simd((s[j] - m) * scale); total += s[j];
        }
        sum[i] = total;
    }
    for (int i = 0; i < n; i++) {
        float *RESTRICT s = prob + (size_t)i * Pk, scale_i = 1.0f / sum[i];
        #pragma omp simd
        for (int j = 0; j < Pk; j++) s[j] *= scale_i;
    }
}

// N frames: out, q (N, P, C); k, v (N, Pk, C)
static void attention_forward(float *out, const float *q, const float *k, const float *v, int N, int P, int Pk, int C,
                              int heads) {
    int hd = C / heads, blocks = ceil_div(P, QUERY_BLOCK);
    #pragma omp parallel
    {
        float *prob = malloc_floats((size_t)QUERY_BLOCK * Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < N * heads * blocks; task++) {
            int p = task % blocks * QUERY_BLOCK, head = task / blocks % heads, f = task / (blocks * heads);
            int n = min_int(QUERY_BLOCK, P - p);
            size_t at = ((size_t)f * P + p) * C + (size_t)head * hd, at_k = (size_t)f * Pk * C + (size_t)head * hd;
            attention_scores(prob, q + at, k + at_k, n, Pk, C, hd);
            matmul_serial(out + at, C, prob, Pk, 0, v + at_k, C, 0, NULL, n, hd, Pk, 0);
        }
        free(prob);
    }
}

// With prob as in forward:  dv = prob^T dout;  dprob = dout v^T;  ds = prob (dprob - sum_keys(dprob prob)) / sqrt(hd);
// dq = ds k;  dk = ds^T q.  dk and dv sum over queries: in fixed slices, added in order. dq, dout as q, dk, dv as k above.
static void attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,
                               const float *v, int N, int P, int Pk, int C, int heads) {
    int hd = C / heads, slices = query_slices(P); float scale = 1.0f / sqrtf((float)hd);
    size_t kv = (size_t)N * Pk * C;
    float *partial = (float *)calloc_check(2 * slices * kv, sizeof(float));  // (slices, {dk, dv}, N, Pk, C)
    #pragma omp parallel
    {
        float *prob = malloc_floats((size_t)QUERY_BLOCK * Pk), *ds = malloc_floats((size_t)QUERY_BLOCK * Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < N * heads * slices; task++) {
            int slice = task % slices, head = task / slices % heads, f = task / (slices * heads);
            int start = (int)((int64_t)P * slice / slices), end = (int)((int64_t)P * (slice + 1) / slices);
            size_t at_k = (size_t)f * Pk * C + (size_t)head * hd;
            float *pdk = partial + 2 * (size_t)slice * kv + at_k, *pdv = pdk + kv;
            for (int p = start; p < end; p += QUERY_BLOCK) {
                int n = min_int(QUERY_BLOCK, end - p);
                size_t at = ((size_t)f * P + p) * C + (size_t)head * hd;
                attention_scores(prob, q + at, k + at_k, n, Pk, C, hd);
                matmul_serial(pdv, C, prob, Pk, 1, dout + at, C, 0, NULL, Pk, hd, n, 1);
                matmul_serial(ds, Pk, dout + at, C, 0, v + at_k, C, 1, NULL, n, Pk, hd, 0);
                for (int i = 0; i < n; i++) {
                    float *RESTRICT d = ds + (size_t)i * Pk, sum = 0.0f;
                    const float *RESTRICT pr = prob + (size_t)i * Pk;
                    #pragma omp simd reduction(+ : sum)
                    for (int j = 0; j < Pk; j++) sum += d[j] * pr[j];
                    #pragma omp simd
                    for (int j = 0; j < Pk; j++) d[j] = pr[j] * (d[j] - sum) * scale;
                }
                matmul_serial(dq + at, C, ds, Pk, 0, k + at_k, C, 0, NULL, n, hd, Pk, 0);
                matmul_serial(pdk, C, ds, Pk, 1, q + at, C, 0, NULL, Pk, hd, n, 1);
            }
        }
        free(ds); free(prob);
    }
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < kv; i++) {
        dk[i] = dv[i] = 0.0f;
        for (size_t at = i, s = 0; s < (size_t)slices; s++, at += 2 * kv) dk[i] += partial[at], dv[i] += partial[at + kv];
    }
    free(partial);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 CAUSAL CONVOLUTION AND SELECTIVE SCAN
//
// The three directions of ST-Mamba visit the same L = T*P tokens, which lie in memory as (T, P, channels), in three orders.
// Nothing is flipped or copied: both loops walk over positions s = 0 .. L-1 and ask which row of memory position s is.

enum { SCAN_FORWARD, SCAN_BACKWARD, SCAN_SPATIAL };

HOST_DEVICE static inline size_t scan_row(int order, int s, int T, int P) {
    if (order == SCAN_FORWARD) return (size_t)s;               // frame after frame
    if (order == SCAN_BACKWARD) return (size_t)T * P - 1 - s;  // the same, from the end
    return (size_t)(s % T) * P + s / T;                        // SCAN_SPATIAL: a pixel through all frames, then the next
}

// The processor does not foresee jumps from row to row; asking early for a row makes these loops up to twice as fast.
static inline void prefetch_row(const float *row, int D) {
    for (int d = 0; d < D; d += 16) PREFETCH(row + d);
}

// F.silu(F.conv1d(x, weight, bias, padding=K-1, groups=D)[:, :, :L]) along the visiting order:
//     z[s] = bias + sum_k weight[k] x[s - (K-1) + k],   out[s] = silu(z[s])       (x is 0 before position 0)
enum { CONV1D_PIECE = 64, CONV1D_AHEAD = 8 };  // positions per task in backward; positions that rows are fetched ahead

// z (D) at position s of one clip; x (L, ldx), taps (K, D)
static void conv1d_position(float *RESTRICT z, const float *x, int ldx, const float *taps, const float *bias,
                            int order, int s, int T, int P, int D, int K) {
    memcpy(z, bias, (size_t)D * sizeof(float));
    for (int k = max_int(0, K - 1 - s); k < K; k++) {
        const float *x_k = x + scan_row(order, s - (K - 1) + k, T, P) * ldx, *w_k = taps + (size_t)k * D;
        #pragma omp simd
        for (int d = 0; d < D; d++) z[d] += w_k[d] * x_k[d];
    }
}

// out (B, L, D); x (B, L, ldx), of which the first D columns are read; weight (D, 1, K); bias (D)
static void conv1d_silu_forward(float *out, const float *x, int ldx, const float *weight, const float *bias,
                                int order, int B, int T, int P, int D, int K) {
    int L = T * P;
    float *taps = taps_first(weight, D, K, 0);
    #pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int s = 0; s < L; s++) {
            const float *x_b = x + (size_t)b * L * ldx;
            float *out_b = out + (size_t)b * L * D, *out_s = out_b + scan_row(order, s, T, P) * D;
            size_t ahead = scan_row(order, min_int(s + CONV1D_AHEAD, L - 1), T, P);
            prefetch_row(x_b + ahead * ldx, D);
            prefetch_row(out_b + ahead * D, D);
            conv1d_position(out_s, x_b, ldx, taps, bias, order, s, T, P, D, K);
            #pragma omp simd
            for (int d = 0; d < D; d++) out_s[d] = silu_simd(out_s[d]);
        }
    free(taps);
}

// z is computed again instead of kept. With dz[s] = dout[s] silu'(z[s]):
//     dbias += sum_s dz[s],   dweight[k] += sum_s dz[s] x[s - (K-1) + k],   dx[s - (K-1) + k] += weight[k] dz[s]
// A piece of positions takes all terms with its own x. It needs the dz of the K-1 positions after it, and recomputes them.
// dx (B, L, lddx) =, or += if accumulate (where the directions of a layer meet); the rest as above
static void conv1d_silu_backward(float *dx, int lddx, float *dweight, float *dbias, const float *dout, const float *x,
                                 int ldx, const float *weight, const float *bias, int order, int B, int T, int P, int D,
                                 int K, int accumulate) {
    int L = T * P, pieces = ceil_div(L, CONV1D_PIECE);
    size_t part = (size_t)(K + 1) * D, tasks = (size_t)B * pieces;
    float *taps = taps_first(weight, D, K, 0), *partial = slices_alloc(part);  // (SLICES, K + 1, D): dweight, dbias
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *dw = partial + (size_t)slice * part, *db = dw + (size_t)K * D, *dz = malloc_floats((size_t)D);
        for (size_t task = slice_start(tasks, slice); task < slice_start(tasks, slice + 1); task++) {
            size_t first = task / pieces * L;  // the clip's first row
            const float *x_b = x + first * ldx, *dout_b = dout + first * D;
            float *dx_b = dx + first * lddx;
            int s0 = (int)(task % pieces) * CONV1D_PIECE, s1 = min_int(s0 + CONV1D_PIECE, L);
            for (int s = s0; s < min_int(s1 + K - 1, L); s++) {
                size_t row = scan_row(order, s, T, P), ahead = scan_row(order, min_int(s + CONV1D_AHEAD, L - 1), T, P);
                prefetch_row(x_b + ahead * ldx, D);
                prefetch_row(dout_b + ahead * D, D);
                prefetch_row(dx_b + ahead * lddx, D);
                conv1d_position(dz, x_b, ldx, taps, bias, order, s, T, P, D, K);
                #pragma omp simd
                for (int d = 0; d < D; d++) dz[d] = dout_b[row * D + d] * silu_grad_simd(dz[d]);
                if (s < s1) {
                    if (!accumulate) memset(dx_b + row * lddx, 0, (size_t)D * sizeof(float));
                    #pragma omp simd
                    for (int d = 0; d < D; d++) db[d] += dz[d];
                }
                // tap k joins z[s] to x[before]: those of the piece's own x
                for (int k = max_int(0, K - 1 - (s - s0)); k < min_int(K, K - 1 + (s1 - s)); k++) {
                    size_t before = scan_row(order, s - (K - 1) + k, T, P);
                    const float *x_k = x_b + before * ldx, *w_k = taps + (size_t)k * D;
                    float *dx_k = dx_b + before * lddx, *dw_k = dw + (size_t)k * D;
                    #pragma omp simd
                    for (int d = 0; d < D; d++) dw_k[d] += dz[d] * x_k[d], dx_k[d] += dz[d] * w_k[d];
                }
            }
        }
        free(dz);
    }
    slices_sum(partial, part);
    for (int d = 0; d < D; d++) {
        for (int k = 0; k < K; k++) dweight[(size_t)d * K + k] += partial[(size_t)k * D + d];
        dbias[d] += partial[(size_t)K * D + d];
    }
    free(partial); free(taps);
}

// The selective scan (selective_scan_ref in Mamba's code without its softplus and gate, which follow below). For each clip, channel d and state
// n, along the visiting order:
//     h[s] = e[s] h[s-1] + dt[s] u[s] Bt[s],   e[s] = exp(dt[s] A),   A = -exp(A_log)      h[-1] = 0
//     y[s] = sum_n Ct[s] h[s] + D_skip u[s]
// u, dt, y have one value per (s, d); Bt, Ct one per (s, n), shared by all channels; A one per (d, n). That makes L*D*N
// values e and h: too many to store, and an e costs more than everything else. So:
// - The lanes of a vector are 16 neighbouring channels: u, dt, y are read and written contiguously, Bt and Ct broadcast, and
//   the sum over n needs no sum across lanes. The states of such a block, h (N, 16), fit into L1.
// - Tokens come in chunks of 32, with all blocks one after the other on each chunk: a row is read from memory once.
// - exp(dt A) = 2^(dt a), with a = A log2(e) computed once.
// Forward keeps h at the start of every chunk ("states"), one value per 32; backward replays each chunk from there.
// Blocks never meet in forward, so threads take blocks. The loop over chunks is outside, and the static schedule gives a
// thread the same blocks in every chunk: nobody waits for anybody (nowait), and a thread still walks over long rows.

enum { SCAN_LANES = 16, SCAN_CHUNK = 32, SCAN_SPANS = 4 };  // channels of a block; tokens of a chunk; see backward
#define LN_2 ((float)0.69314718055994530942)

typedef struct {  // what all blocks share; named as in the signatures below
    const float *u, *dt, *dy, *Bt, *Ct, *D_skip;
    float *y, *du, *ddt;
    float *a;  // (blocks, N, 16)
    int *row;  // (L) the row of every position
    int ldbc, D, L;
} Scan;

// number of floats in "states": (B, chunks, blocks, N, 16)
static size_t selective_scan_states(int B, int T, int P, int D, int N) {
    return (size_t)B * ceil_div(T * P, SCAN_CHUNK) * ceil_div(D, SCAN_LANES) * N * SCAN_LANES;
}

// where (d, n) stands in an array (blocks, N, 16)
HOST_DEVICE static inline size_t rate_at(int d, int n, int N) {
    return ((size_t)(d / SCAN_LANES) * N + n) * SCAN_LANES + d % SCAN_LANES;
}

// What depends on neither clip nor block: a = -exp(A_log) log2(e), from (D, N) to (blocks, N, 16), 0 for channels beyond D; the
// row of every position. Whoever calls frees both
static Scan scan_begin(const float *u, const float *dt, const float *Bt, const float *Ct, int ldbc, const float *A_log,
                       const float *D_skip, int order, int T, int P, int D, int N) {
    Scan p = {u, dt, NULL, Bt, Ct, D_skip, NULL, NULL, NULL, NULL, NULL, ldbc, D, T * P};
    p.a = (float *)calloc_check((size_t)ceil_div(D, SCAN_LANES) * SCAN_LANES * N, sizeof(float));
    p.row = (int *)malloc_check((size_t)p.L * sizeof(int));
    for (int s = 0; s < p.L; s++) p.row[s] = (int)scan_row(order, s, T, P);
    #pragma omp parallel for schedule(static)
    for (int d = 0; d < D; d++)
        for (int n = 0; n < N; n++) p.a[rate_at(d, n, N)] = -LOG2_E * exp_simd(A_log[(size_t)d * N + n]);
    return p;
}

// the row of position s in clip b; s may lie outside the clip (to prefetch)
HOST_DEVICE static inline size_t clip_row(const Scan *p, int b, int s) {
    return (size_t)b * p->L + p->row[max_int(0, min_int(s, p->L - 1))];
}

// One chunk of a block: positions s0 .. s1 of clip b, channels d .. d+lanes. Compiled twice, as backward is: with N and
// lanes constant for what the model uses (16, and D a multiple of 16), where the loop over n is unrolled and the loop over
// lanes becomes one vector, and for any N and number of lanes, about ten times slower.
ALWAYS_INLINE void scan_forward_block(const Scan *p, float *h, int b, int d, int s0, int s1, int N, int lanes,
                                      int accumulate) {
    const float *a = p->a + (size_t)d * N, *skip = p->D_skip + d;
    for (int s = s0; s < s1; s++) {
        size_t row = clip_row(p, b, s), at = row * p->D + d, ahead = clip_row(p, b, s + SCAN_CHUNK) * p->D + d;
        const float *u = p->u + at, *dt = p->dt + at, *Bt = p->Bt + row * p->ldbc, *Ct = p->Ct + row * p->ldbc;
        float *y = p->y + at;
        PREFETCH(p->u + ahead);
        PREFETCH(p->dt + ahead);
        PREFETCH(p->y + ahead);
        #pragma omp simd
        for (int j = 0; j < lanes; j++) {
            float delta = dt[j], x = delta * u[j], sum = skip[j] * u[j];
            UNROLL
            for (int n = 0; n < N; n++) {
                int nj = n * SCAN_LANES + j;
                float h_n = exp2_simd(delta * a[nj]) * h[nj] + x * Bt[n];
                h[nj] = h_n;
                sum += h_n * Ct[n];
            }
            y[j] = accumulate ? y[j] + sum : sum;
        }
    }
}

// y (B, L, D) =, or += if accumulate; u, dt (B, L, D); Bt, Ct (B, L, ldbc), of which N columns are read; A_log (D, N);
// D_skip (D); states: NULL if there will be no backward
static void selective_scan_forward(float *y, float *states, const float *u, const float *dt, const float *Bt,
                                   const float *Ct, int ldbc, const float *A_log, const float *D_skip, int order, int B,
                                   int T, int P, int D, int N, int accumulate) {
    int L = T * P, chunks = ceil_div(L, SCAN_CHUNK), blocks = ceil_div(D, SCAN_LANES);
    size_t state = (size_t)N * SCAN_LANES;
    Scan p = scan_begin(u, dt, Bt, Ct, ldbc, A_log, D_skip, order, T, P, D, N);
    float *h = (float *)calloc_check((size_t)B * blocks * state, sizeof(float));  // (B, blocks, N, 16)
    p.y = y;
    #pragma omp parallel
    for (int c = 0; c < chunks; c++) {
        #pragma omp for schedule(static) nowait
        for (int task = 0; task < B * blocks; task++) {
            int b = task / blocks, block = task % blocks, d = block * SCAN_LANES, lanes = min_int(SCAN_LANES, D - d);
            int s0 = c * SCAN_CHUNK, s1 = min_int(s0 + SCAN_CHUNK, L);
            float *h_block = h + task * state;
            if (states) memcpy(states + (((size_t)b * chunks + c) * blocks + block) * state, h_block, state * sizeof(float));
            if (N == 16 && lanes == SCAN_LANES) scan_forward_block(&p, h_block, b, d, s0, s1, 16, SCAN_LANES, accumulate);
            else scan_forward_block(&p, h_block, b, d, s0, s1, N, lanes, accumulate);
        }
    }
    free(h); free(p.row); free(p.a);
}

// Backward. Let g[s] be the gradient of the loss with respect to h[s], which acts through y[s] and through h[s+1]:
//     g[s] = Ct[s] dy[s] + e[s+1] g[s+1]            g[L] = 0: a second recurrence, from the end
// Then, from h[s] = e[s] h[s-1] + (dt[s] u[s]) Bt[s], with passed[s] = e[s] g[s], and q[s] = passed[s] h[s-1] the gradient
// of the exponent dt A:
//     dCt[s] = sum_d dy[s] h[s],   dBt[s] = sum_d g[s] dt[s] u[s]                                  (sums over channels)
//     du[s] = dt[s] sum_n g[s] Bt[s] + D_skip dy[s],   ddt[s] = u[s] sum_n g[s] Bt[s] + sum_n q[s] A  (sums over states)
//     dA_log = dA dA/dA_log = dA A with dA = sum_s q[s] dt[s],   dD_skip = sum_s dy[s] u[s]
// carry: passed (N, 16), dA (N, 16), dD_skip (16) from the chunks behind. work: for each token e, h before it, and dBt, dCt
// lane by lane (33, 4, N, 16); first: this block begins the sums over channels there, else it adds to them.
ALWAYS_INLINE void scan_backward_block(const Scan *p, float *carry, float *work, const float *checkpoint,
                                       int b, int d, int s0, int s1, int N, int lanes, int first) {
    const size_t state = (size_t)N * SCAN_LANES;
    const float *a = p->a + (size_t)d * N, *skip = p->D_skip + d;
    float *passed = carry, *dA = carry + state, *dskip = carry + 2 * state;
    // Where dy is 0 for long (frames without loss) g decays below 1e-38, where multiplications are a hundred times slower
    for (size_t nj = 0; nj < state; nj++) passed[nj] = fabsf(passed[nj]) < 1e-30f ? 0.0f : passed[nj];
    if (first && lanes < SCAN_LANES) memset(work, 0, (SCAN_CHUNK + 1) * 4 * state * sizeof(float));
    memcpy(work + state, checkpoint, state * sizeof(float));
    for (int s = s0; s < s1; s++) {  // replay
        size_t row = clip_row(p, b, s), at = row * p->D + d, ahead = clip_row(p, b, s - SCAN_CHUNK) * p->D + d;
        const float *u = p->u + at, *dt = p->dt + at, *Bt = p->Bt + row * p->ldbc;
        float *e = work + (s - s0) * 4 * state, *h_before = e + state, *h = h_before + 4 * state;
        PREFETCH(p->u + ahead);
        PREFETCH(p->dt + ahead);
        PREFETCH(p->dy + ahead);
        PREFETCH(p->du + ahead);
        PREFETCH(p->ddt + ahead);
        #pragma omp simd
        for (int j = 0; j < lanes; j++) {
            float delta = dt[j], x = delta * u[j];
            UNROLL
            for (int n = 0; n < N; n++) {
                int nj = n * SCAN_LANES + j;
                float e_n = exp2_simd(delta * a[nj]);
                e[nj] = e_n;
                h[nj] = e_n * h_before[nj] + x * Bt[n];
            }
        }
    }
    for (int s = s1 - 1; s >= s0; s--) {  // and back
        size_t row = clip_row(p, b, s), at = row * p->D + d;
        const float *Bt = p->Bt + row * p->ldbc, *Ct = p->Ct + row * p->ldbc;
        const float *u = p->u + at, *dt = p->dt + at, *dy = p->dy + at;
        float *du = p->du + at, *ddt = p->ddt + at, *e = work + (s - s0) * 4 * state;
        float *h_before = e + state, *dB = e + 2 * state, *dC = e + 3 * state, *h = h_before + 4 * state;
        #pragma omp simd
        for (int j = 0; j < lanes; j++) {
            float delta = dt[j], v = u[j], x = delta * v, dy_j = dy[j], dx = 0.0f, dexponent = 0.0f;
            UNROLL
            for (int n = 0; n < N; n++) {
                int nj = n * SCAN_LANES + j;
                float g = passed[nj] + dy_j * Ct[n];
                dC[nj] = first ? dy_j * h[nj] : dC[nj] + dy_j * h[nj];
                dB[nj] = first ? g * x : dB[nj] + g * x;
                dx += g * Bt[n];
                float g_before = g * e[nj], q = g_before * h_before[nj];
                passed[nj] = g_before;
                dexponent += q * a[nj];
                dA[nj] += q * delta;
            }
            du[j] = dx * delta + dy_j * skip[j];
            ddt[j] = dx * v + dexponent * LN_2;  // a = A log2(e) = A / ln(2)
            dskip[j] += dy_j * v;
        }
    }
}

// du, ddt, dy as u; dBt, dCt (B, L, lddbc), of which N columns are written; dA_log, dD_skip as A_log, D_skip
// A task is one clip and one of up to four fixed spans of channels. It sums dBt and dCt over its own channels, first lane by
// lane, then over the 16 lanes. The spans' sums, and the clips' dA and dD_skip, are added in fixed order at the end.
static void selective_scan_backward(float *du, float *ddt, float *dBt, float *dCt, int lddbc, float *dA_log, float *dD_skip,
                                    const float *dy, const float *u, const float *dt, const float *Bt, const float *Ct,
                                    int ldbc, const float *A_log, const float *D_skip, const float *states, int order,
                                    int B, int T, int P, int D, int N) {
    int L = T * P, chunks = ceil_div(L, SCAN_CHUNK), blocks = ceil_div(D, SCAN_LANES);
    int spans = max_int(1, min_int(blocks / 2, SCAN_SPANS));
    size_t state = (size_t)N * SCAN_LANES, carried = 2 * state + SCAN_LANES, pair = (size_t)2 * N;
    Scan p = scan_begin(u, dt, Bt, Ct, ldbc, A_log, D_skip, order, T, P, D, N);
    float *carry = (float *)calloc_check((size_t)B * blocks * carried, sizeof(float));
    float *partial = malloc_floats((size_t)B * L * spans * pair);  // (B, L, spans, 2N): dBt and dCt of a row side by side
    p.dy = dy, p.du = du, p.ddt = ddt;
    #pragma omp parallel
    {
        float *work = malloc_floats((SCAN_CHUNK + 1) * 4 * state);
        for (int c = chunks - 1; c >= 0; c--) {
            #pragma omp for schedule(static) nowait
            for (int task = 0; task < B * spans; task++) {
                int b = task / spans, span = task % spans, first = blocks * span / spans, last = blocks * (span + 1) / spans;
                int s0 = c * SCAN_CHUNK, s1 = min_int(s0 + SCAN_CHUNK, L);
                for (int block = first; block < last; block++) {
                    int d = block * SCAN_LANES, lanes = min_int(SCAN_LANES, D - d), whole = N == 16 && lanes == SCAN_LANES;
                    const float *h = states + (((size_t)b * chunks + c) * blocks + block) * state;
                    float *k = carry + ((size_t)b * blocks + block) * carried;
                    if (whole && block == first) scan_backward_block(&p, k, work, h, b, d, s0, s1, 16, SCAN_LANES, 1);
                    else if (whole) scan_backward_block(&p, k, work, h, b, d, s0, s1, 16, SCAN_LANES, 0);
                    else scan_backward_block(&p, k, work, h, b, d, s0, s1, N, lanes, block == first);
                }
                // 2N sums over 16 lanes, by adding neighbours four times: 32 N numbers become 16 N, 8 N, 4 N, 2 N
                for (int s = s0; s < s1; s++) {
                    float *v = work + ((s - s0) * 4 + 2) * state;
                    for (size_t left = pair * SCAN_LANES / 2; left >= pair; left /= 2)
                        #pragma omp simd
                        for (size_t m = 0; m < left; m++) v[m] = v[2 * m] + v[2 * m + 1];
                    memcpy(partial + (clip_row(&p, b, s) * spans + span) * pair, v, pair * sizeof(float));
                }
            }
        }
        free(work);
    }
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < B * L; r++)
        for (int n = 0; n < N; n++) {
            const float *from = partial + (size_t)r * spans * pair + n;
            float sum_B = 0.0f, sum_C = 0.0f;
            for (int span = 0; span < spans; span++) sum_B += from[span * pair], sum_C += from[span * pair + N];
            dBt[(size_t)r * lddbc + n] = sum_B;
            dCt[(size_t)r * lddbc + n] = sum_C;
        }
    for (int d = 0; d < D; d++)
        for (int b = 0; b < B; b++) {
            const float *dA = carry + ((size_t)b * blocks + d / SCAN_LANES) * carried + state + d % SCAN_LANES;
            for (int n = 0; n < N; n++) dA_log[(size_t)d * N + n] += dA[n * SCAN_LANES] * (p.a[rate_at(d, n, N)] * LN_2);
            dD_skip[d] += dA[state];
        }
    free(partial); free(carry);
    free(p.row); free(p.a);
}

// The step sizes, from a few numbers a token: dt (rows, D) = softplus(F.linear(delta, weight, bias)). delta (rows, ld), of
// which R columns are read; weight (D, R); bias (D). A row is finished while it is in L1.
static void dt_forward(float *dt, const float *delta, int ld, const float *weight, const float *bias, int rows, int D, int R) {
    float *columns = taps_first(weight, D, R, 0);  // of weight, as rows
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *x = delta + (size_t)r * ld; float *RESTRICT v = dt + (size_t)r * D;
        memcpy(v, bias, (size_t)D * sizeof(float));
        for (int k = 0; k < R; k++)
            #pragma omp simd
            for (int d = 0; d < D; d++) v[d] += x[k] * columns[(size_t)k * D + d];
        #pragma omp simd
        for (int d = 0; d < D; d++) v[d] = softplus_simd(v[d]);
    }
    free(columns);
}

// ddt (rows, D) becomes the gradient before softplus, which dt tells: softplus'(v) = sigmoid(v) = 1 - e^-softplus(v).
// dbias (D) += its column sums. The gradients of delta and weight are products with it.
static void dt_backward(float *ddt, float *dbias, const float *dt, int rows, int D) {
    float *partial = slices_alloc((size_t)D);  // (SLICES, D)
    #pragma omp parallel for schedule(static)
    for (int s = 0; s < SLICES; s++)
        for (size_t r = slice_start((size_t)rows, s); r < slice_start((size_t)rows, s + 1); r++) {
            const float *y = dt + r * D; float *dy = ddt + r * D, *sum = partial + (size_t)s * D;
            #pragma omp simd
            for (int d = 0; d < D; d++) dy[d] *= 1.0f - exp_simd(-y[d]), sum[d] += dy[d];
        }
    slices_sum(partial, (size_t)D);
    for (int d = 0; d < D; d++) dbias[d] += partial[d];
    free(partial);
}

// gated (rows, D) = scale * y * SiLU(z), scale = 1 / number of directions: y (rows, D), z the second half of xz's rows (rows, 2D)
static void gate_forward(float *gated, const float *y, const float *xz, float scale, int rows, int D) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *z = xz + (size_t)r * 2 * D + D, *yr = y + (size_t)r * D; float *o = gated + (size_t)r * D;
        #pragma omp simd
        for (int d = 0; d < D; d++) o[d] = scale * yr[d] * silu_simd(z[d]);
    }
}

// gated again; dy = dgated * SiLU(z) * scale (dy may be dgated); dz = dgated * y * SiLU'(z) * scale, second half of dxz's rows;
// shapes as in forward
static void gate_backward(float *gated, float *dy, float *dxz, const float *dgated, const float *y, const float *xz,
                          float scale, int rows, int D) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *z = xz + (size_t)r * 2 * D + D, *yr = y + (size_t)r * D, *dg = dgated + (size_t)r * D;
        float *dz = dxz + (size_t)r * 2 * D + D, *d_y = dy + (size_t)r * D, *o = gated + (size_t)r * D;
        #pragma omp simd
        for (int d = 0; d < D; d++) {
            float d_gated = dg[d] * scale, silu = silu_simd(z[d]);
            o[d] = scale * yr[d] * silu;
            dz[d] = d_gated * yr[d] * silu_grad_simd(z[d]);
            d_y[d] = d_gated * silu;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 9 BILINEAR UPSAMPLING
//
// F.interpolate(mode="bilinear", align_corners=False): output pixel o reads at (o + 0.5) * in/out - 0.5 of the input.

// the two source pixels and the weight of the second one; positions before the first pixel count as the first
HOST_DEVICE static void bilinear_taps(int *i0, int *i1, float *w1, int o, int in, int out) {
    double source = (o + 0.5) * ((double)in / out) - 0.5;
    source = source < 0.0 ? 0.0 : source;
    *i0 = min_int((int)source, in - 1); *i1 = min_int(*i0 + 1, in - 1);
    *w1 = (float)(source - *i0);
}

// Row oy of one upsampled frame: out (OW, C) [+]= ..., inp (H, W, C), tmp W*C floats. First the two source rows are mixed,
// then along the row the two source pixels.
static void bilinear_row(float *out, float *tmp, const float *inp, int H, int W, int OH, int OW, int C, int oy,
                         int accumulate) {
    int y0, y1, x0, x1; float wy, wx;
    bilinear_taps(&y0, &y1, &wy, oy, H, OH);
    const float *r0 = inp + (size_t)y0 * W * C, *r1 = inp + (size_t)y1 * W * C;
    #pragma omp simd
    for (int i = 0; i < W * C; i++) tmp[i] = (1.0f - wy) * r0[i] + wy * r1[i];
    for (int ox = 0; ox < OW; ox++) {
        bilinear_taps(&x0, &x1, &wx, ox, W, OW);
        const float *a = tmp + (size_t)x0 * C, *b = tmp + (size_t)x1 * C; float *o = out + (size_t)ox * C;
        #pragma omp simd
        for (int c = 0; c < C; c++) o[c] = (accumulate ? o[c] : 0.0f) + (1.0f - wx) * a[c] + wx * b[c];
    }
}

// out (N, OH, OW, C) [+]= inp (N, H, W, C) upsampled (or shrunk, without antialiasing)
static void bilinear_forward(float *out, const float *inp, int N, int H, int W, int OH, int OW, int C, int accumulate) {
    #pragma omp parallel
    {
        float *tmp = malloc_floats((size_t)W * C);
        #pragma omp for schedule(static)
        for (int row = 0; row < N * OH; row++)
            bilinear_row(out + (size_t)row * OW * C, tmp, inp + (size_t)(row / OH) * H * W * C, H, W, OH, OW, C, row % OH,
                         accumulate);
        free(tmp);
    }
}

// out (N, OH, OW, C) += three maps (N, heights[i], widths[i], C), each upsampled
static void bilinear_add3(float *out, const float *a, const float *b, const float *c, const int heights[3],
                          const int widths[3], int N, int OH, int OW, int C) {
    const float *const maps[3] = {a, b, c};
    #pragma omp parallel
    {
        float *tmp = malloc_floats((size_t)OW * C);
        #pragma omp for schedule(static)
        for (int row = 0; row < N * OH; row++)
            for (int i = 0; i < 3; i++) {
                const float *from = maps[i] + (size_t)(row / OH) * heights[i] * widths[i] * C;
                bilinear_row(out + (size_t)row * OW * C, tmp, from, heights[i], widths[i], OH, OW, C, row % OH, 1);
            }
        free(tmp);
    }
}

// dinp (N, H, W, C) from dout (N, OH, OW, C): the transpose, axis by axis. Each output pixel's gradient goes to its two source
// pixels along the row, then each source row gathers the output rows that read it.
static void bilinear_backward(float *dinp, const float *dout, int N, int H, int W, int OH, int OW, int C) {
    float *drows = malloc_floats((size_t)N * OH * W * C);  // (N, OH, W, C)
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < N * OH; row++) {
        float *d = drows + (size_t)row * W * C, wx; memset(d, 0, sizeof(float) * (size_t)W * C);
        for (int ox = 0, x0, x1; ox < OW; ox++) {
            bilinear_taps(&x0, &x1, &wx, ox, W, OW);
            const float *dy = dout + ((size_t)row * OW + ox) * C;
            float *a = d + (size_t)x0 * C, *b = d + (size_t)x1 * C;  // at the right edge the same pixel: two loops
            #pragma omp simd
            for (int c = 0; c < C; c++) a[c] += (1.0f - wx) * dy[c];
            #pragma omp simd
            for (int c = 0; c < C; c++) b[c] += wx * dy[c];
        }
    }
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < N * H; row++) {
        float *d = dinp + (size_t)row * W * C, wy; memset(d, 0, sizeof(float) * (size_t)W * C);
        for (int oy = 0, y0, y1; oy < OH; oy++) {
            bilinear_taps(&y0, &y1, &wy, oy, H, OH);
            const float *from = drows + ((size_t)(row / H) * OH + oy) * W * C;
            float weight = (y0 == row % H ? 1.0f - wy : 0.0f) + (y1 == row % H ? wy : 0.0f);
            if (weight == 0.0f) continue;
            #pragma omp simd
            for (int i = 0; i < W * C; i++) d[i] += weight * from[i];
        }
    }
    free(drows);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 BATCH NORM AND THE SEGMENTATION HEAD

// Mean and variance (biased) of every channel over rows: inp (rows, C). The mean first, then the squares of the differences
// from it, so large means cost no digits.
static void batchnorm_statistics(float *mean, float *var, const float *inp, size_t rows, int C) {
    float *squares = slices_alloc((size_t)C);  // (SLICES, C)
    memset(mean, 0, (size_t)C * sizeof(float));
    add_column_sums(mean, inp, (int)rows, C);
    for (int c = 0; c < C; c++) mean[c] /= (float)rows;
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *RESTRICT q = squares + (size_t)slice * C;
        for (size_t r = slice_start(rows, slice); r < slice_start(rows, slice + 1); r++)
            #pragma omp simd
            for (int c = 0; c < C; c++) q[c] += (inp[r * C + c] - mean[c]) * (inp[r * C + c] - mean[c]);
    }
    slices_sum(squares, (size_t)C);
    for (int c = 0; c < C; c++) var[c] = squares[c] / (float)rows;
    free(squares);
}

// Dropout's factor of one element: 0 or 1/(1-p), from a counter
HOST_DEVICE static inline float dropout_factor(uint64_t key, uint64_t i, float p) {
    return rng_uniform(key, i) < p ? 0.0f : 1.0f / (1.0f - p);
}

// Batch norm's four vectors (E) for this pass, map*scale + shift = gamma (map - mean) rstd + beta. In training mean and
// rstd hold the batch's mean and biased variance on entry and move the running ones, the variance by its unbiased value.
// nn.BatchNorm2d's defaults: eps = 1e-5, momentum = 0.1.
static void batchnorm_vectors(float *mean, float *rstd, float *scale, float *shift, float *running_mean, float *running_var,
                              const float *gamma, const float *beta, size_t rows, int E, int training) {
    float unbiased = (float)((double)rows / (double)(rows > 1 ? rows - 1 : 1));
    for (int e = 0; e < E; e++) {
        float m = training ? mean[e] : running_mean[e], var = training ? rstd[e] : running_var[e];
        if (training) {
            running_mean[e] += 0.1f * (m - running_mean[e]);
            running_var[e] += 0.1f * (var * unbiased - running_var[e]);
        }
        mean[e] = m, rstd[e] = 1.0f / sqrtf(var + 1e-5f);
        scale[e] = gamma[e] * rstd[e], shift[e] = beta[e] - m * scale[e];
    }
}

// low (rows) = w_out . Dropout(ReLU(BatchNorm(map))) + b_out, one frame: map (rows, E); scale, shift (E) are batch norm
// folded: bn = map*scale + shift. first is the index of the frame's first element, for dropout; p = 0 switches it off.
static void head_forward(float *low, const float *map, const float *scale, const float *shift, const float *w_out,
                         const float *b_out, int rows, int E, uint64_t key, uint64_t first, float p) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const float *x = map + (size_t)r * E;
        uint64_t i = first + (uint64_t)r * (uint64_t)E; float sum = 0.0f;
        #pragma omp simd reduction(+ : sum)
        for (int e = 0; e < E; e++) {
            float bn = x[e] * scale[e] + shift[e], relu = bn > 0.0f ? bn : 0.0f * bn;  // 0*bn keeps NaN
            sum += relu * dropout_factor(key, i + (uint64_t)e, p) * w_out[e];
        }
        low[r] = sum + b_out[0];
    }
}

// Sums over one frame for the head's backward, added to dw_out, dgamma, dbeta (E) and db_out (1). With n = (map - mean)
// rstd and dbn = dlow * w_out * dropout where bn > 0:  dgamma += sum dbn n;  dbeta += sum dbn;  dw_out += sum dlow relu
static void head_backward_params(float *dw_out, float *db_out, float *dgamma, float *dbeta, const float *dlow,
                                 const float *map, const float *mean, const float *rstd, const float *scale,
                                 const float *shift, const float *w_out, int rows, int E, uint64_t key, uint64_t first,
                                 float p) {
    size_t sums = (size_t)3 * E + 1;
    float *partial = slices_alloc(sums);  // (SLICES, {dw_out, dgamma, dbeta} of E, db_out)
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        float *RESTRICT dw = partial + (size_t)slice * sums, *RESTRICT dg = dw + E, *RESTRICT db = dg + E;
        for (size_t r = slice_start((size_t)rows, slice); r < slice_start((size_t)rows, slice + 1); r++) {
            const float *x = map + r * E;
            #pragma omp simd
            for (int e = 0; e < E; e++) {
                float bn = x[e] * scale[e] + shift[e], on = bn > 0.0f ? 1.0f : 0.0f;
                float d = dlow[r] * dropout_factor(key, first + r * (uint64_t)E + (uint64_t)e, p);
                dw[e] += d * on * bn; dg[e] += d * on * w_out[e] * (x[e] - mean[e]) * rstd[e];
                db[e] += d * on * w_out[e];
            }
            dw[3 * E] += dlow[r];
        }
    }
    slices_sum(partial, sums);
    for (int e = 0; e < E; e++) dw_out[e] += partial[e], dgamma[e] += partial[E + e], dbeta[e] += partial[2 * E + e];
    db_out[0] += partial[3 * E];
    free(partial);
}

// Batch norm's input gradient of one frame, in place of map: with the sums over all n rows of the batch,
//   dmap = gamma rstd (dbn - dbeta/n - (map - mean) rstd dgamma/n)
// dlow == NULL: a frame without loss (dbn = 0), which batch norm's statistics tie to the others.
static void head_backward_map(float *map, const float *dlow, const float *dgamma, const float *dbeta, const float *mean,
                              const float *rstd, const float *scale, const float *shift, const float *w_out,
                              int rows, int E, double n, uint64_t key, uint64_t first, float p) {
    #pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        float *RESTRICT x = map + (size_t)r * E, inverse = (float)(1.0 / n), dl = dlow ? dlow[r] : 0.0f;
        #pragma omp simd
        for (int e = 0; e < E; e++) {
            float d = dl * dropout_factor(key, first + (uint64_t)r * (uint64_t)E + (uint64_t)e, p);
            float dbn = x[e] * scale[e] + shift[e] > 0.0f ? d * w_out[e] : 0.0f;
            x[e] = scale[e] * (dbn - (dbeta[e] + (x[e] - mean[e]) * rstd[e] * dgamma[e]) * inverse);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 11 LOSSES OF MASK AND BOUNDARY, ADAM
//
// L_seg = BCE + weighted IoU of the target frames: logits s, mask m (B, H, W), m in [0, 1]. Per frame, with p = sigmoid(s):
//   weight = 1 + 5 |avgpool31(mask) - mask|                  zero padding, always divided by 31*31
//   bce    = mean over all pixels of the batch of  max(s, 0) - s m + log(1 + e^-|s|)
//            (weighted: sum(weight bce)/sum(weight) per frame; the released code means this but computes the plain mean)
//   iou    = 1 - (I + 1)/(U - I + 1),   I = sum(weight p m),  U = sum(weight (p + m))
// and the mean of bce + iou over the frames.

enum { POOL = 31 };

// weight (H, W) of one frame, by running sums along columns, then along rows
static void segloss_weight(float *weight, const float *mask, int H, int W) {
    double *column = (double *)calloc_check((size_t)W, sizeof(double));  // sums of mask over the window's rows
    for (int y = -POOL / 2; y < H; y++) {  // rows -15 .. -1 only fill the window
        double sum = 0.0; int enters = y + POOL / 2, leaves = y - POOL / 2 - 1;
        for (int x = 0; x < W; x++) {
            if (enters < H) column[x] += (double)mask[(size_t)enters * W + x];
            if (leaves >= 0) column[x] -= (double)mask[(size_t)leaves * W + x];
        }
        for (int x = -POOL / 2; x < W && y >= 0; x++) {
            size_t i = (size_t)y * W + (size_t)x;
            if (x + POOL / 2 < W) sum += column[x + POOL / 2];
            if (x - POOL / 2 - 1 >= 0) sum -= column[x - POOL / 2 - 1];
            if (x >= 0) weight[i] = 1.0f + 5.0f * fabsf((float)(sum / (POOL * POOL)) - mask[i]);
        }
    }
    free(column);
}

// Returns the loss. logits, mask (B, H, W); weight (B, H, W) and sums (B, 3) = {I, U, sum of weights} are kept for backward.
static double segloss_forward(float *weight, double *sums, const float *logits, const float *mask, int B, int H, int W,
                              int weighted) {
    size_t n = (size_t)H * W;
    double *loss = (double *)malloc_check(sizeof(double) * (size_t)B), total = 0.0;
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++) {
        const float *s = logits + (size_t)b * n, *m = mask + (size_t)b * n; float *w = weight + (size_t)b * n;
        double inter = 0.0, both = 0.0, all = 0.0, bce = 0.0, wbce = 0.0;
        segloss_weight(w, m, H, W);
        for (size_t i = 0; i < n; i++) {
            float p = sigmoid_simd(s[i]), e = softplus_simd(s[i]) - s[i] * m[i];
            inter += (double)(w[i] * p * m[i]); both += (double)(w[i] * (p + m[i]));
            all += (double)w[i]; bce += (double)e;
            wbce += (double)(w[i] * e);
        }
        sums[3 * b] = inter, sums[3 * b + 1] = both, sums[3 * b + 2] = all;
        loss[b] = (weighted ? wbce / all : bce / (double)n) + 1.0 - (inter + 1.0) / (both - inter + 1.0);
    }
    for (int b = 0; b < B; b++) total += loss[b];
    free(loss);
    return total / B;
}

// d bce / ds = p - m;  d iou / dp = -weight (m (U - I + 1) - (I + 1)(1 - m)) / (U - I + 1)^2,  dp / ds = p (1 - p)
static void segloss_backward(float *dlogits, const float *weight, const double *sums, const float *logits, const float *mask,
                             int B, int H, int W, int weighted) {
    int n = H * W;
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < B; b++) {
        const float *s = logits + (size_t)b * n, *m = mask + (size_t)b * n, *w = weight + (size_t)b * n;
        double I = sums[3 * b] + 1.0, U = sums[3 * b + 1] - sums[3 * b] + 1.0;
        float per_pixel = (float)(1.0 / ((double)B * n)), per_weight = (float)(1.0 / (B * sums[3 * b + 2]));
        float on_mask = (float)(-1.0 / U / B), off_mask = (float)(I / (U * U) / B), *d = dlogits + (size_t)b * n;
        #pragma omp simd
        for (int i = 0; i < n; i++) {
            float p = sigmoid_simd(s[i]);
            d[i] = (p - m[i]) * (weighted ? per_weight * w[i] : per_pixel)
                 + w[i] * (m[i] * on_mask + (1.0f - m[i]) * off_mask) * p * (1.0f - p);
        }
    }
}

// The boundary of a mask: edge (N, H, W) is 1 where |Gx| + |Gy| > 0, else 0, with Sobel's Gx, Gy of mask > 0.5 (N, H, W).
// Pixels outside the image repeat the border, so a mask that runs out of the image has no edge there.
static void sobel_edges(float *edge, const float *mask, int N, int H, int W) {
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < N * H; row++) {
        int y = row % H; size_t at = (size_t)row * W;
        const float *here = mask + at, *above = y > 0 ? here - W : here, *below = y + 1 < H ? here + W : here;
        for (int x = 0; x < W; x++) {
            int l = max_int(x - 1, 0), r = min_int(x + 1, W - 1);
            int Gx = (above[r] > 0.5f) + 2 * (here[r] > 0.5f) + (below[r] > 0.5f)
                   - (above[l] > 0.5f) - 2 * (here[l] > 0.5f) - (below[l] > 0.5f);
            int Gy = (below[l] > 0.5f) + 2 * (below[x] > 0.5f) + (below[r] > 0.5f)
                   - (above[l] > 0.5f) - 2 * (above[x] > 0.5f) - (above[r] > 0.5f);
            edge[at + x] = Gx != 0 || Gy != 0 ? 1.0f : 0.0f;
        }
    }
}

// L_bce, the cross-entropy of the boundary, balanced: there are far more pixels off an edge than on it. Of n pixels, n1 on
// an edge, those weigh (n - n1)/n each and the others n1/n:
//   L_bce = ((n - n1)/n sum_on log(1 + e^-s) + n1/n sum_off log(1 + e^s)) / n
// logits s, edge (n). Returns the loss; *on = n1 is kept for backward. With several ranks n, n1 and the sums are the whole
// batch's, and *on is n1's mean over ranks: backward's gradients, averaged over ranks, are then the whole batch's.
static double edgeloss_forward(double *on, const float *logits, const float *edge, size_t n) {
    double partial[SLICES][3], sum[3] = {0, 0, 0};  // n1, sum_on, sum_off
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++) {
        double count = 0, sum_on = 0, sum_off = 0;
        #pragma omp simd reduction(+ : count, sum_on, sum_off)
        for (size_t i = slice_start(n, slice); i < slice_start(n, slice + 1); i++) {
            float e = edge[i], loss = softplus_simd(logits[i]) - e * logits[i];  // log(1 + e^-s) = log(1 + e^s) - s
            count += (double)e; sum_on += (double)(e * loss); sum_off += (double)((1.0f - e) * loss);
        }
        partial[slice][0] = count, partial[slice][1] = sum_on, partial[slice][2] = sum_off;
    }
    for (int i = 0; i < SLICES; i++)
        for (int k = 0; k < 3; k++) sum[k] += partial[i][k];
    parallel_sum(sum, 3);
    double ranks = parallel.ranks, all = (double)n * ranks;
    *on = sum[0] / ranks;
    return (all - sum[0]) / all * sum[1] / all + sum[0] / all * sum[2] / all;
}

// d log(1 + e^-s)/ds = p - 1 and d log(1 + e^s)/ds = p, p = sigmoid(s): together p - edge
static void edgeloss_backward(float *dlogits, double on, const float *logits, const float *edge, size_t n) {
    float weight_on = (float)(((double)n - on) / (double)n / (double)n), weight_off = (float)(on / (double)n / (double)n);
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++)
        dlogits[i] = (edge[i] > 0.5f ? weight_on : weight_off) * (sigmoid_simd(logits[i]) - edge[i]);
}

// ---- The operations of the affine constraint (section 13): patches of q x q, rows and columns from the top left, what is left
// over belongs to none

// how many patches B maps of H x W have
static int patches_of(int B, int H, int W, int q) { return B * (H / q) * (W / q); }

// where row y of patch i begins in (B, H, W)
HOST_DEVICE static inline size_t patch_row(int i, int y, int H, int W, int q) {
    int rows = H / q, columns = W / q;
    return ((size_t)(i / (rows * columns)) * H + (size_t)(i / columns % rows) * q + y) * W + (size_t)(i % columns) * q;
}

// Of the n patches of a batch: pairs (2n, 2, q^2), the true boundary - n of the target frames, then n of the first frames -
// and sigmoid(logits). weight (n) = 1 / (B N_p); 0 where both true patches are empty; N_p: the clip's patches that are not.
static void patches_forward(float *pairs, float *weight, const float *logits, const float *edge, const float *first_edge,
                            int B, int H, int W, int q) {
    int n = patches_of(B, H, W, q); size_t q2 = (size_t)q * q;
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++) {
        float *of_target = pairs + i * 2 * q2, *of_first = of_target + n * 2 * q2, on = 0.0f;
        for (int y = 0; y < q; y++, of_target += q, of_first += q)
            for (int x = 0; x < q; x++) {
                size_t pixel = patch_row(i, y, H, W, q) + (size_t)x;
                of_target[x] = edge[pixel], of_first[x] = first_edge[pixel], on += edge[pixel] + first_edge[pixel];
                of_target[q2 + x] = of_first[q2 + x] = sigmoid_simd(logits[pixel]);
            }
        weight[i] = on > 0.0f ? 1.0f : 0.0f;
    }
    for (int b = 0; b < B; b++) {
        float *of_clip = weight + b * (n / B), count = 0.0f;
        for (int i = 0; i < n / B; i++) count += of_clip[i];
        for (int i = 0; i < n / B; i++) of_clip[i] /= (float)B * (count > 0.0f ? count : 1.0f);
    }
}

// dlogits (B, H, W) = p (1 - p) (sum of both pairs' gradients of p): dsecond (2n, q^2), pairs as above; 0 in no patch
static void patches_backward(float *dlogits, const float *dsecond, const float *pairs, int B, int H, int W, int q) {
    int n = patches_of(B, H, W, q); size_t q2 = (size_t)q * q;
    zero_floats(dlogits, (size_t)B * H * W);
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++)
        for (int y = 0; y < q; y++) {
            const float *d = dsecond + i * q2 + (size_t)y * q, *p = pairs + i * 2 * q2 + q2 + (size_t)y * q;
            float *to = dlogits + patch_row(i, y, H, W, q);
            for (int x = 0; x < q; x++) to[x] = (d[x] + d[n * q2 + x]) * p[x] * (1.0f - p[x]);
        }
}

HOST_DEVICE static double norm6(const float *x) {
    double sum = 0;
    for (int i = 0; i < 6; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// *target = sum_i weight[i] ||out_i||, *first the same of out_(n+i): out (2n, 6), weight (n)
static void norms_forward(double *target, double *first, const float *out, const float *weight, int n) {
    *target = *first = 0.0;
    for (int i = 0; i < n; i++) {
        *target += (double)weight[i] * norm6(out + 6 * i);
        *first += (double)weight[i] * norm6(out + 6 * (n + i));
    }
}

// out becomes its own gradient: d||x||/dx = x/||x||, and 0 at 0
static void norms_backward(float *out, double d_target, double d_first, const float *weight, int n) {
    for (int i = 0; i < 2 * n; i++) {
        double norm = norm6(out + 6 * i), d = (i < n ? d_target : d_first) * (double)weight[i % n];
        for (int k = 0; k < 6; k++) out[6 * i + k] *= norm == 0.0 ? 0.0f : (float)(d / norm);
    }
}

// x = scale (x + y), n elements; y may be NULL
static void scaled_sum(float *x, const float *y, float scale, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) x[i] = scale * (x[i] + (y ? y[i] : 0.0f));
}

// 0*x is 0 for a finite x and NaN for infinity and NaN, and a NaN stays in the sum
static int all_finite(const float *x, size_t n) {
    float sum = 0.0f;
    #pragma omp parallel for simd schedule(static) reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += 0.0f * x[i];
    return sum == 0.0f;
}

// torch.optim.Adam without weight decay: n parameters, step counts from 1
static void adam_update(float *params, const float *grads, float *m, float *v, size_t n, double lr, double beta1,
                        double beta2, double eps, int64_t step) {
    float b1 = (float)beta1, b2 = (float)beta2, one_b1 = (float)(1.0 - beta1), one_b2 = (float)(1.0 - beta2), e = (float)eps;
    float rate = (float)(lr / (1.0 - pow(beta1, (double)step)));
    float correct = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)step)));
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        float g = grads[i];
        m[i] = b1 * m[i] + one_b1 * g;
        v[i] = b2 * v[i] + one_b2 * g * g;
        params[i] -= rate * m[i] / (sqrtf(v[i]) * correct + e);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 12 THE MODEL

typedef struct {
    char name[16];
    int dims[4], depths[4], heads[4], reductions[4], mamba_depths[4];  // of the four stages
    int decoder_dim;                                                   // E
    int d_state, d_conv, expand;                                       // N, K, D/C of the Mamba layers
    char scans[4];    // directions: a subset of "fbs"
    int edge_layers;  // of the boundary head: 3 (the paper's), 1 (the released code's), 0 (none)
    int plain_dt;     // 1: initialise dt's projection as the released Vivim does (normal, bias 0), not as Mamba does
} Config;

#define MIT(name, c0, c1, c2, c3, d0, d1, d2, d3, E) \
    { name, {c0, c1, c2, c3}, {d0, d1, d2, d3}, {1, 2, 5, 8}, {8, 4, 2, 1}, {2, 2, 2, 2}, E, 16, 4, 2, "fbs", 3, 0 }
static const Config CONFIGS[] = {
    { "tiny", {16, 32, 40, 64}, {1, 1, 2, 1}, {1, 2, 5, 8}, {8, 4, 2, 1}, {1, 2, 1, 1}, 32, 16, 4, 2, "fbs", 3, 0 },  // demo
    MIT("b0", 32, 64, 160, 256, 2, 2, 2, 2, 256),  MIT("b1", 64, 128, 320, 512, 2, 2, 2, 2, 256),
    MIT("b2", 64, 128, 320, 512, 3, 4, 6, 3, 768), MIT("b3", 64, 128, 320, 512, 3, 4, 18, 3, 768),  // b3: the paper's
    MIT("b4", 64, 128, 320, 512, 3, 8, 27, 3, 768), MIT("b5", 64, 128, 320, 512, 3, 6, 40, 3, 768),
};
#undef MIT

enum Init { INIT_UNUSED, INIT_CONSTANT, INIT_NORMAL, INIT_UNIFORM, INIT_A_LOG, INIT_DT_BIAS };

// One row per tensor: it serves allocation, initialisation, checkpoints and tests.
typedef struct {
    char name[128];                 // the released Vivim's state_dict key
    int ndim, shape[5], is_buffer;  // saved but not trained: batch norm's running statistics, tensors nobody reads
    int init;
    double init_scale;              // the constant, the standard deviation, or the bound of the uniform distribution
    size_t offset, numel;           // in floats, inside Model.params (or Model.buffers)
} Tensor;

typedef struct { size_t weight, bias; } Layer;  // offsets of a layer's two tensors
typedef struct { size_t A_log, D, x_proj; Layer conv, dt_proj; } Direction;  // the tensors of one direction of ST-Mamba

// A stage is a patch embedding and a list of sublayers x = x + F(LN(x)). F is one of:
enum { ATTENTION, MIX_FFN, ST_MAMBA, DSF };

typedef struct {
    int kind, drop_index;  // drop_index: number of the SegFormer block over all stages, for drop path
    Layer norm;
    Layer query, key, value, sr, sr_norm, proj;  // ATTENTION
    Layer fc1, dwconv, fc2;                      // MIX_FFN, DSF
    size_t in_proj, out_proj;                    // ST_MAMBA
    Direction scan[3];
    // kept by forward for backward (in evaluation they live in scratch memory, for the length of the sublayer only)
    floatX *x; float *mean, *rstd;               // input (rows, C), its layer norm's statistics
    floatX *q, *att, *sr_out, *kv, *k, *v; float *sr_mean, *sr_rstd;  // (rows, C); on the reduced grid (rows_k, C), (rows_k)
    floatX *h1, *h2;                             // (rows, 4C) before and after the depthwise convolution; h2 for backward only
    floatX *xz, *y, *x_dbl[3]; float *states[3]; // (rows, 2D), sum of the scans (rows, D), (rows, x_dbl_row), checkpoints
} Sublayer;

typedef struct {
    int C, H, W, P, C_in, H_in, W_in;  // of its features and of its input
    int heads, reduction, kernel, stride, num_sublayers, first_sublayer;
    Layer patch, patch_norm, linear_c;
    floatX *embed; float *mean, *rstd; // convolution's output (rows, C) before its layer norm
    const floatX *inp;                 // (B*T, H_in, W_in, C_in): the images or the stage before
    floatX *out;                       // (rows, C)
} Stage;

typedef struct {
    Config config;
    Tensor *tensors;
    int num_tensors, num_sublayers, num_blocks;
    size_t num_params, num_buffers;
    float *params, *grads, *adam_m, *adam_v, *buffers;  // grads and Adam's moments exist once training was planned
    floatX *weights;                                    // params as the products of matrices read them
    int64_t step, batches_tracked;                      // optimiser steps done; batch norm updates
    uint64_t seed;
    float drop_path, dropout;                           // 0.1 in training; tests set 0
    int weighted_bce, local_bn;                         // local_bn: batch norm's statistics are those of a rank's own clips
    Stage stages[4];
    Sublayer *sublayers;
    size_t fuse, out_weight, out_bias, running_mean, running_var;
    Layer batch_norm, edge[3];  // edge: the boundary head's layers, the last one edge[edge_layers - 1]
    // the plan: sizes of a batch and what to compute
    int B, T, H, W, training, all_frames;  // all_frames: logits of every frame, else of the target frames T/2 only
    int planning;                          // the planning pass takes memory (all pointers are NULL) and computes nothing
    size_t kept_planned, scratch_planned;  // bytes that it found
    Arena kept, scratch;                   // what backward needs; what lives inside one function
    floatX *folded[4], *folded_bias, *map; // (E, C_i), (E): decoder matrices of this step; (B*T*P, E)
    float *bn_mean, *bn_rstd, *bn_scale, *bn_shift;  // (E)
    float *low, *logits;                   // (frames, P), (frames, H, W), frames = all_frames ? B*T : B
    floatX *edge_h[2]; float *edge_low, *edge_logits;  // in training: (frames, P1, C1), (frames, P1), (frames, H, W)
} Model;

// Appends the row prefix+name+suffix to the table and returns the tensor's offset. Unused dimensions are 0.
static size_t add_tensor(Model *m, int init, double scale, const char *prefix, const char *name, const char *suffix,
                         int ndim, int s0, int s1, int s2, int s3, int s4) {
    m->tensors = (Tensor *)realloc(m->tensors, sizeof(Tensor) * (size_t)(m->num_tensors + 1));
    if (m->tensors == NULL) out_of_memory(sizeof(Tensor) * (double)(m->num_tensors + 1));
    Tensor *t = &m->tensors[m->num_tensors++]; memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s%s%s", prefix, name, suffix);
    t->ndim = ndim, t->init = init, t->init_scale = scale, t->numel = 1;
    t->shape[0] = s0, t->shape[1] = s1, t->shape[2] = s2, t->shape[3] = s3, t->shape[4] = s4;
    t->is_buffer = init == INIT_UNUSED || strstr(name, "running_") != NULL;
    for (int i = 0; i < ndim; i++) t->numel *= (size_t)t->shape[i];
    size_t *total = t->is_buffer ? &m->num_buffers : &m->num_params;
    t->offset = *total;
    *total += t->numel;
    return t->offset;
}

static float *tensor_data(const Model *m, const Tensor *t) { return (t->is_buffer ? m->buffers : m->params) + t->offset; }

// layer norm or batch norm: weight 1, bias 0
static Layer add_norm(Model *m, const char *prefix, const char *name, int C) {
    Layer layer;
    layer.weight = add_tensor(m, INIT_CONSTANT, 1.0, prefix, name, ".weight", 1, C, 0, 0, 0, 0);
    layer.bias = add_tensor(m, INIT_CONSTANT, 0.0, prefix, name, ".bias", 1, C, 0, 0, 0, 0);
    return layer;
}

// A linear layer (ndim 2) or a convolution (ndim 3, 4, 5; kernel k in every axis). INIT_NORMAL: SegFormer's, normal(0, 0.02)
// and bias 0. INIT_UNIFORM: PyTorch's default for convolutions, both uniform within 1/sqrt(fan_in). A linear layer has no k.
static Layer add_layer(Model *m, int init, const char *prefix, const char *name, int ndim, int out, int in, int k) {
    int normal = init == INIT_NORMAL, bias_init = normal ? INIT_CONSTANT : init;
    double bound = 1.0 / sqrt(in * pow(k, ndim - 2));
    Layer layer;
    layer.weight = add_tensor(m, init, normal ? 0.02 : bound, prefix, name, ".weight", ndim, out, in, k, k, k);
    layer.bias = add_tensor(m, bias_init, normal ? 0.0 : bound, prefix, name, ".bias", 1, out, 0, 0, 0, 0);
    return layer;
}

static int dt_rank(int C) { return ceil_div(C, 16); }
static int has_scan(const Config *c, int g) { return strchr(c->scans, "fbs"[g]) != NULL; }

// The sublayers of SegFormer block j of stage i, with the released key names
static void add_segformer_block(Model *m, Sublayer *att, Sublayer *ffn, int i, int j, int drop_index) {
    int C = m->config.dims[i], s = m->config.reductions[i]; char prefix[80];
    snprintf(prefix, sizeof prefix, "encoder.downsample_layers.block.%d.%d.", i, j);
    att->kind = ATTENTION, ffn->kind = MIX_FFN, att->drop_index = ffn->drop_index = drop_index;
    att->norm = add_norm(m, prefix, "layer_norm_1", C);
    att->query = add_layer(m, INIT_NORMAL, prefix, "attention.self.query", 2, C, C, 0);
    att->key = add_layer(m, INIT_NORMAL, prefix, "attention.self.key", 2, C, C, 0);
    att->value = add_layer(m, INIT_NORMAL, prefix, "attention.self.value", 2, C, C, 0);
    if (s > 1) {
        att->sr = add_layer(m, INIT_NORMAL, prefix, "attention.self.sr", 4, C, C, s);
        att->sr_norm = add_norm(m, prefix, "attention.self.layer_norm", C);
    }
    att->proj = add_layer(m, INIT_NORMAL, prefix, "attention.output.dense", 2, C, C, 0);
    ffn->norm = add_norm(m, prefix, "layer_norm_2", C);
    ffn->fc1 = add_layer(m, INIT_NORMAL, prefix, "mlp.dense1", 2, 4 * C, C, 0);
    ffn->dwconv = add_layer(m, INIT_NORMAL, prefix, "mlp.dwconv.dwconv", 4, 4 * C, 1, 3);
    ffn->fc2 = add_layer(m, INIT_NORMAL, prefix, "mlp.dense2", 2, C, 4 * C, 0);
}

// The sublayers of Mamba layer j of stage i. The released names end in "", "_b", "_s": forward, backward, spatial.
static void add_mamba_layer(Model *m, Sublayer *mamba, Sublayer *dsf, int i, int j) {
    static const char *const A_NAME[3] = {"mamba.A_log", "mamba.A_b_log", "mamba.A_s_log"};
    static const char *const SUFFIX[3] = {"", "_b", "_s"};
    const Config *c = &m->config;
    int C = c->dims[i], D = c->expand * C, N = c->d_state, R = dt_rank(C), plain = c->plain_dt;
    char prefix[80], name[32];
    snprintf(prefix, sizeof prefix, "encoder.stages.%d.%d.0.", i, j);
    mamba->kind = ST_MAMBA, dsf->kind = DSF;
    mamba->norm = add_norm(m, prefix, "norm1", C);
    for (int g = 0; g < 3; g++) {
        if (!has_scan(c, g)) continue;
        mamba->scan[g].A_log = add_tensor(m, INIT_A_LOG, 0.0, prefix, A_NAME[g], "", 2, D, N, 0, 0, 0);
        mamba->scan[g].D = add_tensor(m, INIT_CONSTANT, 1.0, prefix, "mamba.D", SUFFIX[g], 1, D, 0, 0, 0, 0);
    }
    mamba->in_proj = add_tensor(m, INIT_NORMAL, 0.02, prefix, "mamba.in_proj", ".weight", 2, 2 * D, C, 0, 0, 0);
    for (int g = 0; g < 3; g++) {
        Direction *scan = &mamba->scan[g];
        if (!has_scan(c, g)) continue;
        snprintf(name, sizeof name, "mamba.conv1d%s", SUFFIX[g]);
        scan->conv = add_layer(m, INIT_UNIFORM, prefix, name, 3, D, 1, c->d_conv);
        snprintf(name, sizeof name, "mamba.x_proj%s", SUFFIX[g]);
        scan->x_proj = add_tensor(m, INIT_NORMAL, 0.02, prefix, name, ".weight", 2, R + 2 * N, D, 0, 0, 0);
        snprintf(name, sizeof name, "mamba.dt_proj%s", SUFFIX[g]);
        int init = plain ? INIT_NORMAL : INIT_UNIFORM, bias_init = plain ? INIT_CONSTANT : INIT_DT_BIAS;
        double scale = plain ? 0.02 : 1.0 / sqrt((double)R);
        scan->dt_proj.weight = add_tensor(m, init, scale, prefix, name, ".weight", 2, D, R, 0, 0, 0);
        scan->dt_proj.bias = add_tensor(m, bias_init, 0.0, prefix, name, ".bias", 1, D, 0, 0, 0, 0);
    }
    mamba->out_proj = add_tensor(m, INIT_NORMAL, 0.02, prefix, "mamba.out_proj", ".weight", 2, C, D, 0, 0, 0);
    dsf->norm = add_norm(m, prefix, "norm2", C);
    dsf->fc1 = add_layer(m, INIT_NORMAL, prefix, "mlp.fc1", 2, 4 * C, C, 0);
    dsf->dwconv = add_layer(m, INIT_UNIFORM, prefix, "mlp.dwconv.dwconv", 5, 4 * C, 1, 3);
    dsf->fc2 = add_layer(m, INIT_NORMAL, prefix, "mlp.fc2", 2, C, 4 * C, 0);
}

// Number k of a tensor's initial values, key its random numbers
static float initial_value(const Tensor *t, uint64_t key, size_t k) {
    switch (t->init) {
    case INIT_NORMAL: return (float)t->init_scale * rng_normal(key, k);
    case INIT_UNIFORM: return (float)t->init_scale * (2.0f * rng_uniform(key, k) - 1.0f);
    case INIT_A_LOG: return logf((float)(k % (size_t)t->shape[1]) + 1.0f);  // A = -1, -2, .. -N
    case INIT_DT_BIAS: {  // softplus(bias) is log-uniform in [0.001, 0.1]
        double dt = exp(log(0.001) + (double)rng_uniform(key, k) * (log(0.1) - log(0.001)));
        return (float)(dt + log(-expm1(-dt)));  // the inverse of softplus
    }
    default: return (float)t->init_scale;
    }
}

// Allocates the parameters of the tensor table and draws their initial values
static void model_allocate(Model *m, uint64_t seed) {
    m->seed = seed;
    m->params = malloc_floats(m->num_params);
    m->weights = (floatX *)(void *)m->params;  // train_vivim.cu has rounded copies, where floatX is not float
    m->buffers = malloc_floats(m->num_buffers);
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i]; uint64_t key = rng_key(seed, RNG_INIT, (uint64_t)i);
        #pragma omp parallel for schedule(static)
        for (size_t k = 0; k < t->numel; k++) tensor_data(m, t)[k] = initial_value(t, key, k);
    }
}

// Builds the tensor table, in the released checkpoints' order, and the parameters
static void model_init(Model *m, const Config *config, uint64_t seed) {
    const Config *c = &m->config; int E = config->decoder_dim;
    char name[64];
    memset(m, 0, sizeof *m);
    m->config = *config;
    m->drop_path = m->dropout = 0.1f;
    for (int i = 0; i < 4; i++) {
        Stage *st = &m->stages[i];
        st->C = c->dims[i], st->C_in = i == 0 ? 3 : c->dims[i - 1];
        st->kernel = i == 0 ? 7 : 3, st->stride = i == 0 ? 4 : 2;
        st->heads = c->heads[i], st->reduction = c->reductions[i];
        st->first_sublayer = m->num_sublayers, st->num_sublayers = 2 * (c->depths[i] + c->mamba_depths[i]);
        m->num_sublayers += st->num_sublayers; m->num_blocks += c->depths[i];
        snprintf(name, sizeof name, "encoder.downsample_layers.patch_embeddings.%d.", i);
        st->patch = add_layer(m, INIT_NORMAL, name, "proj", 4, st->C, st->C_in, st->kernel);
        st->patch_norm = add_norm(m, name, "layer_norm", st->C);
    }
    m->sublayers = (Sublayer *)calloc_check((size_t)m->num_sublayers, sizeof(Sublayer));
    for (int i = 0, block = 0; i < 4; i++) {
        Sublayer *s = m->sublayers + m->stages[i].first_sublayer;
        for (int j = 0; j < c->depths[i]; j++, block++, s += 2) add_segformer_block(m, s, s + 1, i, j, block);
    }
    for (int i = 0; i < 4; i++) {
        Sublayer *s = m->sublayers + m->stages[i].first_sublayer + 2 * c->depths[i];
        for (int j = 0; j < c->mamba_depths[i]; j++, s += 2) add_mamba_layer(m, s, s + 1, i, j);
    }
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "linear_c.%d.proj", i);
        m->stages[i].linear_c = add_layer(m, INIT_NORMAL, "decoder.", name, 2, E, c->dims[i], 0);
    }
    m->fuse = add_tensor(m, INIT_NORMAL, 0.02, "decoder.", "linear_fuse", ".weight", 4, E, 4 * E, 1, 1, 0);
    m->batch_norm = add_norm(m, "decoder.", "batch_norm", E);
    m->running_mean = add_tensor(m, INIT_CONSTANT, 0.0, "decoder.batch_norm.", "running_mean", "", 1, E, 0, 0, 0, 0);
    m->running_var = add_tensor(m, INIT_CONSTANT, 1.0, "decoder.batch_norm.", "running_var", "", 1, E, 0, 0, 0, 0);
    Layer out = add_layer(m, INIT_UNIFORM, "", "out", 4, 1, E, 1);
    m->out_weight = out.weight, m->out_bias = out.bias;
    for (int i = 0; i < c->edge_layers; i++) {
        int last = i == c->edge_layers - 1;
        snprintf(name, sizeof name, c->edge_layers == 1 ? "edgeocr_cls_head" : "edge_head.%d", i);
        m->edge[i] = add_layer(m, INIT_UNIFORM, "", name, 4, last ? 1 : c->dims[0], c->dims[0], last ? 1 : 3);
    }
    // SegFormer's last layer norms and its classifier: in the released checkpoints, read by no forward pass
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "encoder.downsample_layers.layer_norm.%d", i);
        add_tensor(m, INIT_UNUSED, 1.0, name, ".weight", "", 1, c->dims[i], 0, 0, 0, 0);
        add_tensor(m, INIT_UNUSED, 0.0, name, ".bias", "", 1, c->dims[i], 0, 0, 0, 0);
    }
    add_tensor(m, INIT_UNUSED, 0.0, "decoder.", "classifier", ".weight", 4, 150, E, 1, 1, 0);
    add_tensor(m, INIT_UNUSED, 0.0, "decoder.", "classifier", ".bias", 1, 150, 0, 0, 0, 0);
    model_allocate(m, seed);
}

static void model_free(Model *m) {
    free(m->params), free(m->buffers), free(m->grads), free(m->adam_m), free(m->adam_v), free(m->tensors);
    free(m->sublayers), arena_free(&m->kept), arena_free(&m->scratch);
    memset(m, 0, sizeof *m);
}

// Makes room for gradients and Adam's moments, once
static void model_trainable(Model *m) {
    if (m->grads) return;
    m->grads = (float *)calloc_check(m->num_params, sizeof(float));
    m->adam_m = (float *)calloc_check(m->num_params, sizeof(float));
    m->adam_v = (float *)calloc_check(m->num_params, sizeof(float));
}

#endif
#if VIVIM_PART != 1  // the graph: from here to the end of section 13 nothing but operations touches a tensor
#ifndef VIVIM_PART
#include "dev/op_times.h"  // a timer around each operation, which --bench turns on
#endif

#ifndef DECODED_AT_ONCE
#define DECODED_AT_ONCE 1  // frames: of one, the decoder's map may stay in a CPU's cache
#endif

// Every sublayer's F below has the same shape: forward(m, st, s, out, inp, accumulate), backward(m, st, s, dinp, dout, inp),
// all (rows, C) with rows = B*T*P, inp the layer norm's output; accumulate: out += F(inp), else out = F(inp). It takes all its
// memory first; the planning pass ends there.
// And it resets scratch.used at once, though it goes on using the memory: nobody else takes any before it returns.

// Memory for n numbers, of three lives; each for activations and (.._floats) for what is float whatever they are.
// kept: until the next forward pass
static floatX *kept(Model *m, size_t n) { return (floatX *)arena_take(&m->kept, n, sizeof(floatX)); }
static float *kept_floats(Model *m, size_t n) { return (float *)arena_take(&m->kept, n, sizeof(float)); }
// keep: what backward needs: in training until then, in evaluation until the sublayer is done
static Arena *keeper(Model *m) { return m->training ? &m->kept : &m->scratch; }
static floatX *keep(Model *m, size_t n) { return (floatX *)arena_take(keeper(m), n, sizeof(floatX)); }
static float *keep_floats(Model *m, size_t n) { return (float *)arena_take(keeper(m), n, sizeof(float)); }
// scratch: until its function gives it back
static floatX *scratch(Model *m, size_t n) { return (floatX *)arena_take(&m->scratch, n, sizeof(floatX)); }
static float *scratch_floats(Model *m, size_t n) { return (float *)arena_take(&m->scratch, n, sizeof(float)); }

// F.linear and F.layer_norm with a layer's parameters and gradients: out (rows, N), inp (rows, K); inp (rows, C).
// accumulate: out +=, dinp += (inp feeds several layers), else =
static void linear_forward(const Model *m, floatX *out, const floatX *inp, Layer layer, int rows, int N, int K,
                           int accumulate) {
    matmul(out, N, inp, K, 0, m->weights + layer.weight, K, 1, m->weights + layer.bias, rows, N, K, accumulate);
}
static void linear_backward(const Model *m, floatX *dinp, const floatX *dout, const floatX *inp, Layer layer, int rows, int N,
                            int K, int accumulate) {
    matmul(dinp, K, dout, N, 0, m->weights + layer.weight, K, 0, NULL, rows, K, N, accumulate);
    matmul_backward(NULL, m->grads + layer.weight, m->grads + layer.bias, dout, inp, NULL, rows, N, K);
}
static void norm_forward(const Model *m, floatX *out, float *mean, float *rstd, const floatX *inp, Layer layer, int rows,
                         int C) {
    layernorm_forward(out, mean, rstd, inp, m->params + layer.weight, m->params + layer.bias, rows, C);
}
static void norm_backward(const Model *m, floatX *dinp, const floatX *dout, const floatX *dresidual, const floatX *inp,
                          Layer layer, const float *mean, const float *rstd, int rows, int C) {
    layernorm_backward(dinp, m->grads + layer.weight, m->grads + layer.bias, dout, dresidual, inp, m->params + layer.weight,
                       mean, rstd, rows, C);
}

// ---- SegFormer's self-attention. With reduction s > 1 keys and values come from a grid s times smaller in each axis:
//   kv = LN(conv_s(x)) or x;  out = W_o Attention(W_q x + b_q, W_k kv + b_k, W_v kv + b_v) + b_o
static void self_attention_forward(Model *m, const Stage *st, Sublayer *a, floatX *out, const floatX *inp, int accumulate) {
    int C = st->C, N = m->B * m->T, rows = N * st->P, s = st->reduction, Pk = (st->H / s) * (st->W / s), rows_k = N * Pk;
    size_t mark = m->scratch.used, n = (size_t)rows * C, n_k = (size_t)rows_k * C;
    const floatX *w = m->weights, *kv = inp;
    a->q = keep(m, n), a->att = keep(m, n), a->k = keep(m, n_k), a->v = keep(m, n_k);
    if (s > 1) {
        a->sr_out = keep(m, n_k), a->sr_mean = keep_floats(m, (size_t)rows_k), a->sr_rstd = keep_floats(m, (size_t)rows_k);
        kv = a->kv = keep(m, n_k);
    }
    m->scratch.used = mark;
    if (m->planning) return;
    linear_forward(m, a->q, inp, a->query, rows, C, C, 0);
    if (s > 1) {
        conv_forward(a->sr_out, inp, w + a->sr.weight, w + a->sr.bias, N, st->H, st->W, C, C, s, s, 0);
        norm_forward(m, a->kv, a->sr_mean, a->sr_rstd, a->sr_out, a->sr_norm, rows_k, C);
    }
    linear_forward(m, a->k, kv, a->key, rows_k, C, C, 0);
    linear_forward(m, a->v, kv, a->value, rows_k, C, C, 0);
    attention_forward(a->att, a->q, a->k, a->v, N, st->P, Pk, C, st->heads);
    linear_forward(m, out, a->att, a->proj, rows, C, C, accumulate);
}

// From the end to the beginning: datt, dq, dk, dv. dinp sums what comes through keys and values (s > 1: through LN and conv_s;
// else dkv is dinp itself) and through queries
static void self_attention_backward(Model *m, const Stage *st, Sublayer *a, floatX *dinp, const floatX *dout,
                                    const floatX *inp) {
    int C = st->C, N = m->B * m->T, rows = N * st->P, s = st->reduction, Pk = (st->H / s) * (st->W / s), rows_k = N * Pk;
    size_t mark = m->scratch.used, n = (size_t)rows * C, n_k = (size_t)rows_k * C;
    const floatX *w = m->weights, *kv = s > 1 ? a->kv : inp; float *g = m->grads;
    floatX *datt = scratch(m, n), *dq = scratch(m, n), *dk = scratch(m, n_k), *dv = scratch(m, n_k);
    floatX *dkv = s > 1 ? scratch(m, n_k) : dinp;
    m->scratch.used = mark;
    if (m->planning) return;
    linear_backward(m, datt, dout, a->att, a->proj, rows, C, C, 0);
    attention_backward(dq, dk, dv, datt, a->q, a->k, a->v, N, st->P, Pk, C, st->heads);
    linear_backward(m, dkv, dk, kv, a->key, rows_k, C, C, 0);
    linear_backward(m, dkv, dv, kv, a->value, rows_k, C, C, 1);
    if (s > 1) {
        norm_backward(m, dkv, dkv, NULL, a->sr_out, a->sr_norm, a->sr_mean, a->sr_rstd, rows_k, C);
        conv_backward(dinp, g + a->sr.weight, g + a->sr.bias, dkv, inp, w + a->sr.weight, N, st->H, st->W, C, C, s, s, 0);
    }
    linear_backward(m, dinp, dq, inp, a->query, rows, C, C, 1);
}

// ---- The feed-forward networks: SegFormer's MixFFN (depthwise 3x3 in each frame) and Vivim's DSF (3x3x3 in the clip):
//   h1 = W_1 x + b_1 (4C);  h2 = dwconv(h1);  out = W_2 gelu(h2) + b_2
static void ffn_forward(Model *m, const Stage *st, Sublayer *f, floatX *out, const floatX *inp, int accumulate) {
    int C = st->C, rows = m->B * m->T * st->P, kt = f->kind == DSF ? 3 : 1; const float *w = m->params;
    size_t mark = m->scratch.used, n = (size_t)rows * 4 * C;
    f->h1 = keep(m, n), f->h2 = m->training ? keep(m, n) : NULL;
    floatX *act = scratch(m, n);  // backward makes it again from h2
    m->scratch.used = mark;
    if (m->planning) return;
    linear_forward(m, f->h1, inp, f->fc1, rows, 4 * C, C, 0);
    dwconv_forward(f->h2, act, f->h1, w + f->dwconv.weight, w + f->dwconv.bias, m->B, m->T, st->H, st->W, 4 * C, kt);
    linear_forward(m, out, act, f->fc2, rows, C, 4 * C, accumulate);
}

static void ffn_backward(Model *m, const Stage *st, Sublayer *f, floatX *dinp, const floatX *dout, const floatX *inp) {
    int C = st->C, rows = m->B * m->T * st->P, kt = f->kind == DSF ? 3 : 1;
    size_t mark = m->scratch.used, n = (size_t)rows * 4 * C; const float *w = m->params;
    float *g = m->grads; floatX *act = scratch(m, n), *dact = scratch(m, n), *dh1 = act;  // dh1 comes when act is done with
    m->scratch.used = mark;
    if (m->planning) return;
    matmul_backward(dact, NULL, NULL, dout, NULL, m->weights + f->fc2.weight, rows, C, 4 * C);
    gelu_backward(act, dact, dact, f->h2, n);
    matmul_backward(NULL, g + f->fc2.weight, g + f->fc2.bias, dout, act, NULL, rows, C, 4 * C);
    dwconv_backward(dh1, g + f->dwconv.weight, g + f->dwconv.bias, dact, f->h1, w + f->dwconv.weight,
                    m->B, m->T, st->H, st->W, 4 * C, kt);
    linear_backward(m, dinp, dh1, inp, f->fc1, rows, 4 * C, C, 0);
}

// ---- ST-Mamba (paper, section III-B): one projection in, three selective scans over the same tokens in different orders,
// one gate, one projection out:
//   [x | z] = W_in u;  for each direction g:  a = SiLU(conv1d_g(x));  [delta | Bt | Ct] = W_x,g a;
//   dt = softplus(W_dt,g delta + b_dt,g);  y_g = scan_g(a, dt, Bt, Ct);   out = W_out (sum_g y_g * SiLU(z) / directions)
// The released code gates every direction by the same SiLU(z) and then adds; gating the sum once is the same.

// numbers in a row of x_dbl: R + 2N, and some that nobody reads, so that rows begin at multiples of 16 bytes in any type
static int x_dbl_row(const Config *c, int R) { return ceil_div(R + 2 * c->d_state, 8) * 8; }

// a (rows, D) and dt (rows, D) of direction g; x_dbl must hold W_x a unless it is to be computed here
static void scan_inputs(Model *m, const Stage *st, Sublayer *s, int g, floatX *a, floatX *dt, int compute_x_dbl) {
    const Config *c = &m->config; const Direction *p = &s->scan[g];
    int D = c->expand * st->C, N = c->d_state, R = dt_rank(st->C), rows = m->B * m->T * st->P, ld = x_dbl_row(c, R);
    const float *w = m->params; const floatX *wx = m->weights;
    conv1d_silu_forward(a, s->xz, 2 * D, w + p->conv.weight, w + p->conv.bias, g, m->B, m->T, st->P, D, c->d_conv);
    if (compute_x_dbl) matmul(s->x_dbl[g], ld, a, D, 0, wx + p->x_proj, D, 1, NULL, rows, R + 2 * N, D, 0);
    dt_forward(dt, s->x_dbl[g], ld, w + p->dt_proj.weight, w + p->dt_proj.bias, rows, D, R);
}

static void st_mamba_forward(Model *m, const Stage *st, Sublayer *s, floatX *out, const floatX *inp, int accumulate) {
    const Config *c = &m->config;
    int C = st->C, D = c->expand * C, N = c->d_state, R = dt_rank(C), rows = m->B * m->T * st->P, ld = x_dbl_row(c, R);
    int first = 1;
    const float *w = m->params; const floatX *wx = m->weights; size_t mark = m->scratch.used, n = (size_t)rows * D;
    s->xz = keep(m, 2 * n), s->y = keep(m, n);
    for (int g = 0; g < 3; g++) {
        if (!has_scan(c, g)) continue;
        s->x_dbl[g] = keep(m, (size_t)rows * ld);
        s->states[g] = m->training ? keep_floats(m, selective_scan_states(m->B, m->T, st->P, D, N)) : NULL;
    }
    floatX *a = scratch(m, n), *dt = scratch(m, n);
    m->scratch.used = mark;
    if (m->planning) return;
    matmul_forward(s->xz, inp, wx + s->in_proj, NULL, rows, 2 * D, C);
    for (int g = 0; g < 3; g++) {
        if (!has_scan(c, g)) continue;
        const floatX *Bt = s->x_dbl[g] + R, *Ct = Bt + N; scan_inputs(m, st, s, g, a, dt, 1);
        selective_scan_forward(s->y, s->states[g], a, dt, Bt, Ct, ld, w + s->scan[g].A_log, w + s->scan[g].D,
                               g, m->B, m->T, st->P, D, N, !first);
        first = 0;
    }
    gate_forward(a, s->y, s->xz, 1.0f / (float)strlen(c->scans), rows, D);
    matmul(out, C, a, D, 0, wx + s->out_proj, D, 1, NULL, rows, C, D, accumulate);
}

// From the end to the beginning; a and dt are made again. da, ddt (rows, D), dx_dbl = [ddelta | dBt | dCt], as x_dbl, are
// of one direction, the next overwrites them; dxz (rows, 2D) = [dx | dz] sums dx over the directions
static void st_mamba_backward(Model *m, const Stage *st, Sublayer *s, floatX *dinp, const floatX *dout, const floatX *inp) {
    const Config *c = &m->config;
    int C = st->C, D = c->expand * C, N = c->d_state, R = dt_rank(C), rows = m->B * m->T * st->P, ld = x_dbl_row(c, R);
    int first = 1;
    const float *w = m->params; const floatX *wx = m->weights; float *dw = m->grads, scale = 1.0f / (float)strlen(c->scans);
    size_t mark = m->scratch.used, n = (size_t)rows * D;
    floatX *a = scratch(m, n), *dt = scratch(m, n), *dy = scratch(m, n), *da = scratch(m, n), *ddt = scratch(m, n);
    floatX *dxz = scratch(m, 2 * n), *dx_dbl = scratch(m, (size_t)rows * ld);
    m->scratch.used = mark;
    if (m->planning) return;
    matmul_backward(dy, NULL, NULL, dout, NULL, wx + s->out_proj, rows, C, D);
    gate_backward(a, dy, dxz, dy, s->y, s->xz, scale, rows, D);
    matmul_backward(NULL, dw + s->out_proj, NULL, dout, a, NULL, rows, C, D);
    for (int g = 0; g < 3; g++) {
        if (!has_scan(c, g)) continue;
        const Direction *p = &s->scan[g]; const floatX *Bt = s->x_dbl[g] + R, *Ct = Bt + N;
        scan_inputs(m, st, s, g, a, dt, 0);
        selective_scan_backward(da, ddt, dx_dbl + R, dx_dbl + R + N, ld, dw + p->A_log, dw + p->D, dy, a, dt, Bt, Ct, ld,
                                w + p->A_log, w + p->D, s->states[g], g, m->B, m->T, st->P, D, N);
        // dt = softplus(W_dt delta + b): delta is the first R columns of x_dbl
        dt_backward(ddt, dw + p->dt_proj.bias, dt, rows, D);
        matmul(dx_dbl, ld, ddt, D, 0, wx + p->dt_proj.weight, R, 0, NULL, rows, R, D, 0);
        matmul(dw + p->dt_proj.weight, R, ddt, D, 1, s->x_dbl[g], ld, 0, NULL, D, R, rows, 1);
        // x_dbl = W_x a
        matmul(da, D, dx_dbl, ld, 0, wx + p->x_proj, D, 0, NULL, rows, D, R + 2 * N, 1);
        matmul(dw + p->x_proj, D, dx_dbl, ld, 1, a, D, 0, NULL, R + 2 * N, D, rows, 1);
        conv1d_silu_backward(dxz, 2 * D, dw + p->conv.weight, dw + p->conv.bias, da, s->xz, 2 * D, w + p->conv.weight,
                             w + p->conv.bias, g, m->B, m->T, st->P, D, c->d_conv, !first);
        first = 0;
    }
    matmul_backward(dinp, dw + s->in_proj, NULL, dxz, inp, wx + s->in_proj, rows, 2 * D, C);
}

// ---- Drop path (stochastic depth): in training, SegFormer block j of J drops its branch F for a whole frame with probability
// 0.1 j/(J-1) and scales the kept ones up. What is dropped is not computed: F gets the frames that keep it, side by side.
static int is_segformer(const Sublayer *s) { return s->kind == ATTENTION || s->kind == MIX_FFN; }
static float drop_probability(const Model *m, const Sublayer *s) {
    float highest = m->training && is_segformer(s) ? m->drop_path : 0.0f;
    return highest * (float)s->drop_index / (float)max_int(1, m->num_blocks - 1);
}

// frames first .. first+n of a batch all keep F, as its frames at .. at+n
typedef struct { int first, n, at; } Run;

// the run behind r, {0, 0, 0} for the first; behind the last: n = 0 and first = number of frames
static Run next_run(const Model *m, const Sublayer *s, Run r) {
    int frames = m->B * m->T; float p = m->planning ? 0.0f : drop_probability(m, s);
    uint64_t key = rng_key(m->seed, RNG_DROP_PATH, (uint64_t)m->step), number = (uint64_t)(s - m->sublayers) << 16;
    number += (uint64_t)parallel.rank * (uint64_t)frames;  // 65536 for each sublayer
    r.first += r.n, r.at += r.n, r.n = 0;
    while (r.first < frames && dropout_factor(key, number + (uint64_t)r.first, p) == 0.0f) r.first++;
    while (r.first + r.n < frames && dropout_factor(key, number + (uint64_t)(r.first + r.n), p) > 0.0f) r.n++;
    return r;
}

// ln (kept rows, C) = LN(x) of the frames that keep F; returns how many they are
static int sublayer_norm(Model *m, const Stage *st, Sublayer *s, floatX *ln) {
    int P = st->P, C = st->C; Run r = {0, 0, 0};
    for (r = next_run(m, s, r); r.n > 0; r = next_run(m, s, r)) {
        size_t row = (size_t)r.first * P, at = (size_t)r.at * P;
        if (!m->planning) norm_forward(m, ln + at * C, s->mean + at, s->rstd + at, s->x + row * C, s->norm, r.n * P, C);
    }
    return r.at;
}

// ---- One sublayer: out = x + F(LN(x)). In training x is kept and out is new; in evaluation out replaces x. Returns out.
static floatX *sublayer_forward(Model *m, const Stage *st, Sublayer *s, floatX *x) {
    int B = m->B, T = m->T, C = st->C, rows = B * T * st->P; float scale = 1.0f / (1.0f - drop_probability(m, s));
    size_t mark = m->scratch.used, n = (size_t)rows * C, frame = (size_t)st->P * C;
    s->x = x;
    s->mean = keep_floats(m, (size_t)rows), s->rstd = keep_floats(m, (size_t)rows);
    floatX *out = m->training ? keep(m, n) : x, *ln = scratch(m, n), *branch = m->training ? scratch(m, n) : x;
    int frames = sublayer_norm(m, st, s, ln), accumulate = !m->training; Run r = {0, 0, 0};
    if (is_segformer(s)) m->B = frames, m->T = 1;  // it does not look from one frame to another
    if (frames > 0 && s->kind == ATTENTION) self_attention_forward(m, st, s, branch, ln, accumulate);
    else if (frames > 0 && s->kind == ST_MAMBA) st_mamba_forward(m, st, s, branch, ln, accumulate);
    else if (frames > 0) ffn_forward(m, st, s, branch, ln, accumulate);
    m->B = B, m->T = T;
    for (int done = 0; m->training && !m->planning && done < B * T; done = r.first + r.n) {
        r = next_run(m, s, r);
        size_t dropped = (size_t)(r.first - done) * frame, kept = (size_t)r.n * frame, at = r.first * frame;
        if (dropped) residual(out + done * frame, NULL, x + done * frame, 1.0f, dropped);  // as it is
        if (kept) residual(out + at, x + at, branch + r.at * frame, scale, kept);
    }
    m->scratch.used = mark;
    return out;
}

// dx (rows, C): the gradient of the sublayer's output on entry, of its input on return
static void sublayer_backward(Model *m, const Stage *st, Sublayer *s, floatX *dx) {
    int B = m->B, T = m->T, C = st->C, P = st->P; float p = drop_probability(m, s);
    size_t mark = m->scratch.used, frame = (size_t)P * C, n = (size_t)(B * T) * frame;
    floatX *ln = scratch(m, n), *dln = scratch(m, n), *dbranch = p > 0.0f ? scratch(m, n) : dx;
    int frames = sublayer_norm(m, st, s, ln); Run r = {0, 0, 0};  // again: cheaper than keeping it
    for (r = next_run(m, s, r); r.n > 0 && p > 0.0f; r = next_run(m, s, r))
        if (!m->planning) residual(dbranch + r.at * frame, NULL, dx + r.first * frame, 1.0f / (1.0f - p), r.n * frame);
    if (is_segformer(s)) m->B = frames, m->T = 1;
    if (frames > 0 && s->kind == ATTENTION) self_attention_backward(m, st, s, dln, dbranch, ln);
    else if (frames > 0 && s->kind == ST_MAMBA) st_mamba_backward(m, st, s, dln, dbranch, ln);
    else if (frames > 0) ffn_backward(m, st, s, dln, dbranch, ln);
    m->B = B, m->T = T;
    memset(&r, 0, sizeof r);
    for (r = next_run(m, s, r); r.n > 0 && !m->planning; r = next_run(m, s, r)) {
        size_t row = (size_t)r.first * P, at = (size_t)r.at * P; floatX *dx_r = dx + row * C;
        norm_backward(m, dx_r, dln + at * C, dx_r, s->x + row * C, s->norm, s->mean + at, s->rstd + at, r.n * P, C);
    }
    m->scratch.used = mark;
}

// ---- The decoder. As written in the paper: upsample Linear_i(stage_i) to stage 1's grid, concatenate (stage 4 first) and
// fuse by a 1x1 convolution. Upsampling is linear in space and its weights sum to 1, the two matrices are linear in
// channels, so they commute:
//   W_fuse concat(u) = sum_i upsample( (W_fuse,i W_i) stage_i ) + sum_i W_fuse,i b_i,   W_fuse,i the (E, E) block of stage i
// Folding the two matrices first saves 45 % of the FLOPs of a b3 training step and changes nothing else.

// where W_fuse,i begins in params or grads; its rows are 4E apart
static size_t fuse_block(const Model *m, int i) { return m->fuse + (size_t)(3 - i) * m->config.decoder_dim; }

// folded[i] (E, C_i) = W_fuse,i W_i;  folded_bias (E) = sum_i W_fuse,i b_i
static void decoder_fold(Model *m) {
    int E = m->config.decoder_dim;
    for (int i = 0; i < 4; i++) {
        int C = m->stages[i].C;
        const floatX *w = m->weights, *w_fuse = w + fuse_block(m, i);
        matmul(m->folded[i], C, w_fuse, 4 * E, 0, w + m->stages[i].linear_c.weight, C, 0, NULL, E, C, E, 0);
        matmul(m->folded_bias, 1, w_fuse, 4 * E, 0, w + m->stages[i].linear_c.bias, 1, 0, NULL, E, 1, E, i > 0);
    }
}

// map (n, H1, W1, E) of the n frames from frame f on: batch norm's input
static void decoder_map(Model *m, floatX *map, int f, int n) {
    int E = m->config.decoder_dim, H = m->stages[0].H, W = m->stages[0].W;
    size_t mark = m->scratch.used;
    floatX *part[4] = {map, NULL, NULL, NULL};  // stage 1 needs no upsampling: it starts the sum
    for (int i = 1; i < 4; i++) part[i] = scratch(m, (size_t)n * m->stages[i].P * E);
    m->scratch.used = mark;
    if (m->planning) return;
    for (int i = 0; i < 4; i++) {
        const Stage *st = &m->stages[i];
        const floatX *inp = st->out + (size_t)f * st->P * st->C;
        matmul_forward(part[i], inp, m->folded[i], i == 0 ? m->folded_bias : NULL, n * st->P, E, st->C);
    }
    int heights[3] = {m->stages[1].H, m->stages[2].H, m->stages[3].H};
    int widths[3] = {m->stages[1].W, m->stages[2].W, m->stages[3].W};
    bilinear_add3(map, part[1], part[2], part[3], heights, widths, n, H, W, E);
}

// the frame behind row j of the logits
static int logits_frame(const Model *m, int j) { return m->all_frames ? j : j * m->T + m->T / 2; }
static int logits_frames(const Model *m) { return m->all_frames ? m->B * m->T : m->B; }

// Mean and variance of m->map (rows, E) over all ranks, from each one's own, which become rows of a matrix: the mean is that
// of the means, the variance the mean of the variances and the variance of the means.
static void batchnorm_over_ranks(Model *m, int rows) {
    int R = parallel.ranks, E = m->config.decoder_dim;
    size_t mark = m->scratch.used;
    float *means = scratch_floats(m, (size_t)(R + 1) * E), *vars = means + (size_t)R * E;  // (R, E), (E)
    m->scratch.used = mark;
    if (m->planning) return;
    zero_floats(means, (size_t)R * E);
    batchnorm_statistics(means + (size_t)parallel.rank * E, vars, m->map, (size_t)rows, E);
    sum_over_ranks(means, (size_t)(R + 1) * E);
    batchnorm_statistics(m->bn_mean, m->bn_rstd, means, (size_t)R, E);
    scaled_sum(vars, NULL, 1.0f / (float)R, (size_t)E);
    residual(m->bn_rstd, m->bn_rstd, vars, 1.0f, (size_t)E);
}

// map (frames, P_1, E) = the sum above;  low (outputs, P_1) = W_out dropout(relu(batch norm(map))) + b_out;
// logits (outputs, H, W) = upsample(low).  outputs: of each clip the target frame, or, if all_frames, all
static void decoder_forward(Model *m) {
    int E = m->config.decoder_dim, P = m->stages[0].P, frames = m->B * m->T, outputs = logits_frames(m);
    size_t frame = (size_t)P * E, rows = (size_t)frames * P;
    const float *gamma = m->params + m->batch_norm.weight, *beta = m->params + m->batch_norm.bias;
    float **const of_channels[] = {&m->bn_mean, &m->bn_rstd, &m->bn_scale, &m->bn_shift};
    uint64_t key = rng_key(m->seed, RNG_DROPOUT, (uint64_t)m->step), before = (uint64_t)parallel.rank * frames * frame;
    int ranks = m->local_bn ? 1 : parallel.ranks;  // that batch norm sees
    for (int i = 0; i < 4; i++) m->folded[i] = kept(m, (size_t)E * m->stages[i].C);
    m->folded_bias = kept(m, (size_t)E);
    for (int i = 0; i < 4; i++) *of_channels[i] = kept_floats(m, (size_t)E);
    m->low = kept_floats(m, (size_t)outputs * P);
    m->logits = kept_floats(m, (size_t)outputs * m->H * m->W);
    int some = m->training ? frames : m->all_frames ? min_int(frames, DECODED_AT_ONCE) : 1;  // that are decoded at a time
    m->map = kept(m, some * frame);
    if (!m->planning) decoder_fold(m);
    if (m->training) decoder_map(m, m->map, 0, frames);
    // statistics of all frames, though only target frames are supervised; bn_rstd: the variance, until the next line
    if (m->training && ranks > 1) batchnorm_over_ranks(m, rows);
    else if (!m->planning && m->training) batchnorm_statistics(m->bn_mean, m->bn_rstd, m->map, rows, E);
    if (!m->planning && m->training) m->batches_tracked++;
    if (!m->planning)
        batchnorm_vectors(m->bn_mean, m->bn_rstd, m->bn_scale, m->bn_shift, m->buffers + m->running_mean,
                          m->buffers + m->running_var, gamma, beta, (size_t)ranks * rows, E, m->training);
    for (int j = 0, n; j < outputs; j += n) {
        int f = logits_frame(m, j);
        n = m->all_frames ? min_int(some, outputs - j) : 1;
        if (!m->training) decoder_map(m, m->map, f, n);
        if (m->planning) continue;
        head_forward(m->low + (size_t)j * P, m->map + (m->training ? f * frame : 0), m->bn_scale, m->bn_shift,
                     m->params + m->out_weight, m->params + m->out_bias, n * P, E, key, before + f * frame,
                     m->training ? m->dropout : 0.0f);
    }
    if (!m->planning) bilinear_forward(m->logits, m->low, outputs, m->stages[0].H, m->stages[0].W, m->H, m->W, 1, 0);
}

// dstage[i] (B*T*P_i, C_i) from dlogits (frames, H, W). With M_i = W_fuse,i W_i and g_i = upsample^T(dmap):
//   dstage_i = g_i M_i;  dM_i = g_i^T stage_i;  dW_i += W_fuse,i^T dM_i;  dW_fuse,i += dM_i W_i^T
// dM's companion sum(dmap) is zero: batch norm removes every constant. So the biases b_i get no gradient.
static void decoder_backward(Model *m, floatX *const dstage[4], const float *dlogits) {
    int E = m->config.decoder_dim, H = m->stages[0].H, W = m->stages[0].W, P = H * W;
    int frames = m->B * m->T, outputs = logits_frames(m);
    size_t frame = (size_t)P * E, mark = m->scratch.used;
    const floatX *w = m->weights; const float *w_out = m->params + m->out_weight;
    uint64_t key = rng_key(m->seed, RNG_DROPOUT, (uint64_t)m->step), before = (uint64_t)parallel.rank * frames * frame;
    int ranks = m->local_bn ? 1 : parallel.ranks;
    float *g = m->grads, *dlow = scratch_floats(m, (size_t)outputs * P);
    float *dgamma = scratch_floats(m, (size_t)E), *dbeta = scratch_floats(m, (size_t)E);
    floatX *dfolded = scratch(m, (size_t)E * m->stages[3].C);
    floatX *dlow_map = scratch(m, (size_t)frames * m->stages[1].P * E);  // the largest g_i that is not dmap itself
    m->scratch.used = mark;
    if (m->planning) return;
    bilinear_backward(dlow, dlogits, outputs, H, W, m->H, m->W, 1);
    zero_floats(dgamma, (size_t)E); zero_floats(dbeta, (size_t)E);
    for (int j = 0; j < outputs; j++) {
        size_t first = logits_frame(m, j) * frame;
        head_backward_params(g + m->out_weight, g + m->out_bias, dgamma, dbeta, dlow + (size_t)j * P, m->map + first,
                             m->bn_mean, m->bn_rstd, m->bn_scale, m->bn_shift, w_out, P, E, key, before + first, m->dropout);
    }
    residual(g + m->batch_norm.weight, g + m->batch_norm.weight, dgamma, 1.0f, (size_t)E);
    residual(g + m->batch_norm.bias, g + m->batch_norm.bias, dbeta, 1.0f, (size_t)E);
    if (ranks > 1) sum_over_ranks(dgamma, (size_t)E), sum_over_ranks(dbeta, (size_t)E);
    for (int f = 0; f < frames; f++) {  // m->map becomes its own gradient
        const float *dl = m->all_frames ? dlow + (size_t)f * P : f % m->T == m->T / 2 ? dlow + (size_t)(f / m->T) * P : NULL;
        head_backward_map(m->map + f * frame, dl, dgamma, dbeta, m->bn_mean, m->bn_rstd, m->bn_scale, m->bn_shift, w_out,
                          P, E, (double)ranks * frames * P, key, before + f * frame, m->dropout);
    }
    for (int i = 0; i < 4; i++) {
        const Stage *st = &m->stages[i]; int C = st->C, n = frames * st->P;
        const floatX *dmap = i == 0 ? m->map : dlow_map, *linear = w + st->linear_c.weight;
        if (i > 0) bilinear_backward(dlow_map, m->map, frames, st->H, st->W, H, W, E);
        matmul(dstage[i], C, dmap, E, 0, m->folded[i], C, 0, NULL, n, C, E, 0);
        matmul(dfolded, C, dmap, E, 1, st->out, C, 0, NULL, E, C, n, 0);
        matmul(g + st->linear_c.weight, C, w + fuse_block(m, i), 4 * E, 1, dfolded, C, 0, NULL, E, C, E, 1);
        matmul(g + fuse_block(m, i), 4 * E, dfolded, C, 0, linear, C, 1, NULL, E, E, C, 1);
    }
}

// ---- The boundary head, on stage 1's features of the frames that have logits; only training needs it:
//   h_1 = ReLU(conv3x3(x)),  h_2 = ReLU(conv3x3(h_1)),  edge_low = conv1x1(h_2);   with one layer edge_low = conv1x1(x)
static void edge_forward(Model *m) {
    const Stage *st = &m->stages[0]; const floatX *w = m->weights;
    int H = st->H, W = st->W, C = st->C, outputs = logits_frames(m), last = m->config.edge_layers - 1;
    size_t P = (size_t)st->P, frame = P * C;
    for (int i = 0; i < last; i++) m->edge_h[i] = kept(m, outputs * frame);
    m->edge_low = kept_floats(m, outputs * P);
    m->edge_logits = kept_floats(m, (size_t)outputs * m->H * m->W);
    if (m->planning) return;
    for (int j = 0; j < outputs; j++) {  // the first layer's frames lie T apart, all others side by side
        const floatX *x = st->out + logits_frame(m, j) * frame, *w0 = w + m->edge[0].weight;
        if (last == 0) matmul_forward(m->edge_low + j * P, x, w0, m->params + m->edge[0].bias, st->P, 1, C);
        else conv_forward(m->edge_h[0] + j * frame, x, w0, w + m->edge[0].bias, 1, H, W, C, C, 3, 1, 1);
    }
    for (int i = 0; i < last; i++) {
        const floatX *w_i = w + m->edge[i].weight;
        if (i > 0) conv_forward(m->edge_h[i], m->edge_h[i - 1], w_i, w + m->edge[i].bias, outputs, H, W, C, C, 3, 1, 1);
        relu_forward(m->edge_h[i], outputs * frame);
    }
    if (last > 0)
        matmul_forward(m->edge_low, m->edge_h[last - 1], w + m->edge[last].weight, m->params + m->edge[last].bias,
                       outputs * st->P, 1, C);
    bilinear_forward(m->edge_logits, m->edge_low, outputs, H, W, m->H, m->W, 1, 0);
}

// dstage (B*T, P, C) += the gradient that comes from dedge (frames, H, W)
static void edge_backward(Model *m, floatX *dstage, const float *dedge) {
    const Stage *st = &m->stages[0];
    int H = st->H, W = st->W, C = st->C, outputs = logits_frames(m), last = m->config.edge_layers - 1;
    size_t mark = m->scratch.used, P = (size_t)st->P, frame = P * C;
    float *g = m->grads; const floatX *w = m->weights;
    floatX *dlow = scratch(m, outputs * P), *dx = scratch(m, outputs * frame), *dh = scratch(m, outputs * frame);
    m->scratch.used = mark;
    if (m->planning) return;
    bilinear_backward(dlow, dedge, outputs, H, W, m->H, m->W, 1);
    if (last > 0) linear_backward(m, dx, dlow, m->edge_h[last - 1], m->edge[last], outputs * st->P, 1, C, 0);
    for (int i = last - 1; i >= 0; i--) {
        floatX *swap = dh; dh = dx, dx = swap;
        relu_backward(dh, m->edge_h[i], outputs * frame);
        if (i > 0)
            conv_backward(dx, g + m->edge[i].weight, g + m->edge[i].bias, dh, m->edge_h[i - 1], w + m->edge[i].weight,
                          outputs, H, W, C, C, 3, 1, 1);
    }
    for (int j = 0; j < outputs; j++) {
        const floatX *x = st->out + logits_frame(m, j) * frame;
        floatX *to = dstage + logits_frame(m, j) * frame, *dx_j = dx + j * frame;
        if (last == 0) linear_backward(m, dx_j, dlow + j * P, x, m->edge[0], st->P, 1, C, 0);
        else
            conv_backward(dx_j, g + m->edge[0].weight, g + m->edge[0].bias, dh + j * frame, x, w + m->edge[0].weight, 1, H, W,
                          C, C, 3, 1, 1);
        residual(to, to, dx_j, 1.0f, frame);
    }
}

// ---- The whole model. input (B, T, H, W, 3), normalised. Afterwards m->logits (frames, H, W) holds the result, and in
// training m->edge_logits (frames, H, W) the boundary's.
static void model_forward(Model *m, const floatX *input) {
    int N = m->B * m->T; const floatX *w = m->weights;
    m->kept.used = m->scratch.used = 0;
    for (int i = 0; i < 4; i++) {
        Stage *st = &m->stages[i];
        size_t mark = m->scratch.used, rows = (size_t)N * st->P;
        st->inp = i == 0 ? input : st[-1].out;
        st->out = kept(m, rows * st->C), st->embed = keep(m, rows * st->C);
        st->mean = keep_floats(m, rows), st->rstd = keep_floats(m, rows);
        m->scratch.used = mark;
        if (!m->planning) {
            conv_forward(st->embed, st->inp, w + st->patch.weight, w + st->patch.bias, N, st->H_in, st->W_in, st->C_in,
                         st->C, st->kernel, st->stride, st->kernel / 2);
            norm_forward(m, st->out, st->mean, st->rstd, st->embed, st->patch_norm, (int)rows, st->C);
        }
        for (int s = 0; s < st->num_sublayers; s++)
            st->out = sublayer_forward(m, st, m->sublayers + st->first_sublayer + s, st->out);
    }
    decoder_forward(m);
    if (m->training && m->config.edge_layers) edge_forward(m);
}

// From dlogits and dedge (frames, H, W) to all parameter gradients (added to m->grads); dinput (B, T, H, W, 3) may be NULL;
// dedge is not read without a boundary head.
static void model_backward(Model *m, floatX *dinput, const float *dlogits, const float *dedge, const floatX *input) {
    int N = m->B * m->T; floatX *dstage[4]; float *g = m->grads;
    m->scratch.used = 0;
    for (int i = 0; i < 4; i++) dstage[i] = scratch(m, (size_t)N * m->stages[i].P * m->stages[i].C);
    decoder_backward(m, dstage, dlogits);
    if (m->config.edge_layers) edge_backward(m, dstage[0], dedge);
    for (int i = 3; i >= 0; i--) {
        const Stage *st = &m->stages[i];
        size_t mark = m->scratch.used, n = (size_t)st->H_in * st->W_in * st->C_in;  // floats of an input frame
        for (int s = st->num_sublayers - 1; s >= 0; s--)
            sublayer_backward(m, st, m->sublayers + st->first_sublayer + s, dstage[i]);
        floatX *dinp = i == 0 ? dinput : scratch(m, (size_t)N * n);
        m->scratch.used = mark;
        if (m->planning) continue;
        norm_backward(m, dstage[i], dstage[i], NULL, st->embed, st->patch_norm, st->mean, st->rstd, N * st->P, st->C);
        conv_backward(dinp, g + st->patch.weight, g + st->patch.bias, dstage[i], i == 0 ? input : st->inp,
                      m->weights + st->patch.weight, N, st->H_in, st->W_in, st->C_in, st->C, st->kernel, st->stride,
                      st->kernel / 2);
        if (i > 0) residual(dstage[i - 1], dstage[i - 1], dinp, 1.0f, N * n);
    }
}

// Sets the sizes of the next batches and measures, in a planning pass through forward (and backward), the memory that they
// take: m->kept_planned + m->scratch_planned bytes. Fails with one line if the sizes do not fit.
static void model_measure(Model *m, int B, int T, int H, int W, int training, int all_frames) {
    Arena kept = m->kept, scratch_arena = m->scratch;
    m->B = B, m->T = T, m->H = H, m->W = W, m->training = training, m->all_frames = all_frames;
    for (int i = 0; i < 4; i++) {
        Stage *st = &m->stages[i];
        st->H_in = i == 0 ? H : st[-1].H, st->W_in = i == 0 ? W : st[-1].W;
        st->H = conv_size(st->H_in, st->kernel, st->stride, st->kernel / 2);
        st->W = conv_size(st->W_in, st->kernel, st->stride, st->kernel / 2);
        st->P = st->H * st->W;
        if (H < 32 || W < 32 || st->H < st->reduction || st->W < st->reduction)
            fail("frames of %dx%d are too small: both must be at least 32; prepare larger ones with --size", H, W);
        if ((double)B * T * st->P * max_int(4 * st->C, m->config.decoder_dim) > 2e9)  // any count of rows fits an int
            fail("%d clips of %d frames of %dx%d are too much for a batch; use a smaller --batch or --frames", B, T, H, W);
    }
    memset(&m->kept, 0, sizeof m->kept); memset(&m->scratch, 0, sizeof m->scratch);
    m->planning = 1;
    model_forward(m, NULL);
    if (training) model_backward(m, NULL, NULL, NULL, NULL);
    m->planning = 0;
    m->kept_planned = m->kept.peak, m->scratch_planned = m->scratch.peak;
    m->kept = kept, m->scratch = scratch_arena;
}

// The same, and makes room. Says what it will take before it takes it, when `verbose`.
static void model_plan(Model *m, int B, int T, int H, int W, int training, int all_frames, int verbose) {
    const double MiB = 1048576;
    model_measure(m, B, T, H, W, training, all_frames);
    if (verbose)
        printf("memory: parameters %.1f MiB%s, activations %.1f MiB, scratch %.1f MiB\n",
               (double)(m->num_params * sizeof(float)) / MiB,
               training ? " (and as much for each of gradients, Adam's m, Adam's v)" : "", (double)m->kept_planned / MiB,
               (double)m->scratch_planned / MiB);
    arena_reserve(&m->kept, m->kept_planned); arena_reserve(&m->scratch, m->scratch_planned);
    if (training) model_trainable(m);
}

static void model_zero_grad(Model *m) { zero_floats(m->grads, m->num_params); }

// What a step found out, for all ranks alike: the mean of the gradients, and, unless they are the same, rank 0's buffers
static void model_over_ranks(Model *m) {
    if (parallel.ranks == 1) return;
    sum_over_ranks(m->grads, m->num_params);
    scaled_sum(m->grads, NULL, 1.0f / (float)parallel.ranks, m->num_params);
    if (m->local_bn && parallel.rank > 0) zero_floats(m->buffers, m->num_buffers);
    if (m->local_bn) sum_over_ranks(m->buffers, m->num_buffers);
}

// One Adam step with the learning rate lr; PyTorch's default betas and epsilon
static void model_update(Model *m, double lr) {
    m->step++;
    adam_update(m->params, m->grads, m->adam_m, m->adam_v, m->num_params, lr, 0.9, 0.999, 1e-8, m->step);
}

// ---------------------------------------------------------------------------------------------------------------------
// 13 THE AFFINE CONSTRAINT, THE WHOLE LOSS
//
// The inverse-transform network F sees two square patches of a boundary, e and e', and tells by which affine map e became
// e': theta = I + F(e, e'), six numbers in two rows. It is trained in advance (prepro/affine.c) and frozen. In training e is
// the true boundary and e' the predicted one, and ||F(e, e')|| is the loss: the prediction is to lie on the truth without
// being moved. The loss has a gradient for the prediction only, through F.

#endif
#if VIVIM_PART != 2
enum { AFFINE_HIDDEN = 1000, AFFINE_BOTTLENECK = 32 };  // widths of its two hidden layers

typedef struct {
    Model net;            // only its table of tensors is used: parameters, and while F itself is trained their gradients
    int q;                // side of a patch
    Layer fc1, fc2, fc3;  // (1000, 2 q^2), (32, 1000), (6, 32)
} AffineNet;

static void affine_init(AffineNet *f, int q, uint64_t seed) {
    memset(f, 0, sizeof *f);
    f->q = q;
    snprintf(f->net.config.name, sizeof f->net.config.name, "affine");
    f->fc1 = add_layer(&f->net, INIT_UNIFORM, "affine.", "fc1", 2, AFFINE_HIDDEN, 2 * q * q, 0);
    f->fc2 = add_layer(&f->net, INIT_UNIFORM, "affine.", "fc2", 2, AFFINE_BOTTLENECK, AFFINE_HIDDEN, 0);
    f->fc3 = add_layer(&f->net, INIT_UNIFORM, "affine.", "fc3", 2, 6, AFFINE_BOTTLENECK, 0);
    model_allocate(&f->net, seed);
}

static void affine_free(AffineNet *f) {
    model_free(&f->net);
    f->q = 0;
}

typedef struct {  // what affine_forward keeps for affine_backward, n patches in the batch
    float *weight;               // (n) of a patch: 1 / (B N_p), or 0 if it is left out
    float *inp, *h1, *h2, *out;  // (2n, ...): n pairs with the target's boundary, then n with the first frame's
} AffineTerm;

static const double AFFINE_TARGET = 1.00, AFFINE_FIRST = -0.01;

// The parts of the loss: total = seg + 0.3 edge + 0.3 affine (eq. 9); edge is L_bce, affine = 1.00 target - 0.01 first
typedef struct { double total, seg, edge, affine, affine_target, affine_first; } Losses;

static const double BOUNDARY_WEIGHT = 0.3;
#endif
#if VIVIM_PART != 1

// out = fc3(relu(fc2(relu(fc1(inp))))): out = theta - I (n, 6); inp (n, 2 q^2) n pairs of patches, the first row after row,
// then the second; h1 (n, 1000), h2 (n, 32) are kept for backward
static void affine_net_forward(float *out, float *h1, float *h2, const float *inp, const AffineNet *f, int n) {
    const float *w = f->net.params; int inputs = 2 * f->q * f->q, A = AFFINE_HIDDEN, Z = AFFINE_BOTTLENECK;
    matmul_forward(h1, inp, w + f->fc1.weight, w + f->fc1.bias, n, A, inputs);
    relu_forward(h1, (size_t)n * A);
    matmul_forward(h2, h1, w + f->fc2.weight, w + f->fc2.bias, n, Z, A);
    relu_forward(h2, (size_t)n * Z);
    matmul_forward(out, h2, w + f->fc3.weight, w + f->fc3.bias, n, 6, Z);
}

// dsecond (n, q^2): the gradient of the second patches; NULL while F is trained. Parameters get theirs if F has room for it.
static void affine_net_backward(float *dsecond, const float *dout, const float *h1, const float *h2, const float *inp,
                                const AffineNet *f, int n) {
    const float *w = f->net.params; float *g = f->net.grads;
    int inputs = 2 * f->q * f->q, q2 = f->q * f->q, A = AFFINE_HIDDEN, Z = AFFINE_BOTTLENECK;
    float *dh2 = malloc_floats((size_t)n * Z), *dh1 = malloc_floats((size_t)n * A);
    matmul_backward(dh2, NULL, NULL, dout, NULL, w + f->fc3.weight, n, 6, Z);
    relu_backward(dh2, h2, (size_t)n * Z);
    matmul_backward(dh1, NULL, NULL, dh2, NULL, w + f->fc2.weight, n, Z, A);
    relu_backward(dh1, h1, (size_t)n * A);
    if (dsecond) matmul(dsecond, q2, dh1, A, 0, w + f->fc1.weight + q2, inputs, 0, NULL, n, q2, A, 0);
    if (g) {
        matmul_backward(NULL, g + f->fc3.weight, g + f->fc3.bias, dout, h2, NULL, n, 6, Z);
        matmul_backward(NULL, g + f->fc2.weight, g + f->fc2.bias, dh2, h1, NULL, n, Z, A);
        matmul_backward(NULL, g + f->fc1.weight, g + f->fc1.bias, dh1, inp, NULL, n, A, inputs);
    }
    free_check(dh1); free_check(dh2);
}

// The affine constraint (eq. 8). Target boundary and predicted one, p = sigmoid(logits), are cut into patches of q x q, rows
// and columns from the top left, what is left over belongs to none. With theta^t from the target frame's boundary, theta^1
// from that of the clip's first frame, and the same prediction:
//   L_affine = mean over clips of 1/N_p sum_patches (1.00 ||theta^t - I|| - 0.01 ||theta^1 - I||)
// so that the prediction is pulled to this frame's boundary and, weakly, pushed off the first frame's. A patch without a
// boundary in either frame is left out of the sum and of its clip's N_p.
// *target, *first: the two means of norms. logits (B, H, W) of the boundary; edge, first_edge (B, H, W) true ones.
static void affine_forward(double *target, double *first, AffineTerm *a, const float *logits, const float *edge,
                           const float *first_edge, const AffineNet *f, int B, int H, int W) {
    int q = f->q, n = patches_of(B, H, W, q); size_t q2 = (size_t)q * q, N = (size_t)n;
    a->weight = malloc_floats(N), a->inp = malloc_floats(2 * N * 2 * q2), a->out = malloc_floats(2 * N * 6);
    a->h1 = malloc_floats(2 * N * AFFINE_HIDDEN), a->h2 = malloc_floats(2 * N * AFFINE_BOTTLENECK);
    patches_forward(a->inp, a->weight, logits, edge, first_edge, B, H, W, q);
    affine_net_forward(a->out, a->h1, a->h2, a->inp, f, 2 * n);
    norms_forward(target, first, a->out, a->weight, n);
}

// dlogits (B, H, W) from d_target and d_first, the derivatives of the loss by the two means; a->out becomes its own gradient
static void affine_backward(float *dlogits, double d_target, double d_first, AffineTerm *a, const AffineNet *f, int B, int H,
                            int W) {
    int n = patches_of(B, H, W, f->q);
    float *dsecond = malloc_floats(2 * (size_t)n * f->q * f->q);
    norms_backward(a->out, d_target, d_first, a->weight, n);
    affine_net_backward(dsecond, a->out, a->h1, a->h2, a->inp, f, 2 * n);
    patches_backward(dlogits, dsecond, a->inp, B, H, W, f->q);
    free_check(dsecond);
}

static void affine_term_free(AffineTerm *a) {
    free_check(a->weight), free_check(a->inp), free_check(a->h1), free_check(a->h2), free_check(a->out);
}

// Loss of the logits of the target frames that model_forward left in m, and its gradients dlogits, dedge (B, H, W; dedge may
// be NULL without a boundary head). mask, first_mask (B, H, W) of the clips' target and first frames; f == NULL: no affine
// constraint.
static Losses loss_and_gradient(float *dlogits, float *dedge, const Model *m, const AffineNet *f, const float *mask,
                                const float *first_mask) {
    Losses l; memset(&l, 0, sizeof l);
    int B = m->B, H = m->H, W = m->W; size_t n = (size_t)B * H * W;
    float *work = malloc_floats(3 * n), *edge = work, *first_edge = work + n, *daffine = work + 2 * n;
    double *sums = (double *)malloc_check(sizeof(double) * 3 * (size_t)B), on;
    l.seg = segloss_forward(work, sums, m->logits, mask, B, H, W, m->weighted_bce);
    segloss_backward(dlogits, work, sums, m->logits, mask, B, H, W, m->weighted_bce);
    if (m->config.edge_layers) {
        sobel_edges(edge, mask, B, H, W);
        l.edge = edgeloss_forward(&on, m->edge_logits, edge, n);
        edgeloss_backward(dedge, on, m->edge_logits, edge, n);
        if (f) {
            AffineTerm a;
            sobel_edges(first_edge, first_mask, B, H, W);
            affine_forward(&l.affine_target, &l.affine_first, &a, m->edge_logits, edge, first_edge, f, B, H, W);
            affine_backward(daffine, AFFINE_TARGET, AFFINE_FIRST, &a, f, B, H, W);
            affine_term_free(&a);
        }
        scaled_sum(dedge, f ? daffine : NULL, (float)BOUNDARY_WEIGHT, n);
    }
    double means[3] = {l.seg, l.affine_target, l.affine_first}, ranks = parallel.ranks;
    parallel_sum(means, 3);
    l.seg = means[0] / ranks, l.affine_target = means[1] / ranks, l.affine_first = means[2] / ranks;
    l.affine = AFFINE_TARGET * l.affine_target + AFFINE_FIRST * l.affine_first;
    l.total = l.seg + BOUNDARY_WEIGHT * (l.edge + l.affine);
    free_check(sums); free_check(work);
    return l;
}

// One training step; returns the losses. input (B, T, H, W, 3), mask, first_mask (B, H, W) as loss_and_gradient takes them. The
// total is NaN if it, a gradient or a running statistic (an infinite variance makes a finite loss) is not finite: then no
// parameter is updated.
static Losses train_step(Model *m, const AffineNet *f, const floatX *input, const float *mask, const float *first_mask,
                         double lr) {
    size_t pixels = (size_t)m->B * m->H * m->W;
    float *dlogits = malloc_floats(pixels), *dedge = malloc_floats(pixels);
    model_forward(m, input);
    Losses loss = loss_and_gradient(dlogits, dedge, m, f, mask, first_mask);
    if (isfinite(loss.total)) {
        model_zero_grad(m);
        model_backward(m, NULL, dlogits, dedge, input);
        model_over_ranks(m);
        if (all_finite(m->grads, m->num_params) && all_finite(m->buffers, m->num_buffers)) model_update(m, lr);
        else loss.total = (double)NAN;
    }
    free_check(dedge); free_check(dlogits);
    return loss;
}

#endif
#if VIVIM_PART != 2
// ---------------------------------------------------------------------------------------------------------------------
// 14 CHECKPOINTS
//
// Safetensors files with the released Vivim's key names (SegFormer's are read too): one line per tensor of the table.

#include "prepro/checkpoint.h"  // tensors_save, checkpoint_save, checkpoint_load, config_from_file, affine_load

// ---------------------------------------------------------------------------------------------------------------------
// 15 DATA: CLIPS, AUGMENTATION, BATCHES
//
// Every frame of every video is the target of one clip of T frames: its neighbours at offsets -(T/2) .. (T-1)/2, held at the
// video's ends, so the target stands at index T/2.

#include "prepro/clips.h"  // Batch, batch_init, batch_load, shuffle

// ---------------------------------------------------------------------------------------------------------------------
// 16 METRICS
//
// The ultrasound protocol: threshold p > 0.5 (logit > 0) against mask > 0.5, each measure per frame, then the mean over
// frames. A measure without denominator is 0, as in the released code: so a frame that is empty in both counts as 0.
// The other protocols, from predictions and masks in files: dev/evaluate.

#include "dev/metrics.h"  // metrics_count, metrics_ultrasound_add, metrics_ultrasound_mean

// ---------------------------------------------------------------------------------------------------------------------
// 17 OPTIONS, TRAIN, MAIN

#include "prepro/options.h"  // Options, OPTIONS: their table, with defaults, limits and what --help says
#include "dev/threads.h"  // how threads wait, and how many there are: fewer while other programs want the cores

// ---- Where the model is computed. All that follows reaches it through these; train_vivim.cu puts a GPU's in their place. The
// Model of the host stays the one that is saved and loaded.
static void nothing(Model *m) { (void)m; }
static double machine_memory(void) {  // this process's share
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / parallel.local_ranks;
}

#if VIVIM_PART != 1
static void forward_watched(Model *m, const float *input) { model_forward(m, input), threads_watch(); }
static Losses step_watched(Model *m, const AffineNet *f, const float *input, const float *mask, const float *first_mask,
                           double lr) {
    Losses losses = train_step(m, f, input, mask, first_mask, lr);
    threads_watch();
    return losses;
}
#endif

static struct {
    void (*plan)(Model *m, int B, int T, int H, int W, int training, int all_frames, int verbose);  // model_plan
    void (*forward)(Model *m, const float *input);                                       // model_forward; fills m->logits
    Losses (*step)(Model *m, const AffineNet *f, const float *input, const float *mask, const float *first_mask,
                   double lr);                   // train_step
    void (*fetch)(Model *m), (*send)(Model *m);  // what training changes: to the host before saving, back after loading
    double (*memory)(void);                      // bytes that there are
    double (*peak)(void);                        // MB that were in use at a time so far
    void (*measure)(Model *m, int B, int T, int H, int W, int training, int all_frames);  // model_measure
    int elsewhere;                               // the CPU is free meanwhile: it loads the next batch
    void (*profile)(int begin);                  // times of operations: begin, print; NULL: dev/bench.h finds them
    double (*waited)(void);                      // seconds that the host has waited for it so far; NULL: they are one
} device
#if VIVIM_PART != 1
    = {model_plan, forward_watched, step_watched, nothing, nothing, machine_memory, peak_mb, model_measure, 0, NULL, NULL}
#endif
    ;

#include "dev/setup.h"  // model_from_options, open_shard, open_affine, check_memory: what options ask for, or a refusal

static volatile sig_atomic_t stop_requested = 0;  // SIGINT or SIGTERM came
static void request_stop(int number) { stop_requested = number; }

#include "dev/predict.h"  // evaluate: a shard's metrics, after every epoch; predict: --predict, --eval; write_pictures

// CosineAnnealingLR with T_max = epochs, eta_min = lr/100: lr at epoch 0; 1 % of it would come at epoch number `epochs`
static double cosine_lr(double lr, int epoch, int epochs) {
    return 0.01 * lr + 0.99 * lr * 0.5 * (1.0 + cos(3.14159265358979323846 * epoch / epochs));
}

static void not_a_number(FILE *log, const char *what, int64_t step, int epoch, const char *last_path) {
    fflush(log);  // its lines show how it came to this
    parallel_leave_it_to_rank_0();
    fail("step %lld (epoch %d): the %s is not a number; %s%s; try a smaller --lr", (long long)step, epoch + 1, what,
         epoch ? "the last good checkpoint is " : "no checkpoint was saved yet", epoch ? last_path : "");
}

#include "prepro/resume.h"  // Progress, resume_load, open_log, save_state: --resume

static void train(const Options *o) {
    Model model, *m = &model;
    AffineNet affine;
    Shard training, validation;
    Batch batches[2];  // of this step, of the next
    Augment augment;
    Progress p; memset(&p, 0, sizeof p); p.best = -1.0;
    char best_path[4096], last_path[4096], log_path[4096], picture_path[4096], resume_path[4096];
    double start = seconds(), clips_done = 0, train_seconds = 0;
    int tty = isatty(STDOUT_FILENO), stop = 0;  // stop: all ranks know of a request to stop

    // whatever can be refused is refused before anything is written
    open_shard(&training, o->train, o); open_shard(&validation, o->val, o);
    if (same_file(o->train, o->val)) printf("note: --val is the shard of --train: its Dice says nothing of other videos\n");
    int H = training.H, W = training.W, T = o->frames ? o->frames : 5, steps = training.frames / o->batch;
    int B = parallel_share(o->batch);
    if (steps == 0)
        fail("--batch %d: is more than the %d frames of %s; use a smaller --batch", o->batch, training.frames, o->train);
    if (validation.H != H || validation.W != W)
        fail("%s: frames are %dx%d, those of %s %dx%d; prepare both with the same --size", o->val, validation.H,
             validation.W, o->train, H, W);
    if (strlen(o->out) + 32 > sizeof best_path) fail("--out %.40s...: is too long for a path; choose a shorter one", o->out);
    snprintf(best_path, sizeof best_path, "%s/best.safetensors", o->out);
    snprintf(last_path, sizeof last_path, "%s/last.safetensors", o->out);
    snprintf(resume_path, sizeof resume_path, "%s/resume.safetensors", o->out);
    snprintf(log_path, sizeof log_path, "%s/log.txt", o->out);
    snprintf(picture_path, sizeof picture_path, "%s/predictions.png", o->out);
    const AffineNet *f = open_affine(&affine, o, H, W) ? &affine : NULL;
    model_from_options(m, o);
    data_identity(p.data, &training, &validation, f);
    Options effective = *o;  // for the log and for --resume: what options that were left out came to
    effective.config = m->config.name, effective.frames = T;
    o = &effective;
    augment.flip = o->flip, augment.jitter = o->jitter;
    printf("%s: %d videos, %d frames; %s: %d videos, %d frames; %dx%d\n", o->train, training.videos, training.frames, o->val,
           validation.videos, validation.frames, H, W);
    printf("config %s, scans %s: %.2f M parameters; %d clips of %d frames a batch, %d steps an epoch\n", m->config.name,
           o->scans, (double)m->num_params / 1e6, o->batch, T, steps);
    check_memory(m, o, B, T, H, W, 1, 0);
    device.plan(m, B, T, H, W, 1, 0, 1);
    if (o->resume) {
        resume_load(m, resume_path, &p, o);
        device.send(m);
        printf("%s: goes on after %d epochs and %d steps\n", resume_path, p.epoch, p.step);
    }
    int *order = (int *)malloc_check(sizeof(int) * (size_t)training.frames), ahead = device.elsewhere;
    Loader loader = {NULL, &training, NULL, &augment, 0, B, ahead, 0, 0};
    for (int i = 0; i <= ahead; i++) batch_init(&batches[i], B, T, H, W);

    if (mkdir(o->out, 0777) != 0 && errno != EEXIST)
        fail("%s: cannot make this directory: %s; choose another --out", o->out, strerror(errno));
    if (o->resume && p.best >= 0 && access(best_path, R_OK) != 0)
        fail("%s: is gone, and --resume needs it; start again without --resume", best_path);
    if (!o->resume && parallel.rank == 0) unlink(resume_path);  // an older training's: its log is written anew
    FILE *log = open_log(log_path, o, &p, m->num_params);
    parallel_through();

    struct sigaction action; memset(&action, 0, sizeof action);
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESTART | SA_RESETHAND;  // writing goes on; a second signal ends the program at once
    sigaction(SIGINT, &action, NULL); sigaction(SIGTERM, &action, NULL);
    if (parallel.ranks > 1) sigaction(SIGUSR1, &action, NULL);  // mpirun passes it on and, unlike the others, waits

    for (int epochs_before = p.epoch; p.epoch < o->epochs;) {
        int epoch = p.epoch;
        double lr = cosine_lr(o->lr, epoch, o->epochs), dice = -1.0, epoch_start = seconds(), shown = epoch_start;
        int loaded = p.step;  // batches of this epoch up to here
        shuffle(order, training.frames, m->seed, epoch);
        device.plan(m, B, T, H, W, 1, 0, 0);
        while (p.step < steps && !(stop = parallel_any(stop_requested))) {
            const Batch *batch = &batches[p.step % (1 + ahead)];
            for (; loaded <= p.step + ahead && loaded < steps; loaded++) {  // this step's, unless it is there, and the next
                loader_wait(&loader);
                loader.batch = &batches[loaded % (1 + ahead)];
                loader.key = rng_key(m->seed, RNG_AUGMENT, (uint64_t)(m->step + loaded - p.step));
                loader.targets = order + (size_t)loaded * o->batch + (size_t)parallel.rank * B;
                loader_start(&loader);
            }
            if (loaded == p.step + 1) loader_wait(&loader);  // it is the last one
            Losses l = device.step(m, f, batch->input, batch->mask, batch->first_mask, lr);
            if (!isfinite(l.total)) not_a_number(log, "loss, a gradient or a batch norm statistic", m->step + 1, epoch,
                                                 last_path);
            p.sum.total += l.total, p.sum.seg += l.seg, p.sum.edge += l.edge, p.sum.affine += l.affine;
            p.step++, clips_done += o->batch;
            fprintf(log, "train %d %lld %.8g %.6f %.6f %.6f %.6f\n", epoch + 1, (long long)m->step, lr, l.total, l.seg,
                    l.edge, l.affine);
            if (o->save_every && m->step % o->save_every == 0) {
                device.fetch(m);
                save_state(m, resume_path, &p, o, log, log_path);
            }
            if (seconds() - shown > (tty ? 0.2 : 30.0)) {
                shown = seconds();
                printf("%sepoch %d/%d  step %d/%d  loss %.4f  %.1f clips/s%s", tty ? "\r" : "", epoch + 1, o->epochs,
                       p.step, steps, p.sum.total / p.step, clips_done / (train_seconds + shown - epoch_start),
                       tty ? "\033[K" : "\n");
                fflush(stdout);
            }
        }
        loader_wait(&loader);
        train_seconds += seconds() - epoch_start;
        if (!stop)
            printf("%sepoch %3d/%d  lr %.2e  loss %.4f", tty ? "\r\033[K" : "", epoch + 1, o->epochs, lr, p.sum.total / steps);
        if (!stop && o->edge)
            printf(" (seg %.4f edge %.4f affine %.4f)", p.sum.seg / steps, p.sum.edge / steps, p.sum.affine / steps);
        fflush(stdout);
        if (!stop && ((epoch + 1) % o->eval_every == 0 || epoch + 1 == o->epochs)) {
            Metrics v = evaluate(m, &validation, B, T);
            stop = parallel_any(stop_requested);
            if (!isfinite(v.loss)) not_a_number(log, "validation loss", m->step, epoch, last_path);
            if (!stop) {
                fprintf(log, "val %d %.6f", epoch + 1, v.loss);
                for (int k = METRICS_DICE; k <= METRICS_SPECIFICITY; k++) fprintf(log, " %.6f", v.mean[k]);
                fprintf(log, " %d\n", v.sums.empty);
                printf("  val loss %.4f  Dice %.4f  Jaccard %.4f", v.loss, v.mean[METRICS_DICE], v.mean[METRICS_JACCARD]);
                dice = v.mean[METRICS_DICE];
                if (dice > p.best) {
                    p.best = dice, p.best_epoch = epoch + 1;
                    device.fetch(m);
                    checkpoint_save(m, best_path, p.best_epoch, p.best, T, H, W);
                }
            }
        }
        if (!stop) p.epoch++, p.step = 0, memset(&p.sum, 0, sizeof p.sum);
        device.fetch(m);
        parallel_check_same(m->params, m->num_params * sizeof(float));
        checkpoint_save(m, last_path, p.epoch, dice, T, H, W);
        save_state(m, resume_path, &p, o, log, log_path);
        if (stop) {
            printf("\nstopped by a signal in epoch %d, after %lld steps in all; saved %s; --resume goes on\n", epoch + 1,
                   (long long)m->step, last_path);
            parallel_end();
            exit(130);
        }
        double elapsed = seconds() - start, left = elapsed / (p.epoch - epochs_before) * (o->epochs - p.epoch);
        printf("  %.1f clips/s  %.0f s, about %.0f s left\n", clips_done / train_seconds, elapsed, left);
        fflush(stdout);
    }
    fclose(log);  // everything in it was flushed
    if (parallel.rank == 0) {
        checkpoint_load(m, best_path);
        device.send(m);
        write_pictures(m, &validation, T, picture_path);
    }
    printf("wrote %s, %s, %s (true outline green, predicted red)\n", best_path, log_path, picture_path);
    printf("best val Dice %.4f at epoch %d, total %.0f s\n", p.best, p.best_epoch, seconds() - start);
    for (int i = 0; i <= ahead; i++) batch_free(&batches[i]);
    free(order);
    model_free(m);
    if (f) affine_free(&affine);
    shard_close(&training); shard_close(&validation);
}

#include "dev/bench.h"  // bench: --bench

int train_vivim(int argc, char **argv) {
    Options options;
    start_process(argv);
    parallel_start(&argc, &argv);
    options_parse(&options, OPTIONS, argc, argv);
    options_check(&options, argc, argv);
    threads_wanted(options.threads);
    if (options.batch == 0) options.batch = options.bench ? 1 : 4;
    if (options.help) {
        printf("usage: " VIVIM_PROGRAM " [--option value ...]\n\n"
               "Trains Vivim, a video vision Mamba, to segment videos. Without options: a tiny model on synthetic clips.\n\n");
        options_help(OPTIONS);
    } else if (options.bench) bench(&options);
    else if (options.predict[0] || options.eval) predict(&options);
    else train(&options);
    parallel_end();
    return 0;
}

#ifndef VIVIM_NO_MAIN
int main(int argc, char **argv) { return train_vivim(argc, argv); }
#endif
#endif  // VIVIM_PART
