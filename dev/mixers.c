/*
mixers.c - ST-Mamba beside three kinds of attention: time and memory of the layer that mixes a clip's tokens, by its frames.

The paper (Table IV, Fig. 7) puts attention where ST-Mamba stands and measures the whole network. Here each is measured
alone, as a layer x = x + F(LN(x)) at the size of one stage of the model, one clip at a time, with F one of
    mamba   ST-Mamba as train_vivim.c has it: selective scans in three orders
    M1      global attention: every token of the clip attends to all L = T*P
    M2      window attention: to those of its window of 8 frames x 8 rows x 8 columns
    M3      factorised attention, two such layers: to those of its frame, then to those of its pixel in all frames
Windows and heads are chosen here. M2 takes Video Swin's (8 x 7 x 7) with a side of 8, which divides the grids of 256x256
frames; it does not shift them; windows at an end that are cut short stay short, without padding or mask. M3 is ViViT's model 3.
Heads are those of the stage's SegFormer attention, width and biases too; no attention has a position bias.

All is made of train_vivim.c's operations and its graph: self_attention_forward on sequences that are a whole clip, a window,
a frame or a pixel's history. So no attention keeps its probabilities: forward has 128 queries' at a time, backward computes
them again. What they would take (heads x L x keys floats, which plain attention in PyTorch keeps) is counted, not allocated.
attention_backward adds up dk and dv in 8 slices, 16 floats for each of k's; sequences go through it in groups of about 1024
tokens, so that this is little - but M1's one sequence cannot be divided.

Every measurement is a process of its own. Memory is the most that it held in a first run beyond what it held at its start:
parameters, gradients, input, activations, workspace. Time is the median of up to 9 more runs, as many as fit into 5 seconds,
one at least. If a run does not end in --seconds, the point is left out ("-"), and so are longer clips.

With -DVIVIM_CUDA (make dev/mixers_cu) all of it happens on a GPU; dev/mixers_emu runs its --check without one. No GPU has
timed it yet. There attention_backward takes up to four partial dq, and dk and dv of up to 16 slices of the queries.

    make dev && dev/mixers                                       stage 3 of b0 on 256x256 frames: 16 x 16 x 160 per frame
    dev/mixers --config b3 --stage 1 --frames 5,32 --mixers mamba,M2
    dev/mixers --csv > a.csv; dev/mixers --from a.csv --svg dev/results/mixers.svg --md dev/results/mixers.md
    dev/mixers --check                                           all four against textbook loops in double
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define VIVIM_PROGRAM "mixers"
#define VIVIM_NO_MAIN
#define VIVIM_NO_CUDA_MAIN
#if defined(VIVIM_BF16) || defined(VIVIM_TF32)
#error "dev/mixers measures single precision: make PRECISION=FP32 dev/mixers_cu"
#elif defined(CUDAEMU)
#include "train_vivim_emu.cpp"  // train_vivim.cu as dev/cudaemu.sed leaves it
#elif defined(VIVIM_CUDA)
#include "../train_vivim.cu"
#else
#include "../train_vivim.c"
#endif
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------------------------
// 0 WHERE IT RUNS: operations, the graph and malloc_floats are those of the CPU, or of the GPU and its memory. Elsewhere
// below, memory of the one is not looked at by the other.

#ifdef VIVIM_CUDA
enum { GROUP_TOKENS = 16384 };  // fewer do not fill a GPU
static void begin(void) { start_cuda(); }
static void settle(void) { settle_cuda(); }
static double held_mb(void) { settle_cuda(); return peak_cuda(); }
static void copy_in(void *to, const void *from, size_t bytes) { to_device(to, from, bytes); }
static void copy_out(void *to, const void *from, size_t bytes) { to_host(to, from, bytes); }
static void fill_nan(void *p, size_t bytes) { if (bytes) cudaCheck(cudaMemsetAsync(p, 255, bytes, stream_cuda)); }

__global__ static void move_rows_kernel(floatX *out, const floatX *inp, const int *order, size_t n, int C, int scatter) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t other = (size_t)order[i / C] * C + i % C;
    out[scatter ? other : i] = inp[scatter ? i : other];
}

static void move_rows(floatX *out, const floatX *inp, const int *order, int rows, int C, int scatter) {
    size_t n = (size_t)rows * C;
    move_rows_kernel<<<blocks_for(n, BLOCK), BLOCK, 0, stream_cuda>>>(out, inp, order, n, C, scatter);
    cudaCheck(cudaGetLastError());
}
#else
enum { GROUP_TOKENS = 1024 };
static void begin(void) {}
static void settle(void) {}
static double held_mb(void) { return peak_mb(); }
static void copy_in(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void copy_out(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void fill_nan(void *p, size_t bytes) { if (bytes) memset(p, 255, bytes); }

// out[i,:] = inp[order[i],:]: from memory into the layer's order; scatter: out[order[i],:] = inp[i,:], back. (rows, C)
static void move_rows(floatX *out, const floatX *inp, const int *order, int rows, int C, int scatter) {
    #pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        size_t to = (size_t)(scatter ? order[i] : i) * C, from = (size_t)(scatter ? i : order[i]) * C;
        memcpy(out + to, inp + from, (size_t)C * sizeof(floatX));
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 1 THE LAYERS

enum { MAMBA, GLOBAL, WINDOW, FACTORISED, MIXERS };
static const char *const NAMES[MIXERS] = {"mamba", "M1", "M2", "M3"};
static const char *const TITLES[MIXERS] = {"ST-Mamba", "M1 global", "M2 window", "M3 factorised"};

typedef struct {
    int B, T, H, W, window[3];  // the clips; frames, rows, columns of M2's windows
    int group;                  // tokens of a group, about
} Shape;

typedef struct { int first, count, P; Sublayer attention; } Group;  // count sequences of P tokens each, from row `first` on

typedef struct {
    Sublayer sublayer;  // offsets of the parameters; of ST-Mamba and the layer norm also what is kept for backward
    int *order;         // (rows) the token that stands in each row when sequences stand together; NULL: as in memory
    Group *groups;      // of sequences within which tokens attend to each other
    int num_groups;
} Mix;

typedef struct {
    Model model;  // only parameters, gradients and memory are used
    Stage stage;
    Mix layers[2];
    int kind, num_layers;
    size_t probabilities;  // floats that attention would keep if it kept them
} Mixer;

static void *more(void *old, size_t bytes) {  // of the host's memory
    void *p = realloc(old, bytes);
    if (p == NULL) out_of_memory((double)bytes);
    return p;
}
static double *zeros(size_t n) { return (double *)memset(more(NULL, n * sizeof(double)), 0, n * sizeof(double)); }

// `count` sequences of P tokens follow in the layer's order
static void add_sequences(Mixer *x, Mix *l, const Shape *shape, int first, int count, int P) {
    int most = max_int(1, shape->group / P);
    for (int i = 0; i < count; i += most) {
        l->groups = (Group *)more(l->groups, sizeof(Group) * (size_t)(l->num_groups + 1));
        Group *g = &l->groups[l->num_groups++];
        g->first = first + i * P, g->count = min_int(most, count - i), g->P = P, g->attention = l->sublayer;
    }
    x->probabilities += (size_t)count * P * P * x->stage.heads;
}

// Cuts the grid of every clip into windows. Those of one size stand together: all whole ones, then those that are cut short
// along the columns, the rows, the frames, ...
static void order_windows(Mixer *x, Mix *l, const Shape *shape) {
    int size[3] = {shape->T, shape->H, shape->W}, row = 0;
    for (int kind = 0; kind < 8; kind++) {  // bit a: short along axis 2 - a
        int from[3], to[3], side[3], first = row;
        for (int a = 0; a < 3; a++) {
            int whole = size[a] / shape->window[a] * shape->window[a], cut = kind >> (2 - a) & 1;
            from[a] = cut ? whole : 0, to[a] = cut ? size[a] : whole, side[a] = cut ? size[a] - whole : shape->window[a];
        }
        if (side[0] == 0 || side[1] == 0 || side[2] == 0) continue;
        for (int b = 0; b < shape->B; b++)
            for (int t0 = from[0]; t0 < to[0]; t0 += side[0])
                for (int h0 = from[1]; h0 < to[1]; h0 += side[1])
                    for (int w0 = from[2]; w0 < to[2]; w0 += side[2])
                        for (int t = t0; t < t0 + side[0]; t++)
                            for (int h = h0; h < h0 + side[1]; h++)
                                for (int w = w0; w < w0 + side[2]; w++)
                                    l->order[row++] = ((b * size[0] + t) * size[1] + h) * size[2] + w;
        int P = side[0] * side[1] * side[2];
        add_sequences(x, l, shape, first, (row - first) / P, P);
    }
}

// The tokens of a pixel in all frames stand together
static void order_pixels(Mixer *x, Mix *l, const Shape *shape) {
    int T = shape->T, P = shape->H * shape->W, row = 0;
    for (int b = 0; b < shape->B; b++)
        for (int p = 0; p < P; p++)
            for (int t = 0; t < T; t++) l->order[row++] = (b * T + t) * P + p;
    add_sequences(x, l, shape, 0, shape->B * P, T);
}

// Parameters of one layer of attention: C, C, C -> C with biases, as in SegFormer's blocks
static void add_attention(Model *m, Sublayer *a, const char *prefix, int C) {
    a->kind = ATTENTION;
    a->norm = add_norm(m, prefix, "norm", C);
    a->query = add_layer(m, INIT_NORMAL, prefix, "query", 2, C, C, 0);
    a->key = add_layer(m, INIT_NORMAL, prefix, "key", 2, C, C, 0);
    a->value = add_layer(m, INIT_NORMAL, prefix, "value", 2, C, C, 0);
    a->proj = add_layer(m, INIT_NORMAL, prefix, "proj", 2, C, C, 0);
}

static void mixer_init(Mixer *x, int kind, const Config *config, int stage, const Shape *shape) {
    Model *m = &x->model; Stage *st = &x->stage;
    memset(x, 0, sizeof *x);
    m->config = *config, m->B = shape->B, m->T = shape->T, m->sublayers = &x->layers[0].sublayer;
    st->C = config->dims[stage], st->heads = config->heads[stage], st->reduction = 1;
    st->H = shape->H, st->W = shape->W, st->P = st->H * st->W;
    if ((double)shape->B * shape->T * st->P * 4 * st->C > 2e9)  // any count of rows or channels fits an int
        fail("%d frames of %dx%d tokens are too much; use fewer --frames or a smaller --size", shape->T, st->H, st->W);
    int rows = shape->B * shape->T * st->P;
    x->kind = kind, x->num_layers = kind == FACTORISED ? 2 : 1;
    if (kind == MAMBA) {
        Sublayer dsf;  // comes with it, and its tensors come last: cut off again
        memset(&dsf, 0, sizeof dsf);
        add_mamba_layer(m, &x->layers[0].sublayer, &dsf, stage, 0);
        m->num_params = dsf.norm.weight;
        while (m->tensors[m->num_tensors - 1].offset >= m->num_params) m->num_tensors--;
    }
    for (int i = 0; i < x->num_layers && kind != MAMBA; i++) {
        Mix *l = &x->layers[i];
        add_attention(m, &l->sublayer, i ? "time." : kind == FACTORISED ? "space." : "", st->C);
        if (kind == WINDOW || i == 1) l->order = (int *)more(NULL, sizeof(int) * (size_t)rows);
        if (kind == WINDOW) order_windows(x, l, shape);
        else if (kind == GLOBAL) add_sequences(x, l, shape, 0, shape->B, shape->T * st->P);
        else if (i == 0) add_sequences(x, l, shape, 0, shape->B * shape->T, st->P);
        else order_pixels(x, l, shape);
    }
    model_allocate(m, 1);
}

// Parameters and orders go to where they are used
static void mixer_send(Mixer *x) {
    Model *m = &x->model;
    size_t rows = (size_t)m->B * m->T * x->stage.P;
    float *params = malloc_floats(m->num_params);
    copy_in(params, m->params, m->num_params * sizeof(float));
    free(m->params);
    m->params = params, m->weights = (floatX *)(void *)params;
    for (int i = 0; i < x->num_layers; i++) {
        int *order = x->layers[i].order;
        if (order == NULL) continue;
        x->layers[i].order = (int *)malloc_check(rows * sizeof(int));
        copy_in(x->layers[i].order, order, rows * sizeof(int));
        free(order);
    }
    settle();
}

static void mixer_free(Mixer *x) {
    Model *m = &x->model;
    for (int i = 0; i < x->num_layers; i++) free_check(x->layers[i].order), free(x->layers[i].groups);
    free(m->buffers), free(m->tensors), free_check(m->params), free_check(m->grads);
    arena_free(&m->kept), arena_free(&m->scratch);
}

// A group's tokens as the graph knows them: `count` frames, each a column of P tokens
static Stage group_stage(Model *m, const Stage *st, const Group *g) {
    Stage frames = *st;
    m->B = g->count, m->T = 1, frames.H = frames.P = g->P, frames.W = 1;
    return frames;
}

// out = x + F(LN(x)) with attention for F; as sublayer_forward: in training x is kept, in evaluation out replaces it
static floatX *attention_layer_forward(Mixer *x, Mix *l, floatX *inp) {
    Model *m = &x->model; const Stage *st = &x->stage; Sublayer *s = &l->sublayer;
    int B = m->B, T = m->T, C = st->C, rows = B * T * st->P;
    size_t mark = m->scratch.used, n = (size_t)rows * C;
    s->x = inp, s->mean = keep_floats(m, (size_t)rows), s->rstd = keep_floats(m, (size_t)rows);
    floatX *out = m->training ? keep(m, n) : inp, *ln = scratch(m, n), *branch = scratch(m, n), *from = ln, *to = branch;
    if (!m->planning) {
        norm_forward(m, ln, s->mean, s->rstd, inp, s->norm, rows, C);
        if (l->order) move_rows(branch, ln, l->order, rows, C, 0), from = branch, to = ln;
    }
    for (int i = 0; i < l->num_groups; i++) {
        Group *g = &l->groups[i]; size_t at = m->planning ? 0 : (size_t)g->first * C;
        Stage frames = group_stage(m, st, g);
        self_attention_forward(m, &frames, &g->attention, to + at, from + at, 0);
    }
    m->B = B, m->T = T;
    if (!m->planning) {
        if (l->order) move_rows(branch, ln, l->order, rows, C, 1);
        residual(out, inp, branch, 1.0f, n);
    }
    m->scratch.used = mark;
    return out;
}

// dx (rows, C): the gradient of the layer's output on entry, of its input on return
static void attention_layer_backward(Mixer *x, Mix *l, floatX *dx) {
    Model *m = &x->model; const Stage *st = &x->stage; Sublayer *s = &l->sublayer;
    int B = m->B, T = m->T, C = st->C, rows = B * T * st->P;
    size_t mark = m->scratch.used, n = (size_t)rows * C;
    floatX *ln = scratch(m, n), *dln = scratch(m, n), *third = l->order ? scratch(m, n) : NULL;
    floatX *dinp = dln, *dout = dx, *from = ln;
    if (!m->planning) {
        norm_forward(m, ln, s->mean, s->rstd, s->x, s->norm, rows, C);  // again: cheaper than keeping it
        if (l->order) {
            move_rows(third, ln, l->order, rows, C, 0), move_rows(dln, dx, l->order, rows, C, 0);
            from = third, dout = dln, dinp = ln;
        }
    }
    for (int i = 0; i < l->num_groups; i++) {
        Group *g = &l->groups[i]; size_t at = m->planning ? 0 : (size_t)g->first * C;
        Stage frames = group_stage(m, st, g);
        self_attention_backward(m, &frames, &g->attention, dinp + at, dout + at, from + at);
    }
    m->B = B, m->T = T;
    if (!m->planning) {
#ifdef MIXERS_BREAK  // for dev/test_mixers.sh, which sees to it that --check notices
        if (l->order) move_rows(dln, ln, l->order, rows, C, 0);
#else
        if (l->order) move_rows(dln, ln, l->order, rows, C, 1);
#endif
        norm_backward(m, dx, dln, dx, s->x, s->norm, s->mean, s->rstd, rows, C);
    }
    m->scratch.used = mark;
}

// Returns where the output is: inp (rows, C) in evaluation, else kept memory
static floatX *mixer_forward(Mixer *x, floatX *inp) {
    Model *m = &x->model;
    m->kept.used = m->scratch.used = 0;
    for (int i = 0; i < x->num_layers; i++)
        inp = x->kind == MAMBA ? sublayer_forward(m, &x->stage, &x->layers[i].sublayer, inp)
                               : attention_layer_forward(x, &x->layers[i], inp);
    return inp;
}

// dx (rows, C): the output's gradient becomes the input's; parameters' are added to model.grads
static void mixer_backward(Mixer *x, floatX *dx) {
    Model *m = &x->model;
    m->scratch.used = 0;
    for (int i = x->num_layers - 1; i >= 0; i--)
        if (x->kind == MAMBA) sublayer_backward(m, &x->stage, &x->layers[i].sublayer, dx);
        else attention_layer_backward(x, &x->layers[i], dx);
}

// Makes room; returns how many MB
static double mixer_plan(Mixer *x, int training) {
    Model *m = &x->model;
    m->training = training, m->planning = 1;
    mixer_forward(x, NULL);
    if (training) mixer_backward(x, NULL);
    m->planning = 0;
    double bytes = (double)m->kept.peak + (double)m->scratch.peak;
    arena_reserve(&m->kept, m->kept.peak); arena_reserve(&m->scratch, m->scratch.peak);
    if (training) m->grads = (float *)calloc_check(m->num_params, sizeof(float));
    return bytes / 1048576;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 THE TEXTBOOK, IN DOUBLE
//
// Loops over all pairs of tokens that ask of each pair whether it may meet; p are the parameters, at the same offsets.

// y (rows, n) = x (rows, k) W (n, k)^T + b; b may be NULL
static void textbook_linear(double *y, const double *x, const double *w, const double *b, int rows, int n, int k) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < n; j++) {
            double sum = b ? b[j] : 0;
            for (int i = 0; i < k; i++) sum += x[r * k + i] * w[j * k + i];
            y[r * n + j] = sum;
        }
}

static void textbook_norm(double *y, const double *x, const double *w, const double *b, int rows, int C) {
    for (int r = 0; r < rows; r++) {
        double mean = 0, var = 0;
        for (int c = 0; c < C; c++) mean += x[r * C + c] / C;
        for (int c = 0; c < C; c++) var += (x[r * C + c] - mean) * (x[r * C + c] - mean) / C;
        for (int c = 0; c < C; c++) y[r * C + c] = (x[r * C + c] - mean) / sqrt(var + 1e-5) * w[c] + b[c];
    }
}

// Do the tokens i and j of a batch attend to each other?
static int meet(int kind, int layer, const Shape *s, int i, int j) {
    int P = s->H * s->W, ti = i / P % s->T, tj = j / P % s->T, same_clip = i / (P * s->T) == j / (P * s->T);
    int hi = i / s->W % s->H, hj = j / s->W % s->H, wi = i % s->W, wj = j % s->W;
    const int *n = s->window;
    if (kind == WINDOW) return same_clip && ti / n[0] == tj / n[0] && hi / n[1] == hj / n[1] && wi / n[2] == wj / n[2];
    if (kind == FACTORISED) return same_clip && (layer == 0 ? ti == tj : hi == hj && wi == wj);
    return same_clip;
}

static void textbook_attention(double *y, const double *n, const double *p, const Sublayer *a, int kind, int layer,
                               const Shape *s, int C, int heads) {
    int rows = s->B * s->T * s->H * s->W, hd = C / heads;
    double *q = zeros((size_t)rows * (4 * (size_t)C + 1));
    double *k = q + rows * C, *v = k + rows * C, *o = v + rows * C, *prob = o + rows * C;
    textbook_linear(q, n, p + a->query.weight, p + a->query.bias, rows, C, C);
    textbook_linear(k, n, p + a->key.weight, p + a->key.bias, rows, C, C);
    textbook_linear(v, n, p + a->value.weight, p + a->value.bias, rows, C, C);
    for (int c = 0; c < C; c += hd)
        for (int i = 0; i < rows; i++) {
            double sum = 0;
            for (int j = 0; j < rows; j++) {
                double dot = 0;
                for (int d = c; d < c + hd; d++) dot += q[i * C + d] * k[j * C + d];
                prob[j] = meet(kind, layer, s, i, j) ? exp(dot / sqrt((double)hd)) : 0;
                sum += prob[j];
            }
            for (int j = 0; j < rows; j++)
                for (int d = c; d < c + hd; d++) o[i * C + d] += prob[j] / sum * v[j * C + d];
        }
    textbook_linear(y, o, p + a->proj.weight, p + a->proj.bias, rows, C, C);
    free(q);
}

// The token at position s of direction g's way through a clip
static int visited(int g, int s, int T, int P) {
    return g == SCAN_FORWARD ? s : g == SCAN_BACKWARD ? T * P - 1 - s : s % T * P + s / T;
}

// [x | z] = W_in n; for each direction a = SiLU(conv(x)), [delta | B | C] = W_x a, dt = softplus(W_dt delta + b_dt),
// h = exp(dt A) h + dt a B, y += h C + D a;  out = W_out (y/3 * SiLU(z))
static void textbook_mamba(double *out, const double *n, const double *p, const Sublayer *s, const Config *c,
                           const Shape *shape, int C) {
    int T = shape->T, P = shape->H * shape->W, L = T * P, D = c->expand * C, N = c->d_state, R = dt_rank(C), ld = R + 2 * N;
    size_t floats = (size_t)L * (4 * D + ld) + (size_t)D * N;
    double *xz = zeros(floats);
    double *a = xz + L * 2 * D, *y = a + L * D, *x_dbl = y + L * D, *h = x_dbl + L * ld;
    for (int b = 0; b < shape->B; b++, n += L * C, out += L * C) {
        textbook_linear(xz, n, p + s->in_proj, NULL, L, 2 * D, C);
        memset(y, 0, sizeof(double) * (size_t)(L * D));
        for (int g = 0; g < 3; g++) {
            const Direction *scan = &s->scan[g];
            const double *taps = p + scan->conv.weight, *dt_weight = p + scan->dt_proj.weight;
            memset(h, 0, sizeof(double) * (size_t)(D * N));
            for (int l = 0; l < L; l++) {
                int token = visited(g, l, T, P);
                for (int d = 0; d < D; d++) {
                    double sum = p[scan->conv.bias + (size_t)d];
                    for (int k = 0; k < c->d_conv; k++) {
                        int before = l - c->d_conv + 1 + k;
                        if (before >= 0) sum += taps[d * c->d_conv + k] * xz[visited(g, before, T, P) * 2 * D + d];
                    }
                    a[token * D + d] = sum / (1 + exp(-sum));
                }
                textbook_linear(x_dbl, a + token * D, p + scan->x_proj, NULL, 1, ld, D);
                for (int d = 0; d < D; d++) {
                    double dt = p[scan->dt_proj.bias + (size_t)d], u = a[token * D + d];
                    for (int r = 0; r < R; r++) dt += dt_weight[d * R + r] * x_dbl[r];
                    dt = log1p(exp(dt));
                    for (int i = 0; i < N; i++) {
                        double *state = &h[d * N + i], rate = -exp(p[scan->A_log + (size_t)(d * N + i)]);
                        *state = exp(dt * rate) * *state + dt * u * x_dbl[R + i];
                        y[token * D + d] += *state * x_dbl[R + N + i];
                    }
                    y[token * D + d] += p[scan->D + (size_t)d] * u;
                }
            }
        }
        for (int i = 0; i < L * D; i++) {
            double z = xz[i / D * 2 * D + D + i % D];
            y[i] *= z / (1 + exp(-z)) / 3;
        }
        textbook_linear(out, y, p + s->out_proj, NULL, L, C, D);
    }
    free(xz);
}

// y (rows, C): all layers of the mixer; returns sum(y * dout)
static double textbook(double *y, const double *inp, const double *p, const double *dout, const Mixer *x, const Shape *s) {
    int C = x->stage.C, rows = s->B * s->T * s->H * s->W;
    double *n = zeros(2 * (size_t)rows * C), *branch = n + rows * C, sum = 0;
    memcpy(y, inp, sizeof(double) * (size_t)(rows * C));
    for (int i = 0; i < x->num_layers; i++) {
        const Sublayer *a = &x->layers[i].sublayer;
        textbook_norm(n, y, p + a->norm.weight, p + a->norm.bias, rows, C);
        if (x->kind == MAMBA) textbook_mamba(branch, n, p, a, &x->model.config, s, C);
        else textbook_attention(branch, n, p, a, x->kind, i, s, C, x->stage.heads);
        for (int k = 0; k < rows * C; k++) y[k] += branch[k];
    }
    for (int k = 0; k < rows * C; k++) sum += y[k] * dout[k];
    free(n);
    return sum;
}

// gradient[i] = d textbook / d at[i], by central differences; `at` is inp or p
static void differences(double *gradient, double *at, size_t n, double *y, const double *inp, const double *p,
                        const double *dout, const Mixer *x, const Shape *s) {
    const double step = 1e-4;
    for (size_t i = 0; i < n; i++) {
        double value = at[i];
        at[i] = value + step;
        double above = textbook(y, inp, p, dout, x, s);
        at[i] = value - step;
        gradient[i] = (above - textbook(y, inp, p, dout, x, s)) / (2 * step);
        at[i] = value;
    }
}

// Sum of squared differences over the sum of squares (at least n * `least`); one limit for all. Returns 1 if it is not met.
static int compare(const char *mixer, const char *what, const float *got, const double *wanted, size_t n, double least) {
    const double limit = 1e-11;  // float32 makes 4e-15 to 2e-13
    double error = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)got[i] - wanted[i]) * ((double)got[i] - wanted[i]), scale += wanted[i] * wanted[i];
    }
    error /= fmax(scale, (double)n * least);
    if (error <= limit) return 0;  // false for NaN
    printf("FAILED %s: %s: normalised mean square error %.1e, limit %.1e\n", mixer, what, error, limit);
    return 1;
}

// Every mixer's output and gradients, at odd sizes, from memory that holds NaN. Returns how many tensors were wrong.
static int check(void) {
    static const Config TINY = {"check", {6, 6, 6, 6}, {0, 0, 0, 0}, {3, 3, 3, 3}, {1, 1, 1, 1}, {1, 1, 1, 1}, 8, 16, 4, 2,
                                "fbs", 0, 0};
    static const Shape shape = {2, 3, 3, 4, {2, 2, 3}, 12};  // windows of every kind, groups of several sizes
    int wrong = 0, compared = 0;
    begin();
    for (int kind = 0; kind < MIXERS; kind++) {
        Mixer mixer, *x = &mixer; Model *m = &x->model;
        mixer_init(x, kind, &TINY, 0, &shape);
        size_t params = m->num_params, n = (size_t)shape.B * shape.T * shape.H * shape.W * x->stage.C, all = n + params;
        double *d_inp = (double *)more(NULL, sizeof(double) * (3 * n + params + all)), *d_dout = d_inp + n, *y = d_dout + n;
        double *p = y + n, *d_gradient = p + params, squares = 0;
        float *host = (float *)more(NULL, sizeof(float) * (n + all)), *host_dout = host + n, *inp = malloc_floats(2 * n);
        float *dx = inp + n;
        for (size_t i = 0; i < params; i++) p[i] = m->params[i] += rng_uniform(1, i) - 0.5f;  // far from uniform probabilities
        for (size_t i = 0; i < n; i++) {
            d_inp[i] = host[i] = 2 * rng_uniform(2, i) - 1;
            d_dout[i] = host_dout[i] = 2 * rng_uniform(3, i) - 1;
        }
        mixer_send(x);
        copy_in(inp, host, 2 * n * sizeof(float));
        textbook(y, d_inp, p, d_dout, x, &shape);

        mixer_plan(x, 0);
        fill_nan(m->scratch.base, m->scratch.size);
        residual(dx, NULL, inp, 1.0f, n);  // a copy, for it is replaced
        copy_out(host, mixer_forward(x, dx), n * sizeof(float));
        wrong += compare(NAMES[kind], "forward, evaluation", host, y, n, 0);
        arena_free(&m->kept), arena_free(&m->scratch);

        mixer_plan(x, 1);
        fill_nan(m->kept.base, m->kept.size), fill_nan(m->scratch.base, m->scratch.size);
        copy_out(host, mixer_forward(x, inp), n * sizeof(float));
        wrong += compare(NAMES[kind], "forward, training", host, y, n, 0);
        arena_reserve(&m->scratch, m->scratch.size);
        fill_nan(m->scratch.base, m->scratch.size);
        copy_in(dx, host_dout, n * sizeof(float));
        mixer_backward(x, dx);
        copy_out(host, dx, n * sizeof(float));
        differences(d_gradient, d_inp, n, y, d_inp, p, d_dout, x, &shape);
        wrong += compare(NAMES[kind], "gradient of the input", host, d_gradient, n, 0);
        copy_out(host, m->grads, params * sizeof(float));
        differences(d_gradient, p, params, y, d_inp, p, d_dout, x, &shape);
        for (size_t i = 0; i < params; i++) squares += d_gradient[i] * d_gradient[i];
        for (int i = 0; i < m->num_tensors; i++) {  // a key's bias has gradient 0: hence `least`
            const Tensor *t = &m->tensors[i];
            wrong += compare(NAMES[kind], t->name, host + t->offset, d_gradient + t->offset, t->numel,
                             1e-2 * squares / (double)params);
        }
        compared += 3 + m->num_tensors;
        free(d_inp), free(host), free_check(inp);
        mixer_free(x);
    }
    printf("%d tensors compared with the textbook, %d wrong\n", compared, wrong);
    return wrong;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 MEASURING

enum { MAX_ROWS = 64, RUNS = 9, ENOUGH = 5 };  // runs and seconds for one point

typedef struct { double ms, mb, planned_mb, probabilities_mb; } Measured;  // ms 0: left out
typedef struct { int T; Measured at[MIXERS][2]; } Row;                     // [1]: training, else evaluation

typedef struct {
    const char *config, *frames, *mixers, *svg, *md, *from;
    int stage, size, seconds, threads, csv, check, help;
} MixerOptions;

#define FIELD(member) offsetof(MixerOptions, member)
static const Option MIXER_OPTIONS[] = {
    {"config", "b0", "the model whose stage it is: tiny, b0 ... b5", 's', 0, 0, FIELD(config)},
    {"stage", "3", "1 to 4", 'i', 1, 4, FIELD(stage)},
    {"size", "256", "height and width of the frames", 'i', 32, 4096, FIELD(size)},
    {"frames", "5,8,16,32,64,150", "of the clips", 's', 0, 0, FIELD(frames)},
    {"mixers", "mamba,M1,M2,M3", "which ones", 's', 0, 0, FIELD(mixers)},
    {"seconds", "10", "for one run of one mixer; what takes longer is left out", 'i', 1, 3600, FIELD(seconds)},
    {"threads", "0", "0: as many as OpenMP chooses", 'i', 0, 1024, FIELD(threads)},
    {"csv", "", "print comma-separated values", 'f', 0, 0, FIELD(csv)},
    {"from", "", "measure nothing: take what --csv printed (several runs' may stand in one file)", 's', 0, 0, FIELD(from)},
    {"svg", "", "file for the curves of time and memory", 's', 0, 0, FIELD(svg)},
    {"md", "", "file for the tables", 's', 0, 0, FIELD(md)},
    {"check", "", "compare all mixers with textbook loops instead; exit status 1 if they differ", 'f', 0, 0, FIELD(check)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

// malloc gives memory that is freed back to the system (so that what was needed at a time is seen, not how it lay), or, as in
// all programs here, keeps it for the next who wants some, which is faster
static void keep_freed(int keep_it) {
#ifdef __GLIBC__
    mallopt(M_MMAP_MAX, keep_it ? 0 : 65536);
#endif
    (void)keep_it;
}

// In a process of its own: times one clip. Does not return if one of the first two runs takes longer than `limit` seconds.
static Measured measure(int kind, int training, const Config *config, int stage, const Shape *shape, int limit) {
    Mixer mixer, *x = &mixer; Measured result;
    double times[RUNS + 1] = {0}, held, start;
    int runs = 0;
    begin();
    keep_freed(0);
    held = held_mb();
    mixer_init(x, kind, config, stage, shape);
    mixer_send(x);
    size_t n = (size_t)shape->B * shape->T * x->stage.P * x->stage.C;
    float *inp = malloc_floats(n), *dx = training ? malloc_floats(n) : NULL, row[1024];
    for (size_t i = 0; i < n; i += 1024) {
        for (size_t k = 0; k < 1024; k++) row[k] = 2.0f * rng_uniform(1, i + k) - 1.0f;
        copy_in(inp + i, row, sizeof(float) * (n - i < 1024 ? n - i : 1024));
    }
    result.planned_mb = mixer_plan(x, training);
    result.probabilities_mb = (double)x->probabilities * sizeof(float) / 1048576;
    start = seconds();
    while (runs < 2 || (runs <= RUNS && seconds() - start + times[runs - 1] < ENOUGH)) {
        if (training) residual(dx, NULL, inp, 1.0f, n);  // any gradient will do
        settle();
        if (runs < 2) alarm((unsigned)limit);  // ends this process, unless
        times[runs] = seconds();
        mixer_forward(x, inp);
        if (training) mixer_backward(x, dx);
        settle();
        times[runs] = seconds() - times[runs];
        alarm(0);
        if (runs++ == 0) result.mb = held_mb() - held, keep_freed(1);
    }
    qsort(times + 1, (size_t)runs - 1, sizeof times[0], compare_doubles);  // all but the first
    result.ms = 1e3 * times[1 + (runs - 1) / 2];
    return result;
}

static Measured measure_apart(int kind, int training, const Config *config, int stage, const Shape *shape, int limit) {
    Measured result = {0, 0, 0, 0};
    int ends[2], status;
    fflush(stdout);
    if (pipe(ends) != 0) fail("pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0) fail("fork: %s", strerror(errno));
    if (child == 0) {
        result = measure(kind, training, config, stage, shape, limit);
        _exit(write(ends[1], &result, sizeof result) == (ssize_t)sizeof result ? 0 : 1);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], &result, sizeof result);
    close(ends[0]);
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 1) exit(1);  // it said why
    if (WIFSIGNALED(status) && WTERMSIG(status) != SIGALRM)
        fail("%s with %d frames was ended by signal %d: too little memory? use fewer --frames", NAMES[kind], shape->T,
             WTERMSIG(status));
    if (got != (ssize_t)sizeof result) result.ms = 0;
    return result;
}

// Longer clips take longer: in proportion to their frames, M1 to their square. Is there hope, after what was seen so far?
static int worth_trying(const Row *rows, int count, int T, int kind, int training, int limit) {
    if (count == 0) return 1;
    const Measured *last = &rows[count - 1].at[kind][training];
    double ratio = (double)T / rows[count - 1].T;
    return last->ms > 0 && last->ms * ratio * (kind == GLOBAL ? ratio : 1) < 1e3 * limit;
}

static void print_measured(int csv, int T, int kind, int training, const Measured *at) {
    if (csv && at->ms > 0)
        printf("%s,%d,%d,%.3f,%.3f,%.3f,%.3f\n", NAMES[kind], T, training, at->ms, at->mb, at->planned_mb,
               at->probabilities_mb);
    if (!csv) printf("%6d  %-14s %-8s ", T, TITLES[kind], training ? "training" : "forward");
    if (!csv && at->ms > 0) printf("%10.1f ms %9.1f MB\n", at->ms, at->mb);
    else if (!csv) printf("%10s\n", "-");
    fflush(stdout);
}

// "5,8,16" -> ascending numbers; returns how many
static int parse_frames(int *frames, const char *text) {
    int count = 0;
    for (const char *at = text; ; at++) {
        char *end;
        long T = strtol(at, &end, 10);
        if (end == at || (*end != ',' && *end != '\0') || T < 1 || T > 4096 || count == MAX_ROWS ||
            (count && T <= frames[count - 1]))
            fail("--frames %s: wants up to %d ascending numbers from 1 to 4096, as in 5,8,16", text, MAX_ROWS);
        frames[count++] = (int)T;
        if (*end == '\0') return count;
        at = end;
    }
}

static int find_mixer(const char *name, size_t length) {
    for (int i = 0; i < MIXERS; i++) if (strlen(NAMES[i]) == length && strncmp(NAMES[i], name, length) == 0) return i;
    return -1;
}

static void parse_mixers(int *chosen, const char *text) {
    for (const char *at = text; ; at++) {
        size_t length = strcspn(at, ",");
        int kind = find_mixer(at, length);
        if (kind < 0) fail("--mixers %s: there are mamba, M1, M2, M3", text);
        chosen[kind] = 1, at += length;
        if (*at == '\0') return;
    }
}

enum { TITLE = 200 };

typedef struct {  // what the options say
    int frames[MAX_ROWS], count, chosen[MIXERS], stage, side, csv, limit;  // side: height and width of the stage's grid
    const Config *config;
    char title[TITLE];
} Plan;

static void plan_from_options(Plan *plan, const MixerOptions *o) {
    int known = (int)(sizeof CONFIGS / sizeof CONFIGS[0]), c = 0, threads = 1, i = o->stage - 1;
    char where[32];
    memset(plan, 0, sizeof *plan);
    plan->count = parse_frames(plan->frames, o->frames);
    parse_mixers(plan->chosen, o->mixers);
    while (c < known && strcmp(CONFIGS[c].name, o->config) != 0) c++;
    if (c == known) fail("--config %s: no such size; there are tiny, b0, b1, b2, b3, b4, b5", o->config);
    plan->config = &CONFIGS[c], plan->stage = i, plan->side = o->size, plan->csv = o->csv, plan->limit = o->seconds;
    for (int k = 0; k <= i; k++) plan->side = conv_size(plan->side, k ? 3 : 7, k ? 2 : 4, k ? 1 : 3);
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    snprintf(where, sizeof where, threads == 1 ? "1 thread" : "%d threads", threads);
#ifdef VIVIM_CUDA
    snprintf(where, sizeof where, "on a GPU");  // which one is asked by those who use it: CUDA does not survive a fork
#endif
    snprintf(plan->title, TITLE, "%s, stage %d: %d x %d tokens of %d channels per frame, %d head%s, %s", o->config, o->stage,
             plan->side, plan->side, CONFIGS[c].dims[i], CONFIGS[c].heads[i], CONFIGS[c].heads[i] == 1 ? "" : "s", where);
}

// Every number of frames with every mixer in turn
static void measure_all(Row *rows, const Plan *plan) {
    printf(plan->csv ? "# %s\nmixer,frames,training,ms,mb,planned_mb,probabilities_mb\n" : "%s\n", plan->title);
    for (int i = 0; i < plan->count; i++) {
        Shape shape = {1, plan->frames[i], plan->side, plan->side, {8, 8, 8}, GROUP_TOKENS};
        memset(&rows[i], 0, sizeof rows[i]);
        rows[i].T = plan->frames[i];
        for (int training = 0; training < 2; training++)
            for (int kind = 0; kind < MIXERS; kind++) {
                Measured *at = &rows[i].at[kind][training];
                if (!plan->chosen[kind]) continue;
                if (worth_trying(rows, i, rows[i].T, kind, training, plan->limit))
                    *at = measure_apart(kind, training, plan->config, plan->stage, &shape, plan->limit);
                print_measured(plan->csv, rows[i].T, kind, training, at);
            }
    }
}

static int compare_rows(const void *a, const void *b) { return ((const Row *)a)->T - ((const Row *)b)->T; }

// What --csv printed, perhaps several times
static int read_csv(Row *rows, char *title, const char *path) {
    char line[TITLE + 8], name[16];
    int count = 0, number = 0;
    FILE *f = fopen(path, "r");
    if (f == NULL) fail("%s: %s", path, strerror(errno));
    title[0] = '\0';
    while (fgets(line, sizeof line, f)) {
        int T, training, kind, i = 0;
        Measured at;
        number++;
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "mixer,", 6) == 0) continue;
        if (strncmp(line, "# ", 2) == 0 && !strpbrk(line, "<&")) {
            if (title[0] && strcmp(title, line + 2) != 0)
                fail("%s:%d: measured under other conditions than the rows before", path, number);
            snprintf(title, TITLE, "%.*s", TITLE - 1, line + 2);
            continue;
        }
        int fields = sscanf(line, "%15[^,],%d,%d,%lf,%lf,%lf,%lf", name, &T, &training, &at.ms, &at.mb, &at.planned_mb,
                            &at.probabilities_mb);
        if (fields != 7 || (kind = find_mixer(name, strlen(name))) < 0 || T < 1 || T > 4096 || training < 0 || training > 1 ||
            !(at.ms > 0 && at.ms < 1e9) || !(at.mb > 0 && at.mb < 1e9) ||
            !(at.probabilities_mb >= 0 && at.probabilities_mb < 1e12))
            fail("%s:%d: not a line that --csv prints", path, number);
        while (i < count && rows[i].T != T) i++;
        if (i == MAX_ROWS) fail("%s: more than %d different numbers of frames", path, MAX_ROWS);
        if (i == count) memset(&rows[count], 0, sizeof rows[count]), rows[count++].T = T;
        rows[i].at[kind][training] = at;
    }
    fclose(f);
    if (count == 0 || !title[0]) fail("%s: holds nothing that --csv printed", path);
    qsort(rows, (size_t)count, sizeof rows[0], compare_rows);
    return count;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 TABLES AND CURVES

static FILE *open_output(const char *path) {
    FILE *f = fopen(path, "w");
    if (f == NULL) fail("%s: %s; does its folder exist?", path, strerror(errno));
    return f;
}

static void close_output(FILE *f, const char *path) {
    int bad = ferror(f);
    if (fclose(f) != 0 || bad) fail("%s: could not be written; is the disk full?", path);
}

enum { TIME, MEMORY, KEPT };  // quantities; KEPT: training memory if attention kept its probabilities, counted

// 0: not known
static double quantity(const Row *row, int kind, int training, int what) {
    const Measured *at = &row->at[kind][training];
    if (what == KEPT) return at->ms > 0 && at->probabilities_mb > 0 ? at->mb + at->probabilities_mb : 0;
    return what == TIME ? at->ms : at->ms > 0 ? at->mb : 0;
}

static void put_cell(FILE *f, double value) {
    if (value > 0) fprintf(f, value < 10 ? " %.1f |" : " %.0f |", value);
    else fprintf(f, " - |");
}

// svg: the file of curves beside it, or empty
static void write_tables(FILE *f, const Row *rows, int count, const char *title, const char *svg) {
    static const char *const HEADS[5] = {
        "time of forward and backward, ms", "time of forward in evaluation, ms", "memory in training, MB",
        "memory in evaluation, MB", "memory in training if attention kept its probabilities (counted), MB"};
    static const int WHAT[5] = {TIME, TIME, MEMORY, MEMORY, KEPT}, TRAINING[5] = {1, 0, 1, 0, 1};
    fprintf(f, "# ST-Mamba and attention, by the frames of a clip\n\nWritten by `dev/mixers`: %s; one clip. `-`: takes too "
               "long, or has nothing to keep. The head of `dev/mixers.c` says what the columns are and how they are "
               "measured.\n", title);
    if (svg[0]) fprintf(f, "\n![Curves](%s)\n", strrchr(svg, '/') ? strrchr(svg, '/') + 1 : svg);
    for (int k = 0; k < 5; k++) {
        fprintf(f, "\n| frames: %s |", HEADS[k]);
        for (int kind = 0; kind < MIXERS; kind++) fprintf(f, " %s |", TITLES[kind]);
        fprintf(f, "\n|---|---|---|---|---|\n");
        for (int i = 0; i < count; i++) {
            fprintf(f, "| %d |", rows[i].T);
            for (int kind = 0; kind < MIXERS; kind++) put_cell(f, quantity(&rows[i], kind, TRAINING[k], WHAT[k]));
            fprintf(f, "\n");
        }
    }
}

// Two panels on 940 x 430 units, both axes logarithmic. Colours are dev/report's, light or dark as the reader's system is.
enum { SVG_W = 940, SVG_H = 430, PANEL = 470, LEFT = 62, RIGHT = 18, TOP = 112, BOTTOM = 50 };

typedef struct { double x0, x1, y0, y1; int left; } Axes;

static double x_of(const Axes *a, double x) {
    return a->left + LEFT + log(x / a->x0) / log(a->x1 / a->x0) * (PANEL - LEFT - RIGHT);
}
static double y_of(const Axes *a, double y) {
    return SVG_H - BOTTOM - log(y / a->y0) / log(a->y1 / a->y0) * (SVG_H - TOP - BOTTOM);
}

static void put_line(FILE *f, const char *kind, double x1, double y1, double x2, double y2) {
    fprintf(f, "<line class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n", kind, x1, y1, x2, y2);
}

// anchor: which part of the text is at x: start, middle, end
static void put_text(FILE *f, const char *kind, double x, double y, const char *anchor, const char *text) {
    fprintf(f, "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", kind, x, y, anchor, text);
}
static void put_number(FILE *f, double x, double y, const char *anchor, double number) {
    char text[32];
    snprintf(text, sizeof text, "%g", number);
    put_text(f, "number", x, y, anchor, text);
}

static void put_dot(FILE *f, int kind, double x, double y, double radius) {
    fprintf(f, "<circle class=\"c%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\"/>\n", kind, x, y, radius);
}

// 1, 2, 5, 10, 20, ..: the i-th of them
static double tick(int i) {
    static const double STEPS[3] = {1, 2, 5};
    int power = i >= 0 ? i / 3 : -((2 - i) / 3);
    return STEPS[i - 3 * power] * pow(10, power);
}

// A line through the points that are known; dots on it unless it is dotted itself
static void put_curve(FILE *f, const Axes *a, const Row *rows, int count, int kind, int training, int what, int dotted) {
    const char *command = "M";
    fprintf(f, "<path class=\"curve c%d%s\" d=\"", kind, dotted ? " dotted" : "");
    for (int i = 0; i < count; i++) {
        double value = quantity(&rows[i], kind, training, what);
        if (value > 0) fprintf(f, "%s%.1f %.1f", command, x_of(a, rows[i].T), y_of(a, value)), command = "L";
    }
    fprintf(f, "\"/>\n");
    for (int i = 0; i < count && !dotted; i++) {
        double value = quantity(&rows[i], kind, training, what);
        if (value > 0) put_dot(f, kind, x_of(a, rows[i].T), y_of(a, value), 3.5);
    }
}

// One panel: solid lines are the quantity `solid` in training, dotted ones `dotted`, in training or not
static void put_panel(FILE *f, int left, const Row *rows, int count, const char *title, const char *note, int solid, int dotted,
                      int dotted_training) {
    Axes a = {(double)rows[0].T, (double)rows[count - 1].T, HUGE_VAL, 0, left};
    int low = -30, high, start = left + LEFT, end = left + PANEL - RIGHT, floor_y = SVG_H - BOTTOM;
    for (int i = 0; i < count; i++)
        for (int kind = 0; kind < MIXERS; kind++)
            for (int k = 0; k < 2; k++) {
                double value = quantity(&rows[i], kind, k ? dotted_training : 1, k ? dotted : solid);
                if (value > 0) a.y0 = fmin(a.y0, value), a.y1 = fmax(a.y1, value);
            }
    if (a.y1 <= 0) fail("nothing was measured in training, so there is nothing to draw");
    if (count == 1) a.x0 /= 2, a.x1 *= 2;
    while (tick(low + 1) <= a.y0) low++;
    for (high = low + 1; tick(high) < a.y1; ) high++;
    a.y0 = tick(low), a.y1 = tick(high);
    put_text(f, "title", start, TOP - 30, "start", title);
    put_text(f, "note", start, TOP - 12, "start", note);
    for (int i = low; i <= high; i++) {
        double y = y_of(&a, tick(i));
        put_line(f, "grid", start, y, end, y);
        put_number(f, start - 8, y + 4.5, "end", tick(i));
    }
    for (int i = 0; i < count; i++) {
        double x = x_of(&a, rows[i].T);
        put_line(f, "axis", x, floor_y, x, floor_y + 5);
        put_number(f, x, floor_y + 20, "middle", rows[i].T);
    }
    put_line(f, "axis", start, floor_y, end, floor_y);
    put_text(f, "note", (start + end) / 2, SVG_H - 10, "middle", "frames of the clip");
    for (int kind = 0; kind < MIXERS; kind++) put_curve(f, &a, rows, count, kind, dotted_training, dotted, 1);
    for (int kind = 0; kind < MIXERS; kind++) put_curve(f, &a, rows, count, kind, 1, solid, 0);
}

static void write_curves(FILE *f, const Row *rows, int count, const char *title) {
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\" "
               "aria-label=\"Memory and time of ST-Mamba and three kinds of attention by the number of frames\">\n<style>\n"
               "svg { color-scheme: light dark; --page: #fff; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e8;\n"
               "  --c0: #2563ab; --c1: #c2571a; --c2: #26804f; --c3: #8a4fa8 }\n"
               "@media (prefers-color-scheme: dark) { svg { --page: #14171a; --ink: #e3e7ea; --soft: #98a3ad;\n"
               "  --line: #2e353b; --c0: #6fa8e8; --c1: #ec9a5f; --c2: #65c08d; --c3: #c294dc } }\n"
               ".page { fill: var(--page) } .grid { stroke: var(--line) } .axis { stroke: var(--soft) }\n"
               "text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; fill: var(--soft) }\n"
               ".legend, .title { fill: var(--ink) } .title { font-size: 15px; font-weight: 600 }\n"
               ".curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }\n"
               ".dotted { stroke-dasharray: 2 5; stroke-width: 1.6 }\n", SVG_W, SVG_H, SVG_W, SVG_H);
    for (int i = 0; i < MIXERS; i++)
        fprintf(f, "path.c%d { stroke: var(--c%d) } circle.c%d { fill: var(--c%d) }\n", i, i, i, i);
    fprintf(f, "</style>\n<rect class=\"page\" width=\"%d\" height=\"%d\"/>\n", SVG_W, SVG_H);
    put_text(f, "note", LEFT, 22, "start", title);
    for (int kind = 0; kind < MIXERS; kind++) {
        put_dot(f, kind, LEFT + 5 + 118 * kind, 44, 5);
        put_text(f, "legend", LEFT + 16 + 118 * kind, 48.5, "start", TITLES[kind]);
    }
    put_panel(f, 0, rows, count, "Memory in training, MB", "dotted: if attention kept its probabilities, counted", MEMORY,
              KEPT, 1);
    put_panel(f, PANEL, rows, count, "Time of forward and backward, ms", "dotted: forward alone, in evaluation", TIME, TIME, 0);
    fprintf(f, "</svg>\n");
}

int main(int argc, char **argv) {
    MixerOptions o;
    Row rows[MAX_ROWS];
    Plan plan;
    start_process(argv);
    options_parse(&o, MIXER_OPTIONS, argc, argv);
    threads_wanted(o.threads);
    if (o.help) {
        printf("usage: mixers [--option value ...]\n\nTimes ST-Mamba beside global, window and factorised attention.\n\n");
        options_help(MIXER_OPTIONS);
        return 0;
    }
    if (o.check) return check() > 0;
    if (o.from[0]) plan.count = read_csv(rows, plan.title, o.from);
    else plan_from_options(&plan, &o);
    FILE *svg = o.svg[0] ? open_output(o.svg) : NULL, *md = o.md[0] ? open_output(o.md) : NULL;
    if (!o.from[0]) measure_all(rows, &plan);
    if (svg) write_curves(svg, rows, plan.count, plan.title), close_output(svg, o.svg);
    if (md) write_tables(md, rows, plan.count, plan.title, o.svg), close_output(md, o.md);
    return 0;
}
