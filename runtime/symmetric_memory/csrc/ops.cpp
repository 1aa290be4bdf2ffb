// The operators fixpass::all_reduce and fixpass::matmul_all_reduce for CPU tensors.
//
// Their schemas, and what they do where a group has no symmetric memory, are defined in Python.
// A group is known here by its name, and only as long as its process group lives: a group of the
// same name that is made later is another one.
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <memory>
#include <shared_mutex>
#include <unordered_map>

#include "group.h"

namespace fixpass {
namespace {

using at::Tensor;
using WeakProcessGroup = c10::weak_intrusive_ptr<c10d::ProcessGroup>;

struct Entry {
  std::shared_ptr<Group> group;
  WeakProcessGroup process_group;
  std::vector<Tensor> segments;  // keeps the memory mapped
};

std::shared_mutex table_mutex;
std::unordered_map<std::string, Entry> table;

// The group of that name, or null where it has no symmetric memory (yet).
std::shared_ptr<Group> find_group(const std::string& name) {
  std::shared_lock<std::shared_mutex> lock(table_mutex);
  auto entry = table.find(name);
  if (entry == table.end()) return nullptr;
  auto made_for = entry->second.process_group.lock();
  if (!made_for || made_for != c10d::resolve_process_group(name)) return nullptr;
  return entry->second.group;
}

template <typename Fn>
auto translate_errors(Fn&& fn) {
  try {
    return fn();
  } catch (const BrokenGroup& error) {
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  } catch (const WrongCall& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// The group, made ready by Python where it is met for the first time; null: it has none.
std::shared_ptr<Group> ready_group(const std::string& name) {
  if (auto group = find_group(name)) return group;
  static auto prepare = c10::Dispatcher::singleton()
                            .findSchemaOrThrow("fixpass::prepare_group", "")
                            .typed<bool(c10::string_view)>();
  return prepare.call(name) ? find_group(name) : nullptr;
}

int dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: return -1;
  }
}

Message message_of(const Tensor& tensor) {
  Message message{tensor.numel(), -1, dtype_of(tensor.scalar_type()),
                  static_cast<int32_t>(tensor.dim()), {}};
  for (int i = 0; i < std::min<int>(tensor.dim(), kMaxDims); ++i) message.sizes[i] = tensor.size(i);
  return message;
}

// Through the process group, as if fixpass were not there.
Tensor ordinary_all_reduce(const Tensor& input, c10::string_view op, c10::string_view group) {
  auto& dispatcher = c10::Dispatcher::singleton();
  using Reduce = Tensor(const Tensor&, c10::string_view, c10::string_view);
  static auto reduce =
      dispatcher.findSchemaOrThrow("_c10d_functional::all_reduce", "").typed<Reduce>();
  static auto wait = dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "")
                         .typed<Tensor(const Tensor&)>();
  return wait.call(reduce.call(input, op, group));
}

Tensor reduce_with(Group& group, const Tensor& input) {
  Tensor out = at::empty(input.sizes(), input.options());
  group.all_reduce(input.const_data_ptr(), out.mutable_data_ptr(), message_of(input));
  return out;
}

Tensor all_reduce(const Tensor& input, c10::string_view op, c10::string_view group_name) {
  auto group = ready_group(std::string(group_name));
  Tensor dense = input.contiguous();
  if (!group || dtype_of(input.scalar_type()) < 0 || op != "sum") {
    return ordinary_all_reduce(dense, op, group_name);
  }
  return translate_errors([&] {
    auto lock = group->enter();
    return reduce_with(*group, dense);
  });
}

// A tensor in the group's memory for a message of these sizes; undefined where there is no room.
// A small one is the next slot itself.
Tensor allocate_message(const std::shared_ptr<Group>& group, at::IntArrayRef sizes,
                        const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (group->is_small(bytes)) return at::from_blob(group->next_slot(), sizes, options);
  char* block = group->heap.allocate(bytes);
  if (block == nullptr) return {};
  return at::from_blob(block, sizes, [group](void* data) {
    group->heap.release(static_cast<char*>(data));
  }, options);
}

void multiply_into(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                   const at::Scalar& beta, const at::Scalar& alpha) {
  if (a.dim() == 2) {
    bias ? at::addmm_out(out, *bias, a, b, beta, alpha) : at::mm_out(out, a, b);
  } else {
    bias ? at::baddbmm_out(out, *bias, a, b, beta, alpha) : at::bmm_out(out, a, b);
  }
}

std::vector<int64_t> product_sizes(const Tensor& a, const Tensor& b) {
  auto sizes = a.sizes().vec();
  sizes.back() = b.size(-1);
  return sizes;
}

Tensor matmul_all_reduce(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                         const at::Scalar& beta, const at::Scalar& alpha, c10::string_view op,
                         c10::string_view group_name) {
  auto group = ready_group(std::string(group_name));
  const auto sizes = product_sizes(a, b);
  if (!group || dtype_of(a.scalar_type()) < 0 || op != "sum") {
    Tensor product = at::empty(sizes, a.options());
    multiply_into(product, a, b, bias, beta, alpha);
    return ordinary_all_reduce(product, op, group_name);
  }
  return translate_errors([&] {
    auto lock = group->enter();
    Tensor product = allocate_message(group, sizes, a.options());
    if (!product.defined()) product = at::empty(sizes, a.options());
    multiply_into(product, a, b, bias, beta, alpha);
    return reduce_with(*group, product);
  });
}

// While a thread allocates in a group, its new CPU tensors lie in the group's heap, where there is
// room; all others are the ordinary allocator's.
thread_local std::shared_ptr<Group> allocating_in;

struct Block {
  std::shared_ptr<Group> group;
  char* data;
};

class SymmetricAllocator final : public c10::Allocator {
 public:
  explicit SymmetricAllocator(c10::Allocator* ordinary) : ordinary_(ordinary) {}

