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
    """SGLang's scheduler, which says at each load which hooks its process has."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins.hook_registry import HookRegistry

    load = DefaultModelLoader.load_weights_and_postprocess

    def telling(*args, **kwargs):
        print("HOOKED " + json.dumps(sorted(HookRegistry._patched)), file=sys.stderr, flush=True)
        return load(*args, **kwargs)

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
