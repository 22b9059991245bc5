"""The prompt pipeline: sources -> shuffled, repeated, mixed -> batches of tokenised prompts.

Every row follows from (seed, position) alone, and a position in the stream is one number: a resumed run
draws what the uninterrupted one would have drawn, and each process of a job only its own rows of every
batch, on however many hosts. Question sets fit in memory or are made up as they are drawn, so that no
worker processes are needed.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from kdrl_jax.config.data import DataConfig, SourceConfig
from kdrl_jax.data.chat import ChatMode, render_prompt
from kdrl_jax.data.sources import Row, Source, open_source
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.types import Prompts

TASK_ROWS_CHECKED = 1000
"""Rows of a task that are tokenised at the start, to report how many are too long."""


def encode_completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a completion to imitate, its end token included (ending is trained too).

    Raises:
        ValueError: naming a character the tokenizer lacks.
    """
    return [*tokenizer.encode(text), tokenizer.end_ids[0]]


@dataclasses.dataclass(frozen=True)
class _Encoded:
    row: Row
    ids: np.ndarray
    """int32 [length], the prompt's tokens."""


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Rows of any source to token ids."""

    tokenizer: Tokenizer
    prompt_template: str
    chat_template: ChatMode
    max_prompt_tokens: int

    def __call__(self, source: Source, index: int, check_completion: bool = False) -> _Encoded | None:
        """A row with its prompt's ids, or None if there are more than `max_prompt_tokens`."""
        row = source[index]
        try:
            ids = render_prompt(self.tokenizer, row.question, self.prompt_template, self.chat_template)
            if check_completion:
                encode_completion(self.tokenizer, row.completion or "")
        except ValueError as error:
            raise ValueError(f"{source.place(index)}: {error}") from None
        return _Encoded(row, np.array(ids, np.int32)) if len(ids) <= self.max_prompt_tokens else None

    def to_prompts(self, encoded: Sequence[_Encoded], draws: np.ndarray) -> Prompts:
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


