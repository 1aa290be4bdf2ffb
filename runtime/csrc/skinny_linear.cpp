// The operators fixpass::skinny_linear, _linears and _experts for CPU tensors: x of few rows by plain
// weights, at the speed at which memory gives the weights.
//
// Nothing is packed but x. Each output is summed by one thread in an order that depends on K alone,
// so that neither the number of threads nor that of rows changes a bit. Operands that the kernel
// does not take go to torch. Their schemas are defined in Python.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#if __has_include(<Python.h>)
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#endif

#include "skinny_linear/columns.h"
#include "skinny_linear/rows.h"

namespace fixpass {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A thread is woken for at least as many bytes of weights.
constexpr int64_t kLeastBytes = 64 << 10;

// How weights of one order are multiplied: in groups of `group` rows or columns, x in whole `step`s.
struct Form {
  bool by_rows;
  int64_t group, step;
  void (*pack)(const void* x, int64_t pitch, const Work& work, void* packed);
  void (*multiply)(const Work& work, const Matrix& matrix, int64_t begin, int64_t end);
};

struct Kernel {
  Form rows, columns;
};

template <class InRows, class InColumns>
constexpr Kernel kKernel = {
    {true, InRows::kRows, InRows::kStep, pack_for_rows<InRows>, multiply_groups<InRows>},
    {false, kColumnVectors<InColumns> * InColumns::kStep, 1, pack_for_columns<InColumns>,
     multiply_columns<InColumns>}};

const Kernel* kernel_of(at::ScalarType dtype) {
  if (dtype == at::kFloat) return &kKernel<Float32, Float32>;
  if (dtype == at::kBFloat16) return &kKernel<DotBfloat16, Bfloat16>;
#ifdef FIXPASS_HALF
  if (dtype == at::kHalf) return &kKernel<Float16, Float16>;
#endif
  return nullptr;
}

// Whether the kernel would lose a derivative, which torch keeps.
bool records_gradient(const Tensor& tensor) {
  return (tensor.requires_grad() && at::GradMode::is_enabled()) || tensor._fw_grad(0).defined();
}

// How the kernel takes a weight (K, N), or nothing where torch has to.
const Form* form_of(const Kernel& kernel, const Tensor& weight) {
  const int64_t depth = weight.size(0), size = weight.size(1);
  if (weight.stride(0) == 1 && (weight.stride(1) >= depth || size == 1)) return &kernel.rows;
  if (weight.stride(1) == 1 && (weight.stride(0) >= size || depth == 1)) return &kernel.columns;
  return nullptr;
}

const Form* form_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (x.dim() != 2 || weight.dim() != 2 || x.size(0) < 1 || x.size(0) > kMaxRows) return nullptr;
  if (x.size(1) != weight.size(0) || weight.numel() == 0) return nullptr;
  const Kernel* kernel = kernel_of(x.scalar_type());
  if (!kernel || weight.scalar_type() != x.scalar_type() || records_gradient(x)) return nullptr;
  if (!weight.device().is_cpu() || records_gradient(weight)) return nullptr;
  if (bias && (bias->dim() != 1 || bias->size(0) != weight.size(1) || !bias->device().is_cpu() ||
               bias->scalar_type() != x.scalar_type() || records_gradient(*bias))) {
    return nullptr;
  }
  return form_of(*kernel, weight);
}

// Memory of this thread for x, at addresses that vectors can be loaded from.
void* scratch(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes + kAlign) {
    memory.reset(new char[bytes + kAlign]);
    size = bytes + kAlign;
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (kAlign - address % kAlign) % kAlign;
}

// Whether no derivative can be asked for, so that torch's kernels need no other dispatch.
bool is_plain(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return !records_gradient(x) && !records_gradient(weight) && weight.device().is_cpu() &&
         (!bias || !records_gradient(*bias));
}

// As torch computes it.
Tensor ordinary(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (!is_plain(x, weight, bias)) return bias ? at::addmm(*bias, x, weight) : at::mm(x, weight);
  return bias ? at::cpu::addmm(*bias, x, weight) : at::cpu::mm(x, weight);
}

Tensor& ordinary_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     Tensor& out) {
  if (!is_plain(x, weight, bias) || records_gradient(out) || !out.device().is_cpu()) {
    return bias ? at::addmm_out(out, *bias, x, weight) : at::mm_out(out, x, weight);
  }
  return bias ? at::cpu::addmm_out(out, *bias, x, weight) : at::cpu::mm_out(out, x, weight);
}

Matrix matrix_of(const Form& form, const Tensor& weight, const OptionalTensor& bias,
                 const Tensor& out) {
  return {weight.const_data_ptr(),
          weight.size(1),
          weight.stride(form.by_rows ? 1 : 0),
          bias ? bias->const_data_ptr() : nullptr,
          bias ? bias->stride(0) : 0,
          out.mutable_data_ptr()};
}

// All matrices, which are of one form, in one parallel region.
void multiply(const Form& form, const Tensor& x, c10::ArrayRef<Matrix> matrices) {
  const int64_t rows = x.size(0), depth = x.size(1);
  Work work{nullptr, rows, depth, (depth + form.step - 1) / form.step * form.step,
            static_cast<int>((rows + kTileRows - 1) / kTileRows)};
  void* packed = scratch(rows * work.padded * int64_t(sizeof(float)));
  form.pack(x.const_data_ptr(), x.stride(0), work, packed);
  work.x = packed;
  int64_t total = 0;
  for (const auto& matrix : matrices) total += (matrix.size + form.group - 1) / form.group;
  const int64_t bytes = form.group * depth * x.element_size();
  const int64_t grain = std::max<int64_t>(1, (kLeastBytes + bytes - 1) / bytes);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const auto& matrix : matrices) {
      const int64_t count = (matrix.size + form.group - 1) / form.group;
      const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, count);
      if (from < to) form.multiply(work, matrix, from, to);
      first += count;
    }
  });
}

