/* scan_backward.c - the selective scan, backward: from the textbook's loops to train_vivim.c's selective_scan_backward.

   Build:  make dev/scan_backward
   Run:    dev/scan_backward                         the whole ladder on stage 1 of b3: all that one ST-Mamba layer scans

   With h[s] = e[s] h[s-1] + dt[s] u[s] Bt[s], e[s] = exp(dt[s] A) and y[s] = sum_n Ct[s] h[s] + D_skip u[s], let g[s] be the
   gradient with respect to h[s]. It is a recurrence from the end, and all else follows from it (README.md derives this):
       g[s] = Ct[s] dy[s] + e[s+1] g[s+1],       q[s] = g[s] e[s] h[s-1], the gradient of dt[s] A
       dCt[s] = sum_d dy[s] h[s]                 dBt[s] = sum_d g[s] dt[s] u[s]
       du[s] = dt[s] sum_n g[s] Bt[s] + D_skip dy[s]        ddt[s] = u[s] sum_n g[s] Bt[s] + sum_n q[s] A
       dA_log = A sum_s q[s] dt[s]               dD_skip = sum_s dy[s] u[s]
   Every version gets what forward keeps, h at every 32nd token ("states"), and may use it or not. The limit: one exp and
   eleven multiply-adds for each (token, channel, state), in registers, as fast as this machine did them in the same run.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, ns per (token, channel, state) (percent of the limit):
   0  0.969 (41)    1  9.84 (4)    2  9.12 (4)    3  2.71 (14)    4  1.71 (23)    5  0.797 (49)    6  1.04 (38) */
#define VIVIM_PROGRAM "scan_backward"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"

// G directions: du, ddt, u, dt (G, B, L, D); dy (B, L, D); dBt and dCt side by side: dbc (G, B, L, 2N), as bc; dA_log, A_log
// (G, D, N); dD_skip, D_skip (G, D); states: G times what selective_scan_forward keeps
enum { OUT_DU, OUT_DDT, OUT_DBC, ADD_DA_LOG, ADD_DD_SKIP, IN_DY, IN_U, IN_DT, IN_BC, IN_A_LOG, IN_D_SKIP, IN_STATES };

typedef struct {  // one direction
    float *du, *ddt, *dbc, *dA_log, *dD_skip;
    const float *dy, *u, *dt, *bc, *A_log, *D_skip, *states;
    int order, B, T, P, L, D, N;
} Direct;

static Direct direction(float *const *t, const Sizes *s, int g) {
    size_t D = (size_t)s->C, N = (size_t)s->N, rows = tokens_of(s), n = g * rows * D, n_bc = g * rows * 2 * N;
    int P = s->H * s->W;
    Direct p = {t[OUT_DU] + n, t[OUT_DDT] + n, t[OUT_DBC] + n_bc, t[ADD_DA_LOG] + g * D * N, t[ADD_DD_SKIP] + g * D, t[IN_DY],
                t[IN_U] + n, t[IN_DT] + n, t[IN_BC] + n_bc, t[IN_A_LOG] + g * D * N, t[IN_D_SKIP] + g * D,
                t[IN_STATES] + g * selective_scan_states(s->B, s->T, P, s->C, s->N), g, s->B, s->T, P, s->T * P, s->C, s->N};
    return p;
}
static size_t row_of(const Direct *p, int b, int s) { return (size_t)b * p->L + scan_row(p->order, s, p->T, p->P); }

static void ships(const Direct *p) {
    selective_scan_backward(p->du, p->ddt, p->dbc, p->dbc + p->N, 2 * p->N, p->dA_log, p->dD_skip, p->dy, p->u, p->dt, p->bc,
                            p->bc + p->N, 2 * p->N, p->A_log, p->D_skip, p->states, p->order, p->B, p->T, p->P, p->D, p->N);
}
static void scan_ships(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        ships(&p);
    }
}

static float *rates_of(const Direct *p) {  // A (D, N)
    float *A = lab_floats((size_t)p->D * p->N);
    for (int i = 0; i < p->D * p->N; i++) A[i] = -expf(p->A_log[i]);
    return A;
}

