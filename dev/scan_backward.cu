/*
scan_backward.cu: the selective scan's gradients on an NVIDIA GPU, from stored states and atomics to neither.

    make dev && dev/scan_backward_cu all --preset b3.1        every version checked, then timed
    make lab_emu && dev/scan_backward_emu all                 without a GPU: checked on the CPU (dev/cudaemu.h), not timed

With e[s] = exp(dt[s] A), and passed[s] = e[s] g[s] what the gradient g[s] of h[s] hands on to position s - 1:
    g[s] = Ct[s] dy[s] + passed[s+1],   q[s] = passed[s] h[s-1]
    dCt[s] = sum_d dy h,   dBt[s] = sum_d g dt u                                            sums over channels
    du[s] = dt sum_n g Bt + D_skip dy,   ddt[s] = u sum_n g Bt + sum_n q A                   sums over states
    dA_log = A sum_s q dt,   dD_skip = sum_s dy u                                            sums over positions

What makes it hard: h is needed from the end to the beginning, 16 numbers for each one of u; and dBt and dCt are sums over all
channels, two for each position, channel and state ("element"). About 20 instructions an element are needed, and one exp; so
here the limit is instructions, not exps. Version 0 is train_vivim.cu's kernel. What forward left for backward, the states, is
made before the clock starts. Each version adds one idea:

  1  a thread for each clip and channel; forward stored every state; sums over channels by atomics, two for each element:
     the order of the sums, so the result's last bits, are another in every run
  2  no atomics: a warp's 32 channels are summed by shuffles, 5 rounds for each of a position's 32 sums, into the warp's own
     part; a second kernel adds the parts in fixed order. The same bits in every run
  3  forward stored only every 8th state; the 7 after it are computed again, into registers: an exp instead of 64 bytes. That
     is 32 numbers for 4 states, so four lanes share a channel
  4  sums by halves: in each round a lane hands half of its sums to its partner and takes over the partner's other half:
     16 + 8 + 4 shuffles for 32 sums over a warp's 8 channels, where rounds of all sums take 96
  5  the block's warps meet in shared memory: one part for all its channels, a fourth of the bytes
  6  chunks of L at the same time, in two passes as in forward: what a chunk hands on is linear, too
and in ladder "scan_back_bf16":
  1  version 6 on bf16 dy, u, dt, du, ddt; states, sums and all arithmetic in float

dev/README.md says what was counted in their machine code. Times are yet to be measured: there was no GPU here.
*/
#define VIVIM_PROGRAM "scan_backward_cu"
#include "scan_cuda.h"

enum { SEGMENT = 8, MOST_CHANNELS = 32 };  // positions from one stored state to the next; channels of a block
enum { BUTTERFLY, HALVES, BLOCK_SUMS };    // how sums over channels are made

template <typename X> struct BackArgs {  // as selective_scan_backward's; dBC (parts, B*L, {dBt, dCt}, 16); others below
    X *du, *ddt;
    float *dBC, *dA_log, *dD_skip;  // a part for each clip and chunk: (B, chunks, D, N), (B, chunks, D)
    const X *dy, *u, *dt;
    const float *Bt, *Ct, *A_log, *D_skip;
    const float *states, *starts;  // h before every SEGMENT-th position (B, segments, D, 16); passed behind each chunk, or NULL
    float *ends, *sums;            // of chunks: passed from 0, sum of dt
    int ldbc, order, B, T, P, D, N, length, chunks;
};

