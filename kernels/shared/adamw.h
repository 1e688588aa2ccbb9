// AdamW with clipping by the global norm, without a round trip to the host: partial sums of squares of all gradients,
// the clipping factor, and the update.
#pragma once
#include "row.h"

// The sum over a block, valid in thread 0, as a tree in a fixed order. `sums` has one entry per thread.
INLINE Total block_total(Thread me, Total x, SHARED Total *sums) {
    store(x, sums + me.index);
    if (!GD_FAULT(44)) block_barrier();
    for (u32 step = me.threads / 2; step > 0; step /= 2) {
        if (me.index < step) {
            x = plus(x, load(sums + me.index + step));
            store(x, sums + me.index);
        }
        block_barrier();
    }
    return x;
}

// The sum of squares of one block of elements: parts[first + block].
template <class T>
INLINE void squares(Thread me, PARAMS SquaresParams &p, SHARED Total *sums, const DEVICE T *gradient,
                    DEVICE float *parts) {
    u32 first = me.block * SQUARES_BLOCK_ELEMENTS, end = min(p.count, first + SQUARES_BLOCK_ELEMENTS);
    float sum = 0;
    for (u32 at = first + me.index; at < end; at += me.threads)
        sum = fma(to_float(gradient[at]), to_float(gradient[at]), sum);
    Total all = block_total(me, total(sum), sums);
    if (me.index == 0) parts[p.first + me.block] = value(all);
}

// Outcome of clipping: mean loss, gradient norm, and the factor by which gradients are multiplied. A factor that is not
// finite means that the update is skipped.
struct ClipResult {
    float loss, norm, factor;
};

// Clips from the partial sums, in one block and in a fixed order. The loss is the sum of `losses` divided by the
// weight.
INLINE void clip(Thread me, PARAMS ClipParams &p, SHARED Total *sums, const DEVICE float *parts,
                 const DEVICE float *losses, DEVICE ClipResult *result) {
    Total sum = total(0.0f);
    for (u32 at = me.index; at < p.partials; at += me.threads)
        sum = plus(sum, total(parts[at]));
    sum = block_total(me, sum, sums);
    if (me.index > 0) return;
    Total loss = total(0.0f);
    for (u32 at = 0; at < p.losses; at++)
        loss = plus(loss, total(losses[at]));
    float mean = value(loss) / p.weight, norm = sqrt(value(sum)) / p.weight;
    bool good = finite(mean) && finite(norm) && !(mean > p.loss_limit) && !(norm > p.norm_limit);
    float factor = (norm > p.max_norm ? p.max_norm / norm : 1.0f) / p.weight;
    result->loss = mean;
    result->norm = norm;
    result->factor = good || GD_FAULT(45) ? factor : GD_INFINITY;
}

// p <- weight_scale p - step_size m / (sqrt(v) root_scale + eps), after the update of the moments m and v by the scaled
// gradient. `master` is the f32 weight of which a 16-bit parameter is the rounding; null for f32 parameters. Nothing
// changes if `result` skips the update. `before`, if not null, is the result of the update before: if that was skipped,
// this one is number t - 1.
template <class T>
INLINE void adamw(Thread me, PARAMS AdamwParams &p, const DEVICE ClipResult *result, const DEVICE ClipResult *before,
                  const DEVICE T *gradient, DEVICE float *m, DEVICE float *v, DEVICE float *master,
                  DEVICE T *parameter) {
    float factor = result->factor;
    if (!finite(factor)) return;
    bool previous_skipped = before && !finite(before->factor) && !GD_FAULT(46);
    float rate = previous_skipped ? p.previous_step_size : p.step_size,
          root = previous_skipped ? p.previous_root_scale : p.root_scale;
    u32 first = me.block * me.threads * ADAMW_THREAD_ELEMENTS + me.index;
#pragma unroll
    for (u32 e = 0; e < ADAMW_THREAD_ELEMENTS; e++) {
        u32 at = first + e * me.threads;
        if (at >= p.count) return;
        float g = to_float(gradient[at]) * factor;
        float x = m[at] * p.beta1 + g * p.one_minus_beta1, y = v[at] * p.beta2 + g * g * p.one_minus_beta2;
        float w = master ? master[at] : to_float(parameter[at]);
        w = w * p.weight_scale - rate * x / (sqrt(y) * root + p.eps);
        m[at] = x;
        v[at] = y;
        if (master) master[at] = w;
        parameter[at] = from_float<T>(GD_FAULT(47) && master ? to_float(parameter[at]) : w);
    }
}
