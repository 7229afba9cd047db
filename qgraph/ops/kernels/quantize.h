// One group of `n` consecutive values: its scale and codes, the passes of ddt.py over it and plain dequantization (ste.py).
//
// Codes are whole numbers up to 255, whose sums and squares are exact in a lane. Positions are computed anew rather than
// kept; without contraction to fused multiply-adds (-ffp-contract=off) they are the same every time.

#pragma once

#include "lanes.h"

namespace {

// How groups are quantized; native.Plan is the same structure.
struct Plan {
    int32_t affine, mean, binary, clip, windowed, regress;  // mean: the step is `factor` times a mean magnitude
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
    float terms[CHUNK], outside[CHUNK];  // of a short group, so that its codes are computed once
    const bool stored = n <= CHUNK || (wide && !plan.windowed);
    float* kept = n <= CHUNK ? terms : (float*)grad;
    auto at = [&](long i, long count, V& f, V& source) LAMBDA {
        f = position<affine>(read(x, i, count, filler), s);
        source = sparse ? position<affine>(read(pruned, i, count, filler), s) : f;
        return codes<affine, binary>(source, sparse, plan);
    };
    runs(n, [&](long i, long count) LAMBDA {
        V f, source, q = at(i, count, f, source), up = read(h, i, count, 0);
        hq_part += up * q;
        if (affine) h_part += up;
        if (!stored) return;
        V u = (f - q) + q * twice;
        if (plan.windowed) {
            V away = magnitude(source - plan.middle), far;
            EACH {
                u.part[k] = away.part[k] > plan.reach ? q.part[k] : u.part[k];
                far.part[k] = away.part[k] > plan.reach ? F{} + 1 : F{};
            }
            write(outside, i, count, far);
        }
        write(kept, i, count, u);
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
        V up = read(h, i, count, 0), u, far_value = all(0), far = all(0);
        if (stored) {
            u = read(kept, i, count, 0);
            if (plan.windowed) {
                far = read(outside, i, count, 0);
                far_value = u * push + level;
            }
        } else {
            V f, source, q = at(i, count, f, source), away = magnitude(source - plan.middle);
            EACH far.part[k] = away.part[k] > plan.reach ? F{} + 1 : F{};
            u = (f - q) + q * twice;
            far_value = q * push + level;
        }
        V g = u * push + up * slope;
        if (affine) g = g + constant;
        if (plan.windowed) EACH g.part[k] = far.part[k] > 0 ? far_value.part[k] : g.part[k];
        write(grad, i, count, g);
    }, []() LAMBDA {});
}

}  // namespace
