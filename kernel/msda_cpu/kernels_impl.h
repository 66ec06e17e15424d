// Forward and backward over channels in vectors. Included once per instruction set (see kernels_*.cpp).
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace msda {
namespace {

// Vectors of one output row that are kept in registers while all samples are added up.
constexpr int kMaxBlocks = MSDA_VECTOR_BYTES == 64 ? 4 : 8;

constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchedRows = 8;  // how far ahead rows are prefetched

// One output row, or kBlocks vectors of it: `value` points at the head's first channel to process of position 0,
// `locations` and `weights` at the samples of this query and head. With kPartial the (single) vector has `count` lanes.
template <typename S, int kBlocks, bool kPartial>
MSDA_INLINE void forward_channels(const Sizes& sizes, const S* value, const S* locations, const S* weights, S* output,
                                  int64_t count) {
  typedef typename Storage<S>::Compute Compute;
  typedef typename Storage<S>::Vector Vector;
  const int64_t stride = sizes.heads * sizes.channels;
  const auto load = [count](const S* source) {
    return kPartial ? load_partial(source, count) : Storage<S>::load(source);
  };

  Vector sum[kBlocks] = {};
  for (int level_index = 0; level_index < sizes.levels; ++level_index) {
    const Level& level = sizes.level[level_index];
    const S* level_value = value + level.start * stride;
    for (int point = 0; point < sizes.points; ++point, locations += 2, ++weights) {
      Footprint<Compute> footprint;
      if (!locate(Storage<S>::load_scalar(locations), Storage<S>::load_scalar(locations + 1), level, &footprint)) {
        continue;
      }
      const Compute weight = Storage<S>::load_scalar(weights);
      if (is_interior(footprint, level)) {
        const S* above = level_value + corner_position(footprint, level, 0) * stride;
        const S* below = above + level.width * stride;
        const Compute w0 = weight * corner_weight(footprint, 0), w1 = weight * corner_weight(footprint, 1);
        const Compute w2 = weight * corner_weight(footprint, 2), w3 = weight * corner_weight(footprint, 3);
        for (int block = 0; block < kBlocks; ++block) {
          const int64_t channel = block * kLanes<S>;
          sum[block] += w0 * load(above + channel);
          sum[block] += w1 * load(above + stride + channel);
          sum[block] += w2 * load(below + channel);
          sum[block] += w3 * load(below + stride + channel);
        }
        continue;
      }
      for (int corner = 0; corner < 4; ++corner) {
        if (!has_corner(footprint, level, corner)) {
          continue;
        }
        const S* row = level_value + corner_position(footprint, level, corner) * stride;
        const Compute corner_share = weight * corner_weight(footprint, corner);
        for (int block = 0; block < kBlocks; ++block) {
          sum[block] += corner_share * load(row + block * kLanes<S>);
        }
      }
    }
  }
  for (int block = 0; block < kBlocks; ++block) {
    if (kPartial) {
      store_partial(output, sum[block], count);
    } else {
      Storage<S>::store(output + block * kLanes<S>, sum[block]);
    }
  }
}

template <typename S>
MSDA_INLINE void forward_row(const Sizes& sizes, const S* value, const S* locations, const S* weights, S* output) {
  const int64_t lanes = kLanes<S>;
  int64_t channel = 0;
  for (; channel + kMaxBlocks * lanes <= sizes.channels; channel += kMaxBlocks * lanes) {
    forward_channels<S, kMaxBlocks, false>(sizes, value + channel, locations, weights, output + channel, lanes);
  }
  for (; channel + lanes <= sizes.channels; channel += lanes) {
    forward_channels<S, 1, false>(sizes, value + channel, locations, weights, output + channel, lanes);
  }
  if (channel < sizes.channels) {
    forward_channels<S, 1, true>(sizes, value + channel, locations, weights, output + channel,
                                 sizes.channels - channel);
  }
}

// Read one image's value once, in order. Samples touch it in an order that no prefetcher follows; when they touch most of
// it anyway, bringing it into the cache as a stream first is faster.
template <typename S>
MSDA_INLINE void warm_cache(const Sizes& sizes, const S* value) {
  const char* bytes = reinterpret_cast<const char*>(value);
  const int64_t size = sizes.positions * sizes.heads * sizes.channels * static_cast<int64_t>(sizeof(S));
  for (int64_t offset = 0; offset < size; offset += kCacheLine) {
    static_cast<void>(*static_cast<const volatile char*>(bytes + offset));
  }
}

// Queries [begin, end) of one image.
template <typename S>
MSDA_INLINE void forward_image(const Sizes& sizes, const ForwardArguments& arguments, int64_t batch, int64_t begin,
                               int64_t end) {
  const int64_t samples = int64_t(sizes.levels) * sizes.points;
  const S* value = static_cast<const S*>(arguments.value) + batch * sizes.positions * sizes.heads * sizes.channels;
  const int64_t corners_per_head = 4 * samples * (end - begin);
  if (corners_per_head >= sizes.positions) {
    warm_cache(sizes, value);
  }
  for (int64_t query = begin; query < end; ++query) {
    for (int64_t head = 0; head < sizes.heads; ++head) {
      const int64_t row = (batch * sizes.queries + query) * sizes.heads + head;
      forward_row(sizes, value + head * sizes.channels,
                  static_cast<const S*>(arguments.sampling_locations) + row * samples * 2,
                  static_cast<const S*>(arguments.attention_weights) + row * samples,
                  static_cast<S*>(arguments.output) + row * sizes.channels);
    }
  }
}

template <typename S>
void forward(const Sizes& sizes, const ForwardArguments& arguments, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t batch = begin / sizes.queries;
    const int64_t image_end = (batch + 1) * sizes.queries;
    const int64_t stop = end < image_end ? end : image_end;
    forward_image<S>(sizes, arguments, batch, begin - batch * sizes.queries, stop - batch * sizes.queries);
    begin = stop;
  }
}

// Channels of a scratch row: whole vectors, so that only copying in and out meets a partial one.
template <typename S>
MSDA_INLINE int64_t padded_channels(const Sizes& sizes) {
  return (sizes.channels + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// In the compute type: the value of the largest level, its gradient, and one row of the output gradient.
template <typename S>
int64_t scratch_bytes(const Sizes& sizes) {
  int64_t positions = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    const int64_t area = int64_t(sizes.level[level].height) * sizes.level[level].width;
    positions = area > positions ? area : positions;
  }
  return (2 * positions + 1) * padded_channels<S>(sizes) * static_cast<int64_t>(sizeof(typename Storage<S>::Compute));
}

// One head's rows lie `stride` apart, too far for the hardware to foresee the next one.
template <bool kForWriting, typename S>
MSDA_INLINE void prefetch_ahead(const S* rows, int64_t row, int64_t row_count, int64_t stride, int64_t channels) {
  const int64_t ahead = row + kPrefetchedRows < row_count ? row + kPrefetchedRows : row_count - 1;
  const char* bytes = reinterpret_cast<const char*>(rows + ahead * stride);
  for (int64_t offset = 0; offset < channels * static_cast<int64_t>(sizeof(S)); offset += kCacheLine) {
    __builtin_prefetch(bytes + offset, kForWriting);
  }
}

template <typename S>
MSDA_INLINE void copy_row_in(const S* source, typename Storage<S>::Compute* target, int64_t channels) {
  typedef Storage<typename Storage<S>::Compute> ComputeStorage;
  int64_t channel = 0;
  for (; channel + kLanes<S> <= channels; channel += kLanes<S>) {
    ComputeStorage::store(target + channel, Storage<S>::load(source + channel));
  }
  if (channel < channels) {
    ComputeStorage::store(target + channel, load_partial(source + channel, channels - channel));
  }
}

template <typename S>
MSDA_INLINE void copy_row_out(const typename Storage<S>::Compute* source, S* target, int64_t channels) {
  typedef Storage<typename Storage<S>::Compute> ComputeStorage;
  int64_t channel = 0;
  for (; channel + kLanes<S> <= channels; channel += kLanes<S>) {
    Storage<S>::store(target + channel, ComputeStorage::load(source + channel));
  }
  if (channel < channels) {
    store_partial(target + channel, ComputeStorage::load(source + channel), channels - channel);
  }
}

// For the kCorners rows at `offsets`: dots = <grad_output, value row>, gradient row += share * grad_output.
template <typename C, int kCorners>
MSDA_INLINE void backward_corners(const C* value, C* gradient, const int64_t* offsets, const C* shares,
                                  const C* grad_output, int64_t channels, C* dots) {
  typedef typename Storage<C>::Vector Vector;
  Vector products[4] = {};
  for (int64_t channel = 0; channel < channels; channel += kLanes<C>) {
    const Vector upstream = Storage<C>::load(grad_output + channel);
    for (int corner = 0; corner < kCorners; ++corner) {
      const int64_t offset = offsets[corner] + channel;
      products[corner] += upstream * Storage<C>::load(value + offset);
      Storage<C>::store(gradient + offset, Storage<C>::load(gradient + offset) + shares[corner] * upstream);
    }
  }
  C sums[4];
  sums_of_lanes(products, sums);
  memcpy(dots, sums, kCorners * sizeof(C));
}

// One sample: adds to the value gradient of its corners and returns its own gradients.
template <typename C>
MSDA_INLINE SampleGradient<C> backward_sample(const Level& level, C x, C y, C weight, const C* grad_output,
                                              const C* value, C* gradient, int64_t channels) {
  Footprint<C> footprint;
  if (!locate(x, y, level, &footprint)) {
    return SampleGradient<C>{};
  }
  C dots[4] = {};
  C shares[4];
  int64_t offsets[4];
  for (int corner = 0; corner < 4; ++corner) {
    shares[corner] = weight * corner_weight(footprint, corner);
    offsets[corner] = corner_position(footprint, level, corner) * channels;
  }
  if (is_interior(footprint, level)) {
    backward_corners<C, 4>(value, gradient, offsets, shares, grad_output, channels, dots);
  } else {
    for (int corner = 0; corner < 4; ++corner) {
      if (has_corner(footprint, level, corner)) {
        backward_corners<C, 1>(value, gradient, offsets + corner, shares + corner, grad_output, channels, dots + corner);
      }
    }
  }
  return sample_gradient(footprint, level, weight, dots);
}

// All samples of one level by one head of one image. The level is copied into `scratch` first: there it is contiguous,
// in the compute type, and stays in the cache next to its gradient.
template <typename S>
MSDA_INLINE void backward_level(const Sizes& sizes, const BackwardArguments& arguments,
                                typename Storage<S>::Compute* scratch, int64_t batch, int64_t head, int level_index) {
  typedef typename Storage<S>::Compute Compute;
  const Level& level = sizes.level[level_index];
  const int64_t area = int64_t(level.height) * level.width;
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t padded = padded_channels<S>(sizes);
  const int64_t value_offset = ((batch * sizes.positions + level.start) * sizes.heads + head) * sizes.channels;
  const S* source = static_cast<const S*>(arguments.value) + value_offset;
  S* target = static_cast<S*>(arguments.grad_value) + value_offset;
  Compute* value = scratch;
  Compute* gradient = value + area * padded;
  Compute* upstream = gradient + area * padded;

  for (int64_t position = 0; position < area; ++position) {
    prefetch_ahead<false>(source, position, area, stride, sizes.channels);
    copy_row_in(source + position * stride, value + position * padded, sizes.channels);
  }
  memset(gradient, 0, static_cast<size_t>(area * padded) * sizeof(Compute));

  const int64_t first_row = batch * sizes.queries * sizes.heads + head;
  const S* grad_output = static_cast<const S*>(arguments.grad_output) + first_row * sizes.channels;
  for (int64_t query = 0; query < sizes.queries; ++query) {
    prefetch_ahead<false>(grad_output, query, sizes.queries, stride, sizes.channels);
    copy_row_in(grad_output + query * stride, upstream, sizes.channels);
    const int64_t first_sample = ((first_row + query * sizes.heads) * sizes.levels + level_index) * sizes.points;
    for (int64_t sample = first_sample; sample < first_sample + sizes.points; ++sample) {
      const S* location = static_cast<const S*>(arguments.sampling_locations) + 2 * sample;
      const S* weight = static_cast<const S*>(arguments.attention_weights) + sample;
      const SampleGradient<Compute> own = backward_sample(
          level, Storage<S>::load_scalar(location), Storage<S>::load_scalar(location + 1),
          Storage<S>::load_scalar(weight), upstream, value, gradient, padded);
      S* grad_location = static_cast<S*>(arguments.grad_sampling_locations) + 2 * sample;
      Storage<S>::store_scalar(grad_location, own.x);
      Storage<S>::store_scalar(grad_location + 1, own.y);
      Storage<S>::store_scalar(static_cast<S*>(arguments.grad_attention_weights) + sample, own.attention_weight);
    }
  }

  for (int64_t position = 0; position < area; ++position) {
    prefetch_ahead<true>(target, position, area, stride, sizes.channels);
    copy_row_out(gradient + position * padded, target + position * stride, sizes.channels);
  }
}

template <typename S>
void backward(const Sizes& sizes, const BackwardArguments& arguments, void* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / (sizes.heads * sizes.levels);
    const int64_t head = task / sizes.levels % sizes.heads;
    backward_level<S>(sizes, arguments, static_cast<typename Storage<S>::Compute*>(scratch), batch, head,
                      static_cast<int>(task % sizes.levels));
  }
}

}  // namespace

const Kernels MSDA_KERNELS = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {scratch_bytes<float>, scratch_bytes<double>, scratch_bytes<Half>, scratch_bytes<BFloat16>},
};

}  // namespace msda
