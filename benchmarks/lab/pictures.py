"""The lab's pictures, from records alone."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.lab.measures import measures
from benchmarks.lab.protocol import TEACHERS
from benchmarks.lab.runner import Lab
from benchmarks.lab.statistics import mean_of
from benchmarks.lab.tables import NAMES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "sft": "#999999", "seq_kd": "#56b4e9", "kd_rkl": "#0072b2", "grpo": "#000000", "kdrl": "#d55e00",
    "kdrl_anneal": "#e69f00", "kdrl_mask_response": "#cc79a7", "kdrl_mask_group": "#8c4b8f",
    "kd_then_rl": "#009e73",
}  # fmt: skip
"""Okabe and Ito's, which the colour-blind can tell apart, and two more."""
DASHES = {"sft": ":", "seq_kd": ":", "kdrl_mask_response": "--", "kdrl_mask_group": "--"}
TRAINING = {
    "reward/solved_frac": "share of right completions",
    "reward/mixed_groups_frac": "share of groups with a signal for reward",
    "kd/reverse_kl": "KL to the teacher on own samples (nats a token)",
    "entropy": "entropy (nats a token)",
}


def curves(lab: Lab) -> list[Path]:
    """Validation accuracy over updates. This and the others raise LookupError: a run is missing."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for ax, (teacher, runs) in zip(axes, {t: lab.finals(t) for t in TEACHERS}.items(), strict=True):
        for method, records in runs.items():
            steps = records[0]["validation"]["step"]
            values_SE = 100 * np.array([r["validation"]["sampled/accuracy"] for r in records])
            _line(ax, method, steps, values_SE)
        level = 100 * lab.known_model(teacher)["validation"]["sampled/accuracy"][-1]
        ax.axhline(level, color="#666666", lw=1, ls=(0, (6, 3)))
        ax.annotate("the teacher", (0, level), xytext=(2, 3), textcoords="offset points", fontsize=9)
        ax.set_title(f"{teacher} teacher ({len(runs['grpo'])} seeds; bands: lowest to highest)", fontsize=11)
        ax.set_xlabel("updates")
        _quiet(ax)
    axes[0].set_ylabel("validation, avg@4 (%)")
    axes[1].legend(fontsize=9, frameon=False, loc="lower right")
    return _save(fig, lab, "curves.png")


def results(lab: Lab) -> list[Path]:
    """Test accuracy of every method, with 95 % intervals over seeds."""
    new_kinds = lab.protocol.new_kinds
    fig, axes = plt.subplots(2, 2, figsize=(13, 7), sharey=True)
    for row, (teacher, runs) in zip(axes, {t: lab.finals(t) for t in TEACHERS}.items(), strict=True):
        for ax, key, title in zip(row, ("avg@8", "avg@8 new"), ("known kinds", "the new kind"), strict=True):
            for y, (method, records) in enumerate(runs.items()):
                values = [measures(record, new_kinds)[key] for record in records]
                mean = mean_of(values)
                ax.errorbar(mean.value, y, xerr=mean.half, fmt="o", color=COLOURS[method], capsize=3)
                ax.plot(values, [y + 0.25] * len(values), "|", color=COLOURS[method], ms=7, alpha=0.7)
            for name, ls in ((teacher, (0, (6, 3))), ("student", ":")):
                ax.axvline(measures(lab.known_model(name), new_kinds)[key], color="#666666", lw=1, ls=ls)
            ax.set_yticks(range(len(runs)), [NAMES[m] for m in runs])
            ax.set_title(f"{teacher} teacher, {title}: avg@8 (%)", fontsize=11)
            _quiet(ax)
    axes[0][0].invert_yaxis()
    fig.supxlabel(
        "points: means with 95 % intervals over seeds; strokes: seeds; dashed: teacher; dotted: student",
        fontsize=9,
    )
    return _save(fig, lab, "results.png")


def training(lab: Lab) -> list[Path]:
    """What training itself has measured, of those that sample: means over seeds, of ten updates each."""
    fig, axes = plt.subplots(2, len(TRAINING), figsize=(17, 7.5), sharex=True, sharey="col")
    for row, (teacher, runs) in zip(axes, {t: lab.finals(t) for t in TEACHERS}.items(), strict=True):
        for ax, (key, title) in zip(row, TRAINING.items(), strict=True):
            for method, records in runs.items():
                if method in ("sft", "seq_kd") or any(key not in r["metrics"] for r in records):
                    continue
                values_SU = np.array([r["metrics"][key] for r in records], dtype=float)
                tens_SE = values_SU[:, : values_SU.shape[1] // 10 * 10].reshape(len(records), -1, 10).mean(-1)
                _line(ax, method, 10 * np.arange(tens_SE.shape[1]) + 5, tens_SE)
            ax.set_title(f"{title},\n{teacher} teacher", fontsize=10)
            _quiet(ax)
    for ax in axes[1]:
        ax.set_xlabel("updates")
    axes[0][0].legend(fontsize=8, frameon=False)
    return _save(fig, lab, "training.png")


def coefficients(lab: Lab) -> list[Path]:
    """Test accuracy of KDRL over its coefficient, and of what it is made of, over the same seeds."""
    new_kinds, name = lab.protocol.new_kinds, "coefficient of KDRL"
    fig, axes = plt.subplots(1, 2, figsize=(13, 4.5))
    for ax, teacher in zip(axes, TEACHERS, strict=True):
        for key, colour, kind in (("avg@8", "#d55e00", "known kinds"), ("avg@8 new", "#0072b2", "new kind")):
            variants = lab.plan.ablation(name, teacher)
            means = [
                mean_of([measures(lab.plan.known(job), new_kinds)[key] for job in jobs])
                for jobs in variants.values()
            ]
            coefs = [float(variant) for variant in variants]
            ax.errorbar(coefs, [m.value for m in means], yerr=[m.half for m in means], fmt="o-", color=colour,
                        capsize=3, label=f"KDRL, {kind}")  # fmt: skip
            for method, ls in (("kd_rkl", "--"), ("grpo", ":")):
                jobs = [
                    j for j in lab.plan.finals_of(method, teacher) if j.seed in lab.protocol.ablation_seeds
                ]
                level = mean_of([measures(lab.plan.known(job), new_kinds)[key] for job in jobs]).value
                ax.axhline(level, color=colour, lw=1, ls=ls, alpha=0.7, label=f"{NAMES[method]}, {kind}")
        ax.set_xscale("log")
        ax.set_xticks(coefs, [f"{c:g}" for c in coefs])
        ax.minorticks_off()
        ax.set_xlabel("kd.coef")
        ax.set_title(f"{teacher} teacher: avg@8 (%)", fontsize=11)
        _quiet(ax)
    axes[1].legend(fontsize=8, frameon=False)
    return _save(fig, lab, "coefficients.png")


def _line(ax: Any, method: str, steps: Any, values_SE: np.ndarray) -> None:
    """The mean over seeds S of what was found at each of E steps, and a band from the lowest to the
    highest."""
    colour = COLOURS[method]
    ax.plot(
        steps, values_SE.mean(axis=0), label=NAMES[method], lw=1.8, color=colour, ls=DASHES.get(method, "-")
    )
    ax.fill_between(steps, values_SE.min(axis=0), values_SE.max(axis=0), color=colour, alpha=0.08, lw=0)


def _quiet(ax: Any) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _save(fig: Any, lab: Lab, name: str) -> list[Path]:
    path = lab.records.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return [path]
