/*
dwconv3d.cu: the depthwise 3 x 3 x 3 convolution on an NVIDIA GPU. Every input is needed by 27 outputs; how often is it loaded?

    make dev && dev/dwconv3d_cu all --preset b3.1             every version checked, then timed
    make lab_emu && dev/dwconv3d_emu all                      without a GPU: checked on the CPU (dev/cudaemu.h), not timed

    out[b,t,h,w,c] = bias[c] + sum over (dt, dh, dw) in 3 x 3 x 3 of inp[b,t+dt-1,h+dh-1,w+dw-1,c] weight[c,dt,dh,dw]

27 multiply-adds and 8 bytes that must move for each output: on an H100 both take about as long. Version 0 is train_vivim.cu's
kernel: a thread walks along w over 5 frames and 2 rows of a channel, with their sums in registers; 28 loads for 10 outputs.
Each version adds one idea; loads are counted for each output:

  1  a thread for each output, neighbouring threads on neighbouring channels: 27 loads, and 27 of weights
  2  weights in registers, a thread has a strip of 16 outputs along w: 27 loads
  3  the 3 columns that an output reads stay in registers while the strip is walked along, 2 of them are the next one's: 9 loads
  4  4 outputs of neighbouring rows at a time: 18 loads for 4, 4.5 each
  5  a tile of 8 x 8 pixels of 32 channels with its border in shared memory, three frames of it, walked through t: 1.6 loads
     from memory, but 9 from shared memory, and two barriers a frame
*/
#define VIVIM_PROGRAM "dwconv3d_cu"
#include "lab_cuda.h"

enum { WINDOW = 27, STRIP = 16, DW_BLOCK = 128 };  // taps; outputs of a thread along w; threads of a block

typedef struct { float *out; const float *inp, *weight, *bias; int B, T, H, W, C; } Conv;  // shapes as above, weight (C, 27)

__device__ static inline float conv_at(const Conv &p, int b, int t, int h, int w, int c) {
    if (t < 0 || t >= p.T || h < 0 || h >= p.H || w < 0 || w >= p.W) return 0.0f;
    return p.inp[((((size_t)b * p.T + t) * p.H + h) * p.W + w) * p.C + c];
}

// ------------------------------------------------------------------------------------------------------------------
// 1 A thread for each output

__global__ static void conv_naive_kernel(Conv p) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, token = i / p.C;
    if (i >= (size_t)p.B * p.T * p.H * p.W * p.C) return;
    int c = (int)(i % p.C), w = (int)(token % p.W), h = (int)(token / p.W % p.H);
    int t = (int)(token / p.W / p.H % p.T), b = (int)(token / p.W / p.H / p.T);
    float sum = p.bias[c];
    for (int k = 0; k < WINDOW; k++)
        sum += conv_at(p, b, t + k / 9 - 1, h + k / 3 % 3 - 1, w + k % 3 - 1, c) * p.weight[(size_t)c * WINDOW + k];
    p.out[i] = sum;
}

// ------------------------------------------------------------------------------------------------------------------
// 2, 3, 4 A thread for ROWS strips of a channel. grid (strips of all frames, channels), block (32 channels, strips)

