// See grid.h.
#include "grid.h"

#include <memory>
#include <ucontext.h>
#include <vector>

namespace grid {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t STACK = 64 << 10;

enum class State {
    Ready,
    Barrier,
    Shuffle,
    Left
};

// A stack on which threads run, one after the other as long as none of them has to wait.
struct Fiber {
    ucontext_t place;
    std::unique_ptr<uint8_t[]> stack;
};

struct Thread {
    State state;
    Fiber *fiber;
    uint64_t value;
};

std::vector<Thread> threads;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber *> idle;
std::vector<uint64_t> shared_memory;
ucontext_t scheduler;
Fiber *running;
size_t current, started, left;
void (*entry)(void *);
void *argument;

void become(size_t n) {
    uint32_t x = uint32_t(n);
    current = n;
    thread = {x % block_size.x, x / block_size.x % block_size.y, x / block_size.x / block_size.y};
}

void body() {
    for (;;) {
        while (started < threads.size()) {
            become(started++);
            threads[current].fiber = running;
            entry(argument);
            threads[current].state = State::Left;
            left++;
        }
        idle.push_back(running);
        swapcontext(&running->place, &scheduler);
    }
}

void resume(Fiber *fiber) {
    running = fiber;
    swapcontext(&scheduler, &fiber->place);
}

void stop(State state) {
    threads[current].state = state;
    swapcontext(&running->place, &scheduler);
}

Fiber *fresh() {
    if (idle.empty()) {
        auto made = std::make_unique<Fiber>();
        made->stack = std::make_unique<uint8_t[]>(STACK);
        getcontext(&made->place);
        made->place.uc_stack.ss_sp = made->stack.get();
        made->place.uc_stack.ss_size = STACK;
        made->place.uc_link = nullptr;
        makecontext(&made->place, body, 0);
        idle.push_back(made.get());
        fibers.push_back(std::move(made));
    }
    Fiber *fiber = idle.back();
    idle.pop_back();
    return fiber;
}

// Warps whose remaining threads all shuffle go on; so does the block when all that remain are at its barrier.
bool release() {
    bool any = false;
    size_t at_barrier = 0;
    for (size_t first = 0; first < threads.size(); first += 32) {
        size_t end = first + 32 < threads.size() ? first + 32 : threads.size(), shuffling = 0, gone = 0;
        for (size_t n = first; n < end; n++) {
            shuffling += threads[n].state == State::Shuffle;
            at_barrier += threads[n].state == State::Barrier;
            gone += threads[n].state == State::Left;
        }
        if (!shuffling || shuffling + gone < end - first) continue;
        any = true;
        for (size_t n = first; n < end; n++)
            if (threads[n].state == State::Shuffle) threads[n].state = State::Ready;
    }
    if (at_barrier && at_barrier + left == threads.size()) {
        any = true;
        for (Thread &t : threads)
            if (t.state == State::Barrier) t.state = State::Ready;
    }
    return any;
}

bool run_block() {
    threads.assign(threads.size(), Thread{State::Ready, nullptr, 0});
    started = left = 0;
    while (started < threads.size())
        resume(fresh());
    while (left < threads.size()) {
        if (!release()) return false;
        for (size_t n = 0; n < threads.size(); n++)
            if (threads[n].state == State::Ready) {
                become(n);
                resume(threads[n].fiber);
            }
    }
    return true;
}

} // namespace

void barrier() { stop(State::Barrier); }

uint64_t shuffle_xor(uint64_t value, int step) {
    size_t me = current, other = me / 32 * 32 + (me % 32 ^ size_t(step));
    threads[me].value = value;
    stop(State::Shuffle);
    uint64_t result = other < threads.size() ? threads[other].value : value;
    // Nobody may write the next value before all have read this one.
    stop(State::Shuffle);
    return result;
}

void *dynamic_shared() { return shared_memory.data(); }

std::string run(void (*kernel)(void *), void *with, Index blocks, Index shape, uint32_t shared) {
    threads.resize(size_t(shape.x) * shape.y * shape.z);
    shared_memory.assign(shared / 8 + 1, ~uint64_t(0));
    entry = kernel;
    argument = with;
    block_size = shape;
    grid_size = blocks;
    for (block.z = 0; block.z < blocks.z; block.z++)
        for (block.y = 0; block.y < blocks.y; block.y++)
            for (block.x = 0; block.x < blocks.x; block.x++)
                if (!run_block()) return "threads wait for each other in different places";
    return "";
}

} // namespace grid