  c10::DataPtr allocate(size_t size) override {
    char* data = allocating_in && size != 0 ? allocating_in->heap.allocate(size) : nullptr;
    if (data == nullptr) return ordinary_->allocate(size);
    auto release = [](void* context) {
      std::unique_ptr<Block> block(static_cast<Block*>(context));
      block->group->heap.release(block->data);
    };
    return {data, new Block{allocating_in, data}, release, at::Device(at::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return ordinary_->raw_deleter(); }

  void copy_data(void* to, const void* from, size_t count) const override {
    ordinary_->copy_data(to, from, count);
  }

 private:
  c10::Allocator* ordinary_;
};

void set_allocating(c10::string_view group_name) {
  static SymmetricAllocator allocator(c10::GetCPUAllocator());
  static bool installed = [] {
    c10::SetCPUAllocator(&allocator, /*priority=*/1);
    return true;
  }();
  (void)installed;
  allocating_in = group_name.empty() ? nullptr : find_group(std::string(group_name));
}

void open_group(c10::string_view group_name, at::TensorList segments, int64_t rank, int64_t slot,
                int64_t piece, int64_t heap, at::IntArrayRef pidfds, double seconds, int64_t spins,
                int64_t yields) {
  std::string name(group_name);
  std::vector<char*> bases;
  for (const auto& segment : segments) bases.push_back(static_cast<char*>(segment.data_ptr()));
  Areas areas{static_cast<size_t>(slot), static_cast<size_t>(piece), static_cast<size_t>(heap)};
  for (const auto& segment : segments) {
    TORCH_CHECK(segment.nbytes() >= areas.size(), "a segment is smaller than its areas");
  }
  auto group = std::make_shared<Group>(
      name, std::move(bases), rank, areas, std::vector<int>(pidfds.begin(), pidfds.end()), seconds,
      Patience{static_cast<int>(spins), static_cast<int>(yields)});
  Entry entry{std::move(group), WeakProcessGroup(c10d::resolve_process_group(name)),
              segments.vec()};
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  table.insert_or_assign(name, std::move(entry));
}

void close_group(c10::string_view group_name) {
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  table.erase(std::string(group_name));
}

Tensor empty_in_group(at::IntArrayRef sizes, at::ScalarType dtype, c10::string_view group_name) {
  auto group = find_group(std::string(group_name));
  TORCH_CHECK_VALUE(group, "group '", group_name, "' has no symmetric memory");
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  char* block = group->heap.allocate(std::max<size_t>(bytes, 1));
  TORCH_CHECK_WITH(OutOfMemoryError, block, "group '", group_name, "' has no room for ", bytes,
                   " bytes beside the ", group->heap.used_bytes(),
                   " in use: free tensors, or make its context with more heap_bytes");
  return at::from_blob(block, sizes, [group](void* data) {
    group->heap.release(static_cast<char*>(data));
  }, at::TensorOptions().dtype(dtype));
}

std::vector<int64_t> stats(c10::string_view group_name) {
  auto group = find_group(std::string(group_name));
  TORCH_CHECK_VALUE(group, "group '", group_name, "' has no symmetric memory");
  const Stats& s = group->stats;
  return {s.one_shot, s.two_shot, s.staged_bytes, s.resident_bytes,
          static_cast<int64_t>(group->heap.used_bytes())};
}

}  // namespace

TORCH_LIBRARY(fixpass_symmetric_memory, m) {
  m.def("open_group(str group_name, Tensor[] segments, int rank, int slot, int piece, int heap, "
        "int[] pidfds, float seconds, int spins, int yields) -> ()", open_group);
  m.def("close_group(str group_name) -> ()", close_group);
  m.def("empty(int[] sizes, ScalarType dtype, str group_name) -> Tensor", empty_in_group);
  m.def("set_allocating(str group_name) -> ()", set_allocating);
  m.def("stats(str group_name) -> int[]", stats);
}

TORCH_LIBRARY_IMPL(fixpass, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("matmul_all_reduce", matmul_all_reduce);
}

}  // namespace fixpass
