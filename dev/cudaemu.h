/*
cudaemu.h - runs a CUDA file on the CPU: tests of train_vivim.cu for machines that have no GPU.

    sed -f dev/cudaemu.sed train_vivim.cu > train_vivim_emu.cpp        # rewrites launches and dynamic shared memory
    g++ -std=c++17 -g -O1 -fsanitize=address,undefined -include dev/cudaemu.h ...

Every thread of a block is a fiber, a stack of its own; the blocks of a grid run one after the other, in each block one warp at
a time as far as it can go: the schedule in which a missing barrier shows. CUDAEMU_ORDER=forward|reverse|<seed> orders the
blocks of a grid, the warps of a block and the lanes of a warp; a program without races gives the same bits in every order.
What else it finds:

    writing or reading outside global or shared memory        address sanitizer, at the source line
    memory read before it is written                          it holds NaN: global memory, and shared memory in every block
    the host touches device memory                            SIGSEGV: no page of it can be accessed outside kernels and copies
    the host touches managed memory before synchronising      the same, from the first launch to cudaDeviceSynchronize
    threads that miss a barrier, or wait at different ones;   a report with the block and the lines, then abort
      exited or foreign lanes in a shuffle; deadlock;
      invalid launches, too much shared memory;
      waiting, cudaMalloc and the like while a stream is captured
    races, if compiled with -fsanitize=thread, but linked     a report with the source line: two threads access the same number,
      without (make test_races)                               one at least writes, and neither are both atomic nor does a
                                                              barrier of the block (or __syncwarp) lie between

It does not see: what is right in value, but rounded or converted otherwise than meant; work of the host that a captured stream
leaves out, when a graph is launched again (its results are those of the first time); tiles of one shared array that run into
each other, but by the values, and as races; an atomic where none is needed.
Not emulated: time, streams that overlap, textures, inline PTX, __half, cooperative groups, cub. __CUDACC__ is
not defined: what is declared __host__ __device__ under it is a plain function here.

Sections: 1 language | 2 memory | 3 fibers | 4 blocks, warps, barriers | 5 launches | 6 device functions | 7 runtime | 8 cuBLAS
*/
#ifndef CUDAEMU_H
#define CUDAEMU_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

#define CUDAEMU 1

// ------------------------------------------------------------------------------------------------------------------
// 1. Language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static                      // blocks run one at a time: a static is a block's shared memory
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{ x, y }; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{ x, y, z, w }; }
static inline float2 make_float2(float x, float y) { return float2{ x, y }; }
static inline float3 make_float3(float x, float y, float z) { return float3{ x, y, z }; }
static inline float4 make_float4(float x, float y, float z, float w) { return float4{ x, y, z, w }; }
static inline double2 make_double2(double x, double y) { return double2{ x, y }; }
static inline int2 make_int2(int x, int y) { return int2{ x, y }; }
static inline int4 make_int4(int x, int y, int z, int w) { return int4{ x, y, z, w }; }

// bfloat16: the upper half of a float, rounded to nearest, ties to even; a NaN stays one
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        unsigned u;
        memcpy(&u, &x, 4);
        bits = (unsigned short)(x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        unsigned u = (unsigned)bits << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};
static inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
static inline float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 x; x.bits = bits; return x; }

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace emu {

// ------------------------------------------------------------------------------------------------------------------
// 2. Memory. Two heaps of pages of their own, so that one call locks all of one: the device's outside kernels and copies, the
// managed one while work may be under way. Between and behind allocations address sanitizer's poison lies all the time.

static const size_t GRAIN = 256, HEAP = (size_t)1 << 36;       // alignment; bytes of addresses, not of memory

struct Heap {
    char *base = nullptr;
    size_t top = 0;                            // all that was ever in use lies below
    bool open = true;
    std::map<char *, size_t> used, gaps;       // address -> bytes, both without overlap

    void access(bool allowed) {
        if (!base || open == allowed) return;
        open = allowed;
        if (mprotect(base, top, allowed ? PROT_READ | PROT_WRITE : PROT_NONE) != 0) { perror("[cudaemu] mprotect"); abort(); }
    }
    char *take(size_t bytes) {                 // the heap is open; what it returns holds NaN
        size_t room = (bytes / GRAIN + 2) / 16 * 16 * GRAIN + 16 * GRAIN;      // a page at least, with poison behind
        if (!base) {
            base = (char *)mmap(nullptr, HEAP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (base == MAP_FAILED) { perror("[cudaemu] mmap"); abort(); }
            madvise(base, HEAP, MADV_HUGEPAGE);    // to lock and to open pages of 4 KiB was a fifth of all time
        }
        auto gap = gaps.begin();
        while (gap != gaps.end() && gap->second < room) ++gap;
        char *p = gap == gaps.end() ? base + top : gap->first;
        if (gap == gaps.end()) {
            if (top + room > HEAP) return nullptr;
            top += room;
        } else {
            if (gap->second > room) gaps[p + room] = gap->second - room;
            gaps.erase(gap);
        }
        used[p] = room;
#if EMU_ASAN
        ASAN_POISON_MEMORY_REGION(p, room);
        ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
        memset(p, 0xFF, bytes);
        return p;
    }
    bool give_back(void *pointer) {
        auto block = used.find((char *)pointer);
        if (block == used.end()) return false;
        char *p = block->first;
        size_t bytes = block->second;
        used.erase(block);
#if EMU_ASAN
        ASAN_POISON_MEMORY_REGION(p, bytes);
#endif
        auto after = gaps.lower_bound(p);      // neighbouring gaps become one
        if (after != gaps.end() && after->first == p + bytes) bytes += after->second, after = gaps.erase(after);
        if (after != gaps.begin() && std::prev(after)->first + std::prev(after)->second == p) std::prev(after)->second += bytes;
        else gaps[p] = bytes;
        return true;
    }
    bool holds(const void *p) const { return base && (const char *)p >= base && (const char *)p < base + top; }
};
static Heap device, managed;
static bool busy;                              // something was launched since the host synchronised last

static inline void enter() { device.access(true), managed.access(true); }
static inline void leave(bool launched) {
    busy |= launched;
    device.access(false), managed.access(!busy);
}
static inline void synchronize() { busy = false, managed.access(true); }

// ------------------------------------------------------------------------------------------------------------------
// 3. Fibers. A fiber runs thread after thread as long as none waits: elementwise kernels never switch.

static const size_t STACK = 256 * 1024;
struct Fiber {
    void *sp;                                  // where it stopped
    char *stack;
    void *fake;                                // address sanitizer's own
    ucontext_t context;                        // where there is no fast switch
};

#ifdef __x86_64__
// Saves the registers that a function must keep and the stack of `from`; goes on where `to` stopped. swapcontext() would do,
// but it makes a system call each time.
extern "C" void emu_switch(void **from, void *to);
__asm__(".text\n.p2align 4\nemu_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n    ret\n");
#endif

static Fiber scheduler, *current;              // the scheduler runs on the program's own stack
#if EMU_ASAN
static const void *scheduler_bottom;
static size_t scheduler_size;
#endif
static std::vector<Fiber *> spare;             // fibers that can start another thread

static inline void switch_fibers(Fiber *from, Fiber *to) {
#ifdef __x86_64__
    emu_switch(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
}
static inline void to_scheduler() {
    Fiber *self = current;
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&self->fake, scheduler_bottom, scheduler_size);
#endif
    switch_fibers(self, &scheduler);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(self->fake, &scheduler_bottom, &scheduler_size);
#endif
}
static inline void resume(Fiber *fiber) {
    current = fiber;
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&scheduler.fake, fiber->stack, STACK);
#endif
    switch_fibers(&scheduler, fiber);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(scheduler.fake, nullptr, nullptr);
#endif
}
static void fiber_main();
static inline Fiber *get_fiber() {
    if (!spare.empty()) {
        Fiber *fiber = spare.back();
        spare.pop_back();
        return fiber;
    }
    Fiber *fiber = new Fiber();
    char *memory = (char *)mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) { perror("[cudaemu] mmap"); abort(); }
    mprotect(memory, 4096, PROT_NONE);         // below the stack: running over it is caught
    fiber->stack = memory + 4096;
#ifdef __x86_64__
    void **top = (void **)(fiber->stack + STACK);
    *--top = nullptr;                          // fiber_main's return address
    *--top = (void *)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->sp = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK;
    makecontext(&fiber->context, fiber_main, 0);
#endif
    return fiber;
}

// ------------------------------------------------------------------------------------------------------------------
// 4. Blocks, warps, barriers

enum State : char { FRESH, READY, RUNNING, AT_BARRIER, AT_WARP, EXITED };
struct Thread {
    State state;
    Fiber *fiber;
    unsigned mask;                             // of the warp operation that it waits at
    int line;                                  // of the barrier that it waits at
    unsigned syncs;                            // __syncwarp()s that it has passed
    uint64_t in, out;                          // what a warp operation exchanges: given, and visible to the others
};
static std::vector<Thread> threads;
static std::vector<int> order;                 // of the threads, warp by warp
static int thread, count, next_fresh, fresh_end;
static std::function<void()> body;             // the kernel with its arguments
static char *dynamic_shared;
static volatile bool in_kernel;                // volatile: gcc does not know that the functions under Races read these
static volatile unsigned launches, blocks, barriers;   // so far: of all launches, of this one, of this block

[[noreturn]] static void die(const char *what) {
    int states[6] = { 0 };
    fprintf(stderr, "[cudaemu] %s: block (%u,%u,%u)", what, blockIdx.x, blockIdx.y, blockIdx.z);
    for (int t = 0; t < count; t++) states[(int)threads[t].state]++;
    fprintf(stderr, ", %d threads: %d exited, %d at a warp operation, %d at a barrier", count, states[EXITED], states[AT_WARP],
            states[AT_BARRIER]);
    std::vector<int> lines;
    for (int t = 0; t < count; t++) if (threads[t].state == AT_BARRIER) lines.push_back(threads[t].line);
    std::sort(lines.begin(), lines.end());
    lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
    for (int line : lines) fprintf(stderr, ", line %d", line);
    fprintf(stderr, "\n");
    abort();
}

static inline void set_thread(int t) {
    unsigned i = (unsigned)t, row = i / blockDim.x;
    thread = t;
    threadIdx.x = i - row * blockDim.x, threadIdx.y = row, threadIdx.z = 0;
    if (row >= blockDim.y) threadIdx.y = row % blockDim.y, threadIdx.z = row / blockDim.y;
}

static void fiber_main() {
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    for (;;) {
        while (next_fresh < fresh_end) {
            int t = order[next_fresh++];
            set_thread(t);
            threads[t].fiber = current, threads[t].state = RUNNING;
            body();
            threads[t].state = EXITED;
        }
        spare.push_back(current);
        to_scheduler();
    }
}

