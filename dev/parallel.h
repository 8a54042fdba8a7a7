/* parallel.h - one training in several processes ("ranks"), each with its share of every batch. Header only, included by
   train_vivim.c, section 1. Without USE_MPI (and without VIVIM_TCP) there is one rank, and nothing here does anything.

   All ranks run the same program on the same files. Whatever decides how it goes on - losses, gradients, scores, a request to
   stop - is summed over the ranks first, in an order that does not depend on who comes first, so that every rank holds the
   same bits and decides alike. Rank 0 alone prints and writes.
     USE_MPI    mpirun starts the ranks; they talk through MPI
     VIVIM_TCP  torchrun, or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts them; they talk through
                rank 0, on the port after MASTER_PORT (torchrun itself uses that one). For train_vivim.cu, whose large sums
                take another way: here few bytes pass. */
#ifndef VIVIM_PARALLEL_H
#define VIVIM_PARALLEL_H

#if defined(USE_MPI)
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX  // Open MPI's and MPICH's C++ classes
#define MPICH_SKIP_MPICXX
#endif
#include <mpi.h>
#elif defined(VIVIM_TCP)
#include <netdb.h>
#include <sys/socket.h>
#endif

static struct {
    int rank, ranks;              // of this process; how many there are
    int local_rank, local_ranks;  // the same among those on this machine
    int started, through, ended;  // through: rank 0 has met nothing that it refuses
    int sockets[1024];            // VIVIM_TCP: rank 0's to every other; sockets[0] of the others to rank 0
} parallel = {0, 1, 0, 1, 0, 0, 0, {0}};

#if defined(USE_MPI)
#define PARALLEL_BUILD "it is built with MPI; start it with the mpirun of that MPI"
#elif defined(VIVIM_TCP)
#define PARALLEL_BUILD "it is built for torchrun; for mpirun, make it with USE_MPI=1"
#else
#define PARALLEL_BUILD "it is built for one process; make it with USE_MPI=1 and start it with mpirun"
#endif

enum { MAX_RANKS = sizeof parallel.sockets / sizeof parallel.sockets[0] };

#if defined(VIVIM_TCP) && !defined(USE_MPI)
static inline void tcp_move(int rank, void *data, size_t bytes, int sends) {
    for (char *p = (char *)data; bytes > 0;) {
        int s = parallel.sockets[rank];
        ssize_t n = sends ? send(s, p, bytes, MSG_NOSIGNAL) : recv(s, p, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) fail("process %d of %d has ended, so this one (%d) does", rank, parallel.ranks, parallel.rank);
        p += n, bytes -= (size_t)n;
    }
}

static inline int tcp_environment(const char *name, int low, int high) {
    const char *text = getenv(name); char *end = NULL;
    long value = text ? strtol(text, &end, 10) : -1;
    if (text == NULL || *text == '\0' || *end != '\0' || value < low || value > high)
        fail("%s is %s in the environment; torchrun sets it to a number from %d to %d", name, text ? text : "not", low, high);
    return (int)value;
}

// Rank 0 takes a connection of every other; they try for a minute, for it may start last
static inline void tcp_connect(void) {
    const char *address = getenv("MASTER_ADDR"), *why = "nobody listens"; char port[16];
    struct addrinfo hints, *found = NULL; int rank = parallel.rank, on = 1, s = -1;
    if (address == NULL) fail("MASTER_ADDR is not in the environment; torchrun sets it to the address of rank 0's machine");
    snprintf(port, sizeof port, "%d", tcp_environment("MASTER_PORT", 1, 65534) + 1);
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM, hints.ai_flags = rank == 0 ? AI_PASSIVE : 0;
    int error = getaddrinfo(rank == 0 ? NULL : address, port, &hints, &found);
    if (error) fail("MASTER_ADDR %s, port %s: %s", address, port, gai_strerror(error));
    for (int tries = 0; tries < (rank == 0 ? 1 : 600) && s < 0; tries++) {
        if (tries) usleep(100000);
        for (struct addrinfo *a = found; a && s < 0; a = a->ai_next) {
            s = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
            if (s < 0) continue;
            if (rank == 0) setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            if (rank == 0 ? bind(s, a->ai_addr, a->ai_addrlen) || listen(s, MAX_RANKS) : connect(s, a->ai_addr, a->ai_addrlen))
                why = strerror(errno), close(s), s = -1;
        }
    }
    freeaddrinfo(found);
    if (s < 0) fail("%s, port %s: cannot %s: %s", address, port, rank == 0 ? "listen" : "connect to rank 0", why);
    parallel.sockets[0] = s;
    if (rank > 0) tcp_move(0, &rank, sizeof rank, 1);
    for (int i = 1; i < parallel.ranks && parallel.rank == 0; i++) {
        int other = 0, c;
        do c = accept(s, NULL, NULL); while (c < 0 && errno == EINTR);
        if (c < 0) fail("port %s: cannot accept: %s", port, strerror(errno));
        if (recv(c, &other, sizeof other, MSG_WAITALL) != sizeof other || other < 1 || other >= parallel.ranks ||
            parallel.sockets[other])
            fail("port %s: a stranger has connected; choose another MASTER_PORT", port);
        parallel.sockets[other] = c;
    }
    if (rank == 0) close(s);
}
#endif

