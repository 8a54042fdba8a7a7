// frames.c - makes a shard (see shard.h) from folders of images, or from raw video that comes through a pipe.
//
// Build:  gcc -O3 -fopenmp prepro/frames.c -o prepro/frames -ljpeg -lpng      (-fopenmp may be left out: one thread then)
// Use:    prepro/frames --size 256 --out train.bin Train Train_GT
//         ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 - | prepro/frames --raw 640x480 --size 256 --out clip.bin
//         prepro/frames --help        all options, all layouts of folders
//
// Images are decoded and resized as Pillow does, which is what the published numbers rest on: libjpeg with its default
// settings, no gamma, no rotation from EXIF, alpha dropped, 16 bits cut to the upper 8. A mask becomes grey by Pillow's
// integer luma and is resized like a frame, so its outline turns grey; only --threshold makes it two-valued before that.
// Several images are decoded at the same time, but they are written in order: the shard does not depend on the threads.
//
// Map of this file: options; errors; decoders (JPEG, PNG, BMP, PNM); one frame with its mask; folders; output; main.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <jpeglib.h>
#include <png.h>
#include "resize.h"
#include "shard.h"

enum {
    MIN_SIDE = 32,              // the fourth stage of the network sees 1/32 of the frame: one token at least
    MAX_SIDE = SHARD_MAX_SIDE,
    BATCH = 16,                 // images decoded together; a constant, so that memory does not grow with the threads
    MESSAGE = 1024              // bytes of an error message
};

// ---------------------------------------------------------------------------------------------------------------------
// options and errors

typedef struct {
    const char *out, *name;
    int size[2];                // H, W of the shard; 0, 0: as the images are
    int raw[2];                 // W, H of the frames in the pipe, in ffmpeg's order; 0, 0: no pipe
    int threshold;              // -1: masks stay grey
    int skip_unpaired, help;
    const char *folder[2];
    int folders;
} Options;

typedef enum { FLAG, TEXT, LEVEL, SIZE } OptionKind;
typedef struct { const char *name, *value; OptionKind kind; size_t field; const char *help; } OptionRow;

#define NEXT "\n                    "         // a help text goes on in its column
static const OptionRow OPTIONS[] = {
    {"--out", "FILE", TEXT, offsetof(Options, out), "the shard to write (required)"},
    {"--size", "HxW", SIZE, offsetof(Options, size), "resize to height H, width W; one number N stands for NxN."
     NEXT "Without it all frames must already have one size"},
    {"--threshold", "N", LEVEL, offsetof(Options, threshold), "mask values above N (0 .. 254) are foreground, before resizing;"
     NEXT "without it masks keep their grey values"},
    {"--skip-unpaired", "", FLAG, offsetof(Options, skip_unpaired), "leave out frames without mask and masks without frame"},
    {"--raw", "WxH", SIZE, offsetof(Options, raw), "read raw RGB frames of width W, height H from standard input"},
    {"--name", "NAME", TEXT, offsetof(Options, name), "name of the video of --raw (default: video); with a folder"
     NEXT "of images: they are the frames of one video of this name"},
    {"--help", "", FLAG, offsetof(Options, help), "this text"},
};
enum { OPTION_ROWS = (int)(sizeof OPTIONS / sizeof OPTIONS[0]) };

static const char LAYOUTS[] =
    "\nlayouts of IMAGES [MASKS], found by looking (f: an image; a frame and its mask have the same name up to the last dot):\n"
    "  A B   A/<video>/f and B/<video>/f\n"
    "  A B   A/f and B/f                     every image is a video of one frame (but see --name)\n"
    "  A     A/<video>/Frame/f and A/<video>/GT/f\n"
    "  A     A/Frame/... and A/GT/...        the same as giving these two folders\n"
    "  A     A/<video>/f or A/f              a shard without masks\n"
    "Videos and frames are in natural order (2 before 10). Images: JPEG, PNG, BMP, PGM, PPM, told by their content.\n"
    "A set of masks that hold only 0 and 1 is scaled by 255. A mask value above 127 is foreground.\n"
    "video:  ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 - | frames --raw 640x480 --out clip.bin\n";

