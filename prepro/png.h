/* png.h - writes grey and RGB pictures as PNG files, in memory or on the disk. Header only; needs no zlib.

   int png_write(path, pixels, H, W, C, err, errlen)     pixels: (H, W, C) uint8, rows from the top, C 1 (grey) or 3 (RGB).
                                                         0, or -1 and one line in err.

   The file: 8 bytes of signature, then chunks { length, type, data, CRC-32 of type and data }, numbers big-endian:
   IHDR (size and kind), IDAT (a zlib stream: every row has a 0 in front, "no filter"; then the Adler-32 of all rows), IEND.

   The compression is deflate's simplest: one block with the fixed code of RFC 1951, section 3.2.6. What stood there before,
   up to 32768 bytes back, is said by its distance and length instead of again; a table remembers for every hash of three
   bytes where such bytes stood last, and the first candidate is taken. Masks shrink to a hundredth, photographs hardly. */

#ifndef PNG_H
#define PNG_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static inline unsigned char *png_put32(unsigned char *to, uint32_t value) {     // big-endian; returns what follows
    for (int i = 0; i < 4; i++) *to++ = (unsigned char)(value >> (24 - 8 * i));
    return to;
}

// The chunk's data already stand at chunk + 8. Adds length and type before, CRC after; returns what follows.
static inline unsigned char *png_seal(unsigned char *chunk, const char *type, size_t length) {
    uint32_t table[256], crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = (table[i] >> 1) ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
    png_put32(chunk, (uint32_t)length);
    memcpy(chunk + 4, type, 4);
    for (size_t i = 4; i < length + 8; i++) crc = (crc >> 8) ^ table[(crc ^ chunk[i]) & 255];
    return png_put32(chunk + 8 + length, ~crc);
}

enum { PNG_WINDOW = 32768, PNG_LONGEST = 258, PNG_HASHES = 32768 };

typedef struct { unsigned char *at; uint64_t bits; int count; } BitWriter;  // count < 8 bits wait for their byte

static inline void bits_put(BitWriter *w, uint32_t value, int n) {  // lowest bit first
    w->bits |= (uint64_t)value << w->count, w->count += n;
    for (; w->count >= 8; w->count -= 8) *w->at++ = (unsigned char)w->bits, w->bits >>= 8;
}

static inline void code_put(BitWriter *w, int code, int n) {  // codes of symbols go highest bit first
    for (int i = n - 1; i >= 0; i--) bits_put(w, (uint32_t)(code >> i & 1), 1);
}

// The fixed code: 0 .. 255 are bytes, 256 is the end, 257 .. 285 lengths
static inline void symbol_put(BitWriter *w, int symbol) {
    if (symbol < 144) code_put(w, 0x30 + symbol, 8);
    else if (symbol < 256) code_put(w, 0x190 + symbol - 144, 9);
    else if (symbol < 280) code_put(w, symbol - 256, 7);
    else code_put(w, 0xC0 + symbol - 280, 8);
}

static inline int highest_bit(uint32_t value) {
    int bit = 0;
    while (value >>= 1) bit++;
    return bit;
}

// "The `length` bytes that began `distance` bytes ago": symbols stand for ranges, and extra bits say where in the range.
// Four symbols (of distances: two) share a number of extra bits, then there is one more; 258 has a symbol of its own.
static inline void match_put(BitWriter *w, int length, int distance) {
    uint32_t l = (uint32_t)length - 3, d = (uint32_t)distance - 1;
    int extra = l < 8 ? 0 : highest_bit(l) - 2;
    if (length == PNG_LONGEST) symbol_put(w, 285);
    else symbol_put(w, 257 + 4 * extra + (int)(l >> extra)), bits_put(w, l & ((1u << extra) - 1), extra);
    extra = d < 4 ? 0 : highest_bit(d) - 1;
    code_put(w, 2 * extra + (int)(d >> extra), 5), bits_put(w, d & ((1u << extra) - 1), extra);
}

