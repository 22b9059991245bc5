"""Values of expressions, so that two spellings can be compared by what they mean.

Values are exact where all is rational, else they have 120 digits, of which 60 are compared. Nothing is
expanded, simplified or executed, and powers and factorials are bounded, so that hostile text costs no more
than honest text.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from kdrl_jax.rewards.expressions import Node, variables

MAX_BITS = 20_000
"""Size of the numbers that powers and factorials may make."""
_DIGITS = 120
_TOLERANCE_DIGITS = 60

Value = Any
"""A Fraction where it is exact, else mpmath's mpc."""


class NoValueError(ArithmeticError):
    """The expression has no value (0/0), or one too large to be worked out."""


def same(one: Node, other: Node) -> bool:
    """Whether two expressions are equal wherever both have values.

    With variables they are compared at points: all variables positive, then each negative in turn, so that
    \\sqrt{x^2} is not x. Unless i is written, only real values count, where there are any: \\ln x^2 is
    2\\ln x, though for a negative x the second is complex.

    Raises:
        NoValueError: one has no value, or both have none in common.
    """
    import mpmath

    with mpmath.workdps(_DIGITS):
        some = False
        for a, b in _pairs(one, other):
            some = True
            if not _near(a, b):
                return False
    if not some:
        raise NoValueError("nowhere")
    return True


def proportional(one: Node, other: Node) -> bool:
    """Whether one expression is a constant, not 0, times the other: `one = 0` means what `other = 0` does.

    Raises:
        NoValueError: as `same`.
    """
    import mpmath

    with mpmath.workdps(_DIGITS):
        pairs = list(_pairs(one, other))
        if not pairs:
            raise NoValueError("nowhere")
        (first, second), *rest = pairs
        if _near(first, Fraction(0)) or _near(second, Fraction(0)):
            return all(_near(a, Fraction(0)) and _near(b, Fraction(0)) for a, b in pairs)
        return all(_near(_times(a, second), _times(b, first)) for a, b in rest)


def mark(node: Node) -> str:
    """The same for expressions that are `same`, as far as one expression alone can say so: the names of the
    variables, and the values, to 50 digits, at points at which such expressions are compared. Of the points
    those at which variables are positive, since `ln x^2` and `2 ln x` differ at others.

    Raises:
        NoValueError: it has none.
    """
    import mpmath

    names = sorted(set(variables(node)))
    whole = bool(names) and _holds(node, "!", "binom")
    points = list(_whole_points(names) if whole else _positive_points(names))
    with mpmath.workdps(_DIGITS):
        values = [_value_at(node, point) for point in points]
        if all(value is None for value in values):
            raise NoValueError("it has a value at none of the points")
        return " ".join([*names, *("none" if value is None else _written(value) for value in values)])


def _value_at(node: Node, point: dict[str, Fraction]) -> Value | None:
    """None where it has none, or, of a node without i, one that is not real."""
    try:
        value = evaluate(node, point)
    except NoValueError:
        return None
    return value if _holds(node, "i") or _is_real(value) else None


def _written(value: Value) -> str:
    import mpmath

    if isinstance(value, Fraction) and max(abs(value.numerator), value.denominator) > 10**40:
        return str(value)
    return str(mpmath.nstr(mpmath.chop(_inexact(value), mpmath.mpf(10) ** -50), 50))


def _pairs(one: Node, other: Node) -> Iterator[tuple[Value, Value]]:
    """Values of both at the points where both have one, and where both are real if that is so anywhere."""
    names = sorted({name for node in (one, other) for name in variables(node)})
    whole = any(_holds(node, "!", "binom") for node in (one, other))
    has_i = any(_holds(node, "i") for node in (one, other))
    complex_pairs, some_real = [], False
    for point in _whole_points(names) if whole and names else _points(names):
        try:
            pair = evaluate(one, point), evaluate(other, point)
        except NoValueError:
            continue  # ln(1 - x) beyond 1
        if has_i or (_is_real(pair[0]) and _is_real(pair[1])):
            some_real = True
            yield pair
        else:
            complex_pairs.append(pair)
    if not some_real:
        yield from complex_pairs


def _holds(node: Node, *kinds: str) -> bool:
    return node.kind in kinds or node.name in kinds or any(_holds(part, *kinds) for part in node.parts)


def _is_real(value: Value) -> bool:
    import mpmath

    if isinstance(value, Fraction):
        return True
    return bool(abs(value.imag) <= max(mpmath.mpf(1), abs(value)) * mpmath.mpf(10) ** -_TOLERANCE_DIGITS)


def _points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    yield from _positive_points(names)
    above, below = _above(names), _below(names)
    for name in names:
        yield above | {name: -above[name] * Fraction(1319, 1201)}
        yield below | {name: -below[name] * Fraction(1103, 1201)}


def _positive_points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    above, below = _above(names), _below(names)
    yield above
    if names:
        yield below
        yield dict(zip(names, reversed(below.values()), strict=True)) | {names[0]: above[names[0]]}
        yield {name: value * value + Fraction(211, 499) for name, value in above.items()}


def _above(names: list[str]) -> dict[str, Fraction]:
    """Fractions above 1 with large prime denominators: nothing cancels by accident."""
    return {name: Fraction(1009 + 613 * k, 997 + 104 * k) for k, name in enumerate(names)}


def _below(names: list[str]) -> dict[str, Fraction]:
    return {name: Fraction(211 + 97 * k, 499 + 397 * k) for k, name in enumerate(names)}


def _whole_points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """For what is counted (n!): different whole numbers, each variable the largest in turn, as k must not be
    above n in n over k."""
    for first in range(len(names)):
        for start, step in ((3, 1), (4, 3), (6, 2)):
            order = names[first:] + names[:first]
            yield {name: Fraction(start + step * k) for k, name in enumerate(order)}
            yield {name: Fraction(start + step * k) for k, name in enumerate(reversed(order))}


