// Executes kernels on the host: one fiber per GPU thread, one block at a time, in a seeded random order. Memory that
// has not been written is NaN (bytes 0xff): shared memory at the start of a block, buffers after allocation, and the
// target of an asynchronous copy until its thread has waited for it.
#include "../cuda/ptx.cuh"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

__thread Index thread, block, block_size, grid_size;
__thread int fault;
__thread uint32_t present, features, rows;

namespace {

// Stacks are no power of two apart: the tops of all of them would share a few sets of the processor's caches.
constexpr size_t STACK = (128 << 10) + 5 * 64, SHARED = 256 << 10;
constexpr uint8_t POISON = 0xff;

// The saved state with which a fiber, or the scheduler, continues.
struct Context {
#if defined(__x86_64__)
    void *stack;
#else
    ucontext_t context;
#endif
};

#if defined(__x86_64__)
// Saves the registers that calls preserve on the stack, and continues on another one.
extern "C" void gd_switch_stacks(void **from, void *to);
asm(R"(
    .text
    .globl gd_switch_stacks
gd_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void switch_context(Context &from, Context &to) { gd_switch_stacks(&from.stack, to.stack); }
void prepare(Context &c, uint8_t *stack, void (*start)()) {
    // On entry of a function the stack pointer is 8 less than a multiple of 16.
    void **top = reinterpret_cast<void **>(stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(start);
    for (int r = 0; r < 6; r++)
        *--top = nullptr;
    c.stack = top;
}
#else
void switch_context(Context &from, Context &to) { swapcontext(&from.context, &to.context); }
void prepare(Context &c, uint8_t *stack, void (*start)()) {
    getcontext(&c.context);
    c.context.uc_stack.ss_sp = stack;
    c.context.uc_stack.ss_size = STACK;
    c.context.uc_link = nullptr;
    makecontext(&c.context, start, 0);
}
#endif

// Memory between two inaccessible guard pages; `bytes` end (or start) at one of them.
struct GuardedMemory {
    uint8_t *pages = nullptr;
    size_t mapped = 0;

    uint8_t *map(size_t bytes, size_t align, bool at_end) {
        size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
        mapped = inner + 2 * page;
        void *all = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) return nullptr;
        pages = static_cast<uint8_t *>(all);
        mprotect(pages + page, inner, PROT_READ | PROT_WRITE);
        std::memset(pages + page, POISON, inner);
        return at_end ? pages + page + inner - (bytes + align - 1) / align * align : pages + page;
    }
    void unmap() {
        if (pages) munmap(pages, mapped);
        pages = nullptr;
    }
};

struct Kernel {
    const char *file;
    void (*function)();
    Call call;
    size_t params, pointers;
    uint32_t values;
};
std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Copy {
    uint8_t *to;
    const uint8_t *from;
    uint32_t bytes;
    uint32_t group;
};

struct Fiber {
    Context context;
    Index thread;
    std::vector<Copy> copies;
    uint32_t groups = 0;
};

struct Warp {
    uint32_t runnable = 0, arrived = 0;
    LaneCall *calls[32];
};

// The state of a launch.
struct Machine {
    Context scheduler;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<std::pair<const void *, void *>> statics;
    uint8_t *stacks = nullptr;
    size_t stack_count = 0;
    GuardedMemory shared_pages;
    uint8_t *shared_end = nullptr, *dynamic = nullptr;
    std::vector<uint8_t *> static_memory;
    size_t current = 0, finished = 0, at_barrier = 0;
    const Kernel *kernel = nullptr;
    const void *params = nullptr;
    void *const *pointers = nullptr;
    uint64_t random = 1;
    std::string error;
    bool running = false;

    uint32_t random_below(uint32_t bound) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return uint32_t((random >> 32) * bound >> 32);
    }
};
thread_local Machine machine;

void yield() { switch_context(machine.fibers[machine.current].context, machine.scheduler); }

void start() {
    Machine &m = machine;
    m.kernel->call(m.kernel->function, m.params, m.pointers);
    m.finished++;
    yield();
    std::abort();
}

// The first set bit at or after `from`, cyclically.
uint32_t next_bit(uint32_t mask, uint32_t from) {
    uint32_t rotated = mask >> from | mask << (-from & 31);
    return (from + uint32_t(__builtin_ctz(rotated))) & 31;
}

void complete_copies(Fiber &f, uint32_t groups) {
    size_t pending = 0;
    for (Copy &c : f.copies) {
        if (c.group < groups) {
            std::memset(c.to, 0, 16);
            std::memcpy(c.to, c.from, c.bytes);
        } else {
            f.copies[pending++] = c;
        }
    }
    f.copies.resize(pending);
}

void run_block(bool keep_warp) {
    Machine &m = machine;
    uint32_t threads = block_size.x, warps = threads / 32;
    m.finished = m.at_barrier = 0;
    m.warps.assign(warps, Warp());
    for (auto &w : m.warps)
        w.runnable = 0xffffffffu;
    for (uint8_t *p : m.static_memory)
        std::free(p);
    m.static_memory.clear();
    m.statics.clear();
    std::memset(m.dynamic, POISON, size_t(m.shared_end - m.dynamic));
    async_proxy::begin();
    for (uint32_t t = 0; t < threads; t++) {
        Fiber &f = m.fibers[t];
        f.thread = {t, 0, 0};
        f.copies.clear();
        f.groups = 0;
        prepare(f.context, m.stacks + t * STACK, start);
    }
    uint32_t warp = m.random_below(warps);
    while (m.finished < threads && m.error.empty()) {
        async_proxy::step(false);
        if (!keep_warp || !m.warps[warp].runnable) {
            uint32_t first = m.random_below(warps), w = first;
            while (!m.warps[w].runnable && (w + 1) % warps != first)
                w = (w + 1) % warps;
            warp = w;
        }
        uint32_t &runnable = m.warps[warp].runnable;
        if (!runnable && async_proxy::step(true)) continue;
        if (!runnable) {
            m.error = "deadlock: " + std::to_string(m.at_barrier) + " threads wait at a block barrier, " +
                      std::to_string(m.finished) + " of " + std::to_string(threads) + " have finished" +
                      async_proxy::waiting();
            break;
        }
        uint32_t lane = next_bit(runnable, m.random_below(32));
        runnable &= ~(1u << lane);
        m.current = warp * 32 + lane;
        thread = m.fibers[m.current].thread;
        switch_context(m.scheduler, m.fibers[m.current].context);
    }
    if (m.error.empty()) m.error = async_proxy::unfinished();
}

void mma_step(Lanes lanes, bool bfloat) {
    float a[16][16], b[16][8], c[16][8];
    auto wide = [&](uint32_t x) { return bfloat ? __uint_as_float(x << 16) : half_to_float(uint16_t(x)); };
    for (int l = 0; l < 32; l++) {
        const Mma &m = *static_cast<const Mma *>(lanes[l]->data);
        int g = l / 4, t = l % 4;
        for (int r = 0; r < 4; r++) {
            a[g + r % 2 * 8][2 * t + r / 2 * 8] = wide(m.a[r] & 0xffff);
            a[g + r % 2 * 8][2 * t + r / 2 * 8 + 1] = wide(m.a[r] >> 16);
        }
        for (int r = 0; r < 2; r++) {
            b[2 * t + r * 8][g] = wide(m.b[r] & 0xffff);
            b[2 * t + r * 8 + 1][g] = wide(m.b[r] >> 16);
        }
        for (int r = 0; r < 4; r++)
            c[g + r / 2 * 8][2 * t + r % 2] = m.c[r];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++)
                c[i][j] = c[i][j] + a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++) {
        const Mma &m = *static_cast<const Mma *>(lanes[l]->data);
        for (int r = 0; r < 4; r++)
            m.c[r] = c[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2];
    }
}

