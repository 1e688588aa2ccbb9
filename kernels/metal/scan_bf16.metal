// Instantiations of the scan in bf16.
#include "scan_table.h"

SCANS(bf16)
