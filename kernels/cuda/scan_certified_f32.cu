// Instantiations of the scan with 8-bit keys in f32.
#include "scan_certified.cuh"

SCANS_CERTIFIED(f32)
