// Weights as words of a product's left operand: dense bfloat16, or NF4 in the bytes of bitsandbytes.
#pragma once

#include <algorithm>

#include "foreign.h"
#include "panels.h"
#include "product.h"

// float32 scales of blocks of codes; or, under double quantisation, bytes that stand for values of `table`, in groups
// of 256 with a scale each.
struct Scales {
  const void* of_block;
  const float *of_group, *table;
  float offset;

  float operator()(int64_t block) const {
    if (of_group == nullptr) return static_cast<const float*>(of_block)[block];
    return table[static_cast<const uint8_t*>(of_block)[block]] * of_group[block / 256] + offset;
  }
};

struct Matrix {
  const void* data;  // bfloat16 [rows, columns]; or codes, two neighbouring columns in a byte, the even one higher
  int64_t rows, columns;
  int64_t block;  // of codes that share a scale; 0 for bfloat16
  Scales scales;
};

// Matrices of one shape, one after the other, with their scales.
struct Weights {
  const void *data, *of_block;
  const float *of_group, *table, *offsets;
  int64_t rows, columns, block;

  Matrix of(int64_t i) const {
    const int64_t size = rows * columns;
    if (block == 0) return {static_cast<const uint16_t*>(data) + i * size, rows, columns, 0, {}};
    const int64_t blocks = size / block, groups = (blocks + 255) / 256;
    const void* codes = static_cast<const uint8_t*>(data) + i * size / 2;
    if (of_group == nullptr)
      return {codes, rows, columns, block, {static_cast<const float*>(of_block) + i * blocks, nullptr, nullptr, 0.0f}};
    return {codes,
            rows,
            columns,
            block,
            {static_cast<const uint8_t*>(of_block) + i * blocks, of_group + i * groups, table, offsets[i]}};
  }
};

// The OPERANDS operands from the i-th on, as native_weights.py lists them.
constexpr int OPERANDS = 5;

inline Weights weights(const Operands& given, int i, int64_t rows, int64_t columns, int64_t block) {
  const bool grouped = given.arg(i + 2).element_count() > 0;
  return {given.data<const void>(i),
          given.data<const void>(i + 1),
          grouped ? given.data<const float>(i + 2) : nullptr,
          given.data<const float>(i + 4),
          given.data<const float>(i + 3),
          rows,
          columns,
          block};
}

// The layer that the operand `index` names in the stack that begins at the operand `stack`. As in XLA's slices, a
// negative one counts from the end, and one that is out of range becomes the nearest.
inline int64_t layer_in(const Operands& given, int index, int stack) {
  const int64_t layers = given.shape(stack)[0], layer = *given.data<const int32_t>(index);
  return std::clamp<int64_t>(layer < 0 ? layer + layers : layer, 0, std::max<int64_t>(0, layers - 1));
}

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
  const __m512i values = low_halves(_mm512_mul_ps(_mm512_load_ps(NF4), _mm512_set1_ps(m.scales(first / m.block))));
  // a permutation uses the lower four bits of its index
  return {_mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4), values), _mm512_permutexvar_epi32(codes, values)};
}

inline __m512i join(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

// Words of 32 neighbouring values of a stored row, from `column` on.
inline __m512i words_along_row(const Matrix& m, int64_t row, int64_t column) {
  if (m.block == 0) return load_words(static_cast<const uint16_t*>(m.data) + row * m.columns + column);
  const Halves values = decode(m, row, column);
  return join(values.even, values.odd);
}

// Asks for the line that has the values of a row from `column` on. The row may lie beyond the matrix.
inline void prefetch(const Matrix& m, int64_t row, int64_t column) {
  const int64_t value = row * m.columns + column;
  _mm_prefetch(static_cast<const uint8_t*>(m.data) + (m.block == 0 ? 2 * value : value / 2), _MM_HINT_T0);
}

// The processor does not foresee reads at the distance of a row.
constexpr int ROWS_AHEAD = 16;

// Words of two neighbouring stored rows, of 32 columns from `column` on.
inline void words_across_rows(const Matrix& m, int64_t row, int64_t column, Word* words) {
  if (m.block == 0) {
    const uint16_t* values = static_cast<const uint16_t*>(m.data) + row * m.columns + column;
    for (int i : {0, 1}) prefetch(m, row + ROWS_AHEAD + i, column);
    return interleave(values, values + m.columns, words);
  }
  const Halves a = decode(m, row, column), b = decode(m, row + 1, column);
  const __m512i even = join(a.even, b.even), odd = join(a.odd, b.odd);
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store_words(words, _mm512_permutex2var_epi32(even, low, odd));
  store_words(words + LANES, _mm512_permutex2var_epi32(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

// Outputs [first, first + count) of the matrix whose contraction runs over its columns (`over_columns`) or its rows.
// `words` has space for count * contraction / 2 words; `count` and `first` are multiples of 32.
inline Left unpack(const Matrix& m, bool over_columns, int64_t first, int64_t count, Word* words) {
  if (over_columns) {
    for (int64_t n = 0; n < count; n++)
      for (int64_t c = 0; c < m.columns; c += 32)
        store_words(words + (n * m.columns + c) / 2, words_along_row(m, first + n, c));
    return {words, m.columns / 2, 1};
  }
  const int64_t pairs = m.rows / 2;
  for (int64_t j = 0; j < pairs; j++)
    for (int64_t n = 0; n < count; n += 32) {
      alignas(64) Word both[32];
      words_across_rows(m, 2 * j, first + n, both);
      for (int i = 0; i < 32; i += OUTPUTS)
        _mm256_storeu_si256((__m256i*)(words + (n + i) * pairs + j * OUTPUTS),
                            _mm256_load_si256((const __m256i*)(both + i)));
    }
  return {words, pairs, OUTPUTS};
}

// The same outputs as panels of 48 outputs, one after the other: the words j of all outputs of a panel lie side by
// side.
inline void unpack_panels(const Matrix& m, bool over_columns, int64_t first, int64_t count, Word* words) {
  const int64_t pairs = (over_columns ? m.columns : m.rows) / 2;
  // where the 16 outputs from the n-th on begin in their panel, and the panel's width
  const auto place = [&](int64_t n) { return words + n / TILE * TILE * pairs + n % TILE; };
  const auto width = [&](int64_t n) { return std::min<int64_t>(TILE, count - n / TILE * TILE); };
  if (over_columns) {
    for (int64_t n = 0; n < count; n += LANES)
      for (int64_t j = 0; j < pairs; j += LANES) {
        __m512i block[LANES];
        for (int r = 0; r < LANES; r++) block[r] = words_along_row(m, first + n + r, 2 * j);
        transpose(block);
        for (int r = 0; r < LANES; r++) store_words(place(n) + (j + r) * width(n), block[r]);
      }
    return;
  }
  for (int64_t j = 0; j < pairs; j++)
    for (int64_t n = 0; n < count; n += 32) {
      alignas(64) Word both[32];
      words_across_rows(m, 2 * j, first + n, both);
      for (int64_t k = n; k < n + 32; k += LANES) store_words(place(k) + j * width(k), load_words(both + k - n));
    }
}
