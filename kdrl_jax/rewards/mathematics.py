"""The `math` verifier: whether two answers in LaTeX mean the same.

Most answers are decided by their text, or as exact numbers. Else both are taken apart (`forms`) and their
expressions (`expressions`) compared by value (`values`). What is not read there goes to math-verify, within
limits (`symbolic`).
"""

import functools
import re
from fractions import Fraction

from kdrl_jax.rewards import forms, phrases, symbolic
from kdrl_jax.rewards.answers import MAX_TEXT_CHARS, find_marked, parse_number
from kdrl_jax.rewards.expressions import Node, UnreadableError, read
from kdrl_jax.rewards.forms import (
    Equation,
    Form,
    Group,
    InBase,
    Matrix,
    Named,
    Scalar,
    Union,
    Words,
)
from kdrl_jax.rewards.spelling import spelling
from kdrl_jax.rewards.tidy import has_letters, letters, number_of, same_text, tidy
from kdrl_jax.rewards.values import NoValueError, proportional, same

_STATED = re.compile(r"(?i:\banswer(?:\s+is|\s*:|\s*=)|\bis\s*:)\s*")
_INLINE = re.compile(r"\$([^$]+)\$")


def check_installed() -> None:
    """Raises ValueError: what `math` needs is not installed."""
    try:
        import math_verify  # noqa: F401
        import mpmath  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"reward function 'math' needs an extra that is not installed ({error}): "
            "pip install 'kdrl_jax[math]'"
        ) from error
    symbolic.warm_up()


def equivalent(question: str, completion: str, answer: str) -> float:
    """1 if the completion's final answer means what the gold answer does, else 0.

    The completion's is the one in its last `\\boxed{...}`, else after its last `####`, else what its last
    line ends on. The gold answer is what it marks in the same way, else the whole of it.

    Raises:
        ValueError: if the gold answer is empty.
    """
    marked_gold = find_marked(answer)
    gold = answer if marked_gold is None else marked_gold.answer
    if not gold.strip():
        raise ValueError(f"the gold answer {answer[-80:]!r} is empty; check data.*.answer_field")
    completion = completion[-MAX_TEXT_CHARS:]
    if _answers(gold, completion):
        return 1.0
    # `26 billion` and 26, where the question is of billions.
    bare = [phrases.without_scales(text, question) for text in (gold, completion)]
    return float(bare != [gold, completion] and _answers(*bare))


def _answers(gold: str, completion: str) -> bool:
    marked = find_marked(completion)
    if marked is not None:
        return answers_equal(gold, marked.answer)
    said = _last_statement(completion)
    return answers_equal(gold, said) or (
        parse_number(gold) is not None and answers_equal(gold, _last_number(said))
    )


def final_answer(completion: str) -> str | None:
    """The answer that `equivalent` compares, in one `spelling`; None if a completion states none.

    Which reading of a last line counts there depends on the gold answer: here, of words with a number in them
    the last number (`she has 18 eggs`), else all of it.
    """
    completion = completion[-MAX_TEXT_CHARS:]
    marked = find_marked(completion)
    said = _last_statement(completion) if marked is None else marked.answer
    if len(said) > 2 * forms.MAX_CHARS:
        return said.strip()
    if marked is None and number_of(said) is None and forms.has_words(said):
        said = _last_number(said) or said
    return spelling(forms.parse(tidy(said))) or None


def _last_statement(completion: str) -> str:
    """What the last line says that the answer is, else its last formula, else all of it."""
    lines = completion.strip().splitlines()
    line = lines[-1][-forms.MAX_CHARS :].replace("**", "").strip() if lines else ""
    *_, said = _STATED.split(line)
    formulas = _INLINE.findall(said)
    return formulas[-1] if formulas else said


_OPERATORS = frozenset({"+", "-", "*", "/", "^", r"\cdot", r"\times"})


def _last_number(text: str) -> str:
    """The last word with a digit, by the words next to it: of `she has 18 eggs.` the 18, of `it is x + 1`
    and of `it is less than 5` none."""
    words = text.split()
    for i in reversed(range(len(words))):
        if any(char in "0123456789" for char in words[i]):
            times = phrases.beside(" ".join(words[:i]), " " + " ".join(words[i + 1 : i + 4]))
            if times is None or (i and words[i - 1] in _OPERATORS):
                return ""
            number = words[i].rpartition("=")[2]
            return number if times == 1 else f"{times} * {number}"
    return ""


