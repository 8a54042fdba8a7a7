/* attention.c - attention with few keys, forward and backward: from the textbook's loops to train_vivim.c's.

   Build:  make dev/attention
   Run:    dev/attention                             both ladders on stage 1 of b3: 5 frames, 4096 queries, 64 keys of 64
           dev/attention all --preset b3.3           5 frames, 256 queries, 64 keys, 5 heads of 64

   Per frame and head, out = softmax(q k^T / sqrt(hd)) v, hd = C/heads. Vivim's keys live on a grid reduced to Pk = 64 of a
   frame: scores of a block of queries fit in the caches, and nothing that flash attention is for arises. The limit is that of
   multiply-adds in registers for the two products forward, five backward; exps are not counted.

   Measured on an Intel Xeon (AVX-512), gcc 12.2, one thread: version, ns per (query, key) (percent of the limit):
   forward: 0  3.11 (48)    1  98.7 (2)    2  9.17 (16)    3  19.9 (7)    4  3.38 (44)
   backward: 0  8.23 (46)    1  162 (2)    2  23.3 (16) */
#define VIVIM_PROGRAM "attention"
#define VIVIM_NO_MAIN
#include "../train_vivim.c"
#include "lab.h"

// one head of one frame: rows of q, out (P, hd) and k, v (Pk, hd) begin C floats apart
typedef struct { int P, hd; size_t q, k; float scale; } Head;  // q, k: where its first row begins
static Head head_of(const Sizes *s, int task) {
    int frame = task / s->heads, head = task % s->heads, P = s->H * s->W, hd = s->C / s->heads;
    Head h = {P, hd, (size_t)frame * P * s->C + head * hd, (size_t)frame * s->Pk * s->C + head * hd, 1.0f / sqrtf((float)hd)};
    return h;
}
static size_t keys_of(const Sizes *s) { return (size_t)s->B * s->T * s->Pk * s->C; }

// ---------------------------------------------------------------------------------------------------------------------
// forward: out, q (N, P, C), k, v (N, Pk, C), N = B*T frames

enum { OUT, IN_Q, IN_K, IN_V };

static void forward_ships(float *const *t, const Sizes *s) {
    attention_forward(t[OUT], t[IN_Q], t[IN_K], t[IN_V], s->B * s->T, s->H * s->W, s->Pk, s->C, s->heads);
}

// prob (Pk) of the query at q, by plain loops and libm's expf
static void plain_softmax(float *prob, const float *q, const float *k, const Head *h, const Sizes *s) {
    float largest = -FLT_MAX, sum = 0.0f;
    for (int j = 0; j < s->Pk; j++) {
        prob[j] = 0.0f;
        for (int c = 0; c < h->hd; c++) prob[j] += q[c] * k[(size_t)j * s->C + c] * h->scale;
        largest = fmaxf(largest, prob[j]);
    }
    for (int j = 0; j < s->Pk; j++) prob[j] = expf(prob[j] - largest), sum += prob[j];
    for (int j = 0; j < s->Pk; j++) prob[j] /= sum;
}

// 1: all probabilities of all queries in memory, (N, heads, P, Pk), then the sums over keys
static void forward_textbook(float *const *t, const Sizes *s) {
    int tasks = s->B * s->T * s->heads, P = s->H * s->W;
    float *prob = lab_floats((size_t)tasks * P * s->Pk);
    for (int task = 0; task < tasks; task++) {
        Head h = head_of(s, task);
        for (int i = 0; i < P; i++)
            plain_softmax(prob + ((size_t)task * P + i) * s->Pk, t[IN_Q] + h.q + (size_t)i * s->C, t[IN_K] + h.k, &h, s);
    }
    for (int task = 0; task < tasks; task++) {
        Head h = head_of(s, task);
        for (int i = 0; i < P; i++)
            for (int c = 0; c < h.hd; c++) {
                const float *prob_i = prob + ((size_t)task * P + i) * s->Pk;
                float sum = 0.0f;
                for (int j = 0; j < s->Pk; j++) sum += prob_i[j] * t[IN_V][h.k + (size_t)j * s->C + c];
                t[OUT][h.q + (size_t)i * s->C + c] = sum;
            }
    }
    free(prob);
}

// k of a head as (hd, Pk): a vector then holds one channel of many keys
static void keys_across(float *kt, const float *k, const Head *h, const Sizes *s) {
    for (int j = 0; j < s->Pk; j++)
        for (int c = 0; c < h->hd; c++) kt[(size_t)c * s->Pk + j] = k[(size_t)j * s->C + c];
}

