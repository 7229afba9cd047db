// One group of `n` consecutive values: its scale and codes, the passes of ddt.py over it and plain dequantization (ste.py).
//
// Codes are whole numbers up to 255, whose sums and squares are exact in a lane. Positions are computed anew rather than
// kept; without contraction to fused multiply-adds (-ffp-contract=off) they are the same every time.

#pragma once

#include "lanes.h"

namespace {

// How groups are quantized; native.Plan is the same structure.
struct Plan {
    // mean: the step is `factor` times a mean magnitude; regress: or 2, values anew from the statistics of before
    int32_t affine, mean, binary, clip, windowed, regress;
    float factor;                                            // else (max - min) / factor, or max|x| / factor
    float low, high, lam, middle, reach;
};

// Step, offset, mean q, mean f, slope, ridge: what the forward pass leaves to the backward pass.
struct Stats { float step, offset, mean_q, mean_f, slope, ridge; };

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
    float first = single(x[0]);
    runs(n, [&](long i, long count) LAMBDA {
        V v = read(x, i, count, first);
        bad += v - v;  // NaN from the first value on that is NaN or Inf
        if (absolute) v = magnitude(v); else least_v = least(v, least_v);
        most = largest(v, most);
    }, []() LAMBDA {});
    low = least(least_v); high = -least(all(0) - most);
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

struct Grid { float offset; Divisor step; explicit Grid(const Stats& s) : offset(s.offset), step(s.step) {} };
template <bool affine> INLINE V position(V x, const Grid& grid) {
    return affine ? (x - grid.offset) / grid.step : x / grid.step;
}

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

// Short groups go through each pass several at a time: what ends a group is a chain of few operations, under which the
// processor starts the next.
constexpr long TOGETHER = 1024;  // values, of which all that is held stays in the nearest cache
INLINE long groups_at_once(long n) { return n < TOGETHER ? TOGETHER / n : 1; }

template <typename T> OUTLINE void find_scale(const T* x, const T* pruned, long n, const Plan& plan, Stats& s) {
    scale(pruned ? pruned : x, n, pruned != nullptr, plan, s);
    s.step = nonzero(s.step);
    s.mean_q = s.mean_f = 0;
}

template <typename T, bool affine, bool binary>
OUTLINE void dequantize(const T* x, T* y, long n, bool sparse, const Plan& plan, const Stats& s) {
    const Grid grid(s);
    float step = s.step, offset = s.offset;
    runs(n, [&](long i, long count) LAMBDA {
        V q = codes<affine, binary>(position<affine>(read(x, i, count, 0), grid), sparse, plan);
        write(y, i, count, affine ? q * step + offset : q * step);
    }, []() LAMBDA {});
}

// Leaves the codes in y.
template <typename T, bool affine, bool binary>
OUTLINE void regress(const T* x, const T* pruned, T* y, long n, const Plan& plan, Stats& s) {
    const bool sparse = pruned != nullptr;
    const Grid grid(s);
    V q_part = all(0), qq_part = all(0), e_part = all(0), eq_part = all(0);
    double sum_q = 0, sum_qq = 0, sum_e = 0, sum_eq = 0;
    // Beyond the end f and q are 0; binary codes are never 0, so there they are cleared.
    float filler = s.offset;
    runs(n, [&](long i, long count) LAMBDA {
        V f = position<affine>(read(x, i, count, filler), grid);
        V q = codes<affine, binary>(sparse ? position<affine>(read(pruned, i, count, filler), grid) : f, sparse, plan);
        if (count < LANES) { q = cleared(q, count); f = cleared(f, count); }
        write(y, i, count, q);  // whole numbers that both types hold
        V e = f - q;
        qq_part += q * q; eq_part += e * q;
        if (affine) { q_part += q; e_part += e; }
    }, [&]() LAMBDA {
        sum_qq += total(qq_part); sum_eq += total(eq_part); qq_part = eq_part = all(0);
        if (affine) { sum_q += total(q_part); sum_e += total(e_part); q_part = e_part = all(0); }
    });
    double share = 1.0 / n, mean_q = sum_q * share, mean_e = sum_e * share;
    double variance = sum_qq * share - mean_q * mean_q, covariance = sum_eq * share - mean_q * mean_e;
    double ridge = variance + plan.lam;
    if (ridge == 0) ridge = 1;
    s.mean_q = (float)mean_q; s.mean_f = (float)(mean_q + mean_e);
    s.slope = (float)((variance + covariance) / ridge); s.ridge = (float)ridge;
}

// What codes stand for after the regression.
struct Line {
    float gain, centre, base;
    explicit Line(const Stats& s) : gain(s.slope * s.step), centre(s.mean_q), base(s.offset + s.mean_f * s.step) {}
};
template <bool affine> INLINE V denoised(V q, const Line& line) {
    return affine ? (q - line.centre) * line.gain + line.base : q * line.gain;
}

template <typename T, bool affine> OUTLINE void denoise(T* y, long n, const Stats& s) {
    const Line line(s);
    runs(n, [&](long i, long count) LAMBDA { write(y, i, count, denoised<affine>(read(y, i, count, 0), line)); },
         []() LAMBDA {});
}

// What `regress` and `denoise` gave, to the bit, in one pass.
template <typename T, bool affine, bool binary>
OUTLINE void restore(const T* x, T* y, long n, bool sparse, const Plan& plan, const Stats& s) {
    const Grid grid(s); const Line line(s);
    runs(n, [&](long i, long count) LAMBDA {
        V q = codes<affine, binary>(position<affine>(read(x, i, count, s.offset), grid), sparse, plan);
        write(y, i, count, denoised<affine>(q, line));
    }, []() LAMBDA {});
}

template <typename T, bool affine, bool binary>
void forward(const T* x, const T* pruned, T* y, long groups, long n, const Plan& plan, Stats* s) {
    auto at = [n](const T* values, long g) LAMBDA { return values ? values + g * n : nullptr; };
    const T* source = pruned ? pruned : x;
    if (plan.regress == 2) {
        for (long g = 0; g < groups; g++)
            restore<T, affine, binary>(source + g * n, y + g * n, n, pruned != nullptr, plan, s[g]);
        return;
    }
    for (long g = 0; g < groups; g++) find_scale(x + g * n, at(pruned, g), n, plan, s[g]);
    if (!plan.regress) {
        for (long g = 0; g < groups; g++)
            dequantize<T, affine, binary>(source + g * n, y + g * n, n, pruned != nullptr, plan, s[g]);
        return;
    }
    for (long g = 0; g < groups; g++)
        regress<T, affine, binary>(x + g * n, at(pruned, g), y + g * n, n, plan, s[g]);
    for (long g = 0; g < groups; g++) denoise<T, affine>(y + g * n, n, s[g]);
}

// -- backward ----------------------------------------------------------------------------------------------------------

template <typename T, bool affine, bool binary>
INLINE V codes_at(const T* x, const T* pruned, long i, long count, const Grid& grid, const Plan& plan, V& f, V& source) {
    f = position<affine>(read(x, i, count, grid.offset), grid);
    source = pruned ? position<affine>(read(pruned, i, count, grid.offset), grid) : f;
    return codes<affine, binary>(source, pruned != nullptr, plan);
}
INLINE V beyond(V source, const Plan& plan) {  // 1 where a value is outside of the window
    V away = magnitude(source - plan.middle), far;
    EACH far.part[k] = away.part[k] > plan.reach ? F{} + 1 : F{};
    return far;
}

struct Pull { float push, constant, level; };

// Keeps what the second pass needs of each value, in `kept` and `outside`, where these are not null.
template <typename T, bool affine, bool binary>
OUTLINE Pull pull_of(const T* h, const T* x, const T* pruned, float* kept, float* outside, long n, const Plan& plan,
                    const Stats& s) {
    const Grid grid(s);
    V hq_part = all(0), h_part = all(0);
    double sum_hq = 0, sum_h = 0;
    float rest = 1 - s.slope, twice = 2 * rest;
    runs(n, [&](long i, long count) LAMBDA {
        V f, source, q = codes_at<T, affine, binary>(x, pruned, i, count, grid, plan, f, source), up = read(h, i, count, 0);
        hq_part += up * q;
        if (affine) h_part += up;
        if (!kept) return;
        V u = (f - q) + q * twice;
        if (plan.windowed) {
            V far = beyond(source, plan);
            EACH u.part[k] = far.part[k] > 0 ? q.part[k] : u.part[k];
            write(outside, i, count, far);
        }
        write(kept, i, count, u);
    }, [&]() LAMBDA {
        sum_hq += total(hq_part); hq_part = all(0);
        if (affine) { sum_h += total(h_part); h_part = all(0); }
    });
    double share = 1.0 / n, mean_h = sum_h * share;
    float push = (float)((sum_hq * share - (double)s.mean_q * mean_h) / s.ridge);
    if (!affine) return {push, 0, 0};
    double mean_e = (double)s.mean_f - s.mean_q;
    return {push, (float)(rest * mean_h - push * (mean_e + (double)twice * s.mean_q)),
            (float)(mean_h - (double)push * s.mean_q)};
}

template <typename T, bool affine, bool binary>
OUTLINE void pull(const T* h, const T* x, const T* pruned, const float* kept, const float* outside, T* grad, long n,
                 const Plan& plan, const Stats& s, const Pull& p) {
    float slope = s.slope;
    runs(n, [&](long i, long count) LAMBDA {
        V up = read(h, i, count, 0), u, far_value = all(0), far = all(0);
        if (kept) {
            u = read(kept, i, count, 0);
            if (plan.windowed) {
                far = read(outside, i, count, 0);
                far_value = u * p.push + p.level;
            }
        } else {
            V f, source, q = codes_at<T, affine, binary>(x, pruned, i, count, Grid(s), plan, f, source);
            far = beyond(source, plan);
            u = (f - q) + q * (2 * (1 - s.slope));
            far_value = q * p.push + p.level;
        }
        V g = u * p.push + up * slope;
        if (affine) g = g + p.constant;
        if (plan.windowed) EACH g.part[k] = far.part[k] > 0 ? far_value.part[k] : g.part[k];
        write(grad, i, count, g);
    }, []() LAMBDA {});
}

template <typename T, bool affine, bool binary>
void backward(const T* h, const T* x, const T* pruned, T* grad, long groups, long n, const Plan& plan, const Stats* s) {
    // Short groups keep what was computed of a value; a long one has room for one float a value, in its gradient.
    float terms[CHUNK], outside[CHUNK]; Pull pulls[TOGETHER];
    float* kept = n <= CHUNK ? terms : sizeof(T) == sizeof(float) && !plan.windowed ? (float*)grad : nullptr;
    auto at = [n](auto* values, long g) LAMBDA { return values ? values + g * n : nullptr; };
    for (long g = 0; g < groups; g++)
        pulls[g] = pull_of<T, affine, binary>(
            h + g * n, x + g * n, at(pruned, g), at(kept, g), outside + g * n, n, plan, s[g]);
    for (long g = 0; g < groups; g++)
        pull<T, affine, binary>(
            h + g * n, x + g * n, at(pruned, g), at(kept, g), outside + g * n, grad + g * n, n, plan, s[g], pulls[g]);
}

}  // namespace
