"""What a load of one tensor runs through, counted: files of ours that are entered, and functions.

Comprehensions, lambdas and what runs in the commit's own thread are not counted. A number may fall;
one that rises is a cost that every load pays.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fixpass
from fixpass.weights import load, reload, update

OURS = str(Path(fixpass.__file__).parent)


def count(work):
    """Files entered, and functions called once or more."""
    seen = set()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS) and code.co_name[0] != "<":
            seen.add((code.co_filename, code.co_qualname))

    gc.collect()  # What an earlier load left behind is not this one's cost.
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len({file for file, _ in seen}), len(seen)


def model_of():
    return nn.Linear(4, 4, bias=False)


def updated(model):
    with update(model) as tx:
        tx.load("weight", torch.ones(4, 4))


def counts(folder):
    save_file({"weight": torch.ones(4, 4)}, f"{folder}/w.safetensors")
    load(model_of(), folder)  # Imports, and what is made once a process.
    model, other, *new = (model_of() for _ in range(4))
    updated(other)
    return {
        "load": count(lambda: load(new.pop(), folder, progress=False)),
        "update": count(lambda: updated(new.pop())),
        "update again": count(lambda: updated(other)),
        "reload": count(lambda: reload(model, folder, progress=False)),
        "reload again": count(lambda: reload(model, folder, progress=False)),
    }


# The first update and the first reload of a model search it for tensors that would be stale.
MOST = {
    "load": (20, 86),
    "update": (23, 90),
    "update again": (13, 55),
    "reload": (24, 104),
    "reload again": (15, 68),
}


def test_one_tensor_runs_through_few_functions(tmp_path):
    """In a process of its own: layouts and locks of other models would be asked too."""
    command = [sys.executable, "-P", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found.keys() == MOST.keys()
    over = {
        name: (found[name], most)
        for name, most in MOST.items()
        if any(one > other for one, other in zip(found[name], most, strict=True))
    }
    assert over == {}


if __name__ == "__main__":
    print(json.dumps(counts(sys.argv[1])))
