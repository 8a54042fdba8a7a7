/* scan_forward.c - the selective scan, forward: from the textbook's loops to train_vivim.c's selective_scan_forward.

   Build:  make dev/scan_forward
   Run:    dev/scan_forward                          the whole ladder on stage 1 of b3: all that one ST-Mamba layer scans
           dev/scan_forward 0,6 --preset b0.2 --threads 1

   For each clip, channel d and state n, along the order in which a direction visits the L = T*H*W tokens:
       h[s] = e[s] h[s-1] + dt[s] u[s] Bt[s],  e[s] = exp(dt[s] A),  A = -exp(A_log);     y[s] = sum_n Ct[s] h[s] + D_skip u[s]
   A layer scans in three directions and adds the three y. The limit: one exp and three multiply-adds for each (token, channel,
   state), with all numbers in registers, as fast as this machine did them in the same run.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, ns per (token, channel, state) (percent of the limit):
   0  0.28 (65)    1  11.5 (2)    2  7.13 (3)    3  5.07 (4)    4  0.942 (19)    5  0.344 (53)    6  0.625 (29)
   7  0.432 (42)    8  0.332 (55)    9  1.08 (17) */
#define VIVIM_PROGRAM "scan_forward"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"

// G directions: y (B, L, D), the sum; u, dt (G, B, L, D); Bt and Ct side by side: bc (G, B, L, 2N); A_log (G, D, N);
// D_skip (G, D)
enum { OUT_Y, IN_U, IN_DT, IN_BC, IN_A_LOG, IN_D_SKIP };

typedef struct {  // one direction; the first sets y, the others add to it
    float *y;
    const float *u, *dt, *bc, *A_log, *D_skip;
    int order, add, B, T, P, L, D, N;
} Direct;

static Direct direction(float *const *t, const Sizes *s, int g) {
    size_t D = (size_t)s->C, N = (size_t)s->N, rows = tokens_of(s), n = g * rows * D;
    Direct p = {t[OUT_Y], t[IN_U] + n, t[IN_DT] + n, t[IN_BC] + g * rows * 2 * N, t[IN_A_LOG] + g * D * N, t[IN_D_SKIP] + g * D,
                g, g > 0, s->B, s->T, s->H * s->W, s->T * s->H * s->W, s->C, s->N};
    return p;
}
static size_t row_of(const Direct *p, int b, int s) { return (size_t)b * p->L + scan_row(p->order, s, p->T, p->P); }

static void ships(const Direct *p) {
    selective_scan_forward(p->y, NULL, p->u, p->dt, p->bc, p->bc + p->N, 2 * p->N, p->A_log, p->D_skip, p->order, p->B, p->T,
                           p->P, p->D, p->N, p->add);
}
static void scan_ships(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        ships(&p);
    }
}

// 1: as mamba-minimal writes it: first e and dt u B of all (token, channel, state), then the recurrence, then the sum over n
static void scan_textbook(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        size_t D = (size_t)p.D, N = (size_t)p.N, all = (size_t)p.L * D * N;
        float *e = lab_floats(all), *x = lab_floats(all), *h = lab_floats(D * N);
        for (int b = 0; b < p.B; b++) {
            for (int i = 0; i < p.L; i++)
                for (size_t d = 0; d < D; d++)
                    for (size_t n = 0; n < N; n++) {
                        size_t row = row_of(&p, b, i), at = ((size_t)i * D + d) * N + n;
                        e[at] = expf(p.dt[row * D + d] * -expf(p.A_log[d * N + n]));
                        x[at] = p.dt[row * D + d] * p.u[row * D + d] * p.bc[row * 2 * N + n];
                    }
            zero_floats(h, D * N);
            for (int i = 0; i < p.L; i++)
                for (size_t d = 0; d < D; d++) {
                    size_t row = row_of(&p, b, i);
                    float sum = p.D_skip[d] * p.u[row * D + d];
                    for (size_t n = 0; n < N; n++) {
                        h[d * N + n] = e[((size_t)i * D + d) * N + n] * h[d * N + n] + x[((size_t)i * D + d) * N + n];
                        sum += h[d * N + n] * p.bc[row * 2 * N + N + n];
                    }
                    p.y[row * D + d] = p.add ? p.y[row * D + d] + sum : sum;
                }
        }
        free(h); free(x); free(e);
    }
}

// A = -exp(A_log), times log2(e) for 2^x: (D, N), or with the channels as neighbours (N, D)
static float *rates_of(const Direct *p, double scale, int channels_last) {
    float *A = lab_floats((size_t)p->D * p->N);
    for (int d = 0; d < p->D; d++)
        for (int n = 0; n < p->N; n++)
            A[channels_last ? n * p->D + d : d * p->N + n] = (float)(-scale * (double)expf(p->A_log[d * p->N + n]));
    return A;
}

