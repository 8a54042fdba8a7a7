/* memory_cuda.h - the GPU, its memory, its stream and cuBLAS's handle; what fails ends the program with a line that says what.

   Included by train_vivim.cu, section 1, behind train_vivim.c; what dev/memory.h is to that. */
#ifndef VIVIM_MEMORY_CUDA_H
#define VIVIM_MEMORY_CUDA_H

#define cudaCheck(call) cuda_check((call), __FILE__, __LINE__)
#define cublasCheck(call) cublas_check((call), __FILE__, __LINE__)

static void cuda_check(cudaError_t error, const char *file, int line) {
    if (error != cudaSuccess) fail("%s:%d: CUDA: %s", file, line, cudaGetErrorString(error));
}

static void cublas_check(cublasStatus_t status, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) fail("%s:%d: cuBLAS: status %d", file, line, (int)status);
}

static cudaStream_t stream_cuda;  // all work is done in this one, in order
static cublasHandle_t cublas_cuda;
static cublasLtHandle_t cublaslt_cuda;
static void *workspace_cuda;  // cuBLAS's
enum { WORKSPACE = 33554432 };
static cudaMemPool_t pool_cuda;

// Finds a GPU that can be used, makes the stream and cuBLAS's handle; once
static void start_cuda(void) {
    int devices = 0;
    if (cublas_cuda) return;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        fail("no NVIDIA GPU can be used: %s; check the driver with nvidia-smi, or use ./train_vivim, which needs none",
             error != cudaSuccess ? cudaGetErrorString(error) : "none found");
    int gpu = parallel.local_rank % devices;  // two processes on one: start_nccl refuses
    cudaCheck(cudaSetDevice(gpu));
    int major = 0, pools = 0;
    cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu));
    cudaCheck(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, gpu));
    if (major < 8 || !pools)
        fail("this GPU is too old (compute capability %d.x; 8.0, an A100's, is needed); use ./train_vivim", major);
    // memory that was given back stays with the program: else every synchronisation returns it to the driver
    uint64_t all = UINT64_MAX;
    cudaCheck(cudaDeviceGetDefaultMemPool(&pool_cuda, gpu));
    cudaCheck(cudaMemPoolSetAttribute(pool_cuda, cudaMemPoolAttrReleaseThreshold, &all));
    cudaCheck(cudaStreamCreate(&stream_cuda));
    cublasCheck(cublasCreate(&cublas_cuda));
    cublasCheck(cublasLtCreate(&cublaslt_cuda));
    cublasCheck(cublasSetStream(cublas_cuda, stream_cuda));
    // sums whose terms several blocks share are not added in bfloat16
    cublasCheck(cublasSetMathMode(cublas_cuda, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    cudaCheck(cudaMallocAsync(&workspace_cuda, WORKSPACE, stream_cuda));
    cublasCheck(cublasSetWorkspace(cublas_cuda, workspace_cuda, WORKSPACE));
}

// Memory of the device, in the stream's order: what is given back may be taken again at once, for work that comes later
static void *malloc_check_cuda(size_t bytes) {
    void *p = NULL;
    cudaError_t error = cudaMallocAsync(&p, bytes ? bytes : 1, stream_cuda);
    if (error == cudaErrorMemoryAllocation)
        fail("out of GPU memory: %.1f MiB more were wanted; use a smaller --batch, --frames, --size or --config",
             (double)bytes / 1048576);
    cudaCheck(error);
    return p;
}

static void free_check_cuda(void *p) {
    if (p) cudaCheck(cudaFreeAsync(p, stream_cuda));
}

static float *malloc_floats_cuda(size_t n) { return (float *)malloc_check_cuda(n * sizeof(float)); }
static floatX *malloc_activations_cuda(size_t n) { return (floatX *)malloc_check_cuda(n * sizeof(floatX)); }

static void *calloc_check_cuda(size_t count, size_t size) {
    void *p = malloc_check_cuda(count * size);
    cudaCheck(cudaMemsetAsync(p, 0, count * size, stream_cuda));
    return p;
}

static void zero_floats_cuda(float *x, size_t n) {
    if (n) cudaCheck(cudaMemsetAsync(x, 0, n * sizeof(float), stream_cuda));
}

static void arena_free_cuda(Arena *arena) {
    if (arena->base) ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->size);
    free_check_cuda(arena->base);
    memset(arena, 0, sizeof *arena);
}

static void arena_reserve_cuda(Arena *arena, size_t size) {
    if (arena->base == NULL || arena->size < size) {
        arena_free_cuda(arena);
        arena->base = (char *)malloc_check_cuda(size), arena->size = size;
    }
    ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->size);
    arena->used = arena->peak = 0;
}

static double waited_cuda;  // seconds

// Waits until the device has done all it was told
static void settle_cuda(void) {
    double start = seconds();
    cudaCheck(cudaStreamSynchronize(stream_cuda));
    waited_cuda += seconds() - start;
}

static void to_device(void *to, const void *from, size_t bytes) {
    if (bytes) cudaCheck(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_cuda));
}

static void to_host(void *to, const void *from, size_t bytes) {
    if (bytes) cudaCheck(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_cuda));
    settle_cuda();
}

#endif
