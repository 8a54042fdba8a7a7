/* metrics.h - how good is a segmentation? The measures of the papers, from probabilities and masks. Header only, C99 and
   C++17; knows nothing of the model, allocates nothing, prints nothing.

   THE THREE PROTOCOLS
     ultrasound   threshold p > 0.5; Dice, Jaccard, ... of every frame; mean over frames
     polyp        p is stretched to 0 .. 1 frame by frame; a curve over the thresholds p >= k / 255, k = 0 .. 255; the first
                  and the last frame of every video are left out; the curves' mean over the frames of a video, then over
                  videos; and only then the maximum over thresholds. S-measure, E-measure, mean absolute error: the same means
     released     what Vivim's released training script calls Dice: the mean over the thresholds p > k / 255 of every
                  frame, p as it is; mean over all frames; with the rest of that family

   LEVELS. A frame comes as 255 p, called its level v, in double: the byte of a grey picture as it stands. So "p > k/255" is
   "v > k", which is exact for bytes; dividing by 255 first would leave ties to rounding. metrics_level() makes v of a float.
   A curve has 256 thresholds but costs one histogram: v > k for k = 0 .. ceil(v) - 1, and v >= k for k = 0 .. floor(v).

       MetricsFrame frame;  MetricsPolyp video, all;  memset both to 0
       metrics_frame(&frame, level, object, H, W);                  // level (H, W), object (H, W) 0 or 1
       metrics_polyp_add(&video, &frame.polyp);                     // frame after frame
       metrics_polyp_add(&all, &video);                             // video after video
       metrics_polyp_results(results, &all);

   CORNERS. A measure without denominator is 0 (a frame that is empty in both has Dice 0). On the polyp curves all three are
   0 where nothing is hit. The S-measure is 0 where a mean or a deviation of no pixel would be needed. A constant p is not
   stretched. The E-measure divides by the pixels less one, so a perfect one is slightly above 1.

   Sections: counts at one threshold | one frame at all thresholds | means | another size */
#ifndef VIVIM_METRICS_H
#define VIVIM_METRICS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// ---------------------------------------------------------------------------------------------------------------------
// counts at one threshold

// The six measures at one threshold
enum { METRICS_DICE, METRICS_JACCARD, METRICS_PRECISION, METRICS_RECALL, METRICS_SPECIFICITY, METRICS_FSCORE, METRICS_SIX };

typedef struct { double pixels, object, predicted, hit; } MetricsCounts;  // hit: object and predicted; whole numbers

static inline double metrics_ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }

// With hit = TP, predicted - hit = FP, object - hit = FN, the rest TN:
//   Dice = 2 TP / (2 TP + FP + FN)     Jaccard (IoU) = TP / (TP + FP + FN)     Specificity = TN / (TN + FP)
//   Precision P = TP / (TP + FP)       Recall R = TP / (TP + FN)               F = 2 P R / (P + R + 1e-5)
// F1 is Dice; the released code's small number makes it differ in the sixth digit, so it stands for itself.
static inline void metrics_six(double six[METRICS_SIX], MetricsCounts c) {
    double precision = metrics_ratio(c.hit, c.predicted), recall = metrics_ratio(c.hit, c.object);
    six[METRICS_DICE] = metrics_ratio(2.0 * c.hit, c.predicted + c.object);
    six[METRICS_JACCARD] = metrics_ratio(c.hit, c.predicted + c.object - c.hit);
    six[METRICS_PRECISION] = precision;
    six[METRICS_RECALL] = recall;
    six[METRICS_SPECIFICITY] = metrics_ratio(c.pixels - c.predicted - c.object + c.hit, c.pixels - c.object);
    six[METRICS_FSCORE] = 2.0 * precision * recall / (precision + recall + 1e-5);
}

// The ultrasound protocol: sums over frames, to be divided by their number
typedef struct {
    double sum[METRICS_SIX];
    int frames, empty;  // empty: frames without any object pixel, predicted or true
} MetricsUltrasound;

