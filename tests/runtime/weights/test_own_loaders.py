"""Parameters that bring a weight_loader are given their tensors as engines give them."""

import pytest
import torch
from torch import nn

from fixpass import FixpassError
from fixpass.weights import FUSED_EXPERTS, QKV, Mapping, load, reload, update


class QKVLinear(nn.Module):
    """As in serving engines: one rank of two, heads narrowed out of the stored tensor."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.weight.output_dim = 0
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param, loaded, shard_id):
        start, size = {"q": (0, 2), "k": (2, 1), "v": (3, 1)}[shard_id]
        part = loaded.narrow(param.output_dim, self.rank * size, size)
        assert part.shape[1:] == param.shape[1:]
        param.data.narrow(param.output_dim, start, size).copy_(part)


def projections():
    torch.manual_seed(0)
    sizes = {"q": 4, "k": 2, "v": 2}
    return {f"{name}_proj.weight": torch.randn(size, 3) for name, size in sizes.items()}


def attention(rank):
    model = nn.Module()
    model.qkv_proj = QKVLinear(rank)
    model.norm = nn.Parameter(torch.zeros(3), requires_grad=False)
    return model


MAPPING = Mapping(stacked=(QKV,))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stack_is_loaded_by_its_own_loader(rank):
    model, stored = attention(rank), projections() | {"norm": torch.ones(3)}
    report = load(model, stored, mapping=MAPPING)
    wanted = [stored[f"{name}_proj.weight"].chunk(2)[rank] for name in "qkv"]
    assert torch.equal(model.qkv_proj.weight, torch.cat(wanted))
    assert report.loaded == ("qkv_proj.weight", "norm")


def test_an_expert_weight_is_loaded_with_its_shard_and_expert_id():
    calls = []

    def weight_loader(param, loaded, name, *, shard_id, expert_id):
        calls.append((param, loaded.item(), name, shard_id, expert_id))
        param.data[expert_id].copy_(loaded)

    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w2_weight = nn.Parameter(torch.zeros(2, 1, 1))
    model.experts.w2_weight.weight_loader = weight_loader
    stored = {
        "experts.1.down_proj.weight": torch.ones(1, 1),
        "experts.0.down_proj.weight": torch.zeros(1, 1),
        "experts.0.down_proj.input_scale": torch.ones(1),
    }
    with pytest.warns(UserWarning, match="scales that no parameter takes"):
        report = load(model, stored, mapping=Mapping(experts=(FUSED_EXPERTS,)))
    w2 = model.experts.w2_weight
    assert w2.flatten().tolist() == [0, 1]
    assert all(type(call[0]) is nn.Parameter and vars(call[0]) == vars(w2) for call in calls)
    assert [call[1:] for call in calls] == [
        (1, "experts.w2_weight", "w2", 1),
        (0, "experts.w2_weight", "w2", 0),
    ]
    assert [skipped.mapped for skipped in report.skipped] == ["experts.w2_input_scale"]


def test_a_loader_of_a_class_is_found_too():
    class Own(nn.Parameter):
        @property
        def weight_loader(self):
            return lambda param, loaded: param.data.copy_(loaded * 2)

    model = nn.Module()
    model.w = Own(torch.zeros(2), requires_grad=False)
    load(model, {"w": torch.ones(2)})
    assert model.w.tolist() == [2, 2]


def test_a_loader_that_raises_leaves_every_parameter_as_before():
    model, stored = attention(0), projections()
    model.qkv_proj.weight.data.fill_(7)
    stored["v_proj.weight"] = torch.randn(2, 5)
    data = model.qkv_proj.weight.data_ptr()
    with pytest.raises(FixpassError, match=r"weight_loader of 'qkv_proj.weight' did not take 'v_p"):
        load(model, stored | {"norm": torch.ones(3)}, mapping=MAPPING)
    assert model.qkv_proj.weight.eq(7).all()
    assert not model.norm.any()
    assert model.qkv_proj.weight.data_ptr() == data


def test_a_loader_that_rebinds_and_marks_its_parameter_changes_neither():
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.zeros(2), requires_grad=False) for _ in range(2))

    def rebind(param, loaded):
        param.data = loaded
        param.is_shuffled = True

    def refuse(param, loaded):
        raise AssertionError("no")

    model.a.weight_loader, model.b.weight_loader = rebind, refuse
    data = model.a.data_ptr()
    with pytest.raises(FixpassError, match="AssertionError"):
        load(model, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(FixpassError, match="weight_loader of 'a' changed its layout"):
        load(model, {"a": torch.ones(3), "b": torch.ones(2)})
    assert (model.a.data_ptr(), model.a.tolist(), list(vars(model.a))) == (
        data,
        [0, 0],
        ["weight_loader"],
    )


def test_a_part_that_a_loader_never_gets_is_missing():
    stored = projections() | {"norm": torch.ones(3)}
    del stored["k_proj.weight"]
    with pytest.raises(FixpassError, match="no part 1 of 3"):
        load(attention(0), stored, mapping=MAPPING)


def test_a_loader_is_not_trusted_with_quantised_values():
    stored = projections() | {"norm": torch.ones(3)}
    stored["k_proj.weight"] = stored["k_proj.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(FixpassError, match="mean nothing without their scale"):
        load(attention(0), stored, mapping=MAPPING)


def _nothing(model):
    return lambda param, loaded: None


def _half(model):
    return lambda param, loaded: param.data[:2].copy_(loaded[:2])


def _the_module(model):
    return lambda param, loaded: model.w.data.copy_(loaded)


WRITES_TOO_LITTLE = {_nothing: "0 of 16 bytes", _half: "8 of 16 bytes", _the_module: "0 of 16"}


@pytest.mark.parametrize("mode", ["direct", "buffered", "undo_log", "double_buffer"])
@pytest.mark.parametrize("loader", WRITES_TOO_LITTLE)
def test_a_loader_that_leaves_bytes_unwritten_is_an_error_or_on_the_report(loader, mode):
    model = nn.Module()
    model.w = nn.Parameter(torch.full((4,), 9.0), requires_grad=False)
    model.w.weight_loader = loader(model)
    said = WRITES_TOO_LITTLE[loader]
    with pytest.raises(FixpassError, match=f"its weight_loader wrote {said}"):
        load(model, {"w": torch.zeros(4)}, mode)
    with pytest.raises(FixpassError, match=rf"not covered: w \({said}"):
        reload(model, {"w": torch.zeros(4)}, mode, progress=False)
    assert loader is _the_module or model.w.tolist() == [9] * 4
    report = load(model, {"w": torch.zeros(4)}, mode, strict="none")
    assert (report.loaded, [m.name for m in report.missing]) == ((), ["w"])
    if loader is _half:
        assert model.w.tolist() == [0, 0, 9, 9]


@pytest.mark.parametrize("mode", ["direct", "buffered", "undo_log", "double_buffer"])
def test_a_loader_may_write_the_same_values_in_any_way(mode):
    """Coverage is of writes and not of changes; a rebind and numpy are seen too."""
    ways = (
        lambda param, loaded: param.data.copy_(loaded),
        lambda param, loaded: setattr(param, "data", loaded),
        lambda param, loaded: param.data.view(torch.uint8).copy_(loaded.view(torch.uint8)),
        lambda param, loaded: [param[i].fill_(loaded[i].item()) for i in range(4)],
        lambda param, loaded: torch.add(loaded, 0, out=param.data),
    )
    for way in ways:
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(4), requires_grad=False)
        model.w.weight_loader = way
        for new in (torch.zeros(4), torch.arange(4.0)):
            assert load(model, {"w": new}, mode).loaded == ("w",)
            assert torch.equal(model.w, new)


@pytest.mark.parametrize("mode", ["direct", "buffered", "undo_log", "double_buffer"])
@pytest.mark.parametrize("state", ["freed", "meta", "sparse"])
def test_a_parameter_without_memory_is_refused_before_its_loader_is_called(state, mode):
    called = []
    model = nn.Module()
    model.w = nn.Parameter(torch.eye(4), requires_grad=False)
    if state == "freed":
        model.w.untyped_storage().resize_(0)
    else:
        made = model.w.to("meta") if state == "meta" else model.w.to_sparse()
        model.w = nn.Parameter(made, requires_grad=False)
    model.w.weight_loader = lambda *args: called.append(args)
    with pytest.raises(FixpassError, match={"freed": "was freed"}.get(state, state)):
        load(model, {"w": torch.eye(4)}, mode)
    with pytest.raises(FixpassError, match={"freed": "was freed"}.get(state, state)):
        reload(model, {"w": torch.eye(4)}, mode, progress=False)
    assert called == []


@pytest.mark.parametrize("mode", ["direct", "buffered", "undo_log", "double_buffer"])
def test_a_partial_update_by_a_loader_keeps_the_rest(mode):
    model, stored = attention(0), projections()
    model.qkv_proj.weight.data.fill_(9.0)
    with update(model, mode, scope="parts", mapping=MAPPING) as tx:
        tx.load("q_proj.weight", stored["q_proj.weight"])
    assert torch.equal(model.qkv_proj.weight[:2], stored["q_proj.weight"][:2])
    assert model.qkv_proj.weight[2:].eq(9).all()
    assert tx.report.covered == {"qkv_proj.weight": (24, 48)}