static void fatal(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("frames: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// For code that runs in several threads: the message is kept, and the first one in order is reported.
static int failed(char *message, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, MESSAGE, format, args);
    va_end(args);
    return -1;
}

static void print_help(void) {
    printf("usage: frames [options] --out FILE IMAGES [MASKS]\n       frames [options] --out FILE --raw WxH < VIDEO\n\noptions:\n");
    for (int i = 0; i < OPTION_ROWS; i++) {
        int width = 17 - (int)strlen(OPTIONS[i].name);
        printf("  %s %-*s%s\n", OPTIONS[i].name, width, OPTIONS[i].value, OPTIONS[i].help);
    }
    fputs(LAYOUTS, stdout);
}

// Decimal digits from *text on, at most limit; -1 if there are none or they are too large. *text moves behind them.
static int parse_number(const char **text, int limit) {
    const char *start = *text;
    int value = 0;
    for (; **text >= '0' && **text <= '9'; (*text)++) {
        value = 10 * value + (**text - '0');
        if (value > limit) { return -1; }
    }
    return *text == start ? -1 : value;
}

static void parse_options(Options *options, int argc, char **argv) {
    memset(options, 0, sizeof *options);
    options->threshold = -1;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-') {
            if (options->folders == 2) { fatal("%s: a third folder; give IMAGES and MASKS (see --help)", argv[i]); }
            options->folder[options->folders++] = argv[i];
            continue;
        }
        const OptionRow *row = OPTIONS;
        while (row < OPTIONS + OPTION_ROWS && strcmp(row->name, argv[i]) != 0) { row++; }
        if (row == OPTIONS + OPTION_ROWS) { fatal("%s: unknown option; see --help", argv[i]); }
        void *field = (char *)options + row->field;
        if (row->kind == FLAG) { *(int *)field = 1; continue; }
        if (++i == argc) { fatal("%s: its value is missing; give %s", row->name, row->value); }
        const char *end = argv[i];
        if (row->kind == TEXT) { *(const char **)field = argv[i]; }
        if (row->kind == LEVEL) {
            int value = parse_number(&end, 254);
            if (value < 0 || *end) { fatal("%s %s: not a number from 0 to 254; give one", row->name, argv[i]); }
            *(int *)field = value;
        }
        if (row->kind == SIZE) {
            int *pair = (int *)field;
            pair[0] = pair[1] = parse_number(&end, MAX_SIDE);
            if (pair[0] > 0 && *end == 'x') { end++; pair[1] = parse_number(&end, MAX_SIDE); }
            if (pair[0] < MIN_SIDE || pair[1] < MIN_SIDE || *end) {
                fatal("%s %s: not a size; give %s with both from %d to %d", row->name, argv[i], row->value, MIN_SIDE, MAX_SIDE);
            }
        }
    }
    if (options->help) { return; }
    if (!options->out || !options->out[0]) { fatal("--out is missing; give the name of the shard to write (see --help)"); }
    if (options->raw[0] && options->folders) { fatal("%s: a folder together with --raw; give one of the two", options->folder[0]); }
    if (!options->raw[0] && !options->folders) { fatal("no folder of images and no --raw; give one of the two (see --help)"); }
}

// For the main thread; it may only be called before the shard is begun.
static void *allocate(void *old, size_t bytes) {
    void *memory = realloc(old, bytes);
    if (!memory) { fatal("out of memory (%zu bytes); close other programs or make several shards", bytes); }
    return memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// decoders: the bytes of a file -> RGB. Grey images get three equal channels: the luma of (v, v, v) is v again.
// They return 0, or -1 and the reason in message, to which the caller adds the name of the file.

typedef struct { int H, W; uint8_t *rgb; } Image;      // rgb (H,W,3)

static int image_allocate(Image *image, int64_t H, int64_t W, char *message) {
    if (H < 1 || W < 1 || H > MAX_SIDE || W > MAX_SIDE) {
        return failed(message, "its size %lldx%lld (HxW) is beyond 1 .. %d", (long long)H, (long long)W, MAX_SIDE);
    }
    image->H = (int)H;
    image->W = (int)W;
    image->rgb = (uint8_t *)malloc((size_t)H * (size_t)W * 3);
    return image->rgb ? 0 : failed(message, "out of memory for %dx%d pixels", image->H, image->W);
}

#include "jpeg.h"  // JpegErrors, jpeg_stop, jpeg_warning

static int decode_jpeg(Image *image, const uint8_t *data, size_t size, char *message) {
    struct jpeg_decompress_struct jpeg;
    JpegErrors errors;
    jpeg.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = jpeg_stop;
    errors.manager.emit_message = jpeg_warning;
    errors.message = message;
    if (setjmp(errors.jump)) {
        jpeg_destroy_decompress(&jpeg);
        return -1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, (unsigned char *)data, (unsigned long)size);
    jpeg_read_header(&jpeg, TRUE);
    int status = -1;
    if (jpeg.num_components == 4) {
        failed(message, "a JPEG of four colours (CMYK)");
    } else if (image_allocate(image, jpeg.image_height, jpeg.image_width, message) == 0) {
        jpeg.out_color_space = JCS_RGB;
        jpeg_start_decompress(&jpeg);
        while (jpeg.output_scanline < jpeg.output_height) {
            JSAMPROW row = image->rgb + (size_t)jpeg.output_scanline * (size_t)image->W * 3;
            jpeg_read_scanlines(&jpeg, &row, 1);
        }
        jpeg_finish_decompress(&jpeg);
        status = 0;
    }
    jpeg_destroy_decompress(&jpeg);
    return status;
}

typedef struct { const uint8_t *data; size_t size; char *message; } PngSource;

static void png_stop(png_structp png, png_const_charp reason) {
    failed(((PngSource *)png_get_error_ptr(png))->message, "damaged PNG (%s)", reason);
    png_longjmp(png, 1);
}

static void png_warning_ignored(png_structp png, png_const_charp reason) { (void)png; (void)reason; }

static void png_read(png_structp png, png_bytep out, png_size_t bytes) {
    PngSource *source = (PngSource *)png_get_io_ptr(png);
    if (bytes > source->size) { png_error(png, "the file ends too early"); }
    memcpy(out, source->data, bytes);
    source->data += bytes;
    source->size -= bytes;
}

static int decode_png(Image *image, const uint8_t *data, size_t size, char *message) {
    PngSource source = {data, size, message};
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, png_stop, png_warning_ignored);
    png_infop info = png ? png_create_info_struct(png) : NULL;
    if (!info) {
        png_destroy_read_struct(&png, NULL, NULL);
        return failed(message, "out of memory");
    }
    if (setjmp(png_jmpbuf(png))) {
        png_destroy_read_struct(&png, &info, NULL);
        return -1;
    }
    png_set_read_fn(png, &source, png_read);
    png_read_info(png, info);
    png_set_expand(png);            // palette -> RGB, 1, 2, 4 bits -> 8
    png_set_strip_16(png);
    png_set_strip_alpha(png);
    png_set_gray_to_rgb(png);
    int passes = png_set_interlace_handling(png);
    png_read_update_info(png, info);
    int status = image_allocate(image, png_get_image_height(png, info), png_get_image_width(png, info), message);
    if (status == 0) {
        for (int pass = 0; pass < passes; pass++) {
            for (int y = 0; y < image->H; y++) { png_read_row(png, image->rgb + (size_t)y * (size_t)image->W * 3, NULL); }
        }
        png_read_end(png, NULL);
    }
    png_destroy_read_struct(&png, &info, NULL);
    return status;
}

