/* charts.h - curves of a training run as SVG in an HTML page: losses by step, scores by epoch. Header only, for report.c.

   A chart is drawn on 460 x 280 units, so that it can be read on a phone as well as beside another on a large screen. Its
   colours are the page's: classes c0 .. c3 for the curves, grid, axis and band for the rest. */
#ifndef CHARTS_H
#define CHARTS_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../prepro/cli.h"

enum { VALUES = 4 };

// A step with its losses (total, of masks, of boundaries, affine), or an epoch with its scores (Dice, Jaccard)
typedef struct { double at, value[VALUES]; } Point;
typedef struct { Point *points; int count; } Points;

// A run that went astray writes nan and inf. What is beyond 1e30 cannot be drawn either.
static int is_number(double value) { return fabs(value) < 1e30; }

static void *memory(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) fail("out of memory: %.1f MiB more were needed; close other programs", (double)bytes / 1048576);
    return p;
}

enum { CHART_W = 460, CHART_H = 280, LEFT = 50, RIGHT = 12, TOP = 12, BOTTOM = 44, MOST_SAMPLES = 240 };

typedef struct { double x, mean[VALUES], low, high; } Sample;  // of a window; low, high: the least and greatest first value

// At most 240 windows along the points, each of 5 % of them. What is not a number does not count; a window of nothing else
// has a mean that is not a number. Returns how many.
static int sample_points(Sample *samples, const Points *p, int smooth) {
    int n = smooth && p->count > MOST_SAMPLES ? MOST_SAMPLES : p->count, half = smooth ? p->count / 40 : 0;
    for (int i = 0; i < n; i++) {
        int centre = n > 1 ? (int)((int64_t)i * (p->count - 1) / (n - 1)) : 0, counted[VALUES] = {0, 0, 0, 0};
        Sample *s = &samples[i];
        s->x = p->points[centre].at, s->low = HUGE_VAL, s->high = -HUGE_VAL;
        for (int k = 0; k < VALUES; k++) s->mean[k] = 0.0;
        for (int j = centre - half < 0 ? 0 : centre - half; j <= centre + half && j < p->count; j++)
            for (int k = 0; k < VALUES; k++) {
                double value = p->points[j].value[k];
                if (!is_number(value)) continue;
                s->mean[k] += value, counted[k]++;
                if (k == 0) s->low = fmin(s->low, value), s->high = fmax(s->high, value);
            }
        for (int k = 0; k < VALUES; k++) s->mean[k] /= counted[k];
    }
    return n;
}

// 1, 2 or 5 times a power of ten: about `count` of them cover the range
static double nice_step(double range, int count) {
    double power = pow(10.0, floor(log10(range / count))), part = range / count / power;
    return power * (part <= 1.0 ? 1 : part <= 2.0 ? 2 : part <= 5.0 ? 5 : 10);
}

typedef struct { double x0, x1, y0, y1; } Axes;

static double x_of(const Axes *a, double x) { return LEFT + (x - a->x0) / (a->x1 - a->x0) * (CHART_W - LEFT - RIGHT); }
static double y_of(const Axes *a, double y) {
    return CHART_H - BOTTOM - (y - a->y0) / (a->y1 - a->y0) * (CHART_H - TOP - BOTTOM);
}

