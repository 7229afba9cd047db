// What native.py compiles on first use and calls: work shared out to threads.

#include <pthread.h>

#include "fingerprint.h"
#include "prune.h"
#include "quantize.h"

namespace {

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
