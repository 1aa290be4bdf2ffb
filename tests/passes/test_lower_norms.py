"""lower-norms: what Inductor compiles becomes ordinary operations, with the strides recorded."""

import torch
from expecttest import assert_expected_inline

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass import Pipeline
from fixpass.lowering.target import CPU, Target
from fixpass.passes import default_passes
from fixpass.passes.lower_norms import LowerNorms
from fixpass.testing import bf16, text, trace


def norm(x, weight):
    return torch.ops.fixpass.rms_norm(x, weight, None, 1e-6, norm_dtype=torch.bfloat16)


def test_an_op_for_inductor_becomes_the_reference():
    gm = trace(norm, bf16(5, 128), bf16(128))
    Pipeline(default_passes(CPU), verify=True, strict=True).run(gm.graph)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(x: bf16[5, 128], weight: bf16[128])
    convert_element_type = convert_element_type(x, f32)       f32[5, 128]
    pow_1 = pow.Tensor_Scalar(convert_element_type, 2)        f32[5, 128]
    mean = mean.dim(pow_1, [-1], True)                        f32[5, 1]
    add = add.Tensor(mean, 1e-06)                             f32[5, 1]
    rsqrt = rsqrt(add)                                        f32[5, 1]
    mul = mul.Tensor(convert_element_type, rsqrt)             f32[5, 128]
    convert_element_type_1 = convert_element_type(mul, bf16)  bf16[5, 128]
    mul_1 = mul.Tensor(convert_element_type_1, weight)        bf16[5, 128]
    return mul_1
""",
    )


def test_an_op_for_another_kernel_stays_one_op():
    gm = trace(norm, bf16(5, 128), bf16(128))
    ours = Target("cuda:sm_90", "cuda", ("strided_rms_norm", "inductor"))
    Pipeline(default_passes(ours), verify=True, strict=True).run(gm.graph)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(x: bf16[5, 128], weight: bf16[128])
    rms_norm = fixpass.rms_norm(x, weight, None, 1e-06, norm_dtype=bf16, kernel_name='strided_rms_norm')  bf16[5, 128]
    return rms_norm
""",
    )


def test_an_op_without_a_chosen_kernel_is_left_alone():
    gm = trace(norm, bf16(5, 128), bf16(128))
    report = Pipeline((LowerNorms(),), verify=True, strict=True).run(gm.graph)
    assert report.remarks == ()
    assert "fixpass.rms_norm" in text(gm.graph)


def test_an_order_of_dimensions_is_kept_by_a_copy_where_it_must():
    def ordered(x, weight):
        return torch.ops.fixpass.rms_norm(x, weight, None, 1e-6, order=[1, 0, 2])

    gm = trace(ordered, bf16(2, 3, 64), bf16(64))
    Pipeline(default_passes(CPU), verify=True, strict=True).run(gm.graph)
    assert_expected_inline(
        text(gm.graph),
        """\
graph(x: bf16[2, 3, 64], weight: bf16[64])
    convert_element_type = convert_element_type(x, f32)         f32[2, 3, 64]
    pow_1 = pow.Tensor_Scalar(convert_element_type, 2)          f32[2, 3, 64]
    mean = mean.dim(pow_1, [-1], True)                          f32[2, 3, 1]
    add = add.Tensor(mean, 1e-06)                               f32[2, 3, 1]
    rsqrt = rsqrt(add)                                          f32[2, 3, 1]
    mul = mul.Tensor(convert_element_type, rsqrt)               f32[2, 3, 64]
    mul_1 = mul.Tensor(mul, weight)                             f32[2, 3, 64]
    convert_element_type_1 = convert_element_type(mul_1, bf16)  bf16[2, 3, 64]
    permute = permute(convert_element_type_1, [1, 0, 2])        bf16[3, 2, 64][64, 192, 1]
    clone = clone(permute, memory_format=contiguous_format)     bf16[3, 2, 64]
    permute_1 = permute(clone, [1, 0, 2])                       bf16[2, 3, 64][64, 128, 1]
    return permute_1
""",
    )


def test_sites_of_one_kind_are_traced_once_and_each_gets_its_own_results():
    def two(x, weight, y):
        return norm(x, weight), norm(y, weight), norm(x, weight * 2)

    gm = trace(two, bf16(5, 128), bf16(128), bf16(5, 128))
    Pipeline(default_passes(CPU), verify=True, strict=True).run(gm.graph)
    # What a norm computes inside is read by nothing else, and its record may be shared.
    vals = [id(n.meta["val"]) for n in gm.graph.output_node().all_input_nodes]
    assert len(vals) == len(set(vals))
    x, y, weight = bf16(5, 128), bf16(5, 128), bf16(128)
    gm.recompile()
    torch.testing.assert_close(gm(x, weight, y), two(x, weight, y), rtol=0, atol=0)
