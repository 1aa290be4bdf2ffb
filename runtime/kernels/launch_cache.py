"""Launches by the signature of their operands: a call like an earlier one looks its launch up.

The signature holds every fact that the checks and the launch depend on, addresses excepted. The
cache checks and plans nothing itself, and whether operands overlap is checked outside of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.kernels.launch import Launch, dense_vector
from fixpass.runtime.kernels.row_geometry import BOUNDARY, aligned_base

MAX_SIGNATURES = 4096
Operands = tuple[Tensor | None, ...]
Rebase = Callable[[Any], Any]


class Replay:
    """A launch with free places for its pointers, started again and again."""

    def __init__(self, launch: Launch, names: Sequence[str], operands: Operands) -> None:
        arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
        self.pointers: list[tuple[int, int, Rebase | None]] = []
        for place, name in enumerate(launch.kernel.arg_names):
            if isinstance(arguments[place], Tensor):
                operand = names.index(name.removesuffix("_ptr"))
                is_same = arguments[place] is operands[operand]
                self.pointers.append((place, operand, None if is_same else _rebase(name)))
                arguments[place] = None  # a kept tensor would stay allocated
        self.arguments, self.kernel, self.device = arguments, launch.kernel, launch.device
        self.grid, self.num_warps = (*launch.grid, 1, 1)[:3], launch.num_warps
        self.start: Callable[..., None] | None = None

    def __call__(self, operands: Operands) -> None:
        arguments: list[Any] = self.arguments.copy()
        for place, operand, rebase in self.pointers:
            tensor = operands[operand]
            arguments[place] = tensor if rebase is None else rebase(tensor)
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self._start(arguments)
            return
        self._start(arguments)

    def _start(self, arguments: list[Any]) -> None:
        if self.start is not None:
            self.start(*arguments)
            return
        compiled = self.kernel[self.grid](*arguments, num_warps=self.num_warps)
        # The signature settles which code Triton's JIT picks: later calls need no JIT. The
        # interpreter compiles nothing and returns None.
        self.start = None if compiled is None else compiled[self.grid]


def _rebase(name: str) -> Rebase:
    """How a launch gets from an operand to the tensor that the kernel is given."""
    if name.endswith(("weight_ptr", "bias_ptr")):
        return dense_vector
    return lambda tensor: aligned_base(tensor)[0]


def signature(tensor: Tensor | None) -> Any:
    """Every fact of an operand that its checks and its launch depend on."""
    if tensor is None:
        return None
    skew: Any = tensor.data_ptr() % BOUNDARY
    if skew:
        skew = skew, aligned_base(tensor)[1]
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, skew


class LaunchCache:
    """The launches of one launcher.

    Args:
        kernel: the kernel whose launches are kept.
        names: of the operands, in the order in which calls give them.
        plan: makes the launches for operands and options, and raises where the checks refuse them.
        check_overlap: raises where an output lies over an operand that it must not lie over.

    """

    def __init__(
        self,
        kernel: Any,
        names: Sequence[str],
        plan: Callable[..., list[Launch]],
        check_overlap: Callable[..., None],
    ) -> None:
        self.kernel, self.names = kernel, names
        self.plan, self.check_overlap = plan, check_overlap
        self.replays: dict[Any, Replay] = {}

    def run(self, operands: Operands, options: tuple[Any, ...], outputs_are_new: bool) -> None:
        """Launch; plan first where no earlier call had this signature.

        Args:
            operands: one tensor or None for each name.
            options: the arguments of `plan` that follow the operands.
            outputs_are_new: the caller has just allocated the outputs: they overlap nothing.

        """
        key = (options, *map(signature, operands))
        replay = self.replays.get(key)
        launches = [] if replay else self.plan(*operands, *options)
        if not outputs_are_new:
            self.check_overlap(*operands)
        if len(launches) == 1 and launches[0].kernel is self.kernel:
            replay = Replay(launches[0], self.names, operands)
            if len(self.replays) >= MAX_SIGNATURES:
                self.replays.clear()
            self.replays[key] = replay
        if replay:
            replay(operands)
            return
        # These launches take slices of the operands, which the signature doesn't describe.
        for launch in launches:
            launch.run()
