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

template <typename T, bool affine, bool binary> void quantize_job(const Job& job) {
    const long together = groups_at_once(job.n);
    for (long g = job.first; g < job.last; g += together) {
        long at = g * job.n, groups = together < job.last - g ? together : job.last - g;
        const T *x = (const T*)job.x + at, *pruned = job.pruned ? (const T*)job.pruned + at : nullptr;
        T* out = (T*)job.out + at;
        if (job.h) backward<T, affine, binary>((const T*)job.h + at, x, pruned, out, groups, job.n, *job.plan, job.stats + g);
        else forward<T, affine, binary>(x, pruned, out, groups, job.n, *job.plan, job.stats + g);
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

template <typename T> void (*quantizer_of(const Plan& plan))(const Job&) {
    if (plan.affine) return quantize_job<T, true, false>;
    return plan.binary ? quantize_job<T, false, true> : quantize_job<T, false, false>;
}

}  // namespace

extern "C" {

// Quantizes `groups` runs of `n` values of x to out and writes their statistics (of h: gives the gradient to out).
void qgraph_ddt(const Plan* plan, const void* h, const void* x, const void* pruned, void* out, float* stats, long groups,
                long n, int narrow, long threads) {
    Job job = {plan, h, x, pruned, out, (Stats*)stats, n, 0, groups, 0, 0, nullptr};
    job.work = narrow ? quantizer_of<Bf16>(*plan) : quantizer_of<float>(*plan);
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
