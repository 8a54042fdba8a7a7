/* affine.c - pre-trains the inverse-transform network F of the affine constraint from the masks of a training shard.

   F sees two patches of a boundary, e and e', and tells by which affine map e became e'. To train a Vivim it is frozen: the
   true boundary is e, the predicted one e', and F's answer, the distance from "not moved", is the loss (train_vivim.c,
   section 13, whose functions these are: forward, backward and Adam are not written twice).

   Build:  make prepro/affine
   Run:    prepro/affine --shard train.bin            writes train_affine.safetensors beside it

   How it learns: e is a patch of a true boundary (Sobel of the mask), theta a random affine map, e' the patch warped:
       e'(x, y) = e(theta (x, y, 1)),     theta = [ s R(r) [1 tan(h); 0 1] | t ],
   rotation r within 15 degrees, scale s 0.8 .. 1.25, shear h within 10 degrees, shift t within 20 % of the side, uniform;
   coordinates run from -1 to 1 over the patch, bilinear, zeros outside (PyTorch: F.affine_grid, F.grid_sample). F(e, e')
   learns theta - I by mean squared error. Patches of the last eighth of the videos are held out: their error is what is
   printed, beside that of the answer "not moved", theta = I. Patches to learn from are cut at random places around those
   with a boundary and flipped at random. Same options, same file: random numbers are counters, threads do not matter. */

#define VIVIM_NO_MAIN
#define VIVIM_PROGRAM "affine"
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"  // of train_vivim.c only a part is used
#endif
#include "../train_vivim.c"

#ifndef HELD_OUT_PAIRS
#define HELD_OUT_PAIRS 4096  // sanitizers make each 300 times as slow: make SANITIZE=1 sets fewer
#endif
enum { RNG_PAIRS = 100, RNG_HELD_OUT };

typedef struct { int frame, y, x; } Spot;  // the top left of a patch that holds a boundary

typedef struct {
    uint8_t *edge;     // (frames, H, W) the boundaries of all masks
    Spot *spots[2];    // of the part that is learnt from, and of the part that is held out
    int count[2], H, W, q;
} Patches;

static int has_boundary(const Patches *p, int frame, int y0, int x0) {
    for (int y = 0; y < p->q; y++)
        if (memchr(p->edge + ((size_t)frame * p->H + y0 + y) * p->W + x0, 1, (size_t)p->q)) return 1;
    return 0;
}

// Boundaries of all masks, and the places of the grid's patches that hold some
static void patches_init(Patches *p, const Shard *shard, int q, const char *path) {
    int H = shard->H, W = shard->W, frames = shard->frames, rows = H / q, columns = W / q;
    int held_videos = max_int(1, shard->videos / 8);  // of a single video, its last eighth of frames
    int first_held = shard->videos > 1 ? shard->first_frame[shard->videos - held_videos] : frames - max_int(1, frames / 8);
    size_t pixels = (size_t)H * W;
    p->H = H, p->W = W, p->q = q;
    p->edge = (uint8_t *)malloc_check((size_t)frames * pixels);
    float *mask = malloc_floats(pixels), *edge = malloc_floats(pixels);
    for (int f = 0; f < frames; f++) {
        const uint8_t *grey = shard_mask(shard, f);
        for (size_t i = 0; i < pixels; i++) mask[i] = grey[i] * (1.0f / 255.0f);
        sobel_edges(edge, mask, 1, H, W);
        for (size_t i = 0; i < pixels; i++) p->edge[f * pixels + i] = edge[i] > 0.5f;
    }
    for (int part = 0; part < 2; part++) {
        p->count[part] = 0;
        p->spots[part] = (Spot *)malloc_check(sizeof(Spot) * (size_t)frames * rows * columns);
        for (int f = part ? first_held : 0; f < (part ? frames : first_held); f++)
            for (int i = 0; i < rows * columns; i++) {
                Spot s = {f, i / columns * q, i % columns * q};
                if (has_boundary(p, s.frame, s.y, s.x)) p->spots[part][p->count[part]++] = s;
            }
        if (p->count[part] == 0)
            fail("%s: no patch of %dx%d %s holds a boundary; are the masks empty? Use more videos", path, q, q,
                 part ? "of the last videos, which are held out," : "to learn from");
    }
    free(mask); free(edge);
}

