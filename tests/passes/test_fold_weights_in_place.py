"""fold-weights in mode "restride": weights stored in another order, and what keeps them as they are."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import embedding, linear

import fixpass
from fixpass import Config, Report
from fixpass.dynamo_stage import run_entry_passes
from fixpass.runtime.versions import GUARDS_WEIGHT_SHAPES, torch_version
from fixpass.testing import f32
from helpers.compiling import compiled_anew
from helpers.weight_updates import COUNTED, EAGER, UNCOUNTED, Folds, Reads, same

IN_PLACE = EAGER | {"fold_weights": "restride"}


def turned(weight):
    return weight.t().contiguous()


def compiled(module, **options):
    return compiled_anew(module, **(IN_PLACE | options))


@torch.no_grad()
def reports_of(module, x=None):
    """What the pass says in the first trace of a module, and in the one after a restart."""
    found = []

    def backend(gm, example_inputs):
        entry = run_entry_passes(
            gm, example_inputs, Config.resolve({"fold_weights": "restride"}), may_restride=True
        )
        found.append(str(Report(entry.report.of_pass("fold-weights"))))
        entry.retrace_if_restrided()
        return entry.bind_inputs(entry.gm)

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(f32(3, 64) if x is None else x)
    return "".join(found)


def test_a_transposed_weight_is_stored_so_that_its_transpose_is_a_view():
    module = Folds()
    assert_expected_inline(
        reports_of(module),
        """\
fold-weights
    applied contiguous_1: turned is stored in the order (1, 0): t, contiguous is a view of it
bytes saved: 262,144
fold-weights
    applied folded_contiguous: view, permute, contiguous of tiled kept as f32[32, 4, 16, 16], 131,072 bytes; not in place: no order of its dimensions makes it a view
    applied folded_joined: cat of gate, up kept as f32[768, 64], 196,608 bytes; not in place: it has several weights
bytes saved: 655,360
""",
    )
    assert module.turned.stride() == (1, 512)


def test_the_parameter_stays_the_object_that_it_was_at_the_address_that_it_had():
    module = Reads(turned)
    weight, module.weight.loader = module.weight, str
    values, address = weight.detach().clone(), weight.data_ptr()
    same(compiled(module), module, f32(3, 64))
    assert module.weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert weight.loader is str
    torch.testing.assert_close(weight.detach(), values, rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict()["weight"], values, rtol=0, atol=0)
    assert weight.stride() == (1, 512)


@torch.no_grad()
def test_a_view_that_needs_row_major_strides_names_reshape_and_works_after_data_is_set():
    module, x = Reads(turned), f32(3, 64)
    flat, run = module.weight.flatten().clone(), compiled(module)
    same(run, module, x)
    with pytest.raises(RuntimeError, match=r"view size is not compatible.*Use \.reshape"):
        module.weight.view(-1)
    torch.testing.assert_close(module.weight.reshape(-1), flat, rtol=0, atol=0)
    module.weight.data = module.weight.contiguous()
    module.weight.view(-1).mul_(2)
    torch.testing.assert_close(module.weight.view(-1), 2 * flat, rtol=0, atol=0)
    same(run, module, x)


def test_a_stack_of_experts_is_turned_within_each_expert():
    module = Reads(lambda weight: weight.transpose(1, 2).contiguous(), 8, 128, 64)
    assert_expected_inline(
        reports_of(module),
        """\
fold-weights
    applied contiguous: weight is stored in the order (0, 2, 1): transpose, contiguous is a view of it
bytes saved: 524,288

""",
    )


def test_a_weight_that_is_read_as_it_is_too_is_not_touched():
    module = Folds()

    def tied(x):
        rows = embedding((x[:, 0] > 0).long(), module.turned)
        return rows @ x.t(), x @ module.turned.t().contiguous()

    assert_expected_inline(
        reports_of(tied),
        """\
fold-weights
    applied folded_contiguous: t, contiguous of turned kept as f32[64, 512], 131,072 bytes; not in place: turned is read as it is, too, by rows
