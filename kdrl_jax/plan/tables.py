"""A plan as tables for people, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kdrl_jax.plan.cost import LEFT_OUT
from kdrl_jax.plan.fit import ENOUGH, Plan
from kdrl_jax.plan.programs import ROLLOUT, SCORE, UPDATE, Lengths
from kdrl_jax.plan.walk import KERNEL_SHARE

GIB = 2.0**30
COLUMNS = (
    "program",
    "GiB: given",
    "temp",
    "besides",
    "peak",
    "of chip",
    "TFLOP",
    "GB",
    "GB sent",
    "seconds",
    "runs",
    "MFU",
)


def program_rows(plan: Plan) -> list[list[str]]:
    """A row for each program, on each chip."""
    rows = []
    for m in plan.programs:
        sent = sum(c["bytes"] for c in m.collectives)
        rows.append(
            [
                m.name,
                _number(m.arguments / GIB),
                _number(m.temporaries / GIB),
                _number(m.resident / GIB),
                _number(m.peak / GIB),
                f"{m.peak / plan.chip.memory:.0%}",
                _number(m.flops / 1e12),
                _number(m.bytes / 1e9),
                _number(sent / 1e9),
                f"{m.seconds:.3g}",
                f"{m.runs:.3g}",
                f"{m.model_flops / plan.chip.flops / m.seconds:.1%}" if m.seconds > 0 else "",
            ]
        )
    return rows


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
    out = dict.fromkeys((ROLLOUT, SCORE, UPDATE), 0.0)
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
    return [
        f"{plan.topology} ({plan.num_chips} devices): {verdict}: at most {plan.peak / GIB:.2f} of "
        f"{plan.chip.memory / GIB:.2f} GiB ({plan.peak / plan.chip.memory:.0%}; at most {ENOUGH:.0%} "
        "should be filled)",
        f"slots on each device: {plan.slots}; an iteration is estimated at {total:.3g} s ({parts}), with "
        f"prompts of {lengths.prompt} and completions of {lengths.completion} tokens in the mean",
        f"the update's model-FLOPs utilisation is estimated at {update_utilisation(plan):.1%}",
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
                f"{plan.peak / GIB:.2f} of {plan.chip.memory / GIB:.2f}",
                str(plan.slots),
                *(f"{seconds[phase]:.3g}" for phase in (ROLLOUT, SCORE, UPDATE)),
                f"{sum(seconds.values()):.3g}",
                f"{update_utilisation(plan):.1%}",
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
        "All of it is compiled, nothing was run: sizes are the compiler's, times are estimates. Given: "
        "arguments. Besides: what else lives there. GB: from and to the main memory. Runs: in an iteration.",
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


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "topology": plan.topology,
        "chip": dataclasses.asdict(plan.chip),
        "devices": plan.num_chips,
        "fits": plan.fits,
        "problem": plan.problem,
        "peak_bytes": plan.peak,
        "slots": plan.slots,
        "seconds": seconds_of(plan),
        "update_utilisation": update_utilisation(plan),
        "programs": [dataclasses.asdict(m) for m in plan.programs],
    }


def _number(x: float) -> str:
    return f"{x:.4g}" if x >= 100 else f"{x:.2f}"
