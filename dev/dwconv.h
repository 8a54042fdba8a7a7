/* dwconv.h - the depthwise convolutions of train_vivim.c: 3x3 in each frame (MixFFN), 3x3x3 in the clip (DSF). Header only.

   Included by train_vivim.c, section 6, whose memory functions and macros it uses. In PyTorch's words
       y = F.conv3d(x, weight, bias, padding=(kt//2, 1, 1), groups=C)
   on channels-last activations: every channel has a kernel of its own, so channels are the lanes of a vector, and a number is
   used by up to 27 outputs: what matters is to have it at hand. dev/dwconv3d.c has the ladder from the textbook's loops to
   here. */
#ifndef VIVIM_DWCONV_H
#define VIVIM_DWCONV_H

// channels and pixels that a depthwise convolution handles at a time: two vectors of each pixel, so that the pixels' sums and
// what they share fit into the registers
#ifdef __AVX512F__
enum { CONV_LANES = 32, CONV_PIXELS = 4 };
#else
enum { CONV_LANES = 16, CONV_PIXELS = 4 };
#endif
static const float CONV_ZEROS[CONV_LANES] = {0.0f};  // the pixels left and right of a row

// asks early for n channels of some pixels: the processor does not foresee steps of a whole pixel
ALWAYS_INLINE void prefetch_pixels(const float *x, int pixels, int n, int C, int write) {
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < n; c += 16)
            if (write) PREFETCH_WRITE(x + (size_t)i * C + c);
            else PREFETCH(x + (size_t)i * C + c);
}
// where the group of pixels behind pixel w's begins; at the row's end, what comes next
static inline ptrdiff_t next_pixels(int w, ptrdiff_t next, int W, int C) {
    return w + CONV_PIXELS < W ? (ptrdiff_t)(w + CONV_PIXELS) * C : next;
}

// weight (C, taps), PyTorch's order -> (taps, C), so that a tap's weights of neighbouring channels are neighbours.
// turned: the taps in reverse order.
static float *taps_first(const float *weight, int C, int taps, int turned) {
    float *w = malloc_floats((size_t)taps * C);
    for (int c = 0; c < C; c++)
        for (int k = 0; k < taps; k++) w[(size_t)(turned ? taps - 1 - k : k) * C + c] = weight[(size_t)c * taps + k];
    return w;
}

// n channels of one output row (b, t, h): out[w] = bias + sum over (kt, 3, 3) of inp[neighbour] * weight[tap], and
// gelu[w] = gelu(out[w]); out or gelu may be NULL. inp points at channel c0 of the clip's first token, out and gelu of the row;
// n is a constant at the call. The sums of a few neighbouring pixels stay in registers: they share the weights, and most of the
// input.
ALWAYS_INLINE void dwconv_row(const int n, float *RESTRICT out, float *RESTRICT gelu, const float *RESTRICT inp,
                              const float *RESTRICT weight, const float *bias, int t, int h, int T, int H, int W, int C,
                              int kt) {
    for (int w = 0; w < W; w += CONV_PIXELS) {
        float sum[CONV_PIXELS][CONV_LANES]; int pixels = min_int(CONV_PIXELS, W - w);
        prefetch_pixels(inp + ((size_t)(t * H + min_int(h + 2, H - 1)) * W + w) * C, pixels, n, C, 0);
        if (out) prefetch_pixels(out + next_pixels(w, n, W, C), pixels, n, C, 1);  // next: n more channels
        if (gelu) prefetch_pixels(gelu + next_pixels(w, n, W, C), pixels, n, C, 1);
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            #pragma omp simd
            for (int c = 0; c < n; c++) sum[i][c] = 0.0f;
        for (int dt = max_int(0, kt / 2 - t); dt < min_int(kt, T + kt / 2 - t); dt++)
            for (int dh = max_int(0, 1 - h); dh < min_int(3, H + 1 - h); dh++) {
                const float *RESTRICT row = inp + (((size_t)(t + dt - kt / 2) * H + h + dh - 1) * W + w) * C;
                const float *RESTRICT k = weight + (size_t)(dt * 3 + dh) * 3 * C;
                UNROLL
                for (int j = 0; j < CONV_PIXELS + 2; j++) {  // column w + j - 1 meets the sum of pixel w + i in tap j - i
                    const float *RESTRICT x = w + j - 1 >= 0 && w + j - 1 < W ? row + (j - 1) * C : CONV_ZEROS;
                    UNROLL
                    for (int i = 0; i < CONV_PIXELS; i++)
                        if (j - i >= 0 && j - i < 3)
                            #pragma omp simd
                            for (int c = 0; c < n; c++) sum[i][c] += x[c] * k[(j - i) * C + c];
                }
            }
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            if (i < pixels && out)
                #pragma omp simd
                for (int c = 0; c < n; c++) out[(size_t)(w + i) * C + c] = sum[i][c] + bias[c];
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            if (i < pixels && gelu)
                #pragma omp simd
                for (int c = 0; c < n; c++) gelu[(size_t)(w + i) * C + c] = gelu_simd(sum[i][c] + bias[c]);
    }
}

