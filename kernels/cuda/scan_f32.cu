// Instantiations of the scan in f32: one row of tiles a warp at any head_dim.
#include "scan_instances.cuh"

BIAS(f32)
SCAN(f32, 32, 1)
SCAN(f32, 64, 1)
SCAN(f32, 96, 1)
SCAN(f32, 128, 1)
SCAN(f32, 192, 1)
SCAN(f32, 256, 1)
