// The kernels as plain functions over raw pointers, one table of them per instruction set.
//
// The files that define the tables include no torch header: an inline function of a library header compiled there
// could be merged by the linker with the copy that runs on machines without those instructions.
#pragma once

#include <cstdint>

#include "../msda/sampling.h"

namespace msda {

enum ScalarKind { kFloat, kDouble, kHalf, kBFloat16, kScalarKinds };

// Tensors are contiguous: value (batch, positions, heads, channels), sampling_locations (batch, queries, heads, levels,
// points, 2) as (x, y), attention_weights (batch, queries, heads, levels, points), output (batch, queries, heads,
// channels). Gradients have the shape of what they are the gradient of, and every entry of them is written.
struct ForwardArguments {
  const void* value;
  const void* sampling_locations;
  const void* attention_weights;
  void* output;
};

struct BackwardArguments {
  const void* value;
  const void* sampling_locations;
  const void* attention_weights;
  const void* grad_output;
  void* grad_value;
  void* grad_sampling_locations;
  void* grad_attention_weights;
};

struct Kernels {
  // Tasks [begin, end) out of batch * queries; each writes its own output rows.
  void (*forward[kScalarKinds])(const Sizes&, const ForwardArguments&, int64_t begin, int64_t end);
  // Tasks [begin, end) out of batch * heads * levels; each owns one level of one head, so no two write the same entry.
  // `scratch` is the caller's, 64-byte aligned, `scratch_bytes` long, one per thread.
  void (*backward[kScalarKinds])(const Sizes&, const BackwardArguments&, void* scratch, int64_t begin, int64_t end);
  int64_t (*scratch_bytes[kScalarKinds])(const Sizes&);
};

extern const Kernels kKernelsBaseline;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace msda
