/* lab.h - the kernel laboratory's bench: what dev/scan_forward.c, dev/matmul.c and the others have in common. Header only.

   A program includes ../train_vivim.c (or .cu) without its main, then this, and gives lab_main a LabProgram: ladders of
   kernels, version 0 being the one that ships. dev/README.md adds a kernel in ten lines. For each ladder lab_main
   - CHECKS every version against the CPU function of train_vivim.c, at small, odd and prime sizes and at the size that is
     timed: outputs hold NaN before, behind and before every tensor stand guard words, and errors are judged by
     !(error <= limit), so that NaN fails. A version that fails is named, is not timed, and makes the exit status 1;
   - TIMES the others in turn, A B C A B C, each with the tensors out of the caches, and prints median and minimum, with the
     bytes that must move against a copy's speed and the arithmetic against its speed in registers, both measured then.

   Sections: 1 sizes | 2 tensors, kernels, ladders, programs | 3 the CPU as a device | 4 options | 5 checks | 6 timing | 7 main

   Where memory lies and how time is measured is a LabDevice, the CPU unless the program says otherwise (dev/lab_cuda.h).
   -DLAB_BREAK=1 spoils a number of version 1's last output, 2 leaves a NaN there, 3 writes behind it: dev/test_lab.sh shows
   that this is found. */
#ifndef VIVIM_LAB_H
#define VIVIM_LAB_H
#include <float.h>
#include <sys/utsname.h>

// ---------------------------------------------------------------------------------------------------------------------
// 1 SIZES

typedef struct {
    int B, T, H, W, C;             // clips, frames, grid, channels of what the kernel reads: (B, T, H, W, C)
    int N, directions;             // selective scan: d_state, orders of visiting (1 to 3)
    int heads, Pk, E;              // attention: keys of a frame; width of the decoder
    int M, cols, K;                // matmul: C (M, cols) = op(A) (M, K) op(B) (K, cols)
    int transA, transB, accumulate;
    char label[48];                // one of several shapes; empty if there is only one
} Sizes;

static size_t tokens_of(const Sizes *s) { return (size_t)s->B * s->T * s->H * s->W; }

