/* evaluate.c - scores predictions against masks, whoever made them. There is no model in it.

   Build:  make dev/evaluate
   Run:    dev/evaluate --pred P --masks M [--protocol ultrasound|polyp|released|all] [--json FILE]

   P and M are each one of
     - a shard (prepro/shard.h). As P its mask plane holds the predictions, round(255 probability);
     - a folder with a folder of pictures for each video: P/<video>/<frame>.png;
     - a folder of pictures, which is one video.
   Pictures are PNG or JPEG; 16 bits are used as they are, colours become grey, transparency is dropped. Videos are matched
   by their names, frames by theirs up to the last dot, in natural order (2 before 10); a shard's frames, which have no
   names, by their order. A flat folder matches the only video of the other side whatever its name. A prediction of
   another size is resized bilinearly to its mask's. A mask value above 127 is the object.

   The protocols are explained in metrics.h. Nothing is kept but sums: one batch of frames is in memory. Frames are
   measured in parallel and added up in order, so the numbers do not depend on the number of threads.

   Sections: pictures | sets of videos | matching | measuring | table and JSON | main */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define VIVIM_PROGRAM "evaluate"
#include <dirent.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>
#include <jpeglib.h>
#include <png.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "../prepro/cli.h"
#include "../prepro/safetensors.h"  // for its JSON strings
#include "../prepro/shard.h"
#include "metrics.h"

enum { BATCH = 32, MESSAGE = 1024 };  // frames measured together; bytes of a message

// For code that runs in several threads: the message is kept, and the first one in order is reported.
__attribute__((format(printf, 2, 3))) static int failed(char *message, const char *format, ...) {
    va_list args; va_start(args, format);
    vsnprintf(message, MESSAGE, format, args);
    va_end(args);
    return -1;
}

static void *allocate(void *old, size_t count, size_t bytes) {
    void *memory = count <= SIZE_MAX / bytes ? realloc(old, count * bytes) : NULL;
    if (!memory) fail("out of memory (%zu times %zu bytes); close other programs or evaluate fewer videos", count, bytes);
    return memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// pictures: a PNG or JPEG file -> grey levels 0 .. 255 in double. They return 0, or -1 and the reason in message.

typedef struct { int H, W; double *level; uint8_t *bytes; } Picture;  // (H, W); bytes: of the decoder

static void picture_free(Picture *p) { free(p->level), free(p->bytes); p->level = NULL, p->bytes = NULL; }

// Room for H * W levels, and for `channels` bytes a pixel to decode into
static int picture_allocate(Picture *p, int64_t H, int64_t W, int channels, char *message) {
    if (H < 1 || W < 1 || H > SHARD_MAX_SIDE || W > SHARD_MAX_SIDE)
        return failed(message, "its size %lldx%lld (HxW) is beyond 1 .. %d", (long long)H, (long long)W, SHARD_MAX_SIDE);
    p->H = (int)H, p->W = (int)W;
    p->level = (double *)malloc((size_t)(H * W) * sizeof(double));
    p->bytes = channels ? (uint8_t *)malloc((size_t)(H * W) * (size_t)channels) : NULL;
    return p->level && (p->bytes || !channels) ? 0 : failed(message, "out of memory for %dx%d pixels", p->H, p->W);
}

// The luma of red, green, blue in integers, as Pillow has it: weights of 1/65536 that add up to 1, so (v, v, v) stays v
static uint64_t luma(uint64_t r, uint64_t g, uint64_t b) { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }

static void png_stop(png_structp png, png_const_charp reason) {
    failed((char *)png_get_error_ptr(png), "damaged PNG (%s)", reason);
    png_longjmp(png, 1);
}

static void png_ignore(png_structp png, png_const_charp warning) { (void)png, (void)warning; }

// Every kind of PNG becomes two bytes for each of one channel or three: v / 65535 = (v / 257) / 255
static int read_png(Picture *p, FILE *f, char *message) {
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, message, png_stop, png_ignore);
    png_infop info = png ? png_create_info_struct(png) : NULL;
    if (!info) {
        png_destroy_read_struct(&png, NULL, NULL);
        return failed(message, "out of memory");
    }
    if (setjmp(png_jmpbuf(png))) {
        png_destroy_read_struct(&png, &info, NULL);
        return -1;
    }
    png_init_io(png, f);
    png_read_info(png, info);
    png_set_expand(png);  // palette -> colours; 1, 2, 4 bits -> 8
    png_set_strip_alpha(png);
    png_set_expand_16(png);
    int passes = png_set_interlace_handling(png);
    png_read_update_info(png, info);
    size_t channels = png_get_channels(png, info);
    int64_t H = png_get_image_height(png, info), W = png_get_image_width(png, info);
    int status = picture_allocate(p, H, W, 2 * (int)channels, message);
    if (status == 0) {
        size_t row = (size_t)p->W * channels * 2;
        for (int pass = 0; pass < passes; pass++)
            for (int y = 0; y < p->H; y++) png_read_row(png, p->bytes + (size_t)y * row, NULL);
        png_read_end(png, NULL);
        for (size_t i = 0; i < (size_t)p->H * (size_t)p->W; i++) {
            uint64_t v[3];
            const uint8_t *from = p->bytes + i * channels * 2;
            for (size_t c = 0; c < channels; c++) v[c] = (uint64_t)from[2 * c] << 8 | from[2 * c + 1];
            p->level[i] = (double)(channels == 3 ? luma(v[0], v[1], v[2]) : v[0]) / 257.0;
        }
    }
    png_destroy_read_struct(&png, &info, NULL);
    return status;
}

