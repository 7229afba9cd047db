// The passes of ddt.py, ste.py and sparsity.py over memory, fused: native.py compiles this file on first use and calls it.
//
// A group is `n` consecutive values. Sums run in sixteen lanes, a lane in float over at most 4096 / 16 values and from
// there in double: their order, and so every bit of a result, depends neither on the processor nor on the number of
// threads. Codes are whole numbers up to 255, whose sums and squares are exact so. Contraction to fused multiply-adds is
// off (-ffp-contract=off), so that values held in memory and values computed anew are the same.

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr long LANES = 16, CHUNK = 4096, FINGERPRINT = 65536;
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

// How groups are quantized; native.Plan is the same structure.
struct Plan {
    int32_t affine, mean, binary, clip, windowed, regress;  // mean: the step is `factor` times a mean magnitude
    float factor;                                            // else (max - min) / factor, or max|x| / factor
    float low, high, lam, middle, reach;
};

// Step, offset, mean q, mean f, slope, ridge: what the forward pass leaves to the backward pass.
struct Stats { float step, offset, mean_q, mean_f, slope, ridge; };

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

// -- step and offset ---------------------------------------------------------------------------------------------------

// Sum of term(x) over a group; places beyond its end count as `filler`.
template <typename T, typename F> INLINE double sum(const T* x, long n, float filler, F term) {
    double result = 0; V part = all(0);
    runs(n, [&](long i, long count) LAMBDA { part += term(read(x, i, count, filler)); },
         [&]() LAMBDA { result += total(part); part = all(0); });
    return result;
}

template <typename T> INLINE void extremes(const T* x, long n, bool absolute, float& low, float& high) {
    V least_v = all(INFINITY), most = all(-INFINITY), bad = all(0);
    float first = read(x, 0, 1, 0).part[0][0];
    runs(n, [&](long i, long count) LAMBDA {
        V v = read(x, i, count, first);
        bad += v - v;  // NaN from the first value on that is NaN or Inf
        if (absolute) v = magnitude(v); else least_v = least(v, least_v);
        most = largest(v, most);
    }, []() LAMBDA {});
    low = INFINITY; high = -INFINITY;
    float lows[LANES], highs[LANES];
    store(lows, least_v); store(highs, most);
    for (long j = 0; j < LANES; j++) {
        low = lows[j] < low ? lows[j] : low;
        high = highs[j] > high ? highs[j] : high;
    }
    float finite = (float)total(bad);
    low += finite; high += finite;  // such a group has no scale, and shows it
}

template <typename T> INLINE void scale(const T* x, long n, bool sparse, const Plan& plan, Stats& s) {
    float low, high;
    s.offset = 0;
    if (plan.affine) {
        extremes(x, n, false, low, high);
        if (!plan.mean) { s.step = nonzero((high - low) / plan.factor); s.offset = low; return; }
        float mean = (float)(sum(x, n, low, [&](V v) LAMBDA { return v - low; }) / n);
        float spread = (float)(sum(x, n, low + mean, [&](V v) LAMBDA { return magnitude((v - low) - mean); }) / n);
        if (n % LANES) {  // the filler's own rounding is no part of the spread
            double extra = (LANES - n % LANES) * (double)fabsf(((low + mean) - low) - mean);
            spread = (float)((double)spread - extra / n);
        }
        float size = spread * plan.factor;  // 0 for a constant group: its codes are 0 and its offset is its value
        s.step = nonzero(size);
        s.offset = (low + mean) - size * plan.middle;
        return;
    }
    if (!plan.mean) { extremes(x, n, true, low, high); s.step = high / plan.factor; return; }
    double count = n;
    if (sparse) {
        count = sum(x, n, 0, [&](V v) LAMBDA { return nonzero_places(v); });
        if (count < 1) count = 1;
    }
    s.step = (float)(sum(x, n, 0, [](V v) LAMBDA { return magnitude(v); }) / count) * plan.factor;
}

// -- codes -------------------------------------------------------------------------------------------------------------

template <bool affine> INLINE V position(V x, const Stats& s) { return affine ? (x - s.offset) / s.step : x / s.step; }

