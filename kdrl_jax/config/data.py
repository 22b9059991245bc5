"""Where questions come from."""

from typing import Annotated, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator

from kdrl_jax.config.base import Positive, Section


class _Source(Section):
    weight: Annotated[float, Field(strict=True, gt=0)] = 1.0
    """Share of draws in a mixture, relative to the other sources."""
    teacher: str | None = None
    """Which of `teachers` scores the completions of these questions."""


class JsonlSourceConfig(_Source):
    kind: Literal["jsonl"]
    path: str
    """A JSON Lines file, relative to the working directory, or in a bucket (`gs://…`, `s3://…`)."""
    question_field: str = "question"
    answer_field: str = "answer"
    completion_field: str | None = None
    """Field holding a completion to imitate (for SFT)."""
    first: Positive | None = None
    """Use only the first so many rows."""


class TaskSourceConfig(_Source):
    """Procedural questions: every row is generated from its index, so there is nothing to download."""

    kind: Literal["task"]
    task: Literal["chain_sum", "word_sum"]
    """`chain_sum`: symbols with worked steps; `word_sum`: one- and two-step sums in words."""
    split: Literal["train", "heldout"] = "train"
    """A question belongs to one split, by a hash of its text."""
    min_terms: Annotated[int, Field(strict=True, ge=2)] = 2
    max_terms: Annotated[int, Field(strict=True, ge=2)] = 4
    max_value: Positive = 9
    """Terms are drawn from 1..max_value."""
    size: Positive = 100_000
    """Rows before the task repeats (rows are drawn with a fixed seed of the task's own)."""

    @model_validator(mode="after")
    def _check(self) -> "TaskSourceConfig":
        if self.min_terms > self.max_terms:
            raise ValueError(f"min_terms={self.min_terms} is above max_terms={self.max_terms}")
        return self


SourceConfig = Annotated[
    Union[Annotated[JsonlSourceConfig, Tag("jsonl")], Annotated[TaskSourceConfig, Tag("task")]],
    Discriminator("kind"),
]


class DataConfig(Section):
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, mixed by weight, each shuffled and repeated."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources; the first `eval.num_prompts` rows over all of them, taken in turn."""
    prompt_template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    max_prompt_tokens: Positive = 128
    """Longer prompts are left out, counted and reported."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if "{question}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} does not hold '{{question}}'")
        return self
