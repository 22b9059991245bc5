"""Reward functions: `fn(question, completion, answer) -> score`, built in or the user's own."""

import difflib
import importlib
import inspect
from collections.abc import Callable

from kdrl_jax.rewards import mathematics, phrases
from kdrl_jax.rewards.answers import (
    MAX_TEXT_CHARS,
    final_number,
    find_marked,
    last_number,
    normalise,
    parse_number,
)
from kdrl_jax.rewards.choices import choice, make_regex

RewardFunction = Callable[[str, str, str], float]

MAX_REST_CHARS = 32
"""What `format` lets follow the final answer: room for `$.` or `I hope it is correct.`"""


def numeric(question: str, completion: str, answer: str) -> float:
    """1 if the completion's final number equals the gold answer's, as exact fractions, else 0.

    The completion's is the one in its last `\\boxed{...}`, else after its last `####`, else the last number
    in the text. The gold answer's is found the same way, except that without a marker the whole of it must
    state one number: of `(3, \\frac{\\pi}{2})` the last number is not the answer.

    Raises:
        ValueError: if the gold answer states no single number (an error of the data, not of the completion).
    """
    marked = find_marked(answer)
    gold = parse_number(answer if marked is None else marked.answer)
    if gold is None:
        raise ValueError(
            f"the gold answer {answer[-80:]!r} does not state one number; "
            "use reward.verifier=math, exact or a function of your own for such data"
        )
    if final_number(completion) == gold:
        return 1.0
    # Of `26 billion`, where the question is of billions.
    bare = phrases.without_scales(completion[-MAX_TEXT_CHARS:], question)
    return float(final_number(bare) == gold)


def exact(question: str, completion: str, answer: str) -> float:
    """1 if the final answers are the same string up to whitespace and the looks of LaTeX, else 0.

    A marked answer (`\\boxed{...}`, else `####`) is compared if there is one. Without one the gold answer is
    taken whole, and the completion may equal it as a whole or in its last number.

    Raises:
        ValueError: if the gold answer is empty.
    """
    marked_gold = find_marked(answer)
    gold = normalise(answer if marked_gold is None else marked_gold.answer)
    if not gold:
        raise ValueError(f"the gold answer {answer[-80:]!r} is empty; check data.*.answer_field")
    marked = find_marked(completion)
    if marked is not None:
        return float(normalise(marked.answer) == gold)
    if normalise(completion[-MAX_TEXT_CHARS:]) == gold:
        return 1.0
    return float(normalise(last_number(completion) or "") == gold)


def has_format(question: str, completion: str, answer: str) -> float:
    """1 if the completion marks its final answer and ends there, else 0; right or wrong does not matter.

    Marked means the answer that `numeric` and `exact` would grade: the last balanced `\\boxed{...}`, or,
    where there is none, the first non-empty line after the last `####`. It must not be empty, and at most
    `MAX_REST_CHARS` characters may follow it (after the closing brace or after that line, whitespace at both
    ends not counted).
    """
    marked = find_marked(completion)
    return float(marked is not None and bool(marked.answer) and len(marked.rest) <= MAX_REST_CHARS)


BUILT_IN: dict[str, RewardFunction] = {
    "numeric": numeric,
    "math": mathematics.equivalent,
    "choice": choice,
    "exact": exact,
    "format": has_format,
}
NAMES = (*BUILT_IN, "regex")
"""`regex` is made of a pattern."""


def resolve(name: str, pattern: str | None = None) -> RewardFunction:
    """The reward function of that name: a built-in one, or the user's `package.module:function`.

    Args:
        pattern: what `regex` looks for.

    Raises:
        ValueError: if there is none, if its module does not import or what it needs is not installed, or if
            it cannot be called with (question, completion, answer).
    """
    if name == "regex":
        if pattern is None:
            raise ValueError("reward function 'regex' needs reward.pattern, a regular expression")
        return make_regex(pattern)
    if name == "math":
        mathematics.check_installed()
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5) or sorted(NAMES)
        raise ValueError(
            f"no reward function is called {name!r}; nearest: {', '.join(near)}; "
            "or name your own as package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        # A module of the user's may fail in any way while it is imported.
        raise ValueError(
            f"reward function {name!r} does not import: {type(error).__name__}: {error}; "
            "its module must be importable from the working directory or PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"reward function {name!r} is a {type(function).__name__}, not a function")
    _check_arguments(name, function)
    return function


def _check_arguments(name: str, function: Callable[..., object]) -> None:
    """Refuses a function that cannot take (question, completion, answer), before any answer depends on it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature to look at
    try:
        signature.bind("question", "completion", "answer")
    except TypeError as error:
        raise ValueError(
            f"reward function {name!r} has the signature {signature}; it is called with "
            f"(question, completion, answer): {error}"
        ) from error
