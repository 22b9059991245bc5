"""The lab's pictures, from records alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from benchmarks.lab.measures import measures
from benchmarks.lab.protocol import TEACHERS
from benchmarks.lab.records import Record
from benchmarks.lab.statistics import mean_of
from benchmarks.lab.tables import NAMES

if TYPE_CHECKING:
    from benchmarks.lab.runner import Lab

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "sft": "#999999", "seq_kd": "#56b4e9", "kd_rkl": "#0072b2", "grpo": "#000000", "kdrl": "#d55e00",
    "kdrl_anneal": "#e69f00", "kdrl_mask_response": "#cc79a7", "kdrl_mask_group": "#8c4b8f",
    "kd_then_rl": "#009e73",
}  # fmt: skip
"""Okabe and Ito's, which the colour-blind can tell apart, and two more."""
DASHES = {"sft": ":", "seq_kd": ":", "kdrl_mask_response": "--", "kdrl_mask_group": "--"}
Finals = dict[str, dict[str, list[Record]]]
"""Teacher -> method -> records, by seed."""


def draw(lab: "Lab", out: Path) -> list[Path]:
    """Writes them into a folder."""
    finals: Finals = {
        teacher: {m: [_known(lab, job) for job in jobs] for m, jobs in lab.plan.finals(teacher).items()}
        for teacher in TEACHERS
    }
    return [_curves(lab, finals, out / "curves.png"), _results(lab, finals, out / "results.png"),
            _coefficients(lab, finals, out / "coefficients.png")]  # fmt: skip


def _known(lab: "Lab", job: Any) -> Record:
    record = lab.record(job)
    if record is None:
        raise LookupError(f"{job.name} has not run")
    return record


def _model(lab: "Lab", name: str) -> Record:
    record = lab.model_record(name)
    if record is None:
        raise LookupError(f"{name} has not run")
    return record


def _curves(lab: "Lab", finals: Finals, path: Path) -> Path:
    """Validation accuracy over updates."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for ax, (teacher, runs) in zip(axes, finals.items(), strict=True):
        for method, records in runs.items():
            steps = records[0]["validation"]["step"]
            values_SE = 100 * np.array([r["validation"]["sampled/accuracy"] for r in records])
            style = {"color": COLOURS[method], "ls": DASHES.get(method, "-")}
            ax.plot(steps, values_SE.mean(axis=0), label=NAMES[method], lw=1.8, **style)
            ax.fill_between(
                steps, values_SE.min(axis=0), values_SE.max(axis=0), color=COLOURS[method], alpha=0.08, lw=0
            )
        level = 100 * _model(lab, teacher)["validation"]["sampled/accuracy"][-1]
        ax.axhline(level, color="#666666", lw=1, ls=(0, (6, 3)))
        ax.annotate("the teacher", (0, level), xytext=(2, 3), textcoords="offset points", fontsize=9)
        num = len(runs["grpo"])
        ax.set_title(f"{teacher} teacher ({num} seeds; bands: lowest to highest)", fontsize=11)
        ax.set_xlabel("updates")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation, avg@4 (%)")
    axes[1].legend(fontsize=9, frameon=False, loc="lower right")
    return _save(fig, path)


def _results(lab: "Lab", finals: Finals, path: Path) -> Path:
    """Test accuracy of every method, with 95 % intervals over seeds."""
    new_kinds = lab.protocol.new_kinds
    fig, axes = plt.subplots(2, 2, figsize=(13, 7), sharey=True)
    for row, (teacher, runs) in zip(axes, finals.items(), strict=True):
        for ax, key, title in zip(row, ("avg@8", "avg@8 new"), ("known kinds", "the new kind"), strict=True):
            for y, (method, records) in enumerate(runs.items()):
                values = [measures(record, new_kinds)[key] for record in records]
                mean = mean_of(values)
                ax.errorbar(mean.value, y, xerr=mean.half, fmt="o", color=COLOURS[method], capsize=3)
                ax.plot(values, [y + 0.25] * len(values), "|", color=COLOURS[method], ms=7, alpha=0.7)
            for name, ls in ((teacher, (0, (6, 3))), ("student", ":")):
                ax.axvline(measures(_model(lab, name), new_kinds)[key], color="#666666", lw=1, ls=ls)
            ax.set_yticks(range(len(runs)), [NAMES[m] for m in runs])
            ax.set_title(f"{teacher} teacher, {title}: avg@8 (%)", fontsize=11)
            ax.grid(alpha=0.25, axis="x")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    fig.supxlabel(
        "points: means with 95 % intervals over seeds; strokes: seeds; dashed: teacher; dotted: student",
        fontsize=9,
    )
    return _save(fig, path)


def _coefficients(lab: "Lab", finals: Finals, path: Path) -> Path:
    """Test accuracy of KDRL over its coefficient."""
    new_kinds = lab.protocol.new_kinds
    fig, axes = plt.subplots(1, 2, figsize=(13, 4.5))
    for ax, teacher in zip(axes, TEACHERS, strict=True):
        for key, colour, name in (("avg@8", "#d55e00", "known kinds"), ("avg@8 new", "#0072b2", "new kind")):
            variants = lab.plan.ablation("coefficient of KDRL", teacher)
            means = [
                mean_of([measures(_known(lab, job), new_kinds)[key] for job in jobs])
                for jobs in variants.values()
            ]
            coefs = [float(name) for name in variants]
            ax.errorbar(coefs, [m.value for m in means], yerr=[m.half for m in means], fmt="o-", color=colour,
                        capsize=3, label=f"KDRL, {name}")  # fmt: skip
            for method, ls in (("kd_rkl", "--"), ("grpo", ":")):
                level = mean_of([measures(r, new_kinds)[key] for r in finals[teacher][method]]).value
                ax.axhline(level, color=colour, lw=1, ls=ls, alpha=0.7, label=f"{NAMES[method]}, {name}")
        ax.set_xscale("log")
        ax.set_xticks(coefs, [f"{c:g}" for c in coefs])
        ax.set_xlabel("kd.coef")
        ax.set_title(f"{teacher} teacher: avg@8 (%)", fontsize=11)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False)
    return _save(fig, path)


def _save(fig: Any, path: Path) -> Path:
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path
