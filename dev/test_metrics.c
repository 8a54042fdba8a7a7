/* test_metrics.c - is metrics.h right?

   Build:  make dev/test_metrics
   Run:    dev/test_metrics                 the last line counts, the exit status is the verdict
           dev/test_metrics --write DIR     writes the videos that test_evaluate.sh evaluates, and what must come out

   The measures are held against numbers of their PyTorch and numpy versions in every corner (dev/golden/metrics.safetensors),
   against plain loops that go through all pixels once for every threshold, and against examples worked out by hand. An
   output holds NaN before it is filled, and an error is compared by !(error <= limit), so that NaN fails.

   Sections: checks | golden numbers | plain loops | examples | resizing | files for test_evaluate.sh | main */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define VIVIM_PROGRAM "test_metrics"
#include <float.h>
#include "../prepro/cli.h"
#include "../prepro/png.h"
#include "../prepro/safetensors.h"
#include "../prepro/shard.h"
#include "metrics.h"

// ---------------------------------------------------------------------------------------------------------------------
// checks

typedef struct { int passed, failed; } Tally;

__attribute__((format(printf, 5, 6)))
static void check(Tally *t, double got, double want, double limit, const char *what, ...) {
    if (!(fabs(got - want) <= limit)) {
        va_list args; va_start(args, what);
        printf("FAILED ");
        vprintf(what, args);
        printf(": %.12g instead of %.12g\n", got, want);
        va_end(args);
        t->failed++;
    } else {
        t->passed++;
    }
}

static void fill_nan(void *out, size_t bytes) { memset(out, 0xFF, bytes); }  // all bits set: a double is NaN, an int is -1

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) fail("out of memory (%zu bytes); close other programs", bytes);
    return memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// golden numbers

enum { MAX_NUMBERS = 1024 };
typedef struct { char path[96]; double value; int used; } Number;  // a number of the JSON text, as "good/at05/dice"
typedef struct { Number number[MAX_NUMBERS]; int count; } Numbers;

// All numbers of a JSON value; lists count from 0, texts are passed over. scratch: as long as the text
static void read_numbers(Numbers *all, JsonReader *j, const char *path, char *scratch) {
    char inner[96], *name = scratch, first = json_peek(j);
    if (first == '"') {
        json_string(j, &name);
    } else if (first == '{' || first == '[') {
        int i = 0;
        j->at++;
        if (json_take(j, first == '{' ? '}' : ']')) return;
        do {
            char index[16], *key = scratch;
            snprintf(index, sizeof index, "%d", i++);
            if (first == '{' && (!json_string(j, &name) || !json_take(j, ':')))
                fail("metrics.safetensors: no JSON at %s", path);
            snprintf(inner, sizeof inner, "%s%s%s", path, path[0] ? "/" : "", first == '{' ? key : index);
            read_numbers(all, j, inner, name);
            name = scratch;
        } while (json_take(j, ','));
        if (!json_take(j, first == '{' ? '}' : ']')) fail("metrics.safetensors: no JSON at %s", path);
    } else {
        char *end;
        Number *n = &all->number[all->count++];
        if (all->count == MAX_NUMBERS) fail("metrics.safetensors: more than %d numbers", MAX_NUMBERS);
        snprintf(n->path, sizeof n->path, "%s", path);
        n->value = strtod(j->text + j->at, &end), n->used = 0;
        if (end == j->text + j->at) fail("metrics.safetensors: no JSON at %s", path);
        j->at = (size_t)(end - j->text);
    }
}

static double number(Numbers *all, const char *a, const char *b, const char *c) {
    char path[96];
    snprintf(path, sizeof path, "%s/%s%s%s", a, b, c[0] ? "/" : "", c);
    for (int i = 0; i < all->count; i++)
        if (strcmp(all->number[i].path, path) == 0) {
            all->number[i].used = 1;
            return all->number[i].value;
        }
    fail("metrics.safetensors: no number %s", path);
    return 0.0;
}

static const SafeTensor *tensor(const SafeTensors *st, const char *name, const char *part) {
    char key[96];
    snprintf(key, sizeof key, "%s.%s", name, part);
    const SafeTensor *t = safetensors_find(st, key);
    if (!t) fail("metrics.safetensors: no tensor %s", key);
    return t;
}

static const char *const SIX[METRICS_SIX] = {"dice", "jaccard", "precision", "recall", "specificity", "fscore"};

static void open_golden(SafeTensors *st, const char *folder, const char *name) {
    char path[4096], err[4608];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (safetensors_open(st, path, err, sizeof err)) fail("%s", err);
}

