// Instantiations of the scan in f16.
#include "scan_instances.h"

SCANS(f16)
