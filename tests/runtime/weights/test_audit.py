"""An audit of post-processing: each fault is found, and sound post-processing has none."""

import pytest
import torch
from torch import nn

from fixpass.cli import main
from fixpass.runtime.weights.audit import WHY
from fixpass.weights import audit, derive


def load_into(param, values):
    param.data.copy_(values)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.weight.weight_loader = load_into
        self.scale = nn.Parameter(torch.rand(4) + 0.1, requires_grad=False)


def halve(layer):
    layer.scale.data.div_(2)


def halve_twice_as_slowly(layer):
    """The second run changes nothing in place, and makes another value of its own."""
    layer.count = layer.scale.detach() + getattr(layer, "count", 0)


def replace(layer):
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)


def rebind(layer):
    layer.weight.data = layer.weight.data.clone()


def delete(layer):
    if "weight" in layer._parameters:
        kept = layer.weight.data
        del layer.weight
        layer.kept = kept


def hide(layer):
    layer.__dict__.setdefault("weight", layer.weight.data.clone())


def keep_beside(layer):
    if not isinstance(getattr(layer, "kept", None), torch.Tensor):
        layer.kept = torch.empty_like(layer.scale)
    layer.kept.copy_(layer.scale.cumsum(0))


def keep_a_number(layer):
    layer.largest = layer.scale.max().item()


def process_all(process):
    return lambda model: [process(layer) for layer in model]


FAULTS = {
    halve: {("compounded", "0.scale")},
    halve_twice_as_slowly: {
        ("compounded", "0.count"),
        ("moved", "0.count"),
        ("stale", "0.count"),
    },
    replace: {("lost", "0.weight"), ("moved", "0.weight")},
    rebind: {("moved", "0.weight")},
    delete: {("gone", "0.weight"), ("stale", "0.kept")},
    hide: {("gone", "0.weight"), ("lost", "0.weight"), ("stale", "0.weight")},
    keep_beside: {("stale", "0.kept")},
    keep_a_number: {("stale", "0.largest")},
}


@pytest.mark.parametrize("process", FAULTS, ids=lambda process: process.__name__)
def test_a_fault_is_found(process):
    found = audit(nn.Sequential(Layer()), process_all(process))
    assert {(finding.what, finding.name) for finding in found.findings} == FAULTS[process]
    assert found


def test_a_weight_that_no_update_takes_again_is_found():
    def repack(layer):
        if layer.weight.dtype is torch.float32:
            layer.weight.data = layer.weight.data.view(torch.uint8)
            layer.weight.weight_loader = refuse

    def refuse(param, values):
        raise ValueError("values of the checkpoint have another shape")

    found = audit(nn.Sequential(Layer()), process_all(repack))
    assert found.of("refused") == ("Sequential",)
    assert "another shape" in str(found)


def test_what_is_declared_and_refreshed_in_place_is_no_fault():
    model = nn.Sequential(Layer())
    derive(model[0], "kept", lambda scale: scale.cumsum(0), of=["scale"])
    found = audit(model, process_all(keep_beside))
    assert not found
    assert str(found) == "no faults in 3 tensors"


def test_each_kind_of_finding_is_explained():
    kinds = {what for faults in FAULTS.values() for what, _ in faults}
    assert kinds | {"refused", "changed"} == WHY.keys()


PROGRAM = """
import torch
from torch import nn

def sound():
    return nn.Linear(3, 2), lambda model: model.eval()

def halved():
    model = nn.Linear(3, 2)
    return model, lambda model: model.bias.data.div_(2)

def wrong():
    return nn.Linear(3, 2)
"""


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [
        ("sound", 0, "no faults in 2 tensors"),
        ("halved", 1, "compounded  bias: its value changed again"),
        ("wrong", 2, "has to return (model, process)"),
    ],
)
def test_the_command_prints_the_faults_and_its_status_says_whether_there_are_any(
    function, status, text, tmp_path, capsys
):
    file = tmp_path / "engine_model.py"
    file.write_text(PROGRAM)
    assert main(["audit", f"{file}:{function}"]) == status
    said = capsys.readouterr()
    assert text in said.out + said.err