// nn.Conv3d(C, C, (kt,3,3), padding=(kt//2,1,1), groups=C), and nn.Conv2d(C, C, 3, padding=1, groups=C) for kt = 1.
// In the feed-forward networks F.gelu(out) comes next: made here it does not have to read out again. Either may be NULL, if it
// is not wanted; inference does without out.
// out, gelu, inp (B, T, H, W, C); weight (C, 1, [kt,] 3, 3); bias (C)
static void dwconv_forward(float *out, float *gelu, const float *inp, const float *weight, const float *bias, int B, int T,
                           int H, int W, int C, int kt) {
    float *taps = taps_first(weight, C, kt * 9, 0);
    if (kt == 1) B *= T, T = 1;  // every frame is a clip
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T * H; i++) {  // rows (b, h, t): the frames' rows of one height follow each other, they share input
        int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C, row = (size_t)(t * H + h) * W * C;
        for (int c = 0; c < C; c += CONV_LANES) {
            float *y = out ? out + clip + row + c : NULL, *g = gelu ? gelu + clip + row + c : NULL;
            const float *x = inp + clip + c, *k = taps + c, *b = bias + c;
            if (C - c >= CONV_LANES) dwconv_row(CONV_LANES, y, g, x, k, b, t, h, T, H, W, C, kt);
            else dwconv_row(C - c, y, g, x, k, b, t, h, T, H, W, C, kt);
        }
    }
    free(taps);
}