static void test_golden_case(Tally *t, MetricsReleased *all, const SafeTensors *st, Numbers *numbers, const char *name) {
    static const char *const MEAN_MAX[2] = {"mean256", "max256"};
    static const char *const REST[5] = {"Smeasure", "Emeasure_mean", "Emeasure_max", "Emeasure_adp", "MAE"};
    static const char *const COUNT[4] = {"0", "1", "2", "3"};
    static const int ROW[METRICS_SIX] = {METRICS_DICE, METRICS_SPECIFICITY, METRICS_PRECISION, METRICS_RECALL, METRICS_FSCORE,
                                         METRICS_JACCARD};  // of the tensor `curve`
    const SafeTensor *pred = tensor(st, name, "pred"), *mask = tensor(st, name, "gt");
    const SafeTensor *curve = tensor(st, name, "curve"), *emeasure = tensor(st, name, "em_curve");
    int H = (int)pred->shape[0], W = (int)pred->shape[1];
    size_t pixels = (size_t)H * (size_t)W;
    check(t, H, number(numbers, name, "shape", "0"), 0, "%s H", name);
    check(t, W, number(numbers, name, "shape", "1"), 0, "%s W", name);
    if (pred->numel != pixels || mask->numel != pixels || curve->numel != METRICS_SIX * METRICS_THRESHOLDS ||
        emeasure->numel != METRICS_THRESHOLDS)
        fail("metrics.safetensors: %s has tensors of other sizes", name);

    double *level = (double *)allocate(pixels * sizeof(double));
    float *p = (float *)allocate(2 * pixels * sizeof(float)), *g = p + pixels;
    uint8_t *object = (uint8_t *)allocate(pixels);
    for (size_t i = 0; i < pixels; i++) {
        p[i] = (float)safetensors_value(pred, i), g[i] = (float)safetensors_value(mask, i);
        level[i] = metrics_level(p[i]), object[i] = g[i] > 0.5f;
    }
    MetricsFrame frame;
    fill_nan(&frame, sizeof frame);
    metrics_frame(&frame, level, object, H, W);

    MetricsCounts c = frame.half, counted = metrics_count(p, 0.5f, g, pixels);
    const double four[4] = {c.hit, c.predicted - c.hit, c.pixels - c.predicted - c.object + c.hit, c.object - c.hit};
    for (int k = 0; k < 4; k++) check(t, four[k], number(numbers, name, "tp_fp_tn_fn_05", COUNT[k]), 0, "%s count %d", name, k);
    check(t, memcmp(&c, &counted, sizeof c), 0, 0, "%s: metrics_count and metrics_frame count the same", name);
    double six[METRICS_SIX];
    fill_nan(six, sizeof six);
    metrics_six(six, c);
    for (int m = 0; m < METRICS_SIX; m++)
        check(t, six[m], number(numbers, name, "at05", SIX[m]), 1e-6, "%s %s at 0.5", name, SIX[m]);

    MetricsReleased one;
    double mean[METRICS_RELEASED_RESULTS];
    memset(&one, 0, sizeof one), fill_nan(mean, sizeof mean);
    metrics_released_add(&one, &frame), metrics_released_add(all, &frame);
    metrics_released_mean(mean, &one);
    for (int k = 0; k < 2; k++)
        for (int m = 0; m < METRICS_SIX; m++)
            check(t, mean[k * METRICS_SIX + m], number(numbers, name, MEAN_MAX[k], SIX[m]), 1e-6, "%s %s %s", name, MEAN_MAX[k],
                  SIX[m]);
    for (int k = 0; k < 5; k++) {  // computed from float64 predictions, then from float32 ones
        double got = mean[METRICS_RELEASED_SMEASURE + k];
        check(t, got, number(numbers, name, "float64", REST[k]), 1e-9, "%s %s", name, REST[k]);
        check(t, got, number(numbers, name, REST[k], ""), 1e-6, "%s %s in float32", name, REST[k]);
    }
    for (size_t k = 0; k < METRICS_THRESHOLDS; k++) {  // theirs begin with the highest threshold
        size_t j = METRICS_THRESHOLDS - 1 - k;
        for (size_t r = 0; r < METRICS_SIX; r++)
            check(t, frame.curve[ROW[r]][k], safetensors_value(curve, r * METRICS_THRESHOLDS + j), 1e-9, "%s %s above %d/255",
                  name, SIX[ROW[r]], (int)k);
        check(t, frame.polyp.emeasure[k], safetensors_value(emeasure, j), 1e-9, "%s E-measure from %d/255", name, (int)k);
    }
    free(level), free(p), free(object);
}

static void test_golden(Tally *t, const char *folder) {
    static const char *const CASE[] = {"good", "poor", "nonsquare_border", "empty_gt", "empty_gt_const_pred", "full_gt",
                                       "empty_pred", "zero_pred", "single_pixel", "edge_column", "perfect", "grey_gt"};
    SafeTensors st;
    open_golden(&st, folder, "metrics.safetensors");
    const char *text = safetensors_metadata(&st, "expected");
    if (!text) fail("%s/metrics.safetensors: holds no expected numbers", folder);
    Numbers *numbers = (Numbers *)allocate(sizeof(Numbers));
    JsonReader j = {text, strlen(text), 0, NULL};
    char *scratch = (char *)allocate(strlen(text));
    numbers->count = 0;
    read_numbers(numbers, &j, "", scratch);
    free(scratch);

    MetricsReleased all;
    memset(&all, 0, sizeof all);
    for (size_t i = 0; i < sizeof CASE / sizeof CASE[0]; i++) test_golden_case(t, &all, &st, numbers, CASE[i]);
    double mean[METRICS_RELEASED_RESULTS];
    fill_nan(mean, sizeof mean);
    metrics_released_mean(mean, &all);
    for (int m = 0; m < METRICS_SIX; m++) check(t, mean[m], number(numbers, "_dataset", SIX[m], ""), 1e-6, "mean %s", SIX[m]);
    check(t, mean[METRICS_RELEASED_SMEASURE], number(numbers, "_dataset", "Smeasure", ""), 1e-6, "mean S-measure");
    check(t, mean[METRICS_RELEASED_EMEASURE_MEAN], number(numbers, "_dataset", "Emeasure", ""), 1e-6, "mean E-measure");
    check(t, mean[METRICS_RELEASED_EMEASURE_MEAN], number(numbers, "_dataset", "Emeasure_maxkey", ""), 1e-6, "mean E-measure");
    check(t, mean[METRICS_RELEASED_MAE], number(numbers, "_dataset", "MAE", ""), 1e-6, "mean MAE");
    for (int i = 0; i < numbers->count; i++)
        check(t, numbers->number[i].used, 1, 0, "%s of the golden file is compared", numbers->number[i].path);
    free(numbers);
    safetensors_close(&st);
}

