// double.h: turns train_vivim.c into double precision. test_vivim.c, compiled with -DVIVIM_DOUBLE, runs the same source
// with every float a double, so that finite differences of a whole training step are exact to about 1e-9.
#ifndef VIVIM_DOUBLE_H
#define VIVIM_DOUBLE_H
#include <math.h>
#ifdef __clang__
#pragma clang diagnostic ignored "-Wkeyword-macro"  // that is the point
#endif
#define float double
#define expf exp
#define logf log
#define sqrtf sqrt
#define fabsf fabs
#define floorf floor
#define roundf round
#define powf pow

// the elementary functions of section 2
static inline float exp2_simd(float x) { return exp2(x); }
static inline float exp_simd(float x) { return exp(x); }
static inline float log1p_simd(float u) { return log1p(u); }
static inline float normal_cdf_simd(float x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
#endif
