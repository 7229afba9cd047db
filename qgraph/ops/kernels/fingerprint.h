// A number that stands for the bits of many values and their order.

#pragma once

#include "lanes.h"

namespace {

constexpr long FINGERPRINT = 65536;  // so many values have one

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

}  // namespace
