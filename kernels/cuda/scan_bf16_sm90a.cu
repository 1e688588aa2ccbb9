// Instantiations of Hopper's scan in bf16.
#include "scan_hopper.cuh"

SCANS_HOPPER(bf16)
