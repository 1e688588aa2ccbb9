// AdamW with clipping that never leaves the device: sums of squares of all gradients, what they say about the update,
// and the update itself.
#pragma once
#include "row.h"

// Elements of a gradient that make one part of its sum of squares; each thread of a block of 256 takes 64.
// Elements of a thread of an update.

// The sum over a block, in thread 0, in an order of its own; `sums` holds one a thread.
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

// A piece of a gradient: parts[first + block].
template <class T>
INLINE void squares(Thread me, PARAMS SquaresParams &p, SHARED Total *sums, const DEVICE T *gradient,
                    DEVICE float *parts) {
    u32 first = me.block * SQUARES_BLOCK_ELEMENTS, end = min(p.count, first + SQUARES_BLOCK_ELEMENTS);
    float sum = 0;
    for (u32 at = first + me.index; at < end; at += me.threads)
        sum = fma(up(gradient[at]), up(gradient[at]), sum);
    Total all = block_total(me, total(sum), sums);
    if (me.index == 0) parts[p.first + me.block] = value(all);
}

// What is written about an update: its loss, its gradient's norm, and the factor of the gradient. A factor that is
// not finite says that the update is skipped.
struct Verdict {
    float loss, norm, factor;
};

// One block: the verdict from the parts, in order. The loss is the sum of `losses`, by the weight.
INLINE void clip(Thread me, PARAMS ClipParams &p, SHARED Total *sums, const DEVICE float *parts,
                 const DEVICE float *losses, DEVICE Verdict *verdict) {
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
    verdict->loss = mean;
    verdict->norm = norm;
    verdict->factor = good || GD_FAULT(45) ? factor : GD_INFINITY;
}

// p <- keep p - rate m / (sqrt(v) root + eps), after m and v have moved toward the scaled gradient. `master` is the
// f32 weight of which a 16-bit parameter is the rounding; null where the parameter is its own. Where the verdict
// says so, nothing changes; where the one on the update before, if it is given, says that that was skipped, this is
// update t - 1.
template <class T>
INLINE void adamw(Thread me, PARAMS AdamwParams &p, const DEVICE Verdict *verdict, const DEVICE Verdict *before,
                  const DEVICE T *gradient, DEVICE float *m, DEVICE float *v, DEVICE float *master,
                  DEVICE T *parameter) {
    float factor = verdict->factor;
    if (!finite(factor)) return;
    bool late = before && !finite(before->factor) && !GD_FAULT(46);
    float rate = late ? p.previous_step_size : p.step_size, root = late ? p.previous_root_scale : p.root_scale;
    u32 first = me.block * me.threads * ADAMW_THREAD_ELEMENTS + me.index;
#pragma unroll
    for (u32 e = 0; e < ADAMW_THREAD_ELEMENTS; e++) {
        u32 at = first + e * me.threads;
        if (at >= p.count) return;
        float g = up(gradient[at]) * factor;
        float x = m[at] * p.beta1 + g * p.one_minus_beta1, y = v[at] * p.beta2 + g * g * p.one_minus_beta2;
        float w = master ? master[at] : up(parameter[at]);
        w = w * p.weight_scale - rate * x / (sqrt(y) * root + p.eps);
        m[at] = x;
        v[at] = y;
        if (master) master[at] = w;
        parameter[at] = down<T>(GD_FAULT(47) && master ? up(parameter[at]) : w);
    }
}