// Lets those lanes of a warp go on that wait with the same mask, if all that it names wait
static bool release_warp(int first, int lanes) {
    bool moved = false;
    unsigned there = lanes < 32 ? (1u << lanes) - 1 : 0xFFFFFFFFu;
    for (int l = 0; l < lanes; l++) {
        if (threads[first + l].state != AT_WARP) continue;
        unsigned mask = threads[first + l].mask & there;
        bool all = true;
        for (int k = 0; k < lanes; k++) {
            const Thread &other = threads[first + k];
            if (!(mask >> k & 1)) continue;
            if (other.state == EXITED) die("a lane that the mask of a warp operation names has exited");
            all &= other.state == AT_WARP && (other.mask & there) == mask;
        }
        for (int k = 0; k < lanes && all; k++) {
            if (mask >> k & 1) threads[first + k].out = threads[first + k].in, threads[first + k].state = READY;
        }
        moved |= all;
    }
    return moved;
}

static void run_block() {
    for (Thread &t : threads) t.state = FRESH, t.syncs = 0;
    next_fresh = 0, barriers = 0, in_kernel = true;
    for (;;) {
        for (int start = 0; start < count; start += 32) {      // start: in `order`; first: the warp's first thread
            int first = order[start] / 32 * 32, lanes = std::min(32, count - first);
            fresh_end = start + lanes;
            for (bool moved = true; moved;) {
                moved = false;
                while (next_fresh < fresh_end) resume(get_fiber()), moved = true;
                for (int i = start; i < start + lanes; i++) {
                    int t = order[i];
                    if (threads[t].state != READY) continue;
                    threads[t].state = RUNNING;
                    set_thread(t);
                    resume(threads[t].fiber);
                    moved = true;
                }
                moved |= release_warp(first, lanes);
            }
        }
        int exited = 0, waiting = 0, at = -1;
        for (const Thread &t : threads) {
            exited += t.state == EXITED;
            if (t.state != AT_BARRIER) continue;
            if (at >= 0 && at != t.line) die("threads of a block wait at different __syncthreads()");
            at = t.line, waiting++;
        }
        if (exited == count) { blocks = blocks + 1, in_kernel = false; return; }
        if (waiting == 0) die("deadlock: lanes wait for each other in warp operations");
        if (waiting < count) die("not all threads of a block reach a __syncthreads()");
        for (Thread &t : threads) t.state = READY;
        barriers = barriers + 1;
    }
}

// What is accessed inside is not watched (Races, below), or counts as atomic
static volatile bool unwatched, atomic;
struct Unwatched { Unwatched() { unwatched = true; } ~Unwatched() { unwatched = false; } };
struct Atomic { Atomic() { atomic = true; } ~Atomic() { atomic = false; } };

static inline void barrier(int line) {
    threads[thread].line = line, threads[thread].state = AT_BARRIER;
    to_scheduler();
}

// What the lane `source` gives; from a lane beyond the block's end one's own
template <class T> static inline T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "shuffles exchange up to 8 bytes");
    int t = thread, warp = t / 32 * 32;
    Thread *self = &threads[t];
    T result;
    if (!(mask >> (t - warp) & 1)) die("a lane is not in the mask of its own warp operation");
    if (!(mask >> source & 1)) die("a lane reads from a lane that is not in the mask");
    self->in = 0;
    memcpy(&self->in, &value, sizeof value);
    self->mask = mask, self->state = AT_WARP;
    to_scheduler();
    memcpy(&result, &threads[warp + source < count ? warp + source : t].out, sizeof result);
    return result;
}

static inline int lane() { return thread % 32; }

// ------------------------------------------------------------------------------------------------------------------
// 5. Launches

enum { SHARED_LIMIT = 48 * 1024, SHARED_OPTIN_LIMIT = 227 * 1024 };
static std::map<void *, int> shared_limit;     // of kernels that asked for more by cudaFuncSetAttribute

static int order_kind() {                      // 0 forward, -1 reverse, or a seed
    static const char *text = getenv("CUDAEMU_ORDER");
    static int kind = !text || strcmp(text, "forward") == 0 ? 0 : strcmp(text, "reverse") == 0 ? -1 : atoi(text);
    return kind;
}
template <class T> static void permute(T *a, size_t n) {
    static uint64_t seed = (uint64_t)order_kind();
    if (order_kind() < 0) std::reverse(a, a + n);
    for (size_t i = n; i > 1 && order_kind() > 0; i--) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(a[i - 1], a[(seed >> 33) % i]);
    }
}

static std::vector<std::pair<char *, size_t>> filled;   // the shared memory that this block came by

// At the declaration of static shared memory: the first thread of a block fills it with NaN
template <class T> static inline void fresh(T &shared) {
    Unwatched here;
    std::pair<char *, size_t> area((char *)&shared, sizeof shared);
    if (std::find(filled.begin(), filled.end(), area) != filled.end()) return;
    filled.push_back(area);
    memset((void *)&shared, 0xFF, sizeof shared);
}

template <class T> struct Same { typedef T type; };    // arguments are converted to the kernel's types, as in a call

// What a stream is told while it is captured is not done but kept, to be done whenever the graph is launched. Memory that is
// taken meanwhile is the graph's until it is destroyed.
struct Graph { std::vector<std::function<void()>> work; std::vector<void *> memory; };
static Graph *capturing;

