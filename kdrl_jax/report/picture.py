"""Curves for a paper, as a PNG."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdrl_jax.report.panels import Panel, ahead, drawn, points
from kdrl_jax.report.reading import Group, RunFiles

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which the colour-blind can tell apart."""
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def draw(groups: Sequence[Group]) -> bytes:
    """Every panel that some run has: a line for each group and metric, and over several seeds the mean with
    a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for group in groups for run in group.runs]
    # Parts of a whole hide one another: a picture for each group.
    panels = [
        (panel, of_whom)
        for panel in drawn(runs)
        for of_whom in ([[group] for group in groups] if panel.is_stacked else [groups])
    ]
    high = -(-len(panels) // 3)
    fig, axes = plt.subplots(high, min(len(panels), 3), figsize=(13, 3.2 * high), squeeze=False)
    for ax, (panel, of_whom) in zip(axes.flat, panels, strict=False):
        if panel.is_stacked:
            _stack(ax, of_whom[0], panel)
        else:
            _lines(ax, of_whom, panel)
        whose = f", {of_whom[0].label}" if panel.is_stacked and len(groups) > 1 else ""
        ax.set_title(f"{panel.title}{', ' if panel.unit else ''}{panel.unit}{whose}", fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    seeds = max(len(g.runs) for g in groups)
    band = f" (bands: lowest to highest of up to {seeds} seeds)" if seeds > 1 else ""
    fig.suptitle(", ".join(g.label for g in groups) + band)
    fig.tight_layout(rect=(0, 0, 1, 0.985))
    picture = io.BytesIO()
    fig.savefig(picture, dpi=150, format="png")
    plt.close(fig)
    return picture.getvalue()


def _lines(ax: Any, groups: Sequence[Group], panel: Panel) -> None:
    several = len(groups) > 1
    for g, group in enumerate(groups):
        for k, key in enumerate(panel.keys):
            of_runs = [x for run in group.runs if (x := series(points(run, panel), key))]
            style: dict[str, Any] = {
                "color": _COLOURS[(g if several else k) % len(_COLOURS)],
                "linestyle": _DASHES[k % len(_DASHES)] if several else "-",
            }
            label = f"{group.label}: {key}" if several else key
            if of_runs:
                _mean(ax, of_runs, style, label, is_evaluated=panel.is_evaluated)
                if len(of_runs) == 1 and panel.is_evaluated:
                    _whiskers(ax, group.runs[0], key, style["color"])
            _ahead(ax, group, key, max((max(x) for x in of_runs), default=-1), style)
        if panel.is_evaluated and g == 0:
            _teachers(ax, group.runs[0], panel.keys)
    if len(panel.keys) > 1 or several:
        ax.legend(fontsize=7, frameon=False)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Step -> the value, where there is one that is finite."""
    values = {int(row["step"]): row.get(key) for row in rows}
    return {step: float(x) for step, x in values.items() if x is not None and math.isfinite(x)}


def _mean(
    ax: Any, of_runs: Sequence[dict[int, float]], style: dict[str, Any], label: str, *, is_evaluated: bool
) -> None:
    """The mean as far as all runs have come, with its band; beyond, each run by itself, thinner: a mean of
    those that are left would jump where one ends."""
    first, last = max(min(x) for x in of_runs), min(max(x) for x in of_runs)
    steps = [s for s in sorted(set().union(*of_runs)) if first <= s <= last]
    if is_evaluated:  # between two evaluations there is none
        steps = [s for s in steps if all(s in x for x in of_runs)]
    values = np.array([np.interp(steps, list(x), list(x.values())) for x in of_runs])
    dots = {"marker": "o", "markersize": 4} if is_evaluated else {}
    ax.plot(steps, values.mean(0), linewidth=1.3, label=label, **style, **dots)
    if len(of_runs) == 1:
        return
    ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)
    for run in of_runs:
        alone = {s: y for s, y in run.items() if s >= last}
        if len(alone) > 1:
            ax.plot(list(alone), list(alone.values()), linewidth=0.7, alpha=0.6, **style, **dots)


def _ahead(ax: Any, group: Group, key: str, last: int, style: dict[str, Any]) -> None:
    """The schedule that the group still follows, dashed."""
    for run in group.runs:
        steps, values = ahead(run)
        coming = [(s, y) for s, y in zip(steps, values.get(key, ()), strict=False) if s > last]
        if coming:
            ax.plot(*zip(*coming, strict=True), linewidth=1.0, alpha=0.6, color=style["color"], dashes=(4, 3))
            return


def _whiskers(ax: Any, run: RunFiles, key: str, colour: str) -> None:
    """95 % intervals, where the evaluation has them."""
    for name, result in run.evaluations.items():
        interval = result.get(f"{key}_ci")
        if name.startswith("student") and interval and None not in interval:
            ax.vlines(result["step"], *interval, color=colour, linewidth=1)


def _teachers(ax: Any, run: RunFiles, keys: Sequence[str]) -> None:
    for name, result in run.evaluations.items():
        if name.startswith("teacher") and result.get(keys[0]) is not None:
            ax.axhline(result[keys[0]], color="0.4", linestyle=":", label=f"{name}, {keys[0]}")


def _stack(ax: Any, group: Group, panel: Panel) -> None:
    """The mean over seeds, at the steps that all of them have."""
    of_runs = [[series(run.metrics, key) for key in panel.keys] for run in group.runs]
    there = [set().union(*of_run) for of_run in of_runs]
    steps = sorted(set.intersection(*there))
    if not steps:
        return
    parts = np.mean([[[x.get(s, 0.0) for s in steps] for x in of_run] for of_run in of_runs], axis=0)
    # Steps that compile take a hundred times as long as the others, which are to be seen.
    ax.set_ylim(0, 1.5 * np.quantile(parts.sum(0), 0.97))
    labels = [key.partition("/")[2] for key in panel.keys]
    ax.stackplot(steps, parts, labels=labels, alpha=0.85, colors=_COLOURS)
    ax.legend(fontsize=7, frameon=False)
