/* checkpoint.h - a model's weights in files: ours, the released Vivim's, SegFormer's; and the frozen network of the affine
   constraint. Header only, included by train_vivim.c, section 14, whose Model it fills and saves.

   Safetensors files with the released Vivim's key names, so PyTorch loads ours and we load theirs. A file is written under a
   temporary name, synced and renamed when it is complete: whatever happens, the previous checkpoint stays whole. */
#ifndef VIVIM_CHECKPOINT_H
#define VIVIM_CHECKPOINT_H

static const char *const TRACKED = "decoder.batch_norm.num_batches_tracked";  // PyTorch's counter: a scalar, no dimensions

// All tensors of the table, and `count` pairs of text. Rank 0 writes.
static void tensors_save(const Model *m, const char *path, const char *const *keys, const char *const *values, int count) {
    char err[4608];  // a path and a sentence
    int counter = m->num_buffers > 0;
    if (parallel.rank > 0) return;
    SafeTensorOut *out = (SafeTensorOut *)calloc_check((size_t)m->num_tensors + 1, sizeof(SafeTensorOut));
    SafeTensorOut *tracked = &out[m->num_tensors];
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        out[i].name = t->name, out[i].dtype = "F32", out[i].ndim = t->ndim;
        for (int k = 0; k < t->ndim; k++) out[i].shape[k] = t->shape[k];
        out[i].data = tensor_data(m, t), out[i].nbytes = t->numel * sizeof(float);
    }
    tracked->name = TRACKED, tracked->dtype = "I64";
    tracked->data = &m->batches_tracked, tracked->nbytes = sizeof m->batches_tracked;
    if (safetensors_write(path, out, m->num_tensors + counter, keys, values, count, err, sizeof err) != 0) fail("%s", err);
    free(out);
}

// epoch: finished epochs; dice: these weights' validation Dice, negative if not validated. T, H, W: what it was trained on.
static void checkpoint_save(const Model *m, const char *path, int epoch, double dice, int T, int H, int W) {
    char text[4][32];
    const char *const keys[] = {"format", "config", "scans", "epoch", "val_dice", "frames", "size"};
    const char *const values[] = {"pt", m->config.name, m->config.scans, text[0], text[1], text[2], text[3]};
    snprintf(text[0], sizeof text[0], "%d", epoch);
    snprintf(text[1], sizeof text[1], dice < 0 ? "not validated" : "%.6f", dice);
    snprintf(text[2], sizeof text[2], "%d", T), snprintf(text[3], sizeof text[3], "%dx%d", H, W);
    tensors_save(m, path, keys, values, 7);
}

static void checkpoint_open(SafeTensors *file, const char *path) {
    char err[4608];
    if (safetensors_open(file, path, err, sizeof err) != 0) fail("%s", err);
}

// The file's tensor for a row of the table: under its own name, with the training script's prefix "model.", or under
// SegFormer's names (HuggingFace), where our encoder.downsample_layers. is [segformer.]encoder., our decoder. decode_head.
static const SafeTensor *checkpoint_find(const SafeTensors *file, const char *name) {
    static const char *const PREFIXES[][2] = {{"", ""}, {"", "model."}, {"encoder.downsample_layers.", "segformer.encoder."},
                                              {"encoder.downsample_layers.", "encoder."}, {"decoder.", "decode_head."}};
    const SafeTensor *found = NULL;
    for (size_t i = 0; i < sizeof PREFIXES / sizeof PREFIXES[0] && found == NULL; i++) {
        size_t ours = strlen(PREFIXES[i][0]); char alias[192];
        if (strncmp(name, PREFIXES[i][0], ours) != 0) continue;
        snprintf(alias, sizeof alias, "%s%s", PREFIXES[i][1], name + ours);
        found = safetensors_find(file, alias);
    }
    return found;
}

// Copies the tensor of the file into row t of the table and returns it; NULL if the file lacks it. Another shape is an error,
// unless nobody reads the tensor: SegFormer's classifier has as many rows as there were classes.
static const SafeTensor *tensor_load(Model *m, const Tensor *t, const SafeTensors *file, const char *path) {
    const SafeTensor *s = checkpoint_find(file, t->name);
    if (s == NULL) return NULL;
    int same = s->ndim == t->ndim;
    for (int k = 0; same && k < t->ndim; k++) same = s->shape[k] == t->shape[k];
    if (!same && t->init == INIT_UNUSED) return NULL;
    if (!same)
        fail("%s: tensor %s has another shape than config %s needs; leave out --config, or give the one it was trained with",
             path, s->name, m->config.name);
    for (size_t k = 0; k < t->numel; k++) tensor_data(m, t)[k] = (float)safetensors_value(s, k);
    return s;
}

