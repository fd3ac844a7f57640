// Operands and masks of attention. A task has up to 48 queries, or keys, in the lanes of vectors, and visits blocks of
// the other ones.
#pragma once

#include <algorithm>
#include <cmath>

#include "panels.h"
#include "product.h"
#include "threads.h"

constexpr int BLOCK = 64;

struct Shape {
  int64_t batch, length, slots, heads, groups, width, ancestors;
  int64_t window;  // 0 without one
  int64_t offset;  // slot of the first query

  int64_t shared() const { return heads / groups; }
  float scale() const { return 1.0f / std::sqrt(float(width)); }
};

// bfloat16 [batch, rows, heads, width], or [batch, heads, rows, width] if `head_major`.
struct Heads {
  const uint16_t* values;
  int64_t rows, heads, width;
  bool head_major = false;

  // The rows of one head of one example.
  Strided of(int64_t b, int64_t head) const {
    if (head_major) return {values + (b * heads + head) * rows * width, width, width};
    return {values + (b * rows * heads + head) * width, heads * width, width};
  }
};

// A head's rows as left operands of products, whole blocks of rows, filled up with zeros.
struct Sides {
  int64_t rows, padded, width;
  Scratch<Word> plain, paired;  // [heads, padded, width / 2], [heads, padded / 2, width]

  Sides(int64_t heads, int64_t rows, int64_t width)
      : rows(rows),
        padded(round_up(rows, BLOCK)),
        width(width),
        plain(heads * padded * width / 2),
        paired(heads * padded * width / 2) {}
  // Outputs are rows from `row` on, the contraction is the width.
  Left over_width(int64_t head, int64_t row) const {
    return {plain.get() + (head * padded + row) * width / 2, width / 2, 1};
  }
  // Outputs are columns, the contraction runs over rows from `row` on.
  Left over_rows(int64_t head, int64_t row) const {
    return {paired.get() + (head * padded + row) * width / 2, 1, width};
  }
  void fill_plain(int64_t head, const Strided& from) {
    uint16_t* to = reinterpret_cast<uint16_t*>(plain.get() + head * padded * width / 2);
    for (int64_t i = 0; i < rows; i++) std::copy_n(from.row(i), width, to + i * width);
    std::fill(to + rows * width, to + padded * width, uint16_t(0));
  }
  void fill_paired(int64_t head, const Strided& from) {
    for (int64_t c = 0; c < width; c += 32)
      pair_rows(from, 0, rows, padded, c, paired.get() + head * padded * width / 2 + c, width);
  }
};

// Which keys each query sees: those of its segment or of an ancestor, not after it, and within the window.
struct Mask {
  const Shape& shape;
  const int32_t *query_ids, *key_ids, *ancestors;

  // The keys that the queries [first, first + count) may see, by causality and the window alone.
  std::pair<int64_t, int64_t> keys(int64_t first, int64_t count) const {
    const int64_t low = shape.window ? shape.offset + first - shape.window + 1 : 0;
    return {std::max<int64_t>(0, low), std::min(shape.slots, shape.offset + first + count)};
  }
  // The queries that may see the keys [first, first + count).
  std::pair<int64_t, int64_t> queries(int64_t first, int64_t count) const {
    const int64_t high = shape.window ? first + count - 1 + shape.window - shape.offset : shape.length;
    return {std::max<int64_t>(0, first - shape.offset), std::min(shape.length, high)};
  }
};

inline __mmask16 lanes_within(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

inline __m512i positions(int64_t first) {
  return _mm512_add_epi32(_mm512_set1_epi32(int(first)),
                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}

// Bits of up to BLOCK rows of a block for the lanes of a tile.
template <int V>
struct Seen {
  __mmask16 bits[BLOCK][V];
  uint32_t any = 0;

  void set(int64_t row, int v, __mmask16 found) {
    bits[row][v] = found;
    any |= found;
  }
};

// Queries in lanes, keys in rows.
template <int V>
void see_keys(const Mask& mask, int64_t b, const Tile& tile, int64_t first, int64_t keys, Seen<V>& seen) {
  const Shape& s = mask.shape;
  const int32_t *key_ids = mask.key_ids + b * s.slots, *query_ids = mask.query_ids + b * s.length;
  for (int v = 0; v < V; v++) {
    const __mmask16 inside = lanes_within(tile.count - v * LANES);
    const __m512i ids = _mm512_maskz_loadu_epi32(inside, query_ids + tile.first + v * LANES);
    const __m512i slot = positions(s.offset + tile.first + v * LANES);
    for (int64_t k = 0; k < keys; k++) {
      const __m512i id = _mm512_set1_epi32(key_ids[first + k]);
      __mmask16 same = _mm512_cmpeq_epi32_mask(ids, id);
      for (int64_t a = 0; a < s.ancestors; a++) {
        const int32_t* of_lanes = mask.ancestors + (b * s.length + tile.first + v * LANES) * s.ancestors + a;
        const __m512i steps = _mm512_mullo_epi32(positions(0), _mm512_set1_epi32(int(s.ancestors)));
        same |= _mm512_cmpeq_epi32_mask(_mm512_mask_i32gather_epi32(ids, inside, steps, of_lanes, 4), id);
      }
      __mmask16 near = _mm512_cmple_epi32_mask(_mm512_set1_epi32(int(first + k)), slot);
      if (s.window) near &= _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(int(first + k + s.window)), slot);
      seen.set(k, v, inside & same & near);
    }
  }
}

// Keys in lanes, queries in rows.
template <int V>
void see_queries(const Mask& mask, int64_t b, const Tile& tile, int64_t first, int64_t queries, Seen<V>& seen) {
  const Shape& s = mask.shape;
  const int32_t *key_ids = mask.key_ids + b * s.slots, *query_ids = mask.query_ids + b * s.length;
  for (int v = 0; v < V; v++) {
    const __mmask16 inside = lanes_within(tile.count - v * LANES);
    const __m512i ids = _mm512_maskz_loadu_epi32(inside, key_ids + tile.first + v * LANES);
    const __m512i slot = positions(tile.first + v * LANES);
    for (int64_t q = 0; q < queries; q++) {
      __mmask16 same = _mm512_cmpeq_epi32_mask(ids, _mm512_set1_epi32(query_ids[first + q]));
      for (int64_t a = 0; a < s.ancestors; a++) {
        const int32_t id = mask.ancestors[(b * s.length + first + q) * s.ancestors + a];
        same |= _mm512_cmpeq_epi32_mask(ids, _mm512_set1_epi32(id));
      }
      const int64_t at = s.offset + first + q;
      __mmask16 near = _mm512_cmple_epi32_mask(slot, _mm512_set1_epi32(int(at)));
      if (s.window) near &= _mm512_cmpgt_epi32_mask(slot, _mm512_set1_epi32(int(at - s.window)));
      seen.set(q, v, inside & same & near);
    }
  }
}

// Calls body(b, head, tile) for tiles of `rows` rows of every head, on all threads. Later tiles come first: they see
// more.
template <class Body>
void for_each_tile(ffi::ThreadPool& pool, int64_t batch, int64_t heads, int64_t rows, const Body& body) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  parallel_for(pool, batch * heads * tiles, [&](int64_t i) {
    const int64_t first = (tiles - 1 - i / (batch * heads)) * TILE;
    const int count = int(std::min<int64_t>(TILE, rows - first));
    const Tile tile{first, count, int(round_up(count, LANES)), 0};
    body(i / heads % batch, i % heads, tile);
  });
}
