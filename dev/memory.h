/* memory.h - memory that is there or ends the program with a line, and arenas. Header only.

   Included by train_vivim.c, section 1. */
#ifndef VIVIM_MEMORY_H
#define VIVIM_MEMORY_H

static void out_of_memory(double bytes) {
    fail("out of memory: %.1f MiB more were wanted; use a smaller --batch, --frames, --size or --config", bytes / 1048576);
}

// memory that starts on a cache line; free() gives it back. The graph (section 12) says free_check: a GPU's is another pair.
static void *malloc_check(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (p == NULL) out_of_memory((double)bytes);
    return p;
}

static void *calloc_check(size_t count, size_t size) { return memset(malloc_check(count * size), 0, count * size); }
static void free_check(void *p) { free(p); }
static float *malloc_floats(size_t n) { return (float *)malloc_check(n * sizeof(float)); }

// An arena is one block of memory from which tensors are cut one after the other. With base == NULL it only counts: the
// same layout code first measures a plan, then, run again, hands out the pointers.
typedef struct {
    char *base;
    size_t used, peak, size;  // bytes; peak is the largest `used` so far
} Arena;

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
enum { RED_ZONE = 64 };  // poisoned bytes between tensors: running over a tensor's end is caught
#else
enum { RED_ZONE = 0 };
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)0)
#endif

// n numbers of `size` bytes each. In the planning pass the arena has no memory yet: NULL, but they are counted
static void *arena_take(Arena *arena, size_t n, size_t size) {
    size_t bytes = (n * size + 63) / 64 * 64;  // every tensor starts on a cache line
    char *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += bytes + RED_ZONE;
    if (arena->used > arena->peak) arena->peak = arena->used;
    if (p == NULL) return NULL;
    if (arena->used > arena->size) fail("internal error: an arena of %zu bytes is too small; please report it", arena->size);
    ASAN_UNPOISON_MEMORY_REGION(p, n * size);
    ASAN_POISON_MEMORY_REGION(p + n * size, bytes - n * size + RED_ZONE);
    return p;
}

static void arena_free(Arena *arena) {
    if (arena->base) ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->size);
    free(arena->base);
    memset(arena, 0, sizeof *arena);
}

// Makes room for `size` bytes (keeps what is there if it is already large enough; contents are not kept otherwise).
static void arena_reserve(Arena *arena, size_t size) {
    if (arena->base == NULL || arena->size < size) {
        void *base = NULL; arena_free(arena);
        size = (size + 2097151) / 2097152 * 2097152;  // 2 MiB: a huge page
        if (posix_memalign(&base, 2097152, size) != 0) out_of_memory((double)size);
#ifdef MADV_HUGEPAGE
        madvise(base, size, MADV_HUGEPAGE);  // fewer TLB misses: 5-20 % on the memory-bound layers
#endif
        arena->base = (char *)base, arena->size = size;
    }
    ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->size);
    arena->used = arena->peak = 0;
}

#endif
