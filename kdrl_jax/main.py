"""`python -m kdrl_jax.main [COMMAND] --config FILE_OR_RUN_DIR [option=value ...] [section.key=value ...]`.

COMMAND is train (if none is given), eval, sample, plan, export or report.

The only reader of argv and the environment, reward workers aside. What concerns one command is imported by
it, so that a misspelt key is answered at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # Until a command says what it means, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from kdrl_jax.config import (
    COMMANDS,
    Config,
    ConfigError,
    EvalOptions,
    ExportOptions,
    ReportOptions,
    SampleOptions,
    config_for_model,
    load_config,
    load_run_config,
    options_help,
    read_options,
)
from kdrl_jax.config.base import Section
from kdrl_jax.config.job import Hosts, read_hosts
from kdrl_jax.config.load import RUN_CONFIG
from kdrl_jax.paths import as_path, check_bucket, is_outage, is_passing
from kdrl_jax.preemption import GOOGLE, GoogleNotice
from kdrl_jax.signals import Ended, StopRequest, end_on_signals
from kdrl_jax.types import TrainingError
from kdrl_jax.watch import Watch

if TYPE_CHECKING:
    from rich.console import Console

USAGE_ERROR = 2


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
    hosts: Hosts | None
    """Of a job of several processes; None for a process alone."""
    options: Section | None
    """The command's own options, if it has any."""
    overrides: list[str]
    accept_changes: bool
    """Of a run that was begun with settings of another meaning."""


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
        help="a YAML file, or a run; eval, sample and export also take a Hugging Face folder or a .gguf file",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="train: go on with a run under settings that change what its updates are",
    )
    parser.add_argument(
        "--coordinator",
        metavar="auto|HOST:PORT",
        help="of a job on several hosts, started on each: `auto` on TPU pods, GKE and Slurm, elsewhere "
        "an address of the first host and a free port, with the next two",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="of the job, one on each host")
    parser.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0")
    args = parser.parse_intermixed_args(argv)
    words: list[str] = args.words
    command = "train"
    if words and "=" not in words[0]:
        command = words.pop(0)
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; commands are {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {command!r}{hint}")
    hosts = read_hosts(args.coordinator, args.num_processes, args.process_id)
    if hosts is not None and command not in ("train", "eval"):
        raise ConfigError(f"{command} runs on one host: leave out --coordinator")
    if args.accept_changes and command != "train":
        raise ConfigError(f"--accept-changes is about training; {command} changes no run")
    kind = COMMANDS[command]
    options, overrides = (None, words) if kind is None else read_options(command, kind, words)
    return Invocation(command, args.config, hosts, options, overrides, args.accept_changes)


def load(call: Invocation) -> tuple[Config, bool]:
    """The config, and whether it is that of an existing run.

    Raises:
        ConfigError: with one line for the user.
        OSError: a bucket that is not there, or may not be read, of the config or of its run.
    """
    check_bucket(call.config)
    config, is_run = _load(call, as_path(call.config))
    check_bucket(config.run_dir)
    return config, is_run


def _load(call: Invocation, path: Path) -> tuple[Config, bool]:
    # Commands that train nothing take a model as it is.
    if call.command in ("eval", "sample", "export") and _is_model(path):
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


def run_train(config: Config, stop: StopRequest, accept_changes: bool) -> int:
    from kdrl_jax import hosts
    from kdrl_jax.progress import make_console
    from kdrl_jax.report import report
    from kdrl_jax.runs import is_complete
    from kdrl_jax.train import train

    console = make_console(quiet=not hosts.is_first())
    if hosts.of_first(is_complete(config)):
        console.print(f"{config.run_dir} is complete; raise train.num_steps to go on", highlight=False)
    _speak_above(stop, console)
    if not train(config, console, stop, accept_changes=accept_changes):
        return stop.status
    if hosts.is_first():
        report(as_path(config.run_dir), console)
    return 0


def run_eval(config: Config, options: EvalOptions, stop: StopRequest, is_run: bool) -> int:
    from kdrl_jax import hosts
    from kdrl_jax.eval import evaluate
    from kdrl_jax.progress import make_console

    console = make_console(quiet=not hosts.is_first(), lasting=True)
    _speak_above(stop, console)
    return 0 if evaluate(config, options, console, stop, is_run=is_run) else stop.status


def _speak_above(stop: StopRequest, console: "Console") -> None:
    """On a terminal: what it says stands above what is drawn there over and over, which would hide it."""
    if console.is_terminal:
        stop.tell = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def run_plan(config: Config) -> int:
    from kdrl_jax.plan.command import plan
    from kdrl_jax.progress import make_console
    from kdrl_jax.rollout.engine import Stopped

    stop = StopRequest("ending after the program that is compiled now")
    stop.install()
    flags = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    try:
        return 0 if plan(config, make_console(), stop, flags) else 1
    except Stopped:
        raise Ended(stop.signal or signal.SIGINT) from None
    finally:
        stop.close()


def run_report(config: Config, options: ReportOptions) -> None:
    from kdrl_jax.progress import make_console
    from kdrl_jax.report import report

    for path in (*options.others, *([options.out] if options.out else [])):
        check_bucket(path)
    others = [as_path(path) for path in options.others]
    out = as_path(options.out) if options.out else None
    report(as_path(config.run_dir), make_console(), others=others, out=out)


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
    from kdrl_jax.export import export
    from kdrl_jax.progress import make_console

    export(config, options, make_console(), is_run=is_run)


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


def _repeat_exactly(config: Config) -> None:
    """Before JAX starts: no kernels whose sums depend on the order of threads, and none that were chosen by
    their times."""
    if config.deterministic:
        flags = "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _keep_programs(config: Config) -> None:
    """Compiled programs are kept in `cache_dir`, unless JAX was told where to; apart by what the CPU
    can do, since those of a CPU run on no other."""
    import jax

    if config.cache_dir is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = as_path(config.cache_dir) / "xla"
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


def _join(job: Hosts, config: Config) -> Watch:
    """Meets the other processes of the job and begins to watch them.

    Raises:
        ConfigError, TrainingError: with one line for the user.
    """
    import jax

    from kdrl_jax.hosts import text_of_first

    limit = config.mesh.host_timeout_s
    # Signals are asked about by all hosts together, in `hosts.agreed`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            # Should this process itself stand still: later than the watch, which says more.
            heartbeat_timeout_seconds=int(2 * limit),
        )
    except (ValueError, RuntimeError) as error:
        if job.coordinator is None and "should be defined" in str(error):
            raise ConfigError(
                "--coordinator auto: neither a TPU pod nor a GKE or Slurm job is found here; give HOST:PORT "
                "of the first host, with --num-processes and --process-id"
            ) from error
        raise TrainingError(f"the job's processes did not meet: {str(error).splitlines()[0]}") from error
    try:
        return Watch(jax.process_index(), jax.process_count(), text_of_first, host=job.host, timeout_s=limit)
    except OSError as error:
        raise TrainingError(str(error)) from error