// states (B, ceil(L/every), D, 16): h before every `every`-th position. What forward leaves; not timed
__global__ static void scan_states_kernel(float *states, BackArgs<float> p, int every) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, L = p.T * p.P;
    float a[STATES], h[STATES];
    if (d >= p.D) return;
    rates<STATES, EXP_2>(a, p.A_log, d, 0, p.N);
    #pragma unroll
    for (int n = 0; n < STATES; n++) h[n] = 0.0f;
    for (int s = 0; s < L; s++) {
        size_t row = (size_t)blockIdx.y * L + scan_row(p.order, s, p.T, p.P);
        float *to = states + (((size_t)blockIdx.y * ceil_div(L, every) + s / every) * p.D + d) * STATES;
        float delta = p.dt[row * p.D + d], x = delta * p.u[row * p.D + d];
        #pragma unroll
        for (int n = 0; n < STATES; n++) {
            if (s % every == 0) to[n] = h[n];
            h[n] = exp2f(delta * a[n]) * h[n] + (n < p.N ? x * p.Bt[row * p.ldbc + n] : 0.0f);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 1, 2 A thread for each clip and channel, all states stored. grid (channels, clips)

__device__ static inline float sum_over_warp(float x) {
    #pragma unroll
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// ATOMIC: dBC has one part, and it, dA_log and dD_skip are 0 before
template <bool ATOMIC> __global__ static void __launch_bounds__(256) scan_stored_kernel(BackArgs<float> p) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, here = d < p.D, column = min_int(d, p.D - 1), L = p.T * p.P;
    int lane = threadIdx.x % 32;
    size_t clip = (size_t)blockIdx.y * L, part = ATOMIC ? 0 : (size_t)(d / 32) * p.B * L;
    float a[STATES], passed[STATES], dA[STATES], dskip = 0.0f, skip = p.D_skip[column];
    rates<STATES, EXP_2>(a, p.A_log, column, 0, p.N);
    #pragma unroll
    for (int n = 0; n < STATES; n++) passed[n] = dA[n] = 0.0f;
    for (int s = L - 1; s >= 0; s--) {
        size_t row = clip + scan_row(p.order, s, p.T, p.P), at = row * p.D + column;
        const float *before = p.states + ((clip + s) * p.D + column) * STATES;
        float delta = here ? p.dt[at] : 0.0f, v = here ? p.u[at] : 0.0f, dy = here ? p.dy[at] : 0.0f;
        float x = delta * v, dx = 0.0f, dexponent = 0.0f, *to = p.dBC + (part + row) * 2 * STATES, mine = 0.0f;
        #pragma unroll
        for (int n = 0; n < STATES; n++) {
            float b = n < p.N ? p.Bt[row * p.ldbc + n] : 0.0f, c = n < p.N ? p.Ct[row * p.ldbc + n] : 0.0f;
            float e = scan_exp2(delta * a[n]), h = e * before[n] + x * b, g = passed[n] + dy * c;
            if (ATOMIC) {
                if (here && n < p.N) atomicAdd(&to[n], g * x), atomicAdd(&to[STATES + n], dy * h);
            } else {  // lane n keeps the sum for dBt, lane 16 + n that for dCt
                float dB = sum_over_warp(g * x), dC = sum_over_warp(dy * h);
                mine = lane == n ? dB : lane == STATES + n ? dC : mine;
            }
            dx += g * b;
            passed[n] = g * e;
            float q = passed[n] * before[n];
            dexponent += q * a[n];
            dA[n] += q * delta;
        }
        if (!ATOMIC) to[lane] = mine;
        dskip += dy * v;
        if (here) p.du[at] = dx * delta + dy * skip, p.ddt[at] = dx * v + dexponent * LN_2;
    }
    if (!here) return;
    #pragma unroll
    for (int n = 0; n < STATES; n++) {  // dA_log = dA A, A = a ln 2
        if (n >= p.N) continue;
        if (ATOMIC) atomicAdd(&p.dA_log[(size_t)d * p.N + n], dA[n] * (a[n] * LN_2));
        else p.dA_log[((size_t)blockIdx.y * p.D + d) * p.N + n] = dA[n] * (a[n] * LN_2);
    }
    if (ATOMIC) atomicAdd(&p.dD_skip[d], dskip);
    else p.dD_skip[(size_t)blockIdx.y * p.D + d] = dskip;
}

// ------------------------------------------------------------------------------------------------------------------
// 3 to 6: four lanes a channel, 4 states each; a segment of 8 positions at a time. grid (channels, chunks, clips)

// tile[i] (channels) = row of x (B*L, D) at position i of a segment, zeros behind its end and channels behind D
template <typename X>
__device__ static inline void stage_channels(float (*tile)[MOST_CHANNELS], const X *x, const int *rows, int count, int D) {
    int channels = blockDim.x / 4;
    for (int i = threadIdx.x; i < SEGMENT * channels; i += blockDim.x) {
        int token = i / channels, c = i % channels, d = blockIdx.x * channels + c;
        tile[token][c] = token < count && d < D ? as_float(x[(size_t)rows[token] * D + d]) : 0.0f;
    }
}

// What a chunk hands on to the position before it, if nothing comes from behind: the first of two passes
template <typename X> __global__ static void __launch_bounds__(4 * MOST_CHANNELS, 8) scan_back_ends_kernel(BackArgs<X> p) {
    __shared__ float dt[SEGMENT][MOST_CHANNELS];
    __shared__ float dy[SEGMENT][MOST_CHANNELS];
    __shared__ float4 Ct[SEGMENT][4];
    __shared__ int rows[SEGMENT];
    int g = threadIdx.x % 4, j = threadIdx.x / 4, d = blockIdx.x * (blockDim.x / 4) + j, column = min_int(d, p.D - 1);
    int first = blockIdx.y * p.length, end = min_int(first + p.length, p.T * p.P);
    size_t place = ((size_t)blockIdx.z * p.chunks + blockIdx.y) * p.D + column;
    float a[4], passed[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum_dt = 0.0f;
    rates<4, EXP_2>(a, p.A_log, column, g * 4, p.N);
    for (int s0 = (end - 1) / SEGMENT * SEGMENT; s0 >= first; s0 -= SEGMENT) {
        int count = min_int(SEGMENT, end - s0);
        stage_rows<SEGMENT>(rows, p, blockIdx.z, s0);
        stage_channels(dt, p.dt, rows, count, p.D);
        stage_channels(dy, p.dy, rows, count, p.D);
        stage_states<SEGMENT>(Ct, p.Ct, rows, count, p.ldbc, p.N);
        __syncthreads();
        #pragma unroll
        for (int i = SEGMENT - 1; i >= 0; i--) {
            float delta = dt[i][j], c[4];
            load_states(c, (const float *)&Ct[i][g]);
            #pragma unroll
            for (int n = 0; n < 4; n++) passed[n] = scan_exp2(delta * a[n]) * (passed[n] + dy[i][j] * c[n]);
            sum_dt += delta;
        }
    }
    if (d >= p.D) return;
    store_states(p.ends + place * STATES + g * 4, passed);
    if (g == 0) p.sums[place] = sum_dt;
}

// SUMS: BUTTERFLY and HALVES write a part of dBC for each warp, BLOCK_SUMS one for each block of channels
template <typename X, int SUMS>
__global__ static void __launch_bounds__(4 * MOST_CHANNELS, SUMS == BLOCK_SUMS ? 3 : 2) scan_back_kernel(BackArgs<X> p) {
    __shared__ float u[SEGMENT][MOST_CHANNELS];
    __shared__ float dt[SEGMENT][MOST_CHANNELS];
    __shared__ float dy[SEGMENT][MOST_CHANNELS];
    __shared__ float4 Bt[SEGMENT][4];
    __shared__ float4 Ct[SEGMENT][4];
    __shared__ float4 sums[SUMS == BLOCK_SUMS ? MOST_CHANNELS / 8 : 1][SEGMENT][8];  // warp, position, {dBt, dCt} of 16 states
    __shared__ int rows[SEGMENT];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane % 4, j = threadIdx.x / 4;
    int d = blockIdx.x * (blockDim.x / 4) + j, here = d < p.D, column = min_int(d, p.D - 1), L = p.T * p.P;
    int first = blockIdx.y * p.length, end = min_int(first + p.length, L);
    size_t place = ((size_t)blockIdx.z * p.chunks + blockIdx.y) * p.D + column, parts_rows = (size_t)p.B * L;
    float a[4], passed[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dA[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dskip = 0.0f, skip = p.D_skip[column];
    float4 *part = (float4 *)p.dBC + (SUMS == BLOCK_SUMS ? blockIdx.x : blockIdx.x * warps + warp) * parts_rows * 8;
    rates<4, EXP_2>(a, p.A_log, column, g * 4, p.N);
    if (p.starts) load_states(passed, p.starts + place * STATES + g * 4);
    for (int s0 = (end - 1) / SEGMENT * SEGMENT; s0 >= first; s0 -= SEGMENT) {
        int count = min_int(SEGMENT, end - s0);
        stage_rows<SEGMENT>(rows, p, blockIdx.z, s0);
        stage_channels(u, p.u, rows, count, p.D);
        stage_channels(dt, p.dt, rows, count, p.D);
        stage_channels(dy, p.dy, rows, count, p.D);
        stage_states<SEGMENT>(Bt, p.Bt, rows, count, p.ldbc, p.N);
        stage_states<SEGMENT>(Ct, p.Ct, rows, count, p.ldbc, p.N);
        __syncthreads();
        float e[SEGMENT][4], h[SEGMENT + 1][4];
        size_t stored = ((size_t)blockIdx.z * ceil_div(L, SEGMENT) + s0 / SEGMENT) * p.D + column;
        load_states(h[0], p.states + stored * STATES + g * 4);
        #pragma unroll
        for (int i = 0; i < SEGMENT; i++) {  // replay
            float delta = dt[i][j], x = delta * u[i][j], b[4];
            load_states(b, (const float *)&Bt[i][g]);
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                e[i][n] = scan_exp2(delta * a[n]);
                h[i + 1][n] = e[i][n] * h[i][n] + x * b[n];
            }
        }
        #pragma unroll
        for (int i0 = SEGMENT - 4; i0 >= 0; i0 -= 4) {  // and back
            float dx[4], dexponent[4], dbc[32];  // dbc (4 positions, {dBt, dCt}, 4 states)
            #pragma unroll
            for (int k = 3; k >= 0; k--) {
                int i = i0 + k;
                float delta = dt[i][j], v = u[i][j], x = delta * v, dy_i = dy[i][j], b[4], c[4];
                load_states(b, (const float *)&Bt[i][g]);
                load_states(c, (const float *)&Ct[i][g]);
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
                dskip += dy_i * v;
            }
            if (SUMS == BUTTERFLY) {  // over the warp's 8 channels; lane g of the first writes
                #pragma unroll
                for (int k = 0; k < 32; k++)
                    #pragma unroll
                    for (int o = 4; o < 32; o *= 2) dbc[k] += __shfl_xor_sync(0xffffffffu, dbc[k], o);
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (lane >= 4 || i0 + k >= count) continue;
                    store_states((float *)&part[(size_t)rows[i0 + k] * 8 + g], dbc + k * 8);
                    store_states((float *)&part[(size_t)rows[i0 + k] * 8 + 4 + g], dbc + k * 8 + 4);
                }
            } else {
                fold<32, 16, 4>(dbc);  // lane l has position i0 + l/8, states 4 g .. of dBt if l/4 is even, else of dCt
                int i = i0 + lane / 8, k = lane / 4 % 2 * 4 + g;
                if (SUMS == BLOCK_SUMS) store_states((float *)&sums[warp][i][k], dbc);
                else if (i < count) store_states((float *)&part[(size_t)rows[i] * 8 + k], dbc);
            }
            fold<4, 2, 1>(dx);  // lane g has position i0 + g
            fold<4, 2, 1>(dexponent);
            int i = i0 + g;
            size_t to = (size_t)rows[i] * p.D + column;
            if (i < count && here) {
                store_as(&p.du[to], dx[0] * dt[i][j] + dy[i][j] * skip);
                store_as(&p.ddt[to], dx[0] * u[i][j] + dexponent[0] * LN_2);
            }
        }
        if (SUMS != BLOCK_SUMS) continue;
        __syncthreads();
        for (int i = warp; i < count; i += warps) {
            float sum = 0.0f;
            for (int w = 0; w < warps; w++) sum += ((const float *)sums[w][i])[lane];
            ((float *)part)[(size_t)rows[i] * 2 * STATES + lane] = sum;
        }
    }
    if (!here) return;
    if (g == 0) p.dD_skip[place] = dskip;
    #pragma unroll
    for (int n = 0; n < 4; n++)
        if (g * 4 + n < p.N) p.dA_log[place * p.N + g * 4 + n] = dA[n] * (a[n] * LN_2);
}

// dBt, dCt (rows, N) = sums of dBC over its parts
__global__ static void scan_back_finish_kernel(float *dBt, float *dCt, const float *dBC, int parts, size_t rows, int N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / (2 * STATES);
    int k = (int)(i % (2 * STATES)), n = k % STATES;
    if (row >= rows || n >= N) return;
    float sum = 0.0f;
    #pragma unroll 4
    for (int part = 0; part < parts; part++) sum += dBC[part * rows * 2 * STATES + i];
    (k < STATES ? dBt : dCt)[row * N + n] = sum;
}

// ------------------------------------------------------------------------------------------------------------------
// The ladders

enum { OUT_DU, OUT_DDT, OUT_DBT, OUT_DCT, ADD_DA_LOG, ADD_DD_SKIP, IN_DY, IN_U, IN_DT, IN_X_DBL, IN_A_LOG, IN_D_SKIP };

static void tensors_limit(Lab *lab, const Sizes *s, double limit) {
    size_t rows = tokens_of(s), n = rows * s->C, D = s->C, N = s->N, directions = s->directions;
    lab_out(lab, OUT_DU, "du", directions * n, limit);  // outputs of each direction
    lab_out(lab, OUT_DDT, "ddt", directions * n, limit);
    lab_out(lab, OUT_DBT, "dBt", directions * rows * N, 1e-10);
    lab_out(lab, OUT_DCT, "dCt", directions * rows * N, 1e-10);
    lab_add(lab, ADD_DA_LOG, "dA_log", D * N, 1e-10);
    lab_add(lab, ADD_DD_SKIP, "dD_skip", D, 1e-10);
    lab_in(lab, IN_DY, "dy", n, -1, 1);
    lab_in(lab, IN_U, "u", n, -1, 1);
    lab_in(lab, IN_DT, "dt", n, 0.001, 0.2);
    lab_in(lab, IN_X_DBL, "x_dbl", rows * ldbc_of(s), -1, 1);
    lab_in(lab, IN_A_LOG, "A_log", D * N, 0, 2.8);
    lab_in(lab, IN_D_SKIP, "D_skip", D, 0, 2);
}
static void tensors(Lab *lab, const Sizes *s) { tensors_limit(lab, s, 1e-10); }
static void tensors_bf16(Lab *lab, const Sizes *s) { tensors_limit(lab, s, 1.6e-5); }  // du, ddt are rounded: 2^-8

static void derive_bf16(float *const *host, const Sizes *s) {
    for (int i = IN_DY; i <= IN_DT; i++) lab_cut_to_bf16(host[i], tokens_of(s) * s->C);
}

static void reference(float *const *t, const Sizes *s) {
    size_t rows = tokens_of(s), n = rows * s->C;
    int P = pixels_of(s);
    const float *Bt = t[IN_X_DBL] + rank_of(s), *Ct = Bt + s->N;
    float *states = malloc_floats(selective_scan_states(s->B, s->T, P, s->C, s->N)), *y = malloc_floats(n);
    for (int order = 0; order < s->directions; order++) {
        selective_scan_forward(y, states, t[IN_U], t[IN_DT], Bt, Ct, ldbc_of(s), t[IN_A_LOG], t[IN_D_SKIP], order, s->B, s->T,
                               P, s->C, s->N, 0);
        selective_scan_backward(t[OUT_DU] + order * n, t[OUT_DDT] + order * n, t[OUT_DBT] + order * rows * s->N,
                                t[OUT_DCT] + order * rows * s->N, s->N, t[ADD_DA_LOG], t[ADD_DD_SKIP], t[IN_DY], t[IN_U],
                                t[IN_DT], Bt, Ct, ldbc_of(s), t[IN_A_LOG], t[IN_D_SKIP], states, order, s->B, s->T, P, s->C,
                                s->N);
    }
    free(states); free(y);
}

// dy, u, dt read and du, ddt written for each direction, and Bt, Ct, dBt, dCt; 22 floating point operations and an exp each
static LabWork work_bytes(const Sizes *s, double bytes) {
    double rows = (double)tokens_of(s) * s->directions, elements = rows * s->C * s->N;
    LabWork w = {rows * (5 * bytes * s->C + 16.0 * s->N), elements, elements};
    return w;
}
static LabWork work(const Sizes *s) { return work_bytes(s, 4); }
static LabWork work_bf16(const Sizes *s) { return work_bytes(s, 2); }

static BackArgs<float> back_args(float *const *t, const Sizes *s, int order) {
    size_t n = tokens_of(s) * s->C;
    const float *Bt = t[IN_X_DBL] + rank_of(s);
    BackArgs<float> p = {t[OUT_DU] + order * n, t[OUT_DDT] + order * n, NULL, NULL, NULL, t[IN_DY], t[IN_U], t[IN_DT], Bt,
                         Bt + s->N, t[IN_A_LOG], t[IN_D_SKIP], NULL, NULL, NULL, NULL, ldbc_of(s), order, s->B, s->T,
                         pixels_of(s), s->C, s->N, s->T * pixels_of(s), 1};
    return p;
}

static void run_ships(float *const *t, const Sizes *s) {
    size_t rows = tokens_of(s), n = rows * s->C, size = selective_scan_states_cuda(s->B, s->T, pixels_of(s), s->C, s->N);
    float *states = malloc_floats_cuda(s->directions * size), *y = malloc_floats_cuda(n);
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> p = back_args(t, s, order);
        selective_scan_forward_cuda(y, states + order * size, p.u, p.dt, p.Bt, p.Ct, p.ldbc, p.A_log, p.D_skip, order, p.B, p.T,
                                    p.P, p.D, p.N, 0);
    }
    lab_timed_begin();
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> p = back_args(t, s, order);
        selective_scan_backward_cuda(p.du, p.ddt, t[OUT_DBT] + order * rows * p.N, t[OUT_DCT] + order * rows * p.N, p.N,
                                     t[ADD_DA_LOG], t[ADD_DD_SKIP], p.dy, p.u, p.dt, p.Bt, p.Ct, p.ldbc, p.A_log, p.D_skip,
                                     states + order * size, order, p.B, p.T, p.P, p.D, p.N);
    }
    lab_timed_end();
    free_check_cuda(states); free_check_cuda(y);
}

// h before every `every`-th position, of all directions
static float *make_states(float *const *t, const Sizes *s, int every, size_t *size) {
    *size = (size_t)s->B * ceil_div(s->T * pixels_of(s), every) * s->C * STATES;
    float *states = malloc_floats_cuda(s->directions * *size);
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> p = back_args(t, s, order);
        scan_states_kernel<<<dim3(ceil_div(s->C, 32), s->B), 32, 0, stream_cuda>>>(states + order * *size, p, every);
        cudaCheck(cudaGetLastError());
    }
    return states;
}

