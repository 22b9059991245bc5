"""Mistakes in a configuration, in one line for a person: the key, the value and what may stand there."""

import datetime
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, Tag, ValidationError

# Pydantic's kinds of error, in the words of this repository; `{...}` is filled from the error's context.
_WORDS = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "model_type": "expected a section of settings (a mapping)",
    "model_attributes_type": "expected a section of settings (a mapping)",
    "dict_type": "expected a mapping",
    "tuple_type": "expected a list",
    "invalid_key": "names of settings are text",
    "too_short": "expected a list of at least {min_length}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "recursion_loop": "a setting cannot contain itself",
}


class ConfigError(ValueError):
    """A mistake in the configuration: one line that names the key, the value and what to write."""

    def __init__(self, message: str) -> None:
        # Paths and values are the user's, and may hold line breaks.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """The mistake to mend first, in one line, and how many other settings have one.

    Args:
        error: what validation raised.
        config: the model that was validated, to look up valid names.
    """
    # A misspelt key shows twice, as unknown and as missing: the unknown one says what to mend.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    places = {tuple(_locate(p["loc"], config)[0]) for p in problems}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return _describe(problems[0], config) + more


def _describe(problem: Any, config: type[BaseModel]) -> str:
    keys, annotation = _locate(problem["loc"], config)
    name = ".".join(keys)
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(problem["loc"], value, config)
    if kind == "missing":
        return f"'{name}' is required and missing"
    if kind == "union_tag_invalid":
        return f"{name}.kind={show(context['tag'])}: {_choices(context['tag'], list(_branches(annotation)))}"
    if kind == "union_tag_not_found":
        return f"{name}={show(value)}: 'kind' is missing; {_choices(None, list(_branches(annotation)))}"
    if kind == "literal_error":
        return f"{name}={show(value)}: {_choices(value, typing.get_args(annotation))}"
    if kind == "value_error":
        message = str(context["error"])
        if not isinstance(value, (dict, BaseModel)):
            return f"{name}={show(value)}: {message}"
        if not name or message.startswith(f"{name}."):
            return message
        # A section's own checks say `key=value ...`, so that the whole key can be written here.
        return f"{name}.{message}" if re.match(r"\w+=", message) else f"{name}: {message}"
    words = _WORDS[kind].format(**context) if kind in _WORDS else str(problem["msg"])
    return f"{name}={show(value)}: {words}"


def show(value: Any) -> str:
    """A value as in YAML where that differs from Python, and never long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, datetime.date):
        return str(value)
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return f"<{type(value).__name__}>"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def _unknown_key(loc: Sequence[Any], value: Any, config: type[BaseModel]) -> str:
    keys, _ = _locate(loc, config)
    section = _unwrap(_locate(loc[:-1], config)[1])
    valid = list(section.model_fields) if _is_model(section) else []
    prefix = ".".join(keys[:-1])

    def whole(names: Sequence[str]) -> list[str]:
        return [f"{prefix}.{n}" if prefix else n for n in names]

    near = whole(difflib.get_close_matches(keys[-1], valid, n=3, cutoff=0.6))
    near += [path for path in setting_names(config) if path.rpartition(".")[2] == keys[-1]]
    hint = f"did you mean {', '.join(near[:4])}" if near else f"valid here: {', '.join(whole(valid))}"
    return f"unknown key '{'.'.join(keys)}' (value {show(value)}); {hint}"


def _choices(value: Any, valid: Sequence[Any]) -> str:
    names = [str(v) for v in valid]
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    return (f"did you mean {near[0]}? " if near else "") + f"valid here: {', '.join(names)}"


def setting_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full keys of all settings outside lists and unions."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _unwrap(field.annotation)
        if _is_model(inner):
            yield from setting_names(inner, f"{prefix}{name}.")


def _locate(loc: Sequence[Any], config: type[BaseModel]) -> tuple[list[str], Any]:
    """A location's keys as the user writes them, and the annotation there (None where there is none).

    Pydantic puts the branch of a union into the location (`data.train.0.jsonl.path`); readers don't
    want it.
    """
    keys: list[str] = []
    current: Any = config
    for part in loc:
        if part == "[key]":
            continue
        current = _unwrap(current)
        branches = _branches(current)
        if branches:
            current = branches.get(part)
            continue
        keys.append(str(part))
        args = typing.get_args(current)
        if _is_model(current):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        elif typing.get_origin(current) in (tuple, dict):
            current = args[0] if typing.get_origin(current) is tuple else args[1]
        else:
            current = None
    return keys, _unwrap(current)


def _unwrap(annotation: Any) -> Any:
    """An annotation without `Annotated` and `| None`."""
    while True:
        args = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = args[0]
        elif _is_union(annotation) and len(some := [a for a in args if a is not types.NoneType]) == 1:
            annotation = some[0]
        else:
            return annotation


def _branches(annotation: Any) -> dict[str, Any]:
    """Label in locations -> annotation, for a union (else empty)."""
    if not _is_union(annotation):
        return {}
    branches = {}
    for arg in typing.get_args(annotation):
        tags = [m.tag for m in typing.get_args(arg)[1:] if isinstance(m, Tag)]
        branches[tags[0] if tags else str(arg)] = arg
    return branches


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