// all (ranks, bytes) = what each rank has; also a barrier
static inline void parallel_gather(void *all, const void *mine, size_t bytes) {
    memcpy((char *)all + bytes * (size_t)parallel.rank, mine, bytes);
    if (parallel.ranks == 1) return;
#if defined(USE_MPI)
    MPI_Allgather(MPI_IN_PLACE, 0, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD);
#elif defined(VIVIM_TCP)
    int others = parallel.rank == 0 ? parallel.ranks : 1; char *rows = (char *)all;
    if (parallel.rank > 0) tcp_move(0, rows + bytes * (size_t)parallel.rank, bytes, 1);
    for (int r = 1; r < others; r++) tcp_move(r, rows + bytes * (size_t)r, bytes, 0);
    for (int r = 1; r < others; r++) tcp_move(r, rows, bytes * (size_t)parallel.ranks, 1);
    if (parallel.rank > 0) tcp_move(0, rows, bytes * (size_t)parallel.ranks, 0);
#endif
}

static inline void parallel_barrier(void) {
    char all[MAX_RANKS], mine = 0;
    parallel_gather(all, &mine, 1);
}

// What is wrong for all ranks at the same moment: rank 0 says it, and by that ends the others
static inline void parallel_leave_it_to_rank_0(void) {
    if (parallel.rank > 0) parallel_barrier();
}

// x (n) = its sum over the ranks, in their order: the same bits for all
static inline void parallel_sum(double *x, int n) {
    if (parallel.ranks == 1) return;
    double *all = (double *)malloc(sizeof(double) * (size_t)n * (size_t)parallel.ranks);
    if (all == NULL) fail("out of memory");
    parallel_gather(all, x, sizeof(double) * (size_t)n);
    for (int i = 0; i < n; i++) {
        x[i] = all[i];
        for (int r = 1; r < parallel.ranks; r++) x[i] += all[(size_t)r * n + i];
    }
    free(all);
}

// Is it so for any rank?
static inline int parallel_any(int yes) {
    double count = yes != 0;
    parallel_sum(&count, 1);
    return count > 0;
}

// Ends all if the ranks' bytes are not the same: then they are not one training any more
static inline void parallel_check_same(const void *data, size_t bytes) {
    uint64_t hash = 1469598103934665603u, all[MAX_RANKS]; const unsigned char *p = (const unsigned char *)data;
    if (parallel.ranks == 1) return;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ p[i]) * 1099511628211u;  // FNV-1a
    parallel_gather(all, &hash, sizeof hash);
    for (int r = 1; r < parallel.ranks; r++)
        if (all[r] != all[0])
            parallel_leave_it_to_rank_0(), fail("the weights of processes 0 and %d have become different; start all with the "
                                                "same options and files, on the same kind of processor", r);
}

