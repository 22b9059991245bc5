"""Final answers and exact numbers, read out of text that a model wrote.

The text is hostile by default: nothing is evaluated, every length is bounded before it is converted, and
every scan is linear in the text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from kdrl_jax.rewards import phrases, units

MAX_TEXT_CHARS = 200_000
"""Only so many characters at the end of a text are read; a final answer stands there."""
MAX_NUMBER_CHARS = 256
"""An answer longer than this is not a number."""
MAX_DIGITS = 64
"""A number written with more characters than this is not read."""
MAX_EXPONENT = 100
"""Largest |exponent| in `1e6` notation: 1e999999999 would fill the memory."""


@dataclass(frozen=True)
class Marked:
    """An answer that the text itself marks as final."""

    answer: str
    """What the marker holds, without surrounding whitespace; may be empty."""
    rest: str
    """What follows the marked answer, without surrounding whitespace."""


_BOX_TOKENS = re.compile(
    # Without braces TeX takes one token, but a whole number is meant, or a command with what it is about.
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(?P<bare>-?[0-9]+(?:[.,][0-9]+)*|\\[dtc]?frac(?:\s?(?:[0-9]|\{[^{}]{0,200}\})){2}"
    r"|\\(?!boxed|fbox|begin|end|left|right)[A-Za-z]+(?:\s?\{[^{}]{0,200}\}){0,2}"
    r"|[A-Za-z](?=\s*(?:[$.]|\\[)\]]|\Z))))|\\[{}]|[{}]"
)


def _last_box(text: str) -> Marked | None:
    """The balanced `\\boxed{...}` or `\\fbox{...}` that begins last, so of nested boxes the inner one; or
    what stands in `\\boxed 9` without braces."""
    first = min((at for at in (text.find("\\boxed"), text.find("\\fbox")) if at >= 0), default=-1)
    if first < 0:
        return None
    # One pass with a stack: trying every opening in turn would be quadratic in unclosed boxes.
    opened: list[int] = []
    begin, end, rest = -1, -1, -1
    for token in _BOX_TOKENS.finditer(text, first):
        kind = token.group()
        if token["bare"] is not None:
            begin, end, rest = token.start("bare"), token.end("bare"), token.end("bare")
        elif kind == "{":
            opened.append(-1)
        elif kind == "}":
            start = opened.pop() if opened else -1
            if start > begin:
                begin, end, rest = start, token.start(), token.end()
        elif kind.startswith(("\\boxed", "\\fbox")):
            opened.append(token.end())
    if begin < 0:
        return None
    return Marked(text[begin:end].strip(), text[rest:].strip())


def _after_hashes(text: str) -> Marked | None:
    """The first non-empty line after the last `####`; `####` that close a text open nothing."""
    stop = len(text.rstrip("# \t\r\n"))
    at = text.rfind("####", 0, stop)
    if at < 0:
        return None
    tail = text[at + 4 : stop].lstrip()
    answer, _, rest = tail.partition("\n")
    return Marked(answer.strip(), rest.strip())


def find_marked(text: str) -> Marked | None:
    """The answer in the last box (`\\boxed{...}`, `\\boxed 9`, `\\fbox{...}`), else in the line after the
    last `####`, else None."""
    text = text[-MAX_TEXT_CHARS:]
    return _last_box(text) or _after_hashes(text)


_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | {"\u2009": "\\,", "\u202f": "\\,", "\u2248": "="}
)
_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|mbox) ?\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = [
    # Runs of whitespace are one space by now, so ` ?` is enough and no pattern can backtrack over a run. What
    # is dropped leaves a space: 2**3 and 5\text{6} must not become 23 and 56.
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[()\[\]]|\*\*|`"), " "),
    (re.compile(r"\\! ?"), ""),
    (re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r" ?\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})"), "°"),
    *[(_TEXT, r" \1 ")] * 2,
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac ?([0-9]) ?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac ?([0-9]) ?(?=\{)"), r"\\frac{\1}"),
    (re.compile(r"\\frac ?(\{[^{}]*\}) ?([0-9])"), r"\\frac\1{\2}"),
]


def clean(text: str) -> str:
    """The text with one spelling for whitespace, minus signs, and LaTeX that only changes the looks."""
    text = " ".join(text.translate(_CHARACTERS).split())
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def normalise(text: str) -> str:
    """One spelling: see `clean`; also without `$`, a final full stop, and spaces that part no two words."""
    text = clean(text).replace("$", "").strip().removesuffix(".")
    return _LOOSE_SPACE.sub("", text)


_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.0-9])\.[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}+-])[+-])?(?:[$€£¥] ?(?P<inner_sign>[+-])?)?"
    r"(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/ ?[0-9]))?"
    rf"(?P<top>{_UNSIGNED})(?:[eE](?P<exponent>[+-]?[0-9]+)(?!\w))?(?: ?/ ?(?P<bottom>{_UNSIGNED}))?"
)
_FRACTION = re.compile(r"([0-9])?\\frac ?\{ ?([+-]?[0-9.,]{1,64}) ?\} ?\{ ?([0-9.,]{1,64}) ?\}")
_UNIT_POWER = re.compile(
    r"(?P<space> ?)(?<![A-Za-z\\])(?P<name>[A-Za-zµμΩ]+) ?\^ ?(?:[0-9](?![0-9])|\{ ?-?[0-9] ?\})"
)
_UNIT_TIMES = re.compile(r"(?<=[A-Za-z]) ?\\cdot ?(?=[A-Za-z])")


def _without_power(match: re.Match[str]) -> str:
    """The power of a unit (cm^2) is no number of its own; that of a letter (x^2) is."""
    name, follows_number = match["name"], not match["space"]
    before = match.string[: match.start("name")][-1:]
    if follows_number and before not in "/()" and not units.is_written_close(name):
        return match[0]
    return f"{match['space']}{name}" if units.is_unit(name) or phrases.is_word(name) else match[0]


def _plain(text: str) -> str:
    """`clean`, with LaTeX fractions written `a/b` and the powers of units (cm^2) left out."""
    text = clean(text).replace("\\approx", "=")
    text = _FRACTION.sub(lambda m: f"{m[1]} {m[2]}/{m[3]}" if m[1] else f"{m[2]}/{m[3]}", text)
    return _UNIT_TIMES.sub(" ", _UNIT_POWER.sub(_without_power, text))


def _value(number: re.Match[str]) -> Fraction | None:
    """The exact value of a match of `_NUMBER`, or None if it is too long, too large or divided by 0."""
    exponent = number["exponent"] or "0"
    if len(number.group()) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    value = Fraction(number["top"].replace(",", "")) * Fraction(10) ** int(exponent)
    if number["bottom"] is not None:
        divisor = Fraction(number["bottom"].replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    value += int(number["whole"] or 0)
    return -value if "-" in (number["sign"], number["inner_sign"]) else value


_SEVERAL = re.compile(r"[,;](?![0-9]{3})|\b(?:and|or)\b")
_VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_OPERATOR = re.compile(r"[-+*/^]")


def parse_number(text: str) -> Fraction | None:
    """The one number that an answer states, exactly.

    Read are `1,234`, `$18`, `18%` (18), `-3`, `3.50`, `1e3`, `1/2`, `1 1/2`, `\\frac{1}{2}`, with units or
    words around them (`5 dollars`, `5 million`) or an equation before them (`x = 5`).

    Returns:
        None if there is no number, more than one, or something else that changes the value (`3\\pi`, `x+3`,
        `2ab`, `half of 5`).
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    *sides, right = _plain(text).split("=")
    if any(_SEVERAL.search(side) for side in sides):
        return None  # x = 5, y = 7
    if any(_VARIABLE.search(side) and _OPERATOR.search(side) for side in sides):
        return None  # x - 2y = 0: the equation is the answer
    right = re.sub(r"^ ?([+-]) ", r"\1", right)
    numbers = list(_NUMBER.finditer(right))
    if len(numbers) != 1:
        return None
    return _scaled(numbers[0], phrases.factor)