static uint32_t little_endian(const uint8_t *bytes, int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++) { value |= (uint32_t)bytes[i] << (8 * i); }
    return value;
}

// Uncompressed BMP: 1, 4, 8 bits with palette, 24 and 32 bits. Rows are padded to 4 bytes and run upwards, or downwards
// if the height is negative. Kind 3 names the masks of its channels; only the usual order (blue first) is taken.
static int decode_bmp(Image *image, const uint8_t *data, size_t size, char *message) {
    if (size < 66) { return failed(message, "truncated BMP"); }
    size_t pixels = little_endian(data + 10, 4), header = little_endian(data + 14, 4);
    int64_t W = (int32_t)little_endian(data + 18, 4), H = (int32_t)little_endian(data + 22, 4);
    uint32_t bits = little_endian(data + 28, 2), kind = little_endian(data + 30, 4), colours = little_endian(data + 46, 4);
    int usual_order = little_endian(data + 54, 4) == 0xff0000 && little_endian(data + 58, 4) == 0xff00 && little_endian(data + 62, 4) == 0xff;
    int has_palette = bits == 1 || bits == 4 || bits == 8;
    if (header < 40 || !(has_palette || bits == 24 || bits == 32) || !(kind == 0 || (kind == 3 && bits == 32 && usual_order))) {
        return failed(message, "a BMP of a kind that is not read (%u bits, compression %u)", (unsigned)bits, (unsigned)kind);
    }
    if (colours == 0) { colours = 1u << (bits & 15); }
    if (has_palette && (colours > 256 || header > size || 14 + header + 4 * colours > size)) { return failed(message, "truncated BMP"); }
    int upwards = H > 0;
    if (image_allocate(image, upwards ? H : -H, W, message) != 0) { return -1; }
    size_t stride = ((size_t)W * bits + 31) / 32 * 4;
    if (pixels > size || size - pixels < stride * (size_t)image->H) { return failed(message, "truncated BMP"); }
    for (int y = 0; y < image->H; y++) {
        const uint8_t *row = data + pixels + stride * (size_t)(upwards ? image->H - 1 - y : y);
        uint8_t *out = image->rgb + (size_t)y * (size_t)image->W * 3;
        for (size_t x = 0; x < (size_t)image->W; x++, out += 3) {
            const uint8_t *blue_green_red = row + x * (bits / 8);
            if (has_palette) {
                uint32_t shift = 8 - bits - (uint32_t)(x * bits % 8);
                uint32_t index = ((uint32_t)row[x * bits / 8] >> shift) & ((1u << bits) - 1);
                if (index >= colours) { return failed(message, "damaged BMP (a colour outside its palette)"); }
                blue_green_red = data + 14 + header + 4 * index;
            }
            for (int c = 0; c < 3; c++) { out[c] = blue_green_red[2 - c]; }
        }
    }
    return 0;
}

// P5 (grey) and P6 (colour): "P6 W H 255", one white space, the bytes. Comments in the header are not read.
static int decode_pnm(Image *image, const uint8_t *data, size_t size, char *message) {
    int W = 0, H = 0, maximum = 0, at = 0;
    if (sscanf((const char *)data + 2, "%5d%5d%5d%n", &W, &H, &maximum, &at) != 3 || maximum != 255) {
        return failed(message, "a PGM or PPM with a header other than size and 255");
    }
    if (image_allocate(image, H, W, message) != 0) { return -1; }
    size_t count = (size_t)H * (size_t)W, channels = data[1] == '5' ? 1 : 3, start = (size_t)at + 3;
    if (start > size || size - start < count * channels) { return failed(message, "truncated PGM or PPM"); }
    for (size_t i = 0; i < 3 * count; i++) { image->rgb[i] = data[start + (channels == 1 ? i / 3 : i)]; }
    return 0;
}