// prob (Pk) in vectors over the keys
static void vector_softmax(float *RESTRICT prob, const float *q, const float *kt, const Head *h, const Sizes *s) {
    float largest = -FLT_MAX, sum = 0.0f;
    memset(prob, 0, (size_t)s->Pk * sizeof(float));
    for (int c = 0; c < h->hd; c++) {
        const float q_c = q[c] * h->scale, *RESTRICT k = kt + (size_t)c * s->Pk;
        #pragma omp simd
        for (int j = 0; j < s->Pk; j++) prob[j] += q_c * k[j];
    }
    #pragma omp simd reduction(max : largest)
    for (int j = 0; j < s->Pk; j++) largest = prob[j] > largest ? prob[j] : largest;
    #pragma omp simd reduction(+ : sum)
    for (int j = 0; j < s->Pk; j++) prob[j] = exp_simd(prob[j] - largest), sum += prob[j];
    sum = 1.0f / sum;
    #pragma omp simd
    for (int j = 0; j < s->Pk; j++) prob[j] *= sum;
}

// 2: a query at a time, all of it in the first cache: vectors over keys for the scores, over channels for the result
static void forward_query(float *const *t, const Sizes *s) {
    int P = s->H * s->W;
    #pragma omp parallel
    {
        float *kt = lab_floats((size_t)(s->C / s->heads) * s->Pk), *prob = lab_floats((size_t)s->Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < s->B * s->T * s->heads; task++) {
            Head h = head_of(s, task);
            keys_across(kt, t[IN_K] + h.k, &h, s);
            for (int i = 0; i < P; i++) {
                float *RESTRICT out = t[OUT] + h.q + (size_t)i * s->C;
                vector_softmax(prob, t[IN_Q] + h.q + (size_t)i * s->C, kt, &h, s);
                memset(out, 0, (size_t)h.hd * sizeof(float));
                for (int j = 0; j < s->Pk; j++) {
                    const float *RESTRICT v = t[IN_V] + h.k + (size_t)j * s->C;
                    #pragma omp simd
                    for (int c = 0; c < h.hd; c++) out[c] += prob[j] * v[c];
                }
            }
        }
        free(prob); free(kt);
    }
}

// 3: as flash attention does it: keys in tiles of 16, with a running maximum, by which what was summed is scaled again for
// each tile. No score is ever stored; with 64 keys there was nothing to store.
static void forward_online(float *const *t, const Sizes *s) {
    enum { TILE = 16 };
    int P = s->H * s->W;
    #pragma omp parallel
    {
        float *kt = lab_floats((size_t)(s->C / s->heads) * s->Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < s->B * s->T * s->heads; task++) {
            Head h = head_of(s, task);
            keys_across(kt, t[IN_K] + h.k, &h, s);
            for (int i = 0; i < P; i++) {
                float *RESTRICT out = t[OUT] + h.q + (size_t)i * s->C, largest = -FLT_MAX, sum = 0.0f;
                const float *q = t[IN_Q] + h.q + (size_t)i * s->C;
                memset(out, 0, (size_t)h.hd * sizeof(float));
                for (int j0 = 0; j0 < s->Pk; j0 += TILE) {
                    int n = min_int(TILE, s->Pk - j0);
                    float score[TILE], before = largest, factor;
                    for (int j = 0; j < TILE; j++) score[j] = 0.0f;
                    for (int c = 0; c < h.hd; c++)
                        #pragma omp simd
                        for (int j = 0; j < n; j++) score[j] += q[c] * h.scale * kt[(size_t)c * s->Pk + j0 + j];
                    for (int j = 0; j < n; j++) largest = score[j] > largest ? score[j] : largest;
                    factor = exp_simd(before - largest);  // 0 (1e-26) for the first tile, of which nothing is scaled yet
                    sum *= factor;
                    #pragma omp simd
                    for (int c = 0; c < h.hd; c++) out[c] *= factor;
                    for (int j = 0; j < n; j++) {
                        const float p = exp_simd(score[j] - largest), *RESTRICT v = t[IN_V] + h.k + (size_t)(j0 + j) * s->C;
                        sum += p;
                        #pragma omp simd
                        for (int c = 0; c < h.hd; c++) out[c] += p * v[c];
                    }
                }
                #pragma omp simd
                for (int c = 0; c < h.hd; c++) out[c] /= sum;
            }
        }
        free(kt);
    }
}