// theta - I, six numbers in two rows
static void random_map(float *theta, uint64_t key) {
    const double degree = 3.14159265358979323846 / 180;
    double u[5];  // in [-1, 1)
    for (uint64_t i = 0; i < 5; i++) u[i] = 2.0 * (double)rng_uniform(key, i) - 1.0;
    double r = 15 * degree * u[0], s = 1.025 + 0.225 * u[1], shear = tan(10 * degree * u[2]);
    theta[0] = (float)(s * cos(r) - 1.0), theta[1] = (float)(s * (shear * cos(r) - sin(r))), theta[2] = (float)(0.4 * u[3]);
    theta[3] = (float)(s * sin(r)), theta[4] = (float)(s * (shear * sin(r) + cos(r)) - 1.0), theta[5] = (float)(0.4 * u[4]);
}

// e (q, q) at the frame's (y0, x0), flipped: bit 0 up, bit 1 left, bit 2 rows and columns exchanged
static void cut_patch(float *e, const Patches *p, int frame, int y0, int x0, unsigned flip) {
    int q = p->q;
    for (int y = 0; y < q; y++)
        for (int x = 0; x < q; x++) {
            int a = flip & 4 ? x : y, b = flip & 4 ? y : x;
            int from_y = flip & 1 ? q - 1 - a : a, from_x = flip & 2 ? q - 1 - b : b;
            e[y * q + x] = p->edge[((size_t)frame * p->H + y0 + from_y) * p->W + x0 + from_x];
        }
}

static float pixel_or_zero(const float *e, int q, int y, int x) {
    return y >= 0 && y < q && x >= 0 && x < q ? e[y * q + x] : 0.0f;
}

// F.grid_sample(e, F.affine_grid(theta, align_corners=False), align_corners=False); theta without the identity
static void warp(float *warped, const float *e, const float *theta, int q) {
    for (int y = 0; y < q; y++)
        for (int x = 0; x < q; x++) {
            float u = (2 * x + 1) / (float)q - 1, v = (2 * y + 1) / (float)q - 1;
            float from_x = ((1 + theta[0]) * u + theta[1] * v + theta[2] + 1) * 0.5f * (float)q - 0.5f;
            float from_y = (theta[3] * u + (1 + theta[4]) * v + theta[5] + 1) * 0.5f * (float)q - 0.5f;
            int x0 = (int)floorf(from_x), y0 = (int)floorf(from_y);
            float wx = from_x - (float)x0, wy = from_y - (float)y0;
            warped[y * q + x] = (1 - wy) * ((1 - wx) * pixel_or_zero(e, q, y0, x0) + wx * pixel_or_zero(e, q, y0, x0 + 1))
                              + wy * ((1 - wx) * pixel_or_zero(e, q, y0 + 1, x0) + wx * pixel_or_zero(e, q, y0 + 1, x0 + 1));
        }
}

// n pairs: inp (n, 2 q^2), theta - I (n, 6). Held out: patch after patch of the grid. Else around random ones of the others.
static void make_pairs(float *inp, float *theta, const Patches *p, int held_out, uint64_t key, int first, int n) {
    int q = p->q;
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++) {
        uint64_t k = rng_key(key, RNG_PAIRS, (uint64_t)(first + i));
        float *e = inp + (size_t)i * 2 * q * q;
        int count = p->count[held_out];
        Spot s = p->spots[held_out][held_out ? (int)((int64_t)(first + i) * count / HELD_OUT_PAIRS)
                                             : (int)(rng_u32(k, 5) % (uint32_t)count)];
        int y = s.y + (int)(rng_u32(k, 6) % (uint32_t)q) - q / 2, x = s.x + (int)(rng_u32(k, 7) % (uint32_t)q) - q / 2;
        y = max_int(0, min_int(y, p->H - q)), x = max_int(0, min_int(x, p->W - q));
        if (held_out || !has_boundary(p, s.frame, y, x)) y = s.y, x = s.x;
        cut_patch(e, p, s.frame, y, x, held_out ? 0 : rng_u32(k, 8) & 7);
        random_map(theta + 6 * i, k);
        warp(e + (size_t)q * q, e, theta + 6 * i, q);
    }
}

typedef struct { float *inp, *h1, *h2, *out, *theta; } Work;  // of a batch

