// A CUDA driver for machines without a GPU: its device is the host. Device memory is host memory, initialised to NaN,
// between guard zones that must not change; every enqueued operation is executed immediately. The project's kernels run
// in the emulator (kernels/emulate). Candle's kernels run as plain C++ (grid.h), found by the names in their PTX. Calls
// that a GPU would refuse fail: addresses outside of device memory, blocks and shared memory beyond the limits, unknown
// kernels.
//
// GD_DRIVER_COMPUTE is the compute capability, 80 (the default) or 90. On exit a program appends to the file
// GD_DRIVER_LOG how often each kernel and each copy was enqueued, and its bytes; errors go to stderr.
#include <cuda.h>

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../../../kernels/cuda/hopper.cuh"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include "grid.h"

extern "C" int gd_emulate_launch(const char *name, const uint32_t *grid, uint32_t threads, uint32_t shared,
                                 const void *params, size_t params_bytes, void *const *pointers, size_t count,
                                 uint64_t seed, int fault, char *text, size_t text_bytes);
extern "C" int gd_emulate_kernel(const char *name, size_t *params, size_t *pointers, uint32_t *values);

namespace {

// Bytes of a guard zone and of device memory, and the value of the bytes of guard zones.
constexpr size_t ZONE = 256, MEMORY = size_t(8) << 30;
constexpr uint8_t FENCE = 0xa5;

std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

CUresult refuse(CUresult code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    std::fputs("driver: ", stderr);
    std::vfprintf(stderr, format, list);
    std::fputc('\n', stderr);
    va_end(list);
    return code;
}

struct Counts {
    struct Count {
        size_t times = 0, bytes = 0;
    };
    std::map<std::string, Count> all;
    void add(const std::string &what, size_t bytes) {
        auto &count = all[what];
        count.times++;
        count.bytes += bytes;
    }
    ~Counts() {
        const char *path = std::getenv("GD_DRIVER_LOG");
        FILE *file = path ? std::fopen(path, "a") : nullptr;
        if (!file) return;
        for (auto &[what, count] : all)
            std::fprintf(file, "%s %zu %zu\n", what.c_str(), count.times, count.bytes);
        std::fclose(file);
    }
} counts;

// The sizes of all allocations by the address of their first byte.
std::map<uintptr_t, size_t> &memory() {
    static auto *all = new std::map<uintptr_t, size_t>;
    return *all;
}

// Bytes from `at` to the end of its allocation; 0 if `at` is not in device memory.
size_t bytes_to_end(uintptr_t at) {
    auto after = memory().upper_bound(at);
    if (after == memory().begin()) return 0;
    auto [first, bytes] = *std::prev(after);
    return at < first + bytes ? first + bytes - at : 0;
}

CUresult allocate(CUdeviceptr *at, size_t bytes) {
    Guard guard(lock);
    if (!bytes) return refuse(CUDA_ERROR_INVALID_VALUE, "an allocation of no bytes");
    if (bytes > MEMORY) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t all = (bytes + ZONE - 1) / ZONE * ZONE + 2 * ZONE;
    auto *block = static_cast<uint8_t *>(std::aligned_alloc(ZONE, all));
    if (!block) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(block, FENCE, all);
    std::memset(block + ZONE, 0xff, bytes);
    memory()[uintptr_t(block + ZONE)] = bytes;
    *at = CUdeviceptr(block + ZONE);
    return CUDA_SUCCESS;
}

bool intact(uintptr_t at, size_t bytes) {
    size_t end = (bytes + ZONE - 1) / ZONE * ZONE + ZONE;
    auto *first = reinterpret_cast<const uint8_t *>(at);
    for (size_t n = 0; n < ZONE; n++)
        if (first[n - ZONE] != FENCE) return false;
    for (size_t n = bytes; n < end; n++)
        if (first[n] != FENCE) return false;
    return true;
}

CUresult release(CUdeviceptr at) {
    Guard guard(lock);
    auto allocation = memory().find(uintptr_t(at));
    if (allocation == memory().end())
        return refuse(CUDA_ERROR_INVALID_VALUE, "cannot free %#llx, which is no allocation", at);
    bool whole = intact(allocation->first, allocation->second);
    size_t bytes = allocation->second;
    memory().erase(allocation);
    std::free(reinterpret_cast<uint8_t *>(at) - ZONE);
    if (!whole) return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "a write beyond an allocation of %zu bytes", bytes);
    return CUDA_SUCCESS;
}

