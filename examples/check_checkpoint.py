"""All faults of a checkpoint for a model, before a byte is loaded.

    python examples/check_checkpoint.py

The same in a shell, for a checkpoint and a model of your own:
    python -m fixpass check CHECKPOINT MODEL.py:FUNCTION
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fixpass import FixpassError
from fixpass.weights import Mapping, Rename, check, load


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(256, 64, bias=False)


def main() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(4))})
    stored = {f"backbone.{name}": torch.randn_like(w) for name, w in model.state_dict().items()}
    stored["backbone.layers.1.up.weight"] = torch.randn(64, 256)  # transposed
    del stored["backbone.layers.3.down.weight"]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(stored, file)
        print("as it is:", check(file, model), sep="\n")
        renamed = Mapping(renames=(Rename("backbone.", ""),))
        print("\nrenamed:", check(file, model, renamed), sep="\n")

        before = {name: w.clone() for name, w in model.state_dict().items()}
        try:
            load(model, file, mapping=renamed)
        except FixpassError as error:
            print("\nthe load:", error, sep="\n")
        same = all(torch.equal(before[name], w) for name, w in model.state_dict().items())
        print("\nthe model kept its weights:", same)


if __name__ == "__main__":
    main()
