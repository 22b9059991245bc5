"""Samples as compressed blocks of a page, within a room: which steps, and how much of each.

Files are chosen by their sizes and then read one at a time: a run may have gigabytes of them.
"""

import base64
import dataclasses
import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.metrics import as_json, read_jsonl
from kdrl_jax.paths import size_of

CAPS = (None, 4096, 2048, 1024, 512)
"""Tokens of a row that keep their numbers; the text goes on without them."""
ENOUGH_STEPS = 10
"""Rather fewer numbers of long rows than fewer steps than this."""
_CHARS_PER_TOKEN = 8

Told = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Files of one kind of a run."""

    label: str
    files: Mapping[int, Path]
    """By step, in order."""
    read: Callable[[Path], Rows] = read_jsonl


def fit(samples: Sequence[Samples], room: int, told: Told) -> tuple[list[dict[str, Any]], list[str]]:
    """(what there is of each, for the page's script; the blocks), of `room` bytes at most."""
    samples = [one for one in samples if one.files]
    shown: list[dict[str, Any]] = []
    blocks: list[str] = []
    for number, one in enumerate(samples):
        share = room // (len(samples) - number)
        steps = []
        for step, part in sorted(_fit_one(one, share, told), key=lambda x: x[0]):
            steps.append({"step": step, "block": len(blocks), "rows": part.rows, "of": part.of})
            blocks.append(part.packed)
            room -= _size(part.packed)
        if steps:
            shown.append({"run": one.label, "logged": len(one.files), "steps": steps})
    return shown, blocks


@dataclasses.dataclass(frozen=True)
class _Part:
    """A step, as far as it is shown."""

    packed: str
    rows: int
    of: int


def _fit_one(samples: Samples, room: int, told: Told) -> Iterator[tuple[int, _Part]]:
    """As many steps, evenly spaced, as fit; the first and the last if at all possible, if need be with some
    of their rows alone."""
    sizes = {step: max(size_of(path), 1) for step, path in samples.files.items()}
    steps = list(sizes)
    ends = list(dict.fromkeys((steps[-1], steps[0])))
    told(f"samples of {samples.label}", 0, 1)
    newest = samples.read(samples.files[steps[-1]])
    guess = _Guess(newest)
    cap, kept = None, ends
    for cap in CAPS:
        of_byte = guess.size(newest, cap) / sizes[steps[-1]]
        kept = _evenly({step: of_byte * size for step, size in sizes.items()}, room)
        if len(kept) >= min(ENOUGH_STEPS, len(steps)):
            break
    order = [*ends, *(step for step in kept if step not in ends)]
    for number, step in enumerate(order):
        told(f"samples of {samples.label}", number, len(order))
        found = newest or samples.read(samples.files[step])
        if step in ends:
            part = _fitted(found, cap, room // (len(ends) - number), guess)
        else:
            part = _Part(pack(cut(found, cap)), len(found), len(found))
        found = newest = []  # before the next is read
        # A step that has been guessed too small is left out.
        if part.rows and _size(part.packed) <= room:
            room -= _size(part.packed)
            yield step, part


def _size(packed: str) -> int:
    """Of a block in the page, with its tag and its place in the list of them."""
    return len(packed) + 150


def _evenly(packed: Mapping[int, float], room: int) -> list[int]:
    """As many steps as fit, evenly spaced; the first and the last always."""
    steps = list(packed)
    least = min(packed.values())
    for number in range(min(len(steps), max(int(room / least), 2)), 1, -1):
        kept = [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]
        if sum(packed[step] for step in kept) <= room:
            return kept
    return sorted({steps[0], steps[-1]})


class _Guess:
    """Sizes of blocks, by what a few rows come to: packing all in every way to choose one takes minutes."""

    def __init__(self, rows: Rows):
        few = cut(rows[:32], 256)
        plain = [{**row, "tokens": None} for row in few]
        self._of_char = len(pack(plain)) / max(len(as_json(plain)), 1)
        num = sum(min(_num_tokens(row), 256) for row in few)
        self._of_token = (len(pack(few)) - len(pack(plain))) / max(num, 1)

    def size(self, rows: Rows, most: int | None) -> float:
        """Of some rows with the numbers of their first `most` tokens, in bytes."""
        chars = sum(len(as_json({**row, "tokens": None})) for row in rows)
        tokens = [_num_tokens(row) for row in rows]
        num = sum(tokens) if most is None else sum(min(n, most) for n in tokens)
        return _size("") + chars * self._of_char + num * self._of_token


def _fitted(rows: Rows, cap: int | None, room: int, guess: _Guess) -> _Part:
    """All of it; or fewer numbers, then fewer rows, then less text; at last none."""
    trials = [(len(rows), cap), *((len(rows), x) for x in CAPS if x is not None and (cap is None or x < cap))]
    number = len(rows)
    while number > 1:
        number //= 2
        trials.append((number, CAPS[-1]))
    for number, most in trials:
        some = rows[:number]
        if guess.size(some, most) < 1.3 * room and _size(packed := pack(cut(some, most))) <= room:
            return _Part(packed, number, len(rows))
    (row,) = cut(rows[:1], 64)
    text = str(row.get("completion") or "")[: 64 * _CHARS_PER_TOKEN]
    packed = pack([{**row, "completion": f"{text} …"}])
    return _Part(packed, 1 if _size(packed) <= room else 0, len(rows))


def cut(rows: Rows, most: int | None) -> Rows:
    """The rows with the numbers of their first `most` tokens alone; `tokens.of` says how many there were."""
    return rows if most is None else [_cut(row, most) for row in rows]


def _cut(row: dict[str, Any], most: int) -> dict[str, Any]:
    tokens = row.get("tokens")
    if _num_tokens(row) <= most or tokens is None:
        return row
    short = {name: column[:most] for name, column in tokens.items() if isinstance(column, list)}
    names = {i: name for i, name in tokens["names"].items() if int(i) < most}
    return {**row, "tokens": {**short, "names": names, "of": len(tokens["texts"])}}


def _num_tokens(row: dict[str, Any]) -> int:
    """Of those that there are numbers of."""
    return len(row["tokens"]["texts"]) if row.get("tokens") else 0


def read_held_out(path: Path) -> Rows:
    """The answers of a held-out evaluation, in groups as rollouts are: the greedy one first."""
    rows = []
    for kept in read_jsonl(path):
        asked = {name: kept.get(name) for name in ("question", "answer", "source")}
        answers = [("greedy", kept["greedy"])] if "greedy" in kept else []
        answers += [("sampled", found) for found in kept.get("sampled", ())]
        for sample, (how, found) in enumerate(answers):
            said = {name: found.get(name) for name in ("completion", "correct", "finish")}
            rows.append({**asked, **said, "sample": sample, "how": how, "length": found.get("tokens")})
    return rows


def pack(value: Any) -> str:
    """Compressed JSON in base64."""
    text = as_json(value, ensure_ascii=False, separators=(",", ":"))
    # Without a time stamp, so that the same data are the same page.
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()
