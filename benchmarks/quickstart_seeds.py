"""Runs the quickstart for several seeds and says whether its promises hold.

    python benchmarks/quickstart_seeds.py [OUT_DIR] [SEED ...]

Per seed: wall-clock minutes, held-out greedy accuracy of teacher, student before and after, and pass or
short for: at most 6 minutes, teacher at least 90 %, gain at least 25 points, at most 10 below the teacher.
"""

import json
import subprocess
import sys
import time
from pathlib import Path


def run(seed: int, out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} holds an unfinished run, whose time is not known; delete it")
    start = time.monotonic()
    options = ["--config", "configs/quickstart.yaml", f"seed={seed}", f"log.dir={out}"]
    subprocess.run([sys.executable, "-m", "kdrl_jax.main", *options], check=True)
    (out / "minutes.json").write_text(json.dumps((time.monotonic() - start) / 60))


def judge(seed: int, out: Path) -> str:
    evals = sorted((out / "eval").glob("step_*.json"))
    files = (out / "eval" / "teacher.json", evals[0], evals[-1])
    teacher, before, after = (json.loads(p.read_text())["greedy/accuracy"] for p in files)
    minutes = json.loads((out / "minutes.json").read_text())
    holds = minutes <= 6 and teacher >= 0.9 and after - before >= 0.25 and teacher - after <= 0.1
    return (
        f"| {seed} | {minutes:.1f} | {teacher:.1%} | {before:.1%} | {after:.1%} | "
        f"{100 * (after - before):+.1f} | {'pass' if holds else 'SHORT'} |"
    )


def main() -> None:
    base = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart_seeds")
    seeds = [int(s) for s in sys.argv[2:]] or [0, 1, 2]
    for seed in seeds:
        if not (base / str(seed) / "minutes.json").exists():
            run(seed, base / str(seed))
    print("| seed | minutes | teacher | student before | after | gain | |\n" + "| --- " * 7 + "|")
    for seed in seeds:
        print(judge(seed, base / str(seed)))


if __name__ == "__main__":
    main()
