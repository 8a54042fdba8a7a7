// test_cudaemu.cu: does dev/cudaemu.h find what it says it finds? Small kernels, right ones and such with a planted bug;
// dev/test_cudaemu.sh builds this file under the emulation, runs it once per case and order and looks at what comes.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cublas_v2.h>
#include <cublasLt.h>
#include <mma.h>

enum { N = 1000, BLOCK = 256 };

// out[i] = 2 inp[i]; `slack` elements too many
static __global__ void twice_kernel(float *out, const float *inp, int n, int slack) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n + slack) out[i] = 2 * (i < n ? inp[i] : 0);
}

// out[block] = sum of the block's row, through dynamic shared memory; without the barrier in the loop, or `past` numbers off
template <int BARRIER> static __global__ void row_sums_kernel(float *out, const float *inp, int n, int past) {
    extern __shared__ float partial[];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += inp[(size_t)blockIdx.x * n + i];
    partial[threadIdx.x + past] = sum;
    __syncthreads();
    for (int k = blockDim.x / 2; k > 0; k /= 2) {
        if (threadIdx.x < k) partial[threadIdx.x] += partial[threadIdx.x + k];
        if (BARRIER) __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// the same with warp shuffles and static shared memory, of which `used` numbers are read
template <int ROOM> static __global__ void warp_sums_kernel(float *out, const float *inp, int n, int used) {
    __shared__ float warps[ROOM];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += inp[(size_t)blockIdx.x * n + i];
    for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < used ? warps[threadIdx.x] : 0;
    for (int k = 4; k > 0; k /= 2) sum += __shfl_down_sync(0xffffffffu, sum, k);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

static __global__ void divergent_kernel(float *out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1;
}

static __global__ void two_barriers_kernel(float *out) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 1;
}

static __global__ void exited_lane_kernel(float *out) {
    if (threadIdx.x % 32 > 20) return;
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}

static __global__ void deadlock_kernel(float *out) {
    out[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0x1ffffu : 0xffffffffu, 1.0f, 0);
}

// a block reads what the block before it writes
static __global__ void block_race_kernel(float *out) {
    if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}

// threads of a warp read what others write
static __global__ void lane_race_kernel(float *out) {
    out[threadIdx.x + 1] = out[threadIdx.x] + 1;
}

// every block adds 1 to the same number
template <int ATOMIC> static __global__ void count_kernel(float *out) {
    if (threadIdx.x > 0) return;
    if (ATOMIC) atomicAdd(out, 1.0f);
    else *out += 1;
}

// bits[i] of inp[i] as bfloat16, or simply its upper half
template <int ROUND> static __global__ void bf16_kernel(float *bits, const float *inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) bits[i] = (float)(ROUND ? __bfloat16_as_ushort(__float2bfloat16(inp[i])) : __float_as_uint(inp[i]) >> 16);
}

// out (16, 16) = A B^T by one warp, A and B (16, 16) in shared memory, in rows of ld; B lies `past` numbers further on. The
// warp does not meet between writing A and B and loading them (SYNC & 1), or between storing the product and reading it (2)
template <int SYNC> static __global__ void wmma_kernel(float *out, int ld, int past) {
    extern __shared__ float shared[];
    float *product = shared;
    __nv_bfloat16 *A = (__nv_bfloat16 *)(shared + 256), *B = A + 16 * 16 + past;
    using namespace nvcuda::wmma;
    fragment<accumulator, 16, 16, 16, float> sum;
    fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> a;
    fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> b;
    for (int i = threadIdx.x; i < 256; i += 32) A[i] = (float)(i / 16 - i % 16), A[256 + i] = (float)(i % 5);
    if (!(SYNC & 1)) __syncwarp();
    fill_fragment(sum, 0.0f);
    load_matrix_sync(a, A, 16);
    load_matrix_sync(b, B, ld);
    mma_sync(sum, a, b, sum);
    store_matrix_sync(product, sum, 16, mem_row_major);
    if (!(SYNC & 2)) __syncwarp();
    for (int i = threadIdx.x; i < 256; i += 32) out[i] = product[i];
}

static float *device_floats(int n, const float *host) {
    float *p;
    if (cudaMalloc(&p, n * sizeof(float)) != cudaSuccess) exit(1);
    if (host) cudaMemcpy(p, host, n * sizeof(float), cudaMemcpyHostToDevice);
    return p;
}

// all n numbers on the device are `value`
static int all_are(const float *device, int n, float value) {
    float *host = (float *)malloc(n * sizeof(float));
    int good = 1;
    cudaMemcpy(host, device, n * sizeof(float), cudaMemcpyDeviceToHost);
    for (int i = 0; i < n; i++) good &= host[i] == value;
    free(host);
    return good;
}

static int gemm(int transA, int transB, int room) {
    enum { M = 5, K = 70, COLUMNS = 3 };       // C (M,COLUMNS), all column-major, alpha = 2, beta = 1
    float A[M * K], B[K * COLUMNS], C[M * COLUMNS], one = 1, two = 2, worst = 0;
    for (int i = 0; i < M * K; i++) A[i] = sinf(i);
    for (int i = 0; i < K * COLUMNS; i++) B[i] = cosf(i);
    for (int i = 0; i < M * COLUMNS; i++) C[i] = i;
    float *a = device_floats(M * K, A), *b = device_floats(K * COLUMNS, B), *c = device_floats(room, NULL);
    cudaMemcpy(c, C, room * sizeof(float), cudaMemcpyHostToDevice);
    cublasHandle_t handle;
    cublasCreate(&handle);
    cublasOperation_t opA = transA ? CUBLAS_OP_T : CUBLAS_OP_N, opB = transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasGemmEx(handle, opA, opB, M, COLUMNS, K, &two, a, CUDA_R_32F, transA ? K : M, b, CUDA_R_32F, transB ? COLUMNS : K,
                 &one, c, CUDA_R_32F, M, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    cudaMemcpy(C, c, sizeof C, cudaMemcpyDeviceToHost);
    for (int j = 0; j < COLUMNS; j++) for (int i = 0; i < M; i++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += (double)A[transA ? i * K + k : k * M + i] * B[transB ? k * COLUMNS + j : j * K + k];
        worst = fmaxf(worst, fabsf((float)(C[j * M + i] - (j * M + i + 2 * sum))));
    }
    cudaFree(a), cudaFree(b), cudaFree(c);
    return worst < 1e-5f;
}

// the kernel's rounding is to the nearest bfloat16, of two equally near ones to the even
static int bf16_rounds(float *out, float *inp, int round) {
    enum { NUMBERS = 999 };
    float x[NUMBERS], bits[NUMBERS];
    for (int i = 0; i < NUMBERS; i++) x[i] = ldexpf(1 + i / 1024.0f, i % 30 - 15) * (i % 2 ? -1 : 1);  // among them ties
    x[0] = INFINITY, x[1] = 3.4e38f, x[2] = 1e-40f, x[3] = 0;
    cudaMemcpy(inp, x, sizeof x, cudaMemcpyHostToDevice);
    if (round) bf16_kernel<1><<<4, BLOCK>>>(out, inp, NUMBERS);
    else bf16_kernel<0><<<4, BLOCK>>>(out, inp, NUMBERS);
    cudaMemcpy(bits, out, sizeof bits, cudaMemcpyDeviceToHost);
    for (int i = 2; i < NUMBERS; i++) {
        unsigned got = (unsigned)bits[i], value[3];
        double distance[3];
        float y;
        for (int k = 0; k < 3; k++) {          // itself and its two neighbours
            value[k] = (got - (got % 0x8000 > 0) + k) << 16;
            memcpy(&y, &value[k], 4);
            distance[k] = fabs((double)y - (double)x[i]);
        }
        int own = got % 0x8000 > 0;
        for (int k = 0; k < 3; k++) {
            if (distance[k] < distance[own] || (k != own && distance[k] == distance[own] && got % 2)) return 0;
        }
    }
    return bits[0] == 0x7F80 && bits[1] == 0x7F80;
}

// A B^T + bias by cuBLASLt, A and B (8, 8) of ones
static int lt(const float *ones, float *out, const float *bias) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t result;
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    int results = 0;
    float one = 1, zero = 0;
    unsigned aligned = 16;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &transposed, sizeof transposed);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatrixLayoutCreate(&a, CUDA_R_32F, 8, 8, 8);
    cublasLtMatmulPreferenceCreate(&wish);
    for (int k = 5; k < 9; k++) {
        cublasLtMatmulPreferenceSetAttribute(wish, (cublasLtMatmulPreferenceAttributes_t)k, &aligned, sizeof aligned);
    }
    cublasLtMatmulAlgoGetHeuristic(handle, product, a, a, a, a, wish, 1, &result, &results);
    if (!results) return 0;
    cublasLtMatmul(handle, product, &one, ones, a, ones, a, &zero, out, a, out, a, &result.algo, NULL, 0, NULL);
    return all_are(out, 64, 9);
}