// Mean squared errors on the held-out pairs of each number of theta: the network's, and those of "not moved". Returns the
// mean ||F(e, e)||, which should be 0.
static double held_out_errors(double error[6], double trivial[6], const AffineNet *f, const Patches *p, const Work *w,
                              int batch) {
    int q = p->q; double norm = 0.0;
    for (int k = 0; k < 6; k++) error[k] = trivial[k] = 0.0;
    for (int first = 0, n; first < HELD_OUT_PAIRS; first += n) {
        n = min_int(batch, HELD_OUT_PAIRS - first);
        make_pairs(w->inp, w->theta, p, 1, RNG_HELD_OUT, first, n);
        affine_net_forward(w->out, w->h1, w->h2, w->inp, f, n);
        for (int i = 0; i < 6 * n; i++) {
            double t = (double)w->theta[i], d = (double)w->out[i] - t;
            error[i % 6] += d * d / HELD_OUT_PAIRS, trivial[i % 6] += t * t / HELD_OUT_PAIRS;
        }
        for (int i = 0; i < n; i++) {
            float *e = w->inp + (size_t)i * 2 * q * q;
            memcpy(e + (size_t)q * q, e, sizeof(float) * (size_t)q * q);
        }
        affine_net_forward(w->out, w->h1, w->h2, w->inp, f, n);
        for (int i = 0; i < n; i++) norm += norm6(w->out + 6 * i) / HELD_OUT_PAIRS;
    }
    return norm;
}

static double sum6(const double x[6]) { return x[0] + x[1] + x[2] + x[3] + x[4] + x[5]; }

typedef struct { const char *shard, *out; int grid, patch, steps, batch, seed, threads, help; double lr; } AffineOptions;

