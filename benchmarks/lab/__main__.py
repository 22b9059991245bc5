"""Runs what is missing of the lab, and writes its tables and pictures.

    python -m benchmarks.lab [--jobs 2] [--runs runs/lab] [--out results/lab] [--summarise]

Every finished run leaves a record in `--out`; stopped at any time, the same command goes on with the next.
`--summarise` runs nothing, and writes tables and pictures of what is there. On a GPU give `--jobs 1`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.lab.jobs import JobError
from benchmarks.lab.protocol import read_protocol
from benchmarks.lab.runner import Lab
from benchmarks.lab.summary import write_summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="for run directories")
    parser.add_argument("--out", type=Path, default=Path("results/lab"), help="for records and tables")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    lab = Lab(read_protocol(), args.runs, args.out, args.jobs, say)
    try:
        if not args.summarise:
            lab.run()
        for path in write_summary(lab):
            say(f"wrote {path}")
    except (JobError, LookupError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
