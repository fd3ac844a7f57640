// y = x w for rows of bfloat16 and one matrix, dense or NF4. A task unpacks some outputs of w into panels, and multiplies
// all rows of its chunk by them. Rows are the left operand, as they are.
#pragma once

#include <algorithm>

#include "panels.h"
#include "threads.h"
#include "weights.h"

// Panels come in twos: 96 is the least common multiple of a panel's outputs and of the 32 that are unpacked at a time.
constexpr int64_t UNIT = 2 * TILE;

struct Linear {
  const uint16_t* x;  // [rows, in]
  int64_t rows, in, out;
  Matrix w;
  bool over_columns;  // w is stored as (out, in); else (in, out)
  void* y;            // [rows, out]
  bool full;          // y is float32; else bfloat16

  void run(ffi::ThreadPool& pool) const {
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
  }

  template <int V>
  void store(const Sums<V>& sums, int64_t row, int present, int64_t column) const {
    for (int i = 0; i < present; i++)
      for (int v = 0; v < V; v++) {
        const int64_t place = (row + i) * out + column + v * LANES;
        if (full)
          _mm512_stream_ps(static_cast<float*>(y) + place, sums[i][v]);
        else
          store_bf16(static_cast<uint16_t*>(y) + place, sums[i][v]);
      }
  }
};
