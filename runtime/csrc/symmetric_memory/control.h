// What the ranks of a group share, and how one waits for another.
//
// Each rank owns one segment of shared memory, mapped by all: a Control block, then areas for
// data. A rank writes only to its own segment. `arrived` counts the barriers that it has come to
// and is the word that others sleep on. Messages are kept twice, by the parity of the barrier: a
// fast rank may already describe its next call while a slow one still reads this one.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace fixpass {

constexpr int kMaxDims = 8;

// What a rank brings to a call. Compared on every call: ranks that disagree all see it.
struct Message {
  int64_t numel;
  int64_t offset;  // of the data in the rank's segment, or -1: staged piece by piece
  int32_t dtype;     // at::ScalarType
  int32_t num_dims;
  int32_t sums;      // 1, or 0 for a maximum and the like
  int64_t sizes[kMaxDims];
  uint64_t more_sizes;  // a hash of the sizes after those, 0 without
};

// A rank that gave up in a meeting may have been counted as arrived: those that come later must
// not go on as if all was well. One that left after its last call was there for all of it.
enum State : uint32_t { kTakesPart, kLeft, kGaveUp };

struct alignas(128) Control {
  std::atomic<uint32_t> arrived;
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> state;  // kTakesPart, kLeft or kGaveUp
  std::atomic<int32_t> core;    // where the rank ran when it arrived last
  alignas(128) Message messages[2];
};

static_assert(sizeof(Control) <= 4096, "the first page of a segment");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "words are shared between processes");

using Clock = std::chrono::steady_clock;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool has_reached(const Control* control, uint32_t count) {
  // The difference is signed, so that the counter may wrap.
  auto arrived = control->arrived.load(std::memory_order_acquire);
  return static_cast<int32_t>(arrived - count) >= 0;
}

inline void futex(const std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* limit) {
  // Not FUTEX_PRIVATE: the word is shared between processes.
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(word), op, value, limit, nullptr, 0);
}

// Count one more barrier for this rank and wake those that sleep on it.
inline void arrive(Control* control) {
  control->core.store(sched_getcpu(), std::memory_order_relaxed);
  control->arrived.fetch_add(1, std::memory_order_seq_cst);
  if (control->sleepers.load(std::memory_order_seq_cst) != 0) {
    futex(&control->arrived, FUTEX_WAKE, INT_MAX, nullptr);
  }
}

// Sleep until the rank arrives once more, or 20 ms have gone by.
inline void doze(Control* control, uint32_t count) {
  constexpr timespec kNap{0, 20'000'000};
  control->sleepers.fetch_add(1, std::memory_order_seq_cst);
  uint32_t seen = control->arrived.load(std::memory_order_seq_cst);
  if (static_cast<int32_t>(seen - count) < 0) {
    futex(&control->arrived, FUTEX_WAIT, seen, &kNap);
  }
  control->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

// How long to spin and to yield before sleeping. A rank that shares its core with others gets
// nowhere by spinning: the one that it waits for may need that core.
struct Patience {
  int spins;
  int yields;
};

// Whether the rank arrived within the patience. One that ran on this very core cannot arrive while
// this rank spins on it.
inline bool await_briefly(const Control* control, uint32_t count, Patience patience) {
  if (has_reached(control, count)) return true;
  const bool apart = control->core.load(std::memory_order_relaxed) != sched_getcpu();
  for (int i = 0; apart && i < patience.spins; ++i) {
    if (has_reached(control, count)) return true;
    relax();
  }
  for (int i = 0; i < patience.yields; ++i) {
    if (has_reached(control, count)) return true;
    sched_yield();
  }
  return has_reached(control, count);
}

// Whether the process behind a pidfd has ended; -1 stands for a process that cannot be watched.
inline bool has_ended(int pidfd) {
  pollfd entry{pidfd, POLLIN, 0};
  return pidfd >= 0 && poll(&entry, 1, 0) == 1;
}

}  // namespace fixpass
