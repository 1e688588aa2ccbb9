// Instantiations of the steps of select.
#include "../shared/select_barrier.h"
#include "../shared/select_coherence.h"
#include "../shared/inverse_index.h"
#include "../shared/select_residual.h"

// Threads per block and blocks per multiprocessor, which allow 64 or 128 registers per thread. Left to itself, the
// compiler spills registers for higher occupancy.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

#define READERS const u32 *starts, const u32 *segments, const u32 *entries, float *parts

#define SELECT(T)                                                                                                      \
    KERNEL(256, 4)                                                                                                     \
    select_forward_##T##_sm80(SelectParams p, const float *energy, const i32 *index, const float *tau, const T *v,     \
                              i32 *slot, i32 *winner, i32 *nearest, float *chosen, float *margin, float *gate, T *y) { \
        select_forward<T>(this_thread(), p, energy, index, tau, v, slot, winner, nearest, chosen, margin, gate, y);    \
    }                                                                                                                  \
    GD_REGISTER(select_forward_##T##_sm80)                                                                             \
    KERNEL(256, 4)                                                                                                     \
    select_backward_##T##_sm80(SelectParams p, const float *energy, const i32 *index, const float *tau, const T *v,    \
                               const T *dy, float *denergy, float *weights, float *dtau) {                             \
        select_backward<T>(this_thread(), p, energy, index, tau, v, dy, denergy, weights, dtau);                       \
    }                                                                                                                  \
    GD_REGISTER(select_backward_##T##_sm80)                                                                            \
    KERNEL(256, 2)                                                                                                     \
    value_gradient_##T##_sm80(SelectParams p, READERS, const float *weights, const T *dy, T *dv) {                     \
        value_gradient<T>(this_thread(), p, {starts, segments, entries, parts}, weights, dy, dv);                      \
    }                                                                                                                  \
    GD_REGISTER(value_gradient_##T##_sm80)                                                                             \
    KERNEL(256, 4)                                                                                                     \
    energy_forward_##T##_sm80(SelectParams p, const T *q, const T *k, const float *beta, const float *prior,           \
                              const i32 *index, float *energy) {                                                       \
        energy_forward<T>(this_thread(), p, q, k, beta, prior, index, energy);                                         \
    }                                                                                                                  \
    GD_REGISTER(energy_forward_##T##_sm80)                                                                             \
    KERNEL(256, 4)                                                                                                     \
    energy_backward_##T##_sm80(SelectParams p, const T *q, const T *k, const float *beta, const i32 *index,            \
                               const float *grad, T *dq, float *dbeta) {                                               \
        energy_backward<T>(this_thread(), p, q, k, beta, index, grad, dq, dbeta);                                      \
    }                                                                                                                  \
    GD_REGISTER(energy_backward_##T##_sm80)                                                                            \
    KERNEL(256, 2)                                                                                                     \
    energy_key_gradient_##T##_sm80(SelectParams p, READERS, const T *q, const T *k, const float *beta,                 \
                                   const float *grad, T *dk) {                                                         \
        energy_key_gradient<T>(this_thread(), p, {starts, segments, entries, parts}, q, k, beta, grad, dk);            \
    }                                                                                                                  \
    GD_REGISTER(energy_key_gradient_##T##_sm80)                                                                        \
    KERNEL(256, 4)                                                                                                     \
    density_forward_##T##_sm80(SelectParams p, const T *q, const T *k, const float *beta, const float *alpha,          \
                               const i32 *index, float *rho, float *point) {                                           \
        density_forward<T>(this_thread(), p, q, k, beta, alpha, index, rho, point);                                    \
    }                                                                                                                  \
    GD_REGISTER(density_forward_##T##_sm80)                                                                            \
    KERNEL(256, 2)                                                                                                     \
    density_backward_##T##_sm80(SelectParams p, const T *q, const T *k, const float *beta, const float *alpha,         \
                                const i32 *index, const float *grad, T *dq, float *factor, float *dbeta,               \
                                float *dalpha) {                                                                       \
        density_backward<T>(this_thread(), p, q, k, beta, alpha, index, grad, dq, factor, dbeta, dalpha);              \
    }                                                                                                                  \
    GD_REGISTER(density_backward_##T##_sm80)                                                                           \
    KERNEL(256, 2)                                                                                                     \
    density_key_gradient_##T##_sm80(SelectParams p, READERS, const T *q, const T *k, const float *factor, T *dk) {     \
        density_key_gradient<T>(this_thread(), p, {starts, segments, entries, parts}, q, k, factor, dk);               \
    }                                                                                                                  \
    GD_REGISTER(density_key_gradient_##T##_sm80)                                                                       \
    KERNEL(256, 4)                                                                                                     \
    residual_forward_##T##_sm80(SelectParams p, const T *q, const T *k, const i32 *index, T *out) {                    \
        residual_forward<T>(this_thread(), p, q, k, index, out);                                                       \
    }                                                                                                                  \
    GD_REGISTER(residual_forward_##T##_sm80)                                                                           \
    KERNEL(256, 4)                                                                                                     \
    residual_backward_##T##_sm80(SelectParams p, const T *q, const T *k, const i32 *index, const T *dr, T *dq) {       \
        residual_backward<T>(this_thread(), p, q, k, index, dr, dq);                                                   \
    }                                                                                                                  \
    GD_REGISTER(residual_backward_##T##_sm80)                                                                          \
    KERNEL(256, 2)                                                                                                     \
    residual_key_gradient_##T##_sm80(SelectParams p, READERS, const T *q, const T *k, const T *dr, T *dk) {            \
        residual_key_gradient<T>(this_thread(), p, {starts, segments, entries, parts}, q, k, dr, dk);                  \
    }                                                                                                                  \
    GD_REGISTER(residual_key_gradient_##T##_sm80)                                                                      \
    KERNEL(128, 8) add_partials_##T##_sm80(SelectParams p, const u32 *starts, const float *parts, T *out) {            \
        add_partials<T>(this_thread(), p.head_dim, starts, parts, out);                                                \
    }                                                                                                                  \
    GD_REGISTER(add_partials_##T##_sm80)

SELECT(f16)
SELECT(bf16)
SELECT(f32)

KERNEL(256, 4)
prior_rows_sm80(SelectParams p, READERS, const float *grad, float *rows) {
    prior_rows(this_thread(), p, {starts, segments, entries, parts}, grad, rows);
}
GD_REGISTER(prior_rows_sm80)
KERNEL(256, 4) prior_gradient_sm80(SelectParams p, const float *rows, float *dprior) {
    prior_gradient(this_thread(), p, rows, dprior);
}
GD_REGISTER(prior_gradient_sm80)
KERNEL(256, 4) head_sums_sm80(SelectParams p, const float *rows, float *out) {
    GD_SHARED(Total[256], part);
    head_sums(this_thread(), p, part, rows, out);
}
GD_REGISTER(head_sums_sm80)
KERNEL(128, 8)
barrier_forward_sm80(SelectParams p, const float *energy, const i32 *index, const uint8_t *flags, float *out) {
    barrier_forward(this_thread(), p, energy, index, flags, out);
}
GD_REGISTER(barrier_forward_sm80)
KERNEL(128, 8)
barrier_backward_sm80(SelectParams p, const float *energy, const i32 *index, const uint8_t *flags, const float *grad,
                      float *out) {
    barrier_backward(this_thread(), p, energy, index, flags, grad, out);
}
GD_REGISTER(barrier_backward_sm80)

KERNEL(256, 4) select_remaining_sm80(SelectParams p, const i32 *index, const i32 *slot, i32 *out) {
    select_remaining(this_thread(), p, index, slot, out);
}
GD_REGISTER(select_remaining_sm80)

KERNEL(256, 4) sort_init_sm80(SortParams p, const i32 *index, u32 *segments, u32 *entries) {
    sort_init(this_thread(), p, index, segments, entries);
}
GD_REGISTER(sort_init_sm80)
KERNEL(256, 4) sort_histogram_sm80(SortParams p, const u32 *segments, u32 *counts) {
    GD_SHARED(u32[DIGITS], count);
    sort_histogram(this_thread(), p, count, segments, counts);
}
GD_REGISTER(sort_histogram_sm80)
KERNEL(256, 4) sort_offsets_sm80(SortParams p, u32 *counts) {
    GD_SHARED(u32[SORT_WARPS], sums);
    GD_SHARED(u32, total);
    sort_offsets(this_thread(), p, sums, &total, counts);
}
GD_REGISTER(sort_offsets_sm80)
KERNEL(256, 4)
sort_scatter_sm80(SortParams p, const u32 *offsets, const u32 *segments, const u32 *entries, u32 *segments_out,
                  u32 *entries_out) {
    GD_SHARED(u32[SORT_WARPS * DIGITS], next);
    sort_scatter(this_thread(), p, next, offsets, segments, entries, segments_out, entries_out);
}
GD_REGISTER(sort_scatter_sm80)
KERNEL(256, 4) sort_segment_starts_sm80(SortParams p, const u32 *segments, u32 *starts) {
    sort_segment_starts(this_thread(), p, segments, starts);
}
GD_REGISTER(sort_segment_starts_sm80)
