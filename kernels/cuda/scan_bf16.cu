// Instantiations of the scan in bf16.
#include "scan_instances.cuh"

SCANS(bf16)
