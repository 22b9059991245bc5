"""What is kept of a run: one small file, from which every number in the lab's tables comes."""

import json
from pathlib import Path
from typing import Any

from benchmarks.lab.jobs import Job
from kdrl_jax.config import load_run_config
from kdrl_jax.metrics import read_json, read_metrics
from kdrl_jax.paths import write_whole
from kdrl_jax.report.reading import read_evaluations

Record = dict[str, Any]
DIGITS = 6
CURVES = (
    "reward/mean",
    "reward/solved_frac",
    "kd/coef",
    "kd/reverse_kl",
    "entropy",
    "completion/length_mean",
    "completion/truncated_frac",
    "grad_norm",
    "rl/grad_norm",
    "kd/grad_norm",
    "grad_cosine",
    "lr",
)
EVALUATED = ("greedy/accuracy", "sampled/accuracy", "sampled/pass@4", "sampled/length_mean")
TESTED = ("greedy/accuracy", "sampled/accuracy", "sampled/pass@8", "sampled/length_mean")
COMPARED = ("teacher_reverse_kl", "teacher_forward_kl", "teacher_top_agreement")


def make_record(job: Job, digest: str, run_dir: Path, seconds: float) -> Record:
    """Reads a finished run and its tests.

    Args:
        digest: of the job, `jobs.digest`.
        seconds: that it took.

    Raises:
        OSError, ValueError, LookupError: it is not there, or not whole.
    """
    config = load_run_config(run_dir)
    rows = read_metrics(run_dir)
    if [row["step"] for row in rows] != list(range(config.train.num_steps)):
        raise ValueError(f"{run_dir}: metrics.jsonl has not each of {config.train.num_steps} steps once")
    rows_per_step = config.train.prompts_per_iteration * config.rollout.group_size
    tokens, total = [], 0.0
    for row in rows:
        total += row["completion/length_mean"] * rows_per_step
        tokens.append(round(total))
    record: Record = {
        "method": job.method,
        "teacher": job.teacher,
        "seed": job.seed,
        "settings": {key: json.loads(value) for key, value in job.settings},
        "digest": digest,
        "seconds": round(seconds, 1),
        "steps": config.train.num_steps,
        "completions_per_step": rows_per_step,
        "validation": evaluations(run_dir),
        "tokens": tokens,
        "metrics": {
            key: [_rounded(row.get(key)) for row in rows] for key in CURVES if any(key in row for row in rows)
        },
    }
    if job.test is not None:
        record["test"] = read_test(run_dir / "test" / job.compared_with[0])
        record["to_teacher"] = {
            teacher: {key: _rounded(_last(run_dir / "test" / teacher)[key]) for key in COMPARED}
            for teacher in job.compared_with
        }
    return record


def make_model_record(digest: str, run_dir: Path, test: Path) -> Record:
    """Reads a trained model and its test. Raises as `make_record`."""
    record = {"digest": digest, "validation": evaluations(run_dir), "test": read_test(test)}
    return record


def evaluations(run_dir: Path) -> dict[str, list[Any]]:
    """A run's own evaluations: `step`, and beside it what was found."""
    found = [results for name, results in read_evaluations(run_dir).items() if name.startswith("student,")]
    out: dict[str, list[Any]] = {"step": [results["step"] for results in found]}
    return out | {key: [_rounded(results[key]) for results in found] for key in EVALUATED}


def read_test(folder: Path) -> dict[str, dict[str, float]]:
    """By kind of questions, what the model has reached."""
    parts = _last(folder)["by_source"]
    return {kind: {key: _rounded(part[key]) for key in TESTED} for kind, part in parts.items()}


def _last(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("eval_*.json")
    results: dict[str, Any] = list(read_json(file)["evaluations"].values())[-1]
    return results


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


class Records:
    """results/lab: `models/NAME.json` and `runs/JOB.json`, written whole or not at all."""

    def __init__(self, out: Path):
        self.out = out

    def read(self, name: str, digest: str) -> Record | None:
        """None if there is none, or one of other settings. Raises ValueError: the file is no record."""
        path = self._path(name)
        if not path.exists():
            return None
        record: Record = read_json(path)
        return record if record.get("digest") == digest else None

    def write(self, name: str, record: Record) -> None:
        """In place of what was there."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record) + "\n")

    def _path(self, name: str) -> Path:
        return self.out / f"{name}.json"
