/* random.h - counter-based random numbers. Header only.

   Included by train_vivim.c, section 3, which says why. */
#ifndef VIVIM_RANDOM_H
#define VIVIM_RANDOM_H

enum { RNG_INIT = 1, RNG_SHUFFLE, RNG_AUGMENT, RNG_DROP_PATH, RNG_DROPOUT };  // streams

static uint64_t mix64(uint64_t x) {  // the finaliser of splitmix64: every input bit changes every output bit
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// the key of all numbers of a (seed, stream, step)
static uint64_t rng_key(uint64_t seed, int stream, uint64_t step) {
    return mix64(mix64(mix64(seed) + (uint64_t)stream) ^ step);
}

// the i-th number of a key: 32 random bits from two rounds of 32-bit mixing (cheap to vectorise)
HOST_DEVICE static inline uint32_t rng_u32(uint64_t key, uint64_t i) {
    uint32_t x = (uint32_t)i ^ (uint32_t)key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= (x >> 16) ^ (uint32_t)(key >> 32) ^ (uint32_t)(i >> 32) * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0xD35A2D97u;
    return x ^ (x >> 15);
}
// uniform in [0, 1)
HOST_DEVICE static inline float rng_uniform(uint64_t key, uint64_t i) {
    return (float)(rng_u32(key, i) >> 8) * (1.0f / 16777216.0f);
}
static float rng_normal(uint64_t key, uint64_t i) {  // Box-Muller
    double u = ((double)rng_u32(key, 2 * i) + 1.0) / 4294967296.0, v = (double)rng_u32(key, 2 * i + 1) / 4294967296.0;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

#endif
