"""`load` and `reload`: give a model all tensors of one source, as one update."""

import warnings
from collections.abc import Mapping as Named
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fixpass.runtime.weights.formats.open import Source, opened
from fixpass.runtime.weights.mapping import SAME_NAMES, Mapping
from fixpass.runtime.weights.options import (
    Missed,
    Mode,
    OnStale,
    Options,
    Scope,
    Strict,
    mode_named,
)
from fixpass.runtime.weights.reports import LoadReport, UpdateReport
from fixpass.runtime.weights.update import open_update
from fixpass.runtime.weights.update_group import UpdateGroup


def load(
    model: nn.Module,
    checkpoint: Source,
    mode: Mode = "direct",
    *,
    mapping: Mapping = SAME_NAMES,
    strict: Strict = "complete",
    missing: Missed = "error",
    cast: bool = False,
    journal: bool = False,
    threads: int = 0,
    progress: bool | None = None,
    weights_only: bool = True,
) -> LoadReport:
    """Load `checkpoint` into the parameters and persistent buffers of `model`.

    Parameters keep their identity, memory, layout and attributes. Everything is checked before a
    byte changes. The lock of the model is closed while bytes are written, and the version rises.

    Args:
        model: the model, with any layouts, shards, ties and wrappers.
        checkpoint: a safetensors file, index, glob pattern or folder; a folder of
            torch.distributed.checkpoint; a file of torch.save; a state dict; or an iterator of
            names and tensors, which is first written to a temporary file.
        mode: "direct" reads straight into the parameters, and needs no memory. A file that breaks
            while it is read leaves a mixture then, and calls raise PoisonedError. The modes of
            `update` leave the old weights.
        mapping: from names of the checkpoint to those of the model.
        strict: "missing" raises for parameters that are not stored, "complete" for unexpected
            tensors too, "exact" for skipped tensors and initialised parameters too, "none" for none
            of these.
        missing: parameters that are not stored are an error at these levels, or filled with "ones"
            or "zeros".
        cast: round between float dtypes.
        journal: the former name of mode="undo_log".
        threads: 0 for one a processor, at most 4.
        progress: a bar on stderr; None for a bar on a terminal.
        weights_only: False lets pickles run code.

    Raises:
        CheckpointError: the checkpoint is broken or does not fit; the model is as before.

    Warns of a scale of the model that was not loaded, where that does not raise.

    """
    if journal:
        text = "journal=True is now called mode='undo_log'"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        mode = "undo_log"
    options = Options(
        mode_named(mode),
        mapping=mapping,
        cast=cast,
        threads=threads,
        strict=strict,
        missing=missing,
    )
    return _run(model, checkpoint, options, "loading", progress, weights_only).load


def reload(
    model: nn.Module,
    source: Source,
    mode: Mode = "buffered",
    *,
    version: int | None = None,
    base: int | str | None = None,
    scope: Scope = "model",
    mapping: Mapping = SAME_NAMES,
    cast: bool = False,
    finite: bool = False,
    timeout: float | None = None,
    threads: int = 0,
    state_file: str | Path | None = None,
    group: dist.ProcessGroup | UpdateGroup | None = None,
    on_stale: OnStale = "warn",
    progress: bool | None = None,
    weights_only: bool = True,
) -> UpdateReport:
    """Give a live model the weights of `source`: files, a folder, a state dict or an iterator.

    Captured graphs and compiled code go on, but for mode "double_buffer", which moves memory. A
    reload that is like the last one of the model uses its plan again.

    Options are those of `update`; source, progress and weights_only are those of `load`.

    Raises what `update` raises; then the weights are those of before. Scales that are not loaded
    raise with scope="model".

    """
    path = None if state_file is None else Path(state_file)
    options = Options(
        mode_named(mode), version, base, scope, mapping, cast, finite, timeout, threads, path
    )
    options = replace(options, group=group, on_stale=on_stale)
    return _run(model, source, options, "reloading", progress, weights_only)


def _run(
    model: nn.Module,
    source: Source,
    options: Options,
    what: str,
    progress: bool | None,
    weights_only: bool,
) -> UpdateReport:
    """Update `model` from `source`, with a bar of its progress in bytes."""
    disable = None if progress is None else not progress
    with tqdm(unit="B", unit_scale=True, desc=what, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.total = tx.num_bytes
            bar.update(count)

        with open_update(model, replace(options, advance=advance)) as tx:
            if isinstance(source, str | Path):
                found = opened(source, weights_only=weights_only)
                if isinstance(found, Named):
                    tx.load_state_dict(found)
                else:
                    tx.load_stored(found)
            elif isinstance(source, Named):
                tx.load_state_dict(source)
            else:
                tx.load_weights(source)
    assert tx.report is not None
    return tx.report
