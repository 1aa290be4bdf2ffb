"""A source that breaks, lies or has no values is refused, and the model is as before."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from fixpass import FixpassError
from fixpass.runtime.errors import CheckpointError, PoisonedError
from fixpass.runtime.weights.files import TEMPORARY, OpenFile
from fixpass.weights import Mapping, TensorParallel, load, read_lock
from helpers.checkpoints import assert_refused, model_of, two


def test_a_slice_that_is_not_whole_is_refused():
    parallel = TensorParallel(0, 2, (("a", 1),))
    stored = {"a": torch.ones(4, 7), "b": torch.ones(2)}
    mapping = Mapping(tensor_parallel=parallel)
    assert_refused(two(), stored, "has no 2 equal parts along dim 1", mapping=mapping)


def test_an_iterator_that_fails_half_way_changes_nothing():
    def dying():
        yield "a", torch.ones(4, 3)
        raise ConnectionError("the sender is gone")

    model = two()
    with pytest.raises(ConnectionError, match="the sender is gone"):
        load(model, dying())
    assert not model.a.any()


def test_an_iterator_that_gives_a_name_twice_is_refused():
    assert_refused(two(), iter([("b", torch.ones(2))] * 2), "gave 'b' twice")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (3, "is a int, not a tensor"),
        (torch.ones(2).to_sparse(), "give to_dense()"),
        (torch.ones(2, device="meta"), "it has no values"),
    ],
)
def test_what_has_no_values_is_refused(tensor, said):
    assert_refused(two(), {"a": torch.ones(4, 3), "b": tensor}, said)


def test_a_tensor_whose_memory_was_freed_is_refused():
    freed = torch.ones(2)
    freed.untyped_storage().resize_(0)
    assert_refused(two(), {"a": torch.ones(4, 3), "b": freed}, "it was freed")
    assert_refused(two(), iter([("a", torch.ones(4, 3)), ("b", freed)]), "it was freed")


def test_a_parameter_whose_memory_was_freed_is_refused():
    model = two()
    model.b.untyped_storage().resize_(0)
    with pytest.raises(FixpassError, match="it was freed"):
        load(model, {"a": torch.ones(4, 3), "b": torch.ones(2)})


def test_a_parameter_without_memory_is_refused_with_the_way_out():
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)
    with pytest.raises(FixpassError, match=r"model\.to_empty\(device=\.\.\.\) gives it"):
        load(model, {"weight": torch.ones(2, 2)})


def test_a_parameter_whose_elements_share_memory_is_refused():
    model = model_of(a=torch.zeros(1, 3).expand(4, 3), b=torch.zeros(2))
    assert_refused(model, {"a": torch.ones(4, 3), "b": torch.ones(2)}, "is expanded")


def test_a_file_that_breaks_while_it_is_read_is_undone_in_all_modes_but_direct(
    tmp_path, monkeypatch
):
    save_file({"b": torch.ones(2), "a": torch.ones(4, 3)}, tmp_path / "w.safetensors")
    real, reads = OpenFile.read, []

    def breaking(file, *args):
        real(file, *args)
        if file.path is not TEMPORARY:
            reads.append(file)
            raise CheckpointError("the disk is gone")

    monkeypatch.setattr(OpenFile, "read", breaking)
    for mode in ("undo_log", "buffered", "double_buffer"):
        assert_refused(two(), tmp_path, "the disk is gone", mode=mode)
    assert len(reads) == 3
    model = two()
    with pytest.raises(CheckpointError, match="the disk is gone") as caught:
        load(model, tmp_path)
    assert "mode='undo_log' brings the old ones back" in caught.value.__notes__[0]
    assert model.a.all(), "in mode direct nothing is undone, and calls are refused"
    with pytest.raises(PoisonedError), read_lock(model):
        pass
    monkeypatch.undo()
    load(model, tmp_path)
    with read_lock(model):
        assert model.b.all()


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


def test_no_pickle_runs_unless_asked(tmp_path):
    torch.save({"a": Evil()}, tmp_path / "w.pt")
    assert_refused(two(), tmp_path / "w.pt", "cannot be loaded")
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert_refused(two(), folder, "wants posix.system, which no such file needs")


def saved_dcp(folder):
    dcp.save({"a": torch.ones(4, 3), "b": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_truncated_dcp_folder_changes_nothing(tmp_path):
    folder = saved_dcp(tmp_path / "dcp")
    (shard,) = folder.glob("*.distcp")
    os.truncate(shard, shard.stat().st_size - 100)
    assert_refused(two(), folder, "the file is shorter than the metadata says")
    shard.unlink()
    assert_refused(two(), folder, "No such file")
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:50])
    assert_refused(two(), folder, "cannot be read")


def test_a_corrupted_dcp_folder_changes_nothing(tmp_path):
    folder = saved_dcp(tmp_path / "dcp")
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert_refused(two(), folder, "cannot be read")


def test_a_folder_with_nothing_in_it_says_what_it_looked_for(tmp_path):
    said = "holds no .safetensors file, no index of them and no .metadata"
    assert_refused(two(), tmp_path, said)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"strict": "loose"}, "strict is one of none, missing, complete, exact"),
        ({"missing": "twos"}, "missing parameters become 'error', 'ones' or 'zeros', not 'twos'"),
    ],
)
def test_an_option_that_is_not_one_is_refused(option, said):
    assert_refused(two(), {}, said, **option)


def test_many_keys_too_many_make_a_short_message():
    count = 50_000
    stored = {"a": torch.ones(4, 3), "b": torch.ones(2)}
    stored |= dict.fromkeys((f"layers.{i}.odd" for i in range(count)), torch.zeros(()))
    said = assert_refused(two(), stored, "unexpected: layers.0.odd")
    assert f"and {count - 10:,} more" in said
    assert len(said) < 500


@pytest.mark.full
def test_a_million_keys_in_a_file_are_read_and_reported(tmp_path):
    count = 1_000_000
    header = {
        f"l.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    said = assert_refused(two(), file, "missing: a (nothing is stored for it), b")
    assert "and 999,990 more" in said
    report = load(two(), file, strict="none")
    assert len(report.unexpected) == count


def test_a_load_over_warm_parameters_takes_no_memory_of_its_own(tmp_path, monkeypatch):
    """The tensors are strided, so that every byte of 64 MB goes through the staging buffers."""
    import resource

    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4096, 4096).t(), requires_grad=False)
    save_file({"w": torch.ones(4096, 4096)}, tmp_path / "w.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(model, tmp_path, threads=2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert model.w.all()
    assert grown <= 64 << 10
