/* op_times.h - a timer around each operation that the graph calls. --bench turns it on (dev/bench.h); off, it is one test of a
   flag. Included by train_vivim.c in front of the graph, from where on op(...) is: start, op(...), stop. train_vivim.cu has a
   timer of its own. An operation's bound is what the machine needs at least: for its multiply-adds at the peak of the
   arithmetic, or for its bytes (inputs and outputs, each once) at the speed of a copy, whichever is longer. */
#ifndef VIVIM_OP_TIMES_H
#define VIVIM_OP_TIMES_H

enum OpKind {
    OP_LINEAR, OP_CONV, OP_ATTENTION, OP_SCAN, OP_CONV1D, OP_DWCONV, OP_NORM, OP_POINTWISE, OP_DECODER, OP_ADAM, OP_KINDS
};

static struct {
    int on;
    double flops, bytes;                             // that the machine can do per second
    double start, seconds[OP_KINDS], bound[OP_KINDS], work[OP_KINDS];  // work: FLOP
} op_times;

static inline void op_start(void) {
    if (op_times.on) op_times.start = seconds();
}

static inline void op_stop(enum OpKind kind, double flops, double bytes) {
    if (!op_times.on) return;
    double compute = flops / op_times.flops, memory = bytes / op_times.bytes;
    op_times.seconds[kind] += seconds() - op_times.start;
    op_times.bound[kind] += compute > memory ? compute : memory;
    op_times.work[kind] += flops;
}

// elements: floats that are read or written
#define OP_TIMED(kind, flops, elements, call) (op_start(), call, op_stop(kind, flops, sizeof(float) * (double)(elements)))

// a product of M x K and K x N
#define OP_MUL(M, N, K) (2.0 * (M) * (N) * (K))
#define OP_SIZES(M, N, K) (1.0 * (M) * (K) + 1.0 * (N) * (K) + 1.0 * (M) * (N))
#define matmul(C, ldc, A, lda, tA, B, ldb, tB, bias, M, N, K, add) \
    OP_TIMED(OP_LINEAR, OP_MUL(M, N, K), OP_SIZES(M, N, K), matmul(C, ldc, A, lda, tA, B, ldb, tB, bias, M, N, K, add))
#define matmul_forward(out, inp, weight, bias, M, N, K) \
    OP_TIMED(OP_LINEAR, OP_MUL(M, N, K), OP_SIZES(M, N, K), matmul_forward(out, inp, weight, bias, M, N, K))
#define matmul_backward(dinp, dweight, dbias, dout, inp, weight, M, N, K) \
    OP_TIMED(OP_LINEAR, (((dinp) != NULL) + ((dweight) != NULL)) * OP_MUL(M, N, K), \
             (((dinp) != NULL) + ((dweight) != NULL)) * OP_SIZES(M, N, K), \
             matmul_backward(dinp, dweight, dbias, dout, inp, weight, M, N, K))

// of F frames; patches are written and read once more
#define OP_PATCHES(F, H, W, k, st, pad) (1.0 * (F) * conv_size(H, k, st, pad) * conv_size(W, k, st, pad))
#define conv_forward(out, inp, weight, bias, F, H, W, C, O, k, st, pad) \
    OP_TIMED(OP_CONV, OP_MUL(OP_PATCHES(F, H, W, k, st, pad), O, (C) * (k) * (k)), \
             1.0 * (F) * (H) * (W) * (C) + OP_PATCHES(F, H, W, k, st, pad) * (O), \
             conv_forward(out, inp, weight, bias, F, H, W, C, O, k, st, pad))
#define conv_backward(dinp, dweight, dbias, dout, inp, weight, F, H, W, C, O, k, st, pad) \
    OP_TIMED(OP_CONV, (1 + ((dinp) != NULL)) * OP_MUL(OP_PATCHES(F, H, W, k, st, pad), O, (C) * (k) * (k)), \
             2.0 * (F) * (H) * (W) * (C) + OP_PATCHES(F, H, W, k, st, pad) * (O), \
             conv_backward(dinp, dweight, dbias, dout, inp, weight, F, H, W, C, O, k, st, pad))

