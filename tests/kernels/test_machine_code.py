"""The machine code of the kernels on four targets; nothing is run and nothing timed."""

import re
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import __main__ as benchmarks
from benchmarks import machine_code
from benchmarks.machine_code import Specimen, compile_launch, gpu_target, plan, specialize
from fixpass.lowering.target import TARGETS
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.kernels.launch import rounding
from fixpass.runtime.kernels.rms_norm import plan_norm

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
        assert machine_code.table_row(specimen, target) in section.splitlines()


@pytest.mark.parametrize(("target", "specimen"), SHORT, ids=str)
def test_machine_code(target, specimen):
    assert_wide_and_documented(target, specimen)


@pytest.mark.full
@pytest.mark.parametrize("specimen", machine_code.specimens(), ids=str)
@pytest.mark.parametrize("target", machine_code.DOCUMENTED_TARGETS)
def test_machine_code_of_the_whole_table(target, specimen):
    assert_wide_and_documented(target, specimen)


# Sizes that fill no power of two, and so are masked.
MASKED = [
    Specimen(op, size)
    for op in machine_code.OPS
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
@pytest.mark.parametrize("target", machine_code.DOCUMENTED_TARGETS)
def test_every_masked_size_loads_wide_too(target, specimen):
    assert_wide(target, specimen)


OTHERS = [
    target.name
    for target in TARGETS
    if target.device_type == "cuda" and target.name not in machine_code.DOCUMENTED_TARGETS
]


# nvdisasm of triton 3.6 can't read code of sm_103, and its LLVM can't link code of gfx1250.
NEWER = {"cuda:sm_103", "rocm:gfx1250"} if triton.__version__ < "3.7" else set()


@pytest.mark.parametrize("target", OTHERS)
def test_the_other_targets_load_wide_too(target):
    if target in NEWER:
        pytest.skip(f"triton {triton.__version__} does not know {target}")
    assert_wide(target, Specimen("qk_norm", 128))


@pytest.mark.full
@pytest.mark.parametrize("specimen", machine_code.specimens(), ids=str)
@pytest.mark.parametrize("target", OTHERS)
def test_every_kernel_of_the_other_targets_loads_wide(target, specimen):
    code = compile_launch(plan(specimen, gpu_target(target).warp_size), gpu_target(target))
    assert (code.narrowest(), code.spills) == (WIDTHS[specimen.pitch], 0)


def test_the_document_names_every_kernel_of_every_target():
    sections = re.findall(r"^## (\S+:\S+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert sections == list(machine_code.DOCUMENTED_TARGETS)
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| rms_norm")]
    assert len(rows) == 4 * len(machine_code.specimens(("rms_norm",)))


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
        machine_code.kernels_command("rocm:gfx000")
    with pytest.raises(ConfigError, match="target cpu has no kernels"):
        machine_code.kernels_command("cpu")


def test_the_command_prints_a_row_a_kernel():
    lines = []
    assert machine_code.kernels_command("rocm:gfx942", ops=("qk_norm",), show=lines.append) == 0
    assert lines[1] == machine_code.HEADER
    assert len(lines) == 2 + 6


def test_the_benchmark_writes_the_tables_into_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "table", lambda name, ops: [f"a row of {name}"])
    page = tmp_path / "page.md"
    page.write_text(f"prose\n{machine_code.MARKER}\nan old table\n")
    assert benchmarks.main(["machine_code", "--target", "rocm:gfx942", "--write", str(page)]) == 0
    assert page.read_text() == (
        f"prose\n{machine_code.MARKER}\n\nCompiled with Triton {triton.__version__}.\n"
        "a row of rocm:gfx942\n"
    )


def test_the_benchmark_refuses_an_unknown_target_in_one_line(capsys):
    assert benchmarks.main(["machine_code", "--target", "rocm:gfx000"]) == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks machine_code: ")
