/*
safetensors.h - read and write .safetensors files, the format in which PyTorch and HuggingFace weights are exchanged.

A file is

    8 bytes           n, the length of the header, little-endian
    n bytes           the header, JSON:  { "__metadata__": { "key": "text", ... },                       (may be missing)
                                           "tensor name": { "dtype": "F32", "shape": [64, 3, 7, 7], "data_offsets": [begin, end] }, ... }
    the rest          raw little-endian data; begin and end count from its first byte

Reading maps the file, so that a tensor costs nothing until it is touched, and trusts nothing: every length, type, shape and
offset is checked with 64-bit arithmetic before a pointer is made from it, and each failure is one line of text:

    SafeTensors st;
    char err[256];
    if (safetensors_open(&st, "model.safetensors", err, sizeof err) != 0) { fprintf(stderr, "program: %s\n", err); exit(1); }
    const SafeTensor *t = safetensors_find(&st, "decoder.batch_norm.weight");          // NULL if there is none
    double x = t ? safetensors_value(t, 0) : 0.0;                                        // element 0, whatever its type
    const char *note = safetensors_metadata(&st, "note");                              // NULL if there is none
    safetensors_close(&st);

The data may start at any byte, so it is read by memcpy (as safetensors_value does), never through a cast pointer.
Writing goes to PATH.tmp, which takes the final name only when every byte is on the disk.

The JSON reader in the first section is small but strict, and of use by itself (metadata often holds JSON again).

Needs POSIX (mmap) and a little-endian machine; include after defining _POSIX_C_SOURCE >= 200112L or _GNU_SOURCE.
Sections: errors | JSON | types | reading | writing.
*/
#ifndef VIVIM_SAFETENSORS_H
#define VIVIM_SAFETENSORS_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define SAFETENSORS_MAX_HEADER 100000000u   // bytes; the limit of the reference implementation
#define SAFETENSORS_MAX_DIMS 8

// ------------------------------------------------------------------------------------------------------------------
// Errors: "path: what is wrong; what to do", on one line whatever bytes a name in the file contains

#ifdef __GNUC__
__attribute__((format(printf, 4, 5)))
#endif
static inline int safetensors_fail(const char *path, char *err, size_t errlen, const char *format, ...) {
    if (errlen == 0) return -1;
    int used = snprintf(err, errlen, "%s: ", path);
    if (used >= 0 && (size_t)used < errlen) {
        va_list args;
        va_start(args, format);
        vsnprintf(err + used, errlen - (size_t)used, format, args);
        va_end(args);
    }
    for (unsigned char *c = (unsigned char *)err; *c; c++) {
        if (*c < 32 || *c == 127) *c = '?';
        if (*c == 0xC2 && c[1] >= 128 && c[1] < 160) c[0] = c[1] = '?';   // U+0080 .. U+009F in UTF-8: terminals obey these, too
    }
    return -1;
}

// ------------------------------------------------------------------------------------------------------------------
// JSON: a cursor over a text that takes one token after the other. The first thing that does not fit sets `error`;
// after that every call fails, so a parser may check once at the end of a phrase.

typedef struct {
    const char *text;
    size_t length, at;
    const char *error;   // NULL, or what was wrong at byte `at`
} JsonReader;

static inline int json_fail(JsonReader *j, const char *error) {
    if (!j->error) j->error = error;
    return 0;
}

// The next character that is not white space, or 0 at the end (a NUL byte in the text is no token either).
static inline char json_peek(JsonReader *j) {
    while (j->at < j->length && (j->text[j->at] == ' ' || j->text[j->at] == '\n' || j->text[j->at] == '\t' || j->text[j->at] == '\r')) j->at++;
    return j->at < j->length ? j->text[j->at] : '\0';
}

// Takes the character c if it comes next; returns 1 then, else 0, which is no error yet.
static inline int json_take(JsonReader *j, char c) {
    if (j->error || json_peek(j) != c) return 0;
    j->at++;
    return 1;
}

