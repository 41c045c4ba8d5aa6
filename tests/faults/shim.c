/* A disk and a clock that fail as told, for one process: LD_PRELOAD puts these functions before the C library's.
 * Files below FAULTS_BELOW are concerned, and CLOCK_REALTIME. Not seen: system calls made without the C library
 * (rustix makes such for CLOCK_BOOTTIME), and writes through mappings.
 *
 * FAULTS_CONTROL names a file of 64-bit integers, shared with the suite (tests/src/faults/shim.rs has the same order).
 * FAULTS_UNDO names a file that gets, before each write, what it overwrites, and a mark at each good fsync: with it the
 * suite takes back what a power cut would have lost.
 * FAULTS_SENSORS names a folder of what the kernel is to say: proc_pressure_memory in the place of /proc/pressure/memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    CLOCK_OFFSET_S,
    FSYNC_FAILS, /* percent; EIO */
    WRITE_FAILS, /* percent */
    WRITE_ERRNO,
    WRITE_SHORT, /* percent: a part is written, and said so */
    WRITE_TORN,  /* percent: a part is written, and the process is gone */
    INJECTED,    /* counters, from here to the suite */
    CLOCK_READS,
    DISK_CALLS,
    SYNCS,       /* good ones */
    FIELDS = 16
};

static int64_t nothing[FIELDS];
static volatile int64_t *control = nothing;
static int undo = -1;
static const char *below;
static size_t below_length;
static const char *sensors;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *map = mmap(NULL, sizeof nothing, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED)
            control = map;
        close(fd);
    }
    path = getenv("FAULTS_UNDO");
    if (path)
        undo = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    below = getenv("FAULTS_BELOW");
    below_length = below ? strlen(below) : 0;
    sensors = getenv("FAULTS_SENSORS");
}

static int opened(const char *path, int flags, mode_t mode) {
    char other[PATH_MAX];
    if (sensors && (strncmp(path, "/proc/", 6) == 0 || strncmp(path, "/sys/", 5) == 0)) {
        int begin = snprintf(other, sizeof other, "%s/", sensors);
        snprintf(other + begin, sizeof other - begin, "%s", path + 1);
        for (char *c = other + begin; *c; c++)
            if (*c == '/')
                *c = '_';
        if (access(other, R_OK) == 0)
            path = other;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return opened(path, flags, mode);                                                                              \
    }

OPEN(open)
OPEN(open64)

static int concerned(int fd) {
    char link[32], path[PATH_MAX];
    if (!below_length)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    if (length < (ssize_t)below_length || memcmp(path, below, below_length) != 0)
        return 0;
    __atomic_fetch_add(&control[DISK_CALLS], 1, __ATOMIC_RELAXED);
    return 1;
}

static int happens(int field) {
    static __thread uint64_t state;
    int64_t percent = control[field];
    if (percent <= 0)
        return 0;
    if (!state)
        state = (uint64_t)getpid() * 0x9e3779b97f4a7c15ull | 1;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    if ((int64_t)(state % 100) >= percent)
        return 0;
    __atomic_fetch_add(&control[INJECTED], 1, __ATOMIC_RELAXED);
    return 1;
}

/* kind, inode, offset, length, old length of what is there, old size of the file; then what is there. */
static void remember(int64_t kind, int fd, off_t offset, size_t length) {
    struct stat stat;
    if (undo < 0 || fstat(fd, &stat) != 0)
        return;
    char *old = length ? malloc(length) : NULL;
    ssize_t there = old ? syscall(SYS_pread64, fd, old, length, offset) : 0;
    if (there < 0)
        there = 0;
    int64_t head[6] = {kind, (int64_t)stat.st_ino, offset, (int64_t)length, there, stat.st_size};
    struct iovec parts[2] = {{head, sizeof head}, {old, (size_t)there}};
    syscall(SYS_writev, undo, parts, there ? 2 : 1);
    free(old);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* What becomes of a write of `length` bytes: all of it, a part, or none (then errno is set and 0 is returned). */
static size_t fate(size_t length, int *torn) {
    if (happens(WRITE_FAILS)) {
        errno = (int)control[WRITE_ERRNO];
        return 0;
    }
    *torn = happens(WRITE_TORN);
    if (*torn || (length > 1 && happens(WRITE_SHORT)))
        return (length + 1) / 2;
    return length;
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
    int torn = 0;
    if (length && concerned(fd)) {
        length = fate(length, &torn);
        if (!length)
            return -1;
        remember(1, fd, offset, length);
    }
    ssize_t written = syscall(SYS_pwrite64, fd, bytes, length, offset);
    if (torn)
        kill(getpid(), SIGKILL);
    return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    return pwrite64(fd, bytes, length, offset);
}

ssize_t write(int fd, const void *bytes, size_t length) {
    int torn = 0;
    if (length && concerned(fd)) {
        length = fate(length, &torn);
        if (!length)
            return -1;
        int append = fcntl(fd, F_GETFL) & O_APPEND;
        remember(1, fd, lseek(fd, 0, append ? SEEK_END : SEEK_CUR), length);
    }
    ssize_t written = syscall(SYS_write, fd, bytes, length);
    if (torn)
        kill(getpid(), SIGKILL);
    return written;
}

static int synced(int fd, long call) {
    int mine = concerned(fd);
    if (mine && happens(FSYNC_FAILS)) {
        errno = EIO;
        return -1;
    }
    int result = (int)syscall(call, fd);
    if (mine && result == 0) {
        __atomic_fetch_add(&control[SYNCS], 1, __ATOMIC_RELAXED);
        remember(2, fd, 0, 0);
    }
    return result;
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int ftruncate64(int fd, off64_t length) {
    if (concerned(fd)) {
        struct stat stat;
        int shorter = fstat(fd, &stat) == 0 && stat.st_size > length;
        /* What is cut off comes back, too. */
        remember(3, fd, length, shorter ? (size_t)(stat.st_size - length) : 0);
        if (!shorter && happens(WRITE_FAILS)) {
            errno = (int)control[WRITE_ERRNO];
            return -1;
        }
    }
    return (int)syscall(SYS_ftruncate, fd, length);
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = NEXT(clock_gettime);
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) {
        __atomic_fetch_add(&control[CLOCK_READS], 1, __ATOMIC_RELAXED);
        now->tv_sec += control[CLOCK_OFFSET_S];
    }
    return result;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into)
        *into = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict into, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}
