"""The machine code of the kernels on four targets; nothing is run and nothing timed."""

import re
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import machine_code as offline
from benchmarks.machine_code import Specimen, compile_launch, gpu_target, plan, specialize
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.kernels.rms_norm import plan_norm
from fixpass.runtime.kernels.rounding import rounding

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
WIDTHS = {8: 128, 4: 64, 2: 32, 1: 16}
# What one core compiles in seconds; the rest of the table is for `full`.
SHORT = [
    ("cuda:sm_90", Specimen("rms_norm", 128)),
    ("cuda:sm_90", Specimen("qk_norm", 128)),
    ("cuda:sm_90", Specimen("add_rms_norm", 4096, "fp16")),
    ("cuda:sm_90", Specimen("rms_norm", 128, "bf16", 1)),
    ("cuda:sm_100", Specimen("rms_norm", 4096)),
    ("cuda:sm_100", Specimen("layer_norm", 64)),
    *(
        (target, specimen)
        for target in ("rocm:gfx942", "rocm:gfx950")
        for specimen in (
            Specimen("rms_norm", 128),
            Specimen("layer_norm", 256, "fp16"),
            Specimen("add_rms_norm", 8192),
            Specimen("qk_norm", 128),
            Specimen("rms_norm", 128, "bf16", 4),
            Specimen("rms_norm", 4096, "bf16", 2),
            Specimen("rms_norm", 4096, "bf16", 1),
        )
    ),
]


def assert_wide_and_documented(target_name, specimen):
    target = gpu_target(target_name)
    code = compile_launch(plan(specimen, target.warp_size), target)
    assert code.spills == 0
    if specimen.hidden_size <= 256 and specimen.pitch == 8:
        assert code.shared == 0
    assert code.narrowest() == WIDTHS[specimen.pitch]
    document = DOCUMENT.read_text()
    if f"Compiled with Triton {triton.__version__}." in document:  # others allocate otherwise
        section = document.split(f"## {target_name}\n")[1].split("\n## ")[0]
        assert offline.table_row(specimen, target) in section.splitlines()


@pytest.mark.parametrize(("target", "specimen"), SHORT, ids=str)
def test_machine_code(target, specimen):
    assert_wide_and_documented(target, specimen)


@pytest.mark.full
@pytest.mark.parametrize("specimen", offline.specimens(), ids=str)
@pytest.mark.parametrize("target", offline.DOCUMENTED_TARGETS)
def test_machine_code_of_the_whole_table(target, specimen):
    assert_wide_and_documented(target, specimen)


# Sizes that fill no power of two, and so are masked.
MASKED = [
    Specimen(op, size)
    for op in offline.OPS
    for size in ((80, 192) if op == "qk_norm" else (80, 192, 1536, 5000, 7168))
]


def assert_wide(target_name, specimen):
    target = gpu_target(target_name)
    code = compile_launch(plan(specimen, target.warp_size), target)
    assert (code.narrowest(), code.spills) == (128, 0)
    assert specimen.hidden_size > 256 or code.shared == 0


def test_a_masked_size_loads_wide_too():
    assert_wide("rocm:gfx942", Specimen("rms_norm", 5000))
    assert_wide("rocm:gfx950", Specimen("qk_norm", 80))


@pytest.mark.full
@pytest.mark.parametrize("specimen", MASKED, ids=str)
@pytest.mark.parametrize("target", offline.DOCUMENTED_TARGETS)
def test_every_masked_size_loads_wide_too(target, specimen):
    assert_wide(target, specimen)


def test_the_document_names_every_kernel_of_every_target():
    sections = re.findall(r"^## (\S+:\S+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert sections == list(offline.DOCUMENTED_TARGETS)
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| rms_norm")]
    assert len(rows) == 4 * len(offline.specimens(("rms_norm",)))


def source_hash(x, target):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rule = rounding(None, None, 0.0, None, None)
    rows = {"x": x, "out": out}
    launch = plan_norm(rows, None, None, 1e-6, rule, center=False, lanes=32)
    return specialize(launch, target)[0].hash()


@pytest.mark.parametrize("target", ["cuda:sm_90", "rocm:gfx942"])
def test_nothing_recompiles_because_a_pitch_or_a_batch_changed(target):
    target = gpu_target(target)

    def heads(batch, pitch, offset):
        wide = torch.empty(batch, pitch, dtype=torch.bfloat16, device="meta")
        return wide[:, offset : offset + 1024].unflatten(1, (8, 128))

    variants = [(7000, 3072, 0), (7001, 6152, 8), (9999, 1040, 16), (8000, 1 << 17, 1024)]
    found = {source_hash(heads(*variant), target) for variant in variants}
    assert len(found) == 1
    assert source_hash(heads(7000, 3076, 4), target) not in found


def test_an_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"known targets: .*rocm:gfx942"):
        offline.kernels_command("rocm:gfx000")
    with pytest.raises(ConfigError, match="target cpu has no kernels"):
        offline.kernels_command("cpu")


def test_the_command_prints_a_row_a_kernel():
    lines = []
    assert offline.kernels_command("rocm:gfx942", ops=("qk_norm",), show=lines.append) == 0
    assert lines[1] == offline.HEADER
    assert len(lines) == 2 + 6
