/*
train_vivim.cu: Vivim on an NVIDIA GPU. Needs the CUDA Toolkit (cudart, cuBLAS) and, for several GPUs, NCCL.

This file includes train_vivim.c: the training loop, options, data, checkpoints and metrics exist once, there. It adds
  1 memory, streams, errors                5 batch norm and the head      9 attention
  2 building blocks of kernels             6 losses, Adam                10 causal conv, selective scan
  3 layer norm, elementwise                7 matmul: cuBLAS              11 the graph: train_vivim.c's lines
  4 bilinear upsampling                    8 convolutions                12 the model on the device, main
For every operation X of train_vivim.c there is X_cuda here, with the same arguments and the same meaning; tensors are device
memory, scalars are not. Then dev/cuda_names.h lets the plain names mean these, and only then the graph is compiled: the lines
of train_vivim.c that say which operation follows which. test_vivim.c, compiled with -DVIVIM_CUDA, does the same: every test of
an operation or of a whole model is a test of this file, too.

Build and run:  make train_vivimcu && ./train_vivimcu      (--help lists every option; they are train_vivim's)
No GPU:         make train_vivim_emu runs the same kernels on the CPU (dev/cudaemu.h): slow, for tests

CONVENTIONS
   Sums are made in an order that sizes alone decide, without atomics: the same input gives the same bits.
   Neighbouring threads work on neighbouring channels. No fast-math, as in train_vivim.c.
   floatX, the type of activations and of the weights that multiply them, is float, or bfloat16 (make PRECISION=BF16); sums,
   statistics, the scan's states, losses, gradients of parameters, Adam and its weights are single precision in any case.
*/
#define VIVIM_NO_MAIN
#define VIVIM_PART 1  // all but the graph
#ifdef VIVIM_BF16
#include <cuda_bf16.h>
#include <mma.h>
#include <type_traits>
typedef __nv_bfloat16 floatX;
#define VIVIM_FLOATX
#endif
#ifndef VIVIM_PROGRAM
#define VIVIM_PROGRAM "train_vivimcu"
#endif
#if !defined(USE_MPI) && !defined(NO_NCCL)
#define VIVIM_TCP  // dev/parallel.h: torchrun starts the processes
#endif
#include "train_vivim.c"
#include <cuda_runtime.h>
#include <cuda_profiler_api.h>
#include <cublasLt.h>
#include <cublas_v2.h>
#ifndef NO_NCCL
#include <nccl.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 1 MEMORY, STREAMS, ERRORS
//
// The device's counterparts of dev/memory.h and dev/parallel.h: cudaCheck, cublasCheck: or the program ends; stream_cuda, in
// which all work is done, in order; malloc_check_cuda, free_check_cuda, ..; to_device, to_host, settle_cuda; sum_over_ranks_cuda
#include "dev/memory_cuda.h"
#include "dev/parallel_cuda.h"

// ---------------------------------------------------------------------------------------------------------------------
// 2 BUILDING BLOCKS OF THE KERNELS BELOW
//
// Activations are channels-last, so neighbouring threads take neighbouring channels, four each: one 16-byte access. Sums
// over rows are made in two steps, partial sums of many blocks, then their sum in a fixed order: no atomics, and the same
// input gives the same bits.

enum { BLOCK = 256, MAX_SLICES = 512 };

static unsigned blocks_for(size_t n, size_t per_block) { return (unsigned)((n + per_block - 1) / per_block); }

// v = x[i .. i+3], zeros from n on; one access where the address allows it
__device__ static void load4(float v[4], const float *x, size_t i, size_t n) {
    if (i + 4 <= n && (uintptr_t)(x + i) % 16 == 0) {
        float4 f = *(const float4 *)(x + i);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
    } else
        for (int k = 0; k < 4; k++) v[k] = i + k < n ? x[i + k] : 0.0f;
}

#ifdef VIVIM_BF16
// The same for bfloat16, the upper half of a float's bits; two lie in an unsigned
__device__ static void load4(float v[4], const floatX *x, size_t i, size_t n) {
    if (i + 4 <= n && (uintptr_t)(x + i) % 8 == 0) {
        uint2 u = *(const uint2 *)(x + i);
        v[0] = __uint_as_float(u.x << 16), v[1] = __uint_as_float(u.x & 0xffff0000u);
        v[2] = __uint_as_float(u.y << 16), v[3] = __uint_as_float(u.y & 0xffff0000u);
    } else
        for (int k = 0; k < 4; k++) v[k] = i + k < n ? (float)x[i + k] : 0.0f;
}
#endif

template <typename F> struct alignas(4 * sizeof(F)) Four { F x[4]; };  // 16 or 8 bytes

// x[i .. i+3] = v, rounded to F; nothing from n on
template <typename F> __device__ static void store4(F *x, const float v[4], size_t i, size_t n) {
    if (i + 4 <= n && (uintptr_t)(x + i) % sizeof(Four<F>) == 0)
        *(Four<F> *)(x + i) = {{(F)v[0], (F)v[1], (F)v[2], (F)v[3]}};
    else
        for (int k = 0; k < 4 && i + k < n; k++) x[i + k] = (F)v[k];
}

template <typename T> struct Same { typedef T type; };  // a parameter that does not take part in finding out what T is

// Elementwise kernels: a thread takes four of n elements, the grid is blocks_for(n, 4 * BLOCK).
__device__ static size_t first_of_four(void) { return 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x); }

// Kernels over rows of C floats: blocks of (lanes, rows), lanes 1 .. 32 threads of a warp share a row.
static dim3 row_block(int C) {
    int lanes = 1;
    while (lanes < 32 && 4 * lanes < C) lanes *= 2;
    return dim3((unsigned)lanes, (unsigned)(BLOCK / lanes));
}
__device__ static int row_of_thread(void) { return (int)(blockIdx.x * blockDim.y + threadIdx.y); }

