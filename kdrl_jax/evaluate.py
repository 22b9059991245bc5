"""Held-out accuracy, and agreement of student and teacher on the teacher's own greedy answers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.config import Config, EvalConfig
from kdrl_jax.data.prompts import load_eval_prompts
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.metrics import repeated_ngrams, share_of
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.rewards.pool import RewardPool, is_correct
from kdrl_jax.rollout.engine import Engine, Stopped
from kdrl_jax.rollout.finish import completion_ids, cut_at_stops
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.scoring import (
    HeadSettings,
    PackedRows,
    Packs,
    PackShape,
    TeacherSide,
    score_predictors,
    sum_passes,
)
from kdrl_jax.scoring.packer import pack_rollouts, pack_shape
from kdrl_jax.sharding import batch_shards
from kdrl_jax.types import Params, Prompts, Rollouts

Results = dict[str, Any]
Step = Callable[[str, int, int], None]
"""Called with (what, done, of) as an evaluation goes on."""


def take(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Some of the prompts; a row may be taken more than once."""
    pick = [int(i) for i in rows]
    return Prompts(
        prompts.tokens_PT[rows],
        prompts.lengths_P[rows],
        prompts.draws_P[rows],
        *(
            tuple(getattr(prompts, f)[i] for i in pick)
            for f in ("questions", "answers", "completions", "sources")
        ),
    )


def eval_sampler(config: EvalConfig, *, greedy: bool) -> SamplerSettings:
    """How answers are drawn that are not trained on."""
    return SamplerSettings(
        greedy=greedy, top_k=config.top_k, top_p=config.top_p, min_new_tokens=config.min_new_tokens
    )


