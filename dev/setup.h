/* setup.h - from options to what they ask for: a model, shards, the affine network; or one line that says why not. Header only.

   Included by train_vivim.c, section 17. */
#ifndef VIVIM_SETUP_H
#define VIVIM_SETUP_H

static void model_from_options(Model *m, const Options *o) {
    const char *name = o->config[0] ? o->config : "tiny";
    int known = (int)(sizeof CONFIGS / sizeof CONFIGS[0]), i = 0, none = strcmp(o->scans, "none") == 0;
    while (i < known && strcmp(CONFIGS[i].name, name) != 0) i++;
    if (i == known) fail("--config %s: no such size; there are tiny, b0, b1, b2, b3, b4, b5", name);
    if (!none && strcmp(o->scans, "fbs") && strcmp(o->scans, "fb") && strcmp(o->scans, "f") && strcmp(o->scans, "s"))
        fail("--scans %s: must be fbs, fb, f, s or none", o->scans);
    if (strcmp(o->bce, "plain") && strcmp(o->bce, "weighted")) fail("--bce %s: must be plain or weighted", o->bce);
    if (o->edge == 2) fail("--edge 2: the boundary head has 3 layers, 1, or 0 for none");
    if (strcmp(o->dt_init, "mamba") && strcmp(o->dt_init, "vivim")) fail("--dt-init %s: must be mamba or vivim", o->dt_init);
    Config config = CONFIGS[i];
    if (o->init[0] && !o->config[0]) config_from_file(&config, o->init);
    snprintf(config.scans, sizeof config.scans, "%s", none ? "" : o->scans);
    if (none) memset(config.mamba_depths, 0, sizeof config.mamba_depths);  // the ablation "basic"
    config.edge_layers = o->edge;
    config.plain_dt = strcmp(o->dt_init, "vivim") == 0;
    model_init(m, &config, (uint64_t)o->seed);
    m->drop_path = (float)o->drop_path, m->dropout = (float)o->dropout;
    m->weighted_bce = strcmp(o->bce, "weighted") == 0, m->local_bn = !o->sync_bn;
    if (o->init[0] && !o->resume) checkpoint_load(m, o->init);
}

static void map_shard(Shard *shard, const char *path) {
    char err[4608];
    if (shard_open(shard, path, err, sizeof err) != 0)
        fail("%s%s", err, strncmp(path, "data/phantom_", 13) == 0 ? " (`make data` writes the synthetic shards)" : "");
}

// A shard to train or validate on
static void open_shard(Shard *shard, const char *path, const Options *o) {
    map_shard(shard, path);
    if (!shard->has_masks) fail("%s: has no masks to learn from; give prepro/frames a folder of masks", path);
    if (shard->H < 32 || shard->W < 32)
        fail("%s: frames of %dx%d are too small; use prepro/frames --size 32 or more", path, shard->H, shard->W);
    if (o->size && (shard->H != o->size || shard->W != o->size))
        fail("%s: frames are %dx%d, not %dx%d as --size says; use prepro/frames --size %d", path, shard->H, shard->W,
             o->size, o->size, o->size);
}

// Refuses batches that would not fit, and says which would
static void check_memory(Model *m, const Options *o, int B, int T, int H, int W, int training, int all_frames) {
    const double GiB = 1073741824;
    double weights = (double)m->num_params * sizeof(float) * (training ? 4 : 1), needed = 0;
    double limit = o->memory_limit > 0 ? o->memory_limit * GiB : device.memory();
    for (int t = T; t > 0; t = t > 64 ? t * 7 / 8 : t - 1) {
        device.measure(m, B, t, H, W, training, all_frames);
        double bytes = weights + (double)m->kept_planned + (double)m->scratch_planned
                     + sizeof(float) * (double)B * t * H * W * 4;  // the images, and what is made of them
        if (t == T) needed = bytes;
        if (bytes > limit && t > 1) continue;
        if (t < T && bytes <= limit)
            fail("a batch of %d x %d frames of %dx%d needs %.2f GiB, and there are %.2f; --frames %d would fit; or use a "
                 "smaller --batch or --size, or a larger --memory-limit", B, T, H, W, needed / GiB, limit / GiB, t);
        if (bytes > limit)
            fail("even a single frame of %dx%d needs %.2f GiB, and there are %.2f; use a smaller --size or --batch", H, W,
                 bytes / GiB, limit / GiB);
        return;
    }
}

// The frozen network for frames of H x W; 0: train without it
static int open_affine(AffineNet *f, const Options *o, int H, int W) {
    char path[4096];
    int q = o->patch ? o->patch : default_patch(H, W);
    if (o->edge == 0 || strcmp(o->affine, "none") == 0) return 0;
    if (q > min_int(H, W)) fail("--patch %d: is more than the frames' %dx%d; use a smaller one", q, H, W);
    if (o->affine[0]) snprintf(path, sizeof path, "%s", o->affine);
    else affine_path(path, sizeof path, o->train);
    affine_load(f, path, q);
    printf("%s: frozen network of the affine constraint, %d x %d patches of %dx%d\n", path, H / q, W / q, q, q);
    return 1;
}

#endif
