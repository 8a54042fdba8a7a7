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
        flops += c->depths[i] * (2 * C * C * (2 * rows + 2 * rows_k + (s > 1 ? rows_k * s * s : 0)) + 4 * rows * Pk * C + ffn +
                                 2 * rows * 4 * C * 9);
        flops += c->mamba_depths[i] * (2 * rows * 3 * C * D + scans * 2 * rows * D * (c->d_conv + R + 2 * N + R + 3 * N) + ffn +
                                       2 * rows * 4 * C * 27);
        flops += 2 * rows * C * E + 2 * E * E * C + (i > 0 ? 3 * 2 * frames * m->stages[0].P * E : 4 * rows * E);
    }
    return flops;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#ifndef VIVIM_PART  // a GPU's operations have timers of their own: device.profile
// What the machine can do, on all threads: multiply-adds in registers, and bytes of a copy between arrays larger than caches
static double peak_flops(void) {
#ifdef __AVX512F__
    enum { ROWS = 6, COLUMNS = 64, STEPS = 1000000, TIMES = 9 };  // all registers but a few
#else
    enum { ROWS = 6, COLUMNS = 16, STEPS = 1000000, TIMES = 9 };
#endif
    double best = 0, checksum = 0;
    for (int run = 0; run < TIMES; run++) {
        double start = seconds(), flops = 0;
        #pragma omp parallel reduction(+ : flops, checksum)
        {
            float t[ROWS][COLUMNS], x = 0.999f, y = 0.001f + 1e-6f * (float)run;
            for (int i = 0; i < ROWS; i++)
                #pragma omp simd
                for (int j = 0; j < COLUMNS; j++) t[i][j] = (float)(i + j);
            for (int k = 0; k < STEPS; k++) {
                UNROLL
                for (int i = 0; i < ROWS; i++)
                    #pragma omp simd
                    for (int j = 0; j < COLUMNS; j++) t[i][j] = t[i][j] * x + y;
            }
            for (int i = 0; i < ROWS; i++)  // all are used: none is left out
                for (int j = 0; j < COLUMNS; j++) checksum += (double)t[i][j];
            flops += 2.0 * ROWS * COLUMNS * STEPS;
        }
        flops /= seconds() - start;
        if (flops > best && checksum > 0) best = flops;
    }
    return best;
}

static double copy_bytes(void) {
    enum { MIB = 128, TIMES = 5 };
    size_t n = (size_t)MIB * 1048576 / sizeof(float);
    float *a = malloc_floats(n), *b = malloc_floats(n); double best = 0;
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) a[i] = b[i] = 0.0f;
    for (int run = 0; run < TIMES; run++) {
        double start = seconds();
        #pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < n; i++) a[i] = b[i];
        double bytes = 2.0 * (double)(n * sizeof(float)) / (seconds() - start);
        if (bytes > best) best = bytes;
    }
    free(a), free(b);
    return best;
}

// After `runs` passes with op_times on that took `total` seconds: where the time went. More than 100 % of the bound: what the
// operation before has written was still in a cache.
static void print_op_times(const char *what, double total, int runs) {
    static const char *const NAMES[OP_KINDS] = {"linear layers", "dense convolutions", "attention", "selective scan",
        "conv1d + SiLU", "depthwise convolutions", "layer norm", "GELU, softplus, gate, residual", "decoder's maps",
        "Adam, zero gradients"};
    double sum = 0, bound = 0;
    printf("\n%-32s %9s %6s %9s %9s\n", what, "ms", "share", "GFLOP/s", "of bound");
    for (int i = 0; i < OP_KINDS; i++) {
        double s = op_times.seconds[i];
        if (s == 0) continue;
        printf("%-32s %9.2f %5.1f%%", NAMES[i], 1e3 * s / runs, 100 * s / total);
        if (op_times.work[i] > 0 && i != OP_SCAN) printf(" %9.1f", op_times.work[i] / s / 1e9);
        else printf(" %9s", "");
        printf(" %8.0f%%\n", 100 * op_times.bound[i] / s);
        sum += s, bound += op_times.bound[i];
    }
    printf("%-32s %9.2f %5.1f%%\n", "the rest", 1e3 * (total - sum) / runs, 100 * (total - sum) / total);
    printf("%-32s %9.2f %6s %9s %8.0f%%\n", "all", 1e3 * total / runs, "", "", 100 * bound / total);
    for (int i = 0; i < OP_KINDS; i++) op_times.seconds[i] = op_times.bound[i] = op_times.work[i] = 0;
}
#endif

