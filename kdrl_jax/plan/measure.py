"""Compiling a run's programs, and what is read from them."""

import dataclasses
import hashlib
import json
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.cost import analyse
from kdrl_jax.plan.programs import Planned

SCOPES = ("scores", "attention", "mlp", "head", "optimizer", "weights", "embed")
"""Parts of a program whose time is told apart."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled program of a run, on each chip. Sizes are bytes, times seconds of one run."""

    name: str
    phase: str
    runs: float
    """As `Planned.runs`."""
    compile_seconds: float
    """0 where the table was kept from before."""
    arguments: float
    temporaries: float
    peak: float
    """Arguments, results that take over none, temporaries, code, and what lives there besides."""
    resident: float
    """As `Planned.resident`."""
    flops: float
    """Of the program, kernels included."""
    model_flops: float
    bytes: float
    """From and to the main memory."""
    collectives: list[dict[str, Any]]
    """kind, group_size, count, bytes, seconds."""
    seconds: float
    compiler_seconds: float
    seconds_by_kind: dict[str, float]
    seconds_by_scope: dict[str, float]
    notes: list[str]


def measure(planned: Planned, chip: Chip, topology: str, kept: Path | None, flags: str = "") -> Measured:
    """Compiles a program, or takes what was kept of the same one.

    Args:
        kept: folder of tables by program; None keeps none.
        flags: that the compiler was given.
    """
    file = None if kept is None else kept / f"{_fingerprint(planned, topology, flags)}.json"
    if file is not None and file.is_file():
        found = json.loads(file.read_text()) | {"compile_seconds": 0.0}
    else:
        found = _compile(planned, chip)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.replace(file)
    return _measured(planned, found)


def _measured(planned: Planned, found: dict[str, Any]) -> Measured:
    return Measured(
        name=planned.name,
        phase=planned.phase,
        runs=planned.runs,
        resident=planned.resident,
        peak=found.pop("own_peak") + planned.resident,
        model_flops=planned.model_flops,
        **found,
    )


def _compile(planned: Planned, chip: Chip) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = planned.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return _too_large(planned, needed, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    cost = analyse(compiled.as_text(), chip, planned.given, SCOPES)
    own = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return {
        "compile_seconds": seconds,
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "own_peak": own + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "flops": cost.flops + cost.kernel_flops,
        "bytes": cost.bytes,
        "collectives": [dataclasses.asdict(c) for c in cost.collectives],
        "seconds": cost.seconds,
        "compiler_seconds": cost.compiler_seconds,
        "seconds_by_kind": dict(cost.seconds_by_kind),
        "seconds_by_scope": dict(cost.seconds_by_scope),
        "notes": [*cost.notes, *(f"a loop of unknown length counts once: {x}" for x in cost.uncounted_loops)],
    }


def _needed(message: str) -> float | None:
    """Bytes that a program wants of a chip at least, from the compiler's refusal; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMG]) of", message) or re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMG])\)", message
    )
    if found is None:
        return float("inf")
    return float(found.group(1)) * 2.0 ** {"K": 10, "M": 20, "G": 30}[found.group(2)]


def _too_large(planned: Planned, needed: float, seconds: float) -> dict[str, Any]:
    nan = float("nan")
    return {
        "compile_seconds": seconds,
        "arguments": nan,
        "temporaries": nan,
        "own_peak": needed,
        "flops": nan,
        "bytes": nan,
        "collectives": [],
        "seconds": nan,
        "compiler_seconds": nan,
        "seconds_by_kind": {},
        "seconds_by_scope": {},
        "notes": ["the compiler finds no room for it"],
    }


def _fingerprint(planned: Planned, topology: str, flags: str) -> str:
    """Of all that a table depends on: the program, what it is compiled for and by, and how it is read."""
    digest = hashlib.sha256()
    parts = [planned.lowered.as_text(), topology, repr(planned.given), flags]
    parts += [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    parts += [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()[:32]
