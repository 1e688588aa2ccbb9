// The functions of cuRAND that candle calls when it opens a device. Random numbers are not drawn on the device.
#include <curand.h>

extern "C" {
curandStatus_t curandCreateGenerator(curandGenerator_t *generator, curandRngType_t) {
    static int object;
    *generator = reinterpret_cast<curandGenerator_t>(&object);
    return CURAND_STATUS_SUCCESS;
}
curandStatus_t curandDestroyGenerator(curandGenerator_t) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t, unsigned long long) {
    return CURAND_STATUS_SUCCESS;
}
curandStatus_t curandSetStream(curandGenerator_t, cudaStream_t) { return CURAND_STATUS_SUCCESS; }
}
