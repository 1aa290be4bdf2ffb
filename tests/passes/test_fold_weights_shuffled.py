"""fold-weights and `fixpass::shuffle_weight`: kept beside a weight, or the folded weight itself."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import linear

import fixpass
from fixpass import Report, weights
from fixpass.testing import f32
from helpers.compiling import compiled_anew
from helpers.weight_updates import COUNTED, EAGER, UNCOUNTED, same


class Shuffled(nn.Module):
    """A linear layer whose kernel would read tiles; here the tiles are taken for a plain weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 64))

    def forward(self, x):
        return linear(x, weights.shuffle_weight(self.weight, "aiter_16x16"))


def compiled(module, **options):
    return compiled_anew(module, **(EAGER | options))


@torch.no_grad()
def report_of(module, fold):
    torch._dynamo.reset()
    found = fixpass.explain(module, f32(3, 64), options={"fold_weights": fold})
    return str(Report(found.of_pass("fold-weights")))


def test_a_shuffled_weight_is_kept_beside_the_weight():
    assert_expected_inline(
        report_of(Shuffled(), "cache"),
        """\
fold-weights
    applied folded_result: fixpass.shuffle_weight of weight kept as f32[512, 64], 131,072 bytes
bytes saved: 262,144
""",
    )


def test_in_place_the_report_names_the_call_that_folds_the_weight_itself():
    assert_expected_inline(
        report_of(Shuffled(), "restride"),
        """\
fold-weights
    applied folded_result: fixpass.shuffle_weight of weight kept as f32[512, 64], 131,072 bytes; not in place: only its module can show logical values: fixpass.weights.set_layouts(model, {'weight': 'aiter_16x16'}) folds it there
bytes saved: 262,144
""",
    )


def test_of_a_folded_weight_nothing_is_kept():
    module = Shuffled()
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    assert_expected_inline(
        report_of(module, "cache"),
        """\
fold-weights
    applied folded_result: weight is folded into aiter_16x16 itself: nothing is kept beside it
bytes saved: 262,144
""",
    )


@torch.no_grad()
def test_folding_and_unfolding_a_weight_change_no_result_and_compile_nothing():
    module, x = Shuffled(), f32(3, 64)
    run = compiled(module)
    wanted = run(x)
    compiles = counters["stats"]["unique_graphs"]
    for _ in range(2):
        for change in (
            lambda: weights.set_layouts(module, {"weight": "aiter_16x16"}),
            lambda: weights.reset_layouts(module),
        ):
            change()
            torch.testing.assert_close(run(x), wanted, rtol=0, atol=0)
            same(run, module, x)
    assert counters["stats"]["unique_graphs"] == compiles


@torch.no_grad()
def test_unfolding_a_weight_that_was_folded_when_its_graph_was_compiled_writes_nothing_into_it():
    module, x = Shuffled(), f32(3, 64)
    values = module.weight.detach().clone()
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    run = compiled(module)
    wanted = run(x)
    weights.reset_layouts(module)
    torch.testing.assert_close(run(x), wanted, rtol=0, atol=0)
    assert torch.equal(module.weight, values)


@torch.no_grad()
def test_updates_of_a_folded_weight_are_those_of_its_logical_values():
    module, x = Shuffled(), f32(3, 64)
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    # Eager's own matmul, so that equal weights give equal bits.
    run = compiled(module, linear="inductor")
    plain = Shuffled()
    for step in range(3):
        values = torch.randn(512, 64)
        if step == 0:
            module.load_state_dict({"weight": values})
        elif step == 1:
            with weights.update(module) as update:
                update.load("weight", values)
        else:
            with weights.checkpoint_layout([module.weight]):
                module.weight.copy_(values)
        plain.weight.copy_(values)
        torch.testing.assert_close(run(x), plain(x), rtol=0, atol=0)
        assert torch.equal(module.state_dict()["weight"], values)


@pytest.mark.parametrize(
    "update", [*COUNTED.values(), *UNCOUNTED.values()], ids=[*COUNTED, *UNCOUNTED]
)
@torch.no_grad()
def test_a_call_after_an_update_of_an_unfolded_weight_sees_it(update):
    module, x = Shuffled(), f32(3, 64)
    run = compiled(module, fold_weights="restride")
    same(run, module, x)
    with torch.enable_grad():
        update(module)
    same(run, module, x)
