/* shard.h - the file that holds a set of videos: its format, a reader and a writer. Header only.

   A shard is one file with all frames of all videos of a set, already cut to one size, and the masks that were drawn
   on them. It is built once, by the programs in prepro/, and then read by training, by evaluation and by the tests.

   THE FORMAT. Every number is an int32, little-endian. Nothing is compressed and nothing is aligned beyond what the
   sizes give. H, W = size of every frame, V = number of videos, F = number of frames of all videos together.

     offset               bytes      what
     ------------------   --------   ------------------------------------------------------------------------------
     0                    1024       the header, 256 numbers:
                                       [0] 0x4D565656, the letters VVVM
                                       [1] 1, the version of this format
                                       [2] V, 1 .. 1,000,000
                                       [3] F, at least 1
                                       [4] H, 1 .. 16384
                                       [5] W, 1 .. 16384
                                       [6] 3, the channels (red, green, blue)
                                       [7] 1 if there are masks, 0 if not
                                       [8] .. [255] 0
     1024                 64 V       the table of videos; each row: the number of its frames (at least 1; they add up
                                       to F), then its name in 60 bytes: UTF-8, ended by at least one zero byte
     1024 + 64 V          3 F H W    the frames, (F, H, W, 3) uint8: video after video, row after row from the top
     1024 + 64 V + 3 FHW  F H W      the masks, (F, H, W) uint8; only if [7] is 1

   and the file ends there, to the byte. A mask is a grey picture: m = value / 255 for the loss, value > 127 is the
   object. A name is a legal file name (not empty, no '/', no control character, neither "." nor ".."), so that a
   result may be called after its video. Look into a shard with:  od -A d -t d4 -N 32 FILE

   READING. The file is mapped, not read: opening a shard of 100 GB is instant, and only the frames that are looked at
   come from the disk. Every number is checked against the file's size first, in 64 bits, so a truncated or damaged
   file gives one line of explanation and never a wrong address. (A file that shrinks while it is mapped is beyond
   help: the writer below never does that, it replaces files as a whole.)

       Shard shard;  char err[512];
       if (shard_open(&shard, "train.shard", err, sizeof err)) { fprintf(stderr, "program: %s\n", err); exit(1); }
       for (int v = 0; v < shard.videos; v++)                        // frames first_frame[v] .. first_frame[v+1] - 1
           for (int f = shard.first_frame[v]; f < shard.first_frame[v + 1]; f++)
               look(shard_video_name(&shard, v), shard_frame(&shard, f), shard_mask(&shard, f));
       shard_close(&shard);

   WRITING. One pass: neither the number of videos nor the number of frames is known before the end. Frames go to
   FILE.tmp behind the header, masks to a second temporary file. At the end the frames move up by the length of the
   table and the masks follow them; then FILE.tmp, complete and synced, is renamed to FILE. So FILE is always either the old
   one or a whole new one. A call that fails removes what was written and returns -1; no clean-up is needed after it.
   (A program that is killed leaves FILE.tmp behind: delete it, or run it again. Two must not write the same FILE at once.)

       ShardWriter writer;
       if (shard_create(&writer, "train.shard", H, W, 1, err, sizeof err) ||
           shard_begin_video(&writer, "video-01", err, sizeof err) ||
           shard_add_frame(&writer, rgb, mask, err, sizeof err) || ... ||
           shard_finish(&writer, err, sizeof err)) { fprintf(stderr, "program: %s\n", err); exit(1); }

   Every function returns 0, or -1 with one line "FILE: what is wrong; what to do" in err. POSIX only (mmap, pread):
   define _GNU_SOURCE or _POSIX_C_SOURCE 200809L above the first #include of the .c file. */

#ifndef SHARD_H
#define SHARD_H

#if !defined(_GNU_SOURCE) && !defined(_POSIX_C_SOURCE)
#error "shard.h: define _GNU_SOURCE or _POSIX_C_SOURCE 200809L above the first #include"
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum {
    SHARD_MAGIC = 0x4D565656,
    SHARD_VERSION = 1,
    SHARD_HEADER = 1024,            // bytes before the table
    SHARD_MAX_VIDEOS = 1000000,
    SHARD_MAX_SIDE = 16384,
    SHARD_NAME = 60                 // bytes of a name, the final zero included
};

// A row of the table, as it stands in the file: bytes only, so it has no alignment and no byte order of its own.
typedef struct {
    unsigned char frames[4];
    char name[SHARD_NAME];
} ShardVideo;

