"""What kind of answer a text states (a number, a point, an interval, a set, a matrix, an equation, a word),
and its parts."""

import re
from dataclasses import dataclass

from kdrl_jax.rewards import phrases, units
from kdrl_jax.rewards.tidy import ROW, has_letters

MAX_CHARS = 1000
"""A longer answer is compared as text alone."""
MAX_PARTS = 64
MAX_DEPTH = 4
"""Tuples in tuples."""


@dataclass(frozen=True)
class Scalar:
    """One expression, without the unit behind it."""

    text: str
    unit: units.Unit | None = None
    """Where the text states one that is known."""
    is_percent: bool = False
    whole: str = ""
    """With a unit of one or two letters, which may be letters of the expression instead; else empty."""
    may_be_letters: bool = False
    """Whether what is taken for the unit is more likely a product (5m, but not 5 m)."""


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several answers."""

    brackets: str
    """As written: `()`, `[)`, `{}`; empty for a list without any."""
    items: tuple["Form", ...]


@dataclass(frozen=True)
class Union:
    """Intervals and sets joined by \\cup."""

    items: tuple["Form", ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple["Form", ...], ...]


@dataclass(frozen=True)
class Named:
    """`x = 5`, `f(x) = 2x`, `x \\in [0, 1]`, `x > 2`: what is said of a name."""

    name: str
    value: "Form"


@dataclass(frozen=True)
class Equation:
    """Two expressions that are equal, of which none is a name."""

    left: str
    right: str


@dataclass(frozen=True)
class InBase:
    """Digits in a stated base: 2516_8."""

    digits: str
    base: int


Form = Scalar | Words | Group | Union | Matrix | Named | Equation | InBase


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between matches of `separator` that stand in no brackets; brackets need not match in kind,
    as those of intervals do not."""
    parts, depth, begin, at = [], 0, 0, 0
    while at < len(text):
        if depth == 0 and (match := separator.match(text, at)) and match.end() > at:
            parts.append(text[begin:at])
            begin = at = match.end()
            continue
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth = max(0, depth - 1)
        at += 1
    return [part.strip() for part in [*parts, text[begin:]]]


_COMMA = re.compile(r"\s*(?:[,;]|(?<=[\s}),])(?:and|or)(?=[\s\\({]))\s*")
_LIST = re.compile(r"\s*(?:,(?![0-9]{3}(?![0-9]))|;|(?<=[\s}),])(?:and|or)(?=[\s\\({-]))\s*")
_CUP = re.compile(r"\s*(?:\\cup(?![A-Za-z])|(?<=\s)[Uu](?=\s))\s*")
_OR = re.compile(r"\s+(?:or)\s+|\s*\\(?:lor|vee)(?![A-Za-z])\s*")
_EQUALS = re.compile(r"(?<![<>!\\])=")
_RELATION = re.compile(r"\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))\s*")
_APPROXIMATELY = re.compile(r"\s*\\approx(?![A-Za-z])\s*|\s*\\simeq(?![A-Za-z])\s*")
_NOT = re.compile(r"\s*\\ne(?![A-Za-z])\s*")
_SUCH_THAT = re.compile(r"\s*(?:\\mid(?![A-Za-z])|:|\|)\s*")
_IN = re.compile(r"\s*\\in(?![A-Za-z])\s*")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)'?(?: ?\^ ?\{ ?-1 ?\})?(?: ?_ ?(?:\{[^{}]{1,12}\}|[A-Za-z0-9]))?"
    r"(?: ?\( ?(?:[A-Za-z]|\\[A-Za-z]+)(?: ?, ?[A-Za-z])* ?\))?"
    r"|\( ?[A-Za-z](?: ?, ?[A-Za-z])+ ?\)|[A-Z]{2,3}|\\angle ?[A-Z]{1,3}|[A-Za-z]{4,20}"
)
_CONSTANTS = frozenset({"e", "i", r"\pi", r"\infty"})
_ENVIRONMENT = re.compile(
    r"\\begin ?\{(?:[pbBvV]?matrix|smallmatrix|array)\}(?: ?\{[clr| ]*\})?(.*)"
    r"\\end ?\{(?:[pbBvV]?matrix|smallmatrix|array)\}"
)
_DETERMINANT = re.compile(r"\\begin ?\{[vV]matrix\}")
_IN_BASE = re.compile(r"([0-9A-Za-z]{1,64}) ?_ ?(?:\{ ?([0-9]{1,2}) ?\}|([0-9]))")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_RUN = re.compile(r"[A-Za-z]{3,}")
_PLAIN_FUNCTIONS = frozenset(
    {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "arcsin", "arccos", "arctan"}
)


