"""The `plan` command: what a config will need of a TPU slice, before there is one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.status import Status
from rich.table import Table

from kdrl_jax.config import Config
from kdrl_jax.paths import as_path, make_folder, write_whole
from kdrl_jax.plan import tables
from kdrl_jax.plan.fit import Plan, Planner, change_words, mean_lengths
from kdrl_jax.plan.shapes import model_shapes
from kdrl_jax.plan.topology import make_topology

SLOWEST = "a program takes up to a minute or two"


def plan(config: Config, console: Console, should_stop: Callable[[], bool], flags: str = "") -> bool:
    """Compiles the config's programs for each slice of `plan.topology`, prints and writes tables, and tries
    what would make them fit where they do not. Nothing of any model but its shape is read.

    Args:
        should_stop: asked between two programs.
        flags: that the compiler was given.

    Returns:
        Whether the config fits every slice.

    Raises:
        ValueError: an unknown slice or model.
        Stopped: when asked to stop. Nothing is written then but the tables kept of whole programs.
    """
    # What is compiled for devices that are not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    names = [config.plan.topology] if isinstance(config.plan.topology, str) else config.plan.topology
    slices = [(name, *make_topology(name)) for name in names]
    shapes = model_shapes(config)
    kept = None if config.cache_dir is None else Path(config.cache_dir).expanduser() / "plan"
    folder = as_path(config.run_dir) / "plan"
    text, plans = [], []
    for name, chip, devices in slices:
        with console.status(f"{name}: {SLOWEST}") as status:
            planner = Planner(
                name,
                chip,
                devices,
                shapes,
                kept,
                lambda line: _say(console, status, line),
                should_stop=should_stop,
                flags=flags,
            )
            found = planner.plan(config)
        plans.append(found)
        text += _show(config, console, found)
        if found.fits or not config.plan.search:
            continue
        text += _search(config, console, planner, found)
    if len(plans) > 1:
        rows = tables.comparison_rows(plans)
        _table(console, "slices", tables.COMPARISON, rows)
        text.append(tables.markdown("Slices", tables.COMPARISON, rows))
    for line in tables.footnotes():
        console.print(line, style="dim", highlight=False)
    make_folder(folder)
    page = [f"# Plan of {config.name}", "", *text, *tables.footnotes(), ""]
    write_whole(folder / "plan.md", "\n".join(page))
    write_whole(folder / "plan.json", tables.as_json(plans))
    console.print(f"written: {folder}/plan.md and plan.json", highlight=False)
    return all(p.fits for p in plans)


def _show(config: Config, console: Console, found: Plan) -> list[str]:
    lines = tables.summary(found, mean_lengths(config))
    text = [f"# {found.topology}", "", *lines, ""]
    columns, rows, sent = (
        tables.program_columns(found),
        tables.program_rows(found),
        tables.collective_rows(found),
    )
    if found.programs:
        _table(console, f"{found.topology}: on each chip", columns, rows)
        text.append(tables.markdown("Programs, on each chip", columns, rows))
    if sent:
        _table(console, f"{found.topology}: sent between chips", tables.SENT, sent)
        text.append(tables.markdown("Sent between chips", tables.SENT, sent))
    for line in lines:
        console.print(line, highlight=False)
    for note in dict.fromkeys(note for m in found.programs for note in m.notes):
        text.append(f"- {note}")
    return text


def _search(config: Config, console: Console, planner: Planner, found: Plan) -> list[str]:
    """Tries what would make it fit, until something does."""
    rows: list[list[str]] = []
    with console.status(f"{found.topology}: looking for what would make it fit") as status:
        planner.say = lambda line: _say(console, status, line)
        for change, tried in planner.remedies(config, found):
            peak = "" if tried.problem else tables.share_of_chip(tried.peak, tried.chip)
            where = ", ".join(m.name for m in tried.too_large)
            rows.append([change_words(change), "fits" if tried.fits else "does not fit", where, peak])
            if tried.fits:
                break
    columns = ("with", "", "the first too large", "of chip")
    _table(console, f"{found.topology}: what would make it fit", columns, rows)
    return [tables.markdown("What would make it fit", columns, rows)]


def _say(console: Console, status: Status, line: str) -> None:
    status.update(f"{line}: {SLOWEST}")
    if not console.is_terminal:
        console.print(line, highlight=False)


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
