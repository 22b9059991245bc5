"""The `sample` command: one completion of one prompt, printed as it is sampled."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from kdrl_jax.colours import SCALES, colour, ink
from kdrl_jax.config import Config, SampleOptions
from kdrl_jax.data.chat import render_prompt
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.evaluate import eval_sampler
from kdrl_jax.optim import make_schedule
from kdrl_jax.rollout.engine import Chunk, Engine
from kdrl_jax.rollout.finish import finish_reason, stop_length
from kdrl_jax.rollout.sampling import seed_key
from kdrl_jax.rollout.settings import EngineSettings, cache_type
from kdrl_jax.setup import SingleModel, make_single
from kdrl_jax.sharding import batch_shards
from kdrl_jax.types import Prompts

# Decode steps between two prints: enough to keep the device busy, few enough to watch.
_CHUNK = 4
# Prompts of about the same length share a compiled program.
_WIDTH = 64
_REASONS = {
    "end": "ended by its end token",
    "stop": "ended by a text of rollout.stop",
    "length": "cut at rollout.max_new_tokens",
}


def sample(
    config: Config, options: SampleOptions, question: str, *, is_run: bool, out: TextIO, err: TextIO
) -> None:
    """Prints the completion to `out`, and one line about it to `err`.

    The prompt goes through `data.prompt_template` and the chat template as in training; temperature is
    `rollout.temperature` (of a schedule, its value at `options.step`, or else the first), and `eval.top_k`,
    `eval.top_p` and `eval.min_new_tokens` hold. The completion is
    the one of draw 0, sample 0 in a stream of its own: it follows from `seed`, the prompt and the parameters.

    Args:
        question: the prompt.
        is_run: the student is the newest checkpoint (or `options.step`) of the config's run, instead of
            what the config starts it as.

    Raises:
        ValueError: a prompt that is too long or cannot be encoded, no such model or checkpoint.
    """
    if options.step is not None and (not is_run or options.model != "student"):
        raise ValueError(
            f"step={options.step} names a checkpoint of a run's student; give the run's directory and "
            "model=student"
        )
    single = make_single(config, options.model)
    ids = render_prompt(
        single.tokenizer, question, config.data.prompt_template, config.tokenizer.chat_template
    )
    longest, limit = len(ids) + config.rollout.max_new_tokens, single.model.config.longest
    if longest > limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, which with rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} makes {longest}, but the {options.model} was made for {limit} "
            "positions; shorten the one or lower the other"
        )
    run_dir = config.run_dir if is_run and options.model == "student" else None
    engine = make_engine(config, options, single, len(ids))
    prompts = _prompts(ids, engine.settings)
    with Console(file=err).status("loading") if err.isatty() else contextlib.nullcontext():
        params = single.params(run_dir, options.step)
    key = jax.random.fold_in(seed_key(config.seed), 2**31 - 2)
    temperature = float(make_schedule(config.rollout.temperature)(options.step or 0))
    text = TextStream(single.tokenizer)
    timer = _Timer()
    completion: list[int] = []
    pen = Pen(out, coloured=options.show == "logprob")
    for chunk in engine.stream(params, prompts, key, temperature=temperature):
        completion = _completion(chunk, len(ids))
        timer.count(len(completion))
        stopped = stop_length(completion, single.tokenizer.decode, config.rollout.stop)
        completion = completion[:stopped]
        is_last = chunk.num_running == 0 or stopped is not None
        if pen.coloured:
            logprobs = _logprobs(chunk, len(ids), len(completion))
            for piece, logprob in text.pieces(completion, logprobs, is_last=is_last):
                pen.write(piece, logprob)
        else:
            out.write(text.feed(completion, is_last=is_last))
        out.flush()
        if is_last:
            break
    end_ids = single.tokenizer.end_ids
    ended = stopped is not None or completion[-1] in end_ids
    why = _REASONS[finish_reason(completion, ended, end_ids)]
    # On a terminal the completion's last line is still open.
    start = "\n" if out.isatty() else ""
    if pen.coloured:
        pen.legend()
        start = ""
    err.write(f"{start}{len(completion)} tokens, {why}, {timer}\n")


class TextStream:
    """The text of a growing completion, as far as no further token can change it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._given = 0
        self._num_fed = 0

    def feed(self, ids: list[int], *, is_last: bool) -> str:
        """The text that is new and whole: all pieces together are `tokenizer.decode` of the last `ids`.

        Args:
            ids: all of the completion so far.
            is_last: nothing follows, so that what was held back is given too.
        """
        text = self._tokenizer.decode(ids)
        if not is_last:
            # A character whose bytes are not all there decodes to this sign.
            text = text.rstrip("\ufffd")
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def pieces(
        self, ids: list[int], values: Sequence[float], *, is_last: bool
    ) -> Iterator[tuple[str, float]]:
        """`feed` token by token: what each adds to the text, with its value. A character whose bytes are
        several tokens comes with the last of them.

        Args:
            values: of all tokens of the completion so far.
        """
        for end in range(self._num_fed + 1, len(ids) + 1):
            yield self.feed(ids[:end], is_last=False), values[end - 1]
        self._num_fed = len(ids)
        if is_last and (rest := self.feed(ids, is_last=True)):
            yield rest, values[-1]


