/*
scan_forward.cu: the selective scan on an NVIDIA GPU, from the first version that works to the one that ships, and beyond.

    make dev && dev/scan_forward_cu all --preset b3.1         every version checked, then timed
    dev/scan_forward_cu 5 --csv                               one of them
    make lab_emu && dev/scan_forward_emu all                  without a GPU: checked on the CPU (dev/cudaemu.h), not timed

    h[s] = exp(dt[s] A) h[s-1] + dt[s] u[s] Bt[s],   y[s] = sum_n Ct[s] h[s] + D_skip u[s]      for each clip, channel, state

What it costs: of u, dt, y (B, L, D) and Bt, Ct (B, L, 16) every number must move once; an exp per position, channel and state
("element") is needed, of which a multiprocessor makes 16 per clock (MUFU), and it begins 128 instructions of a thread per
clock. An element takes at least 5 of these: dt a, 2^x, x Bt, e h + x Bt, and the sum of Ct h. Version 0 is train_vivim.cu's
kernel, and the CPU's selective_scan_forward is what all are compared with. Each version adds one idea:

  1  a thread for each clip and channel walks over all positions; its states, of a number that the compiler does not know,
     lie in local memory. D * B threads: too few, and every state is loaded and stored at every position
  2  16 states in registers, loops unrolled; a block copies 32 positions' Bt and Ct into shared memory, for all its channels;
     8 positions' u and dt are read before they are needed. expf is still 8 instructions
  3  exp(dt A) = 2^(dt a) with a = A log2(e) multiplied once: exp2f, 4 instructions, because it is exact for denormals, too
  4  the hardware's 2^x alone, 1 instruction: what is below 1e-38 becomes 0
  5  four lanes share a channel: 4 times the warps, a quarter of the states each, 3 shuffles for the sums of 4 positions. All
     four would read the channel's u and dt, so these lie in shared memory, too
  6  a warp scans 32 positions of a channel at a time: pairs (e, h) combine associatively, 5 rounds of shuffles for each
     state. Parallel along L, but 5 rounds of 2 shuffles and 2 multiplications replace one multiply-add
  7  the work-efficient form: each thread first walks over 8 positions, so that 256 of them share the 5 rounds (and a block's
     warps meet in shared memory), and walks again from the right state. One channel a block: Bt, Ct are read D times, and of
     each 32 bytes of u, dt, y that memory delivers 4 are used
  8  version 5 on chunks of L at the same time, in two passes: each chunk from h = 0, then from what the chunks before it
     leave, which needs only their last h and their sum of dt. Two exps per element, enough blocks for any B and D
  9  decoupled look-back: one pass over memory. A block publishes its chunk's last h, looks back over the chunks before it
     until one that knows its own start, then goes over the chunk again in shared memory. Blocks take their chunk from a
     counter: the chunks before it are then sure to be under way
 10  version 8 with every sixth 2^x as a polynomial, on the units for multiply-adds, beside the hardware's

ladder "scan_bf16":
  1  version 8 on bf16 u, dt and y; states, a and all arithmetic in float
ladder "layer", the inner part of a Mamba layer: three directions of conv1d + SiLU + scan, their sum, and the gate
  0  train_vivim.cu's kernels one after the other: u and y are written and read again for each direction
  1  conv1d and SiLU made on the fly where version 8 reads u; the gate where the last direction writes y
  2  the three directions over one piece of x: all frames of a strip of pixels is a chunk for the spatial order and a chunk
     per frame for the others, so a block runs all three over it, sums y in shared memory, applies the gate, writes once

dev/README.md says what was counted in their machine code. Times are yet to be measured: there was no GPU here.
*/
#define VIVIM_PROGRAM "scan_forward_cu"
#include "scan_cuda.h"

enum { BATCH = 8 };  // positions whose u and dt are read, or whose sums are shared out, together

template <typename X> struct ScanArgs {  // pointers to device memory, shapes above; y and the others of chunks may be NULL
    X *y;
    const X *u, *dt;
    const float *Bt, *Ct, *A_log, *D_skip, *starts;  // starts (B, chunks, D, 16): h before each chunk
    float *ends, *sums;                              // (B, chunks, D, 16), (B, chunks, D): last h from h = 0, sum of dt
    int ldbc, order, B, T, P, D, N, length, chunks;  // length: of a chunk
};

// One position of S states: h = e h + x Bt; returns sum Ct h. i: the position in its batch, known to the compiler
template <int S, int EXP, bool ENDS>
__device__ static inline float advance(float *h, const float *a, float delta, float x, const float4 *Bt, const float4 *Ct,
                                       int i) {
    float sum = 0.0f;
    #pragma unroll
    for (int q = 0; q < S / 4; q++) {
        float4 b4 = Bt[q], c4 = ENDS ? b4 : Ct[q];
        float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            int n = 4 * q + k;
            h[n] = decay<EXP>(delta * a[n], (i * S + n) % 6 == 5) * h[n] + x * b[k];
            if (!ENDS) sum += h[n] * c[k];
        }
    }
    return sum;
}

// ------------------------------------------------------------------------------------------------------------------
// 1 One thread for each clip and channel. grid (channels, clips)

