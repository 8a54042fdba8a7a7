/*
layernorm.cu: layer norm on an NVIDIA GPU. As many bytes as the rows have must move; everything else is what one can lose.

    make dev && dev/layernorm_cu all --preset b3.1            every version checked, then timed
    make lab_emu && dev/layernorm_emu all                     without a GPU: checked on the CPU (dev/cudaemu.h), not timed

Version 0 is train_vivim.cu's kernel: up to 32 lanes share a row, four channels each, three reads of it, of which the second
and third find it in the cache. Each version adds one idea:

  1  a thread for each row: neighbouring threads read addresses that lie a row apart, 32 memory sectors for 32 numbers
  2  a block for each row, its threads on neighbouring channels; sums by halving in shared memory, a barrier each time
  3  a warp for each row: sums by shuffles, no barrier
  4  the row stays in registers: one read
  5  mean and variance in one go: parts merge by (count, mean, sum of squares), as Chan, Golub and LeVeque (1979) do: one round
     of shuffles, of three numbers, instead of two rounds of one, and a division each time
and for the gradients, ladder "layernorm_back", where dweight and dbias are sums over all rows:
  1  a warp for each row, atomics for dweight and dbias: two for each number, and other last bits in every run
  2  a second kernel for dweight and dbias, neighbouring threads on neighbouring channels: inp and dout are read twice
*/
#define VIVIM_PROGRAM "layernorm_cu"
#include "lab_cuda.h"

enum { OUT_OUT, OUT_MEAN, OUT_RSTD, IN_INP, IN_WEIGHT, IN_BIAS };

typedef struct { float *out, *mean, *rstd; const float *inp, *weight, *bias; int rows, C; } Norm;  // shapes as in train_vivim.c

// ------------------------------------------------------------------------------------------------------------------
// 1 A thread for each row

__global__ static void norm_thread_kernel(Norm p) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= p.rows) return;
    const float *x = p.inp + (size_t)r * p.C;
    float mean = 0.0f, var = 0.0f;
    for (int c = 0; c < p.C; c++) mean += x[c];
    mean /= (float)p.C;
    for (int c = 0; c < p.C; c++) var += (x[c] - mean) * (x[c] - mean);
    float rstd = 1.0f / sqrtf(var / (float)p.C + 1e-5f);
    for (int c = 0; c < p.C; c++) p.out[(size_t)r * p.C + c] = (x[c] - mean) * rstd * p.weight[c] + p.bias[c];
    p.mean[r] = mean, p.rstd[r] = rstd;
}

// ------------------------------------------------------------------------------------------------------------------
// 2 A block for each row

