"""How long `train` waits for its programs, with the compilation cache empty and then full.

    python benchmarks/start_up.py [CONFIG] [section.key=value ...]

Takes one step of the config twice, each in a process of its own, with one `cache_dir` that is fresh, and
counts the seconds in which JAX traced, lowered, and compiled or fetched. Of TPU programs, which
cannot be kept without their chip, `python -m kdrl_jax.main plan` says what compiling takes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = {
    "traced": "/jax/core/compile/jaxpr_trace_duration",
    "lowered": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiled or fetched": "/jax/core/compile/backend_compile_duration",
}


def train(arguments: list[str]) -> int:
    """In a process of its own: trains, and writes the seconds of each stage as the last line."""
    import jax

    seconds = dict.fromkeys(STAGES.values(), 0.0)

    def heard(event: str, duration: float, **_: object) -> None:
        if event in seconds:
            seconds[event] += duration

    jax.monitoring.register_event_duration_secs_listener(heard)
    from kdrl_jax.main import main

    status = main(arguments)
    print("\n" + json.dumps(seconds))
    return status


def start(config: str, extra: list[str], folder: Path, name: str) -> dict[str, float]:
    """Seconds by event."""
    settings = [f"cache_dir={folder}/cache", f"log.dir={folder}/{name}", "train.num_steps=1", "eval.every=0"]
    command = [sys.executable, __file__, "--child", "train", "--config", config, *settings, *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(train(sys.argv[2:]))
    config, *extra = sys.argv[1:] or ["configs/smollm2_gsm8k_cpu.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        runs = [start(config, extra, Path(folder), name) for name in ("empty", "full")]
    print(f"| {config} | cache empty, s | cache full, s | ratio |\n| --- | --- | --- | --- |")
    rows = {name: [run[event] for run in runs] for name, event in STAGES.items()}
    rows["all"] = [sum(run.values()) for run in runs]
    for name, (empty, full) in rows.items():
        print(f"| {name} | {empty:.2f} | {full:.2f} | {empty / full:.1f} |")


if __name__ == "__main__":
    main()
