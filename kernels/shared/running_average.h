// Gated running average, with its weights in the log domain: with a_t = sigmoid(decay_t),
// log d_t = logaddexp(log a_t + log d_(t-1), write_t), take_t = e^(write_t - log d_t), keep_t = 1 - take_t,
// m_t = keep_t m_(t-1) + take_t v_t. Sequence s = b H + h has blocks of AVERAGE_BLOCK_STEPS steps.
//
// The recurrences of the scalars are associative: one thread block scans each sequence in parallel. The recurrence of
// the rows runs in three passes: every block of steps from zero, a sequential pass that gives every block its start,
// and every block again from its start.
#pragma once
#include "row.h"

INLINE float log_sigmoid(float x) { return fmin(x, 0.0f) - log1p(exp(-fabs(x))); }

INLINE float log_add(float x, float y) {
    float top = fmax(x, y);
    return top == -GD_INFINITY ? top : top + log1p(exp(-fabs(x - y)));
}

// The map z -> log_add(a + z, b). `then` composes two maps, x first.
struct LogStep {
    float a, b;
    static INLINE LogStep then(LogStep x, LogStep y) { return {x.a + y.a, log_add(y.a + x.b, y.b)}; }
    static INLINE LogStep identity() { return {0.0f, -GD_INFINITY}; }
};
// The map z -> a z + b.
struct LinearStep {
    float a, b;
    static INLINE LinearStep then(LinearStep x, LinearStep y) { return {x.a * y.a, fma(y.a, x.b, y.b)}; }
    static INLINE LinearStep identity() { return {1.0f, 0.0f}; }
};

// Inclusive scan: the composition of the maps of all threads up to this one; `all` is that of the whole block. Contains
// two block barriers, so that shared memory that was read before the call may be overwritten after it. `part` has two
// floats per warp.
template <class Step> INLINE Step block_compose(Thread me, Step x, LOCAL Step &all, SHARED float *part) {
    u32 lane = me.lane(), warp = me.warp();
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        Step y = {shuffle_up(x.a, step), shuffle_up(x.b, step)};
        if (lane >= step) x = Step::then(y, x);
    }
    if (lane == 31) part[2 * warp] = x.a, part[2 * warp + 1] = x.b;
    if (!GD_FAULT(26)) block_barrier();
    Step before = Step::identity();
    all = Step::identity();
    for (u32 w = 0; w < AVERAGE_SCAN_THREADS / 32; w++) {
        Step y = {part[2 * w], part[2 * w + 1]};
        if (w < warp) before = Step::then(before, y);
        all = Step::then(all, y);
    }
    block_barrier();
    return Step::then(before, x);
}

// keep and take [B H, N, 2], and log d after the last step [B H]. `start` may be null. `logs` has one float per thread.
template <class T>
INLINE void running_average_weights(Thread me, PARAMS RunningAverageParams &p, SHARED float *part, SHARED float *logs,
                                    const DEVICE T *decay, const DEVICE T *write, const DEVICE float *start,
                                    DEVICE float *weights, DEVICE float *last) {
    u32 s = me.block;
    float carry = start ? start[s] : -GD_INFINITY;
    for (u32 first = 0; first < p.rows; first += AVERAGE_SCAN_THREADS) {
        u32 t = first + me.index;
        LogStep map = LogStep::identity(), all;
        float w = 0;
        if (t < p.rows) {
            w = to_float(write[size_t(s) * p.rows + t]);
            map = {log_sigmoid(to_float(decay[size_t(s) * p.rows + t])), w};
        }
        LogStep upto = block_compose(me, map, all, part);
        logs[me.index] = log_add(upto.a + carry, upto.b);
        block_barrier();
        if (t < p.rows) {
            float before = me.index ? logs[me.index - 1] : carry, past = map.a + before, keep = 1, take = 0;
            if (past > -GD_INFINITY || w > -GD_INFINITY) {
                // Both are computed from the exponential, so that neither loses relative precision as 1 minus the
                // other.
                float lead = w - past, e = exp(-fabs(lead)), larger = 1 / (1 + e), smaller = e / (1 + e);
                keep = lead >= 0 ? smaller : larger;
                take = lead >= 0 ? larger : smaller;
            }
            weights[2 * (size_t(s) * p.rows + t)] = keep;
            weights[2 * (size_t(s) * p.rows + t) + 1] = take;
        }
        carry = log_add(all.a + carry, all.b);
    }
    if (me.index == 0) last[s] = carry;
}

// mean <- keep mean + take value. A small `take` is applied as a correction of the mean, a large one directly, which
// loses the least to rounding in both cases.
INLINE float update_mean(float keep, float take, float mean, float value) {
    return take > 0.5f ? fma(keep, mean, take * value) : fma(take, value - mean, mean);
}

// Sequence and block of steps of a thread block, whose threads take one element d each.
struct BlockSteps {
    u32 s, block, first, end, b, h, kv;

