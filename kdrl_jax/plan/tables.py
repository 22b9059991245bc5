"""A plan as tables for people, and as JSON."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.cost import LEFT_OUT
from kdrl_jax.plan.fit import ENOUGH, Plan
from kdrl_jax.plan.measure import Measured
from kdrl_jax.plan.programs import LOG, ROLLOUT, SCORE, UPDATE, Lengths
from kdrl_jax.plan.walk import KERNEL_SHARE

GIB = 2.0**30


def program_columns(plan: Plan) -> list[str]:
    return ["", *(m.name for m in plan.programs)]


def program_rows(plan: Plan) -> list[list[str]]:
    """What is known of each program on each chip, a column each."""
    rows: dict[str, Callable[[Measured], str]] = {
        "arguments, GiB": lambda m: _number(m.arguments / GIB),
        "temporaries, GiB": lambda m: _number(m.temporaries / GIB),
        "besides, GiB": lambda m: _number(m.resident / GIB),
        "peak, GiB": lambda m: _number(m.peak / GIB),
        "peak, of the chip": lambda m: share_of_chip(m.peak, plan.chip),
        "TFLOP": lambda m: _number(m.flops / 1e12),
        "read and written, GB": lambda m: _number(m.bytes / 1e9),
        "sent, GB": lambda m: _number(sum(c["bytes"] for c in m.collectives) / 1e9),
        "seconds": lambda m: _seconds(m.seconds),
        "the compiler's": lambda m: _seconds(m.compiler_seconds),
        "runs": lambda m: f"{m.runs:.3g}",
        "MFU": lambda m: f"{m.model_flops / plan.chip.flops / m.seconds:.1%}" if m.seconds > 0 else "",
    }
    return [[label, *map(cell, plan.programs)] for label, cell in rows.items()]


def collective_rows(plan: Plan) -> list[list[str]]:
    return [
        [
            m.name,
            c["kind"],
            str(c["group_size"]),
            f"{c['count']:.0f}",
            _number(c["bytes"] / 1e9),
            f"{c['seconds']:.3g}",
        ]
        for m in plan.programs
        for c in m.collectives
    ]


def seconds_of(plan: Plan) -> dict[str, float]:
    """Of an iteration, by phase."""
    out = dict.fromkeys((ROLLOUT, SCORE, UPDATE, LOG), 0.0)
    for m in plan.programs:
        out[m.phase] += m.seconds * m.runs
    return out


def update_utilisation(plan: Plan) -> float:
    """Model FLOPs of the update over what the chip could do in its time."""
    update = next((m for m in plan.programs if m.name == "update"), None)
    return float("nan") if update is None else update.model_flops / plan.chip.flops / update.seconds


def summary(plan: Plan, lengths: Lengths) -> list[str]:
    """What a person wants to know first."""
    if plan.problem is not None:
        return [f"{plan.topology}: does not fit: {plan.problem}"]
    verdict = "fits" if plan.fits else "does not fit"
    seconds = seconds_of(plan)
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items() if value)
    lines = [
        f"{plan.topology} ({plan.num_chips} devices): {verdict}: at most {_number(plan.peak / GIB)} of "
        f"{plan.chip.memory / GIB:.2f} GiB ({share_of_chip(plan.peak, plan.chip)}; at most {ENOUGH:.0%} "
        "should be filled)",
    ]
    took = (
        f"traced and lowered in {plan.lowering_seconds:.3g} s, compiled in {plan.compile_seconds:.3g} s, but "
        "for tables kept from before"
    )
    slots = f"slots on each device: {plan.slots}"
    if not math.isfinite(total):
        refused = ", ".join(m.name for m in plan.programs if not math.isfinite(m.seconds))
        return [*lines, f"{slots}; no time is estimated, since the compiler refuses {refused}", took]
    return [
        *lines,
        f"{slots}; an iteration is estimated at {total:.3g} s ({parts}), with "
        f"prompts of {lengths.prompt} and completions of {lengths.completion} tokens in the mean",
        f"the update's model-FLOPs utilisation is estimated at {update_utilisation(plan):.1%}",
        took,
    ]


def comparison_rows(plans: Sequence[Plan]) -> list[list[str]]:
    rows = []
    for plan in plans:
        if plan.problem is not None:
            rows.append([plan.topology, str(plan.num_chips), "no", *[""] * 6])
            continue
        seconds = seconds_of(plan)
        rows.append(
            [
                plan.topology,
                str(plan.num_chips),
                "yes" if plan.fits else "no",
                f"{_number(plan.peak / GIB)} of {plan.chip.memory / GIB:.2f}",
                str(plan.slots),
                *(_seconds(seconds[phase]) for phase in (ROLLOUT, SCORE, UPDATE)),
                _seconds(sum(seconds.values())),
                "" if math.isnan(update_utilisation(plan)) else f"{update_utilisation(plan):.1%}",
            ]
        )
    return rows


SENT = ("program", "kind", "chips together", "times", "GB", "seconds on the network")

COMPARISON = (
    "slice",
    "devices",
    "fits",
    "peak, GiB",
    "slots",
    "rollout, s",
    "score, s",
    "update, s",
    "iteration, s",
    "utilisation",
)


def footnotes() -> list[str]:
    return [
        "All of it is compiled, nothing was run: sizes are the compiler's, times are estimates. Besides: "
        "what else lives there. Read and written: of the main memory. The compiler's: the seconds if all "
        "that it estimates took so long. Runs: in an iteration; its completions are spread evenly "
        "about their mean.",
        "Utilisation (MFU): model FLOPs (2 for each parameter a token meets and 4 N H for each key it sees, "
        "three times that with gradients; nothing computed again; PaLM, arXiv 2204.02311, appendix B, with "
        "causal attention counted as it is) over the chip's peak in bfloat16 and the estimated seconds.",
        f"Pallas kernels are taken to reach {KERNEL_SHARE:.0%} of the peak where operations bound them; "
        "attention's are taken to do all blocks up to the diagonal.",
        f"Left out: {'; '.join(LEFT_OUT)}.",
    ]


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def as_json(plans: Sequence[Plan]) -> str:
    """All that is known of each; null for what the compiler did not say."""
    return json.dumps([_finite(_as_dict(plan)) for plan in plans], indent=1, allow_nan=False)


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "topology": plan.topology,
        "chip": dataclasses.asdict(plan.chip),
        "devices": plan.num_chips,
        "fits": plan.fits,
        "problem": plan.problem,
        "peak_bytes": plan.peak,
        "slots": plan.slots,
        "seconds": seconds_of(plan),
        "lowering_seconds": plan.lowering_seconds,
        "compile_seconds": plan.compile_seconds,
        "update_utilisation": update_utilisation(plan),
        "programs": [dataclasses.asdict(m) for m in plan.programs],
    }


def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, tree)


def share_of_chip(size: float, chip: Chip) -> str:
    return f"{size / chip.memory:.0%}" if math.isfinite(size) else "> 100%"


def _number(x: float) -> str:
    """Nothing for what the compiler did not say."""
    if math.isinf(x):
        return "too much"
    return "" if math.isnan(x) else f"{x:.4g}" if x >= 100 else f"{x:.2f}"


def _seconds(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}"
