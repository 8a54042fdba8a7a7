/* overlay.h - frames with the outlines of their masks, one by one or side by side on a sheet. Header only.

   An outline runs where a mask changes between a pixel and its right or lower neighbour: red for the predicted mask,
   green for the true one, yellow where they agree. With alpha > 0 what is inside is tinted in the same colours. Small
   frames are enlarged on a sheet so that a person sees something. */
#ifndef OVERLAY_H
#define OVERLAY_H

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    uint8_t *rgb;               // (H, W, 3), the sheet
    int H, W;                   // of the sheet
    int frame_H, frame_W, columns, zoom;
    double alpha;               // 0 .. 1, of the tint
} Overlay;

// A black sheet of rows x columns frames of H x W, each pixel as a square of zoom x zoom; 0, or -1 without memory (H and W of
// the sheet are set in any case).
static inline int overlay_open_zoomed(Overlay *o, int rows, int columns, int H, int W, int zoom) {
    o->zoom = zoom, o->frame_H = H, o->frame_W = W, o->columns = columns, o->alpha = 0.0;
    o->H = rows * H * zoom, o->W = columns * W * zoom;
    o->rgb = (uint8_t *)calloc((size_t)o->H * (size_t)o->W, 3);
    return o->rgb ? 0 : -1;
}

// The same, with frames enlarged to sides of about 256
static inline int overlay_open(Overlay *o, int rows, int columns, int H, int W) {
    int side = H > W ? H : W;
    return overlay_open_zoomed(o, rows, columns, H, W, side < 256 ? 256 / side : 1);
}

static inline void overlay_close(Overlay *o) { free(o->rgb); }

// Draws frame rgb (H, W, 3) at place number `place`; predicted and real (H, W) are 0 or 1, real may be NULL: not known.
static inline void overlay_add(Overlay *o, int place, const uint8_t *rgb, const uint8_t *predicted, const uint8_t *real) {
    int H = o->frame_H, W = o->frame_W, top = place / o->columns * H * o->zoom, left = place % o->columns * W * o->zoom;
    for (int y = 0; y < H * o->zoom; y++)
        for (int x = 0; x < W * o->zoom; x++) {
            int below = (y + 1) / o->zoom, right = (x + 1) / o->zoom;
            size_t p = (size_t)(y / o->zoom) * (size_t)W + (size_t)(x / o->zoom);
            size_t q = below < H ? (size_t)below * (size_t)W + (size_t)(x / o->zoom) : p;
            size_t r = right < W ? (size_t)(y / o->zoom) * (size_t)W + (size_t)right : p;
            int red = predicted[p] != predicted[q] || predicted[p] != predicted[r];
            int green = real && (real[p] != real[q] || real[p] != real[r]);
            int inside[3] = {predicted[p], real && real[p], 0};  // red, green, both: yellow
            double tint = inside[0] || inside[1] ? o->alpha : 0.0;
            uint8_t *to = o->rgb + ((size_t)(top + y) * (size_t)o->W + (size_t)(left + x)) * 3;
            for (int c = 0; c < 3; c++)
                to[c] = (uint8_t)((1.0 - tint) * rgb[3 * p + (size_t)c] + tint * 255 * inside[c] + 0.5);
            if (red || green) to[0] = red ? 255 : 0, to[1] = green ? 255 : 0, to[2] = 0;
        }
}

#endif
