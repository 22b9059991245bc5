"""95 % confidence intervals over questions, by the bootstrap.

Which bootstrap was decided by simulation (`benchmarks/intervals.py`; docs/evaluation.md has the table): of
30 questions, plain percentiles cover a share of 2 % in less than half of all cases, since most samples hold
no right answer at all, or one.

- Shares (accuracy, pass@k): percentiles after two questions were added, one wholly right and one wholly
  wrong, as Agresti and Coull (1998) add successes and failures. They never have width zero.
- Differences of shares: likewise, with two questions that add 1 to the sum of squares, as the half counts
  of Agresti and Min (2005) do.
- Means and ratios without such bounds (lengths, nats per token): studentised (Efron and Tibshirani 1993,
  section 12.5), since their distributions are skewed.

Everything follows from a fixed seed: the same resamples are drawn for all shares (and differences) of as many
questions, and for all means, on all hosts and in a resumed run.
"""

import functools

import numpy as np

LEVEL = 0.95
DRAWS = 2000
"""Resamples; at 2,000 an end of an interval moves by about a twentieth of its width from seed to seed."""
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_CELLS = 4_000_000
"""Counts of resampled questions that are made floats at a time, which bounds the memory (32 MB)."""

Interval = tuple[float, float]
"""Low and high end."""


def share_interval(part_Q: np.ndarray, whole_Q: np.ndarray | None = None) -> Interval:
    """Of a share of all questions' wholes, sum(part) / sum(whole).

    Args:
        part_Q: float [Q], each from 0 to its whole.
        whole_Q: float [Q], at least 0; None is 1 of each: the mean of values from 0 to 1.

    Returns:
        Within 0 and 1, around the share; all of it without any whole.
    """
    whole_Q = _ones_like(part_Q) if whole_Q is None else np.asarray(whole_Q, np.float64)
    if not whole_Q.sum() > 0:
        return 0.0, 1.0
    usual = whole_Q.mean()
    part, whole = np.append(part_Q, [usual, 0.0]), np.append(whole_Q, [usual, usual])
    parts_D, wholes_D = _resampled(part, whole)
    return _around(np.sum(part_Q) / whole_Q.sum(), np.quantile(parts_D / wholes_D, _ENDS))


def difference_interval(ours_Q: np.ndarray, theirs_Q: np.ndarray) -> Interval:
    """Of the mean of ours - theirs, of two evaluations on the same questions in the same order.

    Args:
        ours_Q, theirs_Q: float [Q], from 0 to 1.

    Returns:
        Within -1 and 1, around the mean difference; all of it without questions.

    Raises:
        ValueError: not the same number of questions.
    """
    if len(ours_Q) != len(theirs_Q):
        raise ValueError(f"{len(ours_Q)} questions and {len(theirs_Q)}; compare answers to the same ones")
    if not len(ours_Q):
        return -1.0, 1.0
    won_Q = np.asarray(ours_Q, np.float64) - theirs_Q
    augmented = np.append(won_Q, [0.5**0.5, -(0.5**0.5)])
    (sums_D,) = _resampled(augmented)
    return _around(won_Q.mean(), np.quantile(sums_D / len(augmented), _ENDS))


def mean_interval(
    total_Q: np.ndarray, count_Q: np.ndarray | None = None, *, most: float | None = None
) -> Interval:
    """Of a ratio of sums over all questions, sum(total) / sum(count).

    Args:
        total_Q: float [Q], at least 0.
        count_Q: float [Q], at least 0; None is 1 of each: the mean.
        most: that the ratio can be.

    Returns:
        At least 0, around the ratio; without width where all questions have the same. nan without counts.
    """
    total_Q = np.asarray(total_Q, np.float64)
    count_Q = _ones_like(total_Q) if count_Q is None else np.asarray(count_Q, np.float64)
    if not count_Q.sum() > 0:
        return float("nan"), float("nan")
    ratio = total_Q.sum() / count_Q.sum()
    residual_Q = total_Q - ratio * count_Q
    totals_D, counts_D, tt_D, tc_D, cc_D = _resampled(
        total_Q, count_Q, total_Q * total_Q, total_Q * count_Q, count_Q * count_Q
    )
    # A resample may hold questions without any count only.
    there = counts_D > 0
    totals_D, counts_D, tt_D, tc_D, cc_D = (x[there] for x in (totals_D, counts_D, tt_D, tc_D, cc_D))
    ratios_D = totals_D / counts_D
    error = np.sqrt(np.sum(residual_Q**2)) / count_Q.sum()
    squares_D = np.maximum(tt_D - 2 * ratios_D * tc_D + ratios_D**2 * cc_D, 0.0)
    # Where nearly all questions have the same ratio, a resample may hold no other, and so know no error.
    errors_D = np.maximum(np.sqrt(squares_D) / counts_D, error / np.sqrt(len(total_Q)))
    if not error > 0:
        return float(ratio), float(ratio)
    low, high = np.quantile((ratios_D - ratio) / errors_D, _ENDS)
    ends = np.array([ratio - high * error, ratio - low * error])
    return _around(ratio, np.clip(ends, 0.0, most))


def _around(value: float, ends: np.ndarray) -> Interval:
    """The interval, with the value in it; six decimals, of which the last bits of sums have no part."""
    low, high = min(float(ends[0]), float(value)), max(float(ends[1]), float(value))
    return round(low, 6), round(high, 6)


def _ones_like(values: np.ndarray) -> np.ndarray:
    return np.ones(len(values))


def _resampled(*columns_Q: np.ndarray) -> list[np.ndarray]:
    """The sums of each column over each resample's questions, float64 [DRAWS]."""
    counts_DQ, columns_QM = _counts(len(columns_Q[0])), np.stack(columns_Q, -1).astype(np.float64)
    rows = max(_CELLS // len(columns_QM), 1)
    sums_DM = np.concatenate(
        [counts_DQ[i : i + rows].astype(np.float64) @ columns_QM for i in range(0, DRAWS, rows)]
    )
    return list(sums_DM.T)


@functools.lru_cache(maxsize=8)
def _counts(num: int) -> np.ndarray:
    """uint8 [DRAWS, num]: how often each of `num` questions is in each resample. Kept, since many measures of
    an evaluation ask for the same; no question is drawn 256 times, but with a chance below 1e-500."""
    rng, counts = np.random.default_rng(num), np.empty((DRAWS, num), np.uint8)
    rows = max(_CELLS // (8 * num), 1)
    for i in range(0, DRAWS, rows):
        drawn = rng.integers(0, num, (min(rows, DRAWS - i), num), np.uint32)
        places = drawn + np.arange(len(drawn), dtype=np.uint32)[:, None] * np.uint32(num)
        counts[i : i + rows] = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
    counts.flags.writeable = False
    return counts