// the sum over a row's lanes, in all of them; every thread of the warp calls it
__device__ static float sum_over_lanes(float x) {
    for (int o = (int)blockDim.x / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// the sum over a block of one dimension, in every thread; every thread calls it
__device__ static double sum_over_block(double x) {
    __shared__ double of_warp[32];
    double sum = 0.0;
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    __syncthreads();  // until here of_warp may be read for the sum before
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += of_warp[w];
    return sum;
}

// the sum over threadIdx.y of a block (32, at most 32), in the threads with threadIdx.y = 0; every thread calls it
__device__ static float sum_over_y(float x) {
    __shared__ float of_thread[32][32];
    float sum = 0.0f;
    __syncthreads();
    of_thread[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    for (int y = 0; y < (int)blockDim.y && threadIdx.y == 0; y++) sum += of_thread[y][threadIdx.x];
    return sum;
}

// Second step: a (N) [+]= sum over slices of partial (slices, groups, N) / divisor for group 0; b, c for groups 1 and 2
__global__ static void finish_sums_kernel(float *a, float *b, float *c, const float *partial, int slices, int N, float divisor,
                                          int accumulate) {
    float *out = blockIdx.y == 0 ? a : blockIdx.y == 1 ? b : c, sum = 0.0f;
    int j = (int)(blockIdx.x * 32 + threadIdx.x);
    #pragma unroll 8
    for (int s = (int)threadIdx.y; s < slices && j < N; s += (int)blockDim.y)
        sum += partial[((size_t)s * gridDim.y + blockIdx.y) * N + j];
    sum = sum_over_y(sum) / divisor;
    if (threadIdx.y == 0 && j < N) out[j] = (accumulate ? out[j] : 0.0f) + sum;
}

static void finish_sums(float *a, float *b, float *c, const float *partial, int slices, int N, float divisor, int accumulate) {
    dim3 grid((unsigned)ceil_div(N, 32), c ? 3 : b ? 2 : 1);
    finish_sums_kernel<<<grid, dim3(32, 32), 0, stream_cuda>>>(a, b, c, partial, slices, N, divisor, accumulate);
}

// First step, for sums over rows of (rows, N): blocks of (32 columns, 8 rows), grid (columns, slices of the rows)
static dim3 slice_grid(int rows, int N) {
    int columns = ceil_div(N, 32), enough = min_int(256, max_int(1, 2048 / columns));
    return dim3((unsigned)columns, (unsigned)min_int(ceil_div(rows, 64), enough));
}
__device__ static int slice_begin(int rows, unsigned slice) { return (int)((int64_t)rows * slice / gridDim.y); }

// partial (slices, N): sums of x (M, N) or, with mean (N), of (x - mean)^2
template <typename F>
__global__ static void column_sums_kernel(float *partial, const F *x, const float *mean, int M, int N) {
    int j = (int)(blockIdx.x * 32 + threadIdx.x), end = j < N ? slice_begin(M, blockIdx.y + 1) : 0;
    float sum = 0.0f, m = mean && j < N ? mean[j] : 0.0f;
    #pragma unroll 4
    for (int i = slice_begin(M, blockIdx.y) + (int)threadIdx.y; i < end; i += 8) {
        float d = (float)x[(size_t)i * N + j] - m;
        sum += mean ? d * d : d;
    }
    sum = sum_over_y(sum);
    if (threadIdx.y == 0 && j < N) partial[(size_t)blockIdx.y * N + j] = sum;
}

// sums (N) [+]= column sums / divisor
template <typename F>
static void column_sums(float *sums, const F *x, const float *mean, int M, int N, float divisor, int accumulate) {
    if (M == 0 || N == 0) return;
    dim3 grid = slice_grid(M, N);
    float *partial = malloc_floats_cuda((size_t)grid.y * N);
    column_sums_kernel<F><<<grid, dim3(32, 8), 0, stream_cuda>>>(partial, x, mean, M, N);
    finish_sums(sums, nullptr, nullptr, partial, (int)grid.y, N, divisor, accumulate);
    free_check_cuda(partial);
}

// sums (N) += column sums of x (M, N)
template <typename F> static void add_column_sums_cuda(float *sums, const F *x, int M, int N) {
    column_sums(sums, x, nullptr, M, N, 1.0f, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 LAYER NORM, GELU, RELU, RESIDUAL; STEP SIZES AND GATE OF ST-MAMBA

// out = (inp - mean) rstd weight + bias; out, inp (rows, C), mean, rstd (rows), weight, bias (C). A row is read three times,
// all but the first from the cache next to the arithmetic.
__global__ static void layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const floatX *inp, const float *weight,
                                                const float *bias, int rows, int C) {
    int r = row_of_thread(), begin = 4 * (int)threadIdx.x, step = 4 * (int)blockDim.x;
    int end = r < rows ? C : 0;  // behind the last row nothing is done but the shuffles
    const floatX *x_r = inp + (size_t)r * C;
    float x[4], w[4], b[4], o[4], sum = 0.0f, var = 0.0f, m, s;
    for (int c = begin; c < end; c += step) {
        load4(x, x_r, c, C);
        sum += (x[0] + x[1]) + (x[2] + x[3]);
    }
    m = sum_over_lanes(sum) / (float)C;
    for (int c = begin; c < end; c += step) {
        load4(x, x_r, c, C);
        for (int k = 0; k < 4; k++) var += c + k < C ? (x[k] - m) * (x[k] - m) : 0.0f;
    }
    s = 1.0f / sqrtf(sum_over_lanes(var) / (float)C + 1e-5f);
    for (int c = begin; c < end; c += step) {
        load4(x, x_r, c, C); load4(w, weight, c, C); load4(b, bias, c, C);
        for (int k = 0; k < 4; k++) o[k] = (x[k] - m) * s * w[k] + b[k];
        store4(out + (size_t)r * C, o, c, C);
    }
    if (r < rows && threadIdx.x == 0) mean[r] = m, rstd[r] = s;
}

static void layernorm_forward_cuda(floatX *out, float *mean, float *rstd, const floatX *inp, const float *weight,
                                   const float *bias, int rows, int C) {
    if (rows == 0) return;
    dim3 block = row_block(C);
    unsigned grid = blocks_for((size_t)rows, block.y);
    layernorm_forward_kernel<<<grid, block, 0, stream_cuda>>>(out, mean, rstd, inp, weight, bias, rows, C);
}

// With n = (inp - mean) rstd and dn = dout * weight:  dinp = dresidual + rstd (dn - mean_c(dn) - n mean_c(dn n)), and
// partial (blocks, {dweight, dbias}, C) = a block's sums of dout n and of dout. Every row of threads sums in floats of its
// own in shared memory, channel 4 q + k at k * ceil(C/4) + q: neighbouring threads touch neighbouring floats.
__global__ static void layernorm_backward_kernel(floatX *dinp, float *partial, const floatX *dout, const floatX *dresidual,
                                                 const floatX *inp, const float *weight, const float *mean, const float *rstd,
                                                 int rows, int C) {
    extern __shared__ float layernorm_sums[];  // (rows at a time, {dweight, dbias}, 4, ceil(C/4))
    int quads = ceil_div(C, 4), at_a_time = (int)blockDim.y, thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
    int threads = (int)(blockDim.x * blockDim.y);
    float *dw = layernorm_sums + (size_t)threadIdx.y * 8 * quads, *db = dw + 4 * quads;
    for (int i = thread; i < at_a_time * 8 * quads; i += threads) layernorm_sums[i] = 0.0f;
    __syncthreads();
    for (int first = (int)blockIdx.x * at_a_time; first < rows; first += (int)gridDim.x * at_a_time) {
        int r = min_int(first + (int)threadIdx.y, rows - 1), end = first + (int)threadIdx.y < rows ? quads : 0;
        const floatX *x_r = inp + (size_t)r * C, *dy_r = dout + (size_t)r * C;
        float x[4], dy[4], w[4], m = mean[r], s = rstd[r], dn_mean = 0.0f, dn_n_mean = 0.0f;
        for (int q = (int)threadIdx.x; q < end; q += (int)blockDim.x) {
            load4(x, x_r, 4 * q, C); load4(dy, dy_r, 4 * q, C); load4(w, weight, 4 * q, C);
            for (int k = 0; k < 4; k++) {
                float n = (x[k] - m) * s, dn = dy[k] * w[k];
                dn_mean += dn; dn_n_mean += dn * n;
                dw[k * quads + q] += dy[k] * n; db[k * quads + q] += dy[k];
            }
        }
        dn_mean = sum_over_lanes(dn_mean) / (float)C, dn_n_mean = sum_over_lanes(dn_n_mean) / (float)C;
        for (int q = (int)threadIdx.x; q < end; q += (int)blockDim.x) {
            float dx[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            load4(x, x_r, 4 * q, C); load4(dy, dy_r, 4 * q, C); load4(w, weight, 4 * q, C);
            if (dresidual) load4(dx, dresidual + (size_t)r * C, 4 * q, C);
            for (int k = 0; k < 4; k++) dx[k] += s * (dy[k] * w[k] - dn_mean - (x[k] - m) * s * dn_n_mean);
            store4(dinp + (size_t)r * C, dx, 4 * q, C);
        }
    }
    __syncthreads();
    for (int i = thread; i < 2 * C; i += threads) {
        int group = i / C, c = i % C; float sum = 0.0f;
        for (int y = 0; y < at_a_time; y++) sum += layernorm_sums[((size_t)y * 8 + 4 * group + c % 4) * quads + c / 4];
        partial[(size_t)blockIdx.x * 2 * C + i] = sum;
    }
}

static void layernorm_backward_cuda(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *dresidual,
                                    const floatX *inp, const float *weight, const float *mean, const float *rstd, int rows,
                                    int C) {
    if (rows == 0) return;
    dim3 block = row_block(C);
    size_t row = (size_t)8 * ceil_div(C, 4) * sizeof(float);  // shared memory of a row: no more than 32 KiB of a block
    while (block.x * block.y > 32 && row * block.y > 32768) block.y /= 2;
    unsigned grid = (unsigned)min_int((int)blocks_for((size_t)rows, block.y), MAX_SLICES);
    float *partial = malloc_floats_cuda((size_t)grid * 2 * C);
    layernorm_backward_kernel<<<grid, block, row * block.y, stream_cuda>>>(dinp, partial, dout, dresidual, inp, weight, mean,
                                                                           rstd, rows, C);
    finish_sums(dweight, dbias, nullptr, partial, (int)grid, C, 1.0f, 1);
    free_check_cuda(partial);
}

// Elementwise operations of n floats: out = op(a), or op(a, b) for the backward ones, a = dout, b what forward left. out may
// be a or b; NaN stays: 0*a where one would write 0.
enum { RELU, RELU_BACKWARD };

template <int OP, typename F> __global__ static void elementwise_kernel(F *out, const F *a, const F *b, size_t n) {
    size_t i = first_of_four(); float x[4], y[4];
    load4(x, a, i, n);
    if (b) load4(y, b, i, n);
    for (int k = 0; k < 4; k++) {
        if (OP == RELU) x[k] = x[k] > 0.0f ? x[k] : 0.0f * x[k];
        if (OP == RELU_BACKWARD) x[k] = y[k] > 0.0f ? x[k] : 0.0f * x[k];
    }
    store4(out, x, i, n);
}

template <int OP, typename F> static void elementwise(F *out, const F *a, const F *b, size_t n) {
    if (n == 0) return;
    elementwise_kernel<OP, F><<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(out, a, b, n);
}

template <typename F> static void relu_forward_cuda(F *x, size_t n) { elementwise<RELU, F>(x, x, nullptr, n); }
template <typename F> static void relu_backward_cuda(F *dx, const F *y, size_t n) {
    elementwise<RELU_BACKWARD, F>(dx, dx, y, n);
}

// out = gelu(inp), dinp = dout * gelu'(inp); dinp may be dout. n elements
__global__ static void gelu_backward_kernel(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    size_t i = first_of_four(); float x[4], dx[4];
    load4(x, inp, i, n); load4(dx, dout, i, n);
    for (int k = 0; k < 4; k++) dx[k] *= gelu_grad_simd(x[k]), x[k] = gelu_simd(x[k]);
    store4(out, x, i, n); store4(dinp, dx, i, n);
}

static void gelu_backward_cuda(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    if (n == 0) return;
    gelu_backward_kernel<<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(out, dinp, dout, inp, n);
}

// out = x + scale * branch, n elements; x == NULL: 0
template <typename F> __global__ static void residual_kernel(F *out, const F *x, const F *branch, float scale, size_t n) {
    size_t i = first_of_four(); float v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, b[4];
    if (x) load4(v, x, i, n);
    load4(b, branch, i, n);
    for (int k = 0; k < 4; k++) v[k] += scale * b[k];
    store4(out, v, i, n);
}

template <typename F>
static void residual_cuda(F *out, const typename Same<F>::type *x, const F *branch, float scale, size_t n) {
    if (n == 0) return;
    residual_kernel<F><<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(out, x, branch, scale, n);
}

// ---- Step sizes and gate of ST-Mamba. A block of 32 lanes x 8 warps takes 128 channels, 4 a lane.

enum { DT_CHANNELS = 128, DT_WARPS = 8, DT_ROWS = 4, DT_RANK = 32, DT_PITCH = DT_CHANNELS + 4 };

// dt (rows, D) = softplus(F.linear(delta, weight, bias)): delta (rows, ld), of which R columns are read; weight (D, R); bias (D).
// weight's rows of the block lie in shared memory, transposed; a warp reads each of their numbers for 4 rows.
__global__ static void dt_forward_kernel(floatX *dt, const floatX *delta, int ld, const float *weight, const float *bias, int rows,
                                         int D, int R) {
    __shared__ float4 columns[DT_RANK][DT_PITCH / 4];
    int first = (int)blockIdx.x * DT_CHANNELS, d = first + 4 * (int)threadIdx.x, step = (int)gridDim.y * DT_WARPS * DT_ROWS;
    float b[4];
    for (int i = (int)(threadIdx.y * 32 + threadIdx.x); i < DT_CHANNELS * R; i += 32 * DT_WARPS)
        ((float *)columns[i % R])[i / R] = first + i / R < D ? weight[(size_t)first * R + i] : 0.0f;
    __syncthreads();
    if (d >= D) return;
    load4(b, bias, d, D);
    for (int r0 = (int)(blockIdx.y * DT_WARPS + threadIdx.y) * DT_ROWS; r0 < rows; r0 += step) {
        float v[DT_ROWS][4];
        for (int i = 0; i < DT_ROWS; i++)
            for (int c = 0; c < 4; c++) v[i][c] = b[c];
        for (int k0 = 0; k0 < R; k0 += 4) {
            float x[DT_ROWS][4];
            #pragma unroll
            for (int i = 0; i < DT_ROWS; i++) load4(x[i], delta + (size_t)min_int(r0 + i, rows - 1) * ld, k0, R);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                float4 w = columns[min_int(k0 + k, R - 1)][threadIdx.x];
                #pragma unroll
                for (int i = 0; i < DT_ROWS; i++)
                    v[i][0] += x[i][k] * w.x, v[i][1] += x[i][k] * w.y, v[i][2] += x[i][k] * w.z, v[i][3] += x[i][k] * w.w;
            }
        }
        #pragma unroll
        for (int i = 0; i < DT_ROWS; i++) {
            for (int c = 0; c < 4; c++) v[i][c] = softplus_simd(v[i][c]);
            if (r0 + i < rows) store4(dt + (size_t)(r0 + i) * D, v[i], d, D);
        }
    }
}

static void dt_forward_cuda(floatX *dt, const floatX *delta, int ld, const float *weight, const float *bias, int rows, int D,
                            int R) {
    if (rows == 0 || D == 0) return;
    if (R < 1 || R > DT_RANK) fail("the step sizes have a kernel for dt_rank = 1 to %d, not %d", DT_RANK, R);
    int columns = ceil_div(D, DT_CHANNELS), enough = max_int(1, 512 / columns);  // at a time
    dim3 grid((unsigned)columns, (unsigned)min_int(ceil_div(rows, DT_WARPS * DT_ROWS), enough));
    dt_forward_kernel<<<grid, dim3(32, DT_WARPS), 0, stream_cuda>>>(dt, delta, ld, weight, bias, rows, D, R);
}

// ddt (rows, D) becomes the gradient before softplus: softplus'(v) = 1 - e^-softplus(v). partial (slices, D): its column sums
__global__ static void dt_backward_kernel(floatX *ddt, float *partial, const floatX *dt, int rows, int D) {
    int d = (int)blockIdx.x * DT_CHANNELS + 4 * (int)threadIdx.x, end = d < D ? slice_begin(rows, blockIdx.y + 1) : 0;
    float y[4], dy[4], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int r = slice_begin(rows, blockIdx.y) + (int)threadIdx.y; r < end; r += DT_WARPS) {
        size_t row = (size_t)r * D;
        load4(y, dt + row, d, D); load4(dy, ddt + row, d, D);
        for (int c = 0; c < 4; c++) dy[c] *= 1.0f - exp_simd(-y[c]), sum[c] += dy[c];
        store4(ddt + row, dy, d, D);
    }
    for (int c = 0; c < 4; c++) sum[c] = sum_over_y(sum[c]);
    if (threadIdx.y == 0) store4(partial + (size_t)blockIdx.y * D, sum, d, D);
}

// and dbias (D) += its column sums
static void dt_backward_cuda(floatX *ddt, float *dbias, const floatX *dt, int rows, int D) {
    if (rows == 0 || D == 0) return;
    int columns = ceil_div(D, DT_CHANNELS), enough = max_int(1, 2048 / columns);
    dim3 grid((unsigned)columns, (unsigned)min_int(ceil_div(rows, 8 * DT_WARPS), min_int(enough, MAX_SLICES)));
    float *partial = malloc_floats_cuda((size_t)grid.y * D);
    dt_backward_kernel<<<grid, dim3(32, DT_WARPS), 0, stream_cuda>>>(ddt, partial, dt, rows, D);
    finish_sums(dbias, nullptr, nullptr, partial, (int)grid.y, D, 1.0f, 1);
    free_check_cuda(partial);
}

// gated (rows, D) = scale * y * SiLU(z), y (rows, D), z the second half of xz's rows (rows, 2D)
__global__ static void gate_forward_kernel(floatX *gated, const floatX *y, const floatX *xz, float scale, int rows, int D) {
    int r = row_of_thread(); size_t row = (size_t)r * D;
    for (int d = 4 * (int)threadIdx.x; d < D && r < rows; d += 4 * (int)blockDim.x) {
        float v[4], z[4];
        load4(v, y + row, d, D); load4(z, xz + 2 * row + D, d, D);
        for (int k = 0; k < 4; k++) v[k] = scale * v[k] * silu_simd(z[k]);
        store4(gated + row, v, d, D);
    }
}

static void gate_forward_cuda(floatX *gated, const floatX *y, const floatX *xz, float scale, int rows, int D) {
    if (rows == 0) return;
    dim3 block = row_block(D);
    gate_forward_kernel<<<blocks_for((size_t)rows, block.y), block, 0, stream_cuda>>>(gated, y, xz, scale, rows, D);
}

// gated again; dy = dgated * SiLU(z) * scale (dy may be dgated); dz = dgated * y * SiLU'(z) * scale, second half of dxz's rows
__global__ static void gate_backward_kernel(floatX *gated, floatX *dy, floatX *dxz, const floatX *dgated, const floatX *y,
                                            const floatX *xz, float scale, int rows, int D) {
    int r = row_of_thread(); size_t row = (size_t)r * D;
    for (int d = 4 * (int)threadIdx.x; d < D && r < rows; d += 4 * (int)blockDim.x) {
        float dg[4], v[4], z[4], dz[4];
        load4(dg, dgated + row, d, D); load4(v, y + row, d, D); load4(z, xz + 2 * row + D, d, D);
        for (int k = 0; k < 4; k++) {
            dg[k] *= scale;
            dz[k] = dg[k] * v[k] * silu_grad_simd(z[k]);
            dg[k] *= silu_simd(z[k]), v[k] *= scale * silu_simd(z[k]);
        }
        store4(dxz + 2 * row + D, dz, d, D); store4(dy + row, dg, d, D); store4(gated + row, v, d, D);
    }
}

static void gate_backward_cuda(floatX *gated, floatX *dy, floatX *dxz, const floatX *dgated, const floatX *y, const floatX *xz,
                               float scale, int rows, int D) {
    if (rows == 0) return;
    dim3 block = row_block(D);
    unsigned grid = blocks_for((size_t)rows, block.y);
    gate_backward_kernel<<<grid, block, 0, stream_cuda>>>(gated, dy, dxz, dgated, y, xz, scale, rows, D);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 BILINEAR UPSAMPLING: blocks of (lanes of a pixel, neighbouring pixels of a row), grid (rows of all frames, pieces of a row)

static dim3 pixel_grid(int rows, int W, dim3 block) { return dim3((unsigned)rows, blocks_for((size_t)W, block.y)); }

// o += bilinear mix of channels c .. c+3 of inp (H, W, C), at output pixel (oy, ox) of (OH, OW)
template <typename F>
__device__ static void add_bilinear(float o[4], const F *inp, int H, int W, int OH, int OW, int C, int oy, int ox, int c) {
    int y0, y1, x0, x1; float wy, wx, a0[4], a1[4], b0[4], b1[4];
    bilinear_taps(&y0, &y1, &wy, oy, H, OH);
    bilinear_taps(&x0, &x1, &wx, ox, W, OW);
    load4(a0, inp + ((size_t)y0 * W + x0) * C, c, C); load4(a1, inp + ((size_t)y1 * W + x0) * C, c, C);
    load4(b0, inp + ((size_t)y0 * W + x1) * C, c, C); load4(b1, inp + ((size_t)y1 * W + x1) * C, c, C);
    for (int k = 0; k < 4; k++) {
        float a = (1.0f - wy) * a0[k] + wy * a1[k], b = (1.0f - wy) * b0[k] + wy * b1[k];
        o[k] = o[k] + (1.0f - wx) * a + wx * b;
    }
}

template <typename F> struct Maps { const F *inp[3]; int heights[3], widths[3]; };

// out (N, OH, OW, C) [+]= COUNT maps (N, heights[i], widths[i], C), each upsampled: out is read and written once
template <int COUNT, typename F>
__global__ static void bilinear_forward_kernel(F *out, Maps<F> maps, int OH, int OW, int C, int accumulate) {
    int n = (int)blockIdx.x / OH, oy = (int)blockIdx.x % OH, ox = (int)(blockIdx.y * blockDim.y + threadIdx.y);
    F *to = out + ((size_t)blockIdx.x * OW + ox) * C;
    for (int c = 4 * (int)threadIdx.x; c < C && ox < OW; c += 4 * (int)blockDim.x) {
        float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (accumulate) load4(o, to, c, C);
        #pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int H = maps.heights[i], W = maps.widths[i];
            add_bilinear(o, maps.inp[i] + (size_t)n * H * W * C, H, W, OH, OW, C, oy, ox, c);
        }
        store4(to, o, c, C);
    }
}

template <typename F>
static void bilinear_forward_cuda(F *out, const F *inp, int N, int H, int W, int OH, int OW, int C, int accumulate) {
    if (N == 0) return;
    Maps<F> maps = {{inp, nullptr, nullptr}, {H, 0, 0}, {W, 0, 0}};
    dim3 block = row_block(C), grid = pixel_grid(N * OH, OW, block);
    bilinear_forward_kernel<1, F><<<grid, block, 0, stream_cuda>>>(out, maps, OH, OW, C, accumulate);
}

static void bilinear_add3_cuda(floatX *out, const floatX *a, const floatX *b, const floatX *c, const int heights[3],
                               const int widths[3], int N, int OH, int OW, int C) {
    if (N == 0) return;
    Maps<floatX> maps = {{a, b, c}, {heights[0], heights[1], heights[2]}, {widths[0], widths[1], widths[2]}};
    dim3 block = row_block(C), grid = pixel_grid(N * OH, OW, block);
    bilinear_forward_kernel<3, floatX><<<grid, block, 0, stream_cuda>>>(out, maps, OH, OW, C, 1);
}

// the weight with which output o reads input i (0: it does not), along one axis
__device__ static float bilinear_weight(int o, int i, int in, int out) {
    int i0, i1; float w1;
    bilinear_taps(&i0, &i1, &w1, o, in, out);
    return (i0 == i ? 1.0f - w1 : 0.0f) + (i1 == i ? w1 : 0.0f);
}

// the outputs that may read input i: first and last, one too many rather than one too few
__device__ static void bilinear_readers(int *first, int *last, int i, int in, int out) {
    float scale = (float)out / (float)in;
    *first = max_int(0, (int)floorf(((float)i - 0.5f) * scale - 0.5f) - 1);
    *last = min_int(out - 1, (int)ceilf(((float)i + 1.5f) * scale - 0.5f) + 1);
}

// The transpose: dinp (N, H, W, C), every input pixel gathers from the output pixels that read it. blockIdx.z: channels
template <typename F, typename G>
__global__ static void bilinear_backward_kernel(F *dinp, const G *dout, int H, int W, int OH, int OW, int C) {
    int n = (int)blockIdx.x / H, y = (int)blockIdx.x % H, x = (int)(blockIdx.y * blockDim.y + threadIdx.y);
    int c = 4 * (int)(blockIdx.z * blockDim.x + threadIdx.x), first_y, last_y, first_x, last_x;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, d[4];
    if (x >= W || c >= C) return;
    bilinear_readers(&first_y, &last_y, y, H, OH);
    bilinear_readers(&first_x, &last_x, x, W, OW);
    for (int oy = first_y; oy <= last_y; oy++) {
        float wy = bilinear_weight(oy, y, H, OH);
        const G *row = dout + ((size_t)n * OH + oy) * OW * C;
        for (int ox = first_x; ox <= last_x && wy != 0.0f; ox++) {
            float w = wy * bilinear_weight(ox, x, W, OW);
            if (w == 0.0f) continue;
            load4(d, row + (size_t)ox * C, c, C);
            for (int k = 0; k < 4; k++) sum[k] += w * d[k];
        }
    }
    store4(dinp + ((size_t)blockIdx.x * W + x) * C, sum, c, C);
}

template <typename F, typename G>
static void bilinear_backward_cuda(F *dinp, const G *dout, int N, int H, int W, int OH, int OW, int C) {
    if (N == 0) return;
    dim3 block = row_block(C), grid = pixel_grid(N * H, W, block);
    grid.z = blocks_for((size_t)C, 4 * block.x);
    bilinear_backward_kernel<F, G><<<grid, block, 0, stream_cuda>>>(dinp, dout, H, W, OH, OW, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 BATCH NORM AND THE SEGMENTATION HEAD

// mean and biased variance (C) of inp (rows, C): the mean first, then the squares of the differences from it
template <typename F>
static void batchnorm_statistics_cuda(float *mean, float *var, const F *inp, size_t rows, int C) {
    column_sums(mean, inp, nullptr, (int)rows, C, (float)rows, 0);
    column_sums(var, inp, mean, (int)rows, C, (float)rows, 0);
}

__global__ static void batchnorm_vectors_kernel(float *mean, float *rstd, float *scale, float *shift, float *running_mean,
                                                float *running_var, const float *gamma, const float *beta, float unbiased,
                                                int E, int training) {
    int e = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (e >= E) return;
    float m = training ? mean[e] : running_mean[e], var = training ? rstd[e] : running_var[e];
    if (training) {
        running_mean[e] += 0.1f * (m - running_mean[e]);
        running_var[e] += 0.1f * (var * unbiased - running_var[e]);
    }
    mean[e] = m, rstd[e] = 1.0f / sqrtf(var + 1e-5f);
    scale[e] = gamma[e] * rstd[e], shift[e] = beta[e] - m * scale[e];
}

static void batchnorm_vectors_cuda(float *mean, float *rstd, float *scale, float *shift, float *running_mean,
                                   float *running_var, const float *gamma, const float *beta, size_t rows, int E,
                                   int training) {
    float unbiased = (float)((double)rows / (double)(rows > 1 ? rows - 1 : 1));
    if (E == 0) return;
    batchnorm_vectors_kernel<<<blocks_for((size_t)E, BLOCK), BLOCK, 0, stream_cuda>>>(
        mean, rstd, scale, shift, running_mean, running_var, gamma, beta, unbiased, E, training);
}

// low (rows) = w_out . Dropout(ReLU(map*scale + shift)) + b_out; map (rows, E), the vectors (E)
__global__ static void head_forward_kernel(float *low, const floatX *map, const float *scale, const float *shift,
                                           const float *w_out, const float *b_out, int rows, int E, uint64_t key,
                                           uint64_t first, float p) {
    int r = row_of_thread(), end = r < rows ? E : 0;
    size_t row = (size_t)r * E; float x[4], sc[4], sh[4], w[4], sum = 0.0f;
    for (int e = 4 * (int)threadIdx.x; e < end; e += 4 * (int)blockDim.x) {
        load4(x, map + row, e, E); load4(sc, scale, e, E); load4(sh, shift, e, E); load4(w, w_out, e, E);
        for (int k = 0; k < 4; k++) {
            float bn = x[k] * sc[k] + sh[k], relu = bn > 0.0f ? bn : 0.0f * bn;
            sum += relu * dropout_factor(key, first + row + (uint64_t)(e + k), p) * w[k];
        }
    }
    sum = sum_over_lanes(sum);
    if (r < rows && threadIdx.x == 0) low[r] = sum + b_out[0];
}

static void head_forward_cuda(float *low, const floatX *map, const float *scale, const float *shift, const float *w_out,
                              const float *b_out, int rows, int E, uint64_t key, uint64_t first, float p) {
    if (rows == 0) return;
    dim3 block = row_block(E);
    head_forward_kernel<<<blocks_for((size_t)rows, block.y), block, 0, stream_cuda>>>(low, map, scale, shift, w_out, b_out,
                                                                                      rows, E, key, first, p);
}

// partial (slices, {dw_out, dgamma, dbeta}, E). With n = (map - mean) rstd and dbn = dlow * w_out * dropout where bn > 0:
//   dgamma = sum dbn n;  dbeta = sum dbn;  dw_out = sum dlow relu
__global__ static void head_backward_params_kernel(float *partial, const float *dlow, const floatX *map, const float *mean,
                                                   const float *rstd, const float *scale, const float *shift,
                                                   const float *w_out, int rows, int E, uint64_t key, uint64_t first, float p) {
    int e = (int)(blockIdx.x * 32 + threadIdx.x), column = min_int(e, E - 1);
    int end = e < E ? slice_begin(rows, blockIdx.y + 1) : 0;
    float m = mean[column], rs = rstd[column], sc = scale[column], sh = shift[column], w = w_out[column];
    float dw = 0.0f, dg = 0.0f, db = 0.0f, *to = partial + (size_t)blockIdx.y * 3 * E + column;
    for (int r = slice_begin(rows, blockIdx.y) + (int)threadIdx.y; r < end; r += 8) {
        size_t i = (size_t)r * E + e;
        float x = map[i], bn = x * sc + sh, on = bn > 0.0f ? 1.0f : 0.0f;
        float d = dlow[r] * dropout_factor(key, first + i, p);
        dw += d * on * bn; dg += d * on * w * (x - m) * rs;
        db += d * on * w;
    }
    dw = sum_over_y(dw), dg = sum_over_y(dg), db = sum_over_y(db);
    if (threadIdx.y == 0 && e < E) to[0] = dw, to[E] = dg, to[2 * E] = db;
}

static void head_backward_params_cuda(float *dw_out, float *db_out, float *dgamma, float *dbeta, const float *dlow,
                                      const floatX *map, const float *mean, const float *rstd, const float *scale,
                                      const float *shift, const float *w_out, int rows, int E, uint64_t key, uint64_t first,
                                      float p) {
    if (rows == 0) return;
    dim3 grid = slice_grid(rows, E);
    float *partial = malloc_floats_cuda((size_t)grid.y * 3 * E);
    head_backward_params_kernel<<<grid, dim3(32, 8), 0, stream_cuda>>>(partial, dlow, map, mean, rstd, scale, shift, w_out,
                                                                       rows, E, key, first, p);
    finish_sums(dw_out, dgamma, dbeta, partial, (int)grid.y, E, 1.0f, 1);
    add_column_sums_cuda(db_out, dlow, rows, 1);
    free_check_cuda(partial);
}

// map (rows, E) becomes its own gradient:  gamma rstd (dbn - dbeta/n - (map - mean) rstd dgamma/n);  dlow == NULL: dbn = 0
__global__ static void head_backward_map_kernel(floatX *map, const float *dlow, const float *dgamma, const float *dbeta,
                                                const float *mean, const float *rstd, const float *scale, const float *shift,
                                                const float *w_out, int rows, int E, float inverse, uint64_t key,
                                                uint64_t first, float p) {
    int r = row_of_thread(), end = r < rows ? E : 0;
    size_t row = (size_t)r * E; float x[4], sc[4], sh[4], w[4], m[4], rs[4], dg[4], db[4], dl = dlow && end ? dlow[r] : 0.0f;
    for (int e = 4 * (int)threadIdx.x; e < end; e += 4 * (int)blockDim.x) {
        load4(x, map + row, e, E); load4(sc, scale, e, E); load4(sh, shift, e, E); load4(w, w_out, e, E);
        load4(m, mean, e, E); load4(rs, rstd, e, E); load4(dg, dgamma, e, E); load4(db, dbeta, e, E);
        for (int k = 0; k < 4; k++) {
            float d = dl * dropout_factor(key, first + row + (uint64_t)(e + k), p);
            float dbn = x[k] * sc[k] + sh[k] > 0.0f ? d * w[k] : 0.0f;
            x[k] = sc[k] * (dbn - (db[k] + (x[k] - m[k]) * rs[k] * dg[k]) * inverse);
        }
        store4(map + row, x, e, E);
    }
}

static void head_backward_map_cuda(floatX *map, const float *dlow, const float *dgamma, const float *dbeta, const float *mean,
                                   const float *rstd, const float *scale, const float *shift, const float *w_out, int rows,
                                   int E, double n, uint64_t key, uint64_t first, float p) {
    if (rows == 0) return;
    dim3 block = row_block(E);
    head_backward_map_kernel<<<blocks_for((size_t)rows, block.y), block, 0, stream_cuda>>>(
        map, dlow, dgamma, dbeta, mean, rstd, scale, shift, w_out, rows, E, (float)(1.0 / n), key, first, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 LOSSES OF MASK AND BOUNDARY, ADAM

enum { SEG_SUMS = 5 };  // of a frame: I, U, weights, bce, weight * bce

// weight (B, H, W) = 1 + 5 |avgpool31(mask) - mask|, and partial (B, pieces, SEG_SUMS), a piece being BLOCK pixels of a row:
// the block sums mask over 31 rows for its columns and 15 on either side, then every thread 31 of these sums.
__global__ static void segloss_forward_kernel(float *weight, double *partial, const float *logits, const float *mask, int H,
                                              int W) {
    __shared__ double column[BLOCK + POOL - 1];
    int y = (int)blockIdx.x % H, first = (int)blockIdx.y * BLOCK, thread = (int)threadIdx.x;
    int above = min_int(y, POOL / 2), below = min_int(H - 1 - y, POOL / 2);  // rows of the window
    size_t row = (size_t)blockIdx.x * W, piece = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    for (int i = thread; i < BLOCK + POOL - 1; i += BLOCK) {
        int x = first + i - POOL / 2; double sum = 0.0;
        for (int dy = -above; dy <= below && x >= 0 && x < W; dy++) sum += (double)mask[row + x + (int64_t)dy * W];
        column[i] = sum;
    }
    __syncthreads();
    double sums[SEG_SUMS] = {0.0, 0.0, 0.0, 0.0, 0.0}, window = 0.0;
    if (first + thread < W) {
        for (int i = 0; i < POOL; i++) window += column[thread + i];
        size_t i = row + (size_t)(first + thread);
        float s = logits[i], m = mask[i], w = 1.0f + 5.0f * fabsf((float)(window / (POOL * POOL)) - m);
        float p = sigmoid_simd(s), e = softplus_simd(s) - s * m;
        weight[i] = w;
        sums[0] = (double)(w * p * m), sums[1] = (double)(w * (p + m)), sums[2] = (double)w;
        sums[3] = (double)e, sums[4] = (double)(w * e);
    }
    for (int k = 0; k < SEG_SUMS; k++) {
        double sum = sum_over_block(sums[k]);
        if (thread == 0) partial[piece * SEG_SUMS + k] = sum;
    }
}

// a block a frame: sums (B, 3) = {I, U, sum of weights}, loss (B) = bce + 1 - (I + 1)/(U - I + 1); n pixels in a frame
__global__ static void segloss_finish_kernel(double *sums, double *loss, const double *partial, int pieces, double n,
                                             int weighted) {
    int b = (int)blockIdx.x; double total[SEG_SUMS];
    for (int k = 0; k < SEG_SUMS; k++) {
        double sum = 0.0;
        for (int i = (int)threadIdx.x; i < pieces; i += BLOCK) sum += partial[((size_t)b * pieces + i) * SEG_SUMS + k];
        total[k] = sum_over_block(sum);
    }
    if (threadIdx.x > 0) return;
    sums[3 * b] = total[0], sums[3 * b + 1] = total[1], sums[3 * b + 2] = total[2];
    loss[b] = (weighted ? total[4] / total[2] : total[3] / n) + 1.0 - (total[0] + 1.0) / (total[1] - total[0] + 1.0);
}

static double segloss_forward_cuda(float *weight, double *sums, const float *logits, const float *mask, int B, int H, int W,
                                   int weighted) {
    dim3 grid((unsigned)(B * H), blocks_for((size_t)W, BLOCK));
    int pieces = H * (int)grid.y;
    double *partial = (double *)malloc_check_cuda(sizeof(double) * SEG_SUMS * B * pieces), total = 0.0;
    double *loss_cuda = (double *)malloc_check_cuda(sizeof(double) * B), *loss = (double *)malloc_check(sizeof(double) * B);
    segloss_forward_kernel<<<grid, BLOCK, 0, stream_cuda>>>(weight, partial, logits, mask, H, W);
    segloss_finish_kernel<<<B, BLOCK, 0, stream_cuda>>>(sums, loss_cuda, partial, pieces, (double)H * W, weighted);
    to_host(loss, loss_cuda, sizeof(double) * B);
    for (int b = 0; b < B; b++) total += loss[b];
    free_check_cuda(partial); free_check_cuda(loss_cuda);
    free(loss);
    return total / B;
}

// d bce / ds = p - m;  d iou / dp = -weight (m (U - I + 1) - (I + 1)(1 - m)) / (U - I + 1)^2,  dp / ds = p (1 - p); all but
// sums (B, 3) are (B, n)
__global__ static void segloss_backward_kernel(float *dlogits, const float *weight, const double *sums, const float *logits,
                                               const float *mask, int B, int n, int weighted) {
    __shared__ float per_pixel, per_weight, on_mask, off_mask;  // of the block's frame
    int i = (int)(blockIdx.y * blockDim.x + threadIdx.x); const double *of_frame = sums + 3 * blockIdx.x;
    if (threadIdx.x == 0) {
        double I = of_frame[0] + 1.0, U = of_frame[1] - of_frame[0] + 1.0;
        per_pixel = (float)(1.0 / ((double)B * n)), per_weight = (float)(1.0 / (B * of_frame[2]));
        on_mask = (float)(-1.0 / U / B), off_mask = (float)(I / (U * U) / B);
    }
    __syncthreads();
    for (; i < n; i += (int)(gridDim.y * blockDim.x)) {
        size_t at = (size_t)blockIdx.x * n + i;
        float m = mask[at], w = weight[at], p = sigmoid_simd(logits[at]);
        dlogits[at] = (p - m) * (weighted ? per_weight * w : per_pixel)
                    + w * (m * on_mask + (1.0f - m) * off_mask) * p * (1.0f - p);
    }
}

static void segloss_backward_cuda(float *dlogits, const float *weight, const double *sums, const float *logits,
                                  const float *mask, int B, int H, int W, int weighted) {
    dim3 grid((unsigned)B, (unsigned)min_int(ceil_div(H * W, BLOCK), 1024));
    segloss_backward_kernel<<<grid, BLOCK, 0, stream_cuda>>>(dlogits, weight, sums, logits, mask, B, H * W, weighted);
}

// edge (N, H, W) is 1 where Sobel's |Gx| + |Gy| > 0 of mask > 0.5 (N, H, W), else 0; pixels outside repeat the border
__global__ static void sobel_edges_kernel(float *edge, const float *mask, int H, int W) {
    int y = (int)blockIdx.x % H, x = (int)(blockIdx.y * blockDim.x + threadIdx.x);
    size_t at = (size_t)blockIdx.x * W;
    const float *here = mask + at, *above = y > 0 ? here - W : here, *below = y + 1 < H ? here + W : here;
    if (x >= W) return;
    int l = max_int(x - 1, 0), r = min_int(x + 1, W - 1);
    int Gx = (above[r] > 0.5f) + 2 * (here[r] > 0.5f) + (below[r] > 0.5f)
           - (above[l] > 0.5f) - 2 * (here[l] > 0.5f) - (below[l] > 0.5f);
    int Gy = (below[l] > 0.5f) + 2 * (below[x] > 0.5f) + (below[r] > 0.5f)
           - (above[l] > 0.5f) - 2 * (above[x] > 0.5f) - (above[r] > 0.5f);
    edge[at + x] = Gx != 0 || Gy != 0 ? 1.0f : 0.0f;
}

static void sobel_edges_cuda(float *edge, const float *mask, int N, int H, int W) {
    if (N == 0) return;
    dim3 grid((unsigned)(N * H), blocks_for((size_t)W, BLOCK));
    sobel_edges_kernel<<<grid, BLOCK, 0, stream_cuda>>>(edge, mask, H, W);
}

enum { EDGE_BLOCKS = 256 };  // at most

// partial (blocks, 3): pixels on an edge, sum over them of log(1 + e^-s), sum over the others of log(1 + e^s)
__global__ static void edgeloss_forward_kernel(double *partial, const float *logits, const float *edge, size_t n) {
    double sums[3] = {0.0, 0.0, 0.0};
    for (size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += (size_t)gridDim.x * BLOCK) {
        float e = edge[i], loss = softplus_simd(logits[i]) - e * logits[i];
        sums[0] += (double)e; sums[1] += (double)(e * loss); sums[2] += (double)((1.0f - e) * loss);
    }
    for (int k = 0; k < 3; k++) {
        double sum = sum_over_block(sums[k]);
        if (threadIdx.x == 0) partial[3 * blockIdx.x + k] = sum;
    }
}

static double edgeloss_forward_cuda(double *on, const float *logits, const float *edge, size_t n) {
    double partial[EDGE_BLOCKS][3], sum[3] = {0.0, 0.0, 0.0}, *partial_cuda = (double *)malloc_check_cuda(sizeof partial);
    int blocks = max_int(1, (int)blocks_for(n < EDGE_BLOCKS * BLOCK ? n : EDGE_BLOCKS * BLOCK, BLOCK));
    edgeloss_forward_kernel<<<blocks, BLOCK, 0, stream_cuda>>>(partial_cuda, logits, edge, n);
    to_host(partial, partial_cuda, sizeof partial[0] * (size_t)blocks);
    free_check_cuda(partial_cuda);
    for (int i = 0; i < blocks; i++)
        for (int k = 0; k < 3; k++) sum[k] += partial[i][k];
    parallel_sum(sum, 3);
    double ranks = parallel.ranks, all = (double)n * ranks;
    *on = sum[0] / ranks;
    return (all - sum[0]) / all * sum[1] / all + sum[0] / all * sum[2] / all;
}

// dlogits = weight of the pixel's side * (sigmoid(logits) - edge)
__global__ static void edgeloss_backward_kernel(float *dlogits, const float *logits, const float *edge, float weight_on,
                                                float weight_off, size_t n) {
    size_t i = first_of_four(); float s[4], e[4];
    load4(s, logits, i, n); load4(e, edge, i, n);
    for (int k = 0; k < 4; k++) s[k] = (e[k] > 0.5f ? weight_on : weight_off) * (sigmoid_simd(s[k]) - e[k]);
    store4(dlogits, s, i, n);
}

static void edgeloss_backward_cuda(float *dlogits, double on, const float *logits, const float *edge, size_t n) {
    float weight_on = (float)(((double)n - on) / (double)n / (double)n), weight_off = (float)(on / (double)n / (double)n);
    if (n == 0) return;
    unsigned grid = blocks_for(n, 4 * BLOCK);
    edgeloss_backward_kernel<<<grid, BLOCK, 0, stream_cuda>>>(dlogits, logits, edge, weight_on, weight_off, n);
}

// A block a patch: pairs (2n, 2, q^2), true boundary and sigmoid(logits); weight (n) = 1 where a true patch is not empty
__global__ static void patches_forward_kernel(float *pairs, float *weight, const float *logits, const float *edge,
                                              const float *first_edge, int H, int W, int q) {
    int i = (int)blockIdx.x, n = (int)gridDim.x, q2 = q * q; double on = 0.0;
    float *of_target = pairs + (size_t)i * 2 * q2, *of_first = of_target + (size_t)n * 2 * q2;
    for (int k = (int)threadIdx.x; k < q2; k += BLOCK) {
        size_t pixel = patch_row(i, k / q, H, W, q) + (size_t)(k % q);
        of_target[k] = edge[pixel], of_first[k] = first_edge[pixel], on += (double)(edge[pixel] + first_edge[pixel]);
        of_target[q2 + k] = of_first[q2 + k] = sigmoid_simd(logits[pixel]);
    }
    on = sum_over_block(on);
    if (threadIdx.x == 0) weight[i] = on > 0.0 ? 1.0f : 0.0f;
}

// a block a clip, n patches in it: weight = weight / (B N_p), N_p their sum
__global__ static void patch_weights_kernel(float *weight, int n) {
    float *of_clip = weight + (size_t)blockIdx.x * n; double count = 0.0;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) count += (double)of_clip[i];
    count = sum_over_block(count);
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) of_clip[i] /= (float)gridDim.x * (count > 0.0 ? (float)count : 1.0f);
}

static void patches_forward_cuda(float *pairs, float *weight, const float *logits, const float *edge, const float *first_edge,
                                 int B, int H, int W, int q) {
    int n = patches_of(B, H, W, q);
    if (n == 0) return;
    patches_forward_kernel<<<n, BLOCK, 0, stream_cuda>>>(pairs, weight, logits, edge, first_edge, H, W, q);
    patch_weights_kernel<<<B, BLOCK, 0, stream_cuda>>>(weight, n / B);
}

// A block a patch: dlogits = p (1 - p) (sum of both pairs' gradients of p); dsecond (2n, q^2), pairs (2n, 2, q^2)
__global__ static void patches_backward_kernel(float *dlogits, const float *dsecond, const float *pairs, int H, int W, int q) {
    int i = (int)blockIdx.x, n = (int)gridDim.x, q2 = q * q;
    const float *d = dsecond + (size_t)i * q2, *d_first = d + (size_t)n * q2, *p = pairs + (size_t)i * 2 * q2 + q2;
    for (int k = (int)threadIdx.x; k < q2; k += BLOCK)
        dlogits[patch_row(i, k / q, H, W, q) + (size_t)(k % q)] = (d[k] + d_first[k]) * p[k] * (1.0f - p[k]);
}

static void patches_backward_cuda(float *dlogits, const float *dsecond, const float *pairs, int B, int H, int W, int q) {
    int n = patches_of(B, H, W, q);
    zero_floats_cuda(dlogits, (size_t)B * H * W);
    if (n == 0) return;
    patches_backward_kernel<<<n, BLOCK, 0, stream_cuda>>>(dlogits, dsecond, pairs, H, W, q);
}

// One block: sums (2) of weight[i] ||out_i|| and weight[i] ||out_(n+i)||; out (2n, 6), weight (n)
__global__ static void norms_forward_kernel(double *sums, const float *out, const float *weight, int n) {
    double target = 0.0, first = 0.0;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
        target += (double)weight[i] * norm6(out + 6 * i);
        first += (double)weight[i] * norm6(out + 6 * (n + i));
    }
    target = sum_over_block(target), first = sum_over_block(first);
    if (threadIdx.x == 0) sums[0] = target, sums[1] = first;
}

static void norms_forward_cuda(double *target, double *first, const float *out, const float *weight, int n) {
    double sums[2], *sums_cuda = (double *)malloc_check_cuda(sizeof sums);
    norms_forward_kernel<<<1, BLOCK, 0, stream_cuda>>>(sums_cuda, out, weight, n);
    to_host(sums, sums_cuda, sizeof sums);
    free_check_cuda(sums_cuda);
    *target = sums[0], *first = sums[1];
}

// out (2n, 6) becomes its own gradient: d||x||/dx = x/||x||, and 0 at 0
__global__ static void norms_backward_kernel(float *out, double d_target, double d_first, const float *weight, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= 2 * n) return;
    double norm = norm6(out + 6 * i), d = (i < n ? d_target : d_first) * (double)weight[i % n];
    for (int k = 0; k < 6; k++) out[6 * i + k] *= norm == 0.0 ? 0.0f : (float)(d / norm);
}

static void norms_backward_cuda(float *out, double d_target, double d_first, const float *weight, int n) {
    if (n == 0) return;
    norms_backward_kernel<<<blocks_for((size_t)2 * n, BLOCK), BLOCK, 0, stream_cuda>>>(out, d_target, d_first, weight, n);
}

// x = scale (x + y); y may be NULL
__global__ static void scaled_sum_kernel(float *x, const float *y, float scale, size_t n) {
    size_t i = first_of_four(); float a[4], b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    load4(a, x, i, n);
    if (y) load4(b, y, i, n);
    for (int k = 0; k < 4; k++) a[k] = scale * (a[k] + b[k]);
    store4(x, a, i, n);
}

static void scaled_sum_cuda(float *x, const float *y, float scale, size_t n) {
    if (n == 0) return;
    scaled_sum_kernel<<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(x, y, scale, n);
}

// 0*x is 0 for a finite x and NaN for infinity and NaN
__global__ static void all_finite_kernel(float *found, const float *x, size_t n) {
    size_t i = first_of_four(); float v[4];
    load4(v, x, i, n);
    if (0.0f * v[0] + 0.0f * v[1] + 0.0f * v[2] + 0.0f * v[3] != 0.0f) atomicExch(found, 1.0f);
}

static int all_finite_cuda(const float *x, size_t n) {
    float found, *found_cuda = malloc_floats_cuda(1);
    zero_floats_cuda(found_cuda, 1);
    if (n > 0) all_finite_kernel<<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(found_cuda, x, n);
    to_host(&found, found_cuda, sizeof found);
    free_check_cuda(found_cuda);
    return found == 0.0f;
}

// torch.optim.Adam without weight decay; one_b1 = 1 - b1, one_b2 = 1 - b2; rate, correct: corrected for step
__global__ static void adam_update_kernel(float *params, const float *grads, float *m, float *v, size_t n, float b1, float b2,
                                          float one_b1, float one_b2, float e, float rate, float correct) {
    size_t i = first_of_four(); float p[4], g[4], m4[4], v4[4];
    load4(p, params, i, n); load4(g, grads, i, n); load4(m4, m, i, n); load4(v4, v, i, n);
    for (int k = 0; k < 4; k++) {
        m4[k] = b1 * m4[k] + one_b1 * g[k];
        v4[k] = b2 * v4[k] + one_b2 * g[k] * g[k];
        p[k] -= rate * m4[k] / (sqrtf(v4[k]) * correct + e);
    }
    store4(params, p, i, n); store4(m, m4, i, n); store4(v, v4, i, n);
}

static void adam_update_cuda(float *params, const float *grads, float *m, float *v, size_t n, double lr, double beta1,
                             double beta2, double eps, int64_t step) {
    float b1 = (float)beta1, b2 = (float)beta2, one_b1 = (float)(1.0 - beta1), one_b2 = (float)(1.0 - beta2), e = (float)eps;
    float rate = (float)(lr / (1.0 - pow(beta1, (double)step)));
    float correct = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)step)));
    if (n == 0) return;
    adam_update_kernel<<<blocks_for(n, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(params, grads, m, v, n, b1, b2, one_b1, one_b2, e,
                                                                            rate, correct);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 MATMUL

// Sums are made in fp32, whatever the factors are. The outcome may have another type than they: gradients of weights do.
#ifdef VIVIM_TF32  // 10 bits of mantissa in the factors: faster, and no longer fp32
static const cublasComputeType_t COMPUTE = CUBLAS_COMPUTE_32F_FAST_TF32;
#else
static const cublasComputeType_t COMPUTE = CUBLAS_COMPUTE_32F;
#endif
template <typename T> static cudaDataType_t cuda_type(void) { return sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF; }

// C (M, N) = [C +] bias (N) in every row; rows begin ldc numbers apart. A warp per row.
template <typename F>
__global__ static void bias_rows_kernel(F *C, int ldc, const F *bias, int M, int N, int accumulate) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= M) return;
    F *c = C + (size_t)row * ldc;
    for (int j = threadIdx.x; j < N; j += 32) c[j] = (accumulate ? (float)c[j] : 0.0f) + (float)bias[j];
}

