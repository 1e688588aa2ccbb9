// In place of the toolkit's header of this name: see cuda_fp16.h.
#include "cuda_fp16.h"