struct Launch {
    dim3 grid, block;
    size_t shared;
    Launch(dim3 grid_, dim3 block_, size_t shared_ = 0, void * = nullptr) : grid(grid_), block(block_), shared(shared_) {}

    template <class... P> void operator()(void (*kernel)(P...), typename Same<P>::type... args) {
        if (capturing) {
            Launch launch = *this;
            capturing->work.push_back([=]() mutable { launch(kernel, args...); });
            return;
        }
        size_t number = (size_t)grid.x * grid.y * grid.z, limit = SHARED_LIMIT;
        if (shared_limit.count((void *)kernel)) limit = (size_t)shared_limit[(void *)kernel];
        size_t size = (size_t)block.x * block.y * block.z;
        if (number == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 || size == 0 || size > 1024 || block.z > 64
            || shared > limit) {
            fprintf(stderr, "[cudaemu] invalid launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory, "
                    "at most %zu\n", grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, limit);
            abort();
        }
        gridDim = grid, blockDim = block;
        count = (int)size;
        threads.assign((size_t)count, Thread());
        order.resize((size_t)count);
        std::vector<int> warps;                // the last warp, if it is not full, stays the last
        for (int t = 0; t + 32 <= count; t += 32) warps.push_back(t);
        permute(warps.data(), warps.size());
        if (count % 32) warps.push_back(count / 32 * 32);
        for (size_t w = 0, at = 0; w < warps.size(); w++) {
            int lanes = std::min(32, count - warps[w]);
            for (int l = 0; l < lanes; l++) order[at + (size_t)l] = warps[w] + l;
            permute(&order[at], (size_t)lanes);
            at += (size_t)lanes;
        }
        std::vector<unsigned> block_order;
        if (order_kind() != 0) {
            for (size_t i = 0; i < number; i++) block_order.push_back((unsigned)i);
            permute(block_order.data(), number);
        }
        body = [=] { kernel(args...); };
        dynamic_shared = nullptr;              // exactly as much as was asked for
        if (shared && posix_memalign((void **)&dynamic_shared, 1024, shared) != 0) { perror("[cudaemu]"); abort(); }
        enter();
        launches = launches + 1, blocks = 0;
        for (size_t i = 0; i < number; i++) {
            size_t b = order_kind() == 0 ? i : block_order[i];
            blockIdx = uint3{ (unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y) };
            filled.clear();
            if (shared) memset(dynamic_shared, 0xFF, shared), filled.push_back({ dynamic_shared, shared });
            run_block();
        }
        leave(true);
        free(dynamic_shared);
    }
};

// ---- Races. Under -fsanitize=thread the compiler calls a function before every access to memory. Its library is left out:
// these are the functions. For every two bytes of device and shared memory there is noted who wrote them last and who read them
// since, the last one and one other; places that fall on the same note forget each other.
#ifdef __SANITIZE_THREAD__
struct Access { unsigned launch, block, barriers, syncs; int thread; bool atomic; };
struct Note { uintptr_t place; Access write, read, other; };
static const size_t NOTES = (size_t)1 << 20;
static Note *notes = (Note *)calloc(NOTES, sizeof(Note));

// may happen at the same time
static inline bool collide(const Access &a, const Access &b, bool shared) {
    if (a.launch != b.launch || (a.atomic && b.atomic)) return false;
    if (a.block != b.block) return !shared;
    return a.thread != b.thread && a.barriers == b.barriers && (a.thread / 32 != b.thread / 32 || a.syncs == b.syncs);
}

static void watch(const void *address, size_t bytes, bool writes, void *where) {
    const char *p = (const char *)address;
    bool global = device.holds(p) || managed.holds(p), shared = false;
    for (size_t i = 0; i < filled.size() && !global; i++) {
        shared |= p >= filled[i].first && p < filled[i].first + filled[i].second;
    }
    if (!global && !shared) return;
    Access now = { launches, blocks, barriers, threads[(size_t)thread].syncs, thread, atomic };
    for (uintptr_t place = (uintptr_t)p / 2; place <= ((uintptr_t)p + bytes - 1) / 2; place++) {
        Note *note = &notes[place % NOTES];
        if (note->place != place) *note = Note(), note->place = place;
        const Access *before = collide(note->write, now, shared) ? &note->write : !writes ? nullptr
                             : collide(note->read, now, shared) ? &note->read : collide(note->other, now, shared) ? &note->other
                             : nullptr;
        if (before) {
            char command[160];
            fprintf(stderr, "[cudaemu] race: block %u, thread %d %s %s memory that block %u, thread %d %s\n", now.block,
                    now.thread, writes ? "writes" : "reads", shared ? "shared" : "global", before->block, before->thread,
                    before == &note->write ? "wrote" : "reads");
            snprintf(command, sizeof command, "addr2line -f -C -e /proc/%d/exe %p >&2", (int)getpid(), where);
            if (system(command) != 0) fprintf(stderr, "at %p\n", where);
            abort();
        }
        if (writes) note->write = now, note->read = note->other = Access();
        else if (note->read.thread != now.thread || note->read.block != now.block) note->other = note->read, note->read = now;
        else note->read = now;
    }
}

#define EMU_WATCH(name, writes, bytes, ...) \
    __attribute__((no_sanitize("thread"))) void __tsan_##name(void *p, ##__VA_ARGS__) { \
        if (!in_kernel || unwatched) return; \
        unwatched = true; \
        watch(p, (size_t)(bytes), writes, __builtin_return_address(0)); \
        unwatched = false; \
    }
