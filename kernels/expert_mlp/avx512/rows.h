// The rows of each expert, in panels: for a tile of up to 48 rows, the words of all rows of one index of the
// contraction lie side by side. A product reads them as vectors, and its result is in the form of the next panel.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

constexpr int MAX_VECTORS = 3;
constexpr int TILE = MAX_VECTORS * LANES;

struct Tile {
  int64_t first;   // sorted row
  int count;       // rows, at most `width`
  int width;       // padded to vectors
  int64_t padded;  // rows before it, each expert's padded to vectors
};

struct Expert {
  int64_t first, count;    // sorted rows
  int64_t padded, width;   // the same with padding
  int tile, tiles;         // its tiles are [tile, tile + tiles)
};

struct Groups {
  std::vector<Expert> experts;
  std::vector<Tile> tiles;
  std::vector<int> of_tile;  // the expert of each tile
  int64_t padded = 0;

  Groups(const int32_t* sizes, int count) {
    int64_t first = 0;
    for (int e = 0; e < count; first += sizes[e++]) {
      Expert expert{first, sizes[e], padded, (sizes[e] + LANES - 1) / LANES * LANES, int(tiles.size()), 0};
      for (int64_t done = 0; done < expert.count; done += TILE) {
        const int rows = int(std::min<int64_t>(TILE, expert.count - done));
        tiles.push_back({first + done, rows, (rows + LANES - 1) / LANES * LANES, padded + done});
        of_tile.push_back(e);
        expert.tiles++;
      }
      padded += expert.width;
      experts.push_back(expert);
    }
  }
};

// Rows of a matrix that are gathered by token: row i of a tile is the token of sorted row first + i.
struct Gathered {
  const uint16_t* rows;
  const int32_t* order;
  int top_k;
  int64_t width;

  const uint16_t* row(int64_t sorted) const { return rows + order[sorted] / top_k * width; }
};

// Panels of `depth` words a row: the word j of row i of a tile is at j * tile.width + i.
struct Panels {
  Word* words;
  int64_t depth;

  Word* of(const Tile& tile) const { return words + tile.padded * depth; }
};

// Copies the rows of a tile into the first words of its panel, zeros where it has no row.
inline void gather(const Gathered& x, const Tile& tile, Word* panel) {
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

// Words of two rows that follow each other, for products over rows: `words` [pairs, 32] of 32 columns of an expert.
inline void pair_rows(const Gathered& x, const Expert& expert, int64_t column, Word* words) {
  alignas(64) static const uint16_t zeros[32] = {};
  for (int64_t i = 0; i < expert.width; i += 2, words += 32) {
    const uint16_t* row[2];
    for (int r = 0; r < 2; r++) row[r] = i + r < expert.count ? x.row(expert.first + i + r) + column : zeros;
    interleave(row[0], row[1], words);
  }
}
