"""The faults that benchmarks/mutations.py puts in still fit the code, so that it can be run at any time."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from mutations import FAULTS  # noqa: E402


def test_every_fault_has_one_place():
    wrong = {
        fault.name: number
        for fault in FAULTS
        if (number := (ROOT / "kdrl_jax" / fault.file).read_text().count(fault.old)) != 1
    }
    assert wrong == {}, "how often the text that a fault replaces is there"


def test_every_fault_names_tests_that_are_there():
    files = {fault.tests.split()[0] for fault in FAULTS}
    assert [name for name in files if not (ROOT / "tests" / name).exists()] == []
