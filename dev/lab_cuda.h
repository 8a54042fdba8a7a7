/* lab_cuda.h - the kernel laboratory (lab.h) on an NVIDIA GPU: memory, timing and limits of the device. Header only.

   A program dev/X.cu includes this and ends with LAB_CUDA_MAIN(program). Compiled by nvcc it checks and times on the GPU;
   compiled under dev/cudaemu.h (make lab_emu) it checks on the CPU. As in lab.h a kernel is a function of device tensors and
   sizes; it launches into stream_cuda. Times are a GPU's own (events), with the second-level cache written over before. */
#ifndef VIVIM_LAB_CUDA_H
#define VIVIM_LAB_CUDA_H
#define VIVIM_NO_CUDA_MAIN
#undef VIVIM_BF16  // what ships is compared in single precision, whatever PRECISION the program has
#undef VIVIM_TF32
#ifndef VIVIM_PROGRAM
#define VIVIM_PROGRAM "lab_cuda"
#endif
#ifdef CUDAEMU
#include "train_vivim_emu.cpp"  // train_vivim.cu as dev/cudaemu.sed leaves it
#else
#include "../train_vivim.cu"
#endif
#include <cuda_bf16.h>
// From here on the plain names mean train_vivim.c's functions again: lab.h's memory, and what the kernels are compared with
#undef malloc_check
#undef calloc_check
#undef malloc_floats
#undef zero_floats
#undef free_check
#undef selective_scan_forward
#undef selective_scan_backward
#undef selective_scan_states
#undef conv1d_silu_forward
#undef gate_forward
#undef dwconv_forward
#undef dwconv_backward
#undef layernorm_forward
#undef layernorm_backward
#undef attention_forward
#undef attention_backward
#include "lab.h"

// ---------------------------------------------------------------------------------------------------------------------
// The GPU as a LabDevice

static struct { cudaEvent_t start, stop; void *other; size_t other_bytes; int stopped; } lab_gpu;

static int lab_attribute(cudaDeviceAttr what) {
    int value = 0, gpu = 0;
    cudaCheck(cudaGetDevice(&gpu));
    cudaCheck(cudaDeviceGetAttribute(&value, what, gpu));
    return value;
}

static void gpu_begin(void) {
    start_cuda();
    cudaCheck(cudaEventCreate(&lab_gpu.start));
    cudaCheck(cudaEventCreate(&lab_gpu.stop));
    lab_gpu.other_bytes = 2 * (size_t)lab_attribute(cudaDevAttrL2CacheSize) + 1048576;
    lab_gpu.other = malloc_check_cuda(lab_gpu.other_bytes);
}

static void gpu_name(char *text, size_t size) {
    int gpu = 0, toolkit = 0, driver = 0;
    cudaDeviceProp p;
    cudaCheck(cudaGetDevice(&gpu));
    cudaCheck(cudaGetDeviceProperties(&p, gpu));
    cudaCheck(cudaRuntimeGetVersion(&toolkit));
    cudaCheck(cudaDriverGetVersion(&driver));
    snprintf(text, size, "%s, sm_%d%d, %d multiprocessors at up to %d MHz; CUDA %d.%d, driver for %d.%d", p.name, p.major,
             p.minor, p.multiProcessorCount, lab_attribute(cudaDevAttrClockRate) / 1000, toolkit / 1000, toolkit % 1000 / 10,
             driver / 1000, driver % 1000 / 10);
}

static double gpu_memory(void) {  // a tensor is needed on the host, too
    size_t unused = 0, total = 0;
    cudaCheck(cudaMemGetInfo(&unused, &total));
    return fmin((double)unused, machine_memory());
}

static float *gpu_allocate(size_t floats) { return malloc_floats_cuda(floats); }

static void gpu_copy(float *to, const float *from, size_t floats) {
    cudaCheck(cudaGetLastError());  // what ran before: were its kernels launched?
    cudaCheck(cudaMemcpyAsync(to, from, floats * sizeof(float), cudaMemcpyDefault, stream_cuda));
    settle_cuda();
}

static void gpu_flush(const Lab *lab) {
    (void)lab;
    cudaCheck(cudaMemsetAsync(lab_gpu.other, 0, lab_gpu.other_bytes, stream_cuda));
}

static double gpu_time(LabRun run, float *const *t, const Sizes *s) {
    float ms = 0.0f;
    lab_gpu.stopped = 0;
    cudaCheck(cudaEventRecord(lab_gpu.start, stream_cuda));
    run(t, s);
    cudaCheck(cudaGetLastError());
    if (!lab_gpu.stopped) cudaCheck(cudaEventRecord(lab_gpu.stop, stream_cuda));
    cudaCheck(cudaEventSynchronize(lab_gpu.stop));
    cudaCheck(cudaEventElapsedTime(&ms, lab_gpu.start, lab_gpu.stop));
    return 1e-3 * (double)ms;
}