// A zero byte follows the file's bytes, so that a header of text may be scanned as a string.
static int read_file(uint8_t **data, size_t *size, const char *path, char *message) {
    struct stat st;
    FILE *file = NULL;
    if (stat(path, &st) != 0 || (S_ISREG(st.st_mode) && !(file = fopen(path, "rb")))) {
        return failed(message, "cannot be read (%s)", strerror(errno));
    }
    if (!file) { return failed(message, "not an image but a device or a pipe"); }
    *size = (size_t)st.st_size;
    *data = st.st_size > 0 && st.st_size <= INT32_MAX ? (uint8_t *)calloc(*size + 1, 1) : NULL;
    int status = 0;
    if (st.st_size == 0) {
        status = failed(message, "an empty file");
    } else if (!*data) {
        status = failed(message, "too large (%lld bytes)", (long long)st.st_size);
    } else if (fread(*data, 1, *size, file) != *size) {
        status = failed(message, "cannot be read (%s)", ferror(file) ? strerror(errno) : "it became shorter");
    }
    fclose(file);
    return status;
}

// image->rgb is to be freed by the caller, also after a failure.
static int read_image(Image *image, const char *path, char *message) {
    uint8_t *data = NULL;
    size_t size = 0;
    char reason[MESSAGE];
    image->rgb = NULL;
    int status = read_file(&data, &size, path, reason);
    if (status == 0) {
        if (size >= 3 && memcmp(data, "\xff\xd8\xff", 3) == 0) { status = decode_jpeg(image, data, size, reason); }
        else if (size >= 8 && memcmp(data, "\x89PNG\r\n\x1a\n", 8) == 0) { status = decode_png(image, data, size, reason); }
        else if (size >= 2 && memcmp(data, "BM", 2) == 0) { status = decode_bmp(image, data, size, reason); }
        else if (size >= 2 && (memcmp(data, "P5", 2) == 0 || memcmp(data, "P6", 2) == 0)) { status = decode_pnm(image, data, size, reason); }
        else { status = failed(reason, "not a JPEG, PNG, BMP, PGM or PPM image"); }
    }
    free(data);
    return status == 0 ? 0 : failed(message, "%s: %.500s; replace it, convert it to PNG or take it away", path, reason);
}

// ---------------------------------------------------------------------------------------------------------------------
// one frame with its mask

typedef struct { char *frame, *mask; int video; } Item;     // two paths; mask NULL in a shard without masks
typedef enum { MASK_EMPTY, MASK_ZERO_ONE, MASK_GREY } MaskValues;
typedef struct {
    int H, W;
    uint8_t *rgb, *mask;        // (H,W,3) and (H,W)
    MaskValues values;
    int status;
    char message[MESSAGE];
} Frame;

// *pixels (H,W,C) is replaced by its resized version.
static int fit(uint8_t **pixels, int H, int W, int C, const int *size) {
    if (size[0] == 0 || (size[0] == H && size[1] == W)) { return 0; }
    uint8_t *resized = (uint8_t *)malloc((size_t)size[0] * (size_t)size[1] * (size_t)C);
    if (!resized || resize_bilinear(resized, size[0], size[1], *pixels, H, W, C) != 0) {
        free(resized);
        return -1;
    }
    free(*pixels);
    *pixels = resized;
    return 0;
}

// mask (n) = luma of rgb (n,3); two-valued with a threshold. Values 0 and 1 are scaled by 255; output_frame checks that
// either all masks were of that kind or none.
static MaskValues grey_mask(uint8_t *mask, const uint8_t *rgb, size_t n, int threshold) {
    int largest = 0;
    for (size_t i = 0; i < n; i++) {
        int luma = (rgb[3 * i] * 19595 + rgb[3 * i + 1] * 38470 + rgb[3 * i + 2] * 7471 + 0x8000) >> 16;
        if (threshold >= 0) { luma = luma > threshold ? 255 : 0; }
        mask[i] = (uint8_t)luma;
        if (luma > largest) { largest = luma; }
    }
    if (largest != 1) { return largest == 0 ? MASK_EMPTY : MASK_GREY; }
    for (size_t i = 0; i < n; i++) { mask[i] = (uint8_t)(mask[i] * 255); }
    return MASK_ZERO_ONE;
}

