/* dwconv.h - the depthwise convolutions of train_vivim.c: 3x3 in each frame (MixFFN), 3x3x3 in the clip (DSF). Header only.

   Included by train_vivim.c, section 6, whose memory functions and macros it uses. In PyTorch's words
       y = F.conv3d(x, weight, bias, padding=(kt//2, 1, 1), groups=C)
   on channels-last activations: every channel has a kernel of its own, so channels are the lanes of a vector, and a number is
   used by up to 27 outputs: what matters is to have it at hand. dev/dwconv3d.c has the ladder from the textbook's loops to here. */
#ifndef VIVIM_DWCONV_H
#define VIVIM_DWCONV_H

enum { CONV_LANES = 2 * LANES, CONV_PIXELS = 4 };  // channels and pixels that a depthwise convolution handles at a time

// asks early for n channels of some pixels: the processor does not foresee steps of a whole pixel
static inline void prefetch_pixels(const float *x, int pixels, int n, int C) {
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < n; c += 16) PREFETCH(x + (size_t)i * C + c);
}

// weight (C, taps), PyTorch's order -> (taps, C), so that a tap's weights of neighbouring channels are neighbours.
// turned: the taps in reverse order.
static float *taps_first(const float *weight, int C, int taps, int turned) {
    float *w = malloc_floats((size_t)taps * C);
    for (int c = 0; c < C; c++)
        for (int k = 0; k < taps; k++) w[(size_t)(turned ? taps - 1 - k : k) * C + c] = weight[(size_t)c * taps + k];
    return w;
}

// n channels of one output row (b, t, h): out[w] = bias + sum over (kt, 3, 3) of inp[neighbour] * weight[tap].
// inp and out point at channel c0 of the clip's first token and of the row; n is a constant at the call. The sums of a few
// neighbouring pixels stay in registers: they share the weights, and most of the input.
ALWAYS_INLINE void dwconv_row(const int n, float *RESTRICT out, const float *RESTRICT inp, const float *RESTRICT weight,
                              const float *bias, int t, int h, int T, int H, int W, int C, int kt) {
    for (int w = 0; w < W; w += CONV_PIXELS) {
        float sum[CONV_PIXELS][CONV_LANES];
        prefetch_pixels(inp + ((size_t)(t * H + min_int(h + 2, H - 1)) * W + w) * C, min_int(CONV_PIXELS, W - w), n, C);
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
                    if (w + j - 1 < 0 || w + j - 1 >= W) continue;
                    const float *RESTRICT x = row + (j - 1) * C;
                    UNROLL
                    for (int i = 0; i < CONV_PIXELS; i++)
                        if (j - i >= 0 && j - i < 3)
                            #pragma omp simd
                            for (int c = 0; c < n; c++) sum[i][c] += x[c] * k[(j - i) * C + c];
                }
            }
        UNROLL
        for (int i = 0; i < CONV_PIXELS; i++)
            if (w + i < W)
                #pragma omp simd
                for (int c = 0; c < n; c++) out[(size_t)(w + i) * C + c] = sum[i][c] + (bias ? bias[c] : 0.0f);
    }
}

// number i of the batch's rows, (b, h, t): the frames' rows of one height follow each other, for they share their input
static void dwconv_channels(float *out, const float *inp, const float *weight, const float *bias, int i, int T, int H,
                            int W, int C, int kt) {
    int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C, at = clip + (size_t)(t * H + h) * W * C;
    for (int c = 0; c < C; c += CONV_LANES) {
        const float *bias_c = bias ? bias + c : NULL;
        if (C - c >= CONV_LANES) dwconv_row(CONV_LANES, out + at + c, inp + clip + c, weight + c, bias_c, t, h, T, H, W, C, kt);
        else dwconv_row(C - c, out + at + c, inp + clip + c, weight + c, bias_c, t, h, T, H, W, C, kt);
    }
}

