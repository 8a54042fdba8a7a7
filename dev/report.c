/* report.c - one HTML page about a run: its losses, its validation, what it predicts well and what it does not.

   Build:  make dev/report
   Run:    dev/report --log out/log.txt --pred predicted.bin --masks val.bin --out report.html

   The page needs nothing but itself: curves are inline SVG, pictures are PNG in data URIs, there is no script. Without
   --log it has the prediction's part only, without --pred and --masks the training's. It is built in memory and saved as a
   whole; what can be refused is refused before. (It is XML too, so that xmllint can check it.)

   Map of this file: options; the log; text and pictures in a page; scores; examples; the page, main. Curves: charts.h. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define VIVIM_PROGRAM "report"

#include "../prepro/cli.h"
#include "../prepro/overlay.h"
#include "../prepro/prediction.h"
#include "../prepro/png.h"
#include "charts.h"
#include "metrics.h"
#include "report_style.h"

typedef struct { const char *log, *pred, *masks, *out, *title; int examples, help; } ReportOptions;

#define FIELD(member) offsetof(ReportOptions, member)
static const Option REPORT_OPTIONS[] = {
    {"log", "", "the run's log.txt", 's', 0, 0, FIELD(log)},
    {"pred", "", "the prediction: a shard with frames and predicted masks", 's', 0, 0, FIELD(pred)},
    {"masks", "", "the shard with the true masks: same videos, same frames", 's', 0, 0, FIELD(masks)},
    {"out", "report.html", "the page", 's', 0, 0, FIELD(out)},
    {"title", "Vivim report", "its title", 's', 0, 0, FIELD(title)},
    {"examples", "4", "worst frames to show, and as many of the best", 'i', 0, 100, FIELD(examples)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

// ---------------------------------------------------------------------------------------------------------------------
// the log

typedef struct { char *name, *value; } Setting;

typedef struct {
    Points train, val;
    Setting *settings;        // of the run, from the log's head
    int num_settings, cut;    // cut: the last line has no end
} Log;

// A run that was resumed may say a step again: then only the later one counts.
static void points_add(Points *p, double at, const double *value, int values) {
    while (p->count > 0 && p->points[p->count - 1].at >= at) p->count--;
    if ((p->count & (p->count - 1)) == 0)  // room for twice as many at every power of two
        p->points = (Point *)memory(p->points, sizeof(Point) * 2 * ((size_t)p->count + 1));
    Point *point = &p->points[p->count++];
    point->at = at;
    for (int i = 0; i < VALUES; i++) point->value[i] = i < values ? value[i] : 0.0;
}

// The numbers in a line, at most `most`; -1 if something else stands there
static int read_numbers(double *number, int most, const char *text) {
    int n = 0;
    for (char *end; n < most && text[strspn(text, " \r\n")]; text = end) {
        number[n++] = strtod(text, &end);
        if (end == text) return -1;
    }
    return n;
}

static void setting_add(Log *log, char *line) {
    char *name = line + 2, *value = name + strcspn(name, " \r\n");
    if (*value) *value++ = '\0';
    value[strcspn(value, "\r\n")] = '\0';
    int i = 0;
    while (i < log->num_settings && strcmp(log->settings[i].name, name) != 0) i++;
    if (i == log->num_settings) {
        log->settings = (Setting *)memory(log->settings, sizeof(Setting) * (size_t)++log->num_settings);
        log->settings[i].name = log->settings[i].value = NULL;
    }
    size_t name_bytes = strlen(name) + 1, value_bytes = strlen(value) + 1;
    log->settings[i].name = (char *)memcpy(memory(log->settings[i].name, name_bytes), name, name_bytes);
    log->settings[i].value = (char *)memcpy(memory(log->settings[i].value, value_bytes), value, value_bytes);
}

// The lines of train_vivim's log: "# --name value", "train epoch step lr loss seg edge affine", "val epoch loss dice
// jaccard ..."; other lines are left to other readers. A last line without an end was cut off while it was written.
static void log_read(Log *log, const char *path) {
    char *line = NULL;
    size_t room = 0;
    double number[7];
    memset(log, 0, sizeof *log);
    FILE *f = fopen(path, "r");
    if (!f) fail("%s: cannot be opened: %s; give --log the log.txt of a run", path, strerror(errno));
    errno = 0;
    for (long row = 1, length; (length = (long)getline(&line, &room, f)) > 0; row++) {
        int train = strncmp(line, "train ", 6) == 0, val = strncmp(line, "val ", 4) == 0;
        log->cut = line[length - 1] != '\n';
        if (log->cut) break;
        if (strncmp(line, "# --", 4) == 0 || strncmp(line, "# parameters ", 13) == 0) setting_add(log, line);
        if (!train && !val) continue;
        int n = read_numbers(number, 7, line + (train ? 6 : 4));
        if (n < 4 || !is_number(number[train])) fail("%s: line %ld is damaged; remove it", path, row);
        if (train) points_add(&log->train, number[1], number + 3, n - 3);  // at its step
        else points_add(&log->val, number[0], number + 2, n - 2);          // at its epoch
    }
    if (ferror(f)) fail("%s: cannot be read: %s; give --log the log.txt of a run", path, strerror(errno));
    fclose(f), free(line);
    if (log->num_settings + log->train.count + log->val.count == 0)
        fail("%s: holds no line of a run; give --log the log.txt that train_vivim writes", path);
}

static void log_free(Log *log) {
    for (int i = 0; i < log->num_settings; i++) free(log->settings[i].name), free(log->settings[i].value);
    free(log->settings), free(log->train.points), free(log->val.points);
}

// ---------------------------------------------------------------------------------------------------------------------
// text and pictures in a page

// Escaped; bytes that are no UTF-8 and control characters, which a page must not hold, become question marks
static void put_text(FILE *f, const char *text) {
    for (const unsigned char *c = (const unsigned char *)text; *c;) {
        int more = *c >= 0xC2 && *c < 0xE0 ? 1 : *c >= 0xE0 && *c < 0xF0 ? 2 : *c >= 0xF0 && *c < 0xF5 ? 3 : 0, n = 0;
        while (n < more && (c[n + 1] & 0xC0) == 0x80) n++;
        uint32_t first = more ? (uint32_t)c[0] << 8 | c[1] : 0;  // overlong, surrogate, too high, U+FFFE and U+FFFF
        int bad = n < more || (first >= 0xE080 && first < 0xE0A0) || (first >= 0xEDA0 && first < 0xEE80) ||
                  (first >= 0xF080 && first < 0xF090) || first >= 0xF490 || (first == 0xEFBF && c[2] >= 0xBE);
        if (*c == '&') fputs("&amp;", f);
        else if (*c == '<') fputs("&lt;", f);
        else if (*c == '>') fputs("&gt;", f);
        else if (*c == '"') fputs("&quot;", f);
        else if (*c < 32 || *c == 127 || bad || (*c >= 128 && !more)) fputc('?', f), n = 0;
        else fwrite(c, 1, (size_t)n + 1, f);
        c += n + 1;
    }
}

static void put_base64(FILE *f, const unsigned char *bytes, size_t n) {
    static const char DIGITS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t three = 0;
        for (size_t k = 0; k < 3; k++) three = three << 8 | (i + k < n ? bytes[i + k] : 0u);
        for (size_t k = 0; k < 4; k++) fputc(i + k <= n ? DIGITS[three >> (18 - 6 * k) & 63] : '=', f);
    }
}

static void put_picture(FILE *f, const char *what, const uint8_t *pixels, int H, int W, int C) {
    size_t length;
    unsigned char *png = png_encode(&length, pixels, H, W, C);
    if (!png) fail("no memory for a picture of %dx%d; close other programs", H, W);
    fprintf(f, "<div><img alt=\"%s\" width=\"%d\" height=\"%d\" src=\"data:image/png;base64,", what, W, H);
    put_base64(f, png, length);
    fprintf(f, "\" /><span>%s</span></div>\n", what);
    free(png);
}

// ---------------------------------------------------------------------------------------------------------------------
// scores: the ultrasound protocol, each measure per frame, then the mean over frames; 0 without denominator

typedef struct { double dice, jaccard, precision, recall; int empty; } Score;  // empty: no object, predicted or true
typedef struct { Score score; int index; } Ranked;                              // a video or a frame

// The ultrasound protocol's measures of a frame
static Score score_frame(const uint8_t *predicted, const uint8_t *real, size_t pixels) {
    MetricsCounts c = {(double)pixels, 0, 0, 0};
    double six[METRICS_SIX];
    for (size_t i = 0; i < pixels; i++) {
        int p = predicted[i] > 127, g = real[i] > 127;
        c.object += g, c.predicted += p, c.hit += p & g;
    }
    metrics_six(six, c);
    Score s = {six[METRICS_DICE], six[METRICS_JACCARD], six[METRICS_PRECISION], six[METRICS_RECALL],
               c.predicted + c.object == 0};
    return s;
}

static void score_add(Score *sum, const Score *s, double weight) {
    sum->dice += weight * s->dice, sum->jaccard += weight * s->jaccard;
    sum->precision += weight * s->precision, sum->recall += weight * s->recall, sum->empty += s->empty;
}

static int worse_first(const void *a, const void *b) {
    const Ranked *x = (const Ranked *)a, *y = (const Ranked *)b;
    return x->score.dice != y->score.dice ? (x->score.dice < y->score.dice ? -1 : 1) : x->index - y->index;
}

// Scores of all frames and videos, worst first; returns the mean over all frames
static Score score_all(Ranked *frames, Ranked *videos, const Prediction *p) {
    const Shard *s = &p->shard;
    Score all = {0, 0, 0, 0, 0};
    for (int v = 0; v < s->videos; v++) {
        int first = s->first_frame[v], end = s->first_frame[v + 1];
        memset(&videos[v], 0, sizeof videos[v]), videos[v].index = v;
        for (int i = first; i < end; i++) {
            frames[i].index = i;
            frames[i].score = score_frame(shard_mask(s, i), prediction_truth(p, i), (size_t)s->H * (size_t)s->W);
            score_add(&videos[v].score, &frames[i].score, 1.0 / (end - first));
            score_add(&all, &frames[i].score, 1.0 / s->frames);
        }
    }
    qsort(frames, (size_t)s->frames, sizeof(Ranked), worse_first);
    qsort(videos, (size_t)s->videos, sizeof(Ranked), worse_first);
    return all;
}

static void put_row(FILE *f, const char *name, int frames, const Score *s) {
    fprintf(f, "<tr><th scope=\"row\">"), put_text(f, name);
    fprintf(f, "</th><td>%d</td><td class=\"bar\" style=\"--part:%.1f%%\">%.4f</td>", frames, 100 * s->dice, s->dice);
    fprintf(f, "<td>%.4f</td><td>%.4f</td><td>%.4f</td></tr>\n", s->jaccard, s->precision, s->recall);
}

static void put_scores(FILE *f, const Prediction *p, const Ranked *videos, const Score *all) {
    const Shard *s = &p->shard;
    fprintf(f, "<section><h2>Scores</h2>\n<p class=\"note\">Threshold 0.5; each measure per frame, then the mean over frames; "
            "0 where there is nothing to divide by. Worst video first.");
    if (all->empty) fprintf(f, " %d of %d frames hold no object, neither a predicted nor a true one: they count as 0.",
                            all->empty, s->frames);
    fprintf(f, "</p>\n<div class=\"scroll\"><table><thead><tr><th scope=\"col\">Video</th><th scope=\"col\">Frames</th>"
            "<th scope=\"col\">Dice</th><th scope=\"col\">Jaccard</th><th scope=\"col\">Precision</th>"
            "<th scope=\"col\">Recall</th></tr></thead>\n<tbody class=\"all\">");
    put_row(f, "All frames", s->frames, all);
    fprintf(f, "</tbody>\n<tbody>");
    for (int i = 0; i < s->videos; i++) {
        int v = videos[i].index;
        put_row(f, shard_video_name(s, v), s->first_frame[v + 1] - s->first_frame[v], &videos[i].score);
    }
    fprintf(f, "</tbody></table></div></section>\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// examples: a frame, its outlines, its probability

static void put_example(FILE *f, const Prediction *p, View *view, Overlay *outlines, const Ranked *frame) {
    const Shard *s = &p->shard;
    int v = shard_video_of_frame(s, frame->index), grey = 1;
    size_t pixels = (size_t)view->H * (size_t)view->W;
    if (view_load(view, p, frame->index) != 0) fail("no memory for a frame of %dx%d; close other programs", s->H, s->W);
    overlay_add(outlines, 0, view->rgb, view->predicted, view->real);
    uint8_t *first_channel = (uint8_t *)memory(NULL, pixels);  // is enough for ultrasound: a third of the bytes
    for (size_t i = 0; i < pixels; i++) {
        const uint8_t *rgb = view->rgb + 3 * i;
        first_channel[i] = rgb[0], grey &= rgb[0] == rgb[1] && rgb[1] == rgb[2];
    }
    fprintf(f, "<figure class=\"example\"><div class=\"three\">\n");
    put_picture(f, "frame", grey ? first_channel : view->rgb, view->H, view->W, grey ? 1 : 3);
    put_picture(f, "outlines", outlines->rgb, outlines->H, outlines->W, 3);
    put_picture(f, "probability", view->probability, view->H, view->W, 1);
    fprintf(f, "</div><figcaption><b>Dice %.4f</b> ", frame->score.dice), put_text(f, shard_video_name(s, v));
    fprintf(f, ", frame %d &#183; precision %.3f, recall %.3f</figcaption></figure>\n", frame->index - s->first_frame[v] + 1,
            frame->score.precision, frame->score.recall);
    free(first_channel);
}

// So many frames from one end of the ranking. Neighbours look alike, so each video gives only its share; frames without
// any object, which have no score worth the name, give none.
static void put_examples(FILE *f, const Prediction *p, Ranked *frames, int count, int best) {
    const Shard *s = &p->shard;
    int share = (count + s->videos - 1) / s->videos, shown = 0;
    int *given = (int *)memory(NULL, sizeof(int) * (size_t)s->videos);
    View view;
    Overlay outlines;
    memset(given, 0, sizeof(int) * (size_t)s->videos);
    // about the size on the page, so that the outlines, a pixel wide, do not get lost when a browser shrinks the picture
    const int longest = 192;
    if (view_open(&view, p, longest) != 0 ||
        overlay_open_zoomed(&outlines, 1, 1, view.H, view.W, longest / (view.H > view.W ? view.H : view.W)) != 0)
        fail("no memory for a frame of %dx%d; close other programs", s->H, s->W);
    for (int i = 0; i < s->frames && shown < count; i++) {
        Ranked *frame = &frames[best ? s->frames - 1 - i : i];
        int v = shard_video_of_frame(s, frame->index);
        if (frame->score.empty || given[v] == share) continue;
        if (shown == 0) fprintf(f, "<section><h2>%s frames</h2>\n<p class=\"note\">Outlines: <i class=\"red\"></i>predicted, "
                                "<i class=\"green\"></i>true, <i class=\"yellow\"></i>where they agree. Probability: white is "
                                "1.</p>\n<div class=\"examples\">\n", best ? "Best" : "Worst");
        put_example(f, p, &view, &outlines, frame);
        frame->score.empty = 1;  // not again among the best
        given[v]++, shown++;
    }
    if (shown) fprintf(f, "</div></section>\n");
    overlay_close(&outlines), view_close(&view), free(given);
}

// ---------------------------------------------------------------------------------------------------------------------
// the page

static void put_number(FILE *f, const char *name, const char *format, double value) {
    fprintf(f, "<div><dt>%s</dt><dd>", name), fprintf(f, format, value), fprintf(f, "</dd></div>\n");
}

static void put_source(FILE *f, const char *what, const char *path) {
    if (path[0]) fprintf(f, " %s ", what), put_text(f, path), fputc('.', f);
}

static void put_training(FILE *f, const Log *log) {
    static const char *const LOSSES[] = {"total", "masks (seg)", "boundaries (edge)", "affine"};
    static const char *const SCORES[] = {"Dice", "Jaccard"};
    fprintf(f, "<section><h2>Training</h2>\n");
    if (log->cut) fprintf(f, "<p class=\"note\">The log's last line is incomplete and was left out.</p>\n");
    fprintf(f, "<div class=\"charts\">\n");
    put_chart(f, "Training loss", "step", &log->train, LOSSES, 4, 1);
    put_chart(f, "Validation", "epoch", &log->val, SCORES, 2, 0);
    fprintf(f, "</div></section>\n");
}

static void put_settings(FILE *f, const Log *log) {
    if (log->num_settings == 0) return;
    fprintf(f, "<section><h2>Options of the run</h2>\n<ul class=\"settings\">\n");
    for (int i = 0; i < log->num_settings; i++) {
        fprintf(f, "<li><span>"), put_text(f, log->settings[i].name), fprintf(f, "</span><b>");
        put_text(f, log->settings[i].value), fprintf(f, "</b></li>\n");
    }
    fprintf(f, "</ul></section>\n");
}

static void put_page(FILE *f, const ReportOptions *o, const Log *log, const Prediction *p) {
    Ranked *frames = NULL, *videos = NULL;
    Score all = {0, 0, 0, 0, 0};
    fprintf(f, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\" />\n"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n<title>");
    put_text(f, o->title), fprintf(f, "</title>\n<style>\n%s</style></head>\n<body><h1>", REPORT_STYLE), put_text(f, o->title);
    fprintf(f, "</h1>\n<dl class=\"numbers\">\n");
    if (p) {
        frames = (Ranked *)memory(NULL, sizeof(Ranked) * (size_t)p->shard.frames);
        videos = (Ranked *)memory(NULL, sizeof(Ranked) * (size_t)p->shard.videos);
        all = score_all(frames, videos, p);
        put_number(f, "Dice", "%.4f", all.dice), put_number(f, "Jaccard", "%.4f", all.jaccard);
        put_number(f, "Precision", "%.4f", all.precision), put_number(f, "Recall", "%.4f", all.recall);
        put_number(f, "Videos", "%.0f", p->shard.videos), put_number(f, "Frames", "%.0f", p->shard.frames);
    }
    if (log && log->train.count) put_number(f, "Training steps", "%.0f", log->train.points[log->train.count - 1].at);
    fprintf(f, "</dl>\n<p class=\"note\">");
    put_source(f, "Log:", o->log), put_source(f, "Prediction:", o->pred), put_source(f, "True masks:", o->masks);
    fprintf(f, "</p>\n");
    if (log) put_training(f, log);
    if (p) {
        put_scores(f, p, videos, &all);
        put_examples(f, p, frames, o->examples, 0);
        put_examples(f, p, frames, o->examples, 1);
    }
    if (log) put_settings(f, log);
    fprintf(f, "</body></html>\n");
    free(frames), free(videos);
}

int main(int argc, char **argv) {
    ReportOptions o;
    Log log;
    Prediction p;
    char err[4608], *page = NULL;
    size_t length = 0;
    options_parse(&o, REPORT_OPTIONS, argc, argv);
    if (o.help) {
        printf("report - one HTML page about a run: --log, or --pred and --masks, or all three\n\n");
        options_help(REPORT_OPTIONS);
        return 0;
    }
    if (!o.log[0] && !o.pred[0]) fail("--log, --pred: nothing to report on; give one or both");
    if (!o.pred[0] != !o.masks[0]) fail("--pred, --masks: belong together; give both or none");
    if (same_file(o.out, o.log) || same_file(o.out, o.pred) || same_file(o.out, o.masks))
        fail("--out %s: is a file that the page is made from; choose another name", o.out);
    if (o.log[0]) log_read(&log, o.log);
    if (o.pred[0] && prediction_open(&p, o.pred, o.masks, err, sizeof err) != 0) fail("%s", err);
    FILE *f = open_memstream(&page, &length);
    if (!f) fail("out of memory; close other programs");
    put_page(f, &o, o.log[0] ? &log : NULL, o.pred[0] ? &p : NULL);
    if (fclose(f) != 0) fail("out of memory: the page does not fit; give a smaller --examples");
    if (save_whole(o.out, page, length, err, sizeof err) != 0) fail("%s", err);
    printf("%s: %.1f KiB\n", o.out, (double)length / 1024);
    free(page);
    if (o.log[0]) log_free(&log);
    if (o.pred[0]) prediction_close(&p);
    return 0;
}
