"""Part weights: layouts, updates and reloads of weights on the device, and captured graphs.

Every way of writing is followed by a look at the values, at the addresses, and at the results of
code that was compiled, and captured in a CUDA graph, before the write.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Live:
    """A model in use: compiled, and captured where there is a device."""

    model: nn.Module
    x: Tensor
    compiled: Callable[[Tensor], Tensor]
    replay: Callable[[], Tensor] | None
    source: dict[str, Tensor]

    def addresses(self) -> list[int]:
        return [param.data_ptr() for param in self.model.parameters()]

    def copy(self) -> None:
        """Copy the same bytes, promising nothing."""
        for name, param in self.model.named_parameters():
            param.copy_(self.source[name])


def _updates(part: Part) -> None:
    count, hidden = (8, 8192) if part.on_gpu else (2, 64)
    model = Layers(count, hidden, part.device)
    x = torch.randn(2, hidden, device=part.device).to(torch.bfloat16) * 0.01
    compiled = torch.compile(model, backend=backend, dynamic=False)
    compiled(x)
    source = {name: torch.randn_like(p) * 0.01 for name, p in model.state_dict().items()}
    live = Live(model, x, compiled, _graph_of(lambda: model(x), part), source)
    copy = wall_seconds(live.copy, part.device)
    num_bytes = sum(tensor.nbytes for tensor in source.values())
    part.add("memcpy of the same bytes", GBs=num_bytes / copy / 1e9)
    for mode in MODES:
        for way in ("update", "reload"):
            with part.attempt(f"{way}, {mode}"):
                _update_twice(part, live, mode, way, copy)


def _update_twice(part: Part, live: Live, mode: str, way: str, copy: float) -> None:
    """The second update has the first one's plan; `copy` is the seconds of a memcpy."""
    for turn in (1, 2):
        for tensor in live.source.values():
            tensor.mul_(-1.1)
        before = live.addresses()
        wait(part.device)
        started = time.perf_counter()
        _write(live.model, live.source, mode, way)
        wait(part.device)
        seconds = time.perf_counter() - started
        kept = before == live.addresses()
        exact = all(torch.equal(p, live.source[n]) for n, p in live.model.named_parameters())
        error = relative_error(live.compiled(live.x), live.model(live.x))
        what = f"{way}, {mode}, time {turn}"
        part.add(
            what, ms=seconds * 1e3, of_memcpy=copy / seconds, addresses_kept=kept,
            correct=exact and error < BF16_ERROR,
        )  # fmt: skip
        if live.replay is not None:
            error = relative_error(live.replay(), live.model(live.x))
            # A captured graph reads the addresses that it saw: where they moved, it is stale.
            found = {"correct": error < BF16_ERROR} if kept else {"stale": error >= BF16_ERROR}
            part.add(f"graph after {what}", error=error, **found)
    part.check(f"{way}, {mode}: share of a memcpy", copy / seconds, OF_MEMCPY, at_least=True)


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