static void put_axes(FILE *f, const Axes *a, const char *x_name) {
    double step = nice_step(a->y1 - a->y0, 5);  // (+ 0.0 below makes a minus zero a zero)
    for (double k = ceil(a->y0 / step - 1e-9) + 0.0; k * step <= a->y1 + 1e-9 * step; k++) {
        double y = y_of(a, k * step);
        fprintf(f, "<line class=\"grid\" x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" />", LEFT, y, CHART_W - RIGHT, y);
        fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.10g</text>\n", LEFT - 7, y + 4.5, k * step);
    }
    step = nice_step(a->x1 - a->x0, 6);
    if (step < 1.0) step = 1.0;  // of steps and epochs
    for (double k = ceil(a->x0 / step - 1e-9) + 0.0; k * step <= a->x1 + 1e-9 * step; k++) {
        double x = x_of(a, k * step);
        int y = CHART_H - BOTTOM;
        fprintf(f, "<line class=\"axis\" x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" />", x, y, x, y + 5);
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.10g</text>\n", x, y + 19, k * step);
    }
    fprintf(f, "<line class=\"axis\" x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" />\n", LEFT, CHART_H - BOTTOM, CHART_W - RIGHT,
            CHART_H - BOTTOM);
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", (LEFT + CHART_W - RIGHT) / 2, CHART_H - 6, x_name);
}

// Where a mean is not a number the line has a gap. A line of one point is a dot: its ends are round.
static void put_curve(FILE *f, const Axes *a, const Sample *samples, int n, int k) {
    int drawing = 0;
    fprintf(f, "<path class=\"curve c%d\" d=\"", k);
    for (int i = 0; i < n; i++) {
        int number = is_number(samples[i].mean[k]);
        if (number) fprintf(f, "%s%.1f %.1f%s", drawing ? "L" : "M", x_of(a, samples[i].x), y_of(a, samples[i].mean[k]),
                            drawing ? "" : "h0");
        drawing = number;
    }
    fprintf(f, "\" />\n");
}

// Between the least and the greatest value of every window
static void put_band(FILE *f, const Axes *a, const Sample *samples, int n) {
    const char *command = "M";
    fprintf(f, "<path class=\"band\" d=\"");
    for (int i = 0; i < 2 * n; i++) {
        const Sample *s = &samples[i < n ? i : 2 * n - 1 - i];
        double y = fmax(TOP - 9.0, fmin(CHART_H, y_of(a, i < n ? s->high : s->low)));  // the chart's clip hides the rest
        if (is_number(s->mean[0])) fprintf(f, "%s%.1f %.1f", command, x_of(a, s->x), y), command = "L";
    }
    fprintf(f, "\" />\n");
}

// A figure of points: `curves` of their values by the names given. Losses are smoothed, scores (0 .. 1) are not.
static void put_chart(FILE *f, const char *title, const char *x_name, const Points *p, const char *const *names, int curves,
                      int losses) {
    int used[VALUES] = {0, 0, 0, 0}, missing = 0;
    double told[VALUES] = {-1, -1, -1, -1}, told_at[VALUES] = {0, 0, 0, 0};  // the last loss, the best score
    for (int i = 0; i < p->count; i++) missing += !is_number(p->points[i].value[0]);
    fprintf(f, "<figure class=\"chart\"><h3>%s</h3>\n", title);
    if (missing == p->count) {
        fprintf(f, "<p class=\"note\">%s</p></figure>\n", p->count ? "No value is a number." : "The log has none yet.");
        return;
    }
    Sample *samples = (Sample *)memory(NULL, sizeof(Sample) * (size_t)p->count);
    int n = sample_points(samples, p, losses);
    Axes a = {p->points[0].at, p->points[p->count - 1].at, 0.0, losses ? 0.0 : 1.0};
    for (int i = 0; i < n; i++)
        for (int k = 0; k < curves; k++) {
            double value = samples[i].mean[k];
            if (!is_number(value)) continue;
            used[k] |= !losses || value != 0.0;  // a loss of 0 all the time is switched off
            if (losses || value > told[k]) told[k] = value, told_at[k] = samples[i].x;
            a.y0 = fmin(a.y0, value), a.y1 = fmax(a.y1, value);
        }
    if (a.x1 <= a.x0) a.x0 -= 1, a.x1 += 1;
    if (a.x0 > 0 && a.x0 < 0.05 * a.x1) a.x0 = 0;
    if (a.y1 - a.y0 < 1e-30) a.y1 = a.y0 + 1;
    double step = nice_step(a.y1 - a.y0, 5);
    a.y0 = floor(a.y0 / step + 1e-9) * step, a.y1 = ceil(a.y1 / step - 1e-9) * step;

    fprintf(f, "<p class=\"legend\">");
    for (int k = 0; k < curves; k++)
        if (used[k]) {
            fprintf(f, "<span><i class=\"c%d\"></i>%s <b>%.4f</b>", k, names[k], told[k]);
            fprintf(f, losses ? "</span> " : " at epoch %g</span> ", told_at[k]);
        }
    fprintf(f, "</p>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n", CHART_W, CHART_H, title);
    put_axes(f, &a, x_name);
    fprintf(f, "<svg x=\"0\" y=\"%d\" width=\"%d\" height=\"%d\" viewBox=\"0 %d %d %d\">\n", TOP - 4, CHART_W,
            CHART_H - BOTTOM - TOP + 8, TOP - 4, CHART_W, CHART_H - BOTTOM - TOP + 8);  // a frame that clips
    if (losses) put_band(f, &a, samples, n);
    for (int k = curves - 1; k >= 0; k--) if (used[k]) put_curve(f, &a, samples, n, k);
    fprintf(f, "</svg></svg>\n<p class=\"note\">%s", losses ? "Means of 5 % of the steps; the band spans the totals among "
            "them. Numbers: the last." : "Numbers: the best.");
    if (missing) fprintf(f, " %d of %d values %s not a number.", missing, p->count, missing == 1 ? "is" : "are");
    fprintf(f, "</p></figure>\n");
    free(samples);
}

#endif
