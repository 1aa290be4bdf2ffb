"""Part weights: layouts, updates and reloads of weights on the device, and captured graphs.

Every way of writing is followed by a look at the values, at the addresses, and at the results of
code that was compiled, and captured in a CUDA graph, before the write.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import captured, wait, wall_seconds
from benchmarks.gpu.compiled import BF16_ERROR
from benchmarks.gpu.part import Part, relative_error
from fixpass.backend import fixpass as backend
from fixpass.weights import logical, reload, reset_layout, set_layout, update

LAYOUTS = ("aiter_16x16", "column_major")
MODES = ("buffered", "undo_log", "double_buffer")
OF_MEMCPY = 0.8


class Layers(nn.Module):
    """Square linear layers with a residual."""

    def __init__(self, count: int, hidden: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False, device=device, dtype=torch.bfloat16)
            for _ in range(count)
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


def run(part: Part) -> None:
    for layout in LAYOUTS:
        with part.attempt(f"set_layout {layout}"):
            _set_layout(part, layout)
    with part.attempt("updates"), torch.no_grad():
        _updates(part)


def _set_layout(part: Part, layout: str) -> None:
    shape = (4096, 4096) if part.on_gpu else (64, 64)
    values = torch.randn(shape, device=part.device).to(torch.bfloat16)
    weight = nn.Parameter(values.clone(), requires_grad=False)
    on_cpu = nn.Parameter(values.cpu().clone(), requires_grad=False)
    address = weight.data_ptr()
    wait(part.device)
    started = time.perf_counter()
    set_layout(weight, layout)
    wait(part.device)
    seconds = time.perf_counter() - started
    set_layout(on_cpu, layout)
    correct = torch.equal(weight.cpu(), on_cpu) and torch.equal(logical(weight), values)
    reset_layout(weight)
    correct = correct and torch.equal(weight, values) and weight.data_ptr() == address
    part.add(f"set_layout {layout}", ms=seconds * 1e3, correct=correct)


def _updates(part: Part) -> None:
    count, hidden = (8, 8192) if part.on_gpu else (2, 64)
    model = Layers(count, hidden, part.device)
    x = torch.randn(2, hidden, device=part.device).to(torch.bfloat16) * 0.01
    compiled = torch.compile(model, backend=backend, dynamic=False)
    compiled(x)
    replay = _graph_of(lambda: model(x), part)
    num_bytes = sum(p.nbytes for p in model.parameters())
    source = {name: torch.randn_like(p) * 0.01 for name, p in model.state_dict().items()}

    def memcpy() -> None:
        for name, param in model.named_parameters():
            param.copy_(source[name])

    copy = wall_seconds(memcpy, part.device)
    part.add("memcpy of the same bytes", GBs=num_bytes / copy / 1e9)
    for mode in MODES:
        for way in ("update", "reload"):
            with part.attempt(f"{way}, {mode}"):
                for turn in (1, 2):
                    if part.left() < 3:
                        return part.fail(f"{way}, {mode}", "no time left")
                    for tensor in source.values():
                        tensor.mul_(-1.1)
                    addresses = [p.data_ptr() for p in model.parameters()]
                    wait(part.device)
                    started = time.perf_counter()
                    _write(model, source, mode, way)
                    wait(part.device)
                    seconds = time.perf_counter() - started
                    kept = addresses == [p.data_ptr() for p in model.parameters()]
                    exact = all(torch.equal(p, source[n]) for n, p in model.named_parameters())
                    error = relative_error(compiled(x), model(x))
                    what = f"{way}, {mode}, time {turn}"
                    part.add(
                        what, ms=seconds * 1e3, of_memcpy=copy / seconds, addresses_kept=kept,
                        correct=exact and error < BF16_ERROR,
                    )  # fmt: skip
                    if kept and replay is not None:
                        error = relative_error(replay(), model(x))
                        part.add(f"graph after {what}", error=error, correct=error < BF16_ERROR)
                claim = f"{way}, {mode}: share of a memcpy"
                part.check(claim, copy / seconds, OF_MEMCPY, at_least=True)


def _write(model: nn.Module, source: dict[str, Tensor], mode: str, way: str) -> None:
    if way == "reload":
        reload(model, source, mode=mode)  # type: ignore[arg-type]
        return
    with update(model, mode) as pending:  # type: ignore[arg-type]
        for name, tensor in source.items():
            pending.load(name, tensor)


def _graph_of(run: Callable[[], Tensor], part: Part) -> Callable[[], Tensor] | None:
    """A replay of `run` as a CUDA graph, which gives the captured output; None on the CPU."""
    if not part.on_gpu:
        return None
    outputs: list[Tensor] = []
    graph = captured([lambda: outputs.append(run())])

    def replay() -> Tensor:
        graph.replay()
        wait(part.device)
        return outputs[-1]

    return replay
