"""The lab's tables in Markdown, from records alone."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.lab.measures import measures, reached
from benchmarks.lab.plan import score
from benchmarks.lab.protocol import Teacher
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
BASELINES = {
    "grpo": ("avg@8", "greedy", "avg@8 new"),
    "kd_rkl": ("avg@8", "greedy", "avg@8 new"),
    "kdrl": ("avg@8",),
}
"""What methods are compared with, and by which measures."""
Runs = Mapping[str, Sequence[Record]]
"""Method or variant -> records, by seed."""


def models_table(models: Mapping[str, Record], new_kinds: Sequence[str]) -> str:
    """The student before any method, and the teachers."""
    head = ["", "avg@8", "greedy", "pass@8", "avg@8, new kind", "greedy, new kind", "pass@8, new kind",
            "tokens per answer", "KL to the strong teacher", "KL to the imperfect one"]  # fmt: skip
    keys = ("avg@8", "greedy", "pass@8", "avg@8 new", "greedy new", "pass@8 new", "length")
    names = {"student": "student", "strong": "strong teacher", "imperfect": "imperfect teacher"}
    rows = []
    for name, record in models.items():
        found = measures(record, new_kinds)
        to_teacher = [record["to_teacher"].get(teacher) for teacher in ("strong", "imperfect")]
        kl = ["" if to is None else f"{to['teacher_reverse_kl']:.3f}" for to in to_teacher]
        rows.append([names[name], *(f"{found[key]:.1f}" for key in keys), *kl])
    return _table(head, rows)


def summary_table(
    finals: Mapping[Teacher, Runs], models: Mapping[str, Record], new_kinds: Sequence[str]
) -> str:
    """avg@8 of all methods beside each teacher, and of the models themselves.

    Args:
        finals: teacher -> its runs.
    """
    keys = ("avg@8", "avg@8 new")
    head = ["avg@8 (%)", *(f"{teacher} teacher{kind}" for teacher in finals for kind in ("", ", new kind"))]
    of_models = {name: measures(record, new_kinds) for name, record in models.items()}
    rows = [
        [who, *(f"{of_models[one or teacher][key]:.1f}" for teacher in finals for key in keys)]
        for who, one in (("*the student before*", "student"), ("*the teacher*", None))
    ]
    for method in next(iter(finals.values())):
        cells = [
            _percent(mean_of([measures(record, new_kinds)[key] for record in runs[method]]))
            for runs in finals.values()
            for key in keys
        ]
        rows.append([NAMES[method], *cells])
    return _table(head, rows)


def methods_table(runs: Runs, new_kinds: Sequence[str], teacher: Teacher) -> str:
    """What each method has reached beside a teacher."""
    head = ["method", "avg@8", "greedy", "pass@8", "avg@8, new kind", "greedy, new kind", "pass@8, new kind",
            "tokens per answer", "KL to the teacher"]  # fmt: skip
    keys = ("avg@8", "greedy", "pass@8", "avg@8 new", "greedy new", "pass@8 new", "length")
    rows = []
    for method, records in runs.items():
        each = [measures(record, new_kinds) for record in records]
        cells = [_percent(mean_of([m[key] for m in each])) for key in keys]
        rows.append([NAMES[method], *cells, _kl(records, teacher)])
    return _table(head, rows)


def differences_table(runs: Runs, new_kinds: Sequence[str]) -> str:
    """Of each method minus those of `BASELINES`, paired by seed, in points."""
    keys = {"avg@8": "", "greedy": ", greedy", "avg@8 new": ", new kind"}
    bases = [(base, key) for base, measured in BASELINES.items() for key in measured]
    head = ["method", *(f"minus {NAMES[base]}{keys[key]}" for base, key in bases)]
    values = {
        method: {key: [measures(record, new_kinds)[key] for record in records] for key in keys}
        for method, records in runs.items()
    }
    rows = []
    for method, mine in values.items():
        cells = [
            "" if method == base else _signed(difference_of(mine[key], values[base][key]))
            for base, key in bases
        ]
        rows.append([NAMES[method], *cells])
    return _table(head, rows)


def speed_table(runs: Runs) -> str:
    """How soon each method had, in validation, what GRPO had at its end with the same seed. Seeds that never
    had it count with the whole budget, and the mean is then a lower bound."""
    goals = [score(record) for record in runs["grpo"]]
    rows = []
    for method, records in runs.items():
        found = [reached(record, goal) for record, goal in zip(records, goals, strict=True)]
        whole = [(len(record["tokens"]), record["tokens"][-1]) for record in records]
        hits = [hit or budget for hit, budget in zip(found, whole, strict=True)]
        num_there = sum(hit is not None for hit in found)
        bound = "" if num_there == len(found) else "≥ "
        steps = sum(hit[0] for hit in hits) / len(hits)
        tokens = sum(hit[1] for hit in hits) / len(hits) / 1000
        rows.append(
            [NAMES[method], f"{num_there} of {len(found)}", f"{bound}{steps:.0f}", f"{bound}{tokens:.0f}"]
        )
    return _table(["method", "seeds that got there", "updates", "thousand tokens"], rows)


def trials_table(trials: Runs) -> str:
    """Every trial's settings and score; the best of each method in bold."""
    rows = []
    for method, records in trials.items():
        scores = [score(record) for record in records]
        texts = [f"{_settings(r['settings'])}: {100 * s:.1f}" for r, s in zip(records, scores, strict=True)]
        best = scores.index(max(scores))
        edge = ", ".join(_edges(records[best]["settings"], [record["settings"] for record in records]))
        texts[best] = f"**{texts[best]}**{f' (at the edge: {edge})' if edge else ''}"
        rows.append([NAMES[method], "; ".join(texts)])
    return _table(["method", "settings: avg@4 in the last three validations"], rows)