static int load_mask(Frame *frame, const Item *item, const Options *options) {
    Image image;
    int status = read_image(&image, item->mask, frame->message);
    if (status == 0 && (image.H != frame->H || image.W != frame->W)) {
        status = failed(frame->message, "%s: %dx%d (HxW), but its frame %s is %dx%d; make the mask as large as the frame", item->mask,
                        image.H, image.W, item->frame, frame->H, frame->W);
    }
    if (status == 0) {
        size_t n = (size_t)image.H * (size_t)image.W;
        frame->mask = (uint8_t *)malloc(n);
        if (!frame->mask) { status = failed(frame->message, "%s: out of memory; close other programs", item->mask); }
        else { frame->values = grey_mask(frame->mask, image.rgb, n, options->threshold); }
    }
    free(image.rgb);
    return status;
}

// Fills the frame and its status; runs in several threads.
static void load_frame(Frame *frame, const Item *item, const Options *options) {
    Image image;
    frame->mask = NULL;
    frame->values = MASK_EMPTY;
    frame->status = read_image(&image, item->frame, frame->message);
    frame->rgb = image.rgb;
    if (frame->status != 0) { return; }
    frame->H = image.H;
    frame->W = image.W;
    if (item->mask) { frame->status = load_mask(frame, item, options); }
    if (frame->status != 0) { return; }
    if (fit(&frame->rgb, image.H, image.W, 3, options->size) != 0 ||
        (frame->mask && fit(&frame->mask, image.H, image.W, 1, options->size) != 0)) {
        frame->status = failed(frame->message, "%s: out of memory for resizing; close other programs", item->frame);
    }
    if (options->size[0]) {
        frame->H = options->size[0];
        frame->W = options->size[1];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// folders

typedef struct { char **name; int count; } Names;
typedef struct {
    Item *item;
    int items;
    char **video;               // names
    int videos;
    int frames_left_out, masks_left_out;
    int stills;                                    // images that are videos of their own
    char **kept;                // all names and paths, freed together at the end
    int keeps;
} Input;

// "folder/name", or "name" alone if folder is NULL
static char *join(Input *input, const char *folder, const char *name) {
    size_t length = (folder ? strlen(folder) + 1 : 0) + strlen(name) + 1;
    char *path = (char *)allocate(NULL, length);
    snprintf(path, length, "%s%s%s", folder ? folder : "", folder ? "/" : "", name);
    input->kept = (char **)allocate(input->kept, (size_t)(input->keeps + 1) * sizeof(char *));
    input->kept[input->keeps++] = path;
    return path;
}

static void free_input(Input *input) {
    for (int i = 0; i < input->keeps; i++) { free(input->kept[i]); }
    free(input->kept);
    free(input->item);
    free(input->video);
}

static int is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// The length of a file's name up to its last dot.
static int stem_length(const char *name) {
    const char *dot = strrchr(name, '.');
    return (int)(dot ? (size_t)(dot - name) : strlen(name));
}

// Natural order of a[0 .. na-1] and b[0 .. nb-1]: runs of digits compare as numbers, of any length, the rest as bytes.
// Where that finds no difference (1 and 01), the bytes decide, so that only equal names are equal.
static int compare_names(const char *a, int na, const char *b, int nb) {
    int i = 0, j = 0;
    while (i < na && j < nb) {
        int digits_a = 0, digits_b = 0;
        while (i < na - 1 && a[i] == '0' && a[i + 1] >= '0' && a[i + 1] <= '9') { i++; }       // leading zeros
        while (j < nb - 1 && b[j] == '0' && b[j + 1] >= '0' && b[j + 1] <= '9') { j++; }
        while (i + digits_a < na && a[i + digits_a] >= '0' && a[i + digits_a] <= '9') { digits_a++; }
        while (j + digits_b < nb && b[j + digits_b] >= '0' && b[j + digits_b] <= '9') { digits_b++; }
        if (digits_a && digits_b) {
            int order = digits_a != digits_b ? digits_a - digits_b : memcmp(a + i, b + j, (size_t)digits_a);
            if (order != 0) { return order; }
            i += digits_a;
            j += digits_b;
        } else {
            if (a[i] != b[j]) { return (unsigned char)a[i] - (unsigned char)b[j]; }
            i++;
            j++;
        }
    }
    if (i < na || j < nb) { return i < na ? 1 : -1; }
    int order = memcmp(a, b, (size_t)(na < nb ? na : nb));
    return order != 0 ? order : na - nb;
}

static int compare_folders(const void *a, const void *b) {
    const char *p = *(char *const *)a, *q = *(char *const *)b;
    return compare_names(p, (int)strlen(p), q, (int)strlen(q));
}

static int compare_stems(const void *a, const void *b) {
    const char *p = *(char *const *)a, *q = *(char *const *)b;
    return compare_names(p, stem_length(p), q, stem_length(q));
}

// The files and the folders in a folder, each in natural order. Hidden ones, and what Windows hides, are passed over.
static void list_folder(Names *files, Names *folders, Input *input, const char *path) {
    files->name = folders->name = NULL;
    files->count = folders->count = 0;
    DIR *dir = opendir(path);
    if (!dir) { fatal("%s: cannot be opened (%s); give a folder of images (--help shows how a video file is read)", path, strerror(errno)); }
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        if (entry->d_name[0] == '.' || strcmp(entry->d_name, "Thumbs.db") == 0 || strcmp(entry->d_name, "desktop.ini") == 0) { continue; }
        Names *names = is_folder(join(input, path, entry->d_name)) ? folders : files;
        names->name = (char **)allocate(names->name, (size_t)(names->count + 1) * sizeof(char *));
        names->name[names->count++] = join(input, NULL, entry->d_name);
    }
    closedir(dir);
    if (folders->count) { qsort(folders->name, (size_t)folders->count, sizeof(char *), compare_folders); }
    if (files->count) { qsort(files->name, (size_t)files->count, sizeof(char *), compare_stems); }
    for (int i = 1; i < files->count; i++) {
        if (compare_stems(&files->name[i - 1], &files->name[i]) == 0) {
            fatal("%s/%s: %s lies beside it, so its name is not unique; take one of them away", path, files->name[i], files->name[i - 1]);
        }
    }
}

// The images of a folder that may not hold folders.
static Names list_images(Input *input, const char *path) {
    Names files, folders;
    list_folder(&files, &folders, input, path);
    if (folders.count) { fatal("%s/%s: a folder where images were expected; see --help for the layouts", path, folders.name[0]); }
    return files;
}

static int contains(const Names *folders, const char *name) {
    for (int i = 0; i < folders->count; i++) {
        if (strcmp(folders->name[i], name) == 0) { return 1; }
    }
    return 0;
}

static void add_item(Input *input, char *frame, char *mask, const char *video, int new_video) {
    if (new_video) {
        const char *problem = shard_name_problem(video);
        if (problem) { fatal("%s: the name of its video %s; rename it", frame, problem); }
        input->video = (char **)allocate(input->video, (size_t)(input->videos + 1) * sizeof(char *));
        input->video[input->videos++] = join(input, NULL, video);
    }
    input->item = (Item *)allocate(input->item, (size_t)(input->items + 1) * sizeof(Item));
    Item *item = &input->item[input->items++];
    item->frame = frame;
    item->mask = mask;
    item->video = input->videos - 1;
}

static void leave_out(int *count, const Options *options, const char *folder, const char *name, const char *what, const char *other) {
    if (!options->skip_unpaired) { fatal("%s/%s: no %s of that name in %s; add it or use --skip-unpaired", folder, name, what, other); }
    ++*count;
}

// Pairs the images of two folders, both sorted by stem. mask_folder NULL: no masks. video NULL: every image is a video.
static void add_folder(Input *input, const Options *options, const char *frame_folder, const char *mask_folder, const char *video) {
    Names frames = list_images(input, frame_folder), masks = {NULL, 0};
    if (frames.count == 0) { fatal("%s: holds no images; fill it or take it away", frame_folder); }
    if (mask_folder && is_folder(mask_folder)) { masks = list_images(input, mask_folder); }
    int m = 0, added = 0;
    for (int f = 0; f < frames.count; f++) {
        char *frame = frames.name[f], *mask = NULL;
        for (; m < masks.count && compare_stems(&masks.name[m], &frame) < 0; m++) {
            leave_out(&input->masks_left_out, options, mask_folder, masks.name[m], "frame", frame_folder);
        }
        if (m < masks.count && compare_stems(&masks.name[m], &frame) == 0) { mask = join(input, mask_folder, masks.name[m++]); }
        if (mask_folder && !mask) {
            leave_out(&input->frames_left_out, options, frame_folder, frame, "mask", mask_folder);
            continue;
        }
        char *path = join(input, frame_folder, frame);
        frame[stem_length(frame)] = '\0';          // from here on only the stem is needed: a name for a video
        add_item(input, path, mask, video ? video : frame, !video || added == 0);
        input->stills += !video;
        added++;
    }
    for (; m < masks.count; m++) { leave_out(&input->masks_left_out, options, mask_folder, masks.name[m], "frame", frame_folder); }
    free(frames.name);
    free(masks.name);
}

// Videos of B that A lacks.
static void check_mask_videos(Input *input, const Options *options, const char *A, const Names *videos, const char *B) {
    Names files, mask_videos;
    list_folder(&files, &mask_videos, input, B);
    for (int v = 0; v < mask_videos.count; v++) {
        if (contains(videos, mask_videos.name[v])) { continue; }
        Names masks = list_images(input, join(input, B, mask_videos.name[v]));
        for (int m = 0; m < masks.count; m++) { leave_out(&input->masks_left_out, options, B, mask_videos.name[v], "video", A); }
        free(masks.name);
    }
    free(files.name);
    free(mask_videos.name);
}

// Finds out the layout (see LAYOUTS) of folder A, and B with the masks or NULL.
static void find_frames(Input *input, const Options *options, const char *A, const char *B) {
    Names files, videos;
    list_folder(&files, &videos, input, A);
    int has_frame = contains(&videos, "Frame"), has_masks = contains(&videos, "GT");
    if (!B && has_masks && !has_frame) { fatal("%s/GT: masks, but no folder Frame beside it; rename that, or give two folders", A); }
    if (!B && has_frame) {
        find_frames(input, options, join(input, A, "Frame"), has_masks ? join(input, A, "GT") : NULL);
    } else if (files.count && videos.count) {
        fatal("%s/%s: a file beside folders; give a folder of videos or a folder of images", A, files.name[0]);
    } else if (B && !is_folder(B)) {
        fatal("%s: not a folder; give the folder of the masks", B);
    } else if (!videos.count) {
        add_folder(input, options, A, B, options->name);
    } else {
        if (options->name) { fatal("--name: %s holds videos, which are named after their folders; leave the option out", A); }
        int inner_masks = 0;        // some video has its own GT: then every frame needs a mask
        for (int v = 0; v < videos.count; v++) { inner_masks |= is_folder(join(input, join(input, A, videos.name[v]), "GT")); }
        for (int v = 0; v < videos.count; v++) {
            char *folder = join(input, A, videos.name[v]), *inner = join(input, folder, "Frame");
            int is_inner = is_folder(inner);
            if (is_inner && B) { fatal("%s: this layout has its masks in GT beside Frame; leave out %s", inner, B); }
            if (is_inner) { add_folder(input, options, inner, inner_masks ? join(input, folder, "GT") : NULL, videos.name[v]); }
            else { add_folder(input, options, folder, B ? join(input, B, videos.name[v]) : NULL, videos.name[v]); }
        }
        if (B) { check_mask_videos(input, options, A, &videos, B); }
    }
    free(files.name);
    free(videos.name);
}

// ---------------------------------------------------------------------------------------------------------------------
// output

typedef struct {
    ShardWriter writer;
    int created, H, W, videos, frames, total;      // total 0: not known, from a pipe
    const char *path, *video;                      // the shard; the name of the current video
    const char *first, *first_zero_one, *first_grey;   // the first frame, the first mask of either kind
    double coverage, between;                      // sums over frames: the share of foreground, of what is neither black nor white
    int empty_masks;
    time_t last_progress;
    int progress_shown;
} Output;

// The end after an error: nothing of the shard stays behind.
static void stop(Output *output, const char *format, ...) {
    va_list args;
    char message[MESSAGE];
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (output->progress_shown) { fputs("\r\033[K", stderr); }
    if (output->created) { shard_abort(&output->writer); }
    fatal("%s", message);
}

// A line that rewrites itself on a terminal, every second; elsewhere a line every ten seconds.
static void progress(Output *output) {
    int terminal = isatty(STDERR_FILENO);
    time_t now = time(NULL);
    if (now - output->last_progress < (terminal ? 1 : 10)) { return; }
    output->last_progress = now;
    output->progress_shown |= terminal;
    fprintf(stderr, terminal ? "\r\033[K%s: %d" : "%s: %d", output->path, output->frames);
    if (output->total) { fprintf(stderr, " of %d", output->total); }
    fprintf(stderr, terminal ? " frames" : " frames\n");
}

// Appends a frame of the named video (a new one where the pointer changes). item: where it came from, for messages.
static void output_frame(Output *output, const Frame *frame, const char *video, const Item *item) {
    char message[MESSAGE];
    if (frame->status != 0) { stop(output, "%s", frame->message); }
    if (!output->created) {
        if (frame->H < MIN_SIDE || frame->W < MIN_SIDE) {
            stop(output, "%s: %dx%d (HxW) is below %dx%d; use --size", item->frame, frame->H, frame->W, MIN_SIDE, MIN_SIDE);
        }
        output->H = frame->H;
        output->W = frame->W;
        output->first = item->frame;
        output->created = shard_create(&output->writer, output->path, frame->H, frame->W, frame->mask != NULL, message, sizeof message) == 0;
        if (!output->created) { stop(output, "%s", message); }
    }
    if (frame->H != output->H || frame->W != output->W) {
        stop(output, "%s: %dx%d (HxW), but %s is %dx%d; use --size", item->frame, frame->H, frame->W, output->first, output->H, output->W);
    }
    if (frame->values == MASK_ZERO_ONE && !output->first_zero_one) { output->first_zero_one = item->mask; }
    if (frame->values == MASK_GREY && !output->first_grey) { output->first_grey = item->mask; }
    if (output->first_zero_one && output->first_grey) {
        stop(output, "%s: holds only 0 and 1, but %s has larger values; say with --threshold what is foreground", output->first_zero_one,
             output->first_grey);
    }
    if (video != output->video) {
        if (shard_begin_video(&output->writer, video, message, sizeof message) != 0) { stop(output, "%s", message); }
        output->video = video;
        output->videos++;
    }
    if (shard_add_frame(&output->writer, frame->rgb, frame->mask, message, sizeof message) != 0) { stop(output, "%s", message); }
    if (frame->mask) {
        size_t n = (size_t)frame->H * (size_t)frame->W, foreground = 0, between = 0;
        for (size_t i = 0; i < n; i++) { foreground += frame->mask[i] > 127, between += frame->mask[i] >= 64 && frame->mask[i] < 192; }
        output->coverage += (double)foreground / (double)n;
        output->between += (double)between / (double)n;
        output->empty_masks += foreground == 0;
    }
    output->frames++;
    progress(output);
}

static void output_images(Output *output, const Input *input, const Options *options) {
    Frame *batch = (Frame *)allocate(NULL, BATCH * sizeof(Frame));
    output->total = input->items;
    for (int first = 0; first < input->items; first += BATCH) {
        int count = input->items - first < BATCH ? input->items - first : BATCH;
#ifdef _OPENMP
        #pragma omp parallel for schedule(dynamic)
#endif
        for (int i = 0; i < count; i++) { load_frame(&batch[i], &input->item[first + i], options); }
        for (int i = 0; i < count; i++) {
            const Item *item = &input->item[first + i];
            output_frame(output, &batch[i], input->video[item->video], item);
            free(batch[i].rgb);
            free(batch[i].mask);
        }
    }
    free(batch);
}

static void output_raw(Output *output, const Options *options) {
    char source[] = "standard input";
    const Item item = {source, NULL, 0};
    const char *video = options->name ? options->name : "video";
    int W = options->raw[0], H = options->raw[1];
    size_t bytes = (size_t)H * (size_t)W * 3, got;
    if (isatty(STDIN_FILENO)) { fatal("--raw: standard input is a terminal; send raw video through a pipe (see --help)"); }
    if (shard_name_problem(video)) { fatal("--name: the name %s; choose another", shard_name_problem(video)); }
    Frame frame;
    memset(&frame, 0, sizeof frame);
    frame.H = options->size[0] ? options->size[0] : H;
    frame.W = options->size[0] ? options->size[1] : W;
    do {
        frame.rgb = (uint8_t *)malloc(bytes);
        if (!frame.rgb) { stop(output, "--raw: out of memory for a frame; close other programs"); }
        got = fread(frame.rgb, 1, bytes, stdin);
        if (got == bytes) {
            if (fit(&frame.rgb, H, W, 3, options->size) != 0) { stop(output, "--size: out of memory for resizing; close other programs"); }
            output_frame(output, &frame, video, &item);
        }
        free(frame.rgb);
    } while (got == bytes);
    if (got > 0 || output->frames == 0) {
        stop(output, "standard input: it ends after %d frames and %zu of %zu bytes; check --raw (width x height), rgb24 and the sending program",
             output->frames, got, bytes);
    }
}

static void print_summary(const Output *output, const Input *input, int has_masks) {
    struct stat st;
    double mebibytes = stat(output->path, &st) == 0 ? (double)st.st_size / (1 << 20) : 0.0;
    printf("%s: %d videos, %d frames of %dx%d (HxW), %s, %.1f MiB\n", output->path, output->videos, output->frames, output->H, output->W,
           has_masks ? "with masks" : "without masks", mebibytes);
    if (has_masks) {
        printf("masks: %.2f %% of the pixels are foreground (mean over frames); frames without foreground: %d\n",
               100.0 * output->coverage / output->frames, output->empty_masks);
        if (output->first_zero_one) { printf("note: the masks held only 0 and 1 and were scaled by 255\n"); }
        if (output->between > 0.1 * output->frames) {  // soft outlines are a few per cent
            printf("note: %.0f %% of the masks' pixels are neither black nor white; are these masks? else --threshold N says what is foreground\n",
                   100.0 * output->between / output->frames);
        }
        if (output->empty_masks == output->frames) { printf("note: no mask value is above 127; try --threshold 0\n"); }
    }
    if (input->stills > 1) { printf("note: each image is a video of its own; --name NAME makes them the frames of one\n"); }
    if (input->frames_left_out || input->masks_left_out) {
        printf("left out: %d frames without a mask, %d masks without a frame\n", input->frames_left_out, input->masks_left_out);
    }
}

int main(int argc, char **argv) {
    Options options;
    Input input;
    Output output;
    memset(&input, 0, sizeof input);
    memset(&output, 0, sizeof output);
    parse_options(&options, argc, argv);
    if (options.help) {
        print_help();
        return 0;
    }
    output.path = options.out;
    output.last_progress = time(NULL);
    if (!options.raw[0]) {
        find_frames(&input, &options, options.folder[0], options.folder[1]);
        if (input.items == 0) { fatal("%s: no frame has a mask, so nothing is left; check the two folders", options.folder[0]); }
    }
    int has_masks = input.items > 0 && input.item[0].mask != NULL;
    if (!has_masks && (options.threshold >= 0 || options.skip_unpaired)) {
        fatal("%s: there are no masks; give their folder or leave the option out", options.threshold >= 0 ? "--threshold" : "--skip-unpaired");
    }
    if (options.raw[0]) { output_raw(&output, &options); } else { output_images(&output, &input, &options); }
    char message[MESSAGE];
    if (output.progress_shown) { fputs("\r\033[K", stderr); }
    if (shard_finish(&output.writer, message, sizeof message) != 0) { fatal("%s", message); }
    print_summary(&output, &input, has_masks);
    free_input(&input);
    return 0;
}
