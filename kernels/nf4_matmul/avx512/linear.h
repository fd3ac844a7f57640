// y = x w for rows of bfloat16 and one matrix, dense or NF4. A task unpacks some outputs of w into panels, and
// multiplies all rows of its chunk by them. Rows are the left operand, as they are. Up to 8 rows are multiplied by each
// stored row of w instead: this needs no panels, but stored rows that run along the contraction.
#pragma once

#include <algorithm>

#include "panels.h"
#include "threads.h"
#include "weights.h"

// Panels come in twos: 96 is the least common multiple of a panel's outputs and of the 32 that are unpacked at a time.
constexpr int64_t UNIT = 2 * TILE;
// Values that are read ahead along a row, where memory is read once.
constexpr int64_t AHEAD = 256;

struct Linear {
  const uint16_t* x;  // [rows, in]
  int64_t rows, in, out;
  Matrix w;
  bool over_columns;  // w is stored as (out, in); else (in, out)
  void* y;            // [rows, out]
  bool full;          // y is float32; else bfloat16

  void run(ffi::ThreadPool& pool) const {
    if (over_columns && rows > 0 && rows <= 8) return few_rows(pool);
    // wide tasks write long parts of rows; their panels should stay in a core's second-level cache
    const int64_t tasks = 8 * pool.num_threads(), fitting = (384 << 10) / (in * 2);
    const int64_t outputs = UNIT * std::clamp<int64_t>(std::min(out / tasks, fitting) / UNIT, 1, 4);
    const int64_t blocks = (out + outputs - 1) / outputs;
    const int64_t chunks = std::clamp<int64_t>(rows / 256, 1, std::max<int64_t>(1, tasks / blocks));
    const int64_t chunk = round_up((rows + chunks - 1) / chunks, OUTPUTS);
    parallel_for(pool, blocks * chunks, [&](int64_t i) {
      const int64_t column = i % blocks * outputs, first = i / blocks * chunk;
      multiply(column, std::min(outputs, out - column), first, std::min(rows, first + chunk));
    });
  }

  void few_rows(ffi::ThreadPool& pool) const {
    const int64_t block = std::max<int64_t>(32, out / (8 * pool.num_threads()) / 32 * 32);
    const auto all = [&](auto padded, auto outputs, auto steps) {
      constexpr int R = decltype(padded)::value, P = decltype(outputs)::value, U = decltype(steps)::value;
      const Scratch<uint16_t> values(R * in);
      std::copy_n(x, rows * in, values.get());
      std::fill_n(values.get() + rows * in, (R - rows) * in, 0);
      parallel_for(pool, (out + block - 1) / block, [&](int64_t i) {
        for (int64_t n = i * block; n < std::min(out, (i + 1) * block); n += 32) dots<R, P, U>(values.get(), n);
      });
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 8> eight;
    if (rows == 1) return all(one, one, eight);
    if (rows == 2) return all(two, one, four);
    if (rows <= 4) return all(four, two, two);
    if (8 * in * 2 <= 24 << 10) return all(eight, one, two);
    all(eight, two, one);  // rows beyond the first-level cache: each read of them serves two outputs
  }

  // 32 outputs of R padded rows, P at once. U steps along the contraction have separate sums, so that none waits for
  // another.
  template <int R, int P, int U>
  void dots(const uint16_t* values, int64_t first) const {
    alignas(64) float found[R][32];
    for (int n = 0; n < 32; n += P) {
      __m512 sums[U][P][R];
      for (auto& outputs : sums)
        for (auto& row : outputs)
          for (auto& sum : row) sum = _mm512_setzero_ps();
      const auto step = [&](int64_t c, auto& outputs) {
        __m512bh words[P];
        for (int p = 0; p < P; p++) {
          if (w.block == 0) prefetch(w, first + n + p, c + AHEAD);
          words[p] = (__m512bh)words_along_row(w, first + n + p, c);
        }
        for (int r = 0; r < R; r++) {
          const __m512bh row = (__m512bh)load_words(values + r * in + c);
          for (int p = 0; p < P; p++) outputs[p][r] = _mm512_dpbf16_ps(outputs[p][r], words[p], row);
        }
      };
      int64_t c = 0;
      for (; c + 32 * U <= in; c += 32 * U)
        for (int u = 0; u < U; u++) step(c + 32 * u, sums[u]);
      for (; c < in; c += 32) step(c, sums[0]);
      for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
          for (int u = 1; u < U; u++) sums[0][p][r] = _mm512_add_ps(sums[0][p][r], sums[u][p][r]);
          found[r][n + p] = _mm512_reduce_add_ps(sums[0][p][r]);
        }
    }
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < 32; v += LANES) {
        const __m512 values = _mm512_load_ps(found[r] + v);
        const int64_t place = r * out + first + v;
        if (full)
          _mm512_storeu_ps(static_cast<float*>(y) + place, values);
        else
          store_bf16(static_cast<uint16_t*>(y) + place, values);
      }
  }

  // `count` outputs from `column` on, of the rows [first, last).
  void multiply(int64_t column, int64_t count, int64_t first, int64_t last) const {
    const int64_t pairs = in / 2;
    TaskScratch<Word> words(count * pairs);
    TaskScratch<uint16_t> tail(OUTPUTS * in);
    unpack_panels(w, over_columns, column, count, words.get());
    for (int64_t row = first; row < last; row += OUTPUTS) {
      const int present = int(std::min<int64_t>(OUTPUTS, last - row));
      const uint16_t* rows_of_x = x + row * in;
      if (present < OUTPUTS) {
        std::copy_n(rows_of_x, present * in, tail.get());
        std::fill_n(tail.get() + present * in, (OUTPUTS - present) * in, 0);
        rows_of_x = tail.get();
      }
      const Left left{reinterpret_cast<const Word*>(rows_of_x), pairs, 1};
      for (int64_t c = 0; c < count; c += TILE) {
        const int width = int(std::min<int64_t>(TILE, count - c));
        with_vectors(width, [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          Sums<V> sums;
          clear<V>(sums);
          accumulate<V>(sums, left, words.get() + c * pairs, pairs);
          store<V>(sums, row, present, column + c);
        });
      }
    }
    _mm_sfence();  // of the stores past the caches, before this task counts as done
  }

  // A large result in float32 goes past the caches, in whole lines.
  template <int V>
  void store(const Sums<V>& sums, int64_t row, int present, int64_t column) const {
    const bool past = reinterpret_cast<uintptr_t>(y) % 64 == 0 && rows * out * 4 >= 16 << 20;
    for (int i = 0; i < present; i++)
      for (int v = 0; v < V; v++) {
        const int64_t place = (row + i) * out + column + v * LANES;
        if (full && past)
          _mm512_stream_ps(static_cast<float*>(y) + place, sums[i][v]);
        else if (full)
          _mm512_storeu_ps(static_cast<float*>(y) + place, sums[i][v]);
        else
          store_bf16(static_cast<uint16_t*>(y) + place, sums[i][v]);
      }
  }
};
