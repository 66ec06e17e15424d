#include "torch_binding.h"

#include <torch/library.h>

#include "registration.h"

#if defined(CUDA_KERNEL)
#define MSDA_DISPATCH_KEY CUDA
#else
#define MSDA_DISPATCH_KEY CPU
#endif

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "ms_deform_attn_forward(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  ops.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, MSDA_DISPATCH_KEY, ops) {
  ops.impl("ms_deform_attn_forward", &ms_deform_attn_forward);
  ops.impl("ms_deform_attn_backward", &ms_deform_attn_backward);
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
