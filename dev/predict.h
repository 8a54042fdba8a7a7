/* predict.h - every frame of a shard segmented: validation after an epoch, `./train_vivim --predict` and `--eval`; and the
   pictures at the end of a training. Header only, included by train_vivim.c, section 17. */
#ifndef VIVIM_PREDICT_H
#define VIVIM_PREDICT_H

typedef struct {
    double loss, mean[METRICS_SIX];  // means over frames: mean[METRICS_DICE] ..
    MetricsUltrasound sums;
} Metrics;

// A frame of n pixels: x are logits, threshold 0, or probabilities, threshold 0.5
static void metrics_add(Metrics *s, const float *x, float threshold, const float *mask, size_t n) {
    metrics_ultrasound_add(&s->sums, metrics_count(x, threshold, mask, n));
}

// Every rank has some frames' sums; then all have all
static void metrics_over_ranks(Metrics *s) {
    double counts[2] = {(double)s->sums.frames, (double)s->sums.empty};
    parallel_sum(counts, 2); parallel_sum(&s->loss, 1); parallel_sum(s->sums.sum, METRICS_SIX);
    s->sums.frames = (int)counts[0], s->sums.empty = (int)counts[1];
}

static void metrics_finish(Metrics *s) {
    s->loss /= max_int(1, s->sums.frames);
    metrics_ultrasound_mean(s->mean, &s->sums);
}

// Every frame of the shard as the target of its own clip, in evaluation mode; fewer if a stop is requested. Ranks take turns.
static Metrics evaluate(Model *m, const Shard *shard, int B, int T) {
    Metrics total; memset(&total, 0, sizeof total);
    Batch batch;
    int H = shard->H, W = shard->W; size_t pixels = (size_t)H * W;
    float *weight = malloc_floats((size_t)B * pixels);
    double *sums = (double *)malloc_check(sizeof(double) * 3 * (size_t)B);
    int *targets = (int *)malloc_check(sizeof(int) * (size_t)B);
    batch_init(&batch, B, T, H, W);
    for (int f = parallel.rank * B, n = 0; f < shard->frames && !stop_requested; f += parallel.ranks * B) {
        n = min_int(B, shard->frames - f);
        for (int k = 0; k < n; k++) targets[k] = f + k;
        device.plan(m, n, T, H, W, 0, 0, 0);
        batch_load(&batch, shard, targets, n, NULL, 0);
        device.forward(m, batch.input);
        total.loss += n * segloss_forward(weight, sums, m->logits, batch.mask, n, H, W, m->weighted_bce);
        for (size_t k = 0; k < (size_t)n; k++)
            metrics_add(&total, m->logits + k * pixels, 0.0f, batch.mask + k * pixels, pixels);
    }
    metrics_over_ranks(&total);
    metrics_finish(&total);
    batch_free(&batch); free(targets);
    free(sums); free(weight);
    return total;
}

// The probabilities of every frame of a video, in order, each given to a visitor. The model sees frames of H x W, which may
// differ from the shard's.
typedef void FrameVisitor(void *context, int frame, const float *prob);  // frame of the shard, prob (H, W)

// x (n) becomes sigmoid(x)
static void probabilities(float *x, size_t n, const Shard *shard, int frame) {
    if (!all_finite(x, n))
        fail("%s: the prediction of frame %d is not a number; is the checkpoint damaged?", shard->path, frame + 1);
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) x[i] = sigmoid_simd(x[i]);
}

// As in validation and in the paper: every frame is the target of a clip of its own; B clips at a time
static void predict_centred(Model *m, const Shard *shard, int video, int B, int T, int H, int W, FrameVisitor *visit,
                            void *context) {
    int end = shard->first_frame[video + 1]; size_t pixels = (size_t)H * W;
    int *targets = (int *)malloc_check(sizeof(int) * (size_t)B);
    Batch batch; batch_init(&batch, B, T, H, W);
    for (int f = shard->first_frame[video], n = 0; f < end; f += n) {
        n = min_int(B, end - f);
        for (int k = 0; k < n; k++) targets[k] = f + k;
        device.plan(m, n, T, H, W, 0, 0, 0);
        batch_load(&batch, shard, targets, n, NULL, 0);
        device.forward(m, batch.input);
        for (int k = 0; k < n; k++) {
            probabilities(m->logits + k * pixels, pixels, shard, f + k);
            visit(context, f + k, m->logits + k * pixels);
        }
    }
    batch_free(&batch); free(targets);
}

