"""Compile the models of `tests/helpers/models.py` with Inductor and write `docs/models.md`.

    make models-page

It compiles each model four times, which takes half an hour on one core, and prints a row as soon
as it has it. The tests do not run it; they hold what it found: counts and tolerances.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from fixpass import explain
from helpers.models import NAMES, TOLERANCE, Model, Norms, build, norms_on, outputs

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BACKENDS = ("inductor", "fixpass")
HEAD = """\
# Models

Real `transformers` classes with small random configurations (two layers, 64 wide), compiled
through Inductor on CPU. Norms counts the modules of a norm class; the next column says what
`canonicalize-norms` made of them, as rms_norm / layer_norm / add_rms_norm. An error is the
largest absolute difference to eager in the logits, or in the last hidden state where there are
none, of a prefill of two sequences of 12 tokens (12 images for ViT).

| model | norms | rms / layer / add | missed | fullgraph | largest value | float32: inductor | float32: fixpass | bfloat16: inductor | bfloat16: fixpass |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
FOOT = """
| worst error / largest value | inductor | fixpass | allowed |
| --- | --- | --- | --- |
{worst}

What a result may differ from eager by is twice the worst error of Inductor itself, rounded up.
Prefill and a token behind a cache, static and dynamic lengths, float32 and bfloat16 are tested
for every model in `tests/test_models.py`.

`make models-page` measures again and writes this page.
"""

Errors = dict[tuple[str, torch.dtype], float]


def main() -> None:
    warnings.simplefilter("ignore")
    lines, relative = [], []
    for name in NAMES:
        line, errors = measure(name)
        print(line, flush=True)
        lines.append(line)
        relative.append(errors)
    foot = FOOT.format(worst="\n".join(_worst(relative, dtype) for dtype in DTYPES))
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + foot)


def measure(name: str) -> tuple[str, Errors]:
    """The row of a model, and its errors relative to its largest value."""
    model = build(name)
    with torch.no_grad():
        found = norms_on(explain(model.module, **model.prefill()))
    errors: Errors = {}
    relative: Errors = {}
    for dtype in DTYPES:
        model = build(name, dtype)
        want = outputs(model.module, model.prefill())["result"]
        largest = float(want.abs().max())
        for backend in BACKENDS:
            got = _compiled(model, backend)["result"]
            errors[backend, dtype] = float((got - want).abs().max())
            relative[backend, dtype] = errors[backend, dtype] / largest
    cells = [name, len(model.norm_modules), _counts(found), "; ".join(found.missed) or "none"]
    cells += [model.why_not_fullgraph or "yes", f"{largest:.2g}"]
    cells += [f"{errors[backend, dtype]:.1e}" for dtype in DTYPES for backend in BACKENDS]
    return "| " + " | ".join(map(str, cells)) + " |", relative


def _compiled(model: Model, backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    compiled = torch.compile(model.module, backend=backend, fullgraph=model.fullgraph)
    return outputs(compiled, model.prefill())


def _counts(found: Norms) -> str:
    return f"{found.rms_norm} / {found.layer_norm} / {found.add_rms_norm}"


def _worst(relative: list[Errors], dtype: torch.dtype) -> str:
    errors = (max(found[backend, dtype] for found in relative) for backend in BACKENDS)
    cells = [DTYPES[dtype], *(f"{error:.1e}" for error in errors), f"{TOLERANCE[dtype]:.1e}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
