// Gradients of keys, values and priors: sums over the lists of the inverse index, rounded once. A warp takes
// 128 entries, whatever lists they belong to, so that a key which all queries read costs no more than others:
// a list inside of them is written at once, of a list that goes beyond them a part is kept, and a second
// kernel adds the parts in order.
#pragma once
#include "select.cuh"

constexpr u32 PIECE = 128;

// The inverse index: where lists start, the sorted lists and entries; and room for parts [pieces, 2, dim].
struct Readers {
    const u32 *starts, *lists, *entries;
    float *parts;
};

// Where the part of a list lies that the piece from entry `from` on has: a list that began before the piece,
// or with it, is the piece's first, another one its last.
__device__ __forceinline__ size_t part_at(u32 from, u32 begin, u32 dim) {
    return (size_t(from / PIECE) * 2 + (GD_FAULT(24) ? 0 : begin > from)) * dim;
}

// out [B, Hk, M, dim] = sum over a list's entries of add(entry, place of its row, key, first d, sums of 4 d).
template <class T, class Add>
__device__ __forceinline__ void sum_readers(const SelectParams &p, u32 dim, const Readers &r, T *out,
                                            Add add) {
    Place at(p);
    u32 used = r.starts[p.batch * p.kv_heads * p.keys], from = at.row * PIECE, to = min(from + PIECE, used);
    for (u32 x = from, end; x < to; x = end) {
        u32 list = r.lists[x], begin = r.starts[list], stop = r.starts[list + 1];
        end = min(stop, to);
        bool whole = begin >= from && stop <= to;
        at.b = list / p.keys / p.kv_heads;
        at.kv = list / p.keys % p.kv_heads;
        for (u32 first = 0; first < dim; first += 128) {
            float sum[4] = {0, 0, 0, 0};
            for (u32 e = x; e < (GD_FAULT(23) ? end - 1 : end); e++) {
                u32 slot = r.entries[e];
                at.row = slot / p.slots;
                at.i = at.row % p.queries;
                at.h = at.row / p.queries % p.q_heads;
                add(slot, at, i32(list % p.keys), first, sum);
            }
            for (u32 y = 0; y < 4; y++) {
                u32 d = first + 32 * y + lane_id();
                if (d >= dim) continue;
                if (whole)
                    down(sum[y], out[size_t(list) * dim + d]);
                else
                    r.parts[part_at(from, begin, dim) + d] = sum[y];
            }
        }
    }
}

// The lists that no piece has written: sums of their parts, or zeros; one block of 128 threads a list.
template <class T>
__device__ __forceinline__ void add_parts(u32 dim, const u32 *starts, const float *parts, T *out) {
    u32 list = blockIdx.x, begin = starts[list], end = starts[list + 1];
    bool written = begin < end && begin / PIECE == (end - 1) / PIECE;
    if (written) return;
    for (u32 d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0;
        for (u32 from = begin / PIECE * PIECE; from < end && begin < end; from += PIECE)
            sum += parts[part_at(from, begin, dim) + d];
        down(sum, out[size_t(list) * dim + d]);
    }
}

// dv: every reader adds its weight times dy.
template <class T>
__device__ __forceinline__ void value_gradient(const SelectParams &p, const Readers &r, const float *weights,
                                               const T *dy, T *dv) {
    sum_readers(p, p.value_dim, r, dv, [&](u32 slot, const Place &at, i32, u32 first, float (&sum)[4]) {
        float w = weights[slot];
        if (w == 0) return;
        const T *row = d_row(p, at, dy);
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.value_dim) sum[x] = fmaf(w, up(row[d]), sum[x]);
        }
    });
}

// dk through the energies: 2 beta g (k - q), or -beta g q.
template <class T>
__device__ __forceinline__ void energy_key_gradient(const SelectParams &p, const Readers &r, const T *q,
                                                    const T *k, const float *beta, const float *grad, T *dk) {
    sum_readers(p, p.head_dim, r, dk, [&](u32 slot, const Place &at, i32 j, u32 first, float (&sum)[4]) {
        float g = grad[slot];
        if (g == 0) return;
        const T *query = q_row(p, at, q), *key = k_row(p, at, k, j);
        float c = p.score ? -(beta[at.h] * g) : 2.0f * beta[at.h] * g;
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.head_dim) sum[x] += c * (p.score ? up(query[d]) : up(key[d]) - up(query[d]));
        }
    });
}

// rows [B, Hk, M, prior heads of a key head]: minus the gradients of the energies in which a key's prior takes part.
__device__ __forceinline__ void prior_parts(const SelectParams &p, const Readers &r, const float *grad, float *rows) {
    u32 dim = p.prior_heads / p.kv_heads, share = p.q_heads / p.prior_heads;
    sum_readers(p, dim, r, rows, [&](u32 slot, const Place &at, i32, u32 first, float (&sum)[4]) {
        float g = grad[slot];
#pragma unroll
        for (u32 x = 0; x < 4; x++)
            if (first + 32 * x + lane_id() == at.h / share % dim) sum[x] -= g;
    });
}

// dprior [B|1, Hq|Hk, M] from those rows, one thread a prior.
__device__ __forceinline__ void prior_gradient(const SelectParams &p, const float *rows, float *dprior) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x, dim = p.prior_heads / p.kv_heads;
    if (at >= p.prior_batch * p.prior_heads * p.keys) return;
    u32 j = at % p.keys, head = at / p.keys % p.prior_heads, pb = at / p.keys / p.prior_heads;
    float sum = 0;
    for (u32 b = pb; b < p.batch; b += p.prior_batch)
        sum += rows[((size_t(b) * p.kv_heads + head / dim) * p.keys + j) * dim + (GD_FAULT(67) ? 0 : head % dim)];
    dprior[at] = sum;
}

// Sums of rows [B, Hq, N] into heads [Hq], in f64, one block a head.
__device__ __forceinline__ void head_sums(const SelectParams &p, const float *rows, float *out) {
    GD_SHARED(double[256], part);
    double sum = 0;
    for (u32 x = threadIdx.x; x < p.batch * p.queries; x += blockDim.x)
        sum += double(rows[(size_t(x / p.queries) * p.q_heads + blockIdx.x) * p.queries + x % p.queries]);
    part[threadIdx.x] = sum;
    for (u32 step = blockDim.x / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = float(part[0]);
}
