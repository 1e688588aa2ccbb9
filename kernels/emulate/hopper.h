// Hopper's instructions for a host compiler; see cuda/hopper.cuh for their semantics. Copies and products take
// effect late and in a random order (hopper.cpp). Included by hopper.cuh.
#pragma once
#include "device.h"

#define __grid_constant__

// A tensor [batch, head, row, column] for TMA; sizes and strides from the innermost dimension outwards.
struct TensorMap {
    const uint8_t *first;
    uint64_t dims[4];
    uint64_t strides[3]; // of row, head and batch, in bytes
    uint32_t box[4];
    uint32_t element; // bytes
};

namespace emulate {

// The sums of a lane and the matrices of a product.
struct Product {
    float *c;
    uint64_t a, b;
};
extern const Collective WGMMA_F16, WGMMA_BF16, WGMMA_FENCE, WGMMA_COMMIT, WGMMA_WAIT, REGISTERS;

uint32_t shared_address(const void *p);
void barrier_init(uint64_t *b, uint32_t arrivals);
void barrier_arrive(uint64_t *b, uint32_t bytes);
void barrier_wait(uint64_t *b, uint32_t parity);
void copy_box(void *to, const TensorMap &map, const int32_t (&at)[4], uint64_t *b);
void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *b);
void fence_async();

inline void warp_collective(const Collective &kind, uint64_t in, void *data = nullptr) {
    LaneCall request = {&kind, in, 0, data};
    execute_collective(request, 0xffffffffu);
}

} // namespace emulate

using emulate::barrier_init;
using emulate::barrier_wait;
using emulate::copy_bulk;
using emulate::fence_async;
using emulate::shared_address;

inline void barrier_fence() {}
inline void barrier_arrive(uint64_t *b) { emulate::barrier_arrive(b, 0); }
inline void barrier_expect(uint64_t *b, uint32_t bytes) { emulate::barrier_arrive(b, bytes); }
inline void copy_box(void *to, const TensorMap &map, int32_t column, int32_t row, int32_t head, int32_t batch,
                     uint64_t *b) {
    emulate::copy_box(to, map, {column, row, head, batch}, b);
}
template <int N> inline void registers_raise() { emulate::warp_collective(emulate::REGISTERS, N); }
template <int N> inline void registers_drop() { emulate::warp_collective(emulate::REGISTERS, N); }
inline void wgmma_fence(float (&)[16][4]) { emulate::warp_collective(emulate::WGMMA_FENCE, 0); }
inline void wgmma_commit() { emulate::warp_collective(emulate::WGMMA_COMMIT, 0); }
template <int N> inline void wgmma_wait(float (&)[16][4]) { emulate::warp_collective(emulate::WGMMA_WAIT, N); }
inline void wgmma(float (&c)[16][4], uint64_t a, uint64_t b, f16) {
    emulate::Product operands = {c[0], a, b};
    emulate::warp_collective(emulate::WGMMA_F16, 0, &operands);
}
inline void wgmma(float (&c)[16][4], uint64_t a, uint64_t b, bf16) {
    emulate::Product operands = {c[0], a, b};
    emulate::warp_collective(emulate::WGMMA_BF16, 0, &operands);
}
