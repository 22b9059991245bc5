"""`python -m kdrl_jax.main [train|eval|report] --config FILE_OR_RUN_DIR [section.key=value ...]`.

The only reader of argv and the environment. What concerns one command is imported by it, so that a
misspelt key is answered at once.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kdrl_jax.config import Config, ConfigError, load_config, load_run_config
from kdrl_jax.types import TrainingError

COMMANDS = ("train", "eval", "report")
USAGE_ERROR = 2


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to save and end; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        # os.write, because a signal may arrive in the middle of a print.
        os.write(2, f"\n{name}: saving after what is running now; once more ends at once\n".encode())

    def __call__(self) -> bool:
        return self.signal is not None


class _Parser(argparse.ArgumentParser):
    """A mistake is one line and an exception, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")


def parse(argv: Sequence[str]) -> tuple[str, str, list[str]]:
    """Command, config path and overrides."""
    parser = _Parser(
        prog="python -m kdrl_jax.main",
        description="Post-train a language model by KDRL: distillation and reinforcement learning in one.",
    )
    parser.add_argument("words", nargs="*", metavar="[train|eval|report] [section.key=value ...]")
    parser.add_argument(
        "--config", required=True, metavar="FILE_OR_RUN_DIR", help="a YAML file, or a run to go on with"
    )
    args = parser.parse_intermixed_args(argv)
    words: list[str] = args.words
    command = "train"
    if words and "=" not in words[0]:
        command = words.pop(0)
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; commands are {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {command!r}{hint}")
    return command, args.config, words


def load(path: str, overrides: Sequence[str]) -> Config:
    return load_run_config(path, overrides) if Path(path).is_dir() else load_config(path, overrides)


def run_train(config: Config, stop: StopRequest, is_run: bool) -> int:
    from rich.console import Console

    from kdrl_jax.report import report
    from kdrl_jax.runs import is_complete
    from kdrl_jax.train import train

    console = Console()
    if is_complete(config):
        console.print(f"{config.run_dir} is complete; raise train.num_steps to go on", highlight=False)
    if not train(config, console, stop, resume=is_run):
        return 128 + (stop.signal or 0)
    report(Path(config.run_dir), console)
    return 0


def run_eval(config: Config, stop: StopRequest, is_run: bool) -> int:
    from rich.console import Console

    from kdrl_jax.eval import evaluate

    return 0 if evaluate(config, Console(), stop, is_run=is_run) else 128 + (stop.signal or 0)


def run_report(config: Config, stop: StopRequest, is_run: bool) -> int:
    from rich.console import Console

    from kdrl_jax.report import report

    report(Path(config.run_dir), Console())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    commands: dict[str, Callable[[Config, StopRequest, bool], int]] = {
        "train": run_train,
        "eval": run_eval,
        "report": run_report,
    }
    stop = StopRequest()
    try:
        command, path, overrides = parse(sys.argv[1:] if argv is None else argv)
        config = load(path, overrides)
        stop.install()
        try:
            return commands[command](config, stop, Path(path).is_dir())
        except RuntimeError as error:
            if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
                raise TrainingError(
                    f"out of device memory ({str(error).splitlines()[0]}); lower train.microbatch_rows, "
                    "rollout.group_size or rollout.max_new_tokens, or set train.remat=true"
                ) from error
            raise
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if os.environ.get("KDRL_TRACEBACK"):
            raise
        # Most are mistakes in what was given. One line says so; the variable shows the rest.
        hint = "" if isinstance(error, ConfigError) else " (KDRL_TRACEBACK=1 shows where)"
        print(f"error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
