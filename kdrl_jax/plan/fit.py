"""Whether a config fits a slice, and what would make it fit."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from kdrl_jax.config import Config
from kdrl_jax.models.remat import LADDER
from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.measure import Measured, measure
from kdrl_jax.plan.programs import SCORE, UPDATE, Lengths, RunPrograms
from kdrl_jax.plan.shapes import Ids, Shapes
from kdrl_jax.setup import abstract_setup, check_mesh

ENOUGH = 0.9
"""Share of a chip's memory that a plan may fill: what is left is for what it does not know."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a slice."""

    topology: str
    chip: Chip
    num_chips: int
    slots: int
    programs: list[Measured]
    problem: str | None = None
    """What keeps it from being compiled at all."""

    @property
    def peak(self) -> float:
        return max((m.peak for m in self.programs), default=0.0)

    @property
    def fits(self) -> bool:
        return self.problem is None and self.peak <= ENOUGH * self.chip.memory


class Planner:
    """Compiles configs for one slice."""

    def __init__(
        self, topology: str, chip: Chip, devices: Sequence[jax.Device], shapes: Shapes, kept: Any, say: Say
    ):
        self.topology, self.chip, self.devices = topology, chip, devices
        self.shapes, self.kept, self.say = shapes, kept, say

    def plan(self, config: Config, phases: Sequence[str] | None = None) -> Plan:
        """All programs of a config, or those of some phases.

        Raises:
            ValueError: the config does not go with the slice's devices.
        """
        mesh = check_mesh(config, self.devices)
        ids = Ids(self.shapes.num_tokens)
        setup = abstract_setup(config, mesh, self.shapes.of_role, ids)
        none = Plan(self.topology, self.chip, len(self.devices), 0, [])
        try:
            run = RunPrograms(setup, self.chip.memory * ENOUGH, mean_lengths(config))
        except ValueError as error:
            return dataclasses.replace(none, problem=str(error))
        done = []
        for planned in run.lower(phases):
            self.say(f"{self.topology}: compiling {planned.name}")
            done.append(measure(planned, self.chip, self.topology, self.kept))
        return dataclasses.replace(none, slots=run.slots, programs=done)

    def remedies(self, config: Config, plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
        """Changes of settings, tried one after another; then together, each kept that frees memory, until all
        fits. Yields what was tried and what came of it."""
        together: dict[str, Any] = {}
        least = plan.peak if plan.problem is None else float("inf")
        for change in candidates(config, plan):
            tried = self._try(config, change)
            if tried is None:
                continue
            yield change, tried
            if tried.problem is None and tried.peak < least:
                together |= change
        if len(together) > 1:
            tried = self._try(config, together)
            if tried is not None:
                yield together, tried

    def _try(self, config: Config, change: dict[str, Any]) -> Plan | None:
        try:
            return self.plan(changed(config, change))
        except ValueError:  # settings that contradict others, or do not go with the slice
            return None


def mean_lengths(config: Config) -> Lengths:
    """Of prompts and completions, as the config says or half of the longest."""
    p = config.plan
    return Lengths(
        p.prompt_tokens or max(config.data.max_prompt_tokens // 2, 1),
        p.completion_tokens or max(config.rollout.max_new_tokens // 2, 1),
    )


def candidates(config: Config, plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that may free what lacks, the cheapest first."""
    over = {m.phase for m in plan.programs if m.peak > ENOUGH * plan.chip.memory}
    if plan.problem is not None:
        yield {"rollout.cache_dtype": "int8"}
    if {m.name for m in plan.programs if m.peak > ENOUGH * plan.chip.memory} == {"diagnostics"}:
        yield {"train.diagnostics_every": 0}
    if UPDATE in over:
        for rung in LADDER[LADDER.index(config.train.remat) + 1 :]:
            yield {"train.remat": rung}
        if config.train.microbatch_rows is not None:
            yield {"train.microbatch_rows": None}
        if config.train.head_chunk > 256:
            yield {"train.head_chunk": 256}
    if config.all_teachers and config.train.park_frozen != "always":
        yield {"train.park_frozen": "always"}
    if not config.train.park_optimizer and over != {UPDATE}:
        yield {"train.park_optimizer": True}
    if config.optimizer.kind == "adamw":
        yield {"optimizer.kind": "adamw_bf16"}
    for role, teacher in config.all_teachers.items():
        if teacher.weights == "float" and (SCORE in over or UPDATE in over or plan.problem):
            yield {f"{role}.weights": "int8"}
    for size in (2, 4):
        if config.mesh.tensor < size <= plan.num_chips:
            yield {"mesh.tensor": size}
    if config.student.lora is None:
        yield {"student.lora": {}}


def changed(config: Config, change: dict[str, Any]) -> Config:
    """The config with some settings (dotted keys) replaced.

    Raises:
        ValueError: they contradict others.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in change.items():
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return Config.model_validate(tree)