// makes room for the parts of the sums over channels and over positions; free_check_cuda(dBC)
template <typename X> static void parts_alloc(BackArgs<X> *p, int parts) {
    size_t rows = (size_t)p->B * p->T * p->P, places = (size_t)p->B * p->chunks * p->D;
    p->dBC = malloc_floats_cuda(parts * rows * 2 * STATES + places * (p->N + 1));
    p->dA_log = p->dBC + parts * rows * 2 * STATES, p->dD_skip = p->dA_log + places * p->N;
}

template <typename X> static void parts_sum(float *const *t, const BackArgs<X> *p, int parts) {
    size_t rows = (size_t)p->B * p->T * p->P;
    float *dBt = t[OUT_DBT] + p->order * rows * p->N, *dCt = t[OUT_DCT] + p->order * rows * p->N;
    scan_back_finish_kernel<<<blocks_for(rows * 2 * STATES, 256), 256, 0, stream_cuda>>>(dBt, dCt, p->dBC, parts, rows, p->N);
    cudaCheck(cudaGetLastError());
    finish_sums(t[ADD_DA_LOG], NULL, NULL, p->dA_log, p->B * p->chunks, p->D * p->N, 1.0f, 1);
    finish_sums(t[ADD_DD_SKIP], NULL, NULL, p->dD_skip, p->B * p->chunks, p->D, 1.0f, 1);
}

