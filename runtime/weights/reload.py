"""Load a model again from a checkpoint, as an update: the same parameters, the same compiled code.

Sources, mappings and checks are those of `load`. Captured graphs and compiled code go on, except
that mode "double" moves memory.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from fixpass.runtime.checkpoint.mapping import Mapping
from fixpass.runtime.checkpoint.sources import Source, opened
from fixpass.runtime.weights.options import SAME_NAMES, Mode, Options, Scope
from fixpass.runtime.weights.transaction import UpdateReport, open_update


def reload(
    model: nn.Module,
    source: Source,
    mode: Mode = "staged",
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
    with tqdm(unit="B", unit_scale=True, desc="reloading", disable=disable) as bar:
        options = replace(options, advance=bar.update)
        if isinstance(source, str | Path):
            with opened(source, weights_only=weights_only) as checkpoint:
                bar.total = sum(stored.num_bytes for stored in checkpoint.values())
                with open_update(model, options) as tx:
                    tx.load_checkpoint(checkpoint)
        else:
            with open_update(model, options) as tx:
                tx.load_any(source)
    assert tx.report is not None
    return tx.report