// 2: nothing is stored: one channel after the other goes through all tokens, its N states in the first cache
static void scan_channels_outside(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        float *A = rates_of(&p, 1, 0), *h = lab_floats((size_t)p.N);
        for (int b = 0; b < p.B; b++)
            for (int d = 0; d < p.D; d++) {
                memset(h, 0, (size_t)p.N * sizeof(float));
                for (int i = 0; i < p.L; i++) {
                    size_t row = row_of(&p, b, i), at = row * p.D + d;
                    const float *bc = p.bc + row * 2 * p.N;
                    float delta = p.dt[at], x = delta * p.u[at], sum = p.D_skip[d] * p.u[at];
                    for (int n = 0; n < p.N; n++) {
                        h[n] = expf(delta * A[d * p.N + n]) * h[n] + x * bc[n];
                        sum += h[n] * bc[p.N + n];
                    }
                    p.y[at] = p.add ? p.y[at] + sum : sum;
                }
            }
        free(h); free(A);
    }
}

// 3, 4: tokens outside: a row of D channels is read from memory once, whole; all D N states stay in the caches.
// polynomial: 2^x by exp2_simd, and the loop over states becomes a vector, with a sum across its lanes at the end.
ALWAYS_INLINE void tokens_outside(float *const *t, const Sizes *s, const int polynomial) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        float *A = rates_of(&p, polynomial ? LOG2_E : 1, 0), *states = lab_floats((size_t)p.D * p.N);
        for (int b = 0; b < p.B; b++) {
            zero_floats(states, (size_t)p.D * p.N);
            for (int i = 0; i < p.L; i++) {
                size_t row = row_of(&p, b, i);
                const float *RESTRICT bc = p.bc + row * 2 * p.N;
                for (int d = 0; d < p.D; d++) {
                    size_t at = row * p.D + d;
                    float delta = p.dt[at], x = delta * p.u[at], sum = 0.0f;
                    float *RESTRICT h = states + d * p.N, *RESTRICT a = A + d * p.N;
                    if (polynomial) {
                        #pragma omp simd reduction(+ : sum)
                        for (int n = 0; n < p.N; n++) {
                            h[n] = exp2_simd(delta * a[n]) * h[n] + x * bc[n];
                            sum += h[n] * bc[p.N + n];
                        }
                    } else
                        for (int n = 0; n < p.N; n++) {
                            h[n] = expf(delta * a[n]) * h[n] + x * bc[n];
                            sum += h[n] * bc[p.N + n];
                        }
                    sum += p.D_skip[d] * p.u[at];
                    p.y[at] = p.add ? p.y[at] + sum : sum;
                }
            }
        }
        free(states); free(A);
    }
}
static void scan_tokens_outside(float *const *t, const Sizes *s) { tokens_outside(t, s, 0); }
static void scan_over_N(float *const *t, const Sizes *s) { tokens_outside(t, s, 1); }

// 5: lanes are channels, a state at a time: no sum across lanes, but y passes through memory N times
static void scan_over_D(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        float *A = rates_of(&p, LOG2_E, 1), *states = lab_floats((size_t)p.D * p.N);
        for (int b = 0; b < p.B; b++) {
            zero_floats(states, (size_t)p.D * p.N);
            for (int i = 0; i < p.L; i++) {
                size_t row = row_of(&p, b, i), at = row * p.D;
                const float *RESTRICT dt = p.dt + at, *RESTRICT u = p.u + at, *bc = p.bc + row * 2 * p.N;
                float *RESTRICT y = p.y + at;
                #pragma omp simd
                for (int d = 0; d < p.D; d++) y[d] = (p.add ? y[d] : 0.0f) + p.D_skip[d] * u[d];
                for (int n = 0; n < p.N; n++) {
                    float *RESTRICT h = states + (size_t)n * p.D, *RESTRICT a = A + (size_t)n * p.D;
                    const float Bt = bc[n], Ct = bc[p.N + n];
                    #pragma omp simd
                    for (int d = 0; d < p.D; d++) {
                        h[d] = exp2_simd(dt[d] * a[d]) * h[d] + dt[d] * u[d] * Bt;
                        y[d] += h[d] * Ct;
                    }
                }
            }
        }
        free(states); free(A);
    }
}

