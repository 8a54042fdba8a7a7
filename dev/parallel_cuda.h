/* parallel_cuda.h - sums over several GPUs.

   Included by train_vivim.cu, section 1, behind memory_cuda.h. Several processes (parallel.h) train on a GPU each. NCCL sums
   their gradients and batch norm's statistics where they are, by NVLink or the network, in this stream's order. All ranks get
   the same bits: every element is summed in one place and sent to all; parallel_check_same would tell if not. Without NCCL
   (NO_NCCL=1) the way leads over the host. */
#ifndef VIVIM_PARALLEL_CUDA_H
#define VIVIM_PARALLEL_CUDA_H

#ifdef NO_NCCL
static void sum_over_ranks_cuda(float *x, size_t n) {
    if (parallel.ranks == 1 || n == 0) return;
    float *host = malloc_floats(n);
    to_host(host, x, n * sizeof(float));
    sum_over_ranks(host, n);
    to_device(x, host, n * sizeof(float));
    settle_cuda();
    free(host);
}
#else
#define ncclCheck(call) nccl_check((call), __FILE__, __LINE__)

static void nccl_check(ncclResult_t result, const char *file, int line) {
    if (result != ncclSuccess) fail("%s:%d: NCCL: %s (NCCL_DEBUG=INFO says more)", file, line, ncclGetErrorString(result));
}

static ncclComm_t nccl_cuda;
typedef struct { ncclUniqueId id; cudaUUID_t gpu; } NcclStart;  // what a rank tells the others: rank 0's id, its own GPU

// All ranks come here together, at their first sum. NCCL waits for ever if two share a GPU, so that is refused before.
static void start_nccl(void) {
    NcclStart mine, *all = (NcclStart *)malloc_check(sizeof(NcclStart) * (size_t)parallel.ranks);
    cudaDeviceProp properties; int gpu;
    memset(&mine, 0, sizeof mine);
    cudaCheck(cudaGetDevice(&gpu));
    cudaCheck(cudaGetDeviceProperties(&properties, gpu));
    mine.gpu = properties.uuid;
    if (parallel.rank == 0) ncclCheck(ncclGetUniqueId(&mine.id));
    parallel_gather(all, &mine, sizeof mine);
    for (int r = 0; r < parallel.ranks; r++)
        for (int s = 0; s < r; s++)
            if (memcmp(&all[r].gpu, &all[s].gpu, sizeof mine.gpu) == 0)
                parallel_leave_it_to_rank_0(), fail("processes %d and %d have the same GPU (%s); start one for each GPU", s, r,
                                                    properties.name);
    ncclCheck(ncclCommInitRank(&nccl_cuda, parallel.ranks, all[0].id, parallel.rank));
    free(all);
}

// x (n), on the device, = its sum over the ranks
static void sum_over_ranks_cuda(float *x, size_t n) {
    if (parallel.ranks == 1 || n == 0) return;
    if (nccl_cuda == nullptr) start_nccl();
    ncclCheck(ncclAllReduce(x, x, n, ncclFloat, ncclSum, nccl_cuda, stream_cuda));
}
#endif

#endif