// ---------------------------------------------------------------------------------------------------------------------
// plain loops: the definitions, threshold by threshold and pixel by pixel

typedef struct { const double *level; const uint8_t *object; int H, W; double low, high; } Frame;

// Is 255 q of pixel i at least k? By a product, so that bytes give no rounding at all.
static int stretched_from(const Frame *f, int i, int k) {
    if (f->high == f->low) return f->level[i] >= k;
    return f->level[i] == f->high || 255.0 * (f->level[i] - f->low) >= k * (f->high - f->low);
}

static double stretched(const Frame *f, int i) {
    return f->high == f->low ? f->level[i] / 255.0 : (f->level[i] - f->low) / (f->high - f->low);
}

static double plain_emeasure(const Frame *f, const uint8_t *predicted) {
    double n = f->H * f->W, objects = 0.0, count = 0.0, sum = 0.0;
    for (int i = 0; i < f->H * f->W; i++) objects += f->object[i], count += predicted[i];
    for (int i = 0; i < f->H * f->W; i++) {
        double a = predicted[i] - count / n, b = f->object[i] - objects / n;
        if (objects == 0.0) sum += !predicted[i];
        else if (objects == n) sum += predicted[i];
        else sum += pow(1.0 + 2.0 * a * b / (a * a + b * b + DBL_EPSILON), 2.0) / 4.0;
    }
    return sum / (n - 1.0 + DBL_EPSILON);
}

// Mean, deviation and covariance with the mask, in two passes, over the rectangle's pixels of which the mask is `only`
// (-1: all)
static int plain_moments(double *mean, double *variance, double *covariance, const Frame *f, const int box[4], int only) {
    int n = 0, objects = 0;
    *mean = *variance = *covariance = 0.0;
    for (int y = box[0]; y < box[1]; y++)
        for (int x = box[2]; x < box[3]; x++) {
            int i = y * f->W + x;
            if (only < 0 || f->object[i] == only) *mean += stretched(f, i), objects += f->object[i], n++;
        }
    *mean /= n;
    for (int y = box[0]; y < box[1]; y++)
        for (int x = box[2]; x < box[3]; x++) {
            int i = y * f->W + x;
            double d = stretched(f, i) - *mean;
            if (only < 0 || f->object[i] == only)
                *variance += d * d / (n - 1), *covariance += d * (f->object[i] - (double)objects / n) / (n - 1);
        }
    return n;
}

static double plain_smeasure(const Frame *f) {
    int n = f->H * f->W, objects = 0, rows = 0, columns = 0;
    double mean = 0.0, m, v, c, s = 0.0;
    for (int i = 0; i < n; i++) {
        mean += stretched(f, i) / n;
        if (f->object[i]) objects++, rows += i / f->W, columns += i % f->W;
    }
    if (objects == 0) return 1.0 - mean;
    if (objects == n) return mean;
    for (int part = 0; part < 2; part++) {
        const int all[4] = {0, f->H, 0, f->W};
        int count = plain_moments(&m, &v, &c, f, all, part);
        if (count < 2) return 0.0;
        if (part == 0) m = 1.0 - m;
        s += 0.5 * count / n * 2.0 * m / (m * m + 1.0 + sqrt(v));
    }
    int cy = (int)nearbyint((double)rows / objects) + 1, cx = (int)nearbyint((double)columns / objects) + 1;
    for (int k = 0; k < 4; k++) {
        const int box[4] = {k < 2 ? 0 : cy, k < 2 ? cy : f->H, k % 2 ? cx : 0, k % 2 ? f->W : cx};
        double mg = 0.0, vg = 0.0;
        int count = plain_moments(&m, &v, &c, f, box, -1);
        if (count < 2) return 0.0;
        for (int y = box[0]; y < box[1]; y++)
            for (int x = box[2]; x < box[3]; x++) mg += f->object[y * f->W + x] / (double)count;
        vg = mg * (1.0 - mg) * count / (count - 1);
        if (v < 1e-20) v = c = 0.0;  // constant up to the rounding of its mean
        if (mg < 1e-12 || mg > 1.0 - 1e-12) vg = c = 0.0;
        double below = (m * m + mg * mg) * (v + vg);
        s += 0.5 * count / n * (m * mg * c != 0.0 ? 4.0 * m * mg * c / below : below == 0.0);
    }
    return s > 0.0 ? s : 0.0;
}

static void plain_counts(MetricsCounts *c, const Frame *f, const uint8_t *predicted) {
    c->pixels = f->H * f->W, c->object = c->predicted = c->hit = 0.0;
    for (int i = 0; i < f->H * f->W; i++)
        c->object += f->object[i], c->predicted += predicted[i], c->hit += f->object[i] && predicted[i];
}

