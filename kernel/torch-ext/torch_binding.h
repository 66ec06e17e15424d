#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

// Multi-scale deformable attention: `output[b, q, m] = sum over levels and points of attention_weights *
// bilinear(value of that level and head, sampling_locations)`, (batch, queries, heads * channels).
// `spatial_shapes` is [height_0, width_0, height_1, width_1, ...]. See msda/checks.h for the other shapes.
at::Tensor ms_deform_attn_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                                  const at::Tensor& sampling_locations, const at::Tensor& attention_weights);

// Gradients for value, sampling_locations and attention_weights.
std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad_output,
                                                                       const at::Tensor& value,
                                                                       at::IntArrayRef spatial_shapes,
                                                                       const at::Tensor& sampling_locations,
                                                                       const at::Tensor& attention_weights);