def parse(text: str, depth: int = 0) -> Form:
    """The form of a tidy text."""
    text = text.strip()
    if len(text) > MAX_CHARS or depth > MAX_DEPTH:
        return Words(text)
    if (matrix := _matrix(text, depth)) is not None:
        return matrix
    if match := _IN_BASE.fullmatch(text):
        base = int(match[2] or match[3])
        if match[1][0].isdigit() and 2 <= base <= 36:
            return InBase(match[1].upper(), base)
    if len(about := split(text, _APPROXIMATELY)) > 1:
        # Of `\pi \approx 3.14` the exact side; of `x \approx 3.14` the only one.
        return parse(about[1] if _is_name(about[0]) else about[0], depth)
    for separator in (_CUP, _OR):
        parts = split(text, separator)
        if 1 < len(parts) <= MAX_PARTS and (separator is _CUP or all(_RELATION.search(p) for p in parts)):
            items = tuple(parse(part, depth + 1) for part in parts)
            # x < 1 or x > 2; y \in A \cup B
            names = {item.name for item in items if isinstance(item, Named)}
            union = Union(tuple(item.value if isinstance(item, Named) else item for item in items))
            return Named(names.pop(), union) if len(names) == 1 else union
    if (several := _listing(text, depth)) is not None:
        return several
    if (said := _statement(text, depth)) is not None:
        return said
    if (bracketed := _bracketed(text, depth)) is not None:
        return bracketed
    if _is_words(text):
        return Words(text)
    return _scalar(text)


def _matrix(text: str, depth: int) -> Form | None:
    match = _ENVIRONMENT.fullmatch(text)
    if match is None or _DETERMINANT.match(text) or r"\begin" in match[1]:
        return None
    rows = [row for row in match[1].split(ROW) if row.strip()]
    if not rows or len(rows) > MAX_PARTS:
        return None
    return Matrix(tuple(tuple(parse(cell, depth + 1) for cell in row.split("&")[:MAX_PARTS]) for row in rows))


def _listing(text: str, depth: int) -> Form | None:
    """Several answers without brackets, `\\pm` among them."""
    parts = split(text, _LIST)
    parts = [part for part in parts if part] if len(parts) > 1 else parts
    if len(parts) > MAX_PARTS:
        return Words(text)
    # `5 cm and up` is prose.
    if len(parts) > 1 and any(_is_words(p) for p in parts) and not all(_is_words(p) for p in parts):
        return None
    parts = [version for part in parts for version in _both_signs(part)]
    if len(parts) == 1:
        return None
    return Group("", tuple(parse(part, depth + 1) for part in parts))


def _both_signs(text: str) -> list[str]:
    if not _PLUS_MINUS.search(text) or split(text, _COMMA) != [text] or _spans(_one_brace(text)):
        return [text]
    if len(sides := split(text, _EQUALS)) == 2:  # x = 1 \pm 2: both are x
        return [f"{sides[0]} = {side}" for side in _both_signs(sides[1])]
    return _versions(text)


