"""protocol.yaml, checked."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from kdrl_jax.config.load import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "lab"
Settings = dict[str, Any]
"""Dotted key -> value, as overrides of a config."""
Teacher = Literal["strong", "imperfect"]
TEACHERS: tuple[Teacher, ...] = ("strong", "imperfect")


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
    grid: tuple[Settings, ...]
    across: tuple[Settings, ...] = ({},)
    """Each entry of the grid is tried with each of these."""

    @property
    def points(self) -> list[Settings]:
        """What is tried."""
        return [one | other for other in self.across for one in self.grid]


class Ablation(_Part):
    method: str
    teachers: tuple[Teacher, ...]
    variants: dict[str, Settings]


class Protocol(_Part):
    models: Models
    model_seed: int
    seeds: Seeds
    trial_seed: int
    methods: dict[str, Method]
    ablation_seeds: tuple[int, ...]
    ablations: dict[str, Ablation]
    new_kinds: tuple[str, ...]
    """Labels of the test questions that are none of those trained on."""
    test: Settings

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        trials = {name: len(method.points) for name, method in methods.items()}
        if len(set(trials.values())) > 1:
            raise ValueError(f"every method must have as many trials as the others: {trials}")
        return methods

    @model_validator(mode="after")
    def _check(self) -> "Protocol":
        for name, ablation in self.ablations.items():
            if ablation.method not in self.methods:
                raise ValueError(
                    f"ablation {name!r} is of {ablation.method!r}: there are {list(self.methods)}"
                )
        for teacher in TEACHERS:
            seeds = self.seeds_of(teacher)
            if self.trial_seed in seeds or not set(self.ablation_seeds) <= set(seeds):
                raise ValueError(
                    f"trial_seed={self.trial_seed} must not be among seeds.{teacher}={list(seeds)}, and "
                    f"ablation_seeds={list(self.ablation_seeds)} must"
                )
        labels = [source.get("label") for source in self.test.get("data.eval", ())]
        if missing := [kind for kind in self.new_kinds if kind not in labels]:
            raise ValueError(f"new_kinds={missing} are no labels of test.data.eval, which has {labels}")
        return self

    def seeds_of(self, teacher: Teacher) -> tuple[int, ...]:
        """Of the runs with a teacher that are reported."""
        return self.seeds.strong if teacher == "strong" else self.seeds.imperfect


def read_protocol() -> Protocol:
    """Raises ValueError naming what is wrong."""
    path = Path(__file__).with_name("protocol.yaml")
    return Protocol.model_validate(parse_yaml(path.read_text(), str(path), is_file=True))
