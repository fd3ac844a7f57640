// Forward: out = w2(silu(w1 x) * w3 x) of each sorted row, with the low-rank deltas of the three matrices.
#pragma once

#include "layer.h"

// The factors as left operands of forward products: words of neighbouring rows.
struct PairedFactors {
  int64_t in, out, rank;
  Scratch<Word> a, b;

  PairedFactors(const Factors& f, int64_t experts)
      : in(f.in), out(f.out), rank(f.rank), a(experts * in * rank / 2), b(experts * rank * out / 2) {}
  void fill(const Factors& f, int64_t e) {
    pair_up(f.a + e * in * rank, in, rank, a.get() + e * in * rank / 2);
    pair_up(f.b + e * rank * out, rank, out, b.get() + e * rank * out / 2);
  }
  Left a_of(int64_t e) const { return {a.get() + e * in * rank / 2, 1, rank}; }
  Left b_of(int64_t e) const { return {b.get() + e * rank * out / 2, 1, out}; }
};

struct Forward {
  const Layer& layer;
  const Groups& groups;
  const Gathered x;
  Panels lows;   // x a1, x a3, h a2
  Panels gates;  // w1 x and w3 x, for the backward pass; or without words
  uint16_t* out;

  Scratch<Word> x_words, hidden_words;
  Panels xs, hidden;
  PairedFactors gate, up, down;

  Forward(const Layer& layer, const Groups& groups, const Gathered& x, Panels lows, Panels gates, uint16_t* out)
      : layer(layer),
        groups(groups),
        x(x),
        lows(lows),
        gates(gates),
        out(out),
        x_words(groups.padded * layer.width / 2),
        hidden_words(groups.padded * layer.hidden / 2),
        xs{x_words.get(), layer.width / 2},
        hidden{hidden_words.get(), layer.hidden / 2},
        gate(layer.of_gate, groups.experts.size()),
        up(layer.of_up, groups.experts.size()),
        down(layer.of_down, groups.experts.size()) {}

  void run(ffi::ThreadPool& pool) {
    const int64_t experts = groups.experts.size(), tiles = groups.tiles.size();
    if (layer.rank() > 0)
      parallel_for(pool, experts, [&](int64_t e) {
        if (groups.experts[e].count == 0) return;
        gate.fill(layer.of_gate, e);
        up.fill(layer.of_up, e);
        down.fill(layer.of_down, e);
      });
    parallel_for(pool, tiles, [&](int64_t t) { prepare(t); });
    const int64_t inner = outputs_of_task(layer.hidden, 2 * layer.width * 2);
    parallel_for(pool, experts * (layer.hidden / inner),
                 [&](int64_t i) { expand(i % experts, i / experts * inner, inner); });
    if (down.rank > 0)
      parallel_for(pool, tiles, [&](int64_t t) {
        const Tile& tile = groups.tiles[t];
        multiply(down.a_of(groups.of_tile[t]), down.rank, hidden.of(tile), hidden.depth, lows.of(tile),
                 (gate.rank + up.rank) / 2, tile.width);
      });
    const int64_t outer = outputs_of_task(layer.width, layer.hidden * 2);
    parallel_for(pool, experts * (layer.width / outer),
                 [&](int64_t i) { contract(i % experts, i / experts * outer, outer); });
  }

  // The panel of x, and x times the first factors of w1 and w3.
  void prepare(int64_t t) {
    const Tile& tile = groups.tiles[t];
    const int e = groups.of_tile[t];
    gather(x, tile, xs.of(tile));
    multiply(gate.a_of(e), gate.rank, xs.of(tile), xs.depth, lows.of(tile), 0, tile.width);
    multiply(up.a_of(e), up.rank, xs.of(tile), xs.depth, lows.of(tile), gate.rank / 2, tile.width);
  }

  // silu(w1 x) * w3 x: the hidden columns [first, first + count) of one expert.
  void expand(int64_t e, int64_t first, int64_t count) {
    const Expert& expert = groups.experts[e];
    if (expert.count == 0) return;
    TaskScratch<Word> words(count * layer.width);
    const Left w1 = unpack(layer.gate.of(layer.expert + e), layer.packed, first, count, words.get());
    const Left w3 =
        unpack(layer.up.of(layer.expert + e), layer.packed, first, count, words.get() + count * layer.width / 2);
    for (int t = expert.tile; t < expert.tile + expert.tiles; t++) {
      const Tile& tile = groups.tiles[t];
      const Word *rows = xs.of(tile), *low = lows.of(tile);
      with_vectors(tile.width, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t n = 0; n < count; n += OUTPUTS) {
          Sums<V> g, u;
          clear<V>(g);
          clear<V>(u);
          accumulate<V>(g, w1.from(n), rows, xs.depth);
          accumulate<V>(g, gate.b_of(e).from(first + n), low, gate.rank / 2);
          accumulate<V>(u, w3.from(n), rows, xs.depth);
          accumulate<V>(u, up.b_of(e).from(first + n), low + gate.rank / 2 * tile.width, up.rank / 2);
          if (gates.words != nullptr) {
            store_pairs<V>(g, gates.of(tile), (first + n) / 2);
            store_pairs<V>(u, gates.of(tile), (layer.hidden + first + n) / 2);
          }
          for (int i = 0; i < OUTPUTS; i++)
            for (int v = 0; v < V; v++) g[i][v] = _mm512_mul_ps(_mm512_mul_ps(g[i][v], sigmoid(g[i][v])), u[i][v]);
          store_pairs<V>(g, hidden.of(tile), (first + n) / 2);
        }
      });
    }
  }

  // w2 h: the columns [first, first + count) of the output of one expert.
  void contract(int64_t e, int64_t first, int64_t count) {
    const Expert& expert = groups.experts[e];
    if (expert.count == 0) return;
    TaskScratch<Word> words(count * layer.hidden / 2);
    TaskScratch<float> columns(count * TILE);
    const Left w2 = unpack(layer.down.of(layer.expert + e), layer.packed, first, count, words.get());
    for (int t = expert.tile; t < expert.tile + expert.tiles; t++) {
      const Tile& tile = groups.tiles[t];
      const Word* low = lows.of(tile) + (gate.rank + up.rank) / 2 * tile.width;
      with_vectors(tile.width, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t n = 0; n < count; n += OUTPUTS) {
          Sums<V> sums;
          clear<V>(sums);
          accumulate<V>(sums, w2.from(n), hidden.of(tile), hidden.depth);
          accumulate<V>(sums, down.b_of(e).from(first + n), low, down.rank / 2);
          store_columns<V>(sums, columns.get(), n);
        }
      });
      scatter(columns.get(), tile, count, out + tile.first * layer.width + first, layer.width);
    }
  }
};
