// Functions that XLA calls: void compute(ThreadPool&, const Operands&), without a template for each argument.
#pragma once

#include <new>
#include <stdexcept>

#include "threads.h"

struct Operands {
  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  const ffi::Dictionary& attributes;

  ffi::AnyBuffer arg(int i) const { return *args.get<ffi::AnyBuffer>(i); }
  ffi::AnyBuffer::Dimensions shape(int i) const { return arg(i).dimensions(); }
  template <class T>
  T* data(int i) const {
    return static_cast<T*>(arg(i).untyped_data());
  }
  template <class T>
  T* result(int i) const {
    return static_cast<T*>((*rets.get<ffi::AnyBuffer>(i))->untyped_data());
  }
  bool has_result(int i) const { return (*rets.get<ffi::AnyBuffer>(i))->element_count() > 0; }
  int64_t attribute(const char* name) const { return *attributes.get<int64_t>(name); }
};

template <void (*compute)(ffi::ThreadPool&, const Operands&)>
ffi::Error call(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  try {
    compute(pool, {args, rets, attributes});
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  } catch (const std::invalid_argument& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
  return ffi::Error::Success();
}

#define DEFINE_HANDLER(name, compute)                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, call<compute>, \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs())
