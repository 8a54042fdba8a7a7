/* resume.h - the state of a training in a file, for --resume. Header only, included by train_vivim.c, section 17.

   OUT/resume.safetensors holds all that training changes: parameters, buffers, Adam's moments, counters. It needs no other
   file, so one rename replaces the whole state; and all random numbers follow from the counters, so a resumed training makes
   the same bits as one that never stopped. */
#ifndef VIVIM_RESUME_H
#define VIVIM_RESUME_H

typedef struct {
    int epoch, step, best_epoch;  // epochs done, steps done of the next one; the best epoch so far
    double best;                  // its Dice
    Losses sum;                   // of the steps done of this epoch
    int64_t log_bytes;            // length of log.txt
    char data[160];               // what it is trained on, see data_identity
} Progress;

enum { RESUME_NUMBERS = 10 };

static const char *const ANY_TIME[] = {"out", "resume", "threads", "save-every", "memory-limit", "checkpoint", "stride",
                                       "predict", "eval", "bench", "help"};  // options that a resumed run may change

// The shards and the frozen network as a line of text: another line, other data
static void data_identity(char text[160], const Shard *training, const Shard *validation, const AffineNet *f) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a of F's numbers
    for (size_t i = 0; f && i < f->net.num_params; i++) {
        uint32_t bits; memcpy(&bits, &f->net.params[i], sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    snprintf(text, 160, "%d videos of %d frames, %d of %d, %dx%d, F %016llx", training->videos, training->frames,
             validation->videos, validation->frames, training->H, training->W, (unsigned long long)(f ? hash : 0));
}

static int may_change(const char *option) {
    for (size_t i = 0; i < sizeof ANY_TIME / sizeof ANY_TIME[0]; i++)
        if (strcmp(option, ANY_TIME[i]) == 0) return 1;
    return 0;
}

static void resume_save(const Model *m, const char *path, const Progress *p, const Options *o) {
    enum { ROWS = sizeof OPTIONS / sizeof OPTIONS[0] - 1 };
    char err[4608], text[ROWS][OPTION_TEXT];
    const char *keys[ROWS + 1], *values[ROWS + 1];
    double numbers[RESUME_NUMBERS] = {(double)p->epoch, (double)p->step, (double)p->best_epoch, p->best, p->sum.total,
        p->sum.seg, p->sum.edge, p->sum.affine, (double)m->step, (double)m->batches_tracked};
    int64_t n = (int64_t)m->num_params, b = (int64_t)m->num_buffers;
    size_t n_bytes = m->num_params * sizeof(float), b_bytes = m->num_buffers * sizeof(float);
    const SafeTensorOut tensors[] = {
        {"params", "F32", 1, {n}, m->params, n_bytes}, {"buffers", "F32", 1, {b}, m->buffers, b_bytes},
        {"adam_m", "F32", 1, {n}, m->adam_m, n_bytes}, {"adam_v", "F32", 1, {n}, m->adam_v, n_bytes},
        {"numbers", "F64", 1, {RESUME_NUMBERS}, numbers, sizeof numbers}, {"log_bytes", "I64", 0, {0}, &p->log_bytes, 8}};
    int fixed = 0;
    for (const Option *t = OPTIONS; t->name; t++) {
        if (may_change(t->name)) continue;
        option_text(text[fixed], o, t);
        keys[fixed] = t->name, values[fixed] = text[fixed], fixed++;
    }
    keys[fixed] = "data", values[fixed] = p->data, fixed++;
    if (safetensors_write(path, tensors, 6, keys, values, fixed, err, sizeof err) != 0) fail("%s", err);
}

static void resume_read(float *to, size_t n, const SafeTensors *file, const char *name, const char *path) {
    const SafeTensor *t = safetensors_find(file, name);
    if (t == NULL || (size_t)t->numel != n)
        fail("%s: is not a training state of this model (%s); start again without --resume", path, name);
    for (size_t i = 0; i < n; i++) to[i] = (float)safetensors_value(t, i);
}

static void resume_load(Model *m, const char *path, Progress *p, const Options *o) {
    SafeTensors file; char err[4608], text[OPTION_TEXT];
    if (safetensors_open(&file, path, err, sizeof err) != 0) fail("%s (--resume: there is nothing to go on with)", err);
    for (const Option *t = OPTIONS; t->name; t++) {
        const char *stored = safetensors_metadata(&file, t->name);
        option_text(text, o, t);
        if (may_change(t->name) || (stored && strcmp(stored, text) == 0)) continue;
        char other[64]; snprintf(other, sizeof other, "%s", stored ? stored : "");
        for (char *c = other; *c; c++)
            if (*c < 32 || *c > 126) *c = '?';  // the file may be anyone's, the terminal is ours
        fail("--%s %s: the training in %s has '%s'; --resume needs the same options", t->name, text, path, other);
    }
    const char *data = safetensors_metadata(&file, "data");
    if (data == NULL || strcmp(data, p->data) != 0)
        fail("%s: the shards or the frozen network have changed since; --resume needs the same data", path);
    model_trainable(m);
    resume_read(m->params, m->num_params, &file, "params", path);
    resume_read(m->buffers, m->num_buffers, &file, "buffers", path);
    resume_read(m->adam_m, m->num_params, &file, "adam_m", path);
    resume_read(m->adam_v, m->num_params, &file, "adam_v", path);
    const SafeTensor *numbers = safetensors_find(&file, "numbers"), *log = safetensors_find(&file, "log_bytes");
    double x[RESUME_NUMBERS], length;
    if (numbers == NULL || numbers->numel != RESUME_NUMBERS || log == NULL || log->numel != 1)
        fail("%s: is not a training state; start again without --resume", path);
    for (size_t i = 0; i < RESUME_NUMBERS; i++) {
        x[i] = safetensors_value(numbers, i);
        int counter = i < 3 || i > 7;  // the others are losses and a Dice
        if (!(fabs(x[i]) < 2e9) || (counter && x[i] < 0)) fail("%s: is damaged; start again without --resume", path);
    }
    length = safetensors_value(log, 0);
    if (!(length >= 0 && length < 9e15)) fail("%s: is damaged; start again without --resume", path);
    p->epoch = (int)x[0], p->step = (int)x[1], p->best_epoch = (int)x[2], p->best = x[3];
    p->sum.total = x[4], p->sum.seg = x[5], p->sum.edge = x[6], p->sum.affine = x[7];
    m->step = (int64_t)x[8], m->batches_tracked = (int64_t)x[9], p->log_bytes = (int64_t)length;
    safetensors_close(&file);
}

// the log, at its end (rank 0's; the others' goes nowhere); of a resumed training, where the saved state left it
static FILE *open_log(const char *path, const Options *o, const Progress *p, size_t num_params) {
    struct stat st;
    if (o->resume && parallel.rank == 0 && (stat(path, &st) != 0 || (int64_t)st.st_size < p->log_bytes))
        fail("%s: is gone or shorter than it was, and --resume goes on with it; start again without --resume", path);
    if (parallel.rank > 0) path = "/dev/null";
    FILE *log = fopen(path, o->resume ? "r+" : "w");
    if (log == NULL) fail("%s: cannot write: %s; choose another --out", path, strerror(errno));
    if (o->resume && parallel.rank == 0 && (ftruncate(fileno(log), (off_t)p->log_bytes) != 0 || fseeko(log, 0, SEEK_END) != 0))
        fail("%s: cannot go on with it: %s; start again without --resume", path, strerror(errno));
    if (o->resume) return log;
    options_print(log, o, OPTIONS);
    fprintf(log, "# parameters %zu\n# train: epoch step lr loss seg edge affine\n", num_params);
    fprintf(log, "# val: epoch loss dice jaccard precision recall specificity empty_frames\n");
    return log;
}

// the log on the disk, then the state that knows its length
static void save_state(const Model *m, const char *path, Progress *p, const Options *o, FILE *log, const char *log_path) {
    if (parallel.rank > 0) return;
    if (fflush(log) != 0 || ferror(log)) fail("%s: cannot write: %s; free some space", log_path, strerror(errno));
    fsync(fileno(log));
    p->log_bytes = (int64_t)ftello(log);
    resume_save(m, path, p, o);
}

#endif
