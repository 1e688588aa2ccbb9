// Instantiations of the scan with 8-bit keys in bf16.
#include "scan_certified.cuh"

SCANS_CERTIFIED(bf16)
