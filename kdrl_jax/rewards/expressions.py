"""Expressions in LaTeX, read into trees. Lengths and depths are bounded, and time is linear in the text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from kdrl_jax.rewards.phrases import is_word

MAX_CHARS = 400
"""A longer text is not read."""
MAX_DEPTH = 40
"""Groups in groups."""
MAX_DIGITS = 64
"""Of one number."""


class UnreadableError(ValueError):
    """The text is no expression that is understood here."""


@dataclass(frozen=True)
class Node:
    """An operation and what it is applied to."""

    kind: str
    parts: tuple["Node", ...] = ()
    name: str = ""
    """Of a variable or a function."""
    number: Fraction = Fraction(0)


_TOKEN = re.compile(
    r"\s+|(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<other>\S)", re.ASCII
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar) ?\{ ?([0-9]+) ?\}")
_PLAIN_NAMES = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)"
    r"(?![A-Za-z])"
)
MAX_RUN = 6
"""Letters in a row that may be a product."""
_RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "log",
     "lg", "ln", "exp"}
)  # fmt: skip
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_LETTERS = frozenset(
    {"alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "iota", "kappa",
     "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega",
     "ell", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega"}
)  # fmt: skip
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_TIMES = ("*", r"\cdot", r"\times", "·", "×")
_OVER = ("/", r"\div", "÷")


def read(text: str, spelled: bool = False) -> Node:
    """The expression that a text (see `answers.clean`) states.

    Args:
        spelled: whether letters in a row that could be a word (bca, east) are read as a product even where
            they are all there is; beside digits, signs and commands they always are.

    Raises:
        UnreadableError: it is too long, or holds something else.
    """
    if len(text) > MAX_CHARS:
        raise UnreadableError("too long")
    text = _PLAIN_NAMES.sub(r"\\\1", text)
    runs = _RUN.findall(text)
    words_alone = not spelled and re.fullmatch("[A-Za-z ]*", text) is not None
    for run in runs:
        if len(run) > MAX_RUN or (words_alone and is_word(run)):
            raise UnreadableError(f"a word: {run}")
    return _Reader(text).whole()


class _Reader:
    """Reads by recursive descent: one token of looking ahead, so in time linear in the text."""

    def __init__(self, text: str) -> None:
        text = _REPEATING.sub(_repeating, text)
        self._tokens = [m.group() for m in _TOKEN.finditer(text) if not m.group().isspace()]
        self._at, self._depth = 0, 0

    def whole(self) -> Node:
        node = self._sum()
        if self._now:
            raise UnreadableError(f"unexpected {self._now}")
        return node

    @property
    def _now(self) -> str:
        """The next token; empty at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._now
        if not token or (wanted and token not in wanted):
            raise UnreadableError(f"{token or 'the end'} where {' or '.join(wanted) or 'more'} should be")
        self._at += 1
        return token

    def _sum(self, end: str = "") -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        node = self._product(end)
        while self._now in ("+", "-"):
            sign = self._take()
            part = self._product(end)
            node = Node("+", (node, part if sign == "+" else Node("-", (part,))))
        self._depth -= 1
        return node

    def _product(self, end: str) -> Node:
        node = self._signed(end)
        while self._now:
            if self._now in _TIMES:
                self._take()
                node = Node("*", (node, self._signed(end)))
            elif self._now in _OVER:
                self._take()
                node = Node("/", (node, self._signed(end)))
            elif self._begins_factor(end):
                # 2 3 is no product (but 2!3! is), and 2 3/4 is for `parse_number` to read.
                if self._now[0] in ".0123456789" and self._tokens[self._at - 1] != "!":
                    raise UnreadableError("a number after a factor")
                node = Node("*", (node, self._power(end)))
            else:
                break
        return node

    def _signed(self, end: str) -> Node:
        signs = 0
        while self._now in ("+", "-"):
            signs += self._take() == "-"
        node = self._power(end)
        return Node("-", (node,)) if signs % 2 else node

    def _begins_factor(self, end: str) -> bool:
        now = self._now
        if not now or now == end:
            return False
        if now == "|":
            return end != "|"
        name = now[1:]
        if now in _CLOSING or now[0] in ".0123456789" or (now.isascii() and now.isalpha()):
            return True
        begins = name in _FUNCTIONS or name in _LETTERS or name in ("frac", "sqrt", "pi", "binom")
        return now.startswith("\\") and begins

    def _power(self, end: str) -> Node:
        mixed = self._mixed()
        node = mixed if mixed is not None else self._atom(end)
        start = self._at
        while self._now in ("^", "!", "°"):
            op = self._take()
            if self._at - start > MAX_DEPTH:  # 1!!!!...
                raise UnreadableError("too deep")
            if op == "^":
                node = Node("^", (node, self._argument()))
                if self._now == "^":
                    raise UnreadableError("a power of a power without braces")
            elif op == "!":
                node = Node("!", (node,))
            else:
                node = Node("/", (Node("*", (node, Node("pi"))), _whole(180)))
        return node

    def _mixed(self) -> Node | None:
        """1\\frac{3}{4} is a sum."""
        rest = self._tokens[self._at : self._at + 8]
        shape = [t for t in rest if not t.isdigit()]
        if len(rest) == 8 and shape == ["\\frac", "{", "}", "{", "}"] and rest[0].isdigit():
            values = [int(t) for t in rest if t.isdigit()]
            if rest[1] == "\\frac" and values[2]:
                self._at += 8
                return Node("number", number=values[0] + Fraction(values[1], values[2]))
        return None

    def _argument(self) -> Node:
        """What a command, `^` or `_` is about: a group, or one token."""
        if self._now == "{":
            return self._group()
        if self._now == "-":  # 10^-5, as it is typed
            self._take()
            return Node("-", (self._argument(),))
        return self._atom("")

    def _digit_or_group(self) -> Node:
        """An argument of a command: of \\frac12 the 1 alone."""
        token = self._now
        if token.isdigit() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return _whole(int(token[0]))
        return self._argument()

    def _group(self) -> Node:
        opening = self._take()
        closing = _CLOSING[opening]
        node = self._sum()
        self._take(closing)
        return node

    def _atom(self, end: str) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        node = self._one(end)
        self._depth -= 1
        return node

    def _one(self, end: str) -> Node:
        token = self._now
        if token in ("(", "[", "{", r"\{"):
            return self._group()
        if token in (r"\lfloor", r"\lceil"):
            return Node("function", (self._group(),), name=token[2:])
        if token == "|" and end != "|":
            self._take()
            node = self._sum("|")
            self._take("|")
            return Node("function", (node,), name="abs")
        self._take()
        if token[0] in ".0123456789":
            if len(token) > MAX_DIGITS:
                raise UnreadableError(f"a number of more than {MAX_DIGITS} digits")
            return Node("number", number=Fraction(token))
        if token == r"\frac":
            return Node("/", (self._digit_or_group(), self._digit_or_group()))
        if token == r"\binom":
            return Node("function", (self._digit_or_group(), self._digit_or_group()), name="binom")
        if token == r"\sqrt":
            return self._root()
        if token == r"\pi":
            return Node("pi")
        name = token.removeprefix("\\")
        if token.startswith("\\") and name in _FUNCTIONS:
            return self._function(name)
        if (token.startswith("\\") and name in _LETTERS) or (token.isascii() and token.isalpha()):
            return self._letter(token)
        raise UnreadableError(f"unexpected {token}")

    def _root(self) -> Node:
        degree = _whole(2)
        if self._now == "[":
            degree = self._group()
        # \sqrt13 is set as the root of 1, but means that of 13.
        inner = self._group() if self._now == "(" else self._argument()
        return Node("^", (inner, Node("/", (_whole(1), degree))))

    def _letter(self, token: str) -> Node:
        if token in ("e", "i") and self._now != "_":
            return Node(token)
        if self._now != "_":
            return Node("variable", name=token)
        self._take()
        start = self._at
        self._argument()
        below = "".join(t for t in self._tokens[start : self._at] if t not in "{}")
        return Node("variable", name=f"{token}_{below}")

    def _function(self, name: str) -> Node:
        """With its power and base: \\sin^2 x, \\log_2 8, \\sin^{-1} x."""
        power = base = None
        while self._now in ("^", "_"):
            if self._take() == "^":
                power = self._argument()
            else:
                base = self._digit_or_group()
        argument = self._group() if self._now in ("(", "{", "[") else self._bare_argument()
        if name in ("log", "lg"):
            parts = (argument, base if base is not None else _whole(10))
            node = Node("function", parts, name="log")
        elif base is not None:
            raise UnreadableError(f"a base of {name}")
        elif power is not None and power == Node("-", (_whole(1),)) and name in _INVERSE:
            return Node("function", (argument,), name=_INVERSE[name])
        else:
            node = Node("function", (argument,), name=name)
        return node if power is None else Node("^", (node, power))

    def _bare_argument(self) -> Node:
        """Of \\sin 2x \\cos y, the 2x."""
        node = self._signed("")
        while self._begins_factor("") and self._now[1:] not in _FUNCTIONS and self._now not in ("(", "["):
            node = Node("*", (node, self._power("")))
        return node


def _whole(number: int) -> Node:
    return Node("number", number=Fraction(number))


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, repeated = match.groups()
    if len(match.group()) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits")
    nines = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    first = int(whole or "0") * 10 ** len(fixed) + int(fixed or "0")
    value = first * (10 ** len(repeated) - 1) + int(repeated)
    return rf"{{\frac{{{value}}}{{{nines}}}}}"


def variables(node: Node) -> Iterator[str]:
    """The names in an expression, each as often as it occurs."""
    if node.kind == "variable":
        yield node.name
    for part in node.parts:
        yield from variables(part)
