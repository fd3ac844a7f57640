// The experts' feed-forward layer for x86 processors with AVX-512 and its bfloat16 dot products. ../avx512.py calls it
// with these arguments and results, in this order.

#include "backward.h"
#include "foreign.h"
#include "forward.h"

namespace {

enum {
  X,
  ORDER,
  SIZES,
  LAYER,
  W1,
  W3 = W1 + OPERANDS,
  W2 = W3 + OPERANDS,
  A1 = W2 + OPERANDS,
  B1,
  A3,
  B3,
  A2,
  B2,
  DOUT,
  SCALES,
  LOWS,
  GATES
};

Groups groups_of(const Operands& given) {
  const int32_t* sizes = given.data<const int32_t>(SIZES);
  const int count = int(given.arg(SIZES).element_count());
  int64_t rows = 0;
  for (int e = 0; e < count; e++) {
    if (sizes[e] < 0) throw std::invalid_argument("expert_mlp: a group has a negative size");
    rows += sizes[e];
  }
  if (rows > int64_t(given.arg(ORDER).element_count()))
    throw std::invalid_argument("expert_mlp: the groups have more rows than there are pairs");
  const int32_t* order = given.data<const int32_t>(ORDER);
  const int64_t pairs = given.arg(ORDER).element_count();
  for (int64_t row = 0; row < rows; row++)
    if (order[row] < 0 || order[row] >= pairs)
      throw std::invalid_argument("expert_mlp: a sorted row belongs to no pair");
  return Groups(sizes, count);
}

// Rows by token.
Gathered gathered(const Operands& given, int i) {
  const int64_t tokens = given.shape(i)[0];
  const int top_k = tokens == 0 ? 1 : int(given.arg(ORDER).element_count() / tokens);
  return {given.data<const uint16_t>(i), given.data<const int32_t>(ORDER), top_k, given.shape(i)[1]};
}

Factors factors(const Operands& given, int i) {
  const auto a = given.shape(i), b = given.shape(i + 1);
  return {given.data<const uint16_t>(i), given.data<const uint16_t>(i + 1), a[1], b[2], a[2]};
}

Layer layer_of(const Operands& given) {
  const int64_t width = given.shape(A1)[1], hidden = given.shape(B1)[2];
  const int64_t block = given.attribute("block"), down_block = given.attribute("down_block");
  const auto stack = [&](int i, int64_t in, int64_t out, int64_t block) {  // of the experts of all layers
    return block > 0 ? weights(given, i, out, in, block) : weights(given, i, in, out, 0);
  };
  return {stack(W1, width, hidden, block),
          stack(W3, width, hidden, block),
          stack(W2, hidden, width, down_block),
          layer_in(given, LAYER, W1) * given.shape(A1)[0],
          block > 0,
          factors(given, A1),
          factors(given, A3),
          factors(given, A2),
          width,
          hidden};
}

void forward(ffi::ThreadPool& pool, const Operands& given) {
  const Layer layer = layer_of(given);
  const Groups groups = groups_of(given);
  const Panels lows{given.result<Word>(1), layer.rank() / 2};
  const Panels gates{given.has_result(2) ? given.result<Word>(2) : nullptr, layer.hidden};
  Forward(layer, groups, gathered(given, X), lows, gates, given.result<uint16_t>(0)).run(pool);
}

void backward(ffi::ThreadPool& pool, const Operands& given) {
  const Layer layer = layer_of(given);
  const Groups groups = groups_of(given);
  const Panels lows{given.data<Word>(LOWS), layer.rank() / 2}, gates{given.data<Word>(GATES), layer.hidden};
  const Gradients found{given.result<uint16_t>(0), given.result<float>(1), given.result<float>(2),
                        given.result<float>(3),    given.result<float>(4), given.result<float>(5),
                        given.result<float>(6),    given.result<float>(7)};
  Backward(layer, groups, gathered(given, X), gathered(given, DOUT), given.data<const float>(SCALES), lows, gates,
           found)
      .run(pool);
}

}  // namespace

DEFINE_HANDLER(bimedix_expert_mlp_forward, forward);
DEFINE_HANDLER(bimedix_expert_mlp_backward, backward);
