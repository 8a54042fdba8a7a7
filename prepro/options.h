// options.h: what train_vivim can be told on the command line, and when it counts. Included by train_vivim.c, section 17.
#ifndef VIVIM_OPTIONS_H
#define VIVIM_OPTIONS_H

typedef struct {
    const char *config, *scans, *train, *val, *out, *init, *bce, *dt_init, *affine, *checkpoint, *predict;
    int size, edge, patch, frames, batch, epochs, seed, eval_every, save_every, flip, jitter, threads, stride, resume, eval;
    int bench, sync_bn, help;
    double lr, drop_path, dropout, memory_limit;
} Options;

#define FIELD(member) offsetof(Options, member)
static const Option OPTIONS[] = {
    {"config", "", "size of the model: tiny, b0, b1, b2, b3 (the paper's), b4, b5; else --init's", 's', 0, 0, FIELD(config)},
    {"scans", "fbs", "directions of the scans: fbs (C3), fb (C2), f (C1), s (C4), none (no Mamba)", 's', 0, 0, FIELD(scans)},
    {"train", "data/phantom_train.bin", "shard to train on", 's', 0, 0, FIELD(train)},
    {"val", "data/phantom_val.bin", "shard to validate on, of videos that are not in the other", 's', 0, 0, FIELD(val)},
    {"out", "out", "directory for checkpoints, log and pictures; of --predict, the shard to write", 's', 0, 0, FIELD(out)},
    {"init", "", "weights to start from: Vivim's or SegFormer's (safetensors)", 's', 0, 0, FIELD(init)},
    {"resume", "", "go on with the training that --out holds, as if it had never stopped", 'f', 0, 0, FIELD(resume)},
    {"size", "0", "height and width of frames; 0: the shard's, in prediction the checkpoint's", 'i', 0, 16384, FIELD(size)},
    {"frames", "0", "frames of a clip (T); 0: 5, in prediction the checkpoint's", 'i', 0, 4096, FIELD(frames)},
    {"batch", "", "clips of a batch, of all processes together; else 4, with --bench 1", 'i', 1, 4096, FIELD(batch)},
    {"epochs", "12", "passes over the training shard (a last, incomplete batch is left out)", 'i', 1, 100000, FIELD(epochs)},
    {"lr", "0.002", "Adam's learning rate; falls towards 1 % along a cosine, epoch by epoch", 'd', 1e-9, 1, FIELD(lr)},
    {"bce", "plain", "cross-entropy of the loss: plain (mean over pixels) or weighted (near edges)", 's', 0, 0, FIELD(bce)},
    {"edge", "3", "layers of the boundary head: 3, or 1 (the released code's); 0: no boundary loss", 'i', 0, 3, FIELD(edge)},
    {"affine", "", "network of the affine constraint; none: without; else beside the shard", 's', 0, 0, FIELD(affine)},
    {"patch", "0", "side of the constraint's patches; 0: a quarter of the frames' side", 'i', 0, 1024, FIELD(patch)},
    {"dt-init", "mamba", "initial step sizes of the scans: mamba or vivim (the released code's)", 's', 0, 0, FIELD(dt_init)},
    {"drop-path", "0.1", "highest probability to drop a SegFormer branch", 'd', 0, 0.9, FIELD(drop_path)},
    {"dropout", "0.1", "dropout before the last layer", 'd', 0, 0.9, FIELD(dropout)},
    {"sync-bn", "1", "batch norm over the clips of 1 all processes, 0 each one's own", 'i', 0, 1, FIELD(sync_bn)},
    {"flip", "1", "augmentation by flips: 1 on, 0 off", 'i', 0, 1, FIELD(flip)},
    {"jitter", "1", "augmentation by brightness, contrast, saturation, sharpness: 1 on, 0 off", 'i', 0, 1, FIELD(jitter)},
    {"eval-every", "1", "epochs between validations", 'i', 1, 100000, FIELD(eval_every)},
    {"save-every", "0", "steps between savings for --resume, besides the end of every epoch", 'i', 0, 1e9, FIELD(save_every)},
    {"seed", "1", "of all random numbers", 'i', 0, 2147483647, FIELD(seed)},
    {"threads", "0", "0: as many as OpenMP chooses, fewer while other programs use the cores", 'i', 0, 1024, FIELD(threads)},
    {"predict", "", "shard to segment: writes frames and predicted masks to the shard --out", 's', 0, 0, FIELD(predict)},
    {"eval", "", "predict --val and compare with its masks", 'f', 0, 0, FIELD(eval)},
    {"checkpoint", "out/best.safetensors", "weights and sizes for --predict and --eval", 's', 0, 0, FIELD(checkpoint)},
    {"stride", "0", "of predicted clips; 0: every frame has a clip of its own (the paper's way)", 'i', 0, 4096, FIELD(stride)},
    {"memory-limit", "0", "GiB that may be used; 0: what the machine has", 'd', 0, 1e6, FIELD(memory_limit)},
    {"bench", "", "time forward pass and training step (--frames 5, --size 256 unless given)", 'f', 0, 0, FIELD(bench)},
    {"help", "", "this list", 'f', 0, 0, FIELD(help)},
    {NULL, NULL, NULL, 0, 0, 0, 0},
};
#undef FIELD

// What counts in each mode; --threads, --memory-limit and --help do in all
static const struct { const char *what_for, *options; } MODES[] = {
    {"with --bench, which times the model alone, without data, augmentation and boundary head; leave it out",
     " bench config scans init size frames batch bce dt-init drop-path dropout seed "},
    {"with --predict, which takes the model from --checkpoint and trains nothing; leave it out",
     " predict eval checkpoint out size frames batch stride "},
    {"with --eval, which takes the model from --checkpoint, trains and writes nothing; leave it out",
     " eval checkpoint val size frames batch stride "},
    {"in training; give --predict SHARD or --eval, too, or leave it out (weights to start from: --init)",
     " config scans train val out init resume size frames batch epochs lr bce edge affine patch dt-init drop-path dropout "
     "sync-bn flip jitter eval-every save-every seed "},
};

// Refuses what was given (argv, already parsed) and would be ignored: whoever gave it expects something of it
static void options_check(const Options *o, int argc, char **argv) {
    int mode = o->bench ? 0 : o->predict[0] ? 1 : o->eval ? 2 : 3;
    for (int a = 1; a < argc && !o->help; a++) {
        const Option *t = OPTIONS; char word[32];
        while (strcmp(argv[a] + 2, t->name) != 0) t++;
        snprintf(word, sizeof word, " %s ", t->name);
        if (!strstr(MODES[mode].options, word) && !strstr(" threads memory-limit ", word))
            fail("%s: has no effect %s", argv[a], MODES[mode].what_for);
        if (t->kind != 'f') a++;
    }
    if (o->stride && o->batch && !o->help)
        fail("--batch: has no effect with --stride, which predicts one clip at a time; leave it out");
}

#endif
