/* matmul_amx.h - the inner part of matmul.h for processors with AMX (Intel, from 2023 on): make AMX=1 or AMX=3. Header only.

   Included by matmul.h, in place of its own packing and kernel. AMX multiplies bfloat16, numbers of 8 bits, and adds up floats.
   AMX=1: factors are rounded to bfloat16. AMX=3: a factor is a sum of three bfloat16, each what is left of the ones before
       x = x_0 + x_1 + x_2,   x_0 = bf16(x),  x_1 = bf16(x - x_0),  x_2 = bf16(x - x_0 - x_1)
   which is exact, for 3 x 8 bits are float's 24. Of the nine products of such sums the three smallest (x_1 y_2, x_2 y_1,
   x_2 y_2), 2^-24 of the largest and less, are left out: results are as exact as with float's own multiplications, and six
   products are still faster than they where matrices are large. (Numbers beyond 3.39e38, which bfloat16 rounds to infinity,
   give NaN.) */
#ifndef VIVIM_MATMUL_AMX_H
#define VIVIM_MATMUL_AMX_H
#include <immintrin.h>
#include <sys/syscall.h>

// AMX has 8 tile registers of 16 rows of 64 bytes and an instruction for their products, C (16, 16) += A (16, 32) B (32, 16):
//   A  16 rows of 32 bfloat16, C 16 rows of 16 floats
//   B  16 rows of 16 pairs: row r holds (B(2r, 0), B(2r+1, 0)), (B(2r, 1), B(2r+1, 1)), ..
// It takes 16 cycles, a tile's load 8. Four tiles of C, a square of 32 x 32, need two of A and two of B at each step of 32: 4
// loads for 4 products.
// Packing: both factors are copied into squares of two tiles, already rounded, so that a tile is 1 KiB without a gap:
//   B_panels  for 32 columns after the other: for every 32 steps of k  [parts][2 x 16 columns][16][16][2]
//   panels    for 32 rows after the other:    for every 32 steps of k  [parts][2 x 16 rows][16][32]
// What does not exist is zero. The sum over k is in the order of k, 2 at a time: a row of C depends on nothing but its factors.

enum { SQUARE = 32 * 32, SQUARES = PARTS * SQUARE };  // bfloat16 of two tiles, and of all their parts

// x (16, 16), 32 bits each, is transposed: 2 x 2, then 4 x 4 within the quarters of a register, then the quarters
ALWAYS_INLINE void transpose_16(__m512i *x) {
    __m512i t[16];
    UNROLL
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    UNROLL
    for (int i = 0; i < 16; i += 4) {  // x[i + c]: column c of every quarter, of rows i .. i+4
        x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int c = 0; c < 4; c++) {  // 0x88: quarters 0 and 2 of both; 0xdd: 1 and 3
        __m512i even0 = _mm512_shuffle_i32x4(x[c], x[c + 4], 0x88), even1 = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0x88);
        __m512i odd0 = _mm512_shuffle_i32x4(x[c], x[c + 4], 0xdd), odd1 = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0xdd);
        x[c] = _mm512_shuffle_i32x4(even0, even1, 0x88), x[c + 8] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        x[c + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88), x[c + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}

ALWAYS_INLINE __mmask16 first_lanes(int n) { return (__mmask16)(n <= 0 ? 0 : n >= 16 ? 0xffff : (1 << n) - 1); }

// The parts of 16 floats of low and of high, 32 bfloat16 each, low's first: the numbers rounded to nearest, ties to even (a NaN
// stays one), then what that leaves, rounded, then what both leave
ALWAYS_INLINE void parts_2x16(__m512i part[PARTS], __m512 low, __m512 high) {
    UNROLL
    for (int i = 0; i < PARTS; i++) {
        part[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (i + 1 == PARTS) break;
        __m512i low16 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(part[i]));
        __m512i high16 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part[i], 1));
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(low16, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(high16, 16)));
    }
}