// The same results as metrics_frame
static void plain_frame(MetricsFrame *out, const double *level, const uint8_t *object, int H, int W) {
    Frame f = {level, object, H, W, level[0], level[0]};
    MetricsPolyp *p = &out->polyp;
    MetricsCounts c;
    double six[METRICS_SIX], mean = 0.0, error = 0.0;
    int n = H * W;
    uint8_t *predicted = (uint8_t *)allocate((size_t)n);
    for (int i = 0; i < n; i++) f.low = fmin(f.low, level[i]), f.high = fmax(f.high, level[i]);
    for (int i = 0; i < n; i++) predicted[i] = level[i] > 127.5;
    plain_counts(&out->half, &f, predicted);
    for (int k = 0; k < METRICS_THRESHOLDS; k++) {
        for (int i = 0; i < n; i++) predicted[i] = level[i] > k;
        plain_counts(&c, &f, predicted);
        metrics_six(six, c);  // held against golden numbers
        for (int m = 0; m < METRICS_SIX; m++) out->curve[m][k] = six[m];
        for (int i = 0; i < n; i++) predicted[i] = (uint8_t)stretched_from(&f, i, k);
        plain_counts(&c, &f, predicted);
        double background = c.pixels - c.object, wrong = c.predicted - c.hit;
        p->dice[k] = c.hit > 0.0 ? 2.0 * c.hit / (c.predicted + c.object) : 0.0;
        p->iou[k] = c.hit > 0.0 ? c.hit / (c.predicted + c.object - c.hit) : 0.0;
        p->specificity[k] = c.hit > 0.0 && background > 0.0 ? (background - wrong) / background : 0.0;
        p->emeasure[k] = plain_emeasure(&f, predicted);
    }
    for (int i = 0; i < n; i++) mean += stretched(&f, i), error += fabs(stretched(&f, i) - object[i]) / n;
    mean /= n;
    for (int i = 0; i < n; i++) predicted[i] = stretched(&f, i) >= fmin(2.0 * mean, 1.0);
    p->emeasure_adaptive = plain_emeasure(&f, predicted);
    p->smeasure = plain_smeasure(&f), p->mae = error, p->count = 1;
    free(predicted);
}

// Random numbers: a linear congruential generator's upper bits
static uint32_t random_bits(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

// A frame of random levels and a random mask. Kind of the levels: 0 bytes, 1 any number (all 53 bits in use), 2 few different
// bytes, 3 constant, 4 bytes that follow the mask, 5 constant in the left half, 6 halves, 127.5 among them. Kind of the
// mask: share of object pixels in eighths.
static void random_frame(double *level, uint8_t *object, int H, int W, int kind, int eighths, uint64_t *state) {
    int constant = (int)(random_bits(state) % 256), few = 1 + (int)(random_bits(state) % 200);
    for (int i = 0; i < H * W; i++) {
        int byte = (int)(random_bits(state) % 256);
        object[i] = random_bits(state) % 8 < (uint32_t)eighths;
        level[i] = kind == 1 ? random_bits(state) / 2147483647.5 * 255.0 : kind == 2 ? byte / few * few : kind == 3 ? constant
                 : kind == 4 ? (object[i] ? 255 - byte / 3 : byte / 2) : kind == 5 && i % W < W / 2 ? constant
                 : kind == 6 ? byte / 2 + 64.5 : byte;
    }
}

// Largest difference of two blocks of doubles, or NaN
static double difference(const double *a, const double *b, size_t n) {
    double largest = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(a[i] - b[i])) return NAN;
        largest = fmax(largest, fabs(a[i] - b[i]));
    }
    return largest;
}

static void test_plain_loops(Tally *t) {
    static const int SIZE[][2] = {{1, 2}, {3, 1}, {2, 2}, {5, 7}, {13, 9}, {16, 16}, {31, 17}, {1, 40}, {37, 1}};
    uint64_t state = 1;
    for (size_t s = 0; s < sizeof SIZE / sizeof SIZE[0]; s++)
        for (int kind = 0; kind < 7; kind++)
            for (int eighths = 0; eighths <= 8; eighths++) {
                int H = SIZE[s][0], W = SIZE[s][1];
                double level[31 * 17];
                uint8_t object[31 * 17];
                MetricsFrame got, want;
                random_frame(level, object, H, W, kind, eighths, &state);
                fill_nan(&got, sizeof got), fill_nan(&want, sizeof want);
                metrics_frame(&got, level, object, H, W);
                plain_frame(&want, level, object, H, W);
                const MetricsPolyp *p = &got.polyp, *q = &want.polyp;
                const char *about = "%dx%d, levels of kind %d, %d/8 object: %s";
                check(t, difference(&got.half.pixels, &want.half.pixels, 4), 0, 0, about, H, W, kind, eighths, "counts at 0.5");
                check(t, difference(got.curve[0], want.curve[0], METRICS_SIX * METRICS_THRESHOLDS), 0, 1e-12, about, H, W, kind,
                      eighths, "curves of p > k/255");
                check(t, difference(p->dice, q->dice, METRICS_THRESHOLDS), 0, 1e-12, about, H, W, kind, eighths, "polyp Dice");
                check(t, difference(p->iou, q->iou, METRICS_THRESHOLDS), 0, 1e-12, about, H, W, kind, eighths, "polyp IoU");
                check(t, difference(p->specificity, q->specificity, METRICS_THRESHOLDS), 0, 1e-12, about, H, W, kind, eighths,
                      "polyp specificity");
                check(t, difference(p->emeasure, q->emeasure, METRICS_THRESHOLDS), 0, 1e-9, about, H, W, kind, eighths,
                      "E-measure");
                check(t, p->emeasure_adaptive, q->emeasure_adaptive, 1e-9, about, H, W, kind, eighths, "adaptive E-measure");
                check(t, p->smeasure, q->smeasure, 1e-9, about, H, W, kind, eighths, "S-measure");
                check(t, p->mae, q->mae, 1e-12, about, H, W, kind, eighths, "MAE");
                check(t, p->count, 1, 0, about, H, W, kind, eighths, "count");
            }
}