// A product as cuBLAS sees it: it wants columns next to each other where our rows are. What it takes for C is our
// C^T = op(B)^T op(A)^T, so the factors change places, and nothing is transposed in memory.
typedef struct { int M, N, K, lda, ldb, ldc, transA, transB; cudaDataType_t type, C_type; } CublasShape;

// What cuBLASLt wants to know of a product, and the kernel that it chose; found: 0 if it has none. product: NULL in a free place
typedef struct {
    CublasShape shape; cublasLtMatmulDesc_t product; cublasLtMatrixLayout_t a, b, c; cublasLtMatmulAlgo_t algo; int found;
} KnownProduct;

static void describe_product(KnownProduct *p, CublasShape shape) {
    cublasOperation_t opA = shape.transA ? CUBLAS_OP_T : CUBLAS_OP_N, opB = shape.transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasLtMatmulPreference_t wish; cublasLtMatmulHeuristicResult_t result; int results = 0; size_t room = WORKSPACE;
    uint32_t aligned = 16, sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // sums that blocks share: never in bfloat16
    p->shape = shape;
    cublasCheck(cublasLtMatmulDescCreate(&p->product, COMPUTE, CUDA_R_32F));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &opB, sizeof opB));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &opA, sizeof opA));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->b, shape.type, (uint64_t)(shape.transB ? shape.K : shape.N),
                                           (uint64_t)(shape.transB ? shape.N : shape.K), shape.ldb));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->a, shape.type, (uint64_t)(shape.transA ? shape.M : shape.K),
                                           (uint64_t)(shape.transA ? shape.K : shape.M), shape.lda));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->c, shape.C_type, (uint64_t)shape.N, (uint64_t)shape.M, shape.ldc));
    cublasCheck(cublasLtMatmulPreferenceCreate(&wish));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &sums, sizeof sums));
    for (auto of : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(wish, of, &aligned, sizeof aligned));
    p->found = cublasLtMatmulAlgoGetHeuristic(cublaslt_cuda, p->product, p->b, p->a, p->c, p->c, wish, 1, &result,
                                              &results) == CUBLAS_STATUS_SUCCESS && results > 0;
    if (p->found) p->algo = result.algo;
    cublasCheck(cublasLtMatmulPreferenceDestroy(wish));
}

