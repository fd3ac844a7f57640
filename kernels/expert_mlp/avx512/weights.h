// Weights as words of a product's left operand: dense bfloat16, or NF4 in the bytes of bitsandbytes.
#pragma once

#include "product.h"

struct Matrix {
  const void* data;     // bfloat16 [rows, columns]; or codes, two neighbouring columns in a byte, the even one higher
  const float* scales;  // of each block of `block` codes; null for bfloat16
  int64_t rows, columns, block;
};

// The matrices of all experts.
struct Weights {
  const void* data;
  const float* scales;
  int64_t rows, columns, block;

  Matrix of(int64_t expert) const {
    const int64_t size = rows * columns;
    if (scales == nullptr) return {static_cast<const uint16_t*>(data) + expert * size, nullptr, rows, columns, block};
    return {static_cast<const uint8_t*>(data) + expert * size / 2, scales + expert * size / block, rows, columns,
            block};
  }
};

alignas(64) inline constexpr float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// 16 bfloat16 values in the lower halves of words, of even and of odd columns.
struct Halves {
  __m512i even, odd;
};

// 32 codes of a row from `column` on, a multiple of 32. The scale is applied to the 16 values that a code can have.
inline Halves decode(const Matrix& m, int64_t row, int64_t column) {
  const int64_t first = row * m.columns + column;
  const __m128i bytes = _mm_loadu_si128((const __m128i*)(static_cast<const uint8_t*>(m.data) + first / 2));
  const __m512i codes = _mm512_cvtepu8_epi32(bytes);
  const __m512i values = low_halves(_mm512_mul_ps(_mm512_load_ps(NF4), _mm512_set1_ps(m.scales[first / m.block])));
  // a permutation uses the lower four bits of its index
  return {_mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), values), _mm512_permutexvar_epi32(codes, values)};
}

inline __m512i join(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

// Words of one stored row, of two neighbouring columns each: [columns / 2].
inline void along_row(const Matrix& m, int64_t row, Word* out) {
  if (m.scales == nullptr) {
    const uint16_t* values = static_cast<const uint16_t*>(m.data) + row * m.columns;
    for (int64_t c = 0; c < m.columns; c += 32) store_words(out + c / 2, load_words(values + c));
    return;
  }
  for (int64_t c = 0; c < m.columns; c += 32) {
    const Halves values = decode(m, row, c);
    store_words(out + c / 2, join(values.even, values.odd));
  }
}

// Words of two neighbouring stored rows, of 32 columns from `column` on, in four groups that are `stride` words apart.
inline void across_rows(const Matrix& m, int64_t row, int64_t column, Word* out, int64_t stride) {
  alignas(64) Word words[32];
  if (m.scales == nullptr) {
    const uint16_t* values = static_cast<const uint16_t*>(m.data) + row * m.columns + column;
    interleave(values, values + m.columns, words);
  } else {
    const Halves a = decode(m, row, column), b = decode(m, row + 1, column);
    const __m512i even = join(a.even, b.even), odd = join(a.odd, b.odd);
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store_words(words, _mm512_permutex2var_epi32(even, low, odd));
    store_words(words + LANES, _mm512_permutex2var_epi32(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
  }
  for (int i = 0; i < 4; i++)
    _mm256_storeu_si256((__m256i*)(out + i * stride), _mm256_load_si256((const __m256i*)(words + i * OUTPUTS)));
}

// Outputs [first, first + count) of the matrix whose contraction runs over its columns (`over_columns`) or its rows.
// `words` has space for count * contraction / 2 words; `count` and `first` are multiples of 32.
inline Left unpack(const Matrix& m, bool over_columns, int64_t first, int64_t count, Word* words) {
  if (over_columns) {
    for (int64_t n = 0; n < count; n++) along_row(m, first + n, words + n * m.columns / 2);
    return {words, m.columns / 2, 1};
  }
  const int64_t pairs = m.rows / 2;
  for (int64_t j = 0; j < pairs; j++)
    for (int64_t n = 0; n < count; n += 32)
      across_rows(m, 2 * j, first + n, words + n * pairs + j * OUTPUTS, OUTPUTS * pairs);
  return {words, pairs, OUTPUTS};
}
