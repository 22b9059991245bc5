"""One spelling for the answers that `mathematics` takes for equal, as far as one spelling can say so: what is
equal to both of two that differ (5 to `x = 5` and `y = 5`, 3 to `3 cm` and `3 km`) brings these together."""

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
from kdrl_jax.rewards.tidy import letters, number_of, tight
from kdrl_jax.rewards.values import NoValueError, mark


def spelling(form: Form) -> str:
    """Without units, percent signs and the names of what has a value; numbers and expressions are written as
    their values, and what may stand in any order in one order."""
    if isinstance(form, Scalar):
        return _of_scalar(form.whole if form.may_be_letters else form.text)
    if isinstance(form, Named):
        return spelling(form.value)
    if isinstance(form, Words):
        return letters(form.text)
    if isinstance(form, InBase):
        return f"{form.digits}_{form.base}"
    if isinstance(form, Equation):
        return tight(f"{form.left}={form.right}")
    if isinstance(form, Matrix):
        return "[" + ";".join(",".join(map(spelling, row)) for row in form.rows) + "]"
    if isinstance(form, Union):
        return " or ".join(sorted(map(spelling, form.items)))
    return _of_group(form)


def _of_group(form: Group) -> str:
    items = list(map(spelling, form.items))
    if form.brackets in ("", "{}") and len(items) == 1:
        return items[0]
    named = {item.name: spelling(item) for item in form.items if isinstance(item, Named)}
    if form.brackets == "" and len(named) == len(items):  # y = 4, x = 3: the point (3, 4)
        return f"({','.join(named[name] for name in sorted(named))})"
    if form.brackets in ("", "{}"):
        return "{" + ",".join(sorted(set(items))) + "}"
    return form.brackets[0] + ",".join(items) + form.brackets[1]


def _of_scalar(text: str) -> str:
    number = number_of(text)
    try:
        if number is not None:
            return mark(Node("number", number=number))
        return text if len(text) == 1 else mark(read(text))
    except (UnreadableError, NoValueError):
        return tight(text)
