// Backward: gradients of the rows, of their weights and of the adapters' factors. Nothing of the base is recomputed:
// the forward pass has stored w1 x and w3 x, and the products with the first factors.
#pragma once

#include "layer.h"

// Values of bfloat16 [rank, rows] of each expert, and the words of two neighbouring rows as [rank / 16, pairs, 16].
struct LowRank {
  int64_t rank;
  Scratch<uint16_t> values;
  Scratch<Word> words;

  LowRank(int64_t rank, int64_t rows) : rank(rank), values(rank * rows), words(rank * rows / 2) {}
  uint16_t* of(const Expert& e, int64_t r = 0) const { return values.get() + e.padded * rank + r * e.width; }
  Left left(const Expert& e) const { return {reinterpret_cast<const Word*>(of(e)), e.width / 2, 1}; }
  const Word* words_of(const Expert& e, int64_t r) const { return words.get() + e.padded * rank / 2 + r * e.width / 2; }

  // Reads `rank / 2` rows of words of a tile's panel; each row of the tile is multiplied by its scale, if any.
  void read(const Expert& e, const Tile& tile, const Word* panel, const float* scales) {
    for (int64_t r = 0; r < rank; r += 2)
      for (int i = 0; i < tile.width; i += LANES) {
        const __m512i found = load_words(panel + r / 2 * tile.width + i);
        const __m512 scale = scales ? _mm512_loadu_ps(scales + tile.padded + i) : _mm512_set1_ps(1.0f);
        uint16_t* to = of(e, r) + tile.padded - e.padded + i;
        store_bf16(to, _mm512_mul_ps(first_of(found), scale));
        store_bf16(to + e.width, _mm512_mul_ps(second_of(found), scale));
      }
  }

  void fill_words(const Expert& e) {
    const int64_t pairs = e.width / 2;  // a multiple of 8, so a block may have 8 pairs only
    const Word* from = reinterpret_cast<const Word*>(of(e));
    Word* to = words.get() + e.padded * rank / 2;
    for (int64_t r = 0; r < rank; r += LANES)
      for (int64_t p = 0; p < pairs; p += LANES) {
        const __mmask16 inside = pairs - p >= LANES ? 0xffff : 0xff;
        __m512i block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = _mm512_maskz_loadu_epi32(inside, from + (r + i) * pairs + p);
        transpose(block);
        for (int i = 0; i < LANES && p + i < pairs; i++) store_words(to + r * pairs + (p + i) * LANES, block[i]);
      }
  }
};

struct Gradients {
  uint16_t* x;                           // [rows, width]
  float* scales;                         // [rows]
  float *a_gate, *b_gate, *a_up, *b_up;  // [experts, rank, width], [experts, hidden, rank]
  float *a_down, *b_down;                // [experts, hidden, rank], [experts, rank, width]
};

struct Backward {
  const Layer& layer;
  const Groups& groups;
  const Gathered x, dout;
  const Panels lows, gates;
  const Gradients found;

  int64_t inner, outer;            // outputs of a task
  Scratch<float> scales, partial;  // [padded], [hidden / inner, padded]
  Scratch<Word> dout_words, q_words, both_words, dlow_words;
  Panels douts, qs, both, dlows;  // both: gradients of w1 x and w3 x
  LowRank x_gate, x_up, h_down, q_down, d_gate, d_up;