// T / stride times faster: clips begin `stride` frames apart, the last one ends with the video; all frames of a clip count,
// and where clips overlap, the mean of their probabilities does
static void predict_strided(Model *m, const Shard *shard, int video, int T, int stride, int H, int W, FrameVisitor *visit,
                            void *context) {
    int begin = shard->first_frame[video], n = shard->first_frame[video + 1] - begin; size_t pixels = (size_t)H * W;
    T = min_int(T, n), stride = min_int(stride, T);
    float *sum = (float *)calloc_check((size_t)T * pixels, sizeof(float));  // of the frames from `first` on
    int *count = (int *)calloc_check((size_t)T, sizeof(int));               // how many clips are in it
    Batch batch; batch_init(&batch, 1, T, H, W);
    device.plan(m, 1, T, H, W, 0, 1, 0);
    for (int first = 0, done; first < n; first += done) {
        int target = begin + first + T / 2;
        batch_load(&batch, shard, &target, 1, NULL, 0);
        device.forward(m, batch.input);
        probabilities(m->logits, T * pixels, shard, target);
        #pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < T * pixels; i++) sum[i] += m->logits[i];
        for (int k = 0; k < T; k++) count[k]++;
        done = first + T == n ? T : min_int(stride, n - T - first);  // no further clip reaches these frames
        for (int k = 0; k < done; k++) {
            for (size_t i = 0; i < pixels; i++) sum[k * pixels + i] /= (float)count[k];
            visit(context, begin + first + k, sum + k * pixels);
        }
        memmove(sum, sum + done * pixels, sizeof(float) * (T - done) * pixels);
        memmove(count, count + done, sizeof(int) * (size_t)(T - done));
        memset(sum + (T - done) * pixels, 0, sizeof(float) * done * pixels);
        memset(count + (T - done), 0, sizeof(int) * (size_t)done);
    }
    batch_free(&batch); free(count); free(sum);
}

typedef struct {
    const Shard *shard;
    int H, W;             // of the probabilities
    float *prob, *mask;   // (shard->H, shard->W)
    uint8_t *grey;        // (shard->H, shard->W)
    ShardWriter *writer;  // NULL: nothing is written
    Metrics metrics;      // if the shard has masks
} Prediction;

static void predict_frame(void *context, int frame, const float *prob) {
    Prediction *p = (Prediction *)context; const Shard *shard = p->shard;
    size_t pixels = (size_t)shard->H * shard->W; char err[4608];
    if (p->H != shard->H || p->W != shard->W) {
        bilinear_forward(p->prob, prob, 1, p->H, p->W, shard->H, shard->W, 1, 0);
        prob = p->prob;
    }
    for (size_t i = 0; i < pixels; i++) p->grey[i] = (uint8_t)lrintf(255.0f * prob[i]);
    if (shard->has_masks) {
        const uint8_t *grey = shard_mask(shard, frame);
        for (size_t i = 0; i < pixels; i++) p->mask[i] = grey[i] * (1.0f / 255.0f);
        metrics_add(&p->metrics, prob, 0.5f, p->mask, pixels);
    }
    int video = shard_video_of_frame(shard, frame);
    if (p->writer == NULL) return;
    if ((frame == shard->first_frame[video] && shard_begin_video(p->writer, shard_video_name(shard, video), err, sizeof err)) ||
        shard_add_frame(p->writer, shard_frame(shard, frame), p->grey, err, sizeof err)) fail("%s", err);
}

static ShardWriter prediction_writer;
static void drop_unfinished(void) { shard_abort(&prediction_writer); }  // at exit; harmless if it was finished