    INLINE BlockSteps(Thread me, PARAMS RunningAverageParams &p) {
        s = me.block / p.blocks;
        block = me.block % p.blocks;
        first = block * AVERAGE_BLOCK_STEPS;
        end = min(first + AVERAGE_BLOCK_STEPS, p.rows);
        b = s / p.heads;
        h = s % p.heads;
        kv = h / (p.heads / p.value_heads);
    }
};

template <class T>
INLINE const DEVICE T *value_row(PARAMS RunningAverageParams &p, u32 b, u32 kv, u32 t, const DEVICE T *v) {
    return v + size_t(b) * p.v_batch + size_t(kv) * p.v_head + size_t(t) * p.v_row;
}

// First pass: the mean at the end of every block of steps from a start of zero, carry [B H, blocks, D], and the block's
// weights of its start and of its own values, joint [B H, blocks, 2].
template <class T>
INLINE void running_average_partial(Thread me, PARAMS RunningAverageParams &p, const DEVICE T *v,
                                    const DEVICE float *weights, DEVICE float *carry, DEVICE float *joint) {
    BlockSteps at(me, p);
    u32 d = me.index;
    float mean = 0, keep = 1, take = 0;
    for (u32 t = at.first; t < at.end; t++) {
        const DEVICE float *w = weights + 2 * (size_t(at.s) * p.rows + t);
        if (d < p.dim) mean = update_mean(w[0], w[1], mean, to_float(value_row(p, at.b, at.kv, t, v)[d]));
        keep *= w[0];
        take = update_mean(w[0], w[1], take, 1.0f);
    }
    size_t block_at = size_t(at.s) * p.blocks + at.block;
    if (d < p.dim) carry[block_at * p.dim + d] = mean;
    if (d == 0) joint[2 * block_at] = keep, joint[2 * block_at + 1] = take;
}

// Second pass: replaces carry by the start of every block, and writes the mean after the last step [B H, D]. One thread
// block per sequence.
INLINE void running_average_carry(Thread me, PARAMS RunningAverageParams &p, const DEVICE float *joint,
                                  const DEVICE float *start, DEVICE float *carry, DEVICE float *last) {
    u32 s = me.block, d = me.index;
    if (d >= p.dim) return;
    float mean = start ? start[size_t(s) * p.dim + d] : 0.0f;
    for (u32 c = 0; c < p.blocks; c++) {
        size_t block_at = size_t(s) * p.blocks + c;
        float alone = carry[block_at * p.dim + d], keep = joint[2 * block_at], take = joint[2 * block_at + 1];
        carry[block_at * p.dim + d] = mean;
        mean = take > 0.5f ? fma(keep, mean, alone) : mean + (alone - take * mean);
    }
    last[size_t(s) * p.dim + d] = mean;
}

template <class T>
INLINE void running_average_rows(Thread me, PARAMS RunningAverageParams &p, const DEVICE T *v,
                                 const DEVICE float *weights, const DEVICE float *carry, DEVICE T *m) {
    BlockSteps at(me, p);
    u32 d = me.index;
    if (d >= p.dim) return;
    float mean = carry[(size_t(at.s) * p.blocks + at.block) * p.dim + d];
    for (u32 t = at.first; t < at.end; t++) {
        const DEVICE float *w = weights + 2 * (size_t(at.s) * p.rows + t);
        mean = update_mean(w[0], w[1], mean, to_float(value_row(p, at.b, at.kv, t, v)[d]));
        m[(size_t(at.s) * p.rows + t) * p.dim + d] = from_float<T>(mean);
    }
}

template <class T>
INLINE float mean_gradient(PARAMS RunningAverageParams &p, const DEVICE T *dm, u32 b, u32 h, u32 t, u32 d) {
    return to_float(dm[size_t(b) * p.d_batch + size_t(h) * p.d_head + size_t(t) * p.d_row + d]);
}

// Backward, first pass: the gradient that every block of steps alone passes to the mean before it, carry [B H, blocks,
// D]: keep_first p_first with p_t = dm_t + keep_(t+1) p_(t+1). And the product of its keep_t, joint [B H, blocks, 2].
template <class T>
INLINE void running_average_partial_backward(Thread me, PARAMS RunningAverageParams &p, const DEVICE T *dm,
                                             const DEVICE float *weights, DEVICE float *carry, DEVICE float *joint) {
    BlockSteps at(me, p);
    u32 d = me.index;
    float sum = 0, keep = 1;
    for (u32 t = at.end; t-- > at.first;) {
        float k = weights[2 * (size_t(at.s) * p.rows + t)];
        if (d < p.dim) sum = k * (sum + mean_gradient(p, dm, at.b, at.h, t, d));
        keep *= k;
    }
    size_t block_at = size_t(at.s) * p.blocks + at.block;
    if (d < p.dim) carry[block_at * p.dim + d] = sum;
    if (d == 0) joint[2 * block_at] = keep;
}