static inline void metrics_ultrasound_add(MetricsUltrasound *sums, MetricsCounts c) {
    double six[METRICS_SIX];
    metrics_six(six, c);
    for (int m = 0; m < METRICS_SIX; m++) sums->sum[m] += six[m];
    sums->empty += c.predicted + c.object == 0.0;
    sums->frames++;
}

// A frame of n pixels: pred > threshold (0.5 for probabilities, 0 for logits) against mask > 0.5
static inline MetricsCounts metrics_count(const float *pred, float threshold, const float *mask, size_t n) {
    size_t object = 0, predicted = 0, hit = 0;
    for (size_t i = 0; i < n; i++) {
        int p = pred[i] > threshold, g = mask[i] > 0.5f;
        object += (size_t)g, predicted += (size_t)p, hit += (size_t)(p & g);
    }
    MetricsCounts c = {(double)n, (double)object, (double)predicted, (double)hit};
    return c;
}

static inline void metrics_ultrasound_mean(double mean[METRICS_SIX], const MetricsUltrasound *sums) {
    for (int m = 0; m < METRICS_SIX; m++) mean[m] = metrics_ratio(sums->sum[m], sums->frames);
}

// The E-measure of a binary prediction. With a = predicted - its mean and b = object - its mean (0 or 1 less the fraction),
//   sum over pixels of (2 a b / (a^2 + b^2 + eps) + 1)^2 / 4,  divided by  pixels - 1 + eps.
// A pixel knows only whether it is predicted and whether it is object, so the sum has four different terms. On a mask
// without object every pixel that is not predicted counts 1, on a full mask every predicted one.
static inline double metrics_emeasure(MetricsCounts c) {
    const double eps = 2.220446049250313e-16;
    double sum = 0.0;
    if (c.object == 0.0) {
        sum = c.pixels - c.predicted;
    } else if (c.object == c.pixels) {
        sum = c.predicted;
    } else {
        double count[4] = {c.pixels - c.predicted - c.object + c.hit, c.object - c.hit, c.predicted - c.hit, c.hit};
        for (int k = 0; k < 4; k++) {
            double a = (k >> 1) - c.predicted / c.pixels, b = (k & 1) - c.object / c.pixels;
            double align = 2.0 * a * b / (a * a + b * b + eps) + 1.0;
            sum += count[k] * align * align / 4.0;
        }
    }
    return sum / (c.pixels - 1.0 + eps);
}

// ---------------------------------------------------------------------------------------------------------------------
// one frame at all thresholds

enum { METRICS_THRESHOLDS = 256 };

// Sums over frames or over videos
typedef struct {
    double dice[METRICS_THRESHOLDS], iou[METRICS_THRESHOLDS], specificity[METRICS_THRESHOLDS];  // at p >= k/255
    double emeasure[METRICS_THRESHOLDS];
    double emeasure_adaptive, smeasure, mae;
    int count;
} MetricsPolyp;

typedef struct {
    MetricsCounts half;                             // at p > 0.5
    double curve[METRICS_SIX][METRICS_THRESHOLDS];  // at p > k/255
    MetricsPolyp polyp;                             // of this frame, count 1
} MetricsFrame;

// 255 p of a float p. A float that is the nearest one to k/255 means k, not the k +- 1e-6 that 255 p may give.
static inline double metrics_level(float p) {
    double level = 255.0 * (double)p, k = floor(level + 0.5);
    return p == (float)(k / 255.0) ? k : level;
}

// floor(v) and ceil(v), within 0 .. 255
static inline int metrics_floor(double v) { return v >= 255.0 ? 255 : v > 0.0 ? (int)v : 0; }
static inline int metrics_ceil(double v) {
    int k = metrics_floor(v);
    return k < v && k < 255 ? k + 1 : k;
}

// Sums from which mean, variance and covariance of some pixels follow. x enters as its distance d from the first pixel's:
// then nothing cancels, and equal values have a variance of exactly 0, which the S-measure asks for.
typedef struct { double n, object, first, d, dd, d_object; } MetricsMoments;

static inline void metrics_moments_add(MetricsMoments *m, double x, int object) {
    if (m->n == 0.0) m->first = x;
    double d = x - m->first;
    m->n += 1.0, m->object += object, m->d += d, m->dd += d * d, m->d_object += object ? d : 0.0;
}

