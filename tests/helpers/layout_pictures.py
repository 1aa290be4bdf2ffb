"""Draw what set_layout does to the bytes of a weight, from a weight that is given each layout.

    PYTHONPATH=.:tests python -m helpers.layout_pictures

It writes docs/images/layout_*.svg. Cells stand in the order of memory. A cell has the colour and
the number of its row in the checkpoint.
"""

from pathlib import Path

import torch
from torch import nn

from fixpass.weights import pack, set_layout

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
# Shape of the weight, and how many elements are a cell.
LAYOUTS = {
    "column_major": ((3, 4), 1),
    "transposed": ((3, 4), 1),
    "transposed_dense": ((3, 4), 1),
    "aiter_16x16": ((16, 32), 4),
    "up_gate": ((4, 4), 1),
    "gate_up_interleaved": ((6, 4), 1),
}
COLOURS = ("#9ecae9", "#ffd37f", "#a7d8a0", "#f4a6a0", "#cdb5e6", "#d9c3a5", "#f7b6d2", "#c7d36f")
SIDE, GAP, TOP = 24, 20, 44


def weight_of(shape):
    """A weight whose values count its elements."""
    values = torch.arange(shape[0] * shape[1], dtype=torch.float32)
    return nn.Parameter(values.view(shape), requires_grad=False)


def rows_in_memory(tensor, columns, cell):
    """The row of the checkpoint of each cell, in the order of memory."""
    memory = tensor.data.as_strided((tensor.numel(),), (1,))
    return [int(memory[i]) // columns for i in range(0, tensor.numel(), cell)]


def panel(left, title, rows, width, label=str):
    """Lines of cells with a title above."""
    shapes = [f'<text x="{left}" y="18" class="title">{title}</text>']
    for i, row in enumerate(rows):
        x, y = left + i % width * SIDE, TOP + i // width * SIDE
        colour = COLOURS[row % len(COLOURS)]
        shapes.append(f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="{colour}"/>')
        shapes.append(f'<text x="{x + SIDE // 2}" y="{y + 16}" class="cell">{label(row)}</text>')
    return shapes


def facts(tensor):
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def picture(panels, notes, widths, height):
    """An SVG of panels side by side, with a note under each title."""
    lefts = [10 + sum(widths[:i]) + i * GAP for i in range(len(widths))]
    shapes = [shape for left, make in zip(lefts, panels, strict=True) for shape in make(left)]
    for left, note in zip(lefts, notes, strict=True):
        shapes.append(f'<text x="{left}" y="34" class="note">{note}</text>')
    total = lefts[-1] + widths[-1] + 10
    style = (
        "rect { stroke: #ffffff } text { font-family: sans-serif; fill: #808080 } "
        ".title { font-size: 14px; font-weight: bold } .note { font-size: 11px } "
        ".cell { font-size: 12px; fill: #202020; text-anchor: middle }"
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}">'
    )
    return "\n".join([opening, f"<style>{style}</style>", *shapes, "</svg>", ""])


def layout_picture(name):
    """The bytes of a weight in the checkpoint's layout and in the other one."""
    shape, cell = LAYOUTS[name]
    weight = weight_of(shape)
    before, notes = rows_in_memory(weight, shape[1], cell), [facts(weight)]
    set_layout(weight, name)
    after, notes = rows_in_memory(weight, shape[1], cell), [*notes, facts(weight)]
    width = shape[1] // cell
    size = max(width * SIDE, 240)
    return picture(
        [
            lambda left: panel(left, "in the checkpoint", before, width),
            lambda left: panel(left, name, after, width),
        ],
        notes,
        [size, size],
        TOP + len(before) // width * SIDE + 10,
    )


def pack_picture():
    """Three parameters before and after they are views of one tensor."""
    parts = [weight_of((2, 4)) for _ in "qkv"]
    packed = pack(parts, "qkv_pack")
    rows = [3 * [i] for i in range(3)]
    assert packed.shape == (6, 4)
    whole = [i for i in range(3) for _ in range(8)]
    panels = [
        lambda left, i=i: panel(left, "qkv"[i], 8 * rows[i][:1], 4, "qkv".__getitem__)
        for i in range(3)
    ]
    panels.append(lambda left: panel(left, "qkv_pack", whole, 4, "qkv".__getitem__))
    notes = [*(facts(part) for part in parts), facts(packed)]
    return picture(panels, notes, [150] * 4, TOP + 6 * SIDE + 10)


def pictures():
    """The text of each file."""
    found = {f"layout_{name}.svg": layout_picture(name) for name in LAYOUTS}
    return found | {"layout_qkv_pack.svg": pack_picture()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (IMAGES / name).write_text(text)