// Prints a list of names, those that differ in numbers only as one: "encoder.stages.N.N.N.mamba.A_log (7)"
static void print_names(const char *title, const char *const *names, int count) {
    enum { KINDS = 64 };
    static char kinds[KINDS][128];
    int number[KINDS], n = 0, others = 0;
    for (int i = 0; i < count; i++) {
        char kind[128]; int length = 0, k = 0;
        for (const char *c = names[i]; *c && length < 127; c++) {
            int digit = *c >= '0' && *c <= '9', of_word = c > names[i] && c[-1] != '.';  // stage 3, but not norm1
            if (digit && !of_word) kind[length++] = 'N';
            else if (!(digit && length > 0 && kind[length - 1] == 'N')) kind[length++] = *c < 32 || *c == 127 ? '?' : *c;
        }
        kind[length] = '\0';
        while (k < n && strcmp(kinds[k], kind) != 0) k++;
        if (k == KINDS) { others++; continue; }
        if (k == n) memcpy(kinds[n], kind, sizeof kind), number[n++] = 0;
        number[k]++;
    }
    if (count) printf("  %s:\n", title);
    for (int k = 0; k < n; k++) printf(number[k] > 1 ? "    %s (%d)\n" : "    %s\n", kinds[k], number[k]);
    if (others) printf("    and %d others\n", others);
}

// Fills the tensors that the file has and says what it did with all: those that the file lacks keep their values. A tensor of
// another shape, or no match at all, is an error.
static void checkpoint_load(Model *m, const char *path) {
    SafeTensors file; checkpoint_open(&file, path);
    const char **missing = (const char **)calloc_check((size_t)m->num_tensors, sizeof(char *));
    const char **unused = (const char **)calloc_check((size_t)file.count + 1, sizeof(char *));
    int loaded = 0, lacking = 0, left = 0;
    for (int i = 0; i < file.count; i++) unused[i] = file.tensors[i].name;
    for (int i = 0; i < m->num_tensors; i++) {
        const SafeTensor *s = tensor_load(m, &m->tensors[i], &file, path);
        if (s) unused[s - file.tensors] = NULL, loaded++;
        else if (m->tensors[i].init != INIT_UNUSED) missing[lacking++] = m->tensors[i].name;
    }
    const SafeTensor *tracked = checkpoint_find(&file, TRACKED);
    if (tracked) unused[tracked - file.tensors] = NULL;
    if (loaded == 0) fail("%s: holds no tensor of Vivim or SegFormer; was it made by another program?", path);
    double updates = tracked && tracked->numel == 1 ? safetensors_value(tracked, 0) : 0.0;
    if (updates > 0.0 && updates < 9e15) m->batches_tracked = (int64_t)updates;
    for (int i = 0; i < file.count; i++)
        if (unused[i]) unused[left++] = unused[i];
    printf("%s: %d of its %d tensors loaded\n", path, loaded + (tracked != NULL), file.count);
    print_names("not in the file, kept as initialised", missing, lacking);
    print_names("in the file, not used", unused, left);
    free(missing); free(unused);
    safetensors_close(&file);
}

static int shape_of(const SafeTensors *file, int axis, const char *format, int i, int j) {  // 0: no such tensor
    char name[128];
    snprintf(name, sizeof name, format, i, j);
    const SafeTensor *s = checkpoint_find(file, name);
    return s && s->numel > 0 && axis < s->ndim && s->shape[axis] > 0 && s->shape[axis] < 65536 ? (int)s->shape[axis] : 0;
}

