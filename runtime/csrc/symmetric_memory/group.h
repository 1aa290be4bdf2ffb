// All-reduce between the ranks of one host, through the segments that all of them map.
//
// One-shot, for small messages: each rank copies its data into a slot, all meet once, and each
// sums everything. Two slots take turns with the meetings, so that a slot is written again only
// when all have met once more and so have read it: nobody waits for the last reader. Two-shot, for large
// ones: each rank sums one chunk, all meet again, and each gathers the others' sums. Large messages
// go piece by piece, so that what is staged stays in the cache; data that lies in the segment
// already is not staged. How a message is cut depends on its size alone: all ranks do the same.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "control.h"
#include "heap.h"
#include "reduce.h"
#include "stage.h"

namespace fixpass {

// A rank is gone, late, or no longer takes part: the group is of no more use.
struct BrokenGroup : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The ranks bring different things, or a caller does what cannot work. The group stays usable.
struct WrongCall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The areas of a segment, in bytes; the same on all ranks.
struct Areas {
  size_t slot, piece, heap;

  static constexpr size_t kControl = 4096;
  size_t slot_at(uint32_t meeting) const { return kControl + (meeting & 1) * slot; }
  size_t stage_at() const { return kControl + 2 * slot; }
  size_t result_at() const { return stage_at() + piece; }
  size_t heap_at() const { return result_at() + piece; }
  size_t size() const { return heap_at() + heap; }
};

struct Stats {
  int64_t one_shot = 0, two_shot = 0, staged_bytes = 0, resident_bytes = 0;
};

class Group {
 public:
  // Segments are kept mapped as long as the group lives; pidfds are closed with it.
  Group(std::string name, std::vector<at::Tensor> segments, int rank, Areas areas,
        std::vector<int> pidfds, double seconds, Patience patience)
      : heap(base_of(segments[rank]) + areas.heap_at(), areas.heap), name_(std::move(name)),
        segments_(std::move(segments)), rank_(rank), areas_(areas), pidfds_(std::move(pidfds)),
        seconds_(seconds), patience_(patience), pid_(getpid()) {
    for (const auto& segment : segments_) bases_.push_back(base_of(segment));
  }

  ~Group() {
    for (int pidfd : pidfds_) {
      if (pidfd >= 0) close(pidfd);
    }
  }

  // Whoever holds the lock is the only caller; a second one is refused, since ranks could not
  // know whose call comes first.
  std::unique_lock<std::mutex> enter() {
    if (getpid() != pid_) {
      throw WrongCall(about() + " was made before this process was forked: make a group of the "
                      "child's own, or use the spawn start method");
    }
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      throw WrongCall(about() + " is in use by another thread: give each thread a group of its "
                      "own, or let one thread make all calls");
    }
    if (!broken_.empty()) throw BrokenGroup(broken_);
    return lock;
  }

  bool is_small(size_t bytes) const { return bytes <= areas_.slot; }

  // Where the next small message may be written by whoever computes it.
  char* next_slot() const { return bases_[rank_] + areas_.slot_at(met_ + 1); }

  bool owns(const void* data) const {
    auto* heap_begin = bases_[rank_] + areas_.heap_at();
    return data >= heap_begin && data < heap_begin + areas_.heap;
  }

  static bool can_sum(at::ScalarType type) {
    return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
  }

  void all_reduce(const void* in, void* out, Message message) {
    message.offset = owns(in) ? static_cast<const char*>(in) - bases_[rank_] : -1;
    switch (static_cast<at::ScalarType>(message.dtype)) {
      case at::kFloat:
        return reduce(static_cast<const float*>(in), static_cast<float*>(out), message);
      case at::kBFloat16:
        return reduce(static_cast<const BFloat16*>(in), static_cast<BFloat16*>(out), message);
      default:
        return reduce(static_cast<const _Float16*>(in), static_cast<_Float16*>(out), message);
    }
  }

  // Meet only to see that all ranks bring the same, before another way of reducing is taken.
  void compare(Message message) {
    message.offset = -1;
    meet_with(message);
  }