std::vector<Tensor> skinny_linears(const Tensor& input, at::TensorList weights,
                                   const c10::List<OptionalTensor>& biases) {
  TORCH_CHECK_VALUE(biases.size() == weights.size(), "fixpass::skinny_linears: ", weights.size(),
                    " weights and ", biases.size(), " biases");
  std::vector<const Form*> forms;
  for (size_t i = 0; i < weights.size(); ++i) forms.push_back(form_of(input, weights[i], biases.get(i)));
  std::vector<Tensor> results(weights.size());
  Tensor x;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (results[i].defined()) continue;
    if (!forms[i]) {
      results[i] = ordinary(input, weights[i], biases.get(i));
      continue;
    }
    if (!x.defined()) x = input.stride(1) == 1 || input.size(1) == 1 ? input : input.contiguous();
    std::vector<Matrix> matrices;
    for (size_t j = i; j < weights.size(); ++j) {
      if (forms[j] != forms[i]) continue;
      results[j] = at::empty({x.size(0), weights[j].size(1)}, x.options());
      matrices.push_back(matrix_of(*forms[j], weights[j], biases.get(j), results[j]));
    }
    multiply(*forms[i], x, matrices);
  }
  return results;
}

void multiply_one(const Form& form, const Tensor& input, const Tensor& weight,
                  const OptionalTensor& bias, const Tensor& out) {
  const Tensor x = input.stride(1) == 1 || input.size(1) == 1 ? input : input.contiguous();
  multiply(form, x, matrix_of(form, weight, bias, out));
}

Tensor skinny_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Form* form = form_of(input, weight, bias);
  if (!form) return ordinary(input, weight, bias);
  Tensor out = at::empty({input.size(0), weight.size(1)}, input.options());
  multiply_one(*form, input, weight, bias, out);
  return out;
}

Tensor& skinny_linear_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          Tensor& out) {
  at::assert_no_overlap(out, input);
  at::assert_no_overlap(out, weight);
  if (bias) at::assert_no_overlap(out, *bias);
  const bool fits = out.is_contiguous() && out.scalar_type() == input.scalar_type() &&
                        out.device().is_cpu() && !records_gradient(out) && out.dim() == 2 &&
                        out.size(0) == input.size(0) && out.size(1) == weight.size(-1);
  const Form* form = fits ? form_of(input, weight, bias) : nullptr;
  if (!form) return ordinary_out(input, weight, bias, out);
  multiply_one(*form, input, weight, bias, out);
  return out;
}

// x (S, K), sorted by expert, by weight (E, K, N): expert e has the rows of x up to ends[e].
Tensor skinny_experts(const Tensor& x, const Tensor& weight, const Tensor& ends) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 3 && ends.dim() == 1 &&
                        x.size(1) == weight.size(1) && ends.size(0) == weight.size(0),
                    "fixpass::skinny_experts: x ", x.sizes(), " by weight ", weight.sizes(),
                    " with ends ", ends.sizes(), ": needs (S, K), (E, K, N) and (E)");
  TORCH_CHECK_VALUE(is_plain(x, weight, {}), "fixpass::skinny_experts: computes no gradient");
  const int64_t rows = x.size(0);
  // Rows behind the last expert's are zero.
  Tensor out = at::zeros({rows, weight.size(2)}, x.options());
  const Tensor given = ends.to(at::kLong).contiguous();
  const int64_t* end = given.const_data_ptr<int64_t>();
  for (int64_t expert = 0, row = 0; expert < weight.size(0); row = end[expert++]) {
    const int64_t count = end[expert] - row;
    TORCH_CHECK_VALUE(count >= 0 && end[expert] <= rows, "fixpass::skinny_experts: rows of expert ",
                      expert, " are ", row, " to ", end[expert], " of ", rows);
    if (count == 0) continue;
    Tensor part = out.narrow(0, row, count);
    skinny_linear_out(x.narrow(0, row, count), weight.select(0, expert), {}, part);
  }
  return out;
}

#if __has_include(<Python.h>)
// skinny_linear.out for generated code: (x, weight, bias, out=out). The dispatcher would parse the
// arguments against the schema, which takes longer than a small layer.
PyObject* call_from_python(PyObject*, PyObject* const* args, Py_ssize_t, PyObject*) {
  HANDLE_TH_ERRORS
  const Tensor &x = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const OptionalTensor bias =
      args[2] == Py_None ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(args[2]));
  Tensor out = THPVariable_Unpack(args[3]);
  pybind11::gil_scoped_release no_gil;
  skinny_linear_out(x, weight, bias, out);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef function{"skinny_linear_out", reinterpret_cast<PyCFunction>(call_from_python),
                     METH_FASTCALL | METH_KEYWORDS, nullptr};
#endif

}  // namespace

#if __has_include(<Python.h>)
extern "C" PyObject* skinny_linear_function() { return PyCFunction_New(&function, nullptr); }
#endif

TORCH_LIBRARY_IMPL(fixpass, CPU, m) {
  m.impl("skinny_linear", skinny_linear);
  m.impl("skinny_linear.out", skinny_linear_out);
  m.impl("skinny_linears", skinny_linears);
  m.impl("skinny_experts", skinny_experts);
}

}  // namespace fixpass
