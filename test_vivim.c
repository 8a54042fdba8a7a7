/*
test_vivim.c - is train_vivim.c right?

    gcc -std=c99 -O3 -march=native -ffp-contract=fast -fopenmp test_vivim.c -lm -o test_vivim
    gcc -std=c99 -O3 -march=native -fopenmp -DVIVIM_DOUBLE test_vivim.c -lm -o test_vivim_double

    ./test_vivim                     all tests; the exit status is the verdict, the last line counts
    ./test_vivim op golden.scan      the tests whose names start with one of the words; ^op.scan: all but those
    ./test_vivim --list | --verbose  names only | every comparison with its error and its limit
    ./test_vivim --golden FILE...    whole models against golden files, every tensor on a line

The second build computes everything in double (train_vivim.c turns float into double). There a backward pass can be held
against central differences of its forward, to seven digits, and the golden numbers (float64 PyTorch, stored as float32)
to their last bit. The first build then has to show only that float loses no more than float must.

What each op is put through, section 3: compared with plain loops in double ("oracle") and with PyTorch ("golden"); outputs
hold NaN before, so that what is not written is seen; guard words stand around every tensor; a second backward pass must
add to the gradients of parameters and overwrite those of activations; one and four threads must give the same bits; and
in double, gradients are compared with differences. An error is compared by !(error <= limit), so that NaN fails.

Golden files are looked for in dev/golden, or where the environment variable VIVIM_GOLDEN says; what `make data` makes, in data. A test
without its file is skipped.

With -DVIVIM_CUDA (make test_vivimcu, or test_vivim_emu without a GPU) train_vivim.cu is included instead: the plain names of the operations and
of the model's graph then mean the GPU's, and the same tests hold them to the same numbers. CPU and GPU share all memory.

Sections: 1 the test frame | 2 golden files | 3 the life of an op | 4 ops and their oracles | 5 tests of ops | 6 losses, optimiser |
          7 whole models | 8 the trained affine network | 9 files | 10 main
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "prepro/safetensors.h"   // before train_vivim.c: in the double build the word float changes its meaning there
#include "prepro/shard.h"
#include "prepro/resize.h"

#define VIVIM_NO_MAIN
#ifndef VIVIM_CUDA
#include "train_vivim.c"
#else
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#ifndef CUDAEMU                   // dev/cudaemu.h has what these have
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

// Managed memory, which CPU and GPU both reach, for whatever an operation may be given; other libraries' memory is freed as it was taken
typedef struct { char *base; size_t bytes; } Managed;
static Managed *managed;                       // all that is in use, in no order
static size_t managed_count, managed_room;

__attribute__((noinline)) static void *managed_malloc(size_t bytes) {  // inlined, gcc 12 believes that p dangles
    void *p = NULL;
    if (cudaMallocManaged(&p, bytes ? bytes : 1) != cudaSuccess) return NULL;
    if (managed_count == managed_room) managed = (Managed *)realloc(managed, (managed_room += 4096) * sizeof(Managed));
    if (!managed) exit(1);
    managed[managed_count].base = (char *)p;
    managed[managed_count++].bytes = bytes;
    return p;
}
// the allocation in which p lies
static inline int managed_block(const char *p, char **base, size_t *bytes) {
    for (size_t i = managed_count; i-- > 0;) {
        if (p < managed[i].base || p >= managed[i].base + managed[i].bytes) continue;
        *base = managed[i].base, *bytes = managed[i].bytes;
        return 1;
    }
    return 0;
}
static int managed_memalign(void **p, size_t bytes) { return (*p = managed_malloc(bytes)) ? 0 : ENOMEM; }
static void managed_free(void *p) {
    size_t i = managed_count;
    while (i > 0 && managed[i - 1].base != (char *)p) i--;
    if (i == 0) { free(p); return; }
    managed[i - 1] = managed[--managed_count];
    cudaFree(p);
}
#define malloc(bytes) managed_malloc(bytes)
#define aligned_alloc(alignment, bytes) managed_malloc(bytes)          // both start on 256 bytes
#define posix_memalign(p, alignment, bytes) managed_memalign(p, bytes)
#define free(p) managed_free(p)
#define cudaMalloc(p, bytes) cudaMallocManaged(p, bytes)
#define cudaMallocAsync(p, bytes, stream) cudaMallocManaged(p, bytes)
#define VIVIM_NO_CUDA_MAIN
#ifdef CUDAEMU
#include "train_vivim_emu.cpp"    // train_vivim.cu as dev/cudaemu.sed leaves it
#else
#define cudaFreeAsync(p, stream) cudaFree(p)
#include "train_vivim.cu"
#endif
#undef malloc_check               // the tests' own memory comes as above, not as the graph's
#undef malloc_floats
#undef calloc_check

#endif
#ifdef VIVIM_BF16
#include "dev/test_bf16.h"
#else
#define in_x(p) (p)
#define back_from_x() ((void)0)
#define shadows_free() ((void)0)
#endif

// Before the CPU looks at what operations wrote, or writes what they read: on a GPU they may still be under way
static void settle(void) {
#ifdef VIVIM_CUDA
    cudaError_t launched = cudaGetLastError(), done = cudaDeviceSynchronize(), error = launched ? launched : done;
    if (error == cudaSuccess) return;
    fprintf(stderr, "test_vivim: CUDA: %s\n", cudaGetErrorString(error));
    exit(1);
#endif
}

#ifdef VIVIM_CUDA
// Sublayers hold pointers, which the CPU writes while operations are under way: not in memory that the GPU may hold
static void model_init_managed(Model *m, const Config *config, uint64_t seed) {
    settle();
    model_init(m, config, seed);
    Sublayer *sublayers = (Sublayer *)calloc((size_t)m->num_sublayers + 1, sizeof(Sublayer));
    if (!sublayers) exit(1);
    memcpy(sublayers, m->sublayers, (size_t)m->num_sublayers * sizeof(Sublayer));
    free(m->sublayers);
    m->sublayers = sublayers;
    if (sizeof(floatX) != sizeof(float)) m->weights = NULL;  // round_weights_cuda makes them
}

// The graph's memory goes back the way it came
static void model_free_managed(Model *m) {
    free_check(m->grads), free_check(m->adam_m), free_check(m->adam_v);
    arena_free(&m->kept), arena_free(&m->scratch);
    if ((void *)m->weights != (void *)m->params) free_check(m->weights);
    m->grads = m->adam_m = m->adam_v = NULL;
    model_free(m);
}
#define model_init(m, config, seed) model_init_managed(m, config, seed)
#define model_free(m) model_free_managed(m)
#endif

// ------------------------------------------------------------------------------------------------------------------
// 1. The test frame

#ifdef VIVIM_DOUBLE
#define IS_DOUBLE 1
#define LIMIT(float_limit) ((void)(float_limit), 3e-7)          // a golden number is rounded to float32: 6e-8 of itself
#define ORACLE_LIMIT(float_limit) ((void)(float_limit), 1e-7)   // constants written like 0.1f are rounded to 1e-8
#else
#define IS_DOUBLE 0
#define LIMIT(float_limit) (float_limit)
#define ORACLE_LIMIT(float_limit) (float_limit)
#endif

#ifdef VIVIM_CUDA
#define GUARD 24                               // floats before and after each tensor; 16 bytes of alignment, which float4 needs, no more
#else
#define GUARD 17                               // odd, so that no tensor is well aligned
#endif

enum { ROUNDED_OP, ROUNDED_LAYERS, ROUNDED_MODEL };
#if defined(VIVIM_BF16) || (defined(VIVIM_AMX) && VIVIM_AMX == 1)  // AMX=1: factors of matrix products; AMX=3 has float's limits
#define ROUNDS_TO_BF16
// bfloat16 has 8 bits: an activation is rounded by up to 0.2 % (2^-9) of itself. No limit is smaller than
static const double BF16_LIMITS[] = {
    1.5e-2,                                    // for one operation: input, weight and output are rounded, a sum of few terms cancels
    5e-2,                                      // for the gradients of a chain of up to ten, where small ones are differences of large ones,
                                               // and for what a model computes forward
    0.25                                       // for the gradients of a model, whose chain is some hundred; largest seen: 0.152
};
#endif

#define GUARD_BYTE 0xA5
#define MAX_BLOCKS 4096
#define OPS_FILES 4

typedef struct { float *base; size_t numel; } Block;

typedef struct Test {
    const char *name;                          // of the running test
    int verbose, comparisons, failures, rounded;  // rounded: ROUNDED_OP, ..: which limit a bf16 build has
    char skipped[256];                         // why, or empty
    double worst;                              // largest error / limit so far
    char worst_what[128];
    Block blocks[MAX_BLOCKS];
    int block_count;
    const char *golden;                        // directory
    SafeTensors ops[OPS_FILES];                // ops_1 ... ops_3, ops: those that exist
    int ops_state;                             // 1: opened
} Test;

static void test_fail(Test *t, const char *format, ...) {
    va_list args;
    t->failures++;
    printf("      %s: ", t->name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static void expect(Test *t, int ok, const char *what) {
    t->comparisons++;
    if (!ok) test_fail(t, "%s", what);
    else if (t->verbose) printf("      %-44s yes\n", what);
}

// The one place where an error meets its limit.
static void expect_error(Test *t, const char *what, double error, double limit) {
#ifdef ROUNDS_TO_BF16
    limit = fmax(limit, BF16_LIMITS[t->rounded]);
#endif
    int ok = error <= limit;                   // false for NaN
    t->comparisons++;
    if (!ok) t->failures++;
    if (!ok || t->verbose) printf("      %-60s error %9.2e  limit %9.2e%s\n", what, error, limit, ok ? "" : "  FAILED");
    if (!(error / limit <= t->worst)) {
        t->worst = error / limit;
        snprintf(t->worst_what, sizeof t->worst_what, "%.120s", what);
    }
}

static int ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

// max |a|; NaN if one of them is
static double largest(const float *a, size_t n) {
    double most = 0;
    settle();
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)a[i]) <= most)) most = fabs((double)a[i]);
        if (most != most) break;
    }
    return most;
}

// max |a - b| against limit * max |b|. A NaN anywhere in a makes the error NaN.
static void expect_close(Test *t, const char *what, const float *a, const float *b, size_t n, double limit) {
    double error = 0, scale = largest(b, n);
#ifdef ROUNDS_TO_BF16
    if (n < 8) scale = fmax(scale, 1);         // a few numbers may cancel to nearly nothing: inputs, of size 1, are rounded
#endif
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        if (!(difference <= error)) error = difference;
        if (error != error) break;
    }
    expect_error(t, what, scale > 0 ? error / scale : error, limit);
}

static void expect_number(Test *t, const char *what, double a, double b, double limit) {
    expect_error(t, what, fabs(a - b) / (fabs(b) > 0 ? fabs(b) : 1), limit);
}

static void expect_bits(Test *t, const char *what, const float *a, const float *b, size_t n) {
    t->comparisons++;
    settle();
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&a[i], &b[i], sizeof(float)) != 0) {
            test_fail(t, "%s: element %zu is %.9g and %.9g", what, i, (double)a[i], (double)b[i]);
            return;
        }
    }
}

// Outputs of the same function for batches of different sizes: on a CPU the same bits. cuBLAS chooses its sums' order by the size.
static void expect_same(Test *t, const char *what, const float *a, const float *b, size_t n) {
#ifdef VIVIM_CUDA
    expect_close(t, what, a, b, n, 2e-6);
#else
    expect_bits(t, what, a, b, n);
#endif
}

static void fill(float *a, size_t n, double value) {
    settle();
    for (size_t i = 0; i < n; i++) a[i] = (float)value;
}

// n floats that hold NaN, between guard words; freed at the end of the test.
static float *tensor(Test *t, size_t n) {
    settle();
    float *base = (float *)malloc((n + 2 * GUARD) * sizeof(float));
    if (!base || t->block_count == MAX_BLOCKS) {
        fprintf(stderr, "test_vivim: no room for a tensor of %zu floats\n", n);
        exit(1);
    }
    memset(base, GUARD_BYTE, (n + 2 * GUARD) * sizeof(float));
    fill(base + GUARD, n, NAN);
    t->blocks[t->block_count].base = base;
    t->blocks[t->block_count++].numel = n;
    return base + GUARD;
}

// n activations as floats: themselves, or a copy that lives until the test ends
static const float *floats_of(Test *t, const floatX *x, size_t n) {
#ifdef VIVIM_BF16
    float *copy = tensor(t, n);
    for (size_t i = 0; i < n; i++) copy[i] = __bfloat162float(x[i]);
    return copy;
#else
    (void)t, (void)n;
    return x;
#endif
}

static void check_guards(Test *t, const char *after) {
    settle();
    for (int b = 0; b < t->block_count; b++) {
        const unsigned char *front = (const unsigned char *)t->blocks[b].base;
        const unsigned char *back = (const unsigned char *)(t->blocks[b].base + GUARD + t->blocks[b].numel);
        for (size_t i = 0; i < GUARD * sizeof(float); i++) {
            if (front[i] == GUARD_BYTE && back[i] == GUARD_BYTE) continue;
            test_fail(t, "%s wrote %s a tensor of %zu floats", after, front[i] != GUARD_BYTE ? "before" : "behind", t->blocks[b].numel);
            return;
        }
    }
}

static void free_tensors(Test *t) {
    shadows_free();
    while (t->block_count > 0) free(t->blocks[--t->block_count].base);
}

// Every bit set: a NaN in whatever the model reads before it writes it.
static void poison_arenas(Model *m) {
    settle();
    arena_reserve(&m->kept, m->kept.size);     // takes away the guards that address sanitizer has there
    arena_reserve(&m->scratch, m->scratch.size);
    memset(m->kept.base, 0xFF, m->kept.size);
    memset(m->scratch.base, 0xFF, m->scratch.size);
}

// ------------------------------------------------------------------------------------------------------------------
// 2. Golden files: their hash, which stands for weights and data that need no room; their tensors; their metadata

static uint32_t fnv1a32(const char *name) {
    uint32_t h = 2166136261u;
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 16777619u;
    return h;
}

// u(name, i), in [-1, 1): the state is the name's hash above the index, mixed by splitmix64.
static double hash_u(uint32_t name_hash, uint64_t i) {
    uint64_t x = ((uint64_t)name_hash << 32) + i + 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return (double)(x >> 40) / 8388608.0 - 1.0;
}

// Golden weights and inputs are float32, also where the word float means double.
static double round_to_float32(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    uint64_t rest = bits & 0x1FFFFFFFu, half = 0x10000000u;    // the 29 bits of the fraction that float32 does not have
    bits -= rest;
    if (rest > half || (rest == half && (bits >> 29 & 1))) bits += 0x20000000u;
    memcpy(&value, &bits, 8);
    return value;
}

static void test_hash(Test *t, const void *row) {
    (void)row;
    expect(t, fnv1a32("") == 0x811c9dc5u, "fnv1a32(\"\")");
    expect(t, fnv1a32("input") == 0xf9d86f7bu, "fnv1a32(\"input\")");
    expect(t, fnv1a32("out.weight") == 0xd4d0965fu, "fnv1a32(\"out.weight\")");
    expect(t, hash_u(fnv1a32("input"), 0) == 0.6356050968170166, "u(\"input\", 0)");
    expect(t, hash_u(fnv1a32("input"), 1) == 0.8192038536071777, "u(\"input\", 1)");
    expect(t, hash_u(fnv1a32("out.weight"), 31) == -0.9887654781341553, "u(\"out.weight\", 31)");
    expect(t, hash_u(fnv1a32("target.cx"), 5) == 0.4003312587738037, "u(\"target.cx\", 5)");
}

// Frames, (B,T,H,W,3) from the hash of (B,T,3,H,W), and masks (B,T,H,W): an ellipse per frame
static void hash_clip(float *frames, float *masks, int B, int T, int H, int W) {
    uint32_t input = fnv1a32("input");
    for (int f = 0; f < B * T; f++) {
        uint64_t frame = (uint64_t)f;
        double cx = W * (0.5 + 0.2 * hash_u(fnv1a32("target.cx"), frame)), cy = H * (0.5 + 0.2 * hash_u(fnv1a32("target.cy"), frame));
        double rx = W * (0.2 + 0.08 * hash_u(fnv1a32("target.rx"), frame)), ry = H * (0.2 + 0.08 * hash_u(fnv1a32("target.ry"), frame));
        for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
            size_t pixel = ((size_t)f * (size_t)H + (size_t)y) * (size_t)W + (size_t)x;
            double dx = (x + 0.5 - cx) / rx, dy = (y + 0.5 - cy) / ry;
            masks[pixel] = dx * dx + dy * dy < 1 ? 1 : 0;
            for (int c = 0; c < 3; c++) {
                uint64_t i = (((uint64_t)f * 3 + (uint64_t)c) * (uint64_t)H + (uint64_t)y) * (uint64_t)W + (uint64_t)x;
                frames[pixel * 3 + (size_t)c] = (float)round_to_float32(1.7 * hash_u(input, i));
            }
        }
    }
}

// Of masks (B,T,pixels), those that a clip's loss needs: of its target frame and of its first
static void clip_masks(float *target, float *first, const float *masks, int B, int T, size_t pixels) {
    for (int b = 0; b < B; b++) {
        memcpy(target + (size_t)b * pixels, masks + (size_t)(b * T + T / 2) * pixels, pixels * sizeof(float));
        memcpy(first + (size_t)b * pixels, masks + (size_t)(b * T) * pixels, pixels * sizeof(float));
    }
}

// Element i of the tensor `key`, whose shape has `ndim` entries, from the hash: the rules by which the golden models got their
// weights. The first rule that fits decides. Computed in double, then rounded to float32 (in the double build too).
static double hash_weight(const char *key, uint32_t name_hash, int ndim, const int *shape, size_t numel, size_t i, int d_state) {
    const char *dot = strrchr(key, '.'), *last = dot ? dot + 1 : key;
    double u = hash_u(name_hash, i);
    if (strcmp(last, "A_log") == 0 || strcmp(last, "A_b_log") == 0 || strcmp(last, "A_s_log") == 0) {
        return log((double)(i % (size_t)d_state) + 1) + 0.1 * u;
    }
    if (strcmp(last, "D") == 0 || strcmp(last, "D_b") == 0 || strcmp(last, "D_s") == 0) return 1 + 0.2 * u;
    if (strcmp(last, "running_mean") == 0) return 0.1 * u;
    if (strcmp(last, "running_var") == 0) return 1 + 0.3 * u;
    if (strcmp(last, "weight") == 0 && ndim == 1) return 1 + 0.2 * u;
    if (ends_with(key, "dt_proj.bias") || ends_with(key, "dt_proj_b.bias") || ends_with(key, "dt_proj_s.bias")) return -2 + u;
    if (strcmp(last, "bias") == 0) return 0.1 * u;
    return u * sqrt(3.0 / ((double)numel / shape[0]));       // any other weight: uniform with variance 1 / fan_in
}

// The weights of the file, or those of the hash
static void golden_weights(Model *m, const SafeTensors *st) {
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *row = &m->tensors[i];
        char name[160];
        snprintf(name, sizeof name, "param.%s", row->name);
        const SafeTensor *golden = st ? safetensors_find(st, name) : NULL;
        uint32_t name_hash = fnv1a32(row->name);
        double scale = strcmp(row->name, "affine.fc3.weight") == 0 ? 0.1 : 1;         // F's maps are to stay near the identity
        float *p = tensor_data(m, row);
        for (size_t k = 0; k < row->numel; k++) {
            double value = golden && golden->numel == row->numel ? safetensors_value(golden, k)
                         : scale * hash_weight(row->name, name_hash, row->ndim, row->shape, row->numel, k, m->config.d_state);
            p[k] = (float)round_to_float32(value);
        }
    }
}

// F for patches of side q with the hash's weights; frozen
static void hash_affine(AffineNet *f, int q) {
    settle();
    affine_init(f, q, 1);
    golden_weights(&f->net, NULL);
}

// A tensor of one of the ops files, or NULL. The test is skipped if the files are not there.
static const SafeTensor *ops_tensor(Test *t, const char *name) {
    char path[1024], err[512];
    static const char *const files[OPS_FILES] = { "ops_1", "ops_2", "ops_3", "ops" };
    for (int f = 0, opened = t->ops_state; f < OPS_FILES && !opened; f++) {
        snprintf(path, sizeof path, "%s/%s.safetensors", t->golden, files[f]);
        if (safetensors_open(&t->ops[f], path, err, sizeof err) == 0) t->ops_state = 1;
    }
    if (t->ops_state == 0) {
        snprintf(t->skipped, sizeof t->skipped, "no golden files ops*.safetensors in %.100s", t->golden);
        return NULL;
    }
    for (int f = 0; f < OPS_FILES; f++) {
        const SafeTensor *found = safetensors_find(&t->ops[f], name);
        if (found) return found;
    }
    return NULL;
}

// All elements in order; or, channels_last, with axis 1 moved to the end: (B,C,...) -> (B,...,C).
static void golden_copy(float *out, const SafeTensor *golden, int channels_last) {
    size_t B = 1, C = 1, rest = golden->numel;
    if (channels_last) {
        B = (size_t)golden->shape[0];
        C = (size_t)golden->shape[1];
        rest = golden->numel / (B * C);
    }
    for (size_t b = 0; b < B; b++) {
        for (size_t c = 0; c < C; c++) {
            for (size_t r = 0; r < rest; r++) out[(b * rest + r) * C + c] = (float)safetensors_value(golden, (b * C + c) * rest + r);
        }
    }
}

// The tensor "<op>.<part><name>" of the ops files, which must have n elements; NULL if not.
static float *golden_op(Test *t, const char *op, const char *part, const char *name, size_t n, int channels_last) {
    char full[256];
    snprintf(full, sizeof full, "%s.%s%s", op, part, name);
    const SafeTensor *golden = ops_tensor(t, full);
    if (golden && golden->numel == n) {
        float *out = tensor(t, n);
        golden_copy(out, golden, channels_last);
        return out;
    }
    if (!t->skipped[0]) test_fail(t, "%s: the golden file has %zu elements, the op %zu", full, golden ? golden->numel : 0, n);
    return NULL;
}

// Skips one JSON value of any kind; golden metadata hold JSON inside their strings.
static int json_skip(JsonReader *j, char *scratch, int depth) {
    char first = json_peek(j), *end = scratch;
    if (depth > 16) return json_fail(j, "nested too deep");
    if (first == '"') return json_string(j, &end);
    if (first == '{' || first == '[') {
        char last = first == '{' ? '}' : ']';
        j->at++;
        if (json_take(j, last)) return 1;
        do {
            end = scratch;
            if (first == '{' && (!json_string(j, &end) || !json_take(j, ':'))) return json_fail(j, "expected a name and ':'");
            if (!json_skip(j, scratch, depth + 1)) return 0;
        } while (json_take(j, ','));
        return json_take(j, last) || json_fail(j, "expected ',' or the end of a list");
    }
    size_t start = j->at;                      // a number, true, false, null
    while (j->at < j->length && strchr("+-.0123456789abcdefghijklmnopqrstuvwxyzE", j->text[j->at])) j->at++;
    return j->at > start || json_fail(j, "expected a value");
}

// The text behind "key": in the JSON object `json`, or NULL.
static const char *json_member(const char *json, const char *key) {
    JsonReader j;
    const char *found = NULL;
    memset(&j, 0, sizeof j);
    j.text = json;
    j.length = strlen(json);
    char *scratch = (char *)calloc(1, j.length + 1);
    if (scratch && json_take(&j, '{')) {
        do {
            char *end = scratch;
            if (!json_string(&j, &end) || !json_take(&j, ':')) break;
            json_peek(&j);
            if (strcmp(scratch, key) == 0) found = json + j.at;
        } while (!found && json_skip(&j, scratch, 0) && json_take(&j, ','));
    }
    free(scratch);
    return found;
}

// What PyTorch loses in float32 on this file, for one result; ours may lose five times as much.
static double five_times(const SafeTensors *st, const char *key) {
    const char *json = safetensors_metadata(st, "fp32_err"), *value = json ? json_member(json, key) : NULL;
    return IS_DOUBLE ? 3e-7 : value ? 5 * strtod(value, NULL) : 1e-6;
}

static void compare_loss(Test *t, const SafeTensors *st, const char *name, double loss) {
    const SafeTensor *golden = safetensors_find(st, name);
    // a loss is a mean over many pixels, whose errors PyTorch may by luck have cancelled: so not less than the digits of a float
    if (golden) expect_number(t, name, loss, safetensors_value(golden, 0), IS_DOUBLE ? 1e-12 : fmax(five_times(st, name), 3e-7));
    else test_fail(t, "%s is not in the golden file", name);
}

// ------------------------------------------------------------------------------------------------------------------
// 3. The life of an op

enum { INPUT, PARAM };                         // a backward pass overwrites the gradient of an input and adds to that of a parameter

typedef struct {
    char name[64];                             // as in the golden file
    int kind, channels_last;                   // channels_last: the golden tensor is (B,C,...), ours (B,...,C)
    double offset, scale;                      // random values are offset + scale * u
    size_t numel;
    float *data, *grad;
} OpTensor;

// One op with sizes and data: y = op(x...); run() computes y, and the gradients of all x from that of y if `backward`.
typedef struct Op {
    Test *t;
    void (*run)(struct Op *op, int backward);
    void (*oracle)(struct Op *op, float *y);   // the same y by the plainest loops, in double; or NULL
    void (*host)(struct Op *op, float **grads);  // on a GPU: the gradients by the CPU's function; or NULL
    int n[11];                                 // sizes; each op names its own
    OpTensor x[48], y;
    int count;                                 // of x
    float *work[12];                           // saved and intermediate tensors
    Model *model;                              // the sublayers' own, else NULL
} Op;

static OpTensor *op_tensor(Op *op, const char *name, int kind, size_t numel) {
    OpTensor *x = &op->x[op->count++];
    snprintf(x->name, sizeof x->name, "%s", name);
    x->kind = kind;
    x->channels_last = 0;
    x->offset = 0.0;
    x->scale = 1.0;
    x->numel = numel;
    x->data = tensor(op->t, numel);
    x->grad = tensor(op->t, numel);
    return x;
}

static void op_output(Op *op, size_t numel, int channels_last) {
    op->y.numel = numel;
    op->y.channels_last = channels_last;
    op->y.data = tensor(op->t, numel);
    op->y.grad = tensor(op->t, numel);
}

static float *op_work(Op *op, int i, size_t numel) {      // NaN again at every run
    if (!op->work[i]) op->work[i] = tensor(op->t, numel);
    fill(op->work[i], numel, NAN);
    return op->work[i];
}

typedef void OpMaker(Op *op);

static Op *op_new(Test *t, OpMaker *make, const int *sizes) {
    Op *op = (Op *)calloc(1, sizeof(Op));
    if (!op) exit(1);
    op->t = t;
    memcpy(op->n, sizes, sizeof op->n);
    make(op);
    return op;
}

static void op_random(Op *op) {
    settle();
    for (int i = 0; i < op->count; i++) {
        OpTensor *x = &op->x[i];
        for (size_t k = 0; k < x->numel; k++) x->data[k] = (float)(x->offset + x->scale * hash_u(fnv1a32(x->name), k));
    }
    for (size_t k = 0; k < op->y.numel; k++) op->y.grad[k] = (float)hash_u(fnv1a32("gy"), k);
}

// Forward and backward on outputs that hold NaN, parameter gradients at zero.
static void op_run(Op *op, int backward) {
    fill(op->y.data, op->y.numel, NAN);
    for (int i = 0; i < op->count && backward; i++) fill(op->x[i].grad, op->x[i].numel, op->x[i].kind == PARAM ? 0.0 : NAN);
    op->run(op, backward);
    check_guards(op->t, backward ? "backward" : "forward");
}

static float *copy_of(Test *t, const float *a, size_t n) {
    float *copy = tensor(t, n);
    memcpy(copy, a, n * sizeof(float));
    return copy;
}

static const char *label(char *buffer, size_t size, const Op *op, const char *what, const char *name) {
    int used = snprintf(buffer, size, "%s %s, sizes", what, name);
    for (int i = 0; i < 11 && used > 0 && (size_t)used < size; i++) {
        if (op->n[i]) used += snprintf(buffer + used, size - (size_t)used, " %d", op->n[i]);
    }
    return buffer;
}

// Central differences of f(x) = sum_k gy_k y_k(x) at up to 40 elements of each tensor, against the gradients of the last backward.
// The step is 1e-5 and the forward is in double: truncation 1e-10, rounding 1e-11.
static void op_differences(Op *op) {
    char what[160];
    const double step = 1e-5;
    for (int i = 0; i < op->count; i++) {
        OpTensor *x = &op->x[i];
        double error = 0;
        size_t stride = x->numel > 40 ? x->numel / 37 : 1;
        float *grad = copy_of(op->t, x->grad, x->numel);
        for (size_t k = 0; k < x->numel; k += stride) {
            double f[2] = { 0, 0 };
            float kept = x->data[k];
            for (int side = 0; side < 2; side++) {
                x->data[k] = (float)(kept + (side ? step : -step));
                op_run(op, 0);
                for (size_t l = 0; l < op->y.numel; l++) f[side] += (double)op->y.grad[l] * (double)op->y.data[l];
            }
            x->data[k] = kept;
            double difference = fabs((f[1] - f[0]) / (2 * step) - (double)grad[k]);
            if (!(difference <= error)) error = difference;
        }
        expect_error(op->t, label(what, sizeof what, op, "differences", x->name), error / fmax(largest(grad, x->numel), 1e-2), 1e-7);
    }
}

// Everything that can be asked of an op without a golden file. The limit is for the oracle in float.
static void op_check(Op *op, double limit) {
    Test *t = op->t;
    char what[160];
    op_random(op);
    set_threads(1);
    op_run(op, 0);
    float *y = copy_of(t, op->y.data, op->y.numel);
    if (op->oracle) {
        float *expected = tensor(t, op->y.numel);
        op->oracle(op, expected);
        expect_close(t, label(what, sizeof what, op, "oracle", ""), y, expected, op->y.numel, ORACLE_LIMIT(limit));
    }
    op_run(op, 1);
    expect_close(t, label(what, sizeof what, op, "evaluation and training", ""), op->y.data, y, op->y.numel, IS_DOUBLE ? 1e-14 : 1e-6);
    float *grads[48];
    memcpy(y, op->y.data, op->y.numel * sizeof(float));
    for (int i = 0; i < op->count; i++) grads[i] = copy_of(t, op->x[i].grad, op->x[i].numel);
    if (IS_DOUBLE) op_differences(op);
#ifdef VIVIM_CUDA
    float *expected[48];
    for (int i = 0; i < op->count && op->host; i++) expected[i] = tensor(t, op->x[i].numel);
    if (op->host) op->host(op, expected);
    for (int i = 0; i < op->count && op->host; i++) {
        label(what, sizeof what, op, "as on the CPU: gradient of", op->x[i].name);
        expect_close(t, what, grads[i], expected[i], op->x[i].numel, limit);
    }
#endif

    set_threads(4);
    op_run(op, 1);
    expect_bits(t, label(what, sizeof what, op, "1 and 4 threads:", "out"), op->y.data, y, op->y.numel);
    for (int i = 0; i < op->count; i++) {
        expect_bits(t, label(what, sizeof what, op, "1 and 4 threads: gradient of", op->x[i].name), op->x[i].grad, grads[i], op->x[i].numel);
    }

    op->run(op, 1);                            // once more, without clearing the parameter gradients
    settle();
    for (int i = 0; i < op->count; i++) {
        OpTensor *x = &op->x[i];
        if (x->kind == INPUT) {
            expect_bits(t, label(what, sizeof what, op, "second backward, input", x->name), x->grad, grads[i], x->numel);
        } else {
            for (size_t k = 0; k < x->numel; k++) grads[i][k] *= 2;
            label(what, sizeof what, op, "second backward, parameter", x->name);
            expect_close(t, what, x->grad, grads[i], x->numel, IS_DOUBLE ? 1e-14 : 2e-6);
        }
    }
    check_guards(t, "second backward");
}

// The op against the golden tensors <name>.in.*, .out, .gy, .g.*
static void op_golden(Op *op, const char *name, double forward_limit, double backward_limit) {
    Test *t = op->t;
    char what[160];
    float *gy = golden_op(t, name, "gy", "", op->y.numel, op->y.channels_last);
    float *out = golden_op(t, name, "out", "", op->y.numel, op->y.channels_last);
    if (!gy || !out) return;
    t->rounded = op->model ? ROUNDED_LAYERS : ROUNDED_OP;
    memcpy(op->y.grad, gy, op->y.numel * sizeof(float));
    for (int i = 0; i < op->count; i++) {
        OpTensor *x = &op->x[i];
        float *in = golden_op(t, name, "in.", x->name, x->numel, x->channels_last);
        if (!in) return;
        memcpy(x->data, in, x->numel * sizeof(float));
    }
    op_run(op, 1);
    snprintf(what, sizeof what, "%s.out", name);
    expect_close(t, what, op->y.data, out, op->y.numel, LIMIT(forward_limit));
    for (int i = 0; i < op->count; i++) {
        OpTensor *x = &op->x[i];
        float *expected = golden_op(t, name, "g.", x->name, x->numel, x->channels_last);
        snprintf(what, sizeof what, "%s.g.%s", name, x->name);
        if (!expected) continue;
        if (ends_with(x->name, "key.bias")) {  // shifts all scores of a row: its gradient is zero, so measure it by that of the key's weight
            expect_error(t, what, largest(x->grad, x->numel) / largest(x[-1].grad, x[-1].numel), LIMIT(backward_limit));
        } else {
            expect_close(t, what, x->grad, expected, x->numel, LIMIT(backward_limit));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 4. Ops and their oracles. make_X names the tensors (as the golden file does) and the sizes; run_X calls train_vivim.c.

// linear: n = M, N, K.  y (M,N) = x (M,K) w (N,K)^T + b
static void run_linear(Op *op, int backward) {
    int M = op->n[0], N = op->n[1], K = op->n[2];
    OpTensor *x = op->x;
    matmul_forward(op->y.data, x[0].data, x[1].data, x[2].data, M, N, K);
    if (backward) matmul_backward(x[0].grad, x[1].grad, x[2].grad, op->y.grad, x[0].data, x[1].data, M, N, K);
}

static void oracle_linear(Op *op, float *y) {
    int M = op->n[0], N = op->n[1], K = op->n[2];
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            double sum = (double)op->x[2].data[n];
            for (int k = 0; k < K; k++) sum += (double)op->x[0].data[m * K + k] * (double)op->x[1].data[n * K + k];
            y[m * N + n] = (float)sum;
        }
    }
}

static void make_linear(Op *op) {
    size_t M = (size_t)op->n[0], N = (size_t)op->n[1], K = (size_t)op->n[2];
    op_tensor(op, "x", INPUT, M * K);
    op_tensor(op, "w", PARAM, N * K);
    op_tensor(op, "b", PARAM, N);
    op_output(op, M * N, 0);
    op->run = run_linear;
    op->oracle = oracle_linear;
}

// layernorm: n = rows, C, residual. y = LN(x), or x + LN(x), whose backward adds dy; 2: dinp and dresidual are the same array
static void run_layernorm(Op *op, int backward) {
    int rows = op->n[0], C = op->n[1], residual = op->n[2];
    size_t n = (size_t)rows * (size_t)C;
    OpTensor *x = op->x;
    float *mean = op_work(op, 0, (size_t)rows), *rstd = op_work(op, 1, (size_t)rows);
    layernorm_forward(op->y.data, mean, rstd, x[0].data, x[1].data, x[2].data, rows, C);
    settle();
    for (size_t i = 0; i < n && residual; i++) op->y.data[i] += x[0].data[i];
    if (!backward) return;
    if (residual == 2) memcpy(x[0].grad, op->y.grad, n * sizeof(float));
    layernorm_backward(x[0].grad, x[1].grad, x[2].grad, op->y.grad, residual == 0 ? NULL : residual == 1 ? op->y.grad : x[0].grad,
                       x[0].data, x[1].data, mean, rstd, rows, C);
}

static void oracle_layernorm(Op *op, float *y) {
    int rows = op->n[0], C = op->n[1];
    for (int r = 0; r < rows; r++) {
        const float *x_r = op->x[0].data + r * C;
        double mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += (double)x_r[c] / C;
        for (int c = 0; c < C; c++) variance += ((double)x_r[c] - mean) * ((double)x_r[c] - mean) / C;
        for (int c = 0; c < C; c++) {
            double normal = ((double)x_r[c] - mean) / sqrt(variance + 1e-5);
            y[r * C + c] = (float)(normal * (double)op->x[1].data[c] + (double)op->x[2].data[c] + (op->n[2] ? (double)x_r[c] : 0));
        }
    }
}

static void make_layernorm(Op *op) {
    size_t rows = (size_t)op->n[0], C = (size_t)op->n[1];
    op_tensor(op, "x", INPUT, rows * C);
    op_tensor(op, "w", PARAM, C);
    op_tensor(op, "b", PARAM, C);
    op_output(op, rows * C, 0);
    op->run = run_layernorm;
    op->oracle = oracle_layernorm;
}

// gelu: n = elements. Its backward makes both; the forward, in the depthwise convolution, is tested there
static void run_gelu(Op *op, int backward) {
    size_t n = (size_t)op->n[0];
    float *dinp = backward ? op->x[0].grad : op_work(op, 0, n);
    gelu_backward(op->y.data, dinp, backward ? op->y.grad : op->x[0].data, op->x[0].data, n);
}

static void oracle_gelu(Op *op, float *y) {
    for (int i = 0; i < op->n[0]; i++) y[i] = (float)(0.5 * (double)op->x[0].data[i] * (1.0 + erf((double)op->x[0].data[i] / sqrt(2.0))));
}

static void make_gelu(Op *op) {
    OpTensor *x = op_tensor(op, "x", INPUT, (size_t)op->n[0]);
    x->offset = 2.0;
    x->scale = 6.0;
    op_output(op, (size_t)op->n[0], 0);
    op->run = run_gelu;
    op->oracle = oracle_gelu;
}

// gate: n = rows, D. y * SiLU(z) * 0.3, z the second half of the rows of xz; the first half belongs to others
static void run_gate(Op *op, int backward) {
    int rows = op->n[0], D = op->n[1]; OpTensor *x = op->x;
    gate_forward(op->y.data, x[0].data, x[1].data, 0.3f, rows, D);
    settle();
    if (!backward) return;
    for (int r = 0; r < rows; r++) memset(x[1].grad + (size_t)r * 2 * D, 0, (size_t)D * sizeof(float));
    gate_backward(op->y.data, x[0].grad, x[1].grad, op->y.grad, x[0].data, x[1].data, 0.3f, rows, D);
}

static void oracle_gate(Op *op, float *y) {
    int rows = op->n[0], D = op->n[1];
    for (int r = 0; r < rows; r++) for (int d = 0; d < D; d++) {
        double z = (double)op->x[1].data[((size_t)r * 2 + 1) * D + d];
        y[(size_t)r * D + d] = (float)(0.3 * (double)op->x[0].data[(size_t)r * D + d] * z / (1 + exp(-z)));
    }
}

static void make_gate(Op *op) {
    size_t rows = (size_t)op->n[0], D = (size_t)op->n[1];
    op_tensor(op, "y", INPUT, rows * D);
    OpTensor *xz = op_tensor(op, "xz", INPUT, rows * 2 * D);
    xz->scale = 6.0;
    op_output(op, rows * D, 0);
    op->run = run_gate;
    op->oracle = oracle_gate;
}

// dt: n = rows, D, R, extra. softplus(W delta + b), delta being R of R + extra columns; its backward as the graph has it
static void run_dt(Op *op, int backward) {
    int rows = op->n[0], D = op->n[1], R = op->n[2], ld = R + op->n[3]; OpTensor *x = op->x;
    dt_forward(op->y.data, x[0].data, ld, x[1].data, x[2].data, rows, D, R);
    if (!backward) return;
    float *dv = op_work(op, 0, op->y.numel);
    settle();
    memcpy(dv, op->y.grad, op->y.numel * sizeof(float));
    memset(x[0].grad, 0, x[0].numel * sizeof(float));
    dt_backward(dv, x[2].grad, op->y.data, rows, D);
    matmul(x[0].grad, ld, dv, D, 0, x[1].data, R, 0, NULL, rows, R, D, 0);
    matmul(x[1].grad, R, dv, D, 1, x[0].data, ld, 0, NULL, D, R, rows, 1);
}

#ifdef VIVIM_CUDA
static void host_dt(Op *op, float **grads) {
    int rows = op->n[0], D = op->n[1], R = op->n[2], ld = R + op->n[3];
    const OpTensor *x = op->x;
    float *dv = copy_of(op->t, op->y.grad, op->y.numel);
    fill(grads[0], x[0].numel, 0.0); fill(grads[1], x[1].numel, 0.0); fill(grads[2], x[2].numel, 0.0);
    (dt_backward)(dv, grads[2], op->y.data, rows, D);
    (matmul)(grads[0], ld, dv, D, 0, x[1].data, R, 0, NULL, rows, R, D, 0);
    (matmul)(grads[1], R, dv, D, 1, x[0].data, ld, 0, NULL, D, R, rows, 1);
}
#endif

static void oracle_dt(Op *op, float *y) {
    int rows = op->n[0], D = op->n[1], R = op->n[2], ld = R + op->n[3];
    for (int r = 0; r < rows; r++) for (int d = 0; d < D; d++) {
        double v = (double)op->x[2].data[d];
        for (int k = 0; k < R; k++) v += (double)op->x[0].data[(size_t)r * ld + k] * (double)op->x[1].data[(size_t)d * R + k];
        y[(size_t)r * D + d] = (float)log1p(exp(v));
    }
}

static void make_dt(Op *op) {
    size_t rows = (size_t)op->n[0], D = (size_t)op->n[1], R = (size_t)op->n[2];
    op_tensor(op, "x_dbl", INPUT, rows * (R + (size_t)op->n[3]));
    op_tensor(op, "w", PARAM, D * R);
    op_tensor(op, "b", PARAM, D)->scale = 4.0;
    op_output(op, rows * D, 0);
    op->run = run_dt;
    op->oracle = oracle_dt;
#ifdef VIVIM_CUDA
    op->host = host_dt;
#endif
}

// relu: n = elements. In place, and so is its gradient
static void run_relu(Op *op, int backward) {
    size_t n = (size_t)op->n[0];
    memcpy(op->y.data, op->x[0].data, n * sizeof(float));
    relu_forward(op->y.data, n);
    settle();
    if (!backward) return;
    memcpy(op->x[0].grad, op->y.grad, n * sizeof(float));
    relu_backward(op->x[0].grad, op->y.data, n);
}

static void oracle_relu(Op *op, float *y) {
    for (int i = 0; i < op->n[0]; i++) y[i] = (float)fmax((double)op->x[0].data[i], 0);
}

static void make_relu(Op *op) {
    op_tensor(op, "x", INPUT, (size_t)op->n[0]);
    op_output(op, (size_t)op->n[0], 0);
    op->run = run_relu;
    op->oracle = oracle_relu;
}

// dwconv: n = B, T, H, W, C, kt, gelu.  Depthwise kt x 3 x 3.  gelu: 0 y is the sum; 1 y = gelu(sum), and the sum is not wanted;
// 2 both are
static void run_dwconv(Op *op, int backward) {
    const int *n = op->n, gelu = n[6];
    OpTensor *x = op->x;
    float *y = op->y.data, *sum = gelu ? op_work(op, 0, op->y.numel) : y, *dsum = gelu ? op_work(op, 1, op->y.numel) : op->y.grad;
    dwconv_forward(gelu == 1 ? NULL : sum, gelu ? y : NULL, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4], n[5]);
    if (!backward) return;
    if (gelu == 1) dwconv_forward(sum, NULL, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4], n[5]);
    if (gelu) gelu_backward(op_work(op, 2, op->y.numel), dsum, op->y.grad, sum, op->y.numel);
    dwconv_backward(x[0].grad, x[1].grad, x[2].grad, dsum, x[0].data, x[1].data, n[0], n[1], n[2], n[3], n[4], n[5]);
}

static void oracle_dwconv(Op *op, float *y) {
    int B = op->n[0], T = op->n[1], H = op->n[2], W = op->n[3], C = op->n[4], kt = op->n[5];
    for (int b = 0; b < B; b++) for (int t = 0; t < T; t++) for (int h = 0; h < H; h++) for (int w = 0; w < W; w++) for (int c = 0; c < C; c++) {
        double sum = (double)op->x[2].data[c];
        for (int i = 0; i < kt; i++) for (int j = 0; j < 3; j++) for (int k = 0; k < 3; k++) {
            int ti = t + i - kt / 2, hj = h + j - 1, wk = w + k - 1;
            if (ti < 0 || ti >= T || hj < 0 || hj >= H || wk < 0 || wk >= W) continue;
            sum += (double)op->x[0].data[(((b * T + ti) * H + hj) * W + wk) * C + c] * (double)op->x[1].data[((c * kt + i) * 3 + j) * 3 + k];
        }
        if (op->n[6]) sum *= 0.5 * (1.0 + erf(sum / sqrt(2.0)));
        y[(((b * T + t) * H + h) * W + w) * C + c] = (float)sum;
    }
}

static void make_dwconv(Op *op) {
    const int *n = op->n;
    size_t tokens = (size_t)n[0] * (size_t)n[1] * (size_t)n[2] * (size_t)n[3], C = (size_t)n[4];
    op_tensor(op, "x", INPUT, tokens * C)->channels_last = 1;
    op_tensor(op, "w", PARAM, C * (size_t)n[5] * 9);
    op_tensor(op, "b", PARAM, C);
    op_output(op, tokens * C, 1);
    op->run = run_dwconv;
    op->oracle = oracle_dwconv;
}

// conv: n = N, H, W, C, O, kernel, stride, pad
static void run_conv(Op *op, int backward) {
    const int *n = op->n;
    OpTensor *x = op->x;
    conv_forward(op->y.data, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
    if (!backward) return;
    conv_backward(x[0].grad, x[1].grad, x[2].grad, op->y.grad, x[0].data, x[1].data, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
}

static void oracle_conv(Op *op, float *y) {
    int N = op->n[0], H = op->n[1], W = op->n[2], C = op->n[3], O = op->n[4], K = op->n[5], stride = op->n[6], pad = op->n[7];
    int OH = conv_size(H, K, stride, pad), OW = conv_size(W, K, stride, pad);
    for (int b = 0; b < N; b++) for (int h = 0; h < OH; h++) for (int w = 0; w < OW; w++) for (int o = 0; o < O; o++) {
        double sum = (double)op->x[2].data[o];
        for (int c = 0; c < C; c++) for (int i = 0; i < K; i++) for (int j = 0; j < K; j++) {
            int hi = h * stride + i - pad, wj = w * stride + j - pad;
            if (hi < 0 || hi >= H || wj < 0 || wj >= W) continue;
            sum += (double)op->x[0].data[((b * H + hi) * W + wj) * C + c] * (double)op->x[1].data[((o * C + c) * K + i) * K + j];
        }
        y[((b * OH + h) * OW + w) * O + o] = (float)sum;
    }
}

static void make_conv(Op *op) {
    const int *n = op->n;
    size_t C = (size_t)n[3], O = (size_t)n[4];
    op_tensor(op, "x", INPUT, (size_t)n[0] * (size_t)n[1] * (size_t)n[2] * C)->channels_last = 1;
    op_tensor(op, "w", PARAM, O * C * (size_t)(n[5] * n[5]));
    op_tensor(op, "b", PARAM, O);
    op_output(op, (size_t)n[0] * (size_t)conv_size(n[1], n[5], n[6], n[7]) * (size_t)conv_size(n[2], n[5], n[6], n[7]) * O, 1);
    op->run = run_conv;
    op->oracle = oracle_conv;
}

// patch embedding: n as conv; the conv, then a LayerNorm over its channels
static void run_patch(Op *op, int backward) {
    const int *n = op->n;
    OpTensor *x = op->x;
    int rows = n[0] * conv_size(n[1], n[5], n[6], n[7]) * conv_size(n[2], n[5], n[6], n[7]);
    float *conv = op_work(op, 0, op->y.numel), *dconv = op_work(op, 1, op->y.numel);
    float *mean = op_work(op, 2, (size_t)rows), *rstd = op_work(op, 3, (size_t)rows);
    conv_forward(conv, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
    layernorm_forward(op->y.data, mean, rstd, conv, x[3].data, x[4].data, rows, n[4]);
    if (!backward) return;
    layernorm_backward(dconv, x[3].grad, x[4].grad, op->y.grad, NULL, conv, x[3].data, mean, rstd, rows, n[4]);
    conv_backward(x[0].grad, x[1].grad, x[2].grad, dconv, x[0].data, x[1].data, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
}

static void make_patch(Op *op) {
    make_conv(op);
    snprintf(op->x[1].name, sizeof op->x[1].name, "p.proj.weight");
    snprintf(op->x[2].name, sizeof op->x[2].name, "p.proj.bias");
    op_tensor(op, "p.layer_norm.weight", PARAM, (size_t)op->n[4]);
    op_tensor(op, "p.layer_norm.bias", PARAM, (size_t)op->n[4]);
    op->y.channels_last = 0;                   // tokens (B, h*w, C) in the golden file too
    op->run = run_patch;
    op->oracle = NULL;
}

// attention: n = N, P, Pk, C, heads.  softmax(q k^T / sqrt(C / heads)) v, head by head
static void run_attention(Op *op, int backward) {
    const int *n = op->n;
    OpTensor *x = op->x;
    attention_forward(op->y.data, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4]);
    if (backward) {
        attention_backward(x[0].grad, x[1].grad, x[2].grad, op->y.grad, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4]);
    }
}

#ifdef VIVIM_CUDA
static void host_attention(Op *op, float **grads) {  // in parentheses: not cuda_names.h's macro
    const int *n = op->n;
    const OpTensor *x = op->x;
    (attention_backward)(grads[0], grads[1], grads[2], op->y.grad, x[0].data, x[1].data, x[2].data, n[0], n[1], n[2], n[3], n[4]);
}
#endif

static void oracle_attention(Op *op, float *y) {
    int N = op->n[0], P = op->n[1], Pk = op->n[2], C = op->n[3], heads = op->n[4], d = C / heads;
    double *p = (double *)malloc((size_t)Pk * sizeof(double));
    for (int f = 0; f < N && p; f++) for (int i = 0; i < P; i++) for (int head = 0; head < heads; head++) {
        const float *q = op->x[0].data + ((f * P + i) * C + head * d);
        double largest = -1e300, sum = 0;
        for (int j = 0; j < Pk; j++) {
            p[j] = 0;
            for (int c = 0; c < d; c++) p[j] += (double)q[c] * (double)op->x[1].data[(f * Pk + j) * C + head * d + c] / sqrt((double)d);
            largest = fmax(largest, p[j]);
        }
        for (int j = 0; j < Pk; j++) sum += p[j] = exp(p[j] - largest);
        for (int c = 0; c < d; c++) {
            double out = 0;
            for (int j = 0; j < Pk; j++) out += p[j] / sum * (double)op->x[2].data[(f * Pk + j) * C + head * d + c];
            y[(f * P + i) * C + head * d + c] = (float)out;
        }
    }
    free(p);
}

static void make_attention(Op *op) {
    size_t N = (size_t)op->n[0], P = (size_t)op->n[1], Pk = (size_t)op->n[2], C = (size_t)op->n[3];
    op_tensor(op, "q", INPUT, N * P * C)->scale = 3.0;
    op_tensor(op, "k", INPUT, N * Pk * C);
    op_tensor(op, "v", INPUT, N * Pk * C);
    op_output(op, N * P * C, 0);
    op->run = run_attention;
    op->oracle = oracle_attention;
#ifdef VIVIM_CUDA
    op->host = host_attention;
#endif
}

// The token that a scan visits at step s.
static int visited(int order, int s, int T, int P) {
    return order == SCAN_FORWARD ? s : order == SCAN_BACKWARD ? T * P - 1 - s : s % T * P + s / T;
}

// conv1d + SiLU: n = order, B, T, P, D, K, extra, accumulate.  Rows of x are D + extra floats, of which D belong to it;
// accumulate: the gradient is added, as where the three directions meet
static void run_conv1d(Op *op, int backward) {
    int order = op->n[0], B = op->n[1], T = op->n[2], P = op->n[3], D = op->n[4], K = op->n[5], ldx = D + op->n[6], accumulate = op->n[7];
    OpTensor *x = op->x;
    conv1d_silu_forward(op->y.data, x[0].data, ldx, x[1].data, x[2].data, order, B, T, P, D, K);
    if (!backward) return;
    for (int row = 0; row < B * T * P && !accumulate; row++) fill(x[0].grad + row * ldx + D, (size_t)op->n[6], 0.0);
    conv1d_silu_backward(x[0].grad, ldx, x[1].grad, x[2].grad, op->y.grad, x[0].data, ldx, x[1].data, x[2].data,
                         order, B, T, P, D, K, accumulate);
}

static void oracle_conv1d(Op *op, float *y) {
    int order = op->n[0], B = op->n[1], T = op->n[2], P = op->n[3], D = op->n[4], K = op->n[5], ldx = D + op->n[6], L = T * P;
    for (int b = 0; b < B; b++) for (int s = 0; s < L; s++) for (int d = 0; d < D; d++) {
        double sum = (double)op->x[2].data[d];
        for (int k = 0; k < K; k++) {
            int before = s - (K - 1) + k;
            if (before >= 0) sum += (double)op->x[1].data[d * K + k] * (double)op->x[0].data[(b * L + visited(order, before, T, P)) * ldx + d];
        }
        y[(b * L + visited(order, s, T, P)) * D + d] = (float)(sum / (1 + exp(-sum)));
    }
}

static void make_conv1d(Op *op) {
    size_t tokens = (size_t)op->n[1] * (size_t)op->n[2] * (size_t)op->n[3], D = (size_t)op->n[4], K = (size_t)op->n[5];
    op_tensor(op, "x", op->n[7] ? PARAM : INPUT, tokens * (D + (size_t)op->n[6]))->channels_last = 1;
    op_tensor(op, "w", PARAM, D * K);
    op_tensor(op, "b", PARAM, D);
    op_output(op, tokens * D, 1);
    op->run = run_conv1d;
    op->oracle = oracle_conv1d;
}

// selective scan: n = order, B, T, P, D, N, R, accumulate.  Bt and Ct are columns R... and R+N... of rows of R + 2N floats (as W_x
// leaves them); accumulate: y starts at 0.5 and the op adds
static void run_scan(Op *op, int backward) {
    int order = op->n[0], B = op->n[1], T = op->n[2], P = op->n[3], D = op->n[4], N = op->n[5], R = op->n[6], ld = R + 2 * N;
    OpTensor *x = op->x;
    const float *u = x[0].data, *dt = x[1].data, *bc = x[2].data, *A_log = x[3].data, *D_skip = x[4].data;
    float *dbc = x[2].grad;
    float *states = backward ? op_work(op, 0, selective_scan_states(B, T, P, D, N)) : NULL;
    if (op->n[7]) fill(op->y.data, op->y.numel, 0.5);
    selective_scan_forward(op->y.data, states, u, dt, bc + R, bc + R + N, ld, A_log, D_skip, order, B, T, P, D, N, op->n[7]);
    if (!backward) return;
    for (size_t row = 0; row < (size_t)B * (size_t)T * (size_t)P; row++) fill(dbc + row * (size_t)ld, (size_t)R, 0.0);
    selective_scan_backward(x[0].grad, x[1].grad, dbc + R, dbc + R + N, ld, x[3].grad, x[4].grad, op->y.grad, u, dt, bc + R, bc + R + N, ld,
                            A_log, D_skip, states, order, B, T, P, D, N);
}

static void oracle_scan(Op *op, float *y) {
    int order = op->n[0], B = op->n[1], T = op->n[2], P = op->n[3], D = op->n[4], N = op->n[5], R = op->n[6], L = T * P;
    for (int b = 0; b < B; b++) for (int d = 0; d < D; d++) {
        double h[64] = { 0 };
        for (int s = 0; s < L; s++) {
            int row = b * L + visited(order, s, T, P);
            double u = (double)op->x[0].data[row * D + d], dt = (double)op->x[1].data[row * D + d], out = (double)op->x[4].data[d] * u;
            const float *Bt = op->x[2].data + row * (R + 2 * N) + R, *Ct = Bt + N;
            for (int n = 0; n < N; n++) {
                h[n] = exp(-dt * exp((double)op->x[3].data[d * N + n])) * h[n] + dt * u * (double)Bt[n];
                out += (double)Ct[n] * h[n];
            }
            y[row * D + d] = (float)(out + (op->n[7] ? 0.5 : 0));
        }
    }
}

static void make_scan(Op *op) {
    size_t tokens = (size_t)op->n[1] * (size_t)op->n[2] * (size_t)op->n[3], D = (size_t)op->n[4], N = (size_t)op->n[5];
    op_tensor(op, "u", INPUT, tokens * D);
    OpTensor *dt = op_tensor(op, "dt", INPUT, tokens * D);
    dt->offset = 0.3;                          // 0.02 ... 0.58: as after softplus, never negative
    dt->scale = 0.28;
    op_tensor(op, "bc", INPUT, tokens * ((size_t)op->n[6] + 2 * N));
    op_tensor(op, "A_log", PARAM, D * N)->offset = 0.5;
    op_tensor(op, "D", PARAM, D);
    op_output(op, tokens * D, 0);
    op->run = run_scan;
    op->oracle = oracle_scan;
}

// selective scan as the golden file has it: n = B, L, D, N, full. With delta's bias and softplus and the gate SiLU(z) around it (full),
// and A instead of A_log:  dA = dA_log / A
static void run_scan_golden(Op *op, int backward) {
    int B = op->n[0], L = op->n[1], D = op->n[2], N = op->n[3], full = op->n[4];
    size_t n = op->y.numel, d_count = (size_t)D;
    OpTensor *u = &op->x[0], *delta = &op->x[1], *A = &op->x[2], *Bt = &op->x[3], *Ct = &op->x[4];
    OpTensor *D_skip = full ? &op->x[5] : NULL, *z = full ? &op->x[6] : NULL, *bias = full ? &op->x[7] : NULL;
    float *dt = op_work(op, 0, n), *ddt = op_work(op, 1, n), *y = op_work(op, 2, n), *dy = op_work(op, 3, n);
    float *A_log = op_work(op, 4, A->numel), *zeros = op_work(op, 5, d_count), *dD = op_work(op, 6, d_count);
    float *states = op_work(op, 7, selective_scan_states(B, 1, L, D, N));
    fill(zeros, d_count, 0.0);
    fill(dD, d_count, 0.0);
    for (size_t i = 0; i < A->numel; i++) A_log[i] = (float)log(-(double)A->data[i]);
    for (size_t i = 0; i < n; i++) dt[i] = full ? softplus_simd(delta->data[i] + bias->data[i % d_count]) : delta->data[i];
    selective_scan_forward(y, states, u->data, dt, Bt->data, Ct->data, N, A_log, full ? D_skip->data : zeros, SCAN_FORWARD, B, 1, L, D, N, 0);
    settle();
    for (size_t i = 0; i < n; i++) op->y.data[i] = full ? y[i] * silu_simd(z->data[i]) : y[i];
    if (!backward) return;
    for (size_t i = 0; i < n; i++) {
        dy[i] = op->y.grad[i];
        if (!full) continue;
        float gate = sigmoid_simd(z->data[i]);
        dy[i] *= silu_simd(z->data[i]);
        z->grad[i] = op->y.grad[i] * y[i] * gate * (1 + z->data[i] * (1 - gate));
    }
    selective_scan_backward(u->grad, ddt, Bt->grad, Ct->grad, N, A->grad, full ? D_skip->grad : dD, dy, u->data, dt, Bt->data, Ct->data, N,
                            A_log, full ? D_skip->data : zeros, states, SCAN_FORWARD, B, 1, L, D, N);
    settle();
    for (size_t i = 0; i < A->numel; i++) A->grad[i] /= A->data[i];
    for (size_t i = 0; i < n; i++) {
        delta->grad[i] = full ? ddt[i] * sigmoid_simd(delta->data[i] + bias->data[i % d_count]) : ddt[i];
        if (full) bias->grad[i % d_count] += delta->grad[i];
    }
}

static void make_scan_golden(Op *op) {
    size_t tokens = (size_t)op->n[0] * (size_t)op->n[1], D = (size_t)op->n[2], N = (size_t)op->n[3];
    op_tensor(op, "u", INPUT, tokens * D)->channels_last = 1;
    op_tensor(op, "delta", INPUT, tokens * D)->channels_last = 1;
    op_tensor(op, "A", PARAM, D * N);
    op_tensor(op, "B", INPUT, tokens * N)->channels_last = 1;
    op_tensor(op, "C", INPUT, tokens * N)->channels_last = 1;
    if (op->n[4]) {
        op_tensor(op, "D", PARAM, D);
        op_tensor(op, "z", INPUT, tokens * D)->channels_last = 1;
        op_tensor(op, "delta_bias", PARAM, D);
    }
    op_output(op, tokens * D, 1);
    op->run = run_scan_golden;
}

// bilinear: n = N, H, W, OH, OW, C, accumulate (the output starts at 0.5 then)
static void run_bilinear(Op *op, int backward) {
    const int *n = op->n;
    if (n[6]) fill(op->y.data, op->y.numel, 0.5);
    bilinear_forward(op->y.data, op->x[0].data, n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
    if (backward) bilinear_backward(op->x[0].grad, op->y.grad, n[0], n[1], n[2], n[3], n[4], n[5]);
}

static void oracle_bilinear(Op *op, float *y) {
    int N = op->n[0], H = op->n[1], W = op->n[2], OH = op->n[3], OW = op->n[4], C = op->n[5];
    for (int f = 0; f < N; f++) for (int i = 0; i < OH; i++) for (int j = 0; j < OW; j++) for (int c = 0; c < C; c++) {
        double h = fmax((i + 0.5) * H / OH - 0.5, 0), w = fmax((j + 0.5) * W / OW - 0.5, 0);
        int h0 = (int)h, w0 = (int)w, h1 = h0 + 1 < H ? h0 + 1 : H - 1, w1 = w0 + 1 < W ? w0 + 1 : W - 1;
        const float *x = op->x[0].data + f * H * W * C + c;
        double top = (double)x[(h0 * W + w0) * C] * (1 - (w - w0)) + (double)x[(h0 * W + w1) * C] * (w - w0);
        double bottom = (double)x[(h1 * W + w0) * C] * (1 - (w - w0)) + (double)x[(h1 * W + w1) * C] * (w - w0);
        y[((f * OH + i) * OW + j) * C + c] = (float)(top * (1 - (h - h0)) + bottom * (h - h0) + (op->n[6] ? 0.5 : 0));
    }
}

static void make_bilinear(Op *op) {
    const int *n = op->n;
    op_tensor(op, "x", INPUT, (size_t)n[0] * (size_t)n[1] * (size_t)n[2] * (size_t)n[5])->channels_last = 1;
    op_output(op, (size_t)n[0] * (size_t)n[3] * (size_t)n[4] * (size_t)n[5], 1);
    op->run = run_bilinear;
    op->oracle = oracle_bilinear;
}

// The model's parameters whose names begin with `prefix` become the op's: the data are the model's own.
static void op_params(Op *op, const char *prefix) {
    Model *m = op->model;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *row = &m->tensors[i];
        size_t length = strlen(prefix);
        if (strncmp(row->name, prefix, length) != 0) continue;
        OpTensor *x = &op->x[op->count++];
        snprintf(x->name, sizeof x->name, "p.%s", row->name + length);
        x->kind = PARAM;
        x->scale = strstr(x->name, "norm") || row->shape[1] < 4 ? 1.0 : 0.5;
        x->numel = row->numel;
        x->data = m->params + row->offset;
        x->grad = m->grads + row->offset;
    }
}

// After a planning pass: the memory that it found
static void op_reserve(Op *op) {
    Model *m = op->model;
    size_t kept = m->kept.peak, scratch = m->scratch.peak;
    m->planning = 0;
    memset(&m->kept, 0, sizeof m->kept);
    memset(&m->scratch, 0, sizeof m->scratch);
    arena_reserve(&m->kept, kept);
    arena_reserve(&m->scratch, scratch);
}

// Sublayers of the model as train_vivim.c runs them: n = part, B, T, H, W, C, heads, sr, N, K, expand. The parts:
enum { PART_ATTENTION, PART_MIXFFN, PART_SEGFORMER_BLOCK, PART_MAMBA, PART_DSF, PART_MAMBA_LAYER };
// A model of one block and one Mamba layer is made for it. A block and a layer have two sublayers x + F(LN(x)), the others are
// one F alone.
static void part_forward(Op *op, int training, const float *x, float *y) {
    Model *m = op->model;
    Stage *st = &m->stages[0];
    int part = op->n[0];
    Sublayer *s = m->sublayers + (part == PART_MAMBA || part == PART_MAMBA_LAYER ? 2 : part == PART_MIXFFN ? 1 : part == PART_DSF ? 3 : 0);
    m->training = training;
    m->kept.used = m->scratch.used = 0;
    if (part == PART_SEGFORMER_BLOCK || part == PART_MAMBA_LAYER) {
        floatX *inp = (floatX *)arena_take(&m->kept, op->y.numel, sizeof(floatX));
        for (size_t i = 0; i < op->y.numel && !m->planning; i++) inp[i] = x[i];
        const floatX *out = sublayer_forward(m, st, s + 1, sublayer_forward(m, st, s, inp));
        settle();
        for (size_t i = 0; i < op->y.numel && !m->planning; i++) y[i] = out[i];
    } else if (part == PART_ATTENTION) {
        self_attention_forward(m, st, s, y, x, 0);
    } else if (part == PART_MAMBA) {
        st_mamba_forward(m, st, s, y, x, 0);
    } else {
        ffn_forward(m, st, s, y, x, 0);
    }
}

static void part_backward(Op *op, float *dx, const float *dy, const float *x) {
    Model *m = op->model;
    Stage *st = &m->stages[0];
    int part = op->n[0];
    Sublayer *s = m->sublayers + (part == PART_MAMBA || part == PART_MAMBA_LAYER ? 2 : part == PART_MIXFFN ? 1 : part == PART_DSF ? 3 : 0);
    m->scratch.used = 0;
    settle();
    if (part == PART_SEGFORMER_BLOCK || part == PART_MAMBA_LAYER) {
        if (!m->planning) memcpy(dx, dy, op->y.numel * sizeof(float));
        sublayer_backward(m, st, s + 1, dx);
        sublayer_backward(m, st, s, dx);
    } else if (part == PART_ATTENTION) {
        self_attention_backward(m, st, s, dx, dy, x);
    } else if (part == PART_MAMBA) {
        st_mamba_backward(m, st, s, dx, dy, x);
    } else {
        ffn_backward(m, st, s, dx, dy, x);
    }
}

static void run_part(Op *op, int backward) {
    poison_arenas(op->model);
    part_forward(op, backward, op->x[0].data, op->y.data);      // evaluation, where there is no backward pass, keeps nothing
    if (backward) part_backward(op, op->x[0].grad, op->y.grad, op->x[0].data);
}

static void make_part(Op *op) {
    static const char *const prefixes[6] = {   // of the tensor names that belong to each part; what follows is their name in the golden file
        "encoder.downsample_layers.block.0.0.attention.", "encoder.downsample_layers.block.0.0.mlp.", "encoder.downsample_layers.block.0.0.",
        "encoder.stages.0.0.0.mamba.", "encoder.stages.0.0.0.mlp.", "encoder.stages.0.0.0." };
    const int *n = op->n;
    Config config;
    memset(&config, 0, sizeof config);
    for (int i = 0; i < 4; i++) config.dims[i] = n[5];
    config.heads[0] = n[6];
    config.reductions[0] = n[7];
    config.depths[0] = config.mamba_depths[0] = 1;
    config.d_state = n[8];
    config.d_conv = n[9];
    config.expand = n[10];
    config.decoder_dim = 1;
    snprintf(config.scans, sizeof config.scans, "fbs");
    Model *m = op->model = (Model *)calloc(1, sizeof(Model));
    if (!m) exit(1);
    model_init(m, &config, 1);
    model_trainable(m);
    m->drop_path = 0;
    m->B = n[1];
    m->T = n[2];
    m->stages[0].H = n[3];
    m->stages[0].W = n[4];
    m->stages[0].P = n[3] * n[4];
    size_t numel = (size_t)n[1] * (size_t)n[2] * (size_t)m->stages[0].P * (size_t)n[5];
    op_tensor(op, "x", INPUT, numel)->channels_last = n[0] == PART_MAMBA_LAYER;
    op_output(op, numel, n[0] == PART_MAMBA_LAYER);
    op_params(op, prefixes[n[0]]);
    m->planning = 1;
    part_forward(op, 1, NULL, NULL);
    part_backward(op, NULL, NULL, NULL);
    part_forward(op, 0, NULL, NULL);
    op_reserve(op);
    op->run = run_part;
}

// boundary head: n = B, T, H, W, C, layers, all_frames, OH, OW. x (B*T,H,W,C); y (frames,OH,OW), of all frames or the target's. Its
// gradient is added to the one that x has from elsewhere, so x is treated as a parameter
static void run_edge_head(Op *op, int backward) {
    Model *m = op->model;
    poison_arenas(m);
    m->kept.used = m->scratch.used = 0;
    m->stages[0].out = in_x(op->x[0].data);
    edge_forward(m);
    settle();
    memcpy(op->y.data, m->edge_logits, op->y.numel * sizeof(float));
    if (backward) edge_backward(m, op->x[0].grad, op->y.grad);
}

static void oracle_edge_head(Op *op, float *y) {
    const int *n = op->n;
    int H = n[2], W = n[3], C = n[4], layers = n[5], frames = n[6] ? n[0] * n[1] : n[0];
    Op *plain = (Op *)calloc(1, sizeof(Op));
    if (!plain) exit(1);
    for (int j = 0; j < frames; j++) {
        float *x = op->x[0].data + (n[6] ? j : j * n[1] + n[1] / 2) * H * W * C;
        for (int i = 0; i < layers; i++) {
            int last = i == layers - 1, conv[11] = { 1, H, W, C, last ? 1 : C, last ? 1 : 3, 1, last ? 0 : 1 };
            float *h = tensor(op->t, (size_t)(H * W * C));
            memcpy(plain->n, conv, sizeof conv);
            plain->x[0].data = x;
            plain->x[1].data = op->x[1 + 2 * i].data;
            plain->x[2].data = op->x[2 + 2 * i].data;
            oracle_conv(plain, h);
            for (int k = 0; k < H * W * C && !last; k++) h[k] = (float)fmax((double)h[k], 0);
            x = h;
        }
        int up[11] = { 1, H, W, n[7], n[8], 1 };
        memcpy(plain->n, up, sizeof up);
        plain->x[0].data = x;
        oracle_bilinear(plain, y + j * n[7] * n[8]);
    }
    free(plain);
}

static void make_edge_head(Op *op) {
    const int *n = op->n;
    Config config;
    memset(&config, 0, sizeof config);
    for (int i = 0; i < 4; i++) config.dims[i] = n[4];
    config.decoder_dim = 1;
    config.edge_layers = n[5];
    Model *m = op->model = (Model *)calloc(1, sizeof(Model));
    if (!m) exit(1);
    model_init(m, &config, 1);
    model_trainable(m);
    m->training = 1;
    m->B = n[0];
    m->T = n[1];
    m->H = n[7];
    m->W = n[8];
    m->all_frames = n[6];
    m->stages[0].H = n[2];
    m->stages[0].W = n[3];
    m->stages[0].P = n[2] * n[3];
    op_tensor(op, "x", PARAM, (size_t)(n[0] * n[1] * n[2] * n[3] * n[4]));
    op_output(op, (size_t)((n[6] ? n[0] * n[1] : n[0]) * n[7] * n[8]), 0);
    op_params(op, "edge");
    m->planning = 1;
    edge_forward(m);
    edge_backward(m, NULL, NULL);
    op_reserve(op);
    op->run = run_edge_head;
    op->oracle = oracle_edge_head;
}

// The inverse-transform network F: n = pairs, q, kind. y (pairs,6) from pairs of patches, of which the first comes from the hash and the
// second is x. What backward computes:
enum { OF_SECOND, OF_SECOND_AND_PARAMS, OF_PARAMS };   // the first is F frozen, the last F in its own training
static void run_affine_net(Op *op, int backward) {
    const AffineNet *f = (const AffineNet *)(const void *)op->model;
    int n = op->n[0], q2 = op->n[1] * op->n[1], kind = op->n[2];
    float *inp = op_work(op, 0, (size_t)(2 * n * q2)), *h1 = op_work(op, 1, (size_t)(n * AFFINE_HIDDEN));
    float *h2 = op_work(op, 2, (size_t)(n * AFFINE_BOTTLENECK));
    for (int i = 0; i < n; i++) for (int k = 0; k < q2; k++) {
        float hash = (float)hash_u(fnv1a32("patch"), (uint64_t)(i * q2 + k));
        inp[2 * i * q2 + k] = hash;
        inp[(2 * i + 1) * q2 + k] = kind == OF_PARAMS ? -hash : op->x[0].data[i * q2 + k];
    }
    affine_net_forward(op->y.data, h1, h2, inp, f, n);
    if (backward) affine_net_backward(kind == OF_PARAMS ? NULL : op->x[0].grad, op->y.grad, h1, h2, inp, f, n);
    if ((f->net.grads != NULL) != (kind != OF_SECOND)) test_fail(op->t, "a frozen network has no gradients, another has them");
}

// One pair (first, second) of patches through F, by the plainest loops
static void plain_affine(double out[6], const AffineNet *f, const float *pair) {
    static double h[3][2 * 64 * 64 + AFFINE_HIDDEN];
    const Layer layers[3] = { f->fc1, f->fc2, f->fc3 };
    const int sizes[4] = { 2 * f->q * f->q, AFFINE_HIDDEN, AFFINE_BOTTLENECK, 6 };
    for (int k = 0; k < sizes[0]; k++) h[0][k] = (double)pair[k];
    for (int i = 0; i < 3; i++) for (int o = 0; o < sizes[i + 1]; o++) {
        double sum = (double)f->net.params[layers[i].bias + (size_t)o];
        for (int k = 0; k < sizes[i]; k++) sum += (double)f->net.params[layers[i].weight + (size_t)(o * sizes[i] + k)] * h[i][k];
        if (i == 2) out[o] = sum;
        else h[i + 1][o] = fmax(sum, 0);
    }
}

static void oracle_affine_net(Op *op, float *y) {
    for (int i = 0; i < op->n[0]; i++) {
        double out[6];
        plain_affine(out, (const AffineNet *)(const void *)op->model, op->work[0] + 2 * i * op->n[1] * op->n[1]);
        for (int k = 0; k < 6; k++) y[i * 6 + k] = (float)out[k];
    }
}

// The model of these ops is F's table of tensors, F's first member: so that op_free() frees F
static AffineNet *op_affine(Op *op, int q) {
    AffineNet *f = (AffineNet *)calloc(1, sizeof(AffineNet));
    if (!f) exit(1);
    hash_affine(f, q);
    op->model = &f->net;
    return f;
}

static void make_affine_net(Op *op) {
    size_t n = (size_t)op->n[0], q = (size_t)op->n[1];
    AffineNet *f = op_affine(op, op->n[1]);
    if (op->n[2] != OF_PARAMS) op_tensor(op, "second", INPUT, n * q * q);
    op_output(op, n * 6, 0);
    op->run = run_affine_net;
    op->oracle = oracle_affine_net;
    if (op->n[2] == OF_SECOND) return;
    model_trainable(&f->net);
    op_params(op, "affine.");
    for (int i = 0; i < op->count; i++) {      // values of order 1 in every layer
        if (strstr(op->x[i].name, "fc2.weight")) op->x[i].scale = 0.08;
    }
}

// L_affine's two means of norms: n = B, H, W, q. x are the boundary's logits, y the means for the target's and the first frame's boundary.
// The hash decides which patches have a boundary in both frames, one or none; every third clip has none at all. Pixels left over by the
// patches are all boundary: nothing may depend on them
static void affine_term_edges(Op *op, float *edge, float *first_edge) {
    int B = op->n[0], H = op->n[1], W = op->n[2], q = op->n[3];
    for (int b = 0; b < B; b++) for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
        int i = (b * H + y) * W + x, left_over = y >= H / q * q || x >= W / q * q;
        int which = b % 3 == 1 ? 0 : (int)(4 * (0.5 + 0.5 * hash_u(fnv1a32("which"), (uint64_t)((b * H + y / q) * W + x / q))));
        edge[i] = left_over || ((which & 1) && hash_u(fnv1a32("edge"), (uint64_t)i) > 0.3) ? 1 : 0;
        first_edge[i] = left_over || ((which & 2) && hash_u(fnv1a32("first"), (uint64_t)i) > 0.3) ? 1 : 0;
    }
}

static void run_affine_term(Op *op, int backward) {
    const AffineNet *f = (const AffineNet *)(const void *)op->model;
    int B = op->n[0], H = op->n[1], W = op->n[2];
    float *edge = op_work(op, 0, op->x[0].numel), *first_edge = op_work(op, 1, op->x[0].numel);
    double target, first;
    AffineTerm a;
    affine_term_edges(op, edge, first_edge);
    affine_forward(&target, &first, &a, op->x[0].data, edge, first_edge, f, B, H, W);
    settle();
    op->y.data[0] = (float)target;
    op->y.data[1] = (float)first;
    if (backward) affine_backward(op->x[0].grad, (double)op->y.grad[0], (double)op->y.grad[1], &a, f, B, H, W);
    affine_term_free(&a);
}

static void oracle_affine_term(Op *op, float *out) {
    const AffineNet *f = (const AffineNet *)(const void *)op->model;
    int B = op->n[0], H = op->n[1], W = op->n[2], q = op->n[3];
    double sum[2] = { 0, 0 };
    float *pair = tensor(op->t, (size_t)(2 * q * q));
    for (int b = 0; b < B; b++) {
        double of_clip[2] = { 0, 0 }, patches = 0;
        for (int row = 0; row + q <= H; row += q) for (int column = 0; column + q <= W; column += q) {
            double norm[2], boundary = 0;
            for (int k = 0; k < 2; k++) {      // the target's boundary, the first frame's
                double theta[6];
                for (int y = 0; y < q; y++) for (int x = 0; x < q; x++) {
                    int i = (b * H + row + y) * W + column + x;
                    pair[y * q + x] = op->work[k][i];
                    pair[q * q + y * q + x] = (float)(1 / (1 + exp(-(double)op->x[0].data[i])));
                    boundary += (double)op->work[k][i];
                }
                plain_affine(theta, f, pair);
                norm[k] = 0;
                for (int i = 0; i < 6; i++) norm[k] += theta[i] * theta[i];
            }
            if (boundary == 0) continue;
            patches++;
            for (int k = 0; k < 2; k++) of_clip[k] += sqrt(norm[k]);
        }
        for (int k = 0; k < 2 && patches > 0; k++) sum[k] += of_clip[k] / patches / B;
    }
    out[0] = (float)sum[0];
    out[1] = (float)sum[1];
}

static void make_affine_term(Op *op) {
    op_affine(op, op->n[3]);
    op_tensor(op, "logits", INPUT, (size_t)(op->n[0] * op->n[1] * op->n[2]))->scale = 3.0;
    op_output(op, 2, 0);
    op->run = run_affine_term;
    op->oracle = oracle_affine_term;
}

// ------------------------------------------------------------------------------------------------------------------
// 5. Tests of ops

typedef struct { const char *name; OpMaker *make; int n[11]; double forward, backward; } OpRow;

static void op_free(Op *op) {
    free_tensors(op->t);
    if (op->model) model_free(op->model);
    free(op->model);
    free(op);
}

// Against oracle, differences, itself: sizes 1, 2, odd, prime, a little more than a power of two. The limit is that of the oracle.
static const OpRow OP_ROWS[] = {
    { "linear", make_linear, { 1, 1, 1 }, 1e-6, 0 },
    { "linear", make_linear, { 2, 3, 5 }, 1e-6, 0 },
    { "linear", make_linear, { 7, 17, 33 }, 1e-6, 0 },
    { "linear", make_linear, { 37, 64, 19 }, 1e-6, 0 },
    { "linear", make_linear, { 131, 70, 65 }, 1e-6, 0 },
    { "layernorm", make_layernorm, { 3, 1, 0 }, 1e-6, 0 },
    { "layernorm", make_layernorm, { 1, 2, 0 }, 1e-6, 0 },
    { "layernorm", make_layernorm, { 5, 7, 1 }, 1e-6, 0 },
    { "layernorm", make_layernorm, { 9, 33, 2 }, 1e-6, 0 },
    { "layernorm", make_layernorm, { 131, 64, 0 }, 1e-6, 0 },
    { "gelu", make_gelu, { 1 }, 1e-6, 0 },
    { "gelu", make_gelu, { 17 }, 1e-6, 0 },
    { "gelu", make_gelu, { 1031 }, 1e-6, 0 },
    { "gate", make_gate, { 1, 1 }, 1e-6, 0 },
    { "gate", make_gate, { 3, 7 }, 1e-6, 0 },
    { "gate", make_gate, { 37, 66 }, 1e-6, 0 },
    { "dt", make_dt, { 1, 1, 1, 0 }, 1e-6, 0 },
    { "dt", make_dt, { 3, 7, 2, 5 }, 1e-6, 0 },
    { "dt", make_dt, { 37, 66, 5, 3 }, 1e-6, 0 },
    { "dt", make_dt, { 131, 132, 32, 8 }, 1e-6, 0 },
    { "dt", make_dt, { 2, 1024, 10, 6 }, 1e-6, 0 },
    { "dt", make_dt, { 8201, 129, 2, 1 }, 1e-6, 0 },  // more rows than a grid takes at once
    { "relu", make_relu, { 1 }, 1e-9, 0 },
    { "relu", make_relu, { 17 }, 1e-9, 0 },
    { "relu", make_relu, { 1031 }, 1e-9, 0 },
    { "dwconv", make_dwconv, { 1, 1, 1, 1, 1, 1 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 2, 1, 5, 4, 3, 1 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 3, 2, 2, 1, 17, 1 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 1, 7, 13, 40, 1 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 1, 1, 1, 2, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 2, 1, 3, 3, 16, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 2, 2, 1, 33, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 7, 3, 2, 5, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 2, 5, 4, 7, 20, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 3, 2, 6, 67, 3 }, 1e-6, 0 },
    { "dwconv", make_dwconv, { 1, 2, 67, 1, 3, 3 }, 1e-6, 0 },  // more rows than slices of them
    { "dwconv_gelu", make_dwconv, { 2, 1, 5, 4, 3, 1, 1 }, 1e-6, 0 },
    { "dwconv_gelu", make_dwconv, { 1, 2, 3, 11, 37, 1, 2 }, 1e-6, 0 },
    { "dwconv_gelu", make_dwconv, { 1, 3, 2, 6, 67, 3, 1 }, 1e-6, 0 },
    { "dwconv_gelu", make_dwconv, { 2, 5, 4, 7, 20, 3, 2 }, 1e-6, 0 },
    { "conv", make_conv, { 1, 1, 1, 1, 1, 3, 2, 1 }, 1e-6, 0 },
    { "conv", make_conv, { 2, 5, 7, 3, 4, 3, 2, 1 }, 1e-6, 0 },
    { "conv", make_conv, { 1, 9, 13, 3, 5, 7, 4, 3 }, 1e-6, 0 },
    { "conv", make_conv, { 2, 8, 8, 6, 6, 4, 4, 0 }, 1e-6, 0 },
    { "conv", make_conv, { 1, 9, 7, 5, 5, 2, 2, 0 }, 1e-6, 0 },
    { "conv", make_conv, { 1, 3, 3, 17, 19, 1, 1, 0 }, 1e-6, 0 },
    { "conv", make_conv, { 3, 6, 5, 4, 4, 3, 1, 1 }, 1e-6, 0 },
    { "attention", make_attention, { 1, 1, 1, 1, 1 }, 2e-6, 0 },
    { "attention", make_attention, { 2, 5, 3, 6, 3 }, 2e-6, 0 },
    { "attention", make_attention, { 1, 7, 7, 8, 1 }, 2e-6, 0 },
    { "attention", make_attention, { 3, 17, 5, 20, 5 }, 2e-6, 0 },
    { "attention", make_attention, { 2, 131, 16, 32, 2 }, 2e-6, 0 },
    { "attention", make_attention, { 1, 33, 33, 10, 2 }, 2e-6, 0 },
    { "attention", make_attention, { 2, 67, 65, 6, 2 }, 2e-6, 0 },
    { "attention", make_attention, { 1, 70, 130, 34, 1 }, 2e-6, 0 },
    { "attention", make_attention, { 1, 9, 257, 20, 1 }, 2e-6, 0 },
    { "conv1d", make_conv1d, { SCAN_FORWARD, 1, 1, 1, 1, 1, 0, 0 }, 1e-6, 0 },
    { "conv1d", make_conv1d, { SCAN_FORWARD, 2, 1, 2, 3, 4, 2, 0 }, 1e-6, 0 },
    { "conv1d", make_conv1d, { SCAN_BACKWARD, 2, 3, 5, 17, 4, 17, 1 }, 1e-6, 0 },
    { "conv1d", make_conv1d, { SCAN_SPATIAL, 2, 5, 7, 33, 3, 0, 1 }, 1e-6, 0 },
    { "conv1d", make_conv1d, { SCAN_SPATIAL, 1, 6, 43, 16, 4, 16, 0 }, 1e-6, 0 },
    { "scan", make_scan, { SCAN_FORWARD, 1, 1, 1, 1, 1, 0, 0 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_FORWARD, 2, 1, 2, 3, 16, 1, 0 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_FORWARD, 1, 3, 43, 16, 16, 1, 1 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_BACKWARD, 2, 5, 13, 17, 16, 2, 0 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_SPATIAL, 1, 3, 43, 33, 16, 3, 1 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_SPATIAL, 2, 2, 11, 8, 8, 1, 0 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_BACKWARD, 1, 4, 5, 7, 5, 0, 1 }, 2e-6, 0 },
    { "scan", make_scan, { SCAN_FORWARD, 1, 1, 257, 5, 20, 1, 0 }, 2e-6, 0 },
    { "bilinear", make_bilinear, { 1, 1, 1, 1, 1, 1, 0 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 2, 1, 1, 4, 6, 3, 1 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 2, 5, 7, 10, 14, 17, 0 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 1, 9, 12, 18, 23, 2, 1 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 1, 2, 3, 16, 24, 33, 0 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 1, 9, 12, 5, 6, 1, 0 }, 1e-6, 0 },
    { "bilinear", make_bilinear, { 3, 4, 5, 4, 5, 4, 1 }, 1e-6, 0 },
    { "attention_sublayer", make_part, { PART_ATTENTION, 1, 2, 5, 7, 6, 2, 2, 16, 4, 2 }, 0, 0 },
    { "ffn_sublayer", make_part, { PART_MIXFFN, 1, 2, 3, 5, 5, 1, 1, 16, 4, 2 }, 0, 0 },
    { "ffn_sublayer", make_part, { PART_DSF, 2, 3, 2, 5, 7, 1, 1, 16, 4, 2 }, 0, 0 },
    { "segformer_block", make_part, { PART_SEGFORMER_BLOCK, 2, 3, 5, 3, 4, 2, 1, 16, 4, 2 }, 0, 0 },
    { "mamba_sublayer", make_part, { PART_MAMBA, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 }, 0, 0 },
    { "mamba_sublayer", make_part, { PART_MAMBA, 2, 4, 3, 5, 17, 1, 1, 16, 4, 2 }, 0, 0 },
    { "mamba_layer", make_part, { PART_MAMBA_LAYER, 1, 5, 3, 3, 7, 1, 1, 5, 3, 3 }, 0, 0 },
    { "edge_head", make_edge_head, { 1, 1, 1, 1, 1, 1, 0, 1, 1 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 2, 3, 5, 3, 7, 1, 0, 19, 12 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 1, 2, 3, 4, 16, 1, 1, 12, 16 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 1, 1, 1, 1, 1, 3, 0, 2, 3 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 2, 2, 5, 7, 6, 3, 0, 20, 28 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 1, 5, 4, 3, 17, 3, 0, 13, 11 }, 1e-6, 0 },
    { "edge_head", make_edge_head, { 1, 3, 3, 2, 5, 3, 1, 12, 7 }, 1e-6, 0 },
    { "affine_net", make_affine_net, { 1, 1, OF_SECOND }, 3e-6, 0 },
    { "affine_net", make_affine_net, { 7, 3, OF_SECOND }, 3e-6, 0 },
    { "affine_net", make_affine_net, { 2, 5, OF_SECOND_AND_PARAMS }, 3e-6, 0 },
    { "affine_net", make_affine_net, { 13, 2, OF_SECOND_AND_PARAMS }, 3e-6, 0 },
    { "affine_net", make_affine_net, { 5, 3, OF_PARAMS }, 3e-6, 0 },
};
enum { OP_ROW_COUNT = sizeof OP_ROWS / sizeof OP_ROWS[0] };

static void test_op(Test *t, const void *row) {
    const char *name = ((const OpRow *)row)->name;
    for (int i = 0; i < OP_ROW_COUNT; i++) {
        if (strcmp(OP_ROWS[i].name, name) != 0) continue;
        Op *op = op_new(t, OP_ROWS[i].make, OP_ROWS[i].n);
        op_check(op, OP_ROWS[i].forward);
        op_free(op);
    }
}

// Every order with every length of clip: the spatial order is where a wrong T hides.
static void test_orders(Test *t, const void *row) {
    (void)row;
    for (int order = SCAN_FORWARD; order <= SCAN_SPATIAL; order++) {
        for (int T = 1; T <= 7; T++) {
            int conv1d[11] = { order, 1 + T % 2, T, 1 + T * 5 % 6, 3 + 4 * T, 4, T % 3, T % 2 };
            int scan[11] = { order, 1 + T % 2, T, 1 + T * 5 % 6, 3 + 4 * T, 16, 1, T % 2 };
            Op *op = op_new(t, make_conv1d, conv1d);
            op_check(op, 1e-6);
            op_free(op);
            op = op_new(t, make_scan, scan);
            op_check(op, 2e-6);
            op_free(op);
        }
    }
}

#if defined(VIVIM_CUDA) && !defined(NO_NCCL)
// NCCL starts and sums, as far as one GPU can show it: over one rank, which leaves what there was
static void test_nccl(Test *t, const void *row) {
    enum { N = 100003 };
    float *x = tensor(t, N), *before;
    (void)row;
    for (int i = 0; i < N; i++) x[i] = sinf((float)i);
    before = copy_of(t, x, N);
    start_nccl();
    ncclCheck(ncclAllReduce(x, x, N, ncclFloat, ncclSum, nccl_cuda, stream_cuda));
    settle();
    expect_bits(t, "the sum over one rank", x, before, N);
}
#endif

// Against PyTorch. The limits are about three times what float showed when it was right.
static const OpRow GOLDEN_ROWS[] = {
    { "scan_L37_N16", make_scan_golden, { 2, 37, 6, 16, 1 }, 3e-7, 1e-6 },
    { "scan_L37_N8", make_scan_golden, { 2, 37, 6, 8, 1 }, 5e-7, 1.5e-6 },
    { "scan_L257_N16", make_scan_golden, { 2, 257, 6, 16, 1 }, 5e-7, 1.5e-6 },
    { "scan_L257_N8", make_scan_golden, { 2, 257, 6, 8, 1 }, 4e-7, 2e-6 },
    { "scan_plain", make_scan_golden, { 1, 11, 3, 16, 0 }, 3e-7, 8e-7 },
    { "conv1d_silu_w4", make_conv1d, { SCAN_FORWARD, 2, 1, 19, 6, 4, 0, 0 }, 3e-7, 5e-7 },
    { "conv1d_silu_w3", make_conv1d, { SCAN_FORWARD, 2, 1, 19, 6, 3, 0, 0 }, 4e-7, 6e-7 },
    { "dwconv3d", make_dwconv, { 2, 3, 5, 4, 6, 3 }, 4e-7, 5e-7 },
    { "dwconv3d_t1", make_dwconv, { 1, 1, 2, 2, 4, 3 }, 3e-7, 3e-7 },
    { "dwconv2d", make_dwconv, { 2, 1, 7, 5, 6, 1 }, 3e-7, 4e-7 },
    { "attn_sr4", make_part, { PART_ATTENTION, 2, 1, 9, 12, 12, 3, 4, 16, 4, 2 }, 1e-6, 3e-6 },
    { "attn_sr2", make_part, { PART_ATTENTION, 2, 1, 6, 4, 12, 3, 2, 16, 4, 2 }, 6e-7, 2e-6 },
    { "attn_sr1", make_part, { PART_ATTENTION, 2, 1, 5, 7, 12, 3, 1, 16, 4, 2 }, 8e-7, 1.5e-6 },
    { "mixffn", make_part, { PART_MIXFFN, 2, 1, 5, 6, 8, 1, 1, 16, 4, 2 }, 8e-7, 1e-6 },
    { "seglayer", make_part, { PART_SEGFORMER_BLOCK, 2, 1, 6, 4, 12, 3, 2, 16, 4, 2 }, 5e-7, 1.5e-6 },
    { "mamba_d16_t3", make_part, { PART_MAMBA, 2, 3, 4, 5, 16, 1, 1, 16, 4, 2 }, 1e-6, 4e-6 },
    { "mamba_d40_t5", make_part, { PART_MAMBA, 2, 5, 2, 3, 40, 1, 1, 16, 4, 2 }, 1.5e-6, 3e-6 },
    { "mamba_d8_t2_n8_c3_e1", make_part, { PART_MAMBA, 2, 2, 3, 3, 8, 1, 1, 8, 3, 1 }, 6e-7, 4e-6 },
    { "mamba_mlp", make_part, { PART_DSF, 2, 3, 4, 5, 8, 1, 1, 16, 4, 2 }, 8e-7, 1e-6 },
    { "mambalayer_d16", make_part, { PART_MAMBA_LAYER, 2, 3, 4, 5, 16, 1, 1, 16, 4, 2 }, 6e-7, 4e-6 },
    { "patch7s4", make_patch, { 2, 18, 23, 3, 10, 7, 4, 3 }, 1.5e-6, 8e-7 },
    { "patch3s2", make_patch, { 2, 9, 12, 6, 10, 3, 2, 1 }, 6e-7, 1e-6 },
    { "layernorm", make_layernorm, { 35, 24, 0 }, 4e-7, 1e-6 },
    { "gelu", make_gelu, { 209 }, 3e-7, 3e-7 },
    { "bilinear_x2", make_bilinear, { 2, 5, 7, 10, 14, 3 }, 3e-7, 3e-7 },
    { "bilinear_x4", make_bilinear, { 2, 4, 3, 16, 12, 3 }, 3e-7, 4e-7 },
    { "bilinear_x8", make_bilinear, { 2, 3, 2, 24, 16, 3 }, 3e-7, 4e-7 },
    { "bilinear_odd1", make_bilinear, { 2, 9, 12, 18, 23, 3 }, 2e-6, 2e-6 },
    { "bilinear_odd2", make_bilinear, { 2, 3, 3, 18, 23, 3 }, 6e-7, 8e-7 },
    { "bilinear_odd3", make_bilinear, { 2, 18, 23, 70, 90, 3 }, 1e-5, 8e-6 },
    { "bilinear_down", make_bilinear, { 2, 9, 12, 5, 6, 3 }, 2e-6, 3e-6 },
    { "bilinear_same", make_bilinear, { 2, 4, 5, 4, 5, 3 }, 3e-7, 3e-7 },
    { "bilinear_one", make_bilinear, { 2, 1, 1, 4, 6, 3 }, 3e-7, 3e-7 },
};
enum { GOLDEN_ROW_COUNT = sizeof GOLDEN_ROWS / sizeof GOLDEN_ROWS[0] };

static void test_golden_op(Test *t, const void *data) {
    const OpRow *row = (const OpRow *)data;
    Op *op = op_new(t, row->make, row->n);
    op_golden(op, row->name, row->forward, row->backward);
    op_free(op);
}

// C = [C +] op(A) op(B) + bias, both transposes, with rows longer than the matrix, in parallel and on one thread
static void matmul_case(Test *t, int M, int N, int K, int transA, int transB, int with_bias, int accumulate) {
    char what[160];
    int lda = (transA ? M : K) + 3, ldb = (transB ? K : N) + 1, ldc = N + 2;
    size_t sizeA = (size_t)(transA ? K : M) * (size_t)lda, sizeB = (size_t)(transB ? N : K) * (size_t)ldb, sizeC = (size_t)M * (size_t)ldc;
    float *A = tensor(t, sizeA), *B = tensor(t, sizeB), *bias = tensor(t, (size_t)N), *out[4], *expected = tensor(t, sizeC);
    for (size_t i = 0; i < sizeA; i++) A[i] = (float)hash_u(fnv1a32("A"), i);
    for (size_t i = 0; i < sizeB; i++) B[i] = (float)hash_u(fnv1a32("B"), i);
    for (int i = 0; i < N; i++) bias[i] = (float)hash_u(fnv1a32("bias"), (uint64_t)i);
    for (int i = 0; i < 4; i++) {              // one, four and five threads, serial; columns N.. belong to someone else and stay 7
        out[i] = tensor(t, sizeC);
        if (accumulate) fill(out[i], sizeC, 0.25);
        for (int m = 0; m < M; m++) fill(out[i] + (size_t)m * (size_t)ldc + N, (size_t)(ldc - N), 7);
    }
    for (int m = 0; m < M; m++) for (int n = 0; n < ldc; n++) {
        double sum = n >= N ? 7 : (with_bias ? (double)bias[n] : 0) + (accumulate ? 0.25 : 0);
        for (int k = 0; k < K && n < N; k++) {
            sum += (double)A[transA ? k * lda + m : m * lda + k] * (double)B[transB ? n * ldb + k : k * ldb + n];
        }
        expected[m * ldc + n] = (float)sum;
    }
    static const int threads[3] = { 1, 4, 5 };
    for (int i = 0; i < 3; i++) {
        set_threads(threads[i]);
        matmul(out[i], ldc, A, lda, transA, B, ldb, transB, with_bias ? bias : NULL, M, N, K, accumulate);
    }
    settle();
    matmul_serial(out[3], ldc, A, lda, transA, B, ldb, transB, with_bias ? bias : NULL, M, N, K, accumulate);
    snprintf(what, sizeof what, "M %d N %d K %d%s%s%s%s", M, N, K, transA ? " At" : "", transB ? " Bt" : "", with_bias ? " bias" : "",
             accumulate ? " +=" : "");
    expect_close(t, what, out[0], expected, sizeC, ORACLE_LIMIT(3e-6));
    expect_bits(t, what, out[1], out[0], sizeC);
    expect_bits(t, what, out[2], out[0], sizeC);
    expect_close(t, what, out[3], expected, sizeC, ORACLE_LIMIT(3e-6));
    check_guards(t, what);
    free_tensors(t);
}

static void test_matmul(Test *t, const void *row) {
    static const int sizes[][3] = { { 1, 1, 1 }, { 1, 2, 3 }, { 2, 1, 7 }, { 3, 5, 1 }, { 5, 3, 2 }, { 13, 17, 19 }, { 16, 16, 16 }, { 6, 64, 64 },
                                    { 33, 31, 65 }, { 97, 101, 103 }, { 1, 257, 64 }, { 257, 1, 64 }, { 64, 64, 521 }, { 150, 130, 300 },
                                    { 17, 13, 2311 }, { 211, 523, 9 },    // a sum in slices; more than one block of rows, of columns
                                    { 131, 1061, 67 }, { 37, 277, 1031 },                   // columns of its own for each thread; for one thread, not for five
                                    { 11, 1297, 97 } };                                     // cut where one thread has whole tiles
    (void)row;
    for (int i = 0; i < (int)(sizeof sizes / sizeof sizes[0]); i++) {
        for (int kind = 0; kind < 16; kind++) {
            matmul_case(t, sizes[i][0], sizes[i][1], sizes[i][2], kind & 1, kind >> 1 & 1, kind >> 2 & 1, kind >> 3 & 1);
        }
    }
}

// How many threads come next, while other programs come and go; bits and counts are other tests' matter
static void test_threads_next(Test *t, const void *row) {
    static const struct { double waiting; int times, expected; } steps[] = {
        { 0.0, 20, 8 }, { 0.3, 20, 8 },        // alone, or nearly
        { 0.84, 1, 7 }, { 0.02, 7, 7 },        // one program came: a thread less, for 8 measurements
        { 0.02, 1, 8 }, { 0.84, 1, 7 },        // it is still there: the next trial comes after 16
        { 0.02, 15, 7 }, { 0.02, 1, 8 }, { 3.4, 1, 5 },  // three and more at once: after 32
        { 0.02, 31, 5 }, { 0.02, 1, 6 }, { 0.0, 31, 6 }, { 0.0, 1, 7 }, { 0.0, 32, 8 }, { 0.0, 50, 8 },  // all are gone
        { 1.0, 1, 7 }, { 0.0, 7, 7 }, { 0.0, 1, 8 },     // and the patience is forgotten
        { 100.0, 1, 1 }, { 1.0, 30, 1 }, { 0.0, 15, 1 }, { 0.0, 1, 2 },  // one thread stays
    };
    Crowding c = { 8, 0, 8 };
    int threads = 8;
    (void)row;
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        char what[80];
        for (int n = 0; n < steps[i].times; n++) threads = threads_next(&c, threads, steps[i].waiting);
        snprintf(what, sizeof what, "line %zu: %d threads, expected %d", i, threads, steps[i].expected);
        expect(t, threads == steps[i].expected, what);
    }
    c.most = threads = 2, c.patience = 8, c.quiet = 0;
    for (int trial = 0, patience = 16; trial < 40; trial++, patience = patience < 256 ? 2 * patience : 256) {
        int measurements = 0;                  // beside a program that is always there: ever rarer trials, up to one in 256
        threads = threads_next(&c, threads, 1.0);
        while (threads == 1 && measurements < 999) threads = threads_next(&c, threads, 0.0), measurements++;
        expect(t, measurements == patience, "trials become rarer, but do not end");
    }
}

// The functions that replace libm's in inner loops, on a fine grid and at the ends of their range
static void test_elementary(Test *t, const void *row) {
    double worst[6] = { 0, 0, 0, 0, 0, 0 };
    (void)row;
    for (int i = -30000; i <= 30000; i++) {    // -59.8 ... 59.8: beyond, exp_simd stays where it is
        float x = (float)(i / 502.0);
        double X = (double)x, exact[6], sigmoid = 1 / (1 + exp(-X));
        float ours[6];
        exact[0] = exp(X);
        exact[1] = exp2(X);
        exact[2] = sigmoid;
        exact[3] = X * sigmoid;
        exact[4] = X > 20 ? X : log1p(exp(X));
        exact[5] = X * 0.5 * erfc(-X / sqrt(2.0));
        ours[0] = exp_simd(x);
        ours[1] = exp2_simd(x);
        ours[2] = sigmoid_simd(x);
        ours[3] = silu_simd(x);
        ours[4] = softplus_simd(x);
        ours[5] = gelu_simd(x);
        for (int f = 0; f < 6; f++) {          // relative; of results below 1e-3 (gelu: 0.1, it is 1 - something there) absolute
            double error = fabs((double)ours[f] - exact[f]) / fmax(fabs(exact[f]), f < 2 ? 0 : f < 5 ? 1e-3 : 0.1);
            if (!(error <= worst[f])) worst[f] = error;
        }
    }
    static const char *const names[6] = { "exp", "exp2", "sigmoid", "silu", "softplus", "gelu" };
    for (int f = 0; f < 6; f++) expect_error(t, names[f], worst[f], ORACLE_LIMIT(5e-7));
    expect(t, exp_simd(0.0f) == 1.0f && exp2_simd(0.0f) == 1.0f, "exp(0) is exactly 1");
    expect(t, exp_simd(-1e4f) >= 0.0f && exp_simd(-1e4f) < 1e-25f, "exp(-10000) is 0, or nearly");
    expect(t, sigmoid_simd(-1e4f) >= 0.0f && sigmoid_simd(-1e4f) < 1e-25f && sigmoid_simd(1e4f) == 1.0f, "sigmoid at the ends");
    expect(t, fabsf(silu_simd(-1e4f)) < 1e-20f && silu_simd(1e4f) == 1e4f, "silu at the ends");
    expect(t, softplus_simd(-1e4f) >= 0.0f && softplus_simd(-1e4f) < 1e-25f && fabsf(softplus_simd(25.0f) - 25.0f) < 1e-6f, "softplus at the ends");
    expect(t, fabsf(gelu_simd(-1e4f)) < 1e-15f && gelu_simd(1e4f) == 1e4f, "gelu at the ends");
    float nan = (float)NAN;
    expect(t, isnan(exp_simd(nan)) && isnan(sigmoid_simd(nan)) && isnan(softplus_simd(nan)) && isnan(gelu_simd(nan)), "NaN stays NaN");
}

// silu and softplus against PyTorch, with their derivatives as the gate and dt use them
static void test_golden_elementary(Test *t, const void *row) {
    (void)row;
    for (int f = 0; f < 2; f++) {
        const char *name = f ? "softplus" : "silu";
        size_t n = f ? 214 : 209;
        float *x = golden_op(t, name, "in.", "x", n, 0), *out = golden_op(t, name, "out", "", n, 0), *gy = golden_op(t, name, "gy", "", n, 0);
        float *gx = golden_op(t, name, "g.", "x", n, 0), *y = tensor(t, n), *dx = tensor(t, n);
        if (!x || !out || !gy || !gx) return;
        for (size_t i = 0; i < n; i++) {
            float s = sigmoid_simd(x[i]);
            y[i] = f ? softplus_simd(x[i]) : silu_simd(x[i]);
            dx[i] = gy[i] * (f == 0 ? s * (1 + x[i] * (1 - s)) : x[i] > 20 ? 1 : s);
        }
        expect_close(t, name, y, out, n, LIMIT(5e-7));
        expect_close(t, name, dx, gx, n, LIMIT(5e-7));
    }
}

// ------------------------------------------------------------------------------------------------------------------
// 6. Losses, optimiser, training

// segmentation loss as an op with one output: n = B, H, W, weighted. Clip 0 has an ellipse, 1 nothing, 2 everything, 3 grey values, ...
static void segloss_mask(float *mask, int B, int H, int W) {
    for (int b = 0; b < B; b++) for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
        double dy = (y + 0.5) / H - 0.4, dx = (x + 0.5) / W - 0.6, grey = 0.5 + 0.5 * hash_u(fnv1a32("grey"), (uint64_t)(b * H * W + y * W + x));
        mask[(b * H + y) * W + x] = (float)(b % 4 == 0 ? dy * dy + dx * dx < 0.06 : b % 4 == 1 ? 0 : b % 4 == 2 ? 1 : grey);
    }
}

static void run_segloss(Op *op, int backward) {
    int B = op->n[0], H = op->n[1], W = op->n[2], weighted = op->n[3];
    float *weight = op_work(op, 0, op->x[0].numel), *mask = op_work(op, 1, op->x[0].numel);
    double *sums = (double *)malloc_check(3 * (size_t)B * sizeof(double)), loss;
    segloss_mask(mask, B, H, W);
    loss = segloss_forward(weight, sums, op->x[0].data, mask, B, H, W, weighted);
    if (backward) segloss_backward(op->x[0].grad, weight, sums, op->x[0].data, mask, B, H, W, weighted);
    settle();
    op->y.data[0] = (float)loss;
    for (size_t i = 0; i < op->x[0].numel && backward; i++) op->x[0].grad[i] *= op->y.grad[0];
    free(sums);
}

static void oracle_segloss(Op *op, float *out) {
    int B = op->n[0], H = op->n[1], W = op->n[2], weighted = op->n[3];
    double total = 0;
    float *mask = tensor(op->t, op->x[0].numel);
    segloss_mask(mask, B, H, W);
    for (int b = 0; b < B; b++) {
        const float *m = mask + b * H * W, *logits = op->x[0].data + b * H * W;
        double bce = 0, wbce = 0, weights = 0, inter = 0, both = 0;
        for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
            double pool = 0, s = (double)logits[y * W + x], mi = (double)m[y * W + x], p = 1 / (1 + exp(-s));
            for (int i = -15; i <= 15; i++) for (int j = -15; j <= 15; j++) {
                if (y + i >= 0 && y + i < H && x + j >= 0 && x + j < W) pool += (double)m[(y + i) * W + x + j] / 961;
            }
            double w = 1 + 5 * fabs(pool - mi), e = fmax(s, 0) - s * mi + log1p(exp(-fabs(s)));
            bce += e / (H * W);
            wbce += w * e;
            weights += w;
            inter += w * p * mi;
            both += w * (p + mi);
        }
        total += (weighted ? wbce / weights : bce) + 1 - (inter + 1) / (both - inter + 1);
    }
    out[0] = (float)(total / B);
}

static void make_segloss(Op *op) {
    op_tensor(op, "pred", INPUT, (size_t)op->n[0] * (size_t)op->n[1] * (size_t)op->n[2])->scale = 8.0;
    op_output(op, 1, 0);
    op->run = run_segloss;
    op->oracle = oracle_segloss;
}

static void test_segloss(Test *t, const void *row) {
    static const int sizes[][11] = { { 1, 1, 1, 0 }, { 4, 7, 5, 0 }, { 4, 7, 5, 1 }, { 5, 37, 41, 0 }, { 5, 41, 37, 1 } };
    (void)row;
    for (int i = 0; i < 5; i++) {
        Op *op = op_new(t, make_segloss, sizes[i]);
        op_check(op, 1e-6);
        op_free(op);
    }
}

static void test_golden_segloss(Test *t, const void *row) {
    enum { B = 5, H = 48, W = 40, N = B * H * W };
    static const char *const names[4] = { "loss_a", "loss_b", "loss_a_soft", "loss_b_soft" };
    double *sums = (double *)malloc_check(3 * B * sizeof(double));
    (void)row;
    for (int i = 0; i < 4; i++) {
        const char *kind = i < 2 ? "loss" : "loss_soft";
        float *mask = golden_op(t, kind, "target", "", N, 0), *expected_weight = golden_op(t, kind, "weit", "", N, 0);
        float *pred = golden_op(t, names[i], "in.", "pred", N, 0), *out = golden_op(t, names[i], "out", "", 1, 0);
        float *gy = golden_op(t, names[i], "gy", "", 1, 0), *expected = golden_op(t, names[i], "g.", "pred", N, 0);
        float *weight = tensor(t, N), *dpred = tensor(t, N), loss;
        if (!mask || !expected_weight || !pred || !out || !gy || !expected) break;
        loss = (float)segloss_forward(weight, sums, pred, mask, B, H, W, i & 1);
        segloss_backward(dpred, weight, sums, pred, mask, B, H, W, i & 1);
        settle();
        for (int k = 0; k < N; k++) dpred[k] *= gy[0];
        check_guards(t, names[i]);
        expect_close(t, "weight", weight, expected_weight, N, LIMIT(3e-7));
        expect_close(t, names[i], &loss, out, 1, LIMIT(5e-7));
        expect_close(t, names[i], dpred, expected, N, LIMIT(1e-6));
    }
    free(sums);
}

// The boundary of masks of all kinds against Sobel's two sums of 3x3, as written, with the border repeated
static void sobel_case(Test *t, int N, int H, int W) {
    static const int kernel[3][3] = { { -1, 0, 1 }, { -2, 0, 2 }, { -1, 0, 1 } };      // Gx; Gy is its transpose
    char what[96];
    size_t n = (size_t)(N * H * W);
    float *mask = tensor(t, n), *expected = tensor(t, n), *edge[2] = { tensor(t, n), tensor(t, n) };
    for (int f = 0; f < N; f++) for (int k = 0; k < H * W; k++) {
        double u = hash_u(fnv1a32("mask"), (uint64_t)(f * H * W + k)), y = k / W + 0.5 - H / 2.0, x = k % W + 0.5 - W / 2.0;
        double grey = fabs(u) < 0.2 ? 0.5 : 0.5 + 0.5 * u;             // exactly 0.5 is not object
        mask[f * H * W + k] = (float)(f % 6 == 0 ? grey : f % 6 == 1 ? u > 0.8 : f % 6 == 2 ? u > -0.8 : f % 6 == 3 ? (k / W + k % W) % 2
                                      : f % 6 == 4 ? y * y + x * x < H * W / 9.0 : 1);
    }
    for (int f = 0; f < N; f++) for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
        int Gx = 0, Gy = 0;
        for (int i = 0; i < 3; i++) for (int j = 0; j < 3; j++) {
            int yi = y + i - 1, xj = x + j - 1;
            yi = yi < 0 ? 0 : yi >= H ? H - 1 : yi;
            xj = xj < 0 ? 0 : xj >= W ? W - 1 : xj;
            int object = mask[(f * H + yi) * W + xj] > 0.5f;
            Gx += kernel[i][j] * object;
            Gy += kernel[j][i] * object;
        }
        expected[(f * H + y) * W + x] = abs(Gx) + abs(Gy) > 0;
    }
    for (int run = 0; run < 2; run++) {
        set_threads(run ? 4 : 1);
        sobel_edges(edge[run], mask, N, H, W);
        snprintf(what, sizeof what, "edges of %d masks of %dx%d, %s", N, H, W, run ? "four threads" : "one thread");
        expect_bits(t, what, edge[run], expected, n);
        check_guards(t, what);
    }
    free_tensors(t);
}

static void test_sobel(Test *t, const void *row) {
    static const int sizes[][3] = { { 6, 1, 1 }, { 6, 1, 7 }, { 6, 7, 1 }, { 6, 2, 2 }, { 12, 3, 2 }, { 6, 5, 16 }, { 7, 13, 11 }, { 13, 31, 33 } };
    (void)row;
    for (int i = 0; i < (int)(sizeof sizes / sizeof sizes[0]); i++) sobel_case(t, sizes[i][0], sizes[i][1], sizes[i][2]);
}

// L_bce of the boundary: n = elements, percent of them that are edge
static void run_edgeloss(Op *op, int backward) {
    size_t n = op->x[0].numel;
    float *edge = op_work(op, 0, n);
    double on = NAN, loss;
    for (size_t i = 0; i < n; i++) edge[i] = 50 + 50 * hash_u(fnv1a32("edge"), i) < op->n[1];
    loss = edgeloss_forward(&on, op->x[0].data, edge, n);
    if (backward) edgeloss_backward(op->x[0].grad, on, op->x[0].data, edge, n);
    settle();
    op->y.data[0] = (float)loss;
    for (size_t i = 0; i < n && backward; i++) op->x[0].grad[i] *= op->y.grad[0];
}

static void oracle_edgeloss(Op *op, float *out) {
    double n = (double)op->x[0].numel, n1 = 0, sum = 0;
    for (size_t i = 0; i < op->x[0].numel; i++) n1 += (double)op->work[0][i];
    for (size_t i = 0; i < op->x[0].numel; i++) {
        double p = 1 / (1 + exp(-(double)op->x[0].data[i])), edge = (double)op->work[0][i];
        sum -= edge * (n - n1) / n * log(p) + (1 - edge) * n1 / n * log(1 - p);
    }
    out[0] = (float)(sum / n);
}

static void make_edgeloss(Op *op) {
    op_tensor(op, "logits", INPUT, (size_t)op->n[0])->scale = 8.0;
    op_output(op, 1, 0);
    op->run = run_edgeloss;
    op->oracle = oracle_edgeloss;
}

static void test_edgeloss(Test *t, const void *row) {
    static const int sizes[][11] = { { 1, 0 }, { 1, 100 }, { 2, 50 }, { 17, 30 }, { 31, 0 }, { 257, 100 }, { 1031, 10 }, { 3 * 37 * 41, 4 } };
    (void)row;
    for (int i = 0; i < 8; i++) {
        Op *op = op_new(t, make_edgeloss, sizes[i]);
        op_check(op, 1e-6);
        if (sizes[i][1] % 100 == 0)            // one class only: its weight is 0
            expect(t, op->y.data[0] == 0 && largest(op->x[0].grad, op->x[0].numel) == 0, "loss and gradient of one class are 0");
        else expect(t, largest(op->x[0].grad, op->x[0].numel) > 0, "there is a gradient");
        op_free(op);
    }
}

static void test_golden_edgeloss(Test *t, const void *row) {
    enum { N = 3 * 20 * 24 };
    static const char *const names[2] = { "bce2d", "bce2d_empty" };
    (void)row;
    for (int i = 0; i < 2; i++) {
        float *target = golden_op(t, names[i], "target", "", N, 0), *logits = golden_op(t, names[i], "in.", "edge", N, 0);
        float *out = golden_op(t, names[i], "out", "", 1, 0), *gy = golden_op(t, names[i], "gy", "", 1, 0);
        float *expected = golden_op(t, names[i], "g.", "edge", N, 0), *dlogits = tensor(t, N);
        double on;
        if (!target || !logits || !out || !gy || !expected) return;
        float loss = (float)edgeloss_forward(&on, logits, target, N);
        edgeloss_backward(dlogits, on, logits, target, N);
        settle();
        for (int k = 0; k < N; k++) dlogits[k] *= gy[0];
        check_guards(t, names[i]);
        expect_close(t, names[i], &loss, out, 1, LIMIT(5e-7));
        expect_close(t, names[i], dlogits, expected, N, LIMIT(1e-6));
    }
}

// L_affine with left-over pixels, clips and patches without a boundary, patches of one pixel; both terms, then each for itself
static void test_affine_term(Test *t, const void *row) {
    static const int sizes[][11] = { { 1, 1, 1, 1 }, { 4, 5, 3, 1 }, { 3, 7, 11, 3 }, { 2, 13, 6, 5 }, { 7, 10, 5, 5 }, { 1, 9, 16, 8 } };
    (void)row;
    for (int i = 0; i < (int)(sizeof sizes / sizeof sizes[0]); i++) {
        Op *op = op_new(t, make_affine_term, sizes[i]);
        AffineNet *f = (AffineNet *)(void *)op->model;
        float *params = copy_of(t, f->net.params, f->net.num_params), *dlogits = op->x[0].grad;
        op_check(op, 1e-6);
        for (int term = 0; term < 2; term++) {
            op->y.grad[term] = 1;
            op->y.grad[1 - term] = 0;
            op_run(op, 1);
            if (op->y.data[term] != 0) expect(t, largest(dlogits, op->x[0].numel) > 1e-4, "there is a gradient");
            if (IS_DOUBLE) op_differences(op);
        }
        expect_bits(t, "F is frozen", f->net.params, params, f->net.num_params);
        // a network that moves nothing: ||0|| has the gradient 0, not NaN
        memset(f->net.params + f->fc3.weight, 0, sizeof(float) * 6 * AFFINE_BOTTLENECK);
        memset(f->net.params + f->fc3.bias, 0, sizeof(float) * 6);
        op_run(op, 1);
        expect(t, op->y.data[0] == 0 && op->y.data[1] == 0, "no map, no loss");
        expect(t, largest(dlogits, op->x[0].numel) == 0, "no map, no gradient");
        op_free(op);
    }
}

// The boundary file: masks that run out of the image, are empty or full; clips and patches without a boundary; left-over pixels
static const SafeTensor *boundary_tensor(Test *t, const SafeTensors *st, const char *name, size_t n, float *out) {
    const SafeTensor *golden = safetensors_find(st, name);
    if (!golden || golden->numel != n) test_fail(t, "%s is not in the golden file", name);
    else if (out) golden_copy(out, golden, 0);
    return golden && golden->numel == n ? golden : NULL;
}

static void test_boundary(Test *t, const void *row) {
    enum { B = 3, H = 50, W = 72, Q = 16, PIXELS = H * W, N = B * PIXELS };
    static const char *const masks[10] = { "inside", "border", "corner", "last_row", "pixel", "hole", "stripe", "noise", "empty", "full" };
    char path[1024], err[512], name[64];
    SafeTensors st;
    (void)row;
    snprintf(path, sizeof path, "%s/boundary.safetensors", t->golden);
    if (safetensors_open(&st, path, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.250s", err);
        return;
    }
    float *mask = tensor(t, PIXELS), *expected_edge = tensor(t, PIXELS), *edge = tensor(t, PIXELS);
    for (int i = 0; i < 10; i++) {
        snprintf(name, sizeof name, "sobel.%s.mask", masks[i]);
        const SafeTensor *golden = boundary_tensor(t, &st, name, PIXELS, mask);
        snprintf(name, sizeof name, "sobel.%s.edge", masks[i]);
        if (!golden || !boundary_tensor(t, &st, name, PIXELS, expected_edge)) continue;
        sobel_edges(edge, mask, 1, H, W);
        expect_bits(t, name, edge, expected_edge, PIXELS);
    }

    float *logits = tensor(t, N), *target = tensor(t, N), *first = tensor(t, N), *expected = tensor(t, N), *dlogits = tensor(t, N);
    double of_target, of_first, on, loss;
    int kept[B] = { 0, 0, 0 };
    AffineNet f;
    AffineTerm a;
    const SafeTensor *patches = boundary_tensor(t, &st, "affine.kept", B, NULL);
    int complete = patches && boundary_tensor(t, &st, "affine.logits", N, logits) && boundary_tensor(t, &st, "affine.target", N, target)
                && boundary_tensor(t, &st, "affine.first", N, first) && boundary_tensor(t, &st, "affine.grad_logits", N, expected);
    if (complete) {
        hash_affine(&f, Q);
        affine_forward(&of_target, &of_first, &a, logits, target, first, &f, B, H, W);
        settle();
        for (int i = 0, per_clip = (H / Q) * (W / Q); i < B * per_clip; i++) kept[i / per_clip] += a.weight[i] > 0;
        for (int b = 0; b < B; b++) expect(t, kept[b] == (int)safetensors_value(patches, (size_t)b), "as many patches are kept");
        affine_backward(dlogits, AFFINE_TARGET, AFFINE_FIRST, &a, &f, B, H, W);
        affine_term_free(&a);
        affine_free(&f);
        check_guards(t, "affine_backward");
        compare_loss(t, &st, "loss.affine_t", of_target);
        compare_loss(t, &st, "loss.affine_1", of_first);
        compare_loss(t, &st, "loss.affine", AFFINE_TARGET * of_target + AFFINE_FIRST * of_first);
#if defined(ROUNDS_TO_BF16) && defined(VIVIM_AMX)
        t->rounded = ROUNDED_LAYERS;           // through F, forward and back: six products of rounded factors
#endif
        expect_close(t, "affine.grad_logits", dlogits, expected, N, LIMIT(3e-6));
        t->rounded = ROUNDED_OP;
    }
    if (complete && boundary_tensor(t, &st, "bce_edge.grad_logits", N, expected)) {
        loss = edgeloss_forward(&on, logits, target, N);
        edgeloss_backward(dlogits, on, logits, target, N);
        check_guards(t, "edgeloss_backward");
        compare_loss(t, &st, "loss.bce_edge", loss);
        expect_close(t, "bce_edge.grad_logits", dlogits, expected, N, LIMIT(1e-6));
    }
    safetensors_close(&st);
}

// The statistics of BatchNorm's training mode, by the output and the running statistics that follow from them
static void test_golden_batchnorm(Test *t, const void *row) {
    enum { N = 3 * 6 * 7, C = 5 };
    const char *name = "batchnorm_train";
    (void)row;
    float *x = golden_op(t, name, "in.", "x", N * C, 1), *out = golden_op(t, name, "out", "", N * C, 1), *mean = tensor(t, C);
    float *var = tensor(t, C), *weight = golden_op(t, name, "in.p.", "weight", C, 0), *y = tensor(t, N * C);
    float *bias = golden_op(t, name, "in.p.", "bias", C, 0);
    float *running_mean = golden_op(t, name, "buf.", "running_mean", C, 0), *mean_after = golden_op(t, name, "after.", "running_mean", C, 0);
    float *running_var = golden_op(t, name, "buf.", "running_var", C, 0), *var_after = golden_op(t, name, "after.", "running_var", C, 0);
    if (!x || !out || !weight || !bias || !running_mean || !running_var || !mean_after || !var_after) return;
    batchnorm_statistics(mean, var, x, N, C);
    check_guards(t, name);
    for (int i = 0; i < N * C; i++) {
        double normal = ((double)x[i] - (double)mean[i % C]) / sqrt((double)var[i % C] + 1e-5);
        y[i] = (float)(normal * (double)weight[i % C] + (double)bias[i % C]);
    }
    for (int c = 0; c < C; c++) {
        running_mean[c] = (float)(0.9 * (double)running_mean[c] + 0.1 * (double)mean[c]);
        running_var[c] = (float)(0.9 * (double)running_var[c] + 0.1 * (double)var[c] * N / (N - 1));
    }
    expect_close(t, "out", y, out, N * C, LIMIT(1e-6));
    expect_close(t, "running mean", running_mean, mean_after, C, LIMIT(1e-6));
    expect_close(t, "running variance", running_var, var_after, C, LIMIT(1e-6));
}

static void test_golden_adam(Test *t, const void *row) {
    enum { N = 20, STEPS = 5 };
    static const char *const what[4] = { "p", "m", "v", "step p_k - p_k-1" };
    (void)row;
    float *p = golden_op(t, "adam", "p0", "", N, 0), *grads = golden_op(t, "adam", "grads", "", N * STEPS, 0), *before = tensor(t, N);
    float *expected[4], *ours[4] = { p, tensor(t, N), tensor(t, N), tensor(t, N) };
    expected[0] = golden_op(t, "adam", "p", "", N * STEPS, 0);
    expected[1] = golden_op(t, "adam", "m", "", N * STEPS, 0);
    expected[2] = golden_op(t, "adam", "v", "", N * STEPS, 0);
    expected[3] = golden_op(t, "adam", "dp", "", N * STEPS, 0);
    if (!p || !grads || !expected[0] || !expected[1] || !expected[2] || !expected[3]) return;
    fill(ours[1], N, 0);
    fill(ours[2], N, 0);
    for (int k = 0; k < STEPS; k++) {
        memcpy(before, p, N * sizeof(float));
        adam_update(p, grads + k * N, ours[1], ours[2], N, 1e-4, 0.9, 0.999, 1e-8, k + 1);
        check_guards(t, "adam_update");
        for (int i = 0; i < N; i++) ours[3][i] = p[i] - before[i];
        // a float step of 1e-4 is the difference of two numbers near 1: it has only 4 digits
        for (int i = 0; i < 4; i++) expect_close(t, what[i], ours[i], expected[i] + k * N, N, IS_DOUBLE ? 5e-7 : i == 3 ? 2e-3 : 5e-7);
    }
}

static void test_golden_cosine(Test *t, const void *row) {
    (void)row;
    for (int k = 0; k < 2; k++) {
        const SafeTensor *golden = ops_tensor(t, k ? "cosine.lr200" : "cosine.lr100");
        int epochs = k ? 200 : 100;
        if (!golden) return;
        for (int e = 0; e <= epochs; e++) {
            expect_number(t, "learning rate", cosine_lr(1e-4, e, epochs), safetensors_value(golden, (size_t)e), 1e-12);
        }
    }
}

static Config small_config(int edge_layers) {
    Config c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < 4; i++) {
        c.dims[i] = 8 + 3 * i;
        c.depths[i] = 1;
        c.heads[i] = 1;
        c.reductions[i] = 8 >> i;
        c.mamba_depths[i] = 1;
    }
    c.dims[3] = 16;
    c.heads[3] = 2;
    c.decoder_dim = 9;
    c.d_state = 4;
    c.d_conv = 4;
    c.expand = 2;
    c.edge_layers = edge_layers;
    snprintf(c.name, sizeof c.name, "small");
    snprintf(c.scans, sizeof c.scans, "fbs");
    return c;
}

// Ten steps with dropout, drop path, boundary head, affine constraint: twice, and with another number of threads, they are the same to
// the last bit, the loss of that one batch goes down, and no bit of the frozen network changes.
static void test_ten_steps(Test *t, const void *row) {
    enum { B = 2, T = 3, H = 32, W = 40, STEPS = 10 };
    Config config = small_config(3);
    float *params[3] = { NULL, NULL, NULL }, *masks = tensor(t, B * T * H * W);
    Losses losses[3][STEPS];
    size_t n = 0;
    Batch batch;
    AffineNet f;
    (void)row;
    hash_affine(&f, 8);
    float *frozen = copy_of(t, f.net.params, f.net.num_params);
    batch_init(&batch, B, T, H, W);
    hash_clip(batch.input, masks, B, T, H, W);
    clip_masks(batch.mask, batch.first_mask, masks, B, T, H * W);
    for (int run = 0; run < 3; run++) {
        Model m;
        set_threads(run == 2 ? 4 : 1);
        model_init(&m, &config, 7);
        model_plan(&m, B, T, H, W, 1, 0, 0);
        for (int k = 0; k < STEPS; k++) {
            poison_arenas(&m);
            losses[run][k] = train_step(&m, &f, batch.input, batch.mask, batch.first_mask, 1e-3);
        }
        n = m.num_params;
        params[run] = copy_of(t, m.params, n);
        model_free(&m);
    }
    batch_free(&batch);
    expect_bits(t, "parameters after ten steps, run again", params[1], params[0], n);
    expect_bits(t, "parameters after ten steps, four threads", params[2], params[0], n);
    expect(t, memcmp(losses[0], losses[1], sizeof losses[0]) == 0 && memcmp(losses[0], losses[2], sizeof losses[0]) == 0, "the same losses");
    expect_bits(t, "the frozen network", f.net.params, frozen, f.net.num_params);
    expect(t, !f.net.grads && !f.net.adam_m && f.net.step == 0, "the frozen network has no gradients");
    affine_free(&f);
    for (int k = 0; k < STEPS; k++) {
        const Losses *l = &losses[0][k];
        expect(t, isfinite(l->total) && l->seg > 0 && l->edge > 0 && l->affine_target > 0 && l->affine_first > 0, "every part of the loss is there");
    }
    expect(t, losses[0][STEPS - 1].total < losses[0][0].total, "the loss goes down");
    expect(t, largest(params[0], n) < 1e3, "the parameters are finite");
}

// The gradient of the whole model, with dropout and drop path on, along one random direction in each of its tensors and in the input:
// without a boundary head, with both kinds of one, and of the affine term alone, which reaches stage 1 through the frozen network only
typedef struct { const char *name; int edge_layers, patch, affine_alone; } DifferencesRow;
static const DifferencesRow DIFFERENCES[4] = { { "mask", 0, 0, 0 }, { "edge_1", 1, 0, 0 }, { "total", 3, 7, 0 }, { "affine", 3, 7, 1 } };

static double differences_loss(const DifferencesRow *row, float *dlogits, float *dedge, const Model *m, const AffineNet *f,
                               const float *mask, const float *first_mask) {
    size_t n = (size_t)m->B * (size_t)m->H * (size_t)m->W;
    Losses l = loss_and_gradient(dlogits, dedge, m, row->patch ? f : NULL, mask, first_mask);
    if (!row->affine_alone) return l.total;
    float *edge = malloc_floats(2 * n);
    double target, first;
    AffineTerm a;
    sobel_edges(edge, mask, m->B, m->H, m->W);
    sobel_edges(edge + n, first_mask, m->B, m->H, m->W);
    affine_forward(&target, &first, &a, m->edge_logits, edge, edge + n, f, m->B, m->H, m->W);
    affine_backward(dedge, AFFINE_TARGET, AFFINE_FIRST, &a, f, m->B, m->H, m->W);
    affine_term_free(&a);
    free(edge);
    fill(dlogits, n, 0);
    return l.affine;
}

static void test_model_differences(Test *t, const void *data) {
    enum { B = 2, T = 2, H = 33, W = 39, N = B * H * W, INPUTS = B * T * H * W * 3 };
    const DifferencesRow *row = (const DifferencesRow *)data;
    Config config = small_config(row->edge_layers);
    const double limit = 1e-6;
    float *input = tensor(t, INPUTS), *dinput = tensor(t, INPUTS), *masks = tensor(t, N * T);
    float *target = tensor(t, N), *first = tensor(t, N), *dlogits = tensor(t, N), *dedge = tensor(t, N);
    int reached = 0;
    Model m;
    AffineNet f;
    if (!IS_DOUBLE) {
        snprintf(t->skipped, sizeof t->skipped, "only in the double build");
        return;
    }
    hash_affine(&f, 7);
    hash_clip(input, masks, B, T, H, W);
    clip_masks(target, first, masks, B, T, H * W);
    model_init(&m, &config, 7);
    for (size_t i = 0; i < m.num_params; i++) m.params[i] += (float)(0.1 * hash_u(fnv1a32("params"), i));
    m.drop_path = 0.4f;
    m.dropout = 0.2f;
    model_plan(&m, B, T, H, W, 1, 0, 0);
    poison_arenas(&m);
    model_forward(&m, input);
    differences_loss(row, dlogits, dedge, &m, &f, target, first);
    model_backward(&m, dinput, dlogits, dedge, input);
    check_guards(t, "model_backward");
    for (int i = 0; i <= m.num_tensors; i++) {
        const Tensor *tensor_row = &m.tensors[i];
        int is_input = i == m.num_tensors;
        if (!is_input && tensor_row->is_buffer) continue;
        float *p = is_input ? input : m.params + tensor_row->offset, *g = is_input ? dinput : m.grads + tensor_row->offset;
        size_t numel = is_input ? (size_t)INPUTS : tensor_row->numel;
        uint32_t direction = fnv1a32(is_input ? "input direction" : tensor_row->name);
        double slope = 0, size = 0, loss[2], error = NAN;
        for (size_t k = 0; k < numel; k++) {
            slope += (double)g[k] * hash_u(direction, k);
            size += fabs((double)g[k]);
        }
        float *kept = copy_of(t, p, numel);
        // if a ReLU has its kink between the two sides, a smaller step decides
        for (double step = 1e-5; step > 5e-8 && !(error <= limit); step /= 10) {
            for (int side = 0; side < 2; side++) {
                for (size_t k = 0; k < numel; k++) p[k] = (float)((double)kept[k] + (side ? step : -step) * hash_u(direction, k));
                model_forward(&m, input);
                loss[side] = differences_loss(row, dlogits, dedge, &m, &f, target, first);
            }
            error = fabs((loss[1] - loss[0]) / (2 * step) - slope) / fmax(size, 1e-3);
        }
        memcpy(p, kept, numel * sizeof(float));
        expect_error(t, is_input ? "input" : tensor_row->name, error, limit);
        if (is_input || !row->affine_alone) continue;
        int on_its_way = strncmp(tensor_row->name, "edge_head.", 10) == 0 || strstr(tensor_row->name, "patch_embeddings.0.")
                      || strstr(tensor_row->name, "block.0.") || strstr(tensor_row->name, "encoder.stages.0.");
        reached += on_its_way && size > 1e-6;
        expect(t, on_its_way || size == 0, "the affine term moves the boundary head and stage 1, nothing else");
    }
    if (row->affine_alone) expect(t, reached > 30, "it reaches them");       // 62 tensors; the scans' own gradients are tiny
    affine_free(&f);
    model_free(&m);
}

// ------------------------------------------------------------------------------------------------------------------
// 7. Whole models against golden files

// [ sum x, sum |x|, sqrt(sum x^2), max |x|, sum x_i u(probe, i) ]: what golden files keep of a gradient
static void statistics(double out[5], const float *x, size_t n, const char *probe) {
    uint32_t name_hash = fnv1a32(probe);
    for (int k = 0; k < 5; k++) out[k] = 0;
    for (size_t i = 0; i < n; i++) {
        double v = (double)x[i];
        out[0] += v;
        out[1] += fabs(v);
        out[2] += v * v;
        if (!(fabs(v) <= out[3])) out[3] = fabs(v);
        out[4] += v * hash_u(name_hash, i);
    }
    out[2] = sqrt(out[2]);
}

// The sum and the probe cancel, so they are held against sum |x|; the norm and the maximum against themselves.
static double statistics_error(const double ours[5], const SafeTensor *golden) {
    double error = 0, absolute = safetensors_value(golden, 1);
    for (int k = 0; k < 5; k++) {
        double expected = safetensors_value(golden, (size_t)k), scale = k == 2 || k == 3 ? expected : absolute;
        double difference = fabs(ours[k] - expected) / (scale > 0 ? scale : 1);
        if (!(difference <= error)) error = difference;
    }
    return error;
}

static int json_ints(const char *json, const char *key, int *out, int count) {
    JsonReader j;
    int64_t values[8];
    const char *member = json_member(json, key);
    memset(&j, 0, sizeof j);
    j.text = member ? member : "";
    j.length = strlen(j.text);
    int n = count == 1 ? json_count(&j, values) : json_counts(&j, values, count);
    for (int i = 0; i < n; i++) out[i] = (int)values[i];
    return n == count;
}

typedef struct { int B, T, H, W, weighted, patch; } GoldenSizes;   // patch: side of the affine term's patches, 0 without it

// The configuration of a golden file; 0 if it has none that we know.
static int golden_config(const SafeTensors *st, Config *c, GoldenSizes *s) {
    static const char *const keys[14] = { "dims", "depths", "heads", "sr", "mamba_depths", "decoder", "d_state", "d_conv", "expand",
                                          "B", "T", "H", "W", "with_edge" };
    char joined[1024] = "{";
    const char *json = safetensors_metadata(st, "config");
    if (!json) {                               // the released code's file has one text for each
        for (int i = 0; i < 14; i++) {
            const char *value = safetensors_metadata(st, keys[i]);
            size_t used = strlen(joined);
            if (!value) return 0;
            snprintf(joined + used, sizeof joined - used, "%s\"%s\": %s", i ? ", " : "", keys[i], value);
        }
        strcat(joined, "}");
        json = joined;
    }
    memset(c, 0, sizeof *c);
    memset(s, 0, sizeof *s);
    int ok = json_ints(json, "dims", c->dims, 4) && json_ints(json, "depths", c->depths, 4) && json_ints(json, "heads", c->heads, 4)
        && json_ints(json, "sr", c->reductions, 4) && json_ints(json, "mamba_depths", c->mamba_depths, 4) && json_ints(json, "decoder", &c->decoder_dim, 1)
        && json_ints(json, "d_state", &c->d_state, 1) && json_ints(json, "d_conv", &c->d_conv, 1) && json_ints(json, "expand", &c->expand, 1)
        && json_ints(json, "B", &s->B, 1) && json_ints(json, "T", &s->T, 1) && json_ints(json, "H", &s->H, 1) && json_ints(json, "W", &s->W, 1);
    const char *scans = json_member(json, "scans"), *bce = json_member(json, "bce"), *affine = json_member(json, "affine");
    snprintf(c->name, sizeof c->name, "golden");
    snprintf(c->scans, sizeof c->scans, "fbs");
    if (scans && strncmp(scans, "\"none\"", 6) != 0) snprintf(c->scans, sizeof c->scans, "%.*s", (int)strcspn(scans + 1, "\""), scans + 1);
    const char *with_edge = json_member(json, "with_edge");
    if (!json_ints(json, "edge_layers", &c->edge_layers, 1)) c->edge_layers = with_edge && strncmp(with_edge, "true", 4) == 0;
    s->weighted = bce && strncmp(bce, "\"weighted\"", 10) == 0;
    if (affine && affine[0] == '{') json_ints(affine, "patch", &s->patch, 1);
    return ok;
}

static void compare_golden(Test *t, const SafeTensors *st, const char *name, const float *ours, size_t n, int channels_last, double limit) {
    const SafeTensor *golden = safetensors_find(st, name);
    if (!golden || golden->numel != n) {
        test_fail(t, "%s: the golden file has %zu elements, the model %zu", name, golden ? golden->numel : 0, n);
        return;
    }
    float *expected = tensor(t, n);
    golden_copy(expected, golden, channels_last);
    expect_close(t, name, ours, expected, n, limit);
}

// Frames (B,T,3,H,W) as (B,T,H,W,3)
static void golden_frames(float *out, const SafeTensor *golden, size_t pixels) {
    for (size_t i = 0; i < golden->numel; i++) {
        out[(i / (3 * pixels) * pixels + i % pixels) * 3 + i / pixels % 3] = (float)safetensors_value(golden, i);
    }
}

// The frames and masks of the file, or those of the hash
static void golden_clip(const SafeTensors *st, float *frames, float *masks, const GoldenSizes *s) {
    const SafeTensor *input = safetensors_find(st, "input"), *target = safetensors_find(st, "target");
    size_t pixels = (size_t)s->H * (size_t)s->W, count = (size_t)(s->B * s->T);
    hash_clip(frames, masks, s->B, s->T, s->H, s->W);
    if (!input || !target || input->numel != count * 3 * pixels || target->numel != count * pixels) return;
    golden_copy(masks, target, 0);
    golden_frames(frames, input, pixels);
}

// All gradients against <prefix><key>: whole tensors, or the five statistics of each.
static void compare_gradients(Test *t, const Model *m, const SafeTensors *st, const char *prefix, double limit) {
    t->rounded = ROUNDED_MODEL;
    const char *zero_grad = safetensors_metadata(st, "zero_grad");
    char name[160], quoted[160], probe[160];
    double most = 0;
    for (int i = 0; i < st->count; i++) {      // the largest gradient of the model: what zero gradients are measured by
        const SafeTensor *golden = &st->tensors[i];
        if (strncmp(golden->name, prefix, strlen(prefix)) != 0) continue;
        for (size_t k = 0; k < golden->numel; k++) {         // of five statistics, number 3
            if (golden->dtype != SAFETENSORS_F64 || k == 3) most = fmax(most, fabs(safetensors_value(golden, k)));
        }
    }
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *row = &m->tensors[i];
        if (row->is_buffer) continue;
        const float *grad = m->grads + row->offset;
        snprintf(name, sizeof name, "%s%s", prefix, row->name);
        snprintf(quoted, sizeof quoted, "\"%s\"", row->name);
        snprintf(probe, sizeof probe, "probe.%s", row->name);
        const SafeTensor *golden = safetensors_find(st, name);
        if (!golden) {
            test_fail(t, "%s is not in the golden file", name);
        } else if (zero_grad && strstr(zero_grad, quoted)) {
            double zero_limit = IS_DOUBLE ? 1e-12 : five_times(st, "zero_grad (largest / largest gradient)");
            expect_error(t, name, largest(grad, row->numel) / most, zero_limit);
        } else if (golden->dtype == SAFETENSORS_F64) {
            double ours[5];
            statistics(ours, grad, row->numel, probe);
            expect_error(t, name, statistics_error(ours, golden), limit);
        } else {
            compare_golden(t, st, name, grad, row->numel, 0, limit);
        }
    }
}

// Forward and backward as training does, the loss on target frames only: every part of the loss and every gradient
static void golden_training(Test *t, Model *m, const SafeTensors *st, const GoldenSizes *s, const float *frames, const float *target,
                            const float *first_mask) {
    size_t n = (size_t)s->B * (size_t)s->H * (size_t)s->W;
    float *dlogits = tensor(t, n), *dedge = tensor(t, n);
    AffineNet f;
    if (s->patch) hash_affine(&f, s->patch);
    poison_arenas(m);
    model_forward(m, frames);
    Losses l = loss_and_gradient(dlogits, dedge, m, s->patch ? &f : NULL, target, first_mask);
    compare_loss(t, st, "loss.total", l.total);
    compare_loss(t, st, "loss.seg", l.seg);
    compare_loss(t, st, "loss.bce_edge", l.edge);
    compare_loss(t, st, "loss.affine", l.affine);
    compare_loss(t, st, "loss.affine_t", l.affine_target);
    compare_loss(t, st, "loss.affine_1", l.affine_first);
    model_zero_grad(m);
    model_backward(m, NULL, dlogits, dedge, frames);
    check_guards(t, "model_backward");
    compare_gradients(t, m, st, "grad.", five_times(st, "grad statistics (worst)"));
    if (s->patch) affine_free(&f);
}

// The target frames of a golden tensor (B*T, 1, H, W)
static float *golden_targets(Test *t, const SafeTensors *st, const char *name, const GoldenSizes *s) {
    size_t pixels = (size_t)s->H * (size_t)s->W;
    const SafeTensor *all = safetensors_find(st, name);
    float *out = tensor(t, (size_t)s->B * pixels);
    if (!all || all->numel != (size_t)(s->B * s->T) * pixels) test_fail(t, "%s is not in the golden file", name);
    for (int b = 0; b < s->B && !t->failures; b++) {
        size_t from = (size_t)(b * s->T + s->T / 2) * pixels;
        for (size_t i = 0; i < pixels; i++) out[(size_t)b * pixels + i] = (float)safetensors_value(all, from + i);
    }
    return out;
}

// The released code's losses: L_seg plain (kind a) and weighted (b), without a boundary; or its total, of which only the gradients at
// logits and edge are compared, since it has other terms than ours
static void golden_released(Test *t, Model *m, const SafeTensors *st, const GoldenSizes *s, const char *kind, const float *frames,
                            const float *target) {
    int total = strcmp(kind, "total") == 0, weighted = kind[0] == 'b';
    size_t pixels = (size_t)s->H * (size_t)s->W, n = (size_t)s->B * pixels, inputs = (size_t)(s->B * s->T) * pixels * 3;
    char name[32];
    snprintf(name, sizeof name, "grad_logits.%s", kind);
    float *weight = tensor(t, n), *dlogits = golden_targets(t, st, name, s), *dedge = tensor(t, n), *dinput = tensor(t, inputs);
    double *sums = (double *)malloc_check(3 * (size_t)s->B * sizeof(double));
    poison_arenas(m);
    t->rounded = ROUNDED_LAYERS;
    model_forward(m, frames);
    fill(dedge, n, 0);
    if (total) {
        dedge = golden_targets(t, st, "grad_edge.total", s);
    } else {
        float *expected = copy_of(t, dlogits, n);
        double loss = segloss_forward(weight, sums, m->logits, target, s->B, s->H, s->W, weighted);
        compare_loss(t, st, weighted ? "loss.structure_b" : "loss.structure_a", loss);
        segloss_backward(dlogits, weight, sums, m->logits, target, s->B, s->H, s->W, weighted);
        expect_close(t, name, dlogits, expected, n, LIMIT(5e-6));
    }
    model_zero_grad(m);
    model_backward(m, dinput, dlogits, dedge, frames);
    check_guards(t, "model_backward");
    snprintf(name, sizeof name, "grad%s.", total ? "" : kind);
    compare_gradients(t, m, st, name, LIMIT(4e-5));
    const SafeTensor *golden = safetensors_find(st, "grad_input");
    if (total && golden && golden->numel == inputs) {
        float *expected = tensor(t, inputs);
        golden_frames(expected, golden, pixels);
        expect_close(t, "grad_input", dinput, expected, inputs, LIMIT(4e-5));
    } else expect(t, !total, "grad_input is in the golden file");
    free(sums);
}

static void golden_model(Test *t, const char *path) {
    SafeTensors st;
    Config config;
    GoldenSizes s;
    Model m;
    char err[512], name[64];
    if (safetensors_open(&st, path, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.250s", err);
        return;
    }
    if (!golden_config(&st, &config, &s)) {
        test_fail(t, "%s: no model's golden file", path);
        safetensors_close(&st);
        return;
    }
    t->rounded = ROUNDED_LAYERS;
    int released = safetensors_metadata(&st, "config") == NULL;
    size_t pixels = (size_t)s.H * (size_t)s.W, frame_count = (size_t)(s.B * s.T), E = (size_t)config.decoder_dim;
    float *frames = tensor(t, frame_count * pixels * 3), *masks = tensor(t, frame_count * pixels), *target = tensor(t, (size_t)s.B * pixels);
    float *first_mask = tensor(t, (size_t)s.B * pixels);
    golden_clip(&st, frames, masks, &s);
    clip_masks(target, first_mask, masks, s.B, s.T, pixels);
    model_init(&m, &config, 1);
    m.dropout = m.drop_path = 0;
    m.weighted_bce = s.weighted;
    golden_weights(&m, &st);
    float *buffers = copy_of(t, m.buffers, m.num_buffers);

    // Training mode, all frames: logits and stages.
    set_threads(1);
    model_plan(&m, s.B, s.T, s.H, s.W, 1, 1, 0);
    poison_arenas(&m);
    model_forward(&m, frames);
    compare_golden(t, &st, "logits", m.logits, frame_count * pixels, 0, five_times(&st, "logits"));
    if (config.edge_layers) compare_golden(t, &st, "edge", m.edge_logits, frame_count * pixels, 0, five_times(&st, "edge"));
    for (int i = 0; i < 4; i++) {
        const Stage *stage = &m.stages[i];
        size_t n = frame_count * (size_t)stage->P * (size_t)stage->C;
        snprintf(name, sizeof name, "stage%d", i);
        double limit = five_times(&st, name);
        if (safetensors_find(&st, name)) compare_golden(t, &st, name, floats_of(t, stage->out, n), n, released, limit);
        snprintf(name, sizeof name, "stage%d.stats", i);
        const SafeTensor *stats = safetensors_find(&st, name);
        char probe[64];
        double ours[5];
        snprintf(probe, sizeof probe, "probe.stage%d", i);
        statistics(ours, floats_of(t, stage->out, n), n, probe);
        if (stats) expect_error(t, name, statistics_error(ours, stats), limit);
        if (!released) continue;
        const Sublayer *first = m.sublayers + stage->first_sublayer, *mamba = first + 2 * config.depths[i];
        snprintf(name, sizeof name, "act.embed%d", i);
        compare_golden(t, &st, name, floats_of(t, first->x, n), n, 0, five_times(&st, name));
        snprintf(name, sizeof name, "act.seg%d", i);
        compare_golden(t, &st, name, floats_of(t, mamba->x, n), n, 0, five_times(&st, name));
        snprintf(name, sizeof name, "act.mlayer%d.out", i);
        const floatX *after = mamba + 2 < first + stage->num_sublayers ? mamba[2].x : stage->out;
        compare_golden(t, &st, name, floats_of(t, after, n), n, 1, five_times(&st, name));
    }
    if (released) {
        size_t map = frame_count * (size_t)m.stages[0].P * E;
        compare_golden(t, &st, "act.dec_fuse.out", floats_of(t, m.map, map), map, 1, five_times(&st, "act.dec_fuse.out"));
        compare_golden(t, &st, "logits_lowres", m.low, frame_count * (size_t)m.stages[0].P, 0, five_times(&st, "logits_lowres"));
    }
    const char *mean_after = released ? "after.decoder.batch_norm.running_mean" : "bn.running_mean_after";
    const char *var_after = released ? "after.decoder.batch_norm.running_var" : "bn.running_var_after";
    compare_golden(t, &st, mean_after, m.buffers + m.running_mean, E, 0, five_times(&st, mean_after));
    compare_golden(t, &st, var_after, m.buffers + m.running_var, E, 0, five_times(&st, var_after));
    expect(t, m.batches_tracked == 1, "one batch was counted");
    float *logits = copy_of(t, m.logits, frame_count * pixels), *edge = NULL;
    if (config.edge_layers) edge = copy_of(t, m.edge_logits, frame_count * pixels);

    // Training as it is done: target frames only, with another number of threads.
    set_threads(4);
    model_plan(&m, s.B, s.T, s.H, s.W, 1, 0, 0);
    if (released) {
        static const char *const kinds[3] = { "a", "b", "total" };
        for (int i = 0; i < 3; i++) golden_released(t, &m, &st, &s, kinds[i], frames, target);
    } else {
        golden_training(t, &m, &st, &s, frames, target, first_mask);
    }
    for (int b = 0; b < s.B; b++) {
        size_t ours = (size_t)b * pixels, all = (size_t)(b * s.T + s.T / 2) * pixels;
        expect_same(t, "logits of target frames only", m.logits + ours, logits + all, pixels);
        if (edge) expect_same(t, "edge logits of target frames only", m.edge_logits + ours, edge + all, pixels);
    }

    // Evaluation, with the running statistics from before.
    memcpy(m.buffers, buffers, m.num_buffers * sizeof(float));
    for (int all_frames = 1; all_frames >= 0; all_frames--) {
        model_plan(&m, s.B, s.T, s.H, s.W, 0, all_frames, 0);
        poison_arenas(&m);
        model_forward(&m, frames);
        if (all_frames) {
            compare_golden(t, &st, "logits_eval", m.logits, frame_count * pixels, 0, five_times(&st, "logits_eval"));
            memcpy(logits, m.logits, frame_count * pixels * sizeof(float));
        }
    }
    for (int b = 0; b < s.B; b++) {
        expect_same(t, "evaluation of target frames only", m.logits + (size_t)b * pixels, logits + (size_t)(b * s.T + s.T / 2) * pixels, pixels);
    }
    expect_bits(t, "evaluation leaves the running statistics alone", m.buffers, buffers, m.num_buffers);
    model_free(&m);
    safetensors_close(&st);
}

// Ten steps of Adam against PyTorch: every part of the loss before each and after the last, then parameters and running statistics
static void test_trajectory(Test *t, const void *row) {
    enum { STEPS = 10 };
    static const char *const parts[4] = { "loss.total", "loss.seg", "loss.bce_edge", "loss.affine" };
    char path[1024], err[512], name[160], probe[160], what[64];
    SafeTensors st;
    Config config;
    GoldenSizes s;
    Model m;
    AffineNet f;
    Batch batch;
    (void)row;
    snprintf(path, sizeof path, "%s/hash_trajectory.safetensors", t->golden);
    if (safetensors_open(&st, path, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.250s", err);
        return;
    }
    const char *zero_grad = safetensors_metadata(&st, "zero_grad");
    int complete = golden_config(&st, &config, &s) && s.patch && zero_grad;
    for (int i = 0; i < 4 && complete; i++) {
        const SafeTensor *golden = safetensors_find(&st, parts[i]);
        complete = golden && golden->numel == STEPS + 1;
    }
    expect(t, complete, "the file has configuration, losses and the list of zero gradients");
    if (!complete) {
        safetensors_close(&st);
        return;
    }
    size_t pixels = (size_t)s.H * (size_t)s.W;
    float *masks = tensor(t, (size_t)(s.B * s.T) * pixels);
    batch_init(&batch, s.B, s.T, s.H, s.W);
    hash_clip(batch.input, masks, s.B, s.T, s.H, s.W);
    clip_masks(batch.mask, batch.first_mask, masks, s.B, s.T, pixels);
    hash_affine(&f, s.patch);
    model_init(&m, &config, 1);
    m.dropout = m.drop_path = 0;
    m.weighted_bce = s.weighted;
    golden_weights(&m, NULL);
    model_plan(&m, s.B, s.T, s.H, s.W, 1, 0, 0);
    double limit = five_times(&st, "param statistics (worst)");
    t->rounded = ROUNDED_LAYERS;
    float *last = tensor(t, m.num_params), *start = copy_of(t, m.params, m.num_params);
    for (int k = 0; k <= STEPS; k++) {         // the step after the last serves for its loss only
        memcpy(last, m.params, m.num_params * sizeof(float));
        poison_arenas(&m);
        Losses l = train_step(&m, &f, batch.input, batch.mask, batch.first_mask, 1e-3);
        settle();
        const double losses[4] = { l.total, l.seg, l.edge, l.affine };
        for (int i = 0; i < 4; i++) {          // float32 PyTorch: 4e-7 in the total
            snprintf(what, sizeof what, "%s before step %d", parts[i], k + 1);
            expect_number(t, what, losses[i], safetensors_value(safetensors_find(&st, parts[i]), (size_t)k), IS_DOUBLE ? 1e-8 : 2e-6);
        }
        for (int i = 0; i < m.num_tensors; i++) {
            // Of a gradient that is zero Adam makes steps from rounding noise. No output depends on these parameters, but one of them
            // shifts a running mean: they are held.
            const Tensor *tensor_row = &m.tensors[i];
            snprintf(name, sizeof name, "\"%s\"", tensor_row->name);
            if (!strstr(zero_grad, name)) continue;
            memcpy(m.params + tensor_row->offset, start + tensor_row->offset, tensor_row->numel * sizeof(float));
        }
    }
    // float32 PyTorch's elements of the parameters differ by 3e-5 after the ten steps
    compare_golden(t, &st, "bn.running_mean_after", m.buffers + m.running_mean, (size_t)config.decoder_dim, 0, LIMIT(3e-5));
    compare_golden(t, &st, "bn.running_var_after", m.buffers + m.running_var, (size_t)config.decoder_dim, 0, LIMIT(3e-5));
    for (int i = 0; i < m.num_tensors; i++) {
        const Tensor *tensor_row = &m.tensors[i];
        double ours[5];
        snprintf(name, sizeof name, "\"%s\"", tensor_row->name);
        if (tensor_row->is_buffer || strstr(zero_grad, name)) continue;
        snprintf(name, sizeof name, "param.%s", tensor_row->name);
        snprintf(probe, sizeof probe, "probe.%s", tensor_row->name);
        const SafeTensor *golden = safetensors_find(&st, name);
        statistics(ours, last + tensor_row->offset, tensor_row->numel, probe);
        if (golden) expect_error(t, name, statistics_error(ours, golden), IS_DOUBLE ? 2e-8 : limit);
        else test_fail(t, "%s is not in the golden file", name);
    }
    batch_free(&batch);
    affine_free(&f);
    model_free(&m);
    safetensors_close(&st);
}

static const char *const MODEL_FILES[] = { "hash_basic", "hash_c1", "hash_c2", "hash_c4", "hash_tiny_full",
                                           "hash_tiny_edge1_weighted", "hash_odd_t4_75x61", "hash_b0_t5_64x64", "hash_b3_t2_64x64" };
enum { MODEL_FILE_COUNT = sizeof MODEL_FILES / sizeof MODEL_FILES[0] };

static void test_model(Test *t, const void *row) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.safetensors", t->golden, *(const char *const *)row);
    golden_model(t, path);
}

// ------------------------------------------------------------------------------------------------------------------
// 8. The trained inverse-transform network that `make data` leaves beside the synthetic shard: does F know what it is to know?

#define AFFINE_FILE "data/phantom_train_affine.safetensors"
#define UNSEEN_FILE "data/phantom_val.bin"     // videos that its training did not see

typedef struct {
    AffineNet f;
    int n;                                     // patches with a boundary: of the unseen masks, then as many of drawn ellipses
    float *patches, *boundary;                 // (n, q^2); (n) their pixels that are boundary
    double held_out;                           // mean squared error over that of the predictor theta = I, as its file states
} Trained;

// Appends the patches of n boundary maps (H, W), cut as in training, that are not empty
static void add_patches(Trained *net, const float *edge, int n, int H, int W, int most) {
    int q = net->f.q;
    for (int i = 0; i < patches_of(n, H, W, q) && net->n < most; i++) {
        float *patch = net->patches + (size_t)net->n * (size_t)(q * q), sum = 0;
        for (int k = 0; k < q * q; k++) sum += patch[k] = edge[patch_row(i, k / q, H, W, q) + (size_t)(k % q)];
        net->boundary[net->n] = sum;
        net->n += sum > 0;
    }
}

// An ellipse (or a rectangle) around (cx, cy), turned by `angle`
static void draw_shape(float *mask, int H, int W, double cx, double cy, double rx, double ry, double angle, int rectangle) {
    for (int y = 0; y < H; y++) for (int x = 0; x < W; x++) {
        double dx = x + 0.5 - cx, dy = y + 0.5 - cy, u = (dx * cos(angle) + dy * sin(angle)) / rx, v = (dy * cos(angle) - dx * sin(angle)) / ry;
        mask[y * W + x] = rectangle ? fmax(fabs(u), fabs(v)) < 1 : u * u + v * v < 1;
    }
}

static int trained_open(Test *t, Trained *net) {
    enum { MOST = 600 };
    char err[512];
    SafeTensors st;
    Shard shard;
    if (safetensors_open(&st, AFFINE_FILE, err, sizeof err) != 0 || shard_open(&shard, UNSEEN_FILE, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.180s (`make data` makes it)", err);
        return 0;
    }
    const SafeTensor *fc1 = safetensors_find(&st, "affine.fc1.weight");
    const char *held_out = safetensors_metadata(&st, "held_out_ratio");
    net->held_out = held_out ? strtod(held_out, NULL) : NAN;
    affine_load(&net->f, AFFINE_FILE, fc1 ? (int)(sqrt((double)fc1->shape[1] / 2) + 0.5) : 1);
    safetensors_close(&st);
    int H = shard.H, W = shard.W;
    size_t pixels = (size_t)(H * W);
    float *mask = tensor(t, pixels), *edge = tensor(t, pixels);
    net->n = 0;
    net->patches = tensor(t, (size_t)(MOST * net->f.q * net->f.q));
    net->boundary = tensor(t, MOST);
    for (int f = 0; f < shard.frames; f += 2) {
        for (size_t i = 0; i < pixels; i++) mask[i] = (float)(shard_mask(&shard, f)[i] / 255.0);
        sobel_edges(edge, mask, 1, H, W);
        settle();
        add_patches(net, edge, 1, H, W, MOST / 2);
    }
    for (uint64_t i = 0; i < 1000; i++) {
        double u[5];
        for (uint64_t k = 0; k < 5; k++) u[k] = hash_u(fnv1a32("ellipse"), 5 * i + k);
        draw_shape(mask, H, W, W * (0.5 + 0.2 * u[0]), H * (0.5 + 0.2 * u[1]), W * (0.2 + 0.1 * u[2]), H * (0.2 + 0.1 * u[3]), 3.2 * u[4], 0);
        sobel_edges(edge, mask, 1, H, W);
        settle();
        add_patches(net, edge, 1, H, W, MOST);
    }
    shard_close(&shard);
    expect(t, net->n > MOST * 3 / 4, "there are patches with a boundary");
    return 1;
}

// theta: rotation within 15 degrees, scale 0.8 ... 1.25, shear within 10 degrees, shift within a fifth of the side
static void draw_theta(double theta[6], uint64_t i) {
    double u[5], degree = 3.14159265358979 / 180;
    for (uint64_t k = 0; k < 5; k++) u[k] = hash_u(fnv1a32("theta"), 5 * i + k);
    double angle = 15 * degree * u[0], scale = 1.025 + 0.225 * u[1], shear = tan(10 * degree * u[2]);
    theta[0] = scale * cos(angle);
    theta[1] = scale * (cos(angle) * shear - sin(angle));
    theta[2] = 0.4 * u[3];                     // the side is 2 long
    theta[3] = scale * sin(angle);
    theta[4] = scale * (sin(angle) * shear + cos(angle));
    theta[5] = 0.4 * u[4];
}

// e'(x, y) = e(theta (x, y, 1)) in coordinates from -1 to 1 over the patch, bilinear, zeros outside
static void warp(float *out, const float *patch, int q, const double theta[6]) {
    for (int i = 0; i < q; i++) for (int j = 0; j < q; j++) {
        double x = (2 * j + 1.0) / q - 1, y = (2 * i + 1.0) / q - 1, sum = 0;
        double from_x = ((theta[0] * x + theta[1] * y + theta[2] + 1) * q - 1) / 2;
        double from_y = ((theta[3] * x + theta[4] * y + theta[5] + 1) * q - 1) / 2;
        for (int k = 0; k < q * q; k++) {
            double w = fmax(0, 1 - fabs(from_x - k % q)) * fmax(0, 1 - fabs(from_y - k / q));
            sum += w * (double)patch[k];
        }
        out[i * q + j] = (float)sum;
    }
}

// out (n, 6) = F(patch, patch warped by theta (n, 6)), or F(patch, patch) if theta is NULL
static float *trained_run(Test *t, const Trained *net, const double *theta) {
    int q2 = net->f.q * net->f.q;
    size_t n = (size_t)net->n;
    float *inp = tensor(t, n * 2 * (size_t)q2), *h1 = tensor(t, n * AFFINE_HIDDEN), *h2 = tensor(t, n * AFFINE_BOTTLENECK), *out = tensor(t, n * 6);
    for (int i = 0; i < net->n; i++) {
        const float *patch = net->patches + (size_t)(i * q2);
        memcpy(inp + (size_t)(2 * i * q2), patch, (size_t)q2 * sizeof(float));
        if (theta) warp(inp + (size_t)((2 * i + 1) * q2), patch, net->f.q, theta + 6 * i);
        else memcpy(inp + (size_t)((2 * i + 1) * q2), patch, (size_t)q2 * sizeof(float));
    }
    affine_net_forward(out, h1, h2, inp, &net->f, net->n);
    settle();
    return out;
}

// The warp of pairs is read from them: on unseen masks and on ellipses the squared error is near the one that the training found for
// patches it held back, and far below that of theta = I. A patch with little boundary in it cannot tell much, one with more must.
static void test_affine_recovery(Test *t, const void *row) {
    char what[96];
    Trained net;
    (void)row;
    if (!trained_open(t, &net)) return;
    double *theta = (double *)malloc_check(sizeof(double) * 6 * (size_t)net.n);
    for (int i = 0; i < net.n; i++) draw_theta(theta + 6 * i, (uint64_t)i);
    const float *out = trained_run(t, &net, theta);
    check_guards(t, "affine_net_forward");
    for (int part = 0; part < 2; part++) {
        double error[2][6], trivial[2][6], all_error = 0, all_trivial = 0;     // of all patches; of those with twice a side of boundary
        memset(error, 0, sizeof error);
        memset(trivial, 0, sizeof trivial);
        for (int i = part * net.n / 2; i < (part + 1) * net.n / 2; i++) for (int k = 0; k < 6; k++) {
            double map = theta[6 * i + k] - (k % 4 == 0), difference = (double)out[6 * i + k] - map;
            for (int rich = 0; rich <= (net.boundary[i] >= 2 * net.f.q); rich++) {
                error[rich][k] += difference * difference;
                trivial[rich][k] += map * map;
            }
        }
        for (int k = 0; k < 6; k++) {
            all_error += error[0][k];
            all_trivial += trivial[0][k];
            snprintf(what, sizeof what, "%s: parameter %d, patches with much boundary", part ? "ellipses" : "unseen masks", k + 1);
            expect_error(t, what, error[1][k] / trivial[1][k], 0.4);
        }
        snprintf(what, sizeof what, "%s: all, against the trivial predictor", part ? "ellipses" : "unseen masks");
        expect_error(t, what, all_error / all_trivial, 0.3);
        snprintf(what, sizeof what, "%s: the same against the error that its file states", part ? "ellipses" : "unseen masks");
        expect_error(t, what, all_error / all_trivial / net.held_out, 1.5);    // NaN if it states none
    }
    free(theta);
    affine_free(&net.f);
}

// A boundary and itself: F has to say identity. Its answer is never 0, since it errs; but it has to be small beside the maps that move
// a patch at random, and nearly always smaller than its answer to the patch so moved.
static void test_affine_identity(Test *t, const void *row) {
    Trained net;
    (void)row;
    if (!trained_open(t, &net)) return;
    double *theta = (double *)malloc_check(sizeof(double) * 6 * (size_t)net.n);
    for (int i = 0; i < net.n; i++) draw_theta(theta + 6 * i, (uint64_t)i);
    const float *out = trained_run(t, &net, theta), *same = trained_run(t, &net, NULL);
    for (int part = 0; part < 2; part++) {
        double of_same = 0, of_maps = 0, less = 0;
        for (int i = part * net.n / 2; i < (part + 1) * net.n / 2; i++) {
            double norm = 0;
            for (int k = 0; k < 6; k++) norm += (theta[6 * i + k] - (k % 4 == 0)) * (theta[6 * i + k] - (k % 4 == 0));
            of_maps += sqrt(norm);
            of_same += norm6(same + 6 * i);
            less += norm6(same + 6 * i) < norm6(out + 6 * i);
        }
        expect_error(t, part ? "ellipses: ||F(e, e)|| against ||theta - I||" : "unseen masks: ||F(e, e)|| against ||theta - I||",
                     of_same / of_maps, 0.45);
        expect_error(t, "||F(e, e)|| is not less than ||F(e, warped e)||: part", 1 - less / (net.n / 2), 0.2);
    }
    free(theta);
    affine_free(&net.f);
}

// Gradient descent on nothing but the logits of a boundary, and on nothing but L_affine: its first term draws a boundary that is off by
// two or three pixels, in any direction, to the target's, its second drives it from the first frame's. What moves is the mean position of
// the boundary's probability.
static void mean_position(double mean[2], const float *logits, int q) {
    double sum = 0;
    mean[0] = mean[1] = 0;
    for (int i = 0; i < q * q; i++) {
        double p = 1 / (1 + exp(-(double)logits[i]));
        sum += p;
        mean[0] += p * (i % q);
        mean[1] += p * (i / q);
    }
    mean[0] /= sum;
    mean[1] /= sum;
}

static const int PULL_PUSH[2] = { 0, 1 };

static void test_affine_descent(Test *t, const void *row) {
    enum { STEPS = 20, SHIFTS = 8, SHAPES = 4 };     // shifts by two and three pixels of 16; ellipses, then rectangles
    int push = *(const int *)row, fell = 0, right = 0;
    double moved = 0, wanted = 0;
    Trained net;
    if (!trained_open(t, &net)) return;
    int q = net.f.q, n = q * q;
    // The logits' gradient falls with the number of their pixels, and is a hundred times smaller for the second term.
    double d_target = push ? 0 : AFFINE_TARGET, d_first = push ? AFFINE_FIRST : 0, rate = 30 * (n / 256.0) * (push ? 25 : 1);
    float *mask = tensor(t, (size_t)n), *true_edge = tensor(t, (size_t)n), *none = tensor(t, (size_t)n), *edge = tensor(t, (size_t)n);
    float *logits = tensor(t, (size_t)n), *dlogits = tensor(t, (size_t)n);
    fill(none, (size_t)n, 0);
    for (int shape = 0; shape < SHAPES; shape++) for (int shift = 0; shift < SHIFTS; shift++) {
        double angle = 3.14159265358979 * (shift + 0.5 * (shape % 2)) / 4, distance = (shift % 2 ? 3 : 2) * q / 16.0, dx = distance * cos(angle), dy = distance * sin(angle);
        double rx = 0.27 * q, ry = (shape % 2 ? 0.2 : 0.27) * q, before[2], after[2], aim[2], loss[2] = { 0, 0 };
        int rectangle = shape / 2;
        draw_shape(mask, q, q, q / 2.0, q / 2.0, rx, ry, 0, rectangle);
        sobel_edges(true_edge, mask, 1, q, q);
        settle();
        for (int i = 0; i < n; i++) logits[i] = 6 * true_edge[i] - 3;
        mean_position(aim, logits, q);
        draw_shape(mask, q, q, q / 2.0 + dx, q / 2.0 + dy, rx, ry, 0, rectangle);
        sobel_edges(edge, mask, 1, q, q);
        settle();
        for (int i = 0; i < n; i++) logits[i] = 6 * edge[i] - 3;       // p is 0.05 or 0.95
        mean_position(before, logits, q);
        for (int step = 0; step <= STEPS; step++) {
            double target, first;
            AffineTerm a;
            affine_forward(&target, &first, &a, logits, push ? none : true_edge, push ? true_edge : none, &net.f, 1, q, q);
            affine_backward(dlogits, d_target, d_first, &a, &net.f, 1, q, q);
            affine_term_free(&a);
            settle();
            loss[step > 0] = d_target * target + d_first * first;
            for (int i = 0; i < n; i++) logits[i] -= (float)rate * dlogits[i];
        }
        check_guards(t, "affine_backward");
        mean_position(after, logits, q);
        double product = 0;
        for (int k = 0; k < 2; k++) {
            product += (after[k] - before[k]) * (aim[k] - before[k]);
            wanted += (aim[k] - before[k]) * (aim[k] - before[k]);
        }
        moved += product;
        fell += loss[1] < loss[0];
        right += push ? product < 0 : product > 0;
    }
    expect(t, fell == SHAPES * SHIFTS, "the loss falls in every descent");
    expect_error(t, push ? "shifts that do not grow" : "shifts that do not shrink", SHAPES * SHIFTS - right, SHAPES * SHIFTS / 10);
    expect(t, push ? moved < 0 : moved > 0.1 * wanted, push ? "pushed away" : "a tenth of the way at least");
    if (t->verbose) printf("      moved by %.3f of the shift; %d of %d the right way\n", moved / wanted, right, SHAPES * SHIFTS);
    affine_free(&net.f);
}

// ------------------------------------------------------------------------------------------------------------------
// 9. Files

// Resizing against Pillow: one grey level of difference is allowed, and rare.
// Two videos of 3 and 1 frames in memory: which frames make a clip, at the ends of a video and for every T; masks of its target frame
// and of its first, which at a video's start and for T = 1 are the same; flips that frames and masks share; the order of an epoch.
static void test_clips(Test *t, const void *row) {
    enum { H = 5, W = 7, FRAMES = 4, MOST = 5 };
    static const int offsets[MOST][MOST] = { { 0 }, { -1, 0 }, { -1, 0, 1 }, { -2, -1, 0, 1 }, { -2, -1, 0, 1, 2 } };
    static uint8_t rgb[FRAMES][H][W][3], masks[FRAMES][H][W];
    int first_frame[3] = { 0, 3, 4 }, targets[FRAMES] = { 0, 1, 2, 3 }, seen[4] = { 0, 0, 0, 0 }, order[2][50], count[50], moved = 0;
    double plain = 0, flipped = 0;
    Shard shard;
    (void)row;
    memset(&shard, 0, sizeof shard);
    for (int f = 0; f < FRAMES; f++)
        for (int y = 0; y < H; y++)
            for (int x = 0; x < W; x++) {
                for (int c = 0; c < 3; c++) rgb[f][y][x][c] = (uint8_t)(50 * f + W * y + x + 20 * c);
                masks[f][y][x] = (uint8_t)(40 * f + W * y + x);
            }
    shard.videos = 2, shard.frames = FRAMES, shard.H = H, shard.W = W, shard.has_masks = 1;
    shard.first_frame = first_frame, shard.rgb = &rgb[0][0][0][0], shard.masks = &masks[0][0][0];
    for (int T = 1; T <= MOST; T++)
        for (int round = 0; round < 17; round++) {                     // round 0 without augmentation
            Augment augment = { 1, 0 };
            Batch batch;
            batch_init(&batch, FRAMES, T, H, W);
            batch_load(&batch, &shard, targets, FRAMES, round ? &augment : NULL, (uint64_t)(100 * T + round));
            for (int b = 0; b < FRAMES; b++) {
                double least = 1e30;
                int best = 0;
                for (int flip = 0; flip < (round ? 4 : 1); flip++) {   // the flip that explains all frames and the mask at once
                    double error = 0;
                    for (int k = 0; k < T * H * W; k++) {
                        int frame = b + offsets[T - 1][k / (H * W)], y = k / W % H, x = k % W, lo = b < 3 ? 0 : 3, hi = b < 3 ? 2 : 3;
                        int yf = flip & 1 ? H - 1 - y : y, xf = flip & 2 ? W - 1 - x : x;
                        frame = frame < lo ? lo : frame > hi ? hi : frame;
                        for (int c = 0; c < 3; c++) {
                            static const double mean[3] = { 0.485, 0.456, 0.406 }, std[3] = { 0.229, 0.224, 0.225 };
                            double want = (rgb[frame][yf][xf][c] / 255.0 - mean[c]) / std[c];
                            error = fmax(error, fabs(want - (double)batch.input[((size_t)b * T * H * W + (size_t)k) * 3 + (size_t)c]));
                        }
                        if (k < H * W) {       // masks of the target frame and of the clip's first
                            error = fmax(error, fabs(masks[b][yf][xf] / 255.0 - (double)batch.mask[b * H * W + k]));
                            error = fmax(error, fabs(masks[frame][yf][xf] / 255.0 - (double)batch.first_mask[b * H * W + k]));
                        }
                    }
                    if (error < least) least = error, best = flip;
                }
                if (round) flipped = fmax(flipped, least), seen[best]++;
                else plain = fmax(plain, least);
            }
            batch_free(&batch);
        }
    expect_error(t, "frames and masks of a clip", plain, 2e-6);
    expect_error(t, "flipped frames and masks of a clip", flipped, 2e-6);
    for (int i = 0; i < 4; i++) expect(t, seen[i] > 40, "each of the four flips is about as frequent");   // 320 clips in all
    for (int e = 0; e < 2; e++) {
        memset(count, 0, sizeof count);
        shuffle(order[e], 50, 1, e);
        for (int i = 0; i < 50; i++) if (order[e][i] >= 0 && order[e][i] < 50) count[order[e][i]]++;
        for (int i = 0; i < 50; i++) expect(t, count[i] == 1, "an epoch visits every clip once");
    }
    for (int i = 0; i < 50; i++) moved += order[0][i] != order[1][i];
    expect(t, moved > 25, "another epoch has another order");
}

// Differences cannot see a drop path that does nothing. A dropped frame leaves its sublayer unchanged; a kept one adds what it
// would without drop path, times 1/(1-p); each frame is drawn for itself; dropout zeroes its part.
static void test_drop(Test *t, const void *row) {
    enum { B = 3, T = 7, H = 32, W = 32 };
    Config config = CONFIGS[0];
    Model m;
    int dropped = 0, kept = 0, mixed = 0, zeros = 0, keeps[B * T], keeps_first[B * T];
    const Sublayer *first = NULL;  // that can drop: its input is the same without drop path
    double *branch = NULL, p_first = 0, difference = 0, sum = 0;
    float *input = (float *)malloc(sizeof(float) * B * T * H * W * 3);
    if (!input) exit(1);
    (void)row;
    for (int i = 0; i < B * T * H * W * 3; i++) input[i] = (float)hash_u(fnv1a32("input"), (uint64_t)i);
    model_init(&m, &config, 1);
    m.drop_path = 0.5f;
    model_plan(&m, B, T, H, W, 1, 0, 0);
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) m.drop_path = 0;
        model_forward(&m, input);
        settle();
        for (int i = 0; i < 4; i++) {
            const Stage *st = &m.stages[i];
            size_t n = (size_t)st->P * (size_t)st->C;
            for (int k = 0; k < st->num_sublayers; k++) {
                const Sublayer *s = m.sublayers + st->first_sublayer + k;
                const floatX *out = k + 1 < st->num_sublayers ? s[1].x : st->out;
                double p = is_segformer(s) && pass == 0 ? 0.5 * s->drop_index / (m.num_blocks - 1) : 0;
                Run r = { 0, 0, 0 };
                int at = 0;
                memset(keeps, 0, sizeof keeps);
                for (r = next_run(&m, s, r); r.n > 0; r = next_run(&m, s, r)) {
                    expect(t, r.at == at && r.first >= at && r.first + r.n <= B * T, "kept frames follow each other");
                    for (int f = r.first; f < r.first + r.n; f++, at++) keeps[f] = 1;
                }
                for (int f = 0; f < B * T; f++) {
                    int same = memcmp(out + (size_t)f * n, s->x + (size_t)f * n, n * sizeof(floatX)) == 0;
                    expect(t, same == !keeps[f], "dropped frames alone pass unchanged");
                    expect(t, keeps[f] || p > 0, "a sublayer can be dropped from the second SegFormer block on");
                    mixed += p > 0 && keeps[f] != keeps[0];
                    dropped += !keeps[f], kept += p > 0 && keeps[f];
                }
                if (p > 0 && first == NULL) {
                    first = s, p_first = p;
                    memcpy(keeps_first, keeps, sizeof keeps);
                    branch = (double *)malloc(sizeof(double) * B * T * n);
                    if (!branch) exit(1);
                    for (size_t j = 0; j < B * T * n; j++) branch[j] = (double)out[j] - (double)s->x[j];
                }
                for (size_t j = 0; pass == 1 && s == first && j < B * T * n; j++) {
                    double whole = (double)out[j] - (double)s->x[j], d = branch[j] * (1 - p_first) - whole;
                    if (keeps_first[j / n]) difference += d * d, sum += whole * whole;
                }
            }
        }
    }
    expect_error(t, "a kept branch is scaled by 1/(1-p)", difference / sum, sizeof(floatX) == 2 ? 1e-2 : 1e-9);
    expect(t, mixed > 0, "each frame is drawn for itself");
    expect(t, dropped > 20 && kept > 80, "some frames are dropped, most are not");      // 168 in all, 52 on average
    for (uint64_t i = 0; i < 100000; i++) zeros += dropout_factor(rng_key(1, RNG_DROPOUT, 0), i, 0.1f) == 0;
    expect_error(t, "a tenth is dropped out", fabs(zeros / 1e5 - 0.1), 0.004);              // 4 standard deviations

    // a batch of one frame: what drops it has nothing left to compute, and no gradient
    float *dlogits = (float *)malloc(sizeof(float) * H * W);
    int empty = 0;
    if (!dlogits) exit(1);
    for (int i = 0; i < H * W; i++) dlogits[i] = (float)hash_u(fnv1a32("dlogits"), (uint64_t)i);
    m.drop_path = 0.9f;
    m.step = 3;
    model_plan(&m, 1, 1, H, W, 1, 0, 0);
    model_forward(&m, input);
    model_zero_grad(&m);
    model_backward(&m, NULL, dlogits, dlogits, input);
    settle();
    for (int i = 0; i < m.num_sublayers; i++) {
        const Sublayer *s = &m.sublayers[i];
        Run r = { 0, 0, 0 };
        if (next_run(&m, s, r).n > 0) continue;
        empty++;
        for (int c = 0; c < 2; c++)
            expect(t, m.grads[s->norm.weight + (size_t)c] == 0, "what is dropped has no gradient");
    }
    expect(t, empty > 0, "some sublayers dropped their only frame");
    expect(t, all_finite(m.grads, m.num_params), "their gradients and all others are numbers");
    model_free(&m);
    free(dlogits);
    free(branch);
    free(input);
}

// What the planning pass found must be what forward and backward take, for every set of scans, every boundary head and with drop path.
static void test_plan(Test *t, const void *row) {
    static const char *const scans[5] = { "fbs", "fb", "f", "s", "" };
    static const int edge_layers[3] = { 0, 1, 3 };
    enum { B = 2, T = 3, H = 45, W = 37 };
    float *input = (float *)calloc_check(B * T * H * W * 3, sizeof(float)), *dlogits = (float *)calloc_check(B * T * H * W, sizeof(float));
    (void)row;
    for (int i = 0; i < 45; i++) {             // evaluation, training, training with the logits of all frames
        Config config = CONFIGS[0];
        Model m;
        config.edge_layers = edge_layers[i % 3];
        config.depths[0] = 2;                                          // drop path begins with the second block
        strcpy(config.scans, scans[i / 9]);
        if (!config.scans[0]) memset(config.mamba_depths, 0, sizeof config.mamba_depths);
        model_init(&m, &config, 1);
        m.drop_path = 1e-9f;                                           // and drops nothing: what is dropped takes no memory
        model_plan(&m, B, T, H, W, i / 3 % 3 > 0, i / 3 % 3 == 2, 0);
        model_forward(&m, input);
        if (m.training) model_backward(&m, NULL, dlogits, config.edge_layers ? dlogits : NULL, input);
        expect(t, m.kept.peak == m.kept_planned, "activations take what was planned");
        expect(t, m.scratch.peak == m.scratch_planned, "scratch takes what was planned");
        model_free(&m);
    }
    free(input);
    free(dlogits);
}

static void test_resize(Test *t, const void *row) {
    static const char *const sources[2] = { "syn0", "syn1" }, *const kinds[2] = { "rgb", "gt" }, *const sizes[2] = { "128x128", "96x64" };
    char path[1024], err[512], name[64], what[160];
    SafeTensors st;
    (void)row;
    snprintf(path, sizeof path, "%s/resize_syn.safetensors", t->golden);
    if (safetensors_open(&st, path, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.200s", err);
        return;
    }
    for (int i = 0; i < 8; i++) {
        snprintf(name, sizeof name, "%s.%s", sources[i & 1], kinds[i >> 1 & 1]);
        const SafeTensor *source = safetensors_find(&st, name);
        snprintf(name, sizeof name, "%s.%s_%s", sources[i & 1], kinds[i >> 1 & 1], sizes[i >> 2]);
        const SafeTensor *golden = safetensors_find(&st, name);
        if (!source || !golden) {
            test_fail(t, "%s is missing in %s", name, path);
            continue;
        }
        int channels = source->ndim == 3 ? 3 : 1, most = 0;
        size_t differing = 0;
        uint8_t *out = (uint8_t *)malloc(golden->numel);
        if (!out) exit(1);
        memset(out, 77, golden->numel);
        int status = resize_bilinear(out, (int)golden->shape[0], (int)golden->shape[1], source->data, (int)source->shape[0], (int)source->shape[1], channels);
        expect(t, status == 0, "resize_bilinear returns 0");
        for (size_t k = 0; k < golden->numel; k++) {
            int difference = abs(out[k] - golden->data[k]);
            most = difference > most ? difference : most;
            differing += difference > 0;
        }
        free(out);
        snprintf(what, sizeof what, "%s: largest difference in grey levels", name);
        expect_error(t, what, most, 1);
        snprintf(what, sizeof what, "%s: part of the pixels that differ", name);
        expect_error(t, what, (double)differing / (double)golden->numel, 0.01);
    }
    safetensors_close(&st);
}

static void test_enhance(Test *t, const void *row) {
    char path[1024], err[512], what[160];
    SafeTensors st;
    (void)row;
    snprintf(path, sizeof path, "%s/enhance.safetensors", t->golden);
    if (safetensors_open(&st, path, err, sizeof err) != 0) {
        snprintf(t->skipped, sizeof t->skipped, "%.200s", err);
        return;
    }
    const SafeTensor *rgb = safetensors_find(&st, "rgb"), *factors = safetensors_find(&st, "factors"), *golden = safetensors_find(&st, "out");
    expect(t, rgb && factors && golden && golden->numel == rgb->numel * (factors->numel / 4), "the file has its three tensors");
    if (t->failures) return;
    uint8_t *image = (uint8_t *)malloc(2 * rgb->numel);
    if (!image) exit(1);
    for (size_t i = 0; i < factors->numel / 4; i++) {
        float f[4];
        for (size_t k = 0; k < 4; k++) f[k] = (float)safetensors_value(factors, 4 * i + k);
        memcpy(image, rgb->data, rgb->numel);
        enhance(image, image + rgb->numel, (int)rgb->shape[0], (int)rgb->shape[1], f[0], f[1], f[2], f[3]);
        snprintf(what, sizeof what, "factors %g %g %g %g: equal to Pillow", (double)f[0], (double)f[1], (double)f[2], (double)f[3]);
        expect(t, memcmp(image, golden->data + i * rgb->numel, rgb->numel) == 0, what);
    }
    free(image);
    safetensors_close(&st);
}

static int read_file(const char *path, unsigned char **bytes, size_t *size) {
    FILE *f = fopen(path, "rb");
    *bytes = NULL;
    if (!f) return -1;
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    *bytes = (unsigned char *)malloc(*size + 1);
    int ok = *bytes && fread(*bytes, 1, *size, f) == *size;
    fclose(f);
    return ok ? 0 : -1;
}

static void write_file(const char *path, const unsigned char *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f) != 0) {
        fprintf(stderr, "test_vivim: cannot write %s\n", path);
        exit(1);
    }
}

// A scratch file's name; the tests write nothing anywhere else.
static const char *scratch_path(char *path, size_t size, const char *name) {
    const char *directory = getenv("TMPDIR");
    snprintf(path, size, "%s/test_vivim_%ld_%s", directory ? directory : "/tmp", (long)getpid(), name);
    return path;
}

// What is written is read again; every kind of damage is refused with one line that names the file.
static void test_shard(Test *t, const void *row) {
    enum { VIDEOS = 3, H = 5, W = 7 };
    static const int frames[VIDEOS] = { 2, 1, 4 };
    static const char *const names[VIDEOS] = { "a", "\xc3\xa9: a name of all the 59 bytes that are allowed in a shard.", "c" };
    char path[512], what[128], err[512] = "";
    Shard s;
    ShardWriter w;
    uint8_t rgb[H * W * 3], mask[H * W];
    (void)row;
    scratch_path(path, sizeof path, "shard");
    for (int masks = 0; masks < 2; masks++) {
        int ok = shard_create(&w, path, H, W, masks, err, sizeof err) == 0, frame = 0;
        for (int v = 0; v < VIDEOS && ok; v++) {
            ok = shard_begin_video(&w, names[v], err, sizeof err) == 0;
            for (int f = 0; f < frames[v] && ok; f++, frame++) {
                for (int i = 0; i < H * W * 3; i++) rgb[i] = (uint8_t)(frame * 31 + i);
                for (int i = 0; i < H * W; i++) mask[i] = (uint8_t)(frame * 17 + 3 * i);
                ok = shard_add_frame(&w, rgb, masks ? mask : NULL, err, sizeof err) == 0;
            }
        }
        ok = ok && shard_finish(&w, err, sizeof err) == 0 && shard_open(&s, path, err, sizeof err) == 0;
        expect(t, ok, ok ? "shard written and opened" : err);
        if (!ok) return;
        ok = s.videos == VIDEOS && s.frames == 7 && s.H == H && s.W == W && s.has_masks == masks;
        for (int v = 0, first = 0; v < VIDEOS && ok; first += frames[v], v++) {
            ok = s.first_frame[v] == first && s.first_frame[v + 1] == first + frames[v] && strcmp(shard_video_name(&s, v), names[v]) == 0;
        }
        for (int f = 0; f < 7 && ok; f++) {
            for (int i = 0; i < H * W * 3; i++) ok &= shard_frame(&s, f)[i] == (uint8_t)(f * 31 + i);
            for (int i = 0; i < H * W && masks; i++) ok &= shard_mask(&s, f)[i] == (uint8_t)(f * 17 + 3 * i);
        }
        expect(t, ok, "sizes, names, frames and masks come back");
        shard_close(&s);
    }

    // The file with one number changed; then cut at every length, and with a byte more.
    static const struct { int offset; int32_t value; } damage[] = {
        { 0, 0x4D565657 }, { 4, 2 }, { 8, 0 }, { 8, -1 }, { 8, 1000001 }, { 8, 4 }, { 12, 0 }, { 12, 6 }, { 12, 0x7FFFFFFF }, { 16, 0 }, { 16, 6 }, { 16, 16385 },
        { 16, -5 }, { 20, 0 }, { 20, 0x40000000 }, { 24, 1 }, { 24, 4 }, { 28, 0 }, { 28, 2 }, { 32, 1 }, { 1020, -1 }, { 1024, 0 }, { 1024, 3 }, { 1024, -1 },
        { 1024, 0x7FFFFFFF }, { 1028, 0x2F }, { 1028, 0 }, { 1028, 0x9BC2 } };
    unsigned char *bytes;
    size_t size = 0;
    expect(t, read_file(path, &bytes, &size) == 0, "shard read as bytes");
    for (int i = 0; i < (int)(sizeof damage / sizeof damage[0]); i++) {
        unsigned char kept[4];
        memcpy(kept, bytes + damage[i].offset, 4);
        shard_put(bytes + damage[i].offset, damage[i].value);
        write_file(path, bytes, size);
        memcpy(bytes + damage[i].offset, kept, 4);
        int status = shard_open(&s, path, err, sizeof err);
        snprintf(what, sizeof what, "refused: number %d at byte %d", (int)damage[i].value, damage[i].offset);
        expect(t, status != 0 && strstr(err, path) && !strchr(err, '\n'), what);
        if (status == 0) shard_close(&s);
    }
    unsigned char name[60];
    memcpy(name, bytes + 1028, 60);
    memset(bytes + 1028, 'x', 60);
    write_file(path, bytes, size);
    memcpy(bytes + 1028, name, 60);
    expect(t, shard_open(&s, path, err, sizeof err) != 0, "refused: a name without an end");
    int accepted = 0;
    for (size_t length = 0; length <= size + 1; length += length < 40 || length + 40 > size ? 1 : 37) {
        unsigned char *longer = (unsigned char *)calloc(1, size + 1);
        if (!longer) exit(1);
        memcpy(longer, bytes, size);
        write_file(path, longer, length);
        free(longer);
        if (shard_open(&s, path, err, sizeof err) != 0) continue;
        shard_close(&s);
        accepted += length == size ? 1 : 100;
    }
    expect(t, accepted == 1, "refused: cut off, or with a byte more");
    free(bytes);
    unlink(path);
    expect(t, shard_open(&s, path, err, sizeof err) != 0, "refused: no file");
}

// Tensors of several types, names and metadata with everything that JSON must escape; then damaged headers.
static void test_safetensors(Test *t, const void *row) {
    static const uint16_t half[4] = { 0x3C00, 0xC000, 0x0001, 0x7BFF }, brain[2] = { 0x3F80, 0xC2F7 };
    static const double halves[4] = { 1, -2, 5.9604644775390625e-08, 65504 }, doubles[3] = { 0.1, -1e300, 0 };
    static const int64_t big[1] = { -1234567890123 };
    static const unsigned char bytes[3] = { 0, 127, 255 };
    static const char *const keys[2] = { "plain", "with \"quotes\" \\ and \xc3\xa9" }, *const values[2] = { "", "{\"a\": [1, 2]}\n\ttab\x01" };
    SafeTensorOut out[6];
    SafeTensors st;
    char path[512], err[512] = "", what[160];
    (void)row;
    memset(out, 0, sizeof out);
    out[0].name = "z"; out[0].dtype = "F16"; out[0].ndim = 2; out[0].shape[0] = 2; out[0].shape[1] = 2; out[0].data = half; out[0].nbytes = sizeof half;
    out[1].name = "a.b"; out[1].dtype = "U8"; out[1].ndim = 1; out[1].shape[0] = 3; out[1].data = bytes; out[1].nbytes = sizeof bytes;
    out[2].name = "a"; out[2].dtype = "F64"; out[2].ndim = 1; out[2].shape[0] = 3; out[2].data = doubles; out[2].nbytes = sizeof doubles;
    out[3].name = "scalar"; out[3].dtype = "I64"; out[3].data = big; out[3].nbytes = sizeof big;
    out[4].name = "empty"; out[4].dtype = "F32"; out[4].ndim = 2; out[4].shape[0] = 0; out[4].shape[1] = 9; out[4].data = bytes;
    out[5].name = "odd \"name\"\\ \xf0\x9f\x98\x80"; out[5].dtype = "BF16"; out[5].ndim = 1; out[5].shape[0] = 2; out[5].data = brain; out[5].nbytes = sizeof brain;
    scratch_path(path, sizeof path, "safetensors");
    int ok = safetensors_write(path, out, 6, keys, values, 2, err, sizeof err) == 0 && safetensors_open(&st, path, err, sizeof err) == 0;
    expect(t, ok, ok ? "written and opened" : err);
    if (!ok) return;
    expect(t, st.count == 6 && st.metadata_count == 2, "six tensors, two texts");
    for (int i = 0; i < 2; i++) {
        const char *text = safetensors_metadata(&st, keys[i]);
        expect(t, text && strcmp(text, values[i]) == 0, "metadata come back");
    }
    for (int i = 0; i < 6; i++) {
        const SafeTensor *found = safetensors_find(&st, out[i].name);
        ok = found && found->nbytes == out[i].nbytes && found->ndim == out[i].ndim && memcmp(found->data, out[i].data, out[i].nbytes) == 0;
        expect(t, ok, "a tensor comes back");
        for (size_t k = 0; ok && i == 0 && k < 4; k++) ok = safetensors_value(found, k) == halves[k];
        for (size_t k = 0; ok && i == 2 && k < 3; k++) ok = safetensors_value(found, k) == doubles[k];
        if (ok && i == 3) ok = safetensors_value(found, 0) == -1234567890123.0;
        if (ok && i == 5) ok = safetensors_value(found, 1) == -123.5;
        expect(t, ok, "its values are right");
    }
    expect(t, !safetensors_find(&st, "b") && !safetensors_find(&st, ""), "a name that is not there is not found");
    safetensors_close(&st);

    static const char *const bad[] = {         // each behind 24 bytes of data
        "{\"__metadata__\":{\"k\":\"1\",\"l\":\"2\",\"k\":\"3\"},\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[8,20]}}",
        "{\"\\u009b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},\"\\u009b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[12,24]}}",
        "", "{", "[]", "{}", "{} {}", "{\"a\":1}", "{\"a\":{}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[6]}}",
        "{\"a\":{\"dtype\":\"F31\",\"shape\":[6],\"data_offsets\":[0,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[7],\"data_offsets\":[0,28]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-6],\"data_offsets\":[0,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[6.0],\"data_offsets\":[0,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[06],\"data_offsets\":[0,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[24,0]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24,0]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,6],\"data_offsets\":[0,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,6],\"data_offsets\":[0,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[9999999999999999999],\"data_offsets\":[0,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[4,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24],\"x\":1}}",
        "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]},}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[12,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[8,24]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}x", "{\"a\\q\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
        "{\"a\\ud800\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}", "{\"a\\u0000\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
        "{\"__metadata__\":{\"a\":1},\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}", "{\"a" };
    for (int i = 0; i < (int)(sizeof bad / sizeof bad[0]); i++) {
        unsigned char file[512];
        size_t length = strlen(bad[i]);
        memset(file, 0, sizeof file);
        file[0] = (unsigned char)length;
        memcpy(file + 8, bad[i], length);
        memset(&st, 0, sizeof st);
        int status = safetensors_parse(&st, file, 8 + length + 24, "FILE", err, sizeof err);
        snprintf(what, sizeof what, "refused: %.100s", bad[i]);
        int clean = 1;                         // one line in which nothing can steer a terminal: also no U+0080 .. U+009F
        for (const unsigned char *c = (const unsigned char *)err; *c; c++)
            clean &= *c >= 32 && *c != 127 && (*c != 0xC2 || c[1] < 128 || c[1] >= 160);
        expect(t, status != 0 && clean && strncmp(err, "FILE: ", 6) == 0, what);
        if (status == 0) safetensors_close(&st);
    }
    expect(t, safetensors_write("/nonexistent/file", out, 6, keys, values, 2, err, sizeof err) != 0, "a file that cannot be written is an error");
    unlink(path);
}

// The table of the released model - b3, edge head of one layer - is the released state_dict: every key, every shape. The only
// tensor outside the table is the scalar num_batches_tracked.
static void test_keys(Test *t, const void *row) {
    Config config = CONFIGS[4];
    char path[1024], line[512], what[256];
    int keys = 0, found = 0;
    Model m;
    (void)row;
    snprintf(path, sizeof path, "%s/keys.txt", t->golden);
    FILE *f = fopen(path, "r");
    if (!f) {
        snprintf(t->skipped, sizeof t->skipped, "%.200s: cannot be read", path);
        return;
    }
    config.edge_layers = 1;
    model_init(&m, &config, 1);
    while (fgets(line, sizeof line, f)) {
        char name[256], shape[128], ours[128] = "";
        if (line[0] == '#' || sscanf(line, "%255s [%127[^]]", name, shape) != 2) {
            found += strncmp(line, "decoder.batch_norm.num_batches_tracked []", 41) == 0, keys += line[0] != '#';
            continue;
        }
        keys++;
        for (int i = 0; i < m.num_tensors; i++) {
            const Tensor *row_i = &m.tensors[i];
            if (strcmp(row_i->name, name) != 0) continue;
            for (int k = 0, n = 0; k < row_i->ndim; k++) n += snprintf(ours + n, sizeof ours - (size_t)n, k ? ",%d" : "%d", row_i->shape[k]);
            found++;
        }
        snprintf(what, sizeof what, "%.120s: [%.60s] is [%.60s]", name, ours, shape);
        expect(t, strcmp(ours, shape) == 0, what);
    }
    fclose(f);
    expect(t, keys == 912 && found == keys && m.num_tensors + 1 == keys, "912 keys, each once");
    model_free(&m);
}

// what checkpoint_load prints would disturb the list of tests
static void load_quietly(Model *m, const char *path) {
    fflush(stdout);
    int out = dup(STDOUT_FILENO), null = open("/dev/null", O_WRONLY);
    dup2(null, STDOUT_FILENO);
    checkpoint_load(m, path);
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    close(out), close(null);
}

// A saved model is read back bit for bit, and its file alone tells the sizes, for every set of scans and every boundary head.
static void test_checkpoint(Test *t, const void *row) {
    static const char *const scans[5] = { "fbs", "fb", "f", "s", "" };
    static const int edge_layers[3] = { 0, 1, 3 };
    char path[512];
    (void)row;
    if (IS_DOUBLE) {
        snprintf(t->skipped, sizeof t->skipped, "files hold float32");
        return;
    }
    scratch_path(path, sizeof path, "checkpoint");
    for (int i = 0; i < 15; i++) {
        Config config = CONFIGS[i % 2], read = CONFIGS[1];
        Model a, b;
        config.edge_layers = edge_layers[i % 3];
        strcpy(config.scans, scans[i / 3]);
        if (!config.scans[0]) memset(config.mamba_depths, 0, sizeof config.mamba_depths);
        model_init(&a, &config, 1);
        a.batches_tracked = 77;
        checkpoint_save(&a, path, 3, 0.5, 5, 64, 96);
        read.edge_layers = 0;
        config_from_file(&read, path);
        if (!config.scans[0]) memcpy(config.mamba_depths, CONFIGS[i % 2].mamba_depths, sizeof config.mamba_depths), strcpy(config.scans, "fbs");
        expect(t, memcmp(&config, &read, sizeof config) == 0, "the file tells the sizes");
        if (scans[i / 3][0]) {
            model_init(&b, &read, 2);
            load_quietly(&b, path);
            expect_bits(t, "parameters", a.params, b.params, a.num_params);
            expect_bits(t, "buffers", a.buffers, b.buffers, a.num_buffers);
            expect(t, b.batches_tracked == 77, "counter of batch norm");
            model_free(&b);
        }
        model_free(&a);
    }
    remove(path);
}

// SegFormer's encoder and decoder under HuggingFace's names fill ours; its classifier of 19 classes is left out; the Mamba
// layers keep their initial values.
static void test_segformer(Test *t, const void *row) {
    static const char *const encoders[2] = { "segformer.encoder.", "encoder." };
    char path[512], err[512];
    (void)row;
    if (IS_DOUBLE) {
        snprintf(t->skipped, sizeof t->skipped, "files hold float32");
        return;
    }
    scratch_path(path, sizeof path, "segformer");
    for (int round = 0; round < 4; round++) {      // with and without the prefix; with a decoder and the bare encoder
        Config config = CONFIGS[1], read = CONFIGS[0];
        Model a, b, fresh;
        char names[1024][128];
        static SafeTensorOut out[1024];
        int n = 0, copied = 0, kept = 0, bare = round / 2;
        model_init(&a, &config, 1);
        for (int i = 0; i < a.num_tensors; i++) {
            const Tensor *row_i = &a.tensors[i];
            int encoder = strncmp(row_i->name, "encoder.downsample_layers.", 26) == 0, decoder = strncmp(row_i->name, "decoder.", 8) == 0;
            if (!encoder && !(decoder && !bare)) continue;
            snprintf(names[n], sizeof names[n], "%s%s", encoder ? encoders[round % 2] : "decode_head.", row_i->name + (encoder ? 26 : 8));
            memset(&out[n], 0, sizeof out[n]);
            out[n].name = names[n], out[n].dtype = "F32", out[n].ndim = row_i->ndim;
            for (int k = 0; k < row_i->ndim; k++) out[n].shape[k] = row_i->shape[k];
            if (strstr(row_i->name, "classifier")) out[n].shape[0] = 19;
            out[n].data = tensor_data(&a, row_i), out[n].nbytes = row_i->numel * sizeof(float);
            if (strstr(row_i->name, "classifier")) out[n].nbytes = out[n].nbytes / 150 * 19;
            n++;
        }
        if (safetensors_write(path, out, n, NULL, NULL, 0, err, sizeof err) != 0) expect(t, 0, err);
        config_from_file(&read, path);
        config.edge_layers = read.edge_layers;
        expect(t, memcmp(&config, &read, sizeof config) == 0, "the file tells the sizes: b0");
        model_init(&b, &read, 2), model_init(&fresh, &read, 2);
        load_quietly(&b, path);
        for (int i = 0; i < b.num_tensors; i++) {
            const Tensor *row_i = &b.tensors[i];
            int encoder = strncmp(row_i->name, "encoder.downsample_layers.", 26) == 0, decoder = strncmp(row_i->name, "decoder.", 8) == 0;
            int comes = (encoder || (decoder && !bare)) && !strstr(row_i->name, "classifier");
            const Model *from = comes ? &a : &fresh;
            expect_bits(t, row_i->name, tensor_data(&b, row_i), tensor_data(from, &from->tensors[i]), row_i->numel);
            copied += comes, kept += !comes;
        }
        expect(t, copied > 100 && kept > 100, "both kinds of tensors are there");
        model_free(&a), model_free(&b), model_free(&fresh);
    }
    remove(path);
}

typedef struct { float *prob; int calls, in_order, H, W; } Seen;

static void see(void *context, int frame, const float *prob) {
    Seen *s = (Seen *)context;
    s->in_order += frame == s->calls++;
    memcpy(s->prob + (size_t)frame * (size_t)(s->H * s->W), prob, sizeof(float) * (size_t)(s->H * s->W));
}

// Prediction by clips: every frame once, in order, the mean over the clips that hold it. Prediction of centred clips: what
// the model says of the middle frame. Videos longer than a clip, shorter, and of a single frame.
static void test_predict(Test *t, const void *row) {
    enum { H = 32, W = 40, FRAMES = 14, T = 4, PIXELS = H * W };
    int first_frame[4] = { 0, 10, 13, 14 };
    uint8_t *rgb = (uint8_t *)malloc_check((size_t)FRAMES * PIXELS * 3);
    float *got = malloc_floats((size_t)FRAMES * PIXELS), *want = malloc_floats((size_t)FRAMES * PIXELS);
    Config config = CONFIGS[0];
    Shard shard;
    Model m;
    Batch batch;
    (void)row;
    for (int i = 0; i < FRAMES * PIXELS * 3; i++) rgb[i] = (uint8_t)(127.5 + 127.5 * hash_u(fnv1a32("input"), (uint64_t)i));
    memset(&shard, 0, sizeof shard);
    shard.videos = 3, shard.frames = FRAMES, shard.H = H, shard.W = W, shard.first_frame = first_frame, shard.rgb = rgb;
    shard.path = strdup("scratch");
    model_init(&m, &config, 1);
    for (int stride = 0; stride <= 5; stride++) {
        int most = stride > T ? T : stride;        // clips further apart than they are long would leave frames out
        Seen seen = { got, 0, 0, H, W };
        for (size_t i = 0; i < (size_t)FRAMES * PIXELS; i++) got[i] = (float)NAN, want[i] = 0;
        for (int v = 0; v < 3; v++) {
            int begin = first_frame[v], n = first_frame[v + 1] - begin, length = most && n < T ? n : T, count[FRAMES] = { 0 };
            if (stride) predict_strided(&m, &shard, v, T, stride, H, W, see, &seen);
            else predict_centred(&m, &shard, v, 3, T, H, W, see, &seen);
            batch_init(&batch, 1, length, H, W);
            for (int first = 0; first < n; first++) {
                int target = begin + first + (most ? length / 2 : 0);
                if (most && !(first + length <= n && (first % most == 0 || first == n - length))) continue;
                model_plan(&m, 1, length, H, W, 0, most > 0, 0);
                batch_load(&batch, &shard, &target, 1, NULL, 0);
                model_forward(&m, batch.input);
                for (int k = 0; k < (most ? length : 1); k++, count[first + k - 1]++)
                    for (int i = 0; i < PIXELS; i++)
                        want[(begin + first + k) * PIXELS + i] += 1 / (1 + expf(-m.logits[k * PIXELS + i]));
            }
            batch_free(&batch);
            for (int f = 0; f < n; f++)
                for (int i = 0; i < PIXELS; i++) want[(begin + f) * PIXELS + i] /= (float)count[f];
        }
        expect(t, seen.calls == FRAMES && seen.in_order == FRAMES, "every frame once, in order");
        expect_close(t, "probabilities", got, want, (size_t)FRAMES * PIXELS, LIMIT(1e-6));
    }
    model_free(&m);
    free(shard.path), free(rgb), free(got), free(want);
}

// All 65536 bit patterns of the two short types, against float32's bits and against the definition.
static void test_safetensors_halves(Test *t, const void *row) {
    int wrong_half = 0, wrong_brain = 0;
    (void)row;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint16_t u16 = (uint16_t)bits;
        uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023, u32;
        SafeTensor half, single;
        memset(&half, 0, sizeof half);
        memset(&single, 0, sizeof single);
        half.dtype = SAFETENSORS_F16, half.data = (const unsigned char *)&u16;
        single.dtype = SAFETENSORS_F32, single.data = (const unsigned char *)&u32;
        u32 = bits >> 15 << 31 | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
        double value = safetensors_value(&half, 0), expected = safetensors_value(&single, 0);
        if (exponent == 0) expected = (bits >> 15 ? -1.0 : 1.0) * fraction / 16777216;      // denormal: fraction * 2^-24
        if (isnan(expected) ? !isnan(value) : value != expected || signbit(value) != signbit(expected)) wrong_half++;

        half.dtype = SAFETENSORS_BF16;
        exponent = bits >> 7 & 255, fraction = bits & 127;
        value = safetensors_value(&half, 0);
        expected = exponent == 0 ? ldexp((double)fraction, -133) : ldexp((double)(fraction + 128), (int)exponent - 134);
        if (exponent == 255) expected = fraction ? NAN : HUGE_VAL;
        if (bits >> 15) expected = -expected;
        if (isnan(expected) ? !isnan(value) : value != expected || signbit(value) != signbit(expected)) wrong_brain++;
    }
    expect(t, wrong_half == 0, "F16: every bit pattern is exact");
    expect(t, wrong_brain == 0, "BF16: every bit pattern is exact");
}

// 200,000 tensors and as many texts, each found again: a fraction of a second, where anything quadratic takes minutes.
static void test_safetensors_many(Test *t, const void *row) {
    enum { COUNT = 200000, ENTRY = 96 };
    unsigned char *file = (unsigned char *)malloc((size_t)COUNT * (ENTRY + 1));
    SafeTensors st;
    char err[512] = "", name[32];
    (void)row;
    if (!file) exit(1);
    char *at = (char *)file + 8;
    at += sprintf(at, "{\"__metadata__\":{");
    for (int i = 0; i < COUNT; i++) at += sprintf(at, "%s\"k%d\":\"%d\"", i ? "," : "", i, i);
    at += sprintf(at, "}");
    for (int i = 0; i < COUNT; i++)
        at += sprintf(at, ",\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", i, i, i + 1);
    at += sprintf(at, "}");
    size_t length = (size_t)((unsigned char *)at - file) - 8;
    for (int i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)length >> 8 * i);
    for (int i = 0; i < COUNT; i++) at[i] = (char)(i & 127);
    memset(&st, 0, sizeof st);
    clock_t start = clock();
    int ok = safetensors_parse(&st, file, 8 + length + COUNT, "FILE", err, sizeof err) == 0;
    expect(t, ok && st.count == COUNT && st.metadata_count == COUNT, ok ? "as many as written" : err);
    for (int i = 0; i < COUNT && ok; i++) {
        snprintf(name, sizeof name, "t%d", i);
        const SafeTensor *found = safetensors_find(&st, name);
        name[0] = 'k';
        const char *text = safetensors_metadata(&st, name);
        ok = found && safetensors_value(found, 0) == (i & 127) && text && strcmp(text, name + 1) == 0;
    }
    expect(t, ok, "each is found");
    expect(t, (double)(clock() - start) / CLOCKS_PER_SEC < 20, "in time proportional to their number");
    safetensors_close(&st);
    free(file);
}

// ------------------------------------------------------------------------------------------------------------------
// 10. main

typedef struct { char name[64]; void (*run)(Test *t, const void *row); const void *row; } TestCase;

static int add_test(TestCase *tests, int count, const char *prefix, const char *name, void (*run)(Test *, const void *), const void *row) {
    if (tests) {
        snprintf(tests[count].name, sizeof tests[count].name, "%s%s", prefix, name);
        tests[count].run = run;
        tests[count].row = row;
    }
    return count + 1;
}

enum { MAX_TESTS = 128 };

static int all_tests(TestCase *tests) {
    int n = 0;
    n = add_test(tests, n, "hash", "", test_hash, NULL);
#ifndef VIVIM_CUDA                             // files, pictures, elementary functions on the CPU: nothing of them is different there
    n = add_test(tests, n, "safetensors", "", test_safetensors, NULL);
    n = add_test(tests, n, "safetensors", "_halves", test_safetensors_halves, NULL);
    n = add_test(tests, n, "safetensors", "_many", test_safetensors_many, NULL);
    n = add_test(tests, n, "shard", "", test_shard, NULL);
    n = add_test(tests, n, "keys", "", test_keys, NULL);
    n = add_test(tests, n, "checkpoint", "", test_checkpoint, NULL);
    n = add_test(tests, n, "segformer", "", test_segformer, NULL);
    n = add_test(tests, n, "predict", "", test_predict, NULL);
    n = add_test(tests, n, "clips", "", test_clips, NULL);
    n = add_test(tests, n, "resize", "", test_resize, NULL);
    n = add_test(tests, n, "enhance", "", test_enhance, NULL);
    n = add_test(tests, n, "elementary", "", test_elementary, NULL);
    n = add_test(tests, n, "threads", "", test_threads_next, NULL);
    n = add_test(tests, n, "golden.", "elementary", test_golden_elementary, NULL);
    n = add_test(tests, n, "golden.", "cosine", test_golden_cosine, NULL);
    for (int i = 0; i < 4; i++) n = add_test(tests, n, "differences.", DIFFERENCES[i].name, test_model_differences, &DIFFERENCES[i]);
#endif
    n = add_test(tests, n, "drop", "", test_drop, NULL);
    n = add_test(tests, n, "plan", "", test_plan, NULL);
    n = add_test(tests, n, "op.", "matmul", test_matmul, NULL);
    for (int i = 0; i < OP_ROW_COUNT; i++) {
        if (i == 0 || strcmp(OP_ROWS[i].name, OP_ROWS[i - 1].name) != 0) n = add_test(tests, n, "op.", OP_ROWS[i].name, test_op, &OP_ROWS[i]);
    }
    n = add_test(tests, n, "op.", "orders", test_orders, NULL);
#if defined(VIVIM_CUDA) && !defined(NO_NCCL)
    n = add_test(tests, n, "nccl", "", test_nccl, NULL);
#endif
    for (int i = 0; i < GOLDEN_ROW_COUNT; i++) n = add_test(tests, n, "golden.", GOLDEN_ROWS[i].name, test_golden_op, &GOLDEN_ROWS[i]);
    n = add_test(tests, n, "op.", "segloss", test_segloss, NULL);
    n = add_test(tests, n, "golden.", "segloss", test_golden_segloss, NULL);
    n = add_test(tests, n, "op.", "sobel", test_sobel, NULL);
    n = add_test(tests, n, "op.", "edgeloss", test_edgeloss, NULL);
    n = add_test(tests, n, "golden.", "edgeloss", test_golden_edgeloss, NULL);
    n = add_test(tests, n, "op.", "affine_term", test_affine_term, NULL);
    n = add_test(tests, n, "golden.", "boundary", test_boundary, NULL);
    n = add_test(tests, n, "golden.", "batchnorm", test_golden_batchnorm, NULL);
    n = add_test(tests, n, "golden.", "adam", test_golden_adam, NULL);
    n = add_test(tests, n, "train.", "ten_steps", test_ten_steps, NULL);
    n = add_test(tests, n, "golden.", "trajectory", test_trajectory, NULL);
    n = add_test(tests, n, "affine.", "recovery", test_affine_recovery, NULL);
    n = add_test(tests, n, "affine.", "identity", test_affine_identity, NULL);
    n = add_test(tests, n, "affine.", "pull", test_affine_descent, &PULL_PUSH[0]);
    n = add_test(tests, n, "affine.", "push", test_affine_descent, &PULL_PUSH[1]);
    for (int i = 0; i < MODEL_FILE_COUNT; i++) n = add_test(tests, n, "model.", MODEL_FILES[i], test_model, &MODEL_FILES[i]);
    return n;
}

static void run_test(Test *t, const TestCase *test, int *counts) {
    t->name = test->name;
    t->comparisons = t->failures = 0, t->rounded = ROUNDED_OP;
    t->worst = 0;
    t->skipped[0] = t->worst_what[0] = '\0';
    settle();
    set_threads(1);                            // unless a test says otherwise: waiting for threads is slow where others use the cores
    test->run(t, test->row);
    free_tensors(t);
    counts[t->failures ? 1 : t->skipped[0] ? 2 : 0]++;
    if (t->skipped[0] && !t->failures) {
        printf("skip  %-28s %s\n", t->name, t->skipped);
    } else {
        printf("%s  %-28s %5d comparisons, worst %4.2f of its limit%s%s\n", t->failures ? "FAIL" : "ok  ", t->name, t->comparisons,
               t->worst, t->worst_what[0] ? ": " : "", t->worst_what);
    }
    fflush(stdout);
}

static void test_file(Test *t, const void *row) {
    golden_model(t, (const char *)row);
    if (t->skipped[0]) test_fail(t, "%s", t->skipped);       // asked for by name: its absence is no excuse
}

int main(int argc, char **argv) {
    static Test t;
    static TestCase tests[MAX_TESTS];
    int list = 0, golden = 0, words = 0, counts[3] = { 0, 0, 0 };      // passed, failed, skipped
    t.golden = getenv("VIVIM_GOLDEN") ? getenv("VIVIM_GOLDEN") : "dev/golden";
    int count = all_tests(tests);
#ifdef VIVIM_CUDA
    start_cuda();
#endif
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) list = 1;
        else if (strcmp(argv[i], "--golden") == 0) golden = t.verbose = 1;
        else if (strcmp(argv[i], "--verbose") == 0) t.verbose = 1;
        else if (argv[i][0] == '-') {
            fprintf(stderr, "test_vivim: unknown option %s; there are --list, --verbose and --golden FILE...\n", argv[i]);
            return 1;
        } else words += argv[i][0] != '^';
    }
    for (int i = 1; i < argc && golden; i++) {
        TestCase file;
        if (argv[i][0] == '-') continue;
        const char *slash = strrchr(argv[i], '/');
        add_test(&file, 0, "", slash ? slash + 1 : argv[i], test_file, argv[i]);
        run_test(&t, &file, counts);
    }
    for (int k = 0; k < count && !golden; k++) {
        int wanted = words == 0;
        for (int i = 1; i < argc; i++) wanted |= argv[i][0] != '-' && strncmp(tests[k].name, argv[i], strlen(argv[i])) == 0;
        for (int i = 1; i < argc; i++) wanted &= argv[i][0] != '^' || strncmp(tests[k].name, argv[i] + 1, strlen(argv[i] + 1)) != 0;
        if (!wanted) continue;
        if (list) printf("%s\n", tests[k].name);
        else run_test(&t, &tests[k], counts);
    }
    for (int f = 0; f < OPS_FILES; f++) safetensors_close(&t.ops[f]);
    if (list) return 0;
    if (counts[0] + counts[1] + counts[2] == 0) fprintf(stderr, "test_vivim: no test begins with these words; --list shows the names\n");
    printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
    return counts[1] > 0 || counts[0] + counts[2] == 0;
}