// A linear layer's product with its bias added before anything is written: cuBLASLt's epilogue. It chooses a kernel once for
// each shape; returns 0 if it knows none, for then the caller does without.
static int matmul_bias_lt(void *C, const void *A, const void *B, const void *bias, CublasShape shape, int accumulate) {
    enum { SHAPES = 4096 };  // drop path makes some hundreds of a model's 50
    static KnownProduct known[SHAPES];
    static int count;
    float one = 1.0f, beta = accumulate ? 1.0f : 0.0f; size_t at = 0;
    if (((uintptr_t)C | (uintptr_t)A | (uintptr_t)B | (uintptr_t)bias) % 16) return 0;
    for (size_t k = 0; k < sizeof shape; k++) at = (at ^ ((const unsigned char *)&shape)[k]) * 1099511628211u;  // FNV-1a
    at >>= 20;  // the next free place from here on; there always is one
    while (known[at % SHAPES].product && memcmp(&known[at % SHAPES].shape, &shape, sizeof shape) != 0) at++;
    KnownProduct *p = &known[at % SHAPES];
    if (!p->product && count == SHAPES / 2) return 0;
    if (!p->product) count++, describe_product(p, shape);
    if (!p->found) return 0;
    cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    cublasCheck(cublasLtMatmul(cublaslt_cuda, p->product, &one, B, p->b, A, p->a, &beta, C, p->c, C, p->c, &p->algo,
                               workspace_cuda, WORKSPACE, stream_cuda));
    return 1;
}

// C (M, N) = [C +] op(A) op(B) + bias; A and B have one type, C and the bias another or the same
template <typename F, typename T>
static void matmul_cuda(F *C, int ldc, const T *A, int lda, int transA, const typename Same<T>::type *B, int ldb, int transB,
                        const typename Same<F>::type *bias, int M, int N, int K, int accumulate) {
    CublasShape shape; memset(&shape, 0, sizeof shape);
    shape.M = M, shape.N = N, shape.K = K, shape.lda = lda, shape.ldb = ldb, shape.ldc = ldc;
    shape.transA = transA, shape.transB = transB, shape.type = cuda_type<T>(), shape.C_type = cuda_type<F>();
    if (M == 0 || N == 0 || (bias && matmul_bias_lt(C, A, B, bias, shape, accumulate))) return;
    float one = 1.0f, beta = accumulate || bias ? 1.0f : 0.0f;
    if (bias) bias_rows_kernel<F><<<ceil_div(M, 8), dim3(32, 8), 0, stream_cuda>>>(C, ldc, bias, M, N, accumulate);
    cublasCheck(cublasGemmEx(cublas_cuda, transB ? CUBLAS_OP_T : CUBLAS_OP_N, transA ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &one,
                             B, shape.type, ldb, A, shape.type, lda, &beta, C, shape.C_type, ldc, COMPUTE,
                             CUBLAS_GEMM_DEFAULT));
}

template <typename F, typename T>
static void matmul_forward_cuda(F *out, const T *inp, const typename Same<T>::type *weight,
                                const typename Same<F>::type *bias, int M, int N, int K) {
    matmul_cuda(out, N, inp, K, 0, weight, K, 1, bias, M, N, K, 0);
}

template <typename T>
static void matmul_backward_cuda(typename Same<T>::type *dinp, float *dweight, float *dbias, const T *dout,
                                 const typename Same<T>::type *inp, const typename Same<T>::type *weight, int M, int N,
                                 int K) {
    if (dinp) matmul_cuda(dinp, K, dout, N, 0, weight, K, 0, NULL, M, K, N, 0);
    if (dweight) matmul_cuda(dweight, K, dout, N, 1, inp, K, 0, NULL, N, K, M, 1);
    if (dbias) add_column_sums_cuda(dbias, dout, M, N);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 CONVOLUTIONS
//
// Depthwise: a thread has one channel, its taps in registers, and walks along W through a unit: FRAMES frames x ROWS rows x
// DW_STRIP columns of the output. It loads every input column of the unit and its border once, and each number serves all
// the outputs around it: 28 loads for 10 outputs of 27 taps. Lanes of a warp are channels, the warps of a block units.

enum { DW_STRIP = 16, DW_WARPS = 4, DW_SLICES = 64 };  // DW_SLICES: at most so many blocks share a weight's gradient
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
enum { DW_BLOCKS = 4 };  // with 27 taps: as many blocks as a multiprocessor holds without a spilled register
#else
enum { DW_BLOCKS = 3 };
#endif

typedef struct { int T, H, W, C, row_groups, strips, frame_groups, total; } DwconvUnits;

static DwconvUnits dwconv_units(int B, int T, int H, int W, int C, int frames, int rows) {
    DwconvUnits u = {T, H, W, C, ceil_div(H, rows), ceil_div(W, DW_STRIP), ceil_div(T, frames), 0};
    u.total = B * u.frame_groups * u.strips * u.row_groups;
    return u;
}

// a unit's clip and its first frame, row and column
__device__ static inline int4 dwconv_unit(DwconvUnits u, int unit, int frames, int rows) {
    int h = unit % u.row_groups * rows, strip = unit / u.row_groups;
    int w = strip % u.strips * DW_STRIP, group = strip / u.strips;
    return make_int4(group / u.frame_groups, group % u.frame_groups * frames, h, w);
}

// the number of x, which points at the channel of a unit's first token at[0], that lies dt frames, dh rows and w - at.w columns
// on; 0 outside the clip
__device__ static inline float dwconv_load(const floatX *x, DwconvUnits u, int4 at, int dt, int dh, int w) {
    int t = at.y + dt, h = at.z + dh;
    bool inside = t >= 0 && t < u.T && h >= 0 && h < u.H && w >= 0 && w < u.W;
    return inside ? (float)x[((dt * u.H + dh) * u.W + w - at.w) * u.C] : 0.0f;
}

// out[t,h,w] = bias + sum over (KT, 3, 3) of inp[t+dt-KT/2, h+dh-1, w+dw-1] * weight[tap]; turned: the taps in reverse order.
// gelu = gelu(out); out or gelu may be NULL. out, gelu, inp (B, T, H, W, C); weight (C, KT*9); bias (C) or NULL. sum[..][j]
// belongs to column w - 1 + j when w is loaded.
template <int KT, int FRAMES, int ROWS>
__global__ static void __launch_bounds__(32 * DW_WARPS, KT == 3 ? DW_BLOCKS : 8)
dwconv_kernel(floatX *out, floatX *gelu, const floatX *inp, const float *weight, int turned, const float *bias, DwconvUnits u) {
    const int TAPS = KT * 9;
    __shared__ float taps[32 * TAPS];  // of the block's channels, as they lie in memory: an odd number each, no conflicts
    int c = blockIdx.y * 32 + threadIdx.x, unit = blockIdx.x * DW_WARPS + threadIdx.y;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 32 * TAPS; i += 32 * DW_WARPS) {
        size_t at = (size_t)blockIdx.y * 32 * TAPS + i;
        taps[i] = at < (size_t)u.C * TAPS ? weight[at] : 0.0f;
    }
    __syncthreads();
    if (c >= u.C || unit >= u.total) return;
    float k[TAPS], sum[FRAMES][ROWS][3], first = bias ? bias[c] : 0.0f;
    #pragma unroll
    for (int i = 0; i < TAPS; i++) k[i] = taps[threadIdx.x * TAPS + (turned ? TAPS - 1 - i : i)];
    #pragma unroll
    for (int i = 0; i < FRAMES * ROWS * 3; i++) sum[i / (ROWS * 3)][i / 3 % ROWS][i % 3] = first;
    int4 at = dwconv_unit(u, unit, FRAMES, ROWS);
    int w0 = at.w, end = min_int(u.W, w0 + DW_STRIP);
    size_t token = (((size_t)at.x * u.T + at.y) * u.H + at.z) * u.W + w0;
    inp += token * u.C + c;
    if (out) out += token * u.C + c;
    if (gelu) gelu += token * u.C + c;
    for (int w = w0 - 1; w <= end; w++) {
        float x[FRAMES + KT - 1][ROWS + 2];
        #pragma unroll
        for (int t = 0; t < FRAMES + KT - 1; t++)
            #pragma unroll
            for (int h = 0; h < ROWS + 2; h++) x[t][h] = dwconv_load(inp, u, at, t - KT / 2, h - 1, w);
        #pragma unroll
        for (int t = 0; t < FRAMES; t++)
            #pragma unroll
            for (int h = 0; h < ROWS; h++) {
                #pragma unroll
                for (int i = 0; i < TAPS; i++) sum[t][h][2 - i % 3] += x[t + i / 9][h + i / 3 % 3] * k[i];
                if (w > w0 && at.y + t < u.T && at.z + h < u.H) {
                    int to = ((t * u.H + h) * u.W + w - 1 - w0) * u.C;
                    if (out) out[to] = sum[t][h][0];
                    if (gelu) gelu[to] = gelu_simd(sum[t][h][0]);
                }
                sum[t][h][0] = sum[t][h][1], sum[t][h][1] = sum[t][h][2], sum[t][h][2] = first;
            }
    }
}

static void dwconv_apply_cuda(floatX *out, floatX *gelu, const floatX *inp, const float *weight, int turned, const float *bias,
                              int B, int T, int H, int W, int C, int kt) {
    DwconvUnits u = kt == 3 ? dwconv_units(B, T, H, W, C, 5, 2) : dwconv_units(B, T, H, W, C, 1, 4);
    dim3 grid(ceil_div(u.total, DW_WARPS), ceil_div(C, 32)), block(32, DW_WARPS);
    if (kt == 3) dwconv_kernel<3, 5, 2><<<grid, block, 0, stream_cuda>>>(out, gelu, inp, weight, turned, bias, u);
    else dwconv_kernel<1, 1, 4><<<grid, block, 0, stream_cuda>>>(out, gelu, inp, weight, turned, bias, u);
}

static void dwconv_forward_cuda(floatX *out, floatX *gelu, const floatX *inp, const float *weight, const float *bias, int B,
                                int T, int H, int W, int C, int kt) {
    dwconv_apply_cuda(out, gelu, inp, weight, 0, bias, B, T, H, W, C, kt);
}

// partial (slices, KT*9 + 1, C): sums over a slice's tokens of dout * inp[token + tap], and of dout for the bias. Block x has
// slice x, every slices-th group of DW_WARPS units. dy[..][j] is column w - 1 + j of dout when column w of inp is loaded.
template <int KT, int FRAMES, int ROWS>
__global__ static void __launch_bounds__(32 * DW_WARPS, KT == 3 ? DW_BLOCKS : 7)
dwconv_dweight_kernel(float *partial, const floatX *dout, const floatX *inp, DwconvUnits u) {
    const int SUMS = KT * 9 + 1;
    __shared__ float sums[DW_WARPS][SUMS][32];
    int c = blockIdx.y * 32 + threadIdx.x;
    float sum[SUMS];
    #pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0.0f;
    for (int unit = blockIdx.x * DW_WARPS + threadIdx.y; c < u.C && unit < u.total; unit += gridDim.x * DW_WARPS) {
        int4 at = dwconv_unit(u, unit, FRAMES, ROWS);
        int w0 = at.w, end = min_int(u.W, w0 + DW_STRIP);
        size_t token = (((size_t)at.x * u.T + at.y) * u.H + at.z) * u.W + w0;
        const floatX *inp_c = inp + token * u.C + c, *dout_c = dout + token * u.C + c;
        float dy[FRAMES][ROWS][3] = {};
        for (int w = w0 - 1; w <= end; w++) {
            float x[FRAMES + KT - 1][ROWS + 2];
            #pragma unroll
            for (int t = 0; t < FRAMES + KT - 1; t++)
                #pragma unroll
                for (int h = 0; h < ROWS + 2; h++) x[t][h] = dwconv_load(inp_c, u, at, t - KT / 2, h - 1, w);
            #pragma unroll
            for (int t = 0; t < FRAMES; t++)
                #pragma unroll
                for (int h = 0; h < ROWS; h++) {
                    float *d = dy[t][h];
                    d[0] = d[1], d[1] = d[2];
                    d[2] = w + 1 < end ? dwconv_load(dout_c, u, at, t, h, w + 1) : 0.0f;
                    sum[SUMS - 1] += d[2];
                    #pragma unroll
                    for (int i = 0; i < KT * 9; i++) sum[i] += x[t + i / 9][h + i / 3 % 3] * d[2 - i % 3];
                }
        }
    }
    #pragma unroll
    for (int i = 0; i < SUMS; i++) sums[threadIdx.y][i][threadIdx.x] = sum[i];
    __syncthreads();
    for (int i = threadIdx.y; i < SUMS && c < u.C; i += DW_WARPS) {
        float total = 0.0f;
        for (int warp = 0; warp < DW_WARPS; warp++) total += sums[warp][i][threadIdx.x];
        partial[((size_t)blockIdx.x * SUMS + i) * u.C + c] = total;
    }
}

// dweight (C, taps) and dbias (C) += sum over slices of partial (slices, taps + 1, C)
__global__ static void dwconv_add_kernel(float *dweight, float *dbias, const float *partial, int slices, int taps, int C) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, tap = i / C;
    if (tap > taps) return;
    float sum = 0.0f;
    for (int s = 0; s < slices; s++) sum += partial[((size_t)s * (taps + 1) + tap) * C + c];
    if (tap < taps) dweight[(size_t)c * taps + tap] += sum;
    else dbias[c] += sum;
}