// A tile, in all its parts, of 32 steps k and `lines` rows of A, or columns of B (at most 16; steps: how many there are). The
// numbers of a line are neighbours in memory if along_k, and the lines ld floats apart; otherwise the numbers of a step, and
// the steps ld apart. Read: 16 registers of a line's 32 steps, or of the pairs of two steps. Written: lines (A) or pairs (B).
ALWAYS_INLINE void pack_16x32(uint16_t *to, const float *from, size_t ld, int lines, int steps, const int along_k,
                              const int is_A) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i x[PARTS][16], part[PARTS];
    UNROLL
    for (int i = 0; i < 16; i++) {
        int one = along_k ? i < lines : 2 * i < steps, two = along_k ? one && steps > 16 : 2 * i + 1 < steps;
        const float *a = from + (one ? (along_k ? 1 : 2) * i * ld : 0), *b = two ? a + (along_k ? 16 : ld) : a;
        PREFETCH(a + 32 * ld), PREFETCH(b + 32 * ld);  // the processor does not foresee steps of ld
        parts_2x16(part, _mm512_maskz_loadu_ps(first_lanes(one ? (along_k ? steps : lines) : 0), a),
                   _mm512_maskz_loadu_ps(first_lanes(two ? (along_k ? steps - 16 : lines) : 0), b));
        for (int p = 0; p < PARTS; p++) {
            x[p][i] = along_k ? part[p] : _mm512_permutexvar_epi16(zip, part[p]);
            if (along_k == is_A) _mm512_store_si512((__m512i *)(void *)(to + p * SQUARE + 32 * i), x[p][i]);
        }
    }
    if (along_k == is_A) return;
    UNROLL
    for (int p = 0; p < PARTS; p++) {
        transpose_16(x[p]);
        UNROLL
        for (int i = 0; i < 16; i++) _mm512_store_si512((__m512i *)(void *)(to + p * SQUARE + 32 * i), x[p][i]);
    }
}

// lines first .. first+32 of A or B, for all steps; lines begin `line` floats apart, steps `step`: one of the two is 1
static void pack_lines(uint16_t *to, const float *from, size_t line, size_t step, int lines, int K, const int is_A) {
    for (int k = 0; k < K; k += 32, to += SQUARES)
        for (int half = 0; half < 2; half++) {
            int n = min_int(16, lines - 16 * half), steps = min_int(32, K - k);
            const float *at = from + (n > 0 ? 16 * half * line + k * step : 0);
            uint16_t *tile = to + half * SQUARE / 2;
            if (step == 1) pack_16x32(tile, at, line, n, steps, 1, is_A);
            else pack_16x32(tile, at, step, n, steps, 0, is_A);
        }
}

// columns j0 .. j0+32 of B
static void pack_B(const Product *p, int j0) {
    pack_lines(p->B_panels + (size_t)j0 * round_up(p->K, 32) * PARTS, p->B + j0 * p->B_col, p->B_col, p->B_row,
               min_int(32, p->N - j0), p->K, 0);
}

// rows i0 .. i1 of A
static void pack_A(const Product *p, int i0, int i1, Packed *panels) {
    for (int i = i0; i < i1; i += 32)
        pack_lines(panels + (size_t)(i - i0) * round_up(p->K, 32) * PARTS, p->A + i * p->A_row, p->A_row, p->A_col,
                   min_int(32, i1 - i), p->K, 1);
}

// workspace, in floats: for packed B, and, per thread, for a block of packed A
static size_t packed_B(const Product *p) { return (size_t)round_up(p->N, 32) * round_up(p->K, 32) / 2 * PARTS; }
static size_t packed_A(const Product *p) { return (size_t)MC * round_up(min_int(p->K, KC), 32) / 2 * PARTS; }

// tiles 0 .. 3 (32, 32) += part a (32, 32) of A's square times part b of B's; what is not loaded is still there
ALWAYS_INLINE void multiply(const uint16_t *a, const uint16_t *b) {
    if (a) {
        _tile_loadd(4, a, 64); _tile_loadd(5, a + SQUARE / 2, 64);
    }
    if (b) {
        _tile_loadd(6, b, 64); _tile_loadd(7, b + SQUARE / 2, 64);
    }
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
}