// two products forward; backward makes the scores again and has four more
#define attention_forward(out, q, k, v, F, P, Pk, C, heads) \
    OP_TIMED(OP_ATTENTION, 2 * OP_MUL(F, P, 1.0 * (Pk) * (C)), 2.0 * (F) * (P) * (C), \
             attention_forward(out, q, k, v, F, P, Pk, C, heads))
#define attention_backward(dq, dk, dv, dout, q, k, v, F, P, Pk, C, heads) \
    OP_TIMED(OP_ATTENTION, 5 * OP_MUL(F, P, 1.0 * (Pk) * (C)), 3.0 * (F) * (P) * (C), \
             attention_backward(dq, dk, dv, dout, q, k, v, F, P, Pk, C, heads))

// The scan's bound is instructions: per state and token 15 forward, 22 more backward, where forward is played again, none
// of them an addition and a multiplication at once. Each is counted as 2 FLOP.
#define selective_scan_forward(y, states, u, dt, Bt, Ct, ldbc, A, skip, order, B, T, P, D, N, add) \
    OP_TIMED(OP_SCAN, 30.0 * (B) * (T) * (P) * (D) * (N), 3.0 * (B) * (T) * (P) * (D), \
             selective_scan_forward(y, states, u, dt, Bt, Ct, ldbc, A, skip, order, B, T, P, D, N, add))
#define selective_scan_backward(du, ddt, dB, dC, lddbc, dA, dD, dy, u, dt, Bt, Ct, ldbc, A, D_, states, order, B, T, P, D, N) \
    OP_TIMED(OP_SCAN, 74.0 * (B) * (T) * (P) * (D) * (N), 5.0 * (B) * (T) * (P) * (D), \
             selective_scan_backward(du, ddt, dB, dC, lddbc, dA, dD, dy, u, dt, Bt, Ct, ldbc, A, D_, states, order, B, T, P, \
                                     D, N))
#define conv1d_silu_forward(out, x, ldx, weight, bias, order, B, T, P, D, K) \
    OP_TIMED(OP_CONV1D, OP_MUL(B, 1.0 * (T) * (P), 1.0 * (D) * (K)), 2.0 * (B) * (T) * (P) * (D), \
             conv1d_silu_forward(out, x, ldx, weight, bias, order, B, T, P, D, K))
#define conv1d_silu_backward(dx, lddx, dweight, dbias, dout, x, ldx, weight, bias, order, B, T, P, D, K, add) \
    OP_TIMED(OP_CONV1D, 3 * OP_MUL(B, 1.0 * (T) * (P), 1.0 * (D) * (K)), 4.0 * (B) * (T) * (P) * (D), \
             conv1d_silu_backward(dx, lddx, dweight, dbias, dout, x, ldx, weight, bias, order, B, T, P, D, K, add))

#define dwconv_forward(out, gelu, inp, weight, bias, B, T, H, W, C, kt) \
    OP_TIMED(OP_DWCONV, 18.0 * (kt) * (B) * (T) * (H) * (W) * (C), \
             (1.0 + ((out) != NULL) + ((gelu) != NULL)) * (B) * (T) * (H) * (W) * (C), \
             dwconv_forward(out, gelu, inp, weight, bias, B, T, H, W, C, kt))
#define dwconv_backward(dinp, dweight, dbias, dout, inp, weight, B, T, H, W, C, kt) \
    OP_TIMED(OP_DWCONV, 36.0 * (kt) * (B) * (T) * (H) * (W) * (C), 3.0 * (B) * (T) * (H) * (W) * (C), \
             dwconv_backward(dinp, dweight, dbias, dout, inp, weight, B, T, H, W, C, kt))

#define layernorm_forward(out, mean, rstd, inp, weight, bias, rows, C) \
    OP_TIMED(OP_NORM, 0, 2.0 * (rows) * (C), layernorm_forward(out, mean, rstd, inp, weight, bias, rows, C))
#define layernorm_backward(dinp, dweight, dbias, dout, dres, inp, weight, mean, rstd, rows, C) \
    OP_TIMED(OP_NORM, 0, (3.0 + ((dres) != NULL)) * (rows) * (C), \
             layernorm_backward(dinp, dweight, dbias, dout, dres, inp, weight, mean, rstd, rows, C))

