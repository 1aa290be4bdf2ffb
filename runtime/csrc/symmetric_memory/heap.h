// The part of a rank's segment that tensors are allocated in: first fit, neighbours joined again.
//
// Offsets need not be equal on all ranks: each call tells the others where its data lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>

namespace fixpass {

class Heap {
 public:
  static constexpr size_t kAlignment = 128;

  Heap(char* base, size_t size) : base_(base) {
    if (size != 0) free_.emplace(0, size);
  }

  // A block of at least `size` bytes, or null where there is no room.
  char* allocate(size_t size) {
    const size_t wanted = (size + kAlignment - 1) / kAlignment * kAlignment;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->second < wanted) continue;
      const size_t offset = block->first, left = block->second - wanted;
      free_.erase(block);
      if (left != 0) free_.emplace(offset + wanted, left);
      used_.emplace(offset, wanted);
      return base_ + offset;
    }
    return nullptr;
  }

  void release(const char* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto block = used_.find(static_cast<size_t>(data - base_));
    size_t offset = block->first, size = block->second;
    used_.erase(block);
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + size) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        previous->second += size;
        return;
      }
    }
    free_.emplace(offset, size);
  }

  size_t used_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t total = 0;
    for (const auto& block : used_) total += block.second;
    return total;
  }

 private:
  char* base_;
  std::mutex mutex_;
  std::map<size_t, size_t> free_, used_;  // offset to size
};

}  // namespace fixpass
