"""A finished (or running) run in one table and one picture."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdrl_jax.metrics import read_json, read_metrics
from kdrl_jax.paths import write_whole

# What is drawn, if the run has it: title, and the metrics in one panel.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean", "reward/solved_frac")),
    ("KL(student || teacher), nats per token", ("kd/reverse_kl", "kd/reverse_kl_exact")),
    ("the same, by answer", ("kd/reverse_kl_correct", "kd/reverse_kl_wrong")),
    ("coefficients", ("rl/coef", "kd/coef", "ref/coef", "entropy/coef", "sft/coef")),
    ("loss", ("loss",)),
    ("completion length, tokens", ("completion/length_mean",)),
    ("entropy, nats per token", ("entropy",)),
    ("gradient norms", ("grad_norm", "rl/grad_norm", "kd/grad_norm")),
)


def report(run_dir: Path, console: Console) -> Path:
    """Prints the evaluation table and writes `report.png`; returns its path.

    Raises:
        ValueError: the directory holds no metrics.
    """
    metrics = read_metrics(run_dir)
    if not metrics:
        raise ValueError(f"{run_dir} holds no metrics.jsonl with a whole line; train the run first")
    evaluations = read_evaluations(run_dir)
    if evaluations:
        console.print(_table(evaluations))
    path = run_dir / "report.png"
    _plot(metrics, evaluations, path, title=run_dir.name)
    console.print(f"curves: {path}", highlight=False, markup=False, soft_wrap=True)
    return path


def read_evaluations(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Name -> results: the teachers (if any), then the student by step."""
    folder = run_dir / "eval"
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("teacher*.json")):
        found[path.stem] = read_json(path)
    for path in sorted(folder.glob("step_*.json")):
        results = read_json(path)
        found[f"student, step {results['step']}"] = results
    return found


def _table(evaluations: dict[str, dict[str, Any]]) -> Table:
    columns = {
        "greedy/accuracy": ("greedy accuracy", "{:.1%}"),
        "sampled/accuracy": ("sampled accuracy", "{:.1%}"),
        "sampled/length_mean": ("tokens", "{:.1f}"),
        "sampled/truncated_frac": ("truncated", "{:.1%}"),
        "sampled/repeated_4gram_frac": ("repeated 4-grams", "{:.1%}"),
        "teacher_reverse_kl": ("KL on teacher's answers", "{:.3f}"),
        "teacher_top_agreement": ("same top token", "{:.1%}"),
    }
    if not any("sampled/length_mean" in r for r in evaluations.values()):
        columns = {k.replace("sampled/", "greedy/"): v for k, v in columns.items() if k != "sampled/accuracy"}
    used = {k: v for k, v in columns.items() if any(k in r for r in evaluations.values())}
    num = next(iter(evaluations.values()))["num_prompts"]
    table = Table(title=f"held-out questions ({num})")
    table.add_column("model")
    for label, _ in used.values():
        table.add_column(label, justify="right")
    for name, results in evaluations.items():
        table.add_row(name, *(f.format(results[k]) if k in results else "" for k, (_, f) in used.items()))
    return table


def _plot(metrics: list[Any], evaluations: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (name, [k for k in keys if any(_is_shown(k, m.get(k)) for m in metrics)]) for name, keys in PANELS
    ]
    panels = [(name, keys) for name, keys in panels if keys]
    has_eval = any("greedy/accuracy" in r or "sampled/accuracy" in r for r in evaluations.values())
    num = len(panels) + has_eval
    fig, axes = plt.subplots(-(-num // 3), min(num, 3), figsize=(13, 3.4 * -(-num // 3)), squeeze=False)
    spare = list(axes.flat)
    if has_eval:
        _plot_accuracy(spare.pop(0), evaluations)
    for ax, (name, keys) in zip(spare, panels, strict=False):
        for key in keys:
            points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
            ax.plot(*zip(*points, strict=True), label=key, linewidth=1.2)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        if len(keys) > 1:
            ax.legend(fontsize=8, frameon=False)
        ax.grid(alpha=0.25)
    for ax in spare[len(panels) :]:
        ax.set_visible(False)
    fig.suptitle(title)
    fig.tight_layout()
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110, format="png")
    plt.close(fig)
    write_whole(path, picture.getvalue())


def _is_shown(key: str, value: float | None) -> bool:
    """A coefficient that is always 0 belongs to a term that the run does not have."""
    return value is not None and not (key.endswith("/coef") and value == 0)


def _plot_accuracy(ax: Any, evaluations: dict[str, dict[str, Any]]) -> None:
    """Held-out accuracy of the student by step, the teacher's as a line to reach."""
    students = [r for r in evaluations.values() if "step" in r]
    for key, colour in (("greedy/accuracy", "C0"), ("sampled/accuracy", "C1")):
        points = [(r["step"], r[key]) for r in students if key in r]
        if points:
            label = f"student, {key.split('/')[0]}"
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        for name, results in evaluations.items():
            if name.startswith("teacher") and key in results:
                label = f"{name}, {key.split('/')[0]}"
                ax.axhline(results[key], color=colour, linestyle="--", label=label)
    ax.set_title("held-out accuracy", fontsize=10)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylim(-0.02, 1.02)
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25)
