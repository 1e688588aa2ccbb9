// Instantiations of the steps of select.
#include "../shared/select_barrier.h"
#include "../shared/select_coherence.h"
#include "../shared/inverse_index.h"
#include "../shared/select_residual.h"

#define PARAMS_AT_0 constant SelectParams &p [[buffer(0)]]
// The first four buffers of sums over the readers of keys.
#define READERS                                                                                                        \
    const device u32 *starts [[buffer(1)]], const device u32 *segments [[buffer(2)]],                                  \
        const device u32 *entries [[buffer(3)]], device float *parts [[buffer(4)]]
#define GD_READERS                                                                                                     \
    Readers { starts, segments, entries, parts }

#define SELECT(T)                                                                                                      \
    KERNEL(256)                                                                                                        \
    select_forward_##T##_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]],                                  \
                               const device i32 *index [[buffer(2)]], const device float *tau [[buffer(3)]],           \
                               const device T *v [[buffer(4)]], device i32 *slot [[buffer(5)]],                        \
                               device i32 *winner [[buffer(6)]], device i32 *nearest [[buffer(7)]],                    \
                               device float *chosen [[buffer(8)]], device float *margin [[buffer(9)]],                 \
                               device float *gate [[buffer(10)]], device T *y [[buffer(11)]], GD_THREAD) {             \
        select_forward<T>(GD_HERE, p, energy, index, tau, v, GD_IF_PRESENT(5, slot), winner, nearest, chosen, margin,  \
                          gate, GD_IF_PRESENT(11, y));                                                                 \
    }                                                                                                                  \
    GD_REGISTER(select_forward_##T##_metal)                                                                            \
    KERNEL(256)                                                                                                        \
    select_backward_##T##_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]],                                 \
                                const device i32 *index [[buffer(2)]], const device float *tau [[buffer(3)]],          \
                                const device T *v [[buffer(4)]], const device T *dy [[buffer(5)]],                     \
                                device float *denergy [[buffer(6)]], device float *weights [[buffer(7)]],              \
                                device float *dtau [[buffer(8)]], GD_THREAD) {                                         \
        select_backward<T>(GD_HERE, p, energy, index, tau, v, dy, denergy, weights, dtau);                             \
    }                                                                                                                  \
    GD_REGISTER(select_backward_##T##_metal)                                                                           \
    KERNEL(256)                                                                                                        \
    value_gradient_##T##_metal(PARAMS_AT_0, READERS, const device float *weights [[buffer(5)]],                        \
                               const device T *dy [[buffer(6)]], device T *dv [[buffer(7)]], GD_THREAD) {              \
        value_gradient<T>(GD_HERE, p, GD_READERS, weights, dy, dv);                                                    \
    }                                                                                                                  \
    GD_REGISTER(value_gradient_##T##_metal)                                                                            \
    KERNEL(256)                                                                                                        \
    energy_forward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],          \
                               const device float *beta [[buffer(3)]], const device float *prior [[buffer(4)]],        \
                               const device i32 *index [[buffer(5)]], device float *energy [[buffer(6)]], GD_THREAD) { \
        energy_forward<T>(GD_HERE, p, q, k, beta, prior, index, energy);                                               \
    }                                                                                                                  \
    GD_REGISTER(energy_forward_##T##_metal)                                                                            \
    KERNEL(256)                                                                                                        \
    energy_backward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],         \
                                const device float *beta [[buffer(3)]], const device i32 *index [[buffer(4)]],         \
                                const device float *grad [[buffer(5)]], device T *dq [[buffer(6)]],                    \
                                device float *dbeta [[buffer(7)]], GD_THREAD) {                                        \
        energy_backward<T>(GD_HERE, p, q, k, beta, index, grad, dq, dbeta);                                            \
    }                                                                                                                  \
    GD_REGISTER(energy_backward_##T##_metal)                                                                           \
    KERNEL(256)                                                                                                        \
    energy_key_gradient_##T##_metal(PARAMS_AT_0, READERS, const device T *q [[buffer(5)]],                             \
                                    const device T *k [[buffer(6)]], const device float *beta [[buffer(7)]],           \
                                    const device float *grad [[buffer(8)]], device T *dk [[buffer(9)]], GD_THREAD) {   \
        energy_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, beta, grad, dk);                                          \
    }                                                                                                                  \
    GD_REGISTER(energy_key_gradient_##T##_metal)                                                                       \
    KERNEL(256)                                                                                                        \
    density_forward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],         \
                                const device float *beta [[buffer(3)]], const device float *alpha [[buffer(4)]],       \
                                const device i32 *index [[buffer(5)]], device float *rho [[buffer(6)]],                \
                                device float *point [[buffer(7)]], GD_THREAD) {                                        \
        density_forward<T>(GD_HERE, p, q, k, beta, alpha, index, GD_IF_PRESENT(6, rho), GD_IF_PRESENT(7, point));      \
    }                                                                                                                  \
    GD_REGISTER(density_forward_##T##_metal)                                                                           \
    KERNEL(256)                                                                                                        \
    density_backward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],        \
                                 const device float *beta [[buffer(3)]], const device float *alpha [[buffer(4)]],      \
                                 const device i32 *index [[buffer(5)]], const device float *grad [[buffer(6)]],        \
                                 device T *dq [[buffer(7)]], device float *factor [[buffer(8)]],                       \
                                 device float *dbeta [[buffer(9)]], device float *dalpha [[buffer(10)]], GD_THREAD) {  \
        density_backward<T>(GD_HERE, p, q, k, beta, alpha, index, grad, dq, factor, dbeta, dalpha);                    \
    }                                                                                                                  \
    GD_REGISTER(density_backward_##T##_metal)                                                                          \
    KERNEL(256)                                                                                                        \
    density_key_gradient_##T##_metal(PARAMS_AT_0, READERS, const device T *q [[buffer(5)]],                            \
                                     const device T *k [[buffer(6)]], const device float *factor [[buffer(7)]],        \
                                     device T *dk [[buffer(8)]], GD_THREAD) {                                          \
        density_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, factor, dk);                                             \
    }                                                                                                                  \
    GD_REGISTER(density_key_gradient_##T##_metal)                                                                      \
    KERNEL(256)                                                                                                        \
    residual_forward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],        \
                                 const device i32 *index [[buffer(3)]], device T *out [[buffer(4)]], GD_THREAD) {      \
        residual_forward<T>(GD_HERE, p, q, k, index, out);                                                             \
    }                                                                                                                  \
    GD_REGISTER(residual_forward_##T##_metal)                                                                          \
    KERNEL(256)                                                                                                        \
    residual_backward_##T##_metal(PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],       \
                                  const device i32 *index [[buffer(3)]], const device T *dr [[buffer(4)]],             \
                                  device T *dq [[buffer(5)]], GD_THREAD) {                                             \
        residual_backward<T>(GD_HERE, p, q, k, index, dr, dq);                                                         \
    }                                                                                                                  \
    GD_REGISTER(residual_backward_##T##_metal)                                                                         \
    KERNEL(256)                                                                                                        \
    residual_key_gradient_##T##_metal(PARAMS_AT_0, READERS, const device T *q [[buffer(5)]],                           \
                                      const device T *k [[buffer(6)]], const device T *dr [[buffer(7)]],               \
                                      device T *dk [[buffer(8)]], GD_THREAD) {                                         \
        residual_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, dr, dk);                                                \
    }                                                                                                                  \
    GD_REGISTER(residual_key_gradient_##T##_metal)                                                                     \
    KERNEL(128)                                                                                                        \
    add_partials_##T##_metal(PARAMS_AT_0, const device u32 *starts [[buffer(1)]],                                      \
                             const device float *parts [[buffer(2)]], device T *out [[buffer(3)]], GD_THREAD) {        \
        add_partials<T>(GD_HERE, p.head_dim, starts, parts, out);                                                      \
    }                                                                                                                  \
    GD_REGISTER(add_partials_##T##_metal)

SELECT(f32)
SELECT(f16)
SELECT(bf16)

KERNEL(256)
prior_rows_metal(PARAMS_AT_0, READERS, const device float *grad [[buffer(5)]], device float *rows [[buffer(6)]],
                     GD_THREAD) {
    prior_rows(GD_HERE, p, GD_READERS, grad, rows);
}
GD_REGISTER(prior_rows_metal)
KERNEL(256)
prior_gradient_metal(PARAMS_AT_0, const device float *rows [[buffer(1)]], device float *dprior [[buffer(2)]],
                     GD_THREAD) {
    prior_gradient(GD_HERE, p, rows, dprior);
}
GD_REGISTER(prior_gradient_metal)
KERNEL(256)
head_sums_metal(PARAMS_AT_0, const device float *rows [[buffer(1)]], device float *out [[buffer(2)]], GD_THREAD) {
    GD_SHARED(Total[256], part);
    head_sums(GD_HERE, p, part, rows, out);
}
GD_REGISTER(head_sums_metal)
KERNEL(128)
barrier_forward_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]], const device i32 *index [[buffer(2)]],
                      const device uint8_t *flags [[buffer(3)]], device float *out [[buffer(4)]], GD_THREAD) {
    barrier_forward(GD_HERE, p, energy, index, flags, out);
}
GD_REGISTER(barrier_forward_metal)
KERNEL(128)
barrier_backward_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]], const device i32 *index [[buffer(2)]],
                       const device uint8_t *flags [[buffer(3)]], const device float *grad [[buffer(4)]],
                       device float *out [[buffer(5)]], GD_THREAD) {
    barrier_backward(GD_HERE, p, energy, index, flags, grad, out);
}
GD_REGISTER(barrier_backward_metal)
KERNEL(256)
select_remaining_metal(PARAMS_AT_0, const device i32 *index [[buffer(1)]], const device i32 *slot [[buffer(2)]],
                       device i32 *out [[buffer(3)]], GD_THREAD) {
    select_remaining(GD_HERE, p, index, slot, out);
}
GD_REGISTER(select_remaining_metal)

