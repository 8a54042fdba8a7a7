/* dwconv.h - the depthwise convolutions of train_vivim.c: 3x3 in each frame (MixFFN), 3x3x3 in the clip (DSF). Header only.

   Included by train_vivim.c, section 6, whose memory functions and macros it uses. In PyTorch's words
       y = F.conv3d(x, weight, bias, padding=(kt//2, 1, 1), groups=C)
   on channels-last activations: every channel has a kernel of its own, so channels are the lanes of a vector, and a number is
   used by up to 27 outputs: what matters is to have it at hand. dev/dwconv3d.c has the ladder from the textbook's loops to
   here. */
#ifndef VIVIM_DWCONV_H
#define VIVIM_DWCONV_H

// A convolution handles CONV_LANES channels of CONV_PIXELS neighbouring pixels at a time: two vectors of each, so that the
// pixels' sums and what they share fit into the registers. Backward's tasks have CONV_CHANNELS channels, or what is left.
#ifdef __AVX512F__
enum { CONV_LANES = 32, CONV_PIXELS = 4, CONV_CHANNELS = 512 };
#else
enum { CONV_LANES = 16, CONV_PIXELS = 4, CONV_CHANNELS = 512 };
#endif

// asks early for as many numbers as are handled at a time. In the order in which they lie in memory, not in that in which they
// will be used: so the processor sees where the next ones are, and fetches many more than it can be asked for.
ALWAYS_INLINE void prefetch_floats(const float *x, int write) {
    for (int i = 0; i < CONV_PIXELS * CONV_LANES; i += 16)
        if (write) PREFETCH_WRITE(x + i);
        else PREFETCH(x + i);
}

// weight (C, taps), PyTorch's order -> (taps, C), so that a tap's weights of neighbouring channels are neighbours.
// turned: the taps in reverse order. Behind the last tap is a row of zeros: what lies left and right of an image.
static float *taps_first(const float *weight, int C, int taps, int turned) {
    float *w = malloc_floats((size_t)(taps + 1) * C);
    memset(w + (size_t)taps * C, 0, (size_t)C * sizeof(float));
    for (int c = 0; c < C; c++)
        for (int k = 0; k < taps; k++) w[(size_t)(turned ? taps - 1 - k : k) * C + c] = weight[(size_t)c * taps + k];
    return w;
}

// What the pixels w .. w + CONV_PIXELS - 1 of row (t, h) read, in each row of each frame around it that there is
typedef struct {
    const float *x[9][CONV_PIXELS + 2];  // [r][j]: column w + j - 1 of such a row; it meets pixel w + i in tap j - i
    int tap[9], rows;                    // [r]: the first of its three taps
} ConvGroup;

// inp points at the clip's first token
static ConvGroup conv_group(const float *inp, const float *zeros, int t, int h, int w, int T, int H, int W, int C, int kt) {
    ConvGroup g; g.rows = 0;
    for (int dt = max_int(0, kt / 2 - t); dt < min_int(kt, T + kt / 2 - t); dt++)
        for (int dh = max_int(0, 1 - h); dh < min_int(3, H + 1 - h); dh++, g.rows++) {
            const float *pixel = inp + (((size_t)(t + dt - kt / 2) * H + h + dh - 1) * W + w) * C;
            for (int j = 0; j < CONV_PIXELS + 2; j++)
                g.x[g.rows][j] = w + j - 1 >= 0 && w + j - 1 < W ? pixel + (j - 1) * C : zeros;
            g.tap[g.rows] = (dt * 3 + dh) * 3;
        }
    return g;
}

// from the group at pixel w of row (t, h) to the next one. Rows come in the order (b, h, t)
static inline ptrdiff_t next_group(int t, int w, int T, int H, int W, int C) {
    ptrdiff_t row = (ptrdiff_t)W * C, frame = H * row;
    return w + CONV_PIXELS < W ? (ptrdiff_t)CONV_PIXELS * C : (t + 1 < T ? frame : row - (T - 1) * frame) - (ptrdiff_t)w * C;
}