static inline double metrics_mean(const MetricsMoments *m) { return m->n > 0.0 ? m->first + m->d / m->n : NAN; }

// The variance with n - 1; NaN for less than two pixels
static inline double metrics_variance(const MetricsMoments *m) {
    return m->n > 1.0 ? fmax(0.0, m->dd - m->d * m->d / m->n) / (m->n - 1.0) : NAN;
}

// How alike is a part of the picture, x (mean mx, variance vx), to the mask there, g (mean mg, variance vg)?
//   4 mx mg cov / ((mx^2 + mg^2) (vx + vg)) - and where that is 0: 1 if the denominator is 0 too, else 0
static inline double metrics_similarity(const MetricsMoments *m) {
    const double eps = 2.220446049250313e-16;
    if (m->n < 2.0) return NAN;
    double mx = metrics_mean(m), vx = metrics_variance(m), mg = m->object / m->n;
    double vg = (m->object - m->object * mg) / (m->n - 1.0), cov = (m->d_object - m->d * mg) / (m->n - 1.0);  // 0: g constant
    double above = 4.0 * mx * mg * cov, below = (mx * mx + mg * mg) * (vx + vg);
    return above != 0.0 ? above / (below + eps) : below == 0.0 ? 1.0 : 0.0;
}

// How bright and even is the object (or how dark the background)?  2 m / (m^2 + 1 + deviation)
static inline double metrics_brightness(double mean, double variance) {
    return 2.0 * mean / (mean * mean + 1.0 + sqrt(variance) + 2.220446049250313e-16);
}

// S-measure = half the brightness of object and background, weighted by their areas, and half the similarity of the four
// parts into which the object's centroid cuts the picture, weighted by theirs. part: background, object.
static inline double metrics_smeasure(const MetricsMoments part[2], const MetricsMoments quarter[4], double mean) {
    double pixels = part[0].n + part[1].n, share = part[1].n / pixels;
    if (part[1].n == 0.0) return 1.0 - mean;
    if (part[0].n == 0.0) return mean;
    double by_object = share * metrics_brightness(metrics_mean(&part[1]), metrics_variance(&part[1]))
                     + (1.0 - share) * metrics_brightness(1.0 - metrics_mean(&part[0]), metrics_variance(&part[0]));
    double by_region = 0.0;
    for (int k = 0; k < 4; k++) by_region += quarter[k].n / pixels * metrics_similarity(&quarter[k]);
    double s = 0.5 * by_object + 0.5 * by_region;
    return s > 0.0 ? s : 0.0;  // of NaN too
}

