"""The example of docs/weights.md about tensors that follow from weights runs, and prints its text."""

from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "weights.md"


def test_the_example_prints_what_the_page_says(capsys):
    section = PAGE.read_text().split("## Tensors that follow from weights")[1]
    program = section.split("```python")[1].split("```")[0]
    exec(program, {"__name__": "example"})
    said = [line[2:] for line in program.splitlines() if line.startswith("# ")]
    assert capsys.readouterr().out.splitlines() == said