template <bool affine, bool binary> INLINE V codes(V f, bool sparse, const Plan& plan) {
    EACH {
        F& p = f.part[k];
        if (binary) {
            F sign = p > 0 ? F{} + 1 : F{} - 1;
            sign = p == 0 ? F{} + (sparse ? 0.0f : 1.0f) : sign;
            p = p == p ? sign : p;
        } else if (plan.clip) {  // written so that NaN stays
            p = p < plan.low ? F{} + plan.low : p;
            p = p > plan.high ? F{} + plan.high : p;
        }
    }
    return binary ? f : rounded(f);
}

// -- forward -----------------------------------------------------------------------------------------------------------

template <typename T, bool affine, bool binary>
void forward_group(const T* x, const T* pruned, T* y, long n, const Plan& plan, Stats& s) {
    const bool sparse = pruned != nullptr;
    const T* source = sparse ? pruned : x;
    scale(source, n, sparse, plan, s);
    s.step = nonzero(s.step);
    s.mean_q = s.mean_f = 0;
    if (!plan.regress) {
        float step = s.step, offset = s.offset;
        runs(n, [&](long i, long count) LAMBDA {
            V q = codes<affine, binary>(position<affine>(read(source, i, count, 0), s), sparse, plan);
            write(y, i, count, affine ? q * step + offset : q * step);
        }, []() LAMBDA {});
        return;
    }
    V q_part = all(0), qq_part = all(0), e_part = all(0), eq_part = all(0);
    double sum_q = 0, sum_qq = 0, sum_e = 0, sum_eq = 0;
    // Beyond the end f and q are 0; binary codes are never 0, so there they are cleared.
    float filler = s.offset;
    runs(n, [&](long i, long count) LAMBDA {
        V f = position<affine>(read(x, i, count, filler), s);
        V q = codes<affine, binary>(sparse ? position<affine>(read(pruned, i, count, filler), s) : f, sparse, plan);
        if (count < LANES) { q = cleared(q, count); f = cleared(f, count); }
        write(y, i, count, q);  // whole numbers that both types hold
        V e = f - q;
        qq_part += q * q; eq_part += e * q;
        if (affine) { q_part += q; e_part += e; }
    }, [&]() LAMBDA {
        sum_qq += total(qq_part); sum_eq += total(eq_part); qq_part = eq_part = all(0);
        if (affine) { sum_q += total(q_part); sum_e += total(e_part); q_part = e_part = all(0); }
    });
    double mean_q = sum_q / n, mean_e = sum_e / n;
    double variance = sum_qq / n - mean_q * mean_q, covariance = sum_eq / n - mean_q * mean_e;
    double ridge = variance + plan.lam;
    if (ridge == 0) ridge = 1;
    double slope = (variance + covariance) / ridge;
    s.mean_q = (float)mean_q; s.mean_f = (float)(mean_q + mean_e); s.slope = (float)slope; s.ridge = (float)ridge;
    float gain = s.slope * s.step, centre = s.mean_q, base = s.offset + s.mean_f * s.step;
    runs(n, [&](long i, long count) LAMBDA {
        V q = read(y, i, count, 0);
        write(y, i, count, affine ? (q - centre) * gain + base : q * gain);
    }, []() LAMBDA {});
}

// -- backward ----------------------------------------------------------------------------------------------------------