def _near(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    import mpmath

    a, b = _inexact(a), _inexact(b)
    size = max(mpmath.mpf(1), abs(a), abs(b))
    return bool(abs(a - b) <= size * mpmath.mpf(10) ** -_TOLERANCE_DIGITS)


def _inexact(value: Value) -> Any:
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpc(mpmath.mpf(value.numerator) / value.denominator)
    return value


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a * b
    return _inexact(a) * _inexact(b)


def evaluate(node: Node, at: Mapping[str, Fraction]) -> Value:
    """The value with these values of the variables, in mpmath's working precision.

    Raises:
        NoValueError: there is none, or a number on the way is too large.
    """
    import mpmath

    if node.kind == "number":
        return node.number
    if node.kind == "variable":
        return at[node.name]
    if node.kind in ("pi", "e"):
        return mpmath.mpc(mpmath.pi if node.kind == "pi" else mpmath.e)
    if node.kind == "i":
        return mpmath.mpc(0, 1)
    parts = [evaluate(part, at) for part in node.parts]
    value = _operate(node, parts)
    if not isinstance(value, Fraction) and not mpmath.isfinite(value):
        raise NoValueError(node.kind)
    return value


def _operate(node: Node, parts: list[Value]) -> Value:
    if node.kind == "^":
        return _raise(*parts)
    if node.kind == "!":
        return _factorial(parts[0])
    if node.kind == "function":
        return _apply(node.name, parts)
    if not all(isinstance(part, Fraction) for part in parts):
        parts = [_inexact(part) for part in parts]
    if node.kind == "-":
        return -parts[0]
    a, b = parts
    if node.kind == "+":
        return a + b
    if node.kind == "*":
        return _bounded(a * b)
    if b == 0:
        raise NoValueError("divided by 0")
    return _bounded(a / b)


def _bounded(value: Value) -> Value:
    if (
        isinstance(value, Fraction)
        and value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS
    ):
        raise NoValueError("too large")
    return value


def _log2_size(value: Value) -> float:
    """About |log2 |value||, for bounds."""
    if isinstance(value, Fraction):
        return float(max(value.numerator.bit_length(), value.denominator.bit_length()))
    return abs(float(value.real._mpf_[2] + value.real._mpf_[3])) + abs(
        float(value.imag._mpf_[2] + value.imag._mpf_[3])
    )


def _raise(base: Value, power: Value) -> Value:
    import mpmath

    if _log2_size(power) > 64:
        raise NoValueError("too large")
    if base == 0:
        if isinstance(power, Fraction) and power >= 0:
            return Fraction(int(power == 0))
        raise NoValueError("a power of 0")
    if (1 + _log2_size(base)) * abs(complex(_inexact(power))) > MAX_BITS:
        raise NoValueError("too large")
    if isinstance(base, Fraction) and isinstance(power, Fraction):
        if power.denominator == 1:
            return base**power.numerator
        if base < 0 and power.denominator % 2:  # the real root: \sqrt[3]{-8} is -2
            value = _raise(-base, power)
            return -value if power.numerator % 2 else value
        root = Fraction(_exact_root(base.numerator, power), _exact_root(base.denominator, power))
        if root and root**power.denominator == base:
            return root**power.numerator
    return mpmath.power(_inexact(base), _inexact(power))


def _exact_root(number: int, power: Fraction) -> int:
    """The whole root nearest to that of a number, 1 where it is not worth looking."""
    import mpmath

    if number <= 0 or power.denominator > 64:
        return 1
    return max(1, int(mpmath.nint(mpmath.root(number, power.denominator))))


def _is_count(value: Value) -> bool:
    """Whether it is a whole number from 0 to 1000."""
    return isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 1000


def _factorial(value: Value) -> Value:
    if not _is_count(value):
        raise NoValueError("a factorial")
    return Fraction(math.factorial(value.numerator))


def _apply(name: str, parts: list[Value]) -> Value:
    import mpmath

    if name == "binom":
        n, k = parts
        if not (_is_count(n) and _is_count(k)):
            raise NoValueError("a binomial")
        return Fraction(math.comb(n.numerator, k.numerator))
    if name in ("floor", "ceil"):
        real = parts[0] if isinstance(parts[0], Fraction) else _inexact(parts[0]).real
        if _log2_size(parts[0]) > MAX_BITS:
            raise NoValueError("too large")
        if isinstance(real, Fraction):
            return Fraction(math.floor(real) if name == "floor" else math.ceil(real))
        return Fraction(int(mpmath.floor(real) if name == "floor" else mpmath.ceil(real)))
    if name == "abs":
        return abs(parts[0]) if isinstance(parts[0], Fraction) else mpmath.mpc(abs(parts[0]))
    if any(_log2_size(part) > 64 for part in parts):
        raise NoValueError("too large")
    values = [_inexact(part) for part in parts]
    if name == "log":
        if 0 in values or values[1] == 1:
            raise NoValueError("a logarithm")
        return mpmath.log(values[0]) / mpmath.log(values[1])
    if name == "ln" and values[0] == 0:
        raise NoValueError("a logarithm")
    if name in ("exp", "sinh", "cosh", "tanh") and abs(values[0]) > MAX_BITS:
        raise NoValueError("too large")
    functions: dict[str, Callable[[Any], Any]] = {
        "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec,
        "csc": mpmath.csc, "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh, "ln": mpmath.log,
        "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "exp": mpmath.exp,
    }  # fmt: skip
    try:
        return mpmath.mpc(functions[name](values[0]))
    except (ZeroDivisionError, ValueError) as error:
        raise NoValueError(name) from error
