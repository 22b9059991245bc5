"""The options that one command takes beside the config: `prompt=...`, `out=...`, without a dot.

Every other `section.key=value` word overrides the config.
"""

import difflib
import re
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from kdrl_jax.config.base import Count, Flag, Section
from kdrl_jax.config.errors import ConfigError, describe, show
from kdrl_jax.config.load import parse_yaml
from kdrl_jax.config.schema import Config


class SampleOptions(Section):
    """Options of `sample`."""

    prompt: str
    """The question, taken as it is; `-` reads it from standard input."""
    model: str = "student"
    """Which model answers: student, teacher or teachers.NAME, reference."""
    greedy: Flag = False
    """Take the most likely token each time, instead of drawing one."""
    step: Count | None = None
    """The checkpoint of the run to sample from; null is the newest."""
    show: Literal["logprob"] | None = None
    """On a terminal, colours each token by its log-probability: the lighter, the less likely it was."""

    @field_validator("prompt")
    @classmethod
    def _check(cls, prompt: str) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
            raise ValueError("is not UTF-8") from None
        return prompt


class ExportOptions(Section):
    """Options of `export`."""

    out: str
    """The folder to write; it must not exist yet, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the written tensors. null: that of the safetensors files the student started from, and
    float32 if it came from elsewhere."""
    max_shard_gib: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 2.0
    """Largest size of one file, in GiB; a tensor that is larger has a file of its own."""
    step: Count | None = None
    """The checkpoint of the run to write; null is the newest."""

    @field_validator("out")
    @classmethod
    def _check(cls, out: str) -> str:
        if not out.strip() or "\0" in out:
            raise ValueError("write the name of a folder")
        return out


class ReportOptions(Section):
    """Options of `report`."""

    runs: str = ""
    """Further run directories, with commas between them; those that differ in their seed alone become one
    curve with a band."""
    out: str = ""
    """The page to write, and beside it the picture; if empty, report.html in the run's directory."""

    @property
    def others(self) -> list[str]:
        return [name.strip() for name in self.runs.split(",") if name.strip()]

    @field_validator("out")
    @classmethod
    def _check(cls, out: str) -> str:
        if out and not out.endswith(".html"):
            raise ValueError("write the name of a file that ends in .html")
        return out


class EvalOptions(Section):
    """Options of `eval`."""

    steps: Literal["last", "best", "all"] | tuple[Count, ...] = "last"
    """Which checkpoints of the run are evaluated, side by side: `last`, `best` (of those that training
    evaluated with these settings, by sampled accuracy, or else greedy; of equal ones the newer), `all`, or
    their steps: 10,20."""
    with_teacher: Flag | None = None
    """Evaluate the teachers too. null shows what training has found of them with these settings."""
    out: str | None = None
    """The folder that results and samples are written to; null is `eval/` of a run, and otherwise none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _listed(cls, steps: Any) -> Any:
        """`10` and `10,20` as lists."""
        if isinstance(steps, int) and not isinstance(steps, bool):
            return (steps,)
        if isinstance(steps, str) and re.fullmatch(r"[0-9]+( *, *[0-9]+)*", steps):
            return tuple(int(step) for step in steps.split(","))
        if isinstance(steps, str) and steps not in ("last", "best", "all"):
            raise ValueError("write last, best, all, or steps: 10,20")
        return steps

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: Any) -> Any:
        if not steps:
            raise ValueError("name at least one step")
        return steps if isinstance(steps, str) else tuple(dict.fromkeys(steps))

    @field_validator("out")
    @classmethod
    def _check_out(cls, out: str | None) -> str | None:
        if out is not None and (not out.strip() or "\0" in out):
            raise ValueError("write the name of a folder")
        return out


COMMANDS: dict[str, type[Section] | None] = {
    "train": None,
    "eval": EvalOptions,
    "sample": SampleOptions,
    "plan": None,
    "export": ExportOptions,
    "report": ReportOptions,
}
"""Command -> its options, if it has any."""

Options = TypeVar("Options", bound=Section)


def read_options(command: str, kind: type[Options], words: Sequence[str]) -> tuple[Options, list[str]]:
    """The options among a command's words, and the overrides that are left.

    Text (`prompt`, `out`) is taken letter by letter; other values are read as YAML, as in overrides.

    Raises:
        ConfigError: with one line for the user.
    """
    values: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, equals, text = word.partition("=")
        if key in kind.model_fields and equals:
            is_text = kind.model_fields[key].annotation in (str, str | None)
            values[key] = text if is_text else _read_yaml(command, word, text)
        elif equals and ("." in key or key.strip() in (*Config.model_fields, "")):
            overrides.append(word)
        else:
            raise ConfigError(f"{command}: {_misspelt(key, text, bool(equals), kind)}")
    try:
        return kind.model_validate(values), overrides
    except ValidationError as error:
        raise ConfigError(f"{command}: {describe(error, kind)}") from None


def options_help() -> str:
    """All options of all commands, one paragraph each."""
    lines = []
    for command, kind in COMMANDS.items():
        for name, field in kind.model_fields.items() if kind else ():
            default = "required" if field.is_required() else f"default {show(field.default)}"
            text = " ".join((field.description or "").split())
            lines += textwrap.wrap(f"{command} {name}=: {text} ({default})", 78, subsequent_indent="    ")
    return "\n".join(lines)


def _read_yaml(command: str, word: str, text: str) -> Any:
    try:
        return parse_yaml(text, f"{command}: {show(word)}")
    except RecursionError:
        raise ConfigError(f"{command}: {show(word)}: nested too deeply") from None


def _misspelt(key: str, text: str, has_value: bool, kind: type[Section]) -> str:
    options = list(kind.model_fields)
    valid = f"options here: {', '.join(f'{name}=' for name in options)}"
    if not has_value:
        required = (name for name, field in kind.model_fields.items() if field.is_required())
        first = next(required, options[0])
        return f"{show(key)} has no '='; write {first}=... or section.key=value ({valid})"
    near = difflib.get_close_matches(key, [*options, *Config.model_fields], n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}" if near else valid
    return f"unknown key {show(key)} (value {show(text)}); {hint}"