extern "C" {
EMU_WATCH(read1, false, 1) EMU_WATCH(read2, false, 2) EMU_WATCH(read4, false, 4) EMU_WATCH(read8, false, 8)
EMU_WATCH(read16, false, 16) EMU_WATCH(read_range, false, bytes, long bytes)
EMU_WATCH(write1, true, 1) EMU_WATCH(write2, true, 2) EMU_WATCH(write4, true, 4) EMU_WATCH(write8, true, 8)
EMU_WATCH(write16, true, 16) EMU_WATCH(write_range, true, bytes, long bytes)
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
}
#endif

} // namespace emu

// ------------------------------------------------------------------------------------------------------------------
// 6. Device functions

#define __syncthreads() emu::barrier(__LINE__)
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
    emu::exchange(mask, 0, emu::lane());
    emu::threads[emu::thread].syncs++;
}
static inline void __threadfence() {}
template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emu::exchange(mask, value, (emu::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    int to = emu::lane() ^ lanes;
    return emu::exchange(mask, value, to / width <= emu::lane() / width ? to : emu::lane());
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
    int lane = emu::lane();
    return emu::exchange(mask, value, (lane & (width - 1)) + lanes < width ? lane + lanes : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
    int lane = emu::lane();
    return emu::exchange(mask, value, (lane & (width - 1)) - lanes >= 0 ? lane - lanes : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    int warp = emu::thread / 32 * 32;
    unsigned result = 0;
    emu::exchange(mask, predicate != 0, emu::lane());
    for (int k = 0; k < 32 && warp + k < emu::count; k++) {
        if ((mask >> k & 1) && (emu::threads[warp + k].out & 0xFF)) result |= 1u << k;
    }
    return result;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T> static inline T atomicExch(T *p, T value) { emu::Atomic here; T old = *p; *p = value; return old; }
template <class T> static inline T atomicAdd(T *p, T value) { emu::Atomic here; T old = *p; *p = old + value; return old; }
template <class T> static inline T atomicMax(T *p, T value) {
    emu::Atomic here;
    T old = *p;
    if (value > old) *p = value;
    return old;
}
template <class T> static inline T atomicOr(T *p, T value) { emu::Atomic here; T old = *p; *p = old | value; return old; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T value) { *p = value; }

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#define __expf expf                            // glibc keeps these two names for itself
#define __logf logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }
static inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }

// Tensor cores: matrices of 16 x 16, which a warp holds together. Here lane 0 has them whole and does the work, and all lanes
// meet to multiply - not to load or to store: who writes a tile, or reads one, must synchronise with lane 0 himself.
namespace nvcuda { namespace wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment { float x[M][N]; };

template <class F> static inline void fill_fragment(F &f, float value) {
    for (auto &row : f.x) for (float &x : row) x = value;
}
static inline void emu_aligned(const void *p, size_t ld, size_t of) {
    if ((uintptr_t)p % 32 == 0 && ld % of == 0) return;
    fprintf(stderr, "[cudaemu] wmma: a matrix must begin on 32 bytes and its rows on 16\n");
    abort();
}
template <class Use, class T, class Layout>
static inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *p, unsigned ld) {
    emu_aligned(p, ld, 16 / sizeof(T));
    if (emu::lane() != 0) return;
    for (unsigned i = 0; i < 16; i++) for (unsigned j = 0; j < 16; j++) {
        f.x[i][j] = (float)(std::is_same<Layout, row_major>::value ? p[i * ld + j] : p[j * ld + i]);
    }
}
template <class D, class A, class B> static inline void mma_sync(D &d, const A &a, const B &b, const D &c) {
    emu::exchange(0xFFFFFFFFu, 0, emu::lane());
    if (emu::lane() != 0) return;
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) {
        float sum = c.x[i][j];
        for (int k = 0; k < 16; k++) sum += a.x[i][k] * b.x[k][j];
        d.x[i][j] = sum;
    }
}
template <class F> static inline void store_matrix_sync(float *p, const F &f, unsigned ld, layout_t layout) {
    emu_aligned(p, ld, 4);
    for (unsigned i = 0; i < 16 && emu::lane() == 0; i++) for (unsigned j = 0; j < 16; j++) {
        p[layout == mem_row_major ? i * ld + j : j * ld + i] = f.x[i][j];
    }
}
} }

// ------------------------------------------------------------------------------------------------------------------
// 7. Runtime. What can fail on a GPU by a mistake of the program's aborts here.

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
                      cudaMemcpyDefault };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrClockRate = 13, cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMemoryPoolsSupported = 115
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaMemAttachGlobal = 1 };
typedef void *cudaStream_t;
typedef double *cudaEvent_t;
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, l2CacheSize, managedMemory, concurrentManagedAccess;
};

// What a GPU refuses while a stream is captured
static inline void emu_not_captured(const char *what) {
    if (!emu::capturing) return;
    fprintf(stderr, "[cudaemu] the host %s while a stream is captured\n", what);
    abort();
}