// "b3.1": the features of stage 1 of b3 for one clip of 5 frames of 256x256; C is the stage's
static void lab_preset(Sizes *s, const char *preset) {
    memset(s, 0, sizeof *s);
    for (size_t c = 0; c < sizeof CONFIGS / sizeof CONFIGS[0]; c++)
        for (int i = 0; i < 4; i++) {
            const Config *config = &CONFIGS[c];
            char name[32]; snprintf(name, sizeof name, "%.15s.%d", config->name, i + 1);
            if (strcmp(preset, name) != 0) continue;
            s->B = 1, s->T = 5, s->H = s->W = 64 >> i, s->C = config->dims[i];
            s->N = config->d_state, s->directions = (int)strlen(config->scans), s->heads = config->heads[i];
            s->E = config->decoder_dim;
            s->Pk = (s->H / config->reductions[i]) * (s->W / config->reductions[i]);
            return;
        }
    fail("--preset %s: wants a model and one of its stages, from tiny.1 to b5.4, as b0.2; --help lists the options", preset);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 TENSORS, KERNELS, LADDERS, PROGRAMS

// IN: uniform in low .. high, unless the ladder's derive() computes it. OUT: written. ADD: added to, and not 0 before.
enum { LAB_IN, LAB_OUT, LAB_ADD };
enum { LAB_TENSORS = 24, LAB_GUARD = 64, LAB_VERSIONS = 32 };  // guard words on either side keep tensors on cache lines

typedef struct {
    const char *name; int role; size_t numel;
    double low, high;       // of an IN
    double limit;           // of an OUT or ADD: normalised mean square error, sum (got - want)^2 / sum want^2
    float *host;            // IN: its values; OUT, ADD: what the reference makes of it
    float *block, *data;    // on the device: with guards, without
} LabTensor;

typedef struct { LabTensor tensor[LAB_TENSORS]; int count; } Lab;

static void lab_tensor(Lab *lab, int index, const char *name, int role, size_t numel, double low, double high, double limit) {
    LabTensor *t = &lab->tensor[index];
    t->name = name, t->role = role, t->numel = numel, t->low = low, t->high = high, t->limit = limit;
    lab->count = max_int(lab->count, index + 1);
}
static void lab_in(Lab *lab, int index, const char *name, size_t numel, double low, double high) {
    lab_tensor(lab, index, name, LAB_IN, numel, low, high, 0);
}
static void lab_out(Lab *lab, int index, const char *name, size_t numel, double limit) {
    lab_tensor(lab, index, name, LAB_OUT, numel, 0, 0, limit);
}
static inline void lab_add(Lab *lab, int index, const char *name, size_t numel, double limit) {
    lab_tensor(lab, index, name, LAB_ADD, numel, -1, 1, limit);
}

// A kernel gets the tensors in the ladder's order, and must do all sizes
typedef void (*LabRun)(float *const *t, const Sizes *s);
typedef struct {
    LabRun run;
    const char *idea;         // what this version changes, one line
    int (*available)(void);   // NULL: always
} LabKernel;

typedef struct {
    double bytes;             // that must move: inputs read and outputs written once (read and written if added to)
    double ops;               // of the kind that the arithmetic limit counts
    double units;             // time is also given per unit
} LabWork;

typedef struct {
    const char *name;
    const LabKernel *kernels;                             // version 0 ships; the last row is {NULL, NULL, NULL}
    void (*tensors)(Lab *lab, const Sizes *s);            // what there is: calls lab_in, lab_out, lab_add
    void (*derive)(float *const *host, const Sizes *s);   // inputs that other functions compute from the random ones, or NULL
    LabRun reference;                                     // the CPU function of train_vivim.c, on the host's memory
    LabWork (*work)(const Sizes *s);
    const char *unit, *op;                                // "token, channel, state"; "exp"
    double (*limit)(void);                                // ops per second with all numbers in registers
    int (*shape)(Sizes *s, int i);                        // turns a stage's sizes into the i-th shape, 0 if none; NULL: one
    int rival;                                            // the version that the last percentage is of, if it can run
} LabLadder;

typedef struct LabDevice LabDevice;
typedef struct {
    const char *about;
    const Option *sizes;          // the options that set sizes, as LAB_SIZE; the last row has the name NULL
    void (*preset)(Sizes *s);     // from a stage's C to this operation's, or NULL
    const LabLadder *ladders;     // the last row has the name NULL
    const Sizes *checks;          // small ones; the last row has M == 0 and B == 0
    const LabDevice *dev;
} LabProgram;

// ---------------------------------------------------------------------------------------------------------------------
// 3 THE CPU AS A DEVICE

struct LabDevice {
    void (*begin)(void);                                       // once, before anything else
    void (*name)(char *text, size_t size);                     // machine and compiler
    double (*memory)(void);                                    // bytes that there are
    float *(*allocate)(size_t floats);
    void (*release)(void *p);
    void (*copy)(float *to, const float *from, size_t floats); // in both directions
    void (*flush)(const Lab *lab);                             // no tensor is in a cache after this
    double (*time)(LabRun run, float *const *t, const Sizes *s);  // seconds of one run
    double (*copy_rate)(void);                                 // bytes per second, read and written
};

static int lab_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int lab_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double lab_median(double *x, int n) {
    qsort(x, (size_t)n, sizeof x[0], lab_compare);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

// memory for a kernel's own use; the line that says there is none names the options of these programs
static inline float *lab_floats(size_t n) {
    float *p = n < SIZE_MAX / 8 ? (float *)aligned_alloc(64, (n * sizeof(float) + 64) / 64 * 64) : NULL;
    if (p == NULL) fail("out of memory: %.1f MiB more were wanted; use smaller sizes; --help lists them", (double)n / 262144);
    return p;
}

static void cpu_begin(void) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // malloc then says no, where Linux would end the program later
    struct rlimit limit;
    limit.rlim_cur = limit.rlim_max = (rlim_t)(0.9 * machine_memory());
    setrlimit(RLIMIT_DATA, &limit);
#endif
}

static void cpu_name(char *text, size_t size) {
    struct utsname system;
    char line[256], *colon, name[128] = "unknown";
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (uname(&system) == 0) snprintf(name, sizeof name, "%.64s", system.machine);
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && (colon = strchr(line, ':')) != NULL) {
            colon[strcspn(colon, "\n")] = '\0';
            snprintf(name, sizeof name, "%.120s", colon + 2);
            break;
        }
    if (f) fclose(f);
#ifdef __clang__
    const char *compiler = __VERSION__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    snprintf(text, size, "%s, %d threads of %ld; %s", name, lab_threads(), sysconf(_SC_NPROCESSORS_ONLN), compiler);
}

