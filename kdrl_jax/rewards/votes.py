"""What a completion votes for when the majority of several decides: the answer that its verifier judges."""

from collections.abc import Callable

from kdrl_jax.rewards import mathematics
from kdrl_jax.rewards.answers import (
    MAX_NUMBER_CHARS,
    MAX_TEXT_CHARS,
    final_number,
    find_marked,
    last_number,
    normalise,
)
from kdrl_jax.rewards.choices import chosen, compile_pattern, last_group

AnswerReader = Callable[[str], str | None]
"""A completion -> its final answer, in one spelling for those that are equal, as far as their text shows it;
None if it answers nothing, so that it has no vote."""


def answer_reader(verifier: str, pattern: str | None = None) -> AnswerReader | None:
    """What finds the answer that a verifier judges.

    Args:
        pattern: that of `regex`.

    Returns:
        None where no answer can be told from the rest of a completion: of users' own functions, of `format`,
        and of `regex` without a group.
    """
    if verifier == "regex" and pattern is not None:
        compiled = compile_pattern(pattern)
        return (lambda completion: _spelt(last_group(compiled, completion))) if compiled.groups else None
    return _READERS.get(verifier)


def _number(completion: str) -> str | None:
    number = final_number(completion)
    return None if number is None else str(number)


def _text(completion: str) -> str | None:
    """As `exact` compares: what is marked. Which of a text without a mark counts there depends on the gold
    answer: here all of a single word or formula, else the last number, else all of a short text."""
    marked = find_marked(completion)
    if marked is not None:
        return _spelt(marked.answer)
    whole = completion[-MAX_TEXT_CHARS:].strip()
    if len(whole) <= MAX_NUMBER_CHARS and " " not in normalise(whole):
        return _spelt(whole)
    number = last_number(completion)
    if number is None and len(whole) > MAX_NUMBER_CHARS:
        return None
    return _spelt(whole if number is None else number)


def _spelt(answer: str | None) -> str | None:
    return None if answer is None else normalise(answer) or None


_READERS: dict[str, AnswerReader] = {
    "numeric": _number,
    "math": mathematics.final_answer,
    "choice": chosen,
    "exact": _text,
}