__device__ static inline float norm_block_sum(float *shared, float x) {
    __syncthreads();  // until here what stood there may be read
    shared[threadIdx.x] = x;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

__global__ static void norm_block_kernel(Norm p) {  // blockDim.x is a power of two
    __shared__ float shared[1024];
    const float *x = p.inp + (size_t)blockIdx.x * p.C;
    float sum = 0.0f, var = 0.0f;
    for (int c = threadIdx.x; c < p.C; c += blockDim.x) sum += x[c];
    float mean = norm_block_sum(shared, sum) / (float)p.C;
    for (int c = threadIdx.x; c < p.C; c += blockDim.x) var += (x[c] - mean) * (x[c] - mean);
    float rstd = 1.0f / sqrtf(norm_block_sum(shared, var) / (float)p.C + 1e-5f);
    for (int c = threadIdx.x; c < p.C; c += blockDim.x)
        p.out[(size_t)blockIdx.x * p.C + c] = (x[c] - mean) * rstd * p.weight[c] + p.bias[c];
    if (threadIdx.x == 0) p.mean[blockIdx.x] = mean, p.rstd[blockIdx.x] = rstd;
}

// ------------------------------------------------------------------------------------------------------------------
// 3 A warp for each row

__device__ static inline float norm_warp_sum(float x) {
    #pragma unroll
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

__device__ static inline int norm_row(void) { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }

__global__ static void norm_warp_kernel(Norm p) {
    int r = norm_row(), lane = threadIdx.x % 32;
    if (r >= p.rows) return;
    const float *x = p.inp + (size_t)r * p.C;
    float sum = 0.0f, var = 0.0f;
    for (int c = lane; c < p.C; c += 32) sum += x[c];
    float mean = norm_warp_sum(sum) / (float)p.C;
    for (int c = lane; c < p.C; c += 32) var += (x[c] - mean) * (x[c] - mean);
    float rstd = 1.0f / sqrtf(norm_warp_sum(var) / (float)p.C + 1e-5f);
    for (int c = lane; c < p.C; c += 32) p.out[(size_t)r * p.C + c] = (x[c] - mean) * rstd * p.weight[c] + p.bias[c];
    if (lane == 0) p.mean[r] = mean, p.rstd[r] = rstd;
}

// ------------------------------------------------------------------------------------------------------------------
// 4, 5 The row in registers, COUNT numbers a lane: C <= 32 COUNT; longer rows than 1024 go the way of 3

// (n, mean, m2) of a set of numbers: how many, mean, sum of (x - mean)^2; those of b are added to those of a
__device__ static inline void norm_merge(float *n, float *mean, float *m2, float n_b, float mean_b, float m2_b) {
    float all = *n + n_b, part = all > 0.0f ? n_b / all : 0.0f, difference = mean_b - *mean;
    *mean += difference * part;
    *m2 += m2_b + difference * difference * *n * part;
    *n = all;
}

template <int COUNT, bool MERGE> __global__ static void norm_registers_kernel(Norm p) {
    int r = norm_row(), lane = threadIdx.x % 32;
    if (r >= p.rows) return;
    float x[COUNT], mean = 0.0f, var = 0.0f;
    #pragma unroll
    for (int k = 0; k < COUNT; k++) x[k] = lane + 32 * k < p.C ? p.inp[(size_t)r * p.C + lane + 32 * k] : 0.0f;
    if (MERGE) {
        float n = 0.0f;
        #pragma unroll
        for (int k = 0; k < COUNT; k++)  // the k-th number changes a mean of k by 1/(k+1)
            if (lane + 32 * k < p.C) {
                float difference = x[k] - mean;
                mean += difference * (1.0f / (float)(k + 1));
                var += difference * (x[k] - mean);
                n = (float)(k + 1);
            }
        #pragma unroll
        for (int o = 16; o > 0; o /= 2)
            norm_merge(&n, &mean, &var, __shfl_down_sync(0xffffffffu, n, o), __shfl_down_sync(0xffffffffu, mean, o),
                       __shfl_down_sync(0xffffffffu, var, o));
        mean = __shfl_sync(0xffffffffu, mean, 0), var = __shfl_sync(0xffffffffu, var, 0);
    } else {
        #pragma unroll
        for (int k = 0; k < COUNT; k++) mean += x[k];
        mean = norm_warp_sum(mean) / (float)p.C;
        #pragma unroll
        for (int k = 0; k < COUNT; k++) var += lane + 32 * k < p.C ? (x[k] - mean) * (x[k] - mean) : 0.0f;
        var = norm_warp_sum(var);
    }
    float rstd = 1.0f / sqrtf(var / (float)p.C + 1e-5f);
    #pragma unroll
    for (int k = 0; k < COUNT; k++) {
        int c = lane + 32 * k;
        if (c < p.C) p.out[(size_t)r * p.C + c] = (x[k] - mean) * rstd * p.weight[c] + p.bias[c];
    }
    if (lane == 0) p.mean[r] = mean, p.rstd[r] = rstd;
}

// ------------------------------------------------------------------------------------------------------------------
// Gradients

enum { OUT_DINP, ADD_DWEIGHT, ADD_DBIAS, IN_DOUT, IN_X, IN_W };  // mean and rstd are computed before the clock starts

typedef struct {
    float *dinp, *dweight, *dbias;
    const float *dout, *inp, *weight, *mean, *rstd;
    int rows, C;
} NormBack;

// dinp = rstd (dn - mean(dn) - n mean(dn n)), n = (inp - mean) rstd, dn = dout weight; ATOMIC: dweight, dbias, too
template <bool ATOMIC> __global__ static void norm_back_kernel(NormBack p) {
    int r = norm_row(), lane = threadIdx.x % 32;
    if (r >= p.rows) return;
    size_t row = (size_t)r * p.C;
    float mean = p.mean[r], rstd = p.rstd[r], dn_mean = 0.0f, dn_n_mean = 0.0f;
    for (int c = lane; c < p.C; c += 32) {
        float dy = p.dout[row + c], n = (p.inp[row + c] - mean) * rstd, dn = dy * p.weight[c];
        dn_mean += dn, dn_n_mean += dn * n;
        if (ATOMIC) atomicAdd(&p.dweight[c], dy * n), atomicAdd(&p.dbias[c], dy);
    }
    dn_mean = norm_warp_sum(dn_mean) / (float)p.C, dn_n_mean = norm_warp_sum(dn_n_mean) / (float)p.C;
    for (int c = lane; c < p.C; c += 32) {
        float n = (p.inp[row + c] - mean) * rstd;
        p.dinp[row + c] = rstd * (p.dout[row + c] * p.weight[c] - dn_mean - n * dn_n_mean);
    }
}

enum { NORM_SLICES = 256 };

// partial (slices, {dweight, dbias}, C): a slice of the rows; blocks of (32 channels, 8 rows)
__global__ static void norm_back_columns_kernel(float *partial, NormBack p) {
    __shared__ float dw_of[8][32];
    __shared__ float db_of[8][32];
    int c = blockIdx.x * 32 + threadIdx.x, first = (int)((int64_t)p.rows * blockIdx.y / gridDim.y);
    int end = (int)((int64_t)p.rows * (blockIdx.y + 1) / gridDim.y);
    float dw = 0.0f, db = 0.0f;
    for (int r = first + threadIdx.y; r < end && c < p.C; r += 8) {
        float dy = p.dout[(size_t)r * p.C + c];
        dw += dy * (p.inp[(size_t)r * p.C + c] - p.mean[r]) * p.rstd[r], db += dy;
    }
    dw_of[threadIdx.y][threadIdx.x] = dw, db_of[threadIdx.y][threadIdx.x] = db;
    __syncthreads();
    if (threadIdx.y > 0 || c >= p.C) return;
    for (int y = 1; y < 8; y++) dw += dw_of[y][threadIdx.x], db += db_of[y][threadIdx.x];
    partial[(size_t)blockIdx.y * 2 * p.C + c] = dw, partial[((size_t)blockIdx.y * 2 + 1) * p.C + c] = db;
}

__global__ static void norm_back_finish_kernel(float *dweight, float *dbias, const float *partial, int slices, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    if (c >= 2 * C) return;
    for (int s = 0; s < slices; s++) sum += partial[(size_t)s * 2 * C + c];
    if (c < C) dweight[c] += sum;
    else dbias[c - C] += sum;
}

// ------------------------------------------------------------------------------------------------------------------
// The ladders

static void tensors(Lab *lab, const Sizes *s) {
    size_t rows = tokens_of(s);
    lab_out(lab, OUT_OUT, "out", rows * s->C, 1e-11);
    lab_out(lab, OUT_MEAN, "mean", rows, 1e-11);
    lab_out(lab, OUT_RSTD, "rstd", rows, 1e-11);
    lab_in(lab, IN_INP, "inp", rows * s->C, -1, 3);
    lab_in(lab, IN_WEIGHT, "weight", s->C, -1, 1);
    lab_in(lab, IN_BIAS, "bias", s->C, -1, 1);
}
static void reference(float *const *t, const Sizes *s) {
    layernorm_forward(t[OUT_OUT], t[OUT_MEAN], t[OUT_RSTD], t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], (int)tokens_of(s), s->C);
}
static LabWork work(const Sizes *s) {  // 7 floating point operations a number: sum, difference, square, sum; out
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {8 * n + 8 * (double)tokens_of(s), 7 * n, n};
    return w;
}

static Norm norm_args(float *const *t, const Sizes *s) {
    Norm p = {t[OUT_OUT], t[OUT_MEAN], t[OUT_RSTD], t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], (int)tokens_of(s), s->C};
    return p;
}
static void run_ships(float *const *t, const Sizes *s) {
    layernorm_forward_cuda(t[OUT_OUT], t[OUT_MEAN], t[OUT_RSTD], t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], (int)tokens_of(s), s->C);
}
static void run_thread(float *const *t, const Sizes *s) {
    int block = lab_block(s, 128, 1024);
    norm_thread_kernel<<<blocks_for(tokens_of(s), block), block, 0, stream_cuda>>>(norm_args(t, s));
    cudaCheck(cudaGetLastError());
}
static void run_block(float *const *t, const Sizes *s) {
    int block = 32;
    while (2 * block <= lab_block(s, 128, 1024)) block *= 2;
    norm_block_kernel<<<(unsigned)tokens_of(s), block, 0, stream_cuda>>>(norm_args(t, s));
    cudaCheck(cudaGetLastError());
}
static void run_warp(float *const *t, const Sizes *s) {
    int block = lab_block(s, 256, 1024);
    norm_warp_kernel<<<blocks_for(tokens_of(s), block / 32), block, 0, stream_cuda>>>(norm_args(t, s));
    cudaCheck(cudaGetLastError());
}
template <bool MERGE> static void run_registers(float *const *t, const Sizes *s) {
    int block = lab_block(s, 256, 512);
    auto kernel = s->C <= 64 ? norm_registers_kernel<2, MERGE> : s->C <= 128 ? norm_registers_kernel<4, MERGE>
                : s->C <= 320 ? norm_registers_kernel<10, MERGE> : s->C <= 512 ? norm_registers_kernel<16, MERGE>
                : s->C <= 1024 ? norm_registers_kernel<32, MERGE> : norm_warp_kernel;
    kernel<<<blocks_for(tokens_of(s), block / 32), block, 0, stream_cuda>>>(norm_args(t, s));
    cudaCheck(cudaGetLastError());
}