static void dwconv_backward_cuda(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                                 const float *weight, int B, int T, int H, int W, int C, int kt) {
    DwconvUnits u = kt == 3 ? dwconv_units(B, T, H, W, C, 5, 2) : dwconv_units(B, T, H, W, C, 1, 4);
    int taps = kt * 9, slices = min_int(DW_SLICES, ceil_div(u.total, DW_WARPS));
    float *partial = malloc_floats_cuda((size_t)slices * (taps + 1) * C);
    dim3 grid(slices, ceil_div(C, 32)), block(32, DW_WARPS);
    dwconv_apply_cuda(dinp, NULL, dout, weight, 1, NULL, B, T, H, W, C, kt);
    if (kt == 3) dwconv_dweight_kernel<3, 5, 2><<<grid, block, 0, stream_cuda>>>(partial, dout, inp, u);
    else dwconv_dweight_kernel<1, 1, 4><<<grid, block, 0, stream_cuda>>>(partial, dout, inp, u);
    dwconv_add_kernel<<<ceil_div((taps + 1) * C, 128), 128, 0, stream_cuda>>>(dweight, dbias, partial, slices, taps, C);
    free_check_cuda(partial);
}

// Dense convolutions are products of patches with the kernels, as on the CPU. Here a patch's numbers stand in the order
// (ky, kx, c), channels last, so that they are read and written in runs; the weights are brought into the same order first.

enum { CONV_COL = 16777216 };  // numbers of patches at a time (or one frame's)
enum { MANY = 16 / sizeof(floatX) };  // numbers in 16 bytes

// patch: k*k*C and zeros up to a multiple of 8, for tensor cores want 16 bytes; chunk: frames at a time
typedef struct { int H, W, C, OH, OW, O, k, stride, pad, patch, chunk; } ConvShape;

static ConvShape conv_shape(int N, int H, int W, int C, int O, int k, int stride, int pad) {
    ConvShape s = {H, W, C, conv_size(H, k, stride, pad), conv_size(W, k, stride, pad), O, k, stride, pad,
                   ceil_div(C * k * k, 8) * 8, 0};
    s.chunk = max_int(1, min_int(N, (int)(CONV_COL / ((size_t)s.OH * s.OW * s.patch))));
    return s;
}

// turned (O, patch) = weight (O, C, k*k) in the order (k*k, C), and zeros; back: weight += turned
__global__ static void conv_turn_kernel(floatX *turned, const floatX *weight, ConvShape s) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, o = i / s.patch, j = i % s.patch, c = j % s.C, tap = j / s.C, taps = s.k * s.k;
    if (o < s.O) turned[i] = tap < taps ? weight[((size_t)o * s.C + c) * taps + tap] : (floatX)0.0f;
}
__global__ static void conv_turn_back_kernel(float *weight, const float *turned, ConvShape s) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, o = i / s.patch, j = i % s.patch, c = j % s.C, tap = j / s.C, taps = s.k * s.k;
    if (o < s.O && tap < taps) weight[((size_t)o * s.C + c) * taps + tap] += turned[i];
}

// number i of the patch at (oy, ox) of a frame of inp, both counted in F, C of which make a pixel
template <typename F>
__device__ static inline F patch_number(const F *inp, ConvShape s, int frame, int oy, int ox, int i, int C) {
    int c = i % C, tap = i / C, y = oy * s.stride - s.pad + tap / s.k, x = ox * s.stride - s.pad + tap % s.k;
    bool inside = y >= 0 && y < s.H && x >= 0 && x < s.W && tap < s.k * s.k;
    return inside ? inp[(((size_t)frame * s.H + y) * s.W + x) * C + c] : F();
}

// col (frames*OH*OW, patch) = the patches of inp (frames, H, W, C), zeros outside: a block per patch, 16 bytes a thread
__global__ static void im2col_kernel(float4 *col, const float4 *inp, ConvShape s, int C, int patch) {
    int ox = blockIdx.x % s.OW, oy = blockIdx.x / s.OW % s.OH, frame = blockIdx.x / (s.OW * s.OH);
    for (int i = threadIdx.x; i < patch; i += blockDim.x)
        col[(size_t)blockIdx.x * patch + i] = patch_number(inp, s, frame, oy, ox, i, C);
}

// the same where a pixel is no multiple of 16 bytes, as the images are: they are gathered
__global__ static void im2col_gather_kernel(floatX *col, const floatX *inp, ConvShape s, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int row = (int)(i * MANY / s.patch), first = (int)(i * MANY - (size_t)row * s.patch);
    int ox = row % s.OW, oy = row / s.OW % s.OH, frame = row / (s.OW * s.OH);
    union { float4 all; floatX one[MANY]; } some = {};
    for (int k = 0; k < MANY; k++) some.one[k] = patch_number(inp, s, frame, oy, ox, first + k, s.C);
    ((float4 *)col)[i] = some.all;
}

static void im2col_cuda(floatX *col, const floatX *inp, int frames, ConvShape s) {
    int rows = frames * s.OH * s.OW; size_t n = (size_t)rows * s.patch / MANY;
    if (s.C % MANY == 0)
        im2col_kernel<<<rows, 128, 0, stream_cuda>>>((float4 *)col, (const float4 *)inp, s, s.C / MANY, s.patch / MANY);
    else im2col_gather_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(col, inp, s, n);
}

// the transpose of im2col: dinp (frames, H, W, C), each the sum of the patch entries that it was copied to. Row y of the
// input is row ky of the patches at oy = (y + pad - ky) / stride where that is a whole number.
__global__ static void col2im_kernel(floatX *dinp, const floatX *dcol, ConvShape s, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int pixel = (int)(i / s.C), c = (int)(i - (size_t)pixel * s.C);
    int x = pixel % s.W + s.pad, y = pixel / s.W % s.H + s.pad, frame = pixel / (s.W * s.H);
    float sum = 0.0f;
    for (int ky = y % s.stride; ky < s.k && ky <= y; ky += s.stride)
        for (int kx = x % s.stride; kx < s.k && kx <= x; kx += s.stride) {
            int oy = (y - ky) / s.stride, ox = (x - kx) / s.stride;
            if (oy >= s.OH || ox >= s.OW) continue;
            sum += (float)dcol[(((size_t)frame * s.OH + oy) * s.OW + ox) * s.patch + (ky * s.k + kx) * s.C + c];
        }
    dinp[i] = sum;
}

static floatX *conv_turned_cuda(const floatX *weight, ConvShape s) {
    size_t n = (size_t)s.O * s.patch;
    floatX *turned = malloc_activations_cuda(n);
    conv_turn_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(turned, weight, s);
    return turned;
}

static void conv_forward_cuda(floatX *out, const floatX *inp, const floatX *weight, const floatX *bias, int N, int H, int W,
                              int C, int O, int k, int stride, int pad) {
    ConvShape s = conv_shape(N, H, W, C, O, k, stride, pad);
    floatX *turned = conv_turned_cuda(weight, s), *col = malloc_activations_cuda((size_t)s.chunk * s.OH * s.OW * s.patch);
    for (int n = 0; n < N; n += s.chunk) {
        int frames = min_int(s.chunk, N - n), rows = frames * s.OH * s.OW;
        im2col_cuda(col, inp + (size_t)n * H * W * C, frames, s);
        matmul_forward_cuda(out + (size_t)n * s.OH * s.OW * O, col, turned, bias, rows, O, s.patch);
    }
    free_check_cuda(col); free_check_cuda(turned);
}

static void conv_backward_cuda(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                               const floatX *weight, int N, int H, int W, int C, int O, int k, int stride, int pad) {
    ConvShape s = conv_shape(N, H, W, C, O, k, stride, pad);
    floatX *turned = dinp ? conv_turned_cuda(weight, s) : NULL;
    floatX *col = malloc_activations_cuda((size_t)s.chunk * s.OH * s.OW * s.patch);
    float *dturned = malloc_floats_cuda((size_t)O * s.patch);
    for (int n = 0; n < N; n += s.chunk) {
        int frames = min_int(s.chunk, N - n), rows = frames * s.OH * s.OW;
        const floatX *dy = dout + (size_t)n * s.OH * s.OW * O;
        im2col_cuda(col, inp + (size_t)n * H * W * C, frames, s);
        matmul_cuda(dturned, s.patch, dy, O, 1, col, s.patch, 0, NULL, O, s.patch, rows, n > 0);
        if (dinp == NULL) continue;
        size_t image = (size_t)H * W * C, pixels = frames * image;
        matmul_backward_cuda(col, NULL, NULL, dy, NULL, turned, rows, O, s.patch);
        col2im_kernel<<<blocks_for(pixels, 256), 256, 0, stream_cuda>>>(dinp + n * image, col, s, pixels);
    }
    conv_turn_back_kernel<<<blocks_for((size_t)O * s.patch, 256), 256, 0, stream_cuda>>>(dweight, dturned, s);
    add_column_sums_cuda(dbias, dout, N * s.OH * s.OW, O);
    free_check_cuda(col); free_check_cuda(dturned);
    if (turned) free_check_cuda(turned);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9 ATTENTION
//
// A block has 64 queries of a (frame, head) and 64 keys at a time: at 256 x 256 these are all keys. Its 256 threads stand in
// 16 x 16, thread (ty, tx) with 4 x 4 scores in registers: rows 4 ty + i, columns tx + 16 j. A row's 16 threads are half a
// warp, so sums along keys are shuffles. Tiles lie in shared memory in rows of HD (or 64) numbers and 16 bytes: rows tx of a
// column fall into different banks. HD is the head's size hd rounded up to 16, 32 or 64; what is missing is zeros.
// In bfloat16 the tensor cores multiply the tiles; which number of a product they leave with which thread is theirs to know,
// so it goes through shared memory, too. Scores and sums are single precision in both cases.

enum { TILE = 64, PAD = 16 / sizeof(floatX), TILE_LD = TILE + PAD, PRODUCT_LD = TILE + 4 };
enum { PRODUCT_SIZE = sizeof(floatX) == sizeof(float) ? 0 : TILE * PRODUCT_LD };
enum { ATTENTION_SLICES = 16, ATTENTION_PARTS = 4, ATTENTION_ROOM = 16777216 };  // backward's: see there

typedef struct { int P, Pk, C, heads, hd; float scale; } AttentionShape;

static AttentionShape attention_shape(int P, int Pk, int C, int heads) {
    AttentionShape a = {P, Pk, C, heads, C / heads, 1.0f / sqrtf((float)(C / heads))};
    if (a.hd > TILE) fail("attention heads of %d channels: %d at most on the GPU", a.hd, TILE);
    return a;
}

// tile (64, HD) = rows row0 .. row0+63 of x (rows, C), one head's columns, zeros beyond; 16 bytes at a time if a head has
// whole ones: then they are aligned, for so are x, a row and a tile's row
template <int HD>
__device__ static inline void tile_load(floatX *tile, const floatX *x, int row0, int rows, AttentionShape a) {
    for (int i = threadIdx.x; i < TILE * HD / MANY && a.hd % MANY == 0; i += 256) {
        int row = i / (HD / MANY), d = i % (HD / MANY) * MANY;
        *(float4 *)(tile + row * (HD + PAD) + d) =
            row0 + row < rows && d < a.hd ? *(const float4 *)(x + (size_t)(row0 + row) * a.C + d) : float4();
    }
    for (int i = threadIdx.x; i < TILE * HD && a.hd % MANY != 0; i += 256) {
        int row = i / HD, d = i % HD;
        tile[row * (HD + PAD) + d] = row0 + row < rows && d < a.hd ? x[(size_t)(row0 + row) * a.C + d] : (floatX)0.0f;
    }
}

// rows row0 .. row0+63 of x (rows, C) [+]= the threads' numbers, 4 rows and HD/16 columns each
template <int HD, typename F>
__device__ static inline void tile_store(F *x, const float v[4][HD / 16], int row0, int rows, AttentionShape a, int add) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HD / 16; j++) {
            F *to = x + (size_t)(row0 + 4 * ty + i) * a.C + tx + 16 * j;
            if (row0 + 4 * ty + i < rows && tx + 16 * j < a.hd) *to = add ? (float)*to + v[i][j] : v[i][j];
        }
}

#ifdef VIVIM_BF16
// product (64, N) = op(x) op(y), sums over K: the block's 8 warps take 16 x 16 numbers each, in turn. ROWS: op(x) is x, rows
// first, else its transpose; y likewise. All threads come here together, and find the whole product afterwards.
template <int N, int K, typename X_ROWS, typename Y_ROWS>
__device__ static inline void tile_product(float *product, const floatX *x, int ldx, const floatX *y, int ldy) {
    using namespace nvcuda::wmma;
    const bool x_rows = std::is_same<X_ROWS, row_major>::value, y_rows = std::is_same<Y_ROWS, row_major>::value;
    __syncthreads();
    for (int t = threadIdx.x / 32; t < TILE / 16 * (N / 16); t += 8) {
        int m = t / (N / 16) * 16, n = t % (N / 16) * 16;
        fragment<accumulator, 16, 16, 16, float> sum;
        fill_fragment(sum, 0.0f);
        #pragma unroll 1
        for (int k = 0; k < K; k += 16) {
            fragment<matrix_a, 16, 16, 16, floatX, X_ROWS> a;
            fragment<matrix_b, 16, 16, 16, floatX, Y_ROWS> b;
            load_matrix_sync(a, x + (x_rows ? m * ldx + k : k * ldx + m), ldx);
            load_matrix_sync(b, y + (y_rows ? k * ldy + n : n * ldy + k), ldy);
            mma_sync(sum, a, b, sum);
        }
        store_matrix_sync(product + m * PRODUCT_LD + n, sum, PRODUCT_LD, mem_row_major);
    }
    __syncthreads();
}

// s (64, 64) = x y^T, tiles x, y (64, HD)
template <int HD>
__device__ static inline void tile_scores(float s[4][4], const floatX *x, const floatX *y, float *product) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    tile_product<TILE, HD, nvcuda::wmma::row_major, nvcuda::wmma::col_major>(product, x, HD + PAD, y, HD + PAD);
    for (int i = 0; i < 16; i++) s[i / 4][i % 4] = product[(4 * ty + i / 4) * PRODUCT_LD + tx + 16 * (i % 4)];
}

// out (64, HD) += op(p) x, p (64, 64), x (64, HD); op(p) is p, TRANSPOSED: p^T
template <int HD, bool TRANSPOSED>
__device__ static inline void tile_weigh(float out[4][HD / 16], const floatX *p, const floatX *x, float *product) {
    using namespace nvcuda::wmma;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    typedef typename std::conditional<TRANSPOSED, col_major, row_major>::type P_ROWS;
    tile_product<HD, TILE, P_ROWS, row_major>(product, p, TILE_LD, x, HD + PAD);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HD / 16; j++) out[i][j] += product[(4 * ty + i) * PRODUCT_LD + tx + 16 * j];
}
#else
// s (64, 64) = x y^T, tiles x, y (64, HD)
template <int HD>
__device__ static inline void tile_scores(float s[4][4], const floatX *x, const floatX *y, float *) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int i = 0; i < 16; i++) s[i / 4][i % 4] = 0.0f;
    #pragma unroll 1
    for (int d = 0; d < HD; d += 4) {
        float4 u[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) u[i] = *(const float4 *)(x + (4 * ty + i) * (HD + PAD) + d);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            float4 v = *(const float4 *)(y + (tx + 16 * j) * (HD + PAD) + d);
            #pragma unroll
            for (int i = 0; i < 4; i++) s[i][j] += u[i].x * v.x + u[i].y * v.y + u[i].z * v.z + u[i].w * v.w;
        }
    }
}

// out (64, HD) += op(p) x, as above; for p^T the threads' rows are columns of p
template <int HD, bool TRANSPOSED>
__device__ static inline void tile_weigh(float out[4][HD / 16], const floatX *p, const floatX *x, float *) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    #pragma unroll 2
    for (int k = 0; k < TILE && !TRANSPOSED; k += 4) {
        float4 u[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) u[i] = *(const float4 *)(p + (4 * ty + i) * TILE_LD + k);
        #pragma unroll
        for (int j = 0; j < HD / 16; j++) {
            const float *v = x + k * (HD + PAD) + tx + 16 * j;
            float v0 = v[0], v1 = v[HD + PAD], v2 = v[2 * (HD + PAD)], v3 = v[3 * (HD + PAD)];
            #pragma unroll
            for (int i = 0; i < 4; i++) out[i][j] += u[i].x * v0 + u[i].y * v1 + u[i].z * v2 + u[i].w * v3;
        }
    }
    #pragma unroll 2
    for (int k = 0; k < TILE && TRANSPOSED; k++) {
        float4 u = *(const float4 *)(p + k * TILE_LD + 4 * ty);
        #pragma unroll
        for (int j = 0; j < HD / 16; j++) {
            float v = x[k * (HD + PAD) + tx + 16 * j];
            out[0][j] += u.x * v, out[1][j] += u.y * v, out[2][j] += u.z * v, out[3][j] += u.w * v;
        }
    }
}
#endif

// writes the threads' scores to a tile p (64, 64)
__device__ static inline void tile_put(floatX *p, const float s[4][4]) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) p[(4 * ty + i) * TILE_LD + tx + 16 * j] = s[i][j];
}