template <bool WINDOWED, int ROWS> __global__ static void __launch_bounds__(DW_BLOCK) conv_strip_kernel(Conv p) {
    int c = blockIdx.y * 32 + threadIdx.x, strip = blockIdx.x * blockDim.y + threadIdx.y, strips = ceil_div(p.W, STRIP);
    int row = strip / strips, groups = ceil_div(p.H, ROWS), frame = row / groups, t = frame % p.T, b = frame / p.T;
    int h = row % groups * ROWS, w0 = strip % strips * STRIP;
    if (c >= p.C || b >= p.B) return;
    float k[WINDOW], x[3][ROWS + 2][3], bias = p.bias[c];  // x: frames, rows, columns around the output
    #pragma unroll
    for (int i = 0; i < WINDOW; i++) k[i] = p.weight[(size_t)c * WINDOW + i];
    #pragma unroll
    for (int i = 0; i < 3 * (ROWS + 2); i++)  // the window one step before the first output
        #pragma unroll
        for (int j = 0; j < 3; j++)
            x[i / (ROWS + 2)][i % (ROWS + 2)][j] =
                WINDOWED && j > 0 ? conv_at(p, b, t + i / (ROWS + 2) - 1, h + i % (ROWS + 2) - 1, w0 + j - 2, c) : 0.0f;
    for (int w = w0; w < min_int(w0 + STRIP, p.W); w++) {
        #pragma unroll
        for (int i = 0; i < 3 * (ROWS + 2); i++)
            #pragma unroll
            for (int j = 0; j < 3; j++) {
                float *v = x[i / (ROWS + 2)][i % (ROWS + 2)];
                if (WINDOWED && j < 2) v[j] = v[j + 1];
                else v[j] = conv_at(p, b, t + i / (ROWS + 2) - 1, h + i % (ROWS + 2) - 1, w + j - 1, c);
            }
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = bias;
            #pragma unroll
            for (int i = 0; i < WINDOW; i++) sum += x[i / 9][r + i / 3 % 3][i % 3] * k[i];
            if (h + r < p.H) p.out[((((size_t)b * p.T + t) * p.H + h + r) * p.W + w) * p.C + c] = sum;
        }
    }
}

template <bool WINDOWED, int ROWS> static void conv_strip(Conv p) {
    dim3 block(32, DW_BLOCK / 32);
    dim3 grid(ceil_div(ceil_div(p.W, STRIP) * ceil_div(p.H, ROWS) * p.B * p.T, block.y), ceil_div(p.C, 32));
    conv_strip_kernel<WINDOWED, ROWS><<<grid, block, 0, stream_cuda>>>(p);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------------------------
// 5 Tiles in shared memory. grid (tiles, channels, clips), block (32 channels, 8 rows): a thread has a row of 8 outputs

enum { EDGE = 8, BORDERED = EDGE + 2 };

// frame t of the tile and its border, zeros outside
__device__ static inline void conv_stage(float (*tile)[BORDERED][32], const Conv &p, int b, int t, int h0, int w0, int c) {
    for (int i = threadIdx.y; i < BORDERED * BORDERED; i += EDGE)
        tile[i / BORDERED][i % BORDERED][threadIdx.x] =
            c < p.C ? conv_at(p, b, t, h0 + i / BORDERED - 1, w0 + i % BORDERED - 1, c) : 0.0f;
}

__global__ static void __launch_bounds__(32 * EDGE) conv_tile_kernel(Conv p) {
    __shared__ float x[3][BORDERED][BORDERED][32];  // frame t in x[(t + 1) % 3]
    int c = blockIdx.y * 32 + threadIdx.x, column = min_int(c, p.C - 1), tiles = ceil_div(p.W, EDGE), b = blockIdx.z;
    int h0 = blockIdx.x / tiles * EDGE, w0 = blockIdx.x % tiles * EDGE, h = threadIdx.y;
    float k[WINDOW], bias = p.bias[column];
    #pragma unroll
    for (int i = 0; i < WINDOW; i++) k[i] = p.weight[(size_t)column * WINDOW + i];
    conv_stage(x[0], p, b, -1, h0, w0, c);
    conv_stage(x[1], p, b, 0, h0, w0, c);
    for (int t = 0; t < p.T; t++) {
        conv_stage(x[(t + 2) % 3], p, b, t + 1, h0, w0, c);
        __syncthreads();
        float sum[EDGE];
        #pragma unroll
        for (int w = 0; w < EDGE; w++) sum[w] = bias;
        #pragma unroll
        for (int i = 0; i < 9; i++)  // frame and row of the window
            #pragma unroll
            for (int j = 0; j < BORDERED; j++) {
                float v = x[(t + i / 3) % 3][h + i % 3][j][threadIdx.x];
                #pragma unroll
                for (int dw = 0; dw < 3; dw++)
                    if (j - dw >= 0 && j - dw < EDGE) sum[max_int(0, min_int(j - dw, EDGE - 1))] += v * k[3 * i + dw];
            }
        #pragma unroll
        for (int w = 0; w < EDGE; w++)
            if (c < p.C && h0 + h < p.H && w0 + w < p.W)
                p.out[((((size_t)b * p.T + t) * p.H + h0 + h) * p.W + w0 + w) * p.C + c] = sum[w];
        __syncthreads();  // before the oldest frame is overwritten
    }
}

// ------------------------------------------------------------------------------------------------------------------
// The ladder

enum { OUT_OUT, IN_INP, IN_WEIGHT, IN_BIAS };

static void tensors(Lab *lab, const Sizes *s) {
    size_t n = tokens_of(s) * s->C;
    lab_out(lab, OUT_OUT, "out", n, 1e-11);
    lab_in(lab, IN_INP, "inp", n, -1, 1);
    lab_in(lab, IN_WEIGHT, "weight", (size_t)s->C * WINDOW, -1, 1);
    lab_in(lab, IN_BIAS, "bias", s->C, -1, 1);
}
static void reference(float *const *t, const Sizes *s) {
    dwconv_forward(t[OUT_OUT], NULL, t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], s->B, s->T, s->H, s->W, s->C, 3);
}
static LabWork work(const Sizes *s) {
    double n = (double)tokens_of(s) * s->C;
    LabWork w = {8 * n + 4.0 * s->C * (WINDOW + 1), 2 * WINDOW * n, n};
    return w;
}