CUresult copy(const char *what, void *to, const void *from, size_t bytes, bool to_device, bool from_device) {
    Guard guard(lock);
    if ((to_device && bytes_to_end(uintptr_t(to)) < bytes) || (from_device && bytes_to_end(uintptr_t(from)) < bytes))
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s of %zu bytes from %p to %p: not within device memory", what, bytes,
                      from, to);
    std::memcpy(to, from, bytes);
    counts.add(what, bytes);
    return CUDA_SUCCESS;
}

// An argument of one of candle's kernels, as its PTX declares it.
struct Argument {
    size_t bytes;
    bool floating;
};
struct Function {
    std::string name;
    bool ours;
    void *code;
    std::vector<Argument> arguments;
    uint32_t shared = 48 << 10;
};
struct Module {
    std::map<std::string, std::vector<Argument>> entries;
    bool ours = false;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

// The entries of a PTX text with their parameters: ".entry NAME(.param .u64 NAME_param_0, ...)".
void parse(const std::string &ptx, Module &module) {
    for (size_t at = 0; (at = ptx.find(".entry ", at)) != std::string::npos;) {
        at += 7;
        size_t open = ptx.find('(', at), close = ptx.find(')', open);
        std::vector<Argument> arguments;
        std::string list = ptx.substr(open + 1, close - open - 1);
        for (size_t from = 0; (from = list.find(".param", from)) != std::string::npos;) {
            size_t end = list.find(',', from);
            std::string one = list.substr(from, end == std::string::npos ? end : end - from);
            Argument a = {0, one.find(" .f32") != std::string::npos || one.find(" .f64") != std::string::npos};
            for (auto [name, bytes] :
                 {std::pair(" .b8", 1), {" .u8", 1}, {" .s8", 1}, {"16", 2}, {"32", 4}, {"64", 8}}) {
                std::string text = name;
                if (text[0] != ' ') {
                    for (const char *kind : {" .u", " .s", " .b", " .f"})
                        if (one.find(kind + text) != std::string::npos) a.bytes = size_t(bytes);
                } else if (one.find(text) != std::string::npos) {
                    a.bytes = size_t(bytes);
                }
            }
            if (size_t bracket = one.find('['); bracket != std::string::npos)
                a.bytes = std::strtoul(one.c_str() + bracket + 1, nullptr, 10);
            arguments.push_back(a);
            if (end == std::string::npos) break;
            from = end;
        }
        module.entries[ptx.substr(at, open - at)] = arguments;
    }
}

// A call in the System V ABI: integers in six registers and then on the stack, floats in eight other registers.
struct Call {
    void *code;
    uint64_t integers[32] = {};
    double numbers[8] = {};
};
void enter(void *call) {
    const Call &c = *static_cast<const Call *>(call);
    using Code = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, double, double, double, double,
                          double, double, double, double, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                          uint64_t, uint64_t, uint64_t, uint64_t);
    const uint64_t *i = c.integers;
    const double *d = c.numbers;
    reinterpret_cast<Code>(c.code)(i[0], i[1], i[2], i[3], i[4], i[5], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7],
                                   i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], i[14], i[15]);
}

CUresult launch(Function &f, grid::Index blocks, grid::Index threads, uint32_t shared, void **arguments) {
    Guard guard(lock);
    uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
    if (!blocks.x || !blocks.y || !blocks.z || blocks.y > 65535 || blocks.z > 65535 || !count || count > 1024 ||
        threads.z > 64 || shared > f.shared)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: grid %u x %u x %u, block %u x %u x %u, %u bytes, %u allowed",
                      f.name.c_str(), blocks.x, blocks.y, blocks.z, threads.x, threads.y, threads.z, shared, f.shared);
    size_t touched = 0;
    auto device = [&](const void *argument) {
        uint64_t at;
        std::memcpy(&at, argument, 8);
        size_t bytes = bytes_to_end(at);
        touched += bytes;
        return bytes || !at;
    };
    std::string error;
    if (f.ours) {
        size_t params, pointers;
        uint32_t values;
        gd_emulate_kernel(f.name.c_str(), &params, &pointers, &values);
        std::vector<void *> addresses(pointers);
        for (size_t n = 0; n < pointers; n++) {
            void *argument = arguments[n + 1];
            if (values >> n & 1) {
                addresses[n] = argument;
                continue;
            }
            if (!device(argument))
                return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: buffer %zu is no device memory", f.name.c_str(), n);
            std::memcpy(&addresses[n], argument, 8);
        }
        static uint64_t seed;
        char text[512] = "";
        uint32_t dims[3] = {blocks.x, blocks.y, blocks.z};
        if (threads.y != 1 || threads.z != 1 ||
            gd_emulate_launch(f.name.c_str(), dims, threads.x, shared, arguments[0], params, addresses.data(), pointers,
                              seed++, 0, text, sizeof text))
            error = text;
    } else {
        Call call = {f.code};
        size_t integers = 0, numbers = 0;
        for (size_t n = 0; n < f.arguments.size(); n++) {
            auto [bytes, floating] = f.arguments[n];
            void *to = floating ? static_cast<void *>(&call.numbers[numbers++]) : &call.integers[integers++];
            std::memcpy(to, arguments[n], bytes);
            if (bytes == 8 && !floating) device(arguments[n]);
        }
        if (integers > 16 || numbers > 8)
            error = "more arguments than this driver passes";
        else
            error = grid::run(enter, &call, blocks, threads, shared);
    }
    counts.add(f.name, touched);
    if (!error.empty()) return refuse(CUDA_ERROR_LAUNCH_FAILED, "%s: %s", f.name.c_str(), error.c_str());
    return CUDA_SUCCESS;
}