void integer_mma_step(Lanes lanes) {
    int a[16][32], b[32][8];
    for (int l = 0; l < 32; l++) {
        const IntegerMma &m = *static_cast<const IntegerMma *>(lanes[l]->data);
        int g = l / 4, t = l % 4;
        for (int byte = 0; byte < 4; byte++) {
            for (int r = 0; r < 4; r++)
                a[g + r % 2 * 8][4 * t + byte + r / 2 * 16] = int8_t(m.a[r] >> 8 * byte);
            for (int r = 0; r < 2; r++)
                b[4 * t + byte + r * 16][g] = int8_t(m.b[r] >> 8 * byte);
        }
    }
    for (int l = 0; l < 32; l++) {
        const IntegerMma &m = *static_cast<const IntegerMma *>(lanes[l]->data);
        for (int r = 0; r < 4; r++)
            for (int k = 0; k < 32; k++)
                m.c[r] += a[l / 4 + r / 2 * 8][k] * b[k][2 * (l % 4) + r % 2];
    }
}

void no_effect(Lanes) {}

void shuffle(Lanes lanes) {
    for (LaneCall *r : lanes)
        r->out = lanes[r->from]->in;
}

void ballot(Lanes lanes) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; l++)
        bits |= uint32_t(lanes[l]->in != 0) << l;
    for (LaneCall *r : lanes)
        r->out = bits;
}

