"""One spelling for what LaTeX, Unicode and prose have several for."""

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from kdrl_jax.rewards.answers import clean, parse_number

_UNICODE = str.maketrans(
    {
        "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ",
        "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⟨": "(", "⟩": ")", "ℝ": r"\mathbb{R}", "∅": r"\emptyset ",
    }
)  # fmt: skip
_LOOKS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:boldsymbol|bm|mathsf|mathcal|emph|underline|fbox) ?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\mathbb ?(?:\{ ?R ?\}|R)|^all real(?: number)?s$"), r"(-\\infty,\\infty)"),
    (re.compile(r"\\overline ?\{ ?([A-Z]) ?([A-Z]) ?\}"), r"\1\2"),
    (re.compile(r"\\(?:dots|ldots|dotsc|dotsb)(?![A-Za-z])|\.\.\.|…"), r"\\cdots"),
    (re.compile(r"\\neq(?![A-Za-z])|\\not ?=|≠|!="), r"\\ne "),
    (re.compile(r"(?<=[0-9]) ?([AaPp])\.? ?[Mm](?![A-Za-z])"), lambda m: f" {m[1].lower()}m"),
    (re.compile(r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])|\\(?:limits|nolimits)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:qquad|quad|enspace|thinspace)(?![A-Za-z])|(?<!\\)~"), " "),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:lbrace|\{)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (
        re.compile(r"\\operatorname\*? ?\{ ?(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan) ?\}"),
        r"\\\1",
    ),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])"), r"\\infty "),
]
ROW = "⏎"
"""Stands for \\\\ between the rows of a matrix, which `clean` must not take for a space."""


def tidy(text: str) -> str:
    """`clean`, with one spelling for more of what LaTeX and Unicode have several for."""
    text = text.strip().translate(_UNICODE)
    if r"\begin" in text:
        text = re.sub(r"\\\\ ?(?:\[[^\]]{0,8}\])?", ROW, text)
    dollars = r"\$" in text or re.match(r"-?\$[0-9.,]+$", text)
    text = clean(text.replace(r"\$", "").replace("$", ""))
    if dollars and "dollar" not in text:
        text += " dollars"
    for pattern, replacement in _LOOKS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(".,;: ").strip("` ")


def same_text(one: str, other: str) -> bool:
    """Whether two tidy texts differ in spaces alone that part no words and no numbers."""
    return tight(one) == tight(other) != ""


def tight(text: str) -> str:
    """Without spaces that part no words and no numbers."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def letters(text: str) -> str:
    """Words without case, articles and punctuation."""
    words = re.findall(r"[^\W_]+", re.sub(r"\\[A-Za-z]+", " ", text).casefold())
    return " ".join(word for word in words if word not in ("the", "a", "an"))


def has_letters(text: str) -> bool:
    """Outside of the names of commands."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text)) is not None


@functools.lru_cache(maxsize=4096)
def number_of(text: str) -> Fraction | None:
    """`parse_number`, but for factorials and minutes of arc, which it takes for punctuation."""
    return None if "!" in text or "'" in text else parse_number(text)
