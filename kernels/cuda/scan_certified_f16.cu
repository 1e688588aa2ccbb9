// Instantiations of the scan with 8-bit keys in f16.
#include "scan_certified.cuh"

SCANS_CERTIFIED(f16)