// over the 16 threads of a row
__device__ static inline float row_sum(float x) {
    for (int lane = 8; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
__device__ static inline float row_max(float x) {
    for (int lane = 8; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// out, q (N, P, C); k, v (N, Pk, C); grid (N*heads, tiles of queries). The softmax of a row is made tile by tile of keys: when
// the largest score grows, what was summed so far is scaled down. For backward, if there are several tiles of keys:
// stats (N*heads, P, {largest, 1/sum, sum_d dout out}) instead of out.
template <int HD>
__global__ static void __launch_bounds__(256, 3)
attention_forward_kernel(floatX *out, float *stats, const floatX *dout, const floatX *q, const floatX *k, const floatX *v,
                         AttentionShape a) {
    extern __shared__ float shared[];
    float *product = shared;  // of the tensor cores
    floatX *sq = (floatX *)(shared + PRODUCT_SIZE), *sv = sq + TILE * (HD + PAD), *sk = sv + TILE * (HD + PAD);
    floatX *sp = sk;          // scores replace the keys
    int frame = blockIdx.x / a.heads, head = blockIdx.x % a.heads, p0 = blockIdx.y * TILE;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    size_t at = (size_t)frame * a.P * a.C + head * a.hd, at_k = (size_t)frame * a.Pk * a.C + head * a.hd;
    float s[4][4], o[4][HD / 16] = {}, largest[4], sum[4];
    for (int i = 0; i < 4; i++) largest[i] = -INFINITY, sum[i] = 0.0f;
    tile_load<HD>(sq, q + at, p0, a.P, a);
    for (int k0 = 0; k0 < a.Pk; k0 += TILE) {
        __syncthreads();
        tile_load<HD>(sk, k + at_k, k0, a.Pk, a);
        tile_load<HD>(sv, v + at_k, k0, a.Pk, a);
        __syncthreads();
        tile_scores<HD>(s, sq, sk, product);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float most = largest[i], part = 0.0f, shrink;
            for (int j = 0; j < 4; j++) most = k0 + tx + 16 * j < a.Pk ? fmaxf(most, s[i][j]) : most;
            most = row_max(most);
            for (int j = 0; j < 4; j++) {
                s[i][j] = k0 + tx + 16 * j < a.Pk ? expf((s[i][j] - most) * a.scale) : 0.0f;
                part += s[i][j];
            }
            shrink = expf((largest[i] - most) * a.scale);
            sum[i] = sum[i] * shrink + row_sum(part), largest[i] = most;
            for (int j = 0; j < HD / 16; j++) o[i][j] *= shrink;
        }
        __syncthreads();
        tile_put(sp, s);
        __syncthreads();
        tile_weigh<HD, false>(o, sp, sv, product);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < HD / 16; j++) o[i][j] /= sum[i];
    if (stats == nullptr) {
        tile_store<HD>(out + at, o, p0, a.P, a, 0);
        return;
    }
    for (int i = 0; i < 4; i++) {
        int p = p0 + 4 * ty + i;
        float dot = 0.0f;
        for (int j = 0; j < HD / 16; j++)
            if (p < a.P && tx + 16 * j < a.hd) dot += o[i][j] * (float)dout[at + (size_t)p * a.C + tx + 16 * j];
        dot = row_sum(dot);
        float *to = stats + ((size_t)blockIdx.x * a.P + p) * 3;
        if (p < a.P && tx == 0) to[0] = largest[i], to[1] = 1.0f / sum[i], to[2] = dot;
    }
}

// the size of shared memory: tiles (64, HD), a tile of scores, which in forward lies where the keys were, and a product
template <int HD> static size_t attention_bytes(int tiles) {
    return sizeof(float) * PRODUCT_SIZE + sizeof(floatX) * TILE * (tiles * (HD + PAD) + TILE_LD);
}

template <int HD>
static void attention_forward_hd(floatX *out, float *stats, const floatX *dout, const floatX *q, const floatX *k,
                                 const floatX *v, int N, AttentionShape a) {
    size_t bytes = attention_bytes<HD>(2);
    dim3 grid(N * a.heads, ceil_div(a.P, TILE));
    cudaCheck(cudaFuncSetAttribute(attention_forward_kernel<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    attention_forward_kernel<HD><<<grid, 256, bytes, stream_cuda>>>(out, stats, dout, q, k, v, a);
}

static void attention_forward_cuda(floatX *out, const floatX *q, const floatX *k, const floatX *v, int N, int P, int Pk, int C,
                                   int heads) {
    AttentionShape a = attention_shape(P, Pk, C, heads);
    if (a.hd <= 16) attention_forward_hd<16>(out, NULL, NULL, q, k, v, N, a);
    else if (a.hd <= 32) attention_forward_hd<32>(out, NULL, NULL, q, k, v, N, a);
    else attention_forward_hd<64>(out, NULL, NULL, q, k, v, N, a);
}

// prob = softmax(q k^T / sqrt(hd));  dv = prob^T dout;  dprob = dout v^T;  ds = prob (dprob - sum_keys(dprob prob)) / sqrt(hd);
// dq = ds k;  dk = ds^T q. Grid (N*heads, slices of the queries, parts of the keys): a block takes every parts-th tile of
// keys, one after the other, and keeps its dk and dv in registers while it goes through its slice. dq (parts, N, P, C), dk and
// dv (slices, N, Pk, C) are partial sums, a part's dq_size and a slice's dk_size floats. A row of several tiles of keys has its
// largest score, its 1/sum and sum_keys(dprob prob) = sum_d(dout out) in stats (out = prob v); else stats is NULL, and dq is
// what is wanted, a floatX.
template <int HD, typename Q>
__global__ static void __launch_bounds__(256, 2)
attention_backward_kernel(Q *dq, float *dk, float *dv, const float *stats, const floatX *dout, const floatX *q,
                          const floatX *k, const floatX *v, AttentionShape a, size_t dq_size, size_t dk_size) {
    extern __shared__ float shared[];
    float *product = shared;
    floatX *sk = (floatX *)(shared + PRODUCT_SIZE), *sv = sk + TILE * (HD + PAD), *sq = sv + TILE * (HD + PAD);
    floatX *sd = sq + TILE * (HD + PAD), *sp = sd + TILE * (HD + PAD);  // sp: prob, then ds
    int frame = blockIdx.x / a.heads, head = blockIdx.x % a.heads, tiles = ceil_div(a.P, TILE), parts = gridDim.z;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, slices = gridDim.y, slice = blockIdx.y;
    size_t at = (size_t)frame * a.P * a.C + head * a.hd, at_k = (size_t)frame * a.Pk * a.C + head * a.hd;
    for (int k0 = blockIdx.z * TILE; k0 < a.Pk; k0 += parts * TILE) {
        float dk_sum[4][HD / 16] = {}, dv_sum[4][HD / 16] = {}, prob[4][4], ds[4][4];
        __syncthreads();
        tile_load<HD>(sk, k + at_k, k0, a.Pk, a);
        tile_load<HD>(sv, v + at_k, k0, a.Pk, a);
        for (int tile = tiles * slice / slices; tile < tiles * (slice + 1) / slices; tile++) {
            int p0 = tile * TILE;
            float dq_tile[4][HD / 16] = {};
            __syncthreads();
            tile_load<HD>(sq, q + at, p0, a.P, a);
            tile_load<HD>(sd, dout + at, p0, a.P, a);
            __syncthreads();
            tile_scores<HD>(prob, sq, sk, product);
            tile_scores<HD>(ds, sd, sv, product);  // dprob
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                size_t row = ((size_t)blockIdx.x * a.P + min_int(p0 + 4 * ty + i, a.P - 1)) * 3;
                float largest = -INFINITY, inverse, dot = 0.0f, sum = 0.0f;
                for (int j = 0; j < 4; j++) largest = k0 + tx + 16 * j < a.Pk ? fmaxf(largest, prob[i][j]) : largest;
                largest = stats ? stats[row] : row_max(largest);
                for (int j = 0; j < 4; j++) {
                    prob[i][j] = k0 + tx + 16 * j < a.Pk ? expf((prob[i][j] - largest) * a.scale) : 0.0f;
                    sum += prob[i][j];
                }
                inverse = stats ? stats[row + 1] : 1.0f / row_sum(sum);
                for (int j = 0; j < 4; j++) prob[i][j] *= inverse, dot += prob[i][j] * ds[i][j];
                dot = stats ? stats[row + 2] : row_sum(dot);
                for (int j = 0; j < 4; j++) ds[i][j] = prob[i][j] * (ds[i][j] - dot) * a.scale;
            }
            tile_put(sp, prob);
            __syncthreads();
            tile_weigh<HD, true>(dv_sum, sp, sd, product);
            __syncthreads();
            tile_put(sp, ds);
            __syncthreads();
            tile_weigh<HD, true>(dk_sum, sp, sq, product);
            tile_weigh<HD, false>(dq_tile, sp, sk, product);
            tile_store<HD>(dq + blockIdx.z * dq_size + at, dq_tile, p0, a.P, a, k0 >= parts * TILE);
        }
        tile_store<HD>(dk + slice * dk_size + at_k, dk_sum, k0, a.Pk, a, 0);
        tile_store<HD>(dv + slice * dk_size + at_k, dv_sum, k0, a.Pk, a, 0);
    }
}

// out (n) = sum of partial (count, n) in order
__global__ static void attention_sum_kernel(floatX *out, const float *partial, int count, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    for (int s = 0; s < count && i < n; s++) sum += partial[s * n + i];
    if (i < n) out[i] = sum;
}
static void attention_sum_cuda(floatX *out, const float *partial, int count, size_t n) {
    attention_sum_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(out, partial, count, n);
}

template <int HD, typename Q>
static void attention_backward_hd(Q *dq, float *dk, float *dv, const float *stats, const floatX *dout, const floatX *q,
                                  const floatX *k, const floatX *v, int N, int slices, int parts, AttentionShape a) {
    auto kernel = attention_backward_kernel<HD, Q>; size_t bytes = attention_bytes<HD>(4);
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<dim3(N * a.heads, slices, parts), 256, bytes, stream_cuda>>>(dq, dk, dv, stats, dout, q, k, v, a,
                                                                          (size_t)N * a.P * a.C, (size_t)N * a.Pk * a.C);
}

template <int HD>
static void attention_backward_tiles(floatX *dq, float *dk, float *dv, const floatX *dout, const floatX *q, const floatX *k,
                                     const floatX *v, int N, int slices, AttentionShape a) {
    int key_tiles = ceil_div(a.Pk, TILE); size_t dq_size = (size_t)N * a.P * a.C;
    if (key_tiles == 1) {
        attention_backward_hd<HD, floatX>(dq, dk, dv, NULL, dout, q, k, v, N, slices, 1, a);
        return;
    }
    int parts = max_int(1, min_int(min_int(ATTENTION_PARTS, key_tiles), (int)(ATTENTION_ROOM / dq_size)));
    float *stats = malloc_floats_cuda((size_t)N * a.heads * a.P * 3), *partial = malloc_floats_cuda(parts * dq_size);
    attention_forward_hd<HD>(NULL, stats, dout, q, k, v, N, a);
    attention_backward_hd<HD, float>(partial, dk, dv, stats, dout, q, k, v, N, slices, parts, a);
    attention_sum_cuda(dq, partial, parts, dq_size);
    free_check_cuda(partial); free_check_cuda(stats);
}

// Partial sums take ATTENTION_ROOM floats (64 MiB) twice, or, where that is not enough for one, one of each: dq, dk and dv
static void attention_backward_cuda(floatX *dq, floatX *dk, floatX *dv, const floatX *dout, const floatX *q, const floatX *k,
                                    const floatX *v, int N, int P, int Pk, int C, int heads) {
    AttentionShape a = attention_shape(P, Pk, C, heads);
    size_t dk_size = (size_t)N * Pk * C;
    int slices = max_int(1, min_int(min_int(ATTENTION_SLICES, ceil_div(P, TILE)), (int)(ATTENTION_ROOM / (2 * dk_size))));
    float *dk_partial = malloc_floats_cuda(2 * slices * dk_size), *dv_partial = dk_partial + slices * dk_size;
    if (a.hd <= 16) attention_backward_tiles<16>(dq, dk_partial, dv_partial, dout, q, k, v, N, slices, a);
    else if (a.hd <= 32) attention_backward_tiles<32>(dq, dk_partial, dv_partial, dout, q, k, v, N, slices, a);
    else attention_backward_tiles<64>(dq, dk_partial, dv_partial, dout, q, k, v, N, slices, a);
    attention_sum_cuda(dk, dk_partial, slices, dk_size);
    attention_sum_cuda(dv, dv_partial, slices, dk_size);
    free_check_cuda(dk_partial);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 CAUSAL CONVOLUTION AND SELECTIVE SCAN

enum { CONV1D_RUN = 16, CONV1D_RUN_BACKWARD = 32, CONV1D_RUNS = 8 };  // positions of a thread; runs of a block

// z[s] = bias + sum_k weight[k] x[s - (K-1) + k],   out[s] = silu(z[s]). A thread walks over a run of positions of one channel
// with the last K of x in registers, so that it reads each x once.
// out (B, L, D), x (B, L, ldx), weight (D, K), bias (D); grid (runs, channels, clips), block (32 channels, 8 runs)
template <int K>
static __global__ void conv1d_silu_forward_kernel(floatX *__restrict__ out, const floatX *__restrict__ x, int ldx,
                                                  const float *weight, const float *bias, int order, int T, int P, int D) {
    int L = T * P, d = blockIdx.y * 32 + threadIdx.x, s0 = (blockIdx.x * CONV1D_RUNS + threadIdx.y) * CONV1D_RUN;
    if (d >= D || s0 >= L) return;
    float w[K], x_last[K], shift = bias[d];
    x += (size_t)blockIdx.z * L * ldx + d;
    out += (size_t)blockIdx.z * L * D + d;
    #pragma unroll
    for (int k = 0; k < K; k++) {  // x_last of position s0 - 1
        int s = s0 - K + k;
        w[k] = weight[(size_t)d * K + k];
        x_last[k] = k > 0 && s >= 0 ? (float)x[scan_row(order, s, T, P) * ldx] : 0.0f;
    }
    #pragma unroll 4
    for (int s = s0; s < min_int(s0 + CONV1D_RUN, L); s++) {
        size_t row = scan_row(order, s, T, P);
        float z = shift;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            x_last[k] = k < K - 1 ? x_last[min_int(k + 1, K - 1)] : (float)x[row * ldx];
            z += w[k] * x_last[k];
        }
        out[row * D] = silu_simd(z);
    }
}

static void conv1d_silu_forward_cuda(floatX *out, const floatX *x, int ldx, const float *weight, const float *bias,
                                     int order, int B, int T, int P, int D, int K) {
    if (B == 0 || T * P == 0 || D == 0) return;
    if (K < 1 || K > 4) fail("the causal convolution has kernels for d_conv = 1 to 4, not %d", K);
    auto kernel = K == 1 ? conv1d_silu_forward_kernel<1> : K == 2 ? conv1d_silu_forward_kernel<2>
                : K == 3 ? conv1d_silu_forward_kernel<3> : conv1d_silu_forward_kernel<4>;
    dim3 grid(ceil_div(T * P, CONV1D_RUN * CONV1D_RUNS), ceil_div(D, 32), B), block(32, CONV1D_RUNS);
    kernel<<<grid, block, 0, stream_cuda>>>(out, x, ldx, weight, bias, order, T, P, D);
}

// With dz[s] = dout[s] silu'(z[s]), where z is computed again:
//     dbias += sum_s dz[s],   dweight[k] += sum_s dz[s] x[s - (K-1) + k],   dx[s] = sum_k weight[K-1 - k] dz[s + k]
// A thread walks over its run and K-1 positions more, with the last K of x, dz and rows in registers: at position s the dx of
// position s - (K-1) is complete. A block adds up its runs and writes one part of dweight (parts, D, K) and dbias (parts, D).
template <int K>
static __global__ void conv1d_silu_backward_kernel(floatX *__restrict__ dx, int lddx, float *dweight, float *dbias,
                                                   const floatX *__restrict__ dout, const floatX *__restrict__ x, int ldx,
                                                   const float *weight, const float *bias, int order, int T, int P, int D,
                                                   int accumulate) {
    __shared__ float sums[K + 1][CONV1D_RUNS][32];
    int L = T * P, d = blockIdx.y * 32 + threadIdx.x, s0 = (blockIdx.x * CONV1D_RUNS + threadIdx.y) * CONV1D_RUN_BACKWARD;
    int s1 = d < D ? min_int(s0 + CONV1D_RUN_BACKWARD, L) : s0, here = s0 < s1;
    float w[K], x_last[K], dz_last[K], dw[K], db = 0.0f, shift = here ? bias[d] : 0.0f;
    size_t row_last[K];
    x += (size_t)blockIdx.z * L * ldx + d;
    dx += (size_t)blockIdx.z * L * lddx + d;
    dout += (size_t)blockIdx.z * L * D + d;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        int s = s0 - K + k;
        w[k] = here ? weight[(size_t)d * K + k] : 0.0f;
        x_last[k] = here && k > 0 && s >= 0 ? (float)x[scan_row(order, s, T, P) * ldx] : 0.0f;
        dz_last[k] = dw[k] = 0.0f, row_last[k] = 0;
    }
    #pragma unroll 4
    for (int s = s0; here && s < s1 + K - 1; s++) {
        int inside = s < L;  // dz behind the clip is 0
        size_t row = inside ? scan_row(order, s, T, P) : 0;
        float z = shift, x_s = inside ? (float)x[row * ldx] : 0.0f, dout_s = inside ? (float)dout[row * D] : 0.0f, sum = 0.0f;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            x_last[k] = k < K - 1 ? x_last[min_int(k + 1, K - 1)] : x_s;
            z += w[k] * x_last[k];
        }
        float dz = inside ? dout_s * silu_grad_simd(z) : 0.0f;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            dz_last[k] = k < K - 1 ? dz_last[min_int(k + 1, K - 1)] : dz;
            row_last[k] = k < K - 1 ? row_last[min_int(k + 1, K - 1)] : row;
            sum += w[K - 1 - k] * dz_last[k];
            if (s < s1) dw[k] += dz * x_last[k];
        }
        if (s < s1) db += dz;
        if (s - (K - 1) >= s0) dx[row_last[0] * lddx] = accumulate ? (float)dx[row_last[0] * lddx] + sum : sum;
    }
    #pragma unroll
    for (int k = 0; k < K; k++) sums[k][threadIdx.y][threadIdx.x] = dw[k];
    sums[K][threadIdx.y][threadIdx.x] = db;
    __syncthreads();
    if (threadIdx.y > K || d >= D) return;
    size_t part = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    float sum = 0.0f;
    for (int r = 0; r < CONV1D_RUNS; r++) sum += sums[threadIdx.y][r][threadIdx.x];
    if (threadIdx.y < K) dweight[(part * D + d) * K + threadIdx.y] = sum;
    else dbias[part * D + d] = sum;
}

static void conv1d_silu_backward_cuda(floatX *dx, int lddx, float *dweight, float *dbias, const floatX *dout, const floatX *x,
                                      int ldx, const float *weight, const float *bias, int order, int B, int T, int P, int D,
                                      int K, int accumulate) {
    if (B == 0 || T * P == 0 || D == 0) return;
    if (K < 1 || K > 4) fail("the causal convolution has kernels for d_conv = 1 to 4, not %d", K);
    auto kernel = K == 1 ? conv1d_silu_backward_kernel<1> : K == 2 ? conv1d_silu_backward_kernel<2>
                : K == 3 ? conv1d_silu_backward_kernel<3> : conv1d_silu_backward_kernel<4>;
    dim3 grid(ceil_div(T * P, CONV1D_RUN_BACKWARD * CONV1D_RUNS), ceil_div(D, 32), B), block(32, CONV1D_RUNS);
    int parts = (int)grid.x * B;
    float *dw = malloc_floats_cuda((size_t)parts * D * K), *db = malloc_floats_cuda((size_t)parts * D);
    kernel<<<grid, block, 0, stream_cuda>>>(dx, lddx, dw, db, dout, x, ldx, weight, bias, order, T, P, D, accumulate);
    finish_sums(dweight, NULL, NULL, dw, parts, D * K, 1.0f, 1);
    finish_sums(dbias, NULL, NULL, db, parts, D, 1.0f, 1);
    free_check_cuda(dw); free_check_cuda(db);
}

// ---- The selective scan. Four lanes share a channel, with 4 of its 16 states each, in registers; a warp has 8 neighbouring
// channels, a block 32 (128 threads), and walks over the positions in tiles: it copies a tile's rows of u, dt, Bt, Ct into
// shared memory, where positions behind the end and channels behind D are 0. With dt = 0 a position changes no state, so the
// inner loops need no bounds. Fewer than 16 states are filled up with zeros; more are groups of 16, one launch each.
//
// A GPU wants several hundred blocks. If B*D gives fewer, the positions are cut into chunks that work at the same time:
//     1  every chunk starts from h = 0 and finds its last h and S, the sum of its dt           scan_chunk_kernel
//     2  one after the other: h after chunk c = exp2(a S) (h before it) + (h of step 1)         scan_join_kernel
//     3  every chunk again, from the right h                                                    selective_scan_*_kernel
// because the recurrence is linear and exp(dt A) multiply to exp(S A). The same holds for backward's recurrence, from the end.
// The number of chunks depends on sizes only: results do not depend on the GPU.

enum { SCAN_THREADS = 128, SCAN_CHANNELS = 32, SCAN_GROUP = 16, SCAN_TILE = 32, SCAN_KEPT = 16, SCAN_HALF = 8 };
enum { SCAN_PITCH = SCAN_CHANNELS + 8 };  // of a tile's rows: 4 positions of 8 channels lie in 32 different banks
enum { SCAN_BLOCKS = 384 };  // that many are wanted: about 3 on each of an H100's 132 multiprocessors
#define SCAN_WARP 0xffffffffu

typedef struct {  // as in the signatures of train_vivim.c; n0 is the group's first state, length the positions of a chunk
    const floatX *u, *dt, *dy, *Bt, *Ct;
    const float *A_log, *D_skip;
    int ldbc, order, T, P, D, N, n0, length, chunks;
} ScanCuda;

typedef struct { int d, g, c, b, first, end, row; } ScanPlace;  // channel, lane's quarter, channel in the block, clip, chunk

static __device__ __forceinline__ ScanPlace scan_place(const ScanCuda &p) {
    ScanPlace at;
    at.g = threadIdx.x % 4, at.c = threadIdx.x / 4, at.d = blockIdx.x * SCAN_CHANNELS + at.c, at.b = blockIdx.z;
    at.first = blockIdx.y * p.length, at.end = min_int(at.first + p.length, p.T * p.P), at.row = 0;
    return at;
}

// 2^x in one instruction of the hardware, relative error 2^-22; below 2^-126 it is 0, and NaN stays NaN. exp2f has three more,
// for denormals, which no state needs.
static __device__ __forceinline__ float scan_exp2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// a = A log2(e) of the lane's 4 states
static __device__ __forceinline__ void scan_rates(float *a, const ScanCuda &p, const ScanPlace &at) {
    #pragma unroll
    for (int n = 0; n < 4; n++) {
        int state = p.n0 + at.g * 4 + n;
        a[n] = at.d < p.D && state < p.N ? -LOG2_E * exp_simd(p.A_log[(size_t)at.d * p.N + state]) : 0.0f;
    }
}

static __device__ __forceinline__ void load4(float *v, const float4 *from) {
    float4 q = *from;
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}

// tile[i] (32 channels) = row of x (L, D) at the i-th of `tokens` positions; lane i holds the row of position i
template <int TOKENS>
static __device__ __forceinline__ void scan_stage(float (*tile)[SCAN_PITCH], const floatX *x, int row, int count, int D) {
    int lane = threadIdx.x % 32, d = blockIdx.x * SCAN_CHANNELS + lane;
    float v[TOKENS / 4];
    #pragma unroll
    for (int k = 0; k < TOKENS / 4; k++) {
        int i = threadIdx.x / 32 + k * 4;
        size_t from = (size_t)__shfl_sync(SCAN_WARP, row, i) * D + d;
        v[k] = i < count && d < D ? (float)x[from] : 0.0f;
    }
    #pragma unroll
    for (int k = 0; k < TOKENS / 4; k++) tile[threadIdx.x / 32 + k * 4][lane] = v[k];
}

// tile[i] (16 states) = row of Bt or Ct (L, ldbc), from state n0 of N
template <int TOKENS>
static __device__ __forceinline__ void scan_stage_states(float4 (*tile)[4], const floatX *x, int row, int count,
                                                         const ScanCuda &p) {
    int n = threadIdx.x % SCAN_GROUP;
    float v[TOKENS / 8];
    #pragma unroll
    for (int k = 0; k < TOKENS / 8; k++) {
        int i = threadIdx.x / SCAN_GROUP + k * 8;
        size_t from = (size_t)__shfl_sync(SCAN_WARP, row, i) * p.ldbc + p.n0 + n;
        v[k] = i < count && p.n0 + n < p.N ? (float)x[from] : 0.0f;
    }
    #pragma unroll
    for (int k = 0; k < TOKENS / 8; k++) ((float *)tile[threadIdx.x / SCAN_GROUP + k * 8])[n] = v[k];
}

// Sums over lanes by halves: in each round a lane gives one half of its values away and receives its partner's other half.
// LANE is the first partner's distance, LAST the last one's. With v of 4 values: fold<4, 2, 1> leaves in v[0] of lane g the
// sum of v[g] over 4 lanes; with 32: fold<32, 16, 4> leaves in v[0..3] of lane l the sums of v[4 (l/4) ..] over 8 lanes.
template <int VALUES, int LANE, int LAST>
static __device__ __forceinline__ void fold(float *v) {
    bool upper = threadIdx.x & LANE;
    #pragma unroll
    for (int k = 0; k < VALUES / 2; k++) {
        float mine = upper ? v[k + VALUES / 2] : v[k], other = upper ? v[k] : v[k + VALUES / 2];
        v[k] = mine + __shfl_xor_sync(SCAN_WARP, other, LANE);
    }
    if constexpr (LANE > LAST) fold<VALUES / 2, LANE / 2, LAST>(v);
}

// Step 1. Forward: h = e h + dt u Bt from the chunk's first position. Backward, from its last: passed = e (passed + dy Ct),
// what reaches the position before. ends (B, chunks, D, 16), sums (B, chunks, D)
template <bool BACKWARD>
static __global__ __launch_bounds__(SCAN_THREADS) void scan_chunk_kernel(float *ends, float *sums, ScanCuda p) {
    __shared__ float x[SCAN_TILE][SCAN_PITCH], dt[SCAN_TILE][SCAN_PITCH];
    __shared__ float4 states[SCAN_TILE][4];
    ScanPlace at = scan_place(p);
    int L = p.T * p.P, tiles = ceil_div(at.end - at.first, SCAN_TILE);
    size_t clip = (size_t)at.b * L;
    float a[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum = 0.0f;
    scan_rates(a, p, at);
    for (int k = 0; k < tiles; k++) {
        int s0 = at.first + (BACKWARD ? tiles - 1 - k : k) * SCAN_TILE, count = min_int(SCAN_TILE, at.end - s0);
        int row = (int)scan_row(p.order, min_int(s0 + threadIdx.x % 32, L - 1), p.T, p.P);
        __syncthreads();
        scan_stage<SCAN_TILE>(x, (BACKWARD ? p.dy : p.u) + clip * p.D, row, count, p.D);
        scan_stage<SCAN_TILE>(dt, p.dt + clip * p.D, row, count, p.D);
        scan_stage_states<SCAN_TILE>(states, (BACKWARD ? p.Ct : p.Bt) + clip * p.ldbc, row, count, p);
        __syncthreads();
        #pragma unroll 8
        for (int j = 0; j < SCAN_TILE; j++) {
            int i = BACKWARD ? SCAN_TILE - 1 - j : j;
            float delta = dt[i][at.c], v = BACKWARD ? x[i][at.c] : delta * x[i][at.c], q[4];
            load4(q, &states[i][at.g]);
            sum += delta;
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                float e = scan_exp2(delta * a[n]);
                h[n] = BACKWARD ? e * (h[n] + v * q[n]) : e * h[n] + v * q[n];
            }
        }
    }
    if (at.d >= p.D) return;
    size_t to = ((size_t)at.b * p.chunks + blockIdx.y) * p.D + at.d;
    ((float4 *)ends)[to * 4 + at.g] = make_float4(h[0], h[1], h[2], h[3]);
    if (at.g == 0) sums[to] = sum;
}

// Step 2, a thread for each state (B, D, 16): starts (B, chunks, D, 16) = h before each chunk, in the order of the walk
static __global__ void scan_join_kernel(float *__restrict__ starts, const float *__restrict__ ends,
                                        const float *__restrict__ sums, ScanCuda p, int B, int backward) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = (size_t)p.D * SCAN_GROUP;
    if (i >= B * width) return;
    size_t clip = i / width * p.chunks;
    int d = (int)(i % width / SCAN_GROUP), n = (int)(i % SCAN_GROUP);
    float a = p.n0 + n < p.N ? -LOG2_E * exp_simd(p.A_log[(size_t)d * p.N + p.n0 + n]) : 0.0f, h = 0.0f;
    #pragma unroll 16
    for (int c = 0; c < p.chunks; c++) {
        size_t at = (clip + (backward ? p.chunks - 1 - c : c)) * p.D + d;
        starts[at * SCAN_GROUP + n] = h;
        h = scan_exp2(a * sums[at]) * h + ends[at * SCAN_GROUP + n];
    }
}

