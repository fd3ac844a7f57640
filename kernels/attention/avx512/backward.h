// Backward: weights are recomputed from the logarithms of the denominators, once with queries in lanes, for the
// gradient of q, and once with keys in lanes, for those of k and v. So no sum is shared between tasks.
#pragma once

#include "attention.h"

struct Backward {
  const Shape& shape;
  const Mask& mask;
  const Heads q, k, v, out, dout;
  const float* log_totals;
  uint16_t *dq, *dk, *dv;
  Sides queries, douts, keys, values;
  Scratch<float> inner;  // [batch, heads, length]: <dout, out>

  Backward(const Shape& s, const Mask& mask, Heads q, Heads k, Heads v, Heads out, Heads dout, const float* log_totals,
           uint16_t* dq, uint16_t* dk, uint16_t* dv)
      : shape(s),
        mask(mask),
        q(q),
        k(k),
        v(v),
        out(out),
        dout(dout),
        log_totals(log_totals),
        dq(dq),
        dk(dk),
        dv(dv),
        queries(s.batch * s.heads, s.length, s.width),
        douts(s.batch * s.heads, s.length, s.width),
        keys(s.batch * s.groups, s.slots, s.width),
        values(s.batch * s.groups, s.slots, s.width),
        inner(s.batch * s.heads * s.length) {}

  void run(ffi::ThreadPool& pool) {
    parallel_for(pool, shape.batch * shape.heads, [&](int64_t i) { prepare(i / shape.heads, i % shape.heads); });
    for_each_tile(pool, shape.batch, shape.heads, shape.length, [&](int64_t b, int64_t head, const Tile& tile) {
      with_vectors(tile.width, [&](auto vectors) { of_queries<decltype(vectors)::value>(b, head, tile); });
    });
    for_each_tile(pool, shape.batch, shape.groups, shape.slots, [&](int64_t b, int64_t group, const Tile& tile) {
      with_vectors(tile.width, [&](auto vectors) { of_keys<decltype(vectors)::value>(b, group, tile); });
    });
  }

