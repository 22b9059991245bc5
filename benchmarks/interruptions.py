"""Ends a run again and again, and compares what comes out with a run that was left alone.

    python benchmarks/interruptions.py kill [--times 25] [--seed 0] [--out DIR]
    python benchmarks/interruptions.py term [--times 20] [--seed 0] [--out DIR]

`kill` sends SIGKILL, at moments drawn at random: a third of them anywhere from the start of the process, a
third anywhere in its work, and a third soon after it says that it samples, scores, updates, saves or
evaluates. `term` sends SIGTERM to the quickstart, anywhere in its work, and says how long each end took and
whether the state was saved. Each goes on with the run after every end, and at last to its own end;
parameters, optimizer state, metrics (but clock readings), rollouts and evaluations must then be those of the
other run, bit for bit. Prints a line for each end, and a last one, `same` or `NOT THE SAME`.
"""

import argparse
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import yaml

from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import load_run_config
from kdrl_jax.setup import make_setup

STAGES = ("sampling", "verifying", "scoring", "measuring", "updating", "saving", "evaluating", "comparing")
SAVED_WITHIN_S = 30.0
CLOCKS = ("time/", "tokens_per_second")
TINY = {
    "name": "tiny",
    "student": {"architecture": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }},
    "teacher": {"architecture": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }},
    "tokenizer": {"kind": "char"},
    "data": {
        "train": [{"kind": "task", "task": "chain_sum", "max_terms": 3}],
        "eval": [{"kind": "task", "task": "chain_sum", "max_terms": 3, "split": "heldout"}],
        "max_prompt_tokens": 6,
    },
    "rollout": {"group_size": 4, "max_new_tokens": 32, "decode_chunk": 8},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"num_steps": 120, "prompts_per_iteration": 16, "num_minibatches": 2, "diagnostics_every": 6},
    "eval": {"every": 6, "num_prompts": 32, "num_samples": 2, "agreement": True},
    "checkpoint": {"every": 4, "keep_best": 1},
    "log": {"rollouts_every": 6},
}  # fmt: skip


class Job:
    """The run in a process of its own, on a terminal of its own, so that it shows its stages."""

    def __init__(self, options: list[str]):
        self._terminal, other = pty.openpty()
        env = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
        command = [sys.executable, "-m", "kdrl_jax.main", *options]
        self.process = subprocess.Popen(command, stdout=other, stderr=other, stdin=other, env=env)
        os.close(other)
        self.text, self.stage = "", "starting"

    def read(self, seconds: float) -> bool:
        """Listens for so long, or until the process has ended: whether it goes on."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not select.select([self._terminal], [], [], left)[0]:
                continue
            try:
                said = os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                self.process.wait()
                return False
            self.text += said
            found = re.findall("|".join(STAGES), said)
            self.stage = found[-1] if found else self.stage
        return True

    def wait_for(self, stage: str | None) -> bool:
        """Until a stage, or any, is shown: whether it came."""
        while stage != self.stage and not (stage is None and self.stage != "starting"):
            if not self.read(0.02):
                return False
        return True

    def end(self, number: int) -> float:
        """Sends a signal; seconds until the process was gone."""
        start = time.monotonic()
        self.process.send_signal(number)
        while self.read(0.1):
            if time.monotonic() - start > 10 * SAVED_WITHIN_S:
                self.process.kill()
        self.process.wait()
        return time.monotonic() - start

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._terminal)


def metrics(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def latest(run: Path) -> int | None:
    if not (run / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.latest_step
    finally:
        checkpoints.close()


def state(run: Path) -> tuple[list[np.ndarray], object]:
    checkpoints = Checkpoints(run)
    found, host, _ = checkpoints.restore(make_setup(load_run_config(run)).abstract_state())
    checkpoints.close()
    return [np.asarray(x) for x in jax.tree.leaves(found)], host["run"]


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common."""
    found = []
    for name in ("eval", "rollouts"):
        ours, theirs = (
            {file.name: file.read_bytes() for file in sorted((run / name).iterdir())} for run in (a, b)
        )
        found += [
            f"{name}/{file}" for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file)
        ]
    if metrics(a) != metrics(b):
        found.append("metrics.jsonl")
    (ours, host), (theirs, other) = state(a), state(b)
    same = len(ours) == len(theirs) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(ours, theirs, strict=True)
    )
    return found + ([] if same else ["the state"]) + ([] if host == other else ["what the host kept"])


def finish(options: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "kdrl_jax.main", *options], check=True, stdout=subprocess.DEVNULL)


def verdict(found: list[str]) -> str:
    return "same" if not found else f"NOT THE SAME: {', '.join(found)}"


def interrupt(
    number: int, options: list[str], alone: Path, run: Path, times: int, draw: random.Random
) -> bool:
    """Ends the run so many times; whether every end was as it must be."""
    good, count = True, 0
    while count < times:
        job = Job(options)
        kind = 1 if number == signal.SIGTERM else count % 3
        stage, longest = (("starting", 12.0), (None, 6.0), (draw.choice(STAGES), 0.1))[kind]
        try:
            if not job.wait_for(stage) or not job.read(draw.uniform(0, longest)):
                if job.process.returncode:
                    sys.exit(f"the run failed by itself:\n{job.text[-2000:]}")
                found = differences(alone, run)
                print(f"{count}: the run was complete before the end came, {verdict(found)}; it begins again")
                good &= not found
                subprocess.run(["rm", "-r", str(run)], check=True)
                continue
            at = job.stage
            seconds = job.end(number)
        finally:
            job.close()
        count += 1
        # Of the run, and of those inside it that are trained first.
        places = [run, *(p for p in (run / "student", run / "teacher") if p.is_dir())]
        saved, written = [latest(p) or 0 for p in places], [len(metrics(p)) for p in places]
        line = f"{count}: {signal.Signals(number).name} while {at}; gone after {seconds:.1f} s"
        line += f", exit {job.process.returncode}; metrics of {written} steps, newest checkpoint {saved}"
        if number == signal.SIGTERM:
            is_good = job.process.returncode == 143 and seconds <= SAVED_WITHIN_S and saved == written
            line += "" if is_good else "  NOT AS IT MUST BE"
            good &= is_good
        print(line, flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("how", choices=["kill", "term"])
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="kdrl_jax_interruptions_"))
    out.mkdir(parents=True, exist_ok=True)
    config = Path("configs/quickstart.yaml")
    if args.how == "kill":
        config = out / "tiny.yaml"
        config.write_text(yaml.safe_dump(TINY))
    alone, run = out / "alone", out / "interrupted"
    print(f"{config}, seed {args.seed}, in {out}", flush=True)
    finish(["--config", str(config), f"log.dir={alone}"])
    number, usual = (signal.SIGKILL, 25) if args.how == "kill" else (signal.SIGTERM, 20)
    options = ["--config", str(config), f"log.dir={run}"]
    good = interrupt(number, options, alone, run, args.times or usual, random.Random(args.seed))
    finish(options)
    found = differences(alone, run)
    print(verdict(found))
    sys.exit(0 if good and not found else 1)


if __name__ == "__main__":
    main()
