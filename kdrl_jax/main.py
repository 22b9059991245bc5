"""`python -m kdrl_jax.main [COMMAND] --config FILE_OR_RUN_DIR [option=value ...] [section.key=value ...]`.

COMMAND is train (if none is given), eval, sample, plan, export or report.

The only reader of argv and the environment. What concerns one command is imported by it, so that a
misspelt key is answered at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

if __name__ == "__main__":
    # Until a command says what it means, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from kdrl_jax.config import (
    COMMANDS,
    Config,
    ConfigError,
    ExportOptions,
    SampleOptions,
    config_for_model,
    load_config,
    load_run_config,
    options_help,
    read_options,
)
from kdrl_jax.config.base import Section
from kdrl_jax.config.load import RUN_CONFIG
from kdrl_jax.types import TrainingError

USAGE_ERROR = 2


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to save and end; a second one ends it at once."""

    def __init__(self, says: str = "saving after what is running now") -> None:
        """Nothing happens before `install`.

        Args:
            says: what will be done about it.
        """
        self.signal: int | None = None
        self._says = says

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        # os.write, because a signal may arrive in the middle of a print.
        os.write(2, f"\n{name}: {self._says}; once more ends at once\n".encode())

    def __call__(self) -> bool:
        return self.signal is not None


class Ended(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a command that keeps nothing of what it has begun."""

    def __init__(self, number: int):
        self.signal = number


def end_on_signals() -> None:
    """Lets Ctrl-C and SIGTERM raise `Ended` wherever the program is."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        # Raised in a callback of the garbage collector, it ended nothing: once more, elsewhere.
        if isinstance(what.exc_value, Ended):
            again = (threading.main_thread().ident, what.exc_value.signal)
            threading.Timer(0.01, signal.pthread_kill, again).start()
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = unraisable
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


class _Parser(argparse.ArgumentParser):
    """A mistake is one line and an exception, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What the command line says."""

    command: str
    config: str
    """The path after --config."""
    options: Section | None
    """The command's own options, if it has any."""
    overrides: list[str]


def parse(argv: Sequence[str]) -> Invocation:
    """The command line. Raises ConfigError with one line for the user."""
    parser = _Parser(
        prog="python -m kdrl_jax.main",
        description="Post-train a language model by KDRL: distillation and reinforcement learning in one.",
        epilog=options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar=f"[{'|'.join(COMMANDS)}] [option=value ...] [section.key=value ...]"
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE_OR_RUN_DIR",
        help="a YAML file, or a run; sample and export also take a Hugging Face folder or a .gguf file",
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
    kind = COMMANDS[command]
    if kind is None:
        return Invocation(command, args.config, None, words)
    options, overrides = read_options(command, kind, words)
    return Invocation(command, args.config, options, overrides)


def load(call: Invocation) -> tuple[Config, bool]:
    """The config, and whether it is that of an existing run.

    Raises:
        ConfigError: with one line for the user.
    """
    path = Path(call.config)
    # Commands that train nothing take a model as it is.
    if call.command in ("sample", "export") and _is_model(path):
        return config_for_model(path, call.overrides), False
    if path.is_dir():
        return load_run_config(path, call.overrides), True
    return load_config(path, call.overrides), False


def _is_model(path: Path) -> bool:
    """Whether it is a model's folder or .gguf file; raises ConfigError for a folder that is nothing."""
    if not path.is_dir():
        return path.suffix == ".gguf" and path.is_file()
    if (path / RUN_CONFIG).exists():
        return False
    if (path / "config.json").exists() or any(path.glob("*.gguf")):
        return True
    raise ConfigError(
        f"{path}: neither {RUN_CONFIG} (a run) nor config.json (a Hugging Face model) in this directory; "
        "give a config file, a run, a model's folder or a .gguf file"
    )


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


def run_plan(config: Config) -> int:
    from rich.console import Console

    from kdrl_jax.plan.command import plan
    from kdrl_jax.rollout.engine import Stopped

    stop = StopRequest("ending after the program that is compiled now")
    stop.install()
    flags = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    try:
        return 0 if plan(config, Console(), stop, flags) else 1
    except Stopped:
        raise Ended(stop.signal or signal.SIGINT) from None


def run_report(config: Config, stop: StopRequest, is_run: bool) -> int:
    from rich.console import Console

    from kdrl_jax.report import report

    report(Path(config.run_dir), Console())
    return 0


def run_sample(config: Config, options: SampleOptions, is_run: bool) -> None:
    from kdrl_jax.sample import sample

    # As in a shell's $(...), the line break that ends a file is no part of the text.
    question = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    try:
        sample(config, options, question, is_run=is_run, out=sys.stdout, err=sys.stderr)
    except BrokenPipeError:
        # The reader (`| head -1`) has enough. What is still buffered must find no pipe at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_export(config: Config, options: ExportOptions, is_run: bool) -> None:
    from rich.console import Console

    from kdrl_jax.export import export

    export(config, options, Console(), is_run=is_run)


def _take_cpu_apart(config: Config) -> None:
    """Before JAX starts its devices, which are then what they are."""
    number = config.mesh.cpu_devices
    if number is None:
        return
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        if jax.default_backend() == "cpu" and jax.device_count() != number:
            raise ConfigError(
                f"mesh.cpu_devices={number}, but JAX has started with {jax.device_count()} in this process"
            ) from None


def _keep_programs(config: Config) -> None:
    """Compiled programs are kept in `cache_dir`, unless JAX was told where to; apart by what the CPU
    can do, since those of a CPU run on no other."""
    import jax

    if config.cache_dir is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = Path(config.cache_dir).expanduser() / "xla"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((x for x in cpuinfo.read_text().splitlines() if x.startswith(("flags", "Features"))), "")
        folder = folder / hashlib.sha256(flags.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _compile_for_tpus() -> None:
    """Before JAX starts: libtpu asks no metadata server, may be loaded beside another process's, and no
    device of this host is taken."""
    import jax

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    with contextlib.suppress(RuntimeError):  # started already, in a process that runs several commands
        jax.config.update("jax_platforms", "cpu")


def _run(call: Invocation) -> int:
    config, is_run = load(call)
    if call.command == "plan":
        _compile_for_tpus()
    elif call.command != "report":
        _take_cpu_apart(config)
        _keep_programs(config)
    if call.options is not None:
        end_on_signals()
        if isinstance(call.options, SampleOptions):
            run_sample(config, call.options, is_run)
        elif isinstance(call.options, ExportOptions):
            run_export(config, call.options, is_run)
        return 0
    if call.command == "plan":
        return run_plan(config)
    commands: dict[str, Callable[[Config, StopRequest, bool], int]] = {
        "train": run_train,
        "eval": run_eval,
        "report": run_report,
    }
    stop = StopRequest()
    stop.install()
    return commands[call.command](config, stop, is_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        try:
            return _run(parse(sys.argv[1:] if argv is None else argv))
        except RuntimeError as error:
            if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
                raise TrainingError(
                    f"out of device memory ({str(error).splitlines()[0]}); while sampling, lower "
                    "rollout.slots_per_device or rollout.max_new_tokens, or raise mesh.tensor; while "
                    "updating, lower train.microbatch_rows or train.pack_length, or raise train.remat"
                ) from error
            raise
    except Ended as ended:
        return 128 + ended.signal
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if os.environ.get("KDRL_TRACEBACK"):
            raise
        # Most are mistakes in what was given. One line says so; the variable shows the rest.
        hint = "" if isinstance(error, ConfigError) else " (KDRL_TRACEBACK=1 shows where)"
        print(f"error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
