// The dialect of the kernel bodies in this folder, which are compiled both as CUDA and as Metal. Every pointer names
// its address space: DEVICE for global memory, SHARED for the memory of a block (Metal: threadgroup), LOCAL for
// variables of a thread. Params are passed as `PARAMS P &`; constants at file scope are CONSTANT. A function that
// depends on the thread takes `Thread me`. Metal has no lambdas, no double and no recursion, so these bodies use none.
#pragma once
#if defined(__METAL_VERSION__) || defined(GD_METAL) || defined(GD_STRICT)
#include "../metal/language.h"
#else
#include "../cuda/language.cuh"
#endif