template <typename T, bool affine, bool binary>
void backward_group(const T* h, const T* x, const T* pruned, T* grad, long n, const Plan& plan, const Stats& s) {
    const bool sparse = pruned != nullptr;
    V hq_part = all(0), h_part = all(0);
    double sum_hq = 0, sum_h = 0;
    float rest = 1 - s.slope, twice = 2 * rest, filler = s.offset;
    constexpr bool wide = sizeof(T) == sizeof(float);
    const bool stored = wide && !plan.windowed;
    auto at = [&](long i, long count, V& f, V& source) LAMBDA {
        f = position<affine>(read(x, i, count, filler), s);
        source = sparse ? position<affine>(read(pruned, i, count, filler), s) : f;
        return codes<affine, binary>(source, sparse, plan);
    };
    runs(n, [&](long i, long count) LAMBDA {
        V f, source, q = at(i, count, f, source), up = read(h, i, count, 0);
        hq_part += up * q;
        if (affine) h_part += up;
        if (stored) write(grad, i, count, (f - q) + q * twice);
    }, [&]() LAMBDA {
        sum_hq += total(hq_part); hq_part = all(0);
        if (affine) { sum_h += total(h_part); h_part = all(0); }
    });
    double mean_h = sum_h / n;
    float push = (float)((sum_hq / n - (double)s.mean_q * mean_h) / s.ridge);
    double mean_e = (double)s.mean_f - s.mean_q;
    float constant = affine ? (float)(rest * mean_h - push * (mean_e + (double)twice * s.mean_q)) : 0;
    float slope = s.slope, level = affine ? (float)(mean_h - (double)push * s.mean_q) : 0;
    runs(n, [&](long i, long count) LAMBDA {
        V up = read(h, i, count, 0), u, far_value = all(0), source = all(0);
        if (stored) {
            u = read(grad, i, count, 0);
        } else {
            V f, q = at(i, count, f, source);
            u = (f - q) + q * twice;
            far_value = q * push + level;
        }
        V g = u * push + up * slope;
        if (affine) g = g + constant;
        if (plan.windowed) {
            V away = magnitude(source - plan.middle);
            EACH g.part[k] = away.part[k] > plan.reach ? far_value.part[k] : g.part[k];
        }
        write(grad, i, count, g);
    }, []() LAMBDA {});
}

// -- pruning -----------------------------------------------------------------------------------------------------------

INLINE uint32_t key(const float* p) {  // magnitudes in order; NaN counts as Inf
    uint32_t bits; memcpy(&bits, p, sizeof bits); bits &= 0x7fffffffu;
    return bits > INFINITE ? INFINITE : bits;
}
INLINE uint32_t key(const Bf16* p) {
    uint32_t bits = (uint32_t)(p->bits & 0x7fffu) << 16;
    return bits > INFINITE ? INFINITE : bits;
}
INLINE void keep(const float* w, float* y, bool stays) { *y = *w * (float)stays; }
INLINE void keep(const Bf16* w, Bf16* y, bool stays) {  // a product: a pruned NaN or Inf is NaN, zero keeps its sign
    uint16_t pruned = key(w) == INFINITE ? 0x7fc0 : w->bits & 0x8000;
    y->bits = stays ? w->bits : pruned;
}

// Of each run of m values the n of largest magnitude stay; of equal ones the first.
template <typename T> void prune_run(const T* w, T* y, int n, int m) {
    uint32_t keys[32]; int before[32] = {};
    for (int i = 0; i < m; i++) keys[i] = key(w + i);
    for (int i = 1; i < m; i++)
        for (int j = 0; j < i; j++) {
            int first = keys[j] >= keys[i];
            before[i] += first; before[j] += 1 - first;
        }
    for (int i = 0; i < m; i++) keep(w + i, y + i, before[i] < n);
}

// The same for LANES values whose runs end with them: each is compared with those up to m - 1 places off in its run.
struct Same { int32_t before[LANES][LANES], after[LANES][LANES]; };  // [shift][place]: -1 where that is in the same run
template <typename T> INLINE void prune_lanes(const T* w, T* y, int n, int m, const Same& same) {
    int32_t keys[3 * LANES] = {};
    float values[LANES]; store(values, load(w));
    for (int j = 0; j < LANES; j++) keys[LANES + j] = (int32_t)key(values + j);
    int32_t ranks[LANES] = {};
    for (int shift = 1; shift < m; shift++)
        for (int j = 0; j < LANES; j++) {
            int32_t own = keys[LANES + j];
            ranks[j] -= (-(keys[LANES + j - shift] >= own) & same.before[shift][j]) +
                        (-(keys[LANES + j + shift] > own) & same.after[shift][j]);
        }
    float kept[LANES];
    for (int j = 0; j < LANES; j++) kept[j] = values[j] * (ranks[j] < n ? 1.0f : 0.0f);
    store(y, load(kept));
}
template <typename T> void prune_row(const T* w, T* y, long length, int n, int m) {
    long i = 0;
    if (LANES % m == 0) {
        Same same = {};
        for (int shift = 1; shift < m; shift++)
            for (int j = 0; j < LANES; j++) {
                same.before[shift][j] = -(j % m >= shift);
                same.after[shift][j] = -(j % m + shift < m);
            }
        for (; i + LANES <= length; i += LANES) prune_lanes(w + i, y + i, n, m, same);
    }
    for (; i < length; i += m) prune_run(w + i, y + i, n, (int)(length - i < m ? length - i : m));
}