def _run(call: Invocation) -> int:
    config, is_run = load(call)
    if call.command == "plan":
        _compile_for_tpus()
    elif call.command != "report":
        _take_cpu_apart(config)
        _repeat_exactly(config)
        _keep_programs(config)
    if call.hosts is None:
        return _run_command(call, config, is_run)
    watch: Watch | None = None
    try:
        watch = _join(call.hosts, config)
        status = _run_command(call, config, is_run)
    except BaseException as error:
        line, status = explain(error) or (f"a bug: {error!r}", 1)
        if explain(error) is None:
            traceback.print_exc()
        if watch is not None:
            watch.failed(line, status)
        print(f"error: {line}", file=sys.stderr, flush=True)
        # Not by way of JAX, which would wait for the others.
        os._exit(status)
    watch.done()
    return status


def _check_alone() -> None:
    import jax

    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is one of {jax.process_count()} hosts of a TPU slice: start the same command with "
            "--coordinator auto on all of them, as tpu/run.sh does"
        )


def _run_command(call: Invocation, config: Config, is_run: bool) -> int:
    if isinstance(call.options, SampleOptions):
        with end_on_signals():
            run_sample(config, call.options, is_run)
        return 0
    if isinstance(call.options, ExportOptions):
        with end_on_signals():
            run_export(config, call.options, is_run)
        return 0
    if isinstance(call.options, ReportOptions):
        with end_on_signals():
            run_report(config, call.options)
        return 0
    if call.command == "plan":
        return run_plan(config)
    _check_alone()
    if isinstance(call.options, EvalOptions):
        # What is done is written by then: nothing has to be saved within some time.
        stop = StopRequest("ending after the batch that is running now; what is done is written")
    else:
        stop = StopRequest(within_s=config.checkpoint.stop_within_s)
    stop.install()
    notice = None
    try:
        if call.command == "train" and config.checkpoint.preemption_notice == "google":
            server = os.environ.get("GCE_METADATA_HOST", GOOGLE)
            notice = GoogleNotice(functools.partial(stop.ask, notice=True), server)
        if isinstance(call.options, EvalOptions):
            return run_eval(config, call.options, stop, is_run)
        return run_train(config, stop, call.accept_changes)
    finally:
        if notice is not None:
            notice.close()
        stop.close()


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line for the user, and the exit status; None for a bug, or if the user wants to see where."""
    if os.environ.get("KDRL_TRACEBACK"):
        return None
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        error = TrainingError(
            f"out of device memory ({str(error).splitlines()[0]}); while sampling, lower "
            "rollout.slots_per_device or rollout.max_new_tokens, or raise mesh.tensor; while "
            "updating, lower train.microbatch_rows or train.pack_length, or raise train.remat"
        )
    if not (is_outage(error) or isinstance(error, (ValueError, ImportError, TrainingError))):
        return None
    # Most are mistakes in what was given, which no other try mends. One line says so; the variable shows the
    # rest.
    hint = "" if isinstance(error, ConfigError) else " (KDRL_TRACEBACK=1 shows where)"
    line = f"{' '.join(str(error).split())}{hint}"
    return line, 1 if isinstance(error, TrainingError) or is_passing(error) else USAGE_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        return _run(parse(sys.argv[1:] if argv is None else argv))
    except Ended as ended:
        return 128 + ended.signal
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        line, status = said
        print(f"error: {line}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