  void prepare(int64_t b, int64_t head) {
    const int64_t side = b * shape.heads + head;
    const Strided from_q = q.of(b, head), from_dout = dout.of(b, head), from_out = out.of(b, head);
    queries.fill_plain(side, from_q);
    queries.fill_paired(side, from_q);
    douts.fill_plain(side, from_dout);
    douts.fill_paired(side, from_dout);
    for (int64_t t = 0; t < shape.length; t++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t h = 0; h < shape.width; h += 32) {
        const __m512i x = load_words(from_dout.row(t) + h), y = load_words(from_out.row(t) + h);
        sum = _mm512_fmadd_ps(first_of(x), first_of(y), _mm512_fmadd_ps(second_of(x), second_of(y), sum));
      }
      inner.get()[side * shape.length + t] = _mm512_reduce_add_ps(sum);
    }
    if (head % shape.shared() > 0) return;
    const int64_t group = head / shape.shared();
    keys.fill_plain(b * shape.groups + group, k.of(b, group));
    keys.fill_paired(b * shape.groups + group, k.of(b, group));
    values.fill_plain(b * shape.groups + group, v.of(b, group));
  }

  // The gradient of the queries of a tile.
  template <int V>
  void of_queries(int64_t b, int64_t head, const Tile& tile) {
    constexpr int W = V * LANES;
    const int64_t side = b * shape.groups + head / shape.shared();
    const int64_t of_row = (b * shape.heads + head) * shape.length + tile.first;
    TaskScratch<Word> rows(shape.width / 2 * W), dout_rows(shape.width / 2 * W);
    TaskScratch<float> sums(shape.width * W);
    alignas(64) Word dscores[BLOCK / 2 * W];
    gather(q.of(b, head), tile, rows.get());
    gather(dout.of(b, head), tile, dout_rows.get());
    std::fill_n(sums.get(), shape.width * W, 0.0f);
    __m512 log_total[V], product[V];
    for (int v = 0; v < V; v++) {
      const __mmask16 inside = lanes_within(tile.count - v * LANES);
      log_total[v] = _mm512_maskz_loadu_ps(inside, log_totals + of_row + v * LANES);
      product[v] = _mm512_maskz_loadu_ps(inside, inner.get() + of_row + v * LANES);
    }
    const __m512 scale = _mm512_set1_ps(shape.scale());
    const auto [low, high] = mask.keys(tile.first, tile.count);
    for (int64_t first = low / BLOCK * BLOCK; first < high; first += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, high - first)), whole = int(round_up(count, OUTPUTS));
      Seen<V> seen;
      see_keys<V>(mask, b, tile, first, count, seen);
      if (!seen.any) continue;
      for (int n = 0; n < whole; n += OUTPUTS) {
        Sums<V> scores, dweights;
        clear<V>(scores);
        clear<V>(dweights);
        accumulate<V>(scores, keys.over_width(side, first + n), rows.get(), shape.width / 2);
        accumulate<V>(dweights, values.over_width(side, first + n), dout_rows.get(), shape.width / 2);
        for (int i = 0; i < OUTPUTS; i++)
          for (int v = 0; v < V; v++) {
            const __mmask16 bits = n + i < count ? seen.bits[n + i][v] : __mmask16(0);
            const __m512 weight = exponential(_mm512_fmsub_ps(scores[i][v], scale, log_total[v]));
            dweights[i][v] = _mm512_maskz_mul_ps(bits, weight, _mm512_sub_ps(dweights[i][v], product[v]));
          }
        store_pairs<V>(dweights, dscores, n / 2);
      }
      add<V>(keys.over_rows(side, first), dscores, whole, sums.get());
    }
    finish<V>(sums.get(), tile, shape.scale(), dq, b * shape.length, head, shape.heads);
  }

  // The gradients of the keys and values of a tile, from all query heads that share them.
  template <int V>
  void of_keys(int64_t b, int64_t group, const Tile& tile) {
    constexpr int W = V * LANES;
    TaskScratch<Word> key_rows(shape.width / 2 * W), value_rows(shape.width / 2 * W);
    TaskScratch<float> dkeys(shape.width * W), dvalues(shape.width * W);
    alignas(64) Word weights[BLOCK / 2 * W], dscores[BLOCK / 2 * W];
    gather(k.of(b, group), tile, key_rows.get());
    gather(v.of(b, group), tile, value_rows.get());
    std::fill_n(dkeys.get(), shape.width * W, 0.0f);
    std::fill_n(dvalues.get(), shape.width * W, 0.0f);
    const __m512 scale = _mm512_set1_ps(shape.scale());
    const auto [low, high] = mask.queries(tile.first, tile.count);
    for (int64_t first = low / BLOCK * BLOCK; first < high; first += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, high - first)), whole = int(round_up(count, OUTPUTS));
      Seen<V> seen;
      see_queries<V>(mask, b, tile, first, count, seen);
      if (!seen.any) continue;
      for (int64_t r = 0; r < shape.shared(); r++) {
        const int64_t side = b * shape.heads + group * shape.shared() + r, of_row = side * shape.length + first;
        for (int n = 0; n < whole; n += OUTPUTS) {
          Sums<V> scores, dweights;
          clear<V>(scores);
          clear<V>(dweights);
          accumulate<V>(scores, queries.over_width(side, first + n), key_rows.get(), shape.width / 2);
          accumulate<V>(dweights, douts.over_width(side, first + n), value_rows.get(), shape.width / 2);
          for (int i = 0; i < OUTPUTS; i++) {
            const bool inside = n + i < count;
            const __m512 log_total = _mm512_set1_ps(inside ? log_totals[of_row + n + i] : 0.0f);
            const __m512 product = _mm512_set1_ps(inside ? inner.get()[of_row + n + i] : 0.0f);
            for (int v = 0; v < V; v++) {
              const __mmask16 bits = inside ? seen.bits[n + i][v] : __mmask16(0);
              const __m512 weight = exponential(_mm512_fmsub_ps(scores[i][v], scale, log_total));
              scores[i][v] = _mm512_maskz_mov_ps(bits, weight);
              dweights[i][v] = _mm512_mul_ps(scores[i][v], _mm512_sub_ps(dweights[i][v], product));
            }
          }
          store_pairs<V>(scores, weights, n / 2);
          store_pairs<V>(dweights, dscores, n / 2);
        }
        add<V>(douts.over_rows(side, first), weights, whole, dvalues.get());
        add<V>(queries.over_rows(side, first), dscores, whole, dkeys.get());
      }
    }
    finish<V>(dkeys.get(), tile, shape.scale(), dk, b * shape.slots, group, shape.groups);
    finish<V>(dvalues.get(), tile, 1.0f, dv, b * shape.slots, group, shape.groups);
  }

  // Adds the products of all columns of `left` with `rows` rows of a panel.
  template <int V>
  void add(const Left& left, const Word* panel, int rows, float* sums) {
    for (int64_t h = 0; h < shape.width; h += OUTPUTS) {
      Sums<V> found;
      for (int i = 0; i < OUTPUTS; i++)
        for (int v = 0; v < V; v++) found[i][v] = _mm512_load_ps(sums + ((h + i) * V + v) * LANES);
      accumulate<V>(found, left.from(h), panel, rows / 2);
      store_columns<V>(found, sums, h);
    }
  }

  template <int V>
  void finish(float* sums, const Tile& tile, float factor, uint16_t* to, int64_t before, int64_t head, int64_t heads) {
    for (int64_t i = 0; i < shape.width * V * LANES; i++) sums[i] *= factor;
    const int64_t stride = heads * shape.width;
    scatter(sums, tile, int(shape.width), to + (before + tile.first) * stride + head * shape.width, stride);
  }
};
