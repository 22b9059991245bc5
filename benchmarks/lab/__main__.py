"""Runs what is missing of the lab, and writes its tables and pictures.

    python -m benchmarks.lab [--jobs 2] [--runs runs/lab] [--out results/lab] [--summarise]

Every finished run leaves a record in `--out`; stopped at any time, the same command goes on with the next.
`--summarise` runs nothing, and writes what the records are enough for so far. `--jobs` runs share a GPU.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lab.processes import JobError
from benchmarks.lab.protocol import read_protocol
from benchmarks.lab.runner import Lab
from benchmarks.lab.summary import RESULTS, write_summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=__doc__.split("\n\n")[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time (default: one for each core)")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="for run directories")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for records and tables")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # also where a shell has started it in the background
    try:
        lab = Lab(read_protocol(), args.runs, args.out, args.jobs, say)
        if not args.summarise:
            lab.run()
        written, missing = write_summary(lab)
    except (JobError, LookupError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for path in written:
        say(f"wrote {path}")
    for line in missing:
        say(f"missing: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
