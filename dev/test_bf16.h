/* test_bf16.h - lets test_vivim.c, whose tensors are floats, test the operations and the graph of a bf16 build.

   Included by test_vivim.c behind train_vivim.cu, with -DVIVIM_CUDA -DVIVIM_BF16. From here on a call of an operation is

       for each argument where the operation wants bfloat16: the test's array, rounded, in memory of its own (its shadow)
       the operation
       what it changed there: back into the test's arrays

   so tests need not know. A shadow is of a whole allocation, guards and all: what is written outside a tensor shows there, and
   two arguments that lie in one array do so in its shadow. Shadows live until the test ends: models keep pointers into them. */
#ifndef VIVIM_TEST_BF16_H
#define VIVIM_TEST_BF16_H
#include <type_traits>

typedef struct { float *base; size_t n; floatX *shadow; uint16_t *before; int active; } Shadow;  // before: bits, at the last call
static Shadow shadows[8192];
static int shadow_count;

static void shadows_free(void) {
    cudaDeviceSynchronize();
    for (int i = 0; i < shadow_count; i++) free(shadows[i].shadow), (free)(shadows[i].before);
    shadow_count = 0;
}

// where p's number lies in bfloat16; p lies in memory that managed_malloc gave
static floatX *in_x(const float *p) {
    char *base; size_t bytes;
    if (p == NULL) return NULL;
    cudaDeviceSynchronize();
    if (!managed_block((char *)p, &base, &bytes)) { fprintf(stderr, "test_bf16: an array of unknown size\n"); exit(1); }
    int i = 0;
    while (i < shadow_count && (shadows[i].base != (float *)(void *)base || shadows[i].n != bytes / sizeof(float))) i++;
    Shadow *s = &shadows[i];
    if (i == shadow_count) {
        if (i == 8192) { fprintf(stderr, "test_bf16: too many arrays\n"); exit(1); }
        s->base = (float *)(void *)base, s->n = bytes / sizeof(float), s->active = 0, shadow_count++;
        s->shadow = (floatX *)malloc(s->n * sizeof(floatX));
        s->before = (uint16_t *)(malloc)(s->n * sizeof(uint16_t));
    }
    for (size_t k = 0; k < s->n && !s->active; k++) {
        s->shadow[k] = __float2bfloat16(s->base[k]);
        s->before[k] = __bfloat16_as_ushort(s->shadow[k]);
    }
    s->active = 1;
    return s->shadow + (p - s->base);
}

// what changed since in_x, back into the floats
static void back_from_x(void) {
    cudaDeviceSynchronize();
    for (int i = 0; i < shadow_count; i++) {
        Shadow *s = &shadows[i];
        for (size_t k = 0; k < s->n && s->active; k++)
            if (__bfloat16_as_ushort(s->shadow[k]) != s->before[k]) s->base[k] = __bfloat162float(s->shadow[k]);
        s->active = 0;
    }
}

// an argument of type A, as the operation's parameter of type P
template <typename P, typename A> static P argument(A a) {
    if constexpr (std::is_pointer<P>::value && std::is_integral<A>::value) return nullptr;  // NULL
    else if constexpr (std::is_same<typename std::remove_const<typename std::remove_pointer<P>::type>::type, floatX>::value &&
                       std::is_convertible<A, const float *>::value) return in_x(a);
    else return (P)a;
}

template <typename R, typename... P, typename... A> static R in_bf16(R (*op)(P...), A... a) {
    if constexpr (std::is_void<R>::value) op(argument<P>(a)...), back_from_x();
    else {
        R result = op(argument<P>(a)...);
        back_from_x();
        return result;
    }
}

#undef CUDA_OP
#define CUDA_OP(op, ...) [&] { OpTimer timer(#op); return in_bf16(op, __VA_ARGS__); }()
// those that also exist for floats
#undef matmul
#undef matmul_forward
#undef matmul_backward
#undef relu_forward
#undef relu_backward
#undef bilinear_forward
#undef bilinear_backward
#undef batchnorm_statistics
#define matmul(...) CUDA_OP((matmul_cuda<floatX, floatX>), __VA_ARGS__)
#define matmul_forward(...) CUDA_OP((matmul_forward_cuda<floatX, floatX>), __VA_ARGS__)
#define matmul_backward(...) CUDA_OP((matmul_backward_cuda<floatX>), __VA_ARGS__)
#define relu_forward(...) CUDA_OP((relu_forward_cuda<floatX>), __VA_ARGS__)
#define relu_backward(...) CUDA_OP((relu_backward_cuda<floatX>), __VA_ARGS__)
#define bilinear_forward(...) CUDA_OP((bilinear_forward_cuda<floatX>), __VA_ARGS__)
#define bilinear_backward(...) CUDA_OP((bilinear_backward_cuda<floatX, floatX>), __VA_ARGS__)
#define batchnorm_statistics(...) CUDA_OP((batchnorm_statistics_cuda<floatX>), __VA_ARGS__)
// the graph: the weights' copies first, for tests write to params. The planning pass has no memory yet.
template <typename R, typename... P, typename... A> static R graph(R (*part)(P...), Model *m, A... a) {
    if (!m->planning) round_weights_cuda(m);
    return in_bf16(part, m, a...);
}
#define sublayer_forward(...) graph(sublayer_forward, __VA_ARGS__)
#define sublayer_backward(...) graph(sublayer_backward, __VA_ARGS__)
#define self_attention_forward(...) graph(self_attention_forward, __VA_ARGS__)
#define self_attention_backward(...) graph(self_attention_backward, __VA_ARGS__)
#define st_mamba_forward(...) graph(st_mamba_forward, __VA_ARGS__)
#define st_mamba_backward(...) graph(st_mamba_backward, __VA_ARGS__)
#define ffn_forward(...) graph(ffn_forward, __VA_ARGS__)
#define ffn_backward(...) graph(ffn_backward, __VA_ARGS__)
#define edge_forward(...) graph(edge_forward, __VA_ARGS__)
#define edge_backward(...) graph(edge_backward, __VA_ARGS__)
#define model_forward(...) graph(model_forward, __VA_ARGS__)
#define model_backward(...) graph(model_backward, __VA_ARGS__)
#define train_step(...) graph(train_step, __VA_ARGS__)

#endif
