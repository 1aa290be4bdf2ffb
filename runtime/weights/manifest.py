"""What an update may not change of a parameter, written down before and compared after.

Object, class, attributes by identity, requires_grad, dtype, device, shape, strides and address. A
difference is an UpdateError that lists all of them. Values are not looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.look import Layouts, Look, pointers_of

MOST = 10


@dataclass(frozen=True)
class Manifest:
    """Parameters by name as they were; they are held, so that no id can be used again."""

    names: Sequence[str]
    look: Look

    @staticmethod
    def of(params: Mapping[str, Tensor]) -> "Manifest":
        return Manifest(list(params), Look.at(list(params.values())))

    def check(self, params: Mapping[str, Tensor], *, moved: bool = False) -> None:
        """Raise UpdateError where anything is different; with `moved` the address may be."""
        found = [params.get(name) for name in self.names]
        here = [param for param in found if param is not None]
        if len(here) == len(found) and self.look.is_at(here, moved=moved):
            return
        faults = [
            f"{name}: {fault}"
            for index, name in enumerate(self.names)
            for fault in self._faults(index, found[index], moved)
        ]
        raise UpdateError("the update changed more than values: " + "; ".join(faults[:MOST]))

    def _faults(self, index: int, param: Tensor | None, moved: bool) -> Iterator[str]:
        if param is None or param is not self.look.tensors[index]:
            yield "another object is in its place"
            return
        was, now = self.look.layouts, Layouts.of([param])
        if now.kinds[0] is not was.kinds[index]:
            yield f"its class was {was.kinds[index].__name__} and is {now.kinds[0].__name__}"
        before, after = self.look.attributes[index], vars(param)
        for key in sorted({*before, *after}):
            if key not in after:
                yield f"attribute {key!r} is gone"
            elif key not in before:
                yield f"attribute {key!r} is new"
            elif after[key] is not before[key]:
                yield f"attribute {key!r} is another object"
        (dtype, device, shape), (dtype_now, device_now, shape_now) = was.facts[index], now.facts[0]
        pairs: list[tuple[str, object, object]] = [
            ("requires_grad", was.gradients[index], now.gradients[0]),
            ("dtype", dtype, dtype_now),
            ("device", device, device_now),
            ("shape", tuple(shape), tuple(shape_now)),
            ("stride", was.strides[index], now.strides[0]),
        ]
        if not moved:
            pairs.append(("address", self.look.pointers[index], pointers_of([param])[0]))
        for what, one, other in pairs:
            if one != other:
                yield f"{what} was {one} and is {other}"
