// Rows of matrices in panels: for a tile of up to 48 rows, the words of all rows of one index of the contraction lie
// side by side. A product reads them as vectors, and its result is in the form of the next panel.
#pragma once

#include "simd.h"

constexpr int MAX_VECTORS = 3;
constexpr int TILE = MAX_VECTORS * LANES;

struct Tile {
  int64_t first;   // row
  int count;       // rows, at most `width`
  int width;       // padded to vectors
  int64_t padded;  // padded rows of all tiles before it
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows at equal distances.
struct Strided {
  const uint16_t* rows;
  int64_t stride, width;

  const uint16_t* row(int64_t i) const { return rows + i * stride; }
};

// Copies the rows of a tile into the first words of its panel, zeros where it has no row.
template <class Rows>
inline void gather(const Rows& x, const Tile& tile, Word* panel) {
  const int64_t depth = x.width / 2;
  for (int i = 0; i < tile.width; i += LANES)
    for (int64_t j = 0; j < depth; j += LANES) {
      __m512i block[LANES];
      for (int r = 0; r < LANES; r++)
        block[r] = i + r < tile.count ? load_words(x.row(tile.first + i + r) + 2 * j) : _mm512_setzero_si512();
      transpose(block);
      for (int r = 0; r < LANES; r++) store_words(panel + (j + r) * tile.width + i, block[r]);
    }
}

// Writes `columns` columns of a tile as rows of bfloat16. `values` has them column by column, `tile.width` floats each.
inline void scatter(const float* values, const Tile& tile, int columns, uint16_t* out, int64_t stride) {
  for (int i = 0; i < tile.width; i += LANES)
    for (int c = 0; c < columns; c += LANES) {
      __m512i block[LANES];
      for (int r = 0; r < LANES; r++) block[r] = load_words(values + (c + r) * tile.width + i);
      transpose(block);
      for (int r = 0; r < LANES && i + r < tile.count; r++)
        store_bf16(out + (i + r) * stride + c, _mm512_castsi512_ps(block[r]));
    }
}

// Words of two neighbouring rows, for products over rows, of 32 columns from `column` on: row i / 2 of `words` is of
// the rows first + i and first + i + 1, zeros beyond `count` rows. Its rows are `stride` words apart, `padded` / 2 of
// them.
template <class Rows>
inline void pair_rows(const Rows& x, int64_t first, int64_t count, int64_t padded, int64_t column, Word* words,
                      int64_t stride) {
  alignas(64) static const uint16_t zeros[32] = {};
  for (int64_t i = 0; i < padded; i += 2, words += stride) {
    const uint16_t* row[2];
    for (int r = 0; r < 2; r++) row[r] = i + r < count ? x.row(first + i + r) + column : zeros;
    interleave(row[0], row[1], words);
  }
}