  // Tell the others that this rank takes part no more. A forked child has no say in it.
  void leave(State state = kLeft) {
    auto& mine = control(rank_)->state;
    if (getpid() == pid_ && mine.load() != kGaveUp) mine.store(state, std::memory_order_release);
  }

  Stats stats;
  Heap heap;

 private:
  template <typename T>
  void reduce(const T* in, T* out, const Message& message) {
    const size_t numel = message.numel;
    if (is_small(numel * sizeof(T))) {
      one_shot(in, out, message, numel);
    } else {
      two_shot(in, out, message, numel);
    }
  }

  template <typename T>
  void one_shot(const T* in, T* out, const Message& message, size_t numel) {
    ++stats.one_shot;
    const size_t slot = areas_.slot_at(met_ + 1);
    const size_t bytes = numel * sizeof(T);
    char* mine = bases_[rank_] + slot;
    if (static_cast<const void*>(in) == mine) {
      stats.resident_bytes += bytes;
    } else {
      copy_for_others(mine, reinterpret_cast<const char*>(in), bytes);
      stats.staged_bytes += bytes;
    }
    meet_with(message);
    std::vector<const T*> sources(bases_.size());
    for (size_t rank = 0; rank < sources.size(); ++rank) {
      sources[rank] = reinterpret_cast<const T*>(bases_[rank] + slot);
    }
    sources[rank_] = in;  // in this core's cache, where its slot is not
    sum_ranks(sources.data(), num_ranks(), 0, numel, out);
  }

