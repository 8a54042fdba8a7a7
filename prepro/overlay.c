/* overlay.c - shows predictions: their outlines on the frames, as pictures, contact sheets or video.

   Build:  make prepro/overlay
   Run:    prepro/overlay --pred predicted.bin --masks test.bin --out pictures         pictures/VIDEO/00001.png ...
           prepro/overlay --pred predicted.bin --masks test.bin --sheet sheet.png
           prepro/overlay --pred predicted.bin --raw | ffmpeg -f rawvideo -pix_fmt rgb24 -s 256x256 -r 25 -i - clip.mp4
           prepro/overlay --pred predicted.bin --out masks --mask-only                 for other programs

   prediction.h says what a prediction is and how the true masks are found, overlay.h what is drawn. The frames are the
   prediction's own. With --raw standard output carries pixels, so whatever is to be said goes to standard error. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define VIVIM_PROGRAM "overlay"

#include <signal.h>

#include "cli.h"
#include "overlay.h"
#include "prediction.h"
#include "png.h"

typedef struct {
    const char *pred, *masks, *out, *sheet, *video;
    int raw, columns, count, mask_only, probability, help;
    double alpha;
} OverlayOptions;

#define FIELD(member) offsetof(OverlayOptions, member)
static const Option OVERLAY_OPTIONS[] = {
    {"pred", "", "the prediction: a shard with frames and predicted masks (needed)", 's', 0, 0, FIELD(pred)},
    {"masks", "", "a shard with the true masks: same videos, same frames", 's', 0, 0, FIELD(masks)},
    {"out", "", "a folder for pictures, FOLDER/VIDEO/00001.png ...; made if it is not there", 's', 0, 0, FIELD(out)},
    {"sheet", "", "one PNG picture with frames chosen evenly", 's', 0, 0, FIELD(sheet)},
    {"raw", "", "all frames to standard output, RGB24, for a pipe to ffmpeg", 'f', 0, 0, FIELD(raw)},
    {"video", "", "only this video; else all", 's', 0, 0, FIELD(video)},
    {"columns", "4", "of --sheet", 'i', 1, 100, FIELD(columns)},
    {"count", "16", "frames of --sheet", 'i', 1, 1000, FIELD(count)},
    {"alpha", "0", "tint the masks' insides, 0 (outlines only) to 1 (nothing shines through)", 'd', 0, 1, FIELD(alpha)},
    {"mask-only", "", "with --out: the predicted masks alone, grey, 0 or 255", 'f', 0, 0, FIELD(mask_only)},
    {"probability", "", "with --mask-only: 255 * probability instead of 0 or 255", 'f', 0, 0, FIELD(probability)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

static const char LEGEND[] = "outlines: red predicted, green true, yellow where they agree";

static void no_memory(const Prediction *p) {
    fail("%s: no memory for frames of %dx%d; prepare smaller ones with prepro/frames --size", p->shard.path, p->shard.H,
         p->shard.W);
}

static void check_options(const OverlayOptions *o) {
    if (!o->pred[0]) fail("--pred: no prediction given; --help lists the options");
    if ((o->out[0] != 0) + (o->sheet[0] != 0) + o->raw != 1)
        fail("--out, --sheet, --raw: exactly one of them must say what to write; --help lists the options");
    if (o->mask_only && !o->out[0]) fail("--mask-only: writes pictures; give --out FOLDER");
    if (o->mask_only && (o->masks[0] || o->alpha > 0)) fail("--mask-only: draws nothing; leave out --masks and --alpha");
    if (o->probability && !o->mask_only) fail("--probability: says what --mask-only writes; give both");
    if (same_file(o->sheet, o->pred) || same_file(o->sheet, o->masks))
        fail("--sheet %s: is a file that the sheet is made from; choose another name", o->sheet);
    if (o->raw && isatty(STDOUT_FILENO)) fail("--raw: pixels do not go to a terminal; give them to a pipe or a file");
}

// The videos first .. *end - 1 that --video asks for
static int choose_videos(int *end, const Prediction *p, const char *name) {
    *end = p->shard.videos;
    if (!name[0]) return 0;
    int found = -1;
    for (int v = 0; v < p->shard.videos; v++) {
        if (strcmp(shard_video_name(&p->shard, v), name) != 0) continue;
        if (found >= 0)
            fail("--video %s: %s has several videos of this name; build it again with other names", name, p->shard.path);
        found = v;
    }
    if (found < 0)
        fail("--video %s: %s has no such video; its first is '%s'", name, p->shard.path, shard_video_name(&p->shard, 0));
    return *end = found + 1, found;
}

static void load(View *view, const Prediction *p, int frame) {
    if (view_load(view, p, frame) != 0) no_memory(p);
}

// A folder that is there, or can be made
static void need_folder(const char *path) {
    struct stat st;
    if (mkdir(path, 0777) == 0) return;
    int why = errno;
    if (stat(path, &st) != 0) fail("%s: cannot make this folder: %s; choose another --out", path, strerror(why));
    if (!S_ISDIR(st.st_mode)) fail("%s: a file of this name is in the way; choose another --out", path);
}

// ---------------------------------------------------------------------------------------------------------------------
// --out: a picture of every frame, of its own size

static void write_pictures(const OverlayOptions *o, const Prediction *p, int first, int end) {
    const Shard *s = &p->shard;
    int frames = s->first_frame[end] - s->first_frame[first];
    size_t pixels = (size_t)s->H * (size_t)s->W, room = strlen(o->out) + SHARD_NAME + 32;
    char err[4608], *path = (char *)malloc(room);
    Overlay picture;
    View view;
    for (int i = 1; i < s->videos; i++)
        if (strcmp(p->by_name[i - 1].name, p->by_name[i].name) == 0)
            fail("%s: two videos are named '%s', their pictures would be too; build it again with other names", s->path,
                 p->by_name[i].name);
    if (!path || view_open(&view, p, 0) != 0 || overlay_open_zoomed(&picture, 1, 1, s->H, s->W, 1) != 0) no_memory(p);
    picture.alpha = o->alpha;
    need_folder(o->out);
    for (int v = first; v < end; v++) {
        snprintf(path, room, "%s/%s", o->out, shard_video_name(s, v));
        need_folder(path);
        for (int f = s->first_frame[v]; f < s->first_frame[v + 1]; f++) {
            load(&view, p, f);
            const uint8_t *shown = !o->mask_only ? picture.rgb : o->probability ? view.probability : view.predicted;
            if (!o->mask_only) overlay_add(&picture, 0, view.rgb, view.predicted, view.real);
            else for (size_t i = 0; i < pixels; i++) view.predicted[i] = view.predicted[i] ? 255 : 0;
            snprintf(path, room, "%s/%s/%05d.png", o->out, shard_video_name(s, v), f - s->first_frame[v] + 1);
            if (png_write(path, shown, s->H, s->W, o->mask_only ? 1 : 3, err, sizeof err) != 0) fail("%s", err);
        }
    }
    printf("%s: %d pictures of %dx%d; %s\n", o->out, frames, s->H, s->W,
           o->probability ? "255 * probability" : o->mask_only ? "object 255, else 0" : LEGEND);
    overlay_close(&picture), view_close(&view), free(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// --sheet: some frames side by side

// Frames are shrunk to sides of 512, of many to 256, so that any sheet fits into memory and into a PNG: 64 * 512 * 512 and
// 1000 * 256 * 256 pixels are the most.
static void write_sheet(const OverlayOptions *o, const Prediction *p, int first, int end) {
    int begin = p->shard.first_frame[first], frames = p->shard.first_frame[end] - begin;
    int count = o->count < frames ? o->count : frames, columns = o->columns < count ? o->columns : count;
    char err[4608];
    Overlay sheet;
    View view;
    if (view_open(&view, p, count <= 64 ? 512 : 256) != 0) no_memory(p);
    if (overlay_open(&sheet, (count + columns - 1) / columns, columns, view.H, view.W) != 0)
        fail("--count %d: no memory for a sheet of %dx%d; give a smaller --count", o->count, sheet.H, sheet.W);
    sheet.alpha = o->alpha;
    for (int i = 0; i < count; i++) {                            // the middle frame of each of `count` equal parts
        load(&view, p, begin + (int)((2 * (int64_t)i + 1) * frames / (2 * count)));
        overlay_add(&sheet, i, view.rgb, view.predicted, view.real);
    }
    if (png_write(o->sheet, sheet.rgb, sheet.H, sheet.W, 3, err, sizeof err) != 0) fail("%s", err);
    printf("%s: %d of %d frames, %dx%d; %s\n", o->sheet, count, frames, sheet.H, sheet.W, LEGEND);
    overlay_close(&sheet), view_close(&view);
}

// ---------------------------------------------------------------------------------------------------------------------
// --raw: frames to a pipe

static void write_raw(const OverlayOptions *o, const Prediction *p, int first, int end) {
    const Shard *s = &p->shard;
    int begin = s->first_frame[first], frames = s->first_frame[end] - begin;
    size_t bytes = (size_t)s->H * (size_t)s->W * 3;
    Overlay picture;
    View view;
    if (view_open(&view, p, 0) != 0 || overlay_open_zoomed(&picture, 1, 1, s->H, s->W, 1) != 0) no_memory(p);
    picture.alpha = o->alpha;
    signal(SIGPIPE, SIG_IGN);                                    // a closed pipe is an error of fwrite, not the end
    for (int f = 0; f < frames; f++) {
        load(&view, p, begin + f);
        overlay_add(&picture, 0, view.rgb, view.predicted, view.real);
        if (fwrite(picture.rgb, 1, bytes, stdout) != bytes || fflush(stdout) != 0)
            fail("--raw: frame %d of %d could not be written: %s; what stands after the | says why", f + 1, frames,
                 errno == EPIPE ? "the pipe was closed" : strerror(errno));
    }
    fprintf(stderr, VIVIM_PROGRAM ": %d frames, RGB24, for ffmpeg: -s %dx%d; %s\n", frames, s->W, s->H, LEGEND);
    overlay_close(&picture), view_close(&view);
}

int main(int argc, char **argv) {
    OverlayOptions o;
    Prediction p;
    char err[4608];
    int end;
    options_parse(&o, OVERLAY_OPTIONS, argc, argv);
    if (o.help) {
        printf("overlay - shows a prediction: outlines on the frames, as pictures, contact sheets or video\n\n");
        options_help(OVERLAY_OPTIONS);
        printf("\n%s; --alpha tints likewise.\nGive exactly one of --out, --sheet and --raw. To make a video:\n"
               "  prepro/overlay --pred P --raw | ffmpeg -f rawvideo -pix_fmt rgb24 -s WIDTHxHEIGHT -r 25 -i - out.mp4\n",
               LEGEND);
        return 0;
    }
    check_options(&o);
    if (prediction_open(&p, o.pred, o.masks, err, sizeof err) != 0) fail("%s", err);
    int first = choose_videos(&end, &p, o.video);
    if (o.out[0]) write_pictures(&o, &p, first, end);
    else if (o.sheet[0]) write_sheet(&o, &p, first, end);
    else write_raw(&o, &p, first, end);
    prediction_close(&p);
    return 0;
}