def _scaled(number: re.Match[str], factor: Callable[[str, str], Fraction | None]) -> Fraction | None:
    """The value that a match of `_NUMBER` has by the text around it."""
    value = _value(number)
    times = factor(number.string[: number.start()], number.string[number.end() :])
    if value is None or times is None or (times < 0 and re.match("[$€£¥ ]*-", number.group())):
        return None
    return value * times


def _last_match(text: str) -> re.Match[str] | None:
    text = text[-MAX_TEXT_CHARS:]
    at = max(text.rfind(digit) for digit in "0123456789")
    if at < 0:
        return None
    # A window is enough: a number that does not fit into it has too many digits to be read anyway.
    numbers = list(_NUMBER.finditer(_plain(text[max(0, at - MAX_NUMBER_CHARS) : at + 64])))
    return numbers[-1] if numbers else None


def last_number(text: str) -> str | None:
    """The last number of a text as it is written there (0-9 are the only digits), or None."""
    number = _last_match(text)
    return None if number is None else number.group()


def final_number(text: str) -> Fraction | None:
    """The number a text ends on: that of the marked answer if there is one, else the last one there is, by
    the words next to it (`5 million`, `negative 5`; none for `not 5`)."""
    marked = find_marked(text)
    if marked is not None:
        return parse_number(marked.answer)
    number = _last_match(text)
    return None if number is None else _scaled(number, phrases.beside)