// Step 3, forward. y (B, L, D); states (B, ceil(L/16), D, 16): h before every 16th position, or NULL; starts NULL: one chunk
static __global__ __launch_bounds__(SCAN_THREADS) void selective_scan_forward_kernel(floatX *y, float *states,
                                                                                     const float *starts, ScanCuda p,
                                                                                     int accumulate) {
    __shared__ float u[SCAN_TILE][SCAN_PITCH], dt[SCAN_TILE][SCAN_PITCH], y_before[SCAN_TILE][SCAN_PITCH];
    __shared__ float4 Bt[SCAN_TILE][4], Ct[SCAN_TILE][4];
    ScanPlace at = scan_place(p);
    int L = p.T * p.P, here = at.d < p.D;
    size_t clip = (size_t)at.b * L;
    float a[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, skip = here && at.g == 0 && p.n0 == 0 ? p.D_skip[at.d] : 0.0f;
    scan_rates(a, p, at);
    if (starts && here) load4(h, (const float4 *)starts + (((size_t)at.b * p.chunks + blockIdx.y) * p.D + at.d) * 4 + at.g);
    for (int s0 = at.first; s0 < at.end; s0 += SCAN_TILE) {
        int count = min_int(SCAN_TILE, at.end - s0);
        int row = (int)scan_row(p.order, min_int(s0 + threadIdx.x % 32, L - 1), p.T, p.P);
        __syncthreads();
        scan_stage<SCAN_TILE>(u, p.u + clip * p.D, row, count, p.D);
        scan_stage<SCAN_TILE>(dt, p.dt + clip * p.D, row, count, p.D);
        scan_stage_states<SCAN_TILE>(Bt, p.Bt + clip * p.ldbc, row, count, p);
        scan_stage_states<SCAN_TILE>(Ct, p.Ct + clip * p.ldbc, row, count, p);
        if (accumulate) scan_stage<SCAN_TILE>(y_before, y + clip * p.D, row, count, p.D);
        __syncthreads();
        #pragma unroll 2
        for (int i0 = 0; i0 < SCAN_TILE; i0 += 4) {
            if (states && i0 % SCAN_KEPT == 0 && i0 < count && here) {
                size_t kept = (size_t)at.b * ceil_div(L, SCAN_KEPT) + (s0 + i0) / SCAN_KEPT;
                ((float4 *)states)[(kept * p.D + at.d) * 4 + at.g] = make_float4(h[0], h[1], h[2], h[3]);
            }
            float sum[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float delta = dt[i0 + i][at.c], v = u[i0 + i][at.c], x = delta * v, b[4], c[4];
                load4(b, &Bt[i0 + i][at.g]);
                load4(c, &Ct[i0 + i][at.g]);
                sum[i] = skip * v;
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    h[n] = scan_exp2(delta * a[n]) * h[n] + x * b[n];
                    sum[i] += h[n] * c[n];
                }
            }
            fold<4, 2, 1>(sum);  // lane g has position i0 + g
            size_t to = (clip + __shfl_sync(SCAN_WARP, row, i0 + at.g)) * p.D + at.d;
            if (i0 + at.g < count && here) y[to] = accumulate ? y_before[i0 + at.g][at.c] + sum[0] : sum[0];
        }
    }
}

// number of floats in "states": (groups, B, ceil(L/16), D, 16)
static size_t selective_scan_states_cuda(int B, int T, int P, int D, int N) {
    return (size_t)ceil_div(N, SCAN_GROUP) * B * ceil_div(T * P, SCAN_KEPT) * D * SCAN_GROUP;
}

// cuts L into chunks of whole tiles; returns the grid of all blocks
static dim3 scan_chunks(ScanCuda *p, int B) {
    int L = p->T * p->P, blocks = ceil_div(p->D, SCAN_CHANNELS) * B, tiles = ceil_div(L, SCAN_TILE);
    p->length = ceil_div(tiles, max_int(1, min_int(tiles, SCAN_BLOCKS / blocks))) * SCAN_TILE;
    p->chunks = ceil_div(L, p->length);
    return dim3(ceil_div(p->D, SCAN_CHANNELS), p->chunks, B);
}

// steps 1 and 2; starts stays NULL if there is one chunk; the caller frees it
static float *scan_starts_cuda(const ScanCuda *p, dim3 grid, int B, int backward) {
    if (p->chunks == 1) return NULL;
    size_t width = (size_t)B * p->D * SCAN_GROUP, n = width * p->chunks;
    float *starts = malloc_floats_cuda(n), *ends = malloc_floats_cuda(n), *sums = malloc_floats_cuda(n / SCAN_GROUP);
    auto kernel = backward ? scan_chunk_kernel<true> : scan_chunk_kernel<false>;
    kernel<<<grid, SCAN_THREADS, 0, stream_cuda>>>(ends, sums, *p);
    scan_join_kernel<<<blocks_for(width, 128), 128, 0, stream_cuda>>>(starts, ends, sums, *p, B, backward);
    free_check_cuda(ends); free_check_cuda(sums);
    return starts;
}

static void selective_scan_forward_cuda(floatX *y, float *states, const floatX *u, const floatX *dt, const floatX *Bt,
                                        const floatX *Ct, int ldbc, const float *A_log, const float *D_skip, int order, int B,
                                        int T, int P, int D, int N, int accumulate) {
    if (B == 0 || T * P == 0 || D == 0) return;
    ScanCuda p = {u, dt, NULL, Bt, Ct, A_log, D_skip, ldbc, order, T, P, D, N, 0, 0, 0};
    dim3 grid = scan_chunks(&p, B);
    for (p.n0 = 0; p.n0 < N; p.n0 += SCAN_GROUP) {
        float *kept = states ? states + selective_scan_states_cuda(B, T, P, D, p.n0) : NULL;
        float *starts = scan_starts_cuda(&p, grid, B, 0);
        selective_scan_forward_kernel<<<grid, SCAN_THREADS, 0, stream_cuda>>>(y, kept, starts, p, accumulate || p.n0 > 0);
        free_check_cuda(starts);
    }
}