template <bool ATOMIC> static void run_stored(float *const *t, const Sizes *s) {
    int block = lab_block(s, 64, 256);
    size_t size;
    float *states = make_states(t, s, 1, &size);
    lab_timed_begin();
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> p = back_args(t, s, order);
        dim3 grid(ceil_div(p.D, block), p.B);
        int parts = ATOMIC ? 1 : grid.x * (block / 32);
        parts_alloc(&p, parts);
        float *dBC = p.dBC;
        p.states = states + order * size;
        if (ATOMIC) {
            zero_floats_cuda(p.dBC, tokens_of(s) * 2 * STATES);
            p.dA_log = t[ADD_DA_LOG], p.dD_skip = t[ADD_DD_SKIP];
        }
        scan_stored_kernel<ATOMIC><<<grid, block, 0, stream_cuda>>>(p);
        cudaCheck(cudaGetLastError());
        if (ATOMIC) {
            float *dBt = t[OUT_DBT] + order * tokens_of(s) * p.N, *dCt = t[OUT_DCT] + order * tokens_of(s) * p.N;
            unsigned blocks = blocks_for(tokens_of(s) * 2 * STATES, 256);
            scan_back_finish_kernel<<<blocks, 256, 0, stream_cuda>>>(dBt, dCt, dBC, 1, tokens_of(s), p.N);
            cudaCheck(cudaGetLastError());
        } else parts_sum(t, &p, parts);
        free_check_cuda(dBC);
    }
    lab_timed_end();
    free_check_cuda(states);
}