// One token of all channels, backward, written as the formulas stand: h_before, h and e of that token (D, N); carry (D, N)
// is e[s+1] g[s+1]
static void token_backward(const Direct *p, size_t row, float *carry, const float *A, const float *e, const float *h_before,
                           const float *h) {
    const float *Bt = p->bc + row * 2 * p->N, *Ct = Bt + p->N;
    float *dBt = p->dbc + row * 2 * p->N, *dCt = dBt + p->N;
    memset(dBt, 0, (size_t)2 * p->N * sizeof(float));
    for (int d = 0; d < p->D; d++) {
        size_t at = row * p->D + d;
        float u = p->u[at], dt = p->dt[at], dy = p->dy[at], dx = 0.0f, dexponent = 0.0f;
        for (int n = 0; n < p->N; n++) {
            int i = d * p->N + n;
            float g = Ct[n] * dy + carry[i], q;
            carry[i] = e[i] * g, q = carry[i] * h_before[i];
            dCt[n] += dy * h[i];
            dBt[n] += g * dt * u;
            dx += g * Bt[n];
            dexponent += q * A[i];
            p->dA_log[i] += q * dt * A[i];
        }
        p->du[at] = dt * dx + p->D_skip[d] * dy;
        p->ddt[at] = u * dx + dexponent;
        p->dD_skip[d] += dy * u;
    }
}

// e and h of one token from the h before it
static void token_forward(const Direct *p, size_t row, const float *A, float *e, const float *h_before, float *h) {
    const float *Bt = p->bc + row * 2 * p->N;
    for (int d = 0; d < p->D; d++)
        for (int n = 0; n < p->N; n++) {
            int i = d * p->N + n;
            e[i] = expf(p->dt[row * p->D + d] * A[i]);
            h[i] = e[i] * h_before[i] + p->dt[row * p->D + d] * p->u[row * p->D + d] * Bt[n];
        }
}

// 1: as automatic differentiation does it: e and h of all (token, channel, state) in memory
static void scan_textbook(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        size_t state = (size_t)p.D * p.N;
        float *A = rates_of(&p), *carry = lab_floats(state), *e = lab_floats(p.L * state), *h = lab_floats((p.L + 1) * state);
        for (int b = 0; b < p.B; b++) {
            zero_floats(h, state);  // h[-1]
            zero_floats(carry, state);
            for (int i = 0; i < p.L; i++)
                token_forward(&p, row_of(&p, b, i), A, e + i * state, h + i * state, h + (i + 1) * state);
            for (int i = p.L - 1; i >= 0; i--)
                token_backward(&p, row_of(&p, b, i), carry, A, e + i * state, h + i * state, h + (i + 1) * state);
        }
        free(carry); free(h); free(e); free(A);
    }
}

// 2: chunks of 32 tokens, from the last: h at a chunk's beginning is kept by forward, and the chunk is replayed from there
static void scan_checkpoints(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        int chunks = ceil_div(p.L, SCAN_CHUNK), blocks = ceil_div(p.D, SCAN_LANES);
        size_t state = (size_t)p.D * p.N, kept = (size_t)blocks * p.N * SCAN_LANES;
        float *A = rates_of(&p), *carry = lab_floats(state), *e = lab_floats(SCAN_CHUNK * state);
        float *h = lab_floats((SCAN_CHUNK + 1) * state);
        for (int b = 0; b < p.B; b++) {
            zero_floats(carry, state);
            for (int c = chunks - 1; c >= 0; c--) {
                int s0 = c * SCAN_CHUNK, s1 = min_int(s0 + SCAN_CHUNK, p.L);
                const float *from = p.states + ((size_t)b * chunks + c) * kept;
                for (int d = 0; d < p.D; d++)
                    for (int n = 0; n < p.N; n++) h[d * p.N + n] = from[rate_at(d, n, p.N)];
                for (int i = s0, k = 0; i < s1; i++, k++)
                    token_forward(&p, row_of(&p, b, i), A, e + k * state, h + k * state, h + (k + 1) * state);
                for (int i = s1 - 1, k = i - s0; i >= s0; i--, k--)
                    token_backward(&p, row_of(&p, b, i), carry, A, e + k * state, h + k * state, h + (k + 1) * state);
            }
        }
        free(carry); free(h); free(e); free(A);
    }
}