static float *cpu_allocate(size_t floats) { return lab_floats(floats); }
static void cpu_copy(float *to, const float *from, size_t floats) { memcpy(to, from, floats * sizeof(float)); }

static void cpu_flush(const Lab *lab) {
#if defined(__x86_64__)
    for (int i = 0; i < lab->count; i++)
        for (size_t j = 0; j < lab->tensor[i].numel; j += 16) __builtin_ia32_clflush(lab->tensor[i].data + j);
#else  // fill the caches with something else
    enum { BYTES = 1 << 28 };
    static char *other = NULL;
    if (other == NULL) other = (char *)lab_floats(BYTES / 4);
    memset(other, lab->count, BYTES);
#endif
}

static double cpu_time(LabRun run, float *const *t, const Sizes *s) {
    double start = seconds();
    run(t, s);
    return seconds() - start;
}

static double cpu_copy_rate(void) {
    enum { FLOATS = 1 << 24, RUNS = 7 };
    float *from = lab_floats(FLOATS), *to = lab_floats(FLOATS);
    double times[RUNS];
    for (int r = -1; r < RUNS; r++) {  // the first touches the pages
        double start = seconds();
        #pragma omp parallel for simd schedule(static)
        for (int i = 0; i < FLOATS; i++) to[i] = r < 0 ? from[i] = (float)i : from[i];
        if (r >= 0) times[r] = seconds() - start;
    }
    free(from); free(to);
    return 2.0 * sizeof(float) * FLOATS / lab_median(times, RUNS);
}

static const LabDevice LAB_CPU = {
    cpu_begin, cpu_name, machine_memory, cpu_allocate, free, cpu_copy, cpu_flush, cpu_time, cpu_copy_rate};

// Runs a loop of n steps on all threads, longer and longer until it takes 20 ms: steps per second, the best of five
static volatile float lab_sink;  // what a loop computes goes here, so that it is computed
static inline double lab_rate(float (*loop)(int n)) {
    double best = 0;
    for (int run = 0, n = 1000; run < 5;) {
        double start = seconds(), time;
        #pragma omp parallel
        lab_sink = loop(n);
        time = seconds() - start;
        if (time < 0.02 && n < 1 << 28) { n *= 2; continue; }
        best = fmax(best, (double)n * lab_threads() / time);
        run++;
    }
    return best;
}