// Step 3, backward, with train_vivim.c's formulas. A block walks over its chunk from the end, 16 positions at a time, and in
// them over 8 and 8: it replays h from the kept state, keeps e and h of 8 positions in registers, and goes back through them.
// starts: passed behind each chunk. du, ddt (B, L, D), = or += if add. Each block adds its 32 channels into its part of dBt and
// dCt (D/32, B*L, {dBt, dCt}, 16), and its positions into its part of dA_log (B*chunks, D, N) and dD_skip (B*chunks, D).
static __global__ __launch_bounds__(SCAN_THREADS, 3) void selective_scan_backward_kernel(
        floatX *du, floatX *ddt, float *dBC, float *dA_log, float *dD_skip, const float *states, const float *starts,
        ScanCuda p, int add) {
    __shared__ float u[SCAN_KEPT][SCAN_PITCH], dt[SCAN_KEPT][SCAN_PITCH], dy[SCAN_KEPT][SCAN_PITCH];
    __shared__ float4 Bt[SCAN_KEPT][4], Ct[SCAN_KEPT][4];
    __shared__ float4 sums[2][SCAN_THREADS / 32][SCAN_HALF][8];  // half, warp, position, {dBt, dCt} of 16 states
    ScanPlace at = scan_place(p);
    int L = p.T * p.P, here = at.d < p.D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t clip = (size_t)at.b * L, place = ((size_t)at.b * p.chunks + blockIdx.y) * p.D + at.d;
    float a[4], passed[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dA[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dskip = 0.0f;
    float skip = here && !add ? p.D_skip[at.d] : 0.0f;
    scan_rates(a, p, at);
    if (starts && here) load4(passed, (const float4 *)starts + place * 4 + at.g);
    for (int s0 = (at.end - 1) / SCAN_KEPT * SCAN_KEPT; s0 >= at.first; s0 -= SCAN_KEPT) {
        int count = min_int(SCAN_KEPT, at.end - s0);
        int row = (int)scan_row(p.order, min_int(s0 + lane % SCAN_KEPT, L - 1), p.T, p.P);
        size_t kept = (((size_t)at.b * ceil_div(L, SCAN_KEPT) + s0 / SCAN_KEPT) * p.D + min_int(at.d, p.D - 1)) * 4 + at.g;
        __syncthreads();
        scan_stage<SCAN_KEPT>(u, p.u + clip * p.D, row, count, p.D);
        scan_stage<SCAN_KEPT>(dt, p.dt + clip * p.D, row, count, p.D);
        scan_stage<SCAN_KEPT>(dy, p.dy + clip * p.D, row, count, p.D);
        scan_stage_states<SCAN_KEPT>(Bt, p.Bt + clip * p.ldbc, row, count, p);
        scan_stage_states<SCAN_KEPT>(Ct, p.Ct + clip * p.ldbc, row, count, p);
        __syncthreads();
        #pragma unroll 1
        for (int half = 1; half >= 0; half--) {
            int i0 = half * SCAN_HALF;
            float e[SCAN_HALF][4], h[SCAN_HALF + 1][4];
            load4(h[0], (const float4 *)states + kept);
            #pragma unroll 4
            for (int i = 0; i < i0; i++) {  // to the second half's start
                float delta = dt[i][at.c], x = delta * u[i][at.c], b[4];
                load4(b, &Bt[i][at.g]);
                #pragma unroll
                for (int n = 0; n < 4; n++) h[0][n] = scan_exp2(delta * a[n]) * h[0][n] + x * b[n];
            }
            #pragma unroll
            for (int i = 0; i < SCAN_HALF; i++) {  // replay
                float delta = dt[i0 + i][at.c], x = delta * u[i0 + i][at.c], b[4];
                load4(b, &Bt[i0 + i][at.g]);
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    e[i][n] = scan_exp2(delta * a[n]);
                    h[i + 1][n] = e[i][n] * h[i][n] + x * b[n];
                }
            }
            #pragma unroll
            for (int i4 = SCAN_HALF - 4; i4 >= 0; i4 -= 4) {  // and back
                float dx[4], dexponent[4], dbc[32];  // dbc (4 positions, {dBt, dCt}, 4 states)
                #pragma unroll
                for (int k = 3; k >= 0; k--) {
                    int i = i4 + k;
                    float delta = dt[i0 + i][at.c], x = delta * u[i0 + i][at.c], dy_i = dy[i0 + i][at.c], b[4], c[4];
                    load4(b, &Bt[i0 + i][at.g]);
                    load4(c, &Ct[i0 + i][at.g]);
                    dx[k] = dexponent[k] = 0.0f;
                    #pragma unroll
                    for (int n = 0; n < 4; n++) {
                        float gradient = passed[n] + dy_i * c[n];
                        dbc[k * 8 + n] = gradient * x;
                        dbc[k * 8 + 4 + n] = dy_i * h[i + 1][n];
                        dx[k] += gradient * b[n];
                        passed[n] = gradient * e[i][n];
                        float q = passed[n] * h[i][n];
                        dexponent[k] += q * a[n];
                        dA[n] += q * delta;
                    }
                }
                fold<32, 16, 4>(dbc);  // lane l has position i4 + l/8, states 4 g .. of dBt if l/4 is even, else of dCt
                sums[half][warp][i4 + lane / 8][lane / 4 % 2 * 4 + at.g] = make_float4(dbc[0], dbc[1], dbc[2], dbc[3]);
                fold<4, 2, 1>(dx);  // lane g has position i4 + g
                fold<4, 2, 1>(dexponent);
                int i = i0 + i4 + at.g;
                float delta = dt[i][at.c], v = u[i][at.c], dy_i = dy[i][at.c];
                float du_i = dx[0] * delta + dy_i * skip, ddt_i = dx[0] * v + dexponent[0] * LN_2;
                size_t to = (clip + __shfl_sync(SCAN_WARP, row, i)) * p.D + at.d;
                if (i < count && here) {
                    du[to] = add ? (float)du[to] + du_i : du_i;
                    ddt[to] = add ? (float)ddt[to] + ddt_i : ddt_i;
                }
                dskip += dy_i * v;
            }
            __syncthreads();
            #pragma unroll
            for (int k = 0; k < 2; k++) {  // a warp sums the positions warp and warp + 4 over the warps' channels
                int i = warp + 4 * k, at_row = __shfl_sync(SCAN_WARP, row, i0 + i);
                float sum = 0.0f;
                #pragma unroll
                for (int w = 0; w < SCAN_THREADS / 32; w++) sum += ((const float *)sums[half][w][i])[lane];
                size_t part = (size_t)blockIdx.x * gridDim.z * L + clip + at_row;
                if (i0 + i < count) dBC[part * 2 * SCAN_GROUP + lane] = sum;
            }
        }
    }
    dskip += __shfl_xor_sync(SCAN_WARP, dskip, 1);
    dskip += __shfl_xor_sync(SCAN_WARP, dskip, 2);
    if (!here) return;
    if (at.g == 0 && !add) dD_skip[place] = dskip;
    #pragma unroll
    for (int n = 0; n < 4; n++) {  // dA_log = dA A, A = a ln 2
        int state = p.n0 + at.g * 4 + n;
        if (state < p.N) dA_log[place * p.N + state] = dA[n] * (a[n] * LN_2);
    }
}

// dBt, dCt (rows, lddbc), states n0 .. of N = sums of partial (parts, rows, {dBt, dCt}, 16)
static __global__ void scan_add_channels_kernel(floatX *dBt, floatX *dCt, int lddbc, const float *partial, int parts,
                                                size_t rows, int n0, int N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / (2 * SCAN_GROUP);
    int k = (int)(i % (2 * SCAN_GROUP)), n = n0 + k % SCAN_GROUP;
    if (row >= rows || n >= N) return;
    float sum = 0.0f;
    #pragma unroll 4
    for (int part = 0; part < parts; part++) sum += partial[(size_t)part * rows * 2 * SCAN_GROUP + i];
    (k < SCAN_GROUP ? dBt : dCt)[row * lddbc + n] = sum;
}

static void selective_scan_backward_cuda(floatX *du, floatX *ddt, floatX *dBt, floatX *dCt, int lddbc, float *dA_log,
                                         float *dD_skip, const floatX *dy, const floatX *u, const floatX *dt, const floatX *Bt,
                                         const floatX *Ct, int ldbc, const float *A_log, const float *D_skip,
                                         const float *states, int order, int B, int T, int P, int D, int N) {
    if (B == 0 || T * P == 0 || D == 0) return;
    ScanCuda p = {u, dt, dy, Bt, Ct, A_log, D_skip, ldbc, order, T, P, D, N, 0, 0, 0};
    dim3 grid = scan_chunks(&p, B);
    int places = B * p.chunks;
    size_t rows = (size_t)B * T * P, n = rows * 2 * SCAN_GROUP;
    float *dBC = malloc_floats_cuda(grid.x * n), *dA = malloc_floats_cuda((size_t)places * D * N);
    float *dskip = malloc_floats_cuda((size_t)places * D);
    for (p.n0 = 0; p.n0 < N; p.n0 += SCAN_GROUP) {
        const float *kept = states + selective_scan_states_cuda(B, T, P, D, p.n0);
        float *starts = scan_starts_cuda(&p, grid, B, 1);
        selective_scan_backward_kernel<<<grid, SCAN_THREADS, 0, stream_cuda>>>(du, ddt, dBC, dA, dskip, kept, starts, p,
                                                                               p.n0 > 0);
        scan_add_channels_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(dBt, dCt, lddbc, dBC, (int)grid.x, rows, p.n0, N);
        free_check_cuda(starts);
    }
    finish_sums(dA_log, NULL, NULL, dA, places, D * N, 1.0f, 1);
    finish_sums(dD_skip, NULL, NULL, dskip, places, D, 1.0f, 1);
    free_check_cuda(dBC); free_check_cuda(dA); free_check_cuda(dskip);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11 THE GRAPH

static void (*const model_trainable_host)(Model *) = model_trainable;  // the names' last use as the CPU's
static float *(*const malloc_floats_host)(size_t) = malloc_floats;

static void model_trainable_cuda(Model *m) {
    if (m->grads) return;
    m->grads = (float *)calloc_check_cuda(m->num_params, sizeof(float));
    m->adam_m = (float *)calloc_check_cuda(m->num_params, sizeof(float));
    m->adam_v = (float *)calloc_check_cuda(m->num_params, sizeof(float));
}

// Around each operation of the graph: were all its kernels launched? And its time for --bench, a pair of events, read when all
// is done
typedef struct { const char *name; cudaEvent_t begin, end; } OpTime;
static struct { int on, count, room; OpTime *all; } op_times;

struct OpTimer {
    OpTime time;
    explicit OpTimer(const char *name) {
        time.name = name;
        if (!op_times.on) return;
        cudaCheck(cudaEventCreate(&time.begin)); cudaCheck(cudaEventCreate(&time.end));
        cudaCheck(cudaEventRecord(time.begin, stream_cuda));
    }
    ~OpTimer() {
        cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) fail("%s: CUDA: %s", time.name, cudaGetErrorString(error));
        if (!op_times.on) return;
        cudaCheck(cudaEventRecord(time.end, stream_cuda));
        if (op_times.count == op_times.room) {
            op_times.room = 2 * op_times.room + 1024;
            op_times.all = (OpTime *)realloc(op_times.all, op_times.room * sizeof(OpTime));
            if (op_times.all == NULL) out_of_memory((double)op_times.room * sizeof(OpTime));
        }
        op_times.all[op_times.count++] = time;
    }
};

#include "dev/cuda_names.h"
#define DECODED_AT_ONCE 16  // frames: larger kernels, and their maps, 12 MB each for b3 at 256 x 256, are still near the L2
#undef VIVIM_PART
#define VIVIM_PART 2
#include "train_vivim.c"

// ---------------------------------------------------------------------------------------------------------------------
// 12 THE MODEL ON THE DEVICE, MAIN
//
// The host's Model is the one that is saved and loaded. Its twin has the same tables and sizes, but parameters, gradients,
// moments and activations of its own, on the device.

static struct {
    const Model *of;       // the host's model, NULL: there is none yet
    Model model;           // the twin
    AffineNet affine;      // of the host's frozen network; affine_of: which one
    const AffineNet *affine_of;
    floatX *images, *staging;  // a batch's input: on the device; on the host, in memory that the device copies from fastest
    float *mask, *first_mask;
    size_t pixels, clips;  // for which they have room: B*T*H*W, B*H*W
    cudaGraphExec_t replay;  // the forward pass as planned, recorded; passes: done since the plan
    int passes;
    float *logits;         // (outputs, H, W) on the host: what the host's model->logits points to
    size_t logits_size;
} twin;

// to (n) = from (n), rounded
__global__ static void round_kernel(floatX *to, const float *from, size_t n) {
    size_t i = first_of_four(); float v[4];
    load4(v, from, i, n);
    store4(to, v, i, n);
}

// What the products of matrices read, after the parameters have changed
static void round_weights_cuda(Model *t) {
    if (sizeof(floatX) == sizeof(float)) t->weights = (floatX *)(void *)t->params;
    else {
        if (t->weights == NULL) t->weights = malloc_activations_cuda(t->num_params);
        round_kernel<<<blocks_for(t->num_params, 4 * BLOCK), BLOCK, 0, stream_cuda>>>(t->weights, t->params, t->num_params);
        cudaCheck(cudaGetLastError());
    }
}

// Weights, buffers and, once both sides have them, Adam's moments
static void send_cuda(Model *m) {
    Model *t = &twin.model;
    if (twin.of != m) return;
    to_device(t->params, m->params, m->num_params * sizeof(float));
    round_weights_cuda(t);
    to_device(t->buffers, m->buffers, m->num_buffers * sizeof(float));
    if (m->adam_m) {
        model_trainable(t);
        to_device(t->adam_m, m->adam_m, m->num_params * sizeof(float));
        to_device(t->adam_v, m->adam_v, m->num_params * sizeof(float));
    }
    t->step = m->step, t->batches_tracked = m->batches_tracked;
    settle_cuda();
}

static void fetch_cuda(Model *m) {
    const Model *t = &twin.model;
    if (twin.of != m) return;
    to_host(m->params, t->params, m->num_params * sizeof(float));
    to_host(m->buffers, t->buffers, m->num_buffers * sizeof(float));
    if (t->adam_m) {
        model_trainable_host(m);
        to_host(m->adam_m, t->adam_m, m->num_params * sizeof(float));
        to_host(m->adam_v, t->adam_v, m->num_params * sizeof(float));
    }
}

// Makes the twin of a host's model: a copy of it whose tensors are on the device
static void twin_init(Model *m) {
    Model *t = &twin.model;
    start_cuda();
    if (twin.of) fail("internal error: one model at a time has a place on the GPU; please report it");
    *t = *m;
    twin.of = m;
    t->sublayers = (Sublayer *)malloc((size_t)m->num_sublayers * sizeof(Sublayer));
    if (t->sublayers == NULL) out_of_memory((double)m->num_sublayers * sizeof(Sublayer));
    memcpy(t->sublayers, m->sublayers, (size_t)m->num_sublayers * sizeof(Sublayer));
    memset(&t->kept, 0, sizeof t->kept); memset(&t->scratch, 0, sizeof t->scratch);
    t->grads = t->adam_m = t->adam_v = NULL, t->weights = NULL;
    t->params = malloc_floats(m->num_params), t->buffers = malloc_floats(max_int(1, (int)m->num_buffers));
    send_cuda(m);
}

static void plan_cuda(Model *m, int B, int T, int H, int W, int training, int all_frames, int verbose) {
    Model *t = &twin.model;
    if (twin.of != m) twin_init(m);
    // asked before every batch: as long as nothing is different, what was recorded stays
    else if (t->B == B && t->T == T && t->H == H && t->W == W && t->training == training && t->all_frames == all_frames) return;
    if (twin.replay) {
        settle_cuda();
        cudaCheck(cudaGraphExecDestroy(twin.replay));
    }
    twin.replay = NULL, twin.passes = 0;
    size_t clips = (size_t)B * H * W, outputs = all_frames ? clips * T : clips;
    model_plan(t, B, T, H, W, training, all_frames, verbose);
    if (twin.pixels < clips * T || twin.clips < clips) {
        free_check(twin.images), free_check(twin.mask), free_check(twin.first_mask);
        settle_cuda();
        cudaCheck(cudaFreeHost(twin.staging));
        twin.pixels = clips * T, twin.clips = clips;
        twin.images = malloc_activations_cuda(3 * twin.pixels);
        twin.mask = malloc_floats(clips), twin.first_mask = malloc_floats(clips);
        cudaCheck(cudaMallocHost((void **)&twin.staging, 3 * twin.pixels * sizeof(floatX)));
    }
    if (twin.logits_size < outputs) {
        cudaCheck(cudaFreeHost(twin.logits));
        cudaCheck(cudaMallocHost((void **)&twin.logits, outputs * sizeof(float)));
        twin.logits_size = outputs;
    }
    m->logits = twin.logits;
}

// n numbers of a batch's input to the device, rounded on the way
static void send_images(const float *input, size_t n) {
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) twin.staging[i] = input[i];
    to_device(twin.images, twin.staging, n * sizeof(floatX));
}

// A forward pass of one clip is hundreds of kernels of microseconds each, about as long as it takes to launch them. In
// evaluation nothing depends on the call, so the second pass after a plan is recorded, and replayed from then on as one launch.
// The first is done as it is: then cuBLAS chooses its kernels and loads them, which must not happen while a stream is recorded.
static void forward_replayed(Model *t) {
    if (op_times.on || (twin.replay == NULL && (t->training || twin.passes++ == 0))) {
        model_forward(t, twin.images);
        return;
    }
    if (twin.replay == NULL) {
        cudaGraph_t graph;
        cudaCheck(cudaStreamBeginCapture(stream_cuda, cudaStreamCaptureModeThreadLocal));
        model_forward(t, twin.images);
        cudaCheck(cudaStreamEndCapture(stream_cuda, &graph));
        cudaCheck(cudaGraphInstantiate(&twin.replay, graph, 0));
        cudaCheck(cudaGraphDestroy(graph));
    }
    cudaCheck(cudaGraphLaunch(twin.replay, stream_cuda));
}

static void forward_cuda(Model *m, const float *input) {
    Model *t = &twin.model;
    size_t clips = (size_t)t->B * t->H * t->W;
    send_images(input, 3 * clips * t->T);
    forward_replayed(t);
    to_host(m->logits, t->logits, (t->all_frames ? clips * t->T : clips) * sizeof(float));
}

static Losses step_cuda(Model *m, const AffineNet *f, const float *input, const float *mask, const float *first_mask,
                        double lr) {
    Model *t = &twin.model;
    size_t clips = (size_t)t->B * t->H * t->W;
    if (f && twin.affine_of != f) {  // frozen: it is copied once
        twin.affine = *f, twin.affine_of = f;
        twin.affine.net.params = malloc_floats(f->net.num_params);
        to_device(twin.affine.net.params, f->net.params, f->net.num_params * sizeof(float));
    }
    send_images(input, 3 * clips * t->T);
    to_device(twin.mask, mask, clips * sizeof(float));
    to_device(twin.first_mask, first_mask, clips * sizeof(float));
    Losses loss = train_step(t, f ? &twin.affine : NULL, twin.images, twin.mask, twin.first_mask, lr);
    round_weights_cuda(t);
    m->step = t->step, m->batches_tracked = t->batches_tracked;
    return loss;
}

static double peak_cuda(void) {
    uint64_t bytes = 0, recorded = 0; int gpu;
    cudaCheck(cudaGetDevice(&gpu));
    cudaCheck(cudaMemPoolGetAttribute(pool_cuda, cudaMemPoolAttrUsedMemHigh, &bytes));
    cudaCheck(cudaDeviceGetGraphMemAttribute(gpu, cudaGraphMemAttrUsedMemHigh, &recorded));
    return (double)(bytes + recorded) / 1048576.0;
}

static double waiting_cuda(void) { return waited_cuda; }

// begin: from now on operations are timed; else: what they took since, the longest first. A profiler that waits to be told
// (ncu --profile-from-start off) sees the training step alone.
static void profile_cuda(int begin) {
    struct { const char *name; int calls; double ms; } sums[64];
    double total = 0.0; int names = 0;
    op_times.on = begin;
    if (begin && twin.model.training) cudaCheck(cudaProfilerStart());
    if (begin) return;
    settle_cuda();
    cudaCheck(cudaProfilerStop());
    for (int i = 0; i < op_times.count; i++) {
        OpTime *t = &op_times.all[i]; float ms; int k = 0;
        cudaCheck(cudaEventElapsedTime(&ms, t->begin, t->end));
        cudaCheck(cudaEventDestroy(t->begin)); cudaCheck(cudaEventDestroy(t->end));
        while (k < names && strcmp(sums[k].name, t->name) != 0) k++;
        if (k == 64) continue;
        if (k == names) sums[names].name = t->name, sums[names].calls = 0, sums[names++].ms = 0.0;
        sums[k].calls++, sums[k].ms += ms, total += ms;
    }
    op_times.count = 0;
    for (int n = 0; n < names; n++) {
        int most = 0;
        for (int k = 1; k < names; k++) if (sums[k].ms > sums[most].ms) most = k;
        printf("  %-36s %5d calls %9.3f ms %5.1f %%\n", sums[most].name, sums[most].calls, sums[most].ms,
               100.0 * sums[most].ms / total);
        sums[most].ms = -1.0;
    }
}

static double memory_cuda(void) {
    size_t available = 0, all = 0;
    start_cuda();
    cudaCheck(cudaMemGetInfo(&available, &all));
    return (double)available;
}

#ifndef VIVIM_NO_CUDA_MAIN
int main(int argc, char **argv) {
    device.plan = plan_cuda, device.forward = forward_cuda, device.step = step_cuda;
    device.fetch = fetch_cuda, device.send = send_cuda, device.memory = memory_cuda;
    device.peak = peak_cuda, device.measure = model_measure, device.profile = profile_cuda, device.waited = waiting_cuda;
    device.elsewhere = 1;
    return train_vivim(argc, argv);
}
#endif
