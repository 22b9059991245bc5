"""How often 95 % intervals of several bootstraps hold what they are about, and what ours cost.

    python benchmarks/intervals.py

What the table of docs/evaluation.md is made of, in some minutes on one core.
"""

import itertools
import time

import numpy as np

from kdrl_jax.statistics import difference_interval, mean_interval, share_interval

TIMES = 1000
ENDS = (0.025, 0.975)


def percentile(totals: np.ndarray, counts: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The plain bootstrap of a ratio."""
    drawn = rng.integers(0, len(totals), (1000, len(totals)))
    counts = np.ones(len(totals)) if counts is None else counts
    return np.quantile(totals[drawn].sum(1) / counts[drawn].sum(1), ENDS)


def row(name: str, hits: dict[str, list[float]]) -> None:
    cells = (f"{100 * np.mean(x):.1f} | {100 * np.min(x):.1f}" for x in hits.values())
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def holds(interval: tuple[float, float] | np.ndarray, truth: float) -> bool:
    return bool(interval[0] <= truth <= interval[1])


def shares(num: int, rng: np.random.Generator) -> dict[str, list[float]]:
    hits: dict[str, list[float]] = {"ours": [], "percentile": []}
    for accuracy, samples, spread in itertools.product(
        (0.02, 0.05, 0.2, 0.5, 0.9, 0.98), (1, 4, 8), (0.3, 1.0, 5.0)
    ):
        found = []
        for _ in range(TIMES):
            p = rng.beta(accuracy * spread, (1 - accuracy) * spread, num)
            x = rng.binomial(samples, p) / samples
            found.append((holds(share_interval(x), accuracy), holds(percentile(x, None, rng), accuracy)))
        for name, hit in zip(hits, np.mean(found, axis=0), strict=True):
            hits[name].append(float(hit))
    return hits


def ratios(num: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Of log-normal nats per token (standard deviation of the logarithm 0.3 or 0.8), of answers whose lengths
    are as unequal as the second number says."""
    hits: dict[str, list[float]] = {"ours": [], "percentile": []}
    for sigma, unequal in itertools.product((0.3, 0.8), (0.0, 0.5, 1.0)):
        truth, found = np.exp(sigma**2 / 2), []
        for _ in range(TIMES):
            tokens = np.clip(np.round(40 * np.exp(unequal * rng.standard_normal(num))), 1, 128)
            total = tokens * np.exp(sigma * rng.standard_normal(num))
            ours, plain = mean_interval(total, tokens), percentile(total, tokens, rng)
            found.append((holds(ours, truth), holds(plain, truth)))
        for name, hit in zip(hits, np.mean(found, axis=0), strict=True):
            hits[name].append(float(hit))
    return hits


def differences(num: int, rng: np.random.Generator) -> dict[str, list[float]]:
    hits: dict[str, list[float]] = {"ours": [], "percentile": []}
    for accuracy, samples, kept in itertools.product((0.02, 0.1, 0.5, 0.9), (1, 4, 8), (1.0, 0.8)):
        truth, found = (1 - kept) * accuracy, []
        for _ in range(TIMES):
            p = rng.beta(accuracy, 1 - accuracy, num)
            ours, theirs = (rng.binomial(samples, q) / samples for q in (p, kept * p))
            plain = percentile(ours - theirs, None, rng)
            found.append((holds(difference_interval(ours, theirs), truth), holds(plain, truth)))
        for name, hit in zip(hits, np.mean(found, axis=0), strict=True):
            hits[name].append(float(hit))
    return hits


def main() -> None:
    print("| of | ours: mean % | lowest % | percentile: mean % | lowest % |\n| --- | --- | --- | --- | --- |")
    rng = np.random.default_rng(0)
    for num in (30, 100, 300):
        row(f"shares, {num} questions", shares(num, rng))
        row(f"ratios, {num} questions", ratios(num, rng))
        row(f"differences, {num} questions", differences(num, rng))
    x = np.random.default_rng(1).random(1000)
    for what in ("the first interval of 1,000 questions", "each further one"):
        start = time.process_time()
        share_interval(x)
        print(f"{what}: {1000 * (time.process_time() - start):.0f} ms of one core")


if __name__ == "__main__":
    main()