// n channels of one row of backward. dinp is the same convolution of dout, with the kernel turned around in all axes (the
// padding is symmetric), so what is asked of a row is
//     dinp[w] = sum over taps of dout[neighbour] * weight[tap];   dweight[tap] += sum over w of dout[neighbour] * inp[w]
// with dweight turned, too: one walk over dout's neighbours serves both, and of inp only the row itself is read. To dweight is
// added what a group of pixels gives. dout points at channel c0 of the clip's first token, dinp and inp of the row.
ALWAYS_INLINE void dwconv_row_backward(const int n, float *RESTRICT dinp, float *RESTRICT dweight, float *RESTRICT dbias,
                                       const float *RESTRICT dout, const float *RESTRICT inp, const float *RESTRICT weight,
                                       int t, int h, int T, int H, int W, int C, int kt) {
    const ptrdiff_t frame = (ptrdiff_t)H * W * C, next = t + 1 < T ? frame : (ptrdiff_t)W * C - (T - 1) * frame;  // next row
    for (int w = 0; w < W; w += CONV_PIXELS) {
        float sum[CONV_PIXELS][CONV_LANES], x[CONV_PIXELS][CONV_LANES]; int pixels = min_int(CONV_PIXELS, W - w);
        prefetch_pixels(dout + ((size_t)(t * H + min_int(h + 2, H - 1)) * W + w) * C, pixels, n, C, 0);
        prefetch_pixels(inp + next_pixels(w, next, W, C), pixels, n, C, 0);
        prefetch_pixels(dinp + next_pixels(w, next, W, C), pixels, n, C, 1);
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            #pragma omp simd
            for (int c = 0; c < n; c++) sum[i][c] = 0.0f, x[i][c] = i < pixels ? inp[(size_t)(w + i) * C + c] : 0.0f;
        for (int dt = max_int(0, kt / 2 - t); dt < min_int(kt, T + kt / 2 - t); dt++)
            for (int dh = max_int(0, 1 - h); dh < min_int(3, H + 1 - h); dh++) {
                const float *RESTRICT row = dout + (((size_t)(t + dt - kt / 2) * H + h + dh - 1) * W + w) * C;
                const float *RESTRICT k = weight + (size_t)(dt * 3 + dh) * 3 * C;
                float dk[3][CONV_LANES], *RESTRICT dk_sum = dweight + (size_t)(dt * 3 + dh) * 3 * C;
                UNROLL
                for (int i = 0; i < 3; i++)
                    #pragma omp simd
                    for (int c = 0; c < n; c++) dk[i][c] = 0.0f;
                UNROLL
                for (int j = 0; j < CONV_PIXELS + 2; j++) {  // as above
                    const float *RESTRICT dy = w + j - 1 >= 0 && w + j - 1 < W ? row + (j - 1) * C : CONV_ZEROS;
                    UNROLL
                    for (int i = 0; i < CONV_PIXELS; i++)
                        if (j - i >= 0 && j - i < 3)
                            #pragma omp simd
                            for (int c = 0; c < n; c++) {
                                sum[i][c] += dy[c] * k[(j - i) * C + c];
                                dk[j - i][c] += dy[c] * x[i][c];
                            }
                }
                UNROLL
                for (int i = 0; i < 3; i++)
                    #pragma omp simd
                    for (int c = 0; c < n; c++) dk_sum[i * C + c] += dk[i][c];
            }
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            if (i < pixels)
                #pragma omp simd
                for (int c = 0; c < n; c++) {
                    dinp[(size_t)(w + i) * C + c] = sum[i][c];
                    dbias[c] += dout[((size_t)(t * H + h) * W + w + i) * C + c];
                }
    }
}

// dinp as above; dweight[tap] += sum over tokens of dout * inp[token + tap];  dbias += sum over tokens of dout
// A task has CONV_LANES channels of a slice of the rows, so that their weights and dweight stay in the first cache.
static void dwconv_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, int B, int T, int H, int W, int C, int kt) {
    if (kt == 1) B *= T, T = 1;
    int taps = kt * 9, slices = ceil_div(4 * SLICES, ceil_div(C, CONV_LANES));  // few if C is large
    size_t sums = (size_t)(taps + 1) * C, rows = (size_t)B * T * H;
    float *turned = taps_first(weight, C, taps, 1);
    float *partial = (float *)calloc_check(slices * sums, sizeof(float));  // (slices, taps + 1, C): dbias comes last
    #pragma omp parallel for schedule(static)
    for (int task = 0; task < slices * ceil_div(C, CONV_LANES); task++) {
        int slice = task % slices, c = task / slices * CONV_LANES, start = (int)(rows * slice / slices);
        float *dw = partial + slice * sums + c, *db = dw + (size_t)taps * C;
        for (int i = start; i < (int)(rows * (slice + 1) / slices); i++) {
            int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C;
            size_t at = clip + (size_t)(t * H + h) * W * C + c;
            const float *dy = dout + clip + c, *x = inp + at, *k = turned + c;
            if (C - c >= CONV_LANES) dwconv_row_backward(CONV_LANES, dinp + at, dw, db, dy, x, k, t, h, T, H, W, C, kt);
            else dwconv_row_backward(C - c, dinp + at, dw, db, dy, x, k, t, h, T, H, W, C, kt);
        }
    }
    for (int s = 1; s < slices; s++)  // in order: the same bits for every number of threads
        for (size_t i = 0; i < sums; i++) partial[i] += partial[(size_t)s * sums + i];
    for (int c = 0; c < C; c++) {
        for (int k = 0; k < taps; k++) dweight[(size_t)c * taps + k] += partial[(size_t)(taps - 1 - k) * C + c];
        dbias[c] += partial[(size_t)taps * C + c];
    }
    free(turned); free(partial);
}

#endif