// ---------------------------------------------------------------------------------------------------------------------
// examples

// Eleven pixels of which five are object. X finds one of them surely (255) and the others weakly (100); Y finds all surely and
// five others nearly so (200). Dice by threshold:  k = 0: 10/16    1 .. 100: X 1, Y 2/3    101 .. 200: X 1/3, Y 2/3
// 201 .. 255: X 1/3, Y 1.  One video shows X X Y, the other Y.
static void test_order_of_means(Tally *t) {
    static const double X[11] = {255, 100, 100, 100, 100, 0, 0, 0, 0, 0, 0};
    static const double Y[11] = {255, 255, 255, 255, 255, 200, 200, 200, 200, 200, 0};
    static const uint8_t OBJECT[11] = {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0};
    MetricsFrame x, y;
    MetricsPolyp first, second, all, pooled, none;
    double r[METRICS_POLYP_RESULTS];
    metrics_frame(&x, X, OBJECT, 1, 11), metrics_frame(&y, Y, OBJECT, 1, 11);
    memset(&first, 0, sizeof first), memset(&second, 0, sizeof second), memset(&all, 0, sizeof all);
    memset(&pooled, 0, sizeof pooled), memset(&none, 0, sizeof none);
    metrics_polyp_add(&first, &x.polyp), metrics_polyp_add(&first, &x.polyp), metrics_polyp_add(&first, &y.polyp);
    metrics_polyp_add(&second, &y.polyp);
    metrics_polyp_add(&all, &first), metrics_polyp_add(&all, &none), metrics_polyp_add(&all, &second);
    check(t, all.count, 2, 0, "a video without frames is no video");

    // of the first video: 8/9 up to 100, 4/9 up to 200, then 5/9; of the second 2/3 up to 200, then 1
    fill_nan(r, sizeof r);
    metrics_polyp_results(r, &all);
    check(t, r[METRICS_MAX_DICE], 7.0 / 9, 1e-12, "maxDice");
    check(t, r[METRICS_MEAN_DICE], (10.0 / 16 + 100 * 7.0 / 9 + 100 * 5.0 / 9 + 55 * 7.0 / 9) / 256, 1e-12, "meanDice");
    check(t, r[METRICS_MAX_IOU], (7.0 / 15 + 1.0) / 2, 1e-12, "maxIoU");
    check(t, r[METRICS_MAX_SPECIFICITY], 1.0, 1e-12, "maxSpe");
    check(t, r[METRICS_MEAN_SPECIFICITY], (100 * (13.0 / 18 + 1.0 / 6) / 2 * 2 + 55) / 256, 1e-12, "meanSpe");
    check(t, r[METRICS_MAE], ((2 * (4 * 155.0 / 255) + 5 * 200.0 / 255) / 33 + 5 * 200.0 / 255 / 11) / 2, 1e-12, "MAE");
    const MetricsCounts weak = {11, 5, 1, 1}, broad = {11, 5, 10, 5};  // X above 100, Y up to 200; else the E-measure is 11/10
    double low = ((2 * 1.1 + metrics_emeasure(broad)) / 3 + metrics_emeasure(broad)) / 2;
    double high = ((2 * metrics_emeasure(weak) + 1.1) / 3 + 1.1) / 2;
    check(t, r[METRICS_MAX_EMEASURE], fmax(low, high), 1e-9, "maxE");

    // the other orders, which give other numbers: frames of all videos at once; the maximum of every video first
    metrics_polyp_add(&pooled, &x.polyp), metrics_polyp_add(&pooled, &x.polyp);
    metrics_polyp_add(&pooled, &y.polyp), metrics_polyp_add(&pooled, &y.polyp);
    metrics_polyp_results(r, &pooled);
    check(t, r[METRICS_MAX_DICE], 5.0 / 6, 1e-12, "maxDice pooled over frames");
    metrics_polyp_results(r, &first);
    check(t, r[METRICS_MAX_DICE], 8.0 / 9, 1e-12, "maxDice of the first video");
    metrics_polyp_results(r, &none);
    check(t, r[METRICS_MAX_DICE], 0.0, 0, "maxDice of nothing");
}