#include "../prepro/jpeg.h"  // JpegErrors, jpeg_stop, jpeg_warning

static int read_jpeg(Picture *p, FILE *f, char *message) {
    struct jpeg_decompress_struct jpeg;
    JpegErrors errors;
    jpeg.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = jpeg_stop, errors.manager.emit_message = jpeg_warning, errors.message = message;
    if (setjmp(errors.jump)) {
        jpeg_destroy_decompress(&jpeg);
        return -1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_stdio_src(&jpeg, f);
    jpeg_read_header(&jpeg, TRUE);
    int status = picture_allocate(p, jpeg.image_height, jpeg.image_width, 1, message);
    if (status == 0) {
        jpeg.out_color_space = JCS_GRAYSCALE;
        jpeg_start_decompress(&jpeg);
        while (jpeg.output_scanline < jpeg.output_height) {
            JSAMPROW row = p->bytes + (size_t)jpeg.output_scanline * (size_t)p->W;
            jpeg_read_scanlines(&jpeg, &row, 1);
        }
        jpeg_finish_decompress(&jpeg);
        for (size_t i = 0; i < (size_t)p->H * (size_t)p->W; i++) p->level[i] = p->bytes[i];
    }
    jpeg_destroy_decompress(&jpeg);
    return status;
}

static int read_picture(Picture *p, const char *path, char *message) {
    char reason[MESSAGE];
    unsigned char start[8] = {0};
    struct stat st;
    int status;
    FILE *f = stat(path, &st) == 0 && S_ISREG(st.st_mode) ? fopen(path, "rb") : NULL;
    if (!f) return failed(message, "%s: cannot be read as a file; check it", path);
    size_t bytes = fread(start, 1, sizeof start, f);
    rewind(f);
    if (bytes == 8 && memcmp(start, "\x89PNG\r\n\x1a\n", 8) == 0) status = read_png(p, f, reason);
    else if (bytes >= 3 && memcmp(start, "\xff\xd8\xff", 3) == 0) status = read_jpeg(p, f, reason);
    else status = failed(reason, bytes ? "neither PNG nor JPEG" : "an empty file");
    fclose(f);
    return status == 0 ? 0 : failed(message, "%s: %.300s; write it again", path, reason);
}

// ---------------------------------------------------------------------------------------------------------------------
// sets of videos

typedef struct { char *name, *path; } Entry;  // name: of a picture up to its last dot, of a folder the whole

typedef struct { const char *name; int video; } Named;

typedef struct {
    const char *path;
    int is_shard, is_flat;      // flat: a folder of pictures, whose name says nothing
    Shard shard;
    Entry *frame;               // of folders: all frames of all videos
    int videos;
    char **name;                // (videos)
    int *first_frame;           // (videos + 1): video v has frames first_frame[v] .. first_frame[v + 1] - 1
    Named *order;               // (videos), sorted by name
} Set;

// Natural order: runs of digits compare as numbers, the rest as bytes; where only leading zeros differ, the bytes decide
static int compare_names(const char *a, const char *b) {
    const char *p = a, *q = b;
    while (*p && *q) {
        size_t digits_p = strspn(p, "0123456789"), digits_q = strspn(q, "0123456789");
        if (digits_p && digits_q) {
            for (; digits_p > 1 && *p == '0'; digits_p--) p++;
            for (; digits_q > 1 && *q == '0'; digits_q--) q++;
            int order = digits_p != digits_q ? (digits_p < digits_q ? -1 : 1) : strncmp(p, q, digits_p);
            if (order) return order;
            p += digits_p, q += digits_q;
        } else if (*p == *q) {
            p++, q++;
        } else {
            return (unsigned char)*p < (unsigned char)*q ? -1 : 1;
        }
    }
    return *p ? 1 : *q ? -1 : strcmp(a, b);
}

static int compare_entries(const void *a, const void *b) {
    return compare_names(((const Entry *)a)->name, ((const Entry *)b)->name);
}

static int is_picture(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot && (strcasecmp(dot, ".png") == 0 || strcasecmp(dot, ".jpg") == 0 || strcasecmp(dot, ".jpeg") == 0);
}

// Adds a folder's pictures, or the folders in it, to entry (count), in natural order; returns the new count. Hidden entries
// and other files are passed over.
static int list_folder(Entry **entry, int count, const char *folder, int want_folders) {
    int first = count;
    DIR *dir = opendir(folder);
    if (!dir) fail("%s: cannot be opened (%s); check it", folder, strerror(errno));
    for (struct dirent *d; (d = readdir(dir)) != NULL;) {
        struct stat st;
        if (d->d_name[0] == '.') continue;
        if (!shard_is_text(d->d_name)) fail("%s: the name of a file in it is not plain UTF-8 text; rename it", folder);
        size_t bytes = strlen(folder) + strlen(d->d_name) + 2;
        char *path = (char *)allocate(NULL, bytes, 1);
        snprintf(path, bytes, "%s/%s", folder, d->d_name);
        int is_folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
        if (want_folders ? !is_folder : is_folder || !is_picture(d->d_name)) {
            free(path);
            continue;
        }
        if (count == INT32_MAX - 1) fail("%s: too many pictures; evaluate fewer videos at once", folder);
        if ((count & (count - 1)) == 0) *entry = (Entry *)allocate(*entry, count ? 2 * (size_t)count : 1, sizeof(Entry));
        char *name = strdup(d->d_name), *dot = name ? strrchr(name, '.') : NULL;
        if (!name) fail("out of memory for names; close other programs");
        if (!want_folders) *dot = '\0';
        (*entry)[count].name = name, (*entry)[count++].path = path;
    }
    closedir(dir);
    if (count > first) qsort(*entry + first, (size_t)(count - first), sizeof(Entry), compare_entries);
    for (int i = first + 1; i < count; i++)
        if (strcmp((*entry)[i].name, (*entry)[i - 1].name) == 0)
            fail("%s: %s has the same name up to the ending; take one of the two away", (*entry)[i].path, (*entry)[i - 1].path);
    return count;
}

static void entries_free(Entry *entry, int count) {
    for (int i = 0; i < count; i++) free(entry[i].name), free(entry[i].path);
    free(entry);
}

static void add_video(Set *s, const char *name, int end_frame) {
    if ((s->videos & (s->videos - 1)) == 0) {
        size_t capacity = s->videos ? 2 * (size_t)s->videos : 1;
        s->name = (char **)allocate(s->name, capacity, sizeof(char *));
        s->first_frame = (int *)allocate(s->first_frame, capacity + 1, sizeof(int));
    }
    if (!(s->name[s->videos] = strdup(name))) fail("out of memory for names; close other programs");
    if (s->videos == 0) s->first_frame[0] = 0;
    s->first_frame[++s->videos] = end_frame;
}

static void open_folder(Set *s) {
    Entry *folder = NULL;
    int folders = list_folder(&folder, 0, s->path, 1), frames = list_folder(&s->frame, 0, s->path, 0);
    if (folders && frames)
        fail("%s: holds both pictures (%s) and folders (%s); give a folder of pictures, or one with a folder for each video",
             s->path, s->frame[0].name, folder[0].name);
    if (!folders && !frames) fail("%s: holds neither PNG or JPEG pictures nor folders of them; check it", s->path);
    s->is_flat = !folders;
    if (s->is_flat) {  // the last name of the path, without slashes at its end
        char *copy = strdup(s->path);
        if (!copy) fail("out of memory for names; close other programs");
        for (size_t n = strlen(copy); n > 1 && copy[n - 1] == '/'; n--) copy[n - 1] = '\0';
        char *slash = strrchr(copy, '/');
        add_video(s, slash && slash[1] ? slash + 1 : copy, frames);
        free(copy);
    }
    for (int v = 0; v < folders; v++) {
        int end = list_folder(&s->frame, frames, folder[v].path, 0);
        if (end == frames) fail("%s: holds no PNG or JPEG pictures; fill it or take it away", folder[v].path);
        add_video(s, folder[v].name, frames = end);
    }
    entries_free(folder, folders);
}

static int compare_videos(const void *a, const void *b) {
    const Named *p = (const Named *)a, *q = (const Named *)b;
    int order = compare_names(p->name, q->name);
    return order ? order : p->video < q->video ? -1 : 1;  // of equal names the first comes first
}

static void open_set(Set *s, const char *path, const char *what) {
    char err[4608];
    struct stat st;
    memset(s, 0, sizeof *s);
    s->path = path;
    if (!shard_is_text(path)) fail("--%s: its name is not plain UTF-8 text; rename it", what);
    if (stat(path, &st)) fail("%s: cannot be opened (%s); --%s wants a shard or a folder", path, strerror(errno), what);
    if (S_ISDIR(st.st_mode)) {
        open_folder(s);
    } else {
        s->is_shard = 1;
        if (!S_ISREG(st.st_mode)) fail("%s: neither a file nor a folder; --%s wants a shard or a folder", path, what);
        if (shard_open(&s->shard, path, err, sizeof err)) fail("%s", err);
        if (!s->shard.has_masks) fail("%s: a shard without masks, where --%s should be; build it with them", path, what);
        for (int v = 0; v < s->shard.videos; v++) add_video(s, shard_video_name(&s->shard, v), s->shard.first_frame[v + 1]);
    }
    s->order = (Named *)allocate(NULL, (size_t)s->videos, sizeof(Named));
    for (int v = 0; v < s->videos; v++) s->order[v].name = s->name[v], s->order[v].video = v;
    qsort(s->order, (size_t)s->videos, sizeof(Named), compare_videos);
}

static void close_set(Set *s) {
    if (s->is_shard) shard_close(&s->shard);
    else entries_free(s->frame, s->first_frame[s->videos]);
    for (int v = 0; v < s->videos; v++) free(s->name[v]);
    free(s->name), free(s->first_frame), free(s->order);
}

static int video_frames(const Set *s, int v) { return s->first_frame[v + 1] - s->first_frame[v]; }

static int load_frame(Picture *p, const Set *s, int frame, char *message) {
    p->level = NULL, p->bytes = NULL;
    if (!s->is_shard) return read_picture(p, s->frame[frame].path, message);
    if (picture_allocate(p, s->shard.H, s->shard.W, 0, message)) return -1;
    const uint8_t *plane = shard_mask(&s->shard, frame);
    for (size_t i = 0; i < (size_t)p->H * (size_t)p->W; i++) p->level[i] = plane[i];
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// matching

// Of the same video, both in folders: the same names
static void match_frames(const Set *p, int v, const Set *m, int u) {
    int np = video_frames(p, v), nm = video_frames(m, u);
    if (!p->is_shard && !m->is_shard) {
        const Entry *a = p->frame + p->first_frame[v], *b = m->frame + m->first_frame[u];
        for (int i = 0; i < np || i < nm; i++) {
            int order = i == np ? 1 : i == nm ? -1 : compare_names(a[i].name, b[i].name);
            if (order > 0) fail("%s: has no prediction in %s; add it there or take this away", b[i].path, p->path);
            if (order < 0) fail("%s: has no mask in %s; add it there or take this away", a[i].path, m->path);
        }
    }
    if (np != nm)
        fail("%s: video '%s' has %d frames, but %d in %s; both must have the same", p->path, p->name[v], np, nm, m->path);
}

// pred_video[u] = the video of p for video u of m
static int *match_videos(const Set *p, const Set *m) {
    int *pred_video = (int *)allocate(NULL, (size_t)m->videos, sizeof(int));
    int same = p->videos == 1 && m->videos == 1 && (p->is_flat || m->is_flat);
    for (int i = 0; i < p->videos || i < m->videos; i++) {
        const char *a = i < p->videos ? p->order[i].name : NULL, *b = i < m->videos ? m->order[i].name : NULL;
        int order = same ? 0 : !a ? 1 : !b ? -1 : compare_names(a, b);
        if (order > 0) fail("%s: has no video '%s', which %s has; add it or take it away there", p->path, b, m->path);
        if (order < 0) fail("%s: has no video '%s', which %s has; add it or take it away there", m->path, a, p->path);
        int twice = shard_name_twice(i > 0 ? m->order[i - 1].name : NULL, b, i + 1 < m->videos ? m->order[i + 1].name : NULL);
        if (twice && p->order[i].video != m->order[i].video)  // in the same order they are told apart by their places
            fail("%s: several videos are named '%s', and %s has its videos in another order; build them again with other names",
                 m->path, b, p->path);
        match_frames(p, p->order[i].video, m, m->order[i].video);
        pred_video[m->order[i].video] = p->order[i].video;
    }
    return pred_video;
}

// ---------------------------------------------------------------------------------------------------------------------
// measuring

// Of a video, or of all. polyp_count: the frames that the polyp protocol takes, and how many of these are empty in both
typedef struct { MetricsUltrasound ultrasound; MetricsPolyp polyp; MetricsReleased released; int polyp_count[2]; } Sums;

// What is printed of a video or of all: some kilobytes of sums become some numbers
typedef struct {
    const char *name;
    int count[2], polyp_count[2];  // frames, and how many of them are empty in both
    double ultrasound[METRICS_SIX], polyp[METRICS_POLYP_RESULTS], released[METRICS_RELEASED_RESULTS];
} Scores;

typedef struct {
    MetricsFrame metrics;
    int resized, status;
    double largest_mask, largest_pred;
    char message[MESSAGE];
} Measured;

typedef struct { int resized; double largest_mask, largest_pred; } Found;  // in all frames

static int measure(Measured *out, const Set *p, int pred_frame, const Set *m, int mask_frame) {
    Picture pred, mask = {0, 0, NULL, NULL};
    double *resized = NULL;
    int status = load_frame(&pred, p, pred_frame, out->message);
    if (status == 0) status = load_frame(&mask, m, mask_frame, out->message);
    out->resized = status == 0 && (pred.H != mask.H || pred.W != mask.W);
    if (out->resized) {
        resized = (double *)malloc((size_t)mask.H * (size_t)mask.W * sizeof(double));
        if (resized) metrics_resize(resized, mask.H, mask.W, pred.level, pred.H, pred.W);
        else status = failed(out->message, "%s: out of memory for resizing; close other programs", p->path);
    }
    if (status == 0) {
        size_t pixels = (size_t)mask.H * (size_t)mask.W;
        const double *level = resized ? resized : pred.level;
        if (!mask.bytes) mask.bytes = (uint8_t *)malloc(pixels);
        if (mask.bytes) {
            out->largest_mask = out->largest_pred = 0.0;
            for (size_t i = 0; i < pixels; i++) {
                if (mask.level[i] > out->largest_mask) out->largest_mask = mask.level[i];
                if (level[i] > out->largest_pred) out->largest_pred = level[i];
                mask.bytes[i] = mask.level[i] > 127.5;
            }
            metrics_frame(&out->metrics, level, mask.bytes, mask.H, mask.W);
        } else {
            status = failed(out->message, "%s: out of memory for a mask; close other programs", m->path);
        }
    }
    picture_free(&pred), picture_free(&mask);
    free(resized);
    return status;
}

static void finish_scores(Scores *scores, const Sums *sums, const char *name) {
    scores->name = name;
    scores->count[0] = sums->ultrasound.frames, scores->count[1] = sums->ultrasound.empty;
    scores->polyp_count[0] = sums->polyp_count[0], scores->polyp_count[1] = sums->polyp_count[1];
    metrics_ultrasound_mean(scores->ultrasound, &sums->ultrasound);
    metrics_polyp_results(scores->polyp, &sums->polyp);
    metrics_released_mean(scores->released, &sums->released);
}

// Fills scores (videos + 1), the last being of all. Frame i of the batch is the mask set's frame start + i.
static Found measure_all(Scores *scores, const Set *p, const Set *m, const int *pred_video, int keep_ends) {
    Measured *batch = (Measured *)allocate(NULL, BATCH, sizeof(Measured));
    Sums *sums = (Sums *)allocate(NULL, 2, sizeof(Sums)), *video = sums, *all = sums + 1;
    Found found = {0, 0.0, 0.0};
    memset(sums, 0, 2 * sizeof(Sums));
    int frames = m->first_frame[m->videos], v = 0;
    for (int start = 0; start < frames; start += BATCH) {
        int n = frames - start < BATCH ? frames - start : BATCH, w = v;
        int pred_frame[BATCH];
        for (int i = 0; i < n; i++) {
            while (start + i >= m->first_frame[w + 1]) w++;
            pred_frame[i] = p->first_frame[pred_video[w]] + start + i - m->first_frame[w];
        }
        #pragma omp parallel for schedule(dynamic)
        for (int i = 0; i < n; i++) batch[i].status = measure(&batch[i], p, pred_frame[i], m, start + i);
        for (int i = 0; i < n; i++) {
            Measured *f = &batch[i];
            int frame = start + i, is_end = frame == m->first_frame[v] || frame == m->first_frame[v + 1] - 1;
            if (f->status) fail("%s", f->message);
            for (int k = 0; k < 2; k++) {
                metrics_ultrasound_add(&sums[k].ultrasound, f->metrics.half);
                metrics_released_add(&sums[k].released, &f->metrics);
                sums[k].polyp_count[0] += keep_ends || !is_end;
                sums[k].polyp_count[1] += (keep_ends || !is_end) && f->metrics.half.predicted + f->metrics.half.object == 0.0;
            }
            if (keep_ends || !is_end) metrics_polyp_add(&video->polyp, &f->metrics.polyp);
            found.resized += f->resized;
            found.largest_mask = fmax(found.largest_mask, f->largest_mask);
            found.largest_pred = fmax(found.largest_pred, f->largest_pred);
            if (frame + 1 < m->first_frame[v + 1]) continue;
            metrics_polyp_add(&all->polyp, &video->polyp);
            finish_scores(&scores[v], video, m->name[v]);
            memset(video, 0, sizeof *video), v++;
        }
    }
    finish_scores(&scores[m->videos], all, "all");
    free(batch), free(sums);
    return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// table and JSON

typedef struct {
    const char *name, *about;
    int results, offset;  // how many numbers, and where in Scores
    const char *key[METRICS_RELEASED_RESULTS], *title[METRICS_RELEASED_RESULTS];
} Protocol;

enum { ULTRASOUND, POLYP, RELEASED, PROTOCOLS };
static const Protocol PROTOCOL[PROTOCOLS] = {
    {"ultrasound", "p > 0.5; mean over frames; a frame that is empty in mask and prediction counts 0",
     METRICS_SIX, (int)offsetof(Scores, ultrasound),
     {"dice", "jaccard", "precision", "recall", "specificity", "fscore"},
     {"Dice", "Jaccard", "Precis.", "Recall", "Specif.", "F-score"}},
    {"polyp", "p stretched frame by frame, 256 thresholds; mean over a video's frames, then over videos; then max or mean",
     METRICS_POLYP_RESULTS, (int)offsetof(Scores, polyp),
     {"max_dice", "max_iou", "max_specificity", "mean_dice", "mean_iou", "mean_specificity", "s_measure", "max_e_measure",
      "mean_e_measure", "adaptive_e_measure", "mae"},
     {"maxDice", "maxIoU", "maxSpe", "meanDice", "meanIoU", "meanSpe", "S", "maxE", "meanE", "adaptE", "MAE"}},
    {"released", "each frame's mean over 256 thresholds, as the released training script reports it; mean over frames",
     METRICS_RELEASED_RESULTS, (int)offsetof(Scores, released),
     {"dice", "jaccard", "precision", "recall", "specificity", "fscore", "max_dice", "max_jaccard", "max_precision",
      "max_recall", "max_specificity", "max_fscore", "s_measure", "mean_e_measure", "max_e_measure", "adaptive_e_measure",
      "mae"},
     {"Dice", "Jaccard", "Precis.", "Recall", "Specif.", "F-score", "maxDice", "maxJac.", "maxPrec.", "maxRec.", "maxSpec.",
      "maxF", "S", "meanE", "maxE", "adaptE", "MAE"}},
};

static const double *numbers(const Scores *scores, int protocol) {
    return (const double *)(const void *)((const char *)scores + PROTOCOL[protocol].offset);
}

// Characters, not bytes, of UTF-8
static int text_width(const char *text) {
    int width = 0;
    for (; *text; text++) width += ((unsigned char)*text & 0xC0) != 0x80;
    return width;
}

static void print_padded(const char *text, int width) { printf("%s%*s", text, width - text_width(text), ""); }

static void print_table(const Scores *scores, int videos, int protocol) {
    const Protocol *t = &PROTOCOL[protocol];
    int width = 5;
    for (int v = 0; v < videos; v++) width = text_width(scores[v].name) > width ? text_width(scores[v].name) : width;
    printf("\n%s: %s\n", t->name, t->about);
    print_padded("video", width);
    printf("  frames   empty");  // empty: in mask and prediction
    for (int c = 0; c < t->results; c++) printf(" %8s", t->title[c]);
    for (int v = 0; v <= videos; v++) {
        printf("\n");
        print_padded(scores[v].name, width);
        const int *count = protocol == POLYP ? scores[v].polyp_count : scores[v].count;
        printf(" %7d %7d", count[0], count[1]);
        for (int c = 0; c < t->results; c++) {
            if (count[0] == 0) printf(" %8s", "-");
            else printf(" %8.4f", numbers(&scores[v], protocol)[c]);
        }
    }
    printf("\n");
}

static void json_scores(FILE *f, const Scores *s, const int wanted[PROTOCOLS]) {
    fprintf(f, "\"frames\": %d, \"empty_in_both\": %d, \"polyp_frames\": %d, \"polyp_empty_in_both\": %d", s->count[0],
            s->count[1], s->polyp_count[0], s->polyp_count[1]);
    for (int protocol = 0; protocol < PROTOCOLS; protocol++) {
        const Protocol *t = &PROTOCOL[protocol];
        const int *count = protocol == POLYP ? s->polyp_count : s->count;
        if (!wanted[protocol]) continue;
        fprintf(f, ",\n   \"%s\": ", t->name);
        if (count[0] == 0) {
            fprintf(f, "null");
            continue;
        }
        for (int c = 0; c < t->results; c++)
            fprintf(f, "%s\"%s\": %.9f", c ? ", " : "{", t->key[c], numbers(s, protocol)[c]);
        fprintf(f, "}");
    }
}

// PATH.tmp, which takes the name PATH when all of it is on the disk
static FILE *json_open(char *tmp, size_t bytes, const char *path) {
    struct stat st;
    if ((size_t)snprintf(tmp, bytes, "%s.tmp", path) >= bytes) fail("--json: its name is too long; choose a shorter one");
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) fail("--json %s: exists and is not a file; choose another name", path);
    FILE *f = fopen(tmp, "wb");
    if (!f) fail("--json %s: cannot be written (%s); choose another place", path, strerror(errno));
    return f;
}

static void write_json(const char *path, const Set *p, const Set *m, const Scores *scores, const int wanted[PROTOCOLS],
                       const Found *found) {
    char tmp[4096];
    FILE *f = json_open(tmp, sizeof tmp, path);
    fprintf(f, "{\"pred\": ");
    json_print_string(f, p->path);
    fprintf(f, ", \"masks\": ");
    json_print_string(f, m->path);
    fprintf(f, ", \"videos\": %d, \"resized_frames\": %d,\n \"overall\": {", m->videos, found->resized);
    json_scores(f, &scores[m->videos], wanted);
    fprintf(f, "},\n \"per_video\": [");
    for (int v = 0; v < m->videos; v++) {
        fprintf(f, "%s\n  {\"name\": ", v ? "," : "");
        json_print_string(f, scores[v].name);
        fprintf(f, ", ");
        json_scores(f, &scores[v], wanted);
        fprintf(f, "}");
    }
    fprintf(f, "]}\n");
    int bad = fflush(f) || ferror(f) || fsync(fileno(f));
    if (fclose(f) || bad || rename(tmp, path)) {
        int reason = errno;
        unlink(tmp);
        fail("--json %s: cannot be written (%s); make room or choose another place", path, strerror(reason));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// main

typedef struct { const char *pred, *masks, *protocol, *json; int keep_ends, threads, help; } EvaluateOptions;

#define FIELD(member) offsetof(EvaluateOptions, member)
static const Option EVALUATE_OPTIONS[] = {
    {"pred", "", "predictions: a shard with round(255 probability) as masks, or a folder", 's', 0, 0, FIELD(pred)},
    {"masks", "", "true masks: a shard, or a folder; above 127 is the object", 's', 0, 0, FIELD(masks)},
    {"protocol", "all", "ultrasound, polyp, released or all", 's', 0, 0, FIELD(protocol)},
    {"json", "", "file to write the numbers to, per video and overall", 's', 0, 0, FIELD(json)},
    {"keep-ends", "", "polyp: keep the first and the last frame of every video", 'f', 0, 0, FIELD(keep_ends)},
    {"threads", "0", "0: as many as OpenMP chooses; results do not depend on it", 'i', 0, 1024, FIELD(threads)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

static void print_help(void) {
    printf("evaluate - scores predictions against masks\n\n"
           "  dev/evaluate --pred P --masks M [options]\n\n"
           "P, M: a shard; a folder FOLDER/VIDEO/FRAME.png; or a folder of pictures, which is one video\n\n");
    options_help(EVALUATE_OPTIONS);
}

// Before the long work: can the file be written, and is it none that is read?
static void check_json(const char *path, const EvaluateOptions *o) {
    char tmp[4096];
    if (same_file(path, o->pred) || same_file(path, o->masks))
        fail("--json %s: is read by this program; choose another name", path);
    fclose(json_open(tmp, sizeof tmp, path));
    unlink(tmp);
}

int main(int argc, char **argv) {
    EvaluateOptions o;
    Set pred, masks;
    int wanted[PROTOCOLS], any = 0;
    options_parse(&o, EVALUATE_OPTIONS, argc, argv);
    if (o.help) {
        print_help();
        return 0;
    }
    for (int k = 0; k < PROTOCOLS; k++) {
        wanted[k] = strcmp(o.protocol, "all") == 0 || strcmp(o.protocol, PROTOCOL[k].name) == 0;
        any |= wanted[k];
    }
    if (!any) fail("--protocol %s: wants ultrasound, polyp, released or all", o.protocol);
    if (!o.pred[0]) fail("--pred: is missing; give a shard or a folder of predictions (--help tells more)");
    if (!o.masks[0]) fail("--masks: is missing; give a shard or a folder of masks (--help tells more)");
#ifdef _OPENMP
    if (o.threads) omp_set_num_threads(o.threads);
#endif
    open_set(&pred, o.pred, "pred"), open_set(&masks, o.masks, "masks");
    if (o.json[0]) check_json(o.json, &o);
    int *pred_video = match_videos(&pred, &masks);
    Scores *scores = (Scores *)allocate(NULL, (size_t)masks.videos + 1, sizeof(Scores)), *all = scores + masks.videos;
    Found found = measure_all(scores, &pred, &masks, pred_video, o.keep_ends);

    if (found.largest_mask == 1.0)
        fail("%s: its values are 0 and 1, but the object must be above 127; multiply by 255", masks.path);
    if (wanted[POLYP] && all->polyp_count[0] == 0 && strcmp(o.protocol, "all") != 0)
        fail("%s: no video has 3 frames, and the polyp protocol leaves out the first and the last; give --keep-ends", o.masks);
    if (o.json[0]) write_json(o.json, &pred, &masks, scores, wanted, &found);
    printf("%d videos, %d frames, %d of them empty in both (no object, nothing above 0.5), %d predictions resized\n",
           masks.videos, all->count[0], all->count[1], found.resized);
    if (found.largest_pred <= 1.0)
        printf("note: no prediction is above 1 of 255; were they written as 0 .. 1 instead of 0 .. 255?\n");
    for (int k = 0; k < PROTOCOLS; k++)
        if (wanted[k]) print_table(scores, masks.videos, k);
    if (wanted[POLYP] && !o.keep_ends)
        printf("\npolyp: the first and the last frame of every video are left out, and with them videos of 1 or 2 frames\n");
    if (fflush(stdout) || ferror(stdout)) fail("standard output: cannot be written (%s); make room", strerror(errno));
    free(scores), free(pred_video);
    close_set(&pred), close_set(&masks);
    return 0;
}
