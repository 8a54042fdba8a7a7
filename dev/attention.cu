/*
attention.cu: SegFormer's attention, 4096 queries on 64 keys, on an NVIDIA GPU. Are the scores ever in memory?

    make dev && dev/attention_cu all --preset b3.1            every version checked, then timed
    make lab_emu && dev/attention_emu all                     without a GPU: checked on the CPU (dev/cudaemu.h), not timed

    out = softmax(q k^T / sqrt(hd)) v      for each frame and head; q, out (N, P, C), k, v (N, Pk, C), heads of hd = C/heads

4 hd operations and an exp for each score, while only q and out need to move: 16 operations a byte with 64 keys in float.
Version 0 is train_vivim.cu's kernel: 64 queries and 64 keys a block, 4 x 4 scores a thread, q, k, v, scores in shared memory.
Each version adds one idea:

  1  three kernels: scores, softmax, sums. The scores, and then the probabilities, go through memory: 4 times 64 numbers a
     query and head, where q and out have hd = 32 or 64
  2  a thread for each query: q and out in registers, keys and values in shared memory, where all threads read the same number
     at once; the softmax is made key by key: when the largest score grows, what was summed so far is scaled down (two exps a
     score)
  3  16 scores at a time, the largest of them first: what was summed is scaled down once for 16 keys, one exp a score
  4  two lanes a query, each with half of the channels: half of the registers and twice the warps; a shuffle completes a score
*/
#define VIVIM_PROGRAM "attention_cu"
#include "lab_cuda.h"

typedef struct {
    float *out;
    const float *q, *k, *v;
    int N, P, Pk, C, heads, hd;
    float scale;  // log2(e) / sqrt(hd): softmax by powers of 2
} Attention;

// ------------------------------------------------------------------------------------------------------------------
// 1 Scores in memory: score (N, heads, P, Pk)

__global__ static void scores_kernel(float *score, Attention p) {  // a thread for each score
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / p.Pk;  // row of (N, heads, P)
    if (row >= (size_t)p.N * p.heads * p.P) return;
    size_t n = row / p.P / p.heads, head = row / p.P % p.heads;
    const float *q = p.q + (n * p.P + row % p.P) * p.C + head * p.hd, *k = p.k + (n * p.Pk + i % p.Pk) * p.C + head * p.hd;
    float sum = 0.0f;
    for (int c = 0; c < p.hd; c++) sum += q[c] * k[c];
    score[i] = sum * p.scale;
}

