// The scheduler of grid.h: fibers that run the threads of one block at a time.
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
    Finished
};

// A stack on which threads run one after the other, until one of them has to wait.
struct Fiber {
    ucontext_t context;
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
size_t current, started, finished;
void (*entry)(void *);
void *argument;

void select_thread(size_t n) {
    uint32_t x = uint32_t(n);
    current = n;
    thread = {x % block_size.x, x / block_size.x % block_size.y, x / block_size.x / block_size.y};
}

void body() {
    for (;;) {
        while (started < threads.size()) {
            select_thread(started++);
            threads[current].fiber = running;
            entry(argument);
            threads[current].state = State::Finished;
            finished++;
        }
        idle.push_back(running);
        swapcontext(&running->context, &scheduler);
    }
}

void resume(Fiber *fiber) {
    running = fiber;
    swapcontext(&scheduler, &fiber->context);
}

void stop(State state) {
    threads[current].state = state;
    swapcontext(&running->context, &scheduler);
}

Fiber *idle_fiber() {
    if (idle.empty()) {
        auto made = std::make_unique<Fiber>();
        made->stack = std::make_unique<uint8_t[]>(STACK);
        getcontext(&made->context);
        made->context.uc_stack.ss_sp = made->stack.get();
        made->context.uc_stack.ss_size = STACK;
        made->context.uc_link = nullptr;
        makecontext(&made->context, body, 0);
        idle.push_back(made.get());
        fibers.push_back(std::move(made));
    }
    Fiber *fiber = idle.back();
    idle.pop_back();
    return fiber;
}

// Makes threads ready again: those of a warp whose remaining threads all shuffle, and those of the block if all that
// remain are at its barrier. Returns whether any thread became ready.
bool release() {
    bool any = false;
    size_t at_barrier = 0;
    for (size_t first = 0; first < threads.size(); first += 32) {
        size_t end = first + 32 < threads.size() ? first + 32 : threads.size(), shuffling = 0, finished_in_warp = 0;
        for (size_t n = first; n < end; n++) {
            shuffling += threads[n].state == State::Shuffle;
            at_barrier += threads[n].state == State::Barrier;
            finished_in_warp += threads[n].state == State::Finished;
        }
        if (!shuffling || shuffling + finished_in_warp < end - first) continue;
        any = true;
        for (size_t n = first; n < end; n++)
            if (threads[n].state == State::Shuffle) threads[n].state = State::Ready;
    }
    if (at_barrier && at_barrier + finished == threads.size()) {
        any = true;
        for (Thread &t : threads)
            if (t.state == State::Barrier) t.state = State::Ready;
    }
    return any;
}

bool run_block() {
    threads.assign(threads.size(), Thread{State::Ready, nullptr, 0});
    started = finished = 0;
    while (started < threads.size())
        resume(idle_fiber());
    while (finished < threads.size()) {
        if (!release()) return false;
        for (size_t n = 0; n < threads.size(); n++)
            if (threads[n].state == State::Ready) {
                select_thread(n);
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
    // No thread may write its next value before all have read this one.
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
                if (!run_block()) return "deadlock: threads wait at different barriers or shuffles";
    return "";
}

} // namespace grid