int compute() {
    const char *text = std::getenv("GD_DRIVER_COMPUTE");
    return text ? std::atoi(text) : 80;
}

int object;
template <class T> CUresult return_handle(T *to) {
    *to = reinterpret_cast<T>(&object);
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {
#define GD_DRIVER __attribute__((visibility("default"))) CUresult

GD_DRIVER cuInit(unsigned) { return CUDA_SUCCESS; }
GD_DRIVER cuGetErrorString(CUresult error, const char **text) {
    static std::map<CUresult, std::string> texts;
    Guard guard(lock);
    auto &one = texts[error];
    if (one.empty()) one = "error " + std::to_string(error) + " of the driver for tests";
    *text = one.c_str();
    return CUDA_SUCCESS;
}
GD_DRIVER cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
GD_DRIVER cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
GD_DRIVER cuDeviceGet(CUdevice *device, int n) {
    *device = n;
    return n == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
GD_DRIVER cuDeviceGetName(char *name, int bytes, CUdevice) {
    std::snprintf(name, size_t(bytes), "the host (compute %d)", compute());
    return CUDA_SUCCESS;
}
GD_DRIVER cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = compute() / 10;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = compute() % 10;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = (compute() >= 90 ? 227 : 163) << 10;
        break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 4;
        break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *value = 32;
        break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        *value = 1;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}
GD_DRIVER cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice) { return std::memset(uuid, 1, sizeof *uuid), CUDA_SUCCESS; }
GD_DRIVER cuDeviceTotalMem(size_t *bytes, CUdevice) { return *bytes = MEMORY, CUDA_SUCCESS; }
GD_DRIVER cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) { return return_handle(pool); }
GD_DRIVER cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { return CUDA_SUCCESS; }
GD_DRIVER cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return return_handle(context); }
GD_DRIVER cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
GD_DRIVER cuCtxGetCurrent(CUcontext *context) { return return_handle(context); }
GD_DRIVER cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
GD_DRIVER cuCtxDestroy(CUcontext) { return CUDA_SUCCESS; }
GD_DRIVER cuCtxSynchronize() { return CUDA_SUCCESS; }
GD_DRIVER cuStreamCreate(CUstream *stream, unsigned) { return return_handle(stream); }
GD_DRIVER cuStreamDestroy(CUstream) { return CUDA_SUCCESS; }
GD_DRIVER cuStreamSynchronize(CUstream) {
    Guard guard(lock);
    counts.add("wait", 0);
    return CUDA_SUCCESS;
}
GD_DRIVER cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
GD_DRIVER cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
GD_DRIVER cuEventCreate(CUevent *event, unsigned) { return return_handle(event); }
GD_DRIVER cuEventDestroy(CUevent) { return CUDA_SUCCESS; }
GD_DRIVER cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }
GD_DRIVER cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
GD_DRIVER cuEventQuery(CUevent) { return CUDA_SUCCESS; }