static void tensors_back(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    lab_out(lab, OUT_DINP, "dinp", n, 1e-10);
    lab_add(lab, ADD_DWEIGHT, "dweight", s->C, 1e-9);
    lab_add(lab, ADD_DBIAS, "dbias", s->C, 1e-9);
    lab_in(lab, IN_DOUT, "dout", n, -1, 1);
    lab_in(lab, IN_X, "inp", n, -1, 3);
    lab_in(lab, IN_W, "weight", s->C, -1, 1);
}
static void reference_back(float *const *t, const Sizes *s) {
    int rows = (int)tokens_of(s);
    float *out = malloc_floats(tokens_of(s) * s->C), *mean = malloc_floats(rows), *rstd = malloc_floats(rows);
    layernorm_forward(out, mean, rstd, t[IN_X], t[IN_W], t[IN_W], rows, s->C);
    layernorm_backward(t[OUT_DINP], t[ADD_DWEIGHT], t[ADD_DBIAS], t[IN_DOUT], NULL, t[IN_X], t[IN_W], mean, rstd, rows, s->C);
    free(out); free(mean); free(rstd);
}
static LabWork work_back(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {12 * n + 8 * (double)tokens_of(s), 16 * n, n};
    return w;
}

// mean and rstd, as forward left them; then the clock starts. free_check_cuda(mean)
static NormBack back_begin(float *const *t, const Sizes *s) {
    int rows = (int)tokens_of(s);
    float *mean = malloc_floats_cuda(2 * (size_t)rows);
    layernorm_forward_cuda(t[OUT_DINP], mean, mean + rows, t[IN_X], t[IN_W], t[IN_W], rows, s->C);
    NormBack p = {t[OUT_DINP], t[ADD_DWEIGHT], t[ADD_DBIAS], t[IN_DOUT], t[IN_X], t[IN_W], mean, mean + rows, rows, s->C};
    lab_timed_begin();
    return p;
}
static void back_end(NormBack p) {
    lab_timed_end();
    free_check_cuda((void *)p.mean);
}
static void run_back_ships(float *const *t, const Sizes *s) {
    NormBack p = back_begin(t, s);
    layernorm_backward_cuda(p.dinp, p.dweight, p.dbias, p.dout, NULL, p.inp, p.weight, p.mean, p.rstd, p.rows, p.C);
    back_end(p);
}
static void run_back_atomic(float *const *t, const Sizes *s) {
    int block = lab_block(s, 256, 1024);
    NormBack p = back_begin(t, s);
    norm_back_kernel<true><<<blocks_for(p.rows, block / 32), block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
    back_end(p);
}
static void run_back_columns(float *const *t, const Sizes *s) {
    int block = lab_block(s, 256, 1024), slices = min_int(NORM_SLICES, ceil_div((int)tokens_of(s), 8));
    NormBack p = back_begin(t, s);
    float *partial = malloc_floats_cuda((size_t)slices * 2 * p.C);
    norm_back_kernel<false><<<blocks_for(p.rows, block / 32), block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
    norm_back_columns_kernel<<<dim3(ceil_div(p.C, 32), slices), dim3(32, 8), 0, stream_cuda>>>(partial, p);
    cudaCheck(cudaGetLastError());
    norm_back_finish_kernel<<<ceil_div(2 * p.C, 128), 128, 0, stream_cuda>>>(p.dweight, p.dbias, partial, slices, p.C);
    cudaCheck(cudaGetLastError());
    free_check_cuda(partial);
    back_end(p);
}