  Backward(const Layer& layer, const Groups& groups, const Gathered& x, const Gathered& dout, const float* scale,
           const Panels& lows, const Panels& gates, const Gradients& found)
      : layer(layer),
        groups(groups),
        x(x),
        dout(dout),
        lows(lows),
        gates(gates),
        found(found),
        inner(outputs_of_task(layer.hidden, layer.width * 2)),
        outer(outputs_of_task(layer.width, 2 * layer.hidden * 2)),
        scales(groups.padded),
        partial(layer.hidden / inner * groups.padded),
        dout_words(groups.padded * layer.width / 2),
        q_words(groups.padded * layer.of_down.rank / 2),
        both_words(groups.padded * layer.hidden),
        dlow_words(groups.padded * (layer.of_gate.rank + layer.of_up.rank) / 2),
        douts{dout_words.get(), layer.width / 2},
        qs{q_words.get(), layer.of_down.rank / 2},
        both{both_words.get(), layer.hidden},
        dlows{dlow_words.get(), (layer.of_gate.rank + layer.of_up.rank) / 2},
        x_gate(layer.of_gate.rank, groups.padded),
        x_up(layer.of_up.rank, groups.padded),
        h_down(layer.of_down.rank, groups.padded),
        q_down(layer.of_down.rank, groups.padded),
        d_gate(layer.of_gate.rank, groups.padded),
        d_up(layer.of_up.rank, groups.padded) {
    for (const Tile& tile : groups.tiles)
      for (int i = 0; i < tile.width; i++)
        scales.get()[tile.padded + i] = i < tile.count ? scale[tile.first + i] : 0.0f;
  }

  void run(ffi::ThreadPool& pool) {
    const int64_t experts = groups.experts.size(), tiles = groups.tiles.size();
    parallel_for(pool, tiles, [&](int64_t t) { prepare(t); });
    if (layer.rank() > 0)
      parallel_for(pool, experts, [&](int64_t e) {
        for (LowRank* low : {&x_gate, &x_up, &q_down}) low->fill_words(groups.experts[e]);
      });
    parallel_for(pool, experts * (layer.hidden / inner), [&](int64_t i) { hidden(i % experts, i / experts * inner); });
    parallel_for(pool, tiles, [&](int64_t t) { low_ranks(t); });
    parallel_for(pool, experts * (layer.width / outer), [&](int64_t i) { rows(i % experts, i / experts * outer); });
    if (layer.rank() > 0)
      parallel_for(pool, experts * (layer.width / 32), [&](int64_t i) { factors(i % experts, i / experts * 32); });
  }

  // The panels of dout and of dout b2^T, and the products with first factors row by row.
  void prepare(int64_t t) {
    const Tile& tile = groups.tiles[t];
    const int e = groups.of_tile[t];
    const Expert& expert = groups.experts[e];
    const int64_t gate = layer.of_gate.rank, up = layer.of_up.rank, down = layer.of_down.rank;
    gather(dout, tile, douts.of(tile));
    multiply({layer.of_down.b_of(e), layer.width / 2, 1}, down, douts.of(tile), douts.depth, qs.of(tile), 0,
             tile.width);
    q_down.read(expert, tile, qs.of(tile), scales.get());
    x_gate.read(expert, tile, lows.of(tile), nullptr);
    x_up.read(expert, tile, lows.of(tile) + gate / 2 * tile.width, nullptr);
    h_down.read(expert, tile, lows.of(tile) + (gate + up) / 2 * tile.width, scales.get());
  }