// 16 channels as the lanes of a vector, the loop over states unrolled inside: tokens s0 .. s1 with states h (N, 16). As
// train_vivim.c's scan_forward_block, which also prefetches.
ALWAYS_INLINE void lanes_of_channels(const Direct *p, float *h, const float *a, int b, int d, int s0, int s1, int N,
                                     int lanes) {
    for (int i = s0; i < s1; i++) {
        size_t row = row_of(p, b, i), at = row * p->D + d;
        const float *u = p->u + at, *dt = p->dt + at, *bc = p->bc + row * 2 * p->N, *skip = p->D_skip + d;
        float *y = p->y + at;
        #pragma omp simd
        for (int j = 0; j < lanes; j++) {
            float delta = dt[j], x = delta * u[j], sum = skip[j] * u[j];
            UNROLL
            for (int n = 0; n < N; n++) {
                int nj = n * SCAN_LANES + j;
                float h_n = exp2_simd(delta * a[nj]) * h[nj] + x * bc[n];
                h[nj] = h_n;
                sum += h_n * bc[N + n];
            }
            y[j] = p->add ? y[j] + sum : sum;
        }
    }
}
static void scan_block(const Direct *p, float *h, const float *a, int b, int d, int s0, int s1) {
    if (p->N == 16 && p->D - d >= SCAN_LANES) lanes_of_channels(p, h, a, b, d, s0, s1, 16, SCAN_LANES);
    else lanes_of_channels(p, h, a, b, d, s0, s1, p->N, min_int(SCAN_LANES, p->D - d));
}

// the states of all blocks, at zero, and their rates behind them: (2, B, blocks, N, 16)
static float *states_and_rates(const Direct *p) {
    int blocks = ceil_div(p->D, SCAN_LANES);
    size_t state = (size_t)p->N * SCAN_LANES, n = (size_t)p->B * blocks * state;
    float *h = lab_floats(2 * n), *a = h + n;
    zero_floats(h, 2 * n);
    for (int b = 0; b < p->B; b++)
        for (int d = 0; d < p->D; d++)
            for (int k = 0; k < p->N; k++)
                a[(size_t)b * blocks * state + rate_at(d, k, p->N)] = -LOG2_E * exp_simd(p->A_log[(size_t)d * p->N + k]);
    return h;
}

// 6, 7: threads take blocks of 16 channels, tokens in chunks: of all tokens (6), or of 32, the blocks one after the other on
// each, so that a row that was fetched for one block is still in cache for the next (7)
static void scan_chunks(float *const *t, const Sizes *s, int chunk) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        int blocks = ceil_div(p.D, SCAN_LANES);
        size_t state = (size_t)p.N * SCAN_LANES;
        float *h = states_and_rates(&p), *a = h + (size_t)p.B * blocks * state;
        #pragma omp parallel
        for (int s0 = 0; s0 < p.L; s0 += chunk) {
            #pragma omp for schedule(static) nowait
            for (int task = 0; task < p.B * blocks; task++)
                scan_block(&p, h + task * state, a + task * state, task / blocks, task % blocks * SCAN_LANES, s0,
                           min_int(s0 + chunk, p.L));
        }
        free(h);
    }
}
static void scan_lanes(float *const *t, const Sizes *s) { scan_chunks(t, s, s->T * s->H * s->W); }
static void scan_chunked(float *const *t, const Sizes *s) { scan_chunks(t, s, SCAN_CHUNK); }

// 8: threads take directions; each direction has a y of its own, added at the end
static void scan_directions(float *const *t, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    float *y = lab_floats(n * s->directions);
    #pragma omp parallel for schedule(static, 1)
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        p.y = y + g * n, p.add = 0;
        ships(&p);
    }
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        float sum = 0.0f;
        for (int g = 0; g < s->directions; g++) sum += y[g * n + i];
        t[OUT_Y][i] = sum;
    }
    free(y);
}

// 9: threads take pieces of the sequence, as GPUs must: 8 segments begin at h = 0; what a segment inherits decays over it by
// 2^(a sum dt), so that the true beginnings follow one from the other; then all run again from these. Each exp twice.
static void scan_segments(float *const *t, const Sizes *s) {
    enum { SEGMENTS = 8 };
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g), nowhere = p;
        int blocks = ceil_div(p.D, SCAN_LANES), tasks = p.B * blocks;
        size_t state = (size_t)p.N * SCAN_LANES, all = tasks * state;
        float *h = states_and_rates(&p), *a = h + all, *begin = lab_floats((SEGMENTS + 1) * all);
        float *sum = lab_floats((size_t)SEGMENTS * tasks * SCAN_LANES), *discarded = lab_floats(tokens_of(s) * p.D);
        nowhere.y = discarded, nowhere.add = 0;
        zero_floats(begin, (SEGMENTS + 1) * all);
        zero_floats(sum, (size_t)SEGMENTS * tasks * SCAN_LANES);
        for (int pass = 0; pass < 2; pass++) {
            #pragma omp parallel for schedule(static)
            for (int task = 0; task < (SEGMENTS - 1 + pass) * tasks; task++) {  // nobody inherits from the last
                int k = task / tasks, block = task % tasks, b = block / blocks, d = block % blocks * SCAN_LANES;
                int s0 = (int)((int64_t)p.L * k / SEGMENTS), s1 = (int)((int64_t)p.L * (k + 1) / SEGMENTS);
                float *end = pass ? begin + k * all + block * state : begin + (k + 1) * all + block * state;
                scan_block(pass ? &p : &nowhere, end, a + block * state, b, d, s0, s1);
                for (int i = s0; !pass && i < s1; i++)
                    for (int j = 0; j < min_int(SCAN_LANES, p.D - d); j++)
                        sum[(size_t)task * SCAN_LANES + j] += p.dt[row_of(&p, b, i) * p.D + d + j];
            }
            for (int k = 1; !pass && k < SEGMENTS; k++)
                for (size_t i = 0; i < all; i++)
                    begin[k * all + i] += begin[(k - 1) * all + i] *
                        exp2_simd(a[i] * sum[((size_t)(k - 1) * tasks + i / state) * SCAN_LANES + i % SCAN_LANES]);
        }
        free(discarded); free(sum); free(begin); free(h);
    }
}