static inline int json_hex4(JsonReader *j, unsigned *value) {
    *value = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        if (j->at >= j->length) return json_fail(j, "unfinished \\u escape");
        char c = j->text[j->at];
        unsigned digit = c >= '0' && c <= '9' ? (unsigned)(c - '0') : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10
                       : c >= 'A' && c <= 'F' ? (unsigned)(c - 'A') + 10 : 16;
        if (digit == 16) return json_fail(j, "bad digit in a \\u escape");
        *value = *value * 16 + digit;
    }
    return 1;
}

// The code point after "\u" as UTF-8; a pair of surrogates is one code point.
static inline int json_unicode(JsonReader *j, char **out) {
    unsigned code, low;
    if (!json_hex4(j, &code)) return 0;
    if (code >= 0xD800 && code < 0xDC00) {
        if (j->length - j->at < 2 || j->text[j->at] != '\\' || j->text[j->at + 1] != 'u') return json_fail(j, "half of a surrogate pair");
        j->at += 2;
        if (!json_hex4(j, &low)) return 0;
        if (low < 0xDC00 || low > 0xDFFF) return json_fail(j, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
        return json_fail(j, "half of a surrogate pair");
    }
    if (code == 0) return json_fail(j, "a NUL character in a string");
    char *o = *out;
    if (code < 0x80) {
        *o++ = (char)code;
    } else if (code < 0x800) {
        *o++ = (char)(0xC0 | (code >> 6));
        *o++ = (char)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *o++ = (char)(0xE0 | (code >> 12));
        *o++ = (char)(0x80 | ((code >> 6) & 63));
        *o++ = (char)(0x80 | (code & 63));
    } else {
        *o++ = (char)(0xF0 | (code >> 18));
        *o++ = (char)(0x80 | ((code >> 12) & 63));
        *o++ = (char)(0x80 | ((code >> 6) & 63));
        *o++ = (char)(0x80 | (code & 63));
    }
    *out = o;
    return 1;
}

// A string, decoded to *out with a NUL behind it; *out moves on. No escape is shorter than what it stands for and the
// NUL takes the place of a quote, so a buffer as long as the text is always enough.
static inline int json_string(JsonReader *j, char **out) {
    if (!json_take(j, '"')) return json_fail(j, "expected a string");
    char *o = *out;
    while (j->at < j->length) {
        unsigned char c = (unsigned char)j->text[j->at++];
        if (c == '"') {
            *o++ = '\0';
            *out = o;
            return 1;
        }
        if (c < 32) return json_fail(j, "a control character in a string");
        if (c != '\\') {
            *o++ = (char)c;
            continue;
        }
        char e = j->at < j->length ? j->text[j->at++] : '\0';
        switch (e) {
            case '"': case '\\': case '/': *o++ = e; break;
            case 'b': *o++ = '\b'; break;
            case 'f': *o++ = '\f'; break;
            case 'n': *o++ = '\n'; break;
            case 'r': *o++ = '\r'; break;
            case 't': *o++ = '\t'; break;
            case 'u': if (!json_unicode(j, &o)) return 0; break;
            default: return json_fail(j, "unknown escape in a string");
        }
    }
    return json_fail(j, "unfinished string");
}

// A whole number from 0 to 10^18 - 1, digits only: shapes and offsets are nothing else.
static inline int json_count(JsonReader *j, int64_t *value) {
    char first = json_peek(j);
    if (j->error || first < '0' || first > '9') return json_fail(j, "expected a whole number >= 0");
    size_t start = j->at;
    *value = 0;
    for (; j->at < j->length && j->text[j->at] >= '0' && j->text[j->at] <= '9'; j->at++) {
        if (j->at - start == 18) return json_fail(j, "number too large");
        *value = *value * 10 + (j->text[j->at] - '0');
    }
    if (first == '0' && j->at - start > 1) return json_fail(j, "number with a leading zero");
    return 1;
}

// [ count, count, ... ] of at most `most` numbers; returns how many, or -1.
static inline int json_counts(JsonReader *j, int64_t *values, int most) {
    int n = 0;
    if (!json_take(j, '[')) { json_fail(j, "expected a list"); return -1; }
    if (json_take(j, ']')) return 0;
    do {
        if (n == most) { json_fail(j, "list too long"); return -1; }
        if (!json_count(j, &values[n++])) return -1;
    } while (json_take(j, ','));
    if (!json_take(j, ']')) { json_fail(j, "expected ',' or ']' in a list"); return -1; }
    return n;
}

// ------------------------------------------------------------------------------------------------------------------
// Types

enum { SAFETENSORS_F64, SAFETENSORS_F32, SAFETENSORS_F16, SAFETENSORS_BF16, SAFETENSORS_I64, SAFETENSORS_I32,
       SAFETENSORS_I16, SAFETENSORS_I8, SAFETENSORS_U8, SAFETENSORS_BOOL, SAFETENSORS_DTYPES };

typedef struct {
    char *name;
    int dtype, ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    size_t numel;                 // product of the shape; 1 for a scalar, whose shape is []
    const unsigned char *data;    // in the mapping; not aligned
    size_t nbytes;
} SafeTensor;

typedef struct { char *key, *value; } SafeTensorsPair;

typedef struct {
    SafeTensor *tensors;          // sorted by name
    int count;
    SafeTensorsPair *metadata;    // sorted by key
    int metadata_count;
    char *strings;                // owns the decoded text of all names, keys and values
    void *map;                    // the whole file
    size_t map_bytes;
} SafeTensors;

static inline const char *safetensors_dtype_name(int dtype) {
    static const char *const names[SAFETENSORS_DTYPES] = { "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL" };
    return dtype >= 0 && dtype < SAFETENSORS_DTYPES ? names[dtype] : "?";
}

static inline int safetensors_dtype_bytes(int dtype) {
    static const int bytes[SAFETENSORS_DTYPES] = { 8, 4, 2, 2, 8, 4, 2, 1, 1, 1 };
    return dtype >= 0 && dtype < SAFETENSORS_DTYPES ? bytes[dtype] : 0;
}

static inline int safetensors_dtype(const char *name) {   // -1: unknown
    for (int d = 0; d < SAFETENSORS_DTYPES; d++) {
        if (strcmp(name, safetensors_dtype_name(d)) == 0) return d;
    }
    return -1;
}

// IEEE half precision: sign, 5 bits of exponent, 10 of fraction.
static inline double safetensors_half(uint16_t bits) {
    int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double magnitude = exponent == 0 ? ldexp((double)fraction, -24)
                     : exponent < 31 ? ldexp((double)(fraction + 1024), exponent - 25) : fraction ? NAN : HUGE_VAL;
    return bits >> 15 ? -magnitude : magnitude;
}

// Element i of the flat tensor, as double. The caller keeps i < t->numel.
static inline double safetensors_value(const SafeTensor *t, size_t i) {
    const unsigned char *at = t->data + i * (size_t)safetensors_dtype_bytes(t->dtype);
    double f64; float f32; int64_t i64; int32_t i32; int16_t i16; uint16_t u16; uint32_t u32;
    switch (t->dtype) {
        case SAFETENSORS_F64:  memcpy(&f64, at, 8); return f64;
        case SAFETENSORS_F32:  memcpy(&f32, at, 4); return f32;
        case SAFETENSORS_F16:  memcpy(&u16, at, 2); return safetensors_half(u16);
        case SAFETENSORS_BF16: memcpy(&u16, at, 2); u32 = (uint32_t)u16 << 16; memcpy(&f32, &u32, 4); return f32;
        case SAFETENSORS_I64:  memcpy(&i64, at, 8); return (double)i64;
        case SAFETENSORS_I32:  memcpy(&i32, at, 4); return i32;
        case SAFETENSORS_I16:  memcpy(&i16, at, 2); return i16;
        case SAFETENSORS_I8:   return (signed char)at[0];
        default:               return at[0];      // U8, BOOL
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Reading

static inline int safetensors_by_name(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}

static inline int safetensors_by_key(const void *a, const void *b) {
    return strcmp(((const SafeTensorsPair *)a)->key, ((const SafeTensorsPair *)b)->key);
}

static inline int safetensors_by_data(const void *a, const void *b) {   // empty tensors before the one that starts at the same byte
    const SafeTensor *s = (const SafeTensor *)a, *t = (const SafeTensor *)b;
    if (s->data != t->data) return s->data < t->data ? -1 : 1;
    return (s->nbytes > t->nbytes) - (s->nbytes < t->nbytes);
}

static inline void safetensors_close(SafeTensors *st) {
    free(st->tensors);
    free(st->metadata);
    free(st->strings);
    if (st->map) munmap(st->map, st->map_bytes);
    memset(st, 0, sizeof *st);
}

// { "dtype": ..., "shape": [...], "data_offsets": [begin, end] } in any order, each once. `data` is the first data byte.
static inline int safetensors_parse_tensor(JsonReader *j, SafeTensor *t, const unsigned char *data, size_t data_bytes, char *scratch) {
    int has_dtype = 0, has_shape = 0, has_offsets = 0;
    int64_t offsets[2] = { 0, 0 };
    if (!json_take(j, '{')) return json_fail(j, "expected '{' after a tensor's name");
    do {
        char *field = scratch, *end = scratch;
        if (!json_string(j, &end)) return 0;
        if (!json_take(j, ':')) return json_fail(j, "expected ':'");
        if (strcmp(field, "dtype") == 0 && !has_dtype++) {
            char *name = end;
            if (!json_string(j, &end)) return 0;
            t->dtype = safetensors_dtype(name);
            if (t->dtype < 0) return json_fail(j, "unknown dtype; F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL are known");
        } else if (strcmp(field, "shape") == 0 && !has_shape++) {
            t->ndim = json_counts(j, t->shape, SAFETENSORS_MAX_DIMS);
            if (t->ndim < 0) return 0;
        } else if (strcmp(field, "data_offsets") == 0 && !has_offsets++) {
            if (json_counts(j, offsets, 2) != 2) return json_fail(j, "expected [begin, end]");
        } else {
            return json_fail(j, "expected dtype, shape and data_offsets, each once");
        }
    } while (json_take(j, ','));
    if (!json_take(j, '}')) return json_fail(j, "expected ',' or '}'");
    if (!has_dtype || !has_shape || !has_offsets) return json_fail(j, "a tensor without dtype, shape or data_offsets");

    uint64_t numel = 1, most = (uint64_t)data_bytes;   // no dimension of a tensor with elements exceeds the number of bytes
    int empty = 0;
    for (int d = 0; d < t->ndim; d++) empty |= t->shape[d] == 0;
    for (int d = 0; d < t->ndim && !empty; d++) {
        if ((uint64_t)t->shape[d] > most / numel) return json_fail(j, "shape larger than the file");
        numel *= (uint64_t)t->shape[d];
    }
    if (empty) numel = 0;
    if (offsets[0] > offsets[1] || (uint64_t)offsets[1] > (uint64_t)data_bytes) return json_fail(j, "data_offsets outside the file");
    uint64_t nbytes = (uint64_t)(offsets[1] - offsets[0]);
    // numel <= data_bytes, so that numel * 8 cannot overflow 64 bits
    if (numel * (uint64_t)safetensors_dtype_bytes(t->dtype) != nbytes) return json_fail(j, "shape and data_offsets disagree");
    t->numel = (size_t)numel;
    t->nbytes = (size_t)nbytes;
    t->data = data + offsets[0];
    return 1;
}

// Makes room for one more element of an array that doubles; NULL without memory, the old array then stays.
static inline void *safetensors_grow(void *array, int count, size_t element) {
    if (count > 0 && (count & (count - 1)) != 0) return array;      // room until the next power of two
    return realloc(array, (count ? (size_t)count * 2 : 1) * element);
}

// All of st->tensors and st->metadata from the header; returns 0 with j->error set if something does not fit.
static inline int safetensors_parse_header(SafeTensors *st, JsonReader *j, const unsigned char *data, size_t data_bytes, char *scratch) {
    char *strings = st->strings;
    int metadata_seen = 0;
    if (!json_take(j, '{')) return json_fail(j, "expected '{'");
    if (!json_take(j, '}')) {
        do {
            char *name = strings;
            if (!json_string(j, &strings)) return 0;
            if (!json_take(j, ':')) return json_fail(j, "expected ':'");
            if (strcmp(name, "__metadata__") != 0) {
                SafeTensor t;
                memset(&t, 0, sizeof t);
                t.name = name;
                if (!safetensors_parse_tensor(j, &t, data, data_bytes, scratch)) return 0;
                void *grown = safetensors_grow(st->tensors, st->count, sizeof t);
                if (!grown) return json_fail(j, "out of memory");
                st->tensors = (SafeTensor *)grown;
                st->tensors[st->count++] = t;
                continue;
            }
            if (metadata_seen++) return json_fail(j, "__metadata__ twice");
            if (!json_take(j, '{')) return json_fail(j, "expected '{' after __metadata__");
            if (json_take(j, '}')) continue;
            do {
                SafeTensorsPair pair;
                pair.key = strings;
                if (!json_string(j, &strings)) return 0;
                if (!json_take(j, ':')) return json_fail(j, "expected ':'");
                pair.value = strings;
                if (!json_string(j, &strings)) return 0;
                void *grown = safetensors_grow(st->metadata, st->metadata_count, sizeof pair);
                if (!grown) return json_fail(j, "out of memory");
                st->metadata = (SafeTensorsPair *)grown;
                st->metadata[st->metadata_count++] = pair;
            } while (json_take(j, ','));
            if (!json_take(j, '}')) return json_fail(j, "expected ',' or '}'");
        } while (json_take(j, ','));
        if (!json_take(j, '}')) return json_fail(j, "expected ',' or '}'");
    }
    json_peek(j);                                                   // writers pad the header with spaces
    if (j->at != j->length) return json_fail(j, "text behind the closing '}'");
    return 1;
}

// The checks behind safetensors_open, on bytes in memory; `path` only names them in an error. The tensors point into
// `bytes`. Closes st itself on failure.
static inline int safetensors_parse(SafeTensors *st, const unsigned char *bytes, size_t size, const char *path, char *err, size_t errlen) {
    uint64_t length = 0;
    if (size < 8) {
        safetensors_close(st);
        return safetensors_fail(path, err, errlen, "%zu bytes are too few for a safetensors file", size);
    }
    for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
    if (length < 2 || length > SAFETENSORS_MAX_HEADER || length > (uint64_t)size - 8) {
        safetensors_close(st);
        return safetensors_fail(path, err, errlen, "header of %" PRIu64 " bytes in a file of %zu; not a safetensors file, or cut off", length, size);
    }
    const unsigned char *data = bytes + 8 + (size_t)length;
    size_t data_bytes = size - 8 - (size_t)length;
    JsonReader j;
    memset(&j, 0, sizeof j);
    j.text = (const char *)bytes + 8;
    j.length = (size_t)length;
    st->strings = (char *)malloc((size_t)length);
    char *scratch = (char *)malloc((size_t)length);                 // dtype names and field names, forgotten at once
    if (!st->strings || !scratch) j.error = "out of memory";
    else safetensors_parse_header(st, &j, data, data_bytes, scratch);
    free(scratch);
    if (j.error) {
        safetensors_fail(path, err, errlen, "header, byte %zu: %s; not a safetensors file, or damaged", j.at, j.error);
        safetensors_close(st);
        return -1;
    }

    // As in the reference implementation, the tensors must tile the data: no overlap, no hole, nothing behind the last one.
    const unsigned char *at = data;
    if (st->count) qsort(st->tensors, (size_t)st->count, sizeof(SafeTensor), safetensors_by_data);
    for (int i = 0; i < st->count; i++) {
        if (st->tensors[i].data != at) {
            safetensors_fail(path, err, errlen, "the data of %.100s overlaps another tensor's or leaves a hole; damaged file", st->tensors[i].name);
            safetensors_close(st);
            return -1;
        }
        at += st->tensors[i].nbytes;
    }
    if (at != data + data_bytes) {
        safetensors_close(st);
        return safetensors_fail(path, err, errlen, "%zu bytes behind the last tensor; damaged file", (size_t)(data + data_bytes - at));
    }
    if (st->count) qsort(st->tensors, (size_t)st->count, sizeof(SafeTensor), safetensors_by_name);
    for (int i = 1; i < st->count; i++) {
        if (strcmp(st->tensors[i - 1].name, st->tensors[i].name) == 0) {
            safetensors_fail(path, err, errlen, "two tensors have the name %.100s; damaged file", st->tensors[i].name);
            safetensors_close(st);
            return -1;
        }
    }
    if (st->metadata_count) qsort(st->metadata, (size_t)st->metadata_count, sizeof(SafeTensorsPair), safetensors_by_key);
    for (int i = 1; i < st->metadata_count; i++) {
        if (strcmp(st->metadata[i - 1].key, st->metadata[i].key) == 0) {
            safetensors_fail(path, err, errlen, "the metadata have the key %.100s twice; damaged file", st->metadata[i].key);
            safetensors_close(st);
            return -1;
        }
    }
    return 0;
}

// Maps the file and checks all of its header. 0, or -1 with one line in err and nothing to close.
static inline int safetensors_open(SafeTensors *st, const char *path, char *err, size_t errlen) {
    struct stat info;
    memset(st, 0, sizeof *st);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return safetensors_fail(path, err, errlen, "%s; check the path", strerror(errno));
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return safetensors_fail(path, err, errlen, "not a regular file");
    }
    if (info.st_size < 8) {
        close(fd);
        return safetensors_fail(path, err, errlen, "%lld bytes are too few for a safetensors file", (long long)info.st_size);
    }
    st->map_bytes = (size_t)info.st_size;
    st->map = mmap(NULL, st->map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);                                                      // the mapping keeps the file open
    if (st->map == MAP_FAILED) {
        st->map = NULL;
        return safetensors_fail(path, err, errlen, "cannot map the file: %s", strerror(errno));
    }
    return safetensors_parse(st, (const unsigned char *)st->map, st->map_bytes, path, err, errlen);
}

static inline const SafeTensor *safetensors_find(const SafeTensors *st, const char *name) {
    int low = 0, high = st->count;
    while (low < high) {
        int middle = low + (high - low) / 2, order = strcmp(st->tensors[middle].name, name);
        if (order == 0) return &st->tensors[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static inline const char *safetensors_metadata(const SafeTensors *st, const char *key) {
    int low = 0, high = st->metadata_count;
    while (low < high) {
        int middle = low + (high - low) / 2, order = strcmp(st->metadata[middle].key, key);
        if (order == 0) return st->metadata[middle].value;
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

// ------------------------------------------------------------------------------------------------------------------
// Writing

typedef struct {
    const char *name, *dtype;     // dtype: "F32", "U8", ...
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    const void *data;             // contiguous, little-endian
    size_t nbytes;
} SafeTensorOut;

// Prints text as a JSON string; bytes >= 128 pass as they are (UTF-8).
static inline void json_print_string(FILE *f, const char *text) {
    fputc('"', f);
    for (const char *c = text; *c; c++) {
        if (*c == '"' || *c == '\\') fprintf(f, "\\%c", *c);
        else if ((unsigned char)*c < 32) fprintf(f, "\\u%04x", (unsigned)(unsigned char)*c);
        else fputc(*c, f);
    }
    fputc('"', f);
}

static inline void safetensors_print_header(FILE *f, const SafeTensorOut *tensors, int count, const char *const *keys, const char *const *values,
                                            int n_meta) {
    uint64_t offset = 0;
    fputc('{', f);
    if (n_meta > 0) {
        fputs("\"__metadata__\":{", f);
        for (int i = 0; i < n_meta; i++) {
            if (i) fputc(',', f);
            json_print_string(f, keys[i]);
            fputc(':', f);
            json_print_string(f, values[i]);
        }
        fputc('}', f);
    }
    for (int i = 0; i < count; i++) {
        const SafeTensorOut *t = &tensors[i];
        if (i || n_meta > 0) fputc(',', f);
        json_print_string(f, t->name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype);
        for (int d = 0; d < t->ndim; d++) fprintf(f, "%s%" PRId64, d ? "," : "", t->shape[d]);
        fprintf(f, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", offset, offset + (uint64_t)t->nbytes);
        offset += (uint64_t)t->nbytes;
    }
    fputc('}', f);
}

// Writes PATH.tmp and renames it, so that PATH is always either the old file or the whole new one. 0, or -1 and err.
static inline int safetensors_write(const char *path, const SafeTensorOut *tensors, int count, const char *const *keys, const char *const *values,
                                    int n_meta, char *err, size_t errlen) {
    for (int i = 0; i < count; i++) {
        uint64_t bytes = (uint64_t)safetensors_dtype_bytes(safetensors_dtype(tensors[i].dtype));
        for (int d = 0; d < tensors[i].ndim; d++) bytes *= (uint64_t)tensors[i].shape[d];
        if (bytes != (uint64_t)tensors[i].nbytes) return safetensors_fail(path, err, errlen, "shape and size of %.100s disagree", tensors[i].name);
    }
    struct stat st;                                                 // the rename below must not replace a device or a folder
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) return safetensors_fail(path, err, errlen, "exists and is not a file; choose another name");
    size_t tmp_bytes = strlen(path) + 5;
    char *tmp = (char *)malloc(tmp_bytes);
    if (!tmp) return safetensors_fail(path, err, errlen, "out of memory");
    snprintf(tmp, tmp_bytes, "%s.tmp", path);
    FILE *f = fopen(tmp, "wb");
    if (!f) {
        safetensors_fail(tmp, err, errlen, "%s; check the directory", strerror(errno));
        free(tmp);
        return -1;
    }

    // The header's length stands before it but is known after it: eight zero bytes first, the length at the end.
    unsigned char length[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
    errno = 0;
    fwrite(length, 1, 8, f);
    safetensors_print_header(f, tensors, count, keys, values, n_meta);
    off_t end = ftello(f);
    int ok = end > 8;
    for (; ok && end % 8 != 0; end++) fputc(' ', f);                // the data starts at a multiple of 8 bytes
    for (int i = 0; ok && i < count; i++) ok = fwrite(tensors[i].data, 1, tensors[i].nbytes, f) == tensors[i].nbytes;
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)(end - 8) >> (8 * i));
    ok = ok && fseeko(f, 0, SEEK_SET) == 0 && fwrite(length, 1, 8, f) == 8;
    ok = ok && fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0;
    int reason = errno;
    if (fclose(f) != 0 && ok) { ok = 0; reason = errno; }
    if (ok && rename(tmp, path) != 0) { ok = 0; reason = errno; }
    if (!ok) {
        unlink(tmp);
        safetensors_fail(path, err, errlen, "cannot write: %s; the old file, if any, is unchanged", reason ? strerror(reason) : "disk full?");
    }
    free(tmp);
    return ok ? 0 : -1;
}

#endif