def _edges(chosen: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The settings whose least or greatest value of at least three was chosen."""
    for key in chosen:
        value, values = _size(chosen[key]), {_size(settings[key]) for settings in tried}
        # A switch is one setting, although both coefficients say it.
        if key != "rl.coef" and len(values) >= 3 and value in (min(values), max(values)):
            yield _name(key, chosen[key])


def _size(value: Any) -> float:
    """What schedules of one kind differ in."""
    if not isinstance(value, dict):
        return float(value)
    return float(value["a"] if value["kind"] == "max_linear" else max(map(int, value["values"])))


def _name(key: str, value: Any) -> str:
    if key.startswith("optimizer."):
        return "rate"
    return "switch" if isinstance(value, dict) and value["kind"] == "piecewise" else key


def ablation_table(
    variants: Runs, against: Mapping[str, Runs], new_kinds: Sequence[str], teacher: Teacher
) -> str:
    """One row for each variant.

    Args:
        against: what avg@8 is compared with, paired by seed: a name -> variant -> records.
    """
    head = ["", "avg@8", "greedy", "avg@8, new kind", "KL to the teacher"]
    rows = []
    for name, records in variants.items():
        each = [measures(record, new_kinds) for record in records]
        cells = [_percent(mean_of([m[key] for m in each])) for key in ("avg@8", "greedy", "avg@8 new")]
        for others in against.values():
            theirs = [measures(record, new_kinds)["avg@8"] for record in others[name]]
            cells.append(_signed(difference_of([m["avg@8"] for m in each], theirs)))
        rows.append([name, *cells[:3], _kl(records, teacher), *cells[3:]])
    return _table([*head, *(f"minus {name}" for name in against)], rows)


def made_with_table(records: Iterable[Record]) -> str:
    """How many runs were made with which versions."""
    counts = Counter((r["made_with"]["jax"], r["made_with"]["code"]) for r in records)
    return _table(["jax", "hash of kdrl_jax", "runs"], [[*key, str(n)] for key, n in sorted(counts.items())])


def _settings(settings: Mapping[str, Any]) -> str:
    """`rate 0.0005, kd.coef 0.3`; of schedules what tells them apart."""
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
    return ", ".join(parts)


def _kl(records: Sequence[Record], teacher: Teacher) -> str:
    mean = mean_of([record["to_teacher"][teacher]["teacher_reverse_kl"] for record in records])
    return f"{mean.value:.3f}{_plus_minus(mean, 3)}"


def _percent(mean: Mean) -> str:
    return f"{mean.value:.1f}{_plus_minus(mean)}"


def _signed(mean: Mean) -> str:
    text = f"{mean.value:+.1f}{_plus_minus(mean)}"
    return f"**{text}**" if abs(mean.value) > mean.half else text


def _plus_minus(mean: Mean, digits: int = 1) -> str:
    return "" if math.isnan(mean.half) else f" ± {mean.half:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