  // Gradients of w1 x and w3 x for a task's hidden columns, and of the factors on this side.
  void hidden(int64_t e, int64_t first) {
    const Expert& expert = groups.experts[e];
    const int64_t gate = layer.of_gate.rank, up = layer.of_up.rank, down = layer.of_down.rank;
    float *db_gate = found.b_gate + (e * layer.hidden + first) * gate,
          *db_up = found.b_up + (e * layer.hidden + first) * up,
          *da_down = found.a_down + (e * layer.hidden + first) * down;
    if (expert.count == 0) {
      std::fill_n(db_gate, inner * gate, 0.0f);
      std::fill_n(db_up, inner * up, 0.0f);
      std::fill_n(da_down, inner * down, 0.0f);
      return;
    }
    TaskScratch<Word> words(inner * layer.width / 2);
    TaskScratch<uint16_t> by_column(3 * inner * expert.width);  // gradients of gate and up, and h
    uint16_t *dg = by_column.get(), *du = dg + inner * expert.width, *h = du + inner * expert.width;
    const Left w2 = unpack(layer.down.of(layer.expert + e), !layer.packed, first, inner, words.get());
    const Left a2{layer.of_down.a_of(e) + first * down / 2, down / 2, 1};
    for (int t = expert.tile; t < expert.tile + expert.tiles; t++) {
      const Tile& tile = groups.tiles[t];
      const int64_t at = tile.padded - expert.padded;
      with_vectors(tile.width, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        __m512 scale[V], dscale[V];
        for (int v = 0; v < V; v++) {
          scale[v] = _mm512_loadu_ps(scales.get() + tile.padded + v * LANES);
          dscale[v] = _mm512_setzero_ps();
        }
        for (int64_t n = 0; n < inner; n += OUTPUTS) {
          Sums<V> dh;
          clear<V>(dh);
          accumulate<V>(dh, w2.from(n), douts.of(tile), douts.depth);
          accumulate<V>(dh, a2.from(n), qs.of(tile), down / 2);
          for (int i = 0; i < OUTPUTS; i += 2)
            for (int v = 0; v < V; v++) {
              const int64_t pair = (first + n + i) / 2;
              const int64_t word = (pair * V + v) * LANES, shift = layer.hidden / 2 * tile.width;
              const __m512i g_words = load_words(gates.of(tile) + word),
                            u_words = load_words(gates.of(tile) + word + shift);
              __m512 dg_of[2], du_of[2];
              for (int k = 0; k < 2; k++) {
                const __m512 g = k ? second_of(g_words) : first_of(g_words),
                             u = k ? second_of(u_words) : first_of(u_words);
                const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s), hidden = _mm512_mul_ps(silu, u);
                dscale[v] = _mm512_fmadd_ps(dh[i + k][v], hidden, dscale[v]);
                const __m512 scaled = _mm512_mul_ps(dh[i + k][v], scale[v]);
                // silu'(g) = s (1 + g (1 - s)) = s + silu - silu s
                const __m512 slope = _mm512_add_ps(s, _mm512_fnmadd_ps(silu, s, silu));
                dg_of[k] = _mm512_mul_ps(_mm512_mul_ps(scaled, u), slope);
                du_of[k] = _mm512_mul_ps(scaled, silu);
                const int64_t place = (n + i + k) * expert.width + at + v * LANES;
                store_bf16(h + place, hidden);
                store_bf16(dg + place, dg_of[k]);
                store_bf16(du + place, du_of[k]);
              }
              store_words(both.of(tile) + word, words_of(dg_of[0], dg_of[1]));
              store_words(both.of(tile) + word + shift, words_of(du_of[0], du_of[1]));
            }
        }
        for (int v = 0; v < V; v++)
          _mm512_storeu_ps(partial.get() + first / inner * groups.padded + tile.padded + v * LANES, dscale[v]);
      });
    }
    over_rows(dg, expert, x_gate, db_gate);
    over_rows(du, expert, x_up, db_up);
    over_rows(h, expert, q_down, da_down);
  }

  // [inner, rank]: products of columns, bfloat16 [inner, rows], with the values of `low`, summed over rows.
  void over_rows(const uint16_t* columns, const Expert& expert, const LowRank& low, float* out) {
    const Left left{reinterpret_cast<const Word*>(columns), expert.width / 2, 1};
    for (int64_t r = 0; r < low.rank; r += LANES)
      for (int64_t n = 0; n < inner; n += OUTPUTS) {
        Sums<1> sums;
        clear<1>(sums);
        accumulate<1>(sums, left.from(n), low.words_of(expert, r), expert.width / 2);
        for (int i = 0; i < OUTPUTS; i++) _mm512_storeu_ps(out + (n + i) * low.rank + r, sums[i][0]);
      }
  }

  // Gradients of the products with first factors of w1 and w3, and the sum of the gradients of each row's weight.
  void low_ranks(int64_t t) {
    const Tile& tile = groups.tiles[t];
    const int e = groups.of_tile[t];
    const int64_t gate = layer.of_gate.rank, up = layer.of_up.rank, half = layer.hidden / 2;
    const Word* up_rows = both.of(tile) + half * tile.width;
    multiply({layer.of_gate.b_of(e), half, 1}, gate, both.of(tile), half, dlows.of(tile), 0, tile.width);
    multiply({layer.of_up.b_of(e), half, 1}, up, up_rows, half, dlows.of(tile), gate / 2, tile.width);
    d_gate.read(groups.experts[e], tile, dlows.of(tile), nullptr);
    d_up.read(groups.experts[e], tile, dlows.of(tile) + gate / 2 * tile.width, nullptr);
    for (int i = 0; i < tile.count; i++) {
      float sum = 0;
      for (int64_t part = 0; part < layer.hidden / inner; part++)
        sum += partial.get()[part * groups.padded + tile.padded + i];
      found.scales[tile.first + i] = sum;
    }
  }

  // Gradients of a task's columns of the rows.
  void rows(int64_t e, int64_t first) {
    const Expert& expert = groups.experts[e];
    if (expert.count == 0) return;
    const int64_t gate = layer.of_gate.rank, up = layer.of_up.rank, half = layer.hidden / 2;
    TaskScratch<Word> words(outer * layer.hidden);
    TaskScratch<float> columns(outer * TILE);
    const Left w1 = unpack(layer.gate.of(layer.expert + e), !layer.packed, first, outer, words.get());
    const Left w3 = unpack(layer.up.of(layer.expert + e), !layer.packed, first, outer, words.get() + outer * half);
    const Left a1{layer.of_gate.a_of(e) + first * gate / 2, gate / 2, 1},
        a3{layer.of_up.a_of(e) + first * up / 2, up / 2, 1};
    for (int t = expert.tile; t < expert.tile + expert.tiles; t++) {
      const Tile& tile = groups.tiles[t];
      const Word *gate_rows = both.of(tile), *up_rows = gate_rows + half * tile.width, *low = dlows.of(tile);
      with_vectors(tile.width, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t n = 0; n < outer; n += OUTPUTS) {
          Sums<V> sums;
          clear<V>(sums);
          accumulate<V>(sums, w1.from(n), gate_rows, half);
          accumulate<V>(sums, w3.from(n), up_rows, half);
          accumulate<V>(sums, a1.from(n), low, gate / 2);
          accumulate<V>(sums, a3.from(n), low + gate / 2 * tile.width, up / 2);
          store_columns<V>(sums, columns.get(), n);
        }
      });
      scatter(columns.get(), tile, outer, found.x + tile.first * layer.width + first, layer.width);
    }
  }

  // Gradients of 32 columns of the factors on the side of x and of dout.
  void factors(int64_t e, int64_t column) {
    const Expert& expert = groups.experts[e];
    TaskScratch<Word> words(expert.width * LANES + 1);
    if (layer.of_gate.rank + layer.of_up.rank > 0) {
      pair_rows(x, expert.first, expert.count, expert.width, column, words.get(), 32);
      outer_product(d_gate, expert, words.get(), found.a_gate, e, column);
      outer_product(d_up, expert, words.get(), found.a_up, e, column);
    }
    if (layer.of_down.rank > 0) {
      pair_rows(dout, expert.first, expert.count, expert.width, column, words.get(), 32);
      outer_product(h_down, expert, words.get(), found.b_down, e, column);
    }
  }

  // 32 columns of [rank, width]: the values of `low` times rows of 32 columns, summed over rows.
  void outer_product(const LowRank& low, const Expert& expert, const Word* words, float* out, int64_t e,
                     int64_t column) {
    for (int64_t r = 0; r < low.rank; r += OUTPUTS) {
      Sums<2> sums;
      clear<2>(sums);
      accumulate<2>(sums, low.left(expert).from(r), words, expert.width / 2);
      for (int i = 0; i < OUTPUTS; i++)
        for (int v = 0; v < 2; v++)
          _mm512_storeu_ps(out + (e * low.rank + r + i) * layer.width + column + v * LANES, sums[i][v]);
    }
  }
};