__global__ static void softmax_kernel(float *score, Attention p) {  // a warp for each row, in place
    size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (row >= (size_t)p.N * p.heads * p.P) return;
    float *s = score + row * p.Pk, most = -INFINITY, sum = 0.0f;
    for (int j = lane; j < p.Pk; j += 32) most = fmaxf(most, s[j]);
    for (int o = 16; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    for (int j = lane; j < p.Pk; j += 32) sum += s[j] = exp2f(s[j] - most);
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    for (int j = lane; j < p.Pk; j += 32) s[j] /= sum;
}

__global__ static void weigh_kernel(const float *prob, Attention p) {  // a thread for each output
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / p.C, n = row / p.P;
    if (row >= (size_t)p.N * p.P) return;
    int c = (int)(i % p.C), head = c / p.hd;
    const float *s = prob + ((n * p.heads + head) * p.P + row % p.P) * p.Pk;
    float sum = 0.0f;
    for (int j = 0; j < p.Pk; j++) sum += s[j] * p.v[(n * p.Pk + j) * p.C + c];
    p.out[i] = sum;
}

static void attention_in_memory(Attention p, int block) {
    size_t rows = (size_t)p.N * p.heads * p.P;
    float *score = malloc_floats_cuda(rows * p.Pk);
    scores_kernel<<<blocks_for(rows * p.Pk, block), block, 0, stream_cuda>>>(score, p);
    cudaCheck(cudaGetLastError());
    softmax_kernel<<<blocks_for(rows, block / 32), block, 0, stream_cuda>>>(score, p);
    cudaCheck(cudaGetLastError());
    weigh_kernel<<<blocks_for((size_t)p.N * p.P * p.C, block), block, 0, stream_cuda>>>(score, p);
    cudaCheck(cudaGetLastError());
    free_check_cuda(score);
}

// ------------------------------------------------------------------------------------------------------------------
// 2, 3, 4 LANES threads for each query, GROUP keys at a time. HD is hd rounded up to 16, 32 or 64, zeros behind hd.
// grid (N * heads, tiles of queries), 128 threads; keys and values in tiles of 64

enum { KEYS = 64, THREADS = 128 };

template <int HD, int LANES, int GROUP>
__global__ static void __launch_bounds__(THREADS, 2) attention_query_kernel(Attention p) {
    const int S = HD / LANES;  // channels of a thread: c = 4 (LANES i + g) + 0 .. 3, so that lanes read neighbouring float4
    __shared__ float4 keys[KEYS][HD / 4];
    __shared__ float4 values[KEYS][HD / 4];
    int g = threadIdx.x % LANES, query = (blockIdx.y * THREADS + threadIdx.x) / LANES, row = min_int(query, p.P - 1);
    size_t n = blockIdx.x / p.heads, head = blockIdx.x % p.heads, at = (n * p.P + row) * p.C + head * p.hd;
    float q[S], out[S], most = -INFINITY, sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < S; i++) {
        int c = 4 * (LANES * (i / 4) + g) + i % 4;
        q[i] = c < p.hd ? p.q[at + c] * p.scale : 0.0f, out[i] = 0.0f;
    }
    for (int k0 = 0; k0 < p.Pk; k0 += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * HD; i += THREADS) {
            int j = i / HD, c = i % HD, here = k0 + j < p.Pk && c < p.hd;
            size_t from = (n * p.Pk + k0 + j) * p.C + head * p.hd + c;
            ((float *)keys[j])[c] = here ? p.k[from] : 0.0f, ((float *)values[j])[c] = here ? p.v[from] : 0.0f;
        }
        __syncthreads();
        #pragma unroll 1
        for (int j0 = 0; j0 < min_int(KEYS, p.Pk - k0); j0 += GROUP) {
            float s[GROUP], largest = most;
            #pragma unroll
            for (int j = 0; j < GROUP; j++) {
                s[j] = 0.0f;
                #pragma unroll
                for (int i = 0; i < S; i += 4) {
                    float4 k = keys[j0 + j][i / 4 * LANES + g];
                    s[j] += q[i] * k.x + q[i + 1] * k.y + q[i + 2] * k.z + q[i + 3] * k.w;
                }
                if (LANES == 2) s[j] += __shfl_xor_sync(0xffffffffu, s[j], 1);
                if (k0 + j0 + j >= p.Pk) s[j] = -INFINITY;
                largest = fmaxf(largest, s[j]);
            }
            float shrink = exp2f(most - largest);  // 0 at the first keys
            sum *= shrink, most = largest;
            #pragma unroll
            for (int i = 0; i < S; i++) out[i] *= shrink;
            #pragma unroll
            for (int j = 0; j < GROUP; j++) {
                float e = exp2f(s[j] - most);
                sum += e;
                #pragma unroll
                for (int i = 0; i < S; i += 4) {
                    float4 v = values[j0 + j][i / 4 * LANES + g];
                    out[i] += e * v.x, out[i + 1] += e * v.y, out[i + 2] += e * v.z, out[i + 3] += e * v.w;
                }
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < S; i++) {
        int c = 4 * (LANES * (i / 4) + g) + i % 4;
        if (query < p.P && c < p.hd) p.out[at + c] = out[i] / sum;
    }
}

template <int LANES, int GROUP> static void attention_by_query(Attention p) {
    if (p.hd > 64) fail("attention heads of %d channels: 64 at most", p.hd);
    auto kernel = p.hd <= 16 ? attention_query_kernel<16, LANES, GROUP>
                : p.hd <= 32 ? attention_query_kernel<32, LANES, GROUP> : attention_query_kernel<64, LANES, GROUP>;
    kernel<<<dim3(p.N * p.heads, ceil_div(p.P * LANES, THREADS)), THREADS, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------------------------
// The ladder

enum { OUT_OUT, IN_Q, IN_K, IN_V };

static int frames_of(const Sizes *s) { return s->B * s->T; }
static int queries_of(const Sizes *s) { return s->H * s->W; }
static void whole_heads(const Sizes *s) {
    if (s->C % s->heads) fail("--channels %d: wants a multiple of --heads %d", s->C, s->heads);
}

static void tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C, kv = (size_t)frames_of(s) * s->Pk * s->C;
    whole_heads(s);
    lab_out(lab, OUT_OUT, "out", n, 1e-11);
    lab_in(lab, IN_Q, "q", n, -3, 3);
    lab_in(lab, IN_K, "k", kv, -3, 3);
    lab_in(lab, IN_V, "v", kv, -1, 1);
}
static void reference(float *const *t, const Sizes *s) {
    attention_forward(t[OUT_OUT], t[IN_Q], t[IN_K], t[IN_V], frames_of(s), queries_of(s), s->Pk, s->C, s->heads);
}
static LabWork work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C, scores = (double)tokens_of(s) * s->Pk * s->heads;
    LabWork w = {8 * n + 8.0 * frames_of(s) * s->Pk * s->C, 4 * n * s->Pk, scores};
    return w;
}