class _EncodedSource:
    """Random access to the encoded rows of one source, for grain."""

    def __init__(self, source: Source, encode: _Encoder, needs_completion: bool):
        self.name = source.name
        self.checked = len(source) if source.in_memory else min(len(source), TASK_ROWS_CHECKED)
        looked_at = [encode(source, i, needs_completion) for i in range(self.checked)]
        kept = [e for e in looked_at if e is not None]
        self.dropped = self.checked - len(kept)
        if not kept:
            raise ValueError(
                f"{self.name}: all {self.checked} prompts are longer than data.max_prompt_tokens="
                f"{encode.max_prompt_tokens}; raise it (a chat template counts too)"
            )
        self._encode = encode
        self._source = None if source.in_memory else source
        self._kept = kept
        self._length = len(kept) if source.in_memory else len(source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> _Encoded:
        if self._source is None:
            return self._kept[index]
        # The next row in place of an over-long one, so that a position has one row whatever was drawn before
        # it. Some of the first rows fit, so this ends.
        rows = (self._encode(self._source, i % self._length) for i in itertools.count(index))
        return next(encoded for encoded in rows if encoded is not None)

    def describe(self, limit: int) -> str:
        """One line on what was kept."""
        if self._source is None:
            return (
                f"{self.name}: {self.dropped} of {self.checked} prompts longer than {limit} tokens left out"
            )
        return (
            f"{self.name}: {len(self)} rows made when drawn; prompts longer than {limit} tokens left out "
            f"({self.dropped} of the first {self.checked})"
        )


class PromptStream(Iterator[Prompts]):
    """An endless stream of `Prompts`, with an exact position. Made by `open_prompts`."""

    def __init__(self, sources: Sequence[_EncodedSource], weights: Sequence[float],
                 teachers: Sequence[str | None], encode: _Encoder, rows: np.ndarray,
                 prompts_per_iteration: int, seed: int):  # fmt: skip
        self.dropped: dict[str, int] = {s.name: s.dropped for s in sources}
        """Over-long prompts per source, among all rows of a file or the first rows of a task."""
        self.checked: dict[str, int] = {s.name: s.checked for s in sources}
        """Rows looked at for `dropped`."""
        self.teacher_of: dict[str, str | None] = {
            s.name: teacher for s, teacher in zip(sources, teachers, strict=True)
        }
        """The teacher that the config gives each source."""
        self._sources = sources
        self._encode = encode
        # What the order follows from, kept in the state: a position in another stream means nothing.
        self._identity = {
            "version": 2,  # 1 stepped over over-long rows
            "seed": seed,
            "sources": [[s.name, len(s), weight] for s, weight in zip(sources, weights, strict=True)],
        }
        self._stream = grain.MapDataset.mix(
            [
                grain.MapDataset.source(source).shuffle(seed=_source_seed(seed, i)).repeat()
                for i, source in enumerate(sources)
            ],
            weights,
        )
        self._rows, self._batch = rows, prompts_per_iteration
        self._drawn = 0

    def __next__(self) -> Prompts:
        draws = self._drawn + self._rows
        prompts = self._encode.to_prompts([self._stream[int(i)] for i in draws], draws)
        self._drawn += self._batch
        return prompts

    def get_state(self) -> dict[str, Any]:
        """The position before the next draw, the same on every process; ready for JSON."""
        return {"drawn": self._drawn, "stream": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`, of this stream or of an equal one.

        Raises:
            ValueError: the state is of a stream with other sources, weights or seed.
        """
        if state["stream"] != self._identity:
            raise ValueError(
                f"the saved data position is of {state['stream']}, but the data is now {self._identity}; "
                "restore the data files and the settings of data, tokenizer and seed, or start a new run"
            )
        self._drawn = state["drawn"]

    def describe(self) -> list[str]:
        """One line per source: rows, and prompts left out for their length."""
        return [s.describe(self._encode.max_prompt_tokens) for s in self._sources]


def open_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    chat_template: ChatMode,
    prompts_per_iteration: int,
    seed: int,
    needs_completion: bool,
    rows: np.ndarray | None = None,
) -> PromptStream:
    """Opens and checks the training sources.

    Args:
        data: sources and their weights, prompt template and length limit.
        tokenizer: encodes the prompts.
        chat_template: `auto` or `none`, see `config.TokenizerConfig`.
        prompts_per_iteration: P, prompts of each draw, over all processes.
        seed: of the order of draws.
        needs_completion: whether every row must have a completion to imitate.
        rows: int, which of each draw are wanted in this process; None is all.

    Raises:
        FileNotFoundError, ValueError: as `sources.open_source`; a row that cannot be encoded, with its
            place; a source whose prompts are all too long.
    """
    encode = _Encoder(tokenizer, data.prompt_template, chat_template, data.max_prompt_tokens)
    sources = [_EncodedSource(s, encode, needs_completion) for s in _open(data.train, needs_completion)]
    weights, teachers = [s.weight for s in data.train], [s.teacher for s in data.train]
    rows = np.arange(prompts_per_iteration) if rows is None else rows
    return PromptStream(sources, weights, teachers, encode, rows, prompts_per_iteration, seed)


def load_eval_prompts(
    data: DataConfig, tokenizer: Tokenizer, *, chat_template: ChatMode, num_prompts: int
) -> tuple[Prompts, dict[str, int]]:
    """The first different prompts over the eval sources, taken in turn: the same for every model and run.

    Args:
        data: as for `open_prompts`; a source that runs out leaves its turns to the others.
        tokenizer: encodes the prompts.
        chat_template: `auto` or `none`.
        num_prompts: how many; fewer come back if the sources hold fewer.

    Returns:
        The prompts, and for each source how many over-long ones were passed over.

    Raises:
        FileNotFoundError, ValueError: as `open_prompts`; no eval sources.
    """
    if not data.eval:
        raise ValueError("data.eval names no source; add one to evaluate")
    encode = _Encoder(tokenizer, data.prompt_template, chat_template, data.max_prompt_tokens)
    sources = _open(data.eval, needs_completion=False)
    dropped = {s.name: 0 for s in sources}

    seen: set[str] = set()

    def fitting(source: Source) -> Iterator[_Encoded]:
        for index in range(len(source)):
            encoded = encode(source, index)
            if encoded is None:
                dropped[source.name] += 1
            elif encoded.row.question not in seen:
                seen.add(encoded.row.question)
                yield encoded

    chosen: list[_Encoded] = []
    turns = [fitting(s) for s in sources]
    while turns and len(chosen) < num_prompts:
        for turn in list(turns):
            encoded = next(turn, None)
            if encoded is None:
                turns.remove(turn)
            elif len(chosen) < num_prompts:
                chosen.append(encoded)
    if not chosen:
        raise ValueError(
            f"all prompts of data.eval are longer than data.max_prompt_tokens={data.max_prompt_tokens} "
            f"({dropped}); raise it"
        )
    return encode.to_prompts(chosen, np.arange(len(chosen))), dropped


def _open(configs: Sequence[SourceConfig], needs_completion: bool) -> list[Source]:
    """Sources with different names: `#2` is added to the second of a name."""
    sources = [open_source(config, needs_completion) for config in configs]
    seen: dict[str, int] = {}
    for source in sources:
        seen[source.name] = times = seen.get(source.name, 0) + 1
        if times > 1:
            source.name = f"{source.name}#{times}"
    return sources


def _source_seed(seed: int, index: int) -> int:
    # Hashed, since grain shuffles epoch e with seed + e: neighbouring seeds would share their orders.
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
