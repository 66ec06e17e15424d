// CUDA kernels: one forward, one backward, for float, double, half and bfloat16, any batch and any channel count. One
// warp works on one (batch, query, head); its lanes share the channels, so every read of a value row is coalesced.
// Half precision is computed and accumulated in fp32.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../msda/checks.h"
#include "../torch-ext/torch_binding.h"

namespace {

using msda::Footprint;
using msda::Level;
using msda::SampleGradient;
using msda::Sizes;

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int64_t kMaxBlocks = 1 << 20;

template <typename S>
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Calls `work(row)` for every (batch, query, head) of this warp; `row` counts them in memory order.
template <typename Work>
__device__ __forceinline__ void for_each_row(const Sizes& sizes, const Work& work) {
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y; row < rows; row += step) {
    work(row);
  }
}

// Offset of channel 0 of the first position of a level, for the image and the head of `row`.
__device__ __forceinline__ int64_t level_offset(const Sizes& sizes, const Level& level, int64_t row) {
  const int64_t head = row % sizes.heads;
  const int64_t batch = row / (sizes.heads * sizes.queries);
  return ((batch * sizes.positions + level.start) * sizes.heads + head) * sizes.channels;
}

template <typename S>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    forward_kernel(const Sizes sizes, const S* __restrict__ value, const S* __restrict__ locations,
                   const S* __restrict__ weights, S* __restrict__ output) {
  using Compute = ComputeOf<S>;
  const int64_t stride = sizes.heads * sizes.channels;
  for_each_row(sizes, [&](int64_t row) {
    for (int64_t channel = threadIdx.x; channel < sizes.channels; channel += kWarp) {
      int64_t sample = row * sizes.levels * sizes.points;
      Compute sum = 0;
      for (int level_index = 0; level_index < sizes.levels; ++level_index) {
        const Level level = sizes.level[level_index];
        const S* level_value = value + level_offset(sizes, level, row) + channel;
        for (int point = 0; point < sizes.points; ++point, ++sample) {
          Footprint<Compute> footprint;
          if (!msda::locate(static_cast<Compute>(locations[2 * sample]),
                            static_cast<Compute>(locations[2 * sample + 1]), level, &footprint)) {
            continue;
          }
          Compute sampled = 0;
          for (int corner = 0; corner < 4; ++corner) {
            if (msda::has_corner(footprint, level, corner)) {
              sampled += msda::corner_weight(footprint, corner) *
                         static_cast<Compute>(level_value[msda::corner_position(footprint, level, corner) * stride]);
            }
          }
          sum += static_cast<Compute>(weights[sample]) * sampled;
        }
      }
      output[row * sizes.channels + channel] = static_cast<S>(sum);
    }
  });
}

// `grad_value` is zero on entry and in the compute type: rows of it are shared by warps, hence the atomics.
template <typename S>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    backward_kernel(const Sizes sizes, const S* __restrict__ grad_output, const S* __restrict__ value,
                    const S* __restrict__ locations, const S* __restrict__ weights,
                    ComputeOf<S>* __restrict__ grad_value, S* __restrict__ grad_locations,
                    S* __restrict__ grad_weights) {
  using Compute = ComputeOf<S>;
  const int64_t stride = sizes.heads * sizes.channels;
  for_each_row(sizes, [&](int64_t row) {
    const S* row_grad_output = grad_output + row * sizes.channels;
    int64_t sample = row * sizes.levels * sizes.points;
    for (int level_index = 0; level_index < sizes.levels; ++level_index) {
      const Level level = sizes.level[level_index];
      const int64_t offset = level_offset(sizes, level, row);
      for (int point = 0; point < sizes.points; ++point, ++sample) {
        const Compute weight = static_cast<Compute>(weights[sample]);
        SampleGradient<Compute> gradient = {0, 0, 0};
        Footprint<Compute> footprint;
        // The whole warp sees the same location, so it takes the same branches.
        if (msda::locate(static_cast<Compute>(locations[2 * sample]), static_cast<Compute>(locations[2 * sample + 1]),
                         level, &footprint)) {
          Compute dots[4] = {0, 0, 0, 0};
          for (int corner = 0; corner < 4; ++corner) {
            if (!msda::has_corner(footprint, level, corner)) {
              continue;
            }
            const int64_t corner_offset = offset + msda::corner_position(footprint, level, corner) * stride;
            const Compute share = weight * msda::corner_weight(footprint, corner);
            for (int64_t channel = threadIdx.x; channel < sizes.channels; channel += kWarp) {
              const Compute upstream = static_cast<Compute>(row_grad_output[channel]);
              dots[corner] += upstream * static_cast<Compute>(value[corner_offset + channel]);
              atomicAdd(grad_value + corner_offset + channel, share * upstream);
            }
            dots[corner] = warp_sum(dots[corner]);
          }
          gradient = msda::sample_gradient(footprint, level, weight, dots, 1);
        }
        if (threadIdx.x == 0) {
          grad_weights[sample] = static_cast<S>(gradient.attention_weight);
          grad_locations[2 * sample] = static_cast<S>(gradient.x);
          grad_locations[2 * sample + 1] = static_cast<S>(gradient.y);
        }
      }
    }
  });
}

dim3 grid_for(const Sizes& sizes) {
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  return dim3(static_cast<unsigned>(std::min((rows + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks)));
}

}  // namespace

at::Tensor ms_deform_attn_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                                  const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = msda::checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor value_ = value.contiguous();
  const at::Tensor locations = sampling_locations.contiguous();
  const at::Tensor weights = attention_weights.contiguous();
  at::Tensor output = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (output.numel() == 0) {
    return output;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
        forward_kernel<scalar_t><<<grid_for(sizes), dim3(kWarp, kWarpsPerBlock), 0, c10::cuda::getCurrentCUDAStream()>>>(
            sizes, value_.const_data_ptr<scalar_t>(), locations.const_data_ptr<scalar_t>(),
            weights.const_data_ptr<scalar_t>(), output.mutable_data_ptr<scalar_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad_output,
                                                                       const at::Tensor& value,
                                                                       at::IntArrayRef spatial_shapes,
                                                                       const at::Tensor& sampling_locations,
                                                                       const at::Tensor& attention_weights) {
  const Sizes sizes = msda::checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  msda::check_grad_output(grad_output, value, sizes);
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward on CUDA");
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor grad_output_ = grad_output.contiguous();
  const at::Tensor value_ = value.contiguous();
  const at::Tensor locations = sampling_locations.contiguous();
  const at::Tensor weights = attention_weights.contiguous();
  at::Tensor grad_locations = at::empty_like(locations);
  at::Tensor grad_weights = at::empty_like(weights);
  at::Tensor grad_value;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using Compute = ComputeOf<scalar_t>;
    at::Tensor accumulated =
        at::zeros(value_.sizes(), value.options().dtype(c10::CppTypeToScalarType<Compute>::value));
    if (sizes.batch * sizes.queries * sizes.heads > 0) {
      backward_kernel<scalar_t>
          <<<grid_for(sizes), dim3(kWarp, kWarpsPerBlock), 0, c10::cuda::getCurrentCUDAStream()>>>(
              sizes, grad_output_.const_data_ptr<scalar_t>(), value_.const_data_ptr<scalar_t>(),
              locations.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
              accumulated.mutable_data_ptr<Compute>(), grad_locations.mutable_data_ptr<scalar_t>(),
              grad_weights.mutable_data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    grad_value = accumulated.to(value.scalar_type());
  });
  return {grad_value, grad_locations, grad_weights};
}