// x (n) = its sum over the ranks, for many floats. Of every block each rank gets one piece from all, sums it, gives it to all.
static inline void sum_over_ranks(float *x, size_t n) {
    size_t ranks = (size_t)parallel.ranks, piece = (n + ranks - 1) / ranks;
    if (ranks == 1 || n == 0) return;
    if (piece > 65536) piece = 65536;
    float *block = (float *)malloc(sizeof(float) * 2 * ranks * piece), *parts = block + ranks * piece;
    if (block == NULL) fail("out of memory");
    for (size_t done = 0; done < n; done += ranks * piece) {
        size_t count = n - done < ranks * piece ? n - done : ranks * piece;
        memcpy(block, x + done, sizeof(float) * count);
        memset(block + count, 0, sizeof(float) * (ranks * piece - count));
#if defined(USE_MPI)
        int bytes = (int)(piece * sizeof(float));
        MPI_Alltoall(block, bytes, MPI_BYTE, parts, bytes, MPI_BYTE, MPI_COMM_WORLD);
#else  // only tests come here: all send all
        for (size_t r = 0; r < ranks; r++) {
            float *all = (float *)malloc(sizeof(float) * ranks * piece);
            if (all == NULL) fail("out of memory");
            parallel_gather(all, block + r * piece, sizeof(float) * piece);
            if ((int)r == parallel.rank) memcpy(parts, all, sizeof(float) * ranks * piece);
            free(all);
        }
#endif
        for (size_t r = 1; r < ranks; r++)
            for (size_t i = 0; i < piece; i++) parts[i] += parts[r * piece + i];
        parallel_gather(block, parts, sizeof(float) * piece);
        memcpy(x + done, block, sizeof(float) * count);
    }
    free(block);
}

// How many clips of a batch are this rank's: from number rank * share on
static inline int parallel_share(int batch) {
    int ranks = parallel.ranks;
    if (batch % ranks) fail("--batch %d: %d processes cannot share it equally; use a multiple of %d", batch, ranks, ranks);
    if (ranks > 1) printf("%d processes: each takes %d of a batch's %d clips\n", ranks, batch / ranks, batch);
    return batch / ranks;
}

// At exit: whoever leaves before the others do - fail() has said why - ends them, too
static inline void parallel_abort(void) {
#ifdef USE_MPI
    if (!parallel.ended) parallel.ended = 1, MPI_Abort(MPI_COMM_WORLD, 1);
#endif
}

// Rank 0 is through with all that a user may have got wrong. The others began to wait for that in parallel_start: so what is
// wrong for all is told once, and they do the same after it.
static inline void parallel_through(void) {
    if (parallel.rank == 0 && !parallel.through) parallel_barrier();
    parallel.through = 1;
}

// Finds out who and how many we are. Only rank 0 prints from now on; but all of them may fail.
static inline void parallel_start(int *argc, char ***argv) {
    char name[256] = "";
    (void)argc; (void)argv;
    if (parallel.started++) return;
#if defined(USE_MPI)
    int level;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &parallel.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &parallel.ranks);
    atexit(parallel_abort);
#elif defined(VIVIM_TCP)
    if (getenv("WORLD_SIZE")) parallel.ranks = tcp_environment("WORLD_SIZE", 1, MAX_RANKS);
    if (parallel.ranks > 1) parallel.rank = tcp_environment("RANK", 0, parallel.ranks - 1), tcp_connect();
#endif
    // started as one of several by something that this build does not listen to: each would train on its own, in the same --out
    static const char *const COUNTS[] = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 4 && parallel.ranks == 1; i++)
        if (getenv(COUNTS[i]) && atoi(getenv(COUNTS[i])) > 1)
            fail("%s=%s says that there are more processes, but this one knows of none: " PARALLEL_BUILD, COUNTS[i],
                 getenv(COUNTS[i]));
    if (parallel.ranks > MAX_RANKS) fail("%d processes are too many, %d the most", parallel.ranks, (int)MAX_RANKS);
    if (parallel.ranks == 1) return;
    if (parallel.rank > 0 && freopen("/dev/null", "w", stdout) == NULL) fail("/dev/null: %s", strerror(errno));
    char *names = (char *)malloc(sizeof name * (size_t)parallel.ranks);
    if (names == NULL) fail("out of memory");
    gethostname(name, sizeof name - 1);
    parallel_gather(names, name, sizeof name);
    parallel.local_ranks = 0;
    for (int r = 0; r < parallel.ranks; r++) {
        if (strcmp(names + sizeof name * (size_t)r, name) != 0) continue;
        if (r < parallel.rank) parallel.local_rank++;
        parallel.local_ranks++;
    }
    free(names);
    if (parallel.rank > 0) parallel_barrier();
}

// The last thing that every rank does
static inline void parallel_end(void) {
    parallel_through();
    parallel.ended = 1;
    fflush(stdout);
#ifdef USE_MPI
    MPI_Finalize();
#endif
}

#endif