static const LabKernel KERNELS[] = {
    {scan_ships, "ships: 7, rows fetched 32 tokens ahead", NULL},
    {scan_textbook, "textbook: all exps, then the recurrence", NULL},
    {scan_channels_outside, "nothing stored, channels outside", NULL},
    {scan_tokens_outside, "tokens outside: rows read once", NULL},
    {scan_over_N, "lanes are states, exp a polynomial", NULL},
    {scan_over_D, "lanes are channels, a state at a time", NULL},
    {scan_lanes, "16 channels in lanes, states unrolled, threads over blocks", NULL},
    {scan_chunked, "6 in chunks of 32 tokens", NULL},
    {scan_directions, "0 on one thread each, threads over directions", NULL},
    {scan_segments, "6, threads over 8 segments of the sequence, each twice", NULL},
    {NULL, NULL, NULL}
};

static void tensors(Lab *lab, const Sizes *s) {
    size_t G = (size_t)s->directions, D = (size_t)s->C, N = (size_t)s->N, rows = tokens_of(s);
    lab_out(lab, OUT_Y, "y", rows * D, 1e-11);
    lab_in(lab, IN_U, "u", G * rows * D, -1, 1);
    lab_in(lab, IN_DT, "dt", G * rows * D, 0.001, 0.2);
    lab_in(lab, IN_BC, "Bt,Ct", G * rows * 2 * N, -1, 1);
    lab_in(lab, IN_A_LOG, "A_log", G * D * N, 0, 2.77);  // A from -1 to -16
    lab_in(lab, IN_D_SKIP, "D_skip", G * D, -1, 1);
}

static LabWork work(const Sizes *s) {
    double G = s->directions, rows = (double)tokens_of(s), D = s->C, exps = G * rows * D * s->N;
    LabWork w = {4 * rows * (D * (2 * G + 1) + G * 2 * s->N), exps, exps};
    return w;
}

// The limit: exp, e h, + x B, + h C to a sum, for CHAINS vectors in registers
static float exp_loop(int n) {
    enum { CHAINS = 8 };
    float h[CHAINS][LANES], a[CHAINS][LANES], sum[LANES], total = 0.0f;
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LANES; j++) h[i][j] = 1.0f, a[i][j] = -1.0f - 0.1f * (float)(i + j);
    for (int j = 0; j < LANES; j++) sum[j] = 0.0f;
    for (int k = 0; k < n; k++) {
        float delta = 0.001f * (float)(k % 64), x = 0.5f * delta;
        UNROLL
        for (int i = 0; i < CHAINS; i++)
            #pragma omp simd
            for (int j = 0; j < LANES; j++) {
                h[i][j] = exp2_simd(delta * a[i][j]) * h[i][j] + x * delta;
                sum[j] += h[i][j] * x;
            }
    }
    for (int j = 0; j < LANES; j++) total += sum[j];
    return total;
}
static double exp_rate(void) { return 8.0 * LANES * lab_rate(exp_loop); }

static void preset(Sizes *s) { s->C *= 2; }  // expand

static const Option SIZES[] = {
    LAB_GRID, LAB_SIZE("channels", C, 16384, "D, twice the stage's"), LAB_SIZE("states", N, 256, "N of each channel"),
    LAB_SIZE("directions", directions, 3, "forward, backward, spatial: the first so many"),
    {NULL, NULL, NULL, 0, 0, 0, 0}
};

//    B T H W C N directions
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 17, 16, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 2, 4, 4, 32, 16, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {3, 1, 3, 43, 48, 5, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 5, 11, 3, 13, 19, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"scan_forward", KERNELS, tensors, NULL, scan_ships, work, "(token, channel, state)", "exp", exp_rate, NULL, 0},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {
        "The selective scan, forward, on the CPU: all directions of one ST-Mamba layer.", SIZES, preset, LADDERS, CHECKS,
        &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