// All measures of a frame: level (H, W) = 255 p, within 0 .. 255; object (H, W), 0 or 1. Two passes and a short third.
static inline void metrics_frame(MetricsFrame *out, const double *level, const uint8_t *object, int H, int W) {
    size_t pixels = (size_t)H * (size_t)W, i = 0;
    int64_t sum_y = 0, sum_x = 0;
    int above[METRICS_THRESHOLDS][2], from[METRICS_THRESHOLDS][2];  // histograms of ceil and floor, [1] of object pixels
    MetricsCounts c = {(double)pixels, 0.0, 0.0, 0.0};
    memset(out, 0, sizeof *out), memset(above, 0, sizeof above), memset(from, 0, sizeof from);

    double low = level[0], high = level[0];
    out->half = c;
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++, i++) {
            double v = level[i]; int g = object[i];
            if (v < low) low = v;
            if (v > high) high = v;
            above[metrics_ceil(v)][g]++;
            out->half.predicted += v > 127.5, out->half.hit += v > 127.5 && g;
            c.object += g, sum_y += g ? y : 0, sum_x += g ? x : 0;
        }
    out->half.object = c.object;

    for (int k = METRICS_THRESHOLDS - 1; k >= 0; k--) {  // p > k/255: all pixels with ceil(v) > k
        double six[METRICS_SIX];
        metrics_six(six, c);
        for (int m = 0; m < METRICS_SIX; m++) out->curve[m][k] = six[m];
        c.predicted += above[k][0] + above[k][1], c.hit += above[k][1];
    }

    // q = (v - low) / (high - low), or v / 255 of a constant frame. The centroid is rounded, halves to even, and its row and
    // column belong to the upper and left parts.
    double scale = high > low ? high - low : 255.0, zero = high > low ? low : 0.0, sum_q = 0.0, error = 0.0;
    int split_y = c.object > 0.0 ? (int)rint((double)sum_y / c.object) + 1 : 0;
    int split_x = c.object > 0.0 ? (int)rint((double)sum_x / c.object) + 1 : 0;
    MetricsMoments part[2], quarter[4];
    memset(part, 0, sizeof part), memset(quarter, 0, sizeof quarter);
    i = 0;
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++, i++) {
            double q = (level[i] - zero) / scale; int g = object[i];
            from[q == 1.0 ? 255 : metrics_floor(255.0 * (level[i] - zero) / scale)][g]++;  // of bytes exact; 255 r / r is not
            sum_q += q, error += fabs(q - g);
            metrics_moments_add(&part[g], q, g);
            metrics_moments_add(&quarter[2 * (y >= split_y) + (x >= split_x)], q, g);
        }

    MetricsPolyp *p = &out->polyp;
    c.predicted = c.hit = 0.0;
    for (int k = METRICS_THRESHOLDS - 1; k >= 0; k--) {  // q >= k/255: all pixels with floor(255 q) >= k
        double six[METRICS_SIX];
        c.predicted += from[k][0] + from[k][1], c.hit += from[k][1];
        metrics_six(six, c);
        p->dice[k] = six[METRICS_DICE], p->iou[k] = six[METRICS_JACCARD];
        p->specificity[k] = c.hit > 0.0 ? six[METRICS_SPECIFICITY] : 0.0;
        p->emeasure[k] = metrics_emeasure(c);
    }

    double mean = sum_q / (double)pixels, adaptive = fmin(2.0 * mean, 1.0);
    c.predicted = c.hit = 0.0;
    for (i = 0; i < pixels; i++) {
        int predicted = (level[i] - zero) / scale >= adaptive;
        c.predicted += predicted, c.hit += predicted & object[i];
    }
    p->emeasure_adaptive = metrics_emeasure(c);
    p->smeasure = metrics_smeasure(part, quarter, mean);
    p->mae = error / (double)pixels;
    p->count = 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// means

// Adds the mean of `from` to `to`: of one frame to its video, or of a video to all videos. Nothing in it: nothing is added.
static inline void metrics_polyp_add(MetricsPolyp *to, const MetricsPolyp *from) {
    if (from->count == 0) return;
    for (int k = 0; k < METRICS_THRESHOLDS; k++) {
        to->dice[k] += from->dice[k] / from->count, to->iou[k] += from->iou[k] / from->count;
        to->specificity[k] += from->specificity[k] / from->count, to->emeasure[k] += from->emeasure[k] / from->count;
    }
    to->emeasure_adaptive += from->emeasure_adaptive / from->count;
    to->smeasure += from->smeasure / from->count, to->mae += from->mae / from->count;
    to->count++;
}

static inline double metrics_curve_mean(const double curve[METRICS_THRESHOLDS]) {
    double sum = 0.0;
    for (int k = 0; k < METRICS_THRESHOLDS; k++) sum += curve[k];
    return sum / METRICS_THRESHOLDS;
}

static inline double metrics_curve_max(const double curve[METRICS_THRESHOLDS]) {
    double highest = curve[0];
    for (int k = 1; k < METRICS_THRESHOLDS; k++) highest = fmax(highest, curve[k]);
    return highest;
}

enum { METRICS_MAX_DICE, METRICS_MAX_IOU, METRICS_MAX_SPECIFICITY, METRICS_MEAN_DICE, METRICS_MEAN_IOU,
       METRICS_MEAN_SPECIFICITY, METRICS_SMEASURE, METRICS_MAX_EMEASURE, METRICS_MEAN_EMEASURE, METRICS_ADAPTIVE_EMEASURE,
       METRICS_MAE,
       METRICS_POLYP_RESULTS };