// 3: 2 with vectors over the states of a channel, exp a polynomial. dBt and dCt are vectors then, too; du and ddt need two
// sums across the lanes for each (token, channel). e and h lie in the second cache, a channel at a time.
static void scan_over_N(float *const *t, const Sizes *s) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        int chunks = ceil_div(p.L, SCAN_CHUNK), blocks = ceil_div(p.D, SCAN_LANES), N = p.N;
        size_t state = (size_t)p.D * N, kept = (size_t)blocks * N * SCAN_LANES;
        float *A = rates_of(&p), *carry = lab_floats(state), *e = lab_floats((size_t)SCAN_CHUNK * N);
        float *h = lab_floats((size_t)(SCAN_CHUNK + 1) * N);
        for (int b = 0; b < p.B; b++) {
            zero_floats(carry, state);
            for (int c = chunks - 1; c >= 0; c--) {
                int s0 = c * SCAN_CHUNK, s1 = min_int(s0 + SCAN_CHUNK, p.L);
                const float *from = p.states + ((size_t)b * chunks + c) * kept;
                for (int i = s0; i < s1; i++) memset(p.dbc + row_of(&p, b, i) * 2 * N, 0, (size_t)2 * N * sizeof(float));
                for (int d = 0; d < p.D; d++) {
                    const float *RESTRICT a = A + d * N;
                    float *RESTRICT dA_log = p.dA_log + d * N, *RESTRICT k = carry + d * N;
                    for (int n = 0; n < N; n++) h[n] = from[rate_at(d, n, N)];
                    for (int i = s0; i < s1; i++) {
                        size_t row = row_of(&p, b, i);
                        float dt = p.dt[row * p.D + d], x = dt * p.u[row * p.D + d], *RESTRICT e_i = e + (i - s0) * N;
                        const float *RESTRICT Bt = p.bc + row * 2 * N, *RESTRICT before = h + (i - s0) * N;
                        float *RESTRICT after = h + (i - s0 + 1) * N;
                        #pragma omp simd
                        for (int n = 0; n < N; n++) {
                            e_i[n] = exp2_simd(dt * LOG2_E * a[n]);
                            after[n] = e_i[n] * before[n] + x * Bt[n];
                        }
                    }
                    for (int i = s1 - 1; i >= s0; i--) {
                        size_t row = row_of(&p, b, i), at = row * p.D + d;
                        const float *RESTRICT Bt = p.bc + row * 2 * N, *RESTRICT Ct = Bt + N, *RESTRICT e_i = e + (i - s0) * N;
                        const float *RESTRICT before = h + (i - s0) * N, *RESTRICT after = before + N;
                        float *RESTRICT dBt = p.dbc + row * 2 * N, *RESTRICT dCt = dBt + N;
                        float u = p.u[at], dt = p.dt[at], dy = p.dy[at], dx = 0.0f, dexponent = 0.0f;
                        #pragma omp simd reduction(+ : dx, dexponent)
                        for (int n = 0; n < N; n++) {
                            float g_n = Ct[n] * dy + k[n], passed = e_i[n] * g_n, q = passed * before[n] * a[n];
                            k[n] = passed;
                            dCt[n] += dy * after[n], dBt[n] += g_n * dt * u;
                            dx += g_n * Bt[n], dexponent += q;
                            dA_log[n] += q * dt;
                        }
                        p.du[at] = dt * dx + p.D_skip[d] * dy;
                        p.ddt[at] = u * dx + dexponent;
                        p.dD_skip[d] += dy * u;
                    }
                }
            }
        }
        free(carry); free(h); free(e); free(A);
    }
}

