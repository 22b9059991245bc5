"""What a run leaves in its directory, and goes on from."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdrl_jax import hosts
from kdrl_jax.alarms import Alarm
from kdrl_jax.checkpoint import Checkpoints, Keep, MisfitError
from kdrl_jax.config import Change, Config, save_config
from kdrl_jax.config.evaluation import model_digest
from kdrl_jax.metrics import (
    ALARMS,
    MetricsWriter,
    files_of_steps,
    read_json,
    read_jsonl,
    read_metrics,
    write_json,
    write_jsonl,
)
from kdrl_jax.paths import make_folder, write_whole
from kdrl_jax.runs import check_changes, check_same_step, check_shared
from kdrl_jax.types import Metrics, TrainingError, TrainState
from kdrl_jax.writers import RunWriters, Status

CHANGES = "changes.jsonl"
"""Settings that a run goes on with and did not have before, with the step."""
SKIPPED_KEPT = 10
"""Batches of skipped updates that a run keeps."""


class Record:
    """The run directory, as `train` writes it: files by the first process of a job, checkpoints by all."""

    def __init__(self, config: Config, run_dir: Path):
        """Makes the directory, and opens its checkpoints.

        Raises:
            ValueError: not all hosts of the job see it.
            TrainingError: they see different checkpoints.
        """
        c = config.checkpoint
        self._config, self.run_dir = config, run_dir
        check_shared(run_dir)
        self.checkpoints = Checkpoints(
            run_dir,
            keep=Keep(c.keep, c.keep_every, c.keep_best),
            write=True,
        )
        if c.keep_best:
            last = self.checkpoints.latest_step or 0
            self.checkpoints.accuracies |= read_accuracies(config, run_dir, last)
        check_same_step(self.checkpoints.latest_step)
        self._writer: MetricsWriter | None = None
        self._writers: RunWriters | None = None
        self._status: Status = "stopped"

    def restore(
        self, abstract: TrainState, accept: bool
    ) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """The newest state, what `save` was given with it, and lines about it; None in a new run.

        Args:
            accept: whether the run goes on with settings that give its updates another meaning.

        Raises:
            ValueError: the checkpoint is of other settings.
            TrainingError: as `Checkpoints.restore`.
        """
        if self.checkpoints.latest_step is None:
            return None
        try:
            state, host, notes = self.checkpoints.restore(abstract)
        except MisfitError as error:
            raise ValueError(
                f"{self.checkpoints.directory}: the checkpoint does not fit these settings of student and "
                f"optimizer ({str(error).splitlines()[0][:200]}); undo what was changed"
            ) from error
        return state, host["run"], notes + self._changes(int(state.step), host["config"], accept)

    def _changes(self, step: int, before: dict[str, Any], accept: bool) -> list[str]:
        """A line for each setting that the checkpoint was not made with, which is written down once."""
        file = self.run_dir / CHANGES
        rows = read_jsonl(file)
        # Those of later steps too: of a checkpoint that was lost since.
        accepted = [Change(row["key"], row["was"], row["is"]) for row in rows if row["step"] >= step]
        found = check_changes(self._config, _complete(before), accept, accepted)
        earlier = [row for row in rows if row["step"] < step]
        now = [*earlier, *({"step": step, "key": x.key, "was": x.before, "is": x.now} for x in found)]
        if now != rows and hosts.is_first():
            write_jsonl(file, now)
        return [f"from step {step} on {change}" for change in found]

    def open(self, first_step: int, last_eval: int = -1) -> list[Metrics]:
        """From now on files are written. What is there of steps from `first_step` on is written again.

        Args:
            last_eval: the step of the last evaluation that is not made again; -1 for none.

        Returns:
            The metrics of the steps before.
        """
        before = [row for row in read_metrics(self.run_dir) if row["step"] < first_step]
        if hosts.is_first():
            writers = RunWriters(self._config, self.run_dir)
            save_config(self._config, self.run_dir)
            self._writer = MetricsWriter(self.run_dir, before)
            file = self.run_dir / ALARMS
            if (told := read_jsonl(file)) and any(row["step"] >= first_step for row in told):
                write_jsonl(file, [row for row in told if row["step"] < first_step])
            writers.open(before, first_step, last_eval)
            self._writers = writers
        return before

    def save(self, state: TrainState, host: dict[str, Any]) -> None:
        """Begins to write a checkpoint of the state; its arrays may be donated afterwards.

        Args:
            host: JSON-able, given back by `restore`.

        Raises:
            TrainingError: it, or the one before it, could not be written.
        """
        if self._writer is not None:
            self._writer.flush()  # metrics are never behind a checkpoint
        kept = {"config": self._config.model_dump(mode="json"), "run": host}
        with _told():
            self.checkpoints.save(int(state.step), state, kept)

    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written. Raises as `save`, in a job of several hosts."""
        with _told():
            return self.checkpoints.has_failed()

    def wait(self) -> None:
        """Until the checkpoint is whole on disk. Raises as `save`."""
        with _told():
            self.checkpoints.wait()

    def metrics(self, metrics: Metrics) -> None:
        """A line of metrics.jsonl."""
        if self._writer is not None:
            self._writer.write(metrics)
        self._tell("metrics", metrics["step"], metrics)

    def alarm(self, step: int, alarm: Alarm) -> None:
        """A line of alarms.jsonl."""
        if hosts.is_first():
            file, row = self.run_dir / ALARMS, {"step": step, **dataclasses.asdict(alarm)}
            write_jsonl(file, [*read_jsonl(file), row])
            self._tell("alarm", step, row)

    @property
    def keeps_skipped(self) -> bool:
        """Whether there is room for what another skipped update was made from."""
        folder = self.run_dir / "skipped"
        num = len(list(folder.glob("*.npz"))) if folder.is_dir() else 0
        return hosts.of_first(num < SKIPPED_KEPT)

    def skipped(self, step: int, arrays: Any, texts: list[dict[str, Any]]) -> str:
        """What a skipped update was made from: arrays by their names in `TrainBatch` and `Packs`, in numpy's
        format, and readable completions.

        Returns:
            Where it is.
        """
        folder = self.run_dir / "skipped"
        name = f"step_{step:06d}"
        if hosts.is_first():
            make_folder(folder)
            leaves = jax.tree_util.tree_leaves_with_path(arrays)
            named = {"/".join(str(key).strip(".[]") for key in path[1:]): x for path, x in leaves}
            content = io.BytesIO()
            np.savez_compressed(content, **named)
            write_whole(folder / f"{name}.npz", content.getvalue())
            if texts:
                write_jsonl(folder / f"{name}.jsonl", texts)
        return str(folder / f"{name}.npz")

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Readable samples of an iteration."""
        if hosts.is_first():
            file = self.run_dir / "rollouts" / f"step_{step:06d}.jsonl"
            write_jsonl(file, rows)
            if self._writers is not None:
                # Read again when its turn comes: rows that wait for a stuck writer would fill the memory.
                self._writers.put("rollouts", step, functools.partial(read_jsonl, file))

    def evaluation(self, step: int, results: Metrics, samples: list[dict[str, Any]]) -> None:
        """What a held-out evaluation of the student has found, and answers to read."""
        if (accuracy := headline(results)) is not None:
            self.checkpoints.accuracies[step] = accuracy
        if hosts.is_first():
            name = f"step_{step:06d}"
            about = {"step": step, "settings": model_digest(self._config, "student")}
            write_evaluation(self.run_dir / "eval", name, about | results, {name: samples})
            self._tell("evaluation", step, results)

    def has_teacher(self, role: str) -> bool:
        """Whether a teacher has been evaluated, as these settings have it."""
        return hosts.of_first(read_teacher(self._config, self.run_dir, role) is not None)

    def teacher(self, role: str, results: Metrics, samples: list[dict[str, Any]]) -> None:
        """What a held-out evaluation of a teacher has found, and answers to read."""
        if hosts.is_first():
            about = {"settings": model_digest(self._config, role)}
            write_evaluation(self.run_dir / "eval", role, about | results, {role: samples})
            self._tell(role, 0, results)

    def _tell(self, kind: str, step: int, values: Any) -> None:
        """The writers of log.writers, of something that is in a file; kinds are those of `writers`."""
        if self._writers is not None:
            self._writers.put(kind, step, lambda: values)

    def notes(self) -> list[str]:
        """What writers have to say since they were last asked."""
        return self._writers.notes() if self._writers is not None else []

    def done(self, step: int) -> None:
        """The run is complete."""
        self._status = "finished"
        if hosts.is_first():
            write_json(self.run_dir / "done.json", {"step": step})

    def close(self, *, failed: bool = False) -> None:
        """Waits for what is being written, a little for writers of log.writers. Raises as `save`.

        Args:
            failed: an error ends the run.
        """
        with contextlib.ExitStack() as all_of_them:
            if self._writers is not None:
                all_of_them.callback(self._writers.close, "failed" if failed else self._status)
            if self._writer is not None:
                all_of_them.callback(self._writer.close)
            with _told():
                self.checkpoints.close()


def write_evaluation(
    folder: Path, name: str, results: Metrics, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """`NAME.json`, and `samples/MODEL.jsonl` for each model of which there are some. The results are written
    last: where they are, the evaluation is whole."""
    for model, rows in samples.items():
        if rows:
            write_jsonl(folder / "samples" / f"{model}.jsonl", rows)
    write_json(folder / f"{name}.json", results)


def headline(results: Metrics) -> float | None:
    """The accuracy by which checkpoints are compared: of samples, or else greedy."""
    return results.get("sampled/accuracy", results.get("greedy/accuracy"))


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with the defaults of settings that there were none of when it was saved."""
    with contextlib.suppress(ValueError):
        return Config.model_validate(config).model_dump(mode="json")
    return config


def read_teacher(config: Config, run_dir: Path, role: str) -> Metrics | None:
    """What training has found of a teacher; None if that is not there, cannot be read, or is of other
    settings (another teacher, other questions)."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        results: Metrics = read_json(run_dir / "eval" / f"{role}.json")
        if results["settings"] == model_digest(config, role):
            return results
    return None


def read_accuracies(config: Config, run_dir: Path, last_step: int) -> dict[int, float]:
    """By step, of the student's evaluations that are there, can be read, and are of these settings."""
    found, settings = {}, model_digest(config, "student")
    for file in files_of_steps(run_dir / "eval", "json").values():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            results = read_json(file)
            accuracy, is_before = headline(results), results["step"] <= last_step
            if accuracy is not None and is_before and results["settings"] == settings:
                found[int(results["step"])] = float(accuracy)
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What keeps checkpoints from being written, as a TrainingError."""
    try:
        yield
    except Exception as error:
        # Orbax and tensorstore below it have many errors for disks and buckets.
        line = " ".join(str(error).split())
        if len(line) > 300:  # names of files that are being written, and the reason at the end
            line = f"{line[:120]} … {line[-160:]}"
        raise TrainingError(f"the checkpoint could not be written: {line}") from error
