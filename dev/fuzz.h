// fuzz.h - what fuzz_shard.c and fuzz_safetensors.c share: how to fail, what a message must look like, where to write.

#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// libFuzzer's side of the contract: it calls these two, and gives the third.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

// Not assert(), which a build may switch off. The fuzzer catches the abort and keeps the input.
static inline void require(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

// Nothing in the text may end a line or steer a terminal: not the control characters below 32, nor 127, nor, in UTF-8,
// U+0080 .. U+009F.
static inline void require_clean(const char *text, const char *what) {
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        require(*c >= 32 && *c != 127 && (*c != 0xC2 || c[1] < 128 || c[1] >= 160), what);
}

// What a program prints when it refuses a file: one line, which begins with the file's name.
static inline void require_message(const char *err, const char *path) {
    require(strncmp(err, path, strlen(path)) == 0 && strlen(err) > strlen(path), "a message names the file and says more");
    require_clean(err, "a message without control characters");
}

// A file of this process for what is written and read again; TMPDIR should not be a slow disk.
static inline const char *scratch_path(char *path, size_t size, const char *name) {
    const char *directory = getenv("TMPDIR");
    snprintf(path, size, "%s/%s_%ld", directory ? directory : "/tmp", name, (long)getpid());
    return path;
}

#endif
