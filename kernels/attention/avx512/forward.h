// Forward: the softmax is computed block by block, as in FlashAttention (arXiv 2307.08691).
#pragma once

#include "attention.h"

struct Forward {
  const Shape& shape;
  const Mask& mask;
  const Heads q, k, v;
  uint16_t* out;
  float* log_totals;  // [batch, heads, length]
  Sides keys, values;

  Forward(const Shape& s, const Mask& mask, Heads q, Heads k, Heads v, uint16_t* out, float* log_totals)
      : shape(s),
        mask(mask),
        q(q),
        k(k),
        v(v),
        out(out),
        log_totals(log_totals),
        keys(s.batch * s.groups, s.slots, s.width),
        values(s.batch * s.groups, s.slots, s.width) {}

  void run(ffi::ThreadPool& pool) {
    parallel_for(pool, shape.batch * shape.groups, [&](int64_t i) {
      keys.fill_plain(i, k.of(i / shape.groups, i % shape.groups));
      values.fill_paired(i, v.of(i / shape.groups, i % shape.groups));
    });
    for_each_tile(pool, shape.batch, shape.heads, shape.length, [&](int64_t b, int64_t head, const Tile& tile) {
      with_vectors(tile.width, [&](auto vectors) { attend<decltype(vectors)::value>(b, head, tile); });
    });
  }

  template <int V>
  void attend(int64_t b, int64_t head, const Tile& tile) {
    constexpr int W = V * LANES;
    const int64_t side = b * shape.groups + head / shape.shared();
    TaskScratch<Word> rows(shape.width / 2 * W);
    TaskScratch<float> sums(shape.width * W);
    alignas(64) float scores[BLOCK * W];
    alignas(64) Word weights[BLOCK / 2 * W];
    gather(q.of(b, head), tile, rows.get());
    std::fill_n(sums.get(), shape.width * W, 0.0f);
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(shape.scale());
    __m512 peak[V], total[V];
    for (int v = 0; v < V; v++) {
      peak[v] = none;
      total[v] = _mm512_setzero_ps();
    }
    const auto [low, high] = mask.keys(tile.first, tile.count);
    for (int64_t first = low / BLOCK * BLOCK; first < high; first += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, high - first)), whole = int(round_up(count, OUTPUTS));
      Seen<V> seen;
      see_keys<V>(mask, b, tile, first, count, seen);
      if (!seen.any) continue;
      __m512 higher[V], shrink[V];
      for (int v = 0; v < V; v++) higher[v] = peak[v];
      for (int n = 0; n < whole; n += OUTPUTS) {
        Sums<V> found;
        clear<V>(found);
        accumulate<V>(found, keys.over_width(side, first + n), rows.get(), shape.width / 2);
        for (int i = 0; i < OUTPUTS; i++)
          for (int v = 0; v < V; v++) {
            const __mmask16 bits = n + i < count ? seen.bits[n + i][v] : __mmask16(0);
            found[i][v] = _mm512_mask_mul_ps(none, bits, found[i][v], scale);
            higher[v] = _mm512_max_ps(higher[v], found[i][v]);
          }
        store_columns<V>(found, scores, n);
      }
      for (int v = 0; v < V; v++) {
        const __mmask16 some = _mm512_cmpneq_ps_mask(higher[v], none);
        shrink[v] =
            _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(peak[v], none), exponential(_mm512_sub_ps(peak[v], higher[v])));
        peak[v] = higher[v];
        higher[v] = _mm512_maskz_mov_ps(some, higher[v]);
        total[v] = _mm512_mul_ps(total[v], shrink[v]);
      }
      for (int n = 0; n < whole; n += 2)
        for (int v = 0; v < V; v++) {
          __m512 weight[2];
          for (int i = 0; i < 2; i++) {
            const __m512 score = _mm512_load_ps(scores + (n + i) * W + v * LANES);
            weight[i] =
                _mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(score, none), exponential(_mm512_sub_ps(score, higher[v])));
            total[v] = _mm512_add_ps(total[v], weight[i]);
          }
          store_words(weights + n / 2 * W + v * LANES, words_of(weight[0], weight[1]));
        }
      for (int64_t h = 0; h < shape.width; h += OUTPUTS) {
        Sums<V> found;
        for (int i = 0; i < OUTPUTS; i++)
          for (int v = 0; v < V; v++)
            found[i][v] = _mm512_mul_ps(_mm512_load_ps(sums.get() + ((h + i) * V + v) * LANES), shrink[v]);
        accumulate<V>(found, values.over_rows(side, first).from(h), weights, whole / 2);
        store_columns<V>(found, sums.get(), h);
      }
    }
    finish<V>(b, head, tile, sums.get(), peak, total);
  }

  template <int V>
  void finish(int64_t b, int64_t head, const Tile& tile, float* sums, const __m512 (&peak)[V],
              const __m512 (&total)[V]) {
    for (int v = 0; v < V; v++) {
      const __mmask16 some = _mm512_cmplt_ps_mask(_mm512_setzero_ps(), total[v]);
      const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), total[v]);
      for (int64_t h = 0; h < shape.width; h++) {
        float* at = sums + (h * V + v) * LANES;
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), inverse));
      }
      alignas(64) float peaks[LANES], totals[LANES];
      _mm512_store_ps(peaks, peak[v]);
      _mm512_store_ps(totals, total[v]);
      for (int i = 0; i < LANES && v * LANES + i < tile.count; i++)
        log_totals[(b * shape.heads + head) * shape.length + tile.first + v * LANES + i] =
            totals[i] > 0 ? peaks[i] + std::log(totals[i]) : 0.0f;
    }
    const int64_t stride = shape.heads * shape.width;
    scatter(sums, tile, int(shape.width), out + (b * shape.length + tile.first) * stride + head * shape.width, stride);
  }
};
