// The asynchronous units of a Hopper multiprocessor: mbarriers with transaction counts, TMA copies, and warpgroup
// products. A copy completes at a random time, mostly when no thread can continue; until then its target is NaN. A
// product reads shared memory at a random time between its start and the wait for its group; until that wait its
// accumulators are NaN. Both read shared memory through their own view, in which stores of threads appear only after a
// proxy fence.
#include <map>
#include <memory>
#include <vector>

// Last: it has names that the library's headers use for themselves.
#include "../cuda/hopper.cuh"

namespace emulate {
namespace {

constexpr uint8_t POISON = 0xff;
constexpr size_t WINDOW = 256 << 10;
// Columns of a product, and rows of a warp in it.
constexpr int KEYS = 128, ROWS = 16;

struct Barrier {
    uint32_t arrivals = 0, missing = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<uint32_t> threads;
};

// A copy in flight, in units of 16 bytes; `from` is null beyond the edge of the tensor.
struct Copy {
    struct Unit {
        uint32_t to;
        const uint8_t *from;
    };
    std::vector<Unit> units;
    uint64_t *barrier;
};

// Accumulators of products in flight; the registers of a lane are identified by their address.
struct Sums {
    float *registers[32];
    float value[ROWS][KEYS];
};
struct ProductInFlight {
    std::shared_ptr<Sums> sums;
    uint64_t a, b;
    uint32_t group;
    bool bfloat, done;
};
struct Warp {
    std::vector<ProductInFlight> products;
    uint32_t groups = 0;
    bool fenced = false;
    // Keys of the products that were started, and the register counts that were requested.
    std::vector<uint64_t> history;
    std::vector<uint64_t> registers;
};

struct AsyncProxy {
    std::map<uint64_t *, Barrier> barriers;
    std::vector<Copy> copies;
    std::map<uint32_t, Warp> warps;
    std::vector<uint8_t> view;
    // Whether a proxy fence has made the stores of threads visible to the next read.
    bool fenced = false;
    bool eager = false;
};
thread_local AsyncProxy state;

std::vector<uint8_t> &view() {
    if (state.view.empty()) state.view.assign(WINDOW, POISON);
    return state.view;
}

uint32_t offset(const void *p, const char *what) {
    size_t at = size_t(static_cast<const uint8_t *>(p) - shared_window());
    if (at >= WINDOW) fail("%s outside of shared memory", what);
    return uint32_t(at);
}

Barrier &find_barrier(uint64_t *b) {
    auto entry = state.barriers.find(b);
    if (entry == state.barriers.end()) fail("an mbarrier that is not initialised");
    return entry->second;
}

// Ends the phase if nothing is missing.
void finish_phase(Barrier &b) {
    if (b.missing || b.bytes) return;
    b.phase++;
    b.missing = b.arrivals;
    for (uint32_t t : b.threads)
        wake(t);
    b.threads.clear();
}

void store(uint32_t to, const uint8_t *from, bool complete) {
    uint8_t unit[16];
    std::memset(unit, complete ? 0 : POISON, 16);
    if (complete && from) std::memcpy(unit, from, 16);
    std::memcpy(shared_window() + to, unit, 16);
    std::memcpy(view().data() + to, unit, 16);
}

void start(Copy copy) {
    find_barrier(copy.barrier);
    for (auto &p : copy.units)
        store(p.to, p.from, false);
    state.copies.push_back(std::move(copy));
}

void complete_copy(size_t which) {
    std::swap(state.copies[which], state.copies.back());
    Copy copy = std::move(state.copies.back());
    state.copies.pop_back();
    for (auto &p : copy.units)
        store(p.to, p.from, true);
    Barrier &b = state.barriers.find(copy.barrier)->second;
    b.bytes -= int64_t(16 * copy.units.size());
    finish_phase(b);
}

// Element (row, column) of the matrix that a descriptor describes.
uint16_t element(uint64_t name, uint32_t row, uint32_t column) {
    uint32_t first = uint32_t(name & 0x3fff) << 4, eight = uint32_t(name >> 32 & 0x3fff) << 4;
    uint32_t at = first + row / 8 * eight + row % 8 * MATRIX_ROW + 2 * column;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, view().data() + at % WINDOW, 2);
    return bits;
}

void multiply(ProductInFlight &p, uint32_t warp) {
    if (state.fenced) view().assign(shared_window(), shared_window() + WINDOW);
    state.fenced = false;
    float a[ROWS][16], b[16][KEYS];
    auto wide = [&](uint16_t x) { return p.bfloat ? __uint_as_float(uint32_t(x) << 16) : half_to_float(x); };
    for (uint32_t k = 0; k < 16; k++) {
        for (uint32_t i = 0; i < ROWS; i++)
            a[i][k] = wide(element(p.a, warp % 4 * ROWS + i, k));
        for (uint32_t j = 0; j < KEYS; j++)
            b[k][j] = wide(element(p.b, j, k));
    }
    // In reverse order: kernels must not rely on the summation order of mma here.
    for (int i = 0; i < ROWS; i++)
        for (int k = 15; k >= 0; k--)
            for (int j = 0; j < KEYS; j++)
                p.sums->value[i][j] = p.sums->value[i][j] + a[i][k] * b[k][j];
    p.done = true;
}

// Runs the first `count` products of a warp, in order.
void run(Warp &w, uint32_t warp, size_t count) {
    for (size_t x = 0; x < count; x++)
        if (!w.products[x].done) multiply(w.products[x], warp);
}

// Calls visit(register, its value) for all sums of all lanes.
template <class Visit> void registers(Sums &s, Visit visit) {
    for (int l = 0; l < 32; l++)
        for (int n = 0; n < KEYS / 8; n++)
            for (int r = 0; r < 4; r++)
                visit(s.registers[l][4 * n + r], s.value[l / 4 + r / 2 * 8][8 * n + 2 * (l % 4) + r % 2]);
}

uint32_t this_warp() { return thread.x / 32; }

// Fails unless all four warps of a warpgroup make the same entries in the same order.
void require_agreement(std::vector<uint64_t> Warp::*list, uint64_t entry, const char *what) {
    uint32_t warp = this_warp();
    auto &entries = state.warps[warp].*list;
    entries.push_back(entry);
    for (uint32_t w = warp / 4 * 4; w < warp / 4 * 4 + 4; w++) {
        auto entry_of_warp = state.warps.find(w);
        if (entry_of_warp == state.warps.end()) continue;
        auto &other = entry_of_warp->second.*list;
        if (other.size() >= entries.size() && other[entries.size() - 1] != entry)
            fail("the warps of a warpgroup differ in %s", what);
    }
}

void begin_product(Lanes lanes, bool bfloat) {
    uint32_t warp = this_warp();
    Warp &w = state.warps[warp];
    auto operands = [&](int l) -> const Product & { return *static_cast<const Product *>(lanes[l]->data); };
    const Product &first = operands(0);
    for (int l = 0; l < 32; l++)
        if (operands(l).a != first.a || operands(l).b != first.b) fail("lanes name different matrices");
    for (uint64_t name : {first.a, first.b})
        if (name >> 62 != 1 || name >> 49 & 7) fail("a matrix that is not swizzled by 128 bytes");
    require_agreement(&Warp::history, first.a << 32 ^ first.b ^ first.a >> 32, "a product");
    std::shared_ptr<Sums> sums;
    for (auto &p : w.products)
        if (p.sums->registers[0] == first.c) sums = p.sums;
    if (!sums) {
        if (!w.fenced) fail("a product on sums that were written before, without wgmma.fence");
        sums = std::make_shared<Sums>();
        for (int l = 0; l < 32; l++)
            sums->registers[l] = operands(l).c;
        registers(*sums, [](float &at, float &value) {
            value = at;
            std::memset(&at, POISON, sizeof at);
        });
    }
    w.products.push_back({sums, first.a, first.b, w.groups, bfloat, false});
    if (random_below(4) == 0) run(w, warp, w.products.size());
}

void wait(Lanes lanes) {
    uint32_t warp = this_warp(), in_flight = uint32_t(lanes[0]->in);
    Warp &w = state.warps[warp];
    uint32_t over = w.groups - (w.groups < in_flight ? w.groups : in_flight);
    size_t count = 0;
    while (count < w.products.size() && w.products[count].group < over)
        count++;
    run(w, warp, count);
    for (size_t x = 0; x < count; x++) {
        // The last product of these sums writes them to the registers.
        Sums *sums = w.products[x].sums.get();
        bool more = false;
        for (size_t y = x + 1; y < w.products.size(); y++)
            more |= w.products[y].sums.get() == sums;
        if (!more) registers(*sums, [](float &at, float &value) { at = value; });
    }
    w.products.erase(w.products.begin(), w.products.begin() + long(count));
    w.fenced = false;
}

} // namespace

