"""The real vLLM on CPU with fixpass switched on and off: tokens, caches, reports, reloads.

Checkpoints are tiny and random. Each engine is a process of its own; these are minutes.
"""

import re
from statistics import mean

import pytest
import tiny
from vllm_engines import applied, distances, hits, misses

pytestmark = pytest.mark.engine
OWN_MODE = {"keep_mode": True, "llm": {"compilation_config": {"mode": 3}}}


def norms_of(result):
    """The norms of vLLM's model, as the graph names them: without the head's `model.`."""
    return sorted(name.removeprefix("model.") for name in result["norms"][0])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_greedy_tokens_are_those_of_vllm_without_fixpass(engines, name, tp):
    without, ours = (engines.run(name, tp=tp, fixpass=on) for on in (False, True))
    assert ours["tokens"] == without["tokens"]
    assert all(applied(ours, "canonicalize-norms"))
    assert not any(applied(without, "canonicalize-norms"))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_norm_is_on_the_report(engines, name, tp):
    ours = engines.run(name, tp=tp, fixpass=True)
    assert len(norms_of(ours)) >= 2 * tiny.SHAPE["num_hidden_layers"] + 1
    assert applied(ours, "canonicalize-norms") == [norms_of(ours)] * tp
    assert "canonicalize-norms" in ours["reports"][0]


@pytest.mark.parametrize("tp", [1, 2])
def test_vllms_linear_kernels_stay_and_the_report_says_why(engines, tp):
    ours = engines.run("qwen3", tp=tp, fixpass=True)
    layers = 4 * tiny.SHAPE["num_hidden_layers"]
    text = f"vLLM's own _C::onednn_mm computes {layers} linear layers: it has packed their weights"
    assert [text in report for report in ours["reports"]] == [True] * tp


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_all_reduce_of_two_ranks_goes_through_symmetric_memory(engines, name):
    ours = engines.run(name, tp=2, fixpass=True)
    for places in applied(ours, "place-symmetric-memory"):
        assert len(places) == 2 * tiny.SHAPE["num_hidden_layers"] + 1
        assert "embed_tokens" in places


def test_gloos_all_reduces_go_through_symmetric_memory_too(engines):
    ours = engines.run("qwen3", tp=2, fixpass=True, environ=(("FIXPASS_TEST_GLOO", "1"),))
    assert ours["tokens"] == engines.run("qwen3", tp=2, fixpass=False)["tokens"]
    places = applied(ours, "place-symmetric-memory")
    assert [len(each) for each in places] == [7, 7]


def test_the_backends_name_alone_switches_on_in_processes_of_vllms_own(engines):
    ours = engines.run(
        "qwen3",
        llm={"compilation_config": {"backend": "fixpass"}},
        environ=(("VLLM_ENABLE_V1_MULTIPROCESSING", "1"),),
    )
    assert ours["tokens"] == engines.run("qwen3", tp=1, fixpass=False)["tokens"]
    assert applied(ours, "canonicalize-norms") == [norms_of(ours)]


@pytest.mark.parametrize("how", [{}, OWN_MODE], ids=["traced-once", "vllms-own-mode"])
def test_the_second_start_hits_the_caches_and_a_changed_option_does_not(engines, how):
    kind = {"fixpass": True, "caches": f"caches-{len(how)}", **how}
    first = engines.run("qwen3", again="first", **kind)
    second = engines.run("qwen3", again="second", **kind)
    changed = engines.run("qwen3", environ=(("FIXPASS_DISABLE", "join-qk-norms"),), **kind)
    assert misses(first) > 0
    assert misses(second) == 0
    assert hits(second) > 0
    # vLLM's own mode takes the code from its own cache, which has no place for a report.
    kept = [[]] if how else applied(first, "canonicalize-norms")
    assert applied(second, "canonicalize-norms") == kept
    assert misses(changed) > 0
    assert applied(changed, "canonicalize-norms") == applied(first, "canonicalize-norms") != [[]]
    without = engines.run("qwen3", tp=1, fixpass=False)["tokens"]
    assert first["tokens"] == second["tokens"] == changed["tokens"] == without


@pytest.mark.parametrize("name", tiny.NAMES)
def test_bfloat16_stays_within_the_spread_of_eager_and_inductor(engines, name):
    eager = engines.run(name, dtype="bfloat16", llm={"enforce_eager": True})
    inductor = engines.run(name, dtype="bfloat16")
    ours = engines.run(name, dtype="bfloat16", fixpass=True)
    spread, found = distances(eager, inductor), distances(ours, inductor)
    assert mean(found) <= mean(spread)
    assert max(found) <= max(spread)
    assert mean(distances(ours, eager)) <= 2 * mean(spread)


@pytest.mark.parametrize("tp", [1, 2])
def test_reloaded_weights_give_what_a_fresh_engine_gives(engines, tp):
    folders = [str(engines.checkpoint("qwen3", seed=seed)) for seed in (1, 2, 0)]
    ours = engines.run("qwen3", tp=tp, fixpass=True, again="reload", reloads=folders)
    fresh = [engines.run("qwen3", seed=seed, tp=1, fixpass=False)["tokens"] for seed in (1, 2, 0)]
    assert ours["reloaded"] == fresh
    assert len({str(tokens) for tokens in fresh}) == 3
    assert "AttributeError" not in ours["log"]


def test_an_eager_engine_is_told_once_that_there_is_nothing_to_do(engines):
    ours = engines.run("qwen3", fixpass=True, llm={"enforce_eager": True})
    lines = re.findall("fixpass: .*", ours["log"])
    assert lines == [
        "fixpass: compilation mode NONE compiles nothing that fixpass sees: "
        "vLLM runs without fixpass"
    ]
    assert ours["tokens"] == engines.run("qwen3", tp=1, fixpass=False)["tokens"]
