// Instantiations of the steps of select.
#include "../shared/barrier.h"
#include "../shared/coherence.h"
#include "../shared/inverse.h"
#include "../shared/residual.h"

#define PARAMS_AT_0 constant SelectParams &p [[buffer(0)]]
// The first four buffers of sums over the readers of keys.
#define READERS                                                                                               \
    const device u32 *starts [[buffer(1)]], const device u32 *lists [[buffer(2)]],                            \
        const device u32 *entries [[buffer(3)]], device float *parts [[buffer(4)]]
#define GD_READERS                                                                                            \
    Readers { starts, lists, entries, parts }

#define SELECT(T)                                                                                             \
    KERNEL(256) select_forward_##T##_metal(                                                                   \
        PARAMS_AT_0, const device float *energy [[buffer(1)]], const device i32 *index [[buffer(2)]],         \
        const device float *tau [[buffer(3)]], const device T *v [[buffer(4)]],                               \
        device i32 *slot [[buffer(5)]], device i32 *winner [[buffer(6)]],                                     \
        device i32 *nearest [[buffer(7)]], device float *chosen [[buffer(8)]],                                \
        device float *margin [[buffer(9)]], device float *gate [[buffer(10)]], device T *y [[buffer(11)]],    \
        GD_THREAD) {                                                                                          \
        select_forward<T>(GD_HERE, p, energy, index, tau, v, GD_IF_PRESENT(5, slot), winner, nearest,         \
                          chosen, margin, gate, GD_IF_PRESENT(11, y));                                        \
    }                                                                                                         \
    GD_REGISTER(select_forward_##T##_metal)                                                                   \
    KERNEL(256) select_backward_##T##_metal(                                                                  \
        PARAMS_AT_0, const device float *energy [[buffer(1)]], const device i32 *index [[buffer(2)]],         \
        const device float *tau [[buffer(3)]], const device T *v [[buffer(4)]],                               \
        const device T *dy [[buffer(5)]], device float *denergy [[buffer(6)]],                                \
        device float *weights [[buffer(7)]], device float *dtau [[buffer(8)]], GD_THREAD) {                   \
        select_backward<T>(GD_HERE, p, energy, index, tau, v, dy, denergy, weights, dtau);                    \
    }                                                                                                         \
    GD_REGISTER(select_backward_##T##_metal)                                                                  \
    KERNEL(256) select_values_##T##_metal(                                                                    \
        PARAMS_AT_0, READERS, const device float *weights [[buffer(5)]], const device T *dy [[buffer(6)]],    \
        device T *dv [[buffer(7)]], GD_THREAD) {                                                              \
        value_gradient<T>(GD_HERE, p, GD_READERS, weights, dy, dv);                                           \
    }                                                                                                         \
    GD_REGISTER(select_values_##T##_metal)                                                                    \
    KERNEL(256) energy_forward_##T##_metal(                                                                   \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device float *beta [[buffer(3)]], const device float *prior [[buffer(4)]],                      \
        const device i32 *index [[buffer(5)]], device float *energy [[buffer(6)]], GD_THREAD) {               \
        energy_forward<T>(GD_HERE, p, q, k, beta, prior, index, energy);                                      \
    }                                                                                                         \
    GD_REGISTER(energy_forward_##T##_metal)                                                                   \
    KERNEL(256) energy_backward_##T##_metal(                                                                  \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device float *beta [[buffer(3)]], const device i32 *index [[buffer(4)]],                        \
        const device float *grad [[buffer(5)]], device T *dq [[buffer(6)]],                                   \
        device float *dbeta [[buffer(7)]], GD_THREAD) {                                                       \
        energy_backward<T>(GD_HERE, p, q, k, beta, index, grad, dq, dbeta);                                   \
    }                                                                                                         \
    GD_REGISTER(energy_backward_##T##_metal)                                                                  \
    KERNEL(256) energy_keys_##T##_metal(                                                                      \
        PARAMS_AT_0, READERS, const device T *q [[buffer(5)]], const device T *k [[buffer(6)]],               \
        const device float *beta [[buffer(7)]], const device float *grad [[buffer(8)]],                       \
        device T *dk [[buffer(9)]], GD_THREAD) {                                                              \
        energy_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, beta, grad, dk);                                 \
    }                                                                                                         \
    GD_REGISTER(energy_keys_##T##_metal)                                                                      \
    KERNEL(256) density_forward_##T##_metal(                                                                  \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device float *beta [[buffer(3)]], const device float *alpha [[buffer(4)]],                      \
        const device i32 *index [[buffer(5)]], device float *rho [[buffer(6)]],                               \
        device float *point [[buffer(7)]], GD_THREAD) {                                                       \
        density_forward<T>(GD_HERE, p, q, k, beta, alpha, index, GD_IF_PRESENT(6, rho),                       \
                           GD_IF_PRESENT(7, point));                                                          \
    }                                                                                                         \
    GD_REGISTER(density_forward_##T##_metal)                                                                  \
    KERNEL(256) density_backward_##T##_metal(                                                                 \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device float *beta [[buffer(3)]], const device float *alpha [[buffer(4)]],                      \
        const device i32 *index [[buffer(5)]], const device float *grad [[buffer(6)]],                        \
        device T *dq [[buffer(7)]], device float *factor [[buffer(8)]], device float *dbeta [[buffer(9)]],    \
        device float *dalpha [[buffer(10)]], GD_THREAD) {                                                     \
        density_backward<T>(GD_HERE, p, q, k, beta, alpha, index, grad, dq, factor, dbeta, dalpha);           \
    }                                                                                                         \
    GD_REGISTER(density_backward_##T##_metal)                                                                 \
    KERNEL(256) density_keys_##T##_metal(                                                                     \
        PARAMS_AT_0, READERS, const device T *q [[buffer(5)]], const device T *k [[buffer(6)]],               \
        const device float *factor [[buffer(7)]], device T *dk [[buffer(8)]], GD_THREAD) {                    \
        density_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, factor, dk);                                    \
    }                                                                                                         \
    GD_REGISTER(density_keys_##T##_metal)                                                                     \
    KERNEL(256) residual_forward_##T##_metal(                                                                 \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device i32 *index [[buffer(3)]], device T *out [[buffer(4)]], GD_THREAD) {                      \
        residual_forward<T>(GD_HERE, p, q, k, index, out);                                                    \
    }                                                                                                         \
    GD_REGISTER(residual_forward_##T##_metal)                                                                 \
    KERNEL(256) residual_backward_##T##_metal(                                                                \
        PARAMS_AT_0, const device T *q [[buffer(1)]], const device T *k [[buffer(2)]],                        \
        const device i32 *index [[buffer(3)]], const device T *dr [[buffer(4)]],                              \
        device T *dq [[buffer(5)]], GD_THREAD) {                                                              \
        residual_backward<T>(GD_HERE, p, q, k, index, dr, dq);                                                \
    }                                                                                                         \
    GD_REGISTER(residual_backward_##T##_metal)                                                                \
    KERNEL(256) residual_keys_##T##_metal(                                                                    \
        PARAMS_AT_0, READERS, const device T *q [[buffer(5)]], const device T *k [[buffer(6)]],               \
        const device T *dr [[buffer(7)]], device T *dk [[buffer(8)]], GD_THREAD) {                            \
        residual_key_gradient<T>(GD_HERE, p, GD_READERS, q, k, dr, dk);                                       \
    }                                                                                                         \
    GD_REGISTER(residual_keys_##T##_metal)                                                                    \
    KERNEL(128) add_parts_##T##_metal(PARAMS_AT_0, const device u32 *starts [[buffer(1)]],                    \
                                      const device float *parts [[buffer(2)]], device T *out [[buffer(3)]],   \
                                      GD_THREAD) {                                                            \
        add_parts<T>(GD_HERE, p.head_dim, starts, parts, out);                                                \
    }                                                                                                         \
    GD_REGISTER(add_parts_##T##_metal)

SELECT(f32)
SELECT(f16)
SELECT(bf16)

KERNEL(256) prior_parts_f32_metal(PARAMS_AT_0, READERS, const device float *grad [[buffer(5)]],
                                  device float *rows [[buffer(6)]], GD_THREAD) {
    prior_parts(GD_HERE, p, GD_READERS, grad, rows);
}
GD_REGISTER(prior_parts_f32_metal)
KERNEL(256) prior_gradient_metal(PARAMS_AT_0, const device float *rows [[buffer(1)]],
                                 device float *dprior [[buffer(2)]], GD_THREAD) {
    prior_gradient(GD_HERE, p, rows, dprior);
}
GD_REGISTER(prior_gradient_metal)
KERNEL(256) head_sums_metal(PARAMS_AT_0, const device float *rows [[buffer(1)]],
                            device float *out [[buffer(2)]], GD_THREAD) {
    GD_SHARED(Total[256], part);
    head_sums(GD_HERE, p, part, rows, out);
}
GD_REGISTER(head_sums_metal)
KERNEL(128) barrier_forward_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]],
                                  const device i32 *index [[buffer(2)]],
                                  const device uint8_t *flags [[buffer(3)]], device float *out [[buffer(4)]],
                                  GD_THREAD) {
    barrier_forward(GD_HERE, p, energy, index, flags, out);
}
GD_REGISTER(barrier_forward_metal)
KERNEL(128) barrier_backward_metal(PARAMS_AT_0, const device float *energy [[buffer(1)]],
                                   const device i32 *index [[buffer(2)]],
                                   const device uint8_t *flags [[buffer(3)]],
                                   const device float *grad [[buffer(4)]], device float *out [[buffer(5)]],
                                   GD_THREAD) {
    barrier_backward(GD_HERE, p, energy, index, flags, grad, out);
}
GD_REGISTER(barrier_backward_metal)
KERNEL(256) select_rest_metal(PARAMS_AT_0, const device i32 *index [[buffer(1)]],
                              const device i32 *slot [[buffer(2)]], device i32 *out [[buffer(3)]],
                              GD_THREAD) {
    select_rest(GD_HERE, p, index, slot, out);
}
GD_REGISTER(select_rest_metal)