void load_matrices(Lanes lanes) {
    for (int l = 0; l < 32; l++) {
        if (lanes[l]->in % 16) fail("ldmatrix: a row at an address that is no multiple of 16");
        for (int x = 0; x < 4; x++) {
            const uint8_t *row = reinterpret_cast<const uint8_t *>(lanes[x * 8 + l / 4]->in);
            std::memcpy(static_cast<uint32_t *>(lanes[l]->data) + x, row + l % 4 * 4, 4);
        }
    }
}

// Handles a read or write outside of every buffer: ends the launch with an error.
void on_fault(int signal, siginfo_t *info, void *) {
    if (!machine.running) {
        std::signal(signal, SIG_DFL);
        return;
    }
    fail("access outside of all buffers, at %p", info->si_addr);
}

} // namespace

const Collective SYNC = {"syncwarp", no_effect};
const Collective SHUFFLE = {"shuffle", shuffle};
const Collective BALLOT = {"ballot", ballot};
const Collective MATRICES = {"ldmatrix", load_matrices};
const Collective MMA_F16 = {"mma f16", [](Lanes lanes) { mma_step(lanes, false); }};
const Collective MMA_BF16 = {"mma bf16", [](Lanes lanes) { mma_step(lanes, true); }};
const Collective MMA_S8 = {"mma s8", integer_mma_step};

void fail(const char *format, ...) {
    char text[256];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    machine.error =
        std::string(text) + " (block " + std::to_string(block.x) + ", thread " + std::to_string(thread.x) + ")";
    yield();
    std::abort();
}

void execute_collective(LaneCall &call, uint32_t mask) {
    Machine &m = machine;
    if (mask != 0xffffffffu) fail("a warp operation without all lanes");
    size_t current = m.current;
    Warp &w = m.warps[current / 32];
    uint32_t lane = uint32_t(current % 32);
    if (w.arrived) {
        LaneCall *other = w.calls[__builtin_ctz(w.arrived)];
        if (other->kind != call.kind) fail("lanes of a warp are at %s and %s", other->kind->name, call.kind->name);
    }
    w.calls[lane] = &call;
    w.arrived |= 1u << lane;
    if (w.arrived != 0xffffffffu) {
        yield();
        return;
    }
    call.kind->complete(w.calls);
    w.arrived = 0;
    w.runnable |= ~(1u << lane);
}

void block_barrier() {
    Machine &m = machine;
    if (m.warps[m.current / 32].arrived) fail("a block barrier while lanes of the warp wait for each other");
    m.at_barrier++;
    if (m.at_barrier < block_size.x) {
        yield();
        return;
    }
    m.at_barrier = 0;
    for (size_t w = 0; w < m.warps.size(); w++)
        m.warps[w].runnable = 0xffffffffu;
    m.warps[m.current / 32].runnable &= ~(1u << m.current % 32);
}

uint32_t random_below(uint32_t bound) { return machine.random_below(bound); }
void suspend() { yield(); }
void wake(uint32_t thread) { machine.warps[thread / 32].runnable |= 1u << thread % 32; }
uint8_t *shared_window() { return machine.shared_end - SHARED; }

void *dynamic_shared() { return machine.dynamic; }

void *static_shared(const void *tag, size_t bytes) {
    for (auto &entry : machine.statics)
        if (entry.first == tag) return entry.second;
    uint8_t *memory = static_cast<uint8_t *>(std::malloc(bytes));
    std::memset(memory, POISON, bytes);
    machine.static_memory.push_back(memory);
    machine.statics.emplace_back(tag, memory);
    return memory;
}

void copy_async(void *to, const void *from, uint32_t bytes) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes > 16)
        fail("cp.async of %u bytes, or not aligned to 16", bytes);
    Fiber &f = machine.fibers[machine.current];
    std::memset(to, POISON, 16);
    f.copies.push_back({static_cast<uint8_t *>(to), static_cast<const uint8_t *>(from), bytes, f.groups});
}
void copy_commit() { machine.fibers[machine.current].groups++; }
void copy_wait(int in_flight) {
    Fiber &f = machine.fibers[machine.current];
    complete_copies(f, f.groups - (f.groups < uint32_t(in_flight) ? f.groups : uint32_t(in_flight)));
}

void register_kernel(const char *name, const char *file, void (*kernel)(), Call call, size_t params, size_t pointers,
                     uint32_t values) {
    kernels()[name] = {file, kernel, call, params, pointers, values};
}

float half_to_float(uint16_t bits) {
    static const float *const table = [] {
        float *t = new float[65536];
        for (uint32_t x = 0; x < 65536; x++) {
            uint32_t exponent = x >> 10 & 31, mantissa = x & 1023;
            float y = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                      : std::ldexp(float(mantissa + 1024), int(exponent) - 25);
            t[x] = x >> 15 ? -y : y;
        }
        return t;
    }();
    return table[bits];
}

