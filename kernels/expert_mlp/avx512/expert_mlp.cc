// The experts' feed-forward layer for x86 processors with AVX-512 and its bfloat16 dot products (kernels/expert_mlp/
// avx512.py). XLA calls these functions through its foreign function interface.

#include "backward.h"
#include "forward.h"

namespace ffi = xla::ffi;

namespace {

// Arguments and results, in the order of avx512.py.
struct Operands {
  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  int64_t block, down_block;

  enum { X, ORDER, SIZES, LAYER, W1, S1, W3, S3, W2, S2, A1, B1, A3, B3, A2, B2, DOUT, SCALES, LOWS, GATES };

  ffi::AnyBuffer arg(int i) const { return *args.get<ffi::AnyBuffer>(i); }
  template <class T>
  T* data(int i) const {
    return static_cast<T*>(arg(i).untyped_data());
  }
  template <class T>
  T* result(int i) const {
    return static_cast<T*>((*rets.get<ffi::AnyBuffer>(i))->untyped_data());
  }
  bool has_result(int i) const { return (*rets.get<ffi::AnyBuffer>(i))->element_count() > 0; }

  Groups groups() const { return Groups(data<const int32_t>(SIZES), int(arg(SIZES).element_count())); }

  // Rows by token.
  Gathered gathered(int i) const {
    const int64_t tokens = arg(i).dimensions()[0];
    const int top_k = tokens == 0 ? 1 : int(arg(ORDER).element_count() / tokens);
    return {data<const uint16_t>(i), data<const int32_t>(ORDER), top_k, arg(i).dimensions()[1]};
  }

  // Dense weights are the stack [layers, experts, in, out]; packed ones are [experts, bytes], stored as (out, in).
  Weights weights(int i, int64_t in, int64_t out, int64_t block) const {
    if (block > 0) return {data<const void>(i), data<const float>(i + 1), out, in, block};
    const int64_t before = *data<const int32_t>(LAYER) * arg(A1).dimensions()[0] * in * out;
    return {data<const uint16_t>(i) + before, nullptr, in, out, 0};
  }

  Factors factors(int i) const {
    const auto a = arg(i).dimensions(), b = arg(i + 1).dimensions();
    return {data<const uint16_t>(i), data<const uint16_t>(i + 1), a[1], b[2], a[2]};
  }

  Layer layer() const {
    const int64_t width = arg(A1).dimensions()[1], hidden = arg(B1).dimensions()[2];
    return {weights(W1, width, hidden, block),      weights(W3, width, hidden, block),
            weights(W2, hidden, width, down_block), block > 0,
            factors(A1),                            factors(A3),
            factors(A2),                            width,
            hidden};
  }
};

void forward(ffi::ThreadPool& pool, const Operands& given) {
  const Layer layer = given.layer();
  const Groups groups = given.groups();
  const Panels lows{given.result<Word>(1), layer.rank() / 2};
  const Panels gates{given.has_result(2) ? given.result<Word>(2) : nullptr, layer.hidden};
  Forward(layer, groups, given.gathered(given.X), lows, gates, given.result<uint16_t>(0)).run(pool);
}

void backward(ffi::ThreadPool& pool, const Operands& given) {
  const Layer layer = given.layer();
  const Groups groups = given.groups();
  const Panels lows{given.data<Word>(given.LOWS), layer.rank() / 2}, gates{given.data<Word>(given.GATES), layer.hidden};
  const Gradients found{given.result<uint16_t>(0), given.result<float>(1), given.result<float>(2),
                        given.result<float>(3),    given.result<float>(4), given.result<float>(5),
                        given.result<float>(6),    given.result<float>(7)};
  Backward(layer, groups, given.gathered(given.X), given.gathered(given.DOUT), given.data<const float>(given.SCALES),
           lows, gates, found)
      .run(pool);
}

template <void (*compute)(ffi::ThreadPool&, const Operands&)>
ffi::Error call(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t block,
                int64_t down_block) {
  try {
    compute(pool, {args, rets, block, down_block});
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "expert_mlp: out of memory");
  }
  return ffi::Error::Success();
}

auto signature() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("block")
      .Attr<int64_t>("down_block");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(bimedix_expert_mlp_forward, call<forward>, signature());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bimedix_expert_mlp_backward, call<backward>, signature());
