"""The diff of two graphs: no line is lost or made up, and unique lines keep their place."""

import random
from difflib import SequenceMatcher

import pytest

from fixpass.report.graph_diff import GraphMatcher


def rebuilt(left, right):
    """Both sides, put together from the blocks of the diff."""
    codes = GraphMatcher(left, right).get_opcodes()
    for kind, i, i_end, j, j_end in codes:
        assert (kind == "equal") == (left[i:i_end] == right[j:j_end])
    first = [line for _, i, i_end, _, _ in codes for line in left[i:i_end]]
    return first, [line for _, _, _, j, j_end in codes for line in right[j:j_end]]


@pytest.mark.parametrize("kinds", [3, 20, 1000])
def test_both_sides_can_be_put_together_again(kinds):
    """`kinds` is the number of different lines: few mean that most occur several times."""
    chance = random.Random(0)
    for _ in range(200):
        left = [f"line {chance.randrange(kinds)}" for _ in range(chance.randrange(30))]
        right = [line for line in left if chance.random() < 0.8]
        right.insert(chance.randrange(len(right) + 1), "new")
        assert rebuilt(left, right) == (left, right)


def test_unique_lines_are_matched_as_difflib_matches_them():
    left = [f"node_{i}" for i in range(400)]
    right = [line for i, line in enumerate(left) if i % 7] + ["end"]
    expected = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    assert GraphMatcher(left, right).get_matching_blocks() == expected


def test_a_line_that_moved_is_deleted_and_inserted():
    assert list(GraphMatcher(list("abcd"), list("bcda")).text(0)) == [
        "@@ -1 +1 @@", "-a", "@@ -5 +4 @@", "+a",
    ]  # fmt: skip
