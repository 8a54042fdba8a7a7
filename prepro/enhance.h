/* enhance.h - Pillow's ImageEnhance, bit for bit: the colour augmentation of training. Header only.

   Brightness, Contrast, Color, Sharpness, in this order, each mix the image with a duller version of itself (black, the mean
   grey, the grey image, a smoothed image) by a factor: 1 leaves it, 0 gives the dull one, above 1 exaggerates. */
#ifndef ENHANCE_H
#define ENHANCE_H

#include <stdint.h>
#include <string.h>

// dull + factor (value - dull), clamped to 0..255 and truncated. Pillow rounds the product to float32 before it adds; the
// product is made in double here so that no compiler joins the two into one multiply-add.
static inline uint8_t enhance_mix(int dull, int value, float factor) {
    float mixed = (float)((double)factor * (double)(value - dull)) + (float)dull;
    return mixed <= 0.0f ? 0 : mixed >= 255.0f ? 255 : (uint8_t)mixed;
}

// Pillow's convert("L"): ITU-R 601's 0.299, 0.587, 0.114 in 1/65536, rounded
static inline int enhance_luma(const uint8_t *rgb) { return (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16; }

// rgb (H, W, 3), in place; tmp has room for as much
static inline void enhance(uint8_t *rgb, uint8_t *tmp, int H, int W, float brightness, float contrast, float saturation,
                           float sharpness) {
    size_t n = (size_t)H * (size_t)W;
    double grey_sum = 0.0;
    for (size_t i = 0; i < 3 * n; i++) rgb[i] = enhance_mix(0, rgb[i], brightness);
    for (size_t i = 0; i < n; i++) grey_sum += enhance_luma(rgb + 3 * i);
    int mean = (int)(grey_sum / (double)n + 0.5);
    for (size_t i = 0; i < 3 * n; i++) rgb[i] = enhance_mix(mean, rgb[i], contrast);
    for (size_t i = 0; i < n; i++) {
        int grey = enhance_luma(rgb + 3 * i);
        for (size_t c = 0; c < 3; c++) rgb[3 * i + c] = enhance_mix(grey, rgb[3 * i + c], saturation);
    }
    memcpy(tmp, rgb, 3 * n);
    for (int y = 1; y + 1 < H; y++)  // smoothed by [1 1 1; 1 5 1; 1 1 1]/13; the border stays as it is
        for (int x = 3; x < 3 * (W - 1); x++) {
            const uint8_t *p = tmp + ((size_t)y * (size_t)W * 3 + (size_t)x), *up = p - 3 * (size_t)W, *down = p + 3 * (size_t)W;
            int sum = up[-3] + up[0] + up[3] + p[-3] + 5 * p[0] + p[3] + down[-3] + down[0] + down[3];
            rgb[(size_t)y * (size_t)W * 3 + (size_t)x] = enhance_mix((2 * sum + 13) / 26, p[0], sharpness);
        }
}

#endif
