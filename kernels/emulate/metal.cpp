// Collective operations of a simdgroup that CUDA does not have.
#include "metal.h"

// The macro would hide emulate::thread.
#undef thread

namespace emulate {

namespace {

// Pairwise, from lanes far apart to neighbours; the same bits in all lanes.
void sum(Lanes lanes) {
    float x[32];
    for (int l = 0; l < 32; l++) {
        uint32_t bits = uint32_t(lanes[l]->in);
        std::memcpy(&x[l], &bits, 4);
    }
    for (int step = 16; step > 0; step /= 2)
        for (int l = 0; l < step; l++)
            x[l] += x[l + step];
    uint32_t bits;
    std::memcpy(&bits, &x[0], 4);
    for (LaneCall *r : lanes)
        r->out = bits;
}

void multiply(Lanes lanes) {
    float a[64], b[64], c[64];
    for (uint32_t l = 0; l < 32; l++) {
        const MatrixMultiply &m = *static_cast<const MatrixMultiply *>(lanes[l]->data);
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t at = matrix_element(l, e);
            a[at] = m.a[e];
            b[at] = m.b[e];
            c[at] = m.c[e];
        }
    }
    for (int i = 0; i < 8; i++)
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 8; j++)
                c[i * 8 + j] += a[i * 8 + k] * b[k * 8 + j];
    for (uint32_t l = 0; l < 32; l++)
        for (uint32_t e = 0; e < 2; e++)
            static_cast<MatrixMultiply *>(lanes[l]->data)->d[e] = c[matrix_element(l, e)];
}

void no_effect(Lanes) {}

} // namespace

const Collective SUM = {"simd_sum", sum};
const Collective MATRIX_LOAD = {"simdgroup_load", no_effect};
const Collective MATRIX_STORE = {"simdgroup_store", no_effect};
const Collective MATRIX_MULTIPLY = {"simdgroup_multiply_accumulate", multiply};

} // namespace emulate