template <typename X, int SUMS> static void scan_back(float *const *t, BackArgs<X> p, int block, int chunked) {
    int L = p.T * p.P, segments = ceil_div(L, SEGMENT), blocks = ceil_div(4 * p.D, block), warps = blocks * (block / 32) * p.B;
    int parts = SUMS == BLOCK_SUMS ? blocks : blocks * (block / 32);
    p.length = chunked ? ceil_div(segments, max_int(1, min_int(segments, WARPS_WANTED / warps))) * SEGMENT : L;
    p.chunks = ceil_div(L, p.length);
    parts_alloc(&p, parts);
    dim3 grid(blocks, p.chunks, p.B);
    size_t states = (size_t)p.B * p.chunks * p.D * STATES;
    float *joined = p.chunks > 1 ? malloc_floats_cuda(2 * states + states / STATES) : NULL;
    if (joined) {
        p.ends = joined + states, p.sums = joined + 2 * states;
        scan_back_ends_kernel<X><<<grid, block, 0, stream_cuda>>>(p);
        cudaCheck(cudaGetLastError());
        scan_starts_kernel<<<blocks_for((size_t)p.B * p.D * STATES, 128), 128, 0, stream_cuda>>>(joined, p.ends, p.sums,
                                                                                                p.A_log, p.B, p.chunks, p.D,
                                                                                                p.N, 1);
        cudaCheck(cudaGetLastError());
        p.starts = joined;
    }
    scan_back_kernel<X, SUMS><<<grid, block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
    parts_sum(t, &p, parts);
    free_check_cuda(p.dBC);
    free_check_cuda(joined);
}

