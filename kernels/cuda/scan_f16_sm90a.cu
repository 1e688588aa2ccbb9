// Instantiations of Hopper's scan in f16.
#include "scan_hopper.cuh"

SCANS_HOPPER(f16)
