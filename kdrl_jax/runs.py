"""Run directories: whether one is done, goes on with the same settings, or needs other runs first."""

from pathlib import Path
from typing import Literal

from kdrl_jax.config import Config, differences, load_config, load_run_config
from kdrl_jax.metrics import read_json

Role = Literal["student", "teacher"]


def is_complete(config: Config) -> bool:
    """Whether the run has been trained to its last step and evaluated."""
    done = Path(config.run_dir) / "done.json"
    return done.exists() and read_json(done)["step"] >= config.train.num_steps


def prerequisites(config: Config) -> list[Config]:
    """The runs that must be trained first. Each takes this run's seed and lives inside its directory, in
    `<run>/student` or `<run>/teacher`."""
    found = []
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is None or model.run is None or Path(model.run).is_dir():
            continue
        directory = Path(config.run_dir) / role
        # Without the file it came from, a run that was started goes on as it was.
        source = model.run if Path(model.run).exists() else directory / "config.yaml"
        if not Path(source).is_file():
            raise FileNotFoundError(f"{role}.run={model.run}: no such config file or run directory")
        found.append(load_config(source, fixed={"seed": config.seed, "log": {"dir": str(directory)}}))
    return found


def run_of(config: Config, role: Role) -> Path | None:
    """The run directory that a model with `run` comes from: the one named, or inside this run."""
    model = config.student if role == "student" else config.teacher
    if model is None or model.run is None:
        return None
    named = Path(model.run)
    return named if named.is_dir() else Path(config.run_dir) / role


def check_same_run(config: Config) -> None:
    """A run directory goes on with the settings it was started with, unless it is named itself."""
    if not (Path(config.run_dir) / "config.yaml").exists():
        return
    before = load_run_config(config.run_dir).model_dump(mode="json")
    now = config.model_dump(mode="json")
    before["log"]["dir"] = now["log"]["dir"]
    changed = [f"{key} was {a}, is {b}" for key, a, b in differences(before, now)]
    if changed:
        raise ValueError(
            f"{config.run_dir} was started with other settings ({'; '.join(changed[:5])}); choose another "
            f"log.dir, delete it, or go on with it by --config {config.run_dir} section.key=value"
        )