static Attention attention_args(float *const *t, const Sizes *s) {
    Attention p = {t[OUT_OUT], t[IN_Q], t[IN_K], t[IN_V], frames_of(s), queries_of(s), s->Pk, s->C, s->heads, s->C / s->heads,
                   LOG2_E / sqrtf((float)(s->C / s->heads))};
    return p;
}
static void run_ships(float *const *t, const Sizes *s) {
    attention_forward_cuda(t[OUT_OUT], t[IN_Q], t[IN_K], t[IN_V], frames_of(s), queries_of(s), s->Pk, s->C, s->heads);
}
static void run_in_memory(float *const *t, const Sizes *s) {
    attention_in_memory(attention_args(t, s), lab_block(s, 256, 1024));
}
template <int LANES, int GROUP> static void run_by_query(float *const *t, const Sizes *s) {
    attention_by_query<LANES, GROUP>(attention_args(t, s));
}

static const LabKernel KERNELS[] = {
    {run_ships, "ships: 64 queries a block, 4 x 4 scores a thread", NULL},
    {run_in_memory, "three kernels, scores in memory", NULL},
    {run_by_query<1, 1>, "a thread a query, softmax key by key", NULL},
    {run_by_query<1, 16>, "16 keys at a time", NULL},
    {run_by_query<2, 16>, "two lanes a query", NULL},
    {NULL, NULL, NULL}
};
static const LabLadder LADDERS[] = {
    {"attention", KERNELS, tensors, NULL, reference, work, "score", "FLOP", gpu_flop_rate, NULL, 0},
    {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}
};

static const Option SIZES[] = {
    LAB_GRID,
    LAB_SIZE("channels", C, 65536, "C, of all heads"),
    LAB_SIZE("heads", heads, 1024, "heads, of at most 64 channels"),
    LAB_SIZE("keys", Pk, 65536, "keys of a frame"),
    LAB_BLOCK,
    {NULL, NULL, NULL, 0, 0, 0, 0}
};

//    B T H W C N dirs heads Pk E  block
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 32, 0, 0, 0, 0, 0, ""},
    {1, 2, 5, 7, 6, 0, 0, 2, 3, 0, 64, 0, 0, 0, 0, 0, ""},
    {2, 1, 7, 11, 62, 0, 0, 2, 64, 0, 128, 0, 0, 0, 0, 0, ""},
    {1, 1, 3, 43, 59, 0, 0, 1, 131, 0, 256, 0, 0, 0, 0, 0, ""},
    {1, 1, 13, 5, 128, 0, 0, 2, 65, 0, 512, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

static const LabProgram PROGRAM = {
    "Attention of many queries on few keys, on an NVIDIA GPU.", SIZES, NULL, LADDERS, CHECKS, &LAB_GPU};

int main(int argc, char **argv) { return lab_cuda_main(&PROGRAM, argc, argv); }
