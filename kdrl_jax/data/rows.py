"""One row of a question set: from the fields that a file has to the texts that are used."""

import dataclasses
import json
import math
import re
from collections import Counter
from typing import Any

from kdrl_jax.config.data import StoredConfig
from kdrl_jax.rewards.answers import find_marked

_WHOLE = re.compile(r"\+?(?P<sign>-?)0*(?P<digits>[0-9]+)(?:\.0*)?", re.ASCII)
"""A whole number as data may have it: 142.0, 025."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One question."""

    question: str
    answer: str
    """The gold answer as the data has it; a verifier extracts what it needs."""
    completion: str | None
    """A completion to imitate, where the source has them."""
    source: str
    """Name of the source, for logs."""


class BadRows:
    """Rows of a file that cannot be used: so many are left out, and told of."""

    LISTED = 5

    def __init__(self, limit: int):
        self._limit = limit
        self.count = 0
        self._listed: list[str] = []

    def add(self, problem: str) -> None:
        """One more. Raises ValueError: more than the limit."""
        self.count += 1
        if self.count > self._limit:
            so_many = f" (row {self.count} that cannot be read, of max_bad_rows={self._limit})"
            raise ValueError(problem + (so_many if self._limit else ""))
        if self.count <= self.LISTED:
            self._listed.append(problem)

    def describe(self, name: str) -> list[str]:
        """A line on how many, if any, and one for each of the first."""
        if not self.count:
            return []
        first = f", of which the first {self.LISTED}" if self.count > self.LISTED else ""
        return [f"{name}: {self.count} rows that cannot be read left out{first}:", *self._listed]


class RowReader:
    """Records of one source to rows, by the fields that its config names."""

    def __init__(self, config: StoredConfig):
        self._config = config
        self.left_out: Counter[str] = Counter()
        """Reason -> rows that the config does not want."""

    def __call__(self, record: dict[str, Any], source: str) -> Row | None:
        """The row, or None if `where` or `solve_rate` leaves it out.

        Raises:
            ValueError: a field that is missing, empty or of another kind; the place is the caller's to say.
        """
        c = self._config
        for field, wanted in c.where.items():
            value = _find(record, "where", field)
            # In Python True is 1.
            if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
                self.left_out[f"where {field} is not {json.dumps(wanted)}"] += 1
                return None
        if c.solve_rate is not None and not self._has_rate(record, *c.solve_rate):
            return None
        completion = c.completion_field
        return Row(
            question=_text(record, "question_field", c.question_field),
            answer=self._answer(record),
            completion=None if completion is None else _text(record, "completion_field", completion),
            source=source,
        )

    def _has_rate(self, record: dict[str, Any], low: float, high: float) -> bool:
        field = self._config.solve_rate_field
        assert field is not None
        rate = _find(record, "solve_rate_field", field)
        if rate is None:
            self.left_out["without a solve rate"] += 1
            return False
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(
                f"field {field!r} (solve_rate_field) must be a share from 0 to 1, got {short(rate)}"
            )
        if not low <= rate <= high:
            self.left_out[f"with a solve rate outside [{low:g}, {high:g}]"] += 1
            return False
        return True

    def _answer(self, record: dict[str, Any]) -> str:
        field, part = self._config.answer_field, self._config.answer_part
        text = _text(record, "answer_field", field, number_ok=True)
        if part == "all":
            return text
        if part == "integer":
            whole = _WHOLE.fullmatch(text.strip())
            return text if whole is None else whole["sign"] + whole["digits"]
        marked = find_marked(text)
        if marked is None or not marked.answer:
            raise ValueError(
                f"field {field!r} (answer_field) marks no answer by \\boxed{{...}} or ####, but ends in "
                f"{text[-40:]!r}; mend the row, or set answer_part to all"
            )
        return marked.answer


def parse_object(raw: bytes, expected: str, *, encoding: str = "utf-8", hint: str = "") -> dict[str, Any]:
    """A JSON object.

    Args:
        expected: what there should be, for the error.
        hint: what else may be said of text that is no JSON.

    Raises:
        ValueError: something else; the place is the caller's to say.
    """
    try:
        record = json.loads(raw.decode(encoding), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); convert it first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); {expected}{hint}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {short(record)}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"field {twice!r} is given twice")
    return found


def _find(record: dict[str, Any], setting: str, field: str) -> Any:
    """What a field holds; dots lead into objects and lists, unless there is a field of that very name."""
    value: Any = record
    for part in [field] if field in record else field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(
                f"no field {field!r} ({setting}); the row has {sorted(record)[:12]}. "
                f"Set {setting} or mend the row"
            )
    return value


def _text(record: dict[str, Any], setting: str, field: str, number_ok: bool = False) -> str:
    value = _find(record, setting, field)
    if number_ok and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} ({setting}) must be text, got {short(value)}")
    if not value.strip():
        raise ValueError(f"field {field!r} ({setting}) is empty")
    # A lone surrogate ("\ud800") is valid JSON but no text: no tokenizer takes it.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} ({setting}) holds half a surrogate pair") from None
    return value


def short(value: Any) -> str:
    """A value of a row for an error message: its type and its beginning."""
    shown = json.dumps(value, default=repr)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
