"""fold-weights in models that are sharded over ranks: nothing is kept that FSDP2 may refill."""

import pytest

from helpers.fold_workers import run_sharded
from helpers.ranks import Ranks


# Of their own for each test: a process that uses FSDP at all folds nothing.
@pytest.fixture
def two():
    with Ranks(2) as ranks:
        yield ranks


def test_under_fsdp_nothing_is_folded_and_the_report_says_why(two):
    for wrong, said in two.run(run_sharded, "fsdp"):
        assert wrong == []
        assert said
        assert all(kind == "missed" and "may be refilled by FSDP" in text for kind, text in said)


def test_beside_tensor_parallel_layers_plain_weights_are_folded(two):
    for wrong, said in two.run(run_sharded, "tp"):
        assert wrong == []
        assert [kind for kind, _ in said] == ["applied"]
        assert "cat of" in said[0][1]
