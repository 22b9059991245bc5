"""One HTML file that needs nothing else: the files beside this one, and the data, compressed.

Texts of models and data are never part of the markup: the page's script puts them into text nodes. They
travel as compressed JSON in base64, which no text can end, and a policy in the page allows this script alone.
"""

import base64
import dataclasses
import datetime
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kdrl_jax.colours import css, scales
from kdrl_jax.report.panels import Panel, ahead, drawn
from kdrl_jax.report.reading import Group, RunFiles
from kdrl_jax.report.samples import Samples, Told, fit, pack, read_held_out

MAX_BYTES = 4_700_000
"""Of a page: samples beyond it are left out, and it says so."""
MAX_POINTS = 2000
"""Of a curve: in longer runs a point is the mean of some steps."""
ALL_POINTS = 12_000
"""Of a metric's curves, of all runs together."""
_SCRIPTS = ("page.js", "curves.js", "tables.js", "viewer.js", "start.js")


def report_page(groups: Sequence[Group], told: Told) -> str:
    """The page of some runs: curves, evaluations, settings, and samples as far as there is room.

    Args:
        told: as samples are read.
    """
    runs = [run for group in groups for run in group.runs]
    panels = drawn(runs)
    most = max(min(MAX_POINTS, ALL_POINTS // len(runs)), 1)
    data = {
        "title": ", ".join(group.label for group in groups),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "panels": [dataclasses.asdict(panel) for panel in panels],
        "evaluated": [key for panel in panels if panel.is_evaluated for key in panel.keys],
        "scales": scales(),
        "groups": [_group(group, panels, most) for group in groups],
    }
    room = MAX_BYTES - len(_page(data | {"samples": []}, [])) - 20_000
    held_out = [Samples(f"{run.name}, held-out answers", run.held_out(), read_held_out) for run in runs]
    rollouts = [Samples(run.name, run.rollouts()) for run in runs]
    # What is small first: what it leaves is the others'.
    samples, blocks = fit([*held_out, *rollouts], room, told)
    shown = sorted(samples, key=lambda one: one["run"] not in {run.name for run in runs})
    return _page(data | {"samples": shown}, blocks)


def viewer_page(files: Sequence[Path], title: str = "samples") -> str:
    """A page with the samples of some files alone, `rollouts/step_*.jsonl` of a run; for notebooks."""
    steps = {int(path.stem.rpartition("_")[2]): path for path in files}
    samples, blocks = fit([Samples(title, steps)], MAX_BYTES, lambda *_: None)
    return _page({"title": title, "groups": [], "scales": scales(), "samples": samples}, blocks)


def _group(group: Group, panels: Sequence[Panel], most: int) -> dict[str, Any]:
    """A group; all of its runs have their points at the same steps, so that a mean is one of all."""
    steps = [int(row["step"]) for run in group.runs for row in run.metrics]
    size = -(-(max(steps) + 1) // most)
    keys = [key for panel in panels if not panel.is_evaluated for key in panel.keys]
    return {
        "label": group.label,
        "differs": group.differs,
        "mean_of": size,
        "runs": [_run(run, keys, size) for run in group.runs],
    }


def _run(run: RunFiles, keys: Sequence[str], size: int) -> dict[str, Any]:
    c = run.config
    steps, series = _series(run.metrics, keys, size)
    steps_ahead, coming = ahead(run)
    alarms = [{"step": r["step"], "alarm": r["name"], "text": r["says"]} for r in run.alarms]
    changed = [
        {"step": r["step"], "alarm": None, "text": f"{r['key']} was {r['was']}, is {r['is']}"}
        for r in run.changes
    ]
    return {
        "name": run.name,
        "seed": c.seed,
        "done": run.last_step + 1,
        "of": c.train.num_steps,
        "steps": steps,
        "series": series,
        "ahead": {
            "steps": steps_ahead,
            "series": {key: [_digits(x) for x in values] for key, values in coming.items()},
        },
        "marks": sorted([*alarms, *changed], key=lambda mark: mark["step"]),
        "evaluations": [{"name": name, **results} for name, results in run.evaluations.items()],
        "settings": yaml.safe_dump(c.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    }


def _series(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], size: int
) -> tuple[list[int], dict[str, list[float | None]]]:
    """(steps, values of each metric): means over `size` steps, from 0 on, at the middle one of them."""
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(int(row["step"]) // size, []).append(row)

    def mean(part: Sequence[Mapping[str, Any]], key: str) -> float | None:
        values = [row[key] for row in part if isinstance(row.get(key), (int, float))]
        values = [value for value in values if math.isfinite(value)]
        return _digits(sum(values) / len(values)) if values else None

    series = {key: [mean(part, key) for part in parts.values()] for key in keys}
    return (
        [number * size + size // 2 for number in parts],
        {key: values for key, values in series.items() if any(x is not None for x in values)},
    )


def _digits(value: float) -> float:
    """Four, which is more than can be seen."""
    return float(f"{value:.4g}")


def _page(data: dict[str, Any], blocks: Sequence[str]) -> str:
    here = files("kdrl_jax.report")
    template, style = (here.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css"))
    script = "\n".join(here.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    held = {"data": pack(data)} | {f"block-{i}": block for i, block in enumerate(blocks)}
    filled = {
        "TITLE": html.escape(data["title"]),
        "POLICY": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "STYLE": f"{css()}\n{style}",
        "DATA": "\n".join(
            f'<script type="text/plain" id="{name}">{block}</script>' for name, block in held.items()
        ),
        "SCRIPT": script,
    }
    before, *parts = template.split("{{")
    return before + "".join(filled[name] + rest for name, rest in (p.split("}}", 1) for p in parts))
