"""What is kept of a run: one small file, from which every number in the lab's tables comes."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import kdrl_jax
from benchmarks.lab.jobs import Job, decisive, thawed
from benchmarks.lab.protocol import Settings, Teacher
from kdrl_jax.config import load_run_config
from kdrl_jax.metrics import read_json, read_metrics
from kdrl_jax.paths import write_whole
from kdrl_jax.report.reading import read_evaluations

Record = dict[str, Any]
CURVES = (
    "reward/solved_frac",
    "reward/mixed_groups_frac",
    "kd/coef",
    "kd/reverse_kl",
    "entropy",
    "completion/length_mean",
    "grad_norm",
    "rl/grad_norm",
    "kd/grad_norm",
    "grad_cosine",
)
EVALUATED = ("greedy/accuracy", "sampled/accuracy", "sampled/pass@4")
TESTED = ("greedy/accuracy", "sampled/accuracy", "sampled/pass@8", "sampled/length_mean")
COMPARED = ("teacher_reverse_kl", "teacher_forward_kl", "teacher_top_agreement")


def make_record(job: Job, models: dict[str, str], run_dir: Path, seconds: float) -> Record:
    """Reads a finished run and its tests.

    Args:
        models: fingerprints of those that it needs, by name.
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
        "settings": thawed(job.settings),
        "config": decisive(config),
        "models": models,
        "made_with": made_with(),
        "seconds": round(seconds, 1),
        "validation": validations(run_dir),
        "tokens": tokens,
        "metrics": {
            key: [_rounded(row.get(key)) for row in rows] for key in CURVES if any(key in row for row in rows)
        },
    }
    return record if job.test is None else record | tests(run_dir, thawed(job.test), job.compared_with)


def make_model_record(run_dir: Path, test: Settings, compared_with: tuple[Teacher, ...]) -> Record:
    """Reads a trained model and its tests. Raises as `make_record`."""
    config = load_run_config(run_dir)
    record = {"config": decisive(config), "fingerprint": fingerprint(run_dir, config.train.num_steps)}
    return record | {"validation": validations(run_dir)} | tests(run_dir, test, compared_with)


def tests(run_dir: Path, test: Settings, compared_with: tuple[Teacher, ...]) -> Record:
    """What `jobs.test_all` has found: by kind of questions, and by teacher."""
    parts = _last(run_dir / "test" / (compared_with[0] if compared_with else "alone"))["by_source"]
    counts = {part["num_prompts"] for part in parts.values()}
    if len(counts) > 1:
        raise ValueError(f"{run_dir}: kinds of questions have {sorted(counts)} of them; they must be as many")
    to_teacher = {teacher: _last(run_dir / "test" / teacher) for teacher in compared_with}
    return {
        "test_settings": test,
        "test": {kind: {key: _rounded(part[key]) for key in TESTED} for kind, part in parts.items()},
        "to_teacher": {
            teacher: {key: _rounded(found[key]) for key in COMPARED} for teacher, found in to_teacher.items()
        },
    }


def validations(run_dir: Path) -> dict[str, list[Any]]:
    """A run's own evaluations: `step`, and beside it what was found."""
    found = [results for name, results in read_evaluations(run_dir).items() if name.startswith("student,")]
    out: dict[str, list[Any]] = {"step": [results["step"] for results in found]}
    return out | {key: [_rounded(results[key]) for results in found] for key in EVALUATED}


def fingerprint(run_dir: Path, step: int) -> str:
    """Of the student's parameters in a checkpoint: other bits, another fingerprint."""
    sealed = read_json(run_dir / "checkpoints" / str(step) / "host" / "metadata")
    return _hash(json.dumps(sealed["arrays"]["params"], sort_keys=True).encode())


def made_with() -> dict[str, str]:
    """The version of JAX, and the state of this package's code."""
    sources = sorted(Path(kdrl_jax.__file__).parent.rglob("*.py"))
    return {
        "jax": importlib.metadata.version("jax"),
        "code": _hash(b"\0".join(path.read_bytes() for path in sources)),
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _last(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("eval_*.json")
    results: dict[str, Any] = list(read_json(file)["evaluations"].values())[-1]
    return results


def _rounded(value: Any) -> Any:
    """Six digits are enough."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Records:
    """results/lab: `models/NAME.json` and `runs/JOB.json`, written whole or not at all."""

    def __init__(self, out: Path):
        self.out = out

    def read(self, name: str) -> Record | None:
        """None if there is none. Raises ValueError: the file is no record."""
        path = self.path(name)
        found: Record | None = read_json(path) if path.exists() else None
        return found

    def write(self, name: str, record: Record) -> None:
        """In place of what was there."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record) + "\n")

    def path(self, name: str) -> Path:
        """Where a record lies."""
        return self.out / f"{name}.json"
