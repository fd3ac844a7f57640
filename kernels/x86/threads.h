// Loops over independent tasks on the threads of XLA.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Uninitialised memory, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count) : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  T* get() const { return data_; }

 private:
  T* data_;
};

// The same for the length of a task: the thread keeps the memory for its next tasks, which saves most of malloc's time.
template <class T>
class TaskScratch {
 public:
  explicit TaskScratch(size_t count) {
    while (slot_->used) slot_++;
    if (slot_->size < count * sizeof(T)) {
      slot_->memory.reset();
      slot_->size = 0;
      slot_->memory = std::make_unique<Scratch<char>>(count * sizeof(T));
      slot_->size = count * sizeof(T);
    }
    slot_->used = true;
  }
  TaskScratch(const TaskScratch&) = delete;
  TaskScratch& operator=(const TaskScratch&) = delete;
  ~TaskScratch() { slot_->used = false; }
  T* get() const { return reinterpret_cast<T*>(slot_->memory->get()); }

 private:
  struct Slot {
    std::unique_ptr<Scratch<char>> memory;
    size_t size = 0;
    bool used = false;
  };
  static inline thread_local Slot slots_[8];  // more than one task ever has
  Slot* slot_ = slots_;
};

// Runs task(0), ..., task(count - 1) on the calling thread and on those that XLA has free, and returns when all ended.
// The caller takes part and waits only for tasks that have begun. So no thread waits for one that never starts, even
// when all threads of the pool run such loops. Throws std::bad_alloc if a task did.
template <class Task>
void parallel_for(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  auto state = std::make_shared<State>();
  const Task* body = &task;  // used only while a task is left, hence before this function returns
  auto work = [state, body, count] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      try {
        (*body)(i);
      } catch (const std::bad_alloc&) {
        state->failed = true;
      }
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t others = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < others; i++) pool.Schedule(std::function<void()>(work));
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; spins++) {
    if (spins < 1000)
      _mm_pause();
    else
      std::this_thread::yield();
  }
  if (state->failed) throw std::bad_alloc();
}