def _versions(text: str) -> list[str]:
    """With the upper signs and with the lower ones."""
    upper = re.sub(r"(^|[(\[,] ?)\+", r"\1", text.replace(r"\pm", "+").replace(r"\mp", "-").strip())
    return [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")]


def _statement(text: str, depth: int) -> Form | None:
    """What is said of a name, or an equation."""
    if len(sides := split(text, _IN)) == 2 and _is_name(sides[0]):
        return Named(_name(sides[0]), parse(sides[1], depth + 1))
    if len(sides := split(text, _NOT)) == 2 and _is_name(sides[0]):
        hole, low, high = parse(sides[1], depth + 1), Scalar(r"-\infty"), Scalar(r"\infty")
        return Named(_name(sides[0]), Union((Group("()", (low, hole)), Group("()", (hole, high)))))
    if (bounds := _bounds(text, depth)) is not None:
        return bounds
    sides = split(text, _EQUALS)
    if len(sides) < 2 or not all(sides):
        return None
    if _is_name(sides[0]):
        return Named(_name(sides[0]), parse(sides[-1], depth + 1))
    if not any(re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", _COMMAND.sub(" ", side)) for side in sides):
        return parse(sides[-1], depth + 1)  # 2 + 3 = 5
    if _is_asked_for(sides[0]):
        return Named(_name(sides[0]), parse(sides[-1], depth + 1))  # f(2) = 4 + 1 = 5
    if _is_asked_for(sides[-1]) and not any(has_letters(side) for side in sides[:-1]):
        return Named(_name(sides[-1]), parse(sides[0], depth + 1))
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        return (
            Named(_name(sides[1]), parse(sides[0], depth + 1))
            if not has_letters(sides[0])
            else Equation(*sides)
        )
    if len(sides) > 2 and any(has_letters(side) for side in sides[1:]):
        return None
    return Equation(sides[0], sides[-1])  # a + b = 3 + 4 = 7


_APPLIED = re.compile(
    r"(?:(?<![A-Za-z])(?:[fghpqsvdrFGHPETVASCLRNMD]|Var|Cov)|\\(?:Pr|varphi|phi|sigma|tau|mu|Phi|pi|gcd|max|min|det|log|ln"
    r"|sin|cos|tan|cot|sec|csc|operatorname ?\{ ?[A-Za-z]{1,12} ?\}))"
    r"(?:'{1,3}|_(?:[A-Za-z0-9]|\{[^{}]{1,12}\})){0,2} ?(?:\([^()]*\)|\[[^\[\]]*\])"
)
"""A function of something: f(2), P(X = 2), E[X]; with another letter it is a product, x(x + 1)."""
_DERIVATIVE = re.compile(r"\\frac ?\{ ?(?:d|\\partial) ?[A-Za-z]? ?\} ?\{ ?(?:d|\\partial) ?[A-Za-z] ?\}")
_OPERATION = re.compile(
    r"\\(?:lim|int|sum|prod|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|det|gcd|max|min)(?![A-Za-z])"
)


def _is_asked_for(left: str) -> bool:
    """Whether a side of an equation is a quantity of its own: functions of something and what is made of them
    alone, a derivative, a limit."""
    if _OPERATION.match(left):
        return not re.search(r"[-+]", re.sub(r"[({\[][^(){}\[\]]*[)}\]]", "", left))
    left = _DERIVATIVE.sub("□", left)
    for _ in range(MAX_DEPTH):
        left = _APPLIED.sub("□", left)
    return "□" in left and not re.search(r"[A-Za-z0-9]", left)


def is_made_of_names(left: str) -> bool:
    """Whether a side of an equation is made of several names and nothing else (a + b, xy, |AB|), so that its
    value may be what was asked for; 2x and x - 3 are equations still to be solved."""
    bare = re.sub(r"_ ?(?:[A-Za-z0-9]|\{[^{}]{1,12}\})|\^ ?(?:[0-9]|\{ ?[0-9] ?\})", "", left)
    names = re.findall(r"[A-Za-z](?:_(?:[A-Za-z0-9]|\{[^{}]{1,12}\}))?", _COMMAND.sub(" ", left))
    return len(set(names)) > 1 and not re.search(r"[0-9]", bare) and not left.startswith("-")


def _bounds(text: str, depth: int) -> Form | None:
    """`2 < x \\le 5` and `x > 2` as intervals."""
    pieces = _RELATION.split(text)
    sides, signs = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    if not signs or len(signs) > 2 or not all(sides):
        return None
    if len(signs) == 1:
        if _is_name(sides[1]) and not _is_name(sides[0]):
            sides.reverse()
            signs = [{"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[signs[0]]]
        if not _is_name(sides[0]):
            return None
        name, other = sides
        below = signs[0] in ("<", r"\le")
        closed = signs[0] in (r"\le", r"\ge")
        low, high = (r"-\infty", other) if below else (other, r"\infty")
        brackets = ("(" + ("]" if closed else ")")) if below else (("[" if closed else "(") + ")")
    else:
        low, name, high = sides
        if not _is_name(name) or (signs[0] in ("<", r"\le")) != (signs[1] in ("<", r"\le")):
            return None
        if signs[0] in (">", r"\ge"):
            low, high, signs = high, low, signs[::-1]
        brackets = ("(" if signs[0] in "<>" else "[") + (")" if signs[1] in "<>" else "]")
    return Named(_name(name), Group(brackets, (parse(low, depth + 1), parse(high, depth + 1))))


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in _CONSTANTS


def _name(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)


def _bracketed(text: str, depth: int) -> Form | None:
    """A tuple, an interval, a set; or what stands in brackets that change nothing."""
    text = _one_brace(text)
    if len(text) < 2 or text[0] not in "([⦃" or text[-1] not in ")]⦄" or not _spans(text):
        return None
    inner, brackets = text[1:-1].replace("⦃", r"\{").replace("⦄", r"\}").strip(), text[0] + text[-1]
    brackets = brackets.replace("⦃", "{").replace("⦄", "}")
    if brackets == "{}" and len(such := split(inner, _SUCH_THAT)) == 2 and _is_name(such[0]):
        return parse(such[1], depth + 1)  # {x : x > 2}
    parts = split(inner, _COMMA)
    if len(parts) > MAX_PARTS:
        return Words(text)
    if len(parts) == 1 and brackets != "{}":
        return parse(inner, depth + 1) if brackets in ("()", "[]") else None
    if brackets != "{}" and _PLUS_MINUS.search(inner):
        # (\pm 3, 4) is two points, and no point of three numbers.
        points = [f"{brackets[0]}{version}{brackets[1]}" for version in _versions(inner)]
        return Group("", tuple(parse(point, depth + 1) for point in points))
    parts = [version for part in parts for version in _both_signs(part)]
    return Group(brackets, tuple(parse(part, depth + 1) for part in parts if part))


def _one_brace(text: str) -> str:
    """Braces that are printed as one character each, apart from those that group."""
    return text.replace(r"\{", "⦃").replace(r"\}", "⦄")


def _spans(text: str) -> bool:
    """Whether all stands between the first bracket and the one that closes it: not so in (1)(2)."""
    if text[:1] not in ("(", "[", "{", "⦃"):
        return False
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{⦃") - (char in ")]}⦄")
        if depth == 0:
            return at == len(text) - 1
    return False


def _is_words(text: str) -> bool:
    rest = _COMMAND.sub(" ", text)
    if any(char in "0123456789^_+*/=<>|" for char in rest):
        return False
    return rest.strip().lower() == "no" or has_words(text)


def has_words(text: str) -> bool:
    """Whether something in it is neither a name, a function nor a command of LaTeX."""
    return any(run not in _PLAIN_FUNCTIONS for run in _RUN.findall(_COMMAND.sub(" ", text)))


_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES: units.Unit = (("°", 1),)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def _scalar(text: str) -> Scalar:
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    if text.endswith("%"):
        return Scalar(text.removesuffix("%").removesuffix("\\").strip(), is_percent=True)
    for word in ("percent", "percentage points"):
        if text.endswith(word):
            return Scalar(text.removesuffix(word).strip(), is_percent=True)
    found = units.split_unit(text)
    if found is None or (found.unit == _DEGREES and _ANGLE.search(found.value)):  # \sin 30° has no unit
        return Scalar(phrases.without_nouns(text))
    if found.is_short and has_letters(found.value):
        return Scalar(text)
    whole = text if found.is_short else ""
    return Scalar(found.value, found.unit, whole=whole, may_be_letters=found.may_be_letters)