// 4, 5: lanes are 16 channels, as in forward: du and ddt need no sum across lanes. dBt and dCt do, over all channels. 4 makes
// it for each (token, state) of each block; 5 adds blocks lane by lane first, and sums the lanes once for all blocks, which is
// what scan_backward_block and selective_scan_backward do (for up to 4 spans of channels; here there is one, and one thread)
static void scan_lanes(float *const *t, const Sizes *s, int sum_each_block) {
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        int chunks = ceil_div(p.L, SCAN_CHUNK), blocks = ceil_div(p.D, SCAN_LANES), N = p.N;
        size_t state = (size_t)N * SCAN_LANES, carried = 2 * state + SCAN_LANES;
        Scan scan = scan_begin(p.u, p.dt, p.bc, p.bc + N, 2 * N, p.A_log, p.D_skip, p.order, p.T, p.P, p.D, N);
        float *work = lab_floats((SCAN_CHUNK + 1) * 4 * state), *carry = lab_floats(p.B * blocks * carried);
        zero_floats(carry, p.B * blocks * carried);
        scan.dy = p.dy, scan.du = p.du, scan.ddt = p.ddt;
        for (int b = 0; b < p.B; b++)
            for (int c = chunks - 1; c >= 0; c--) {
                int s0 = c * SCAN_CHUNK, s1 = min_int(s0 + SCAN_CHUNK, p.L);
                for (int block = 0; block < blocks; block++) {
                    int d = block * SCAN_LANES, lanes = min_int(SCAN_LANES, p.D - d), first = sum_each_block || block == 0;
                    const float *h = p.states + (((size_t)b * chunks + c) * blocks + block) * state;
                    float *k = carry + ((size_t)b * blocks + block) * carried;
                    int whole = N == 16 && lanes == SCAN_LANES;
                    if (whole && first) scan_backward_block(&scan, k, work, h, b, d, s0, s1, 16, SCAN_LANES, 1);
                    else if (whole) scan_backward_block(&scan, k, work, h, b, d, s0, s1, 16, SCAN_LANES, 0);
                    else scan_backward_block(&scan, k, work, h, b, d, s0, s1, N, lanes, first);
                    for (int i = s0; (sum_each_block || block + 1 == blocks) && i < s1; i++) {
                        const float *v = work + ((i - s0) * 4 + 2) * state;
                        float *dbc = p.dbc + row_of(&p, b, i) * 2 * N;
                        for (int n = 0; n < 2 * N; n++) {  // N sums of dBt, N of dCt behind them
                            float sum = sum_each_block && block > 0 ? dbc[n] : 0.0f;
                            #pragma omp simd reduction(+ : sum)
                            for (int j = 0; j < SCAN_LANES; j++) sum += v[n * SCAN_LANES + j];
                            dbc[n] = sum;
                        }
                    }
                }
            }
        for (int i = 0; i < p.B * p.D; i++) {
            int b = i / p.D, d = i % p.D;
            const float *dA = carry + ((size_t)b * blocks + d / SCAN_LANES) * carried + state + d % SCAN_LANES;
            for (int n = 0; n < N; n++) p.dA_log[(size_t)d * N + n] += dA[n * SCAN_LANES] * (scan.a[rate_at(d, n, N)] * LN_2);
            p.dD_skip[d] += dA[state];
        }
        free(carry); free(work); free(scan.row); free(scan.a);
    }
}
static void scan_lanes_each(float *const *t, const Sizes *s) { scan_lanes(t, s, 1); }
static void scan_lanes_once(float *const *t, const Sizes *s) { scan_lanes(t, s, 0); }

// 6: threads take directions: nothing is shared, but three do not divide well among two
static void scan_directions(float *const *t, const Sizes *s) {
    #pragma omp parallel for schedule(static, 1)
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        ships(&p);
    }
}

static const LabKernel KERNELS[] = {
    {scan_ships, "ships: 5, threads over spans of channels", NULL},
    {scan_textbook, "textbook: e and h of all tokens in memory", NULL},
    {scan_checkpoints, "replayed from every 32nd h", NULL},
    {scan_over_N, "lanes are states, exp a polynomial", NULL},
    {scan_lanes_each, "lanes are 16 channels, summed for each block", NULL},
    {scan_lanes_once, "4, summed once for all blocks", NULL},
    {scan_directions, "5, threads over directions", NULL},
    {NULL, NULL, NULL}
};

