"""Load a checkpoint into a model: everything is checked first, then every byte goes where it is.

Parameters keep their identity, memory and attributes. Where anything does not fit, the model is as
before. Reads go straight into the parameters; over them a load needs the staging buffers alone. It
does not make parameters, and does not dequantise.
"""

import time
import warnings
from contextlib import ExitStack

from torch import nn
from tqdm import tqdm

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats.open import Source, opened
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.own_loaders import run_own_loads
from fixpass.runtime.weights.plan import Missed, Plan, fill, make_plan
from fixpass.runtime.weights.read import read
from fixpass.runtime.weights.report import RAISES, LoadReport, Strict, some
from fixpass.runtime.weights.targets import reshard, targets
from fixpass.runtime.weights.undo_log import UndoLog

_SAME_NAMES = Mapping()


def load(
    model: nn.Module,
    checkpoint: Source,
    *,
    mapping: Mapping = _SAME_NAMES,
    strict: Strict = "complete",
    missing: Missed = "error",
    cast: bool = False,
    journal: bool = False,
    threads: int = 0,
    progress: bool | None = None,
    weights_only: bool = True,
) -> LoadReport:
    """Load `checkpoint` into the parameters and persistent buffers of `model`.

    checkpoint: a safetensors file, index, glob pattern or folder; a folder of
    torch.distributed.checkpoint; a file of torch.save; a state dict; an iterator of names and
    tensors, which is first written to a temporary file. strict: "missing" raises for parameters
    that are not stored, "complete" for unexpected tensors too, "exact" for skipped tensors and
    initialised parameters too, "none" for none of these. missing: parameters that are not stored
    are an error at these levels, or filled with "ones" or "zeros". cast: round between float
    dtypes. journal: keep the old bytes in a temporary file, so that a file that breaks while it
    is read leaves the model as before; parameters with a weight_loader of their own always do.
    threads: 0 for one a processor, at most 4. progress: a bar on stderr; None for one on a
    terminal. weights_only: False lets pickles run code.

    Raises CheckpointError, with the model as before, where the checkpoint is broken or does not
    fit. Warns of a scale that was not loaded, where that does not raise.
    """
    if strict not in RAISES:
        raise CheckpointError(f"strict is one of {', '.join(RAISES)}, not {strict!r}")
    began = time.perf_counter()
    reshard(model)
    with opened(checkpoint, weights_only=weights_only) as stored:
        plan = make_plan(stored, mapping, targets(model), missing=missing, cast=cast)
        faults = plan.report().faults(strict)
        if faults:
            raise CheckpointError("\n".join([*faults, f"strict={strict!r} raises for these"]))
        execute(plan, journal=journal, threads=threads, progress=progress)
    if plan.scales:
        warnings.warn(f"scales that were not loaded: {some(plan.scales)}", stacklevel=2)
    return plan.report(time.perf_counter() - began)


def execute(
    plan: Plan, *, journal: bool = False, threads: int = 0, progress: bool | None = None
) -> None:
    """Do what a plan says."""
    disable = None if progress is None else not progress
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="loading", disable=disable)
        )
        kept = stack.enter_context(UndoLog()) if plan.own or journal else None
        if kept is not None and journal:
            for copy in plan.copies:
                kept.keep(copy.target)
        # Loaders of parameters' own come first: they may raise, and these reads do not.
        if kept is not None:
            run_own_loads(plan.own, kept, threads, bar.update)
        try:
            read(plan.copies, threads=threads, advance=bar.update)
        except CheckpointError as error:
            if not journal:
                error.add_note("Parameters may hold old and new bytes: journal=True undoes this")
            raise
        fill(plan)
