// The operations on rows of kernels/shared, and the lane index.
#pragma once
#include "../shared/row.h"

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % 32; }
