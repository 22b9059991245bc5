"""Verdicts on answers to numbers with intervals, as `eval/*.json` holds them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdrl_jax.evaluate.agreement import RowSums
from kdrl_jax.metrics import share_of
from kdrl_jax.statistics import (
    Interval,
    majority,
    mean_interval,
    pass_at_k,
    pass_sizes,
    share_interval,
)

Results = dict[str, Any]
"""Flat and JSON-able. Beside `NAME` stands `NAME_ci`: [low, high], 95 %, over questions."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """N answers to each of P questions, and the verdicts on them; the same on every process."""

    correct_PN: np.ndarray
    """bool."""
    failed_PN: np.ndarray
    """bool: there is no verdict, by an error of the verifier; counts as wrong."""
    votes_PN: np.ndarray | None
    """int: as `statistics.majority` takes them; None where the verifier knows no votes."""
    lengths_PN: np.ndarray
    """int: tokens."""
    ended_PN: np.ndarray
    """bool: not truncated."""
    ngrams_PN2: np.ndarray
    """int: repeated 4-grams, and all."""

    def take(self, questions: np.ndarray) -> "Answers":
        """Those to some questions."""
        each: list[Any] = [getattr(self, field.name) for field in dataclasses.fields(self)]
        taken: list[Any] = [None if values is None else values[questions] for values in each]
        return Answers(*taken)

    @classmethod
    def joined(cls, parts: "Sequence[Answers]") -> "Answers":
        """Those of several batches, one after another."""
        each = [[getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)]
        whole: list[Any] = [None if values[0] is None else np.concatenate(values) for values in each]
        return cls(*whole)

    @property
    def accuracy_P(self) -> np.ndarray:  # noqa: N802 - dimensions in names
        """float64: the share of right answers to each question."""
        return self.correct_PN.mean(axis=1)


def answer_results(name: str, answers: Answers, longest: int) -> Results:
    """Accuracy, lengths, truncation and repetition; of several samples pass@k too, and maj@k if they have
    votes.

    Args:
        name: `greedy` or `sampled`.
        longest: tokens that an answer may have.
    """
    repeated, grams = answers.ngrams_PN2.sum(axis=(0, 1)).tolist()
    out = _headline(name, answers, longest)
    out |= _with_interval(
        f"{name}/truncated_frac",
        1.0 - int(answers.ended_PN.sum()) / answers.ended_PN.size,
        share_interval(1.0 - answers.ended_PN.mean(axis=1)),
    )
    out[f"{name}/repeated_4gram_frac"] = share_of(repeated, grams)
    out[f"{name}/verifier_errors"] = int(answers.failed_PN.sum())
    return out


def _headline(name: str, answers: Answers, longest: int) -> Results:
    """What is told of each source of questions too."""
    num = answers.correct_PN.size
    out: Results = {}
    if name == "sampled":
        out["sampled/num_samples"] = answers.correct_PN.shape[1]
    out |= _with_interval(
        f"{name}/accuracy", int(answers.correct_PN.sum()) / num, share_interval(answers.accuracy_P)
    )
    if name == "sampled":
        out |= _of_several(answers)
    lengths_P = answers.lengths_PN.mean(axis=1)
    return out | _with_interval(
        f"{name}/length_mean",
        int(answers.lengths_PN.sum()) / num,
        mean_interval(lengths_P, most=float(longest)),
    )


def _of_several(answers: Answers) -> Results:
    num_samples = answers.correct_PN.shape[1]
    correct_P = answers.correct_PN.sum(axis=1)
    each = {f"pass@{k}": pass_at_k(correct_P, num_samples, k) for k in pass_sizes(num_samples)}
    if num_samples > 1 and answers.votes_PN is not None:
        each[f"maj@{num_samples}"] = majority(answers.votes_PN, answers.correct_PN)
    out: Results = {}
    for key, values_P in each.items():
        out |= _with_interval(f"sampled/{key}", float(values_P.mean()), share_interval(values_P))
    return out


def source_results(
    parts: dict[str, Answers], sources: Sequence[str], longest: int
) -> dict[str, Results] | None:
    """The headline numbers of each source of questions; None where there is one.

    Args:
        parts: `greedy` and `sampled`, those that were measured.
        sources: of each question.
    """
    names = list(dict.fromkeys(sources))
    if len(names) < 2:
        return None
    out: dict[str, Results] = {}
    for source in names:
        mine = np.flatnonzero([s == source for s in sources])
        out[source] = {"num_prompts": len(mine)}
        for name, answers in parts.items():
            out[source] |= _headline(name, answers.take(mine), longest)
    return out


def agreement_results(sums: RowSums) -> Results:
    """Means over all tokens of the teacher's answers; the intervals are over questions."""
    tokens = sums.tokens_B.sum()
    return (
        _with_interval(
            "teacher_reverse_kl",
            float(sums.reverse_kl_B.sum() / tokens),
            mean_interval(sums.reverse_kl_B, sums.tokens_B),
        )
        | _with_interval(
            "teacher_forward_kl",
            float(sums.forward_kl_B.sum() / tokens),
            mean_interval(sums.forward_kl_B, sums.tokens_B),
        )
        | _with_interval(
            "teacher_top_agreement",
            float(sums.same_top_B.sum() / tokens),
            share_interval(sums.same_top_B, sums.tokens_B),
        )
    )


def _with_interval(key: str, value: float, interval: Interval) -> Results:
    return {key: value, f"{key}_ci": list(interval)}