bytes saved: 262,144
""",
    )
    assert module.turned.is_contiguous()


def test_a_weight_whose_memory_others_see_is_not_touched():
    whole = torch.randn(2, 512, 64)
    part, held, folder = Reads(turned), Reads(turned), Reads(turned)
    part.weight = nn.Parameter(whole[0])
    state = held.state_dict()
    folder.weight.data.share_memory_()
    assert_expected_inline(
        reports_of(part) + reports_of(held) + reports_of(folder),
        """\
fold-weights
    applied folded_contiguous: t, contiguous of weight kept as f32[64, 512], 131,072 bytes; not in place: weight: it is a part of a larger storage
bytes saved: 262,144
fold-weights
    applied folded_contiguous: t, contiguous of weight kept as f32[64, 512], 131,072 bytes; not in place: weight: another tensor shares its memory
bytes saved: 262,144
fold-weights
    applied folded_contiguous: t, contiguous of weight kept as f32[64, 512], 131,072 bytes; not in place: weight: other processes share its memory
bytes saved: 262,144
""",
    )
    assert part.weight.is_contiguous()
    assert state["weight"].is_contiguous()


def test_explain_touches_no_weight_and_says_what_could_be():
    module = Reads(turned)
    with torch.no_grad():
        found = fixpass.explain(module, f32(3, 64), options={"fold_weights": "restride"})
    assert_expected_inline(
        str(Report(found.of_pass("fold-weights"))),
        """\
fold-weights
    applied folded_contiguous: t, contiguous of weight kept as f32[64, 512], 131,072 bytes; a weight stored in the order (1, 0) would make it a view
bytes saved: 262,144
""",
    )
    assert module.weight.is_contiguous()


def test_a_weight_in_training_is_not_touched():
    module = Folds()
    run = compiled(module)
    run(f32(3, 64))
    assert module.turned.is_contiguous()


@pytest.mark.parametrize(
    "update", [*COUNTED.values(), *UNCOUNTED.values()], ids=[*COUNTED, *UNCOUNTED]
)
def test_a_call_after_an_update_sees_the_new_weights(update):
    module, x = Folds(), f32(3, 64)
    run = compiled(module)
    for _ in range(2):
        same(run, module, x)
        update(module)
        same(run, module, x)


def test_weights_that_are_replaced_again_and_again_by_row_major_ones_compile_once_more():
    module, x = Reads(turned), f32(3, 64)
    run = compiled(module)
    same(run, module, x)
    compiles = counters["stats"]["unique_graphs"]
    for _ in range(12):
        module.weight.data = torch.randn(512, 64)
        same(run, module, x)
    # Without the guard the code of a row-major weight is taken again, and the copy is made anew.
    once_more = torch_version() >= GUARDS_WEIGHT_SHAPES
    assert counters["stats"]["unique_graphs"] == compiles + once_more


def test_modules_that_share_a_graph_compile_once_more_at_most():
    blocks = [Folds() for _ in range(12)]
    x = f32(3, 64)
    runs = [compiled(block) for block in blocks[:1]] + [
        torch.compile(block, backend="fixpass", options=IN_PLACE, fullgraph=True)
        for block in blocks[1:]
    ]
    compiles = counters["stats"]["unique_graphs"]
    for run, block in zip(runs, blocks, strict=True):
        same(run, block, x)
    assert counters["stats"]["unique_graphs"] <= compiles + 2


def test_out_of_fuel_no_weight_is_touched():
    module = Reads(turned)
    same(compiled(module, fuel=0), module, f32(3, 64))
    assert module.weight.is_contiguous()


@pytest.mark.inductor
def test_through_inductor_with_dynamic_sizes():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(512, 64))
            self.other = nn.Linear(64, 512)

        def forward(self, x):
            return x @ self.weight.t().contiguous() + linear(x, self.other.weight)

    module = Turned()
    torch._dynamo.reset()
    run = torch.compile(
        module, backend="fixpass", options={"fold_weights": "restride"}, dynamic=True
    )
    for rows in (2, 5):
        same(run, module, f32(rows, 64))
    assert module.weight.stride() == (1, 512)