static inline const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
static inline const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorMemoryAllocation";
}
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
static inline cudaError_t cudaDeviceSynchronize() { emu_not_captured("waits"); emu::synchronize(); return cudaSuccess; }
static inline cudaError_t cudaDeviceReset() { return cudaSuccess; }
static inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
static inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
static inline cudaError_t cudaDriverGetVersion(int *version) { *version = 12000; return cudaSuccess; }
static inline cudaError_t cudaRuntimeGetVersion(int *version) { *version = 12000; return cudaSuccess; }
static inline cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
static inline cudaError_t cudaGetDevice(int *number) { *number = 0; return cudaSuccess; }
static inline cudaError_t cudaSetDevice(int number) { (void)number; return cudaSuccess; }
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int number) {
    (void)number;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "emulation on the CPU");
    p->totalGlobalMem = (size_t)8 << 30;
    p->sharedMemPerBlock = emu::SHARED_LIMIT, p->sharedMemPerBlockOptin = emu::SHARED_OPTIN_LIMIT;
    p->major = 9, p->multiProcessorCount = 2, p->maxThreadsPerMultiProcessor = 2048, p->l2CacheSize = 1 << 20;
    p->managedMemory = 1;
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int number) {
    (void)number;
    *value = what == cudaDevAttrMaxThreadsPerBlock ? 1024 : what == cudaDevAttrMultiProcessorCount ? 2
           : what == cudaDevAttrMaxThreadsPerMultiProcessor ? 2048 : what == cudaDevAttrComputeCapabilityMajor ? 9
           : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emu::SHARED_OPTIN_LIMIT
           : what == cudaDevAttrMemoryPoolsSupported;
    return cudaSuccess;
}
template <class F> static inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute what, int value) {
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > emu::SHARED_OPTIN_LIMIT) {
        fprintf(stderr, "[cudaemu] %d bytes of shared memory are too much\n", value);
        abort();
    }
    emu::shared_limit[(void *)kernel] = value;
    return cudaSuccess;
}
template <class F>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, F *kernel, int block_size, size_t shared) {
    (void)kernel, (void)shared;
    *blocks = 2048 / block_size;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = nullptr; return cudaSuccess; }
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { *stream = nullptr; return cudaSuccess; }
static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }

static inline cudaError_t emu_allocate(emu::Heap *heap, void **p, size_t bytes) {
    heap->access(true);
    *p = heap->take(bytes);
    emu::leave(false);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <class T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    emu_not_captured("takes memory by cudaMalloc");
    return emu_allocate(&emu::device, (void **)p, bytes);
}
template <class T> static inline cudaError_t cudaMallocAsync(T **p, size_t bytes, cudaStream_t) {
    cudaError_t error = emu_allocate(&emu::device, (void **)p, bytes);
    void *memory = *p;
    if (emu::capturing && error == cudaSuccess) {
        emu::capturing->memory.push_back(memory);
        emu::capturing->work.push_back([=] {
            emu::enter();
#if EMU_ASAN
            ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
            memset(memory, 0xFF, bytes);
            emu::leave(true);
        });
    }
    return error;
}
template <class T> static inline cudaError_t cudaMallocManaged(T **p, size_t bytes, unsigned = cudaMemAttachGlobal) {
    return emu_allocate(&emu::managed, (void **)p, bytes);
}
static inline cudaError_t cudaFreeAsync(void *p, cudaStream_t) {
    if (emu::capturing && p) {                 // until the graph is launched again nobody may use it
        auto &memory = emu::capturing->memory;
        if (std::find(memory.begin(), memory.end(), p) == memory.end()) emu_not_captured("gives back memory of before");
#if EMU_ASAN
        size_t room = emu::device.used[(char *)p];
        emu::capturing->work.push_back([=] { ASAN_POISON_MEMORY_REGION(p, room); });
#endif
        return cudaSuccess;
    }
    if (p && !emu::device.give_back(p) && !emu::managed.give_back(p)) {
        fprintf(stderr, "[cudaemu] cudaFree of what cudaMalloc did not return, or twice\n");
        abort();
    }
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    emu_not_captured("calls cudaFree");
    emu::synchronize();
    return cudaFreeAsync(p, nullptr);
}
template <class T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes) {
    emu_not_captured("takes memory by cudaMallocHost");
    *p = (T *)malloc(bytes);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
static inline cudaError_t cudaFreeHost(void *p) { free(p); return cudaSuccess; }
static inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = emu::device.holds(p) ? cudaMemoryTypeDevice
            : emu::managed.holds(p) ? cudaMemoryTypeManaged : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
#if EMU_ASAN
// A program that marks its own memory does so in the order of its work: with a graph, when that is launched
static inline void emu_mark(const volatile void *p, size_t bytes, bool poison) {
    if (emu::capturing) emu::capturing->work.push_back([=] { emu_mark(p, bytes, poison); });
    else if (poison) __asan_poison_memory_region(p, bytes);
    else __asan_unpoison_memory_region(p, bytes);
}
#undef ASAN_POISON_MEMORY_REGION
#undef ASAN_UNPOISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(p, bytes) emu_mark(p, bytes, true)
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) emu_mark(p, bytes, false)
#endif

