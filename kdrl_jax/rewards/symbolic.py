"""Comparison by math-verify, for what `values` does not read: within limits, as its parser takes exponential
time on some short texts, and sympy any time and memory on some small expressions."""

import functools
import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MAX_CHARS = 120
MAX_DEPTH = 5
"""Brackets in brackets: each takes the parser twice the time."""
TIME_LIMIT_S = 1.0
"""For both texts together. math-verify has limits of its own, in whole seconds for each of its steps, which
are switched off."""

_COMMANDS = frozenset(
    {"frac", "sqrt", "pi", "cdot", "times", "div", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin",
     "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp", "infty", "pm", "mp", "cup", "cap",
     "setminus", "in", "le", "ge", "leq", "geq", "lt", "gt", "neq", "ne", "mid", "mathbb", "emptyset",
     "overline", "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
     "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
     "Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega"}
)  # fmt: skip
"""What else the parser knows (integrals, sums, determinants, eigenvalues, matrices of any size) is worked out
while it is read, however long that takes."""
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_REFUSED = re.compile(
    r"[0-9]{13}|!|\|.*\|.*\||[0-9][eE][0-9+-]|[^\x20-\x7e]|['\"]|[A-Za-z]{2}"
    r"|[\^_] ?(?:\w|\{[^{}]*\}|\\[A-Za-z]+) ?[\^_]|\^ ?[0-9]{4}|\^ ?\{[^{}]*[0-9]{4}|\^ ?\{[^{}]*\^"
)
"""Long numbers, factorials, bars in bars, quotes (which it drops: 5' is not 5), words, scripts on scripts and
large powers."""


# It warns that its own limits are off. Not within the time limit: an exception inside of logging would leave
# its lock held.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def warm_up() -> None:
    """Imports math-verify and fills its parser's tables, which takes seconds: before any answer waits, and
    without the limit that answers have."""
    _are_equal(r"\{x \mid x > 2\}", r"f(x) + 1")


def is_readable(text: str) -> bool:
    """Whether a text is short and simple enough for math-verify."""
    if len(text) > MAX_CHARS or _REFUSED.search(_COMMAND.sub(" ", text)):
        return False
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest <= MAX_DEPTH and all(name in _COMMANDS for name in _COMMAND.findall(text))


def same(gold: str, guess: str) -> bool:
    """Whether math-verify holds two texts, as LaTeX, for equal. False for what it cannot read.

    Raises:
        TimeoutError: it took longer than `TIME_LIMIT_S`.
    """
    if not (is_readable(gold) and is_readable(guess)):
        return False
    with _time_limit():
        return _are_equal(gold, guess)


def _are_equal(gold: str, guess: str) -> bool:
    from math_verify import verify

    ours, theirs = _parsed(gold), _parsed(guess)
    return bool(ours and theirs and verify(ours, theirs, float_rounding=15, timeout_seconds=None))


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units stay: among those that it would drop from the end are c, d, g, h, l, m, o, s and t.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)
    return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)


class _LateError(BaseException):
    """No Exception, since math-verify and sympy go on after those."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TimeoutError in the block once `TIME_LIMIT_S` have passed; in the main thread alone, as signals
    are delivered there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_: int, __: FrameType | None) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    except _LateError:
        raise TimeoutError(f"math-verify took more than {TIME_LIMIT_S} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
