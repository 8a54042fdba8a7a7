/* dwconv3d.c - the depthwise 3x3x3 convolution of DSF, forward and backward: from the textbook's loops to train_vivim.c's.

   Build:  make dev/dwconv3d
   Run:    dev/dwconv3d                              both ladders on stage 1 of b3: (1, 5, 64, 64, 4*64)
           dev/dwconv3d 0,4 --only dwconv3d_backward --preset b3.3

   out[t,h,w,c] = bias[c] + sum over (dt,dh,dw) of weight[c,dt,dh,dw] inp[t+dt-1, h+dh-1, w+dw-1, c], inp 0 outside the clip.
   27 multiply-adds for each number read and each written: near the border between what memory and arithmetic allow. The
   limit is that of multiply-adds in registers; a load for each operand of each would halve it.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, ns per (token, channel) (percent of the limit):
   forward: 0  1.72 (19)    1  158 (0)    2  3.16 (10)    3  3.03 (10)    4  2.18 (15)    5  2.35 (14)    6  2.31 (14)
   7  2.11 (15)
   backward: 0  2.7 (23)    1  199 (0)    2  6.42 (10)    3  5.51 (11)    4  5.76 (11)    5  4.24 (15) */
#define VIVIM_PROGRAM "dwconv3d"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"

enum { TAPS = 27, KT = 3 };

// ---------------------------------------------------------------------------------------------------------------------
// forward: out, inp (B, T, H, W, C); weight (C, 1, 3, 3, 3); bias (C)

enum { OUT, IN_INP, IN_WEIGHT, IN_BIAS };

static void forward_ships(float *const *t, const Sizes *s) {
    dwconv_forward(t[OUT], NULL, t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], s->B, s->T, s->H, s->W, s->C, KT);
}

// the token next to (b, t, h, w) that a tap reads, or -1 outside of the clip
static int64_t neighbour(const Sizes *s, int b, int t, int h, int w, int tap) {
    int tt = t + tap / 9 - 1, hh = h + tap / 3 % 3 - 1, ww = w + tap % 3 - 1;
    if (tt < 0 || tt >= s->T || hh < 0 || hh >= s->H || ww < 0 || ww >= s->W) return -1;
    return ((int64_t)(b * s->T + tt) * s->H + hh) * s->W + ww;
}

// 1: a number of the output at a time
static void forward_textbook(float *const *t, const Sizes *s) {
    int C = s->C, token = 0;
    for (int b = 0; b < s->B; b++)
        for (int f = 0; f < s->T; f++)
            for (int h = 0; h < s->H; h++)
                for (int w = 0; w < s->W; w++, token++)
                    for (int c = 0; c < C; c++) {
                        float sum = t[IN_BIAS][c];
                        for (int k = 0; k < TAPS; k++) {
                            int64_t from = neighbour(s, b, f, h, w, k);
                            if (from >= 0) sum += t[IN_WEIGHT][c * TAPS + k] * t[IN_INP][from * C + c];
                        }
                        t[OUT][(size_t)token * C + c] = sum;
                    }
}

// 2: channels innermost, in vectors, with the weights of a tap side by side; the sums go through memory 27 times
static void channels_inside(float *out, const float *inp, const float *taps, const float *bias, const Sizes *s) {
    int C = s->C;
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < s->B * s->T * s->H; row++)
        for (int w = 0, h = row % s->H, f = row / s->H % s->T, b = row / (s->H * s->T); w < s->W; w++) {
            float *RESTRICT o = out + ((size_t)row * s->W + w) * C;
            for (int c = 0; c < C; c++) o[c] = bias ? bias[c] : 0.0f;
            for (int k = 0; k < TAPS; k++) {
                int64_t from = neighbour(s, b, f, h, w, k);
                if (from < 0) continue;
                const float *RESTRICT x = inp + from * C, *RESTRICT weight = taps + (size_t)k * C;
                #pragma omp simd
                for (int c = 0; c < C; c++) o[c] += x[c] * weight[c];
            }
        }
}
static void forward_channels(float *const *t, const Sizes *s) {
    float *taps = taps_first(t[IN_WEIGHT], s->C, TAPS, 0);
    channels_inside(t[OUT], t[IN_INP], taps, t[IN_BIAS], s);
    free(taps);
}

