"""fold-weights: which values leave the graph, and what stays in it and why."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn.functional import dropout, linear

from fixpass import Config, FixpassError, Report
from fixpass.dynamo_stage import run_entry_passes
from fixpass.testing import f32, text, trace
from helpers.weight_updates import Folds, Reads, compiled, same


def report(module, x, **options):
    """The report of the pass alone on a module's only graph."""
    found = []

    def backend(gm, example_inputs):
        config = Config.resolve({"strict": True, **options})
        found.append(run_entry_passes(gm, example_inputs, config).report)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    return Report(found[0].of_pass("fold-weights"))


@torch.no_grad()
def report_of(module):
    return str(report(module, f32(3, 64)))


def test_a_concatenated_weight_is_an_input_of_its_own():
    def joined(x, module):
        return linear(x, torch.cat([module.gate, module.up]))

    assert_expected_inline(
        text(trace(joined, f32(3, 64), Folds()).graph),
        """\
graph(module_gate: f32[256, 64], module_up: f32[512, 64], x: f32[3, 64], folded_cat: f32[768, 64])
    permute = permute(folded_cat, [1, 0])  f32[64, 768][1, 64]
    mm = mm(x, permute)                    f32[3, 768]
    return mm
""",
    )


def test_views_of_weights_stay_in_the_graph_and_so_do_views_of_what_was_folded():
    def views(x, module):
        joined = torch.cat([module.gate, module.up]).bfloat16()
        return x @ module.turned.t(), x.bfloat16() @ joined.t()

    assert_expected_inline(
        text(trace(views, f32(3, 64), Folds()).graph),
        """\
graph(module_gate: f32[256, 64], module_up: f32[512, 64], module_turned: f32[512, 64], x: f32[3, 64], folded_joined: bf16[768, 64])
    permute = permute(module_turned, [1, 0])              f32[64, 512][1, 64]
    mm = mm(x, permute)                                   f32[3, 512]
    convert_element_type = convert_element_type(x, bf16)  bf16[3, 64]
    permute_1 = permute(folded_joined, [1, 0])            bf16[64, 768][1, 64]
    mm_1 = mm(convert_element_type, permute_1)            bf16[3, 768]
    return mm, mm_1
""",
    )


def test_the_report_says_what_was_done_to_which_weights():
    assert_expected_inline(
        report_of(Folds()),
        """\
fold-weights
    applied folded_contiguous: view, permute, contiguous of tiled kept as f32[32, 4, 16, 16], 131,072 bytes
    applied folded_joined: cat of gate, up kept as f32[768, 64], 196,608 bytes
    applied folded_contiguous_1: t, contiguous of turned kept as f32[64, 512], 131,072 bytes
bytes saved: 917,504
""",
    )


def test_a_weight_that_the_graph_writes_is_missed():
    def counted(scale):
        scale.add_(1)
        return scale.t().contiguous()

    assert_expected_inline(
        report_of(Reads(counted, of_buffer=True)),
        """\
fold-weights
    missed  contiguous: the graph writes into scale
""",
    )


def test_a_value_that_the_graph_writes_is_missed():
    def written(weight):
        turned = weight.t().contiguous()
        turned[0] = 1.0
        return turned

    module = Reads(written)
    assert_expected_inline(
        report_of(module),
        """\
fold-weights
    missed  turned: the graph writes into it
""",
    )
    run = compiled(module)
    for _ in range(2):
        same(run, module, f32(3, 64))


def test_a_value_that_is_written_through_a_view_is_missed():
    def written(weight):
        turned = weight.t().contiguous()
        torch.nn.functional.relu(turned.view(-1), True)
        return turned * 2

    module = Reads(written)
    run = compiled(module)
    for _ in range(2):
        same(run, module, f32(3, 64))
    assert "applied" not in report_of(module)


def test_a_weight_that_shares_memory_with_an_input_that_is_written_is_missed():
    module = Reads(lambda weight: weight.t().contiguous(), of_buffer=True)
    module.register_buffer("cache", module.scale.view(-1))

    def step(x):
        module.cache.add_(1)
        return module(x)

    assert_expected_inline(
        report_of(step),
        """\
fold-weights
    missed  contiguous: the graph writes into scale
""",
    )


