// Runs a kernel of plain CUDA C++ on the host: every thread of a block is a fiber, and blocks run one after the other.
// Unlike kernels/emulate it takes blocks of any size and shape, allows threads to return early, and does not look for
// races: it runs candle's kernels, which are not under test.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace grid {

struct Index {
    uint32_t x, y, z;
};
extern Index thread, block, block_size, grid_size;

// A block barrier: waits for all threads of the block that have not returned.
void barrier();
// The value of the lane whose number is this one's xor `step`; the thread's own value if there is no such lane.
uint64_t shuffle_xor(uint64_t value, int step);
void *dynamic_shared();

// Calls `kernel(with)` once for each thread. Returns an error text, empty on success.
std::string run(void (*kernel)(void *), void *with, Index blocks, Index threads, uint32_t shared);

} // namespace grid
