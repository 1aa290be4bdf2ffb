"""What a caller chooses: renames, slices, casts, what raises, what is filled, what is shown."""

import pytest
import torch
from torch import nn

from fixpass import FixpassError
from fixpass.weights import (
    QKV,
    Mapping,
    Rename,
    Stacked,
    Stage,
    TensorParallel,
    load,
)
from helpers.checkpoints import holder, mlp, zeroed


def test_renames_filters_and_stages_are_applied_in_this_order():
    model = holder(layers__2__w=(1,), layers__3__w=(1,), lm_head__w=(1,))
    stored = {f"old.layers.{i}.w": torch.full((1,), float(i)) for i in range(4)}
    stored |= {"old.head.w": torch.ones(1), "old.embed_tokens.w": torch.ones(1)}
    stored |= {"old.layers.2.rotary.inv_freq": torch.ones(1), "optimizer.x": torch.ones(1)}
    mapping = Mapping(
        renames=(
            Rename("optimizer.", None),
            Rename("old.", ""),
            Rename(r"^head\.(\w)$", r"lm_head.\1", "regex"),
        ),
        filters=("*.inv_freq",),
        stage=Stage(range(2, 4), is_last=True),
    )
    report = load(model, stored, mapping=mapping)
    assert model.layers.get_submodule("3").w.item() == 3
    assert {(s.name, s.branch) for s in report.skipped} == {
        ("optimizer.x", "filter"),
        ("old.layers.2.rotary.inv_freq", "filter"),
        ("old.embed_tokens.w", "stage"),
        ("old.layers.0.w", "stage"),
        ("old.layers.1.w", "stage"),
    }


def test_scale_names_of_another_format_are_renamed():
    model = holder(attn__k_scale=(1,))
    mapping = Mapping(scale_renames=(Rename(".k_proj.k_scale", ".k_scale", "suffix"),))
    load(model, {"attn.k_proj.k_scale": torch.full((1,), 7.0)}, mapping=mapping)
    assert model.attn.k_scale.item() == 7


@pytest.mark.parametrize("rank", [0, 1])
def test_a_plain_parameter_takes_its_slice_of_the_whole(rank):
    model = holder(qkv_proj__weight=(4, 3), o_proj__weight=(3, 2))
    q, k, v, o = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2, 3), torch.randn(3, 4)
    stored = {f"{n}_proj.weight": t for n, t in {"q": q, "k": k, "v": v, "o": o}.items()}
    parallel = TensorParallel(rank, 2, (("*qkv_proj*", 0), ("*o_proj*", 1)))
    load(model, stored, mapping=Mapping(stacked=(QKV,), tensor_parallel=parallel))
    parts = [t.chunk(2)[rank] for t in (q, k, v)]
    assert torch.equal(model.qkv_proj.weight, torch.cat(parts))
    assert torch.equal(model.o_proj.weight, o.chunk(2, dim=1)[rank])


def test_a_stack_may_be_along_another_dimension():
    model = holder(ab__weight=(2, 5))
    a, b = torch.randn(2, 2), torch.randn(2, 3)
    stacked = Stacked("ab", ("a", "b"), dim=1)
    load(model, {"b.weight": b, "a.weight": a}, mapping=Mapping(stacked=(stacked,)))
    assert torch.equal(model.ab.weight, torch.cat([a, b], dim=1))


def test_a_tied_parameter_is_loaded_once_under_either_name():
    for names in (["a.weight"], ["b.weight"], ["b.weight", "a.weight"]):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
        stored = {name: torch.full((2, 2), 3.0) for name in names}
        report = load(model, stored)
        assert report.loaded == ("a.weight",)
        assert [s.branch for s in report.skipped] == ["tied"] * (len(names) - 1)
        assert model["b"].weight[0, 0] == 3


def test_a_cast_is_made_where_it_is_asked_for():
    wanted = mlp()
    model = zeroed(wanted).bfloat16()
    load(model, wanted.state_dict(), cast=True)
    assert torch.equal(model[0].weight, wanted[0].weight.bfloat16())


def test_a_parameter_of_any_strides_is_filled():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(5, 3).t())
    made = torch.randn(3, 5)
    load(model, {"w": made})
    assert torch.equal(model.w, made)
    assert model.w.stride() == (1, 3)


LEVELS = {"none": 0, "missing": 1, "complete": 2, "exact": 4}


def uneven():
    """One parameter each that is missing and initialised; a tensor each unexpected and skipped."""
    model = holder(there=(1,), gone=(1,), made=(1,))
    model.made.missing_param_init = "ones"
    return model, {"there": torch.ones(1), "odd": torch.ones(1), "x.input_scale": torch.ones(1)}


@pytest.mark.parametrize("strict", LEVELS)
def test_the_level_decides_what_raises(strict):
    model, stored = uneven()
    if strict == "none":
        with pytest.warns(UserWarning, match="scales that no parameter takes: x.input_scale"):
            report = load(model, stored, strict=strict)
        assert [m.name for m in report.missing] == ["gone"]
        assert [(i.name, i.value) for i in report.initialised] == [("made", "ones")]
        assert report.unexpected == ("odd",)
        assert [s.name for s in report.skipped] == ["x.input_scale"]
        assert (model.there.item(), model.gone.item(), model.made.item()) == (1, 0, 1)
        assert "missing 1: gone (nothing is stored for it)" in str(report)
        return
    with pytest.raises(FixpassError) as raised:
        load(model, stored, strict=strict)
    kinds = ("missing:", "unexpected:", "skipped:", "initialised:")
    assert sum(kind in str(raised.value) for kind in kinds) == LEVELS[strict]
    assert (model.there.item(), model.gone.item(), model.made.item()) == (0, 0, 0)


@pytest.mark.parametrize(("missing", "value"), [("ones", 1.0), ("zeros", 0.0)])
def test_a_missing_parameter_is_filled_where_that_is_asked_for(missing, value):
    model = holder(a=(2,), b=(2,))
    model.b.data.fill_(9)
    report = load(model, {"a": torch.ones(2)}, missing=missing)
    assert model.b.tolist() == [value] * 2
    assert [str(i) for i in report.initialised] == [f"b ({missing})"]


@pytest.mark.parametrize("missing", ["error", "ones"])
def test_a_scale_that_was_never_loaded_is_never_silent(missing):
    model = holder(weight=(2,), weight_scale=(1,))
    with pytest.warns(UserWarning, match="scales that were not loaded: weight_scale"):
        load(model, {"weight": torch.ones(2)}, strict="none", missing=missing)
    if missing == "error":
        with pytest.raises(FixpassError, match="missing: weight_scale"):
            load(model, {"weight": torch.ones(2)})


def test_progress_is_shown_where_it_is_asked_for(capsys):
    load(mlp(), mlp().state_dict(), progress=True)
    assert "loading: 100%" in capsys.readouterr().err
    load(mlp(), mlp().state_dict(), progress=False)
    assert capsys.readouterr().err == ""
