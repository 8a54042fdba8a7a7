/* scan_cuda.h - what dev/scan_forward.cu and dev/scan_backward.cu share: decays, tiles in shared memory, chunks. */
#ifndef VIVIM_SCAN_CUDA_H
#define VIVIM_SCAN_CUDA_H
#include "lab_cuda.h"

enum { STATES = 16, TOKENS = 32 };  // states of a channel at most; positions of a tile

// 2^x by multiply-adds, as exp2_simd on the CPU: x = k + f with k an integer, a polynomial of f, k added to the exponent
__device__ static inline float exp2_polynomial(float x) {
    x = fmaxf(x, -126.0f);
    float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    float p = ((1.3264727e-3f * f + 9.6715127e-3f) * f + 5.5507337e-2f) * f + 2.4022242e-1f;
    return __uint_as_float(__float_as_uint((p * f + 6.9314698e-1f) * f + 1.0f) + (__float_as_uint(shifted) << 23));
}

enum { EXP_E, EXP_2, EXP_HARDWARE, EXP_MIXED };

// a of states n .. n+S of channel d: A, or A log2(e); 0 for those that do not exist
template <int S, int EXP> __device__ static inline void rates(float *a, const float *A_log, int d, int n, int N) {
    #pragma unroll
    for (int k = 0; k < S; k++)
        a[k] = n + k < N ? -(EXP == EXP_E ? 1.0f : LOG2_E) * expf(A_log[(size_t)d * N + n + k]) : 0.0f;
}

template <int EXP> __device__ static inline float decay(float exponent, bool sixth) {
    if (EXP == EXP_E) return expf(exponent);
    if (EXP == EXP_2) return exp2f(exponent);
    return EXP == EXP_MIXED && sixth ? exp2_polynomial(exponent) : scan_exp2(exponent);
}

// rows (COUNT) = the rows of positions s0 .. of clip b; the last one's behind the end. Every thread of the block calls it.
template <int COUNT, class Args> __device__ static inline void stage_rows(int *rows, const Args &p, int b, int s0) {
    __syncthreads();  // until here they may be in use
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x)
        rows[i] = (int)((size_t)b * p.T * p.P + scan_row(p.order, min_int(s0 + i, p.T * p.P - 1), p.T, p.P));
    __syncthreads();
}

// tile (COUNT, 16) = rows of x (B*L, ldbc), zeros behind the last position and state
template <int COUNT>
__device__ static inline void stage_states(float4 (*tile)[4], const float *x, const int *rows, int count, int ldbc, int N) {
    for (int i = threadIdx.x; i < COUNT * STATES; i += blockDim.x) {
        int token = i / STATES, n = i % STATES;
        ((float *)tile[token])[n] = token < count && n < N ? x[(size_t)rows[token] * ldbc + n] : 0.0f;
    }
}

// four states of a lane
__device__ static inline void load_states(float *h, const float *from) {
    float4 v = *(const float4 *)from;
    h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
}
__device__ static inline void store_states(float *to, const float *h) { *(float4 *)to = make_float4(h[0], h[1], h[2], h[3]); }

// starts (B, chunks, D, 16) from ends and sums, a thread for each (clip, channel, state). reversed: the walk began at the last
__global__ static void scan_starts_kernel(float *starts, const float *ends, const float *sums, const float *A_log, int B,
                                          int chunks, int D, int N, int reversed) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = (size_t)D * STATES;
    if (i >= B * width) return;
    int d = (int)(i % width / STATES), n = (int)(i % STATES);
    float a, h = 0.0f;
    rates<1, EXP_2>(&a, A_log, d, n, N);
    #pragma unroll 8
    for (int c = 0; c < chunks; c++) {
        size_t at = (i / width * chunks + (reversed ? chunks - 1 - c : c)) * D + d;
        starts[at * STATES + n] = h;
        h = exp2f(a * sums[at]) * h + ends[at * STATES + n];
    }
}

// As many chunks of whole tiles as give about 4 warps to each of a large GPU's 528 schedulers
enum { WARPS_WANTED = 2048 };

// Sizes: C is D = d_inner; a row of x_dbl is, as in the model, dt's R numbers, Bt, Ct
#define SCAN_SIZES LAB_GRID, LAB_SIZE("channels", C, 65536, "d_inner"), LAB_SIZE("states", N, STATES, "d_state"), \
                   LAB_SIZE("directions", directions, 3, "orders of visiting, one after the other"), LAB_BLOCK
static int rank_of(const Sizes *s) { return dt_rank(ceil_div(s->C, 2)); }
static int ldbc_of(const Sizes *s) { return rank_of(s) + 2 * s->N; }
static int pixels_of(const Sizes *s) { return s->H * s->W; }

#endif
