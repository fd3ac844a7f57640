// Attention for x86 processors with AVX-512 and its bfloat16 dot products. ../avx512.py calls it with these arguments
// and results, in this order.

#include "backward.h"
#include "foreign.h"
#include "forward.h"

namespace {

enum { Q, K, V, QUERY_IDS, KEY_IDS, ANCESTORS, OFFSET, OUT, LOG_TOTALS, DOUT };

Heads heads(const Operands& given, int i) {
  const auto shape = given.shape(i);
  const bool head_major = (i == K || i == V) && given.attribute("head_major");
  return {given.data<const uint16_t>(i), shape[head_major ? 2 : 1], shape[head_major ? 1 : 2], shape[3], head_major};
}

Shape shape_of(const Operands& given) {
  const auto q = given.shape(Q);
  const Heads k = heads(given, K);
  return {q[0],
          q[1],
          k.rows,
          q[2],
          k.heads,
          q[3],
          given.shape(ANCESTORS)[2],
          given.attribute("window"),
          *given.data<const int32_t>(OFFSET)};
}

Mask mask_of(const Operands& given, const Shape& shape) {
  return {shape, given.data<const int32_t>(QUERY_IDS), given.data<const int32_t>(KEY_IDS),
          given.data<const int32_t>(ANCESTORS)};
}

void forward(ffi::ThreadPool& pool, const Operands& given) {
  const Shape shape = shape_of(given);
  Forward(shape, mask_of(given, shape), heads(given, Q), heads(given, K), heads(given, V), given.result<uint16_t>(0),
          given.result<float>(1))
      .run(pool);
}

void backward(ffi::ThreadPool& pool, const Operands& given) {
  const Shape shape = shape_of(given);
  Backward(shape, mask_of(given, shape), heads(given, Q), heads(given, K), heads(given, V), heads(given, OUT),
           heads(given, DOUT), given.data<const float>(LOG_TOTALS), given.result<uint16_t>(0),
           given.result<uint16_t>(1), given.result<uint16_t>(2))
      .run(pool);
}

}  // namespace

DEFINE_HANDLER(bimedix_attention_forward, forward);
DEFINE_HANDLER(bimedix_attention_backward, backward);
