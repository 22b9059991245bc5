"""Where questions come from."""

from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator

from kdrl_jax.config.base import AboveZero, Count, Fraction, Positive, Section
from kdrl_jax.config.mappings import MAPPINGS


class _Source(Section):
    weight: AboveZero = 1.0
    """Share of draws in a mixture, relative to the other sources of data.train."""
    teacher: str | None = None
    """Which of `teachers` scores the completions of these questions."""


class StoredConfig(_Source):
    """Rows that are stored somewhere, and which of their fields is what. A field inside another is written
    with dots, an element of a list by its number: `reward_model.ground_truth`, `answers.0`."""

    mapping: (
        Literal["gsm8k", "math", "deepscaler", "aime", "amc", "olympiadbench", "minerva", "bigmath"] | None
    ) = None
    """A published data set, for whose fields (and name on the hub) the settings are ready, in
    config/mappings.py; those that are given here go before."""
    question_field: str = "question"
    answer_field: str = "answer"
    answer_part: Literal["all", "marked", "integer"] = "all"
    """What of the field is the answer: all of it; what stands in its last \\boxed{...}, else after its last
    `####`; or all of it with whole numbers in their plain spelling (142.0 is 142, 025 is 25)."""
    completion_field: str | None = None
    """Field holding a completion to imitate (for SFT)."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Fields and the values that they must have, e.g. `{level: Level 5}`; other rows are left out and
    counted."""
    solve_rate_field: str | None = None
    """Field holding a measured share of right answers, from 0 to 1."""
    solve_rate: tuple[Fraction, Fraction] | None = None
    """[least, most]: rows outside, or without a rate, are left out and counted. null: none are."""
    first: Positive | None = None
    """Use only the first so many rows."""
    max_bad_rows: Count = 0
    """So many rows that cannot be read (no JSON, a field missing or empty, a character that the tokenizer
    lacks) are left out, counted, and the first of them listed; a file with more is refused."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Writes the mapping's settings out, so that a run's own config does not change with the table."""
        name = given.get("mapping") if isinstance(given, dict) else None
        ready = MAPPINGS.get(name, {}) if isinstance(name, str) else {}
        known = {key: value for key, value in ready.items() if key in cls.model_fields}
        return {**known, **given} if known else given

    @model_validator(mode="after")
    def _check_rate(self) -> "StoredConfig":
        if self.solve_rate is None:
            return self
        low, high = self.solve_rate
        if self.solve_rate_field is None:
            raise ValueError(f"solve_rate={[low, high]} needs solve_rate_field, where rows have their rate")
        if low > high:
            raise ValueError(f"solve_rate={[low, high]}: write [least, most]")
        return self


class JsonlSourceConfig(StoredConfig):
    kind: Literal["jsonl"]
    path: str
    """A JSON Lines file, relative to the working directory, or in a bucket (`gs://…`, `s3://…`)."""


class ParquetSourceConfig(StoredConfig):
    kind: Literal["parquet"]
    path: str
    """A Parquet file, or a folder of `*.parquet`, taken in the order of their names; relative to the working
    directory, or in a bucket."""


class ArrayRecordSourceConfig(StoredConfig):
    """ArrayRecord files, each of whose records is a JSON object in UTF-8."""

    kind: Literal["array_record"]
    path: str
    """An ArrayRecord file, or a folder of `*.array_record` or `*.arrayrecord`, taken in the order of their
    names; relative to the working directory, or in a bucket."""


class HubSourceConfig(StoredConfig):
    """A data set of the Hugging Face hub, or a folder laid out like one; its own code is never run."""

    kind: Literal["hub"]
    name: str
    """`owner/name`, or a folder."""
    config: str | None = None
    """Which of its configurations (subsets); null is its only, or default, one."""
    split: str = "train"
    """`train`, `test`, `train[:10%]`, ..."""
    revision: str | None = None
    """A commit or tag, so that the data cannot change; null is the newest."""


class MistakesConfig(Section):
    """Worked steps that are wrong, for teaching a model what it will have to unlearn. The answer that
    completions are judged by stays the right one."""

    facts: Fraction = 0.0
    """Share of single steps (`12+9`) that are believed to have another result, each always the same one."""
    belief: Fraction = 0.7
    """How often a step that is believed wrong is written so; the other times it is right."""
    slips: Fraction = 0.0
    """How often any other step is wrong, by one in either direction."""
    seed: Count = 0
    """Other seeds believe other things."""


