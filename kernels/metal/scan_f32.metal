// Instantiations of the scan in f32.
#include "scan_table.h"

SCANS(f32)