typedef struct {
    char *path;                     // a copy, for messages
    int videos, frames, H, W, has_masks;
    int *first_frame;               // (videos + 1): video v has frames first_frame[v] .. first_frame[v+1] - 1
    const ShardVideo *table;        // (videos), mapped
    const uint8_t *rgb;             // (frames, H, W, 3), mapped
    const uint8_t *masks;           // (frames, H, W), mapped; NULL without masks
    void *map;                      // the whole file
    size_t map_bytes;
} Shard;

typedef struct {
    char *path, *tmp_path;          // FILE and FILE.tmp
    int fd, mask_fd;                // FILE.tmp, and the masks' temporary file (-1 without masks)
    int videos, frames, H, W, has_masks;
    ShardVideo *table;              // (capacity), the first `videos` in use
    int capacity;
    int video_frames;               // frames of the current video so far
} ShardWriter;

// ---------------------------------------------------------------------------------------------------------------------
// what both sides need

static inline int shard_fail(char *err, size_t errlen, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, errlen, format, args);
    va_end(args);
    return -1;
}

static inline int32_t shard_get(const unsigned char *bytes) {
    return (int32_t)((uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24);
}

static inline void shard_put(unsigned char *bytes, int32_t value) {
    for (int i = 0; i < 4; i++) bytes[i] = (unsigned char)((uint32_t)value >> 8 * i);
}

// Whether text is UTF-8 without control characters, which terminals obey: it fits on a line, into JSON and into a page.
static inline int shard_is_text(const char *text) {
    const unsigned char *c = (const unsigned char *)text;
    while (*c) {
        int more = *c < 0x80 ? 0 : *c < 0xC2 ? -1 : *c < 0xE0 ? 1 : *c < 0xF0 ? 2 : *c < 0xF5 ? 3 : -1;  // bytes that follow
        if (*c < 32 || *c == 127 || more < 0) return 0;
        if (*c == 0xC2 && c[1] < 0xA0) return 0;                                   // control characters, too
        if ((*c == 0xE0 && c[1] < 0xA0) || (*c == 0xED && c[1] > 0x9F)) return 0;  // overlong; half of a surrogate pair
        if ((*c == 0xF0 && c[1] < 0x90) || (*c == 0xF4 && c[1] > 0x8F)) return 0;  // overlong; beyond the last character
        for (c++; more > 0; more--, c++)
            if (*c < 0x80 || *c > 0xBF) return 0;
    }
    return 1;
}

// NULL if the name is legal, else what is wrong with it. At most SHARD_NAME bytes are looked at.
static inline const char *shard_name_problem(const char *name) {
    size_t length = strnlen(name, SHARD_NAME);
    if (length == SHARD_NAME) return "is longer than 59 bytes";
    if (length == 0) return "is empty";
    if (strchr(name, '/')) return "holds a '/'";
    if (!shard_is_text(name)) return "is not UTF-8 or holds a control character";
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) return "is '.' or '..'";
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// reader

static inline void shard_close(Shard *s) {
    if (s->map) munmap(s->map, s->map_bytes);
    free(s->first_frame);
    free(s->path);
    memset(s, 0, sizeof *s);
}

// All fields, in the order of the file. On the way out s is filled, on failure err.
static inline int shard_check(Shard *s, char *err, size_t errlen) {
    const unsigned char *bytes = (const unsigned char *)s->map;
    int32_t field[SHARD_HEADER / 4];
    for (int i = 0; i < SHARD_HEADER / 4; i++) field[i] = shard_get(bytes + 4 * i);

    if (field[0] != SHARD_MAGIC)
        return shard_fail(err, errlen, "%s: not a shard; prepro/frames makes one from folders of pictures or from video",
                          s->path);
    if (field[1] != SHARD_VERSION)
        return shard_fail(err, errlen, "%s: shard version %d, this program reads version %d; build it again", s->path,
                          (int)field[1], SHARD_VERSION);
    if (field[2] < 1 || field[2] > SHARD_MAX_VIDEOS || field[3] < field[2] || field[4] < 1 || field[4] > SHARD_MAX_SIDE ||
        field[5] < 1 || field[5] > SHARD_MAX_SIDE || field[6] != 3 || field[7] < 0 || field[7] > 1)
        return shard_fail(err, errlen, "%s: damaged header (%d videos, %d frames of %d x %d, %d channels, masks %d); build it again",
                          s->path, (int)field[2], (int)field[3], (int)field[4], (int)field[5], (int)field[6], (int)field[7]);
    for (int i = 8; i < SHARD_HEADER / 4; i++)
        if (field[i] != 0)
            return shard_fail(err, errlen, "%s: damaged header (number %d is %d, not 0); build it again",
                              s->path, i, (int)field[i]);
    s->videos = field[2], s->frames = field[3], s->H = field[4], s->W = field[5], s->has_masks = field[7];

    // at most 2^31 frames of 2^28 pixels of 4 bytes: 64 bits suffice
    int64_t pixels = (int64_t)s->frames * s->H * s->W;
    int64_t rgb_offset = SHARD_HEADER + (int64_t)s->videos * (int64_t)sizeof(ShardVideo);
    int64_t promised = rgb_offset + 3 * pixels + (s->has_masks ? pixels : 0);
    if (promised != (int64_t)s->map_bytes)
        return shard_fail(err, errlen, "%s: %lld bytes long, but its header promises %lld; copy or build it again", s->path,
                          (long long)s->map_bytes, (long long)promised);
    s->table = (const ShardVideo *)(bytes + SHARD_HEADER);
    s->rgb = bytes + rgb_offset;
    s->masks = s->has_masks ? s->rgb + 3 * pixels : NULL;

    s->first_frame = (int *)malloc(((size_t)s->videos + 1) * sizeof(int));
    if (!s->first_frame) return shard_fail(err, errlen, "%s: no memory for a table of %d videos", s->path, s->videos);
    s->first_frame[0] = 0;
    for (int v = 0; v < s->videos; v++) {
        int32_t n = shard_get(s->table[v].frames);
        const char *problem = shard_name_problem(s->table[v].name);
        if (problem)
            return shard_fail(err, errlen, "%s: damaged table (the name of video %d %s); build it again", s->path, v, problem);
        if (n < 1 || n > s->frames - s->first_frame[v])
            return shard_fail(err, errlen, "%s: damaged table (video %d has %d frames); build it again", s->path, v, (int)n);
        s->first_frame[v + 1] = s->first_frame[v] + n;
    }
    if (s->first_frame[s->videos] != s->frames)
        return shard_fail(err, errlen, "%s: damaged table (its videos have %d frames, the shard %d); build it again", s->path,
                          s->first_frame[s->videos], s->frames);
    return 0;
}

static inline int shard_open(Shard *s, const char *path, char *err, size_t errlen) {
    memset(s, 0, sizeof *s);
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0) return shard_fail(err, errlen, "%s: cannot be opened: %s; check the path", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size < SHARD_HEADER || (uint64_t)st.st_size > SIZE_MAX) {
        close(fd);
        return shard_fail(err, errlen, "%s: not a shard (not a file of at least %d bytes); prepro/frames makes one from folders of "
                          "pictures or from video",
                          path, SHARD_HEADER);
    }
    s->map_bytes = (size_t)st.st_size;
    void *map = mmap(NULL, s->map_bytes, PROT_READ, MAP_SHARED, fd, 0);
    int mmap_errno = errno;
    close(fd);                      // the mapping stays
    if (map == MAP_FAILED) return shard_fail(err, errlen, "%s: cannot be mapped: %s", path, strerror(mmap_errno));
    s->map = map;
    s->path = strdup(path);
    int failed = s->path ? shard_check(s, err, errlen) : shard_fail(err, errlen, "%s: out of memory", path);
    if (failed) shard_close(s);
    return failed;
}

