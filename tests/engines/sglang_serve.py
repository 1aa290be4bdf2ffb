"""Serve a tiny Llama with SGLang's CPU engine and print the tokens as JSON.

`python sglang_serve.py FOLDER [OTHER]`: tokens of the checkpoint in FOLDER, and then, in the same
engine, of the one in OTHER. The environment says whether fixpass is on. The engine's workers are
processes of their own, which is why this is a script.
"""

import json
import logging
import sys

OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    # No keys and values of the last weights may be found for a prompt after an update.
    "disable_radix_cache": True,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "log_level": "info",
}
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


def tokens(engine):
    from tiny import prompts

    found = engine.generate(input_ids=prompts(8, 24), sampling_params=GREEDY)
    return [one["output_ids"] for one in found]


def scheduler(*args, **kwargs):
    """SGLang's scheduler: each load says which hooks its process has, and what it leaves stale.

    A copy of a norm's weight, which nothing refreshes, shows that the census sees the model.
    """
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins.hook_registry import HookRegistry

    from fixpass.weights import census

    load, found = DefaultModelLoader.load_weights_and_postprocess, []

    def say(what, facts):
        print(f"{what} {json.dumps(facts)}", file=sys.stderr, flush=True)

    def telling(model, *args, **kwargs):
        say("HOOKED", sorted(HookRegistry._patched))
        result = load(model, *args, **kwargs)
        if not found:
            model.kept = model.model.norm.weight.detach().clone()
        found.append(census(model))
        say("STALE", [entry.names for entry in found[-1].stale_since(found[0])])
        return result

    DefaultModelLoader.load_weights_and_postprocess = staticmethod(telling)
    return run_scheduler_process(*args, **kwargs)


def main(folder, other=None):
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    from sglang.srt.entrypoints.engine import Engine

    Engine.run_scheduler_process_func = staticmethod(scheduler)
    engine = Engine(model_path=folder, **OPTIONS)
    found = [tokens(engine)]
    if other is not None:
        engine.update_weights_from_disk(other)
        found.append(tokens(engine))
    engine.shutdown()
    print("TOKENS " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
