/* elementary.h - exp, log, the normal distribution and what is made of them, so that compilers vectorise loops over them.
   Header only.

   Included by train_vivim.c, section 2, which says what each is. Inside `#pragma omp simd` loops they run 16 lanes at a time,
   without fast-math, which would hide NaN. Kernels of train_vivim.cu call them, too. */
#ifndef VIVIM_ELEMENTARY_H
#define VIVIM_ELEMENTARY_H

#define LOG2_E ((float)1.44269504088896340736)
#ifndef VIVIM_DOUBLE  // dev/double.h has them in double
// 2^x for -100 <= x <= 127, relative error 1.7e-7; below, 2^-100, so that what it multiplies becomes no (slow) denormal.
// With k the nearest integer, 2^x = 2^k 2^f, |f| <= 1/2. Adding 1.5*2^23 rounds x to an integer and leaves k in the low
// bits of the sum; 2^f is a minimax polynomial; k is added to its exponent bits.
HOST_DEVICE static inline float exp2_simd(float x) {
#ifdef __CUDA_ARCH__
    return exp2f(x);  // the bits of NaN are others there
#else
    union { float f; uint32_t bits; } shifted, power;
    x = x < -100.0f ? -100.0f : x;  // written so that NaN passes
    shifted.f = x + 12582912.0f;
    float f = x - (shifted.f - 12582912.0f);
    float p = ((1.3264727e-3f * f + 9.6715127e-3f) * f + 5.5507337e-2f) * f + 2.4022242e-1f;
    power.f = (p * f + 6.9314698e-1f) * f + 1.0f;
    power.bits += shifted.bits << 23;
    return power.f;
#endif
}

// e^x = 2^k e^f with f = x - k ln 2, ln 2 in two parts so that f keeps all its digits. x is held within +-60, beyond which
// sigmoid, softmax, softplus and the normal density are within 1e-26 of their limits: no overflow, no (slow) denormals.
HOST_DEVICE static inline float exp_simd(float x) {
#ifdef __CUDA_ARCH__
    return expf(x);
#else
    union { float f; uint32_t bits; } shifted, power;
    x = x < -60.0f ? -60.0f : x;
    x = x > 60.0f ? 60.0f : x;
    shifted.f = x * 1.44269504f + 12582912.0f;
    float k = shifted.f - 12582912.0f, f = x - k * 0.693359375f;
    f = f + k * 2.12194440e-4f;
    float p = ((1.383684195e-03f * f + 8.374815782e-03f) * f + 4.166822564e-02f) * f + 1.666642017e-01f;
    power.f = ((p * f + 4.999999208e-01f) * f + 1.0f) * f + 1.0f;
    power.bits += shifted.bits << 23;
    return power.f;
#endif
}

// log(1 + u) for 0 <= u <= 1, relative error 5e-9 before rounding
HOST_DEVICE static inline float log1p_simd(float u) {
    float p = ((-3.243980824e-03f * u + 1.985126246e-02f) * u - 5.695915876e-02f) * u + 1.060361684e-01f;
    p = ((p * u - 1.530557010e-01f) * u + 1.967593146e-01f) * u - 2.495413213e-01f;
    return (((p * u + 3.332996227e-01f) * u - 4.999990242e-01f) * u + 1.0f) * u;
}

// P(X <= x) of a standard normal = 1 - erfc(x/sqrt 2)/2. For a = |x| the tail is erfc(a/sqrt 2) = 2^(-a Q(a)) with a smooth
// Q, fitted so that the result is within 2e-8; beyond a = 10 the tail is below 2^-70 and stays there.
HOST_DEVICE static inline float normal_cdf_simd(float x) {
    float a = fabsf(x), q, tail; a = a > 10.0f ? 10.0f : a;
    q = ((2.334923497e-06f * a - 3.373753505e-05f) * a + 1.612926143e-04f) * a + 1.917062060e-04f;
    q = (((q * a - 7.126868233e-03f) * a + 5.253361498e-02f) * a + 4.591982811e-01f) * a + 1.151106042e+00f;
    tail = 0.5f * exp2_simd(-a * q);
    return x > 0.0f ? 1.0f - tail : tail;
}
#endif

HOST_DEVICE static inline float sigmoid_simd(float x) { return 1.0f / (1.0f + exp_simd(-x)); }
HOST_DEVICE static inline float silu_simd(float x) { return x * sigmoid_simd(x); }
// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x)
HOST_DEVICE static inline float silu_grad_simd(float x) {
    float s = sigmoid_simd(x);
    return s * (1.0f + x * (1.0f - s));
}
// softplus(x) = log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). PyTorch returns x itself above 20, where the two agree to the
// last bit in float32.
HOST_DEVICE static inline float softplus_simd(float x) {
    float positive = x > 0.0f ? x : 0.0f * x;  // 0*x keeps NaN
    return positive + log1p_simd(exp_simd(-fabsf(x)));
}
HOST_DEVICE static inline float gelu_simd(float x) { return x * normal_cdf_simd(x); }
// d gelu / dx = cdf(x) + x pdf(x)
HOST_DEVICE static inline float gelu_grad_simd(float x) {
    return normal_cdf_simd(x) + x * 0.39894228f * exp_simd(-0.5f * x * x);  // 1/sqrt(2 pi)
}

#endif
