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
constexpr int kSecondCache = 2;         // as __builtin_prefetch counts

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

// Channels of a row of output gradients: whole vectors, so that only value and its gradient meet a partial one.
template <typename S>
MSDA_INLINE int64_t padded_channels(const Sizes& sizes) {
  return (sizes.channels + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// One head's rows lie `stride` apart, too far for the hardware to foresee the next one. Rows are fetched into the second
// cache: the first is busy with output gradients, and small.
template <bool kForWriting, typename S>
MSDA_INLINE void prefetch_ahead(const S* rows, int64_t row, int64_t row_count, int64_t stride, int64_t channels) {
  const int64_t ahead = row + kPrefetchedRows < row_count ? row + kPrefetchedRows : row_count - 1;
  const char* bytes = reinterpret_cast<const char*>(rows + ahead * stride);
  for (int64_t offset = 0; offset < channels * static_cast<int64_t>(sizeof(S)); offset += kCacheLine) {
    __builtin_prefetch(bytes + offset, kForWriting, kSecondCache);
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

// Corners are added up in fours, which share the sums over lanes.
constexpr int kQuad = 4;

MSDA_INLINE int32_t whole_quads(int32_t count) { return (count + kQuad - 1) / kQuad * kQuad; }

// One of the four pixels around a sample, as its pixel meets it.
template <typename C>
struct Corner {
  int32_t row;    // where the output gradient of the sample's query starts in `upstream`
  int32_t index;  // of the corner in `dots`
  C share;        // attention weight times bilinear weight
};

// What one thread needs for one level of one head of one image. Each fact about samples is an array of its own, so that
// the compiler makes vectors of them.
template <typename C>
struct Scratch {
  C* upstream;  // (queries + 1, padded channels): the head's output gradient, then a row of zeros
  // (queries, points):
  C* x;
  C* y;
  C* weights;  // of attention; zero where a sample touches no pixel
  C* past_top;
  C* past_left;
  C* grad_x;
  C* grad_y;
  C* grad_weights;
  // (4 corners, queries, points):
  int32_t* positions;  // of a corner's pixel inside the level; the level's area where there is no pixel
  C* shares;
  C* dots;            // <output gradient, value at the pixel>; one more entry is the fillers'
  Corner<C>* sorted;  // by position, each position's filled up to whole quads with corners that change nothing
  int32_t* ends;      // (area + 1): where each position's corners end in `sorted`
};

// Gives `start` the next `count` elements of `memory`, whose first `used` bytes are taken. `memory` may be null, to measure.
template <typename T>
MSDA_INLINE void take(void* memory, int64_t count, int64_t* used, T** start) {
  *start = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(*used));
  *used += (count * static_cast<int64_t>(sizeof(T)) + kCacheLine - 1) / kCacheLine * kCacheLine;
}

// Divides `memory` up for the largest level; returns the bytes that takes.
template <typename S>
MSDA_INLINE int64_t divide_scratch(const Sizes& sizes, void* memory, Scratch<typename Storage<S>::Compute>* scratch) {
  int64_t area = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    const int64_t level_area = int64_t(sizes.level[level].height) * sizes.level[level].width;
    area = level_area > area ? level_area : area;
  }
  const int64_t samples = sizes.queries * sizes.points;
  const int64_t positions = area + 1 < 4 * samples ? area + 1 : 4 * samples;  // with corners, at most
  int64_t used = 0;
  take(memory, (sizes.queries + 1) * padded_channels<S>(sizes), &used, &scratch->upstream);
  typedef typename Storage<S>::Compute Compute;
  Compute** const arrays[] = {&scratch->x,         &scratch->y,      &scratch->weights, &scratch->past_top,
                              &scratch->past_left, &scratch->grad_x, &scratch->grad_y,  &scratch->grad_weights};
  for (Compute** array : arrays) {
    take(memory, samples, &used, array);
  }
  take(memory, 4 * samples, &used, &scratch->positions);
  take(memory, 4 * samples, &used, &scratch->shares);
  take(memory, 4 * samples + 1, &used, &scratch->dots);
  take(memory, 4 * samples + (kQuad - 1) * positions, &used, &scratch->sorted);
  take(memory, area + 1, &used, &scratch->ends);
  return used;
}

template <typename S>
int64_t scratch_bytes(const Sizes& sizes) {
  Scratch<typename Storage<S>::Compute> scratch;
  return divide_scratch<S>(sizes, nullptr, &scratch);
}

// The head's output gradient, contiguous and in the compute type, and a row of zeros.
template <typename S, typename C>
MSDA_INLINE void copy_upstream(const Sizes& sizes, const S* grad_output, C* upstream) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t padded = padded_channels<S>(sizes);
  for (int64_t query = 0; query < sizes.queries; ++query) {
    prefetch_ahead<false>(grad_output, query, sizes.queries, stride, sizes.channels);
    copy_row_in(grad_output + query * stride, upstream + query * padded, sizes.channels);
  }
  memset(upstream + sizes.queries * padded, 0, static_cast<size_t>(padded) * sizeof(C));
}

// A query's samples of this level and head are `stride` samples after those of the query before.
template <typename S, typename C>
MSDA_INLINE void gather_samples(const Sizes& sizes, const S* locations, const S* weights, int64_t stride,
                                const Scratch<C>& scratch) {
  int64_t sample = 0;
  for (int64_t query = 0; query < sizes.queries; ++query) {
    prefetch_ahead<false>(locations, query, sizes.queries, 2 * stride, 2 * sizes.points);
    prefetch_ahead<false>(weights, query, sizes.queries, stride, sizes.points);
    for (int64_t index = query * stride; index < query * stride + sizes.points; ++index, ++sample) {
      scratch.x[sample] = Storage<S>::load_scalar(locations + 2 * index);
      scratch.y[sample] = Storage<S>::load_scalar(locations + 2 * index + 1);
      scratch.weights[sample] = Storage<S>::load_scalar(weights + index);
    }
  }
}

// Where every sample lies and what its corners are. `level` and `scratch` are copies: behind a reference they might change
// with every store, and the compiler would make no vectors.
template <typename C>
MSDA_INLINE void locate_samples(const Level level, int64_t samples, const Scratch<C> scratch) {
  const int32_t area = level.height * level.width;
#pragma omp simd
  for (int64_t sample = 0; sample < samples; ++sample) {
    Footprint<C> footprint;
    const bool touches = locate(scratch.x[sample], scratch.y[sample], level, &footprint);
    const C weight = touches ? scratch.weights[sample] : C(0);
    scratch.weights[sample] = weight;
    scratch.past_top[sample] = footprint.past_top;
    scratch.past_left[sample] = footprint.past_left;
    for (int corner = 0; corner < 4; ++corner) {
      const bool has_pixel = touches & has_corner(footprint, level, corner);
      const int32_t position = static_cast<int32_t>(corner_position(footprint, level, corner));
      scratch.positions[corner * samples + sample] = has_pixel ? position : area;
      scratch.shares[corner * samples + sample] = weight * corner_weight(footprint, corner);
    }
  }
}

// A counting sort by position. A position's last quad is full of fillers before its corners take their places.
template <typename C>
MSDA_INLINE void sort_corners(const Sizes& sizes, int32_t padded, int32_t area, const Scratch<C>& scratch) {
  const int32_t queries = static_cast<int32_t>(sizes.queries);
  const int32_t corners = 4 * queries * sizes.points;
  int32_t* const ends = scratch.ends;
  memset(ends, 0, static_cast<size_t>(area + 1) * sizeof(*ends));
  for (int32_t index = 0; index < corners; ++index) {
    ++ends[scratch.positions[index]];
  }
  const Corner<C> filler = {queries * padded, corners, C(0)};
  int32_t start = 0;
  for (int32_t position = 0; position <= area; ++position) {
    const int32_t count = ends[position];
    ends[position] = start;
    start += whole_quads(count);
    for (int32_t place = start - kQuad; count > 0 && place < start; ++place) {
      scratch.sorted[place] = filler;
    }
  }
  int32_t index = 0;
  for (int corner = 0; corner < 4; ++corner) {
    for (int32_t query = 0; query < queries; ++query) {
      for (int32_t point = 0; point < sizes.points; ++point, ++index) {
        scratch.sorted[ends[scratch.positions[index]]++] = {query * padded, index, scratch.shares[index]};
      }
    }
  }
}

// kBlocks vectors of one pixel's channels. Its value and its gradient stay in registers while all corners on it pass by:
// gradient += share * upstream, dot += <upstream, value>. With kPartial the (single) vector has `count` lanes.
template <typename S, int kBlocks, bool kPartial, typename C>
MSDA_INLINE void backward_channels(const S* value, S* grad_value, const C* upstream, const Corner<C>* corner,
                                   const Corner<C>* end, C* dots, int64_t count) {
  typedef typename Storage<C>::Vector Vector;
  Vector values[kBlocks];
  Vector gradients[kBlocks] = {};
  for (int block = 0; block < kBlocks; ++block) {
    values[block] = kPartial ? load_partial(value, count) : Storage<S>::load(value + block * kLanes<S>);
  }
  for (; corner < end; corner += kQuad) {
    Vector products[kQuad] = {};
    for (int index = 0; index < kQuad; ++index) {
      for (int block = 0; block < kBlocks; ++block) {
        const Vector row = Storage<C>::load(upstream + corner[index].row + block * kLanes<S>);
        products[index] += row * values[block];
        gradients[block] += corner[index].share * row;
      }
    }
    C sums[kQuad];
    sums_of_lanes(products, sums);
    for (int index = 0; index < kQuad; ++index) {
      dots[corner[index].index] += sums[index];
    }
  }
  for (int block = 0; block < kBlocks; ++block) {
    if (kPartial) {
      store_partial(grad_value, gradients[block], count);
    } else {
      Storage<S>::store(grad_value + block * kLanes<S>, gradients[block]);
    }
  }
}

template <typename S, typename C>
MSDA_INLINE void backward_pixel(const Sizes& sizes, const S* value, S* grad_value, const Scratch<C>& scratch,
                                const Corner<C>* corners, const Corner<C>* end) {
  constexpr int kBlocks = 4;
  const int64_t lanes = kLanes<S>;
  int64_t channel = 0;
  for (; channel + kBlocks * lanes <= sizes.channels; channel += kBlocks * lanes) {
    backward_channels<S, kBlocks, false>(value + channel, grad_value + channel, scratch.upstream + channel, corners, end,
                                         scratch.dots, lanes);
  }
  for (; channel + lanes <= sizes.channels; channel += lanes) {
    backward_channels<S, 1, false>(value + channel, grad_value + channel, scratch.upstream + channel, corners, end,
                                   scratch.dots, lanes);
  }
  if (channel < sizes.channels) {
    backward_channels<S, 1, true>(value + channel, grad_value + channel, scratch.upstream + channel, corners, end,
                                  scratch.dots, sizes.channels - channel);
  }
}

// Every pixel of the level, in order: its value is read once and its gradient written once.
template <typename S, typename C>
MSDA_INLINE void backward_pixels(const Sizes& sizes, const Level& level, const S* value, S* grad_value,
                                 const Scratch<C>& scratch) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int32_t area = level.height * level.width;
  const Corner<C>* corners = scratch.sorted;
  for (int32_t position = 0; position < area; ++position) {
    const Corner<C>* end = scratch.sorted + whole_quads(scratch.ends[position]);
    prefetch_ahead<false>(value, position, area, stride, sizes.channels);
    prefetch_ahead<true>(grad_value, position, area, stride, sizes.channels);
    backward_pixel(sizes, value + position * stride, grad_value + position * stride, scratch, corners, end);
    corners = end;
  }
}