// 4: the scores (P, Pk) of all queries of a head in memory, then one matrix product with the values
static void forward_whole(float *const *t, const Sizes *s) {
    int P = s->H * s->W, Pk = s->Pk, C = s->C;
    #pragma omp parallel
    {
        float *prob = lab_floats((size_t)P * Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < s->B * s->T * s->heads; task++) {
            Head h = head_of(s, task);
            for (int p = 0; p < P; p += QUERY_BLOCK)
                attention_scores(prob + (size_t)p * Pk, t[IN_Q] + h.q + (size_t)p * C, t[IN_K] + h.k, min_int(QUERY_BLOCK, P - p),
                                 Pk, C, h.hd);
            matmul_serial(t[OUT] + h.q, C, prob, Pk, 0, t[IN_V] + h.k, C, 0, NULL, P, h.hd, Pk, 0);
        }
        free(prob);
    }
}

static const LabKernel FORWARD[] = {
    {forward_ships, "ships: 4 in blocks of 256 queries", NULL},
    {forward_textbook, "textbook: all probabilities in memory", NULL},
    {forward_query, "a query at a time, vectors over keys, then channels", NULL},
    {forward_online, "2 with a running maximum, keys in tiles of 16 (flash attention)", NULL},
    {forward_whole, "the scores of all queries of a head in memory", NULL},
    {NULL, NULL, NULL}
};

static void forward_tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    if (s->C % s->heads) fail("--channels %d --heads %d: heads must divide channels; --help lists the options", s->C, s->heads);
    lab_out(lab, OUT, "out", n, 1e-10);
    lab_in(lab, IN_Q, "q", n, -2, 2);
    lab_in(lab, IN_K, "k", keys_of(s), -2, 2);
    lab_in(lab, IN_V, "v", keys_of(s), -1, 1);
}

static LabWork forward_work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {4 * (2 * n + 2 * (double)keys_of(s)), 4 * n * s->Pk, (double)tokens_of(s) * s->heads * s->Pk};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// backward: dq, dout, q (N, P, C); dk, dv, k, v (N, Pk, C). With prob as in forward:
// dv = prob^T dout,  dprob = dout v^T,  ds = prob (dprob - sum_keys(dprob prob)) / sqrt(hd),  dq = ds k,  dk = ds^T q

enum { OUT_DQ, OUT_DK, OUT_DV, IN_DOUT, IN_BQ, IN_BK, IN_BV };

static void backward_ships(float *const *t, const Sizes *s) {
    attention_backward(t[OUT_DQ], t[OUT_DK], t[OUT_DV], t[IN_DOUT], t[IN_BQ], t[IN_BK], t[IN_BV], s->B * s->T, s->H * s->W,
                       s->Pk, s->C, s->heads);
}

// 1: plain loops, a query at a time
static void backward_textbook(float *const *t, const Sizes *s) {
    float *prob = lab_floats(2 * (size_t)s->Pk), *ds = prob + s->Pk;
    zero_floats(t[OUT_DK], keys_of(s));
    zero_floats(t[OUT_DV], keys_of(s));
    for (int task = 0; task < s->B * s->T * s->heads; task++) {
        Head h = head_of(s, task);
        for (int i = 0; i < h.P; i++) {
            size_t at = h.q + (size_t)i * s->C;
            float sum = 0.0f;
            plain_softmax(prob, t[IN_BQ] + at, t[IN_BK] + h.k, &h, s);
            for (int j = 0; j < s->Pk; j++) {
                size_t key = h.k + (size_t)j * s->C;
                ds[j] = 0.0f;
                for (int c = 0; c < h.hd; c++) {
                    ds[j] += t[IN_DOUT][at + c] * t[IN_BV][key + c];
                    t[OUT_DV][key + c] += prob[j] * t[IN_DOUT][at + c];
                }
                sum += ds[j] * prob[j];
            }
            for (int c = 0; c < h.hd; c++) t[OUT_DQ][at + c] = 0.0f;
            for (int j = 0; j < s->Pk; j++) {
                size_t key = h.k + (size_t)j * s->C;
                ds[j] = prob[j] * (ds[j] - sum) * h.scale;
                for (int c = 0; c < h.hd; c++) {
                    t[OUT_DQ][at + c] += ds[j] * t[IN_BK][key + c];
                    t[OUT_DK][key + c] += ds[j] * t[IN_BQ][at + c];
                }
            }
        }
    }
    free(prob);
}

