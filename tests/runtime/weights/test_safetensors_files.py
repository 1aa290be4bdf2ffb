"""Which files make up a checkpoint, and that an index tells the truth about them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats.safetensors import from_folder, from_glob, from_index


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    return tmp_path


def index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


def test_an_index_a_glob_and_a_folder_find_the_same(folder):
    path = index(folder, {"a": "one.safetensors", "b": "./two.safetensors"})
    found = from_index(path).tensors()
    assert {name: stored.shape for name, stored in found.items()} == {"a": (2,), "b": (3,)}
    everything = from_glob(str(folder / "*.safetensors")).tensors()
    assert everything.keys() == from_folder(folder).tensors().keys() == found.keys()


def test_only_the_shards_of_the_index_are_the_checkpoint(folder):
    index(folder, {"a": "one.safetensors"})
    assert list(from_folder(folder).tensors()) == ["a"]


def test_a_cache_made_of_links_is_followed(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    (cache / "one.safetensors").symlink_to(folder / "one.safetensors")
    assert list(from_index(index(cache, {"a": "one.safetensors"})).tensors()) == ["a"]


def test_a_folder_without_safetensors_has_none(tmp_path):
    assert from_folder(tmp_path) is None


BROKEN = {
    "names three.safetensors and there is no such file": {"a": "three.safetensors"},
    "'c' is in one.safetensors, and it is not there": {"c": "one.safetensors"},
    "'a' is in two.safetensors, and it is in one": {"a": "two.safetensors", "b": "one.safetensors"},
    "'../one.safetensors', which is not in the folder": {"a": "../one.safetensors"},
    "'/etc/passwd', which is not in the folder": {"a": "/etc/passwd"},
    "which is not in the folder of the index": {"a": "x\\..\\..\\one.safetensors"},
    "no weight_map from names to files": {"a": 3},
}


@pytest.mark.parametrize("said", BROKEN)
def test_an_index_that_lies_is_refused_and_says_why(folder, said):
    with pytest.raises(CheckpointError, match=said.replace(".", r"\.")):
        from_index(index(folder, BROKEN[said])).tensors()


def test_an_index_that_is_not_json_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        from_folder(folder)


def test_two_indices_want_a_choice(folder):
    index(folder, {"a": "one.safetensors"})
    index(folder, {"a": "one.safetensors"}, "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match="name one of them"):
        from_folder(folder)


def test_a_name_in_two_shards_is_refused(folder):
    save_file({"a": torch.ones(2)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in one\.safetensors and in two"):
        from_folder(folder).tensors()


def test_a_glob_without_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no file matches"):
        from_glob(str(tmp_path / "*.safetensors"))