// One pool, whose attributes are numbers of 64 bits; the most that was used is not counted: what is used now stands for it.
typedef int cudaMemPool_t;
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4, cudaMemPoolAttrUsedMemHigh = 8 };
static inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int number) {
    *pool = number;
    return cudaSuccess;
}
static inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) { return cudaSuccess; }
static inline cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
    uint64_t bytes = 0;
    for (const auto &block : emu::device.used) bytes += block.second;
    memcpy(value, &bytes, sizeof bytes);
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = (size_t)8 << 30;
    *unused = *total;
    for (const auto &block : emu::device.used) *unused -= std::min(*unused, block.second);
    return cudaSuccess;
}
static inline bool emu_fits(const void *p, bool on_device) {
    return emu::managed.holds(p) || emu::device.holds(p) == on_device;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                          cudaStream_t = nullptr) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && !(emu_fits(to, to_device) && emu_fits(from, from_device))) {
        fprintf(stderr, "[cudaemu] cudaMemcpy: its kind does not fit the pointers\n");
        abort();
    }
    if (emu::capturing) {
        emu::capturing->work.push_back([=] { cudaMemcpyAsync(to, from, bytes, kind); });
        return cudaSuccess;
    }
    emu::enter();
    memmove(to, from, bytes);
    emu::leave(true);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    cudaMemcpyAsync(to, from, bytes, kind);
    return cudaDeviceSynchronize();
}
static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t = nullptr) {
    if (emu::capturing) {
        emu::capturing->work.push_back([=] { cudaMemsetAsync(p, value, bytes); });
        return cudaSuccess;
    }
    emu::enter();
    memset(p, value, bytes);
    emu::leave(true);
    return cudaSuccess;
}
static inline cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes); }
template <class T> static inline cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t bytes) {
    memcpy((void *)&symbol, from, bytes);
    return cudaSuccess;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
typedef emu::Graph *cudaGraph_t;
typedef emu::Graph *cudaGraphExec_t;
static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    emu::capturing = new emu::Graph;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = emu::capturing;
    emu::capturing = nullptr;
    return cudaSuccess;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new emu::Graph(*graph);
    return cudaSuccess;
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (auto &work : exec->work) work();
    return cudaSuccess;
}
enum cudaGraphMemAttributeType { cudaGraphMemAttrUsedMemHigh = 1 };
static inline cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void *value) {
    memset(value, 0, sizeof(uint64_t));        // a graph's memory is in the pool here
    return cudaSuccess;
}
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    for (void *p : exec->memory) cudaFreeAsync(p, nullptr);
    delete exec;
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = new double(0); return cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *event = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
    return cudaSuccess;
}
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)(*b - *a);
    return cudaSuccess;
}
static inline cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; return cudaSuccess; }

// ------------------------------------------------------------------------------------------------------------------
// 8. cuBLAS and cuBLASLt: column-major matrix products by loops. Sums of 32 products in float, of those in double.

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasMath_t { CUBLAS_DEFAULT_MATH = 0, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef void *cublasHandle_t;
static inline const char *cublasGetStatusString(cublasStatus_t) { return "CUBLAS_STATUS_SUCCESS"; }
static inline cublasStatus_t cublasCreate(cublasHandle_t *handle) { *handle = nullptr; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }

struct EmuMatrix { const void *data; cudaDataType_t type; int rows, columns, ld; };

static inline size_t emu_size(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }
__attribute__((no_sanitize("address", "undefined"))) static float emu_read(const void *a, cudaDataType_t type, size_t i) {
    return type == CUDA_R_32F ? ((const float *)a)[i] : (float)((const __nv_bfloat16 *)a)[i];
}

// The loops below run without address sanitizer, for speed: what they will touch is looked at first, column by column
static inline void emu_check_matrix(const char *name, EmuMatrix a) {
    const void *bad = a.ld < a.rows || a.rows < 0 || a.columns < 0 ? a.data : nullptr;
    for (int j = 0; j < a.columns && !bad; j++) {
        if (!emu::device.holds(a.data) && !emu::managed.holds(a.data)) bad = a.data;
#if EMU_ASAN
        else bad = __asan_region_is_poisoned((char *)a.data + (size_t)j * (size_t)a.ld * emu_size(a.type),
                                             (size_t)a.rows * emu_size(a.type));
#endif
    }
    if (!bad) return;
    fprintf(stderr, "[cudaemu] cuBLAS: %s (%d x %d, leading dimension %d) is not, or not all, in device memory\n",
            name, a.rows, a.columns, a.ld);
    abort();
}

// sum (m) = A (m,k, its columns one after the other) b (k)
__attribute__((optimize("O3"), no_sanitize("address", "undefined")))
static void emu_column(double *sum, float *partial, const float *A, const float *b, int m, int k) {
    for (int i = 0; i < m; i++) sum[i] = 0;
    for (int l = 0; l < k; l += 32) {
        for (int i = 0; i < m; i++) partial[i] = 0;
        for (int h = l; h < std::min(k, l + 32); h++) {
            const float *a = A + (size_t)h * (size_t)m, factor = b[h];
            for (int i = 0; i < m; i++) partial[i] += a[i] * factor;
        }
        for (int i = 0; i < m; i++) sum[i] += (double)partial[i];
    }
}

// C (m,n) = alpha op(A) op(B) + beta C + bias (m) in every column
__attribute__((optimize("O2"), no_sanitize("address", "undefined")))
static void emu_product(bool transA, bool transB, int m, int n, int k, float alpha, const void *A, cudaDataType_t typeA,
                        int lda, const void *B, cudaDataType_t typeB, int ldb, float beta, void *C, cudaDataType_t typeC,
                        int ldc, const void *bias) {
    if (emu::capturing) {
        emu::capturing->work.push_back([=] {
            emu_product(transA, transB, m, n, k, alpha, A, typeA, lda, B, typeB, ldb, beta, C, typeC, ldc, bias);
        });
        return;
    }
    std::vector<float> packed((size_t)m * (size_t)k), partial((size_t)m), b((size_t)k);
    std::vector<double> sum((size_t)m);
    emu::enter();
    emu_check_matrix("A", { A, typeA, transA ? k : m, transA ? m : k, lda });
    emu_check_matrix("B", { B, typeB, transB ? n : k, transB ? k : n, ldb });
    emu_check_matrix("C", { C, typeC, m, n, ldc });
    if (bias) emu_check_matrix("bias", { bias, typeC, m, 1, m });
    for (int l = 0; l < k; l++) for (int i = 0; i < m; i++) {
        size_t row = (size_t)(transA ? l : i), column = (size_t)(transA ? i : l);
        packed[(size_t)l * (size_t)m + (size_t)i] = emu_read(A, typeA, column * (size_t)lda + row);
    }
    for (int j = 0; j < n; j++) {
        for (int l = 0; l < k; l++) {
            b[(size_t)l] = emu_read(B, typeB, (size_t)(transB ? l : j) * (size_t)ldb + (size_t)(transB ? j : l));
        }
        emu_column(sum.data(), partial.data(), packed.data(), b.data(), m, k);
        for (int i = 0; i < m; i++) {
            size_t at = (size_t)j * (size_t)ldc + (size_t)i;
            float x = alpha * (float)sum[(size_t)i] + (beta == 0.0f ? 0.0f : beta * emu_read(C, typeC, at));
            if (bias) x += emu_read(bias, typeC, (size_t)i);
            if (typeC == CUDA_R_32F) ((float *)C)[at] = x;
            else ((__nv_bfloat16 *)C)[at] = __nv_bfloat16(x);
        }
    }
    emu::leave(true);
}

static inline cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t transA, cublasOperation_t transB, int m, int n,
        int k, const void *alpha, const void *A, cudaDataType_t typeA, int lda, const void *B, cudaDataType_t typeB, int ldb,
        const void *beta, void *C, cudaDataType_t typeC, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    if (typeA != typeB) return CUBLAS_STATUS_NOT_SUPPORTED;
    emu_product(transA, transB, m, n, k, *(const float *)alpha, A, typeA, lda, B, typeB, ldb, *(const float *)beta, C, typeC,
                ldc, nullptr);
    return CUBLAS_STATUS_SUCCESS;
}

