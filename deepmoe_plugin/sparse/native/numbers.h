// Number types, and activation functions on vectors.
#pragma once

#include <cstring>

#include "layout.h"

struct Float {
    static constexpr int64_t SIZE = 4, PAIR = 1;
    typedef uint32_t Channel;

    // Chosen ones of sixteen neighbouring channels, side by side; what is written behind them means nothing.
    static void squeeze(const char* source, unsigned bits, Channel* target) {
#ifdef __AVX512F__
        // In a register, then as a whole: compaction into memory is very slow on some processors (Zen 4).
        _mm512_storeu_si512(target, _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_loadu_si512(source)));
#else
        for (; bits; bits &= bits - 1) *target++ = ((const Channel*)source)[__builtin_ctz(bits)];
#endif
    }
    static Vector add_product(Vector sum, uint32_t x, Units weight) {
        float value;
        std::memcpy(&value, &x, 4);
        return sum + value * (Vector)weight;
    }
    static float read(const char* place) { return *(const float*)place; }
    static void write(char* place, float value) { *(float*)place = value; }
    static Vector read_vector(const char* place) { return *(const Vector*)place; }
    static void write_vector(char* place, Vector value) { *(Vector*)place = value; }
};

struct Bfloat16 {
    static constexpr int64_t SIZE = 2, PAIR = 2;
    typedef uint16_t Channel;

    static void squeeze(const char* source, unsigned bits, Channel* target) {
#if defined(__AVX512VBMI2__) && defined(__AVX512VL__)
        const __m256i all = _mm256_loadu_si256((const __m256i*)source);
        _mm256_storeu_si256((__m256i*)target, _mm256_maskz_compress_epi16((__mmask16)bits, all));
#else
        for (; bits; bits &= bits - 1) *target++ = ((const Channel*)source)[__builtin_ctz(bits)];
#endif
    }
    static Vector add_product(Vector sum, uint32_t x, Units weight) {
#ifdef __AVX512BF16__
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)weight);
#else
        const Units both = Units{} + x;
        sum += (Vector)(both << 16) * (Vector)(weight << 16);
        return sum + (Vector)(both & 0xffff0000u) * (Vector)(weight & 0xffff0000u);
#endif
    }
    static float read(const char* place) {
        const uint32_t bits = (uint32_t)*(const uint16_t*)place << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static void write(char* place, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = value != value ? 0x7fc00000u : bits + 0x7fff + (bits >> 16 & 1);
        *(uint16_t*)place = (uint16_t)(bits >> 16);
    }
    static Vector read_vector(const char* place) {
        return (Vector)(__builtin_convertvector(*(const Halves*)place, Units) << 16);
    }
    static void write_vector(char* place, Vector value) {  // to the nearest, even if there are two
        const Units bits = (Units)value, is_number = (Units)(value == value);
        const Units rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        *(Halves*)place = __builtin_convertvector(((rounded & is_number) | (0x7fc00000u & ~is_number)) >> 16, Halves);
    }
};

// Some lanes of a vector; the others are zero.
template <class Number>
static Vector read_some(const char* place, int64_t lanes) {
    if (lanes == LANES) return Number::read_vector(place);
#ifdef __AVX512F__
    if constexpr (Number::SIZE == 4) return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), place);
#endif
    Vector value = {};
    for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = Number::read(place + lane * Number::SIZE);
    return value;
}

template <class Number>
static void write_some(char* place, Vector value, int64_t lanes) {
    if (lanes == LANES) return Number::write_vector(place, value);
#ifdef __AVX512F__
    if constexpr (Number::SIZE == 4) return _mm512_mask_storeu_ps(place, (__mmask16)((1u << lanes) - 1), (__m512)value);
#endif
    for (int64_t lane = 0; lane < lanes; ++lane) Number::write(place + lane * Number::SIZE, value[lane]);
}

// The sum of all lanes: halves are added until one is left, which takes few steps that wait for each other.
static float total(Vector x) {
    x += __builtin_shuffle(x, Units{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    x += __builtin_shuffle(x, Units{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    x += __builtin_shuffle(x, Units{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    x += __builtin_shuffle(x, Units{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return x[0];
}

// erf(x) = x P(x^2) / Q(x^2) up to 4, where it is 1 to float rounding. The coefficients are a fit of least relative error,
// 6e-8, by repeated least squares.
static Vector erf_of(Vector x) {
    const Vector limit = Vector{} + 4.0f;
    x = x > limit ? limit : x < -limit ? -limit : x;
    const Vector t = x * x;
    Vector p = t * 1.911083736e-08f - 1.942233666e-06f;
    p = p * t + 1.472715958e-04f;
    p = p * t + 3.990012221e-03f;
    p = p * t + 5.152317882e-02f;
    p = p * t + 2.071125656e-01f;
    p = p * t + 1.128379107f;
    Vector q = t * 1.020971686e-03f + 1.495696232e-02f;
    q = q * t + 1.179654747e-01f;
    q = q * t + 5.168799758e-01f;
    q = q * t + 1.0f;
    return x * p / q;
}

static Vector activated(Vector x, int64_t activation) {
    if (activation == RELU) return x < 0.0f ? Vector{} : x;
    if (activation == GELU) return x * 0.5f * (erf_of(x * 0.70710678f) + 1.0f);
    return x;
}