class Pen:
    """Writes pieces of text on a background that says how unlikely they were, as the report's viewer has it,
    where colours are shown: on terminals, and where FORCE_COLOR asks for them, as in notebooks; unless
    NO_COLOR is set."""

    def __init__(self, out: TextIO, *, coloured: bool):
        self._console = Console(file=out, highlight=False)
        if self._console.is_terminal and not out.isatty():
            # A notebook says nothing of its colours; 256 of them are shown by all.
            self._console = Console(file=out, highlight=False, color_system="256")
        self.coloured = coloured and self._console.is_terminal and not self._console.no_color

    def write(self, piece: str, logprob: float) -> None:
        # Line by line, so that a background ends with its text.
        for number, line in enumerate(piece.split("\n")):
            if number:
                self._console.print()
            self._console.print(Text(line, _style(logprob)), end="", soft_wrap=True)

    def legend(self) -> None:
        """A line of its own, beneath the text."""
        self._console.print("\n-log p, nats: ", end="", style="dim")
        top = int(SCALES["logprobs"].top)
        for nats in range(top + 1):
            more = " or more" if nats == top else ""
            self._console.print(Text(f" {nats}{more} ", _style(-nats)), end="")
        self._console.print()


def _style(logprob: float) -> str:
    behind = colour(logprob, SCALES["logprobs"])
    return "" if behind is None else f"{ink(behind)} on {behind}"


class _Timer:
    """Tokens per second after the first chunk, which compiles."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def count(self, num_tokens: int) -> None:
        self._last = (num_tokens, time.monotonic())
        self._first = self._first or self._last

    def __str__(self) -> str:
        assert self._first is not None
        tokens, seconds = (b - a for a, b in zip(self._first, self._last, strict=True))
        return f"{tokens / seconds:.1f} tokens/s" if tokens else "too short to time"


def make_engine(config: Config, options: SampleOptions, single: SingleModel, num_tokens: int) -> Engine:
    """An engine for one prompt of `num_tokens`, with the sampler that the config and the options say."""
    tokenizer = single.tokenizer
    settings = EngineSettings(
        num_prompts=batch_shards(single.mesh),
        group_size=1,
        max_prompt_tokens=-(-num_tokens // _WIDTH) * _WIDTH,
        max_new_tokens=config.rollout.max_new_tokens,
        num_tokens=single.num_tokens,
        end_ids=tokenizer.end_ids,
        pad_id=tokenizer.pad_id,
        decode_chunk=_CHUNK,
        sampler=eval_sampler(config.eval, greedy=options.greedy),
        cache_dtype=cache_type(config.rollout.cache_dtype, single.model.compute_dtype, single.mesh),
        attention=config.rollout.attention,
    )
    return Engine(single.model, settings, single.mesh)


def _prompts(ids: list[int], settings: EngineSettings) -> Prompts:
    """The prompt in every row: each device needs one, and row 0 is read."""
    num = settings.num_prompts
    tokens = np.full((num, settings.max_prompt_tokens), settings.pad_id, np.int32)
    tokens[:, : len(ids)] = ids
    lengths = np.full(num, len(ids), np.int32)
    return Prompts(tokens, lengths, np.zeros(num, np.int32), (), (), (), ())


def _logprobs(chunk: Chunk, start: int, num_tokens: int) -> list[float]:
    """Of the first tokens of the completion, under the whole distribution at its temperature."""
    return np.asarray(chunk.carry.logprobs_BT)[0, start : start + num_tokens].tolist()


def _completion(chunk: Chunk, start: int) -> list[int]:
    # Copied to lists: a view of the arrays would keep the next chunk from taking them over.
    count = np.asarray(chunk.carry.counts_B).tolist()[0]
    return np.asarray(chunk.carry.tokens_BT)[0, start : start + count].tolist()
