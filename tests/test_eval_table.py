"""The table of the `eval` command."""

import pytest
from rich.cells import cell_len
from rich.console import Console

from kdrl_jax.eval.command import _say
from kdrl_jax.eval.table import change, measure, results_lines

SOURCE = "[hard].jsonl"


def results(step):
    measured = {"greedy/accuracy": 0.5, "sampled/accuracy": 0.521, "sampled/repeated_4gram_frac": 0.25}
    found = {"num_prompts": 64} | measured | {f"{key}_ci": [0.49, 0.552] for key in measured}
    return {"step": step, "settings": "0123abcd", **found, "by_source": {SOURCE: found, "数学.jsonl": found}}


def test_cells_of_the_table():
    assert measure("greedy/accuracy", 0.521, [0.49, 0.552]) == "52.1 % (49.0–55.2)"
    assert measure("sampled/length_mean", 38.2, [36.91, 39.62]) == "38.2 (36.9–39.6)"
    assert measure("teacher_reverse_kl", 1.25, None) == "1.250"
    assert measure("num_prompts", 64, None) == "64"
    assert measure("greedy/accuracy", None, None) == ""
    assert change(-0.01, [-0.05, 0.031]) == "-1.0 (-5.0 to +3.1)"


@pytest.mark.parametrize("num", [1, 5, 12])
@pytest.mark.parametrize("width", [40, 60, 80, 200, None])
def test_nothing_is_lost_in_narrow_terminals(num, width):
    columns = {f"step {1000 * i}": results(1000 * i) for i in range(num)}
    columns["teacher"] = {"num_prompts": 64, "greedy/accuracy": 0.9, "greedy/accuracy_ci": [0.8, 0.95]}
    changes = {"from_step": 0, "to_step": 1000, "greedy/accuracy": 0.01, "greedy/accuracy_ci": [-0.02, 0.04]}
    lines = list(results_lines(columns, changes if num > 1 else {}, width))
    text = "\n".join(lines)
    assert text.count("52.1 % (49.0–55.2)") == 3 * num
    assert text.count("+1.0 (-2.0 to +4.0)") == (num > 1)
    assert text.count("90.0 % (80.0–95.0)") == 1
    assert "0123abcd" not in text
    assert "…" not in text
    for name in (*columns, "greedy/accuracy", "sampled/repeated_4gram_frac", "数学.jsonl:"):
        assert name in text
    assert lines.count(f"{SOURCE}:") == 1
    assert width is None or width < 60 or max(map(cell_len, lines)) <= width


def test_names_are_printed_as_they_are(capsys):
    _say(Console(), f"{SOURCE}: [red]1[/red]")
    assert capsys.readouterr().out == f"{SOURCE}: [red]1[/red]\n"


def test_what_is_compared_stands_in_one_place():
    """Beside each other if there is room; else beneath each other, a few measures at a time."""
    columns = {f"step {i}": results(i) for i in range(12)}
    wide, narrow = (list(results_lines(columns, {}, width)) for width in (None, 80))
    (line,) = (line for line in wide[: wide.index(f"{SOURCE}:")] if line.startswith("sampled/accuracy"))
    assert line.count("52.1 %") == 12
    start = next(i for i, line in enumerate(narrow) if "greedy/accuracy" in line)
    block = narrow[start : start + 13]
    assert [line.split("   ")[0] for line in block[1:]] == list(columns)
    assert len({cell_len(line) for line in block}) == 1
