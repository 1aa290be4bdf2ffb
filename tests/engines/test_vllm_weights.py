"""Folded weights in the real vLLM on CPU: kept beside a parameter or in it, and reloaded.

The MLPs have a kernel that reads weights in tiles (vllm_tiles); what vLLM gives without it, in an
engine that is started with the new weights, is what has to come out.
"""

import pytest
import tiny
import vllm_tiles
from vllm_engines import applied, hits, misses

pytestmark = pytest.mark.engine
TILES = ("FIXPASS_TEST_TILES", "1")
RAW = ("FIXPASS_TEST_RAW", "1")
SEEDS = (1, 2, 0)
LAYERS = range(tiny.SHAPE["num_hidden_layers"])
FOLDED = {
    f"model.layers.{layer}.mlp.{name}.weight": vllm_tiles.LAYOUT
    for layer in LAYERS
    for name in vllm_tiles.MLPS
}


def fresh(engines, seed=0):
    """What vLLM gives without fixpass and without tiles, started with these weights."""
    return engines.run("qwen3", seed=seed, tp=1, fixpass=False)["tokens"]


def reloads(engines):
    return [str(engines.checkpoint("qwen3", seed=seed)) for seed in SEEDS]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_weight_that_is_shuffled_in_each_call_is_kept_shuffled_and_reloaded(engines, tp):
    ours = engines.run("qwen3", tp=tp, fixpass=True, environ=(TILES,), reloads=reloads(engines))
    assert [len(places) for places in applied(ours, "fold-weights")] == [len(FOLDED)] * tp
    assert ours["tokens"] == fresh(engines)
    assert ours["reloaded"] == [fresh(engines, seed) for seed in SEEDS]
    assert len({str(tokens) for tokens in ours["reloaded"]}) == len(SEEDS)
    assert ours["layouts"] == [[]] * tp
    assert "AttributeError" not in ours["log"]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_weight_that_is_folded_in_place_is_reloaded_by_its_record(engines, tp):
    ours = engines.run(
        "qwen3", tp=tp, fixpass=True, environ=(TILES,), folds=FOLDED, reloads=reloads(engines)
    )
    assert ours["tokens"] == ours["folded"] == fresh(engines)
    assert ours["reloaded"] == [fresh(engines, seed) for seed in SEEDS]
    assert ours["layouts"] == [list(FOLDED)] * tp
    assert "AttributeError" not in ours["log"]


def test_without_its_record_a_folded_weight_is_wrong_after_a_reload(engines):
    """What the records are for: vLLM copies its own layout over the tiles."""
    ours = engines.run(
        "qwen3", fixpass=True, environ=(TILES, RAW), folds=FOLDED, reloads=reloads(engines)
    )
    assert ours["folded"] == fresh(engines)
    assert all(
        reloaded != fresh(engines, seed)
        for reloaded, seed in zip(ours["reloaded"], SEEDS, strict=True)
    )


def test_a_second_start_folds_and_hits_the_caches(engines):
    kind = {"fixpass": True, "caches": "tiles", "environ": (TILES,)}
    first = engines.run("qwen3", again="first", **kind)
    second = engines.run("qwen3", again="second", **kind)
    assert misses(first) > 0
    assert misses(second) == 0
    assert hits(second) > 0
    assert applied(second, "fold-weights") == applied(first, "fold-weights") != [[]]
    assert first["tokens"] == second["tokens"] == fresh(engines)


def test_folds_that_are_switched_off_stay_in_the_graph(engines):
    ours = engines.run("qwen3", fixpass=True, environ=(TILES, ("FIXPASS_FOLD_WEIGHTS", "off")))
    assert applied(ours, "fold-weights") == [[]]
    assert ours["tokens"] == fresh(engines)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_census_finds_nothing_stale_after_reloads(engines, tp):
    ours = engines.run("qwen3", tp=tp, fixpass=True, census=True, reloads=reloads(engines)[:1])
    assert ours["reloaded"] == [fresh(engines, SEEDS[0])]
    # The test's own copy of a weight, and nothing of vLLM's.
    assert ours["stale"] == [["kept"]] * tp
