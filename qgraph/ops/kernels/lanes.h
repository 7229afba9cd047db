// Sixteen values at a time, in as many registers as the processor takes for them, and sums over many of them.
//
// Sums run in sixteen lanes, a lane in float over at most 4096 / 16 values and from there in double: their order, and so
// every bit of a result, depends neither on the processor nor on the number of threads.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 16, CHUNK = 4096;
constexpr float TINY = 1.17549435e-38f;  // the smallest normal float
constexpr float SHIFT = 12582912.0f;     // 1.5 * 2^23: adding and subtracting it rounds half to even, up to 2^22
constexpr uint32_t INFINITE = 0x7f800000u;

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define INLINE inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))
#define LAMBDA __attribute__((always_inline))

typedef float F __attribute__((vector_size(WIDTH)));
typedef uint32_t U __attribute__((vector_size(WIDTH)));
typedef uint16_t H __attribute__((vector_size(WIDTH / 2)));

struct Bf16 { uint16_t bits; };

// Sixteen lanes in as many registers as the processor takes for them.
constexpr int PARTS = 64 / WIDTH, EACH_PART = LANES / PARTS;
struct V { F part[PARTS]; };
#define EACH _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; k++)
#define BOTH(op) \
    INLINE V operator op(V a, V b) { EACH a.part[k] = a.part[k] op b.part[k]; return a; } \
    INLINE V operator op(V a, float b) { EACH a.part[k] = a.part[k] op b; return a; }
BOTH(+) BOTH(-) BOTH(*) BOTH(/)
INLINE void operator+=(V& a, V b) { a = a + b; }
INLINE V all(float value) { V v; EACH v.part[k] = F{} + value; return v; }
INLINE V magnitude(V v) { EACH v.part[k] = (F)((U)v.part[k] & 0x7fffffffu); return v; }
INLINE V least(V a, V b) { EACH a.part[k] = a.part[k] < b.part[k] ? a.part[k] : b.part[k]; return a; }
INLINE V largest(V a, V b) { EACH a.part[k] = a.part[k] > b.part[k] ? a.part[k] : b.part[k]; return a; }
INLINE V rounded(V v) { return (v + SHIFT) - SHIFT; }

#if defined(__AVX512F__)
#define FUSED 1
INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
#define FUSED 1
INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

// Divides by one number many times. Where there is a fused multiply-add, a quotient by the reciprocal is put right twice by
// what it leaves, which gives the correctly rounded one (Markstein 1990; not where something over- or underflows) in a
// fraction of the time of a division.
struct Divisor {
    float value, inverse;
    bool quick;
    explicit Divisor(float by) : value(by), inverse(1 / by), quick(by > 0x1p-60f && by < 0x1p60f) {}
};
INLINE V operator/(V a, const Divisor& by) {
#ifdef FUSED
    if (by.quick) {
        EACH {
            F q = a.part[k] * by.inverse, minus = F{} - by.value, inverse = F{} + by.inverse;
            q = fused(fused(q, minus, a.part[k]), inverse, q);
            a.part[k] = fused(fused(q, minus, a.part[k]), inverse, q);
        }
        return a;
    }
#endif
    return a / by.value;
}

INLINE V load(const float* p) { V v; EACH memcpy(&v.part[k], p + k * EACH_PART, sizeof(F)); return v; }
INLINE V load(const Bf16* p) {
    V v;
    EACH {
        H half; memcpy(&half, p + k * EACH_PART, sizeof half);
        v.part[k] = (F)(__builtin_convertvector(half, U) << 16);
    }
    return v;
}
INLINE float single(float value) { return value; }
INLINE float single(Bf16 value) { uint32_t bits = (uint32_t)value.bits << 16; float f; memcpy(&f, &bits, sizeof f); return f; }
INLINE void store(float* p, V v) { EACH memcpy(p + k * EACH_PART, &v.part[k], sizeof(F)); }
INLINE void store(Bf16* p, V v) {
    EACH {
        U bits = (U)v.part[k], up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        H half = __builtin_convertvector(v.part[k] == v.part[k] ? up : U{} + 0x7fc0u, H);
        memcpy(p + k * EACH_PART, &half, sizeof half);
    }
}

// The last, shorter run of a group: `filler` in the places that it lacks.
template <typename T> __attribute__((noinline)) void load_part(const T* p, long count, float filler, float* lanes) {
    T part[LANES] = {}; memcpy(part, p, count * sizeof(T));
    store(lanes, load(part));
    for (long j = count; j < LANES; j++) lanes[j] = filler;
}
template <typename T> __attribute__((noinline)) void store_part(T* p, const float* lanes, long count) {
    T part[LANES]; store(part, load(lanes)); memcpy(p, part, count * sizeof(T));
}
INLINE V cleared(V v, long count) {  // 0 in the places that the last run lacks
    float lanes[LANES]; store(lanes, v);
    for (long j = count; j < LANES; j++) lanes[j] = 0;
    return load(lanes);
}

INLINE V nonzero_places(V v) { EACH v.part[k] = v.part[k] != 0 ? F{} + 1 : F{}; return v; }
typedef float Q __attribute__((vector_size(16)));
INLINE double total(V v) {  // always in this order
    typedef float Half __attribute__((vector_size(32)));
    typedef double Wide __attribute__((vector_size(64)));
    typedef double D __attribute__((vector_size(32)));
    Half half[2]; memcpy(half, &v, sizeof half);
    Wide both = __builtin_convertvector(half[0], Wide) + __builtin_convertvector(half[1], Wide);
    D quarter[2]; memcpy(quarter, &both, sizeof quarter);
    D sums = quarter[0] + quarter[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}
// The least of all lanes; what is NaN in one is left out or not, as it comes.
INLINE float least(V v) {
    Q quarter[4]; memcpy(quarter, &v, sizeof quarter);
    Q a = quarter[0] < quarter[1] ? quarter[0] : quarter[1], b = quarter[2] < quarter[3] ? quarter[2] : quarter[3];
    a = a < b ? a : b;
    float c = a[0] < a[1] ? a[0] : a[1], d = a[2] < a[3] ? a[2] : a[3];
    return c < d ? c : d;
}
INLINE float nonzero(float step) { return step < TINY ? 1.0f : step; }

// f(i, count) for runs of LANES values, count < LANES in the last; done() after every CHUNK of them and at the end.
template <typename F, typename D> INLINE void runs(long n, F f, D done) {
    for (long start = 0; start < n; start += CHUNK) {
        long end = start + CHUNK < n ? start + CHUNK : n, i = start;
        for (; i + LANES <= end; i += LANES) f(i, LANES);
        if (i < end) f(i, end - i);
        done();
    }
}
template <typename T> INLINE V read(const T* p, long i, long count, float filler) {
    if (count == LANES) return load(p + i);
    float lanes[LANES]; load_part(p + i, count, filler, lanes);
    return load(lanes);
}
template <typename T> INLINE void write(T* p, long i, long count, V v) {
    if (count == LANES) return store(p + i, v);
    float lanes[LANES]; store(lanes, v);
    store_part(p + i, lanes, count);
}

}  // namespace
