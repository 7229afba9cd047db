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

// The key of a rank, from 1 on, in falling order, among `count` that agree in all bits from `bits` on: by one digit after the
// other. Leaves `count` of them that are equal to it, and its rank among these; the keys are overwritten.
INLINE uint32_t select(uint32_t* keys, long& count, int bits, long& rank) {
    constexpr int DIGIT = 10, BINS = 1 << DIGIT;
    for (int shift = bits - DIGIT; shift >= 0; shift -= DIGIT) {
        uint32_t counts[BINS] = {};
        for (long i = 0; i < count; i++) counts[keys[i] >> shift & (BINS - 1)]++;
        uint32_t bin = BINS - 1;
        while (rank > counts[bin]) rank -= counts[bin--];
        long left = 0;
        for (long i = 0; i < count; i++) {
            uint32_t k = keys[i];
            keys[left] = k;
            left += (k >> shift & (BINS - 1)) == bin;
        }
        count = left;
    }
    return keys[0];
}

template <typename T> INLINE void keep_from(const T* w, T* y, long n, uint32_t threshold) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        V v = load(w + i);
        EACH {
            U bits = (U)v.part[k] & 0x7fffffffu;
            bits = bits > INFINITE ? U{} + INFINITE : bits;
            v.part[k] = v.part[k] * (bits >= threshold ? F{} + 1 : F{});
        }
        store(y + i, v);
    }
    for (; i < n; i++) keep(w + i, y + i, key(w + i) >= threshold);
}

// The place after the `rank`-th value whose key is `of`.
template <typename T> INLINE long place_after(const T* w, long n, uint32_t of, long rank) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        int here = 0;
        for (long j = i; j < i + LANES; j++) here += key(w + j) == of;
        if (here >= rank) break;
        rank -= here;
    }
    while (rank > 0) rank -= key(w + i++) == of;
    return i;
}

// The `kept` largest of all n values stay, of equal ones the first. The upper bits of a key say which few values are near
// the one that is the last to stay.
template <typename T> int prune_largest(const T* w, T* y, long n, long kept) {
    constexpr long LOWER = 20, BINS = 1 << (31 - LOWER), COPIES = 4;  // of a bin, which is seldom met twice in a row in one
    uint32_t counts[COPIES][BINS] = {};
    for (long i = 0; i < n; i++) counts[i % COPIES][key(w + i) >> LOWER]++;
    auto in = [&](uint32_t bin) { return (long)counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin]; };
    uint32_t bin = BINS - 1;
    long rank = kept;
    while (rank > in(bin)) rank -= in(bin--);
    long near = in(bin), found = 0;
    uint32_t* keys = (uint32_t*)malloc((near + 1) * sizeof(uint32_t));
    if (!keys) return 1;
    for (long i = 0; i < n; i++) {
        uint32_t k = key(w + i);
        keys[found] = k;
        found += k >> LOWER == bin;
    }
    uint32_t threshold = select(keys, near, LOWER, rank);  // of the values equal to it the first `rank` stay
    free(keys);
    long cut = near == rank ? n : place_after(w, n, threshold, rank);
    keep_from(w, y, cut, threshold);
    keep_from(w + cut, y + cut, n - cut, threshold + 1);
    return 0;
}

}  // namespace