static Conv conv_args(float *const *t, const Sizes *s) {
    Conv p = {t[OUT_OUT], t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], s->B, s->T, s->H, s->W, s->C};
    return p;
}
static void run_ships(float *const *t, const Sizes *s) {
    dwconv_forward_cuda(t[OUT_OUT], NULL, t[IN_INP], t[IN_WEIGHT], t[IN_BIAS], s->B, s->T, s->H, s->W, s->C, 3);
}
static void run_naive(float *const *t, const Sizes *s) {
    int block = lab_block(s, 256, 1024);
    conv_naive_kernel<<<blocks_for(tokens_of(s) * s->C, block), block, 0, stream_cuda>>>(conv_args(t, s));
    cudaCheck(cudaGetLastError());
}
template <bool WINDOWED, int ROWS> static void run_strip(float *const *t, const Sizes *s) {
    conv_strip<WINDOWED, ROWS>(conv_args(t, s));
}
static void run_tile(float *const *t, const Sizes *s) {
    dim3 grid(ceil_div(s->H, EDGE) * ceil_div(s->W, EDGE), ceil_div(s->C, 32), s->B);
    conv_tile_kernel<<<grid, dim3(32, EDGE), 0, stream_cuda>>>(conv_args(t, s));
    cudaCheck(cudaGetLastError());
}

static const LabKernel KERNELS[] = {
    {run_ships, "ships: sums of 5 frames and 2 rows in registers, along w", NULL},
    {run_naive, "a thread an output", NULL},
    {run_strip<false, 1>, "weights in registers, 16 outputs along w", NULL},
    {run_strip<true, 1>, "a window of 3 columns in registers", NULL},
    {run_strip<true, 4>, "4 rows at a time", NULL},
    {run_tile, "tiles of three frames in shared memory", NULL},
    {NULL, NULL, NULL}
};
static const LabLadder LADDERS[] = {
    {"dwconv3d", KERNELS, tensors, NULL, reference, work, "output", "FLOP", gpu_flop_rate, NULL, 0},
    {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}
};

static const Option SIZES[] = {LAB_GRID, LAB_SIZE("channels", C, 65536, "C"), LAB_BLOCK, {NULL, NULL, NULL, 0, 0, 0, 0}};

//    B T H W C N dirs heads Pk E  block
static const Sizes CHECKS[] = {
    {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, ""},
    {2, 2, 3, 2, 3, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, ""},
    {1, 5, 7, 11, 37, 0, 0, 0, 0, 0, 96, 0, 0, 0, 0, 0, ""},
    {1, 7, 9, 19, 5, 0, 0, 0, 0, 0, 256, 0, 0, 0, 0, 0, ""},
    {2, 3, 17, 33, 3, 0, 0, 0, 0, 0, 512, 0, 0, 0, 0, 0, ""},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ""}
};

static void preset(Sizes *s) { s->C *= 4; }  // DSF's hidden channels

static const LabProgram PROGRAM = {
    "The depthwise 3 x 3 x 3 convolution on an NVIDIA GPU.", SIZES, preset, LADDERS, CHECKS, &LAB_GPU};

int main(int argc, char **argv) { return lab_cuda_main(&PROGRAM, argc, argv); }
