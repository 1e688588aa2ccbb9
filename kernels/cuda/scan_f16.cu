// Instantiations of the scan in f16.
#include "scan_instances.cuh"

SCANS(f16)