def test_a_value_that_is_returned_is_missed_because_its_reader_may_write_into_it():
    def given(x, module):
        return x, module.turned.t().contiguous()[:4]

    module = Folds()
    assert_expected_inline(
        report_of(lambda x: given(x, module)),
        """\
fold-weights
    missed  contiguous: the graph returns it, and the caller may write into it
""",
    )
    run = compiled(lambda x: given(x, module))
    with torch.no_grad():
        run(f32(3, 64))[1].zero_()
    same(run, lambda x: given(x, module), f32(3, 64))


def test_little_work_is_missed():
    assert_expected_inline(
        report_of(Reads(lambda weight: weight.t().contiguous(), 8, 8)),
        """\
fold-weights
    missed  contiguous: 512 bytes are moved: less than keeping the value costs
""",
    )


def test_a_value_that_is_much_larger_than_its_weights_is_missed():
    repeated = Reads(lambda weight: weight.repeat(4, 1))
    assert_expected_inline(
        report_of(repeated),
        """\
fold-weights
    missed  repeat: f32[2048, 64] has 524,288 bytes and its weights have 131,072: it would take 4.0 times their memory
""",
    )


def test_random_numbers_are_missed():
    assert_expected_inline(
        report_of(Reads(lambda weight: dropout(weight, 0.5))),
        """\
fold-weights
    missed  dropout: aten::bernoulli_.float draws random numbers
""",
    )


def test_an_op_of_another_library_is_missed():
    library = torch.library.Library("fold_weights_test", "FRAGMENT")
    library.define("pack(Tensor weight) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("pack", lambda weight: weight.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("fold_weights_test::pack", torch.empty_like, lib=library)
    pack = torch.ops.fold_weights_test.pack
    assert_expected_inline(
        report_of(Reads(pack)),
        """\
fold-weights
    missed  pack: fold_weights_test::pack is an op of another library, which may depend on more than its inputs
""",
    )


def test_a_weight_made_in_inference_mode_is_missed():
    with torch.inference_mode():
        module = Reads(lambda weight: weight.t().contiguous())
        found = report_of(module)
    assert_expected_inline(
        found,
        """\
fold-weights
    missed  contiguous: weight was made in inference mode, where torch counts no writes
""",
    )


def test_autocast_is_missed():
    module = Reads(lambda weight: weight.t().contiguous())
    with torch.autocast("cpu"):
        found = report_of(module)
    assert_expected_inline(
        found,
        """\
fold-weights
    missed  contiguous: autocast is on, which changes what its operations give
""",
    )


def test_a_weight_in_training_is_missed_and_gets_its_gradient():
    module = Folds()
    assert_expected_inline(
        str(report(module, f32(3, 64))),
        """\
fold-weights
    missed  contiguous: training: tiled gets a gradient through it
    missed  joined: training: gate gets a gradient through it
    missed  contiguous_1: training: turned gets a gradient through it
""",
    )
    x, gradients = f32(3, 64), []
    for run in (compiled(module), module):
        sum(out.sum() for out in run(x)).backward()
        gradients.append([p.grad for p in module.parameters()])
        module.zero_grad()
    torch.testing.assert_close(*gradients)


def test_a_frozen_weight_in_training_is_folded():
    module = Folds().requires_grad_(False)
    x = f32(3, 64).requires_grad_()
    assert len(report(module, x).of_kind("applied")) == 3
    outs = compiled(module)(x)
    torch.testing.assert_close(outs, module(x))
    sum(out.sum() for out in outs).backward()
    got, x.grad = x.grad, None
    sum(out.sum() for out in module(x)).backward()
    torch.testing.assert_close(got, x.grad)


def test_off_leaves_everything_in_the_graph():
    with torch.no_grad():
        assert not report(Folds(), f32(3, 64), fold_weights="off").remarks
    with pytest.raises(FixpassError, match='"cache", "restride" or "off"'):
        Config.resolve({"fold_weights": "always"})