// n channels from c0 on of a group's `pixels` pixels: out = bias + sum over rows and columns of x * weight[tap], and gelu =
// gelu(out); out or gelu may be NULL. n is a constant at the call. The sums stay in registers: they share the weights, and most
// of the input.
ALWAYS_INLINE void conv_group_forward(const int n, float *RESTRICT out, float *RESTRICT gelu, const ConvGroup *g,
                                      const float *RESTRICT weight, const float *RESTRICT bias, int c0, int pixels, int C) {
    float sum[CONV_PIXELS][CONV_LANES];
    UNROLL
    for (int i = 0; i < CONV_PIXELS; i++)
        #pragma omp simd
        for (int c = 0; c < n; c++) sum[i][c] = 0.0f;
    for (int r = 0; r < g->rows; r++) {
        const float *RESTRICT k = weight + (size_t)g->tap[r] * C + c0;
        UNROLL
        for (int j = 0; j < CONV_PIXELS + 2; j++) {
            const float *RESTRICT x = g->x[r][j] + c0;
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
            for (int c = 0; c < n; c++) out[(size_t)i * C + c0 + c] = sum[i][c] + bias[c0 + c];
    UNROLL
    for (int i = 0; i < CONV_PIXELS; i++)
        if (i < pixels && gelu)
            #pragma omp simd
            for (int c = 0; c < n; c++) gelu[(size_t)i * C + c0 + c] = gelu_simd(sum[i][c] + bias[c0 + c]);
}

// nn.Conv3d(C, C, (kt,3,3), padding=(kt//2,1,1), groups=C), and nn.Conv2d(C, C, 3, padding=1, groups=C) for kt = 1.
// In the feed-forward networks F.gelu(out) comes next: made here it does not have to read out again. Either may be NULL, if it
// is not wanted; inference does without out.
// out, gelu, inp (B, T, H, W, C); weight (C, 1, [kt,] 3, 3); bias (C)
static void dwconv_forward(float *out, float *gelu, const float *inp, const float *weight, const float *bias, int B, int T,
                           int H, int W, int C, int kt) {
    float *taps = taps_first(weight, C, kt * 9, 0), *zeros = taps + (size_t)kt * 9 * C;
    if (kt == 1) B *= T, T = 1;  // every frame is a clip
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < B * T * H; i++) {  // rows (b, h, t): the frames' rows of one height follow each other, they share input
        int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C;
        for (int w = 0; w < W; w += CONV_PIXELS) {
            ConvGroup g = conv_group(inp + clip, zeros, t, h, w, T, H, W, C, kt);
            size_t at = clip + ((size_t)(t * H + h) * W + w) * C; ptrdiff_t next = next_group(t, w, T, H, W, C);
            const float *below = inp + clip + ((size_t)(t * H + min_int(h + 2, H - 1)) * W + w) * C;
            float *y = out ? out + at : NULL, *a = gelu ? gelu + at : NULL; int pixels = min_int(CONV_PIXELS, W - w);
            for (int c = 0; c < C; c += CONV_LANES) {
                prefetch_floats(below + CONV_PIXELS * c, 0);
                if (y) prefetch_floats(y + next + CONV_PIXELS * c, 1);
                if (a) prefetch_floats(a + next + CONV_PIXELS * c, 1);
                if (C - c >= CONV_LANES) conv_group_forward(CONV_LANES, y, a, &g, taps, bias, c, pixels, C);
                else conv_group_forward(C - c, y, a, &g, taps, bias, c, pixels, C);
            }
        }
    }
    free(taps);
}

// n channels from c0 on of a group in backward. dinp is the same convolution of dout, with the kernel turned around in all
// axes (the padding is symmetric), so what is asked of a pixel is
//     dinp = sum over taps of dout[neighbour] * weight[tap];   dweight[tap] += dout[neighbour] * inp
// with dweight turned, too: one walk over dout's neighbours serves both, and of inp only the pixels themselves are read. To
// dweight is added what a group of pixels gives. dinp, dout, inp point at the group's first pixel.
ALWAYS_INLINE void conv_group_backward(const int n, float *RESTRICT dinp, float *RESTRICT dweight, float *RESTRICT dbias,
                                       const float *RESTRICT dout, const ConvGroup *g, const float *RESTRICT inp,
                                       const float *RESTRICT weight, int c0, int pixels, int C) {
    float sum[CONV_PIXELS][CONV_LANES], x[CONV_PIXELS][CONV_LANES];
    UNROLL
    for (int i = 0; i < CONV_PIXELS; i++)
        #pragma omp simd
        for (int c = 0; c < n; c++) sum[i][c] = 0.0f, x[i][c] = i < pixels ? inp[(size_t)i * C + c0 + c] : 0.0f;
    for (int r = 0; r < g->rows; r++) {
        const float *RESTRICT k = weight + (size_t)g->tap[r] * C + c0;
        float dk[3][CONV_LANES], *RESTRICT dk_sum = dweight + (size_t)g->tap[r] * C + c0;
        UNROLL
        for (int i = 0; i < 3; i++)
            #pragma omp simd
            for (int c = 0; c < n; c++) dk[i][c] = 0.0f;
        UNROLL
        for (int j = 0; j < CONV_PIXELS + 2; j++) {
            const float *RESTRICT dy = g->x[r][j] + c0;
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
                dinp[(size_t)i * C + c0 + c] = sum[i][c];
                dbias[c0 + c] += dout[(size_t)i * C + c0 + c];
            }
}

// dinp as above; dweight[tap] += sum over tokens of dout * inp[token + tap];  dbias += sum over tokens of dout
// A task has CONV_CHANNELS channels of a slice of the rows, so that their weights and dweight stay in a cache.
static void dwconv_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, int B, int T, int H, int W, int C, int kt) {
    if (kt == 1) B *= T, T = 1;
    int taps = kt * 9, chunks = ceil_div(C, CONV_CHANNELS), slices = 2 * ceil_div(SLICES / 2, chunks);  // few if C is large
    size_t sums = (size_t)(taps + 1) * C, rows = (size_t)B * T * H;
    float *turned = taps_first(weight, C, taps, 1), *zeros = turned + (size_t)taps * C;
    float *partial = (float *)calloc_check(slices * sums, sizeof(float));  // (slices, taps + 1, C): dbias comes last
    #pragma omp parallel for schedule(static)
    for (int task = 0; task < slices * chunks; task++) {
        int slice = task / chunks, c0 = task % chunks * CONV_CHANNELS, n = min_int(CONV_CHANNELS, C - c0);
        float *dw = partial + slice * sums, *db = dw + (size_t)taps * C;
        for (int i = (int)(rows * slice / slices); i < (int)(rows * (slice + 1) / slices); i++) {
            int t = i % T, h = i / T % H; size_t clip = (size_t)(i / (T * H)) * T * H * W * C;
            for (int w = 0; w < W; w += CONV_PIXELS) {
                ConvGroup g = conv_group(dout + clip, zeros, t, h, w, T, H, W, C, kt);
                size_t at = clip + ((size_t)(t * H + h) * W + w) * C; ptrdiff_t next = next_group(t, w, T, H, W, C) + c0;
                const float *below = dout + clip + ((size_t)(t * H + min_int(h + 2, H - 1)) * W + w) * C + c0;
                const float *dy = dout + at, *x = inp + at; float *dx = dinp + at; int pixels = min_int(CONV_PIXELS, W - w);
                for (int c = 0; c < n; c += CONV_LANES) {
                    int part = CONV_PIXELS * c / n * C + CONV_PIXELS * c % n;  // of the n channels of CONV_PIXELS pixels
                    prefetch_floats(below + part, 0);
                    prefetch_floats(x + next + part, 0);
                    prefetch_floats(dx + next + part, 1);
                    if (n - c >= CONV_LANES) conv_group_backward(CONV_LANES, dx, dw, db, dy, &g, x, turned, c0 + c, pixels, C);
                    else conv_group_backward(n - c, dx, dw, db, dy, &g, x, turned, c0 + c, pixels, C);
                }
            }
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