__global__ static void scan_naive_kernel(ScanArgs<float> p) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, L = p.T * p.P;
    float A[STATES], h[STATES];
    if (d >= p.D) return;
    #pragma unroll 1
    for (int n = 0; n < p.N; n++) A[n] = -expf(p.A_log[(size_t)d * p.N + n]), h[n] = 0.0f;
    for (int s = 0; s < L; s++) {
        size_t row = (size_t)blockIdx.y * L + scan_row(p.order, s, p.T, p.P);
        float delta = p.dt[row * p.D + d], v = p.u[row * p.D + d], sum = p.D_skip[d] * v;
        #pragma unroll 1
        for (int n = 0; n < p.N; n++) {
            h[n] = expf(delta * A[n]) * h[n] + delta * v * p.Bt[row * p.ldbc + n];
            sum += h[n] * p.Ct[row * p.ldbc + n];
        }
        p.y[row * p.D + d] = sum;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 2, 3, 4 A thread for each clip and channel, its states in registers. grid (channels, clips)

template <int EXP> __global__ static void __launch_bounds__(256) scan_tiled_kernel(ScanArgs<float> p) {
    __shared__ float4 Bt[TOKENS][4];
    __shared__ float4 Ct[TOKENS][4];
    __shared__ int rows[TOKENS];
    int d = blockIdx.x * blockDim.x + threadIdx.x, column = min_int(d, p.D - 1), L = p.T * p.P;
    float a[STATES], h[STATES], skip = p.D_skip[column];
    rates<STATES, EXP>(a, p.A_log, column, 0, p.N);
    #pragma unroll
    for (int n = 0; n < STATES; n++) h[n] = 0.0f;
    for (int s0 = 0; s0 < L; s0 += TOKENS) {
        int count = min_int(TOKENS, L - s0);
        stage_rows<TOKENS>(rows, p, blockIdx.y, s0);
        stage_states<TOKENS>(Bt, p.Bt, rows, count, p.ldbc, p.N);
        stage_states<TOKENS>(Ct, p.Ct, rows, count, p.ldbc, p.N);
        __syncthreads();
        #pragma unroll 1
        for (int i0 = 0; i0 < count; i0 += BATCH) {
            float delta[BATCH], v[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {  // dt = 0 behind the end: such a position changes no state
                size_t at = (size_t)rows[i0 + i] * p.D + column;
                delta[i] = i0 + i < count ? p.dt[at] : 0.0f;
                v[i] = i0 + i < count ? p.u[at] : 0.0f;
            }
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float sum = advance<STATES, EXP, false>(h, a, delta[i], delta[i] * v[i], Bt[i0 + i], Ct[i0 + i], i);
                if (i0 + i < count && d < p.D) p.y[(size_t)rows[i0 + i] * p.D + d] = sum + skip * v[i];
            }
        }
    }
}

template <int EXP> static void scan_tiled(ScanArgs<float> p, int block) {
    dim3 grid(ceil_div(p.D, block), p.B);
    scan_tiled_kernel<EXP><<<grid, block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------------------------
// 5, 8, 10 and scan_bf16's 1: four neighbouring lanes share a channel. As they would all read its u and dt, these lie in shared
// memory, too. grid (channels, chunks, clips). ENDS: what a chunk leaves behind, starting from 0, instead of y

enum { MOST_CHANNELS = 64 };  // of a block

template <typename X, int EXP, bool ENDS>
__global__ static void __launch_bounds__(4 * MOST_CHANNELS, 4) scan_lanes_kernel(ScanArgs<X> p) {
    __shared__ float u[TOKENS][MOST_CHANNELS];
    __shared__ float dt[TOKENS][MOST_CHANNELS];
    __shared__ float4 Bt[TOKENS][4];
    __shared__ float4 Ct[TOKENS][4];
    __shared__ int rows[TOKENS];
    int g = threadIdx.x % 4, j = threadIdx.x / 4, channels = blockDim.x / 4, d = blockIdx.x * channels + j;
    int column = min_int(d, p.D - 1), L = p.T * p.P, first = blockIdx.y * p.length, end = min_int(first + p.length, L);
    size_t place = ((size_t)blockIdx.z * p.chunks + blockIdx.y) * p.D + column;
    float a[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum_dt = 0.0f, skip = g == 0 ? p.D_skip[column] : 0.0f;  // one lane adds it
    rates<4, EXP>(a, p.A_log, column, g * 4, p.N);
    if (p.starts) load_states(h, p.starts + place * STATES + g * 4);
    for (int s0 = first; s0 < end; s0 += TOKENS) {
        int count = min_int(TOKENS, end - s0);
        stage_rows<TOKENS>(rows, p, blockIdx.z, s0);
        stage_states<TOKENS>(Bt, p.Bt, rows, count, p.ldbc, p.N);
        if (!ENDS) stage_states<TOKENS>(Ct, p.Ct, rows, count, p.ldbc, p.N);
        for (int i = threadIdx.x; i < TOKENS * channels; i += blockDim.x) {
            int token = i / channels, c = i % channels, here = token < count && blockIdx.x * channels + c < p.D;
            size_t at = (size_t)rows[token] * p.D + blockIdx.x * channels + c;
            u[token][c] = here ? as_float(p.u[at]) : 0.0f, dt[token][c] = here ? as_float(p.dt[at]) : 0.0f;
        }
        __syncthreads();
        #pragma unroll 1
        for (int i0 = 0; i0 < count; i0 += BATCH) {
            float sum[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float delta = dt[i0 + i][j], v = u[i0 + i][j];
                sum[i] = advance<4, EXP, ENDS>(h, a, delta, delta * v, &Bt[i0 + i][g], &Ct[i0 + i][g], i) + skip * v;
                sum_dt += delta;
            }
            if (ENDS) continue;
            fold<4, 2, 1>(sum);  // lane g gets the sums of positions i0 + g and i0 + 4 + g
            fold<4, 2, 1>(sum + 4);
            if (i0 + g < count && d < p.D) store_as(&p.y[(size_t)rows[i0 + g] * p.D + d], sum[0]);
            if (i0 + 4 + g < count && d < p.D) store_as(&p.y[(size_t)rows[i0 + 4 + g] * p.D + d], sum[4]);
        }
    }
    if (!ENDS || d >= p.D) return;
    store_states(p.ends + place * STATES + g * 4, h);
    if (g == 0) p.sums[place] = sum_dt;
}

static void scan_lanes(ScanArgs<float> p, int block) {
    p.length = p.T * p.P, p.chunks = 1;
    dim3 grid(ceil_div(p.D * 4, block), 1, p.B);
    scan_lanes_kernel<float, EXP_HARDWARE, false><<<grid, block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
}

template <typename X, int EXP> static void scan_chunked(ScanArgs<X> p, int block) {
    int L = p.T * p.P, tiles = ceil_div(L, TOKENS), warps = ceil_div(p.D * 4, block) * (block / 32) * p.B;
    p.length = ceil_div(tiles, max_int(1, min_int(tiles, WARPS_WANTED / warps))) * TOKENS;
    p.chunks = ceil_div(L, p.length);
    dim3 grid(ceil_div(p.D * 4, block), p.chunks, p.B);
    size_t states = (size_t)p.B * p.chunks * p.D * STATES;
    float *work = p.chunks > 1 ? malloc_floats_cuda(2 * states + states / STATES) : NULL;
    if (work) {
        p.ends = work + states, p.sums = work + 2 * states;
        scan_lanes_kernel<X, EXP, true><<<grid, block, 0, stream_cuda>>>(p);
        cudaCheck(cudaGetLastError());
        scan_starts_kernel<<<ceil_div(p.B * p.D * STATES, 128), 128, 0, stream_cuda>>>(work, p.ends, p.sums, p.A_log, p.B,
                                                                                      p.chunks, p.D, p.N, 0);
        cudaCheck(cudaGetLastError());
        p.starts = work;
    }
    scan_lanes_kernel<X, EXP, false><<<grid, block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
    free_check_cuda(work);
}

// ------------------------------------------------------------------------------------------------------------------
// 6 A warp for each clip and channel, a lane for each of 32 positions. grid (channels / 8, clips), 8 warps a block

enum { SCAN_WARPS = 8 };

// (e, h) of this lane = the composition of all lanes' up to this one: h -> e h + what they add
__device__ static inline void scan_pairs(float *e, float *h) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        float e_before = __shfl_up_sync(0xffffffffu, *e, o), h_before = __shfl_up_sync(0xffffffffu, *h, o);
        if (lane >= o) *h += *e * h_before, *e *= e_before;
    }
}

__global__ static void __launch_bounds__(32 * SCAN_WARPS) scan_warp_kernel(ScanArgs<float> p) {
    __shared__ float u[32][SCAN_WARPS + 1];  // an odd pitch: a column's 32 positions lie in 32 banks
    __shared__ float dt[32][SCAN_WARPS + 1];
    __shared__ float y[32][SCAN_WARPS + 1];
    __shared__ float Bt[STATES][33];
    __shared__ float Ct[STATES][33];
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, L = p.T * p.P;
    int d = min_int(blockIdx.x * SCAN_WARPS + warp, p.D - 1);                        // the warp's channel
    int at_token = thread / SCAN_WARPS, at_channel = thread % SCAN_WARPS;            // what the thread copies
    int column = blockIdx.x * SCAN_WARPS + at_channel;
    float a[STATES], h0[STATES], skip = p.D_skip[d];
    rates<STATES, EXP_2>(a, p.A_log, d, 0, p.N);
    #pragma unroll
    for (int n = 0; n < STATES; n++) h0[n] = 0.0f;
    for (int s0 = 0; s0 < L; s0 += 32) {
        int s = s0 + at_token, here = s < L && column < p.D;
        size_t row = (size_t)blockIdx.y * L + scan_row(p.order, min_int(s, L - 1), p.T, p.P);
        __syncthreads();
        u[at_token][at_channel] = here ? p.u[row * p.D + column] : 0.0f;
        dt[at_token][at_channel] = here ? p.dt[row * p.D + column] : 0.0f;
        for (int n = at_channel; n < STATES; n += SCAN_WARPS) {
            Bt[n][at_token] = s < L && n < p.N ? p.Bt[row * p.ldbc + n] : 0.0f;
            Ct[n][at_token] = s < L && n < p.N ? p.Ct[row * p.ldbc + n] : 0.0f;
        }
        __syncthreads();
        float delta = dt[lane][warp], v = u[lane][warp], sum = skip * v;
        #pragma unroll
        for (int n = 0; n < STATES; n++) {
            float e = scan_exp2(delta * a[n]), h = delta * v * Bt[n][lane];
            scan_pairs(&e, &h);
            h += e * h0[n];
            sum += h * Ct[n][lane];
            h0[n] = __shfl_sync(0xffffffffu, h, 31);
        }
        y[lane][warp] = sum;
        __syncthreads();
        if (here) p.y[row * p.D + column] = y[at_token][at_channel];
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 7 A block for each clip and channel, a thread for 8 positions. grid (channels, clips)

__global__ static void __launch_bounds__(256) scan_block_kernel(ScanArgs<float> p) {
    __shared__ float carry[STATES];  // h before the block's positions
    __shared__ float e_of_warp[8];
    __shared__ float h_of_warp[8];
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32, L = p.T * p.P, d = blockIdx.x;
    float skip = p.D_skip[d];
    if (thread < STATES) carry[thread] = 0.0f;
    for (int s0 = 0; s0 < L; s0 += BATCH * blockDim.x) {
        float delta[BATCH], v[BATCH], y[BATCH];
        int rows[BATCH], first = s0 + thread * BATCH;
        #pragma unroll
        for (int i = 0; i < BATCH; i++) {
            rows[i] = (int)(blockIdx.y * L + scan_row(p.order, min_int(first + i, L - 1), p.T, p.P));
            delta[i] = first + i < L ? p.dt[(size_t)rows[i] * p.D + d] : 0.0f;
            v[i] = first + i < L ? p.u[(size_t)rows[i] * p.D + d] : 0.0f;
            y[i] = skip * v[i];
        }
        #pragma unroll 1
        for (int n = 0; n < p.N; n++) {
            float a, e[BATCH], h[BATCH], e_all = 1.0f, h_all = 0.0f;
            rates<1, EXP_2>(&a, p.A_log, d, n, p.N);
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {  // up: the thread's positions as one pair
                e[i] = scan_exp2(delta[i] * a), h[i] = delta[i] * v[i] * p.Bt[(size_t)rows[i] * p.ldbc + n];
                e_all *= e[i], h_all = e[i] * h_all + h[i];
            }
            scan_pairs(&e_all, &h_all);
            if (lane == 31) e_of_warp[warp] = e_all, h_of_warp[warp] = h_all;
            __syncthreads();
            float h_here = carry[n], e_before = __shfl_up_sync(0xffffffffu, e_all, 1);
            float h_before = __shfl_up_sync(0xffffffffu, h_all, 1);
            for (int w = 0; w < warp; w++) h_here = e_of_warp[w] * h_here + h_of_warp[w];
            if (lane > 0) h_here = e_before * h_here + h_before;
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {  // down: the same positions from the right state
                h_here = e[i] * h_here + h[i];
                y[i] += h_here * p.Ct[(size_t)rows[i] * p.ldbc + n];
            }
            __syncthreads();  // all have read carry and the pairs of warps
            if (thread == warps * 32 - 1) carry[n] = h_here;
        }
        #pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (first + i < L) p.y[(size_t)rows[i] * p.D + d] = y[i];
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 9 Decoupled look-back. A block of 128 threads has 32 channels, four lanes each, and a chunk of 64 positions, all of which
// lies in shared memory. work: ends, then starts of the next chunk (B, chunks, D, 16), sums (B, chunks, D); flags (chunks,
// clips, channels / 32) and behind them the counter, all 0 at the beginning.

enum { LOOK_CHUNK = 64, LOOK_CHANNELS = 32, LOOK_ENDS = 1, LOOK_STARTS = 2 };  // what a flag says is there
#ifdef CUDAEMU
enum { LOOK_TELLS = 3 };  // where a block ends before the next begins, only every third says LOOK_STARTS: else no one looks far
#else
enum { LOOK_TELLS = 1 };
#endif

__global__ static void __launch_bounds__(128) scan_lookback_kernel(ScanArgs<float> p, float *next, int *flags, int *counter) {
    __shared__ float u[LOOK_CHUNK][LOOK_CHANNELS + 8];  // pitch: 4 positions of 8 channels lie in 32 banks
    __shared__ float dt[LOOK_CHUNK][LOOK_CHANNELS + 8];
    __shared__ float4 Bt[LOOK_CHUNK][4];
    __shared__ float4 Ct[LOOK_CHUNK][4];
    __shared__ int rows[LOOK_CHUNK];
    __shared__ int ticket;
    int thread = threadIdx.x, g = thread % 4, j = thread / 4, L = p.T * p.P, groups = ceil_div(p.D, LOOK_CHANNELS);
    if (thread == 0) ticket = atomicAdd(counter, 1);
    __syncthreads();
    int chunk = ticket / (groups * p.B), b = ticket / groups % p.B, group = ticket % groups, s0 = chunk * LOOK_CHUNK;
    int d = group * LOOK_CHANNELS + j, column = min_int(d, p.D - 1), count = min_int(LOOK_CHUNK, L - s0);
    if (thread < LOOK_CHUNK) rows[thread] = (int)(b * L + scan_row(p.order, min_int(s0 + thread, L - 1), p.T, p.P));
    __syncthreads();
    for (int i = thread; i < LOOK_CHUNK * LOOK_CHANNELS; i += 128) {
        int token = i / LOOK_CHANNELS, c = i % LOOK_CHANNELS, here = token < count && group * LOOK_CHANNELS + c < p.D;
        size_t at = (size_t)rows[token] * p.D + group * LOOK_CHANNELS + c;
        u[token][c] = here ? p.u[at] : 0.0f, dt[token][c] = here ? p.dt[at] : 0.0f;
    }
    for (int part = 0; part < LOOK_CHUNK; part += TOKENS) {
        stage_states<TOKENS>(Bt + part, p.Bt, rows + part, count - part, p.ldbc, p.N);
        stage_states<TOKENS>(Ct + part, p.Ct, rows + part, count - part, p.ldbc, p.N);
    }
    __syncthreads();
    float a[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, end[4], sum_dt = 0.0f, skip = g == 0 ? p.D_skip[column] : 0.0f;
    rates<4, EXP_2>(a, p.A_log, column, g * 4, p.N);
    #pragma unroll 8
    for (int i = 0; i < LOOK_CHUNK; i++) {
        advance<4, EXP_HARDWARE, true>(h, a, dt[i][j], dt[i][j] * u[i][j], &Bt[i][g], NULL, 0);
        sum_dt += dt[i][j];
    }
    #pragma unroll
    for (int n = 0; n < 4; n++) end[n] = h[n], h[n] = 0.0f;
    // publish: the data, then a fence, then, when all threads are that far, the flag
    size_t place = ((size_t)b * p.chunks + chunk) * p.D + column;
    int of_group = b * groups + group, stride = groups * p.B;
    if (d < p.D) store_states(p.ends + place * STATES + g * 4, end);
    if (d < p.D && g == 0) p.sums[place] = sum_dt;
    __threadfence();
    __syncthreads();
    if (thread == 0) atomicExch(&flags[chunk * stride + of_group], (int)LOOK_ENDS);
    // look back: h before this chunk = sum over chunks c before of exp(A, dt between) * end of c
    float between = 0.0f;  // sum of dt from behind chunk c to here
    for (int c = chunk - 1; c >= 0; c--) {
        size_t from = ((size_t)b * p.chunks + c) * p.D + column;
        int flag;
        do flag = *(volatile int *)&flags[c * stride + of_group]; while (flag == 0);
        __threadfence();
        const volatile float *found = (flag == LOOK_STARTS ? next : p.ends) + from * STATES + g * 4;
        #pragma unroll
        for (int n = 0; n < 4; n++) h[n] += scan_exp2(a[n] * between) * found[n];
        if (flag == LOOK_STARTS) break;
        between += ((const volatile float *)p.sums)[from];
    }
    #pragma unroll
    for (int n = 0; n < 4; n++) end[n] += scan_exp2(a[n] * sum_dt) * h[n];
    if (d < p.D) store_states(next + place * STATES + g * 4, end);
    __threadfence();
    __syncthreads();
    if (thread == 0 && chunk % LOOK_TELLS == 0) atomicExch(&flags[chunk * stride + of_group], (int)LOOK_STARTS);
    #pragma unroll 1
    for (int i0 = 0; i0 < LOOK_CHUNK; i0 += 4) {
        float sum[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float delta = dt[i0 + i][j], v = u[i0 + i][j];
            sum[i] = skip * v + advance<4, EXP_HARDWARE, false>(h, a, delta, delta * v, &Bt[i0 + i][g], &Ct[i0 + i][g], i);
        }
        fold<4, 2, 1>(sum);
        if (i0 + g < count && d < p.D) p.y[(size_t)rows[i0 + g] * p.D + d] = sum[0];
    }
}

static void scan_lookback(ScanArgs<float> p) {
    p.length = LOOK_CHUNK, p.chunks = ceil_div(p.T * p.P, LOOK_CHUNK);
    int blocks = p.chunks * ceil_div(p.D, LOOK_CHANNELS) * p.B;
    size_t states = (size_t)p.B * p.chunks * p.D * STATES;
    p.ends = malloc_floats_cuda(2 * states + states / STATES), p.sums = p.ends + 2 * states;
    int *flags = (int *)calloc_check_cuda((size_t)blocks + 1, sizeof(int));
    scan_lookback_kernel<<<blocks, 128, 0, stream_cuda>>>(p, p.ends + states, flags, flags + blocks);
    cudaCheck(cudaGetLastError());
    free_check_cuda(p.ends);
    free_check_cuda(flags);
}

// ------------------------------------------------------------------------------------------------------------------
// Ladder "layer": gated = SiLU(z) (y_f + y_b + y_s) / 3, y_g = scan_g(SiLU(conv1d_g(x)))

enum { DIRECTIONS = 3, TAPS = 4, PITCH = 40 };  // PITCH: of a tile's 32 channels, 4 positions of 8 of them in 32 banks

typedef struct {  // the three directions stand in the order of SCAN_FORWARD, SCAN_BACKWARD, SCAN_SPATIAL
    float *gated;                                   // (B, L, D)
    const float *xz;                                // (B, L, 2D)
    const float *weight[DIRECTIONS], *bias[DIRECTIONS];     // conv1d's (D, 4), (D)
    const float *dt[DIRECTIONS], *Bt[DIRECTIONS], *Ct[DIRECTIONS];  // (B, L, D), (B, L, ldbc)
    const float *A_log[DIRECTIONS], *D_skip[DIRECTIONS];    // (D, N), (D)
    int ldbc, B, T, P, D, N;
} LayerArgs;

typedef struct { float *ends, *sums; const float *starts; int chunks; } Chunks;  // of one direction, as in ScanArgs

typedef struct {  // a block's tile of 32 positions and 32 channels, in shared memory
    float u[TOKENS][PITCH], dt[TOKENS][PITCH];
    float4 Bt[TOKENS][4], Ct[TOKENS][4];
    int rows[TOKENS + TAPS - 1];  // of positions s0 - 3 .. s0 + 31; -1 before the first
} Tile;

// Fills a tile with positions s0 .. s0+count of clip b; u = SiLU(conv1d(x)) is made from x: a thread takes 8 positions of a
// channel, so that it reads each x once, and 3 before them. All 128 threads of the block call it.
template <bool ENDS>
__device__ static inline void stage_tile(Tile *tile, const LayerArgs &p, int direction, int b, int s0, int count) {
    int thread = threadIdx.x, c = thread % 32, d = blockIdx.x * 32 + c, column = min_int(d, p.D - 1), i0 = thread / 32 * BATCH;
    float x[TAPS], w[TAPS], shift = p.bias[direction][column];
    __syncthreads();
    for (int i = thread; i < TOKENS + TAPS - 1; i += 128) {
        int s = min_int(s0 + i - (TAPS - 1), p.T * p.P - 1);
        tile->rows[i] = s < 0 ? -1 : (int)((size_t)b * p.T * p.P + scan_row(direction, s, p.T, p.P));
    }
    __syncthreads();
    stage_states<TOKENS>(tile->Bt, p.Bt[direction], tile->rows + TAPS - 1, count, p.ldbc, p.N);
    if (!ENDS) stage_states<TOKENS>(tile->Ct, p.Ct[direction], tile->rows + TAPS - 1, count, p.ldbc, p.N);
    #pragma unroll
    for (int i = 1 - TAPS; i < BATCH; i++) {
        int row = tile->rows[i0 + i + TAPS - 1], here = i0 + i < count && d < p.D;
        #pragma unroll
        for (int k = 0; k < TAPS - 1; k++) x[k] = x[k + 1];
        x[TAPS - 1] = row < 0 ? 0.0f : p.xz[(size_t)row * 2 * p.D + column];
        if (i < 0) continue;
        float z = shift;
        #pragma unroll
        for (int k = 0; k < TAPS; k++) {
            if (i == 0) w[k] = p.weight[direction][(size_t)column * TAPS + k];
            z += w[k] * x[k];
        }
        tile->u[i0 + i][c] = here ? silu_simd(z) : 0.0f;
        tile->dt[i0 + i][c] = here ? p.dt[direction][(size_t)row * p.D + column] : 0.0f;
    }
    __syncthreads();
}

// 1: scan's version 8 with u made on the fly. y (B, L, D) = for the first direction, += for the others; the last one's block
// has the whole sum and writes gated instead. grid (channels / 32, chunks, clips)
template <bool ENDS>
__global__ static void __launch_bounds__(128) scan_conv_kernel(LayerArgs p, Chunks chunks, float *y, int direction,
                                                               int length) {
    __shared__ Tile tile;
    int g = threadIdx.x % 4, j = threadIdx.x / 4, d = blockIdx.x * 32 + j, column = min_int(d, p.D - 1), L = p.T * p.P;
    int first = blockIdx.y * length, end = min_int(first + length, L), last = direction == DIRECTIONS - 1;
    size_t place = ((size_t)blockIdx.z * chunks.chunks + blockIdx.y) * p.D + column;
    float a[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum_dt = 0.0f, skip = g == 0 ? p.D_skip[direction][column] : 0.0f;
    rates<4, EXP_2>(a, p.A_log[direction], column, g * 4, p.N);
    if (chunks.starts) load_states(h, chunks.starts + place * STATES + g * 4);
    for (int s0 = first; s0 < end; s0 += TOKENS) {
        int count = min_int(TOKENS, end - s0);
        stage_tile<ENDS>(&tile, p, direction, blockIdx.z, s0, count);
        #pragma unroll 1
        for (int i0 = 0; i0 < count; i0 += 4) {
            float sum[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float delta = tile.dt[i0 + i][j], v = tile.u[i0 + i][j];
                sum[i] = skip * v + advance<4, EXP_HARDWARE, ENDS>(h, a, delta, delta * v, &tile.Bt[i0 + i][g],
                                                                   &tile.Ct[i0 + i][g], i);
                sum_dt += delta;
            }
            if (ENDS) continue;
            fold<4, 2, 1>(sum);
            if (i0 + g >= count || d >= p.D) continue;
            size_t row = (size_t)tile.rows[i0 + g + TAPS - 1], at = row * p.D + d;
            if (direction > 0) sum[0] += y[at];
            if (last) p.gated[at] = sum[0] * (1.0f / DIRECTIONS) * silu_simd(p.xz[row * 2 * p.D + p.D + d]);
            else y[at] = sum[0];
        }
    }
    if (!ENDS || d >= p.D) return;
    store_states(chunks.ends + place * STATES + g * 4, h);
    if (g == 0) chunks.sums[place] = sum_dt;
}

static Chunks chunks_alloc(const LayerArgs &p, int count) {  // free_check_cuda(ends) afterwards
    size_t states = (size_t)p.B * count * p.D * STATES;
    float *work = malloc_floats_cuda(2 * states + states / STATES);
    Chunks chunks = {work, work + 2 * states, NULL, count};
    return chunks;
}

static void chunks_join(Chunks *chunks, const LayerArgs &p, int direction, int reversed) {
    float *starts = chunks->ends + (size_t)p.B * chunks->chunks * p.D * STATES;
    scan_starts_kernel<<<ceil_div(p.B * p.D * STATES, 128), 128, 0, stream_cuda>>>(
        starts, chunks->ends, chunks->sums, p.A_log[direction], p.B, chunks->chunks, p.D, p.N, reversed);
    cudaCheck(cudaGetLastError());
    chunks->starts = starts;
}

static void layer_by_direction(LayerArgs p) {
    int L = p.T * p.P, tiles = ceil_div(L, TOKENS), warps = ceil_div(p.D, 32) * 4 * p.B;
    int length = ceil_div(tiles, max_int(1, min_int(tiles, WARPS_WANTED / warps))) * TOKENS;
    float *y = malloc_floats_cuda((size_t)p.B * L * p.D);
    dim3 grid(ceil_div(p.D, 32), ceil_div(L, length), p.B);
    for (int direction = 0; direction < DIRECTIONS; direction++) {
        Chunks chunks = chunks_alloc(p, grid.y);
        if (grid.y > 1) {
            scan_conv_kernel<true><<<grid, 128, 0, stream_cuda>>>(p, chunks, y, direction, length);
            cudaCheck(cudaGetLastError());
            chunks_join(&chunks, p, direction, 0);
        }
        scan_conv_kernel<false><<<grid, 128, 0, stream_cuda>>>(p, chunks, y, direction, length);
        cudaCheck(cudaGetLastError());
        free_check_cuda(chunks.ends);
    }
    free_check_cuda(y);
}

// 2: a block has all frames of a strip of pixels, of 32 channels. For the spatial order these positions are one chunk, for
// the others they are a chunk in each frame. grid (channels / 32, strips, clips)
enum { STRIP_ROWS = 256 };  // tokens of a strip, at most: their y lie in shared memory. Clips of more frames go the way of 1

template <bool ENDS>
__global__ static void __launch_bounds__(128) scan_layer_kernel(LayerArgs p, Chunks all0, Chunks all1, Chunks all2, int strip) {
    extern __shared__ float strip_y[];  // (T, strip, 32)
    __shared__ Tile tile;
    int g = threadIdx.x % 4, j = threadIdx.x / 4, d = blockIdx.x * 32 + j, column = min_int(d, p.D - 1), L = p.T * p.P;
    int p0 = blockIdx.y * strip, width = min_int(strip, p.P - p0), b = blockIdx.z;
    for (int direction = 0; direction < DIRECTIONS; direction++) {
        Chunks chunks = direction == SCAN_FORWARD ? all0 : direction == SCAN_BACKWARD ? all1 : all2;
        float a[4], skip = g == 0 ? p.D_skip[direction][column] : 0.0f;
        rates<4, EXP_2>(a, p.A_log[direction], column, g * 4, p.N);
        for (int t = 0; t < (direction == SCAN_SPATIAL ? 1 : p.T); t++) {
            int row = t * p.P + p0, length = direction == SCAN_SPATIAL ? width * p.T : width;  // the chunk's first position:
            int first = direction == SCAN_FORWARD ? row : direction == SCAN_BACKWARD ? L - row - width : p0 * p.T;
            size_t place = ((size_t)b * chunks.chunks + t * gridDim.y + blockIdx.y) * p.D + column;
            float h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum_dt = 0.0f;
            if (!ENDS) load_states(h, chunks.starts + place * STATES + g * 4);
            for (int s0 = first; s0 < first + length; s0 += TOKENS) {
                int count = min_int(TOKENS, first + length - s0);
                stage_tile<ENDS>(&tile, p, direction, b, s0, count);
                #pragma unroll 1
                for (int i0 = 0; i0 < count; i0 += 4) {
                    float sum[4];
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float delta = tile.dt[i0 + i][j], v = tile.u[i0 + i][j];
                        sum[i] = skip * v + advance<4, EXP_HARDWARE, ENDS>(h, a, delta, delta * v, &tile.Bt[i0 + i][g],
                                                                           &tile.Ct[i0 + i][g], i);
                        sum_dt += delta;
                    }
                    if (ENDS) continue;
                    fold<4, 2, 1>(sum);
                    if (i0 + g >= count) continue;
                    int at = tile.rows[i0 + g + TAPS - 1] - b * L;  // in the clip
                    float *y = &strip_y[(at / p.P * strip + at % p.P - p0) * 32 + j];
                    *y = direction > 0 ? *y + sum[0] : sum[0];
                }
            }
            if (!ENDS || d >= p.D) continue;
            store_states(chunks.ends + place * STATES + g * 4, h);
            if (g == 0) chunks.sums[place] = sum_dt;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < p.T * width && !ENDS; i += 4) {
        int t = i / width, pixel = i % width, c = threadIdx.x % 32, channel = blockIdx.x * 32 + c;
        size_t row = (size_t)b * L + (size_t)t * p.P + p0 + pixel;
        if (channel < p.D) p.gated[row * p.D + channel] = strip_y[(t * strip + pixel) * 32 + c] * (1.0f / DIRECTIONS)
                                                        * silu_simd(p.xz[row * 2 * p.D + p.D + channel]);
    }
}

static void layer_at_once(LayerArgs p) {
    if (p.T > STRIP_ROWS) { layer_by_direction(p); return; }
    int strip = max_int(1, min_int(min_int(TOKENS, p.P), STRIP_ROWS / p.T)), strips = ceil_div(p.P, strip);
    size_t bytes = sizeof(float) * 32 * p.T * strip;
    dim3 grid(ceil_div(p.D, 32), strips, p.B);
    Chunks chunks[DIRECTIONS];
    for (int direction = 0; direction < DIRECTIONS; direction++)
        chunks[direction] = chunks_alloc(p, direction == SCAN_SPATIAL ? strips : strips * p.T);
    scan_layer_kernel<true><<<grid, 128, 0, stream_cuda>>>(p, chunks[0], chunks[1], chunks[2], strip);
    cudaCheck(cudaGetLastError());
    for (int direction = 0; direction < DIRECTIONS; direction++)
        chunks_join(&chunks[direction], p, direction, direction == SCAN_BACKWARD);
    scan_layer_kernel<false><<<grid, 128, bytes, stream_cuda>>>(p, chunks[0], chunks[1], chunks[2], strip);
    cudaCheck(cudaGetLastError());
    for (int direction = 0; direction < DIRECTIONS; direction++) free_check_cuda(chunks[direction].ends);
}

// ------------------------------------------------------------------------------------------------------------------
// The ladders

enum { OUT_Y, IN_U, IN_DT, IN_X_DBL, IN_A_LOG, IN_D_SKIP };

static void scan_tensors_limit(Lab *lab, const Sizes *s, double limit) {
    size_t rows = tokens_of(s), n = rows * s->C;
    lab_out(lab, OUT_Y, "y", n * s->directions, limit);  // (directions, B, L, D)
    lab_in(lab, IN_U, "u", n, -1, 1);
    lab_in(lab, IN_DT, "dt", n, 0.001, 0.2);
    lab_in(lab, IN_X_DBL, "x_dbl", rows * ldbc_of(s), -1, 1);
    lab_in(lab, IN_A_LOG, "A_log", (size_t)s->C * s->N, 0, 2.8);
    lab_in(lab, IN_D_SKIP, "D_skip", s->C, 0, 2);
}
static void scan_tensors(Lab *lab, const Sizes *s) { scan_tensors_limit(lab, s, 1e-11); }
static void scan_tensors_bf16(Lab *lab, const Sizes *s) { scan_tensors_limit(lab, s, 1.6e-5); }  // y is rounded: 2^-8

static void scan_derive_bf16(float *const *host, const Sizes *s) {
    for (int i = IN_U; i <= IN_DT; i++) lab_cut_to_bf16(host[i], tokens_of(s) * s->C);
}

static void scan_reference(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++)
        selective_scan_forward(t[OUT_Y] + order * tokens_of(s) * s->C, NULL, t[IN_U], t[IN_DT], t[IN_X_DBL] + rank_of(s),
                               t[IN_X_DBL] + rank_of(s) + s->N, ldbc_of(s), t[IN_A_LOG], t[IN_D_SKIP], order, s->B, s->T,
                               pixels_of(s), s->C, s->N, 0);
}

// u, dt read and y written once for each direction, Bt and Ct, too; an exp per element
static LabWork scan_work_bytes(const Sizes *s, double bytes) {
    double rows = (double)tokens_of(s) * s->directions, elements = rows * s->C * s->N;
    LabWork w = {rows * (3 * bytes * s->C + 8.0 * s->N), elements, elements};
    return w;
}
static LabWork scan_work(const Sizes *s) { return scan_work_bytes(s, 4); }
static LabWork scan_work_bf16(const Sizes *s) { return scan_work_bytes(s, 2); }

static ScanArgs<float> scan_args(float *const *t, const Sizes *s, int order) {
    ScanArgs<float> p = {t[OUT_Y] + order * tokens_of(s) * s->C, t[IN_U], t[IN_DT], t[IN_X_DBL] + rank_of(s),
                         t[IN_X_DBL] + rank_of(s) + s->N, t[IN_A_LOG], t[IN_D_SKIP], NULL, NULL, NULL, ldbc_of(s), order, s->B,
                         s->T, pixels_of(s), s->C, s->N, 0, 0};
    return p;
}

static void run_ships(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) {
        ScanArgs<float> p = scan_args(t, s, order);
        selective_scan_forward_cuda(p.y, NULL, p.u, p.dt, p.Bt, p.Ct, p.ldbc, p.A_log, p.D_skip, order, p.B, p.T, p.P, p.D,
                                    p.N, 0);
    }
}
static void run_naive(float *const *t, const Sizes *s) {
    int block = lab_block(s, 128, 1024);
    for (int order = 0; order < s->directions; order++) {
        scan_naive_kernel<<<dim3(ceil_div(s->C, block), s->B), block, 0, stream_cuda>>>(scan_args(t, s, order));
        cudaCheck(cudaGetLastError());
    }
}
template <int EXP> static void run_tiled(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) scan_tiled<EXP>(scan_args(t, s, order), lab_block(s, 64, 256));
}
static void run_lanes(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) scan_lanes(scan_args(t, s, order), lab_block(s, 128, 256));
}
static void run_warp(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) {
        dim3 grid(ceil_div(s->C, SCAN_WARPS), s->B);
        scan_warp_kernel<<<grid, 32 * SCAN_WARPS, 0, stream_cuda>>>(scan_args(t, s, order));
        cudaCheck(cudaGetLastError());
    }
}
static void run_block(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) {
        scan_block_kernel<<<dim3(s->C, s->B), lab_block(s, 128, 256), 0, stream_cuda>>>(scan_args(t, s, order));
        cudaCheck(cudaGetLastError());
    }
}
template <int EXP> static void run_chunked(float *const *t, const Sizes *s) {
    int block = lab_block(s, 128, 256);
    for (int order = 0; order < s->directions; order++) scan_chunked<float, EXP>(scan_args(t, s, order), block);
}
static void run_lookback(float *const *t, const Sizes *s) {
    for (int order = 0; order < s->directions; order++) scan_lookback(scan_args(t, s, order));
}
static void run_bf16(float *const *t, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    __nv_bfloat16 *u = lab_to_bf16(t[IN_U], n), *dt = lab_to_bf16(t[IN_DT], n), *y = lab_to_bf16(NULL, n * s->directions);
    lab_timed_begin();
    for (int order = 0; order < s->directions; order++) {
        ScanArgs<float> f = scan_args(t, s, order);
        ScanArgs<__nv_bfloat16> p = {y + order * n, u, dt, f.Bt, f.Ct, f.A_log, f.D_skip, NULL, NULL, NULL, f.ldbc, order, f.B,
                                     f.T, f.P, f.D, f.N, 0, 0};
        scan_chunked<__nv_bfloat16, EXP_HARDWARE>(p, lab_block(s, 128, 256));
    }
    lab_timed_end();
    lab_from_bf16(t[OUT_Y], y, n * s->directions);
    free_check_cuda(u); free_check_cuda(dt); free_check_cuda(y);
}

static const LabKernel SCAN_KERNELS[] = {
    {run_ships, "ships: 4 lanes a channel, all operands staged, chunks, exp2f", NULL},
    {run_naive, "a thread for each clip and channel, states in local memory", NULL},
    {run_tiled<EXP_E>, "16 states in registers, Bt and Ct in shared memory", NULL},
    {run_tiled<EXP_2>, "exp2f of dt times a prescaled A", NULL},
    {run_tiled<EXP_HARDWARE>, "the hardware's 2^x", NULL},
    {run_lanes, "4 lanes a channel, 4 states each; u and dt staged", NULL},
    {run_warp, "a warp scans 32 positions", NULL},
    {run_block, "a block scans 8 positions a thread, work-efficient", NULL},
    {run_chunked<EXP_HARDWARE>, "5 on chunks of L, two passes", NULL},
    {run_lookback, "chunks with decoupled look-back, one pass", NULL},
    {run_chunked<EXP_MIXED>, "8, every sixth 2^x a polynomial", NULL},
    {NULL, NULL, NULL}
};
static const LabKernel BF16_KERNELS[] = {
    {run_ships, "ships, on float", NULL},
    {run_bf16, "scan's 8 on bf16 u, dt, y", NULL},
    {NULL, NULL, NULL}
};

enum { OUT_GATED, IN_XZ, IN_WEIGHT, IN_BIAS, IN_DTS, IN_X_DBLS, IN_A_LOGS, IN_D_SKIPS };  // all but xz: of each direction

static void layer_tensors(Lab *lab, const Sizes *s) {
    size_t rows = tokens_of(s), n = rows * s->C, D = s->C;
    lab_out(lab, OUT_GATED, "gated", n, 1e-11);
    lab_in(lab, IN_XZ, "xz", 2 * n, -1, 1);
    lab_in(lab, IN_WEIGHT, "weight", DIRECTIONS * D * TAPS, -1, 1);
    lab_in(lab, IN_BIAS, "bias", DIRECTIONS * D, -1, 1);
    lab_in(lab, IN_DTS, "dt", DIRECTIONS * n, 0.001, 0.2);
    lab_in(lab, IN_X_DBLS, "x_dbl", DIRECTIONS * rows * ldbc_of(s), -1, 1);
    lab_in(lab, IN_A_LOGS, "A_log", DIRECTIONS * D * s->N, 0, 2.8);
    lab_in(lab, IN_D_SKIPS, "D_skip", DIRECTIONS * D, 0, 2);
}

static LayerArgs layer_args(float *const *t, const Sizes *s) {
    LayerArgs p;
    p.gated = t[OUT_GATED], p.xz = t[IN_XZ];
    for (size_t g = 0; g < DIRECTIONS; g++) {
        p.weight[g] = t[IN_WEIGHT] + g * s->C * TAPS, p.bias[g] = t[IN_BIAS] + g * s->C;
        p.dt[g] = t[IN_DTS] + g * tokens_of(s) * s->C;
        p.Bt[g] = t[IN_X_DBLS] + g * tokens_of(s) * ldbc_of(s) + rank_of(s), p.Ct[g] = p.Bt[g] + s->N;
        p.A_log[g] = t[IN_A_LOGS] + g * s->C * s->N, p.D_skip[g] = t[IN_D_SKIPS] + g * s->C;
    }
    p.ldbc = ldbc_of(s), p.B = s->B, p.T = s->T, p.P = pixels_of(s), p.D = s->C, p.N = s->N;
    return p;
}

static void layer_reference(float *const *t, const Sizes *s) {
    LayerArgs p = layer_args(t, s);
    size_t n = tokens_of(s) * s->C;
    float *u = malloc_floats(n), *y = malloc_floats(n);
    for (int g = 0; g < DIRECTIONS; g++) {
        conv1d_silu_forward(u, p.xz, 2 * p.D, p.weight[g], p.bias[g], g, p.B, p.T, p.P, p.D, TAPS);
        selective_scan_forward(y, NULL, u, p.dt[g], p.Bt[g], p.Ct[g], p.ldbc, p.A_log[g], p.D_skip[g], g, p.B, p.T, p.P, p.D,
                               p.N, g > 0);
    }
    gate_forward(p.gated, y, p.xz, 1.0f / DIRECTIONS, (int)tokens_of(s), p.D);
    free(u); free(y);
}

static void run_layer_ships(float *const *t, const Sizes *s) {
    LayerArgs p = layer_args(t, s);
    size_t n = tokens_of(s) * s->C;
    float *u = malloc_floats_cuda(n), *y = malloc_floats_cuda(n);
    for (int g = 0; g < DIRECTIONS; g++) {
        conv1d_silu_forward_cuda(u, p.xz, 2 * p.D, p.weight[g], p.bias[g], g, p.B, p.T, p.P, p.D, TAPS);
        selective_scan_forward_cuda(y, NULL, u, p.dt[g], p.Bt[g], p.Ct[g], p.ldbc, p.A_log[g], p.D_skip[g], g, p.B, p.T, p.P,
                                    p.D, p.N, g > 0);
    }
    gate_forward_cuda(p.gated, y, p.xz, 1.0f / DIRECTIONS, (int)tokens_of(s), p.D);
    free_check_cuda(u); free_check_cuda(y);
}
static void run_by_direction(float *const *t, const Sizes *s) { layer_by_direction(layer_args(t, s)); }
static void run_at_once(float *const *t, const Sizes *s) { layer_at_once(layer_args(t, s)); }

static const LabKernel LAYER_KERNELS[] = {
    {run_layer_ships, "ships: conv1d + SiLU, scan, each direction; gate", NULL},
    {run_by_direction, "conv1d + SiLU + scan + gate in one kernel a direction", NULL},
    {run_at_once, "three directions over one read of x and z", NULL},
    {NULL, NULL, NULL}
};

// x, z, dt of three directions read, gated written; exps: elements and SiLU of u and z
static LabWork layer_work(const Sizes *s) {
    double rows = (double)tokens_of(s), D = s->C, elements = DIRECTIONS * rows * D * s->N;
    LabWork w = {4 * rows * ((3 + DIRECTIONS) * D + DIRECTIONS * 2.0 * s->N), elements + 4 * rows * D, elements};
    return w;
}

static const LabLadder LADDERS[] = {
    {"scan", SCAN_KERNELS, scan_tensors, NULL, scan_reference, scan_work, "element", "exp", gpu_exp_rate, NULL, 0},
    {"scan_bf16", BF16_KERNELS, scan_tensors_bf16, scan_derive_bf16, scan_reference, scan_work_bf16, "element", "exp",
     gpu_exp_rate, NULL, 0},
    {"layer", LAYER_KERNELS, layer_tensors, NULL, layer_reference, layer_work, "element", "exp", gpu_exp_rate, NULL, 0},
    {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}
};

static const Option SIZES[] = {SCAN_SIZES, {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C N dirs heads Pk E  block
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 1, 3, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 37, 16, 3, 0, 0, 0, 64, 0, 0, 0, 0, 0, ""},
    {1, 5, 6, 11, 9, 13, 3, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {1, 2, 17, 19, 5, 3, 2, 0, 0, 0, 128, 0, 0, 0, 0, 0, ""},
    {3, 1, 1, 67, 66, 16, 3, 0, 0, 0, 256, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

static void preset(Sizes *s) { s->C *= 2; }  // d_inner

static const LabProgram PROGRAM = {
    "The selective scan, forward, on an NVIDIA GPU. A unit is an element: a position, channel and state.", SIZES, preset,
    LADDERS, CHECKS, &LAB_GPU};

int main(int argc, char **argv) { return lab_cuda_main(&PROGRAM, argc, argv); }
