// The words of the bodies in this folder, which are compiled as CUDA and as Metal. A pointer names what it
// points to: DEVICE memory, SHARED memory of a block, a LOCAL variable; params come as `PARAMS P &`, numbers
// of a file are CONSTANT. A function that depends on its thread takes `Thread me`. No lambdas, no double, no
// recursion: Metal has none.
#pragma once
#if defined(__METAL_VERSION__) || defined(GD_METAL) || defined(GD_STRICT)
#include "../metal/language.h"
#else
#include "../cuda/language.cuh"
#endif
