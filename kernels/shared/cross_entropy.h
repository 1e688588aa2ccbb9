// Cross entropy in nats: logsumexp(logits) - logits[target]. One block per row of logits [B, H, N, V]; targets, losses
// and log-sums [B H N]. Computed in f32 by an online softmax; gradients are rounded once.
#pragma once
#include "row_index.h"

// Target of a row that is left out of the loss.
constexpr CONSTANT u32 IGNORED = 0xffffffffu;
// Start of the running maximum: below every finite logit, and finite, so that exp(-inf - start) is 0 and not NaN.
constexpr CONSTANT float MAX_START = -3.4e38f;

// Logits that a thread loads before it uses the first, to keep enough loads in flight.
constexpr CONSTANT u32 LOGITS_PER_LOAD = 4;

// State of an online logsumexp: the maximum so far and sum e^(x - max). NaN or +inf among the logits makes the sum
// non-finite.
struct OnlineSum {
    float max, sum;

    INLINE void add(float other_max, float other_sum) {
        float greater = fmax(max, other_max);
        sum = sum * exp(max - greater) + other_sum * exp(other_max - greater);
        max = greater;
    }
};

// `maxima` and `sums` have one entry per thread. A target outside of 0..V has probability 0 and loss +inf.
template <class T>
INLINE void cross_entropy_forward(Thread me, PARAMS CrossEntropyParams &p, SHARED float *maxima, SHARED float *sums,
                                  const DEVICE T *logits, const DEVICE u32 *targets, DEVICE float *losses,
                                  DEVICE float *log_sums) {
    u32 target = targets[me.block];
    if (target == IGNORED) {
        if (me.index == 0) losses[me.block] = 0, log_sums[me.block] = 0;
        return;
    }
    logits += RowIndex(me.block, p.heads, p.rows).offset(p.x_batch, p.x_head, p.x_row);
    OnlineSum all = {MAX_START, 0.0f};
    for (u32 first = me.index; first < p.vocab; first += me.threads * LOGITS_PER_LOAD) {
        float x[LOGITS_PER_LOAD], greatest = all.max, sum = 0;
#pragma unroll
        for (u32 e = 0; e < LOGITS_PER_LOAD; e++) {
            u32 c = first + e * me.threads;
            x[e] = c < p.vocab ? to_float(logits[c]) : -GD_INFINITY;
        }
#pragma unroll
        for (u32 e = 0; e < LOGITS_PER_LOAD; e++)
            greatest = fmax(greatest, x[e]);
#pragma unroll
        for (u32 e = 0; e < LOGITS_PER_LOAD; e++)
            sum += exp(x[e] - greatest);
        all.add(greatest, sum);
    }
    maxima[me.index] = all.max;
    sums[me.index] = all.sum;
    if (!GD_FAULT(48)) block_barrier();
    for (u32 step = me.threads / 2; step > 0; step /= 2) {
        if (me.index < step) {
            all.add(maxima[me.index + step], sums[me.index + step]);
            maxima[me.index] = all.max;
            sums[me.index] = all.sum;
        }
        block_barrier();
    }
    if (me.index > 0) return;
    float log_sum = all.max + log(all.sum);
    losses[me.block] = target < p.vocab ? log_sum - to_float(logits[target]) : GD_INFINITY;
    log_sums[me.block] = log_sum;
}

// (softmax - one-hot) times the gradient of the row's loss.
template <class T>
INLINE void cross_entropy_backward(Thread me, PARAMS CrossEntropyParams &p, const DEVICE T *logits,
                                   const DEVICE u32 *targets, const DEVICE float *log_sums, const DEVICE float *dlosses,
                                   DEVICE T *dlogits) {
    u32 target = targets[me.block];
    float log_sum = log_sums[me.block], scale = dlosses[me.block];
    logits += RowIndex(me.block, p.heads, p.rows).offset(p.x_batch, p.x_head, p.x_row);
    dlogits += size_t(me.block) * p.vocab;
    for (u32 first = me.index; first < p.vocab; first += me.threads * LOGITS_PER_LOAD) {
        float x[LOGITS_PER_LOAD];
#pragma unroll
        for (u32 e = 0; e < LOGITS_PER_LOAD; e++) {
            u32 c = first + e * me.threads;
            x[e] = c < p.vocab ? to_float(logits[c]) : 0.0f;
        }
#pragma unroll
        for (u32 e = 0; e < LOGITS_PER_LOAD; e++) {
            u32 c = first + e * me.threads;
            float part = exp(x[e] - log_sum) - (c == target ? 1.0f : 0.0f);
            if (c < p.vocab) dlogits[c] = from_float<T>(target == IGNORED && !GD_FAULT(49) ? 0.0f : part * scale);
        }
    }
}
