"""Results of several models side by side, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from kdrl_jax.evaluate import Results

_COUNTS = ("step", "num_prompts", "sampled/num_samples", "greedy/verifier_errors", "sampled/verifier_errors")
_NOT_SHARES = ("length_mean", "_kl")
_GAP = "   "

Row = tuple[str, list[str]]
"""What it is of, and a cell for each column."""


def results_lines(
    columns: Mapping[str, Results], changes: Mapping[str, Any], width: int | None
) -> Iterator[str]:
    """A line for each measure and a column for each model. If these are too wide together, a line for each
    model and a column for each measure, in blocks of as many as have room. The intervals are of 95 %, over
    questions.

    Args:
        columns: results by the name of their model.
        changes: differences between students, by measure, as one model more; empty for none.
        width: of the screen; None for any.
    """
    everything, names = list(columns.values()), list(columns)
    rows = _rows(everything)
    if changes:
        names.append(f"change, {changes['from_step']} to {changes['to_step']}")
        for key, cells in rows:
            cells.append(change(changes[key], changes[f"{key}_ci"]) if key in changes else "")
    sections = {"": rows}
    for source in dict.fromkeys(s for found in everything for s in found.get("by_source", {})):
        of_source = _rows([found.get("by_source", {}).get(source, {}) for found in everything])
        sections[source] = [(key, [*cells, *[""] * bool(changes)]) for key, cells in of_source]
    yield "held-out questions; in brackets 95 % intervals over them"
    whole = [("", names), *(row for section in sections.values() for row in section)]
    is_turned = width is not None and len(names) > 1 and _width(whole) > width
    for source, section in sections.items():
        if source:
            yield ""
            yield f"{source}:"
        if is_turned:
            keys = [key for key, _ in section]
            models = [(name, [cells[i] for _, cells in section]) for i, name in enumerate(names)]
            yield from _blocks([("", keys), *models], width)
        else:
            yield from ([] if source else [""])
            # Of single sources there are no changes.
            shown = range(len(columns) if source else len(names))
            yield from _lines([("", names), *section], _widths(whole), shown)


def _rows(group: Sequence[Results]) -> list[Row]:
    keys = dict.fromkeys(key for found in group for key in found)
    return [
        (key, [measure(key, found.get(key), found.get(f"{key}_ci")) for found in group])
        for key in keys
        if key not in ("step", "settings", "by_source") and not key.endswith("_ci")
    ]


def _widths(rows: Sequence[Row]) -> list[int]:
    """Of the labels, and of each column."""
    labels, columns = zip(*rows, strict=True)
    return [max(map(cell_len, column)) for column in (labels, *zip(*columns, strict=True))]


def _width(rows: Sequence[Row]) -> int:
    widths = _widths(rows)
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _blocks(rows: Sequence[Row], width: int | None) -> Iterator[str]:
    """Columns that have room side by side, at least one, and the others beneath."""
    labels, *widths = _widths(rows)
    first, used = 0, labels
    for i, wide in enumerate(widths):
        if width is not None and i > first and used + len(_GAP) + wide > width:
            yield ""
            yield from _lines(rows, [labels, *widths], range(first, i))
            first, used = i, labels
        used += len(_GAP) + wide
    yield ""
    yield from _lines(rows, [labels, *widths], range(first, len(widths)))


def _lines(rows: Sequence[Row], widths: Sequence[int], columns: range) -> Iterator[str]:
    """Rows that have something in these columns."""
    for label, cells in rows:
        if any(cells[i] for i in columns):
            parts = [label + " " * (widths[0] - cell_len(label))]
            parts += [" " * (widths[i + 1] - cell_len(cells[i])) + cells[i] for i in columns]
            yield _GAP.join(parts).rstrip()


def measure(key: str, value: Any, interval: list[float] | None) -> str:
    """A value with its interval: `52.1 % (49.0–55.2)`, `38.20 (36.91–39.62)`."""
    if value is None:
        return ""
    if key in _COUNTS:
        return str(value)
    if key.endswith(_NOT_SHARES):
        digits = 1 if key.endswith("length_mean") else 3
        text, ends = f"{value:.{digits}f}", [f"{end:.{digits}f}" for end in interval or ()]
    else:
        text, ends = f"{100 * value:.1f} %", [f"{100 * end:.1f}" for end in interval or ()]
    return f"{text} ({'–'.join(ends)})" if ends else text


def change(value: float, interval: list[float]) -> str:
    """A difference of shares in percent points: `+3.1 (-0.4 to +6.8)`."""
    low, high = (f"{100 * end:+.1f}" for end in interval)
    return f"{100 * value:+.1f} ({low} to {high})"
