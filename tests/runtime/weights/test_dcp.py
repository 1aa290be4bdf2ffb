"""Folders of torch.distributed.checkpoint that lie about what they hold are refused."""

import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fixpass import FixpassError
from fixpass.runtime.weights.formats.dcp import from_dcp
from fixpass.weights import load


@pytest.fixture
def folder(tmp_path):
    dcp.save({"w": torch.ones(4, 3), "step": 3}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def edit(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_values_that_are_no_tensors_are_left_out(folder):
    assert list(from_dcp(folder)) == ["w"]


def moved(path):
    def change(metadata):
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, relative_path=path)

    return change


@pytest.mark.parametrize("path", ["../other.distcp", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(folder, path):
    edit(folder, moved(path))
    with pytest.raises(FixpassError, match=r"outside the folder"):
        from_dcp(folder)


def test_shards_that_do_not_make_up_their_tensor_are_refused(folder):
    edit(folder, lambda metadata: metadata.state_dict_metadata["w"].chunks.clear())
    with pytest.raises(FixpassError, match=r"the shards of 'w' do not make up \[4, 3\]"):
        from_dcp(folder)


def test_shards_that_overlap_are_refused(folder):
    def twice(metadata):
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size((8, 3))
        entry.chunks *= 2

    edit(folder, twice)
    with pytest.raises(FixpassError, match="do not make up"):
        from_dcp(folder)


def test_a_shard_of_another_shape_than_the_metadata_says_is_refused(folder):
    def turned(metadata):
        entry = metadata.state_dict_metadata["w"]
        entry.size = entry.chunks[0].sizes = torch.Size((3, 4))

    edit(folder, turned)
    with pytest.raises(FixpassError, match=r"it is not a dense torch.float32 of \[3, 4\]"):
        from_dcp(folder)


def test_a_tensor_that_no_file_holds_is_refused(folder):
    edit(folder, lambda metadata: metadata.storage_data.clear())
    with pytest.raises(FixpassError, match=r"no file holds 'w' from \[0, 0\] on"):
        from_dcp(folder)


def test_a_metadata_file_of_something_else_is_refused(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(FixpassError, match="holds no metadata"):
        load(torch.nn.Linear(1, 1), folder)
