"""`update`: change the weights of a live model as a whole or not at all.

    with update(model) as tx:
        tx.load("layers.0.weight", tensor)

Tensors are collected and planned; at the end of the context the lock closes, the bytes are written,
and the version rises. An exception before that leaves every byte of the model alone. Modes, and the
way back from a failure in each of them, are in commit. `load` and `reload` are updates too.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Named
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from fixpass.runtime.errors import (
    CheckpointError,
    PoisonedError,
    UpdateError,
    VersionError,
    level_of_caller,
)
from fixpass.runtime.weights.commit import Commit
from fixpass.runtime.weights.derived import DECLARED, SEARCHED, Staged, without_declared
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.group_commit import taking_part
from fixpass.runtime.weights.lock import WeightsLock, lock_of
from fixpass.runtime.weights.mapping import SAME_NAMES, Mapping
from fixpass.runtime.weights.module_hooks import protect
from fixpass.runtime.weights.options import Mode, OnStale, Options, Scope, mode_named
from fixpass.runtime.weights.own_loaders import run_own_loaders
from fixpass.runtime.weights.parameter_layout import any_layout_set
from fixpass.runtime.weights.pending_update import PendingUpdate
from fixpass.runtime.weights.plan import make_plan
from fixpass.runtime.weights.plan_cache import (
    Manifest,
    ModelSignature,
    SourceSignature,
    cached_plan,
    keep_plan,
)
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.rebind import bring_back_packed
from fixpass.runtime.weights.reports import LoadReport, UpdateReport, some
from fixpass.runtime.weights.route import check_twins, scales_without_taker
from fixpass.runtime.weights.stale import keep_search, stale_after, views_of, warning_of
from fixpass.runtime.weights.state_file import digest, resume
from fixpass.runtime.weights.stored import Stored
from fixpass.runtime.weights.targets import gc_paused, reshard, walk
from fixpass.runtime.weights.update_group import UpdateGroup


class _Prepared(NamedTuple):
    """An update that only has to be written."""

    work: Work
    written: Sequence[int]
    """Which of the model's tensors are written, as indices of the walk."""
    report: LoadReport
    covered: Named[str, tuple[int, int]]
    scales: list[str]
    is_whole: bool
    """Whether each written tensor is written whole, byte for byte."""


