// CPU entry points: checks, allocation, choice of instruction set, and one parallel loop each.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "../msda/checks.h"
#include "../torch-ext/torch_binding.h"
#include "kernels.h"

namespace {

// torch's own choice, so that ATEN_CPU_CAPABILITY=default|avx2 selects ours too.
const msda::Kernels& kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return msda::kKernelsAvx512;
  }
  if (capability == "AVX2") {
    return msda::kKernelsAvx2;
  }
#endif
  return msda::kKernelsBaseline;
}

msda::ScalarKind scalar_kind(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return msda::kFloat;
    case at::kDouble:
      return msda::kDouble;
    case at::kHalf:
      return msda::kHalf;
    case at::kBFloat16:
      return msda::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "multi-scale deformable attention needs float32, float64, float16 or bfloat16, got ",
                       dtype);
  }
}

// The backward counts in 32 bits, which halves what it keeps in the cache.
void check_backward_sizes(const msda::Sizes& sizes) {
  constexpr int64_t kMost = int64_t(1) << 26;
  const int64_t per_query = std::max({sizes.channels, int64_t(sizes.points), int64_t(1)});
  TORCH_CHECK_VALUE(sizes.queries <= kMost / per_query && sizes.positions <= kMost, "the CPU backward takes at most ",
                    kMost, " positions and as many queries * channels and queries * points, got ", sizes.positions,
                    " positions, ", sizes.queries, " queries, ", sizes.channels, " channels and ", sizes.points, " points");
}

// A tensor of `like`'s shape that is about to be written for the first time. Large ones come fresh from the operating
// system, and a page fault every 4 KB costs more than this file's arithmetic: ask for huge pages where they are on offer.
at::Tensor fresh_like(const at::Tensor& like) {
  at::Tensor tensor = at::empty_like(like);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failing changes nothing
  }
#endif
  return tensor;
}

}  // namespace

at::Tensor ms_deform_attn_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                                  const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const msda::Sizes sizes = msda::checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  const auto forward = kernels().forward[scalar_kind(value.scalar_type())];
  const at::Tensor value_ = value.contiguous();
  const at::Tensor locations = sampling_locations.contiguous();
  const at::Tensor weights = attention_weights.contiguous();
  at::Tensor output = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());

  const msda::ForwardArguments arguments = {value_.const_data_ptr(), locations.const_data_ptr(),
                                            weights.const_data_ptr(), output.mutable_data_ptr()};
  constexpr int64_t kQueriesPerTask = 16;
  at::parallel_for(0, sizes.batch * sizes.queries, kQueriesPerTask,
                   [&](int64_t begin, int64_t end) { forward(sizes, arguments, begin, end); });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad_output,
                                                                       const at::Tensor& value,
                                                                       at::IntArrayRef spatial_shapes,
                                                                       const at::Tensor& sampling_locations,
                                                                       const at::Tensor& attention_weights) {
  const msda::Sizes sizes = msda::checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  msda::check_grad_output(grad_output, value, sizes);
  check_backward_sizes(sizes);
  const msda::ScalarKind kind = scalar_kind(value.scalar_type());
  const at::Tensor grad_output_ = grad_output.contiguous();
  const at::Tensor value_ = value.contiguous();
  const at::Tensor locations = sampling_locations.contiguous();
  const at::Tensor weights = attention_weights.contiguous();
  at::Tensor grad_value = fresh_like(value_);
  at::Tensor grad_locations = at::empty_like(locations);
  at::Tensor grad_weights = at::empty_like(weights);

  const msda::BackwardArguments arguments = {
      value_.const_data_ptr(),         locations.const_data_ptr(),        weights.const_data_ptr(),
      grad_output_.const_data_ptr(),   grad_value.mutable_data_ptr(),     grad_locations.mutable_data_ptr(),
      grad_weights.mutable_data_ptr()};
  const auto backward = kernels().backward[kind];
  const int64_t scratch_bytes = kernels().scratch_bytes[kind](sizes);
  at::parallel_for(0, sizes.batch * sizes.heads * sizes.levels, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({scratch_bytes}, at::kByte);
    backward(sizes, arguments, scratch.mutable_data_ptr(), begin, end);
  });
  return {grad_value, grad_locations, grad_weights};
}
