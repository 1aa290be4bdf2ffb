"""Partial updates: some parameters, parts of them, experts by index, deltas of a base."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError, VersionError
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import FUSED_EXPERTS
from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.parameter_layout import logical
from fixpass.runtime.weights.state_file import digest
from fixpass.runtime.weights.update import update
from helpers.updating import MODES, holds, model_of, values


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def test_a_partial_update_leaves_the_rest(mode):
    model = model_of()
    new = {"turned.weight": values(1)["turned.weight"], "q.weight": values(1)["q.weight"]}
    with update(model, mode, scope="parameters") as tx:
        tx.load_state_dict(new)
    assert holds(model, values(0) | new)
    with pytest.raises(CheckpointError, match="missing"), update(model, mode) as tx:
        tx.load_state_dict(new)


def test_a_delta_of_another_base_is_refused(mode):
    model = model_of()
    with update(model, mode, version=10) as tx:
        tx.load_state_dict(values(1))
    with (
        pytest.raises(VersionError, match="changes 9, and the weights are 10"),
        update(model, base=9),
    ):
        pass
    with (
        pytest.raises(VersionError, match="version 10 does not follow version 10"),
        update(model, version=10),
    ):
        pass
    with update(model, mode, base=10, version=11, scope="parameters") as tx:
        tx.load("q.weight", values(2)["q.weight"])
    assert version(model) == 11
    base = digest(model)
    with update(model, mode, base=base, scope="parameters") as tx:
        tx.load("k.weight", values(2)["k.weight"])
    with pytest.raises(VersionError, match="and the weights are"), update(model, base=base):
        pass


def test_a_digest_is_of_logical_values():
    assert digest(model_of()) == digest(model_of(folded=False)) != digest(model_of(1))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(4, 64, 32))
        self.w2 = nn.Parameter(torch.zeros(4, 32, 32))


def test_parts_are_placed_by_their_start_and_counted(mode):
    model = Experts()
    set_layouts(model, {"w13": "aiter_16x16"})
    whole = torch.randn(4, 64, 32)
    with update(model, mode, scope="parts") as tx:
        for expert in (2, 0):
            tx.load("w13", whole[expert], start=(expert,))
    assert torch.equal(logical(model.w13)[[0, 2]], whole[[0, 2]])
    assert not logical(model.w13)[[1, 3]].any()
    assert tx.report.covered == {"w13": (16384, 32768)}
    with (
        pytest.raises(CheckpointError, match=r"not covered: w13 \(8,192 of 32,768 bytes\)"),
        update(model, mode, scope="parameters") as tx,
    ):
        tx.load("w13", whole[1], start=(1,))
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match="two parts of 'w13' overlap"),
        update(model, mode, scope="parts") as tx,
    ):
        tx.load("w13", whole[1], start=(1,))
        tx.load("w13", whole[1, 5:], start=(1, 5))
    with (
        pytest.raises(
            CheckpointError, match=r"at \[4, 0, 0\] is not within 'w13', f32\[4, 64, 32\]"
        ),
        update(model, mode, scope="parts") as tx,
    ):
        tx.load("w13", whole[1], start=(4,))
    with update(model, mode, scope="parameters") as tx:
        for row in range(0, 64, 8):
            tx.load("w13", whole[:, row : row + 8], start=(0, row))
    assert torch.equal(logical(model.w13), whole)


FUSED = Mapping(experts=(FUSED_EXPERTS,))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.w13_weight = nn.Parameter(torch.zeros(4, 64, 32))
        self.experts.w2_weight = nn.Parameter(torch.zeros(4, 32, 32))


def expert_tensors():
    torch.manual_seed(0)
    return {
        f"experts.{i}.{part}_proj.weight": torch.randn(32, 32)
        for i in range(4)
        for part in ("gate", "up", "down")
    }


def test_experts_go_by_their_index_whatever_the_order(mode):
    model, stored = Mixture(), expert_tensors()
    set_layouts(model, {"experts.w13_weight": "aiter_16x16"})
    with update(model, mode, mapping=FUSED) as tx:
        tx.load_state_dict(dict(reversed(stored.items())))
    w13 = logical(model.experts.w13_weight)
    for i in range(4):
        assert torch.equal(w13[i, :32], stored[f"experts.{i}.gate_proj.weight"])
        assert torch.equal(w13[i, 32:], stored[f"experts.{i}.up_proj.weight"])
        assert torch.equal(model.experts.w2_weight[i], stored[f"experts.{i}.down_proj.weight"])
    renamed = {name.replace("experts.1.", "experts.10."): t for name, t in stored.items()}
    with (
        pytest.raises(CheckpointError, match=r"expert 10 and .* has 4 experts"),
        update(model, mode, mapping=FUSED) as tx,
    ):
        tx.load_state_dict(renamed)
    gone = {name: t for name, t in stored.items() if ".1." not in name}
    with (
        pytest.raises(CheckpointError, match="nothing is stored for expert 1"),
        update(model, mode, mapping=FUSED, scope="parameters") as tx,
    ):
        tx.load_state_dict(gone)
