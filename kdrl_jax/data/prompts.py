"""The prompt pipeline: sources -> shuffled, repeated, mixed -> batches of tokenised prompts.

Every row follows from (seed, position) alone, and a position in the stream is one number: a resumed run
draws what the uninterrupted one would have drawn, and each process of a job only its own rows of every
batch, on however many hosts. (With a curriculum, from (seed, position, outcomes so far); these are saved
with the position.) Question sets fit in memory or are made up as they are drawn, so that no worker processes
are needed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from kdrl_jax.config.data import DataConfig, SourceConfig
from kdrl_jax.data.chat import ChatMode
from kdrl_jax.data.curriculum import Curriculum, Place
from kdrl_jax.data.decontaminate import HeldOutQuestions
from kdrl_jax.data.encoded import Encoded, EncodedSource, Encoder, HeldOut
from kdrl_jax.data.sources import Source, open_source
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.types import Prompts

MADE_ROWS_COMPARED = 1000
"""Of a source of data.eval that makes its questions up, so many are kept away from training."""


class _Rows:
    """The numbers of a source's rows, for grain to shuffle, repeat and mix."""

    def __init__(self, source: int, length: int):
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Place:
        return self._source, int(index)


class PromptStream(Iterator[Prompts]):
    """An endless stream of `Prompts`, with an exact position. Made by `open_prompts`."""

    def __init__(self, sources: Sequence[EncodedSource], weights: Sequence[float],
                 teachers: Sequence[str | None], encode: Encoder, rows: np.ndarray,
                 prompts_per_iteration: int, seed: int, held_out: HeldOut | None,
                 curriculum: Curriculum | None):  # fmt: skip
        self.dropped: dict[str, int] = {s.name: s.dropped for s in sources}
        """Over-long prompts per source, among all rows of a file or the first rows of a task."""
        self.checked: dict[str, int] = {s.name: s.checked for s in sources}
        """Rows looked at for `dropped`."""
        self.teacher_of: dict[str, str | None] = {
            s.name: teacher for s, teacher in zip(sources, teachers, strict=True)
        }
        """The teacher that the config gives each source."""
        self._sources, self._weights = sources, weights
        self._encode = encode
        # What the order follows from, kept in the state: a position in another stream means nothing.
        self._identity: dict[str, Any] = {
            "version": 3,  # 1 stepped over over-long rows, 2 knew only how many rows there are
            "seed": seed,
            "sources": [
                [s.name, len(s), weight, s.digest] for s, weight in zip(sources, weights, strict=True)
            ],
        }
        if held_out is not None and held_out.leave_out and not all(s.in_memory for s in sources):
            # Which rows are left out as they are drawn; of those in memory the digests know.
            self._identity["held_out"] = held_out.questions.digest
        self._stream = grain.MapDataset.mix(
            [
                grain.MapDataset.source(_Rows(i, len(source))).shuffle(seed=_source_seed(seed, i)).repeat()
                for i, source in enumerate(sources)
            ],
            weights,
        )
        self._rows, self._batch = rows, prompts_per_iteration
        self._drawn = 0
        self._curriculum = curriculum
        # First position of a draw -> what was drawn, for verdicts to come.
        self._unobserved: dict[int, list[Place]] = {}

    def __next__(self) -> Prompts:
        draws = self._drawn + self._rows
        if self._curriculum is None:
            places = [self._stream[int(draw)] for draw in draws]
        else:
            # Those of all processes: each is to learn from all verdicts.
            batch = [
                self._curriculum.choose(p, self._stream[p])
                for p in range(self._drawn, self._drawn + self._batch)
            ]
            self._unobserved[self._drawn] = batch
            places = [batch[i] for i in self._rows]
        prompts = self._encode.to_prompts([self._sources[s][row] for s, row in places], draws)
        self._drawn += self._batch
        return prompts

    def observe(self, prompts: Prompts, correct_B: np.ndarray) -> None:
        """Takes notice of the verdicts on a draw; draws from now on go by them, if there is a curriculum.

        Args:
            prompts: of the draw, as `__next__` gave them.
            correct_B: bool, on the completions of all its prompts, group after group: of all processes.
        """
        if self._curriculum is not None:
            places = self._unobserved.pop(int(prompts.draws_P[0]) - int(self._rows[0]))
            self._curriculum.observe(places, correct_B.reshape(self._batch, -1))

    def metrics(self) -> dict[str, float]:
        """With a curriculum, the shares of stored questions all, or none, of whose last group was right."""
        if self._curriculum is None:
            return {}
        solved, unsolved = self._curriculum.shares()
        return {"curriculum/solved_frac": solved, "curriculum/unsolved_frac": unsolved}

    def get_state(self) -> dict[str, Any]:
        """The position before the next draw, the same on every process; ready for JSON."""
        state = {"drawn": self._drawn, "stream": self._identity}
        return state if self._curriculum is None else state | {"outcomes": self._curriculum.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`, of this stream or of an equal one. Saved without a
        curriculum, it has no outcomes yet.

        Raises:
            ValueError: the state is of a stream with other sources, weights or seed.
        """
        if state["stream"] != self._identity:
            raise ValueError(
                f"the saved data position is of {state['stream']}, but the data is now {self._identity}; "
                "restore the data files and the settings of data, tokenizer and seed, or start a new run"
            )
        self._drawn = state["drawn"]
        self._unobserved.clear()
        if self._curriculum is not None:
            self._curriculum.set_state(state.get("outcomes"))

    def describe(self) -> list[str]:
        """Lines on each source: rows, and what was left out."""
        limit, whole = self._encode.max_prompt_tokens, sum(self._weights)
        shares = [self._batch * weight / whole for weight in self._weights]
        return [
            line for s, share in zip(self._sources, shares, strict=True) for line in s.describe(limit, share)
        ]


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
        FileNotFoundError, ImportError, ValueError: as `sources.open_source`; a row that cannot be encoded,
            with its place; a source whose prompts are all too long, or overlap with held-out ones; a
            curriculum of questions none of which is stored.
    """
    encode = Encoder(tokenizer, data.prompt_template, chat_template, data.max_prompt_tokens)
    held_out = _held_out(data)
    sources = [
        EncodedSource(s, encode, needs_completion, held_out) for s in _open(data.train, needs_completion)
    ]
    weights, teachers = [s.weight for s in data.train], [s.teacher for s in data.train]
    rows = np.arange(prompts_per_iteration) if rows is None else rows
    curriculum = None
    if data.curriculum is not None:
        if not any(s.in_memory for s in sources):
            raise ValueError(
                "data.curriculum goes by how stored questions did, but all sources of data.train make theirs "
                "up; remove it"
            )
        sizes = [len(s) if s.in_memory else 0 for s in sources]
        curriculum = Curriculum(data.curriculum, sizes, seed)
    return PromptStream(
        sources, weights, teachers, encode, rows, prompts_per_iteration, seed, held_out, curriculum
    )


def _held_out(data: DataConfig) -> HeldOut | None:
    """The questions of data.eval: all that are stored, and the first of those that are made up."""
    if not data.eval:
        return None
    leave_out = data.decontaminate is not None

    def questions() -> Iterator[str]:
        for source in _open(data.eval, needs_completion=False):
            made = min(len(source), MADE_ROWS_COMPARED) if leave_out else source.num_checked
            yield from (source[i].question for i in range(len(source) if source.in_memory else made))

    ngram = None if data.decontaminate is None else data.decontaminate.ngram
    return HeldOut(HeldOutQuestions(questions(), ngram), leave_out)


def load_eval_prompts(
    data: DataConfig, tokenizer: Tokenizer, *, chat_template: ChatMode, num_prompts: int
) -> tuple[Prompts, list[str]]:
    """The first different prompts over the eval sources, taken in turn: the same for every model and run.

    Args:
        data: as for `open_prompts`; a source that runs out leaves its turns to the others.
        tokenizer: encodes the prompts.
        chat_template: `auto` or `none`.
        num_prompts: how many; fewer come back if the sources hold fewer.

    Returns:
        The prompts, and lines on what was passed over.

    Raises:
        FileNotFoundError, ValueError: as `open_prompts`; no eval sources.
    """
    if not data.eval:
        raise ValueError("data.eval names no source; add one to evaluate")
    encode = Encoder(tokenizer, data.prompt_template, chat_template, data.max_prompt_tokens)
    sources = _open(data.eval, needs_completion=False)
    bad = {s.name: s.bad.count for s in sources}
    passed_over = {s.name: 0 for s in sources}

    seen: set[str] = set()

    def fitting(source: Source) -> Iterator[Encoded]:
        for index in range(len(source)):
            encoded = encode(source, index)
            if encoded is None:
                passed_over[source.name] += 1
            elif encoded.row.question not in seen:
                seen.add(encoded.row.question)
                yield encoded

    chosen: list[Encoded] = []
    turns = [fitting(s) for s in sources]
    while turns and len(chosen) < num_prompts:
        for turn in list(turns):
            encoded = next(turn, None)
            if encoded is None:
                turns.remove(turn)
            elif len(chosen) < num_prompts:
                chosen.append(encoded)
    dropped = {s.name: passed_over[s.name] - (s.bad.count - bad[s.name]) for s in sources}
    if not chosen and (lines := [line for s in sources for line in s.bad.describe(s.name)]):
        raise ValueError(f"data.eval: no row can be used: {' '.join(lines)}")
    if not chosen:
        raise ValueError(
            f"all prompts of data.eval are longer than data.max_prompt_tokens={data.max_prompt_tokens} "
            f"({dropped}); raise it"
        )
    notes = [f"{name}: {n} held-out prompts too long, left out" for name, n in dropped.items() if n]
    notes += [line for s in sources for line in s.bad.describe(s.name)]
    return encode.to_prompts(chosen, np.arange(len(chosen))), notes


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
