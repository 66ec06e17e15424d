// Geometry of bilinear sampling, shared by the CPU and the CUDA kernels: what is tested on the CPU is what runs on the GPU.
//
// Conventions of Deformable DETR (Zhu et al. 2021, section 4.1) and of torch.nn.functional.grid_sample with
// padding_mode="zeros", align_corners=False: a location in [0, 1] maps to the pixel coordinate location * size - 0.5,
// pixel centers have integer coordinates, and pixels outside the level are zero.
//
// Everything here has internal linkage: the header is compiled once per instruction set, and the linker must never
// merge the copies.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MSDA_INLINE static __host__ __device__ __forceinline__
#else
#define MSDA_INLINE static inline __attribute__((always_inline))
#endif

namespace msda {

constexpr int kMaxLevels = 32;

struct Level {
  int64_t start;  // index of the level's first position in `value`
  int32_t height;
  int32_t width;
};

// Sizes of one call. Passed by value to the CUDA kernels, so that no level size is ever read from device memory.
struct Sizes {
  int64_t batch;
  int64_t positions;  // sum of height * width over the levels
  int64_t heads;
  int64_t channels;  // per head
  int64_t queries;
  int32_t levels;
  int32_t points;
  Level level[kMaxLevels];
};

// Where one sample falls: the pixel at or before it, and how far past that pixel it lies. `top` and `left` are in
// [-1, size - 1], so the four corners are (top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1).
template <typename T>
struct Footprint {
  int32_t top;
  int32_t left;
  T past_top;   // in [0, 1)
  T past_left;  // in [0, 1)
};

template <typename T>
MSDA_INLINE int32_t floor_to_int(T coordinate) {
  const int32_t truncated = static_cast<int32_t>(coordinate);
  return truncated - (coordinate < static_cast<T>(truncated));
}

// `coordinate` moved into [-1, size], where it fits an integer; NaN becomes -1.
template <typename T>
MSDA_INLINE T clamp(T coordinate, int32_t size) {
  const T at_least = coordinate > T(-1) ? coordinate : T(-1);
  const T at_most = static_cast<T>(size);
  return at_least < at_most ? at_least : at_most;
}

// False when the sample touches no pixel of the level, as with NaN and infinite locations. Without branches, which
// samples near a border would take at random.
template <typename T>
MSDA_INLINE bool locate(T x, T y, const Level& level, Footprint<T>* footprint) {
  const T row = y * static_cast<T>(level.height) - static_cast<T>(0.5);
  const T column = x * static_cast<T>(level.width) - static_cast<T>(0.5);
  const bool touches = (row > T(-1)) & (column > T(-1)) & (row < static_cast<T>(level.height)) &
                       (column < static_cast<T>(level.width));
  const T safe_row = clamp(row, level.height);
  const T safe_column = clamp(column, level.width);
  footprint->top = floor_to_int(safe_row);
  footprint->left = floor_to_int(safe_column);
  footprint->past_top = safe_row - static_cast<T>(footprint->top);
  footprint->past_left = safe_column - static_cast<T>(footprint->left);
  return touches;
}

template <typename T>
MSDA_INLINE bool is_interior(const Footprint<T>& footprint, const Level& level) {
  return (footprint.top >= 0) & (footprint.left >= 0) & (footprint.top + 1 < level.height) &
         (footprint.left + 1 < level.width);
}

template <typename T>
MSDA_INLINE bool has_corner(const Footprint<T>& footprint, const Level& level, int corner) {
  const int32_t row = footprint.top + (corner >> 1);
  const int32_t column = footprint.left + (corner & 1);
  return (row >= 0) & (row < level.height) & (column >= 0) & (column < level.width);
}

// Position of a corner inside its level; meaningful only where `has_corner`.
template <typename T>
MSDA_INLINE int64_t corner_position(const Footprint<T>& footprint, const Level& level, int corner) {
  return static_cast<int64_t>(footprint.top + (corner >> 1)) * level.width + (footprint.left + (corner & 1));
}

template <typename T>
MSDA_INLINE T corner_weight(const Footprint<T>& footprint, int corner) {
  const T vertical = (corner >> 1) ? footprint.past_top : T(1) - footprint.past_top;
  const T horizontal = (corner & 1) ? footprint.past_left : T(1) - footprint.past_left;
  return vertical * horizontal;
}

template <typename T>
struct SampleGradient {
  T attention_weight;
  T x;
  T y;
};

// Gradients of one sample from its corners' <output gradient, value at the corner>, zero where there is no corner, which
// lie `stride` apart in `dots`.
template <typename T>
MSDA_INLINE SampleGradient<T> sample_gradient(const Footprint<T>& footprint, const Level& level, T attention_weight,
                                              const T* dots, int64_t stride) {
  const T dot0 = dots[0], dot1 = dots[stride], dot2 = dots[2 * stride], dot3 = dots[3 * stride];
  SampleGradient<T> gradient;
  gradient.attention_weight = corner_weight(footprint, 0) * dot0 + corner_weight(footprint, 1) * dot1 +
                              corner_weight(footprint, 2) * dot2 + corner_weight(footprint, 3) * dot3;
  const T along_x = (T(1) - footprint.past_top) * (dot1 - dot0) + footprint.past_top * (dot3 - dot2);
  const T along_y = (T(1) - footprint.past_left) * (dot2 - dot0) + footprint.past_left * (dot3 - dot1);
  gradient.x = attention_weight * static_cast<T>(level.width) * along_x;
  gradient.y = attention_weight * static_cast<T>(level.height) * along_y;
  return gradient;
}

}  // namespace msda