// A run that prepares something which is not to be timed says so: between these two calls lies what is
static void lab_timed_begin(void) {
    gpu_flush(NULL);
    cudaCheck(cudaEventRecord(lab_gpu.start, stream_cuda));
}
static void lab_timed_end(void) {
    cudaCheck(cudaEventRecord(lab_gpu.stop, stream_cuda));
    lab_gpu.stopped = 1;
}

static float *lab_copy_from, *lab_copy_to;
enum { LAB_COPY = 1 << 26 };  // floats: 256 MiB, more than a cache holds
static void lab_copy_run(float *const *t, const Sizes *s) {
    (void)t, (void)s;
    cudaCheck(cudaMemcpyAsync(lab_copy_to, lab_copy_from, LAB_COPY * sizeof(float), cudaMemcpyDeviceToDevice, stream_cuda));
}
static double gpu_copy_rate(void) {
    enum { RUNS = 9 };
    double times[RUNS];
    lab_copy_from = (float *)calloc_check_cuda(LAB_COPY, sizeof(float)), lab_copy_to = malloc_floats_cuda(LAB_COPY);
    lab_copy_run(NULL, NULL);
    for (int r = 0; r < RUNS; r++) times[r] = gpu_time(lab_copy_run, NULL, NULL);
    free_check_cuda(lab_copy_from), free_check_cuda(lab_copy_to);
    return 2.0 * sizeof(float) * LAB_COPY / lab_median(times, RUNS);
}

static const LabDevice LAB_GPU = {
    gpu_begin, gpu_name, gpu_memory, gpu_allocate, free_check_cuda, gpu_copy, gpu_flush, gpu_time, gpu_copy_rate};

// Limits at the highest clock: a multiprocessor begins 16 exps (MUFU) and 128 multiply-adds in a clock; 64 of these on an A100
static double gpu_clocks(void) {
    return 1e3 * lab_attribute(cudaDevAttrClockRate) * lab_attribute(cudaDevAttrMultiProcessorCount);
}
static inline double gpu_exp_rate(void) { return 16.0 * gpu_clocks(); }
static inline double gpu_flop_rate(void) {
    int a100 = lab_attribute(cudaDevAttrComputeCapabilityMajor) == 8 && lab_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
    return 2.0 * (a100 ? 64.0 : 128.0) * gpu_clocks();
}

// An option of versions whose blocks may have several sizes. Sizes has no field of this name: M is free outside matmul.c
#define LAB_BLOCK LAB_SIZE("block", M, 1024, "threads of a block, where the version has a choice; 0: its own")
static inline int lab_block(const Sizes *s, int otherwise, int most) {
    return s->M ? max_int(32, min_int(s->M, most)) / 32 * 32 : otherwise;
}

// Under the emulation there is nothing to time, and its fibers live to the end
#if defined(CUDAEMU) && defined(__SANITIZE_ADDRESS__)
extern "C" const char *__asan_default_options(void) { return "detect_leaks=0"; }
#endif
static inline int lab_cuda_main(const LabProgram *program, int argc, char **argv) {
#ifdef CUDAEMU
    std::vector<char *> more(argv, argv + argc);
    static char check[] = "--check";
    more.push_back(check), more.push_back(NULL);
    return lab_main(program, argc + 1, more.data());
#else
    return lab_main(program, argc, argv);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels of several programs use

// numbers in memory are float or bf16, in registers float
__device__ static inline float as_float(float x) { return x; }
__device__ static inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ static inline void store_as(float *to, float x) { *to = x; }
__device__ static inline void store_as(__nv_bfloat16 *to, float x) { *to = __float2bfloat16(x); }

__global__ static void lab_to_bf16_kernel(__nv_bfloat16 *to, const float *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = __float2bfloat16(from[i]);
}
__global__ static void lab_from_bf16_kernel(float *to, const __nv_bfloat16 *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = __bfloat162float(from[i]);
}
static inline void lab_cut_to_bf16(float *x, size_t n) {  // on the host: to numbers that bf16 has
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0xFFFF0000u;
        memcpy(&x[i], &bits, sizeof bits);
    }
}
static inline __nv_bfloat16 *lab_to_bf16(const float *from, size_t n) {  // free_check_cuda it; from NULL: room only
    __nv_bfloat16 *to = (__nv_bfloat16 *)malloc_check_cuda(n * sizeof *to);
    if (from) lab_to_bf16_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(to, from, n);
    cudaCheck(cudaGetLastError());
    return to;
}
static inline void lab_from_bf16(float *to, const __nv_bfloat16 *from, size_t n) {
    lab_from_bf16_kernel<<<blocks_for(n, 256), 256, 0, stream_cuda>>>(to, from, n);
    cudaCheck(cudaGetLastError());
}

#endif
