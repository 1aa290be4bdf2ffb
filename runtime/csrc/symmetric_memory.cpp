// The operators fixpass::all_reduce and fixpass::matmul_all_reduce for CPU tensors.
//
// Python defines their schemas, and their kernels for groups without symmetric memory. This file
// finds a group by its name while its process group lives: a group of the same name that is made
// later is another one.
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <memory>
#include <shared_mutex>
#include <unordered_map>

#include "symmetric_memory/group.h"

namespace fixpass {
namespace {

using at::Tensor;
using WeakProcessGroup = c10::weak_intrusive_ptr<c10d::ProcessGroup>;

struct Entry {
  std::shared_ptr<Group> group;
  WeakProcessGroup process_group;
};

// Never destroyed: when the process ends, Python has closed the groups that it opened.
std::shared_mutex& table_mutex = *new std::shared_mutex;
auto& table = *new std::unordered_map<std::string, Entry>;

// What the process group of that name has here, or null where it has no symmetric memory (yet).
// Several names may stand for one process group.
std::shared_ptr<Group> find_group(const std::string& name) {
  const auto process_group = c10d::resolve_process_group(name);
  std::shared_lock<std::shared_mutex> lock(table_mutex);
  auto entry = table.find(process_group->getGroupName());
  if (entry == table.end() || entry->second.process_group.lock() != process_group) return nullptr;
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

Message message_of(const Tensor& tensor, c10::string_view op) {
  Message message{tensor.numel(), -1, static_cast<int32_t>(tensor.scalar_type()),
                  static_cast<int32_t>(tensor.dim()), op == "sum", {}, 0};
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i < kMaxDims) {
      message.sizes[i] = sizes[i];
    } else {  // FNV-1a, a size at a time
      message.more_sizes = ((message.more_sizes ^ 0xcbf29ce484222325) + sizes[i]) * 0x100000001b3;
    }
  }
  return message;
}

// Through the process group, as if fixpass were not there. Called with boxed arguments: torch's
// releases differ in the C++ types of these operators.
Tensor process_group_all_reduce(const Tensor& input, c10::string_view op, c10::string_view group) {
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto reduce = dispatcher.findSchemaOrThrow("_c10d_functional::all_reduce", "");
  static auto wait = dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  torch::jit::Stack stack{input, std::string(op), std::string(group)};
  reduce.callBoxed(&stack);
  wait.callBoxed(&stack);
  return stack.back().toTensor();
}

// Summed in the group's memory, into `out` or else a tensor of its own; undefined where the group
// cannot do that and all ranks have seen so.
Tensor reduce_with(Group& group, const Tensor& input, c10::string_view op, Tensor out = {}) {
  const Message message = message_of(input, op);
  if (!message.sums || !Group::can_sum(input.scalar_type())) {
    group.compare(message);
    return {};
  }
  if (!out.defined()) out = at::empty(input.sizes(), input.options());
  group.all_reduce(input.const_data_ptr(), out.mutable_data_ptr(), message);
  return out;
}

Tensor all_reduce(const Tensor& input, c10::string_view op, c10::string_view group_name) {
  Tensor dense = input.contiguous();
  if (auto group = ready_group(std::string(group_name))) {
    Tensor out = translate_errors([&] {
      auto lock = group->enter();
      return reduce_with(*group, dense, op);
    });
    if (out.defined()) return out;
  }
  return process_group_all_reduce(dense, op, group_name);
}

// The same in place: nothing is allocated where x is dense.
Tensor& all_reduce_(Tensor& x, c10::string_view op, c10::string_view group_name) {
  auto group = x.is_contiguous() ? ready_group(std::string(group_name)) : nullptr;
  if (group) {
    const Tensor out = translate_errors([&] {
      auto lock = group->enter();
      return reduce_with(*group, x, op, x);
    });
    if (out.defined()) return x;
  }
  return x.copy_(all_reduce(x, op, group_name));
}

// A tensor over a block of the group's heap, which gets it back when the tensor is gone.
Tensor tensor_over(const std::shared_ptr<Group>& group, char* block, at::IntArrayRef sizes,
                   const at::TensorOptions& options) {
  return at::from_blob(block, sizes, [group](void* data) {
    group->heap.release(static_cast<char*>(data));
  }, options);
}

// A tensor in the group's memory for a message of these sizes; undefined where there is no room.
// A small one is the next slot itself.
Tensor allocate_message(const std::shared_ptr<Group>& group, at::IntArrayRef sizes,
                        const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (group->is_small(bytes)) return at::from_blob(group->next_slot(), sizes, options);
  char* block = group->heap.allocate(bytes);
  return block == nullptr ? Tensor() : tensor_over(group, block, sizes, options);
}

// The product as `skinny_linear.out` computes it, where this process has loaded that kernel.
bool multiply_few_rows_into(Tensor& out, const Tensor& a, const Tensor& b,
                            const std::optional<Tensor>& bias) {
  using Linear = Tensor&(const Tensor&, const Tensor&, const std::optional<Tensor>&, Tensor&);
  const auto op = c10::Dispatcher::singleton().findSchema({"fixpass::skinny_linear", "out"});
  if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return false;
  op->typed<Linear>().call(a, b, bias, out);
  return true;
}

void multiply_into(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                   const at::Scalar& beta, const at::Scalar& alpha) {
  const bool is_vector = !bias || bias->dim() == 1;
  if (a.dim() == 2 && is_vector && beta.equal(1) && alpha.equal(1) &&
      multiply_few_rows_into(out, a, b, bias)) {
    return;
  }
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
  Tensor product, out;
  if (group) {
    out = translate_errors([&] {
      auto lock = group->enter();
      product = allocate_message(group, sizes, a.options());
      const bool resident = product.defined();
      if (!resident) product = at::empty(sizes, a.options());
      multiply_into(product, a, b, bias, beta, alpha);
      return reduce_with(*group, product, op, resident ? Tensor() : product);
    });
    if (out.defined()) return out;
    product = product.clone();  // out of the slot, which the next call writes
  } else {
    product = at::empty(sizes, a.options());
    multiply_into(product, a, b, bias, beta, alpha);
  }
  return process_group_all_reduce(product, op, group_name);
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

// Begin to allocate in a group, or end with an empty name; false where this thread already does.
bool set_allocating(c10::string_view group_name) {
  static SymmetricAllocator allocator(c10::GetCPUAllocator());
  static bool installed = [] {
    c10::SetCPUAllocator(&allocator, /*priority=*/1);
    return true;
  }();
  if (!group_name.empty() && allocating_in) return false;
  allocating_in = group_name.empty() ? nullptr : find_group(std::string(group_name));
  return installed;
}

void open_group(c10::string_view group_name, at::TensorList segments, int64_t rank, int64_t slot,
                int64_t piece, int64_t heap, at::IntArrayRef pidfds, double seconds, int64_t spins,
                int64_t yields) {
  std::string name(group_name);
  Areas areas{static_cast<size_t>(slot), static_cast<size_t>(piece), static_cast<size_t>(heap)};
  for (const auto& segment : segments) {
    TORCH_CHECK(segment.nbytes() >= areas.size(), "a segment is smaller than its areas");
  }
  Entry entry{std::make_shared<Group>(
                  name, segments.vec(), rank, areas,
                  std::vector<int>(pidfds.begin(), pidfds.end()), seconds,
                  Patience{static_cast<int>(spins), static_cast<int>(yields)}),
              WeakProcessGroup(c10d::resolve_process_group(name))};
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  table.insert_or_assign(name, std::move(entry));
}

void close_group(c10::string_view group_name) {
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  auto entry = table.find(std::string(group_name));
  if (entry == table.end()) return;
  entry->second.group->leave();
  table.erase(entry);
}

Tensor empty_in_group(at::IntArrayRef sizes, at::ScalarType dtype, c10::string_view group_name) {
  auto group = find_group(std::string(group_name));
  TORCH_CHECK_VALUE(group, "group '", group_name, "' has no symmetric memory");
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  char* block = group->heap.allocate(std::max<size_t>(bytes, 1));
  TORCH_CHECK_WITH(OutOfMemoryError, block, "group '", group_name, "' has no room for ", bytes,
                   " bytes beside the ", group->heap.used_bytes(),
                   " in use: free tensors, or make its context with more heap_bytes");
  return tensor_over(group, block, sizes, at::TensorOptions().dtype(dtype));
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
  m.def("set_allocating(str group_name) -> bool", set_allocating);
  m.def("stats(str group_name) -> int[]", stats);
}

TORCH_LIBRARY_IMPL(fixpass, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("all_reduce_", all_reduce_);
  m.impl("matmul_all_reduce", matmul_all_reduce);
}

}  // namespace fixpass