// The samples' own gradients, from the dots of their corners.
template <typename C>
MSDA_INLINE void differentiate_samples(const Level level, int64_t samples, const Scratch<C> scratch) {
#pragma omp simd
  for (int64_t sample = 0; sample < samples; ++sample) {
    const Footprint<C> footprint = {0, 0, scratch.past_top[sample], scratch.past_left[sample]};
    const SampleGradient<C> gradient =
        sample_gradient(footprint, level, scratch.weights[sample], scratch.dots + sample, samples);
    scratch.grad_x[sample] = gradient.x;
    scratch.grad_y[sample] = gradient.y;
    scratch.grad_weights[sample] = gradient.attention_weight;
  }
}

// The way back of gather_samples.
template <typename S, typename C>
MSDA_INLINE void scatter_gradients(const Sizes& sizes, S* grad_locations, S* grad_weights, int64_t stride,
                                   const Scratch<C>& scratch) {
  int64_t sample = 0;
  for (int64_t query = 0; query < sizes.queries; ++query) {
    prefetch_ahead<true>(grad_locations, query, sizes.queries, 2 * stride, 2 * sizes.points);
    prefetch_ahead<true>(grad_weights, query, sizes.queries, stride, sizes.points);
    for (int64_t index = query * stride; index < query * stride + sizes.points; ++index, ++sample) {
      Storage<S>::store_scalar(grad_locations + 2 * index, scratch.grad_x[sample]);
      Storage<S>::store_scalar(grad_locations + 2 * index + 1, scratch.grad_y[sample]);
      Storage<S>::store_scalar(grad_weights + index, scratch.grad_weights[sample]);
    }
  }
}

