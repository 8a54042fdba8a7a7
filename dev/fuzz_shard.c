/* fuzz_shard.c - any bytes whatever, read as a shard by prepro/shard.h. dev/fuzz.sh builds and runs it; Linux only.

   shard_open takes a path, so the bytes go into a file that exists only in memory (memfd_create). Its last page is mapped
   whole, and reading behind the file's end on it would go unnoticed: the checks run a second time on the fuzzer's own block,
   which is exactly as long as the input, and before the pixels are read the rest of the page is poisoned. Checked promises:

     - an accepted file: every frame and mask is the bytes that the format puts there, every name is a legal one, every
       frame belongs to the video whose frames it is counted among
     - a refused file gives one clean line, and leaves nothing allocated (the leak sanitizer looks)
     - what ShardWriter makes of an accepted file is the same file, but for bytes behind the end of a name */

#define _GNU_SOURCE

#include "../prepro/shard.h"
#include "fuzz.h"

#include <sanitizer/asan_interface.h>

// All of an accepted shard; `data` is what the file was made of.
static void use(const Shard *s, const uint8_t *data, size_t size) {
    size_t pixels = (size_t)s->H * (size_t)s->W, at = 1024 + 64 * (size_t)s->videos;
    require(s->videos >= 1 && s->first_frame[0] == 0 && s->first_frame[s->videos] == s->frames, "the videos have all frames");
    for (int v = 0; v < s->videos; v++) {
        const char *name = shard_video_name(s, v);
        size_t length = strlen(name);
        require(length >= 1 && length <= 59 && strcmp(name, ".") && strcmp(name, ".."), "a name that a file may have");
        require_clean(name, "a name without control characters");
        require(strchr(name, '/') == NULL, "a name without '/'");
        require(s->first_frame[v] < s->first_frame[v + 1], "no video without frames");
        require(shard_video_of_frame(s, s->first_frame[v]) == v && shard_video_of_frame(s, s->first_frame[v + 1] - 1) == v,
                "the first and the last frame of a video are its own");
    }
    for (int f = 0; f < s->frames; f++, at += 3 * pixels)
        require(memcmp(shard_frame(s, f), data + at, 3 * pixels) == 0, "every frame in its place");
    for (int f = 0; f < s->frames; f++, at += s->has_masks ? pixels : 0) {
        const uint8_t *mask = shard_mask(s, f);
        require(s->has_masks ? memcmp(mask, data + at, pixels) == 0 : mask == NULL, "every mask in its place");
    }
    require(at == size, "nothing behind the pixels");
}

// Writes what s holds and compares the files byte by byte.
static void round_trip(const Shard *s, const uint8_t *data, size_t size) {
    char path[512], err[1024] = "";
    ShardWriter writer;
    scratch_path(path, sizeof path, "fuzz_shard");
    int failed = shard_create(&writer, path, s->H, s->W, s->has_masks, err, sizeof err);
    for (int v = 0; v < s->videos && !failed; v++) {
        failed = shard_begin_video(&writer, shard_video_name(s, v), err, sizeof err);
        for (int f = s->first_frame[v]; f < s->first_frame[v + 1] && !failed; f++)
            failed = shard_add_frame(&writer, shard_frame(s, f), shard_mask(s, f), err, sizeof err);
    }
    require(!failed && shard_finish(&writer, err, sizeof err) == 0, err);

    uint8_t *expected = (uint8_t *)malloc(size), *written = (uint8_t *)malloc(size + 1);
    require(expected && written, "memory for the test");
    memcpy(expected, data, size);
    for (int v = 0; v < s->videos; v++) {                               // zeros behind each name, as the writer leaves them
        size_t length = strlen(shard_video_name(s, v));
        memset(expected + 1024 + 64 * (size_t)v + 4 + length, 0, 60 - length);
    }
    FILE *file = fopen(path, "rb");
    require(file != NULL && fread(written, 1, size + 1, file) == size, "a shard of the same length");
    require(memcmp(written, expected, size) == 0, "what is written is what was read");
    fclose(file);
    unlink(path);
    free(written);
    free(expected);
}

// The checks alone, on memory with a fence behind it. shard_close would unmap what was never mapped: it gets no map.
static int check(const uint8_t *data, size_t size) {
    char err[512] = "";
    Shard s;
    memset(&s, 0, sizeof s);
    s.path = strdup("FILE");
    s.map = (void *)(uintptr_t)data;
    s.map_bytes = size;
    int failed = shard_check(&s, err, sizeof err);
    if (failed) require_message(err, "FILE: ");
    s.map = NULL;
    shard_close(&s);
    return failed;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64], err[512] = "";
    Shard s;
    int fd = memfd_create("shard", 0);
    require(fd >= 0 && shard_pwrite_all(fd, data, size, 0) == 0, "a file in memory");
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int failed = shard_open(&s, path, err, sizeof err);
    close(fd);
    if (size >= SHARD_HEADER) require(check(data, size) == failed, "the same verdict on a file and on memory");
    if (failed) {
        require_message(err, path);
        return 0;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE), rest = (page - size % page) % page;
    ASAN_POISON_MEMORY_REGION((uint8_t *)s.map + size, rest);
    use(&s, data, size);
    round_trip(&s, data, size);
    ASAN_UNPOISON_MEMORY_REGION((uint8_t *)s.map + size, rest);         // the next mapping may lie there
    shard_close(&s);
    return 0;
}

// Nearly every byte of the header must be zero and the length must be right to the byte, so blind changes hardly get past
// these two checks. A third of the mutations change only the eight numbers, a third only what is behind the header; half of
// all then get the length that the header asks for, where that is possible.
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    size_t behind = size > SHARD_HEADER ? size - SHARD_HEADER : 0;
    if (seed % 3 == 0 && size > 32) LLVMFuzzerMutate(data, 32, 32);
    else if (seed % 3 == 1 && behind > 0) LLVMFuzzerMutate(data + SHARD_HEADER, behind, behind);
    else size = LLVMFuzzerMutate(data, size, max_size);

    if (seed / 3 % 2 == 0 || size < SHARD_HEADER) return size;
    int64_t number[8];
    for (int i = 0; i < 8; i++) number[i] = shard_get(data + 4 * i);
    for (int i = 2; i < 6; i++)
        if (number[i] < 1 || number[i] > SHARD_MAX_SIDE) return size;
    int64_t length = SHARD_HEADER + 64 * number[2] + (number[7] == 1 ? 4 : 3) * number[3] * number[4] * number[5];
    if (length > (int64_t)max_size) return size;
    if ((int64_t)size < length) memset(data + size, (int)(seed >> 8 & 255), (size_t)length - size);
    return (size_t)length;
}