  template <typename T>
  void two_shot(const T* in, T* out, const Message& message, size_t numel) {
    ++stats.two_shot;
    if (message.offset >= 0) stats.resident_bytes += numel * sizeof(T);
    const size_t step = areas_.piece / sizeof(T);
    std::vector<const T*> sources(bases_.size());
    for (size_t start = 0; start < numel; start += step) {
      const size_t count = std::min(step, numel - start);
      if (message.offset < 0) stage(in + start, count);
      start == 0 ? meet_with(message) : meet();
      for (size_t rank = 0; rank < sources.size(); ++rank) {
        const int64_t offset = offsets_[rank];
        const size_t at = offset < 0 ? areas_.stage_at() : offset + start * sizeof(T);
        sources[rank] = reinterpret_cast<const T*>(bases_[rank] + at);
      }
      sources[rank_] = in + start;
      const auto [begin, end] = chunk(rank_, count);
      T* result = result_of<T>(rank_);
      at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
        sum_ranks(sources.data(), num_ranks(), from, to, out + start);
        std::memcpy(result + (from - begin), out + start + from, (to - from) * sizeof(T));
      });
      meet();
      gather(out + start, count);
    }
  }

  // Put what the other ranks will sum where they can read it.
  template <typename T>
  void stage(const T* in, size_t count) {
    T* mine = reinterpret_cast<T*>(bases_[rank_] + areas_.stage_at());
    for (int rank = 0; rank < num_ranks(); ++rank) {
      if (rank == rank_) continue;
      const auto [begin, end] = chunk(rank, count);
      copy(mine + begin, in + begin, end - begin);
      stats.staged_bytes += (end - begin) * sizeof(T);
    }
  }

  template <typename T>
  void gather(T* out, size_t count) {
    for (int rank = 0; rank < num_ranks(); ++rank) {
      if (rank == rank_) continue;
      const auto [begin, end] = chunk(rank, count);
      copy(out + begin, result_of<T>(rank), end - begin);
    }
  }

  template <typename T>
  static void copy(T* to, const T* from, int64_t count) {
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      std::memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
    });
  }

  template <typename T>
  T* result_of(int rank) const {
    return reinterpret_cast<T*>(bases_[rank] + areas_.result_at());
  }

  // The elements that a rank sums: equal parts, on boundaries of cache lines.
  std::pair<size_t, size_t> chunk(int rank, size_t count) const {
    const size_t part = (count / num_ranks() + 63) / 64 * 64;
    const size_t begin = std::min(count, rank * part);
    return {begin, rank + 1 == num_ranks() ? count : std::min(count, begin + part)};
  }

  // Meet, and see that all bring the same; where they do not, every rank finds out.
  void meet_with(const Message& message) {
    const uint32_t parity = (met_ + 1) & 1;
    control(rank_)->messages[parity] = message;
    described_ = message;
    meet();
    offsets_.resize(bases_.size());
    for (int rank = 0; rank < num_ranks(); ++rank) {
      const Message& other = control(rank)->messages[parity];
      if (!agree(other, message)) throw WrongCall(disagreement(parity));
      offsets_[rank] = other.offset;
    }
  }

  void meet() {
    arrive(control(rank_));
    ++met_;
    for (int rank = 0; rank < num_ranks(); ++rank) {
      if (rank == rank_) continue;
      if (!await_briefly(control(rank), met_, patience_)) await_rank(rank);
      if (state_of(rank) == kGaveUp) give_up(rank, " has given the all-reduce up");
    }
  }

  void await_rank(int rank) {
    const auto limit = Clock::now() + std::chrono::duration<double>(seconds_);
    while (!has_reached(control(rank), met_)) {
      // Asked first: what a rank did before it ended is seen in `arrived` once more below.
      const bool ended = has_ended(pidfds_[rank]);
      const State state = state_of(rank);
      if (has_reached(control(rank), met_)) return;
      if (state == kGaveUp) give_up(rank, " has given an all-reduce up");
      if (ended) give_up(rank, ": its process has ended");
      if (state == kLeft) give_up(rank, " has left the group");
      if (Clock::now() > limit) {
        std::ostringstream text;
        text << " has not come within " << seconds_ << " s";
        give_up(rank, text.str());
      }
      doze(control(rank), met_);
    }
  }

  [[noreturn]] void give_up(int rank, const std::string& why) {
    leave(kGaveUp);
    broken_ = "rank " + std::to_string(rank) + " of " + about() + why + ", and the all-reduce of " + describe(described_) + " on rank " +
              std::to_string(rank_) + " cannot be completed: destroy the process group and make "
              "it again";
    throw BrokenGroup(broken_);
  }

  static bool agree(const Message& a, const Message& b) {
    return a.numel == b.numel && a.dtype == b.dtype && a.sums == b.sums &&
           a.num_dims == b.num_dims && a.more_sizes == b.more_sizes &&
           std::equal(a.sizes, a.sizes + kMaxDims, b.sizes);
  }

  std::string disagreement(uint32_t parity) const {
    std::string text = "the ranks of " + about() + " bring different tensors to an all-reduce:";
    for (int rank = 0; rank < num_ranks(); ++rank) {
      text += (rank ? ", rank " : " rank ") + std::to_string(rank) + " " +
              describe(control(rank)->messages[parity]);
    }
    return text;
  }

  static std::string describe(const Message& message) {
    std::string text(c10::getDtypeNames(static_cast<at::ScalarType>(message.dtype)).first);
    text += "[";
    for (int i = 0; i < std::min(message.num_dims, kMaxDims); ++i) {
      text += (i ? ", " : "") + std::to_string(message.sizes[i]);
    }
    if (message.num_dims > kMaxDims) text += ", ... of " + std::to_string(message.num_dims) + " dims";
    return text + "]" + (message.sums ? "" : " not to sum");
  }

  State state_of(int rank) const {
    return static_cast<State>(control(rank)->state.load(std::memory_order_acquire));
  }
  int num_ranks() const { return static_cast<int>(bases_.size()); }
  static char* base_of(const at::Tensor& segment) {
    return static_cast<char*>(segment.mutable_data_ptr());
  }
  Control* control(int rank) const { return reinterpret_cast<Control*>(bases_[rank]); }
  std::string about() const { return "group '" + name_ + "'"; }

  static constexpr int64_t kGrain = 1 << 16;

  std::string name_;
  std::vector<at::Tensor> segments_;
  std::vector<char*> bases_;
  int rank_;
  Areas areas_;
  std::vector<int> pidfds_;
  double seconds_;
  Patience patience_;
  pid_t pid_;
  std::mutex mutex_;
  std::string broken_;
  uint32_t met_ = 0;
  Message described_{};
  std::vector<int64_t> offsets_;
};

}  // namespace fixpass
