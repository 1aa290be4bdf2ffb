"""New weights for a model that runs: compiled once, loaded from a file, then updated twice.

    python examples/reload_live_model.py

A thread calls the compiled model all the time. Each of its results comes from one version of the
weights. Nothing is compiled again.
"""

import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fixpass


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.RMSNorm(256), nn.Linear(256, 64))
    model = model.eval().requires_grad_(False)
    run, x = fixpass.compile(model, lower="eager"), torch.randn(4, 64)
    checkpoints = [{k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in "123"]
    results: list[Tensor] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            results.append(run(x))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(checkpoints[0], file)
        print(fixpass.weights.load(model, file))
        expected = [run(x)]
        server = threading.Thread(target=serve)
        server.start()
        for checkpoint in checkpoints[1:]:
            print(fixpass.weights.reload(model, checkpoint))
            expected.append(run(x))
        done.set()
        server.join()
    is_whole = [any(torch.equal(result, e) for e in expected) for result in results]
    print("every call read the weights of one version:", all(is_whole))


if __name__ == "__main__":
    main()