GD_DRIVER cuMemGetInfo(size_t *free, size_t *total) {
    *free = *total = MEMORY;
    return CUDA_SUCCESS;
}
GD_DRIVER cuMemAlloc(CUdeviceptr *at, size_t bytes) { return allocate(at, bytes); }
GD_DRIVER cuMemAllocAsync(CUdeviceptr *at, size_t bytes, CUstream) { return allocate(at, bytes); }
GD_DRIVER cuMemFree(CUdeviceptr at) { return release(at); }
GD_DRIVER cuMemFreeAsync(CUdeviceptr at, CUstream) { return release(at); }
GD_DRIVER cuMemAllocHost(void **at, size_t bytes) { return *at = std::malloc(bytes), CUDA_SUCCESS; }
GD_DRIVER cuMemHostAlloc(void **at, size_t bytes, unsigned) { return *at = std::malloc(bytes), CUDA_SUCCESS; }
GD_DRIVER cuMemFreeHost(void *at) { return std::free(at), CUDA_SUCCESS; }
GD_DRIVER cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream) {
    return copy("copy-to-device", reinterpret_cast<void *>(to), from, bytes, true, false);
}
GD_DRIVER cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream) {
    return copy("copy-to-host", to, reinterpret_cast<const void *>(from), bytes, false, true);
}
GD_DRIVER cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    return copy("copy", reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes, true, true);
}
GD_DRIVER cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream) {
    Guard guard(lock);
    if (bytes_to_end(uintptr_t(at)) < bytes) return refuse(CUDA_ERROR_INVALID_VALUE, "a memset beyond device memory");
    std::memset(reinterpret_cast<void *>(at), value, bytes);
    counts.add("memset", bytes);
    return CUDA_SUCCESS;
}

GD_DRIVER cuModuleLoadData(CUmodule *module, const void *image) {
    auto *made = new Module;
    uint32_t magic;
    std::memcpy(&magic, image, 4);
    // A fat binary or an object file holds GPU code; only the names of its kernels are used.
    made->ours = magic == 0xba55ed50 || magic == 0x464c457f;
    if (!made->ours) parse(static_cast<const char *>(image), *made);
    *module = reinterpret_cast<CUmodule>(made);
    return CUDA_SUCCESS;
}
GD_DRIVER cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
GD_DRIVER cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
    Guard guard(lock);
    auto &module = *reinterpret_cast<Module *>(handle);
    auto &function_of_name = module.functions[name];
    if (!function_of_name) {
        auto made = std::make_unique<Function>(Function{name, module.ours, nullptr, {}});
        size_t params, pointers;
        uint32_t values;
        if (module.ours) {
            if (!gd_emulate_kernel(name, &params, &pointers, &values)) return CUDA_ERROR_NOT_FOUND;
        } else {
            auto entry = module.entries.find(name);
            if (entry == module.entries.end()) return CUDA_ERROR_NOT_FOUND;
            made->arguments = entry->second;
            made->code = dlsym(RTLD_DEFAULT, name);
            if (!made->code) return refuse(CUDA_ERROR_NOT_FOUND, "%s is not compiled for the host", name);
        }
        function_of_name = std::move(made);
    }
    *function = reinterpret_cast<CUfunction>(function_of_name.get());
    return CUDA_SUCCESS;
}
GD_DRIVER cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    auto &f = *reinterpret_cast<Function *>(handle);
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        int limit;
        cuDeviceGetAttribute(&limit, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0);
        if (value > limit)
            return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory", f.name.c_str(), value);
        f.shared = uint32_t(value);
    }
    return CUDA_SUCCESS;
}
GD_DRIVER cuLaunchKernel(CUfunction handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                         unsigned bz, unsigned shared, CUstream, void **arguments, void **) {
    return launch(*reinterpret_cast<Function *>(handle), {gx, gy, gz}, {bx, by, bz}, shared, arguments);
}

GD_DRIVER cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *first,
                                 const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                 const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "the emulator's map");
    bool fits = rank == 4 && uintptr_t(first) % 16 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    for (int n = 0; fits && n < 4; n++)
        fits = dims[n] > 0 && box[n] > 0 && box[n] <= 256 && steps[n] == 1 && (n == 3 || strides[n] % 16 == 0);
    if (!fits) return refuse(CUDA_ERROR_INVALID_VALUE, "a tensor map of rank %u at %p", rank, first);
    TensorMap tensor_map = {};
    tensor_map.first = static_cast<const uint8_t *>(first);
    tensor_map.element = 2;
    for (int n = 0; n < 4; n++) {
        tensor_map.dims[n] = dims[n];
        tensor_map.box[n] = box[n];
        if (n < 3) tensor_map.strides[n] = strides[n];
    }
    std::memcpy(map, &tensor_map, sizeof tensor_map);
    return CUDA_SUCCESS;
}
}