// c (32, 32) = from + the sum over k of squares of a and b. Rows of c begin ldc floats apart, of from ld (0: all are the same)
static void square(float *c, size_t ldc, const float *from, size_t ld, const uint16_t *a, const uint16_t *b, int K) {
    const long to_bytes = (long)(ldc * sizeof(float)), bytes = (long)(ld * sizeof(float));
    __asm__ volatile("" ::: "memory");  // gcc does not know that a tile's load reads memory: what was written, is written here
    _tile_loadd(0, from, bytes); _tile_loadd(1, from + 16, bytes);
    _tile_loadd(2, from + 16 * ld, bytes); _tile_loadd(3, from + 16 * ld + 16, bytes);
    for (int k = 0, r = 0; k < K; k += 32, a += SQUARES, b += SQUARES) {
        for (int end = (int)(32 * (int64_t)(k + 32) / K); r < min_int(end, 32); r++)  // C is cold: see tile in matmul.h
            PREFETCH_WRITE(c + r * ldc), PREFETCH_WRITE(c + r * ldc + 31);
        if (PARTS == 3) {                       // in an order that loads little
            multiply(a + 2 * SQUARE, b);        // a_2 b_0
            multiply(a + SQUARE, NULL);         // a_1 b_0
            multiply(NULL, b + SQUARE);         // a_1 b_1
            multiply(a, NULL);                  // a_0 b_1
            multiply(NULL, b + 2 * SQUARE);     // a_0 b_2
            multiply(NULL, b);                  // a_0 b_0
        } else
            multiply(a, b);
    }
    _tile_stored(0, c, to_bytes); _tile_stored(1, c + 16, to_bytes);
    _tile_stored(2, c + 16 * ldc, to_bytes); _tile_stored(3, c + 16 * ldc + 16, to_bytes);
    __asm__ volatile("" ::: "memory");
}

static pthread_once_t amx_once = PTHREAD_ONCE_INIT;
static void amx_ask(void) {  // Linux keeps 8 KiB more of a thread's state for those who ask: ARCH_REQ_XCOMP_PERM, feature 18
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0)
        fail("AMX=%d: this machine or its kernel has no AMX (bf16); build without AMX=%d", PARTS, PARTS);
}

// One pass over rows i0 .. i1, packed in panels, and columns j0 .. j1 of C. A square at an edge is computed in a buffer.
static void product_block(Product p, int i0, int i1, int j0, int j1, const Packed *panels) {
    static const struct { uint8_t palette, start_row, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles =
        {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    static const float zeros[32] = {0.0f};
    float buffer[32 * 32];
    size_t depth = (size_t)round_up(p.K, 32) * PARTS;
    pthread_once(&amx_once, amx_ask);
    _tile_loadconfig(&tiles);
    for (int i = i0; i < i1; i += 32)
        for (int j = j0; j < j1; j += 32) {
            const uint16_t *a = panels + (i - i0) * depth, *b = p.B_panels + j * depth;
            int m = min_int(32, i1 - i), w = min_int(32, p.N - j), whole = m == 32 && w == 32 && !(p.accumulate && p.bias);
            float *c = p.C + i * p.ldc + j;
            const float *bias = p.bias ? p.bias + j : zeros;
            if (whole) {
                if (p.accumulate) square(c, p.ldc, c, p.ldc, a, b, p.K);
                else square(c, p.ldc, bias, 0, a, b, p.K);
                continue;
            }
            for (int r = 0; r < 32; r++)
                for (int l = 0; l < 32; l++) buffer[32 * r + l] = 0.0f;
            for (int r = 0; r < m; r++)
                for (int l = 0; l < w; l++)
                    buffer[32 * r + l] = (p.accumulate ? c[r * p.ldc + l] : 0.0f) + (p.bias ? bias[l] : 0.0f);
            square(buffer, 32, buffer, 32, a, b, p.K);
            for (int r = 0; r < m; r++)
                for (int l = 0; l < w; l++) c[r * p.ldc + l] = buffer[32 * r + l];
        }
    _tile_release();
}

#endif
