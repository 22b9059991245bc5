"""The lab's tables in Markdown, from records alone."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lab.measures import final_accuracy, measures, reached
from benchmarks.lab.plan import score
from benchmarks.lab.records import Record
from benchmarks.lab.statistics import Mean, difference_of, mean_of

NAMES = {
    "sft": "SFT on right steps",
    "seq_kd": "SFT on the teacher's samples",
    "kd_rkl": "KD-RKL",
    "grpo": "GRPO",
    "kdrl": "KDRL",
    "kdrl_anneal": "KDRL, annealed",
    "kdrl_mask_response": "KDRL, wrong completions",
    "kdrl_mask_group": "KDRL, failed groups",
    "kd_then_rl": "KD-RKL, then GRPO",
}
BASELINES = ("grpo", "kd_rkl")
Runs = Mapping[str, Sequence[Record]]
"""Method or variant -> records, by seed."""


def models_table(models: Mapping[str, Record], new_kinds: Sequence[str]) -> str:
    """The student before any method, and the teachers."""
    head = ["", "avg@8", "greedy", "pass@8", "avg@8, new kind", "greedy, new kind", "tokens per answer"]
    keys = ("avg@8", "greedy", "pass@8", "avg@8 new", "greedy new", "length")
    names = {"student": "student", "strong": "strong teacher", "imperfect": "imperfect teacher"}
    found = {name: measures(record, new_kinds) for name, record in models.items()}
    return _table(head, [[names[name], *(f"{m[key]:.1f}" for key in keys)] for name, m in found.items()])


def methods_table(runs: Runs, new_kinds: Sequence[str], teacher: str) -> str:
    """What each method has reached beside a teacher."""
    head = ["method", "avg@8", "greedy", "pass@8", "avg@8, new kind", "greedy, new kind", "pass@8, new kind",
            "tokens per answer", "KL to the teacher"]  # fmt: skip
    keys = ("avg@8", "greedy", "pass@8", "avg@8 new", "greedy new", "pass@8 new", "length")
    rows = []
    for method, records in runs.items():
        each = [measures(record, new_kinds) for record in records]
        to_teacher = mean_of([r["to_teacher"][teacher]["teacher_reverse_kl"] for r in records])
        cells = [_percent(mean_of([m[key] for m in each])) for key in keys]
        rows.append([NAMES[method], *cells, f"{to_teacher.value:.3f} ± {to_teacher.half:.3f}"])
    return _table(head, rows)


def speed_table(runs: Runs) -> str:
    """How soon each method had, in validation, what GRPO had at its end with the same seed."""
    goals = [final_accuracy(record) for record in runs["grpo"]]
    rows = []
    for method, records in runs.items():
        found = [reached(record, goal) for record, goal in zip(records, goals, strict=True)]
        there = [hit for hit in found if hit is not None]
        how_many = f"{len(there)} of {len(found)}"
        steps = f"{sum(hit[0] for hit in there) / len(there):.0f}" if there else "–"
        tokens = f"{sum(hit[1] for hit in there) / len(there) / 1000:.0f}" if there else "–"
        rows.append([NAMES[method], how_many, steps, tokens])
    return _table(["method", "seeds that got there", "updates", "thousand tokens"], rows)


def differences_table(runs: Runs, new_kinds: Sequence[str]) -> str:
    """Of each method minus GRPO and minus KD-RKL, paired by seed, in points of avg@8."""
    head = ["method", *(f"minus {NAMES[b]}{kind}" for b in BASELINES for kind in ("", ", new kind"))]
    values = {
        method: {
            key: [measures(record, new_kinds)[key] for record in records] for key in ("avg@8", "avg@8 new")
        }
        for method, records in runs.items()
    }
    rows = []
    for method, mine in values.items():
        cells = [
            "" if method == base else _signed(difference_of(mine[key], values[base][key]))
            for base in BASELINES
            for key in ("avg@8", "avg@8 new")
        ]
        rows.append([NAMES[method], *cells])
    return _table(head, rows)


def trials_table(trials: Runs) -> str:
    """Every trial's settings and score; the best of each method in bold."""
    rows = []
    for method, records in trials.items():
        best = max(score(record) for record in records)
        cells = []
        is_marked = False
        for record in records:
            text = f"{_settings(record['settings'])}: {100 * score(record):.1f}"
            is_best = score(record) == best and not is_marked
            is_marked |= is_best
            cells.append(f"**{text}**" if is_best else text)
        rows.append([NAMES[method], "; ".join(cells)])
    return _table(["method", "settings: avg@4 in the last three validations"], rows)


def ablation_table(variants: Runs, new_kinds: Sequence[str], teacher: str) -> str:
    """One row for each variant."""
    head = ["", "avg@8", "greedy", "avg@8, new kind", "KL to the teacher"]
    rows = []
    for name, records in variants.items():
        each = [measures(record, new_kinds) for record in records]
        cells = [_percent(mean_of([m[key] for m in each])) for key in ("avg@8", "greedy", "avg@8 new")]
        kl = mean_of([record["to_teacher"][teacher]["teacher_reverse_kl"] for record in records])
        rows.append([name, *cells, f"{kl.value:.3f} ± {kl.half:.3f}"])
    return _table(head, rows)


def _settings(settings: Mapping[str, Any]) -> str:
    """`rate 5e-4, kd.coef 0.3`; of schedules what tells them apart."""
    parts = []
    for key, value in settings.items():
        if key.startswith("optimizer."):
            parts.append(f"rate {value:g}")
        elif not isinstance(value, dict):
            parts.append(f"{key} {value:g}")
        elif value["kind"] == "max_linear":
            parts.append(f"{key} from {value['a']:g} to {value['c']:g}")
        elif key == "kd.coef":
            parts.append(f"switch at {max(map(int, value['values']))}")
    return ", ".join(parts) or json.dumps(settings)


def _percent(mean: Mean) -> str:
    return f"{mean.value:.1f}" if math.isnan(mean.half) else f"{mean.value:.1f} ± {mean.half:.1f}"


def _signed(mean: Mean) -> str:
    text = f"{mean.value:+.1f} ± {mean.half:.1f}"
    return f"**{text}**" if abs(mean.value) > mean.half else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
