// The operands of one layer of experts, with its adapters.
#pragma once

#include "rows.h"
#include "threads.h"
#include "weights.h"

// Factors of all experts, bfloat16: a [in, rank] and b [rank, out]. Ranks are multiples of 16, or 0.
struct Factors {
  const uint16_t *a, *b;
  int64_t in, out, rank;

  const Word* a_of(int64_t e) const { return reinterpret_cast<const Word*>(a + e * in * rank); }
  const Word* b_of(int64_t e) const { return reinterpret_cast<const Word*>(b + e * rank * out); }
};

struct Layer {
  Weights gate, up, down;
  int64_t expert;  // the layer's first expert
  bool packed;     // stored as (out, in); else (in, out)
  Factors of_gate, of_up, of_down;
  int64_t width, hidden;

  int64_t rank() const { return of_gate.rank + of_up.rank + of_down.rank; }
};

// How many outputs a task takes: their weights, `bytes` for each output, should stay in a core's second-level cache.
inline int64_t outputs_of_task(int64_t outputs, int64_t bytes) {
  return outputs % 64 == 0 && 64 * bytes <= 640 << 10 ? 64 : 32;
}

// Words of two neighbouring rows of bfloat16 [rows, columns].
inline void pair_up(const uint16_t* matrix, int64_t rows, int64_t columns, Word* out) {
  for (int64_t j = 0; j < rows; j += 2)
    for (int64_t c = 0; c < columns; c++) *out++ = matrix[j * columns + c] | Word(matrix[(j + 1) * columns + c]) << 16;
}

// Products of a panel with `count` outputs, stored as rows of words from the pair `pair` of `out` on.
inline void multiply(const Left& left, int64_t count, const Word* right, int64_t pairs, Word* out, int64_t pair,
                     int width) {
  with_vectors(width, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t n = 0; n < count; n += OUTPUTS) {
      Sums<V> sums;
      clear<V>(sums);
      accumulate<V>(sums, left.from(n), right, pairs);
      store_pairs<V>(sums, out, pair + n / 2);
    }
  });
}
