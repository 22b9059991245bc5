"""Whether a config fits a slice, and what would make it fit."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.config import Config
from kdrl_jax.models.remat import LADDER
from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.logged import logged_names, lower_logged
from kdrl_jax.plan.measure import Measured, measure
from kdrl_jax.plan.programs import LOG, ROLLOUT, SCORE, UPDATE, Lengths, Planned, RunPrograms
from kdrl_jax.plan.shapes import Ids, Shapes
from kdrl_jax.progress import Pace, progress_words
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.rollout.memory import SHARE
from kdrl_jax.setup import abstract_setup, check_mesh

ENOUGH = SHARE
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
    lowering_seconds: float = 0.0
    """That tracing and lowering took here."""

    @property
    def compile_seconds(self) -> float:
        """That compiling took here, but for tables that were kept."""
        return sum(m.compile_seconds for m in self.programs)

    @property
    def peak(self) -> float:
        return max((m.peak for m in self.programs), default=0.0)

    @property
    def fits(self) -> bool:
        return self.problem is None and not self.too_large

    @property
    def too_large(self) -> list[Measured]:
        """Programs that a chip has no room for."""
        return [m for m in self.programs if m.peak > ENOUGH * self.chip.memory]


class Planner:
    """Compiles configs for one slice."""

    def __init__(
        self,
        topology: str,
        chip: Chip,
        devices: Sequence[jax.Device],
        shapes: Shapes,
        kept: Path | None,
        say: Say,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        flags: str = "",
    ):
        """Takes what it works with.

        Args:
            kept, flags: as in `measure`.
            say: told what begins.
            should_stop: asked between two programs.
        """
        self.topology, self.chip, self.devices = topology, chip, devices
        self.shapes, self.kept, self.say = shapes, kept, say
        self.should_stop, self.flags = should_stop, flags

    def plan(self, config: Config, first: Sequence[str] | None = None) -> Plan:
        """All programs of a config; or, with phases to begin with, those up to the first that has no room.

        Raises:
            Stopped: when asked to stop between two programs.
        """
        none = Plan(self.topology, self.chip, len(self.devices), 0, [])
        try:
            mesh = check_mesh(config, self.devices)
            setup = abstract_setup(config, mesh, self.shapes.of_role, Ids(self.shapes.num_tokens))
            run = RunPrograms(setup, self.chip.memory * ENOUGH, mean_lengths(config))
        except ValueError as error:
            return dataclasses.replace(none, problem=str(error))
        found = dataclasses.replace(none, slots=run.slots)
        rest = [phase for phase in (ROLLOUT, SCORE, UPDATE, LOG) if phase not in (first or ())]
        num, pace = len(run.names()) + len(logged_names(run)), Pace()
        lowering, start = 0.0, time.perf_counter()
        for planned in itertools.chain(_lower(run, first or ()), _lower(run, rest)):
            lowering += time.perf_counter() - start
            if self.should_stop():
                raise Stopped
            how_far = progress_words(len(found.programs), num, pace)
            self.say(f"{self.topology}: compiling {planned.name}{how_far}")
            found.programs.append(measure(planned, self.chip, self.topology, self.kept, self.flags))
            if first is not None and not found.fits:
                break
            start = time.perf_counter()
        return dataclasses.replace(found, lowering_seconds=lowering)

    def remedies(self, config: Config, plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
        """Changes of settings, tried one after another; then together those that freed memory, or moved the
        want of it to another program. Yields what was tried and what came of it: up to the first program that
        has no room."""
        before = {m.name: m.peak for m in plan.too_large}
        first = list(dict.fromkeys(m.phase for m in plan.too_large))
        together: dict[str, Any] = {}
        for change in candidates(config, plan):
            tried = self._try(config, change, first)
            if tried is None:
                continue
            yield change, tried
            if tried.problem is None and all(m.peak < before.get(m.name, math.inf) for m in tried.too_large):
                together |= change
        if len(together) > 1:
            tried = self._try(config, together, first)
            if tried is not None:
                yield together, tried

    def _try(self, config: Config, change: dict[str, Any], first: Sequence[str]) -> Plan | None:
        try:
            config = changed(config, change)
        except ValueError:  # contradicts other settings
            return None
        say, words = self.say, change_words(change)
        self.say = lambda line: say(f"trying {words}: {line}")
        try:
            return self.plan(config, first)
        finally:
            self.say = say


def _lower(run: RunPrograms, phases: Sequence[str]) -> Iterator[Planned]:
    yield from run.lower(phases)
    if LOG in phases:
        yield from lower_logged(run)


def mean_lengths(config: Config) -> Lengths:
    """Of prompts and completions, as the config says or half of the longest."""
    p = config.plan
    return Lengths(
        p.prompt_tokens or max(config.data.max_prompt_tokens // 2, 1),
        p.completion_tokens or max(config.rollout.max_new_tokens // 2, 1),
    )


def change_words(change: Mapping[str, Any]) -> str:
    """As on a command line."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in change.items())


def candidates(config: Config, plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that may free what lacks, the cheapest first; of the rungs of remat only those that
    free most, since each takes a minute to compile."""
    over = {m.phase for m in plan.too_large}
    if plan.problem is not None or ROLLOUT in over:
        slots = config.rollout.slots_per_device
        if slots is not None:
            yield {"rollout.slots_per_device": None}
        elif plan.slots > 1:
            yield {"rollout.slots_per_device": plan.slots // 2}
        if config.rollout.cache_dtype != "int8":
            yield {"rollout.cache_dtype": "int8"}
    if {m.name for m in plan.too_large} == {"diagnostics"}:
        yield {"train.diagnostics_every": 0}
    if over == {LOG}:
        yield {"log.rollouts_tokens": False}
    if UPDATE in over:
        for rung in LADDER[max(LADDER.index("full"), LADDER.index(config.train.remat) + 1) :]:
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
