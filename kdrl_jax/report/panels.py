"""What is drawn of a run, in the page and in the picture."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdrl_jax.config import Config, Schedule
from kdrl_jax.config.schedules import is_zero, value_at
from kdrl_jax.report.reading import RunFiles

MAX_AHEAD = 200
"""Points of a schedule that is still to come."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Some metrics under one title, drawn if a run has one of them."""

    title: str
    keys: tuple[str, ...]
    """In PANELS with `*` for whatever there is."""
    unit: str = ""
    alarms: tuple[str, ...] = ()
    """Names of alarms that are about these metrics."""
    is_stacked: bool = False
    """Parts of a whole, one upon another."""
    is_evaluated: bool = False
    """Of held-out evaluations, not of steps."""
    least: int = 1
    """Keys; fewer say nothing that another panel does not."""


PANELS: tuple[Panel, ...] = (
    Panel("reward", ("reward/mean", "reward/solved_frac"), alarms=("reward_collapse",)),
    Panel("held-out accuracy", ("greedy/accuracy", "sampled/accuracy"), is_evaluated=True),
    Panel("held-out: pass@k and maj@k", ("sampled/pass@*", "sampled/maj@*"), is_evaluated=True),
    Panel(
        "KL(student ‖ teacher)",
        ("kd/reverse_kl", "kd/reverse_kl_exact", "ref/reverse_kl"),
        "nats per token",
        ("teacher_mismatch",),
    ),
    Panel("KL by verdict on the answer", ("kd/reverse_kl_correct", "kd/reverse_kl_wrong"), "nats per token"),
    Panel(
        "held-out: KL on the teacher's answers",
        ("teacher_reverse_kl", "teacher_forward_kl"),
        "nats per token",
        is_evaluated=True,
    ),
    Panel("parts of the reward", ("reward/part/*",), least=2),
    Panel("completion length", ("completion/length_mean",), "tokens", ("length_blow_up",)),
    Panel("cut off, and repeating itself", ("completion/truncated_frac", "completion/repeated_4gram_frac")),
    Panel("entropy", ("entropy",), "nats per token", ("entropy_collapse",)),
    Panel("coefficients", ("rl/coef", "kd/coef", "ref/coef", "entropy/coef", "sft/coef")),
    Panel("learning rate", ("lr",)),
    Panel("gradient norms", ("grad_norm", "rl/grad_norm", "kd/grad_norm")),
    Panel("cosine of RL and KD gradients", ("grad_cosine",)),
    Panel("loss", ("loss",)),
    Panel(
        "seconds by phase",
        ("time/rollout", "time/reward", "time/teacher", "time/update", "time/diagnostics"),
        "per iteration",
        is_stacked=True,
    ),
    Panel("throughput", ("tokens_per_second",), "completion tokens per second"),
    Panel("sampler against trainer", ("sampler/logprob_gap",), "nats, mean gap"),
)
LEFT_OUT = ("sampled/pass@1",)
"""What a pattern would find, and another panel has: it is the accuracy of samples."""


def schedules(config: Config) -> dict[str, Schedule]:
    """Metric -> the schedule that it follows."""
    c = config
    return {
        "rl/coef": c.rl.coef,
        "kd/coef": c.kd.coef,
        "ref/coef": c.ref.coef,
        "entropy/coef": c.entropy.coef,
        "sft/coef": c.sft.coef,
        "lr": c.optimizer.learning_rate,
    }


def ahead(run: RunFiles) -> tuple[list[int], dict[str, list[float]]]:
    """(steps that the run has still to do, some of many; what its schedules will be there). Without those
    that are always 0."""
    last, end = run.last_step, run.config.train.num_steps
    steps = [*range(last + 1, end, max((end - last) // MAX_AHEAD, 1))]
    if steps and steps[-1] != end - 1:
        steps.append(end - 1)
    there = {key: s for key, s in schedules(run.config).items() if steps and not is_zero(s)}
    return steps, {key: [float(value_at(s, step)) for step in steps] for key, s in there.items()}


def evaluated(run: RunFiles) -> list[dict[str, Any]]:
    """The student's evaluations in training, by step."""
    return [r for name, r in run.evaluations.items() if name.startswith("student")]


def points(run: RunFiles, panel: Panel) -> Sequence[Mapping[str, Any]]:
    """The rows with `step` that a panel draws."""
    return evaluated(run) if panel.is_evaluated else run.metrics


def drawn(runs: Sequence[RunFiles]) -> list[Panel]:
    """The panels that some run has something of, with these keys alone. A coefficient that is 0 and stays so
    belongs to a term that no run has."""
    of_steps = _keys(run.metrics for run in runs)
    # Learning rates are there from the first step on.
    of_steps |= {k: None for run in runs for k, v in ahead(run)[1].items() if k.endswith("/coef") and any(v)}
    of_evaluations = _keys(evaluated(run) for run in runs)
    found = []
    for panel in PANELS:
        there = sorted(of_evaluations if panel.is_evaluated else of_steps, key=_by_number)
        keys = [key for name in panel.keys for key in there if fnmatch.fnmatchcase(key, name)]
        if len(keys := [key for key in keys if key not in LEFT_OUT]) >= panel.least:
            found.append(dataclasses.replace(panel, keys=tuple(keys)))
    return found


def _keys(of_runs: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, None]:
    """Names of numbers that some row has, in their order."""
    return {
        key: None
        for rows in of_runs
        for row in rows
        for key, value in row.items()
        if isinstance(value, (int, float)) and not (key.endswith("/coef") and value == 0)
    }


def _by_number(key: str) -> tuple[str, int]:
    """pass@2 before pass@16."""
    name, _, number = key.partition("@")
    return name, int(number) if number.isdigit() else 0
