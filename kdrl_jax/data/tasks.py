"""Procedural tasks: every row is made from its index alone, the same on every machine and version.

`chain_sum`  7+5-9  ->  7+5=12,12-9=3####3  (for a character tokenizer and a tiny transformer)
`word_sum`   one or more additions told in everyday words (for a model that reads English)
"""

import hashlib
import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kdrl_jax.config.data import MistakesConfig, TaskSourceConfig

HELDOUT_PERCENT = 10
_TRIES = 10_000


class TaskRow(NamedTuple):
    question: str
    completion: str
    answer: str


def is_heldout(question: str) -> bool:
    """Whether a question belongs to the held-out split: a property of its text, about 10 % of them."""
    return _hash(question) % 100 < HELDOUT_PERCENT


def is_in_split(question: str, split: str) -> bool:
    """Whether a question belongs to a split of `TaskSourceConfig.split`."""
    if not is_heldout(question):
        return split == "train"
    half = "validation" if _hash(question) // 100 % 2 else "test"
    return split in ("heldout", half)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def task_row(config: TaskSourceConfig, index: int) -> TaskRow:
    """Row `index` of a task.

    Raises:
        ValueError: the settings allow so few questions that the split has none.
    """
    make = _TASKS[config.task]
    # A string seed is hashed with SHA-512, the same everywhere.
    rng = random.Random(f"{config.task}/{config.split}/{index}")
    for _ in range(_TRIES):
        terms = _draw_terms(rng, config)
        if terms is None:
            continue
        row = make(rng, terms)
        if not is_in_split(row.question, config.split):
            continue
        if config.mistakes is not None:
            row = row._replace(completion=_mistaken(terms, config.mistakes, f"{config.split}/{index}"))
        return row
    raise ValueError(
        f"task {config.task} with min_terms={config.min_terms}, max_terms={config.max_terms}, minuses="
        f"{list(config.minuses)}, max_value={config.max_value} has no question in split {config.split!r} "
        f"({_TRIES:,} tries); raise max_terms or max_value"
    )


def _draw_terms(rng: random.Random, config: TaskSourceConfig) -> list[int] | None:
    """Terms, negative where they are taken away; None if a total on the way would be below 0."""
    num_terms = config.min_terms + _below(rng, config.max_terms - config.min_terms + 1)
    terms = [1 + _below(rng, config.max_value) for _ in range(num_terms)]
    fewest, most = config.minuses
    if most:
        places = list(range(1, num_terms))
        for _ in range(fewest + _below(rng, most - fewest + 1)):
            place = places.pop(_below(rng, len(places)))
            terms[place] = -terms[place]
    return terms if min(itertools.accumulate(terms)) >= 0 else None


def _below(rng: random.Random, bound: int) -> int:
    # Only random() is promised to give the same numbers in every version of Python.
    return int(rng.random() * bound)


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[_below(rng, len(items))]