class Evaluator:
    """Evaluates models on a config's held-out prompts; engines are made once per model and kept."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Tokenizer,
        mesh: Mesh,
        head: HeadSettings,
        student: Model,
        teacher: FrozenModel | None,
        make_engine: Callable[[Model, int, int, SamplerSettings], Engine],
        pool: RewardPool,
    ):
        """Reads the held-out prompts.

        Args:
            make_engine: (model, prompts per call, samples per prompt, sampler) -> engine.
        """
        self._config, self._tokenizer = config, tokenizer
        self._teacher, self._make_engine, self._pool = teacher, make_engine, pool
        self._engines: dict[tuple[int, bool], Engine] = {}
        self._reference: list[tuple[Rollouts, int]] | None = None
        if teacher is not None:
            self._agreement = Agreement(head, student, teacher.model, mesh)
        self.prompts, self.dropped = load_eval_prompts(
            config.data,
            tokenizer,
            chat_template=config.tokenizer.chat_template,
            num_prompts=config.eval.num_prompts,
        )
        # As many rows at a time as training samples.
        self._rows = config.train.prompts_per_iteration * config.rollout.group_size
        self._mesh = mesh

    def accuracy(
        self,
        model: Model,
        params: Params,
        *,
        on_step: Step | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Results:
        """Greedy and sampled (avg@k) accuracy, completion lengths, truncation and repetition.

        Raises:
            Stopped: when asked to stop between two chunks of decoding.
        """
        e = self._config.eval
        out: Results = {"num_prompts": len(self.prompts.questions)}
        if e.greedy:
            out |= self._measure(model, params, "greedy", 1, on_step, should_stop)
        if e.num_samples:
            out |= self._measure(model, params, "sampled", e.num_samples, on_step, should_stop)
        return out

    def agreement(self, params: Params, *, should_stop: Callable[[], bool] | None = None) -> Results:
        """How near the student is to the teacher on the teacher's greedy answers to held-out prompts:
        exact reverse KL (nats per token, temperature 1) and share of equal most likely tokens."""
        teacher = self._teacher
        assert teacher is not None
        if self._reference is None:
            engine = self._engine(teacher.model, greedy=True, num_samples=1)
            self._reference = [
                (r, len(p.questions))
                for r, p in self._generate(engine, teacher.on_device(), None, "teacher", should_stop)
            ]
        kl = top = count = 0.0
        teacher_params = teacher.on_device()
        for rollouts, num_rows in self._reference:
            sums = self._agreement(params, teacher_params, rollouts, num_rows)
            kl, top, count = kl + float(sums[0]), top + float(sums[1]), count + float(sums[2])
        return {"teacher_reverse_kl": kl / count, "teacher_top_agreement": top / count}

    def _measure(
        self,
        model: Model,
        params: Params,
        name: str,
        num_samples: int,
        on_step: Step | None,
        should_stop: Callable[[], bool] | None,
    ) -> Results:
        engine = self._engine(model, greedy=name == "greedy", num_samples=num_samples)
        counts = np.zeros(7, np.int64)
        share = hosts.share(self._mesh, engine.settings.num_prompts).repeated(num_samples)
        for rollouts, prompts in self._generate(engine, params, on_step, name, should_stop):
            # The batch's own rows come first; each process verifies those that it answers for.
            mine = np.flatnonzero(share.owned & (share.held < len(prompts.questions) * num_samples))
            ids, ended = completion_ids(rollouts), hosts.held(rollouts.ended_B)
            asked = share.held[mine] // num_samples
            scored = self._pool.score(
                [prompts.questions[i] for i in asked],
                [self._tokenizer.decode(ids[i].tolist()) for i in mine],
                [prompts.answers[i] for i in asked],
            )
            verifier = self._config.reward.verifier
            counts += [
                len(mine),
                sum(is_correct(s, verifier) for s in scored),
                sum(s.error is not None for s in scored),
                sum(len(ids[i]) for i in mine),
                int(np.sum(ended[mine])),
                *repeated_ngrams([ids[i] for i in mine]),
            ]
        num, correct, errors, length, num_ended, *repeats = hosts.total(counts).tolist()
        return {
            f"{name}/accuracy": correct / num,
            f"{name}/length_mean": length / num,
            f"{name}/truncated_frac": 1.0 - num_ended / num,
            f"{name}/repeated_4gram_frac": share_of(*repeats),
            f"{name}/verifier_errors": errors,
        }

    def _engine(self, model: Model, greedy: bool, num_samples: int) -> Engine:
        key = (id(model), greedy)
        if key not in self._engines:
            c = self._config
            total = len(self.prompts.questions)
            fits = min(max(self._rows // num_samples, 1), total)
            shards = batch_shards(self._mesh)
            num = -(-fits // shards) * shards
            sampler = eval_sampler(c.eval, greedy=greedy)
            self._engines[key] = self._make_engine(model, num, num_samples, sampler)
        return self._engines[key]

    def _generate(
        self,
        engine: Engine,
        params: Params,
        on_step: Step | None,
        name: str,
        should_stop: Callable[[], bool] | None,
    ) -> Iterator[tuple[Rollouts, Prompts]]:
        """Yields (rollouts, the prompts they answer); the last batch is filled up with row 0."""
        total, size = len(self.prompts.questions), engine.settings.num_prompts
        key = jax.random.fold_in(seed_key(self._config.seed), 2**31 - 1)
        for start in range(0, total, size):
            if should_stop is not None and should_stop():
                raise Stopped
            rows = np.arange(start, min(start + size, total))
            filled = np.concatenate([rows, np.zeros(size - len(rows), rows.dtype)])
            share = hosts.share(self._mesh, size)
            rollouts = engine.generate(
                params,
                take(self.prompts, filled[share.held]),
                key,
                temperature=self._config.eval.temperature,
                should_stop=should_stop,
            )
            rollouts = cut_at_stops(
                rollouts,
                self._tokenizer.decode,
                self._config.rollout.stop,
                pad_id=self._tokenizer.pad_id,
            )
            yield rollouts, take(self.prompts, rows)
            if on_step is not None:
                on_step(name, int(rows[-1]) + 1, total)


class Agreement:
    """Student and teacher on the same completions."""

    def __init__(self, head: HeadSettings, student: Model, teacher: Model, mesh: Mesh):
        self._models, self._head, self._mesh = (student, teacher), head, mesh
        self._sums = jax.jit(self._of_packs, static_argnames="shape")

    def __call__(
        self, params: Params, teacher_params: Params, rollouts: Rollouts, num_rows: int
    ) -> tuple[jax.Array, ...]:
        """Sums over the completion tokens of the first `num_rows` rows: exact reverse KL (nats, temperature
        1), tokens with the same most likely token, and tokens."""
        num, longest = rollouts.tokens_BT.shape
        lengths = jnp.where(jnp.arange(num) < num_rows, rollouts.completion_lengths_B, 0)
        rollouts = dataclasses.replace(rollouts, completion_lengths_B=lengths)
        shape = pack_shape(num, longest, self._mesh, self._models[0].attention)
        (packed,) = pack_rollouts(rollouts, 1, shape, self._mesh)
        with jax.set_mesh(self._mesh):
            return self._sums(params, teacher_params, packed.packs, shape=shape)

    def _of_packs(
        self, params: Params, teacher_params: Params, packs: Packs, shape: PackShape
    ) -> tuple[jax.Array, ...]:
        ours, theirs = (m.bind(p) for m, p in zip(self._models, (params, teacher_params), strict=True))

        def sums(rows: PackedRows) -> tuple[jax.Array, ...]:
            states = [rows.predicting(m.hidden(rows.tokens_RT, rows.layout)) for m in (ours, theirs)]
            scores = score_predictors(
                states[0],
                ours.output_head(),
                rows.targets_RN,
                1.0,
                self._head,
                TeacherSide((states[1],), (theirs.output_head(),)),
                counts_B=rows.counts_R,
                train_head=False,
            )
            assert scores.reverse_kl is not None
            assert scores.same_top is not None
            real = rows.is_token_RN
            kl = jnp.sum(jnp.where(real, scores.reverse_kl, 0.0))
            return kl, jnp.sum(real & scores.same_top), jnp.sum(real)

        result: tuple[jax.Array, ...] = sum_passes(
            sums, (packs.rows,), shape.max_passes, (0, packs.bounds[-1])
        )
        return result
