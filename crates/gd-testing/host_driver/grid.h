// Runs a kernel of plain CUDA C++ on the host: every thread of a block is a fiber, blocks run one after the other.
// Unlike kernels/emulate it takes blocks of any size and shape, lets threads leave before the others, and looks for
// no races: it is for candle's kernels, which are not what is under test.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace grid {

struct Index {
    uint32_t x, y, z;
};
extern Index thread, block, block_size, grid_size;

// All threads of the block that have not left must come.
void barrier();
// The value of the lane `step` (by exclusive or) away; one's own where there is no such lane.
uint64_t shuffle_xor(uint64_t value, int step);
void *dynamic_shared();

// Calls `kernel(with)` once for each thread. An error, or nothing.
std::string run(void (*kernel)(void *), void *with, Index blocks, Index threads, uint32_t shared);

} // namespace grid
