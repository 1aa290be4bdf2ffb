"""Updates of parameters that are unlike others: own loaders, shared, inference, no memory."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.update import update
from helpers.folding import aiter
from helpers.updating import MODES


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


class Rows(nn.Module):
    """A parameter with a loader of an engine: narrows its own rows out of the stored tensor."""

    def __init__(self, rank=1):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)
        self.weight.output_dim = 0
        self.weight.weight_loader = self.weight_loader
        self.rank = rank

    def weight_loader(self, param, loaded):
        part = loaded.narrow(param.output_dim, 32 * self.rank, 32)
        assert param.shape == part.shape
        param.data.copy_(part)


def test_a_loader_of_a_parameters_own_is_used_and_may_fail(mode):
    model, whole = Rows(), torch.randn(64, 64)
    set_layouts(model, {"weight": "aiter_16x16"})
    for _ in range(2):
        with update(model, mode) as tx:
            tx.load("weight", whole)
        assert torch.equal(model.weight, aiter(whole[32:]))
    model.rank = 7
    with (
        pytest.raises(CheckpointError, match="weight_loader of 'weight' did not take"),
        update(model, mode) as tx,
    ):
        tx.load("weight", whole)
    assert torch.equal(model.weight, aiter(whole[32:]))


def test_memory_that_others_share_is_not_doubled():
    model = nn.Linear(2, 2).share_memory()
    with pytest.raises(UpdateError, match="shared memory"), update(model, "double_buffer") as tx:
        tx.load_state_dict(model.state_dict())


def test_memory_of_inference_mode_is_written_and_not_exchanged():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    wanted = nn.Linear(4, 4).state_dict()
    with (
        pytest.raises(UpdateError, match="made in inference mode"),
        update(model, "double_buffer") as tx,
    ):
        tx.load_state_dict(wanted)
    for mode in ("buffered", "undo_log"):
        with update(model, mode) as tx:
            tx.load_state_dict(wanted)
        assert torch.equal(model.weight, wanted["weight"])


@pytest.mark.parametrize(
    ("param", "said"),
    [
        (nn.Parameter(torch.empty(2, 2, device="meta")), r"meta device .*to_empty"),
        (nn.Parameter(torch.eye(2).to_sparse()), "only strided parameters"),
    ],
)
def test_a_parameter_without_memory_is_refused(mode, param, said):
    model = nn.Module()
    model.weight = param
    with pytest.raises(CheckpointError, match=said), update(model, mode) as tx:
        tx.load("weight", torch.ones(2, 2))
