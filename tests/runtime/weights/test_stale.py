"""What updates leave stale: refused or warned of, found once for each signature of a model."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights import stale
from fixpass.weights import StaleWarning, census, derive, load, reload, update, version

MODES = ("direct", "buffered", "undo_log", "double_buffer")


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)
        self.gate = nn.Linear(4, 6, bias=False)
        self.kept = self.proj.weight.detach().t().contiguous()


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(Turned(), Turned())


def new_weights(model, seed=1):
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def searches(monkeypatch):
    """How many models were searched."""
    made, search = [], stale.followers

    def counting(model):
        made.append(model)
        return search(model)

    monkeypatch.setattr(stale, "followers", counting)
    return made


TEXT = r"0\.kept \(a transpose of 0\.proj\.weight\), 1\.kept"


@pytest.mark.parametrize("mode", MODES)
def test_raise_refuses_the_update_before_a_byte_changes(mode):
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UpdateError, match=TEXT):
        reload(model, new_weights(model), mode, progress=False, on_stale="raise")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert version(model) == 0


@pytest.mark.parametrize("mode", MODES)
def test_warn_is_the_default_and_names_them_after_each_update(mode):
    model = model_of()
    for seed in range(2):
        with pytest.warns(StaleWarning, match=TEXT):
            report = reload(model, new_weights(model, seed), mode, progress=False)
        assert len(report.stale) == 2
        assert "may be stale 2: 0.kept" in str(report)
    assert version(model) == 2


def test_ignore_says_nothing_and_a_load_of_new_weights_neither(searches):
    model = model_of()
    report = reload(model, new_weights(model), progress=False, on_stale="ignore")
    load(model, new_weights(model), progress=False)
    assert report.stale == ()
    assert searches == []


def test_another_word_is_an_error():
    model = model_of()
    with pytest.raises(UpdateError, match="on_stale is one of warn, raise, ignore, not 'say'"):
        reload(model, new_weights(model), progress=False, on_stale="say")


def zero(model, name):
    """An update of one weight that would leave nothing stale."""
    with update(model, scope="parameters", on_stale="raise") as tx:
        tx.load(name, torch.zeros(6, 4))


def test_only_tensors_of_written_weights_count():
    model = model_of()
    zero(model, "0.gate.weight")
    with pytest.raises(UpdateError, match=r"stale: 1\.kept"):
        zero(model, "1.proj.weight")


def test_what_the_update_writes_itself_is_not_stale():
    model = model_of()
    for child in model:
        child.kept = nn.Parameter(child.kept)
    census(model, process=lambda model: [refresh(child) for child in model])
    with pytest.raises(UpdateError, match=r"stale: 0\.kept"):
        zero(model, "0.proj.weight")
    reload(model, new_weights(model), progress=False, on_stale="raise")


def refresh(child):
    child.kept = nn.Parameter(child.proj.weight.detach().t().contiguous())


@pytest.mark.parametrize("finite", [False, True])
def test_a_model_is_searched_once_for_each_signature(searches, finite):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    for seed in range(3):
        load(model, new_weights(model, seed), progress=False)
        reload(model, new_weights(model, seed), progress=False, finite=finite)
        with update(model, scope="parameters") as tx:
            tx.load("1.bias", torch.zeros(4))
    assert len(searches) == 1
    model[0] = Turned()
    load(model, model.state_dict(), progress=False)
    with pytest.warns(StaleWarning, match=r"0\.kept"):
        reload(model, new_weights(model), progress=False)
    assert len(searches) == 2


def test_a_declaration_and_a_census_of_post_processing_start_a_new_search():
    model = model_of()
    with pytest.raises(UpdateError, match="stale"):
        reload(model, new_weights(model), progress=False, on_stale="raise")
    for child in model:
        derive(child, "kept", lambda weight: weight.t(), of=["proj.weight"])
    reload(model, new_weights(model), progress=False, on_stale="raise")

    def process(model):
        model[0].norm = model[0].gate.weight.detach().norm()

    census(model, process=process)
    with pytest.raises(UpdateError, match=r"0\.norm \(made by .*process of 0\.gate\.weight\)"):
        reload(model, new_weights(model), progress=False, on_stale="raise")


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


PLACES = {
    "attribute": lambda view: view,
    "dict": lambda view: {"view": view},
    "object": Holder,
    "closure": lambda view: lambda: view,
}
VIEWS = {
    "turned": lambda weight: weight.data.t(),
    "rows": lambda weight: weight.data[2:5],
    "detached": lambda weight: weight.detach(),
    "bits": lambda weight: weight.data.view(torch.int32),
    "with a gradient": lambda weight: weight.t(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("view", VIEWS)
def test_views_follow_weights_into_other_memory(place, view):
    model = nn.Module()
    model.proj = nn.Linear(4, 6, bias=False)
    held = VIEWS[view](model.proj.weight)
    model.held = PLACES[place](held)
    for seed in range(3):
        new = new_weights(model, seed)
        before = model.proj.weight.data_ptr()
        reload(model, new, "double_buffer", progress=False, on_stale="raise")
        assert model.proj.weight.data_ptr() != before
        assert torch.equal(held, VIEWS[view](nn.Parameter(new["proj.weight"])))


def test_a_model_whose_memory_nothing_else_uses_is_not_searched_for_views(monkeypatch):
    model = model_of()
    monkeypatch.setattr(stale, "reachable", None)
    for seed in range(3):
        reload(model, new_weights(model, seed), "double_buffer", progress=False, on_stale="ignore")


def test_tied_and_shared_weights_are_not_taken_for_views(monkeypatch):
    model = model_of()
    model[1].proj.weight = model[0].proj.weight
    memory = torch.randn(2, 6, 4)
    for child, part in zip(model, memory, strict=True):
        child.gate.weight.data = part
    del memory, part
    monkeypatch.setattr(stale, "reachable", None)
    new = new_weights(model)
    new["1.proj.weight"] = new["0.proj.weight"]
    reload(model, new, "double_buffer", progress=False, on_stale="ignore")
    assert torch.equal(model[1].gate.weight, new["1.gate.weight"])