// Whether a name in a sorted list of videos is there several times: one of its neighbours (NULL at the ends) is the same
static inline int shard_name_twice(const char *before, const char *name, const char *after) {
    return (before && strcmp(before, name) == 0) || (after && strcmp(after, name) == 0);
}
static inline const char *shard_video_name(const Shard *s, int video) { return s->table[video].name; }

// RGB of one frame (0 .. frames-1, over all videos): (H, W, 3)
static inline const uint8_t *shard_frame(const Shard *s, int frame) {
    return s->rgb + (size_t)frame * 3 * (size_t)s->H * (size_t)s->W;
}

// mask of one frame: (H, W), or NULL in a shard without masks
static inline const uint8_t *shard_mask(const Shard *s, int frame) {
    return s->masks ? s->masks + (size_t)frame * (size_t)s->H * (size_t)s->W : NULL;
}

// the video that a frame belongs to, by bisection: first_frame[video] <= frame < first_frame[video+1]
static inline int shard_video_of_frame(const Shard *s, int frame) {
    int low = 0, high = s->videos;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (s->first_frame[middle] <= frame) low = middle;
        else high = middle;
    }
    return low;
}

// ---------------------------------------------------------------------------------------------------------------------
// writer

// Removes the temporary files and frees everything. Harmless after a failed call, after shard_finish and when called twice.
static inline void shard_abort(ShardWriter *w) {
    if (w->fd >= 0) {
        close(w->fd);
        unlink(w->tmp_path);
    }
    if (w->mask_fd >= 0) close(w->mask_fd);
    free(w->path);
    free(w->tmp_path);
    free(w->table);
    memset(w, 0, sizeof *w);
    w->fd = w->mask_fd = -1;
}

