"""What is reported of a run, from its record."""

from collections.abc import Sequence

from benchmarks.lab.plan import running_scores
from benchmarks.lab.records import Record

ACCURACIES = {"avg@8": "sampled/accuracy", "greedy": "greedy/accuracy", "pass@8": "sampled/pass@8"}


def measures(record: Record, new_kinds: Sequence[str]) -> dict[str, float]:
    """Accuracies in percent, on known and new kinds of questions, and tokens per sampled answer.

    Returns:
        `avg@8`, `greedy`, `pass@8`, and the same with ` new`; `length`.
    """
    known = [kind for kind in record["test"] if kind not in new_kinds]
    out: dict[str, float] = {}
    for kinds, ending in ((known, ""), (new_kinds, " new")):
        out |= {f"{name}{ending}": 100 * _mean(record, kinds, key) for name, key in ACCURACIES.items()}
    return out | {"length": _mean(record, known, "sampled/length_mean")}


def _mean(record: Record, kinds: Sequence[str], key: str) -> float:
    """Over kinds of questions, of which there are equally many."""
    return float(sum(record["test"][kind][key] for kind in kinds) / len(kinds))


def reached(record: Record, accuracy: float) -> tuple[int, int] | None:
    """Updates, and tokens of completions, until the last validations' mean was at least so much.

    Args:
        accuracy: a share, of the same kind of mean (`plan.score`).

    Returns:
        None if it never was; (0, 0) if the student began with it.
    """
    for step, value in zip(record["validation"]["step"], running_scores(record), strict=True):
        if value >= accuracy:
            return step, record["tokens"][step - 1] if step else 0
    return None