const Collective WGMMA_F16 = {"wgmma f16", [](Lanes lanes) { begin_product(lanes, false); }};
const Collective WGMMA_BF16 = {"wgmma bf16", [](Lanes lanes) { begin_product(lanes, true); }};
const Collective WGMMA_FENCE = {"wgmma.fence", [](Lanes) { state.warps[this_warp()].fenced = true; }};
const Collective WGMMA_COMMIT = {"wgmma.commit_group", [](Lanes) { state.warps[this_warp()].groups++; }};
const Collective WGMMA_WAIT = {"wgmma.wait_group", wait};
const Collective REGISTERS = {"setmaxnreg", [](Lanes lanes) {
                                  uint64_t count = lanes[0]->in;
                                  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg %d", int(count));
                                  require_agreement(&Warp::registers, count, "setmaxnreg");
                              }};

uint32_t shared_address(const void *p) { return offset(p, "an address"); }

void barrier_init(uint64_t *b, uint32_t arrivals) {
    if (offset(b, "an mbarrier") % 8 || arrivals == 0) fail("mbarrier.init of %u arrivals", arrivals);
    Barrier &x = state.barriers[b];
    x = Barrier();
    x.arrivals = x.missing = arrivals;
}

void barrier_arrive(uint64_t *b, uint32_t bytes) {
    Barrier &x = find_barrier(b);
    if (!x.missing) fail("more arrivals at an mbarrier than its phase has");
    x.bytes += bytes;
    x.missing--;
    finish_phase(x);
}

