"""The lines that a pass changed in a graph, in time that is linear in its length.

`difflib` compares each line with every place where it occurs, in square time on a graph of 10,000
nodes. Nodes have unique names, so most lines occur once; those that do are matched by a table.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import Match, SequenceMatcher


class GraphMatcher(SequenceMatcher[str]):
    """The blocks of lines that two graphs have in common, in order."""

    def __init__(self, left: Sequence[str], right: Sequence[str]) -> None:
        super().__init__(None, left, right, autojunk=False)
        self._left, self._right = left, right

    def get_matching_blocks(self) -> list[Match]:
        """Blocks around lines that occur once on each side; the last has no lines."""
        left, right = self._left, self._right
        blocks: list[Match] = []
        i = j = 0
        for x, y in [*_anchors(left, right), (len(left), len(right))]:
            if x < i or y < j:
                continue  # the block before has grown over this line
            while x > i and y > j and left[x - 1] == right[y - 1]:
                x, y = x - 1, y - 1
            start = x
            while x < len(left) and y < len(right) and left[x] == right[y]:
                x, y = x + 1, y + 1
            blocks += [Match(start, y - (x - start), x - start)] if x > start else []
            i, j = x, y
        return [*blocks, Match(len(left), len(right), 0)]

    def text(self, context: int) -> Iterator[str]:
        """The changed lines after `-` and `+`, with as many lines around each change."""
        for group in self.get_grouped_opcodes(context):
            yield f"@@ -{group[0][1] + 1} +{group[0][3] + 1} @@"
            for kind, i, i_end, j, j_end in group:
                if kind == "equal":
                    yield from (f" {line}" for line in self._left[i:i_end])
                    continue
                yield from (f"-{line}" for line in self._left[i:i_end])
                yield from (f"+{line}" for line in self._right[j:j_end])


def _anchors(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """The most lines that occur once on each side and have the same order on both."""
    on_left, on_right = Counter(left), Counter(right)
    places = {line: j for j, line in enumerate(right) if on_right[line] == 1}
    pairs = [(i, places[line]) for i, line in enumerate(left)
             if on_left[line] == 1 and line in places]  # fmt: skip
    # The longest increasing sequence of places: each pair remembers the one before it.
    ends: list[int] = []
    ends_at: list[int] = []
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        length = bisect_left(ends, j)
        before.append(ends_at[length - 1] if length else -1)
        ends[length:length + 1], ends_at[length:length + 1] = [j], [number]  # fmt: skip
    found = []
    number = ends_at[-1] if ends_at else -1
    while number >= 0:
        found.append(pairs[number])
        number = before[number]
    return found[::-1]