class Update:
    """An update that is open. When its context ends, everything given to it is written."""

    def __init__(self, model: nn.Module, base: int, options: Options) -> None:
        self.report: UpdateReport | None = None
        """The result; None until the update is done."""
        self.num_bytes = 0
        """Bytes that the commit moves."""
        self._model = model
        self._base = base
        self._options = options
        self._given = PendingUpdate(model, copies=options.mode == "buffered")
        self._live, transient = walk(model)
        self._views: list[Tensor] = []
        if options.mode == "double_buffer":
            weights = [target.tensor for target in self._live]
            self._views = views_of(model, [*weights, *transient])
        if DECLARED:
            self._live, self._options = without_declared(model, self._live, options)
        self._manifest = Manifest.of({target.name: target.tensor for target in self._live})

    def load(self, name: str, tensor: Tensor, *, start: Sequence[int] | None = None) -> None:
        """Take a tensor by its name in the checkpoint; with `start`, a part of a parameter.

        Args:
            name: in the checkpoint; with `start`, of the parameter.
            tensor: in mode "buffered" its values are copied now; in the other modes the tensor must
                not change before the update ends.
            start: the first element of the part in each dimension. Trailing zeros may be left out:
                (3,) is expert 3.

        """
        self._given.add(name, tensor, start)

    def load_state_dict(self, tensors: Named[str, Tensor]) -> None:
        """Take all tensors of a state dict."""
        with gc_paused():
            for name, tensor in tensors.items():
                self._given.add(name, tensor, None)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors from an iterator that may use their memory again at once.

        In modes other than "buffered" the tensors go to a temporary file.
        """
        self._given.add_iterator(tensors)

    def load_stored(self, tensors: Iterable[Stored] | Files) -> None:
        """Take tensors that are in files, which must not change before the update ends."""
        self._given.add_stored(tensors)

    def validate(self) -> LoadReport:
        """Check everything that was given so far, as at the end; the report of that load."""
        given = self._given
        return make_plan(given.checkpoint(), given.parts, self._live, self._options).report()

    def commit(self) -> None:
        """Write the update. Called once, when the context ends without an exception."""
        options, given = self._options, self._given
        with gc_paused():
            source, signature = given.signature, ModelSignature.of(self._manifest)
            cached = self._cached(source, signature)
            found = cached or self._planned(source, signature)
        self.num_bytes = found.report.num_bytes
        written = [self._live[index] for index in found.written]
        stale: tuple[str, ...] = ()
        # A search that found nothing is good for all updates with the plan that is kept.
        if options.on_stale != "ignore" and (cached is None or SEARCHED.get(self._model, True)):
            stale = stale_after(self._model, signature, [t.name for t in written], options.on_stale)
        staged = Staged([target.tensor for target in written], found.work) if DECLARED else None
        covers_all = options.strict is not None or options.scope == "model"
        commit = Commit(
            self._model,
            options,
            self._base,
            self._manifest,
            written,
            found.work,
            given.opened,
            covers_all=covers_all and not found.report.missing and not found.covered,
            is_whole=found.is_whole,
            views=self._views,
            staged=staged,
        )
        try:
            seconds = commit.run()
        except CheckpointError as error:
            given.note_cut_off(error)
            raise
        derived = () if staged is None else staged.names(self._model)
        self._finish(found, seconds, derived, stale)

    def _finish(
        self, found: _Prepared, seconds: float, derived: tuple[str, ...], stale: tuple[str, ...]
    ) -> None:
        """Make the report, and warn."""
        options, number = self._options, lock_of(self._model).version
        report = replace(found.report, seconds=time.perf_counter() - options.began)
        self.report = UpdateReport(
            report, number, options.mode, seconds, found.covered, derived, stale
        )
        unused = scales_without_taker(report, options.mapping) if report.skipped else []
        for what, names in (("were not loaded", found.scales), ("no parameter takes", unused)):
            if names:
                warnings.warn(f"scales that {what}: {some(names, 5)}", stacklevel=level_of_caller())
        if stale:
            warnings.warn(warning_of(stale), stacklevel=level_of_caller())

    def _cached(
        self, source: SourceSignature | None, signature: ModelSignature | None
    ) -> _Prepared | None:
        """The update by the plan of the last one, where it is like that."""
        found = cached_plan(self._model, source, signature, self._options)
        if found is None:
            return None
        if found.twins:
            stored = self._given.checkpoint()
            check_twins((stored[one], stored[other]) for one, other in found.twins)
        work = found.work(self._given.sources, self._live)
        return _Prepared(work, found.written, found.report, {}, found.scales, is_whole=True)

    def _planned(
        self, source: SourceSignature | None, signature: ModelSignature | None
    ) -> _Prepared:
        options, given = self._options, self._given
        plan = make_plan(given.checkpoint(), given.parts, self._live, options)
        in_file = options.mode in ("direct", "undo_log")
        check_twins(plan.twins)
        copies, sources = plan.copies, given.sources
        if plan.own:
            own, covered = run_own_loaders(plan.own, options.threads, in_file=in_file)
            plan.note_covered(covered, options)
            copies = [*copies, *own]
        work = Work.of(copies, plan.tensors, sources, batched=not options.finite)
        if options.on_stale == "ignore" and self._model in SEARCHED:
            keep_search(self._model, signature)
        report = plan.report()
        # A source that the signature does not know is none that the next update can have.
        source = source if len(work.given) == len(sources) else None
        keep_plan(self._model, source, signature, options, plan, work, report)
        is_whole = not (plan.own or plan.covered or plan.missing or any(c.view for c in copies))
        return _Prepared(work, plan.written, report, plan.covered, plan.scales, is_whole)


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
    group: "dist.ProcessGroup | UpdateGroup | None" = None,
    on_stale: OnStale = "warn",
) -> AbstractContextManager[Update]:
    """Open an update of a model's weights, written when the context ends without an exception.

    Args:
        model: its parameters and persistent buffers are updated, in any layout.
        mode: "buffered", "undo_log", "double_buffer" or "direct", see commit.
        version: the version afterwards, above the present one; one more by default.
        base: the version, or the digest, of the weights that this update changes.
        scope: "model" must give every parameter, "parameters" all of those that it touches, "parts"
            any bytes.
        mapping: from names of the checkpoint to those of the model.
        cast: round between float dtypes.
        finite: refuse NaN and infinities.
        timeout: seconds to wait for calls under way.
        threads: 0 for one a processor, at most 4.
        state_file: for a model in a file or in shared memory, see state_file.
        group: commit only where all ranks of this process group, or UpdateGroup, commit.
        on_stale: "warn" after the update of tensors that follow from its weights and are not
            declared with `derive`; "raise" before it; "ignore" them.

    Raises:
        CheckpointError: a tensor does not fit; the weights are those of before.
        VersionError: the weights are not those of `base`, or became others meanwhile.
        UpdateError: the update is refused or undone; the weights are those of before.

    """
    path = None if state_file is None else Path(state_file)
    options = Options(
        mode_named(mode), version, base, scope, mapping, cast, finite, timeout, threads, path
    )
    return open_update(model, replace(options, group=group, on_stale=on_stale))


@contextmanager
def open_update(model: nn.Module, options: Options) -> Iterator[Update]:
    """As `update`, with the options in one."""
    lock = lock_of(model)
    if lock.updating:
        raise UpdateError("another update of this model is open")
    lock.updating = True
    try:
        group = options.group
        with taking_part(group, options, lock) if group else nullcontext(options) as options:
            _check_base(model, lock, options)
            base = lock.version
            reshard(model)
            if any_layout_set():
                protect(model)
                bring_back_packed(model, options.timeout)
            with gc_paused():
                tx = Update(model, base, options)
            yield tx
            tx.commit()
    finally:
        lock.updating = False


def _check_base(model: nn.Module, lock: WeightsLock, options: Options) -> None:
    if options.state_file is not None:
        resume(model, options.state_file)
    if lock.poisoned and options.scope != "model":
        raise PoisonedError(f"{lock.poisoned}; scope={options.scope!r} does not make them whole")
    if options.version is not None and options.version <= lock.version:
        raise VersionError(f"version {options.version} does not follow version {lock.version}")
    if options.base is None:
        return
    found = digest(model) if isinstance(options.base, str) else lock.version
    if found != options.base:
        raise VersionError(f"the update changes {options.base}, and the weights are {found}")
