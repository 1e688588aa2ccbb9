// Instantiations of the scan in bf16.
#include "scan_table.cuh"

SCANS(bf16)