KERNEL(256) sort_begin_metal(constant SortParams &p [[buffer(0)]], const device i32 *index [[buffer(1)]],
                             device u32 *lists [[buffer(2)]], device u32 *entries [[buffer(3)]], GD_THREAD) {
    sort_begin(GD_HERE, p, index, lists, entries);
}
GD_REGISTER(sort_begin_metal)
KERNEL(256) sort_count_metal(constant SortParams &p [[buffer(0)]], const device u32 *lists [[buffer(1)]],
                             device u32 *counts [[buffer(2)]], GD_THREAD) {
    GD_SHARED(u32[DIGITS], count);
    sort_count(GD_HERE, p, count, lists, counts);
}
GD_REGISTER(sort_count_metal)
KERNEL(256) sort_places_metal(constant SortParams &p [[buffer(0)]], device u32 *counts [[buffer(1)]],
                              GD_THREAD) {
    GD_SHARED(u32[SORT_WARPS], sums);
    GD_SHARED(u32[1], all);
    sort_places(GD_HERE, p, sums, all, counts);
}
GD_REGISTER(sort_places_metal)
KERNEL(256) sort_move_metal(constant SortParams &p [[buffer(0)]], const device u32 *places [[buffer(1)]],
                            const device u32 *lists [[buffer(2)]], const device u32 *entries [[buffer(3)]],
                            device u32 *lists_out [[buffer(4)]], device u32 *entries_out [[buffer(5)]],
                            GD_THREAD) {
    GD_SHARED(u32[SORT_WARPS * DIGITS], next);
    sort_move(GD_HERE, p, next, places, lists, entries, lists_out, entries_out);
}
GD_REGISTER(sort_move_metal)
KERNEL(256) sort_starts_metal(constant SortParams &p [[buffer(0)]], const device u32 *lists [[buffer(1)]],
                              device u32 *starts [[buffer(2)]], GD_THREAD) {
    sort_starts(GD_HERE, p, lists, starts);
}
GD_REGISTER(sort_starts_metal)
