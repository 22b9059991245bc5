"""protocol.yaml, checked."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from kdrl_jax.config.load import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "lab"
Settings = dict[str, Any]
"""Dotted key -> value, as overrides of a config."""
TEACHERS = ("strong", "imperfect")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Part):
    student: str
    strong: str
    imperfect: str


class Seeds(_Part):
    strong: tuple[int, ...]
    imperfect: tuple[int, ...]


class Method(_Part):
    has_teacher: bool = True
    at_best_of: str | None = None
    """A method whose best settings each entry of the grid is tried with; None: the grid is all."""
    grid: tuple[Settings, ...]


class Ablation(_Part):
    method: str
    teachers: tuple[Literal["strong", "imperfect"], ...]
    variants: dict[str, Settings]


class Protocol(_Part):
    models: Models
    model_seed: int
    seeds: Seeds
    trial_seed: int
    rates: tuple[Settings, ...]
    """Named once, for grids."""
    coefs: tuple[Settings, ...]
    """Likewise."""
    methods: dict[str, Method]
    ablation_seeds: tuple[int, ...]
    ablations: dict[str, Ablation]
    new_kinds: tuple[str, ...]
    test: Settings

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name, method in methods.items():
            other = method.at_best_of
            if other is not None and (other not in methods or methods[other].at_best_of is not None):
                raise ValueError(f"{name}.at_best_of={other}: name a method with a grid of its own")
        trials = {name: len(method.grid) for name, method in methods.items()}
        if len(set(trials.values())) > 1:
            raise ValueError(f"every method must have as many trials as the others: {trials}")
        return methods

    @model_validator(mode="after")
    def _check(self) -> "Protocol":
        for name, ablation in self.ablations.items():
            if not self.methods[ablation.method].has_teacher:
                raise ValueError(f"ablation {name!r} is of {ablation.method}, which has no teacher")
        for teacher in TEACHERS:
            seeds = self.seeds_of(teacher)
            if self.trial_seed in seeds or not set(self.ablation_seeds) <= set(seeds):
                raise ValueError(
                    f"trial_seed={self.trial_seed} must not be among seeds.{teacher}={list(seeds)}, and "
                    f"ablation_seeds={list(self.ablation_seeds)} must"
                )
        return self

    def seeds_of(self, teacher: str) -> tuple[int, ...]:
        """Of the runs with a teacher that are reported."""
        return self.seeds.strong if teacher == "strong" else self.seeds.imperfect


def read_protocol() -> Protocol:
    """Raises ValueError naming what is wrong."""
    path = Path(__file__).with_name("protocol.yaml")
    return Protocol.model_validate(parse_yaml(path.read_text(), str(path), is_file=True))
