// resize.h - bilinear resize of 8-bit images, with antialiasing, the same grey levels as Pillow's resize(BILINEAR).
//
// Plain bilinear interpolation looks at two pixels per axis; when an image shrinks it skips the others and aliases. Here the
// triangle is widened by the scale, so that every input pixel takes part:
//     scale = in / out,  s = max(scale, 1),  centre = (o + 0.5) scale
//     weight(o, i) = max(0, 1 - |i + 0.5 - centre| / s),  over their sum
// Two passes, along the rows first, then along the columns, and each rounds to 8 bits, as Pillow 9 does. (Pillow 13 takes
// the columns first where that is less work; the two orders differ by one grey level here and there.) The weights are
// integers of 22 fractional bits: 255 * 2^22 < 2^30, so a sum fits an int and does not depend on the order of its terms.

#ifndef PREPRO_RESIZE_H
#define PREPRO_RESIZE_H

#include <stdint.h>
#include <stdlib.h>

enum { RESIZE_BITS = 22 };   // fractional bits of a weight

// The weights of one axis: output o is the sum over k < count[o] of weight[o * taps + k] * input[first[o] + k].
typedef struct { int taps; int *first, *count, *weight; } ResizeAxis;

static inline void resize_axis_free(ResizeAxis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weight);
}

static inline int resize_axis_build(ResizeAxis *axis, int out_size, int in_size) {
    double scale = (double)in_size / out_size;
    double s = scale > 1.0 ? scale : 1.0;          // half the width of the triangle, in input pixels
    axis->taps = 2 * (int)(s + 1.0) + 1;
    axis->first = (int *)malloc((size_t)out_size * sizeof(int));
    axis->count = (int *)malloc((size_t)out_size * sizeof(int));
    axis->weight = (int *)malloc((size_t)out_size * (size_t)axis->taps * sizeof(int));
    double *real = (double *)malloc((size_t)axis->taps * sizeof(double));
    if (!axis->first || !axis->count || !axis->weight || !real) {
        resize_axis_free(axis);
        free(real);
        return -1;
    }
    for (int o = 0; o < out_size; o++) {
        double centre = (o + 0.5) * scale;
        int first = (int)(centre - s + 0.5), end = (int)(centre + s + 0.5);   // the conversion cuts towards zero
        if (first < 0) { first = 0; }
        if (end > in_size) { end = in_size; }
        double sum = 0.0;
        for (int k = 0; k < end - first; k++) {
            double distance = (first + k - centre + 0.5) * (1.0 / s);
            if (distance < 0.0) { distance = -distance; }
            real[k] = distance < 1.0 ? 1.0 - distance : 0.0;
            sum += real[k];
        }
        for (int k = 0; k < end - first; k++) {
            axis->weight[(size_t)o * (size_t)axis->taps + (size_t)k] = (int)(0.5 + real[k] / sum * (1 << RESIZE_BITS));
        }
        axis->first[o] = first;
        axis->count[o] = end - first;
    }
    free(real);
    return 0;
}

// The weights are not negative, but rounding may carry their sum a hair above 1: hence the bound.
static inline uint8_t resize_round(int sum) {
    int level = (sum + (1 << (RESIZE_BITS - 1))) >> RESIZE_BITS;
    return (uint8_t)(level > 255 ? 255 : level);
}

// out (OH,OW,C) = inp (H,W,C), bytes; all sizes >= 1. Returns 0, or -1 when memory is short.
static inline int resize_bilinear(uint8_t *out, int OH, int OW, const uint8_t *inp, int H, int W, int C) {
    ResizeAxis across, down;
    if (resize_axis_build(&across, OW, W) != 0) { return -1; }
    if (resize_axis_build(&down, OH, H) != 0) { resize_axis_free(&across); return -1; }
    size_t row_in = (size_t)W * (size_t)C, row_out = (size_t)OW * (size_t)C;
    uint8_t *half = (uint8_t *)malloc((size_t)H * row_out);      // (H,OW,C), after the first pass
    int *sum = (int *)malloc(row_out * sizeof(int));             // one row of the second pass
    if (half && sum) {
        for (int y = 0; y < H; y++) {
            for (int x = 0; x < OW; x++) {
                const uint8_t *inp_x = inp + (size_t)y * row_in + (size_t)across.first[x] * (size_t)C;
                const int *weight_x = across.weight + (size_t)x * (size_t)across.taps;
                uint8_t *half_x = half + (size_t)y * row_out + (size_t)x * (size_t)C;
                for (int c = 0; c < C; c++) {
                    int total = 0;
                    for (int k = 0; k < across.count[x]; k++) { total += inp_x[k * C + c] * weight_x[k]; }
                    half_x[c] = resize_round(total);
                }
            }
        }
        for (int y = 0; y < OH; y++) {
            const int *weight_y = down.weight + (size_t)y * (size_t)down.taps;
            for (size_t i = 0; i < row_out; i++) { sum[i] = 0; }
            for (int k = 0; k < down.count[y]; k++) {
                const uint8_t *half_k = half + (size_t)(down.first[y] + k) * row_out;
                for (size_t i = 0; i < row_out; i++) { sum[i] += half_k[i] * weight_y[k]; }
            }
            for (size_t i = 0; i < row_out; i++) { out[(size_t)y * row_out + i] = resize_round(sum[i]); }
        }
    }
    int status = half && sum ? 0 : -1;
    free(half);
    free(sum);
    resize_axis_free(&across);
    resize_axis_free(&down);
    return status;
}

#endif
