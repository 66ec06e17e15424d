// Argument checks shared by the CPU and the CUDA entry points. After them every address the kernels form is in bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/irange.h>

#include <cstdint>

#include "sampling.h"

namespace msda {

// `spatial_shapes` is [height_0, width_0, height_1, width_1, ...].
inline Sizes checked_sizes(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                           const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  TORCH_CHECK_VALUE(value.dim() == 4, "value must be (batch, positions, heads, channels), got ", value.sizes());
  TORCH_CHECK_VALUE(sampling_locations.dim() == 6 && sampling_locations.size(5) == 2,
                    "sampling_locations must be (batch, queries, heads, levels, points, 2), got ",
                    sampling_locations.sizes());
  TORCH_CHECK_VALUE(attention_weights.sizes() == sampling_locations.sizes().slice(0, 5),
                    "attention_weights must be (batch, queries, heads, levels, points) = ",
                    sampling_locations.sizes().slice(0, 5), ", got ", attention_weights.sizes());
  TORCH_CHECK_VALUE(value.size(0) == sampling_locations.size(0) && value.size(2) == sampling_locations.size(2),
                    "value ", value.sizes(), " and sampling_locations ", sampling_locations.sizes(),
                    " differ in batch size or number of heads");
  TORCH_CHECK_TYPE(value.scalar_type() == sampling_locations.scalar_type() &&
                       value.scalar_type() == attention_weights.scalar_type(),
                   "value, sampling_locations and attention_weights must have one dtype, got ", value.scalar_type(),
                   ", ", sampling_locations.scalar_type(), " and ", attention_weights.scalar_type());
  TORCH_CHECK_VALUE(value.device() == sampling_locations.device() && value.device() == attention_weights.device(),
                    "value, sampling_locations and attention_weights must be on one device, got ", value.device(), ", ",
                    sampling_locations.device(), " and ", attention_weights.device());
  const int64_t levels = sampling_locations.size(3);
  TORCH_CHECK_VALUE(levels <= kMaxLevels, "at most ", kMaxLevels, " levels are supported, got ", levels);
  TORCH_CHECK_VALUE(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels,
                    "spatial_shapes must hold a height and a width for each of the ", levels, " levels, got ",
                    spatial_shapes);
  TORCH_CHECK_VALUE(sampling_locations.size(4) <= INT32_MAX, "too many points: ", sampling_locations.size(4));

  Sizes sizes = {};
  sizes.batch = value.size(0);
  sizes.positions = value.size(1);
  sizes.heads = value.size(2);
  sizes.channels = value.size(3);
  sizes.queries = sampling_locations.size(1);
  sizes.levels = static_cast<int32_t>(levels);
  sizes.points = static_cast<int32_t>(sampling_locations.size(4));
  int64_t start = 0;
  for (const auto level : c10::irange(levels)) {
    const int64_t height = spatial_shapes[2 * level];
    const int64_t width = spatial_shapes[2 * level + 1];
    // 2^24 keeps coordinates exact in fp32 and products of sides far from overflow.
    TORCH_CHECK_VALUE(height > 0 && width > 0 && height < (1 << 24) && width < (1 << 24), "level ", level,
                      " has the impossible size ", height, " x ", width);
    sizes.level[level] = {start, static_cast<int32_t>(height), static_cast<int32_t>(width)};
    start += height * width;
  }
  TORCH_CHECK_VALUE(start == sizes.positions, "value has ", sizes.positions, " positions but spatial_shapes ",
                    spatial_shapes, " cover ", start);
  return sizes;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({sizes.batch, sizes.queries, sizes.heads * sizes.channels}),
                    "grad_output must be (batch, queries, heads * channels) = (", sizes.batch, ", ", sizes.queries, ", ",
                    sizes.heads * sizes.channels, "), got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == value.scalar_type(), "grad_output must have the dtype of value, ",
                   value.scalar_type(), ", got ", grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.device() == value.device(), "grad_output must be on the device of value, ",
                    value.device(), ", got ", grad_output.device());
}

}  // namespace msda