// Where the time goes: a few forward passes and a few steps with a timer around every operation
static void bench_operations(Model *m, const Batch *batch, int B, int T, int size) {
    enum { TIMES = 3 };
    for (int training = 0; training < 2; training++) {
        double total = 0;
        device.plan(m, B, T, size, size, training, !training, 0);
#ifndef VIVIM_PART
        if (!training) {
            op_times.flops = peak_flops(), op_times.bytes = copy_bytes();
            printf("this machine: %.0f GFLOP/s of multiply-adds, %.1f GB/s of a copy\n", op_times.flops / 1e9,
                   op_times.bytes / 1e9);
        }
#endif
        for (int i = 0; i < TIMES + 1; i++) {  // the first warms up
            double start = seconds();
#ifndef VIVIM_PART
            op_times.on = i > 0;
#endif
            if (device.profile && i == TIMES) device.profile(1);
            if (training) device.step(m, NULL, batch->input, batch->mask, batch->first_mask, 1e-4);
            else device.forward(m, batch->input);
            if (device.profile && i == TIMES) device.profile(0);
            if (i > 0) total += seconds() - start;
        }
#ifndef VIVIM_PART
        op_times.on = 0;
        print_op_times(training ? "a training step" : "forward, evaluation", total, TIMES);
#endif
        (void)total;
    }
}

// Times one clip, or --batch of them: forward in evaluation mode with the logits of all frames, then a training step of the
// segmentation network, without the boundary loss, as the numbers that README compares with
static void bench(const Options *o) {
    enum { RUNS = 9 };
    Options options = *o;
    Model model, *m = &model;
    Batch batch;
    int size = o->size ? o->size : 256, T = o->frames ? o->frames : 5, B = o->batch, threads = 1;
    double times[RUNS], forward_ms, step_ms, forward_mb, step_mb;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    options.edge = 0;
    threads_wanted(threads);  // and no fewer
    if (parallel.ranks > 1) fail("--bench: times one process, and there are %d", parallel.ranks);
    model_from_options(m, &options);
    check_memory(m, &options, B, T, size, size, 1, 0);
    batch_init(&batch, B, T, size, size);
    for (size_t i = 0; i < (size_t)B * T * size * size * 3; i++) batch.input[i] = 4.0f * rng_uniform(1, i) - 2.0f;
    for (size_t i = 0; i < (size_t)B * size * size; i++) batch.mask[i] = i % (size_t)size > (size_t)size / 2 ? 1.0f : 0.0f;
    printf("%s, %d clip%s of %d frames of %dx%d, %d threads, medians of %d\n", m->config.name, B, B > 1 ? "s" : "", T, size,
           size, threads, RUNS);
    device.plan(m, B, T, size, size, 0, 1, 1);
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
    printf("forward, evaluation   %9.1f ms  %7.1f GFLOP  %6.1f GFLOP/s  peak %.0f MB\n", forward_ms, gflop,
           gflop / forward_ms * 1e3, forward_mb);
    fflush(stdout);
    device.plan(m, B, T, size, size, 1, 0, 1);
    device.step(m, NULL, batch.input, batch.mask, batch.first_mask, 1e-4);
    double start = seconds(), waited = device.waited ? device.waited() : 0;
    for (int i = 0; i < RUNS; i++) {
        times[i] = seconds();
        device.step(m, NULL, batch.input, batch.mask, batch.first_mask, 1e-4);
        times[i] = seconds() - times[i];
    }
    if (device.waited) waited = device.waited() - waited;
    double host_ms = 1e3 * (seconds() - start - waited) / RUNS;
    qsort(times, RUNS, sizeof times[0], compare_doubles);
    step_ms = 1e3 * times[RUNS / 2];
    step_mb = device.peak();
    printf("training step         %9.1f ms  %7.1f GFLOP  %6.1f GFLOP/s  peak %.0f MB\n", step_ms, 3 * gflop,
           3 * gflop / step_ms * 1e3, step_mb);
    if (device.waited) printf("  the host's part     %9.1f ms  launches and copies, mean; the rest it waits\n", host_ms);
    fflush(stdout);
    bench_operations(m, &batch, B, T, size);
    printf("{\"config\": \"%s\", \"threads\": %d, \"forward_ms\": %.2f, \"step_ms\": %.2f, \"forward_peak_mb\": %.0f, "
           "\"step_peak_mb\": %.0f}\n",
           m->config.name, threads, forward_ms, step_ms, forward_mb, step_mb);
    batch_free(&batch);
    model_free(m);
}

#endif