#define FIELD(member) offsetof(AffineOptions, member)
static const Option AFFINE_OPTIONS[] = {
    {"shard", "data/phantom_train.bin", "the training shard", 's', 0, 0, FIELD(shard)},
    {"out", "", "the network; else beside the shard: SHARD_affine.safetensors", 's', 0, 0, FIELD(out)},
    {"grid", "0", "patches along the frames' smaller side; 0: 4", 'i', 0, 4096, FIELD(grid)},
    {"patch", "0", "side of a patch, instead of --grid; 0: what --grid says", 'i', 0, 1024, FIELD(patch)},
    {"steps", "10000", "batches of pairs to learn from", 'i', 1, 1e9, FIELD(steps)},
    {"batch", "256", "pairs of a batch", 'i', 1, 65536, FIELD(batch)},
    {"lr", "0.003", "Adam's learning rate; falls along a cosine", 'd', 1e-9, 1, FIELD(lr)},
    {"seed", "1", "of all random numbers", 'i', 0, 2147483647, FIELD(seed)},
    {"threads", "0", "0: as many as OpenMP chooses, fewer while other programs use the cores", 'i', 0, 1024, FIELD(threads)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

int main(int argc, char **argv) {
    static const char *const NAME[6] = {"a11", "a12", "tx", "a21", "a22", "ty"};
    start_process(argv);
    AffineOptions o;
    options_parse(&o, AFFINE_OPTIONS, argc, argv);
    if (o.help) {
        printf("affine - pre-trains the network of the affine constraint on the masks of a training shard\n\n");
        options_help(AFFINE_OPTIONS);
        return 0;
    }
    if (o.grid && o.patch) fail("--grid and --patch: both say the side of a patch; give one");
    Shard shard; Patches p; AffineNet f; Work w;
    char err[4608], path[4096], text[4][64];
    double error[6], trivial[6], start = seconds(), loss = 0.0;
    if (shard_open(&shard, o.shard, err, sizeof err) != 0) fail("%s", err);
    if (!shard.has_masks) fail("%s: has no masks to learn from; give prepro/frames a folder of masks", o.shard);
    int side = min_int(shard.H, shard.W), q = o.patch ? o.patch : o.grid ? side / o.grid : default_patch(shard.H, shard.W);
    if (q < 4 || q > side)
        fail("--patch %d: must be between 4 and the side of the frames, %dx%d; choose another --patch or --grid", q, shard.H,
             shard.W);
    if (o.out[0]) snprintf(path, sizeof path, "%s", o.out);
    else affine_path(path, sizeof path, o.shard);
    if (same_file(path, o.shard)) fail("--out %s: is read by this program; choose another name", path);
    snprintf(err, sizeof err, "%s.tmp", path);  // can it be written? Asked before the long work
    FILE *tmp = fopen(err, "wb");
    if (tmp == NULL) fail("%s: cannot be written: %s; choose another --out", path, strerror(errno));
    fclose(tmp), unlink(err);
    threads_wanted(o.threads);
    patches_init(&p, &shard, q, o.shard);
    affine_init(&f, q, (uint64_t)o.seed);
    printf("%s: %d patches of %dx%d to learn from, %d held out; %.1f M parameters, %.0f MiB\n", o.shard, p.count[0], q, q,
           p.count[1], (double)f.net.num_params / 1e6, (double)f.net.num_params * 16 / 1048576);
    model_trainable(&f.net);
    size_t n = (size_t)o.batch;
    w.inp = malloc_floats(n * 2 * q * q), w.theta = malloc_floats(n * 6), w.out = malloc_floats(n * 6);
    w.h1 = malloc_floats(n * AFFINE_HIDDEN), w.h2 = malloc_floats(n * AFFINE_BOTTLENECK);
    for (int step = 0; step < o.steps; step++) {
        double rate = cosine_lr(o.lr, step, o.steps) * fmin(1.0, (step + 1) / 50.0);  // the first steps are small
        make_pairs(w.inp, w.theta, &p, 0, rng_key((uint64_t)o.seed, RNG_PAIRS, (uint64_t)step), 0, o.batch);
        affine_net_forward(w.out, w.h1, w.h2, w.inp, &f, o.batch);
        double sum = 0.0;
        for (int i = 0; i < 6 * o.batch; i++) {  // mean squared error, and its gradient in place of out
            float d = w.out[i] - w.theta[i];
            sum += (double)(d * d) / (6.0 * o.batch), w.out[i] = 2.0f * d / (6.0f * (float)o.batch);
        }
        if (!isfinite(sum)) fail("step %d: the loss is not a number; try a smaller --lr", step + 1);
        loss += sum;
        model_zero_grad(&f.net);
        affine_net_backward(NULL, w.out, w.h1, w.h2, w.inp, &f, o.batch);
        model_update(&f.net, rate);
        threads_watch();
        int every = max_int(1, o.steps / 6);
        if ((step + 1) % every == 0) {
            held_out_errors(error, trivial, &f, &p, &w, o.batch);
            printf("step %6d  loss %.5f  held-out error / trivial %.3f  %.0f s\n", step + 1, loss / every,
                   sum6(error) / sum6(trivial), seconds() - start);
            fflush(stdout), loss = 0.0;
        }
    }
    double identity = held_out_errors(error, trivial, &f, &p, &w, o.batch), ratio = sum6(error) / sum6(trivial);
    printf("held out, mean squared error:\n           trivial   network   ratio\n");
    for (int k = 0; k < 6; k++) printf("  %-7s %9.5f %9.5f  %6.3f\n", NAME[k], trivial[k], error[k], error[k] / trivial[k]);
    printf("  all     %9.5f %9.5f  %6.3f\n", sum6(trivial) / 6, sum6(error) / 6, ratio);
    printf("  mean ||F(e, e)|| of equal boundaries %.3f; a random map's norm is %.3f (root mean square)\n", identity,
           sqrt(sum6(trivial)));
    const char *const keys[] = {"format", "patch", "frames", "steps", "held_out_ratio"};
    const char *const values[] = {"pt", text[0], text[1], text[2], text[3]};
    snprintf(text[0], sizeof text[0], "%d", q), snprintf(text[1], sizeof text[1], "%dx%d", shard.H, shard.W);
    snprintf(text[2], sizeof text[2], "%d", o.steps), snprintf(text[3], sizeof text[3], "%.4f", ratio);
    tensors_save(&f.net, path, keys, values, 5);
    printf("wrote %s, total %.0f s\n", path, seconds() - start);
    free(w.inp), free(w.theta), free(w.out), free(w.h1), free(w.h2);
    free(p.edge), free(p.spots[0]), free(p.spots[1]);
    affine_free(&f), shard_close(&shard);
    return 0;
}