void barrier_wait(uint64_t *b, uint32_t parity) {
    Barrier &x = find_barrier(b);
    while ((x.phase & 1) == parity) {
        x.threads.push_back(thread.x);
        suspend();
    }
}

void copy_box(void *to, const TensorMap &map, const int32_t (&at)[4], uint64_t *b) {
    uint32_t first = offset(to, "the target of a copy"), row_bytes = map.box[0] * map.element;
    if (first % MATRIX_ALIGN || row_bytes != MATRIX_ROW || map.box[1] > 256 || map.box[2] != 1 || map.box[3] != 1)
        fail("a copy of a box %u x %u to offset %u", map.box[0], map.box[1], first);
    if (uintptr_t(map.first) % 16 || map.dims[0] * map.element % 16) fail("a tensor that is not aligned to 16");
    for (uint64_t stride : map.strides)
        if (stride % 16) fail("a tensor with a stride of %d bytes", int(stride));
    Copy copy = {{}, b};
    auto inside = [&](int d, int64_t x) { return x >= 0 && x < int64_t(map.dims[d]); };
    for (uint32_t r = 0; r < map.box[1]; r++) {
        for (uint32_t u = 0; u < MATRIX_ROW / 16; u++) {
            uint32_t position = first + r * MATRIX_ROW + u * 16;
            int64_t column = at[0] + int64_t(u * 16 / map.element), row = at[1] + int64_t(r);
            const uint8_t *from = nullptr;
            if (inside(0, column) && inside(1, row) && inside(2, at[2]) && inside(3, at[3]))
                from = map.first + column * map.element + row * int64_t(map.strides[0]) +
                       at[2] * int64_t(map.strides[1]) + at[3] * int64_t(map.strides[2]);
            copy.units.push_back({position ^ (position >> 7 & 7) << 4, from});
        }
    }
    start(std::move(copy));
}

void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *b) {
    uint32_t first = offset(to, "the target of a copy");
    if (first % 16 || uintptr_t(from) % 16 || bytes % 16 || bytes == 0)
        fail("a copy of %u bytes, or not aligned to 16", bytes);
    Copy copy = {{}, b};
    for (uint32_t x = 0; x < bytes; x += 16)
        copy.units.push_back({first + x, static_cast<const uint8_t *>(from) + x});
    start(std::move(copy));
}

// Makes the stores of all threads visible: those of the calling thread, and possibly more than the hardware does.
void fence_async() { state.fenced = true; }

namespace async_proxy {

void begin() {
    state = AsyncProxy();
    state.eager = random_below(4) == 0;
}

bool step(bool stuck) {
    if (state.copies.empty()) return false;
    if (!stuck && (!state.eager || random_below(64))) return false;
    complete_copy(random_below(uint32_t(state.copies.size())));
    return true;
}

std::string waiting() {
    std::string text;
    for (auto &[at, b] : state.barriers)
        if (!b.threads.empty())
            text += ", " + std::to_string(b.threads.size()) + " wait at the mbarrier at " +
                    std::to_string(offset(at, "")) + " for phase " + std::to_string(b.phase) + " (" +
                    std::to_string(b.missing) + " arrivals and " + std::to_string(b.bytes) + " bytes are missing)";
    return text;
}

std::string unfinished() {
    if (!state.copies.empty()) return std::to_string(state.copies.size()) + " copies are in flight at the end";
    for (auto &[at, b] : state.barriers)
        if (b.bytes) return "an mbarrier expects " + std::to_string(b.bytes) + " bytes more at the end";
    for (auto &[warp, w] : state.warps) {
        if (!w.products.empty()) return "warp " + std::to_string(warp) + " has not waited for its products";
        for (uint32_t other = warp / 4 * 4; other < warp / 4 * 4 + 4; other++) {
            auto entry = state.warps.find(other);
            bool same = entry != state.warps.end() && entry->second.history.size() == w.history.size() &&
                        entry->second.registers.size() == w.registers.size();
            if (!same)
                return "warps " + std::to_string(warp) + " and " + std::to_string(other) +
                       " of a warpgroup differ in products or setmaxnreg";
        }
    }
    return "";
}

} // namespace async_proxy
} // namespace emulate
