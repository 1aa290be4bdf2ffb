"""Engines for the tests of vLLM: each kind is run once a session, and its result is shared."""

import tiny
import vllm_jobs

PROMPTS = tiny.prompts(64, 100)


class Engines:
    """Runs engines in `root`; checkpoints are made there when they are first asked for."""

    def __init__(self, root):
        self.root = root
        self.results = {}

    def checkpoint(self, name, dtype="float32", seed=0):
        folder = self.root / f"checkpoint-{name}-{dtype}-{seed}"
        if not folder.exists():
            tiny.write(name, folder, dtype, seed)
        return folder

    def run(self, name, *, dtype="float32", seed=0, again="", caches=None, **how):
        """The result of an engine; `again` names another run of the same kind.

        caches: the folder whose caches it shares. By default all engines with fixpass share theirs,
        and all those without.
        """
        key = repr((name, dtype, seed, again, sorted(how.items())))
        if key not in self.results:
            folder = self.root / (caches or ("with" if how.get("fixpass") else "without"))
            checkpoint = self.checkpoint(name, dtype, seed)
            self.results[key] = vllm_jobs.run(
                folder, checkpoint, dtype=dtype, **{"prompts": PROMPTS, **how}
            )
        return self.results[key]


def applied(result, pass_name):
    """Where a pass did something, in the graphs of each worker: a list of modules a worker."""
    return [
        sorted(where for name, kind, where in remarks if (name, kind) == (pass_name, "applied"))
        for remarks in result["remarks"]
    ]


def misses(result):
    """How often Inductor's and AOTAutograd's caches missed, in all workers."""
    return sum(v for each in result["counters"] for k, v in each.items() if k.endswith("_miss"))


def hits(result):
    return sum(v for each in result["counters"] for k, v in each.items() if k.endswith("_hit"))


def distances(one, other):
    """|difference| of the logprobs of chosen tokens, as far as both chose the same ones."""
    found = []
    for tokens, others, logprobs, others_logprobs in zip(
        one["tokens"], other["tokens"], one["logprobs"], other["logprobs"], strict=True
    ):
        for token, twin, a, b in zip(tokens, others, logprobs, others_logprobs, strict=True):
            if token != twin:
                break
            found.append(abs(a - b))
    return found
