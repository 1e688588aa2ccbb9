// The bias of every key, to which <q, k> is added to give its score. Keys are ordered by scores, because
// -energy / (2 beta) = <q, k> - |k|^2 / 2 + b / (2 beta) + (a term of the query alone): the bias is
// -|k|^2 / 2 + b / (2 beta) for the energy and b / beta for the dot product. One warp per key.
#pragma once
#include "row.h"

template <class T>
INLINE void write_key_biases(Thread me, PARAMS BiasParams &p, const DEVICE T *k, const DEVICE float *beta,
                             const DEVICE float *prior, DEVICE float *bias) {
    u32 warps = me.warps(), row = me.block * warps + me.warp();
    if (row >= p.batch * p.bias_heads * p.bias_row) return;
    u32 j = row % p.bias_row, head = row / p.bias_row % p.bias_heads, b = row / p.bias_row / p.bias_heads;
    float x = -GD_INFINITY;
    if (j < p.keys) {
        u32 kv = head / (p.bias_heads / p.kv_heads);
        const DEVICE T *key = k + size_t(b) * p.k_batch + size_t(kv) * p.k_head + size_t(j) * p.k_row;
        float sum = key_bias(me, p.score, key, p.head_dim);
        float scale = (p.score == SCORE_DOT ? 1.0f : 0.5f) / beta[head % p.q_heads];
        x = p.prior_batch ? fma(prior[prior_offset(p, b, head) + j], scale, sum) : sum;
    }
    if (me.lane() == 0) bias[row] = x;
}
