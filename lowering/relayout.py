"""The cheapest legal relayout: nothing, a view of rows, a copy of exactly one operand.

`cheapest_relayout` tries the few changes that keep the values and asks the kernel's contract about
each; the bytes that a change moves decide. It plans; `insert-relayout` edits the graph.
"""

from dataclasses import dataclass, replace
from itertools import product

from fixpass.lowering.contract import Kernel, Verdict
from fixpass.lowering.layout import Dim, Layout
from fixpass.lowering.site import Site


@dataclass(frozen=True)
class Relayout:
    """Which operands to copy dense, and whether row operands are then viewed as 2-D rows."""

    copied: tuple[str, ...]
    as_rows: bool
    num_bytes: Dim

    def __bool__(self) -> bool:
        return bool(self.copied) or self.as_rows

    def __str__(self) -> str:
        parts = [f"copy {' and '.join(self.copied)}"] if self.copied else []
        parts += ["view as rows"] if self.as_rows else []
        return ", ".join(parts) or "nothing to change"


def cheapest_relayout(kernel: Kernel, site: Site) -> Relayout | None:
    """The change that makes the contract hold and moves the fewest bytes, or None."""
    if kernel.check(site):
        return Relayout((), False, 0)
    groups: list[tuple[str, ...]] = [(name,) for name in site.rows]
    # The parameters are small: they are copied together, where that helps at all.
    groups += [site.loose_parameters] if site.loose_parameters else []
    best: Relayout | None = None
    for flags in product((False, True), repeat=len(groups) + 1):
        as_rows, *copies = flags
        chosen = (group for group, flag in zip(groups, copies, strict=True) if flag)
        copied = tuple(name for group in chosen for name in group)
        plan = Relayout(copied, as_rows, copy_bytes(site, copied))
        if best is not None and not is_cheaper(plan, best):
            continue
        changed = apply_relayout(site, plan)
        if changed is not None and kernel.check(changed):
            best = plan
    return best


def why_not(kernel: Kernel, site: Site) -> Verdict:
    """The constraint that still fails after every change that a relayout can make."""
    names = (*site.rows, *site.loose_parameters)
    everything = apply_relayout(site, Relayout(names, bool(site.x.rank), 0))
    verdict = kernel.check(everything or site)
    return kernel.check(site) if verdict else replace(verdict, site=site)


def apply_relayout(site: Site, plan: Relayout) -> Site | None:
    """The site after the change, or None when rows are not proved to merge without a copy."""
    changed: dict[str, Layout] = {}
    for name in dict.fromkeys((*site.rows, *plan.copied)):
        layout: Layout | None = site.layouts[name]
        if name in plan.copied:
            layout = Layout.contiguous(site.layouts[name].shape, site.layouts[name].dtype)
        if plan.as_rows and layout is not None and name in site.rows:
            layout = layout.rows()
        if layout is None:
            return None
        changed[name] = layout
    return site.with_layouts(**changed)


def copy_bytes(site: Site, copied: tuple[str, ...]) -> Dim:
    """Bytes read and written by the copies."""
    return sum(2 * site.layouts[name].num_bytes for name in copied)


def is_cheaper(left: Relayout, right: Relayout) -> bool:
    """Fewer bytes at the traced sizes, then fewer changes."""
    return (hint(left.num_bytes), len(left.copied), left.as_rows) < (
        hint(right.num_bytes),
        len(right.copied),
        right.as_rows,
    )


def hint(value: Dim) -> int:
    """The value at the sizes seen while tracing, 4096 for an unbacked size; adds no guard."""
    if isinstance(value, int):
        return value
    known_size = value.node.hint
    return 4096 if known_size is None else int(known_size)