// Records out = 2 inp with some memory in between, and launches it twice; `mistake` is made on the way
static int graph(const char *mistake, float *out, float *inp) {
    cudaGraph_t recorded;
    cudaGraphExec_t replay;
    float *between, *host = (float *)malloc(N * sizeof(float));
    int right = 1, slack = 0;
    for (int i = 0; i < N; i++) host[i] = 1;
    cudaStreamBeginCapture(NULL, cudaStreamCaptureModeThreadLocal);
    cudaMallocAsync(&between, N * sizeof(float), NULL);
    if (strcmp(mistake, "graph_waits") == 0) cudaStreamSynchronize(NULL);
    if (strcmp(mistake, "graph_takes") == 0) cudaMalloc(&between, N * sizeof(float));
    if (strcmp(mistake, "graph_gives") == 0) cudaFreeAsync(inp, NULL);
    if (strcmp(mistake, "graph_host_work") == 0) slack = (int)host[0] - 1;     // known now, not when it is launched
    cudaMemcpyAsync(between, inp, N * sizeof(float), cudaMemcpyDeviceToDevice, NULL);
    if (strcmp(mistake, "graph_own_freed") == 0) cudaFreeAsync(between, NULL);
    twice_kernel<<<(N + BLOCK - 1) / BLOCK, BLOCK>>>(out, between, N + slack, 0);
    if (strcmp(mistake, "graph_own_freed") != 0) cudaFreeAsync(between, NULL);
    cudaStreamEndCapture(NULL, &recorded);
    cudaGraphInstantiate(&replay, recorded, 0);
    cudaGraphDestroy(recorded);
    if (strcmp(mistake, "graph_freed") == 0) cudaFree(inp);
    for (int k = 1; k <= 2; k++) {
        for (int i = 0; i < N; i++) host[i] = (float)k;
        if (strcmp(mistake, "graph_host_work") == 0 && k == 2) slack = -N / 2;
        if (strcmp(mistake, "graph_freed") != 0) cudaMemcpy(inp, host, N * sizeof(float), cudaMemcpyHostToDevice);
        cudaMemset(out, 0, N * sizeof(float));
        cudaGraphLaunch(replay, NULL);
        right &= all_are(out, N + slack, (float)(2 * k)) && (slack == 0 || all_are(out + N + slack, -slack, 0));
    }
    cudaGraphExecDestroy(replay);
    free(host);
    return right;
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    float host[N], *inp, *out, *managed;
    int right = 0;
    for (int i = 0; i < N; i++) host[i] = 1;
    inp = device_floats(N, host);
    out = device_floats(N, strcmp(name, "unwritten") == 0 ? NULL : host);
    cudaMallocManaged(&managed, N * sizeof(float));
    for (int i = 0; i < N; i++) managed[i] = 3;
    if (strcmp(name, "twice") == 0) {
        twice_kernel<<<(N + BLOCK - 1) / BLOCK, BLOCK>>>(out, inp, N, 0);
        right = all_are(out, N, 2);
    } else if (strcmp(name, "global_past") == 0) {
        twice_kernel<<<(N + BLOCK - 1) / BLOCK, BLOCK>>>(out, inp, N, 1);
    } else if (strcmp(name, "unwritten") == 0) {
        twice_kernel<<<1, BLOCK>>>(out, inp, BLOCK, 0);
        right = all_are(out, N, 2);
    } else if (strcmp(name, "row_sums") == 0) {
        row_sums_kernel<1><<<10, 64, 64 * sizeof(float)>>>(out, inp, 100, 0);
        right = all_are(out, 10, 100);
    } else if (strcmp(name, "missing_barrier") == 0) {
        row_sums_kernel<0><<<10, 64, 64 * sizeof(float)>>>(out, inp, 100, 0);
        right = all_are(out, 10, 100);
    } else if (strcmp(name, "shared_past") == 0) {
        row_sums_kernel<1><<<10, 64, 64 * sizeof(float)>>>(out, inp, 100, 1);
    } else if (strcmp(name, "warp_sums") == 0) {
        warp_sums_kernel<8><<<10, BLOCK>>>(out, inp, 100, 8);
        right = all_are(out, 10, 100);
    } else if (strcmp(name, "static_shared_past") == 0) {
        warp_sums_kernel<7><<<10, BLOCK>>>(out, inp, 100, 8);
    } else if (strcmp(name, "shared_unwritten") == 0) {
        warp_sums_kernel<8><<<10, BLOCK>>>(out, inp, 100, 8);
        warp_sums_kernel<8><<<10, 128>>>(out, inp, 100, 8);
        right = all_are(out, 10, 100);
    } else if (strcmp(name, "divergent_barrier") == 0) {
        divergent_kernel<<<1, 64>>>(out);
    } else if (strcmp(name, "different_barriers") == 0) {
        two_barriers_kernel<<<1, 64>>>(out);
    } else if (strcmp(name, "exited_lane") == 0) {
        exited_lane_kernel<<<1, 64>>>(out);
    } else if (strcmp(name, "deadlock") == 0) {
        deadlock_kernel<<<1, 32>>>(out);
    } else if (strcmp(name, "block_race") == 0) {
        block_race_kernel<<<10, 32>>>(out);
        cudaMemcpy(host, out, 11 * sizeof(float), cudaMemcpyDeviceToHost);
        right = host[10] == 11;
    } else if (strcmp(name, "lane_race") == 0) {
        lane_race_kernel<<<1, 32>>>(out);
        cudaMemcpy(host, out, 33 * sizeof(float), cudaMemcpyDeviceToHost);
        right = host[32] == 2;
    } else if (strcmp(name, "host_touches_device") == 0) {
        printf("%f\n", (double)out[0]);
    } else if (strcmp(name, "managed") == 0) {
        twice_kernel<<<(N + BLOCK - 1) / BLOCK, BLOCK>>>(managed, inp, N, 0);
        cudaDeviceSynchronize();
        right = managed[0] == 2 && managed[N - 1] == 2;
    } else if (strcmp(name, "managed_too_early") == 0) {
        twice_kernel<<<(N + BLOCK - 1) / BLOCK, BLOCK>>>(out, inp, N, 0);
        printf("%f\n", (double)managed[0]);
    } else if (strcmp(name, "too_many_threads") == 0) {
        twice_kernel<<<1, 1056>>>(out, inp, N, 0);
    } else if (strcmp(name, "empty_grid") == 0) {
        twice_kernel<<<0, 32>>>(out, inp, N, 0);
    } else if (strcmp(name, "much_shared") == 0) {
        cudaFuncSetAttribute(row_sums_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
        row_sums_kernel<1><<<10, 64, 50000>>>(out, inp, 100, 0);
        right = all_are(out, 10, 100);
    } else if (strcmp(name, "too_much_shared") == 0) {
        row_sums_kernel<1><<<10, 64, 50000>>>(out, inp, 100, 0);
    } else if (strcmp(name, "copy_kind") == 0) {
        cudaMemcpy(out, host, sizeof host, cudaMemcpyDeviceToHost);
    } else if (strcmp(name, "copy_past") == 0) {
        cudaMemcpy(out, inp, (N + 1) * sizeof(float), cudaMemcpyDeviceToDevice);
    } else if (strcmp(name, "free_twice") == 0) {
        cudaFree(out), cudaFree(out);
    } else if (strcmp(name, "use_after_free") == 0) {
        cudaFree(inp);
        twice_kernel<<<1, BLOCK>>>(out, inp, BLOCK, 0);
    } else if (strcmp(name, "gemm") == 0) {
        right = gemm(0, 0, 15) && gemm(0, 1, 15) && gemm(1, 0, 15) && gemm(1, 1, 15);
    } else if (strcmp(name, "gemm_past") == 0) {
        right = gemm(0, 0, 14);
    } else if (strcmp(name, "atomic_add") == 0 || strcmp(name, "plain_add") == 0) {
        cudaMemset(out, 0, sizeof(float));
        if (name[0] == 'a') count_kernel<1><<<10, 32>>>(out);
        else count_kernel<0><<<10, 32>>>(out);
        right = all_are(out, 1, 10);
    } else if (strncmp(name, "bf16", 4) == 0) {
        right = bf16_rounds(out, inp, strcmp(name, "bf16_truncated") != 0);
    } else if (strncmp(name, "wmma", 4) == 0) {
        size_t bytes = 256 * sizeof(float) + 512 * sizeof(__nv_bfloat16);
        if (strcmp(name, "wmma_no_sync_before") == 0) wmma_kernel<1><<<1, 32, bytes>>>(out, 16, 0);
        else if (strcmp(name, "wmma_no_sync_after") == 0) wmma_kernel<2><<<1, 32, bytes>>>(out, 16, 0);
        else wmma_kernel<0><<<1, 32, bytes>>>(out, strcmp(name, "wmma_ld") == 0 ? 8 : 16, strcmp(name, "wmma_past") == 0 ? 16
                                              : strcmp(name, "wmma_unaligned") == 0 ? 8 : 0);
        cudaMemcpy(host, out, 256 * sizeof(float), cudaMemcpyDeviceToHost);
        right = 1;
        for (int i = 0; i < 256; i++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += (float)(i / 16 - k) * (float)((i % 16 * 16 + k) % 5);
            right &= host[i] == sum;
        }
    } else if (strncmp(name, "lt", 2) == 0) {
        right = lt(inp, out, strcmp(name, "lt_host_bias") == 0 ? (float *)(((uintptr_t)host + 15) / 16 * 16)
                           : strcmp(name, "lt_short_bias") == 0 ? inp + N - 4 : inp);
    } else if (strncmp(name, "graph", 5) == 0) {
        right = graph(name, out, inp);
    } else {
        fprintf(stderr, "test_cudaemu: no case \"%s\"\n", name);
        return 2;
    }
    cudaDeviceSynchronize();
    printf("%s\n", right ? "right" : "wrong");
    return 0;
}
