"""Evaluations as a table for the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from kdrl_jax.report.reading import Evaluations

COLUMNS = {
    "greedy/accuracy": ("greedy accuracy", "{:.1%}"),
    "sampled/accuracy": ("sampled accuracy", "{:.1%}"),
    "sampled/length_mean": ("tokens", "{:.1f}"),
    "sampled/truncated_frac": ("truncated", "{:.1%}"),
    "sampled/repeated_4gram_frac": ("repeated 4-grams", "{:.1%}"),
    "teacher_reverse_kl": ("KL on teacher's answers", "{:.3f}"),
    "teacher_top_agreement": ("same top token", "{:.1%}"),
}


def evaluation_table(run: str, evaluations: Evaluations) -> Table:
    """A row for each model. Args: run: its name, where there are several."""
    columns = COLUMNS
    if not any("sampled/length_mean" in r for r in evaluations.values()):
        columns = {k.replace("sampled/", "greedy/"): v for k, v in COLUMNS.items() if k != "sampled/accuracy"}
    used = {k: v for k, v in columns.items() if any(k in r for r in evaluations.values())}
    nums = dict.fromkeys(str(r["num_prompts"]) for r in evaluations.values() if "num_prompts" in r)
    # Names hold what users have written: no markup.
    table = Table(title=Text(f"{run}{': ' if run else ''}held-out questions ({', '.join(nums)})"))
    table.add_column("model")
    for label, _ in used.values():
        table.add_column(label, justify="right")
    for name, results in evaluations.items():
        table.add_row(Text(name), *(_cell(results, k, form) for k, (_, form) in used.items()))
    return table


def _cell(results: dict[str, Any], key: str, form: str) -> str:
    """The value, and its 95 % interval where there is one."""
    value, interval = results.get(key), results.get(f"{key}_ci") or ()
    if value is None:
        return "" if key not in results else "not finite"
    text = form.format(value)
    if len(interval) == 2 and None not in interval:
        low, high = (form.format(x).removesuffix("%") for x in interval)
        text += f" ({low}–{high})"
    return text
