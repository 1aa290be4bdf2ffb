"""Calls: the ops that a piece of code reaches, in order, with their arguments."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Collects `(name, args)` of each op; ops that another op calls inside are not seen."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))