// Rows (b, t, h) in the order that a task number counts them: as they lie, or all frames of a grid row one after the other.
// Then an input row is needed for t - 1, t and t + 1 at once, and stays in the second cache till h + 1 and h + 2 want it, too.
typedef struct { int row, b, f, h; size_t next; } Row;  // next: first token of the row of which no task before has read
static Row row_of(const Sizes *s, size_t task, int frames_inside) {
    int i = (int)task, clip = s->T * s->H, b = i / clip, f = frames_inside ? i % s->T : i / s->H % s->T;
    int h = frames_inside ? i / s->T % s->H : i % s->H, f1 = min_int(f + 1, s->T - 1), h1 = min_int(h + 1, s->H - 1);
    Row r = {(b * s->T + f) * s->H + h, b, f, h, (size_t)((b * s->T + f1) * s->H + h1) * s->W};
    return r;
}

enum { BLOCK = 4 * LANES, AHEAD = 4, PIXELS = 4, WIDE = 2 * LANES };  // channels of 3 to 6; pixels that memory is asked ahead
                                                                      // for; pixels and channels of a group in 7

// n channels of one pixel: their sums stay in registers over the 27 taps
ALWAYS_INLINE void pixel(const int n, float *RESTRICT out, const float *inp, const float *taps, const float *bias, int f, int h,
                         int w, const Sizes *s) {
    int C = s->C;
    float sum[BLOCK];
    #pragma omp simd
    for (int c = 0; c < n; c++) sum[c] = bias ? bias[c] : 0.0f;
    for (int dt = max_int(0, 1 - f); dt < min_int(3, s->T + 1 - f); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, s->H + 1 - h); dh++)
            for (int dw = max_int(0, 1 - w); dw < min_int(3, s->W + 1 - w); dw++) {
                const float *RESTRICT x = inp + ((ptrdiff_t)((dt - 1) * s->H + dh - 1) * s->W + dw - 1) * C;
                const float *RESTRICT k = taps + (size_t)((dt * 3 + dh) * 3 + dw) * C;
                #pragma omp simd
                for (int c = 0; c < n; c++) sum[c] += x[c] * k[c];
            }
    #pragma omp simd
    for (int c = 0; c < n; c++) out[c] = sum[c];
}

// asks for the lines of channels c .. c+n that the row will want AHEAD pixels later: of what it reads, and of what it writes
static inline void fetch(const float *inp, float *out, const Row *r, int w, int c, int n, const Sizes *s) {
    size_t ahead = (size_t)min_int(w + AHEAD, s->W - 1);
    prefetch_row(inp + (r->next + ahead) * s->C + c, n);
    for (int j = 0; out && j < n; j += 16) PREFETCH_WRITE(out + ((size_t)r->row * s->W + ahead) * s->C + c + j);
}

// channels c .. c+BLOCK, or as many as there are, of pixel w of a row
static inline void pixel_block(float *out, const float *inp, const float *taps, const float *bias, const Row *r, int w, int c,
                               const Sizes *s) {
    size_t at = ((size_t)r->row * s->W + w) * s->C + c;
    const float *bias_c = bias ? bias + c : NULL;
    if (s->C - c >= BLOCK) pixel(BLOCK, out + at, inp + at, taps + c, bias_c, r->f, r->h, w, s);
    else pixel(s->C - c, out + at, inp + at, taps + c, bias_c, r->f, r->h, w, s);
}

