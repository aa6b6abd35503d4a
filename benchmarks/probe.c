/* What the machine gives at this very moment: read bandwidth and the peak of 8-bit dot products.
 *
 * Reading: one stream a thread from memory in huge pages, four 64-byte loads folded by xor for each
 * 256 bytes, no software prefetch (it slows even this loop, and so do several streams a thread).
 * Peak: vpdpbusd on registers alone, 16 independent sums (8 suffice to hide its latency).
 * Threads are started first and wait at a gate, so that their start is not timed.
 *
 * Compiled when it is used: cc -O3 -march=native -shared -fPIC -pthread probe.c
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { most_threads = 256, huge_page = 2 << 20 };

typedef struct {
    int threads;
    atomic_int waiting;
    const uint8_t *bytes; /* null: peak */
    size_t size;          /* bytes to read in all, or rounds of the register loop of each thread */
    int floats;           /* of that loop */
} Job;

typedef struct {
    Job *job;
    int index;
    double start, end;
    uint64_t result; /* kept, so that the work is */
} Share;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static uint64_t read_all(const uint8_t *bytes, size_t size) {
    uint64_t folded[8] = {0};
#ifdef __AVX512F__
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t at = 0; at + 256 <= size; at += 256) {
        a = _mm512_xor_si512(a, _mm512_load_si512(bytes + at));
        b = _mm512_xor_si512(b, _mm512_load_si512(bytes + at + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(bytes + at + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(bytes + at + 192));
    }
    _mm512_storeu_si512(folded, _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
#else
    __m128i sums[8] = {0};
    for (size_t at = 0; at + 128 <= size; at += 128)
        for (int i = 0; i < 8; i++)
            sums[i] = _mm_xor_si128(sums[i], _mm_load_si128((const __m128i *)(bytes + at) + i));
    for (int i = 1; i < 8; i++) sums[0] = _mm_xor_si128(sums[0], sums[i]);
    _mm_storeu_si128((__m128i *)folded, sums[0]);
#endif
    for (int i = 1; i < 8; i++) folded[0] ^= folded[i];
    return folded[0];
}

/* 16 dot products a round; returns something that depends on all of them. */
static uint64_t multiply(size_t rounds) {
#ifdef __AVX512VNNI__
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
    __m512i t0 = a, t1 = a, t2 = a, t3 = a, t4 = a, t5 = a, t6 = a, t7 = a;
    /* As text: the compiler copies the sums of the intrinsic around. */
#define DOT(sum) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
    for (size_t i = 0; i < rounds; i++) {
        DOT(s0); DOT(s1); DOT(s2); DOT(s3); DOT(s4); DOT(s5); DOT(s6); DOT(s7);
        DOT(t0); DOT(t1); DOT(t2); DOT(t3); DOT(t4); DOT(t5); DOT(t6); DOT(t7);
    }
    s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));
    s4 = _mm512_xor_si512(_mm512_xor_si512(s4, s5), _mm512_xor_si512(s6, s7));
    t0 = _mm512_xor_si512(_mm512_xor_si512(t0, t1), _mm512_xor_si512(t2, t3));
    t4 = _mm512_xor_si512(_mm512_xor_si512(t4, t5), _mm512_xor_si512(t6, t7));
    s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s4), _mm512_xor_si512(t0, t4));
    return (uint64_t)_mm512_reduce_add_epi64(s0);
#else
    return rounds;
#endif
}

/* 12 float multiply-adds a round, of whole vectors; returns something that depends on all of them. */
static uint64_t multiply_floats(size_t rounds) {
#if defined(__AVX512F__)
    typedef __m512 Vector;
#elif defined(__FMA__)
    typedef __m256 Vector;
#endif
#if defined(__FMA__)
    Vector s0 = {1}, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0, sa = s0, sb = s0;
    const Vector half = {0.5f};
#define FMA(sum) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(half))
    for (size_t i = 0; i < rounds; i++) {
        FMA(s0); FMA(s1); FMA(s2); FMA(s3); FMA(s4); FMA(s5);
        FMA(s6); FMA(s7); FMA(s8); FMA(s9); FMA(sa); FMA(sb);
    }
    s0 += s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + sa + sb;
    return (uint64_t)s0[0];
#else
    return rounds;
#endif
}

static void *work(void *argument) {
    Share *share = argument;
    Job *job = share->job;
    atomic_fetch_sub(&job->waiting, 1);
    while (atomic_load(&job->waiting) > 0) _mm_pause();
    share->start = now();
    if (job->bytes) {
        size_t part = job->size / (size_t)job->threads / 4096 * 4096;
        share->result = read_all(job->bytes + part * (size_t)share->index, part);
    } else {
        share->result = job->floats ? multiply_floats(job->size) : multiply(job->size);
    }
    share->end = now();
    return NULL;
}

/* Seconds from the opening of the gate to the end of the last thread; negative on failure. */
static double run(Job *job) {
    pthread_t thread[most_threads];
    static Share share[most_threads];
    if (job->threads < 1 || job->threads > most_threads) return -1;
    atomic_store(&job->waiting, job->threads);
    for (int i = 0; i < job->threads; i++) share[i] = (Share){job, i, 0, 0, 0};
    for (int i = 1; i < job->threads; i++)
        if (pthread_create(&thread[i], NULL, work, &share[i])) return -1;
    work(&share[0]);
    double start = share[0].start, end = share[0].end;
    for (int i = 1; i < job->threads; i++) {
        pthread_join(thread[i], NULL);
        if (share[i].start < start) start = share[i].start;
        if (share[i].end > end) end = share[i].end;
    }
    return end - start;
}

/* Memory in huge pages where they are granted, touched; null where there is none. */
void *probe_memory(size_t size) {
    uint8_t *raw = mmap(NULL, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    uint8_t *bytes = (uint8_t *)(((uintptr_t)raw + huge_page - 1) / huge_page * huge_page);
    madvise(bytes, size, MADV_HUGEPAGE);
    memset(bytes, 1, size);
    return bytes;
}

double probe_read(const void *bytes, size_t size, int threads) {
    Job job = {.threads = threads, .bytes = bytes, .size = size};
    return run(&job);
}

/* Seconds for `rounds` of 16 products of 64 bytes (2048 operations) on each thread. */
double probe_multiply(size_t rounds, int threads) {
    Job job = {.threads = threads, .size = rounds};
    return run(&job);
}

/* Seconds for `rounds` of 12 multiply-adds of vectors on each thread. */
double probe_multiply_floats(size_t rounds, int threads) {
    Job job = {.threads = threads, .size = rounds, .floats = 1};
    return run(&job);
}

/* Floats of a vector; 0 where there are no fused multiply-adds. */
int probe_floats(void) {
#if defined(__AVX512F__)
    return 16;
#elif defined(__FMA__)
    return 8;
#else
    return 0;
#endif
}

int probe_has_dot_products(void) {
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}
