/* png.h - writes an RGB picture as a PNG file that any viewer opens. Header only; nothing is compressed, so that no zlib
   is needed: a PNG's pixels are a zlib stream, and zlib allows "stored" blocks of at most 65535 bytes taken as they are.

   int png_write(path, rgb, W, H, err, errlen)    rgb: (H, W, 3) uint8, rows from the top. 0, or -1 and one line in err.

   The file: 8 bytes of signature, then chunks { length, type, data, CRC-32 of type and data }, numbers big-endian:
   IHDR (size and kind), IDAT (the stream: every row has a 0 in front, "no filter"; then the Adler-32 of all rows), IEND. */

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

static inline int png_write(const char *path, const uint8_t *rgb, int W, int H, char *err, size_t errlen) {
    const size_t row = 1 + 3 * (size_t)W, raw = row * (size_t)H, blocks = (raw + 65534) / 65535;
    if (W < 1 || H < 1 || raw > 0x7FFF0000u) {
        snprintf(err, errlen, "%s: a picture of %d x %d cannot be written; its sides must be 1 or more, its bytes below 2^31",
                 path, H, W);
        return -1;
    }
    struct stat st;                                              // the rename below must not replace a device or a folder
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {
        snprintf(err, errlen, "%s: exists and is not a file; choose another name", path);
        return -1;
    }
    unsigned char *file = (unsigned char *)malloc(raw + 5 * blocks + 128), *at;
    char *tmp_path = (char *)malloc(strlen(path) + sizeof ".tmp");
    int failed = !file || !tmp_path;
    if (!failed) {
        memcpy(file, "\x89PNG\r\n\x1a\n", 8);
        png_put32(png_put32(file + 16, (uint32_t)W), (uint32_t)H);
        memcpy(file + 24, "\x08\x02\0\0", 5);                    // 8 bits, RGB, zlib, standard filters, not interlaced
        unsigned char *idat = png_seal(file + 8, "IHDR", 13);
        at = idat + 8;
        *at++ = 0x78, *at++ = 0x01;                              // zlib: deflate, window 32 KiB, fastest
        uint32_t a = 1, b = 0;                                   // Adler-32: sum of bytes, sum of sums
        for (size_t i = 0; i < raw; i++) {
            if (i % 65535 == 0) {                                // a new stored block: last?, length, ~length (little-endian)
                uint32_t n = (uint32_t)(raw - i < 65535 ? raw - i : 65535);
                *at++ = raw - i <= 65535;
                *at++ = (unsigned char)n, *at++ = (unsigned char)(n >> 8);
                *at++ = (unsigned char)~n, *at++ = (unsigned char)(~n >> 8);
            }
            *at = i % row == 0 ? 0 : rgb[i / row * (row - 1) + i % row - 1];
            a = (a + *at++) % 65521, b = (b + a) % 65521;
        }
        at = png_put32(at, b << 16 | a);
        at = png_seal(idat, "IDAT", (size_t)(at - idat) - 8);
        at = png_seal(at, "IEND", 0);

        sprintf(tmp_path, "%s.tmp", path);
        FILE *f = fopen(tmp_path, "wb");
        failed = !f || fwrite(file, 1, (size_t)(at - file), f) != (size_t)(at - file);
        if (f && fclose(f)) failed = 1;
        if (!failed && rename(tmp_path, path)) failed = 1;
        if (failed && f) unlink(tmp_path);
    }
    if (failed) snprintf(err, errlen, "%s: %s", path, strerror(errno));
    free(tmp_path);
    free(file);
    return failed ? -1 : 0;
}

#endif