// 3: a block of channels goes along the whole row, then the next: of each pixel 64 floats are read, then C - 64 left out
static void row_by_blocks(float *out, const float *inp, const float *taps, const float *bias, const Row *r, const Sizes *s) {
    for (int c = 0; c < s->C; c += BLOCK)
        for (int w = 0; w < s->W; w++) pixel_block(out, inp, taps, bias, r, w, c, s);
}
// 4, 5, 6: all channels of a pixel come before the next pixel: memory is read in runs of C floats
static void row_by_pixels(float *out, const float *inp, const float *taps, const float *bias, const Row *r, int w0, int w1,
                          int ask, const Sizes *s) {
    for (int w = w0; w < w1; w++)
        for (int c = 0; c < s->C; c += BLOCK) {
            if (ask) fetch(inp, out, r, w, c, min_int(BLOCK, s->C - c), s);
            pixel_block(out, inp, taps, bias, r, w, c, s);
        }
}
static void forward_blocks(float *const *t, const Sizes *s) {
    float *taps = taps_first(t[IN_WEIGHT], s->C, TAPS, 0);
    #pragma omp parallel for schedule(static)
    for (int task = 0; task < s->B * s->T * s->H; task++) {
        Row r = row_of(s, (size_t)task, 0);
        row_by_blocks(t[OUT], t[IN_INP], taps, t[IN_BIAS], &r, s);
    }
    free(taps);
}
static void forward_rows(float *const *t, const Sizes *s, int frames_inside, int ask) {
    float *taps = taps_first(t[IN_WEIGHT], s->C, TAPS, 0);
    #pragma omp parallel for schedule(static)
    for (int task = 0; task < s->B * s->T * s->H; task++) {
        Row r = row_of(s, (size_t)task, frames_inside);
        row_by_pixels(t[OUT], t[IN_INP], taps, t[IN_BIAS], &r, 0, s->W, ask, s);
    }
    free(taps);
}
static void forward_pixel(float *const *t, const Sizes *s) { forward_rows(t, s, 0, 0); }
static void forward_frames(float *const *t, const Sizes *s) { forward_rows(t, s, 1, 0); }
static void forward_fetch(float *const *t, const Sizes *s) { forward_rows(t, s, 1, 1); }

// 7: the sums of 4 neighbours and 2 vectors of channels in registers: a tap's weights are loaded once for all four
ALWAYS_INLINE void group(float *RESTRICT out, const float *RESTRICT inp, const float *RESTRICT taps, const float *bias, int f,
                         int h, const Sizes *s) {
    int C = s->C;
    float sum[PIXELS][WIDE];
    for (int i = 0; i < PIXELS; i++)
        #pragma omp simd
        for (int c = 0; c < WIDE; c++) sum[i][c] = bias ? bias[c] : 0.0f;
    for (int dt = max_int(0, 1 - f); dt < min_int(KT, s->T + 1 - f); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, s->H + 1 - h); dh++) {
            const float *x = inp + ((ptrdiff_t)((dt - 1) * s->H + dh - 1) * s->W - 1) * C;
            const float *k = taps + (size_t)(dt * 3 + dh) * 3 * C;
            for (int dw = 0; dw < 3; dw++)
                UNROLL
                for (int i = 0; i < PIXELS; i++)
                    #pragma omp simd
                    for (int c = 0; c < WIDE; c++) sum[i][c] += x[(size_t)(i + dw) * C + c] * k[dw * C + c];
        }
    for (int i = 0; i < PIXELS; i++)
        #pragma omp simd
        for (int c = 0; c < WIDE; c++) out[(size_t)i * C + c] = sum[i][c];
}
// a group needs neighbours on both sides, and whole vectors; what else there is goes pixel by pixel
static void row_by_groups(float *out, const float *inp, const float *taps, const float *bias, const Row *r, const Sizes *s) {
    int w = s->C % WIDE == 0 ? 1 : s->W;
    row_by_pixels(out, inp, taps, bias, r, 0, min_int(w, s->W), 1, s);
    for (; w + PIXELS < s->W; w += PIXELS) {
        size_t at = ((size_t)r->row * s->W + w) * s->C;
        for (int c = 0; c < s->C; c += WIDE) {
            for (int i = 0; i < PIXELS; i++) fetch(inp, out, r, w + i, c, WIDE, s);
            group(out + at + c, inp + at + c, taps + c, bias ? bias + c : NULL, r->f, r->h, s);
        }
    }
    row_by_pixels(out, inp, taps, bias, r, w, s->W, 1, s);
}
static void forward_groups(float *const *t, const Sizes *s) {
    float *taps = taps_first(t[IN_WEIGHT], s->C, TAPS, 0);
    #pragma omp parallel for schedule(static)
    for (int task = 0; task < s->B * s->T * s->H; task++) {
        Row r = row_of(s, (size_t)task, 1);
        row_by_groups(t[OUT], t[IN_INP], taps, t[IN_BIAS], &r, s);
    }
    free(taps);
}

