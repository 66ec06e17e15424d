// Fixed-size vectors over channels (GCC/Clang vector extensions) and the conversions to and from storage types.
// Included once per instruction set; MSDA_VECTOR_BYTES says how wide a vector is. Half precision is computed in fp32.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed between inlined functions
#endif

namespace msda {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

typedef float FloatVector __attribute__((vector_size(MSDA_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(MSDA_VECTOR_BYTES)));
typedef uint32_t BitVector __attribute__((vector_size(MSDA_VECTOR_BYTES)));
typedef int32_t MaskVector __attribute__((vector_size(MSDA_VECTOR_BYTES)));
typedef uint16_t HalfBitVector __attribute__((vector_size(MSDA_VECTOR_BYTES / 2)));

template <typename Compute>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef FloatVector type;
};
template <>
struct VectorOf<double> {
  typedef DoubleVector type;
};

template <typename To, typename From>
MSDA_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector>
MSDA_INLINE Vector load_bits(const void* source) {
  Vector vector;
  memcpy(&vector, source, sizeof(vector));
  return vector;
}

#if MSDA_VECTOR_BYTES == 64
MSDA_INLINE FloatVector half_to_float(HalfBitVector bits) {
  return bit_copy<FloatVector>(_mm512_maskz_cvtph_ps(0xffff, bit_copy<__m256i>(bits)));
}
MSDA_INLINE HalfBitVector float_to_half(FloatVector values) {
  return bit_copy<HalfBitVector>(_mm512_maskz_cvtps_ph(0xffff, bit_copy<__m512>(values), _MM_FROUND_TO_NEAREST_INT));
}
#elif MSDA_VECTOR_BYTES == 32
MSDA_INLINE FloatVector half_to_float(HalfBitVector bits) {
  return bit_copy<FloatVector>(_mm256_cvtph_ps(bit_copy<__m128i>(bits)));
}
MSDA_INLINE HalfBitVector float_to_half(FloatVector values) {
  return bit_copy<HalfBitVector>(_mm256_cvtps_ph(bit_copy<__m256>(values), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without a conversion instruction: re-bias the exponent by a multiplication, which normalizes subnormals as well.
MSDA_INLINE FloatVector half_to_float(HalfBitVector half_bits) {
  const BitVector bits = __builtin_convertvector(half_bits, BitVector);
  const BitVector magnitude = (bits & 0x7fffu) << 13;
  const FloatVector scaled = bit_copy<FloatVector>(magnitude) * 0x1p112f;
  const BitVector is_not_finite = (BitVector)((bits & 0x7c00u) == 0x7c00u);
  const BitVector not_finite = magnitude | 0x7f800000u;
  const BitVector result = (bit_copy<BitVector>(scaled) & ~is_not_finite) | (not_finite & is_not_finite);
  return bit_copy<FloatVector>(result | ((bits & 0x8000u) << 16));
}
MSDA_INLINE uint16_t round_to_half(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u);
  }
  if (magnitude >= 0x477ff000u) {  // rounds past the largest half
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {  // subnormal: let the float addition round to a multiple of 2^-24
    const float rounded = bit_copy<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_copy<uint32_t>(rounded) - bit_copy<uint32_t>(0.5f)));
  }
  const uint32_t round_up = 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + round_up) >> 13));
}
MSDA_INLINE HalfBitVector float_to_half(FloatVector values) {
  HalfBitVector bits = {};
  for (int lane = 0; lane < static_cast<int>(sizeof(values) / sizeof(float)); ++lane) {
    bits[lane] = round_to_half(values[lane]);
  }
  return bits;
}
#endif

MSDA_INLINE FloatVector bfloat16_to_float(HalfBitVector bits) {
  return bit_copy<FloatVector>(__builtin_convertvector(bits, BitVector) << 16);
}
MSDA_INLINE HalfBitVector float_to_bfloat16(FloatVector values) {
  const BitVector bits = bit_copy<BitVector>(values);
  const BitVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVector is_nan = (BitVector)(values != values);
  return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), HalfBitVector);
}