def answers_equal(gold: str, guess: str) -> bool:
    """Whether two answers mean the same. Where an answer leaves something out, the gold answer decides:
    `5` answers `x = 5`, but `y = 5` does not."""
    if not guess.strip():
        return False
    if max(len(gold), len(guess)) > 2 * forms.MAX_CHARS:
        return gold.strip() == guess.strip()
    gold, guess = tidy(gold), tidy(guess)
    if same_text(gold, guess):
        return True
    return _equal(_parsed(gold), forms.parse(guess))


@functools.lru_cache(maxsize=1024)
def _parsed(gold: str) -> Form:
    return forms.parse(gold)


def _equal(gold: Form, guess: Form) -> bool:
    if isinstance(gold, Named) and isinstance(guess, Named):
        if _are_different(gold.name, guess.name):
            return False
        return _equal(gold.value, guess.value)
    if isinstance(guess, Named) and not isinstance(gold, Equation):
        return _equal(gold, guess.value)
    if isinstance(gold, Named) and not isinstance(guess, Equation):
        return _equal(gold.value, guess)
    if isinstance(gold, Equation | Named) and isinstance(guess, Equation | Named):
        return _same_equation(gold, guess)
    if isinstance(gold, InBase) or isinstance(guess, InBase):
        return _same_digits(gold, guess)
    if isinstance(gold, Words) or isinstance(guess, Words):
        return _same_words(gold, guess) or _same_letters(gold, guess)
    if isinstance(guess, Equation) and isinstance(gold, Scalar) and forms.is_made_of_names(guess.left):
        return not has_letters(guess.right) and _equal(gold, forms.parse(guess.right))
    if isinstance(gold, Matrix) and isinstance(guess, Matrix):
        return len(gold.rows) == len(guess.rows) and all(
            _all_equal(a, b) for a, b in zip(gold.rows, guess.rows, strict=True)
        )
    if isinstance(gold, Union) and isinstance(guess, Union):
        return _matched(gold.items, guess.items)
    if isinstance(gold, Group) and isinstance(guess, Group):
        return _same_group(gold, guess)
    if isinstance(gold, Group) and gold.brackets in ("", "{}") and len(gold.items) == 1:
        return _equal(gold.items[0], guess)
    if isinstance(guess, Group) and guess.brackets in ("", "{}") and len(guess.items) == 1:
        return _equal(gold, guess.items[0])
    if isinstance(gold, Scalar) and isinstance(guess, Scalar):
        return _same_scalar(gold, guess)
    return False


def _is_bare(name: str) -> bool:
    """Whether a name is one letter: `x`, not `f(x)` or `area`."""
    return len(name.removeprefix("\\")) == 1 or (name.startswith("\\") and name[1:].isalpha())


def _are_different(name: str, other: str) -> bool:
    """Whether two names cannot be of the same: x and y, f(2) and f(3); but f(x) may be y."""
    if _is_bare(name) and _is_bare(other):
        return name != other
    return re.search("[0-9]", name) is not None is not re.search("[0-9]", other) and name != other


def _all_equal(gold: tuple[Form, ...], guess: tuple[Form, ...]) -> bool:
    return len(gold) == len(guess) and all(_equal(a, b) for a, b in zip(gold, guess, strict=True))


def _distinct(items: tuple[Form, ...]) -> list[Form]:
    kept: list[Form] = []
    for item in items:
        if not any(_equal(other, item) for other in kept):
            kept.append(item)
    return kept


MAX_UNORDERED = 16
"""Answers in any order are compared pair by pair, up to so many."""


def _matched(gold: tuple[Form, ...], guess: tuple[Form, ...]) -> bool:
    """Equal in some order, repetitions not counted."""
    if max(len(gold), len(guess)) > MAX_UNORDERED:
        return _all_equal(gold, guess)
    ours, theirs = _distinct(gold), _distinct(guess)
    if len(ours) != len(theirs):
        return False
    for item in ours:
        found = next((other for other in theirs if _equal(item, other)), None)
        if found is None:
            return False
        theirs.remove(found)
    return True


def _same_group(gold: Group, guess: Group) -> bool:
    """Order counts where the gold answer has round or square brackets; a list without brackets may stand for
    a set or for a point."""
    if _is_point(gold) and guess.brackets in ("", "()"):
        return _all_equal(gold.items, guess.items) or (_is_point(guess) and _matched(gold.items, guess.items))
    if gold.brackets in ("", "{}"):
        if guess.brackets in ("", "{}") or (gold.brackets == "" and guess.brackets == "()"):
            return _matched(gold.items, guess.items)
        return False
    if guess.brackets == gold.brackets or (guess.brackets == "" and gold.brackets == "()"):
        return _all_equal(gold.items, guess.items)
    return False