// The sizes of a model as the shapes in its file tell them. What the file does not have (a SegFormer has no Mamba layers,
// its bare encoder no decoder) is taken from the config of the same encoder, else stays as it is.
static void config_from_file(Config *c, const char *path) {
    SafeTensors file; checkpoint_open(&file, path);
    Config sizes = *c; int mamba = 0, known = 0;
    for (int i = 0; i < 4; i++) {
        int *depth = &sizes.depths[i], *layers = &sizes.mamba_depths[i];
        sizes.dims[i] = shape_of(&file, 0, "encoder.downsample_layers.patch_embeddings.%d.proj.weight", i, 0);
        if (sizes.dims[i] == 0) fail("%s: holds no encoder of Vivim or SegFormer; was it made by another program?", path);
        *depth = *layers = 0;
        while (shape_of(&file, 0, "encoder.downsample_layers.block.%d.%d.layer_norm_1.weight", i, *depth)) ++*depth;
        while (shape_of(&file, 0, "encoder.stages.%d.%d.0.norm1.weight", i, *layers)) ++*layers;
        int reduction = shape_of(&file, 2, "encoder.downsample_layers.block.%d.0.attention.self.sr.weight", i, 0);
        sizes.reductions[i] = max_int(1, reduction);
        if (sizes.dims[i] % sizes.heads[i] != 0)
            fail("%s: %d channels in stage %d cannot be shared by %d heads; this is no SegFormer", path, sizes.dims[i], i + 1,
                 sizes.heads[i]);
        mamba += *layers;
    }
    for (int k = 0; k < (int)(sizeof CONFIGS / sizeof CONFIGS[0]) && !known; k++) {
        const Config *t = &CONFIGS[k];
        known = memcmp(t->dims, sizes.dims, sizeof t->dims) == 0 && memcmp(t->depths, sizes.depths, sizeof t->depths) == 0;
        if (known) memcpy(sizes.name, t->name, sizeof t->name), sizes.decoder_dim = t->decoder_dim;
        if (known && mamba == 0) memcpy(sizes.mamba_depths, t->mamba_depths, sizeof t->mamba_depths);
    }
    if (!known) snprintf(sizes.name, sizeof sizes.name, "custom");
    if (shape_of(&file, 0, "decoder.linear_c.0.proj.weight", 0, 0))
        sizes.decoder_dim = shape_of(&file, 0, "decoder.linear_c.0.proj.weight", 0, 0);
    int i = 0;
    while (mamba && sizes.mamba_depths[i] == 0) i++;  // the first stage with Mamba layers
    int A = shape_of(&file, 0, "encoder.stages.%d.0.0.mamba.A_log", i, 0) ? 1 : 0;
    int b = shape_of(&file, 0, "encoder.stages.%d.0.0.mamba.A_b_log", i, 0) ? 1 : 0;
    int spatial = shape_of(&file, 0, "encoder.stages.%d.0.0.mamba.A_s_log", i, 0) ? 1 : 0;
    if (mamba) {
        const char *log = A ? "encoder.stages.%d.0.0.mamba.A_log" : "encoder.stages.%d.0.0.mamba.A_s_log";
        const char *conv = A ? "encoder.stages.%d.0.0.mamba.conv1d.weight" : "encoder.stages.%d.0.0.mamba.conv1d_s.weight";
        snprintf(sizes.scans, sizeof sizes.scans, "%s%s%s", A ? "f" : "", b ? "b" : "", spatial ? "s" : "");
        sizes.d_state = shape_of(&file, 1, log, i, 0), sizes.d_conv = shape_of(&file, 2, conv, i, 0);
        sizes.expand = shape_of(&file, 0, log, i, 0) / sizes.dims[i];
        if (sizes.d_state == 0 || sizes.d_conv == 0 || sizes.expand == 0)
            fail("%s: its Mamba layers lack tensors; is the file whole?", path);
    }
    if (shape_of(&file, 0, "edge_head.0.weight", 0, 0)) sizes.edge_layers = 3;
    else if (shape_of(&file, 0, "edgeocr_cls_head.weight", 0, 0)) sizes.edge_layers = 1;
    *c = sizes;
    safetensors_close(&file);
}

// The side of the affine constraint's patches if the user does not say: a grid of 4 x 4
static int default_patch(int H, int W) { return min_int(H, W) / 4; }

// Where the network of a training shard is looked for: beside it, data/x.bin -> data/x_affine.safetensors
static void affine_path(char *path, size_t size, const char *shard) {
    size_t length = strlen(shard), stem = length > 4 && strcmp(shard + length - 4, ".bin") == 0 ? length - 4 : length;
    if (length + 32 > size) fail("%.40s...: is too long for a path; choose a shorter one", shard);
    snprintf(path, size, "%.*s_affine.safetensors", (int)stem, shard);
}

// Reads F, which must be for patches of side q
static void affine_load(AffineNet *f, const char *path, int q) {
    char err[4608];
    SafeTensors file;
    if (safetensors_open(&file, path, err, sizeof err) != 0)
        fail("%s (prepro/affine makes it from a training shard; --affine none does without)", err);
    const SafeTensor *fc1 = safetensors_find(&file, "affine.fc1.weight");
    if (fc1 == NULL || fc1->ndim != 2) fail("%s: holds no inverse-transform network; make one with prepro/affine", path);
    int side = (int)(sqrt((double)fc1->shape[1] / 2) + 0.5);
    if ((int64_t)fc1->shape[1] != (int64_t)2 * q * q)
        fail("%s: is for patches of %dx%d, but %dx%d are asked for; give --patch %d, or make another with prepro/affine",
             path, side, side, q, q, side);
    affine_init(f, q, 0);
    for (int i = 0; i < f->net.num_tensors; i++)
        if (!tensor_load(&f->net, &f->net.tensors[i], &file, path))
            fail("%s: lacks the tensor %s; make it again with prepro/affine", path, f->net.tensors[i].name);
    safetensors_close(&file);
    if (!all_finite(f->net.params, f->net.num_params))
        fail("%s: holds numbers that are not finite; make it again with prepro/affine", path);
}

#endif