// ---- cuBLASLt, as far as a product with a bias needs it
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
                                      CUBLASLT_MATMUL_DESC_EPILOGUE = 7, CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8 };
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8 };
struct EmuProduct { cublasOperation_t transA, transB; cublasLtEpilogue_t epilogue; const void *bias; };
struct EmuPreference { uint32_t aligned[4]; };
typedef void *cublasLtHandle_t;
typedef EmuProduct *cublasLtMatmulDesc_t;
typedef EmuMatrix *cublasLtMatrixLayout_t;
typedef EmuPreference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { int chosen; };   // 1 + the operations it was chosen for
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; };

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { *handle = nullptr; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *p, cublasComputeType_t, cudaDataType_t) {
    *p = new EmuProduct{ CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr };
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p, cublasLtMatmulDescAttributes_t what,
                                                            const void *value, size_t) {
    if (what == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&p->transA, value, sizeof p->transA);
    if (what == CUBLASLT_MATMUL_DESC_TRANSB) memcpy(&p->transB, value, sizeof p->transB);
    if (what == CUBLASLT_MATMUL_DESC_EPILOGUE) memcpy(&p->epilogue, value, sizeof p->epilogue);
    if (what == CUBLASLT_MATMUL_DESC_BIAS_POINTER) memcpy(&p->bias, value, sizeof p->bias);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *a, cudaDataType_t type, uint64_t rows,
                                                        uint64_t columns, int64_t ld) {
    *a = new EmuMatrix{ nullptr, type, (int)rows, (int)columns, (int)ld };
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t a) { delete a; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *wish) {
    *wish = new EmuPreference{ { 256, 256, 256, 256 } };
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t wish,
        cublasLtMatmulPreferenceAttributes_t what, const void *value, size_t) {
    if (what >= 5) memcpy(&wish->aligned[what - 5], value, sizeof wish->aligned[0]);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t wish) {
    delete wish;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t p, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t wish, int,
        cublasLtMatmulHeuristicResult_t *result, int *results) {
    *results = 1;
    for (int i = 0; i < 4; i++) if (wish->aligned[i] > 16) *results = 0;  // what the caller's pointers may not keep
    result->algo.chosen = 1 + p->transA + 2 * p->transB;
    return *results ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t p, const void *alpha, const void *A,
        cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *beta, const void *C,
        cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *algo, void *, size_t,
        cudaStream_t) {
    int k = p->transA ? a->rows : a->columns;
    bool fits = (p->transA ? a->columns : a->rows) == c->rows && (p->transB ? b->rows : b->columns) == c->columns
             && (p->transB ? b->columns : b->rows) == k && a->type == b->type && C == D
             && algo->chosen == 1 + p->transA + 2 * p->transB;
    if (!fits || ((uintptr_t)A | (uintptr_t)B | (uintptr_t)D | (uintptr_t)p->bias) % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    emu_product(p->transA, p->transB, c->rows, c->columns, k, *(const float *)alpha, A, a->type, a->ld, B, b->type, b->ld,
                *(const float *)beta, D, c->type, c->ld, p->epilogue == CUBLASLT_EPILOGUE_BIAS ? p->bias : nullptr);
    return CUBLAS_STATUS_SUCCESS;
}
#endif