static const LabKernel FORWARD[] = {
    {forward_ships, "ships", NULL},
    {forward_textbook, "textbook: a number at a time", NULL},
    {forward_channels, "channels in vectors, threads over rows", NULL},
    {forward_blocks, "sums of 64 channels in registers, along a row, then the next 64", NULL},
    {forward_pixel, "3 with all channels of a pixel before the next", NULL},
    {forward_frames, "4, all frames of a grid row one after the other", NULL},
    {forward_fetch, "5, what is new asked for 4 pixels ahead", NULL},
    {forward_groups, "6, sums of 4 pixels x 2 vectors in registers", NULL},
    {NULL, NULL, NULL}
};

static void forward_tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C, C = (size_t)s->C;
    lab_out(lab, OUT, "out", n, 1e-12);
    lab_in(lab, IN_INP, "inp", n, -1, 1);
    lab_in(lab, IN_WEIGHT, "weight", C * TAPS, -1, 1);
    lab_in(lab, IN_BIAS, "bias", C, -1, 1);
}

static LabWork forward_work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {4 * (2 * n + 28.0 * s->C), 2 * TAPS * n, n};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: dinp, dout, inp (B, T, H, W, C); dweight, weight (C, 1, 3, 3, 3); dbias (C)
// dinp is the same convolution of dout with the kernel turned around; dweight[tap] += sum over tokens of dout inp[token + tap]

enum { OUT_DINP, ADD_DWEIGHT, ADD_DBIAS, IN_DOUT, IN_X, IN_W };

static void backward_ships(float *const *t, const Sizes *s) {
    dwconv_backward(t[OUT_DINP], t[ADD_DWEIGHT], t[ADD_DBIAS], t[IN_DOUT], t[IN_X], t[IN_W], s->B, s->T, s->H, s->W, s->C, KT);
}

// 1: forward's loop, turned around: every output gives to its 27 inputs and weights
static void backward_textbook(float *const *t, const Sizes *s) {
    int C = s->C, token = 0;
    zero_floats(t[OUT_DINP], tokens_of(s) * C);
    for (int b = 0; b < s->B; b++)
        for (int f = 0; f < s->T; f++)
            for (int h = 0; h < s->H; h++)
                for (int w = 0; w < s->W; w++, token++)
                    for (int c = 0; c < C; c++) {
                        float dout = t[IN_DOUT][(size_t)token * C + c];
                        t[ADD_DBIAS][c] += dout;
                        for (int k = 0; k < TAPS; k++) {
                            int64_t from = neighbour(s, b, f, h, w, k);
                            if (from < 0) continue;
                            t[OUT_DINP][from * C + c] += t[IN_W][c * TAPS + k] * dout;
                            t[ADD_DWEIGHT][c * TAPS + k] += t[IN_X][from * C + c] * dout;
                        }
                    }
}

static void add_slices(float *const *t, float *partial, int C) {  // (SLICES, TAPS + 1, C): the last tap is dbias
    slices_sum(partial, (size_t)(TAPS + 1) * C);
    for (int c = 0; c < C; c++) {
        for (int k = 0; k < TAPS; k++) t[ADD_DWEIGHT][c * TAPS + k] += partial[(size_t)k * C + c];
        t[ADD_DBIAS][c] += partial[(size_t)TAPS * C + c];
    }
    free(partial);
}

// 2: channels in vectors: dinp by forward's loop with the kernel turned, then dweight and dbias in slices, added to in memory
static void backward_channels(float *const *t, const Sizes *s) {
    int C = s->C; size_t rows = (size_t)s->B * s->T * s->H;
    float *taps = taps_first(t[IN_W], C, TAPS, 1), *partial = slices_alloc((size_t)(TAPS + 1) * C);
    channels_inside(t[OUT_DINP], t[IN_DOUT], taps, NULL, s);
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++)
        for (size_t row = slice_start(rows, slice); row < slice_start(rows, slice + 1); row++)
            for (int w = 0; w < s->W; w++) {
                int h = (int)row % s->H, f = (int)row / s->H % s->T, b = (int)row / (s->H * s->T);
                const float *RESTRICT dout = t[IN_DOUT] + (row * s->W + w) * C;
                for (int k = 0; k <= TAPS; k++) {
                    int64_t from = k < TAPS ? neighbour(s, b, f, h, w, k) : 0;
                    if (from < 0) continue;
                    const float *RESTRICT x = t[IN_X] + from * C;
                    float *RESTRICT sum = partial + ((size_t)slice * (TAPS + 1) + k) * C;
                    #pragma omp simd
                    for (int c = 0; c < C; c++) sum[c] += k < TAPS ? x[c] * dout[c] : dout[c];
                }
            }
    add_slices(t, partial, C);
    free(taps);
}

