"""Load a model again from a checkpoint, as an update: the same parameters, the same compiled code.

Sources, mappings and checks are those of `load`. Captured graphs and compiled code go on, except
that mode "double" moves memory.
"""

from collections.abc import Mapping as Named
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from fixpass.runtime.weights.formats.open import Source, files_of, opened
from fixpass.runtime.weights.kept import Keeping, kept_for
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.options import SAME_NAMES, Mode, Options, Scope
from fixpass.runtime.weights.origins import FromFiles, FromMemory, Origin
from fixpass.runtime.weights.repeat import repeated
from fixpass.runtime.weights.stream import Stream
from fixpass.runtime.weights.update import UpdateReport, open_update


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
    progress: bool | None = None,
    weights_only: bool = True,
) -> UpdateReport:
    """Give `model` the weights of `source`: files, a folder, a state dict or an iterator.

    Options are those of `update`; progress and weights_only those of `load`. Raises what `update`
    raises; then the weights are those of before. Scales that are not loaded raise with
    scope="model".
    """
    disable = None if progress is None else not progress
    path = None if state_file is None else Path(state_file)
    options = Options(mode, version, base, scope, mapping, cast, finite, timeout, threads, path)
    with (
        ExitStack() as stack,
        tqdm(unit="B", unit_scale=True, desc="reloading", disable=disable) as bar,
    ):
        options = replace(options, advance=bar.update)
        origin = _origin(source, model)
        if isinstance(origin, FromFiles):
            bar.total = origin.files.num_bytes
        if origin is not None and (report := repeated(model, origin, options)) is not None:
            return report
        with open_update(model, options) as tx:
            tx.keeping = None if origin is None else Keeping(model, origin)
            if isinstance(origin, FromFiles):
                tx.load_checkpoint(origin.checkpoint())
            elif isinstance(source, str | Path):
                checkpoint = stack.enter_context(opened(source, weights_only=weights_only))
                bar.total = sum(stored.num_bytes for stored in checkpoint.values())
                tx.load_checkpoint(checkpoint)
            elif isinstance(source, Named):
                tx.load_state_dict(source)
            else:
                assert isinstance(origin, Stream)
                tx.load_weights(origin)
    assert tx.report is not None
    return tx.report


def _origin(source: Source, model: nn.Module) -> Origin | Stream | None:
    """The source, where the next one may be like it."""
    if isinstance(source, str | Path):
        files = files_of(source)
        return None if files is None else FromFiles(files)
    if not isinstance(source, Named):
        return Stream(source)
    kept = kept_for(model)
    return FromMemory.of(source, None if kept is None else kept.origin)