#define gelu_backward(out, dinp, dout, inp, n) OP_TIMED(OP_POINTWISE, 0, 4.0 * (n), gelu_backward(out, dinp, dout, inp, n))
#define relu_forward(x, n) OP_TIMED(OP_POINTWISE, 0, 2.0 * (n), relu_forward(x, n))
#define relu_backward(dx, y, n) OP_TIMED(OP_POINTWISE, 0, 3.0 * (n), relu_backward(dx, y, n))
#define residual(out, x, branch, scale, n) OP_TIMED(OP_POINTWISE, 0, (2.0 + ((x) != NULL)) * (n), residual(out, x, branch, scale, n))
#define dt_forward(dt, delta, ld, weight, bias, rows, D, R) \
    OP_TIMED(OP_LINEAR, OP_MUL(rows, D, R), 1.0 * (rows) * ((D) + (R)), dt_forward(dt, delta, ld, weight, bias, rows, D, R))
#define dt_backward(ddt, dbias, dt, rows, D) OP_TIMED(OP_POINTWISE, 0, 3.0 * (rows) * (D), dt_backward(ddt, dbias, dt, rows, D))
#define gate_forward(gated, y, xz, scale, rows, D) \
    OP_TIMED(OP_POINTWISE, 0, 3.0 * (rows) * (D), gate_forward(gated, y, xz, scale, rows, D))
#define gate_backward(gated, dy, dxz, dgated, y, xz, scale, rows, D) \
    OP_TIMED(OP_POINTWISE, 0, 6.0 * (rows) * (D), gate_backward(gated, dy, dxz, dgated, y, xz, scale, rows, D))

#define bilinear_forward(out, inp, N, H, W, OH, OW, C, add) \
    OP_TIMED(OP_DECODER, 0, 1.0 * (N) * (OH) * (OW) * (C), bilinear_forward(out, inp, N, H, W, OH, OW, C, add))
#define bilinear_add3(out, a, b, c, heights, widths, N, OH, OW, C) \
    OP_TIMED(OP_DECODER, 0, 2.0 * (N) * (OH) * (OW) * (C), bilinear_add3(out, a, b, c, heights, widths, N, OH, OW, C))
#define bilinear_backward(dinp, dout, N, H, W, OH, OW, C) \
    OP_TIMED(OP_DECODER, 0, 1.0 * (N) * (OH) * (OW) * (C), bilinear_backward(dinp, dout, N, H, W, OH, OW, C))
#define batchnorm_statistics(mean, var, inp, rows, C) \
    OP_TIMED(OP_DECODER, 0, 1.0 * (rows) * (C), batchnorm_statistics(mean, var, inp, rows, C))
#define head_forward(low, map, scale, shift, w, b, rows, E, key, first, p) \
    OP_TIMED(OP_DECODER, 0, 1.0 * (rows) * (E), head_forward(low, map, scale, shift, w, b, rows, E, key, first, p))
#define head_backward_params(dw, db, dg, dbeta, dlow, map, mean, rstd, scale, shift, w, rows, E, key, first, p) \
    OP_TIMED(OP_DECODER, 0, 1.0 * (rows) * (E), \
             head_backward_params(dw, db, dg, dbeta, dlow, map, mean, rstd, scale, shift, w, rows, E, key, first, p))
#define head_backward_map(map, dlow, dg, dbeta, mean, rstd, scale, shift, w, rows, E, n, key, first, p) \
    OP_TIMED(OP_DECODER, 0, 2.0 * (rows) * (E), \
             head_backward_map(map, dlow, dg, dbeta, mean, rstd, scale, shift, w, rows, E, n, key, first, p))

#define adam_update(params, grads, m, v, n, lr, beta1, beta2, eps, step) \
    OP_TIMED(OP_ADAM, 0, 7.0 * (n), adam_update(params, grads, m, v, n, lr, beta1, beta2, eps, step))
#define zero_floats(x, n) OP_TIMED(OP_ADAM, 0, 1.0 * (n), zero_floats(x, n))

#endif