static const LabKernel KERNELS[] = {
    {run_ships, "ships: up to 32 lanes a row, 4 channels each, three reads", NULL},
    {run_thread, "a thread a row", NULL},
    {run_block, "a block a row, sums in shared memory", NULL},
    {run_warp, "a warp a row, sums by shuffles", NULL},
    {run_registers<false>, "the row in registers, one read", NULL},
    {run_registers<true>, "mean and variance merged in one go", NULL},
    {NULL, NULL, NULL}
};
static const LabKernel KERNELS_BACK[] = {
    {run_back_ships, "ships: one kernel, sums over rows in shared memory, then over blocks", NULL},
    {run_back_atomic, "a warp a row, atomics for dweight and dbias", NULL},
    {run_back_columns, "dweight and dbias by a kernel of their own", NULL},
    {NULL, NULL, NULL}
};
static const LabLadder LADDERS[] = {
    {"layernorm", KERNELS, tensors, NULL, reference, work, "number", "FLOP", gpu_flop_rate, NULL, 0},
    {"layernorm_back", KERNELS_BACK, tensors_back, NULL, reference_back, work_back, "number", "FLOP", gpu_flop_rate, NULL, 0},
    {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}
};

static const Option SIZES[] = {LAB_GRID, LAB_SIZE("channels", C, 65536, "C"), LAB_BLOCK, {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C N dirs heads Pk E  block
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {1, 1, 3, 7, 64, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, ""},
    {2, 1, 5, 7, 37, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, ""},
    {1, 3, 3, 3, 131, 0, 0, 0, 0, 0, 96, 0, 0, 0, 0, 0, ""},
    {1, 1, 1, 13, 509, 0, 0, 0, 0, 0, 256, 0, 0, 0, 0, 0, ""},
    {1, 1, 1, 5, 1031, 0, 0, 0, 0, 0, 512, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

static const LabProgram PROGRAM = {
    "Layer norm on an NVIDIA GPU, forward and backward.", SIZES, NULL, LADDERS, CHECKS, &LAB_GPU};

int main(int argc, char **argv) { return lab_cuda_main(&PROGRAM, argc, argv); }