// Storage<S>: how elements of type S are read into and written from vectors of their compute type.
template <typename S>
struct Storage {
  typedef S Compute;
  typedef typename VectorOf<S>::type Vector;
  MSDA_INLINE Vector load(const S* source) { return load_bits<Vector>(source); }
  MSDA_INLINE void store(S* target, Vector vector) { memcpy(target, &vector, sizeof(vector)); }
  MSDA_INLINE Compute load_scalar(const S* source) { return *source; }
  MSDA_INLINE void store_scalar(S* target, Compute scalar) { *target = scalar; }
};
template <>
struct Storage<Half> {
  typedef float Compute;
  typedef FloatVector Vector;
  MSDA_INLINE Vector load(const Half* source) { return half_to_float(load_bits<HalfBitVector>(source)); }
  MSDA_INLINE void store(Half* target, Vector vector) {
    const HalfBitVector bits = float_to_half(vector);
    memcpy(target, &bits, sizeof(bits));
  }
  MSDA_INLINE float load_scalar(const Half* source) {
    const HalfBitVector bits = {source->bits};
    return half_to_float(bits)[0];
  }
  MSDA_INLINE void store_scalar(Half* target, float scalar) {
    const FloatVector vector = {scalar};
    target->bits = float_to_half(vector)[0];
  }
};
template <>
struct Storage<BFloat16> {
  typedef float Compute;
  typedef FloatVector Vector;
  MSDA_INLINE Vector load(const BFloat16* source) { return bfloat16_to_float(load_bits<HalfBitVector>(source)); }
  MSDA_INLINE void store(BFloat16* target, Vector vector) {
    const HalfBitVector bits = float_to_bfloat16(vector);
    memcpy(target, &bits, sizeof(bits));
  }
  MSDA_INLINE float load_scalar(const BFloat16* source) {
    const HalfBitVector bits = {source->bits};
    return bfloat16_to_float(bits)[0];
  }
  MSDA_INLINE void store_scalar(BFloat16* target, float scalar) {
    const FloatVector vector = {scalar};
    target->bits = float_to_bfloat16(vector)[0];
  }
};

template <typename S>
constexpr int64_t kLanes = sizeof(typename Storage<S>::Vector) / sizeof(typename Storage<S>::Compute);

// The last channels, when they do not fill a vector: lanes past `count` read as zero and are not written.
template <typename S>
MSDA_INLINE typename Storage<S>::Vector load_partial(const S* source, int64_t count) {
  S padded[kLanes<S>] = {};
  memcpy(padded, source, static_cast<size_t>(count) * sizeof(S));
  return Storage<S>::load(padded);
}
template <typename S>
MSDA_INLINE void store_partial(S* target, typename Storage<S>::Vector vector, int64_t count) {
  S padded[kLanes<S>];
  Storage<S>::store(padded, vector);
  memcpy(target, padded, static_cast<size_t>(count) * sizeof(S));
}

// Blocks of `kBlock` lanes of two vectors, every second one, added to those left out.
template <size_t kBlock, typename Vector, size_t... kLane>
MSDA_INLINE Vector sums_of_neighbors(Vector first, Vector second, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(first, second, (kLane / kBlock * 2 * kBlock + kLane % kBlock)...) +
         __builtin_shufflevector(first, second, (kLane / kBlock * 2 * kBlock + kLane % kBlock + kBlock)...);
}

// Lane sums of four vectors, side by side: shuffles that serve all four at once.
template <typename Vector, typename Compute>
MSDA_INLINE void sums_of_lanes(const Vector* vectors, Compute* sums) {
  constexpr size_t kCount = sizeof(Vector) / sizeof(Compute);
  constexpr std::make_index_sequence<kCount> lanes;
  const Vector first = sums_of_neighbors<kCount / 2>(vectors[0], vectors[1], lanes);
  const Vector second = sums_of_neighbors<kCount / 2>(vectors[2], vectors[3], lanes);
  if constexpr (kCount == 2) {
    memcpy(sums, &first, sizeof(first));
    memcpy(sums + 2, &second, sizeof(second));
  } else {
    Vector all = sums_of_neighbors<kCount / 4>(first, second, lanes);
    if constexpr (kCount == 16) {
      all = sums_of_neighbors<2>(all, all, lanes);
    }
    if constexpr (kCount >= 8) {
      all = sums_of_neighbors<1>(all, all, lanes);
    }
    memcpy(sums, &all, 4 * sizeof(Compute));
  }
}

}  // namespace
}  // namespace msda
