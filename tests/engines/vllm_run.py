"""One vLLM engine in a process of its own: `python vllm_run.py JOB.json RESULT.json`.

A job: `llm` (keywords of LLM), `prompts` (lists of token numbers), `max_tokens`, `rounds` (how
often to generate, timed), `folds` (layouts by parameter, folded then), `reloads` (checkpoints, each
loaded into the running engine before it generates again), `census` (which tensors the reloads have
left stale), `keep_mode` (CPU's platform leaves the compilation mode that was asked for).
"""

import json
import sys
import time

EXTENSION = "vllm_extension.Extension"


def main(job_path, result_path):
    with open(job_path) as file:
        job = json.load(file)
    if job.get("keep_mode"):
        keep_mode()
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(skip_tokenizer_init=True, worker_extension_cls=EXTENSION, **job["llm"])
    result = {"start": time.perf_counter() - started, "seconds": []}
    for _ in range(job.get("rounds", 1)):
        started = time.perf_counter()
        outputs = generate(llm, job)
        result["seconds"].append(time.perf_counter() - started)
    result |= outputs
    result["reports"] = llm.collective_rpc("fixpass_reports")
    for asked in ("counters", "remarks", "norms"):
        result[asked] = llm.collective_rpc(f"test_{asked}")
    if folds := job.get("folds"):
        llm.collective_rpc("fixpass_fold", args=(folds,))
        result["folded"] = generate(llm, job)["tokens"]
    if job.get("census"):
        llm.collective_rpc("test_census")
    result["reloaded"] = [reload(llm, job, folder) for folder in job.get("reloads", ())]
    if job.get("census"):
        result["stale"] = llm.collective_rpc("test_census")
    result["layouts"] = llm.collective_rpc("test_folded")
    with open(result_path, "w") as file:
        json.dump(result, file)


def generate(llm, job):
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], detokenize=False, ignore_eos=True, logprobs=1
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    # What a round before left in the prefix cache would make this one another measurement.
    llm.reset_prefix_cache()
    completions = [
        request.outputs[0] for request in llm.generate(prompts, settings, use_tqdm=False)
    ]
    tokens = [list(each.token_ids) for each in completions]
    chosen = [
        [step[token].logprob for token, step in zip(each.token_ids, each.logprobs, strict=True)]
        for each in completions
    ]
    return {"tokens": tokens, "logprobs": chosen}


def reload(llm, job, folder):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    return generate(llm, job)["tokens"]


def keep_mode():
    """Let vLLM's own compile mode stand, as on a GPU, where CPU's platform replaces it."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    theirs = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        asked = config.compilation_config.mode
        theirs(cls, config)
        config.compilation_config.mode = asked
        if asked == CompilationMode.VLLM_COMPILE:
            config.compilation_config.ir_enable_torch_wrap = True
            config.compilation_config.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    # It names CUDA's ops, which are not registered here; Inductor has a way of its own for it.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


if __name__ == "__main__":
    main(*sys.argv[1:])
