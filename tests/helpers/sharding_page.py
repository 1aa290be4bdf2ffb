"""Write the table of classes, rules and units in `docs/checkpoints.md`.

    make sharding-page

`tests/runtime/test_sharding.py` fails where the page says something else than the models do.
"""

import warnings
from pathlib import Path

from fixpass.sharding import resolve_shard_conditions, shard_units
from helpers import sharded_models

PAGE = Path(__file__).resolve().parents[2] / "docs/checkpoints.md"
START, END = "<!-- units -->", "<!-- end of units -->"


def table():
    """A row for each class: the rule that applies, how many units it gives, and which."""
    rows = ["| class | rule | units | which |", "| --- | --- | --- | --- |"]
    for name in sharded_models.SPECS:
        model = sharded_models.build(name)
        conditions, rule = resolve_shard_conditions(model)
        units = shard_units(model, conditions)
        rows.append(f"| {name} | {rule} | {len(units)} | {_containers(units)} |")
    return "\n".join(rows)


def _containers(units):
    """Units with their numbers counted, as in `layers.* (2)`."""
    counts = {}
    for unit in units:
        path, _, last = unit.rpartition(".")
        key = f"{path}.*" if last.isdigit() else unit
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"`{key}`" + (f" ({n})" if n > 1 else "") for key, n in counts.items())


def main():
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