// The `kept` largest of all n values stay, of equal ones the first: a radix selection, sixteen bits at a time.
template <typename T> int prune_largest(const T* w, T* y, long n, long kept) {
    constexpr long BINS = 1 << 15, COPIES = 4;  // of the upper half a bin is seldom met twice in a row in one copy
    uint32_t* counts = (uint32_t*)calloc(COPIES * BINS + (1 << 16), sizeof(uint32_t));
    if (!counts) return 1;
    uint32_t *high = counts, *low = counts + COPIES * BINS;
    for (long i = 0; i < n; i++) high[(i % COPIES) * BINS + (key(w + i) >> 16)]++;
    for (long b = 0; b < BINS; b++) high[b] += high[BINS + b] + high[2 * BINS + b] + high[3 * BINS + b];
    long above = 0, bin = BINS - 1;
    while (above + high[bin] < kept) above += high[bin--];
    uint32_t threshold = (uint32_t)bin << 16;
    long level = high[bin];
    if (sizeof(T) == sizeof(float)) {
        for (long i = 0; i < n; i++) {
            uint32_t k = key(w + i);
            if (k >> 16 == (uint32_t)bin) low[k & 0xffff]++;
        }
        long place = (1 << 16) - 1;
        while (above + low[place] < kept) above += low[place--];
        threshold |= (uint32_t)place;
        level = low[place];
    }
    free(counts);
    long of_level = kept - above;  // so many of the values at the threshold stay
    if (of_level == level) {
        for (long i = 0; i < n; i++) keep(w + i, y + i, key(w + i) >= threshold);
        return 0;
    }
    for (long i = 0; i < n; i++) {
        uint32_t k = key(w + i);
        long level_kept = (k == threshold) & (of_level > 0);
        of_level -= level_kept;
        keep(w + i, y + i, (k > threshold) | level_kept);
    }
    return 0;
}

// -- fingerprints ------------------------------------------------------------------------------------------------------

// Sixteen lanes, each a chain of steps that are one to one: a change of one value always changes the result.
template <typename T> uint64_t fingerprint(const T* x, long n) {
    uint32_t lanes[LANES];
    for (long j = 0; j < LANES; j++) lanes[j] = 2166136261u + (uint32_t)j;
    U state[PARTS]; memcpy(state, lanes, sizeof state);
    auto mix = [&](const float* words) LAMBDA {
        EACH {
            U bits; memcpy(&bits, words + k * EACH_PART, sizeof bits);
            bits ^= state[k];
            state[k] = ((bits << 13) | (bits >> 19)) * 2246822519u;
        }
    };
    float words[LANES] = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES) { store(words, load(x + i)); mix(words); }
    if (i < n) { load_part(x + i, n - i, 0, words); mix(words); }
    memcpy(lanes, state, sizeof state);
    uint64_t result = (uint64_t)n;
    for (long j = 0; j < LANES; j++) {
        result = (result ^ lanes[j]) * 11400714819323198485ull;
        result ^= result >> 29;
    }
    return result;
}

// -- threads -----------------------------------------------------------------------------------------------------------

struct Job {
    const Plan* plan; const void *h, *x, *pruned; void* out; Stats* stats;
    long n, first, last; int kept, run;
    void (*work)(const Job&);
};

void* start(void* job) { ((Job*)job)->work(*(Job*)job); return nullptr; }