static void test_ultrasound(Tally *t) {
    static const float P[4][4] = {{0.9f, 0.5f, 0.51f, 0.1f}, {0, 0, 0, 0.5f}, {0, 0, 0, 0}, {1, 1, 1, 1}};
    static const float G[4][4] = {{1, 1, 0, 0}, {0, 0.5f, 0, 0}, {1, 0, 0, 0}, {1, 1, 1, 1}};
    MetricsUltrasound sums;
    double mean[METRICS_SIX];
    memset(&sums, 0, sizeof sums);
    for (int f = 0; f < 4; f++) metrics_ultrasound_add(&sums, metrics_count(P[f], 0.5f, G[f], 4));
    fill_nan(mean, sizeof mean);
    metrics_ultrasound_mean(mean, &sums);
    check(t, sums.frames, 4, 0, "ultrasound: frames");
    check(t, sums.empty, 1, 0, "ultrasound: frames empty in both");
    check(t, mean[METRICS_DICE], (0.5 + 0 + 0 + 1) / 4, 1e-12, "ultrasound Dice");
    check(t, mean[METRICS_JACCARD], (1.0 / 3 + 0 + 0 + 1) / 4, 1e-12, "ultrasound Jaccard");
    check(t, mean[METRICS_PRECISION], (0.5 + 0 + 0 + 1) / 4, 1e-12, "ultrasound Precision");
    check(t, mean[METRICS_RECALL], (0.5 + 0 + 0 + 1) / 4, 1e-12, "ultrasound Recall");
    check(t, mean[METRICS_SPECIFICITY], (0.5 + 1 + 1 + 0) / 4, 1e-12, "ultrasound Specificity");
    memset(&sums, 0, sizeof sums);
    metrics_ultrasound_mean(mean, &sums);
    check(t, mean[METRICS_DICE], 0, 0, "ultrasound Dice of no frame");
}

