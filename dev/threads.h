/* threads.h - how the threads of a program wait for each other, and how many there are. Header only.

   Included by train_vivim.c. start_process is what a main does first, threads_wanted says how many threads there shall be, and
   threads_watch, called after each piece of work, takes some away while other programs want their cores. */
#ifndef VIVIM_THREADS_H
#define VIVIM_THREADS_H
#include <dirent.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

// How threads wait and malloc keeps memory
static void start_process(char **argv) {
#if defined(_OPENMP) && defined(__linux__)
    // Threads that wait for each other spin by default for many milliseconds. On a machine that others use too, the one
    // waited for then gets no core: 20 times slower beside two busy programs. To sleep at once costs up to 30 % on a quiet
    // machine, to sleep after 0.1 ms 7 - 17 %. So: half a millisecond, less than a time slice. OpenMP reads this at start
    // only, hence the program starts again.
    if (!getenv("OMP_WAIT_POLICY") && !getenv("GOMP_SPINCOUNT") && !getenv("KMP_BLOCKTIME")) {
        setenv("GOMP_SPINCOUNT", "50000", 1);  // gcc's, in turns of a loop
        setenv("KMP_BLOCKTIME", "1", 1);       // clang's, in milliseconds
        execv("/proc/self/exe", argv);         // returns only if it failed: then go on as we are
    }
#endif
    (void)argv;
#ifdef __GLIBC__
    // Layers take and give back workspace at every call: let malloc reuse it instead of returning it to the system, which
    // would clear the pages each time.
    mallopt(M_MMAP_MAX, 0); mallopt(M_TRIM_THRESHOLD, -1);
#endif
}

// A thread that shares its core with another program is late at every barrier, and all wait for it: with 2 threads beside one
// busy program, training took 5 times as long as alone, with 1 thread 1.7 times. And no result depends on their number. So:
// Linux counts how long threads that could run had no core. Is that more than a third of the time, so many threads are too
// many; after some quiet seconds one more is tried again, after more of them each time that it was wrong.
typedef struct {
    int most;               // threads when the machine is ours
    int quiet, patience;    // measurements without too many threads so far; that it takes to try one more
} Crowding;

// how many threads come next; waiting: seconds without a core of all threads, for each second of work
static int threads_next(Crowding *c, int threads, double waiting) {
    if (waiting > 1.0 / 3) {
        if (threads > 1) c->patience = c->quiet < 2 ? min_int(2 * c->patience, 256) : 8;
        c->quiet = 0;
        return max_int(threads - max_int((int)(waiting + 0.5), 1), 1);
    }
    if (++c->quiet < c->patience || threads == c->most) return threads;
    c->quiet = 0;
    return threads + 1;
}

// seconds that threads of this process could have run and had no core, so far; -1: not to be known here
static double threads_waited(void) {
    double ns = -1; struct dirent *entry; DIR *tasks = opendir("/proc/self/task");
    while (tasks && (entry = readdir(tasks)) != NULL) {
        char path[300]; double ran, waited; FILE *file;
        snprintf(path, sizeof path, "/proc/self/task/%s/schedstat", entry->d_name);
        if (entry->d_name[0] == '.' || (file = fopen(path, "r")) == NULL) continue;
        if (fscanf(file, "%lf %lf", &ran, &waited) == 2) ns = (ns > 0 ? ns : 0) + waited;
        fclose(file);
    }
    if (tasks) closedir(tasks);
    return ns < 0 ? -1 : 1e-9 * ns;
}

static struct {
    Crowding crowding;     // most 0: the number of threads is not to be changed
    double start, waited;  // of this measurement: when it began, threads_waited then
} threads_now;

static void set_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    (void)threads;
}

static void threads_wanted(int threads) {  // 0: as many as OpenMP chooses, fewer while others want the cores
    if (threads) set_threads(threads);
    threads_now.crowding.most = threads ? 0 : max_threads(), threads_now.crowding.patience = 8;
    threads_now.start = seconds(), threads_now.waited = threads_waited();
}

static void threads_watch(void) {  // after each piece of work
    double work = seconds() - threads_now.start;
    if (!threads_now.crowding.most || threads_now.waited < 0 || work < 0.25) return;  // some dozens of time slices
    double waiting = (threads_waited() - threads_now.waited) / work;
    set_threads(threads_next(&threads_now.crowding, max_threads(), waiting));
    threads_now.start = seconds(), threads_now.waited = threads_waited();
}

#endif