// nn.Conv3d(C, C, (kt,3,3), padding=(kt//2,1,1), groups=C), and nn.Conv2d(C, C, 3, padding=1, groups=C) for kt = 1.
// out, inp (B, T, H, W, C); weight (C, 1, [kt,] 3, 3); bias (C)
static void dwconv_forward(float *out, const float *inp, const float *weight, const float *bias, int B, int T, int H, int W,
                           int C, int kt) {
    float *taps = taps_first(weight, C, kt * 9, 0);
    if (kt == 1) B *= T, T = 1;  // every frame is a clip
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T * H; i++) dwconv_channels(out, inp, taps, bias, i, T, H, W, C, kt);
    free(taps);
}

// n channels of dweight (taps first) and dbias from one output row: sums stay in registers along the row
ALWAYS_INLINE void dwconv_row_dweight(const int n, float *RESTRICT dweight, float *RESTRICT dbias,
                                      const float *RESTRICT dout, const float *RESTRICT inp, int t, int h, int T, int H,
                                      int W, int C, int kt) {
    for (int dt = max_int(0, kt / 2 - t); dt < min_int(kt, T + kt / 2 - t); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, H + 1 - h); dh++) {
            const float *RESTRICT row = inp + ((size_t)(t + dt - kt / 2) * H + h + dh - 1) * W * C;
            float sum[4][CONV_LANES], *RESTRICT k = dweight + (size_t)(dt * 3 + dh) * 3 * C;  // three taps, and dout itself
            UNROLL
            for (int i = 0; i < 4; i++)
                #pragma omp simd
                for (int c = 0; c < n; c++) sum[i][c] = 0.0f;
            for (int w = 0; w < W; w++) {
                const float *RESTRICT dy = dout + (size_t)w * C;
                if (dt == kt / 2 && dh == 2) prefetch_pixels(row + (size_t)(W + w) * C, 1, n, C);
                UNROLL
                for (int i = 0; i < 3; i++) {
                    if (w + i - 1 < 0 || w + i - 1 >= W) continue;
                    #pragma omp simd
                    for (int c = 0; c < n; c++) sum[i][c] += row[(size_t)(w + i - 1) * C + c] * dy[c];
                }
                #pragma omp simd
                for (int c = 0; c < n; c++) sum[3][c] += dy[c];
            }
            UNROLL
            for (int i = 0; i < 3; i++)
                #pragma omp simd
                for (int c = 0; c < n; c++) k[i * C + c] += sum[i][c];
            for (int c = 0; dt == kt / 2 && dh == 1 && c < n; c++) dbias[c] += sum[3][c];
        }
}

// dinp is the same convolution of dout with the kernel turned around in all axes (the padding is symmetric);
// dweight[tap] += sum over tokens of dout * inp[token + tap];  dbias += sum over tokens of dout
static void dwconv_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, int B, int T, int H, int W, int C, int kt) {
    if (kt == 1) B *= T, T = 1;
    int taps = kt * 9; size_t sums = (size_t)(taps + 1) * C, rows = (size_t)B * T * H;
    float *partial = slices_alloc(sums), *turned = taps_first(weight, C, taps, 1);  // (SLICES, taps + 1, C): dbias comes last
    #pragma omp parallel for schedule(static)
    for (int slice = 0; slice < SLICES; slice++)
        for (int i = (int)slice_start(rows, slice); i < (int)slice_start(rows, slice + 1); i++) {
            int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C;
            for (int c = 0; c < C; c += CONV_LANES) {
                const float *dy = dout + clip + (size_t)(t * H + h) * W * C + c, *x = inp + clip + c;
                float *dw = partial + (size_t)slice * sums + c, *db = dw + (size_t)taps * C;
                if (C - c >= CONV_LANES) dwconv_row_dweight(CONV_LANES, dw, db, dy, x, t, h, T, H, W, C, kt);
                else dwconv_row_dweight(C - c, dw, db, dy, x, t, h, T, H, W, C, kt);
            }
            dwconv_channels(dinp, dout, turned, NULL, i, T, H, W, C, kt);
        }
    slices_sum(partial, sums);
    for (int c = 0; c < C; c++) {
        for (int k = 0; k < taps; k++) dweight[(size_t)c * taps + k] += partial[(size_t)k * C + c];
        dbias[c] += partial[(size_t)taps * C + c];
    }
    free(turned); free(partial);
}

#endif
