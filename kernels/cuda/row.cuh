// The shared words for rows, as the kernels of this folder use them.
#pragma once
#include "../shared/row.h"

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % 32; }
