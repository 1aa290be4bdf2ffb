"""Check a checkpoint against a model from headers alone, and list all faults with a way out.

The model may be on the meta device. Values are read of tied tensors that are stored twice, and of
nothing else. Parameters with loaders of their own are checked by name and dtype: shapes are the
loader's.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Named
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats.open import StoredSource, checkpoint_of
from fixpass.runtime.weights.mapping import SAME_NAMES, Mapping
from fixpass.runtime.weights.own_loaders import own_loader
from fixpass.runtime.weights.parameter_layout import record_of
from fixpass.runtime.weights.placement import check_dtype, missing_parts, place, taken
from fixpass.runtime.weights.renames import pattern, suggest
from fixpass.runtime.weights.reports import printable, some
from fixpass.runtime.weights.route import NO_PARAMETER, Routed, Routes, check_twins, route
from fixpass.runtime.weights.stored import Checkpoint, Shape, Stored
from fixpass.runtime.weights.targets import WeightTarget, is_quantised, targets

FAMILIES: Named[str, str] = {
    "torchao": r":_weight_\w+$",
    "Quark": r"\.\w+_quantizer\.\w+$",
    "AutoRound, GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "compressed-tensors": r"\.(weight_packed|weight_shape|\w+_global_scale|\w+_zero_point)$",
    "ModelOpt": r"\.(weight_scale_2|pre_quant_scale)$",
    "fp8 in blocks": r"\.weight_scale_inv$",
}
"""Formats of quantised checkpoints, and names that only they have."""
NO_FAMILY = "in a format that the names do not tell"


@dataclass(frozen=True)
class Diagnosis:
    """All that is wrong with a load, or worth a look, in words."""

    num_tensors: int
    faults: tuple[str, ...]
    """Each of them makes `load` raise, or leaves a parameter without its values."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        count = f"{self.num_tensors:,} stored tensors: {len(self.faults) or 'no'} faults"
        lines = [count, *(f"fault: {fault}" for fault in self.faults)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass
class _Findings:
    """Names by kind of finding, before they are put in words."""

    unfit: dict[str, str] = field(default_factory=dict)
    """Parameters, and why their tensors do not fit."""
    plain: list[Stored] = field(default_factory=list)
    """Quantised tensors for parameters that are not quantised."""
    transposed: list[str] = field(default_factory=list)
    """Stored tensors that would fit with their last two dimensions exchanged."""
    single: list[str] = field(default_factory=list)
    """Parameters that get one value and have room for several."""
    square: list[str] = field(default_factory=list)
    """Stored tensors that fit either way."""
    own: list[str] = field(default_factory=list)
    """Parameters with loaders of their own."""


def check(
    source: StoredSource, model: nn.Module, mapping: Mapping = SAME_NAMES, *, cast: bool = False
) -> Diagnosis:
    """Say what a load of a checkpoint into a model would do wrong.

    Args:
        source: a path of any format that `load` takes, of which headers are read, or a state dict.
        model: on any device, also meta.
        mapping: from names of the checkpoint to those of the model.
        cast: whether the load may round between float dtypes.

    """
    checkpoint, model_tensors = checkpoint_of(source), targets(model)
    routes = route(checkpoint, mapping, model_tensors)
    found = _Findings()
    for name, routed in routes.taken.items():
        _look_at(found, model_tensors[name], routed, mapping, cast)
    missing = {
        name: _shape(target)
        for name, target in model_tensors.items()
        if routes.owner[name] == name and name not in routes.taken
        if getattr(target.tensor, "missing_param_init", "error") == "error"
    }
    spare = [*routes.unexpected, *(s.name for s in routes.skipped if s.why == NO_PARAMETER)]
    shapes = {name: checkpoint[name].shape for name in spare if name in checkpoint}
    used = {item.stored.name for routed in routes.taken.values() for item in routed}
    hints = [str(suggestion) for suggestion in suggest(missing, shapes, used)]
    scales = [name for name in checkpoint if mapping.is_scale(name)]
    family = _family(checkpoint)
    faults = [*_quantised(found, family), *_faults(routes, found, missing)]
    notes = [*hints, *_marks(found), *_skipped(routes), *_squares(found)]
    notes += [*_scales(scales, used, family), _memory(model_tensors, routes, found)]
    return Diagnosis(len(checkpoint), tuple(map(printable, faults)), tuple(map(printable, notes)))


def _faults(routes: Routes, found: _Findings, missing: Iterable[str]) -> list[str]:
    return [
        *_alike(found.unfit),
        *_nothing_stored(missing, routes.taken),
        *(f"no parameter takes {text}" for text in grouped(routes.unexpected)),
        *_twins(routes),
    ]


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one text each."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern(name), []).append(name)
    return [
        names[0] if len(names) == 1 else f"{alike} ({len(names):,})"
        for alike, names in found.items()
    ]


def _shape(target: WeightTarget) -> Shape:
    record = record_of(target.tensor)
    return tuple(target.tensor.shape) if record is None else record.plan.logical


def _look_at(
    found: _Findings, target: WeightTarget, routed: Sequence[Routed], mapping: Mapping, cast: bool
) -> None:
    name, dtype, whole = target.name, target.tensor.dtype, _shape(target)
    plain = [item.stored for item in routed if is_quantised(item.stored.dtype)]
    if plain and dtype.is_floating_point and not is_quantised(dtype):
        found.plain.extend(plain)
        return
    own = own_loader(target) is not None
    try:
        for item in routed:
            check_dtype(item.stored, name, dtype, cast=cast or own)
        lacks = missing_parts(routed) if own else _placed(name, whole, routed, mapping)
    except CheckpointError as error:
        found.unfit[name] = str(error)
        if own:
            return
        turned = not routed[0].candidate.transposed
        if _fits(name, whole, routed, mapping, transposed=turned):
            found.transposed.extend(item.stored.name for item in routed)
        elif _fits(name, whole, routed, mapping, broadcast=True):
            found.single.append(name)
        return
    if lacks:
        found.unfit[name] = f"{name!r} is filled in part: {lacks}"
    if own:
        found.own.append(name)
        return
    for item in routed:
        *_, rows, columns = (0, 1, *taken(item.stored.shape, item.candidate).shape)
        if rows == columns > 1 and not item.candidate.transposed:
            found.square.append(item.stored.name)


def _placed(name: str, whole: Shape, routed: Sequence[Routed], mapping: Mapping) -> str:
    return place(name, whole, routed, mapping.tensor_parallel).missing


def _fits(
    name: str, whole: Shape, routed: Sequence[Routed], mapping: Mapping, **marks: Any
) -> bool:
    """Whether the tensors would fit if the mapping marked them so."""
    marked = [item._replace(candidate=item.candidate._replace(**marks)) for item in routed]
    try:
        return not _placed(name, whole, marked, mapping)
    except CheckpointError:
        return False


def _alike(unfit: Named[str, str]) -> list[str]:
    """One text for all parameters whose names differ in numbers only."""
    ordered = sorted(unfit, key=pattern)
    groups = [list(group) for _, group in groupby(ordered, pattern)]
    found = [(unfit[names[0]], len(names)) for names in groups]
    return [text if n == 1 else f"{text}, and {n - 1:,} more like it" for text, n in found]


def _quantised(found: _Findings, family: str) -> list[str]:
    if not found.plain:
        return []
    names = some(grouped(stored.name for stored in found.plain), 3)
    return [
        f"the checkpoint is quantised ({family}) and the model is plain: {names} are "
        f"{found.plain[0].dtype}, for float parameters. Build the model with the checkpoint's "
        "quantisation, or dequantise the checkpoint"
    ]


def _nothing_stored(missing: Iterable[str], filled_names: Iterable[str]) -> list[str]:
    """What is missing, by the outermost module that nothing at all is stored for."""
    filled = {module for name in filled_names for module in _modules(name)}
    modules: dict[str, list[str]] = {}
    for name in missing:
        head = next((module for module in _modules(name) if module not in filled), name)
        modules.setdefault(head, []).append(name)
    whole = [head for head, names in modules.items() if len(names) > 1]
    rest = [name for names in modules.values() if len(names) == 1 for name in names]
    return [
        *(f"nothing is stored for {head}.* ({len(modules[head]):,} parameters)" for head in whole),
        *(f"nothing is stored for {text}" for text in grouped(rest)),
    ]


def _modules(name: str) -> Iterator[str]:
    """The modules that hold a parameter, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def _twins(routes: Routes) -> list[str]:
    faults = []
    for pair in routes.twins:
        try:
            check_twins((pair,))
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def _skipped(routes: Routes) -> list[str]:
    by_why: dict[str, list[str]] = {}
    for skipped in routes.skipped:
        by_why.setdefault(f"{skipped.branch}: {skipped.why}", []).append(skipped.name)
    return [f"skipped ({why}): {some(grouped(names))}" for why, names in by_why.items()]


def _marks(found: _Findings) -> list[str]:
    marks = {
        "stored transposed": ("transposed", found.transposed),
        "one value for several slots": ("broadcast", found.single),
    }
    return [
        f"{what}? Mapping({mark}=({', '.join(sorted({repr(pattern(n)) for n in names}))},))"
        for what, (mark, names) in marks.items()
        if names
    ]


def _squares(found: _Findings) -> list[str]:
    if not found.square:
        return []
    return [
        "square, so that the shape does not show whether they are stored transposed, which "
        f"Mapping(transposed=...) says: {some(grouped(found.square))}"
    ]


def _family(checkpoint: Checkpoint) -> str:
    """The formats of quantised checkpoints that the names are of."""
    names = {pattern(name) for name in checkpoint}
    found = [f for f, text in FAMILIES.items() if any(re.search(text, name) for name in names)]
    return " or ".join(found) or NO_FAMILY


def _scales(scales: Sequence[str], used: set[str], family: str) -> list[str]:
    if not scales and family == NO_FAMILY:
        return []
    loaded = sum(name in used for name in scales)
    text = f"quantised ({family}): {loaded:,} of {len(scales):,} scales loaded"
    unsupported = ": a load does not know these flattened tensors" * ("torchao" in family)
    return [text + unsupported]


def _memory(model: Named[str, WeightTarget], routes: Routes, found: _Findings) -> str:
    """The memory that a load takes besides the model, by mode."""
    sizes = {name: sum(i.stored.num_bytes for i in routed) for name, routed in routes.taken.items()}
    moved, most = sum(sizes.values()), max((sizes[name] for name in found.own), default=0)
    held = sum({id(t.tensor): t.tensor.nbytes for t in model.values()}.values())
    own = f", and {2 * most:,} bytes for a parameter with a loader of its own" * bool(most)
    return (
        f"memory besides the {held:,} bytes of the model: in mode direct and undo_log 8 MiB a "
        f"thread, in mode buffered {moved:,} bytes, in mode double_buffer {held:,} bytes{own}"
    )
