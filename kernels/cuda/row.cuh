// The shared words for rows, as the kernels of this folder use them.
#pragma once
#include "../shared/row.h"

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % 32; }

template <class Q, class K>
__device__ __forceinline__ float pair_energy(u32 score, float beta, float prior, const Q *q, const K *k,
                                             u32 dim) {
    return pair_energy(here(), score, beta, prior, q, k, dim);
}
