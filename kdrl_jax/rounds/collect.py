"""Drawing prompts, completing them, and having the completions verified."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.config import Config
from kdrl_jax.config.schedules import constant
from kdrl_jax.data.encoded import encode_completion
from kdrl_jax.data.prompts import PromptStream
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.hosts import Share
from kdrl_jax.models.decoder import FrozenModel
from kdrl_jax.optim import make_schedule
from kdrl_jax.progress import Reporter
from kdrl_jax.rewards.pool import RewardPool, Scored
from kdrl_jax.rollout.engine import Chunk, Engine
from kdrl_jax.rollout.finish import completion_ids, cut_at_stops
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import seed_key
from kdrl_jax.rounds.choose import Round, verdicts
from kdrl_jax.types import Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Completions of one draw of prompts, which workers are verifying."""

    prompts: Prompts
    rollouts: Rollouts
    share: Share
    ids: list[np.ndarray]
    texts: list[str]
    max_new_tokens: int
    idle_frac: float | None
    """As in `Round`."""
    pending: Future[list[Scored]] | None
    """None for completions of a dataset."""
    sources: list[str]
    """Of each row of the batch, the source of its prompt."""


class Collector:
    """Draws rounds from the data and verifies them."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        mesh: Mesh,
        engine: Engine,
        teacher: FrozenModel | None,
        data: PromptStream,
        pool: RewardPool,
        should_stop: Callable[[], bool],
    ):
        """Takes what it works with.

        Args:
            engine: of the model that completes the prompts.
            teacher: completes them with rollout.source=teacher.
            should_stop: asked between two chunks of decoding.
        """
        self._config, self._tokenizer, self._mesh, self._engine = config, tokenizer, mesh, engine
        self._teacher, self._data, self._pool, self._should_stop = teacher, data, pool, should_stop
        self._told_errors = False
        self._share = hosts.share(mesh, config.train.prompts_per_iteration)
        r = config.rollout
        self._length_limit = make_schedule(r.length_limit or constant(r.max_new_tokens))

    def draw(self, student_params: Params, step: int, temperature: float, reporter: Reporter) -> Drawn:
        """The next prompts with completions, which are handed to the workers.

        Raises:
            Stopped: when asked to stop between two chunks of decoding.
        """
        prompts = next(self._data)
        limit = round(float(self._length_limit(step)))
        if self._config.rollout.source == "dataset":
            rollouts, idle_frac = self._given(prompts), None
        else:
            rollouts, idle_frac = self._sampled(student_params, step, prompts, temperature, limit, reporter)
        jax.block_until_ready(rollouts)
        share = self._share.repeated(self._config.rollout.group_size)
        ids = [row for row, owned in zip(completion_ids(rollouts), share.owned, strict=True) if owned]
        texts = [self._tokenizer.decode(row.tolist()) for row in ids]
        pending = self._submit(prompts, texts)
        return Drawn(prompts, rollouts, share, ids, texts, limit, idle_frac, pending, self._sources(prompts))

    def verify(self, drawn: Drawn, reporter: Reporter) -> Round:
        """Waits for the workers' verdicts."""
        scored = None
        if drawn.pending is not None:
            reporter.stage("verifying")
            scored = drawn.pending.result()
            self._tell_errors(scored, reporter)
        d = drawn
        rewards_B, correct_B, parts = verdicts(self._config, scored, d.share)
        lengths_B, ended_B = hosts.whole((d.rollouts.completion_lengths_B, d.rollouts.ended_B))
        return Round(
            d.prompts,
            d.rollouts,
            d.share,
            d.ids,
            d.texts,
            scored,
            rewards_B,
            correct_B,
            parts,
            lengths_B,
            ended_B,
            d.max_new_tokens,
            d.idle_frac,
            d.sources,
        )

    def _sources(self, prompts: Prompts) -> list[str]:
        """`Drawn.sources`."""
        names = list(self._data.teacher_of)
        mine = np.array([names.index(source) for source in prompts.sources], np.int32)
        of_prompts = hosts.gather(mine, self._share)
        return [names[i] for i in np.repeat(of_prompts, self._config.rollout.group_size)]

    def _given(self, prompts: Prompts) -> Rollouts:
        """The completions of the dataset."""
        c, t = self._config, self._tokenizer
        return from_completions(
            prompts,
            [encode_completion(t, text or "") for text in prompts.completions],
            max_new_tokens=c.rollout.max_new_tokens,
            end_ids=t.end_ids,
            pad_id=t.pad_id,
            share=self._share,
            mesh=self._mesh,
        )

    def _sampled(
        self,
        student_params: Params,
        step: int,
        prompts: Prompts,
        temperature: float,
        limit: int,
        reporter: Reporter,
    ) -> tuple[Rollouts, float]:
        """Completions of at most `limit` tokens; and `Round.idle_frac`."""
        c, t, params = self._config, self._tokenizer, student_params
        if c.rollout.source == "teacher":
            assert self._teacher is not None
            params = self._teacher.on_device()
        idle_frac = 0.0

        def on_chunk(chunk: Chunk) -> None:
            nonlocal idle_frac
            idle_frac = chunk.idle_frac
            done = max(num_rows - chunk.num_running, 0)
            reporter.stage("sampling", done, num_rows, f" ({chunk.num_tokens} tokens)")

        num_rows = c.train.prompts_per_iteration * c.rollout.group_size
        reporter.stage("sampling")
        rollouts = self._engine.generate(
            params,
            prompts,
            jax.random.fold_in(seed_key(c.seed), step),
            temperature=temperature,
            max_new_tokens=limit,
            on_chunk=on_chunk,
            should_stop=self._should_stop,
        )
        return cut_at_stops(rollouts, t.decode, c.rollout.stop, pad_id=t.pad_id), idle_frac

    def _submit(self, prompts: Prompts, texts: list[str]) -> Future[list[Scored]] | None:
        """Hands the completions to the worker processes; None for those of a dataset."""
        if self._config.rollout.source == "dataset":
            return None
        g = self._config.rollout.group_size
        owned = np.flatnonzero(self._share.owned)
        return self._pool.submit(
            [prompts.questions[i] for i in owned for _ in range(g)],
            texts,
            [prompts.answers[i] for i in owned for _ in range(g)],
        )

    def _tell_errors(self, scored: list[Scored], reporter: Reporter) -> None:
        """Says so once, if reward functions have failed."""
        errors = [s.error for s in scored if s.error is not None]
        if not errors or self._told_errors:
            return
        self._told_errors = True
        reporter.note(
            f"reward functions failed on {len(errors)} of {len(scored)} answers, which is a score of 0; the "
            f"first: {errors[0]} (later ones are counted in reward/errors)"
        )