// Backward, second pass: replaces carry by the gradient that reaches every block from the blocks after it.
INLINE void running_average_carry_backward(Thread me, PARAMS RunningAverageParams &p, const DEVICE float *joint,
                                           DEVICE float *carry) {
    u32 s = me.block, d = me.index;
    if (d >= p.dim) return;
    float sum = 0;
    for (u32 c = p.blocks; c-- > 0;) {
        size_t block_at = size_t(s) * p.blocks + c;
        float alone = carry[block_at * p.dim + d];
        carry[block_at * p.dim + d] = sum;
        sum = fma(joint[2 * block_at], sum, alone);
    }
}

// Backward, third pass: dv [B, Hk, N, D], summed over the heads that share a value head, and the partial sums of every
// warp of dtake_t = <p_t, v_t - m_(t-1)>: [B H, N, warps]. A thread block takes one block of steps of a value head.
// `start` is the mean before the first step, or null. `gradient` has one float per thread and head of the group.
template <class T>
INLINE void running_average_rows_backward(Thread me, PARAMS RunningAverageParams &p, SHARED float *gradient,
                                          const DEVICE T *v, const DEVICE T *m, const DEVICE T *dm,
                                          const DEVICE float *weights, const DEVICE float *carry,
                                          const DEVICE float *start, DEVICE T *dv, DEVICE float *dtake) {
    u32 sv = me.block / p.blocks, block = me.block % p.blocks, b = sv / p.value_heads, kv = sv % p.value_heads;
    u32 group = p.heads / p.value_heads, d = me.index, warps = me.warps();
    u32 first = block * AVERAGE_BLOCK_STEPS, end = min(first + AVERAGE_BLOCK_STEPS, p.rows);
    size_t first_head = size_t(b) * p.heads + kv * group;
    for (u32 j = 0; j < group; j++)
        gradient[j * me.threads + d] = d < p.dim ? carry[((first_head + j) * p.blocks + block) * p.dim + d] : 0.0f;
    for (u32 t = end; t-- > first;) {
        float sum = 0, value = d < p.dim ? to_float(value_row(p, b, kv, t, v)[d]) : 0.0f;
        for (u32 j = 0; j < group; j++) {
            size_t s = first_head + j;
            float keep = weights[2 * (s * p.rows + t)], take = weights[2 * (s * p.rows + t) + 1], product = 0;
            if (d < p.dim) {
                float x = gradient[j * me.threads + d] + mean_gradient(p, dm, b, kv * group + j, t, d);
                float before = t ? to_float(m[(s * p.rows + t - 1) * p.dim + d]) : start ? start[s * p.dim + d] : 0.0f;
                product = x * (value - before);
                sum = fma(take, x, sum);
                gradient[j * me.threads + d] = keep * x;
            }
            product = warp_sum(product);
            if (me.lane() == 0) dtake[(s * p.rows + t) * warps + me.warp()] = product;
        }
        if (d < p.dim) dv[(size_t(sv) * p.rows + t) * p.dim + d] = from_float<T>(sum);
    }
}

// ddecay and dwrite [B, H, N], from the last step to the first: with dz = dtake take keep and q the value that the step
// after passes on, dwrite = dz + take q; keep q - dz is the q of the step before and, times sigmoid(-decay), ddecay.
template <class T>
INLINE void running_average_weights_backward(Thread me, PARAMS RunningAverageParams &p, SHARED float *part,
                                             SHARED float *after, const DEVICE T *decay, const DEVICE float *weights,
                                             const DEVICE float *dtake, u32 warps, DEVICE T *ddecay, DEVICE T *dwrite) {
    u32 s = me.block;
    float carry = 0;
    for (u32 done = 0; done < p.rows; done += AVERAGE_SCAN_THREADS) {
        bool inside = done + me.index < p.rows;
        u32 t = inside ? p.rows - 1 - done - me.index : 0;
        size_t at = size_t(s) * p.rows + t;
        float keep = 1, take = 0, dz = 0;
        if (inside) {
            keep = weights[2 * at];
            take = weights[2 * at + 1];
            float sum = 0;
            for (u32 w = 0; w < warps; w++)
                sum += dtake[at * warps + w];
            dz = sum * take * keep;
        }
        LinearStep all, upto = block_compose(me, LinearStep{keep, -dz}, all, part);
        float q = fma(upto.a, carry, upto.b);
        after[me.index] = q;
        block_barrier();
        if (inside) {
            float before = me.index ? after[me.index - 1] : carry;
            dwrite[at] = from_float<T>(dz + take * before);
            ddecay[at] = from_float<T>(q / (1 + exp(to_float(decay[at]))));
        }
        carry = fma(all.a, carry, all.b);
    }
}