def _is_point(form: Group) -> bool:
    """Whether a list gives values of different names: x = 3, y = 4."""
    names = {item.name for item in form.items if isinstance(item, Named)}
    return form.brackets == "" and len(names) == len(form.items) > 1


def _same_words(gold: Form, guess: Form) -> bool:
    if isinstance(gold, Words) and isinstance(guess, Words):
        return letters(gold.text) == letters(guess.text) != ""
    return False


def _same_letters(gold: Form, guess: Form) -> bool:
    """Letters in a row as products (abc and bca), if at least one of the two cannot be a word."""
    texts = [form.text for form in (gold, guess) if isinstance(form, Words | Scalar)]
    if len(texts) < 2 or "no" in (text.lower() for text in texts):
        return False
    if len({frozenset(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))) for text in texts}) > 1:
        return False
    try:
        if not any(_is_readable(text) for text in texts):
            return False
        return same(*(read(text, spelled=True) for text in texts))
    except (UnreadableError, NoValueError):
        return False


def _is_readable(text: str) -> bool:
    try:
        read(text)
    except UnreadableError:
        return False
    return True


def _same_digits(gold: Form, guess: Form) -> bool:
    """In stated bases by value; where the guess states none, the same digits."""
    if isinstance(gold, InBase) and isinstance(guess, InBase):
        try:
            return int(gold.digits, gold.base) == int(guess.digits, guess.base)
        except ValueError:  # 29_8
            return gold == guess
    if isinstance(gold, InBase) and isinstance(guess, Scalar):
        return gold.digits == re.sub(r"[\s,]", "", guess.text).upper()
    if isinstance(guess, InBase) and isinstance(gold, Scalar) and guess.base == 10:
        return guess.digits == gold.text
    return False


def _same_equation(gold: Equation | Named, guess: Equation | Named) -> bool:
    sides = []
    for form in (gold, guess):
        if isinstance(form, Equation):
            sides.append((form.left, form.right))
        elif isinstance(form.value, Scalar):
            sides.append((form.name, form.value.text))
        else:
            return False
    try:
        ours, theirs = (
            Node("+", (read(left), Node("-", (read(right),)))) for left, right in sides
        )  # fmt: skip
        return proportional(ours, theirs)
    except (UnreadableError, NoValueError):
        return False


def _same_scalar(gold: Scalar, guess: Scalar) -> bool:
    if gold.unit != guess.unit:
        if (
            gold.may_be_letters
            or guess.may_be_letters
            or _is_letters(gold, guess)
            or _is_letters(guess, gold)
        ):
            return _same_text(gold, guess, gold.whole or gold.text, guess.whole or guess.text)
        if gold.unit and guess.unit and not any("unit" in dict(unit) for unit in (gold.unit, guess.unit)):
            return False
    return _same_text(gold, guess, gold.text, guess.text)


def _is_letters(one: Scalar, other: Scalar) -> bool:
    """Whether the unit of one may be letters, as the other has some and no unit: of 5 m and m \\cdot 5."""
    if not one.whole or other.unit is not None or number_of(other.text) is not None:
        return False
    return has_letters(other.text)


def _same_text(gold: Scalar, guess: Scalar, ours: str, theirs: str) -> bool:
    # 18\% is 18 and 0.18.
    hundred = Fraction(1)
    if gold.is_percent != guess.is_percent:
        hundred = Fraction(1, 100) if gold.is_percent else Fraction(100)
    elif same_text(ours, theirs):
        return True
    if (infinite := _infinite(ours)) or _infinite(theirs):
        return infinite == _infinite(theirs)
    numbers = number_of(ours), number_of(theirs)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[1] in (numbers[0], numbers[0] * hundred)
    if len(ours) == len(theirs) == 1:
        return False  # two letters
    try:
        gold_node, guess_node = _read(ours), _read(theirs)
    except UnreadableError:
        return symbolic.same(ours, theirs)
    try:
        return same(gold_node, guess_node) or (
            hundred != 1 and same(Node("*", (Node("number", number=hundred), gold_node)), guess_node)
        )
    except NoValueError:
        return False


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Node:
    number = number_of(text)
    return read(text) if number is None else Node("number", number=number)


def _infinite(text: str) -> str:
    """`-` or `+` for an infinity, empty for anything else."""
    match = re.fullmatch(r"([+-]?) ?\\infty", text.strip())
    return "" if match is None else match[1] or "+"