// The float next to k/255 means k; its neighbours lie on their own sides of k
static void test_levels(Tally *t) {
    for (int k = 0; k < 256; k++) {
        float p = (float)(k / 255.0);
        check(t, metrics_level(p), k, 0, "level of the float of %d/255", k);
        check(t, metrics_level(nextafterf(p, 2.0f)) > k, 1, 0, "level above %d/255", k);
        check(t, metrics_level(nextafterf(p, -1.0f)) < k, 1, 0, "level below %d/255", k);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// resizing

static void test_resize(Tally *t, const char *folder) {
    static const char *const CASE[] = {"x2", "x4", "x8", "odd1", "odd2", "odd3", "down", "same", "one"};
    int found = 0;
    for (int file = 1; file <= 3; file++) {
        char name[64];
        SafeTensors st;
        snprintf(name, sizeof name, "ops_%d.safetensors", file);
        open_golden(&st, folder, name);
        for (size_t i = 0; i < sizeof CASE / sizeof CASE[0]; i++) {
            snprintf(name, sizeof name, "bilinear_%s.in.x", CASE[i]);
            const SafeTensor *from = safetensors_find(&st, name);
            snprintf(name, sizeof name, "bilinear_%s.out", CASE[i]);
            const SafeTensor *to = safetensors_find(&st, name);
            if (!from || !to) continue;
            found++;
            int h = (int)from->shape[2], w = (int)from->shape[3], H = (int)to->shape[2], W = (int)to->shape[3];
            size_t small = (size_t)h * (size_t)w, large = (size_t)H * (size_t)W;
            double *inp = (double *)allocate((small + large) * sizeof(double)), *out = inp + small;
            for (size_t plane = 0; plane < to->numel / large; plane++) {
                for (size_t k = 0; k < small; k++) inp[k] = safetensors_value(from, plane * small + k);
                fill_nan(out, large * sizeof(double));
                metrics_resize(out, H, W, inp, h, w);
                for (size_t k = 0; k < large; k++)
                    check(t, out[k], safetensors_value(to, plane * large + k), 1e-6, "resize %s, element %d", CASE[i], (int)k);
            }
            for (size_t k = 0; k < small; k++) inp[k] = 0.1;
            metrics_resize(out, H, W, inp, h, w);
            for (size_t k = 0; k < large; k++) check(t, out[k], 0.1, 0, "resize %s, constant", CASE[i]);
            free(inp);
        }
        safetensors_close(&st);
    }
    check(t, found, sizeof CASE / sizeof CASE[0], 0, "golden cases of resizing");
}

// ---------------------------------------------------------------------------------------------------------------------
// files for test_evaluate.sh: the same videos as shards and as folders, and their scores by plain loops
//
//   masks.bin pred.bin small.bin     shards; pred.bin has its videos in another order, small.bin is smaller
//   masks/ pred/ small/              the same as VIDEO/fN.png, of many kinds of PNG
//   flat_masks/ flat_pred/           the pictures of the video v10
//   expected.txt expected_small.txt  lines "protocol measure value"

enum { VIDEOS = 4, H = 37, W = 45, SMALL_H = 20, SMALL_W = 23, FIRST_NUMBER = 8 };
static const char *const VIDEO_NAME[VIDEOS] = {"a", "short", "v2", "v10"};
static const int VIDEO_FRAMES[VIDEOS] = {5, 2, 4, 3};
static const int OTHER_ORDER[VIDEOS] = {3, 0, 1, 2};

// A disc that moves, and a soft disc beside it. Frame 1 of "a" is empty in both, frame 2 has an empty mask, and frame 1 of
// "v2" an empty prediction of 7s.
static void draw(uint8_t *pred, uint8_t *mask, int video, int frame, int h, int w) {
    for (int i = 0; i < h * w; i++) {
        double y = (i / w + 0.5) / h, x = (i % w + 0.5) / w, cx = 0.3 + 0.07 * frame, cy = 0.4 + 0.06 * video;
        double near = hypot(x - cx, y - cy), soft = hypot(x - cx - 0.05, y - cy - 0.03 * frame);
        int empty_mask = video == 0 && (frame == 1 || frame == 2), empty_pred = (video == 0 || video == 2) && frame == 1;
        mask[i] = !empty_mask && near < 0.25 ? 255 : 0;
        double disc = 255.0 / (1.0 + exp(25.0 * (soft - 0.22 - 0.02 * video)));
        pred[i] = (uint8_t)(!empty_pred ? disc : video == 0 ? (i * 31) % 100 : 7);
    }
}

static void write_shard(const char *folder, const char *name, int what, int h, int w, const int order[VIDEOS]) {
    char path[4096], err[4608];
    ShardWriter writer;
    uint8_t plane[2][H * W], rgb[3 * H * W];
    memset(rgb, 0, sizeof rgb);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int bad = shard_create(&writer, path, h, w, 1, err, sizeof err);
    for (int i = 0; i < VIDEOS && !bad; i++) {
        int v = order[i];
        bad = shard_begin_video(&writer, VIDEO_NAME[v], err, sizeof err);
        for (int f = 0; f < VIDEO_FRAMES[v] && !bad; f++) {
            draw(plane[0], plane[1], v, f, h, w);
            bad = shard_add_frame(&writer, rgb, plane[what], err, sizeof err);
        }
    }
    if (bad || shard_finish(&writer, err, sizeof err)) fail("%s", err);
}

// Grey values as a PNG: 1 bit, grey, RGB, with opacity, or 16 bits; all of them mean the same
typedef struct { int depth, colour, channels; } PngKind;
static const PngKind PNG_KIND[] = {{8, 0, 1}, {8, 2, 3}, {8, 6, 4}, {16, 0, 1}, {8, 4, 2}, {16, 2, 3}, {1, 0, 1}};
enum { GREY_KINDS = 6, ONE_BIT = 6 };

static void write_png(const char *path, const uint8_t *grey, int h, int w, PngKind kind) {
    uint8_t file[65536 + 256], *at, *stream, *rows;
    size_t row = 1 + ((size_t)(w * kind.channels * kind.depth) + 7) / 8, raw = row * (size_t)h;
    memcpy(file, "\x89PNG\r\n\x1a\n", 8);
    png_put32(png_put32(file + 16, (uint32_t)w), (uint32_t)h);
    file[24] = (uint8_t)kind.depth, file[25] = (uint8_t)kind.colour, file[26] = file[27] = file[28] = 0;
    stream = png_seal(file + 8, "IHDR", 13);
    at = stream + 8;
    const uint8_t head[7] = {0x78, 1, 1, (uint8_t)raw, (uint8_t)(raw >> 8), (uint8_t)~raw, (uint8_t)(~raw >> 8)};
    memcpy(at, head, 7);  // one stored block
    rows = at += 7;
    memset(rows, 0, raw);
    for (int y = 0; y < h; y++) {
        uint8_t *to = rows + (size_t)y * row + 1;
        for (int x = 0; x < w; x++) {
            uint8_t v = grey[y * w + x];
            if (kind.depth == 1) to[x / 8] = (uint8_t)(to[x / 8] | (v > 127) << (7 - x % 8));
            else
                for (int c = 0; c < kind.channels; c++) {
                    int opacity = kind.channels % 2 == 0 && c == kind.channels - 1;
                    for (int byte = 0; byte < kind.depth / 8; byte++) *to++ = opacity ? (uint8_t)(x * 5) : v;
                }
        }
    }
    uint32_t a = 1, b = 0;
    for (size_t i = 0; i < raw; i++) a = (a + *at++) % 65521, b = (b + a) % 65521;
    at = png_seal(stream, "IDAT", (size_t)(png_put32(at, b << 16 | a) - stream) - 8);
    at = png_seal(at, "IEND", 0);
    FILE *f = fopen(path, "wb");
    size_t bytes = (size_t)(at - file);
    if (!f || fwrite(file, 1, bytes, f) != bytes || fclose(f)) fail("%s: %s", path, strerror(errno));
}

static void make_folder(const char *path) {
    if (mkdir(path, 0777) && errno != EEXIST) fail("%s: %s", path, strerror(errno));
}

static void write_folder(const char *folder, const char *name, int what, int h, int w) {
    char path[4096], file[4352];
    uint8_t plane[2][H * W];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    make_folder(path);
    for (int v = 0; v < VIDEOS; v++) {
        snprintf(path, sizeof path, "%s/%s/%s", folder, name, VIDEO_NAME[v]);
        make_folder(path);
        for (int f = 0; f < VIDEO_FRAMES[v]; f++) {
            draw(plane[0], plane[1], v, f, h, w);
            snprintf(file, sizeof file, "%s/f%d.png", path, FIRST_NUMBER + f);
            write_png(file, plane[what], h, w, PNG_KIND[what == 1 && f % 2 ? ONE_BIT : (v + f) % GREY_KINDS]);
        }
    }
}

static void write_flat(const char *folder) {
    static const char *const NAME[2] = {"flat_pred", "flat_masks"};
    char path[4352];
    uint8_t plane[2][H * W];
    for (int what = 0; what < 2; what++) {
        snprintf(path, sizeof path, "%s/%s", folder, NAME[what]);
        make_folder(path);
        for (int f = 0; f < VIDEO_FRAMES[3]; f++) {
            draw(plane[0], plane[1], 3, f, H, W);
            snprintf(path, sizeof path, "%s/%s/%d.png", folder, NAME[what], f);
            write_png(path, plane[what], H, W, PNG_KIND[0]);
        }
    }
}

static double largest_mean(double curve[VIDEOS][METRICS_THRESHOLDS], int videos) {
    double largest = 0.0;
    for (int k = 0; k < METRICS_THRESHOLDS; k++) {
        double sum = 0.0;
        for (int v = 0; v < videos; v++) sum += curve[v][k];
        largest = fmax(largest, sum / videos);
    }
    return largest;
}

// Scores over all videos, from predictions of h x w: every mean as its definition says
static void write_expected(const char *folder, const char *name, int h, int w) {
    static const char *const TITLE[4] = {"max_dice", "max_iou", "max_specificity", "max_e_measure"};
    static double curve[4][VIDEOS][METRICS_THRESHOLDS];
    uint8_t pred[H * W], mask[H * W], object[H * W];
    double level[H * W], resized[H * W], six[METRICS_SIX] = {0}, smeasure = 0, mae = 0, released = 0, adaptive = 0;
    int frames = 0, videos = 0, empty = 0;
    char path[4096];
    memset(curve, 0, sizeof curve);
    for (int v = 0; v < VIDEOS; v++) {
        int kept = VIDEO_FRAMES[v] - 2;
        for (int f = 0; f < VIDEO_FRAMES[v]; f++, frames++) {
            MetricsFrame m;
            double of_frame[METRICS_SIX];
            draw(pred, mask, v, f, h, w);
            for (int i = 0; i < h * w; i++) level[i] = pred[i];
            metrics_resize(resized, H, W, level, h, w);
            draw(pred, mask, v, f, H, W);
            for (int i = 0; i < H * W; i++) object[i] = mask[i] > 127;
            plain_frame(&m, resized, object, H, W);
            metrics_six(of_frame, m.half);
            for (int k = 0; k < METRICS_SIX; k++) six[k] += of_frame[k];
            for (int k = 0; k < METRICS_THRESHOLDS; k++) released += m.curve[METRICS_DICE][k] / 256;
            empty += m.half.predicted + m.half.object == 0.0;
            if (f == 0 || f == VIDEO_FRAMES[v] - 1) continue;
            const double *const from[4] = {m.polyp.dice, m.polyp.iou, m.polyp.specificity, m.polyp.emeasure};
            for (int c = 0; c < 4; c++)
                for (int k = 0; k < METRICS_THRESHOLDS; k++) curve[c][videos][k] += from[c][k] / kept;
            smeasure += m.polyp.smeasure / kept / 3, mae += m.polyp.mae / kept / 3;  // three videos have frames to keep
            adaptive += m.polyp.emeasure_adaptive / kept / 3;
        }
        videos += kept > 0;
    }
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *out = fopen(path, "w");
    if (!out) fail("%s: %s", path, strerror(errno));
    for (int k = 0; k < METRICS_SIX; k++) fprintf(out, "ultrasound %s %.9f\n", SIX[k], six[k] / frames);
    for (int c = 0; c < 4; c++) fprintf(out, "polyp %s %.9f\n", TITLE[c], largest_mean(curve[c], videos));
    fprintf(out, "polyp s_measure %.9f\npolyp mae %.9f\npolyp adaptive_e_measure %.9f\n", smeasure, mae, adaptive);
    fprintf(out, "released dice %.9f\noverall empty_in_both %d\noverall frames %d\n", released / frames, empty, frames);
    if (fclose(out)) fail("%s: %s", path, strerror(errno));
}

static void write_files(const char *folder) {
    static const int IN_ORDER[VIDEOS] = {0, 1, 2, 3};
    make_folder(folder);
    write_shard(folder, "masks.bin", 1, H, W, IN_ORDER);
    write_shard(folder, "pred.bin", 0, H, W, OTHER_ORDER);
    write_shard(folder, "small.bin", 0, SMALL_H, SMALL_W, IN_ORDER);
    write_folder(folder, "masks", 1, H, W);
    write_folder(folder, "pred", 0, H, W);
    write_folder(folder, "small", 0, SMALL_H, SMALL_W);
    write_flat(folder);
    write_expected(folder, "expected.txt", H, W);
    write_expected(folder, "expected_small.txt", SMALL_H, SMALL_W);
}

// ---------------------------------------------------------------------------------------------------------------------

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--write") == 0) {
        write_files(argv[2]);
        return 0;
    }
    if (argc > 1) fail("%s: no such option; there is only --write DIR", argv[1]);
    const char *folder = getenv("VIVIM_GOLDEN");
    if (!folder) folder = "dev/golden";
    Tally t = {0, 0};
    test_golden(&t, folder);
    test_plain_loops(&t);
    test_order_of_means(&t);
    test_ultrasound(&t);
    test_levels(&t);
    test_resize(&t, folder);
    printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed > 0;
}