// The message is made before the abort, which frees the path it names.
static inline int shard_writer_fail(ShardWriter *w, char *err, size_t errlen, const char *what) {
    shard_fail(err, errlen, "%s: %s", w->path ? w->path : "shard", what);
    shard_abort(w);
    return -1;
}

static inline int shard_pwrite_all(int fd, const void *data, size_t bytes, int64_t offset) {
    const char *from = (const char *)data;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, from, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) return -1;
        from += n, offset += n, bytes -= (size_t)n;
    }
    return 0;
}

static inline int shard_pread_all(int fd, void *data, size_t bytes, int64_t offset) {
    char *to = (char *)data;
    while (bytes > 0) {
        ssize_t n = pread(fd, to, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = EIO;
        if (n <= 0) return -1;
        to += n, offset += n, bytes -= (size_t)n;
    }
    return 0;
}

// Copies bytes from one file to another or, like memmove, to a higher place in the same file: the last piece goes first.
static inline int shard_move_up(int to_fd, int64_t to, int from_fd, int64_t from, int64_t bytes) {
    const int64_t piece = 4 << 20;
    if (bytes == 0 || (to_fd == from_fd && to == from)) return 0;
    char *buffer = (char *)malloc((size_t)piece);
    if (!buffer) return -1;
    int failed = 0;
    while (bytes > 0 && !failed) {
        size_t n = (size_t)(bytes < piece ? bytes : piece);
        bytes -= (int64_t)n;
        failed = shard_pread_all(from_fd, buffer, n, from + bytes) || shard_pwrite_all(to_fd, buffer, n, to + bytes);
    }
    free(buffer);
    return failed ? -1 : 0;
}

// H, W = size of every frame to come; has_masks: 1 if every frame comes with a mask, 0 if none does
static inline int shard_create(ShardWriter *w, const char *path, int H, int W, int has_masks, char *err, size_t errlen) {
    memset(w, 0, sizeof *w);
    w->fd = w->mask_fd = -1;
    if (H < 1 || H > SHARD_MAX_SIDE || W < 1 || W > SHARD_MAX_SIDE)
        return shard_fail(err, errlen, "%s: frames of %d x %d cannot be stored; each side must be 1 .. %d", path, H, W,
                          SHARD_MAX_SIDE);
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return shard_fail(err, errlen, "%s: exists and is not a file; choose another name", path);

    w->H = H, w->W = W, w->has_masks = has_masks != 0;
    size_t length = strlen(path); char problem[256];
    w->path = strdup(path);
    w->tmp_path = (char *)malloc(length + sizeof ".masks.tmp");
    if (!w->path || !w->tmp_path) return shard_writer_fail(w, err, errlen, "out of memory");
    if (w->has_masks) {             // a file without a name: it goes away by itself, however the program ends
        sprintf(w->tmp_path, "%s.masks.tmp", path);
        w->mask_fd = open(w->tmp_path, O_RDWR | O_CREAT | O_TRUNC, 0666);
        if (w->mask_fd >= 0) unlink(w->tmp_path);
    }
    sprintf(w->tmp_path, "%s.tmp", path);
    if (!w->has_masks || w->mask_fd >= 0) w->fd = open(w->tmp_path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    if (w->fd < 0) {
        snprintf(problem, sizeof problem, "cannot be written: %s; choose another place", strerror(errno));
        return shard_writer_fail(w, err, errlen, problem);
    }
    return 0;
}

static inline int shard_begin_video(ShardWriter *w, const char *name, char *err, size_t errlen) {
    if (w->fd < 0) return shard_writer_fail(w, err, errlen, "not open for writing");
    if (w->videos > 0 && w->video_frames == 0) return shard_writer_fail(w, err, errlen, "a video without frames cannot be stored");
    if (w->videos == SHARD_MAX_VIDEOS) return shard_writer_fail(w, err, errlen, "more than 1,000,000 videos; make several shards");
    const char *problem = shard_name_problem(name);
    if (problem) {
        char shown[SHARD_NAME];     // so much of it that one knows it again, and on one line
        snprintf(shown, sizeof shown, "%s", name);
        for (int i = 0; shown[i]; i++)
            if (shown[i] < 32 || shown[i] > 126) shown[i] = '?';  // char may be signed: bytes above 127, too
        shard_fail(err, errlen, "%s: the video name '%s' %s; choose another", w->path, shown, problem);
        shard_abort(w);
        return -1;
    }
    if (w->videos == w->capacity) {
        int capacity = w->capacity ? 2 * w->capacity : 64;
        ShardVideo *table = (ShardVideo *)realloc(w->table, (size_t)capacity * sizeof(ShardVideo));
        if (!table) return shard_writer_fail(w, err, errlen, "out of memory");
        w->table = table, w->capacity = capacity;
    }
    ShardVideo *video = &w->table[w->videos++];
    memset(video, 0, sizeof *video);
    memcpy(video->name, name, strlen(name));
    w->video_frames = 0;
    return 0;
}

// The next frame of the current video. rgb: (H, W, 3); mask: (H, W), not looked at in a shard without masks.
static inline int shard_add_frame(ShardWriter *w, const uint8_t *rgb, const uint8_t *mask, char *err, size_t errlen) {
    if (w->fd < 0) return shard_writer_fail(w, err, errlen, "not open for writing");
    if (w->videos == 0) return shard_writer_fail(w, err, errlen, "a frame before the first video");
    if (w->has_masks && !mask) return shard_writer_fail(w, err, errlen, "a frame without a mask in a shard with masks");
    if (w->frames == INT_MAX) return shard_writer_fail(w, err, errlen, "more than 2^31 frames; make several shards");
    int64_t pixels = (int64_t)w->H * w->W;
    if (shard_pwrite_all(w->fd, rgb, (size_t)(3 * pixels), SHARD_HEADER + 3 * pixels * w->frames) ||
        (w->has_masks && shard_pwrite_all(w->mask_fd, mask, (size_t)pixels, pixels * w->frames)))
        return shard_writer_fail(w, err, errlen, strerror(errno));
    w->frames++;
    w->video_frames++;
    shard_put(w->table[w->videos - 1].frames, w->video_frames);
    return 0;
}

// Puts the parts together and gives the file its name.
static inline int shard_finish(ShardWriter *w, char *err, size_t errlen) {
    if (w->fd < 0) return shard_writer_fail(w, err, errlen, "not open for writing");
    if (w->videos == 0 || w->video_frames == 0)
        return shard_writer_fail(w, err, errlen, "a shard or video without frames cannot be stored");
    unsigned char header[SHARD_HEADER];
    memset(header, 0, sizeof header);
    const int32_t fields[8] = {SHARD_MAGIC, SHARD_VERSION, w->videos, w->frames, w->H, w->W, 3, w->has_masks};
    for (int i = 0; i < 8; i++) shard_put(header + 4 * i, fields[i]);

    int64_t pixels = (int64_t)w->frames * w->H * w->W;
    size_t table_bytes = (size_t)w->videos * sizeof(ShardVideo);
    int64_t rgb_offset = SHARD_HEADER + (int64_t)table_bytes;
    if (shard_move_up(w->fd, rgb_offset, w->fd, SHARD_HEADER, 3 * pixels) ||
        (w->has_masks && shard_move_up(w->fd, rgb_offset + 3 * pixels, w->mask_fd, 0, pixels)) ||
        shard_pwrite_all(w->fd, w->table, table_bytes, SHARD_HEADER) ||
        shard_pwrite_all(w->fd, header, sizeof header, 0) || fsync(w->fd))
        return shard_writer_fail(w, err, errlen, strerror(errno));
    int close_failed = close(w->fd);   // some file systems tell of a full disk only here
    w->fd = -1;
    if (close_failed || rename(w->tmp_path, w->path)) {
        shard_fail(err, errlen, "%s: %s", w->path, strerror(errno));
        unlink(w->tmp_path);
        shard_abort(w);
        return -1;
    }
    shard_abort(w);                 // nothing is left to remove: this only frees
    return 0;
}

#endif
