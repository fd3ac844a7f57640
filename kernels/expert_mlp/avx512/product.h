// The inner loop of all products: 8 outputs times up to 48 rows, accumulated in float32 registers.
#pragma once

#include "weights.h"

constexpr int OUTPUTS = 8;

template <int V>
using Sums = __m512[OUTPUTS][V];

// sums[first + n] += left outputs n times the panel `right` of 16 V rows, over `pairs` words; N outputs.
template <int V, int FIRST = 0, int N = OUTPUTS>
inline void accumulate(Sums<V>& sums, const Left& left, const Word* right, int64_t pairs) {
  __m512 acc[N][V];  // a copy, so that the compiler keeps it in registers
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) acc[n][v] = sums[FIRST + n][v];
  const auto step = [&](const Word* const (&word)[N], int64_t j) {
    __m512bh rows[V];
    for (int v = 0; v < V; v++) rows[v] = (__m512bh)load_words(right + (j * V + v) * LANES);
    for (int n = 0; n < N; n++) {
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(int(*word[n]));
      for (int v = 0; v < V; v++) acc[n][v] = _mm512_dpbf16_ps(acc[n][v], weight, rows[v]);
    }
  };
  const Word* word[N];
  if (left.of_pair == 1) {
    for (int64_t j = 0; j < pairs; j++) {
      for (int n = 0; n < N; n++) word[n] = left.words + n * left.of_output + j;
      step(word, j);
    }
  } else {
    for (int64_t j = 0; j < pairs; j++) {
      for (int n = 0; n < N; n++) word[n] = left.words + j * left.of_pair + n;
      step(word, j);
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) sums[FIRST + n][v] = acc[n][v];
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
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    default: return body(std::integral_constant<int, 3>{});
  }
}

// Writes 8 outputs as 4 rows of words from the pair `pair` of a panel on.
template <int V>
inline void store_pairs(const Sums<V>& sums, Word* panel, int64_t pair) {
  for (int n = 0; n < OUTPUTS; n += 2)
    for (int v = 0; v < V; v++)
      store_words(panel + ((pair + n / 2) * V + v) * LANES, words_of(sums[n][v], sums[n + 1][v]));
}
