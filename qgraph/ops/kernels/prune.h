// Pruning by magnitude: n of every m values of a row, or the largest of all. Ties go to the lower index.

#pragma once

#include <stdlib.h>

#include "lanes.h"

namespace {

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

}  // namespace
