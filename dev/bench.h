// bench.h: `./train_vivim --bench` times the model on one clip and says how far that is from what the arithmetic needs.
// Included at the end of train_vivim.c (and, on a GPU, of train_vivim.cu): it uses their model, options and train_step.
#ifndef VIVIM_BENCH_H
#define VIVIM_BENCH_H

// Floating point operations of a forward pass as planned (2 per multiply-add), the decoder folded; a training step takes
// three times as many: each product has one product for its input's and one for its weight's gradient.
static double model_flops(const Model *m) {
    const Config *c = &m->config;
    double flops = 0, frames = (double)m->B * m->T, E = c->decoder_dim;
    for (int i = 0; i < 4; i++) {
        const Stage *st = &m->stages[i];
        int s = c->reductions[i], Pk = (st->H / s) * (st->W / s), R = dt_rank(st->C), N = c->d_state;
        double rows = frames * st->P, rows_k = frames * Pk, C = st->C, D = c->expand * C, scans = (double)strlen(c->scans);
        double ffn = 2 * rows * (8 * C * C);
        flops += 2 * rows * C * (i == 0 ? 3 : c->dims[i - 1]) * st->kernel * st->kernel;
        flops += c->depths[i] * (2 * C * C * (2 * rows + 2 * rows_k + (s > 1 ? rows_k * s * s : 0)) + 4 * rows * Pk * C + ffn + 2 * rows * 4 * C * 9);
        flops += c->mamba_depths[i] * (2 * rows * 3 * C * D + scans * 2 * rows * D * (c->d_conv + R + 2 * N + R + 3 * N) + ffn + 2 * rows * 4 * C * 27);
        flops += 2 * rows * C * E + 2 * E * E * C + (i > 0 ? 3 * 2 * frames * m->stages[0].P * E : 4 * rows * E);
    }
    return flops;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Times one clip: forward in evaluation mode with the logits of all frames, then a training step of the segmentation network,
// without the boundary loss, as the numbers that README compares with
static void bench(const Options *o) {
    enum { RUNS = 9 };
    Options options = *o;
    Model model, *m = &model;
    Batch batch;
    int size = o->size ? o->size : 256, T = o->frames ? o->frames : 5, threads = 1;
    double times[RUNS], forward_ms, step_ms, forward_mb, step_mb;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    options.edge = 0;
    if (parallel.ranks > 1) fail("--bench: times one process, and there are %d", parallel.ranks);
    model_from_options(m, &options);
    check_memory(m, &options, 1, T, size, size, 1, 0);
    batch_init(&batch, 1, T, size, size);
    for (size_t i = 0; i < (size_t)T * size * size * 3; i++) batch.input[i] = 4.0f * rng_uniform(1, i) - 2.0f;
    for (size_t i = 0; i < (size_t)size * size; i++) batch.mask[i] = i % (size_t)size > (size_t)size / 2 ? 1.0f : 0.0f;
    printf("%s, one clip of %d frames of %dx%d, %d threads, medians of %d\n", m->config.name, T, size, size, threads, RUNS);
    device.plan(m, 1, T, size, size, 0, 1, 1);
    device.forward(m, batch.input);
    for (int i = 0; i < RUNS; i++) {
        times[i] = seconds();
        device.forward(m, batch.input);
        times[i] = seconds() - times[i];
    }
    qsort(times, RUNS, sizeof times[0], compare_doubles);
    forward_ms = 1e3 * times[RUNS / 2];
    forward_mb = device.peak();
    double gflop = model_flops(m) / 1e9;
    printf("forward, evaluation   %9.1f ms  %7.1f GFLOP  %6.1f GFLOP/s  peak %.0f MB\n", forward_ms, gflop, gflop / forward_ms * 1e3, forward_mb);
    fflush(stdout);
    device.plan(m, 1, T, size, size, 1, 0, 1);
    device.step(m, NULL, batch.input, batch.mask, batch.first_mask, 1e-4);
    for (int i = 0; i < RUNS; i++) {
        times[i] = seconds();
        device.step(m, NULL, batch.input, batch.mask, batch.first_mask, 1e-4);
        times[i] = seconds() - times[i];
    }
    qsort(times, RUNS, sizeof times[0], compare_doubles);
    step_ms = 1e3 * times[RUNS / 2];
    step_mb = device.peak();
    printf("training step         %9.1f ms  %7.1f GFLOP  %6.1f GFLOP/s  peak %.0f MB\n", step_ms, 3 * gflop, 3 * gflop / step_ms * 1e3, step_mb);
    printf("{\"config\": \"%s\", \"threads\": %d, \"forward_ms\": %.2f, \"step_ms\": %.2f, \"forward_peak_mb\": %.0f, \"step_peak_mb\": %.0f}\n",
           m->config.name, threads, forward_ms, step_ms, forward_mb, step_mb);
    batch_free(&batch);
    model_free(m);
}

#endif