static void tensors(Lab *lab, const Sizes *s) {
    size_t G = (size_t)s->directions, D = (size_t)s->C, N = (size_t)s->N, rows = tokens_of(s);
    lab_out(lab, OUT_DU, "du", G * rows * D, 1e-10);
    lab_out(lab, OUT_DDT, "ddt", G * rows * D, 1e-10);
    lab_out(lab, OUT_DBC, "dBt,dCt", G * rows * 2 * N, 1e-10);
    lab_add(lab, ADD_DA_LOG, "dA_log", G * D * N, 1e-10);
    lab_add(lab, ADD_DD_SKIP, "dD_skip", G * D, 1e-10);
    lab_in(lab, IN_DY, "dy", rows * D, -1, 1);
    lab_in(lab, IN_U, "u", G * rows * D, -1, 1);
    lab_in(lab, IN_DT, "dt", G * rows * D, 0.001, 0.2);
    lab_in(lab, IN_BC, "Bt,Ct", G * rows * 2 * N, -1, 1);
    lab_in(lab, IN_A_LOG, "A_log", G * D * N, 0, 2.77);  // A from -1 to -16
    lab_in(lab, IN_D_SKIP, "D_skip", G * D, -1, 1);
    lab_in(lab, IN_STATES, "states", G * selective_scan_states(s->B, s->T, s->H * s->W, s->C, s->N), 0, 0);
}

static void keep_states(float *const *t, const Sizes *s) {
    float *y = lab_floats(tokens_of(s) * s->C);
    for (int g = 0; g < s->directions; g++) {
        Direct p = direction(t, s, g);
        float *states = t[IN_STATES] + g * selective_scan_states(s->B, s->T, p.P, s->C, s->N);
        selective_scan_forward(y, states, p.u, p.dt, p.bc, p.bc + p.N, 2 * p.N, p.A_log, p.D_skip, g, p.B, p.T, p.P, p.D, p.N,
                               0);
    }
    free(y);
}

static LabWork work(const Sizes *s) {
    double G = s->directions, rows = (double)tokens_of(s), D = s->C, N = s->N, exps = G * rows * D * N;
    LabWork w = {4 * rows * (D * (4 * G + 1) + G * 4 * N) + 4 * exps / SCAN_CHUNK, exps, exps};
    return w;
}

// The limit: exp, then replay (1 multiply-add, x Bt), g, passed, q, dCt, dBt, dx, dexponent, dA; CHAINS vectors in registers
static float backward_loop(int n) {
    enum { CHAINS = 4 };
    float h[CHAINS][LANES], k[CHAINS][LANES], dA[CHAINS][LANES], dC[LANES], dB[LANES], dx[LANES], dexponent[LANES];
    float total = 0.0f;
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LANES; j++) h[i][j] = k[i][j] = 1.0f, dA[i][j] = 0.0f;
    for (int j = 0; j < LANES; j++) dC[j] = dB[j] = dx[j] = dexponent[j] = 0.0f;
    for (int step = 0; step < n; step++) {
        float delta = 0.001f * (float)(step % 64), x = 0.5f * delta, a = -1.0f - delta;
        UNROLL
        for (int i = 0; i < CHAINS; i++)
            #pragma omp simd
            for (int j = 0; j < LANES; j++) {
                float e = exp2_simd(delta * (a + h[i][j])), g = k[i][j] + x * delta, q;
                h[i][j] = e * h[i][j] + x * delta;
                k[i][j] = g * e, q = k[i][j] * h[i][j];
                dC[j] += x * h[i][j], dB[j] += g * x, dx[j] += g * delta;
                dexponent[j] += q * a, dA[i][j] += q * delta;
            }
    }
    for (int j = 0; j < LANES; j++) {
        total += dC[j] + dB[j] + dx[j] + dexponent[j];
        for (int i = 0; i < CHAINS; i++) total += dA[i][j];
    }
    return total;
}
static double backward_rate(void) { return 4.0 * LANES * lab_rate(backward_loop); }

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
    {1, 2, 4, 4, 64, 16, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {3, 1, 3, 43, 48, 5, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 5, 11, 3, 13, 19, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"scan_backward", KERNELS, tensors, keep_states, scan_ships, work, "(token, channel, state)", "exp", backward_rate,
         NULL, 0},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {
        "The selective scan, backward, on the CPU: all directions of one ST-Mamba layer.", SIZES, preset, LADDERS, CHECKS,
        &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
