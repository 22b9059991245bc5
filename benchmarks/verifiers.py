"""How fast verifiers are, how long the worst answer takes, and how often they are right.

    python benchmarks/verifiers.py [--plain]

For each verifier, through `RewardPool` with 1 and with 2 workers: answers per second over its golden answers
(tests/golden/verifiers.tsv; those of `math` once, fewer than 1,000 repeated); the longest time of one golden
and of one hostile answer (tests/golden/hostile.jsonl), as whoever asks sees it, one answer at a time; and
how many golden answers it judges as the file says. Hostile answers meet a gold answer that only math-verify
reads, so that none is decided early.

--plain judges the answers of `math` by math-verify alone as well, as its README does (`parse`, `verify`), in
this process.
"""

import argparse
import collections
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from verifier_sets import Row, golden, hostile  # noqa: E402

from kdrl_jax.rewards.pool import RewardPool, Scored  # noqa: E402

HOSTILE_GOLD = {"math": r"x^2 + y^2 \le 77777", "numeric": "77777", "choice": "Q"}
LIMIT_S = 2.0


def one_by_one(pool: RewardPool, rows: Sequence[tuple[str, str]]) -> tuple[float, int]:
    """The longest time of one answer, and how many had an error."""
    longest, errors = 0.0, 0
    for gold, completion in rows:
        start = time.perf_counter()
        (scored,) = pool.score([""], [completion], [gold])
        longest = max(longest, time.perf_counter() - start)
        errors += scored.error is not None
    return longest, errors


def measure(verifier: str, rows: list[Row]) -> None:
    name, _, pattern = verifier.partition(":")
    completions, golds = [r.completion for r in rows], [r.gold for r in rows]
    rates, scored = [], list[Scored]()
    repeats = -(-1000 // len(rows))
    for num_workers in (1, 2):
        with RewardPool([name], num_workers, LIMIT_S, pattern or None) as pool:
            start = time.perf_counter()
            scored = pool.score([""] * len(rows) * repeats, completions * repeats, golds * repeats)
            rates.append(len(rows) * repeats / (time.perf_counter() - start))
    right = sum(s.scores[name] == float(r.is_right) for s, r in zip(scored, rows, strict=False))
    with RewardPool([name], 1, LIMIT_S, pattern or None) as pool:
        worst_golden, _ = one_by_one(pool, [(r.gold, r.completion) for r in rows])
        gold = HOSTILE_GOLD.get(name, "no such text")
        worst_hostile, errors = one_by_one(pool, [(gold, text) for text in hostile()])
    print(
        f"{verifier[:32]:32} {right:5}/{len(rows):<5} {rates[0]:9.0f} {rates[1]:9.0f} "
        f"{1000 * worst_golden:9.0f} {1000 * worst_hostile:9.0f} {errors:7}"
    )


def plain(rows: list[Row]) -> None:
    """math-verify as its README uses it."""
    from math_verify import parse, verify

    right, falsely = 0, 0
    start = time.perf_counter()
    for row in rows:
        gold = row.gold if "boxed" in row.gold or "####" in row.gold else f"${row.gold}$"
        says = verify(parse(gold), parse(row.completion))
        right += says == row.is_right
        falsely += says and not row.is_right
    took = time.perf_counter() - start
    print(
        f"math-verify alone: {right}/{len(rows)} as the file says, {falsely} wrong answers taken for right, "
        f"{len(rows) / took:.0f} answers/s in one process"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    by_verifier = collections.defaultdict(list)
    for row in golden():
        by_verifier[row.verifier].append(row)
    print(f"{os.cpu_count()} cores, limit {LIMIT_S} s, {len(hostile())} hostile answers")
    print(
        f"{'verifier':32} {'right':>11} {'1 worker':>9} {'2 workers':>9} {'golden':>9} {'hostile':>9} "
        f"{'errors':>7}\n{'':32} {'':11} {'answers/s':>9} {'answers/s':>9} {'worst ms':>9} {'worst ms':>9}"
    )
    for verifier, rows in by_verifier.items():
        measure(verifier, rows)
    if args.plain:
        plain(by_verifier["math"])


if __name__ == "__main__":
    main()
