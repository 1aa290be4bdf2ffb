"""Jobs for vllm_run.py: a process each, with caches and environment of its own, and its result."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LLM = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 16, "seed": 0}
SECONDS = 600
# Lines of the log that a test may look at.
OURS = ("fixpass", "AttributeError", "Traceback")


def run(folder, checkpoint, *, fixpass=False, tp=1, dtype="float32", environ=(), llm=(), **job):
    """Run one engine with that checkpoint; its result, and `log`: the text of its output.

    folder: for the job's files, and for caches, which jobs in one folder share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {"prompts": [[5, 6, 7]], "max_tokens": 16, **job}
    job["llm"] = {**LLM, "model": str(checkpoint), "dtype": dtype, **dict(llm)}
    job["llm"]["tensor_parallel_size"] = tp
    paths = [folder / "job.json", folder / "result.json"]
    paths[0].write_text(json.dumps(job))
    paths[1].unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "vllm_run.py"), *map(str, paths)]
    done = subprocess.run(
        command,
        env=_environ(folder, fixpass, tp) | dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"the engine failed:\n{done.stdout[-8000:]}")
    return {**json.loads(paths[1].read_text()), "log": done.stdout}


def _environ(folder, fixpass, tp):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FIXPASS", "VLLM"))}
    return inherited | {
        "FIXPASS": "1" if fixpass else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "PYTHONWARNINGS": "ignore",
        # One rank a core; with one rank everything is in one process.
        **({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tp == 2 else {}),
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tp == 1 else {}),
    }
