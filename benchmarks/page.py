"""Write the table of bounds in `docs/benchmarks.md` from the JSON of the last runs.

python -m benchmarks.page
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs/benchmarks.md"
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
            f"| {check['claim'].replace('|', '/')} | {_measured(check)} | {_bound(check)} |"
            for check in checks
        ]
        head = f"### [{data['name']}](../benchmarks/results/{path.stem}.md)"
        parts.append(f"{head}\n\n{_first_sentence(data['about'])} torch {where['torch']}.\n")
        parts.append("\n".join(["| what | measured | bound |", "|---|---|---|", *rows]) + "\n")
        if path.with_suffix(".svg").is_file():
            parts.append(f"![{data['name']}](../benchmarks/results/{path.stem}.svg)\n")
    return "\n".join(parts)


def write() -> None:
    """Put the table between the two marks of the page."""
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")


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