enum { LAB_CHAINS = 12 };  // independent sums: enough to fill two pipelines of latency 4 to 6
static inline float lab_fma_loop(int n) {
    float sum[LAB_CHAINS][LANES], total = 0.0f, x = 0.999999f + 0.0f * lab_sink, y = 1e-6f;
    for (int i = 0; i < LAB_CHAINS; i++)
        for (int j = 0; j < LANES; j++) sum[i][j] = 1.0f + (float)(i * LANES + j);
    for (int k = 0; k < n; k++)
        UNROLL
        for (int i = 0; i < LAB_CHAINS; i++)
            #pragma omp simd
            for (int j = 0; j < LANES; j++) sum[i][j] = sum[i][j] * x + y;
    for (int i = 0; i < LAB_CHAINS; i++)
        for (int j = 0; j < LANES; j++) total += sum[i][j];
    return total;
}
// floating point operations per second of multiply-adds in registers
static inline double cpu_flop_rate(void) {
    lab_sink = 0.0f;
    return 2.0 * LAB_CHAINS * LANES * lab_rate(lab_fma_loop);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 OPTIONS

typedef struct {
    Sizes size;  // 0: the preset's
    const char *preset, *only;
    int threads, repeats, check, csv, warm, help;
    double seconds;
} LabOptions;

#define LAB_SIZE(name, field, high, help) {name, "0", help, 'i', 0, high, offsetof(LabOptions, size.field)}
#define LAB_GRID LAB_SIZE("batch", B, 256, "clips"), LAB_SIZE("frames", T, 4096, "frames of a clip"), \
                 LAB_SIZE("height", H, 4096, "rows of a frame's grid"), LAB_SIZE("width", W, 4096, "columns of it")
static const Option LAB_OPTIONS[] = {
    {"preset", "b3.1", "a model's stage, tiny.1 .. b5.4: a clip of 5 frames, 256x256", 's', 0, 0, offsetof(LabOptions, preset)},
    {"only", "", "the ladder of this name alone", 's', 0, 0, offsetof(LabOptions, only)},
    {"threads", "0", "0: as many as OpenMP chooses", 'i', 0, 1024, offsetof(LabOptions, threads)},
    {"seconds", "0.5", "for each version, caches and all; at least 3 runs", 'd', 0, 3600, offsetof(LabOptions, seconds)},
    {"repeats", "0", "runs of each version; 0: as --seconds says", 'i', 0, 1000, offsetof(LabOptions, repeats)},
    {"warm", "", "leave in the caches what is there", 'f', 0, 0, offsetof(LabOptions, warm)},
    {"csv", "", "comma-separated values instead of tables", 'f', 0, 0, offsetof(LabOptions, csv)},
    {"check", "", "check at small sizes, time nothing", 'f', 0, 0, offsetof(LabOptions, check)},
    {"help", "", "this", 'f', 0, 0, offsetof(LabOptions, help)},
    {NULL, NULL, NULL, 0, 0, 0, 0}
};

static int lab_versions(const LabLadder *ladder) {
    int n = 0;
    while (ladder->kernels[n].run) n++;
    return n;
}
static int lab_available(const LabKernel *k) { return k->available == NULL || k->available(); }

// "all", "3" or "0,3" -> wanted[version]
static void lab_select(int wanted[LAB_VERSIONS], const char *which, const LabProgram *program, const char *only) {
    int most = 0, all = strcmp(which, "all") == 0;
    for (const LabLadder *l = program->ladders; l->name; l++)
        if (!only[0] || strcmp(only, l->name) == 0) most = max_int(most, lab_versions(l));
    if (most == 0) fail("--only %s: no such ladder; --help lists them", only);
    for (int k = 0; k < LAB_VERSIONS; k++) wanted[k] = all;
    for (const char *at = which; !all; at++) {
        char *end; long k = strtol(at, &end, 10);
        if (end == at || (*end != '\0' && *end != ',') || k < 0 || k >= most)
            fail("%s: wants a version from 0 to %d, or several as 0,2, or all; --help lists them", which, most - 1);
        wanted[k] = 1;
        if (*(at = end) == '\0') break;
    }
}

static void lab_help(const LabProgram *program) {
    printf("usage: dev/" VIVIM_PROGRAM " [version[,version...] | all] [--option value ...]\n\n%s\n\n", program->about);
    for (const LabLadder *l = program->ladders; l->name; l++) {
        printf("%s:\n", l->name);
        for (int k = 0; l->kernels[k].run; k++)
            printf("  %2d  %s%s\n", k, l->kernels[k].idea, lab_available(&l->kernels[k]) ? "" : " (not found here)");
    }
    printf("\nsizes (0: the preset's)\n");
    options_help(program->sizes);
    printf("\n");
    options_help(LAB_OPTIONS);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 CHECKS

// A NaN of our own: who reads beyond a tensor gets NaN, who writes there changes these bits
static void lab_fill_guard(float *p, size_t n) {
    const uint32_t bits = 0x7FC0BEEFu;
    for (size_t i = 0; i < n; i++) memcpy(p + i, &bits, sizeof bits);
}
static int lab_guard_intact(const float *p) {
    float guard[LAB_GUARD];
    lab_fill_guard(guard, LAB_GUARD);
    return memcmp(p, guard, sizeof guard) == 0;
}

// pseudo-random numbers for an input, and for what is added to
static void lab_fill(float *x, const LabTensor *t, int index) {
    uint64_t key = rng_key(20240129, index, 0);
    for (size_t i = 0; i < t->numel; i++) x[i] = (float)(t->low + (t->high - t->low) * (double)rng_uniform(key, i));
}

// Outputs of the device become what they are before a run: NaN, or, where the kernel adds, numbers
static void lab_reset(const Lab *lab, const LabDevice *dev, float *host_block) {
    for (int i = 0; i < lab->count; i++) {
        const LabTensor *t = &lab->tensor[i];
        if (t->role == LAB_IN) continue;
        lab_fill_guard(host_block, t->numel + 2 * LAB_GUARD);
        if (t->role == LAB_ADD) lab_fill(host_block + LAB_GUARD, t, i);
        dev->copy(t->block, host_block, t->numel + 2 * LAB_GUARD);
    }
}

// All tensors of one size, with the reference's results; returns a host buffer that holds the largest of them with guards
static float *lab_prepare(Lab *lab, const LabLadder *ladder, const LabDevice *dev, const Sizes *s) {
    float *host[LAB_TENSORS] = {NULL}, *host_block;
    double bytes = 0; size_t largest = 0;
    memset(lab, 0, sizeof *lab);
    if (tokens_of(s) > 1000000000) fail("%zu tokens are too many; use smaller sizes; --help lists them", tokens_of(s));
    ladder->tensors(lab, s);
    for (int i = 0; i < lab->count; i++) {
        bytes += 2.0 * sizeof(float) * (double)lab->tensor[i].numel;
        if (lab->tensor[i].numel > largest) largest = lab->tensor[i].numel;
    }
    if (bytes > 0.9 * dev->memory())
        fail("%.1f GiB are needed, and there are %.1f; use smaller sizes; --help lists them", bytes / 1073741824,
             dev->memory() / 1073741824);
    host_block = lab_floats(largest + 2 * LAB_GUARD);
    for (int i = 0; i < lab->count; i++) {
        LabTensor *t = &lab->tensor[i];
        host[i] = t->host = lab_floats(t->numel);
        if (t->role == LAB_OUT) lab_fill_guard(t->host, t->numel);
        else lab_fill(t->host, t, i);
    }
    if (ladder->derive) ladder->derive(host, s);
    ladder->reference(host, s);
    for (int i = 0; i < lab->count; i++) {
        LabTensor *t = &lab->tensor[i];
        t->block = dev->allocate(t->numel + 2 * LAB_GUARD), t->data = t->block + LAB_GUARD;
        if (t->role != LAB_IN) continue;
        lab_fill_guard(host_block, t->numel + 2 * LAB_GUARD);
        memcpy(host_block + LAB_GUARD, t->host, t->numel * sizeof(float));
        dev->copy(t->block, host_block, t->numel + 2 * LAB_GUARD);
        free(t->host), t->host = NULL;
    }
    return host_block;
}

static void lab_release(Lab *lab, const LabDevice *dev, float *host_block) {
    for (int i = 0; i < lab->count; i++) free(lab->tensor[i].host), dev->release(lab->tensor[i].block);
    free(host_block);
}

static void lab_pointers(float *data[LAB_TENSORS], const Lab *lab) {
    for (int i = 0; i < lab->count; i++) data[i] = lab->tensor[i].data;
}

// Runs version k once and judges it; the largest error over its outputs, or -1 if it is wrong, after a line that says how
static double lab_check(const Lab *lab, const LabLadder *ladder, int k, const LabDevice *dev, const Sizes *s,
                        float *host_block, const char *size_text) {
    float *data[LAB_TENSORS], *got = host_block + LAB_GUARD;
    double worst = 0; int wrong = 0;
    lab_pointers(data, lab);
    lab_reset(lab, dev, host_block);
    ladder->kernels[k].run(data, s);
    for (int i = 0; i < lab->count; i++) {
        const LabTensor *t = &lab->tensor[i];
        double difference = 0, size = 0, error;
        dev->copy(host_block, t->block, t->numel + 2 * LAB_GUARD);
#ifdef LAB_BREAK
        if (k == 1 && t->role != LAB_IN && (i + 1 == lab->count || t[1].role == LAB_IN))
            got[LAB_BREAK == 3 ? t->numel : t->numel / 2] = LAB_BREAK == 2 ? sqrtf(-1.0f) : 1.5f * got[t->numel / 2] + 0.5f;
#endif
        if (!lab_guard_intact(host_block) || !lab_guard_intact(got + t->numel)) {
            fprintf(stderr, "FAILED %s %d (%s) at %s: writes before or behind %s\n", ladder->name, k, ladder->kernels[k].idea,
                    size_text, t->name);
            wrong = 1;
        }
        if (t->role == LAB_IN) continue;
        for (size_t j = 0; j < t->numel; j++) {
            double want = t->host[j], d = got[j] - want;
            difference += d * d, size += want * want;
        }
        error = difference / (size + DBL_MIN);
        if (!(error <= t->limit)) {
            fprintf(stderr, "FAILED %s %d (%s) at %s: %s: NMSE %.2g, the limit is %.0g\n", ladder->name, k,
                    ladder->kernels[k].idea, size_text, t->name, error, t->limit);
            wrong = 1;
        }
        worst = fmax(worst, error);
    }
    return wrong ? -1 : worst;
}

// the shape's name, or the sizes as they would be given: "--batch 1 --frames 5 ..."
static void lab_size_text(char *text, size_t room, const LabProgram *program, const Sizes *s) {
    LabOptions o;
    size_t used = (size_t)snprintf(text, room, "%s", s->label);
    memset(&o, 0, sizeof o);
    o.size = *s;
    for (const Option *t = program->sizes; !s->label[0] && t->name && used < room; t++) {
        int value = *(const int *)(const void *)((const char *)&o + t->field);
        used += (size_t)snprintf(text + used, room - used, "%s--%s %d", used ? " " : "", t->name, value);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 TIMING

typedef struct { double times[1000], spent, error; int runs; } LabTimes;

static void lab_print_head(const LabLadder *l, const LabOptions *o) {
    if (o->csv) return;
    printf("\n| %sversion | median ms | min ms | ns per %s | GB/s | %% of copy | G%s/s | %% of limit | %% of %d's speed | NMSE "
           "| idea |\n%s|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|:--|\n", l->shape ? "shape | " : "", l->unit, l->op, l->rival,
           l->shape ? "|:--" : "");
}

static void lab_print_row(const LabLadder *l, const LabOptions *o, const Sizes *s, int k, LabTimes *t, double rival,
                          double copy_rate, double limit) {
    LabWork work = l->work(s);
    double median = lab_median(t->times, t->runs), ms = 1e3 * median, min_ms = 1e3 * t->times[0];
    double ns = 1e9 * median / work.units, gb = work.bytes / median * 1e-9, gop = work.ops / median * 1e-9;
    double of_copy = 100 * gb / (copy_rate * 1e-9), of_limit = 100 * gop / (limit * 1e-9);
    char percent[16] = "";
    if (rival > 0) snprintf(percent, sizeof percent, "%.0f", 100 * rival / median);
    if (o->csv)
        printf("%s,%s,%d,%d,%.5f,%.5f,%.5f,%.2f,%.1f,%.2f,%s,%.1f,%s,%.1e,%d\n", l->name, s->label, k, lab_threads(), ms,
               min_ms, ns, gb, of_copy, gop, l->op, of_limit, percent, t->error, t->runs);
    else {
        if (l->shape) printf("| %s ", s->label);
        printf("| %d | %.3f | %.3f | %.4f | %.1f | %.0f | %.2f | %.0f | %s | %.0e | %s |\n", k, ms, min_ms, ns, gb, of_copy,
               gop, of_limit, percent, t->error, l->kernels[k].idea);
    }
    fflush(stdout);
}

// Checks the wanted versions at the size to time, times those that are right, in turn, prints; the number of wrong ones
static int lab_time(const LabProgram *program, const LabLadder *l, const int *wanted, const LabOptions *o, const Sizes *s,
                    double copy_rate, double limit) {
    const LabDevice *dev = program->dev;
    int versions = lab_versions(l), wrong = 0, more = 1;
    char size_text[256];
    Lab lab;
    float *data[LAB_TENSORS], *host_block = lab_prepare(&lab, l, dev, s);
    LabTimes *times = (LabTimes *)calloc_check((size_t)versions, sizeof *times);
    lab_size_text(size_text, sizeof size_text, program, s);
    lab_pointers(data, &lab);
    for (int k = 0; k < versions; k++) {
        if (!wanted[k] || !lab_available(&l->kernels[k])) continue;
        times[k].error = lab_check(&lab, l, k, dev, s, host_block, size_text);
        if (times[k].error < 0) wrong++;
        else times[k].runs = -1;  // to be timed
    }
    for (int turn = 0; more && turn < 1000; turn++) {
        more = 0;
        for (int k = 0; k < versions; k++) {
            LabTimes *t = &times[k];
            // three runs at least, unless one alone takes six times what all were to take; -1 is the check's
            int enough = t->spent >= o->seconds && (t->runs >= 3 || t->spent > 6 * o->seconds);
            if (t->runs == 0 || (t->runs > 0 && (o->repeats ? t->runs >= o->repeats : enough))) continue;
            double start = seconds();
            if (!o->warm) dev->flush(&lab);
            t->runs = max_int(t->runs, 0);
            t->times[t->runs++] = dev->time(l->kernels[k].run, data, s);
            t->spent += seconds() - start, more = 1;
        }
    }
    double rival = 0;
    if (times[l->rival].runs > 0) rival = lab_median(times[l->rival].times, times[l->rival].runs);
    for (int k = 0; k < versions; k++)
        if (times[k].runs > 0) lab_print_row(l, o, s, k, &times[k], rival, copy_rate, limit);
    free(times);
    lab_release(&lab, dev, host_block);
    return wrong;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 MAIN

// the program's small sizes; counts every version at every size
static void lab_check_small(const LabProgram *program, const LabLadder *l, const int *wanted, int *passed, int *failed) {
    for (const Sizes *s = program->checks; s->B || s->M; s++) {
        char size_text[256];
        Lab lab;
        float *host_block = lab_prepare(&lab, l, program->dev, s);
        lab_size_text(size_text, sizeof size_text, program, s);
        for (int k = 0; l->kernels[k].run; k++) {
            if (!wanted[k] || !lab_available(&l->kernels[k])) continue;
            if (lab_check(&lab, l, k, program->dev, s, host_block, size_text) < 0) ++*failed;
            else ++*passed;
        }
        lab_release(&lab, program->dev, host_block);
    }
}

static int lab_main(const LabProgram *program, int argc, char **argv) {
    Option table[64]; LabOptions o; Sizes preset;
    int rows = 0, wanted[LAB_VERSIONS], passed = 0, failed = 0, positional = argc > 1 && strncmp(argv[1], "--", 2) != 0;
    char machine[256], date[32], size_text[256]; time_t now = time(NULL);
    start_process(argv);
    for (const Option *t = program->sizes; t->name; t++) table[rows++] = *t;
    memcpy(table + rows, LAB_OPTIONS, sizeof LAB_OPTIONS);
    options_parse(&o, table, argc - positional, argv + positional);
    if (o.help) { lab_help(program); return 0; }
    lab_select(wanted, positional ? argv[1] : "all", program, o.only);
    threads_wanted(o.threads);
    lab_preset(&preset, o.preset);
    if (program->preset) program->preset(&preset);
    for (const Option *t = program->sizes; t->name; t++) {  // what was given replaces the preset's
        int given = *(const int *)(const void *)((const char *)&o + t->field);
        if (given) *(int *)(void *)((char *)&preset + (t->field - offsetof(LabOptions, size))) = given;
    }
    o.size = preset;
    program->dev->begin();
    for (const LabLadder *l = program->ladders; l->name; l++)
        if (!o.only[0] || strcmp(o.only, l->name) == 0) lab_check_small(program, l, wanted, &passed, &failed);
    if (o.check) {
        printf("%d passed, %d failed\n", passed, failed);
        return failed > 0;
    }
    program->dev->name(machine, sizeof machine);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    double copy_rate = program->dev->copy_rate();
    printf("%s%s; %s; copy %.1f GB/s%s\n", o.csv ? "# " : "", machine, date, copy_rate * 1e-9, o.warm ? "; warm caches" : "");
    if (o.csv)
        printf("ladder,shape,version,threads,median_ms,min_ms,ns_per_unit,gb_s,of_copy,gop_s,op,of_limit,of_rival,nmse,runs\n");
    for (const LabLadder *l = program->ladders; l->name; l++) {
        if (o.only[0] && strcmp(o.only, l->name) != 0) continue;
        double limit = l->limit();
        lab_size_text(size_text, sizeof size_text, program, &o.size);
        printf("%s%s%s%s; limit %.1f G%s/s\n", o.csv ? "# " : "\n", l->name, l->shape ? "" : ", ", l->shape ? "" : size_text,
               limit * 1e-9, l->op);
        lab_print_head(l, &o);
        for (int i = 0; i == 0 || l->shape; i++) {
            Sizes s = o.size;
            if (l->shape && !l->shape(&s, i)) break;
            failed += lab_time(program, l, wanted, &o, &s, copy_rate, limit);
        }
    }
    return failed > 0;
}

#endif
