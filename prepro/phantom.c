/* phantom.c - writes a shard of synthetic ultrasound videos with the outline of a lesion on every frame.

   What it is for: to try, test and time the whole system without any patient's data, from nothing but a seed. What it
   is not: a simulator of acoustics, or a substitute for real videos. It gives what makes ultrasound hard for a
   segmentation network - speckle that moves with the tissue, low contrast, fuzzy rims, shadows - and nothing more.

   Build:  cc -O3 -march=native -ffp-contract=fast -fno-math-errno phantom.c -o phantom -lm
   Run:    ./phantom --out train.shard --videos 48 --seed 1 --preview train.png

   How a video is made:
     1. tissue     A rectangle of tissue, wider than the picture, is laid out once per video: skin, fat, gland, muscle and
                   what lies below, undulating, each with its own echo level and texture; vessels; ribs or calcifications.
                   Every point of it has scatterers (two fields of complex Gaussian noise), an echo level and an attenuation.
     2. motion     For each frame, a smooth map tells which point of the tissue stands at each pixel: the probe slides,
                   the hand presses, the tissue shears. Moving the plane of the picture turns one noise field into the other.
     3. lesion     A blob with its own motion and a changing outline replaces the echo level of the tissue it covers.
                   The mask is that outline: the middle of the fuzzy rim.
     4. sound      Attenuation adds up along each column, so shadows fall by themselves; the gain makes up for the average.
                   The echo is blurred by the point-spread function, narrow in depth and wide across, widest off the focus;
                   the magnitude of this complex sum is the speckle. Two looks with independent speckle are averaged, as
                   scanners do (compounding). Noise, logarithm, eight bits.

   The same options give the same file everywhere: random numbers are hashes of integers, every pixel is computed by
   itself and in double, so that the last digits, which differ between math libraries, vanish in the rounding to 8 bits. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "png.h"
#include "shard.h"

#define TWO_PI 6.283185307179586

enum { LAYERS = 5, VESSELS = 4, REFLECTORS = 2, HARMONICS = 4, MAX_TAPS = 65 };

static const double margin_u = 0.25, margin_v = 0.15;   // tissue beyond the picture: left and right, below

static void die(const char *message) {
    fprintf(stderr, "phantom: %s\n", message);
    exit(1);
}

static void *malloc_check(size_t bytes) {
    void *p = malloc(bytes);
    if (!p) die("out of memory; choose a smaller --size");
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// random numbers: hashes of integers, no state but a counter

static uint64_t hash(uint64_t x) {      // the finaliser of splitmix64: every bit of x moves every bit of the result
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

typedef struct {
    uint64_t key, count;
} Random;

static double uniform(Random *random, double low, double high) {
    return low + (high - low) * (double)(hash(random->key + random->count++) >> 11) / 9007199254740992.0;
}

// normal(0, 1) but for its tails: four 16-bit uniforms added up, variance 4/12
static double gaussian(uint64_t key, uint64_t index) {
    uint64_t h = hash(key + index);
    int64_t sum = (int64_t)((h & 65535) + (h >> 16 & 65535) + (h >> 32 & 65535) + (h >> 48)) - 2 * 65535;
    return (double)sum / 65535.0 * 1.7320508075688772;
}

static double smoothstep(double x) {
    if (x <= 0) return 0;
    if (x >= 1) return 1;
    return x * x * (3 - 2 * x);
}

// smooth noise in -1 .. 1 whose features are about 1 unit wide: values at integer points, blended between them
static double value_noise(uint64_t key, double x, double y) {
    double fx = floor(x), fy = floor(y), a = smoothstep(x - fx), b = smoothstep(y - fy), corner[4];
    for (int k = 0; k < 4; k++) {
        uint64_t column = (uint64_t)((int64_t)fx + (k & 1)), row = (uint64_t)((int64_t)fy + (k >> 1));
        corner[k] = (double)(hash(key ^ hash(column + (row << 32))) >> 11) / 4503599627370496.0 - 1;
    }
    return (corner[0] * (1 - a) + corner[1] * a) * (1 - b) + (corner[2] * (1 - a) + corner[3] * a) * b;
}

// ---------------------------------------------------------------------------------------------------------------------
// what a video is drawn from. Lengths are fractions of the picture's width (u) or height (v); echo levels are in decibels.

typedef struct {
    double u, v, radius_u, radius_v;
} Ellipse;

typedef struct {
    uint64_t key;                                       // for the noise fields
    // tissue: layer k reaches down to bottom[k] + its waves
    double bottom[LAYERS], level[LAYERS], wave_size[LAYERS], wave_phase[LAYERS], wave_length[LAYERS];
    Ellipse vessels[VESSELS];
    int n_vessels;
    Ellipse reflectors[REFLECTORS];                     // radius_v: how much the arc hangs down at its ends
    int n_reflectors;
    double shadow;                                      // decibels lost in a reflector
    // motion: per frame, t = its number
    double slide, slide_speed, slide_phase;             // probe left and right
    double press, press_speed, press_phase;             // depth squeezed
    double shear, shear_speed, shear_phase;             // deep tissue lags behind
    double plane_speed;                                 // radians per frame from one noise field to the other
    // lesion
    Ellipse lesion;
    double angle, contrast, halo, rim, patches, lesion_attenuation, drift, pulse, lesion_speed, lesion_phase;
    double harmonic[HARMONICS], harmonic_phase[HARMONICS], harmonic_speed[HARMONICS];
    double leaves_at;                                   // the frame by which the plane has left the lesion; before 0: never
    int comes_back_to_front;                            // 1: time runs the other way, the lesion appears
    // the scanner
    double gain, tilt, range, focus, noise, blur;
} Video;

static Video draw_video(uint64_t seed, int number, int frames) {
    Video v;
    memset(&v, 0, sizeof v);
    Random r;
    r.key = hash(hash(seed) + (uint64_t)number), r.count = 0;
    v.key = hash(r.key ^ 0x7151u);

    //                                   skin  fat   gland  muscle below
    static const double bottoms[LAYERS] = {0.035, 0.17, 0.76, 0.90, 9.0}, levels[LAYERS] = {6, -7, 0, -6, -12};
    for (int k = 0; k < LAYERS; k++) {
        v.bottom[k] = bottoms[k] * uniform(&r, 0.85, 1.15);
        v.level[k] = levels[k] + uniform(&r, -1.5, 1.5);
        v.wave_size[k] = (k == 0 ? 0.003 : 0.035) * uniform(&r, 0.3, 1);
        v.wave_phase[k] = uniform(&r, 0, TWO_PI);
        v.wave_length[k] = uniform(&r, 0.5, 1.3);
    }

    v.slide = uniform(&r, 0.02, 0.11), v.slide_speed = uniform(&r, 0.15, 0.5), v.slide_phase = uniform(&r, 0, TWO_PI);
    v.press = uniform(&r, 0.01, 0.07), v.press_speed = uniform(&r, 0.2, 0.6), v.press_phase = uniform(&r, 0, TWO_PI);
    v.shear = uniform(&r, 0.005, 0.03), v.shear_speed = uniform(&r, 0.2, 0.6), v.shear_phase = uniform(&r, 0, TWO_PI);
    v.plane_speed = uniform(&r, 0.01, 0.08);

    // the lesion covers 5 to 17 % of the frame, flat rather than tall, in the gland
    double area = uniform(&r, 0.05, 0.17), flatness = uniform(&r, 0.85, 1.6);
    v.lesion.radius_u = sqrt(area / TWO_PI * 2 * flatness), v.lesion.radius_v = sqrt(area / TWO_PI * 2 / flatness);
    v.lesion.u = uniform(&r, 0.32, 0.68), v.lesion.v = uniform(&r, 0.40, 0.56);
    v.angle = uniform(&r, -0.4, 0.4);
    v.contrast = uniform(&r, -15, -9);
    if (uniform(&r, 0, 1) < 0.15) v.contrast = uniform(&r, -7, -5), v.halo = uniform(&r, 7, 10);    // not much darker: a dark halo
    v.rim = uniform(&r, 0.10, 0.32);
    v.patches = uniform(&r, 1, 3.5);
    v.lesion_attenuation = uniform(&r, -22, 16);
    v.drift = uniform(&r, 0, 0.02), v.pulse = uniform(&r, 0, 0.08);
    v.lesion_speed = uniform(&r, 0.3, 0.8), v.lesion_phase = uniform(&r, 0, TWO_PI);
    for (int k = 0; k < HARMONICS; k++) {
        v.harmonic[k] = uniform(&r, 0, 0.30) / (k + 1.5);
        v.harmonic_phase[k] = uniform(&r, 0, TWO_PI);
        v.harmonic_speed[k] = uniform(&r, -0.35, 0.35);
    }
    // every seventh video loses its lesion for about a sixth of its frames
    double leaves = uniform(&r, 0.68, 0.87) * frames;
    v.leaves_at = frames >= 4 && ((uint64_t)number + hash(seed) % 7) % 7 == 0 ? leaves : -1;
    v.comes_back_to_front = uniform(&r, 0, 1) < 0.5;

    // vessels: black, sharp and much smaller than a lesion, and never in it
    v.n_vessels = (int)uniform(&r, 0, VESSELS + 0.999);
    for (int k = 0; k < v.n_vessels; k++) {
        Ellipse *e = &v.vessels[k];
        e->radius_v = uniform(&r, 0.016, 0.032), e->radius_u = e->radius_v * uniform(&r, 0.9, 2.2);
        do {
            e->u = uniform(&r, -0.1, 1.1), e->v = uniform(&r, 0.22, 0.85);
        } while (hypot((e->u - v.lesion.u) / (v.lesion.radius_u + e->radius_u),
                       (e->v - v.lesion.v) / (v.lesion.radius_v + e->radius_v)) < 1.4);
    }
    // reflectors: ribs under the muscle, or a calcification beside the lesion; the shadow must not hide the lesion
    v.n_reflectors = (int)uniform(&r, 0, REFLECTORS + 0.999);
    for (int k = 0; k < v.n_reflectors; k++) {
        Ellipse *e = &v.reflectors[k];
        int rib = uniform(&r, 0, 1) < 0.5;
        e->radius_u = rib ? uniform(&r, 0.10, 0.16) : uniform(&r, 0.02, 0.05);
        e->radius_v = rib ? uniform(&r, 0.02, 0.05) : uniform(&r, 0.002, 0.01);
        double side = uniform(&r, 0, 1) < 0.5 ? -1 : 1;
        e->u = rib ? uniform(&r, 0, 1) : v.lesion.u + side * (v.lesion.radius_u * 1.15 + e->radius_u + uniform(&r, 0, 0.25));
        e->v = rib ? uniform(&r, 0.82, 0.90) : uniform(&r, 0.16, 0.6);
    }

    v.shadow = uniform(&r, 11, 22);
    v.gain = uniform(&r, -3, 3), v.tilt = uniform(&r, -10, -1), v.range = uniform(&r, 46, 58);
    v.focus = uniform(&r, 0.35, 0.65), v.noise = uniform(&r, -34, -26), v.blur = uniform(&r, 0.9, 1.2);
    return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. tissue

typedef struct {
    int rows, columns;              // at the picture's resolution, margins included
    double *scatter[4];             // two complex fields: re, im, re, im
    double *echo, *attenuation;     // decibels, decibels per height of the picture
} Tissue;

// the bottom of layer k below the place u
static double layer_bottom(const Video *v, int k, double u) {
    double angle = TWO_PI * u / v->wave_length[k], phase = v->wave_phase[k];
    return v->bottom[k] + v->wave_size[k] * (sin(angle + phase) + 0.4 * sin(2.7 * angle + 2 * phase));
}

// One point: echo level and attenuation, and how far the echo is a mirror's, the same everywhere, instead of speckle.
static void tissue_point(const Video *v, double u, double depth, double *echo, double *attenuation, double *mirror) {
    *attenuation = *mirror = 0;
    int k = 0;                      // the layer, and how far its top is above
    double above = depth;
    for (; k < LAYERS - 1; k++) {
        double beyond = depth - layer_bottom(v, k, u);
        if (beyond < 0) break;
        above = beyond;
    }
    double coarse = value_noise(v->key + 1, u * 7, depth * 11), fine = value_noise(v->key + 2, u * 30, depth * 38), ridge;
    switch (k) {
    case 0:                                             // skin: two bright sheets
        *echo = 4 * cos(TWO_PI * 2 * depth / v->bottom[0]);
        break;
    case 1:                                             // fat: dark lobules between bright septa, which lie flat
        ridge = value_noise(v->key + 3, u * 5 + 0.5 * coarse, depth * 24 + 4 * u);
        *echo = coarse + 9 * exp(-ridge * ridge * 130) * smoothstep(0.6 + coarse);
        break;
    case 2:                                             // gland: grains, dark ducts and bright strands, patches darker and brighter
        ridge = value_noise(v->key + 4, u * 6 + 0.7 * coarse, depth * 15 + 3 * u);
        *echo = 2.2 * coarse + 2.2 * fine + 4 * exp(-ridge * ridge * 90) - 3 * smoothstep(4 * ridge - 1.2);
        break;
    case 3:                                             // muscle: striations
        *echo = coarse + 6 * value_noise(v->key + 5, u * 4, depth * 70 + 2 * coarse + 5 * u);
        break;
    default:                                            // below: little is left to see
        *echo = 2 * coarse + 3 * value_noise(v->key + 6, u * 5, depth * 30);
    }
    *echo += v->level[k];

    // fascia: a thin bright line on top of a layer, in places
    if (k > 0) {
        double patchy = smoothstep(0.55 + 0.8 * value_noise(v->key + 7, u * 9, 5.0 * k)), width = k < LAYERS - 1 ? 0.0045 : 0.008;
        double line = patchy * exp(-above * above / (2 * width * width));
        *echo += 9 * line;
        *mirror += 0.8 * line;
    }

    for (int i = 0; i < v->n_vessels; i++) {
        const Ellipse *e = &v->vessels[i];
        double distance = hypot((u - e->u) / e->radius_u, (depth - e->v) / e->radius_v);
        double inside = smoothstep((1.08 - distance) / 0.16);
        *echo = *echo * (1 - inside) - 34 * inside;
        *attenuation -= 25 * inside;
        double wall = (distance - 1.15) / 0.15;
        *echo += 5 * exp(-wall * wall) * fabs(depth - e->v) / e->radius_v;      // brightest where sound hits it flat
    }
    for (int i = 0; i < v->n_reflectors; i++) {
        const Ellipse *e = &v->reflectors[i];
        double across = (u - e->u) / e->radius_u, thickness = 0.02;
        double behind = depth - (e->v + e->radius_v * across * across + 0.008 * coarse + 0.004 * fine);
        if (fabs(across) > 1.2 || behind < -0.05 || behind > 0.1) continue;
        double width = smoothstep((1.15 - fabs(across)) / 0.5);
        double face = width * exp(-behind * behind / (2 * 0.006 * 0.006));
        *echo += 16 * face;
        *mirror += face;
        if (behind > 0 && behind < thickness) *attenuation += v->shadow / thickness * width;
    }
}

// Width of the point-spread function in pixels: finer pictures have more pixels to a grain of speckle, but not as many more.
static double grain_of(const Video *v, int H, int W) { return v->blur * sqrt((H < W ? H : W) / 64.0); }

static void make_tissue(Tissue *tissue, const Video *v, int H, int W) {
    const double mirror_size = 1.3 / grain_of(v, H, W);     // blurred, equal echoes add up faster than random ones: grain against 1
    for (int i = 0; i < tissue->rows; i++) {
        for (int j = 0; j < tissue->columns; j++) {
            size_t at = (size_t)i * (size_t)tissue->columns + (size_t)j;
            double mirror;
            tissue_point(v, (j + 0.5) / W - margin_u, (i + 0.5) / H, &tissue->echo[at], &tissue->attenuation[at], &mirror);
            for (int k = 0; k < 4; k++)
                tissue->scatter[k][at] = gaussian(hash(v->key + 100 + (uint64_t)k), at) + mirror_size * mirror;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. motion, 3. lesion

typedef struct {
    double slide, press, shear, plane;                  // the tissue at this moment
    double u, v, scale, cosine, sine;                   // the lesion: centre, size, direction; scale 0 = out of the plane
    double harmonic[HARMONICS][2];                      // of its outline: size times cos, sin of the phase
} Moment;

static Moment moment_of(const Video *v, int frame, int frames) {
    Moment m;
    double t = v->comes_back_to_front ? frames - 1 - frame : frame;
    m.slide = v->slide * sin(v->slide_speed * t + v->slide_phase);
    m.press = v->press * sin(v->press_speed * t + v->press_phase);
    m.shear = v->shear * sin(v->shear_speed * t + v->shear_phase);
    m.plane = v->plane_speed * t;

    double beat = v->lesion_speed * t + v->lesion_phase;
    m.u = v->lesion.u + v->drift * cos(beat), m.v = v->lesion.v + v->drift * sin(1.3 * beat);
    m.scale = 1 + v->pulse * sin(beat);
    // The plane leaves a ball: the cut shrinks as a circle does, slowly and then fast. Meanwhile the speckle changes faster.
    if (v->leaves_at >= 0) {
        double away = (t - v->leaves_at + 2.5) / 2.5;
        if (away > 0) {
            m.plane += 0.5 * away;
            m.scale *= away < 1 ? sqrt(1 - away * away) : 0;
        }
    }
    if (m.scale < 0.4) m.scale = 0;                     // a last sliver nobody would outline
    m.cosine = cos(v->angle), m.sine = sin(v->angle);
    for (int k = 0; k < HARMONICS; k++) {
        double phase = v->harmonic_phase[k] + v->harmonic_speed[k] * t;
        m.harmonic[k][0] = v->harmonic[k] * cos(phase), m.harmonic[k][1] = v->harmonic[k] * sin(phase);
    }
    return m;
}

// Distance of a point of the tissue from the lesion's outline, in radii, positive inside.
// The outline in polar coordinates: r(angle) = 1 + sum_k size_k cos(k angle + phase_k), k = 2 .. HARMONICS + 1
static double lesion_depth(const Video *v, const Moment *m, double u, double depth) {
    if (m->scale == 0) return -1;
    double x = (m->cosine * (u - m->u) + m->sine * (depth - m->v)) / (v->lesion.radius_u * m->scale);
    double y = (m->cosine * (depth - m->v) - m->sine * (u - m->u)) / (v->lesion.radius_v * m->scale);
    double radius = sqrt(x * x + y * y);
    if (radius > 2.2) return -1;
    if (radius < 1e-9) return 1;
    double c = x / radius, s = y / radius, ck = c, sk = s, outline = 1;
    for (int k = 0; k < HARMONICS; k++) {               // cos and sin of k angle, one multiple after the other
        double next = ck * c - sk * s;
        sk = sk * c + ck * s;
        ck = next;
        outline += ck * m->harmonic[k][0] - sk * m->harmonic[k][1];
    }
    return outline - radius;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. sound

typedef struct {
    double *echo[4];                                    // (H, W) each: the two looks, re and im of each
    double *blurred[4];
    double *level, *attenuation;                        // (H, W)
    double *lost;                                       // (2, W): decibels lost above each pixel of a row, and the next row's
} Canvas;

// A Gaussian of the given width, of unit energy so that speckle keeps its brightness. Returns its radius.
static int gaussian_taps(double *taps, double width) {
    int radius = (int)ceil(2.5 * width);
    if (radius > MAX_TAPS / 2) radius = MAX_TAPS / 2;
    double energy = 0;
    for (int k = -radius; k <= radius; k++) {
        taps[k + radius] = exp(-k * k / (2 * width * width));
        energy += taps[k + radius] * taps[k + radius];
    }
    for (int k = 0; k <= 2 * radius; k++) taps[k] /= sqrt(energy);
    return radius;
}

static int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// rgb: (H, W, 3), mask: (H, W)
static void render(uint8_t *rgb, uint8_t *mask, const Video *v, const Tissue *tissue, const Canvas *canvas,
                   int frame, int frames, int H, int W) {
    const Moment m = moment_of(v, frame, frames);
    const double plane_cos = cos(m.plane), plane_sin = sin(m.plane);

    // the tissue at every pixel
    for (int i = 0; i < H; i++) {
        for (int j = 0; j < W; j++) {
            size_t at = (size_t)i * (size_t)W + (size_t)j;
            double x = (j + 0.5) / W, z = (i + 0.5) / H;
            double u = x + m.slide + m.shear * z * sin(TWO_PI * 0.7 * x + v->shear_phase);
            double depth = z * (1 + m.press + m.shear * sin(TWO_PI * 0.9 * x + v->slide_phase));    // the skin stays at the probe

            double column = (u + margin_u) * W - 0.5, row = depth * H - 0.5;
            int c = clamp((int)floor(column), 0, tissue->columns - 2), l = clamp((int)floor(row), 0, tissue->rows - 2);
            double a = column - c, b = row - l;
            a = a < 0 ? 0 : a > 1 ? 1 : a, b = b < 0 ? 0 : b > 1 ? 1 : b;
            const double weight[4] = {(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b};
            const size_t corner = (size_t)l * (size_t)tissue->columns + (size_t)c;
            const size_t from[4] = {corner, corner + 1, corner + (size_t)tissue->columns, corner + (size_t)tissue->columns + 1};
            double sample[6] = {0, 0, 0, 0, 0, 0}, energy = 0;
            for (int k = 0; k < 4; k++) {
                for (int f = 0; f < 4; f++) sample[f] += weight[k] * tissue->scatter[f][from[k]];
                sample[4] += weight[k] * tissue->echo[from[k]];
                sample[5] += weight[k] * tissue->attenuation[from[k]];
                energy += weight[k] * weight[k];
            }
            double unit = 1 / sqrt(energy);             // between lattice points noise would be weaker
            for (int part = 0; part < 2; part++) {      // re, im; the looks are orthogonal, so their speckle is independent
                canvas->echo[part][at] = unit * (plane_cos * sample[part] + plane_sin * sample[part + 2]);
                canvas->echo[part + 2][at] = unit * (plane_cos * sample[part + 2] - plane_sin * sample[part]);
            }

            double inside = lesion_depth(v, &m, u, depth), cover = smoothstep(inside / v->rim + 0.5);
            double patches = cover > 0 ? v->patches * value_noise(v->key + 8, (u - m.u) * 14, (depth - m.v) * 14) : 0;
            double rim = (inside + 0.02) / 0.10;
            canvas->level[at] = sample[4] * (1 - cover) + (v->level[2] + v->contrast + patches) * cover - v->halo * exp(-rim * rim);
            canvas->attenuation[at] = sample[5] + v->lesion_attenuation * cover;
            mask[at] = inside > 0 ? 255 : 0;
        }
    }

    // attenuation adds up from the probe down; the beam's width blurs its edges with depth
    double *lost = canvas->lost, *next = canvas->lost + W;
    for (int j = 0; j < W; j++) lost[j] = 0;
    for (int i = 0; i < H; i++) {
        double *level_i = canvas->level + (size_t)i * (size_t)W;
        const double *attenuation_i = canvas->attenuation + (size_t)i * (size_t)W;
        double z = (i + 0.5) / H, spread = 0.16;
        for (int j = 0; j < W; j++) {
            double sides = lost[j > 0 ? j - 1 : 0] + lost[j < W - 1 ? j + 1 : W - 1];
            next[j] = (1 - 2 * spread) * lost[j] + spread * sides + attenuation_i[j] / H;
            level_i[j] += v->gain + v->tilt * z - lost[j] - 3 * fabs(z - v->focus);
        }
        double *swap = lost;
        lost = next, next = swap;
    }

    // echo = point-spread function * (scatterers times amplitude), first down, then across
    const double grain = grain_of(v, H, W);
    double down[MAX_TAPS];
    const int down_radius = gaussian_taps(down, 0.55 * grain);
    for (size_t at = 0; at < (size_t)H * (size_t)W; at++) {
        double amplitude = exp(canvas->level[at] * 0.11512925464970229);            // 10^(level / 20)
        for (int k = 0; k < 4; k++) canvas->echo[k][at] *= amplitude;
    }
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < H; i++) {
            double *to = canvas->blurred[k] + (size_t)i * (size_t)W;
            for (int j = 0; j < W; j++) to[j] = 0;
            for (int d = -down_radius; d <= down_radius; d++) {
                const double *from = canvas->echo[k] + (size_t)clamp(i + d, 0, H - 1) * (size_t)W;
                for (int j = 0; j < W; j++) to[j] += down[d + down_radius] * from[j];
            }
        }
    }
    const uint64_t noise_key = hash(v->key + 1000 + (uint64_t)frame);
    for (int i = 0; i < H; i++) {
        double z = (i + 0.5) / H, across[MAX_TAPS];
        int radius = gaussian_taps(across, grain * (0.9 + 1.1 * fabs(z - v->focus)));
        double noise = exp((v->noise + 8 * z) * 0.11512925464970229);   // of the electronics; the gain lifts it with depth
        for (int j = 0; j < W; j++) {
            size_t at = (size_t)i * (size_t)W + (size_t)j;
            double energy = 0;
            for (int k = 0; k < 4; k++) {
                const double *from = canvas->blurred[k] + (size_t)i * (size_t)W;
                double sum = noise * gaussian(noise_key, 4 * at + (uint64_t)k);
                for (int d = -radius; d <= radius; d++) sum += across[d + radius] * from[clamp(j + d, 0, W - 1)];
                energy += sum * sum;
            }
            double decibels = 4.342944819032518 * log(energy / 2 + 1e-9);
            double grey = 255 * (0.52 + (decibels - 3) / v->range);
            rgb[3 * at] = rgb[3 * at + 1] = rgb[3 * at + 2] = (uint8_t)(grey < 0 ? 0 : grey > 255 ? 255 : grey + 0.5);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the contact sheet: a pair of rows for a video, its frames and the same with the outline

typedef struct {
    int rows, columns, zoom, step;                      // videos, frames, pixels to a pixel, every step-th frame
    int cell_height, cell_width, height, width;         // a frame with its gap, the sheet
    uint8_t *rgb;
} Sheet;

static Sheet sheet_make(int videos, int frames, int H, int W) {
    Sheet s;
    s.zoom = clamp(160 / W, 1, 4);
    s.cell_height = H * s.zoom + 3, s.cell_width = W * s.zoom + 3;
    s.columns = clamp(1600 / s.cell_width, 1, frames < 8 ? frames : 8);
    s.rows = clamp(2000 / (2 * s.cell_height), 1, videos < 6 ? videos : 6);
    s.step = s.columns > 1 ? (frames - 1) / (s.columns - 1) : 1;
    s.height = 2 * s.rows * s.cell_height, s.width = s.columns * s.cell_width;
    s.rgb = (uint8_t *)malloc_check((size_t)s.width * (size_t)s.height * 3);
    memset(s.rgb, 0, (size_t)s.width * (size_t)s.height * 3);
    return s;
}

static void sheet_add(Sheet *s, const uint8_t *rgb, const uint8_t *mask, int video, int frame, int H, int W) {
    const int column = frame / s->step;
    if (video >= s->rows || frame % s->step != 0 || column >= s->columns) return;
    for (int outlined = 0; outlined < 2; outlined++) {
        for (int i = 0; i < H * s->zoom; i++) {
            for (int j = 0; j < W * s->zoom; j++) {
                int y = i / s->zoom, x = j / s->zoom;
                size_t at = (size_t)y * (size_t)W + (size_t)x, row = (size_t)((2 * video + outlined) * s->cell_height + i);
                uint8_t *to = s->rgb + (row * (size_t)s->width + (size_t)(column * s->cell_width + j)) * 3;
                int edge = mask[at] && (y == 0 || x == 0 || y == H - 1 || x == W - 1 || !mask[at - 1] || !mask[at + 1] ||
                                        !mask[at - (size_t)W] || !mask[at + (size_t)W]);
                memcpy(to, rgb + 3 * at, 3);
                if (outlined && edge) to[0] = 255, to[1] = 200, to[2] = 0;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// options

typedef struct {
    const char *out, *preview;
    int videos, frames, H, W;
    uint64_t seed;
} Options;

static void print_help(void) {
    printf("phantom - writes a shard of synthetic ultrasound videos with lesion masks\n\n"
           "  --out FILE        the shard to write (needed)\n"
           "  --videos N        videos, 1 .. 100000                          [48]\n"
           "  --frames N        frames of each video, 1 .. 10000             [8]\n"
           "  --size HxW        height and width of a frame, 32 .. 2048      [64x64]\n"
           "  --seed S          another seed, other videos; 0 .. 2^63 - 1    [1]\n"
           "  --preview FILE    also write a contact sheet, a PNG picture\n"
           "  --help            this text\n");
}

// a whole number and nothing else; the text may end where `end` says
static long long parse_number(const char *option, const char *text, char end, const char **rest, long long low, long long high) {
    char *stop;
    errno = 0;
    long long value = strtoll(text, &stop, 10);
    if (text[0] < '0' || text[0] > '9' || *stop != end || errno || value < low || value > high) {
        fprintf(stderr, "phantom: %s: '%s' is not a number from %lld to %lld; see --help\n", option, text, low, high);
        exit(1);
    }
    if (rest) *rest = stop + 1;
    return value;
}

static Options parse_options(int argc, char **argv) {
    Options o;
    o.out = o.preview = NULL, o.videos = 48, o.frames = 8, o.H = o.W = 64, o.seed = 1;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (strcmp(name, "--help") == 0) {
            print_help();
            exit(0);
        }
        static const char *const known[6] = {"--out", "--videos", "--frames", "--size", "--seed", "--preview"};
        int option = 0;
        while (option < 6 && strcmp(name, known[option]) != 0) option++;
        if (option == 6 || i + 1 == argc) {
            fprintf(stderr, "phantom: %s: %s; see --help\n", name, option == 6 ? "there is no such option" : "needs a value");
            exit(1);
        }
        const char *value = argv[++i], *rest;
        switch (option) {
        case 0: o.out = value; break;
        case 1: o.videos = (int)parse_number(name, value, 0, NULL, 1, 100000); break;
        case 2: o.frames = (int)parse_number(name, value, 0, NULL, 1, 10000); break;
        case 3:
            if (!strchr(value, 'x')) die("--size: must be two numbers, like 64x96; see --help");
            o.H = (int)parse_number(name, value, 'x', &rest, 32, 2048);
            o.W = (int)parse_number(name, rest, 0, NULL, 32, 2048);
            break;
        case 4: o.seed = (uint64_t)parse_number(name, value, 0, NULL, 0, INT64_MAX); break;
        default: o.preview = value;
        }
    }
    if (!o.out || !o.out[0]) die("--out FILE is needed; see --help");
    if (o.preview && strcmp(o.out, o.preview) == 0) die("--out and --preview name the same file; choose two");
    return o;
}

int main(int argc, char **argv) {
    const Options o = parse_options(argc, argv);
    const int H = o.H, W = o.W;
    const size_t pixels = (size_t)H * (size_t)W;

    Tissue tissue;
    tissue.columns = (int)(W * (1 + 2 * margin_u)), tissue.rows = (int)(H * (1 + margin_v));
    const size_t points = (size_t)tissue.columns * (size_t)tissue.rows;
    double *tissue_memory = (double *)malloc_check(6 * points * sizeof(double));
    for (int k = 0; k < 4; k++) tissue.scatter[k] = tissue_memory + (size_t)k * points;
    tissue.echo = tissue_memory + 4 * points, tissue.attenuation = tissue_memory + 5 * points;

    double *canvas_memory = (double *)malloc_check((10 * pixels + 2 * (size_t)W) * sizeof(double));
    Canvas canvas;
    for (size_t k = 0; k < 4; k++) {
        canvas.echo[k] = canvas_memory + k * pixels;
        canvas.blurred[k] = canvas_memory + (k + 4) * pixels;
    }
    canvas.level = canvas_memory + 8 * pixels, canvas.attenuation = canvas_memory + 9 * pixels;
    canvas.lost = canvas_memory + 10 * pixels;

    uint8_t *rgb = (uint8_t *)malloc_check(4 * pixels), *mask = rgb + 3 * pixels;
    Sheet sheet;
    memset(&sheet, 0, sizeof sheet);
    if (o.preview) sheet = sheet_make(o.videos, o.frames, H, W);

    char err[512], name[SHARD_NAME];
    ShardWriter writer;
    int failed = shard_create(&writer, o.out, H, W, 1, err, sizeof err);
    int64_t empty_frames = 0, lesion_pixels = 0;
    for (int number = 0; number < o.videos && !failed; number++) {
        const Video video = draw_video(o.seed, number, o.frames);
        make_tissue(&tissue, &video, H, W);
        snprintf(name, sizeof name, "phantom-%llu-%05d", (unsigned long long)o.seed, number);
        failed = shard_begin_video(&writer, name, err, sizeof err);
        for (int frame = 0; frame < o.frames && !failed; frame++) {
            render(rgb, mask, &video, &tissue, &canvas, frame, o.frames, H, W);
            failed = shard_add_frame(&writer, rgb, mask, err, sizeof err);
            int64_t area = 0;
            for (size_t i = 0; i < pixels; i++) area += mask[i] > 0;
            empty_frames += area == 0, lesion_pixels += area;
            if (o.preview) sheet_add(&sheet, rgb, mask, number, frame, H, W);
        }
    }
    failed = failed || shard_finish(&writer, err, sizeof err);
    if (!failed) {
        int64_t frames = (int64_t)o.videos * o.frames, shown = frames - empty_frames;
        double cover = 100.0 * (double)lesion_pixels / ((double)pixels * (double)(shown > 0 ? shown : 1));
        printf("%s: %d videos, %lld frames of %d x %d; %lld frames show the lesion, which covers %.1f %% of them\n",
               o.out, o.videos, (long long)frames, H, W, (long long)shown, cover);
        if (o.preview) failed = png_write(o.preview, sheet.rgb, sheet.height, sheet.width, 3, err, sizeof err);
    }
    if (failed) fprintf(stderr, "phantom: %s\n", err);
    free(sheet.rgb);
    free(rgb);
    free(canvas_memory);
    free(tissue_memory);
    return failed ? 1 : 0;
}
