// The words of the bodies in this folder, which are compiled as CUDA and as Metal. A pointer names what it
// points to: DEVICE memory, SHARED memory of a block, a LOCAL variable; params come as `PARAMS P &`. A
// function that depends on its thread takes `Thread me`. No lambdas, no double, no recursion: Metal has none.
#pragma once
#ifdef GD_METAL
#include "../metal/language.h"
#else
#include "../cuda/language.cuh"
#endif