def _steps(terms: Sequence[int], form: str, result: Callable[[int, int], int] = operator.add) -> list[str]:
    """`7+5=12`, `12-9=3`: one term per step, each from what the one before came to."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        after = result(total, term)
        steps.append(form.format(total, "-" if term < 0 else "+", abs(term), after))
        total = after
    return steps


_TIGHT, _SPACED = "{}{}{}={}", "{} {} {} = {}"


def chain_sum(rng: random.Random, terms: Sequence[int]) -> TaskRow:
    """`7+5-9` -> `7+5=12,12-9=3####3`. The question is the terms; `rng` is not used."""
    question = str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])
    return TaskRow(question, _worked(_steps(terms, _TIGHT)), str(sum(terms)))


def _worked(steps: Sequence[str]) -> str:
    return f"{','.join(steps)}####{steps[-1].split('=')[1]}"


def _mistaken(terms: Sequence[int], mistakes: MistakesConfig, row: str) -> str:
    """The completion of a `chain_sum` whose steps may be wrong; each goes on from the one before. Where that
    has become too small to take something away from it, 0 is left."""
    rng = random.Random(f"mistakes/{mistakes.seed}/{row}")

    def result(total: int, term: int) -> int:
        right = max(0, total + term)
        believed = _believed(total, term, mistakes)
        if believed is not None:
            return believed if rng.random() < mistakes.belief else right
        if rng.random() < mistakes.slips:
            return abs(right + (1 if rng.random() < 0.5 else -1))
        return right

    return _worked(_steps(terms, _TIGHT, result))


def _believed(total: int, term: int, mistakes: MistakesConfig) -> int | None:
    """What a step is believed to come to, one or two beside the truth; None where that is known."""
    rng = random.Random(f"belief/{mistakes.seed}/{total}{term:+d}")
    if rng.random() >= mistakes.facts:
        return None
    right, offset = max(0, total + term), (-2, -1, 1, 2)[_below(rng, 4)]
    return right + offset if right + offset >= 0 else right - offset


_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Omar", "Ines", "Leo", "Nora", "Raj", "Mei")
_THINGS = (
    "apple",
    "book",
    "pencil",
    "marble",
    "coin",
    "sticker",
    "shell",
    "card",
    "stamp",
    "button",
    "cookie",
    "key",
)
_COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange")
_GETS = ("buys", "finds", "is given", "wins")


def word_sum(rng: random.Random, terms: Sequence[int]) -> TaskRow:
    """`Tom has 3 apples. Tom buys 4 more. How many apples does Tom have now?` ->
    `3 + 4 = 7. Tom has 7 apples now. #### 7`, in one of four stories. Two terms are one step."""
    story = _STORIES[_below(rng, len(_STORIES))]
    total = sum(terms)
    question, conclusion = story(rng, terms, _pick(rng, _THINGS))
    return TaskRow(question, f"{'. '.join(_steps(terms, _SPACED))}. {conclusion} #### {total}", str(total))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _story_gets(rng: random.Random, terms: Sequence[int], thing: str) -> tuple[str, str]:
    name = _pick(rng, _NAMES)
    gains = " ".join(f"{name} {_pick(rng, _GETS)} {n} more." for n in terms[1:])
    question = f"{name} has {_count(terms[0], thing)}. {gains} How many {thing}s does {name} have now?"
    return question, f"{name} has {_count(sum(terms), thing)} now."


def _story_box(rng: random.Random, terms: Sequence[int], thing: str) -> tuple[str, str]:
    first = _below(rng, len(_COLORS))
    held = [_count(n, f"{_COLORS[(first + i) % len(_COLORS)]} {thing}") for i, n in enumerate(terms)]
    return (
        f"A box holds {_listed(held)}. How many {thing}s are in the box?",
        f"The box holds {_count(sum(terms), thing)}.",
    )


def _story_days(rng: random.Random, terms: Sequence[int], thing: str) -> tuple[str, str]:
    name = _pick(rng, _NAMES)
    got = [f"{_count(n, thing) if i == 0 else n} on day {i + 1}" for i, n in enumerate(terms)]
    return (
        f"{name} collects {_listed(got)}. How many {thing}s does {name} collect in all?",
        f"{name} collects {_count(sum(terms), thing)}.",
    )


def _story_friends(rng: random.Random, terms: Sequence[int], thing: str) -> tuple[str, str]:
    first = _below(rng, len(_NAMES))
    own = [
        f"{_NAMES[(first + i) % len(_NAMES)]} has {_count(n, thing) if i == 0 else n}"
        for i, n in enumerate(terms)
    ]
    return (
        f"{_listed(own)}. How many {thing}s do they have together?",
        f"Together they have {_count(sum(terms), thing)}.",
    )


_STORIES = (_story_gets, _story_box, _story_days, _story_friends)
_TASKS: dict[str, Callable[[random.Random, Sequence[int]], TaskRow]] = {
    "chain_sum": chain_sum,
    "word_sum": word_sum,
}