// --predict and --eval: segments all videos of a shard with a checkpoint's model; writes a shard of the same frames whose
// masks are round(255 * probability), compares with the shard's own masks, or both. Several ranks compare a video each in
// turn; a shard is written from its first frame to its last, by rank 0 alone.
static void predict(const Options *o) {
    Shard shard; Model model, *m = &model; SafeTensors file; Config config = CONFIGS[0];
    Prediction p; char err[4608], path[4096];
    memset(&p, 0, sizeof p);
    int share = o->predict[0] == '\0';
    if (!share && parallel.rank > 0) return;
    map_shard(&shard, o->predict[0] ? o->predict : o->val);
    if (o->eval && !shard.has_masks) fail("%s: has no masks to compare with; use --predict", shard.path);
    config_from_file(&config, o->checkpoint);
    checkpoint_open(&file, o->checkpoint);
    int T = o->frames, H = o->size, W = o->size;
    const char *frames = safetensors_metadata(&file, "frames"), *size = safetensors_metadata(&file, "size");
    if (T == 0 && (frames == NULL || sscanf(frames, "%d", &T) != 1 || T < 1 || T > 4096)) T = 5;
    if (H == 0 && (size == NULL || sscanf(size, "%dx%d", &H, &W) != 2 || H < 32 || W < 32 || H > 16384 || W > 16384))
        H = shard.H, W = shard.W;
    safetensors_close(&file);
    model_init(m, &config, 0);
    checkpoint_load(m, o->checkpoint);
    int B = o->stride ? 1 : o->batch;
    check_memory(m, o, B, T, H, W, 0, o->stride > 0);
    size_t pixels = (size_t)shard.H * shard.W;
    p.shard = &shard, p.H = H, p.W = W;
    p.prob = malloc_floats(pixels), p.mask = malloc_floats(pixels), p.grey = (uint8_t *)malloc_check(pixels);
    if (o->predict[0]) {
        snprintf(path, sizeof path, strcmp(o->out, "out") == 0 ? "out/predictions.bin" : "%s", o->out);
        if (strcmp(o->out, "out") == 0) mkdir("out", 0777);
        if (same_file(path, o->predict) || same_file(path, o->checkpoint))  // true masks, or a model, would be lost
            fail("--out %s: is read by this program; choose another name", path);
        if (shard_create(&prediction_writer, path, shard.H, shard.W, 1, err, sizeof err) != 0) fail("%s", err);
        p.writer = &prediction_writer;
        atexit(drop_unfinished);
    }
    printf("%s: %d videos, %d frames of %dx%d; the model sees clips of %d frames of %dx%d\n", shard.path, shard.videos,
           shard.frames, shard.H, shard.W, T, H, W);
    double start = seconds(), shown = start;
    parallel_through();
    for (int v = share ? parallel.rank : 0; v < shard.videos; v += share ? parallel.ranks : 1) {
        if (o->stride) predict_strided(m, &shard, v, T, o->stride, H, W, predict_frame, &p);
        else predict_centred(m, &shard, v, B, T, H, W, predict_frame, &p);
        if (seconds() - shown > (isatty(STDOUT_FILENO) ? 0.2 : 30.0)) {
            shown = seconds();
            printf("video %d/%d  %.1f frames/s\n", v + 1, shard.videos, shard.first_frame[v + 1] / (shown - start));
            fflush(stdout);
        }
    }
    if (share) metrics_over_ranks(&p.metrics);  // also waits for the slowest
    double elapsed = seconds() - start;
    if (p.writer && shard_finish(p.writer, err, sizeof err) != 0) fail("%s", err);
    if (p.writer) printf("wrote %s\n", path);
    if (shard.has_masks) {
        metrics_finish(&p.metrics);
        const double *mean = p.metrics.mean;
        printf("Dice %.4f  Jaccard %.4f  Precision %.4f  Recall %.4f  Specificity %.4f  (threshold 0.5, mean over %d frames, %d "
               "empty in both)\n", mean[METRICS_DICE], mean[METRICS_JACCARD], mean[METRICS_PRECISION], mean[METRICS_RECALL],
               mean[METRICS_SPECIFICITY], p.metrics.sums.frames, p.metrics.sums.empty);
    }
    printf("%.1f frames/s, peak memory %.0f MB\n", shard.frames / elapsed, device.peak());
    free(p.prob), free(p.mask), free(p.grey);
    model_free(m), shard_close(&shard);
}

// A contact sheet: the middle frame of the first 16 videos with the true and the predicted outline
static void write_pictures(Model *m, const Shard *shard, int T, const char *path) {
    int videos = min_int(16, shard->videos), columns = min_int(4, videos), H = shard->H, W = shard->W;
    size_t pixels = (size_t)H * W;
    uint8_t *masks = (uint8_t *)malloc_check(2 * pixels);  // the predicted one, the true one
    char err[4608];
    Batch batch;
    Overlay sheet;
    if (overlay_open(&sheet, ceil_div(videos, columns), columns, H, W) != 0) out_of_memory((double)sheet.H * sheet.W * 3);
    batch_init(&batch, 1, T, H, W);
    device.plan(m, 1, T, H, W, 0, 0, 0);
    for (int v = 0; v < videos; v++) {
        int frame = shard->first_frame[v] + (shard->first_frame[v + 1] - shard->first_frame[v]) / 2;
        batch_load(&batch, shard, &frame, 1, NULL, 0);
        device.forward(m, batch.input);
        for (size_t i = 0; i < pixels; i++) masks[i] = m->logits[i] > 0.0f, masks[pixels + i] = batch.mask[i] > 0.5f;
        overlay_add(&sheet, v, shard_frame(shard, frame), masks, masks + pixels);
    }
    if (png_write(path, sheet.rgb, sheet.H, sheet.W, 3, err, sizeof err) != 0) fail("%s", err);
    overlay_close(&sheet);
    batch_free(&batch); free(masks);
}

#endif
