/* clips.h - from a shard's frames to batches of clips, augmented and normalised. Header only, included by train_vivim.c,
   section 15, whose random numbers and memory functions it uses.

   Every frame of every video is the target of one clip of T frames: its neighbours at offsets -(T/2) .. (T-1)/2, held at the
   video's ends, so the target stands at index T/2. A still image is a video of one frame. */
#ifndef VIVIM_CLIPS_H
#define VIVIM_CLIPS_H

static const float IMAGE_MEAN[3] = {0.485f, 0.456f, 0.406f}, IMAGE_STD[3] = {0.229f, 0.224f, 0.225f};

typedef struct { int flip, jitter; } Augment;  // which augmentations training uses

// One frame of a batch: input (H, W, 3) normalised, mask (H, W) in [0, 1] or NULL; buffer (2, H, W, 3) for the jitter. The
// clip's flips come from clip_key, the frame's colours from frame_key. A frame of another size (prediction only: no mask)
// is resized as prepro/frames does it.
static void load_frame(float *input, float *mask, uint8_t *buffer, int H, int W, const Shard *shard, int frame,
                       const Augment *augment, uint64_t clip_key, uint64_t frame_key) {
    int up = 0, left = 0; size_t n = (size_t)H * W;
    const uint8_t *rgb = shard_frame(shard, frame), *grey = shard->has_masks ? shard_mask(shard, frame) : NULL;
    if (H != shard->H || W != shard->W) {
        if (resize_bilinear(buffer, H, W, rgb, shard->H, shard->W, 3) != 0) out_of_memory(12.0 * shard->H * W);
        rgb = buffer;
    }
    if (augment && augment->flip) {  // a rotation by 180 degrees is both flips
        int turn = rng_uniform(clip_key, 2) < 0.5f; up = (rng_uniform(clip_key, 0) < 0.5f) ^ turn;
        left = (rng_uniform(clip_key, 1) < 0.5f) ^ turn;
    }
    if (augment && augment->jitter) {
        float factor[4];  // brightness and contrast 0.5 .. 1.5, saturation 0 .. 2, sharpness 0 .. 3, in steps of 0.1
        for (uint64_t i = 0; i < 4; i++)
            factor[i] = 0.1f * (float)(i < 2 ? 5 + rng_u32(frame_key, i) % 11 : rng_u32(frame_key, i) % (i == 2 ? 21 : 31));
        memcpy(buffer, rgb, 3 * n);
        enhance(buffer, buffer + 3 * n, H, W, factor[0], factor[1], factor[2], factor[3]);
        rgb = buffer;
    }
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++) {
            size_t from = (size_t)(up ? H - 1 - y : y) * W + (left ? W - 1 - x : x), to = (size_t)y * W + x;
            for (int c = 0; c < 3; c++)
                input[3 * to + c] = (rgb[3 * from + c] * (1.0f / 255.0f) - IMAGE_MEAN[c]) / IMAGE_STD[c];
            if (mask) mask[to] = grey[from] * (1.0f / 255.0f);
        }
}

typedef struct {
    int B, T, H, W;
    float *input;              // (B, T, H, W, 3)
    float *mask, *first_mask;  // (B, H, W) of the target frames; of the clips' first frames
} Batch;

static void batch_init(Batch *b, int B, int T, int H, int W) {
    b->B = B, b->T = T, b->H = H, b->W = W;
    b->input = malloc_floats((size_t)B * T * H * W * 3);
    b->mask = malloc_floats((size_t)B * H * W), b->first_mask = malloc_floats((size_t)B * H * W);
}

static void batch_free(Batch *b) {
    free(b->input), free(b->mask), free(b->first_mask);
}

// Fills the first n clips of the batch with those whose target frames (counted over the whole shard) are targets[0..n).
// augment NULL: none. key makes each step's augmentation different;
// with several ranks clips count through all their batches.
static void batch_load(Batch *b, const Shard *shard, const int *targets, int n, const Augment *augment, uint64_t key) {
    size_t pixels = (size_t)b->H * b->W;
    uint64_t before = (uint64_t)parallel.rank * (uint64_t)b->B, all = (uint64_t)parallel.ranks * (uint64_t)b->B;
    #pragma omp parallel
    {
        uint8_t *buffer = (uint8_t *)malloc_check(6 * pixels);
        #pragma omp for schedule(static)
        for (int k = 0; k < n * b->T; k++) {
            int clip = k / b->T, t = k % b->T, video = shard_video_of_frame(shard, targets[clip]);
            int first = shard->first_frame[video], last = shard->first_frame[video + 1] - 1;
            int frame = max_int(first, min_int(last, targets[clip] + t - b->T / 2));
            float *mask = t == b->T / 2 ? b->mask : t == 0 ? b->first_mask : NULL;
            if (mask) mask = shard->has_masks && b->H == shard->H && b->W == shard->W ? mask + (size_t)clip * pixels : NULL;
            load_frame(b->input + (size_t)k * pixels * 3, mask, buffer, b->H, b->W, shard, frame, augment,
                       rng_key(key, RNG_AUGMENT, before + (uint64_t)clip),
                       rng_key(key, RNG_AUGMENT, all + before * (uint64_t)b->T + (uint64_t)k));
        }
        free(buffer);
    }
    if (b->T == 1) memcpy(b->first_mask, b->mask, sizeof(float) * n * pixels);
}

// A batch that is to be loaded, if `threaded` by a thread of its own, while the device computes with another one
typedef struct {
    Batch *batch;
    const Shard *shard;
    const int *targets;
    const Augment *augment;
    uint64_t key;
    int n, threaded, running;
    pthread_t thread;
} Loader;

static void *loader_run(void *loader) {
    const Loader *l = (const Loader *)loader;
    batch_load(l->batch, l->shard, l->targets, l->n, l->augment, l->key);
    return NULL;
}

static void loader_start(Loader *l) {
    l->running = l->threaded && pthread_create(&l->thread, NULL, loader_run, l) == 0;
    if (!l->running) loader_run(l);
}

static void loader_wait(Loader *l) {
    if (l->running) pthread_join(l->thread, NULL);
    l->running = 0;
}

// A permutation of 0..n-1 that depends on seed and epoch only (Fisher and Yates)
static void shuffle(int *order, int n, uint64_t seed, int epoch) {
    uint64_t key = rng_key(seed, RNG_SHUFFLE, (uint64_t)epoch);
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)(rng_u32(key, (uint64_t)i) % (uint32_t)(i + 1)), swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
}

#endif