class TaskSourceConfig(_Source):
    """Procedural questions: every row is generated from its index, so there is nothing to download."""

    kind: Literal["task"]
    task: Literal["chain_sum", "word_sum"]
    """`chain_sum`: symbols with worked steps; `word_sum`: sums in words."""
    split: Literal["train", "heldout", "validation", "test"] = "train"
    """A question belongs to `train` or to `heldout` by a hash of its text; `validation` and `test` are the
    halves of `heldout`."""
    min_terms: Annotated[int, Field(strict=True, ge=2)] = 2
    max_terms: Annotated[int, Field(strict=True, ge=2)] = 4
    max_value: Positive = 9
    """Terms are drawn from 1..max_value."""
    minuses: tuple[Count, Count] = (0, 0)
    """[fewest, most] terms of a `chain_sum` that are taken away; no total on the way is below 0."""
    mistakes: MistakesConfig | None = None
    """Of a `chain_sum`: wrong steps in its completions. null: none."""
    label: str | None = None
    """What evaluations call this source. null: its task and split."""
    size: Positive = 100_000
    """Rows before the task repeats (rows are drawn with a fixed seed of the task's own)."""

    @model_validator(mode="after")
    def _check(self) -> "TaskSourceConfig":
        if self.min_terms > self.max_terms:
            raise ValueError(f"min_terms={self.min_terms} is above max_terms={self.max_terms}")
        fewest, most = self.minuses
        if fewest > most:
            raise ValueError(f"minuses={[fewest, most]}: write [fewest, most]")
        if most >= self.min_terms:
            raise ValueError(
                f"minuses={[fewest, most]}: of min_terms={self.min_terms} at most {self.min_terms - 1} can "
                "be taken away, since the first is not"
            )
        if self.task != "chain_sum":
            for key, is_set in {"minuses": most > 0, "mistakes": self.mistakes is not None}.items():
                if is_set:
                    raise ValueError(f"{key} is for task=chain_sum, not for {self.task}; remove it")
        return self


class GymSourceConfig(_Source):
    """Questions and answers of a generator of `reasoning-gym`; its scorers are never called, since some of
    them run what a model wrote."""

    kind: Literal["gym"]
    task: str
    """The generator, one of those with a single right answer in text: data/gym.py lists them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The generator's own settings, e.g. `{min_terms: 2, max_terms: 6}`."""
    seed: Count = 0
    """Other seeds make other questions: give the held-out source another one."""
    size: Positive = 100_000
    """Rows before they repeat."""


SourceConfig = Annotated[
    Union[
        Annotated[JsonlSourceConfig, Tag("jsonl")],
        Annotated[ParquetSourceConfig, Tag("parquet")],
        Annotated[ArrayRecordSourceConfig, Tag("array_record")],
        Annotated[HubSourceConfig, Tag("hub")],
        Annotated[TaskSourceConfig, Tag("task")],
        Annotated[GymSourceConfig, Tag("gym")],
    ],
    Discriminator("kind"),
]


class DecontaminateConfig(Section):
    ngram: Positive = 13
    """Words in a row that no question of data.train may share with one of data.eval (13 as in GPT-3, arXiv
    2005.14165, appendix C); questions of fewer words are compared whole."""


class CurriculumConfig(Section):
    """Questions that taught nothing when they were last sampled are drawn less often: another question of
    their source, picked at random, takes their place. Of data that are stored; questions that are made up
    hardly come twice."""

    skip_solved: Fraction = 0.5
    """How likely a question is passed over of whose last group every completion was right."""
    skip_unsolved: Fraction = 0.5
    """How likely a question is passed over of whose last group every completion was wrong."""

    @model_validator(mode="after")
    def _check(self) -> "CurriculumConfig":
        if self.skip_solved == self.skip_unsolved == 0:
            raise ValueError("skip_solved=0 and skip_unsolved=0 pass nothing over; remove data.curriculum")
        return self


class DataConfig(Section):
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, mixed by weight, each shuffled and repeated."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources; the first `eval.num_prompts` rows over all of them, taken in turn."""
    prompt_template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    max_prompt_tokens: Positive = 128
    """Longer prompts are left out, counted and reported."""
    decontaminate: DecontaminateConfig | None = None
    """Leave out training questions that overlap with questions of data.eval. null: only those that are there
    word for word are counted and reported. It is not the default because what questions of one template
    share (`word_sum`, reasoning-gym) is no leak."""
    curriculum: CurriculumConfig | None = None
    """Draw by how often this run's own completions were right. null: all questions alike."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if "{question}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} does not hold '{{question}}'")
        if self.decontaminate is not None and not self.eval:
            shown = f"{{ngram: {self.decontaminate.ngram}}}"
            raise ValueError(f"decontaminate={shown} compares with data.eval, which names no source; add one")
        return self
