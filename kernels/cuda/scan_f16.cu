// Instantiations of the scan in f16.
#include "scan_table.cuh"

SCANS(f16)
