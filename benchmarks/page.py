"""Write the tables and plots of bounds in `docs/benchmarks.md` from the JSON of the last runs.

python -m benchmarks.page
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixpass.report.tables import TextTable

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs/benchmarks.md"
PICTURES = PAGE.parent / "images/benchmarks"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_MOST = 100.0
"""The largest distance from a bound that a plot shows."""
START, END = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->"


def table() -> str:
    """One table a benchmark and one row a bound; a missed bound is bold."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        checks = data.get("checks", [])
        if not checks:
            continue
        where = data["environment"]
        rows = [
            {"what": check["claim"], "measured": _measured(check), "bound": _bound(check)}
            for check in checks
        ]
        head = f"### [{data['name']}](../benchmarks/results/{path.stem}.md)"
        parts.append(f"{head}\n\n{_first_sentence(data['about'])} torch {where['torch']}.\n")
        picture = f"![Measured figures and their bounds](images/benchmarks/{path.stem}.svg)"
        parts.append(f"{picture}\n\n{TextTable.of(rows).markdown()}\n")
        if path.with_suffix(".svg").is_file():
            parts.append(f"![{data['name']}](../benchmarks/results/{path.stem}.svg)\n")
    return "\n".join(parts)


def write() -> None:
    """Put the table between the two marks of the page."""
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        if data.get("checks"):
            plot(data["checks"], PICTURES / f"{path.stem}.svg")


def plot(checks: list[Mapping[str, Any]], path: Path) -> None:
    """Draw how far each figure is from its bound, on the good side or on the bad one."""
    from matplotlib import pyplot, rc_context

    settings = {"svg.fonttype": "none", "svg.hashsalt": "fixpass", "font.size": 8}
    with rc_context(settings):
        figure, axis = pyplot.subplots(figsize=(4, 0.19 * len(checks) + 0.9))
        for held, colour, label in ((True, "tab:blue", "holds"), (False, "tab:red", "missed")):
            chosen = [(i, c) for i, c in enumerate(checks) if c["holds"] == held]
            if chosen:
                places = [i for i, _ in chosen]
                axis.plot([_distance(c) for _, c in chosen], places, "o", c=colour, label=label)
        low, high = (pick(map(_distance, checks)) for pick in (min, max))
        low, high = min(low, 0.9), max(high, 2.2)
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axis.set(xscale="log", xlim=(low / 1.1, high * 1.1), xlabel="times better than the bound")
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_ylim(len(checks) - 0.5, -0.5)
        axis.set_yticks(range(len(checks)), [check["claim"] for check in checks])
        axis.grid(axis="x", linewidth=0.3)
        axis.legend()
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def _distance(check: Mapping[str, Any]) -> float:
    """Above 1 where the bound holds: 2 is twice as good as the bound asks for."""
    measured, bound = check["measured"], check["bound"]
    if check["at_least"]:
        return min(_MOST, measured / bound)
    return min(_MOST, bound / measured) if measured > 0 else _MOST


def _measured(check: dict[str, float]) -> str:
    text = _number(check["measured"])
    return text if check["holds"] else f"**{text}**"


def _bound(check: dict[str, float]) -> str:
    return f"{'at least' if check['at_least'] else 'at most'} {_number(check['bound'])}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    write()
