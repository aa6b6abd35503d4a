/* Breaks a run off at its n-th change of a directory, and turns the clock: a library put before libc.
 *
 * Counted are the calls that change files below a chosen prefix: opening to write, writing, syncing, renaming,
 * making and removing. The chosen one is carried out or not, then the process is killed, or the call fails with a
 * chosen error (and, where the disk is to stay full, so does every later one that would take room). What is counted
 * is what the C library is asked for: from Python, torch and the Rust of safetensors and tokenizers alike.
 *
 * Compiled when it is used: cc -O2 -shared -fPIC faults.c -ldl; loaded by LD_PRELOAD.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { count_only, kill_before, kill_within, kill_after, fail_once, fail_from_then_on };

static char prefix[4096];
static long counted, chosen;
static int action, error_number;
static uint64_t clock_state;

/* Begin to count below `path`; 0 as `at` counts only. */
void faults_arm(const char *path, long at, int what, int error) {
    snprintf(prefix, sizeof prefix, "%s", path);
    counted = 0;
    chosen = at;
    action = what;
    error_number = error;
}

long faults_count(void) { return counted; }

/* Let every reading of the wall clock jump by up to ten years either way; 0 sets it right. */
void faults_clock(uint64_t seed) { clock_state = seed; }

static int below(int directory, const char *path) {
    char full[8192];
    if (!prefix[0]) return 0;
    if (path && path[0] == '/') return strncmp(path, prefix, strlen(prefix)) == 0;
    char link[64];
    snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
    const ssize_t length = readlink(link, full, 4096);
    if (length < 0) return 0;
    snprintf(full + length, sizeof full - (size_t)length, path ? "/%s" : "", path);
    return strncmp(full, prefix, strlen(prefix)) == 0;
}

/* What is to become of a call: 0 go on, 1 go on and then be killed, -1 fail (errno is set). */
static int step(int takes_room, int writes) {
    if (++counted < chosen || !chosen || action == count_only) return 0;
    if (counted > chosen) {
        if (action != fail_from_then_on || !takes_room) return 0;
        errno = error_number;
        return -1;
    }
    if (action == kill_before || (action == kill_within && !writes)) raise(SIGKILL);
    if (action == kill_within || action == kill_after) return 1;
    errno = error_number;
    return -1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)
#define RUN(inside, takes_room, failure, call) \
    do { \
        const int fate = (inside) ? step(takes_room, 0) : 0; \
        if (fate < 0) return failure; \
        const __typeof__(call) result = call; \
        if (fate > 0) raise(SIGKILL); \
        return result; \
    } while (0)

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        const mode_t mode = (mode_t)va_arg(rest, int); \
        va_end(rest); \
        REAL(int, #name, const char *, int, ...); \
        RUN((flags & O_ACCMODE) != O_RDONLY && below(AT_FDCWD, path), 1, -1, real(path, flags, mode)); \
    }
OPENS(open)
OPENS(open64)
#define OPENS_AT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        const mode_t mode = (mode_t)va_arg(rest, int); \
        va_end(rest); \
        REAL(int, #name, int, const char *, int, ...); \
        RUN((flags & O_ACCMODE) != O_RDONLY && below(directory, path), 1, -1, \
            real(directory, path, flags, mode)); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

/* A write that is to be killed within itself has put half of its bytes down. */
#define WRITES(name, parameters, half, whole, ...) \
    ssize_t name parameters { \
        REAL(ssize_t, #name, __VA_ARGS__); \
        const int fate = below(file, NULL) ? step(1, 1) : 0; \
        if (fate < 0) return -1; \
        if (fate > 0 && action == kill_within) { \
            half; \
            raise(SIGKILL); \
        } \
        const ssize_t result = whole; \
        if (fate > 0) raise(SIGKILL); \
        return result; \
    }
WRITES(write, (int file, const void *data, size_t size), real(file, data, size / 2), real(file, data, size),
       int, const void *, size_t)
WRITES(pwrite, (int file, const void *data, size_t size, off_t at), real(file, data, size / 2, at),
       real(file, data, size, at), int, const void *, size_t, off_t)
WRITES(pwrite64, (int file, const void *data, size_t size, off64_t at), real(file, data, size / 2, at),
       real(file, data, size, at), int, const void *, size_t, off64_t)
WRITES(writev, (int file, const struct iovec *parts, int count), real(file, parts, count / 2),
       real(file, parts, count), int, const struct iovec *, int)
WRITES(pwritev, (int file, const struct iovec *parts, int count, off_t at), real(file, parts, count / 2, at),
       real(file, parts, count, at), int, const struct iovec *, int, off_t)
WRITES(pwritev64, (int file, const struct iovec *parts, int count, off64_t at),
       real(file, parts, count / 2, at), real(file, parts, count, at), int, const struct iovec *, int, off64_t)
WRITES(pwritev64v2, (int file, const struct iovec *parts, int count, off64_t at, int flags),
       real(file, parts, count / 2, at, flags), real(file, parts, count, at, flags), int, const struct iovec *, int,
       off64_t, int)
WRITES(sendfile64, (int file, int from, off64_t *at, size_t size), real(file, from, at, size / 2),
       real(file, from, at, size), int, int, off64_t *, size_t)

#define CHANGES(name, takes_room, parameters, inside, call, ...) \
    int name parameters { \
        REAL(int, #name, __VA_ARGS__); \
        RUN(inside, takes_room, -1, call); \
    }
CHANGES(fsync, 1, (int file), below(file, NULL), real(file), int)
CHANGES(fdatasync, 1, (int file), below(file, NULL), real(file), int)
CHANGES(ftruncate64, 1, (int file, off64_t size), below(file, NULL), real(file, size), int, off64_t)
CHANGES(rename, 0, (const char *from, const char *to), below(AT_FDCWD, to), real(from, to), const char *,
        const char *)
CHANGES(mkdir, 1, (const char *path, mode_t mode), below(AT_FDCWD, path), real(path, mode), const char *, mode_t)
CHANGES(unlink, 0, (const char *path), below(AT_FDCWD, path), real(path), const char *)
CHANGES(rmdir, 0, (const char *path), below(AT_FDCWD, path), real(path), const char *)
CHANGES(unlinkat, 0, (int directory, const char *path, int flags), below(directory, path),
        real(directory, path, flags), int, const char *, int)

static time_t jump(void) {
    clock_state = clock_state * 6364136223846793005u + 1442695040888963407u;
    return (time_t)((clock_state >> 33) % 631152000u) - 315576000;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    const int result = real(clock, now);
    if (!result && clock_state && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    const int result = real(now, zone);
    if (!result && clock_state) now->tv_sec += jump();
    return result;
}