// Shares the groups (or rows) out; no pool is kept, so a fork finds none that died. A thread that cannot be had is done here.
void share(Job job, long groups, long threads) {
    constexpr long MOST = 64;
    if (threads > groups) threads = groups;
    if (threads > MOST) threads = MOST;
    Job jobs[MOST]; pthread_t ids[MOST]; bool started[MOST] = {};
    for (long t = 0; t < threads; t++) {
        jobs[t] = job; jobs[t].first = groups * t / threads; jobs[t].last = groups * (t + 1) / threads;
        if (t > 0) started[t] = pthread_create(&ids[t], nullptr, start, &jobs[t]) == 0;
    }
    for (long t = 0; t < threads; t++) if (!started[t]) jobs[t].work(jobs[t]);
    for (long t = 1; t < threads; t++) if (started[t]) pthread_join(ids[t], nullptr);
}

template <typename T, bool affine, bool binary> void forward_job(const Job& job) {
    for (long g = job.first; g < job.last; g++) {
        long at = g * job.n;
        forward_group<T, affine, binary>(
            (const T*)job.x + at, job.pruned ? (const T*)job.pruned + at : nullptr, (T*)job.out + at, job.n, *job.plan,
            job.stats[g]);
    }
}
template <typename T, bool affine, bool binary> void backward_job(const Job& job) {
    for (long g = job.first; g < job.last; g++) {
        long at = g * job.n;
        backward_group<T, affine, binary>(
            (const T*)job.h + at, (const T*)job.x + at, job.pruned ? (const T*)job.pruned + at : nullptr,
            (T*)job.out + at, job.n, *job.plan, job.stats[g]);
    }
}
template <typename T> void prune_job(const Job& job) {
    for (long g = job.first; g < job.last; g++)
        prune_row((const T*)job.x + g * job.n, (T*)job.out + g * job.n, job.n, job.kept, job.run);
}

template <typename T> void fingerprint_job(const Job& job) {
    for (long g = job.first; g < job.last; g++) {
        long at = g * FINGERPRINT, end = at + FINGERPRINT < job.n ? at + FINGERPRINT : job.n;
        ((uint64_t*)job.out)[g] = fingerprint((const T*)job.x + at, end - at);
    }
}

template <typename T, bool affine, bool binary> void choose(Job& job, bool backward) {
    job.work = backward ? backward_job<T, affine, binary> : forward_job<T, affine, binary>;
}
template <typename T> void choose(Job& job, bool backward) {
    if (job.plan->affine) choose<T, true, false>(job, backward);
    else if (job.plan->binary) choose<T, false, true>(job, backward);
    else choose<T, false, false>(job, backward);
}

}  // namespace

extern "C" {

// Quantizes `groups` runs of `n` values of x to out and writes their statistics (of h: gives the gradient to out).
void qgraph_ddt(const Plan* plan, const void* h, const void* x, const void* pruned, void* out, float* stats, long groups,
                long n, int narrow, long threads) {
    Job job = {plan, h, x, pruned, out, (Stats*)stats, n, 0, groups, 0, 0, nullptr};
    if (narrow) choose<Bf16>(job, h != nullptr); else choose<float>(job, h != nullptr);
    share(job, groups, threads);
}

// Prunes each row of `length` values to n of every m.
void qgraph_prune_runs(const void* w, void* out, long rows, long length, int n, int m, int narrow, long threads) {
    Job job = {nullptr, nullptr, w, nullptr, out, nullptr, length, 0, rows, n, m, nullptr};
    job.work = narrow ? prune_job<Bf16> : prune_job<float>;
    share(job, rows, threads);
}

// Writes a number for every 65536 of the `n` values that stands for their bits and order.
void qgraph_fingerprint(const void* x, void* out, long n, int narrow, long threads) {
    Job job = {nullptr, nullptr, x, nullptr, out, nullptr, n, 0, 0, 0, 0, nullptr};
    job.work = narrow ? fingerprint_job<Bf16> : fingerprint_job<float>;
    share(job, (n + FINGERPRINT - 1) / FINGERPRINT, threads);
}

// Prunes all but the `kept` largest of `n` values; not 0 where there is no memory for the counts.
int qgraph_prune_largest(const void* w, void* out, long n, long kept, int narrow) {
    return narrow ? prune_largest((const Bf16*)w, (Bf16*)out, n, kept) : prune_largest((const float*)w, (float*)out, n, kept);
}
}
