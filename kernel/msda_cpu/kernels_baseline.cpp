// Any machine: 16-byte vectors, which every 64-bit x86 and Arm has.
#include <cstdint>
#include <cstring>
#include <utility>

#define MSDA_VECTOR_BYTES 16
#define MSDA_KERNELS kKernelsBaseline
#include "kernels_impl.h"
