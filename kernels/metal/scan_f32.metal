// Instantiations of the scan in f32.
#include "scan_instances.h"

SCANS(f32)
