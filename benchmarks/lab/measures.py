"""What is reported of a run, from its record."""

from collections.abc import Sequence

from benchmarks.lab.plan import score
from benchmarks.lab.records import Record


def known_kinds(record: Record, new_kinds: Sequence[str]) -> list[str]:
    """The kinds of test questions that were trained on."""
    return [kind for kind in record["test"] if kind not in new_kinds]


def tested(record: Record, kinds: Sequence[str], key: str) -> float:
    """The mean over kinds of questions, of which there are equally many."""
    return sum(record["test"][kind][key] for kind in kinds) / len(kinds)


def measures(record: Record, new_kinds: Sequence[str]) -> dict[str, float]:
    """Accuracies in percent, on known and new kinds of questions, and tokens per sampled answer.

    Returns:
        `avg@8`, `greedy`, `pass@8`, and the same with ` new`; `length`.
    """
    known = known_kinds(record, new_kinds)
    keys = {"avg@8": "sampled/accuracy", "greedy": "greedy/accuracy", "pass@8": "sampled/pass@8"}
    out: dict[str, float] = {}
    for kinds, ending in ((known, ""), (list(new_kinds), " new")):
        out |= {f"{name}{ending}": 100 * tested(record, kinds, key) for name, key in keys.items()}
    return out | {"length": tested(record, known, "sampled/length_mean")}


def reached(record: Record, accuracy: float) -> tuple[int, int] | None:
    """Updates, and tokens of completions, until validation first showed an accuracy (avg@4, a share).

    Returns:
        None if it never did; (0, 0) if the student began with it.
    """
    validation = record["validation"]
    for step, value in zip(validation["step"], validation["sampled/accuracy"], strict=True):
        if value >= accuracy:
            return step, record["tokens"][step - 1] if step else 0
    return None


def final_accuracy(record: Record) -> float:
    """A share: what trials are judged by too, the mean of the last validations."""
    return score(record)
