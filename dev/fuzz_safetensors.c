/* fuzz_safetensors.c - any bytes whatever, read as a safetensors file by prepro/safetensors.h. dev/fuzz.sh builds and runs it.

   The address sanitizer sees every access outside the input, which is a block of memory of exactly its size. An accepted
   file is used completely, so that a wrong pointer is followed; then it is written, read again and compared. Beyond
   "nothing crashes", these promises are checked:

     - the tensors tile the data: each byte belongs to exactly one of them; sizes, shapes and types agree
     - every name and every key finds its own tensor and its own text
     - a refused file gives one clean line, and leaves nothing allocated (the leak sanitizer looks)
     - what safetensors_write makes of an accepted file is accepted again and equal */

#define _GNU_SOURCE

#include "../prepro/safetensors.h"
#include "fuzz.h"

static uint64_t header_length(const uint8_t *file) {
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | file[i];
    return length;
}

// Touches every value and checks what the reader promises of an accepted file.
static void use(const SafeTensors *st, const uint8_t *data, size_t data_bytes) {
    unsigned char *owned = (unsigned char *)calloc(data_bytes + 1, 1);
    require(owned != NULL, "memory for the test");
    double sum = 0;
    size_t total = 0;
    for (int i = 0; i < st->count; i++) {
        const SafeTensor *t = &st->tensors[i];
        require(t->dtype >= 0 && t->dtype < SAFETENSORS_DTYPES, "a known type");
        require(t->ndim >= 0 && t->ndim <= SAFETENSORS_MAX_DIMS, "a number of dimensions");
        require(t->nbytes == t->numel * (size_t)safetensors_dtype_bytes(t->dtype), "as many bytes as elements need");
        double product = 1;             // may be larger than any integer where a dimension is 0, as long as it ends at 0
        for (int d = 0; d < t->ndim; d++) product *= (double)t->shape[d];
        require(product == (double)t->numel, "as many elements as the shape says");
        size_t begin = (size_t)(t->data - data);
        require(t->nbytes <= data_bytes && begin <= data_bytes - t->nbytes, "a tensor inside the file");
        for (size_t b = 0; b < t->nbytes; b++) require(!owned[begin + b]++, "tensors that do not overlap");
        for (size_t k = 0; k < t->numel; k++) sum += safetensors_value(t, k);
        require(safetensors_find(st, t->name) == t, "a tensor is found by its name");
        total += t->nbytes;
    }
    require(total == data_bytes, "no byte without a tensor");
    const SafeTensor *other = safetensors_find(st, "x");
    require(!other || strcmp(other->name, "x") == 0, "no other tensor is found");
    for (int i = 0; i < st->metadata_count; i++) {
        const char *value = safetensors_metadata(st, st->metadata[i].key);
        require(value && strcmp(value, st->metadata[i].value) == 0, "a text is found by its key");
        sum += (double)strlen(value);
    }
    volatile double kept = sum;         // so that no read is optimised away
    (void)kept;
    free(owned);
}

static void require_equal(const SafeTensors *a, const SafeTensors *b) {
    require(a->count == b->count && a->metadata_count == b->metadata_count, "as many tensors and texts as were written");
    for (int i = 0; i < a->count; i++) {
        const SafeTensor *s = &a->tensors[i], *t = &b->tensors[i];
        require(strcmp(s->name, t->name) == 0, "names come back");
        require(s->dtype == t->dtype && s->ndim == t->ndim, "types come back");
        require(memcmp(s->shape, t->shape, sizeof s->shape) == 0, "shapes come back");
        require(s->nbytes == t->nbytes && memcmp(s->data, t->data, s->nbytes) == 0, "data come back");
    }
    for (int i = 0; i < a->metadata_count; i++) {
        const char *value = safetensors_metadata(b, a->metadata[i].key);
        require(value && strcmp(value, a->metadata[i].value) == 0, "metadata come back");
    }
}

static void round_trip(const SafeTensors *st) {
    SafeTensorOut *out = (SafeTensorOut *)calloc((size_t)st->count + 1, sizeof(SafeTensorOut));
    const char **texts = (const char **)calloc(2 * (size_t)st->metadata_count + 1, sizeof(char *));     // keys, then values
    require(out && texts, "memory for the test");
    for (int i = 0; i < st->count; i++) {
        const SafeTensor *t = &st->tensors[i];
        out[i].name = t->name, out[i].dtype = safetensors_dtype_name(t->dtype), out[i].ndim = t->ndim;
        memcpy(out[i].shape, t->shape, sizeof t->shape);
        out[i].data = t->data, out[i].nbytes = t->nbytes;
    }
    for (int i = 0; i < st->metadata_count; i++) {
        texts[i] = st->metadata[i].key;
        texts[st->metadata_count + i] = st->metadata[i].value;
    }
    char path[512], err[1024] = "";
    SafeTensors again;
    scratch_path(path, sizeof path, "fuzz_safetensors");
    const char *const *keys = texts, *const *values = texts + st->metadata_count;
    int failed = safetensors_write(path, out, st->count, keys, values, st->metadata_count, err, sizeof err) ||
                 safetensors_open(&again, path, err, sizeof err);
    require(!failed, err);
    require_equal(st, &again);
    safetensors_close(&again);
    unlink(path);
    free(texts);
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    SafeTensors st;
    char err[512] = "";
    memset(&st, 0, sizeof st);
    if (safetensors_parse(&st, data, size, "FILE", err, sizeof err) != 0) {
        require_message(err, "FILE: ");
        return 0;
    }
    size_t header = 8 + (size_t)header_length(data);
    use(&st, data + header, size - header);
    round_trip(&st);
    safetensors_close(&st);
    return 0;
}

// Bytes put in or taken out would make the length before the header wrong, and hardly a change get past that check. So
// three of four mutations change the header alone, keep the data behind it and set the length right.
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    if (seed % 4 == 0 || size < 8 || header_length(data) > size - 8) return LLVMFuzzerMutate(data, size, max_size);
    size_t length = (size_t)header_length(data), rest = size - 8 - length;
    if (8 + rest == max_size) return LLVMFuzzerMutate(data, size, max_size);
    uint8_t *kept = (uint8_t *)malloc(rest + 1);
    require(kept != NULL, "memory for the test");
    memcpy(kept, data + 8 + length, rest);
    length = LLVMFuzzerMutate(data + 8, length, max_size - 8 - rest);
    memcpy(data + 8 + length, kept, rest);
    free(kept);
    for (int i = 0; i < 8; i++) data[i] = (uint8_t)((uint64_t)length >> 8 * i);
    return 8 + length + rest;
}
