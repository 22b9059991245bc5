"""Rows of a source as token ids: those that can be used, and what is told of the others."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from kdrl_jax.data.chat import ChatMode, render_prompt
from kdrl_jax.data.decontaminate import HeldOutQuestions
from kdrl_jax.data.rows import Row
from kdrl_jax.data.sources import Source
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.types import Prompts

OVERLAPS_LISTED = 3
"""Questions shown of those that overlap with held-out ones."""


def encode_completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a completion to imitate, its end token included (ending is trained too).

    Raises:
        ValueError: naming a character the tokenizer lacks.
    """
    return [*tokenizer.encode(text), tokenizer.end_ids[0]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    row: Row
    ids: np.ndarray
    """int32 [length], the prompt's tokens."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Rows of any source to token ids."""

    tokenizer: Tokenizer
    prompt_template: str
    chat_template: ChatMode
    max_prompt_tokens: int

    def __call__(self, source: Source, index: int, check_completion: bool = False) -> Encoded | None:
        """A row with its prompt's ids, or None if there are more than `max_prompt_tokens`, or if it is a bad
        row, of which the source may have some."""
        row = source[index]
        try:
            ids = render_prompt(self.tokenizer, row.question, self.prompt_template, self.chat_template)
            if check_completion:
                encode_completion(self.tokenizer, row.completion or "")
        except ValueError as error:
            source.bad.add(f"{source.place(index)}: {error}")
            return None
        return Encoded(row, np.array(ids, np.int32)) if len(ids) <= self.max_prompt_tokens else None

    def to_prompts(self, encoded: Sequence[Encoded], draws: np.ndarray) -> Prompts:
        """`Prompts` of some rows, with their numbers."""
        tokens_PT = np.full((len(encoded), self.max_prompt_tokens), self.tokenizer.pad_id, np.int32)
        for tokens_T, e in zip(tokens_PT, encoded, strict=True):
            tokens_T[: len(e.ids)] = e.ids
        return Prompts(
            tokens_PT=tokens_PT,
            lengths_P=np.array([len(e.ids) for e in encoded], np.int32),
            draws_P=draws.astype(np.int32),
            questions=tuple(e.row.question for e in encoded),
            answers=tuple(e.row.answer for e in encoded),
            completions=tuple(e.row.completion for e in encoded),
            sources=tuple(e.row.source for e in encoded),
        )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What no training question may overlap with."""

    questions: HeldOutQuestions
    leave_out: bool
    """Or else they are only counted."""


class EncodedSource:
    """Random access to the encoded rows of one source."""

    def __init__(self, source: Source, encode: Encoder, needs_completion: bool, held_out: HeldOut | None):
        self.name = source.name
        self.in_memory = source.in_memory
        self.checked = source.num_checked
        bad = source.bad.count
        looked_at = [encode(source, i, needs_completion) for i in range(self.checked)]
        kept = [e for e in looked_at if e is not None]
        self.dropped = self.checked - len(kept) - (source.bad.count - bad)
        if not kept and source.bad.count > bad:
            raise ValueError(
                f"{self.name}: none of its rows can be used: {source.bad.describe(self.name)[1]}"
            )
        if not kept:
            raise ValueError(
                f"{self.name}: all {self.checked} prompts are longer than data.max_prompt_tokens="
                f"{encode.max_prompt_tokens}; raise it (a chat template counts too)"
            )
        self._held_out = held_out
        matches = [(e, self._match(e)) for e in kept]
        self._overlaps = [(e.row.question, match) for e, match in matches if match is not None]
        if held_out is not None and held_out.leave_out:
            kept = [e for e, match in matches if match is None]
        if not kept:
            raise ValueError(
                f"{self.name}: all of its {len(self._overlaps)} questions overlap with those of data.eval; "
                "take other held-out questions, or raise data.decontaminate.ngram"
            )
        self._encode = encode
        self._source = source
        self._kept = kept
        self.digest = _digest(e.row for e in kept) if source.may_change else None
        """Of all rows that are drawn, or of the first ones; rows of tasks follow from the config."""
        self._length = len(kept) if source.in_memory else len(source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Encoded:
        if self.in_memory:
            return self._kept[index]
        # The next row in place of one that is left out, so that a position has one row whatever was drawn
        # before it. Some of the first rows are not, so this ends.
        rows = (self._encode(self._source, i % self._length) for i in itertools.count(index))
        return next(e for e in rows if e is not None and not self._leaves_out(e))

    def _match(self, encoded: Encoded) -> str | None:
        """The held-out question that a row overlaps with."""
        return None if self._held_out is None else self._held_out.questions.match(encoded.row.question)

    def _leaves_out(self, encoded: Encoded) -> bool:
        leaves_out = self._held_out is not None and self._held_out.leave_out
        return leaves_out and self._match(encoded) is not None

    def describe(self, limit: int, per_iteration: float) -> list[str]:
        """Lines on what was kept.

        Args:
            limit: tokens of a prompt.
            per_iteration: rows that an iteration draws, on average.
        """
        if not self.in_memory:
            made = (
                f"{self.name}: {len(self)} rows made when drawn; prompts longer than {limit} tokens left out "
                f"({self.dropped} of the first {self.checked})"
            )
            return [made, *self._describe_overlaps()]
        lines = [f"{self.name}: {self.dropped} of {self.checked} prompts longer than {limit} tokens left out"]
        lines += [f"{self.name}: {n} rows {why} left out" for why, n in self._source.left_out.items()]
        lines += self._source.bad.describe(self.name)
        lines += self._describe_overlaps()
        if repeated := len(self) - len({e.row.question for e in self._kept}):
            lines.append(f"{self.name}: {repeated} questions are there more than once")
        if len(self) < per_iteration:
            lines.append(
                f"{self.name}: {len(self)} rows, and an iteration draws {per_iteration:g}: some repeat"
            )
        return lines

    def _describe_overlaps(self) -> list[str]:
        if self._held_out is None or not self._overlaps:
            return []
        number, of = len(self._overlaps), "" if self.in_memory else f" of the first {self.checked}"
        if not self._held_out.leave_out:
            return [
                f"{self.name}: {number}{of} questions are also in data.eval; data.decontaminate="
                "{ngram: 13} leaves them out, and what overlaps with such"
            ]
        first = f", of which the first {OVERLAPS_LISTED}" if number > OVERLAPS_LISTED else ""
        shown = (
            f"{question[:80]!r} overlaps with {match[:80]!r}"
            for question, match in self._overlaps[:OVERLAPS_LISTED]
        )
        return [f"{self.name}: {number}{of} questions left out that overlap with data.eval{first}:", *shown]


def _digest(rows: Iterable[Row]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(repr((row.question, row.answer, row.completion)).encode())
    return digest.hexdigest()