static inline void metrics_polyp_results(double results[METRICS_POLYP_RESULTS], const MetricsPolyp *sums) {
    const double *const curve[3] = {sums->dice, sums->iou, sums->specificity};
    for (int m = 0; m < 3; m++) {
        results[METRICS_MAX_DICE + m] = metrics_curve_max(curve[m]);
        results[METRICS_MEAN_DICE + m] = metrics_curve_mean(curve[m]);
    }
    results[METRICS_SMEASURE] = sums->smeasure;
    results[METRICS_MAX_EMEASURE] = metrics_curve_max(sums->emeasure);
    results[METRICS_MEAN_EMEASURE] = metrics_curve_mean(sums->emeasure);
    results[METRICS_ADAPTIVE_EMEASURE] = sums->emeasure_adaptive;
    results[METRICS_MAE] = sums->mae;
    for (int m = 0; m < METRICS_POLYP_RESULTS; m++) results[m] = metrics_ratio(results[m], sums->count);
}

// The released script's family, sums over frames: the six measures' means over the thresholds, their maxima, the rest
enum { METRICS_RELEASED_MEAN, METRICS_RELEASED_MAX = METRICS_SIX, METRICS_RELEASED_SMEASURE = 2 * METRICS_SIX,
       METRICS_RELEASED_EMEASURE_MEAN, METRICS_RELEASED_EMEASURE_MAX, METRICS_RELEASED_EMEASURE_ADAPTIVE, METRICS_RELEASED_MAE,
       METRICS_RELEASED_RESULTS };

typedef struct { double sum[METRICS_RELEASED_RESULTS]; int frames; } MetricsReleased;

static inline void metrics_released_add(MetricsReleased *sums, const MetricsFrame *frame) {
    for (int m = 0; m < METRICS_SIX; m++) {
        sums->sum[METRICS_RELEASED_MEAN + m] += metrics_curve_mean(frame->curve[m]);
        sums->sum[METRICS_RELEASED_MAX + m] += metrics_curve_max(frame->curve[m]);
    }
    sums->sum[METRICS_RELEASED_SMEASURE] += frame->polyp.smeasure;
    sums->sum[METRICS_RELEASED_EMEASURE_MEAN] += metrics_curve_mean(frame->polyp.emeasure);
    sums->sum[METRICS_RELEASED_EMEASURE_MAX] += metrics_curve_max(frame->polyp.emeasure);
    sums->sum[METRICS_RELEASED_EMEASURE_ADAPTIVE] += frame->polyp.emeasure_adaptive;
    sums->sum[METRICS_RELEASED_MAE] += frame->polyp.mae;
    sums->frames++;
}

static inline void metrics_released_mean(double mean[METRICS_RELEASED_RESULTS], const MetricsReleased *sums) {
    for (int m = 0; m < METRICS_RELEASED_RESULTS; m++) mean[m] = metrics_ratio(sums->sum[m], sums->frames);
}

// ---------------------------------------------------------------------------------------------------------------------
// another size

// F.interpolate(inp, size=(H, W), mode='bilinear', align_corners=False): out (H, W), inp (h, w). Along one side, the centre
// of pixel o lies at i = (o + 0.5) h / H - 0.5, at least 0; it mixes pixels floor(i) and the next (at the end: itself).
// a + weight (b - a), because it leaves equal values as they are.
static inline void metrics_resize(double *out, int H, int W, const double *inp, int h, int w) {
    for (int y = 0; y < H; y++) {
        double from_y = fmax(0.0, (y + 0.5) * h / H - 0.5);
        int y0 = (int)from_y;
        const double *row0 = inp + (size_t)y0 * (size_t)w, *row1 = y0 + 1 < h ? row0 + w : row0;
        for (int x = 0; x < W; x++) {
            double from_x = fmax(0.0, (x + 0.5) * w / W - 0.5), weight = from_x - (int)from_x;
            int x0 = (int)from_x, x1 = x0 + 1 < w ? x0 + 1 : x0;
            double upper = row0[x0] + weight * (row0[x1] - row0[x0]), lower = row1[x0] + weight * (row1[x1] - row1[x0]);
            out[(size_t)y * (size_t)W + (size_t)x] = upper + (from_y - y0) * (lower - upper);
        }
    }
}

#endif