template <int SUMS, int CHUNKED> static void run_replayed(float *const *t, const Sizes *s) {
    size_t size;
    float *states = make_states(t, s, SEGMENT, &size);
    lab_timed_begin();
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> p = back_args(t, s, order);
        p.states = states + order * size;
        scan_back<float, SUMS>(t, p, lab_block(s, 128, 4 * MOST_CHANNELS), CHUNKED);
    }
    lab_timed_end();
    free_check_cuda(states);
}

static void run_bf16(float *const *t, const Sizes *s) {
    size_t size, n = tokens_of(s) * s->C, all = n * s->directions;
    float *states = make_states(t, s, SEGMENT, &size);
    __nv_bfloat16 *dy = lab_to_bf16(t[IN_DY], n), *u = lab_to_bf16(t[IN_U], n), *dt = lab_to_bf16(t[IN_DT], n);
    __nv_bfloat16 *du = lab_to_bf16(NULL, all), *ddt = lab_to_bf16(NULL, all);
    lab_timed_begin();
    for (int order = 0; order < s->directions; order++) {
        BackArgs<float> f = back_args(t, s, order);
        BackArgs<__nv_bfloat16> p = {du + order * n, ddt + order * n, NULL, NULL, NULL, dy, u, dt, f.Bt, f.Ct, f.A_log,
                                     f.D_skip, states + order * size, NULL, NULL, NULL, f.ldbc, order, f.B, f.T, f.P, f.D, f.N,
                                     0, 1};
        scan_back<__nv_bfloat16, BLOCK_SUMS>(t, p, lab_block(s, 128, 4 * MOST_CHANNELS), 1);
    }
    lab_timed_end();
    lab_from_bf16(t[OUT_DU], du, all);
    lab_from_bf16(t[OUT_DDT], ddt, all);
    free_check_cuda(states); free_check_cuda(dy); free_check_cuda(u); free_check_cuda(dt); free_check_cuda(du);
    free_check_cuda(ddt);
}