// The zlib stream of n bytes; out must have room for n + n / 8 + 32: no byte takes more than 9 bits. Returns its end.
static inline unsigned char *zlib_compress(unsigned char *out, const unsigned char *inp, size_t n, uint32_t *last_seen) {
    BitWriter w = {out, 0, 0};
    uint32_t a = 1, b = 0;                                       // Adler-32: sum of bytes, sum of sums
    memset(last_seen, 0, PNG_HASHES * sizeof(uint32_t));    // positions + 1; 0: not seen
    bits_put(&w, 0x78, 8), bits_put(&w, 0x01, 8);                // deflate, window 32 KiB
    bits_put(&w, 1, 1), bits_put(&w, 1, 2);                      // the last block; fixed code
    size_t covered = 0;                                          // bytes that are already said
    for (size_t i = 0; i < n; i++) {
        size_t longest = PNG_LONGEST, length = 0, before = 0;
        if (longest > n - i) longest = n - i;
        if (longest >= 3) {
            uint32_t three = (uint32_t)inp[i] | (uint32_t)inp[i + 1] << 8 | (uint32_t)inp[i + 2] << 16;
            uint32_t *seen = &last_seen[(three * 2654435761u) >> 17];
            before = *seen, *seen = (uint32_t)i + 1;
        }
        if (i >= covered) {
            if (before > 0 && i + 1 - before <= PNG_WINDOW)
                while (length < longest && inp[before - 1 + length] == inp[i + length]) length++;
            if (length >= 3) match_put(&w, (int)length, (int)(i + 1 - before));
            else symbol_put(&w, inp[i]);
            covered = i + (length >= 3 ? length : 1);
        }
        a = (a + inp[i]) % 65521, b = (b + a) % 65521;
    }
    symbol_put(&w, 256);
    bits_put(&w, 0, 7);                                          // what waits becomes a byte
    return png_put32(w.at, b << 16 | a);
}

// The file of a picture (H, W, C) uint8, C 1 (grey) or 3 (RGB), rows from the top; free() it. NULL without memory, or if
// the picture has more than 2^31 bytes.
static inline unsigned char *png_encode(size_t *length, const uint8_t *pixels, int H, int W, int C) {
    const size_t row = (size_t)W * (size_t)C, raw = (row + 1) * (size_t)H;
    if (W < 1 || H < 1 || raw + raw / 8 > 0x7FFF0000u) return NULL;  // a chunk can have no more
    unsigned char *file = (unsigned char *)malloc(raw + raw / 8 + 256), *lines = (unsigned char *)malloc(raw);
    uint32_t *last_seen = (uint32_t *)malloc(PNG_HASHES * sizeof(uint32_t));
    if (file && lines && last_seen) {
        for (size_t y = 0; y < (size_t)H; y++) {
            lines[y * (row + 1)] = 0;                            // no filter
            memcpy(lines + y * (row + 1) + 1, pixels + y * row, row);
        }
        memcpy(file, "\x89PNG\r\n\x1a\n", 8);
        png_put32(png_put32(file + 16, (uint32_t)W), (uint32_t)H);
        const unsigned char kind[5] = {8, (unsigned char)(C == 3 ? 2 : 0), 0, 0, 0};  // 8 bits; RGB or grey
        memcpy(file + 24, kind, 5);
        unsigned char *idat = png_seal(file + 8, "IHDR", 13);
        unsigned char *end = zlib_compress(idat + 8, lines, raw, last_seen);
        end = png_seal(png_seal(idat, "IDAT", (size_t)(end - idat) - 8), "IEND", 0);
        *length = (size_t)(end - file);
    } else {
        free(file);
        file = NULL;
    }
    free(lines);
    free(last_seen);
    return file;
}

// Writes bytes to path.tmp, which gets its name when it is whole. 0, or -1 and one line in err.
static inline int save_whole(const char *path, const void *bytes, size_t n, char *err, size_t errlen) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {          // the rename must not replace a device or a folder
        snprintf(err, errlen, "%s: exists and is not a file; choose another name", path);
        return -1;
    }
    char *tmp_path = (char *)malloc(strlen(path) + sizeof ".tmp");
    if (tmp_path) sprintf(tmp_path, "%s.tmp", path);
    FILE *f = tmp_path ? fopen(tmp_path, "wb") : NULL;
    int failed = !f || fwrite(bytes, 1, n, f) != n, why = errno;
    if (f && fclose(f) && !failed) failed = 1, why = errno;
    if (!failed && rename(tmp_path, path)) failed = 1, why = errno;
    if (failed && f) unlink(tmp_path);
    if (failed) snprintf(err, errlen, "%s: cannot be written: %s; choose another place", path, strerror(why));
    free(tmp_path);
    return failed ? -1 : 0;
}

static inline int png_write(const char *path, const uint8_t *pixels, int H, int W, int C, char *err, size_t errlen) {
    size_t length;
    unsigned char *file = png_encode(&length, pixels, H, W, C);
    if (!file) {
        snprintf(err, errlen, "%s: no memory for a picture of %d x %d, or it is too large for PNG", path, H, W);
        return -1;
    }
    int failed = save_whole(path, file, length, err, errlen);
    free(file);
    return failed;
}

#endif
