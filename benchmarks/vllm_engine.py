"""One vLLM engine that is measured: `python -m benchmarks.vllm_engine JOB FD`, a child.

It writes a line of JSON to the descriptor FD when it is ready, and one for each line that it reads
from its input: the seconds that a round of requests took, and its tokens. It knows of no other.
"""

import hashlib
import json
import os
import sys
import time
from typing import Any


def main(job: dict[str, Any], descriptor: int) -> None:
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, **job["llm"])
    settings = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    with os.fdopen(descriptor, "w", buffering=1) as answers:
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answers)
        for _ in sys.stdin:
            llm.reset_prefix_cache()
            started = time.perf_counter()
            requests = llm.generate(prompts, settings, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = [list(request.outputs[0].token_ids) for request in requests]
            digest = hashlib.sha256(repr(tokens).encode()).hexdigest()
            print(json.dumps({"seconds": seconds, "tokens": digest}), file=answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
