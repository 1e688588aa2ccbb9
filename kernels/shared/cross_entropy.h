// Cross entropy of rows of logits with their targets, in nats: logsumexp(logits) - logits[target]. A block takes a row
// of logits [B, H, N, V]; targets, losses and the logarithms of the sums [B H N]. Computed in f32; gradients are
// rounded once.
#pragma once
#include "row_index.h"

// The target of a row that does not count.
constexpr CONSTANT u32 IGNORED = 0xffffffffu;
// Below every logit but -inf, whose power beside it is 0.
constexpr CONSTANT float LEAST = -3.4e38f;

// Logits that a thread reads before it uses the first: enough loads under way at 2 bytes each.
constexpr CONSTANT u32 LOGITS_EACH = 4;

// The powers of some numbers: their greatest, and sum e^(x - top). A number that is not finite, but for -inf, makes the
// sum one that is not.
struct Powers {
    float top, sum;

    INLINE void add(float other_top, float other_sum) {
        float most = fmax(top, other_top);
        sum = sum * exp(top - most) + other_sum * exp(other_top - most);
        top = most;
    }
};

// `tops` and `sums` hold one a thread. A target that is no column has probability 0 and the loss +inf.
template <class T>
INLINE void cross_entropy_forward(Thread me, PARAMS CrossEntropyParams &p, SHARED float *tops, SHARED float *sums,
                                  const DEVICE T *logits, const DEVICE u32 *targets, DEVICE float *losses,
                                  DEVICE float *log_sums) {
    u32 target = targets[me.block];
    if (target == IGNORED) {
        if (me.index == 0) losses[me.block] = 0, log_sums[me.block] = 0;
        return;
    }
    logits += Place(me.block, p.heads, p.rows).at(p.x_batch, p.x_head, p.x_row);
    Powers all = {LEAST, 0.0f};
    for (u32 first = me.index; first < p.vocab; first += me.threads * LOGITS_EACH) {
        float x[LOGITS_EACH], most = all.top, sum = 0;
#pragma unroll
        for (u32 e = 0; e < LOGITS_EACH; e++) {
            u32 c = first + e * me.threads;
            x[e] = c < p.vocab ? up(logits[c]) : -GD_INFINITY;
        }
#pragma unroll
        for (u32 e = 0; e < LOGITS_EACH; e++)
            most = fmax(most, x[e]);
#pragma unroll
        for (u32 e = 0; e < LOGITS_EACH; e++)
            sum += exp(x[e] - most);
        all.add(most, sum);
    }
    tops[me.index] = all.top;
    sums[me.index] = all.sum;
    if (!GD_FAULT(48)) block_barrier();
    for (u32 step = me.threads / 2; step > 0; step /= 2) {
        if (me.index < step) {
            all.add(tops[me.index + step], sums[me.index + step]);
            tops[me.index] = all.top;
            sums[me.index] = all.sum;
        }
        block_barrier();
    }
    if (me.index > 0) return;
    float log_sum = all.top + log(all.sum);
    losses[me.block] = target < p.vocab ? log_sum - up(logits[target]) : GD_INFINITY;
    log_sums[me.block] = log_sum;
}

// (softmax - one-hot) times the gradient of the row's loss.
template <class T>
INLINE void cross_entropy_backward(Thread me, PARAMS CrossEntropyParams &p, const DEVICE T *logits,
                                   const DEVICE u32 *targets, const DEVICE float *log_sums, const DEVICE float *dlosses,
                                   DEVICE T *dlogits) {
    u32 target = targets[me.block];
    float log_sum = log_sums[me.block], scale = dlosses[me.block];
    logits += Place(me.block, p.heads, p.rows).at(p.x_batch, p.x_head, p.x_row);
    dlogits += size_t(me.block) * p.vocab;
    for (u32 first = me.index; first < p.vocab; first += me.threads * LOGITS_EACH) {
        float x[LOGITS_EACH];
#pragma unroll
        for (u32 e = 0; e < LOGITS_EACH; e++) {
            u32 c = first + e * me.threads;
            x[e] = c < p.vocab ? up(logits[c]) : 0.0f;
        }
#pragma unroll
        for (u32 e = 0; e < LOGITS_EACH; e++) {
            u32 c = first + e * me.threads;
            float part = exp(x[e] - log_sum) - (c == target ? 1.0f : 0.0f);
            if (c < p.vocab) dlogits[c] = down<T>(target == IGNORED && !GD_FAULT(49) ? 0.0f : part * scale);
        }
    }
}
