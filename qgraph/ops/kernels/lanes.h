// Sixteen values at a time, in as many registers as the processor takes for them, and sums over many of them.
//
// Sums run in sixteen lanes, a lane in float over at most 4096 / 16 values and from there in double: their order, and so
// every bit of a result, depends neither on the processor nor on the number of threads.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

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

INLINE V load(const float* p) { V v; EACH memcpy(&v.part[k], p + k * EACH_PART, sizeof(F)); return v; }
INLINE V load(const Bf16* p) {
    V v;
    EACH {
        H half; memcpy(&half, p + k * EACH_PART, sizeof half);
        v.part[k] = (F)(__builtin_convertvector(half, U) << 16);
    }
    return v;
}
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
INLINE double total(V v) {  // always in this order
    typedef double D __attribute__((vector_size(32)));
    typedef float Q __attribute__((vector_size(16)));
    float lanes[LANES]; store(lanes, v);
    Q quarter[4]; memcpy(quarter, lanes, sizeof quarter);
    D wide[4];
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) wide[k] = __builtin_convertvector(quarter[k], D);
    D sums = (wide[0] + wide[2]) + (wide[1] + wide[3]);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
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