// n channels of dweight from one row: a tap's sums stay in registers along the row
ALWAYS_INLINE void row_dweight(const int n, float *RESTRICT sums, const float *RESTRICT dout, const float *RESTRICT inp, int f,
                               int h, const Sizes *s) {
    int C = s->C, W = s->W;
    for (int dt = max_int(0, 1 - f); dt < min_int(KT, s->T + 1 - f); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, s->H + 1 - h); dh++)
            for (int dw = 0; dw < 3; dw++) {
                const float *x = inp + (ptrdiff_t)((dt - 1) * s->H + dh - 1) * W * C;
                float sum[BLOCK], *RESTRICT to = sums + (size_t)((dt * 3 + dh) * 3 + dw) * C;
                #pragma omp simd
                for (int c = 0; c < n; c++) sum[c] = 0.0f;
                for (int w = max_int(0, 1 - dw); w < min_int(W, W + 1 - dw); w++)
                    #pragma omp simd
                    for (int c = 0; c < n; c++) sum[c] += x[(ptrdiff_t)(w + dw - 1) * C + c] * dout[(size_t)w * C + c];
                #pragma omp simd
                for (int c = 0; c < n; c++) to[c] += sum[c];
            }
}

// 3, 4: sums in registers, 64 channels along a row. 3: dinp in one pass, dweight and dbias in another; 4: a row of all three
// together, while it and its neighbours are in the caches
static void backward_by_blocks(float *const *t, const Sizes *s, int one_pass) {
    int C = s->C, W = s->W; size_t rows = (size_t)s->B * s->T * s->H;
    float *taps = taps_first(t[IN_W], C, TAPS, 1), *partial = slices_alloc((size_t)(TAPS + 1) * C);
    for (int pass = one_pass; pass < 2; pass++) {
        #pragma omp parallel for schedule(static)
        for (int slice = 0; slice < SLICES; slice++)
            for (size_t task = slice_start(rows, slice); task < slice_start(rows, slice + 1); task++) {
                Row r = row_of(s, task, 0);
                float *sums = partial + (size_t)slice * (TAPS + 1) * C, *dbias = sums + (size_t)TAPS * C;
                if (one_pass || pass == 0) row_by_blocks(t[OUT_DINP], t[IN_DOUT], taps, NULL, &r, s);
                if (pass == 0) continue;
                for (int c = 0; c < C; c += BLOCK) {
                    size_t at = (size_t)r.row * W * C + c;
                    if (C - c >= BLOCK) row_dweight(BLOCK, sums + c, t[IN_DOUT] + at, t[IN_X] + at, r.f, r.h, s);
                    else row_dweight(C - c, sums + c, t[IN_DOUT] + at, t[IN_X] + at, r.f, r.h, s);
                }
                for (size_t i = (size_t)r.row * W; i < (size_t)(r.row + 1) * W; i++)
                    #pragma omp simd
                    for (int c = 0; c < C; c++) dbias[c] += t[IN_DOUT][i * C + c];
            }
    }
    add_slices(t, partial, C);
    free(taps);
}
static void backward_two_passes(float *const *t, const Sizes *s) { backward_by_blocks(t, s, 0); }
static void backward_one_pass(float *const *t, const Sizes *s) { backward_by_blocks(t, s, 1); }

