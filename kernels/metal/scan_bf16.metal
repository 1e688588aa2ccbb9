// Instantiations of the scan in bf16.
#include "scan_instances.h"

SCANS(bf16)
