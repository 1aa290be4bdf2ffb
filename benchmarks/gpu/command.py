"""`python -m benchmarks gpu`: check and measure fixpass on a GPU, within a number of minutes.

Each part runs in a process of its own, under a time limit of its own, and writes its JSON as it
goes, so that a run that is cut off keeps its rows. Without a GPU, `--device cpu` runs every part
on small sizes, Triton kernels in the interpreter: it shows that the parts work and times nothing.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import FAILED, OK

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# In order of value. The number is a part's share of the minutes; a part gives what it leaves over
# to the parts after it.
PARTS: dict[str, tuple[str, float]] = {
    "compile": ("benchmarks.gpu.compiled:run", 1.0),
    "kernels": ("benchmarks.gpu.kernels:run", 1.5),
    "bandwidth": ("benchmarks.gpu.bandwidth:run", 1.75),
    "models": ("benchmarks.gpu.models:run", 3.0),
    "weights": ("benchmarks.gpu.weights:run", 1.0),
    "symmetric-memory": ("benchmarks.gpu.symmetric:run", 0.75),
}
LAST_SECONDS = 5.0


def main(argv: Sequence[str]) -> int:
    """Run the parts; 0 when all are ok, 1 otherwise."""
    epilog = "example: python -m benchmarks gpu --device cpu --only kernels"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, epilog=epilog
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", choices=list(PARTS), action="append", metavar="PART")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{status_line()} No CUDA or ROCm device is here; --device cpu is a dry run.")
        return 1
    out = arguments.out or default_folder(arguments.device)
    parts = {name: PARTS[name] for name in arguments.only or PARTS}
    return run_parts(parts, arguments.device, arguments.minutes * 60, out)


def run_parts(
    parts: Mapping[str, tuple[str, float]], device: str, seconds: float, out: Path
) -> int:
    """Run each part in turn, print a line for each, and write `gpu.json`, the total."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    total: dict[str, Any] = {**environment(device), "parts": {}}
    shares = {name: share for name, (_, share) in parts.items()}
    for name, (function, share) in parts.items():
        limit = max(1.0, (end - time.monotonic()) * share / sum(shares.values()))
        del shares[name]
        print(f"{name}: at most {limit:.0f} s", flush=True)
        total["parts"][name] = result = _run_part(name, function, device, limit, out)
        (out / "gpu.json").write_text(json.dumps(total, indent=1) + "\n")
        print(f"{name}: {result['status']}, {result['seconds']:.0f} s{_why(result)}", flush=True)
    print(f"JSON: {out}")
    return 0 if all(result["status"] == OK for result in total["parts"].values()) else 1


def _run_part(name: str, function: str, device: str, limit: float, out: Path) -> dict[str, Any]:
    """A part's status, seconds and rows; what its process printed last, where it ended badly."""
    path, log = out / f"{name}.json", out / f"{name}.log"
    path.unlink(missing_ok=True)
    soft = max(1.0, limit - LAST_SECONDS)
    command = [sys.executable, "-P", "-m", "benchmarks.gpu.part", function, "--device", device]
    command += ["--seconds", str(soft), "--json", str(path)]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        problem = _wait(process, limit)
    text = log.read_text(errors="replace")
    print("".join(f"{line}\n" for line in text.splitlines() if line.startswith("  ")), end="")
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result = {"rows": [], "checks": [], "errors": [], **result}
    if problem:
        result["status"] = FAILED if result.get("status") in (None, OK) else result["status"]
        result["errors"].append({"what": name, "error": problem, "trace": text[-3000:]})
        result["status"] = FAILED
        path.write_text(json.dumps(result, indent=1) + "\n")
    else:
        log.unlink()
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    """The problem with which the part ended; empty for none."""
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        # The part leads a session of its own: its children end with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended at its limit of {limit:.0f} s"
    return "" if code == 0 else f"its process died with exit status {code}"


def _why(result: Mapping[str, Any]) -> str:
    """What follows the status on a part's line."""
    wrong = [row["what"] for row in result["rows"] if not row.get("correct", True)]
    missed = [check["claim"] for check in result["checks"] if not check["holds"]]
    lines = [f"wrong: {what}" for what in wrong] + [f"missed: {claim}" for claim in missed]
    for error in result["errors"]:
        last = error.get("trace", "").strip().splitlines()[-3:]
        lines += [f"{error['what']}: {error['error']}", *(f"    {line}" for line in last)]
    return "".join(f"\n    {line}" for line in lines[:12])


def environment(device: str) -> dict[str, Any]:
    """The device, date, versions and commit that a reader judges the figures by."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in ("triton", "transformers", "safetensors")},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def default_folder(device: str) -> Path:
    """benchmarks/results/<device>; for a dry run, a new temporary folder."""
    if device == "cpu":
        return Path(tempfile.mkdtemp(prefix="fixpass-gpu-dry-run-"))
    return RESULTS / slug(device_name(device))


def slug(name: str) -> str:
    """A folder's name for a device: h100 of "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    models = [w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w) and not w.startswith("hbm")]
    return models[0] if models else "-".join(words)


def status_line(results: Path = RESULTS) -> str:
    """Whether and where fixpass has run on a GPU, as the docs say it."""
    totals = sorted(results.glob("*/gpu.json"))
    if not totals:
        return "fixpass has not yet run on a GPU."
    runs = []
    for path in totals:
        total = json.loads(path.read_text())
        parts = total["parts"].values()
        passed = sum(part["status"] == OK for part in parts)
        runs.append(
            f"{total['device']}, {total['date'][:10]}, commit {total['commit']}: "
            f"{passed} of {len(parts)} parts ok"
        )
    return f"fixpass has run on a GPU: {'; '.join(runs)}."