KERNEL(256)
sort_init_metal(constant SortParams &p [[buffer(0)]], const device i32 *index [[buffer(1)]],
                device u32 *segments [[buffer(2)]], device u32 *entries [[buffer(3)]], GD_THREAD) {
    sort_init(GD_HERE, p, index, segments, entries);
}
GD_REGISTER(sort_init_metal)
KERNEL(256)
sort_histogram_metal(constant SortParams &p [[buffer(0)]], const device u32 *segments [[buffer(1)]],
                     device u32 *counts [[buffer(2)]], GD_THREAD) {
    GD_SHARED(u32[DIGITS], count);
    sort_histogram(GD_HERE, p, count, segments, counts);
}
GD_REGISTER(sort_histogram_metal)
KERNEL(256) sort_offsets_metal(constant SortParams &p [[buffer(0)]], device u32 *counts [[buffer(1)]], GD_THREAD) {
    GD_SHARED(u32[SORT_WARPS], sums);
    GD_SHARED(u32[1], all);
    sort_offsets(GD_HERE, p, sums, all, counts);
}
GD_REGISTER(sort_offsets_metal)
KERNEL(256)
sort_scatter_metal(constant SortParams &p [[buffer(0)]], const device u32 *offsets [[buffer(1)]],
                   const device u32 *segments [[buffer(2)]], const device u32 *entries [[buffer(3)]],
                   device u32 *segments_out [[buffer(4)]], device u32 *entries_out [[buffer(5)]], GD_THREAD) {
    GD_SHARED(u32[SORT_WARPS * DIGITS], next);
    sort_scatter(GD_HERE, p, next, offsets, segments, entries, segments_out, entries_out);
}
GD_REGISTER(sort_scatter_metal)
KERNEL(256)
sort_segment_starts_metal(constant SortParams &p [[buffer(0)]], const device u32 *segments [[buffer(1)]],
                          device u32 *starts [[buffer(2)]], GD_THREAD) {
    sort_segment_starts(GD_HERE, p, segments, starts);
}
GD_REGISTER(sort_segment_starts_metal)
