/* prediction.h - reads predicted masks, and the true ones beside them. Header only.

   A prediction is a shard: the frames it was made for, and as masks round(255 * probability); above 127 is the object.
   The true masks are in another shard: its videos are matched by name (where several have one, all must stand in the same
   order), frames by order.

       Prediction p;  View view;
       if (prediction_open(&p, "predicted.bin", "test.bin", err, sizeof err)) fail("%s", err);    // "": truth not known
       if (view_open(&view, &p, 256)) ...                         // sides of at most 256; 0: frames as they are
       for each frame f: view_load(&view, &p, f), look at view.rgb, view.predicted, view.real
       view_close(&view), prediction_close(&p);  */
#ifndef PREDICTION_H
#define PREDICTION_H

#include "resize.h"
#include "shard.h"

typedef struct { const char *name; int video; } NamedVideo;

typedef struct {
    Shard shard, truth;      // truth.map is NULL when it is not known
    NamedVideo *by_name;     // (shard.videos), sorted
    int *true_first;         // (shard.videos) the truth's first frame of each video
} Prediction;

static inline int named_video_compare(const void *a, const void *b) {
    const NamedVideo *x = (const NamedVideo *)a, *y = (const NamedVideo *)b;
    int order = strcmp(x->name, y->name);
    return order ? order : x->video - y->video;
}

static inline NamedVideo *videos_by_name(const Shard *s) {
    NamedVideo *list = (NamedVideo *)malloc((size_t)s->videos * sizeof(NamedVideo));
    for (int v = 0; list && v < s->videos; v++) list[v].name = shard_video_name(s, v), list[v].video = v;
    if (list) qsort(list, (size_t)s->videos, sizeof(NamedVideo), named_video_compare);
    return list;
}

static inline void prediction_close(Prediction *p) {
    free(p->by_name);
    free(p->true_first);
    shard_close(&p->shard);
    shard_close(&p->truth);
}

static inline int prediction_match(Prediction *p, const NamedVideo *real, char *err, size_t errlen) {
    const Shard *s = &p->shard, *t = &p->truth;
    if (s->H != t->H || s->W != t->W)
        return shard_fail(err, errlen, "%s: frames are %dx%d, those of %s %dx%d; give the shard that was predicted from",
                          t->path, t->H, t->W, s->path, s->H, s->W);
    for (int i = 0; i < s->videos || i < t->videos; i++) {
        int order = i == t->videos ? -1 : i == s->videos ? 1 : strcmp(p->by_name[i].name, real[i].name);
        if (order)
            return shard_fail(err, errlen, "%s: video '%s' is not in %s; give the shard that was predicted from",
                              order < 0 ? s->path : t->path, order < 0 ? p->by_name[i].name : real[i].name,
                              order < 0 ? t->path : s->path);
        int v = p->by_name[i].video, w = real[i].video;
        int frames = s->first_frame[v + 1] - s->first_frame[v], true_frames = t->first_frame[w + 1] - t->first_frame[w];
        if (frames != true_frames)
            return shard_fail(err, errlen, "%s: video '%s' has %d frames, in %s %d; give the shard that was predicted from",
                              t->path, real[i].name, true_frames, s->path, frames);
        int twice = shard_name_twice(i > 0 ? real[i - 1].name : NULL, real[i].name,
                                     i + 1 < t->videos ? real[i + 1].name : NULL);
        if (twice && v != w)  // with the same order of all videos they are told apart by their places
            return shard_fail(err, errlen, "%s: several videos are named '%s', and %s has its videos in another order; "
                              "build them again with other names", t->path, real[i].name, s->path);
        p->true_first[v] = t->first_frame[w];
    }
    return 0;
}

