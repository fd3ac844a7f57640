// The inner loop of all products: 8 outputs times up to 48 rows, accumulated in float32 registers.
#pragma once

#include <type_traits>

#include "simd.h"

// A left operand, of which 8 outputs from a multiple of 8 on are used at a time. The word j of output n is at n *
// of_output
// + j if `of_pair` is 1. Otherwise the words of 8 outputs lie side by side, that of output 8 m + n at 8 m * of_output +
// j * of_pair + n.
struct Left {
  const Word* words;
  int64_t of_output, of_pair;

  Left from(int64_t output) const { return {words + output * of_output, of_output, of_pair}; }
};

constexpr int OUTPUTS = 8;

template <int V>
using Sums = __m512[OUTPUTS][V];

// Adds 8 outputs of `left` times the panel `right` of 16 V rows, over `pairs` words.
template <int V>
inline void accumulate(Sums<V>& sums, const Left& left, const Word* right, int64_t pairs) {
  if (pairs == 0) return;
  __m512 acc[OUTPUTS][V];  // a copy, so that the compiler keeps it in registers
  for (int n = 0; n < OUTPUTS; n++)
    for (int v = 0; v < V; v++) acc[n][v] = sums[n][v];
  const auto add = [&](const auto& word_of, int64_t j) {
    __m512bh rows[V];
    for (int v = 0; v < V; v++) rows[v] = (__m512bh)load_words(right + (j * V + v) * LANES);
    for (int n = 0; n < OUTPUTS; n++) {
      const __m512bh word = (__m512bh)_mm512_set1_epi32(int(word_of(n)));
      for (int v = 0; v < V; v++) acc[n][v] = _mm512_dpbf16_ps(acc[n][v], word, rows[v]);
    }
  };
  if (left.of_pair == 1)
    for (int64_t j = 0; j < pairs; j++) add([&](int n) { return left.words[n * left.of_output + j]; }, j);
  else
    for (int64_t j = 0; j < pairs; j++) add([&](int n) { return left.words[j * left.of_pair + n]; }, j);
  for (int n = 0; n < OUTPUTS; n++)
    for (int v = 0; v < V; v++) sums[n][v] = acc[n][v];
}

template <int V>
inline void clear(Sums<V>& sums) {
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
}

// Calls `body` with the number of vectors of a tile as a constant.
template <class Body>
inline void with_vectors(int width, const Body& body) {
  switch (width / LANES) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    default:
      return body(std::integral_constant<int, 3>{});
  }
}

// Writes 8 outputs column by column, 16 V floats each, from `column` on.
template <int V>
inline void store_columns(const Sums<V>& sums, float* columns, int64_t column) {
  for (int n = 0; n < OUTPUTS; n++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(columns + ((column + n) * V + v) * LANES, sums[n][v]);
}

// Writes 8 outputs as 4 rows of words from the pair `pair` of a panel on.
template <int V>
inline void store_pairs(const Sums<V>& sums, Word* panel, int64_t pair) {
  for (int n = 0; n < OUTPUTS; n += 2)
    for (int v = 0; v < V; v++)
      store_words(panel + ((pair + n / 2) * V + v) * LANES, words_of(sums[n][v], sums[n + 1][v]));
}
