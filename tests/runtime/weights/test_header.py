"""A safetensors header is believed only where it is exactly what the file holds."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats.safetensors import DTYPES, raw_header, tensors_in


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_every_dtype_that_safetensors_writes_is_read(tmp_path):
    made = {name: torch.zeros(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    save_file(made, tmp_path / "all.safetensors")
    found = {stored.name: stored for stored in tensors_in(raw_header(tmp_path / "all.safetensors"))}
    assert {name: (s.dtype, s.shape) for name, s in found.items()} == {
        name: (dtype, (2, 3)) for name, dtype in DTYPES.items()
    }


def test_packed_4_bit_values_count_bytes_as_torch_does(tmp_path):
    packed = torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"w": packed}, tmp_path / "f4.safetensors")
    (stored,) = tensors_in(raw_header(tmp_path / "f4.safetensors"))
    assert (stored.dtype, stored.shape) == (torch.float4_e2m1fn_x2, (4, 8))


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_file({"w": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a valid safetensors file"):
        tensors_in(raw_header(path))


LIES = {
    "is not JSON": b"{]",
    "is not a JSON object": b"[]",
    "has 'w' twice": b'{"w": {}, "w": {}}',
    "has no dtype, shape and data_offsets": {"w": {"dtype": "F32"}},
    "are not sizes": {"w": entry([-1], 0, 4)},
    "the offsets of 'b' are not sizes": {"b": entry([True], 0, 4)},
    "ends before it starts": {"w": entry([1], 4, 0)},
    "which torch has not": {"w": entry([1], 0, 4, "F7")},
    "has 4 bytes for a shape of 8": {"w": entry([2], 0, 4)},
    "'b' overlaps": {"a": entry([1], 0, 4), "b": entry([1], 2, 6)},
    "'b' leaves a gap": {"a": entry([1], 0, 4), "b": entry([1], 8, 12)},
    "and the file at": {"w": entry([64], 0, 256)},
    "for a shape of": {"w": entry([1 << 40, 1 << 40], 0, 8)},
}


@pytest.mark.parametrize("said", LIES)
def test_a_header_that_lies_is_refused_and_says_why(tmp_path, said):
    path = write(tmp_path / "lie.safetensors", LIES[said], bytes(8))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        tensors_in(raw_header(path))


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="is not in its 10 bytes"):
        tensors_in(raw_header(path))


def test_brackets_nested_without_end_are_refused(tmp_path):
    path = write(tmp_path / "deep.safetensors", b'{"w":' + b"[" * 200_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        tensors_in(raw_header(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors.*No such file"):
        tensors_in(raw_header(tmp_path / "gone.safetensors"))
