"""The first sentence of an explained model: norms, launches and bytes, counted from its remarks."""

from collections.abc import Iterable

from fixpass.passes.base import Choice, Remark


def summary(remarks: Iterable[Remark], target: str) -> str:
    """One sentence on what the passes did; empty where they chose no norm kernel.

    The figures "instead of" are those of the target's first kernel, with the copies that this
    kernel needs. `explain` puts the sentence under the title.

    Example:
        >>> summary(report.remarks, "rocm:gfx942")
        'On rocm:gfx942: 8 of 17 norms read a strided layout without a copy; the norms take 17
        launches instead of 25; 2.8 MB not moved.'
    """
    remarks = tuple(remarks)
    choices = [remark.choice for remark in remarks if remark.choice is not None]
    norms = [choice for choice in choices if choice.launches > 0]
    if not norms:
        return ""
    total = sum(choice.num_norms for choice in norms)
    parts = [_layouts([choice for choice in norms if choice.is_strided], total)]
    launches = sum(choice.launches for choice in choices)
    first = sum(choice.first_launches for choice in choices)
    instead = f" instead of {first}" if first > launches else ""
    take = "the norm takes" if total == 1 else "the norms take"
    parts.append(f"{take} {launches} launch{'' if launches == 1 else 'es'}{instead}")
    if num_bytes := sum(remark.bytes_saved for remark in remarks):
        parts.append(f"{readable(num_bytes)} not moved")
    return f"On {target}: {'; '.join(parts)}."


def _layouts(strided: list[Choice], total: int) -> str:
    norms = "1 norm" if total == 1 else f"{total} norms"
    if not strided:
        return f"{norms} over dense tensors"
    free = sum(choice.num_norms for choice in strided if not choice.copied)
    reads = "reads" if free == 1 else "read"
    text = f"{free} of {norms} {reads} a strided layout without a copy"
    copied = sum(choice.num_norms for choice in strided) - free
    return f"{text}, {copied} through a copy" if copied else text


def readable(num_bytes: int) -> str:
    """`1,280 bytes`, `65.5 kB`, `2.8 MB`: decimal units, exact below 10,000."""
    if num_bytes < 10_000:
        return f"{num_bytes:,} bytes"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000 or unit == "GB":
            break
    return f"{value:,.1f} {unit}"