// 5: one pass in the order of forward's 7, dinp by its groups; of dweight, what 4 pixels give is summed in registers before it
// is added to memory. n: channels, WIDE or what there is; pixels: PIXELS in the row's interior, or 1
ALWAYS_INLINE void group_dweight(const int n, const int pixels, float *RESTRICT sums, const float *RESTRICT dout,
                                 const float *RESTRICT inp, int f, int h, int w, const Sizes *s) {
    int C = s->C, low = w == 0, high = w + pixels == s->W ? 2 : 3;  // taps that all of the pixels have
    for (int dt = max_int(0, 1 - f); dt < min_int(KT, s->T + 1 - f); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, s->H + 1 - h); dh++) {
            const float *x = inp + ((ptrdiff_t)((dt - 1) * s->H + dh - 1) * s->W - 1) * C;
            for (int dw = low; dw < high; dw++) {
                float *to = sums + (size_t)((dt * 3 + dh) * 3 + dw) * C;
                #pragma omp simd
                for (int c = 0; c < n; c++) {
                    float sum = to[c];
                    UNROLL
                    for (int i = 0; i < pixels; i++) sum += x[(ptrdiff_t)(i + dw) * C + c] * dout[(size_t)i * C + c];
                    to[c] = sum;
                }
            }
        }
}
static void backward_groups(float *const *t, const Sizes *s) {
    int C = s->C, W = s->W; size_t rows = (size_t)s->B * s->T * s->H;
    float *taps = taps_first(t[IN_W], C, TAPS, 1), *partial = slices_alloc((size_t)(TAPS + 1) * C);
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++)
        for (size_t task = slice_start(rows, slice); task < slice_start(rows, slice + 1); task++) {
            Row r = row_of(s, task, 1);
            float *sums = partial + (size_t)slice * (TAPS + 1) * C, *dbias = sums + (size_t)TAPS * C;
            row_by_groups(t[OUT_DINP], t[IN_DOUT], taps, NULL, &r, s);
            for (int w = 0, step; w < W; w += step) {
                size_t at = ((size_t)r.row * W + w) * C;
                const float *dout = t[IN_DOUT] + at, *x = t[IN_X] + at;
                step = w > 0 && w + PIXELS < W && C % WIDE == 0 ? (int)PIXELS : 1;
                for (int c = 0; step == PIXELS && c < C; c += WIDE) {
                    for (int i = 0; i < PIXELS; i++) fetch(t[IN_X], NULL, &r, w + i, c, WIDE, s);
                    group_dweight(WIDE, PIXELS, sums + c, dout + c, x + c, r.f, r.h, w, s);
                }
                if (step == 1) group_dweight(C, 1, sums, dout, x, r.f, r.h, w, s);
                for (int i = 0; i < step; i++)
                    #pragma omp simd
                    for (int c = 0; c < C; c++) dbias[c] += dout[(size_t)i * C + c];
            }
        }
    add_slices(t, partial, C);
    free(taps);
}

static const LabKernel BACKWARD[] = {
    {backward_ships, "ships", NULL},
    {backward_textbook, "textbook: every output gives to 27 inputs and weights", NULL},
    {backward_channels, "channels in vectors, threads over rows and slices", NULL},
    {backward_two_passes, "sums of 64 channels in registers, along a row", NULL},
    {backward_one_pass, "3, dinp, dweight and dbias in one pass", NULL},
    {backward_groups, "one pass as forward's 7, dweight from 4 pixels at a time", NULL},
    {NULL, NULL, NULL}
};

static void backward_tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C, C = (size_t)s->C;
    lab_out(lab, OUT_DINP, "dinp", n, 1e-12);
    lab_add(lab, ADD_DWEIGHT, "dweight", C * TAPS, 1e-10);
    lab_add(lab, ADD_DBIAS, "dbias", C, 1e-10);
    lab_in(lab, IN_DOUT, "dout", n, -1, 1);
    lab_in(lab, IN_X, "inp", n, -1, 1);
    lab_in(lab, IN_W, "weight", C * TAPS, -1, 1);
}

static LabWork backward_work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {4 * (3 * n + 83.0 * s->C), 4 * TAPS * n, n};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------

static void preset(Sizes *s) { s->C *= 4; }  // inside DSF

static const Option SIZES[] = {
    LAB_GRID, LAB_SIZE("channels", C, 16384, "four times the stage's"), {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 67, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 2, 1, 2, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 2, 3, 11, 160, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {3, 4, 2, 1, 129, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"dwconv3d_forward", FORWARD, forward_tensors, NULL, forward_ships, forward_work, "(token, channel)", "flop",
         cpu_flop_rate, NULL, 0},
        {"dwconv3d_backward", BACKWARD, backward_tensors, NULL, backward_ships, backward_work, "(token, channel)", "flop",
         cpu_flop_rate, NULL, 0},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {
        "The depthwise 3x3x3 convolution of DSF, on the CPU.", SIZES, preset, LADDERS, CHECKS, &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
