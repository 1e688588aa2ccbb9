// Instantiations of the scan in f16.
#include "scan_table.h"

SCANS(f16)
