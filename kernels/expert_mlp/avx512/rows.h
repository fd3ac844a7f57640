// The sorted rows of each expert, and their tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "panels.h"

struct Expert {
  int64_t first, count;   // sorted rows
  int64_t padded, width;  // the same with padding
  int tile, tiles;        // its tiles are [tile, tile + tiles)
};

struct Groups {
  std::vector<Expert> experts;
  std::vector<Tile> tiles;
  std::vector<int> of_tile;  // the expert of each tile
  int64_t padded = 0;

  Groups(const int32_t* sizes, int count) {
    int64_t first = 0;
    for (int e = 0; e < count; first += sizes[e++]) {
      Expert expert{first, sizes[e], padded, round_up(sizes[e], LANES), int(tiles.size()), 0};
      for (int64_t done = 0; done < expert.count; done += TILE) {
        const int rows = int(std::min<int64_t>(TILE, expert.count - done));
        tiles.push_back({first + done, rows, int(round_up(rows, LANES)), padded + done});
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
