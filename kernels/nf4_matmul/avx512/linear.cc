// Products of rows with one matrix for x86 processors with AVX-512 and its bfloat16 dot products. ../avx512.py calls it
// with these arguments.

#include "linear.h"

#include "foreign.h"

namespace {

enum { X, LAYER, W };

void linear(ffi::ThreadPool& pool, const Operands& given) {
  const auto shape = given.shape(X);
  const int64_t in = shape[1], out = given.attribute("out"), block = given.attribute("block");
  const bool over_columns = given.attribute("over_columns"), full = given.attribute("full");
  const Weights stack = over_columns ? weights(given, W, out, in, block) : weights(given, W, in, out, block);
  Linear{given.data<const uint16_t>(X), shape[0], in, out, stack.of(layer_in(given, LAYER, W)), over_columns,
         given.result<void>(0),         full}
      .run(pool);
}

}  // namespace

DEFINE_HANDLER(bimedix_linear, linear);