static const LabKernel KERNELS[] = {
    {run_ships, "ships: every 16th state, halves, block sums, chunks, exp2f", NULL},
    {run_stored<true>, "all states stored, atomics", NULL},
    {run_stored<false>, "warp sums by shuffles, no atomics", NULL},
    {run_replayed<BUTTERFLY, 0>, "every 8th state stored, 4 lanes a channel", NULL},
    {run_replayed<HALVES, 0>, "sums by halves", NULL},
    {run_replayed<BLOCK_SUMS, 0>, "sums of a block's warps in shared memory", NULL},
    {run_replayed<BLOCK_SUMS, 1>, "chunks of L, two passes", NULL},
    {NULL, NULL, NULL}
};
static const LabKernel BF16_KERNELS[] = {
    {run_ships, "ships, on float", NULL},
    {run_bf16, "scan_back's 6 on bf16 dy, u, dt, du, ddt", NULL},
    {NULL, NULL, NULL}
};

static const LabLadder LADDERS[] = {
    {"scan_back", KERNELS, tensors, NULL, reference, work, "element", "exp", gpu_exp_rate, NULL, 0},
    {"scan_back_bf16", BF16_KERNELS, tensors_bf16, derive_bf16, reference, work_bf16, "element", "exp", gpu_exp_rate, NULL, 0},
    {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}
};

static const Option SIZES[] = {SCAN_SIZES, {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C N dirs heads Pk E  block
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 1, 3, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 37, 16, 3, 0, 0, 0, 64, 0, 0, 0, 0, 0, ""},
    {1, 5, 3, 11, 9, 13, 3, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {3, 1, 1, 67, 66, 16, 2, 0, 0, 0, 256, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

static void preset(Sizes *s) { s->C *= 2; }  // d_inner

static const LabProgram PROGRAM = {
    "The selective scan, backward, on an NVIDIA GPU. A unit is an element: a position, channel and state.", SIZES, preset,
    LADDERS, CHECKS, &LAB_GPU};

int main(int argc, char **argv) { return lab_cuda_main(&PROGRAM, argc, argv); }
