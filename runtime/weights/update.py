"""An update of a model's weights that happens as a whole or not at all.

    with update(model) as tx:
        tx.load("layers.0.weight", tensor)

What is loaded is collected and checked; at the end of the context the gate closes, the bytes are
written, and the version rises. An exception before that leaves every byte of the model alone. How
the bytes are written, and what undoes them, is in commit.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Named
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from fixpass.runtime.errors import PoisonedError, UpdateError, VersionError
from fixpass.runtime.weights.collected import Collected, Prepared, in_staging, values_of
from fixpass.runtime.weights.commit import Commit
from fixpass.runtime.weights.digest import digest
from fixpass.runtime.weights.formats import memory
from fixpass.runtime.weights.kept import Keeping
from fixpass.runtime.weights.lock import WeightsLock, closed, lock_of, over, tensors_of
from fixpass.runtime.weights.manifest import Manifest
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.module_hooks import protect
from fixpass.runtime.weights.occupied import Occupied
from fixpass.runtime.weights.options import SAME_NAMES, Mode, Options, Scope
from fixpass.runtime.weights.packed_parameters import has_left_pack, return_to_pack
from fixpass.runtime.weights.places import Places, places
from fixpass.runtime.weights.report import LoadReport
from fixpass.runtime.weights.state_file import resume
from fixpass.runtime.weights.stored import Checkpoint, Stored
from fixpass.runtime.weights.targets import reshard, targets
from fixpass.runtime.weights.weight_version import committed


@dataclass(frozen=True)
class UpdateReport:
    """What an update did: the load, the version that it made, how long calls were held back.

    closed: seconds. covered: bytes written of each parameter that was not written whole, and all
    of its bytes.
    """

    load: LoadReport
    version: int
    mode: Mode
    closed: float
    covered: Named[str, tuple[int, int]]

    def __str__(self) -> str:
        parts = [f"{name}: {a:,} of {b:,} bytes" for name, (a, b) in self.covered.items()]
        return "\n".join(
            [
                str(self.load),
                f"version {self.version}, {self.mode}, calls held back for {self.closed:.3f} s",
                *parts,
            ]
        )


class Update:
    """An update that is open. All that is loaded is written when its context ends, or nothing."""

    def __init__(self, model: nn.Module, options: Options, stack: ExitStack) -> None:
        self.report: UpdateReport | None = None
        """What was done; None until it is."""
        self.keeping: Keeping | None = None
        """Takes the plan of what was written, where the next update may be like it."""
        self._model = model
        self._options = options
        self._stack = stack
        self._collected = Collected()

    @cached_property
    def _memory(self) -> Occupied:
        return Occupied.by(tensors_of(self._model))

    def load(self, name: str, tensor: Tensor, *, start: Sequence[int] | None = None) -> None:
        """Take a tensor by its name in the checkpoint; with `start`, a part of a parameter.

        start: where in the parameter `name` the part begins, in elements for each dimension, the
        last ones 0 where they are left out: (3,) is expert 3. In mode "staged" the values are
        copied now; in the other modes the tensor must not change before the update ends.
        """
        stored = memory.from_state_dict({name: tensor})[name]
        if self._options.mode == "buffered" or self._is_live(stored):
            (stored,) = in_staging([stored], self._options.threads)
        if start is None:
            self._collected.add(stored)
        else:
            self._collected.add_part(stored, start)

    def _is_live(self, stored: Stored) -> bool:
        """Whether the values lie in memory of the model, which the commit writes over."""
        return self._memory.holds_any(values_of(stored))

    def load_state_dict(self, tensors: Named[str, Tensor]) -> None:
        """Take all tensors of a state dict."""
        for name, tensor in tensors.items():
            self.load(name, tensor)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors from an iterator that may use their memory again at once.

        In modes other than "staged" they go to a temporary file.
        """
        if self._options.mode == "buffered":
            for name, tensor in tensors:
                self.load(name, tensor)
            return
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fixpass-"))
        for stored in memory.from_iterator(tensors, Path(folder) / "tensors").values():
            self._collected.add(stored)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take the tensors of a checkpoint; in mode "staged" their bytes are read now."""
        found: Iterable[Stored] = checkpoint.values()
        if self._options.mode == "buffered":
            found = in_staging(found, self._options.threads)
        for stored in found:
            self._collected.add(stored)

    def validate(self) -> LoadReport:
        """Check all that was loaded so far as at the end; what the load would be."""
        return self._prepare(places(targets(self._model))).report

    def _prepare(self, where: Places) -> Prepared:
        options = self._options
        return self._collected.prepare(where, options.mapping, options.scope, options.cast)

    def _commit(self, work: Commit) -> None:
        prepared, seconds = work.run()
        if self.keeping is not None:
            self.keeping.keep(prepared, self._options)
        committed(self._model)
        self.report = UpdateReport(
            replace(prepared.report, seconds=time.perf_counter() - self._options.began),
            lock_of(self._model).version,
            self._options.mode,
            seconds,
            prepared.covered,
        )


@contextmanager
def update(
    model: nn.Module,
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
) -> Iterator[Update]:
    """An update of the weights of `model`, written when the context ends without an exception.

    mode: "staged", "journal" or "double": what an update costs and what undoes it, see commit.
    version: what the model has afterwards, above the present one; one more by default. base: the
    version, or the digest, of the weights that this update changes. scope: "model" must give every
    parameter, "parameters" those that it touches whole, "parts" any bytes. mapping: from names of
    the checkpoint to those of the model. cast: round between float dtypes. finite: refuse NaN and
    infinities. timeout: seconds to wait for calls under way. threads: 0 for one a processor, at
    most 4. state_file: for a model in a file or in shared memory, see saved_state.

    Raises CheckpointError for what does not fit, VersionError for another base, UpdateError
    otherwise; then the weights are those of before. Calls in the gate of the model raise
    PoisonedError where they are not, which only a failing machine brings about.
    """
    path = None if state_file is None else Path(state_file)
    options = Options(mode, version, base, scope, mapping, cast, finite, timeout, threads, path)
    with open_update(model, options) as tx:
        yield tx


@contextmanager
def open_update(model: nn.Module, options: Options) -> Iterator[Update]:
    """As `update`, with the options in one."""
    with alone(model, options) as base, ExitStack() as stack:
        reshard(model)
        protect(model)
        _bring_back_packed(model, options)
        live = targets(model)
        manifest = Manifest.of({name: target.tensor for name, target in live.items()})
        tx = Update(model, options, stack)
        yield tx
        tx._commit(Commit(model, live, manifest, base, tx._prepare, options))


@contextmanager
def alone(model: nn.Module, options: Options) -> Iterator[int]:
    """A context for the one update of a model; its value is the version that it changes."""
    gate = lock_of(model)
    if gate.updating:
        raise UpdateError("another update of this model is open")
    gate.updating = True
    try:
        _check_base(model, gate, options)
        yield gate.version
    finally:
        gate.updating = False


def _check_base(model: nn.Module, gate: WeightsLock, options: Options) -> None:
    if options.state_file is not None:
        resume(model, options.state_file)
    if gate.poisoned and options.scope != "model":
        raise PoisonedError(f"{gate.poisoned}; scope={options.scope!r} does not make them whole")
    if options.version is not None and options.version <= gate.version:
        raise VersionError(f"version {options.version} does not follow version {gate.version}")
    if options.base is None:
        return
    found = digest(model) if isinstance(options.base, str) else gate.version
    if found != options.base:
        raise VersionError(f"the update changes {options.base}, and the weights are {found}")


def _bring_back_packed(model: nn.Module, options: Options) -> None:
    """Parameters of a pack that were given other memory go back to it: it is what kernels read."""
    away = [tensor for tensor in tensors_of(model) if has_left_pack(tensor)]
    if away:
        with closed(over(away), options.timeout):
            for tensor in away:
                return_to_pack(tensor)
