"""A finished (or running) run, or several, as a page to open, a picture for a paper, and a table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kdrl_jax.paths import write_whole
from kdrl_jax.progress import Work
from kdrl_jax.report.page import report_page, viewer_page
from kdrl_jax.report.picture import draw
from kdrl_jax.report.reading import group_runs, read_evaluations, read_runs
from kdrl_jax.report.table import evaluation_table

__all__ = ["read_evaluations", "report", "viewer_page"]


def report(run_dir: Path, console: Console, *, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Prints the evaluation tables, and writes the page and, beside it, the picture.

    Args:
        others: further runs to compare with, each counted once. Those that differ in their seed alone become
        one curve. out: the page; None is `report.html` in the run's directory. The picture has its name, and
            ends in .png.

    Returns:
        The page's path.

    Raises:
        ValueError: a directory holds no metrics, or no config.
    """
    with Work(console, "report") as work:
        work.at("reading")
        groups = group_runs(runs := read_runs([run_dir, *others]))
        page = run_dir / "report.html" if out is None else out
        picture = page.with_suffix(".png")
        work.at("drawing the picture")
        write_whole(picture, draw(groups))
        write_whole(page, report_page(groups, work.at))
    for run in runs:
        if run.evaluations:
            console.print(evaluation_table(run.name if len(runs) > 1 else "", run.evaluations))
    console.print(f"curves: {picture}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    return page