// 2: the same in vectors: k and v with keys side by side for the scores, dk and dv summed in the caches; threads over heads
static void backward_query(float *const *t, const Sizes *s) {
    int P = s->H * s->W, Pk = s->Pk, hd = s->C / s->heads;
    zero_floats(t[OUT_DK], keys_of(s));
    zero_floats(t[OUT_DV], keys_of(s));
    #pragma omp parallel
    {
        float *kt = lab_floats((size_t)hd * Pk), *vt = lab_floats((size_t)hd * Pk);
        float *prob = lab_floats((size_t)Pk), *ds = lab_floats((size_t)Pk);
        #pragma omp for schedule(static)
        for (int task = 0; task < s->B * s->T * s->heads; task++) {
            Head h = head_of(s, task);
            keys_across(kt, t[IN_BK] + h.k, &h, s);
            keys_across(vt, t[IN_BV] + h.k, &h, s);
            for (int i = 0; i < P; i++) {
                size_t at = h.q + (size_t)i * s->C;
                const float *RESTRICT q = t[IN_BQ] + at, *RESTRICT dout = t[IN_DOUT] + at;
                float *RESTRICT dq = t[OUT_DQ] + at, sum = 0.0f;
                vector_softmax(prob, q, kt, &h, s);
                memset(ds, 0, (size_t)Pk * sizeof(float));
                for (int c = 0; c < hd; c++)
                    #pragma omp simd
                    for (int j = 0; j < Pk; j++) ds[j] += dout[c] * vt[(size_t)c * Pk + j];
                #pragma omp simd reduction(+ : sum)
                for (int j = 0; j < Pk; j++) sum += ds[j] * prob[j];
                #pragma omp simd
                for (int j = 0; j < Pk; j++) ds[j] = prob[j] * (ds[j] - sum) * h.scale;
                memset(dq, 0, (size_t)hd * sizeof(float));
                for (int j = 0; j < Pk; j++) {
                    const float *RESTRICT k = t[IN_BK] + h.k + (size_t)j * s->C, ds_j = ds[j], prob_j = prob[j];
                    float *RESTRICT dk = t[OUT_DK] + h.k + (size_t)j * s->C, *RESTRICT dv = t[OUT_DV] + h.k + (size_t)j * s->C;
                    #pragma omp simd
                    for (int c = 0; c < hd; c++) dq[c] += ds_j * k[c], dk[c] += ds_j * q[c], dv[c] += prob_j * dout[c];
                }
            }
        }
        free(ds); free(prob); free(vt); free(kt);
    }
}

static const LabKernel BACKWARD[] = {
    {backward_ships, "ships: five matrix products for each block of 128 queries", NULL},
    {backward_textbook, "textbook: plain loops, a query at a time", NULL},
    {backward_query, "a query at a time in vectors, threads over heads", NULL},
    {NULL, NULL, NULL}
};

static void backward_tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    if (s->C % s->heads) fail("--channels %d --heads %d: heads must divide channels; --help lists the options", s->C, s->heads);
    lab_out(lab, OUT_DQ, "dq", n, 1e-9);
    lab_out(lab, OUT_DK, "dk", keys_of(s), 1e-9);
    lab_out(lab, OUT_DV, "dv", keys_of(s), 1e-9);
    lab_in(lab, IN_DOUT, "dout", n, -1, 1);
    lab_in(lab, IN_BQ, "q", n, -2, 2);
    lab_in(lab, IN_BK, "k", keys_of(s), -2, 2);
    lab_in(lab, IN_BV, "v", keys_of(s), -1, 1);
}

static LabWork backward_work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {4 * (3 * n + 4 * (double)keys_of(s)), 10 * n * s->Pk, (double)tokens_of(s) * s->heads * s->Pk};
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------

static const Option SIZES[] = {
    LAB_GRID, LAB_SIZE("channels", C, 16384, "of all heads together"),
    LAB_SIZE("heads", heads, 1024, "must divide the channels"), LAB_SIZE("keys", Pk, 65536, "of a frame"),
    {NULL, NULL, NULL, 0, 0, 0, 0}
};

//    B T H W C N dirs heads Pk
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 3, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, ""},
    {2, 3, 5, 7, 34, 0, 0, 2, 13, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 1, 13, 11, 160, 0, 0, 5, 64, 0, 0, 0, 0, 0, 0, 0, ""},
    {1, 2, 16, 17, 64, 0, 0, 1, 67, 0, 0, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

int main(int argc, char **argv) {
    static const LabLadder LADDERS[] = {
        {"attention_forward", FORWARD, forward_tensors, NULL, forward_ships, forward_work, "(query, key)", "flop",
         cpu_flop_rate, NULL, 0},
        {"attention_backward", BACKWARD, backward_tensors, NULL, backward_ships, backward_work, "(query, key)", "flop",
         cpu_flop_rate, NULL, 0},
        {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}};
    static const LabProgram PROGRAM = {"Attention with few keys, on the CPU.", SIZES, NULL, LADDERS, CHECKS, &LAB_CPU};
    return lab_main(&PROGRAM, argc, argv);
}