// A task is one level of one head of one image. It sorts the corners of its samples by pixel and then visits the pixels,
// so that each gradient is summed up in registers instead of in memory, and no two tasks write the same entry.
template <typename S>
void backward(const Sizes& sizes, const BackwardArguments& arguments, void* memory, int64_t begin, int64_t end) {
  Scratch<typename Storage<S>::Compute> scratch;
  divide_scratch<S>(sizes, memory, &scratch);
  const int32_t padded = static_cast<int32_t>(padded_channels<S>(sizes));
  const int64_t samples = sizes.queries * sizes.points;
  const int64_t samples_per_query = sizes.heads * sizes.levels * sizes.points;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / (sizes.heads * sizes.levels);
    const int64_t head = task / sizes.levels % sizes.heads;
    const int level_index = static_cast<int>(task % sizes.levels);
    const Level& level = sizes.level[level_index];
    const int64_t channel = ((batch * sizes.positions + level.start) * sizes.heads + head) * sizes.channels;
    const int64_t first_sample =
        batch * sizes.queries * samples_per_query + (head * sizes.levels + level_index) * sizes.points;

    if (task == begin || level_index == 0) {
      const int64_t row = batch * sizes.queries * sizes.heads + head;
      copy_upstream(sizes, static_cast<const S*>(arguments.grad_output) + row * sizes.channels, scratch.upstream);
    }
    gather_samples(sizes, static_cast<const S*>(arguments.sampling_locations) + 2 * first_sample,
                   static_cast<const S*>(arguments.attention_weights) + first_sample, samples_per_query, scratch);
    locate_samples(level, samples, scratch);
    sort_corners(sizes, padded, level.height * level.width, scratch);
    memset(scratch.dots, 0, static_cast<size_t>(4 * samples + 1) * sizeof(*scratch.dots));
    backward_pixels(sizes, level, static_cast<const S*>(arguments.value) + channel,
                    static_cast<S*>(arguments.grad_value) + channel, scratch);
    differentiate_samples(level, samples, scratch);
    scatter_gradients(sizes, static_cast<S*>(arguments.grad_sampling_locations) + 2 * first_sample,
                      static_cast<S*>(arguments.grad_attention_weights) + first_sample, samples_per_query, scratch);
  }
}

}  // namespace

const Kernels MSDA_KERNELS = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {scratch_bytes<float>, scratch_bytes<double>, scratch_bytes<Half>, scratch_bytes<BFloat16>},
};

}  // namespace msda