uint16_t half_from_float(float x) {
    uint32_t sign = __float_as_uint(x) >> 31 << 15;
    float y = std::fabs(x);
    if (!(y == y)) return uint16_t(sign | 0x7fff);
    if (y >= 65520.0f) return uint16_t(sign | 0x7c00);
    // In units of the last place; nearbyint rounds ties to even.
    int exponent = y < 6.103515625e-05f ? -14 : std::ilogb(y);
    float units = std::nearbyint(std::ldexp(y, 10 - exponent));
    uint32_t bits = uint32_t(exponent + 14) * 1024 + uint32_t(units);
    return uint16_t(sign | bits);
}

uint16_t bfloat_from_float(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

} // namespace emulate

using namespace emulate;

extern "C" {

// Memory of NaN between guard pages; an even `side` places its end at the upper one, an odd one its start at the lower.
void *gd_emulate_allocate(size_t bytes, uint32_t side, void **pages, size_t *mapped) {
    GuardedMemory f;
    uint8_t *at = f.map(bytes ? bytes : 1, 16, side % 2 == 0);
    *pages = f.pages;
    *mapped = f.mapped;
    return at;
}

void gd_emulate_free(void *pages, size_t mapped) { munmap(pages, mapped); }

// Bytes of a kernel's params, its other arguments, and a bit for each of those that is passed by value; 0 if there is
// no such kernel.
int gd_emulate_kernel(const char *name, size_t *params, size_t *pointers, uint32_t *values) {
    auto entry = kernels().find(name);
    if (entry == kernels().end()) return 0;
    *params = entry->second.params;
    *pointers = entry->second.pointers;
    *values = entry->second.values;
    return 1;
}

// Name of the kernel at this position of all kernels, and the source file that defines it; null beyond the last.
const char *gd_emulate_registered(size_t position, const char **file) {
    if (position >= kernels().size()) return nullptr;
    auto kernel = std::next(kernels().begin(), long(position));
    *file = kernel->second.file;
    return kernel->first.c_str();
}

// Function constants of the launches of this thread from now on.
void gd_emulate_constants(uint32_t features_bits, uint32_t row_count) {
    features = features_bits;
    rows = row_count;
}

// Runs a kernel; returns 0, or 1 and a text.
int gd_emulate_launch(const char *name, const uint32_t *grid, uint32_t threads, uint32_t shared, const void *params,
                      size_t params_bytes, void *const *pointers, size_t count, uint64_t seed, int fault_number,
                      char *text, size_t text_bytes) {
    Machine &m = machine;
    auto refuse = [&](const std::string &why) {
        std::snprintf(text, text_bytes, "%s", why.c_str());
        return 1;
    };
    auto entry = kernels().find(name);
    if (entry == kernels().end()) return refuse("no such kernel");
    const Kernel &k = entry->second;
    if (k.params != params_bytes || k.pointers != count)
        return refuse("takes params of " + std::to_string(k.params) + " bytes and " + std::to_string(k.pointers) +
                      " pointers");
    if (threads == 0 || threads % 32 || threads > 1024 || shared > SHARED || grid[1] != 1 || grid[2] != 1)
        return refuse("a launch of this shape");
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        return sigaction(SIGSEGV, &action, nullptr) == 0 && sigaction(SIGBUS, &action, nullptr) == 0;
    }();
    if (!installed) return refuse("no signal handler");
    if (m.stack_count < threads) {
        if (m.stacks) munmap(m.stacks, m.stack_count * STACK);
        m.stack_count = threads;
        m.stacks = static_cast<uint8_t *>(
            mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        m.fibers.resize(threads);
    }
    if (!m.shared_end) m.shared_end = m.shared_pages.map(SHARED, 128, true) + SHARED;
    m.dynamic = m.shared_end - (shared + 127) / 128 * 128;
    m.kernel = &k;
    m.params = params;
    m.pointers = pointers;
    m.error.clear();
    m.random = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    fault = fault_number;
    block_size = {threads, 1, 1};
    grid_size = {grid[0], 1, 1};
    // Blocks in a random order.
    std::vector<uint32_t> order(grid[0]);
    for (uint32_t b = 0; b < grid[0]; b++) {
        order[b] = b;
        std::swap(order[b], order[m.random_below(b + 1)]);
    }
    m.running = true;
    for (uint32_t b : order) {
        block = {b, 0, 0};
        run_block(m.random_below(2) == 0);
        if (!m.error.empty()) break;
    }
    m.running = false;
    return m.error.empty() ? 0 : refuse(m.error);
}
}