// masks_path "": the truth is not known
static inline int prediction_open(Prediction *p, const char *path, const char *masks_path, char *err, size_t errlen) {
    NamedVideo *real = NULL;
    memset(p, 0, sizeof *p);
    int failed = shard_open(&p->shard, path, err, errlen);
    if (!failed && !p->shard.has_masks)
        failed = shard_fail(err, errlen, "%s: has no masks, so it is no prediction; ./train_vivim --predict writes one", path);
    if (!failed && masks_path[0]) failed = shard_open(&p->truth, masks_path, err, errlen);
    if (!failed && masks_path[0] && !p->truth.has_masks)
        failed = shard_fail(err, errlen, "%s: has no masks to compare with; give prepro/frames a folder of masks", masks_path);
    if (!failed) {
        p->by_name = videos_by_name(&p->shard);
        p->true_first = (int *)malloc((size_t)p->shard.videos * sizeof(int));
        if (masks_path[0]) real = videos_by_name(&p->truth);
        if (!p->by_name || !p->true_first || (masks_path[0] && !real))
            failed = shard_fail(err, errlen, "%s: no memory for a table of %d videos", path, p->shard.videos);
    }
    if (!failed && masks_path[0]) failed = prediction_match(p, real, err, errlen);
    free(real);
    if (failed) prediction_close(p);
    return failed;
}

// the true mask of frame number `frame` of the prediction: (H, W), or NULL where it is not known
static inline const uint8_t *prediction_truth(const Prediction *p, int frame) {
    if (!p->truth.map) return NULL;
    int v = shard_video_of_frame(&p->shard, frame);
    return shard_mask(&p->truth, p->true_first[v] + frame - p->shard.first_frame[v]);
}

// ---------------------------------------------------------------------------------------------------------------------
// a frame to look at, shrunk to a size that a person wants to see

typedef struct {
    int H, W;
    const uint8_t *rgb, *probability;  // (H, W, 3), (H, W): the shard's, or what follows
    uint8_t *predicted, *real;         // (H, W): 0 or 1; real is NULL where it is not known
    uint8_t *small, *full;             // of shrunk views: (H, W, 4) for rgb and probability, a mask of the shard's size
} View;

static inline void view_close(View *w) {
    free(w->predicted);
    free(w->real);
    free(w->small);
    free(w->full);
}

// No side is longer than `longest` (0: as in the shard). 0, or -1 without memory.
static inline int view_open(View *w, const Prediction *p, int longest) {
    int H = p->shard.H, W = p->shard.W, side = H > W ? H : W;
    memset(w, 0, sizeof *w);
    w->H = H, w->W = W;
    if (longest && side > longest) {
        w->H = H * longest / side, w->W = W * longest / side;  // 2^14 times a few hundred
        if (w->H < 1) w->H = 1;
        if (w->W < 1) w->W = 1;
        w->small = (uint8_t *)malloc((size_t)w->H * (size_t)w->W * 4);
        w->full = (uint8_t *)malloc((size_t)H * (size_t)W);
    }
    size_t pixels = (size_t)w->H * (size_t)w->W;
    w->predicted = (uint8_t *)malloc(pixels);
    w->real = p->truth.map ? (uint8_t *)malloc(pixels) : NULL;
    int shrunk = w->H != H || w->W != W;
    if (w->predicted && (w->real || !p->truth.map) && (!shrunk || (w->small && w->full))) return 0;
    view_close(w);
    return -1;
}

// A mask of grey levels, shrunk as the object's outline and not as its grey levels, as 0 and 1. 0, or -1 without memory.
static inline int view_mask(uint8_t *mask, const View *w, const uint8_t *grey, const Shard *s) {
    size_t pixels = (size_t)w->H * (size_t)w->W, full_pixels = (size_t)s->H * (size_t)s->W;
    if (w->full) {
        for (size_t i = 0; i < full_pixels; i++) w->full[i] = grey[i] > 127 ? 255 : 0;
        if (resize_bilinear(mask, w->H, w->W, w->full, s->H, s->W, 1) != 0) return -1;
        grey = mask;
    }
    for (size_t i = 0; i < pixels; i++) mask[i] = grey[i] > 127;
    return 0;
}

static inline int view_load(View *w, const Prediction *p, int frame) {
    const Shard *s = &p->shard;
    w->rgb = shard_frame(s, frame), w->probability = shard_mask(s, frame);
    if (view_mask(w->predicted, w, w->probability, s) != 0) return -1;
    if (w->real && view_mask(w->real, w, prediction_truth(p, frame), s) != 0) return -1;
    if (!w->small) return 0;
    uint8_t *probability = w->small + (size_t)w->H * (size_t)w->W * 3;
    if (resize_bilinear(w->small, w->H, w->W, w->rgb, s->H, s->W, 3) != 0 ||
        resize_bilinear(probability, w->H, w->W, w->probability, s->H, s->W, 1) != 0) return -1;
    w->rgb = w->small, w->probability = probability;
    return 0;
}

#endif
