"""Held-out answers of a model, verified, and what they say of it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.config import Config, EvalConfig
from kdrl_jax.data.prompts import load_eval_prompts
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.evaluate.agreement import Agreement, RowSums
from kdrl_jax.evaluate.results import (
    Answers,
    Results,
    agreement_results,
    answer_results,
    source_results,
)
from kdrl_jax.hosts import Share
from kdrl_jax.metrics import repeated_ngrams
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.rewards.pool import RewardPool, is_correct
from kdrl_jax.rewards.votes import answer_reader
from kdrl_jax.rollout.engine import Chunk, Engine, Stopped
from kdrl_jax.rollout.finish import completion_ids, cut_at_stops, finish_reason
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.sharding import batch_shards
from kdrl_jax.types import Params, Prompts, Rollouts

OnStep = Callable[[str, int, int], None]
"""Called with (what, done, of), in answers, as a pass over the questions goes on; all are done only at its
end."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found of a model."""

    results: Results
    samples: list[dict[str, Any]]
    """Readable answers to the first `eval.keep_samples` questions, one record each; on the first process
    alone, of all processes' questions."""
    accuracy_P: dict[str, np.ndarray]
    """`greedy/accuracy` and `sampled/accuracy` of each question, those that were measured: float64 [P]."""


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
        self._of_teacher: list[tuple[Rollouts, Prompts]] | None = None
        if teacher is not None:
            self._agreement = Agreement(head, student, teacher.model, mesh)
        self.prompts, self.notes = load_eval_prompts(
            config.data,
            tokenizer,
            chat_template=config.tokenizer.chat_template,
            num_prompts=config.eval.num_prompts,
        )
        r = config.reward
        can_vote = answer_reader(r.verifier, r.pattern) is not None
        self._read_by = r.verifier if can_vote else None
        # As many rows at a time as training samples.
        self._rows = config.train.prompts_per_iteration * config.rollout.group_size
        self._mesh = mesh

    def accuracy(
        self,
        model: Model,
        params: Params,
        *,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Evaluation:
        """Greedy answers and samples to all questions, verified.

        Args:
            on_step: told of the passes `greedy` and `sampled`.

        Raises:
            Stopped: when asked to stop between two chunks of decoding.
        """
        e, prompts = self._config.eval, self.prompts
        kept = min(e.keep_samples, len(prompts.questions)) if hosts.is_first() else 0
        samples: list[dict[str, Any]] = [
            {"question": prompts.questions[i], "answer": prompts.answers[i], "source": prompts.sources[i]}
            for i in range(kept)
        ]
        parts: dict[str, Answers] = {}
        for name, num_samples in {"greedy": int(e.greedy), "sampled": e.num_samples}.items():
            if num_samples:
                parts[name], records = self._measure(model, params, name, num_samples, on_step, should_stop)
                for sample, of_question in zip(samples, records, strict=True):
                    sample[name] = of_question[0] if name == "greedy" else of_question
        longest = self._config.rollout.max_new_tokens
        results: Results = {"num_prompts": len(prompts.questions)}
        for name, answers in parts.items():
            results |= answer_results(name, answers, longest)
        by_source = source_results(parts, prompts.sources, longest)
        if by_source is not None:
            results["by_source"] = by_source
        accuracy_P = {f"{name}/accuracy": answers.accuracy_P for name, answers in parts.items()}
        return Evaluation(results, samples, accuracy_P)

    def agreement(
        self,
        params: Params,
        *,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Results:
        """How near the student is to the teacher on the teacher's greedy answers to held-out prompts:
        exact reverse and forward KL (nats per token, temperature 1) and share of equal most likely tokens.

        Args:
            on_step: told of the passes `answers of the teacher`, if these are not there yet, and `comparing`.

        Raises:
            Stopped: when asked to stop between two chunks of decoding, or two batches.
        """
        assert self._teacher is not None
        batches = self._answers_of_teacher(on_step, "answers of the teacher", should_stop)
        teacher_params = self._teacher.on_device()
        sums: list[RowSums] = []
        done, total = 0, len(self.prompts.questions)
        for rollouts, prompts in batches:
            if should_stop is not None and should_stop():
                raise Stopped
            sums.append(self._agreement(params, teacher_params, rollouts, len(prompts.questions)))
            done += len(prompts.questions)
            if on_step is not None:
                on_step("comparing", done, total)
        return agreement_results(RowSums.joined(sums))

    def _answers_of_teacher(
        self, on_step: OnStep | None, name: str, should_stop: Callable[[], bool] | None
    ) -> list[tuple[Rollouts, Prompts]]:
        """The teacher's greedy answers, as `_generate` yields them; generated once, since nothing about them
        changes."""
        if self._of_teacher is None:
            assert self._teacher is not None
            engine = self._engine(self._teacher.model, greedy=True, num_samples=1)
            params = self._teacher.on_device()
            self._of_teacher = list(self._generate(engine, params, on_step, name, should_stop))
        return self._of_teacher

    def _measure(
        self,
        model: Model,
        params: Params,
        name: str,
        num_samples: int,
        on_step: OnStep | None,
        should_stop: Callable[[], bool] | None,
    ) -> tuple[Answers, list[list[dict[str, Any]]]]:
        """All answers, and a list of records of each question that is kept."""
        engine = self._engine(model, greedy=name == "greedy", num_samples=num_samples)
        share = hosts.share(self._mesh, engine.settings.num_prompts).repeated(num_samples)
        parts: list[Answers] = []
        records: list[list[dict[str, Any]]] = []
        batches: Iterable[tuple[Rollouts, Prompts]]
        if self._is_compared_with(model) and name == "greedy":
            batches = self._answers_of_teacher(on_step, name, should_stop)
        else:
            batches = self._generate(engine, params, on_step, name, should_stop)
        for rollouts, prompts in batches:
            answers = self._verify(rollouts, prompts, share, num_samples)
            keep = min(self._config.eval.keep_samples - len(records), len(prompts.questions))
            if keep > 0:
                records += self._records(rollouts, answers, keep)
            parts.append(answers)
        return Answers.joined(parts), records if hosts.is_first() else []

    def _is_compared_with(self, model: Model) -> bool:
        return self._config.eval.agreement and self._teacher is not None and model is self._teacher.model

    def _verify(self, rollouts: Rollouts, prompts: Prompts, share: Share, num_samples: int) -> Answers:
        """The batch's answers; each process verifies those that it answers for."""
        # The batch's own rows come first.
        num_rows = len(prompts.questions) * num_samples
        mine = np.flatnonzero(share.owned & (share.held < num_rows))
        ids = completion_ids(rollouts)
        texts = [self._tokenizer.decode(ids[i].tolist()) for i in mine]
        asked = share.held[mine] // num_samples
        scored = self._pool.score(
            [prompts.questions[i] for i in asked],
            texts,
            [prompts.answers[i] for i in asked],
            only=self._config.reward.verifier,
            read_by=self._read_by if num_samples > 1 else None,
        )
        # [rows here, ...]: correct, failed, vote, repeated 4-grams, all 4-grams
        found = np.zeros((len(share.held), 5), np.int32)
        found[mine, 0] = [is_correct(s, self._config.reward.verifier) for s in scored]
        found[mine, 1] = [s.error is not None for s in scored]
        found[mine, 2] = _votes([s.said for s in scored], num_samples)
        found[mine, 3:] = [repeated_ngrams([ids[i]]) for i in mine] or np.zeros((0, 2))
        found = hosts.gather(found, share)
        lengths_B, ended_B = hosts.whole((rollouts.completion_lengths_B, rollouts.ended_B))

        def by_question(values: np.ndarray) -> np.ndarray:
            return values[:num_rows].reshape(-1, num_samples, *values.shape[1:])

        return Answers(
            correct_PN=by_question(found[:, 0].astype(bool)),
            failed_PN=by_question(found[:, 1].astype(bool)),
            votes_PN=by_question(found[:, 2]) if self._read_by is not None else None,
            lengths_PN=by_question(lengths_B),
            ended_PN=by_question(ended_B),
            ngrams_PN2=by_question(found[:, 3:]),
        )

    def _records(self, rollouts: Rollouts, answers: Answers, num: int) -> list[list[dict[str, Any]]]:
        """Of the batch's first `num` questions: the answers, to read. All processes must ask for them."""
        tokens_BT, starts_B = hosts.whole((rollouts.tokens_BT, rollouts.prompt_lengths_B))
        if not hosts.is_first():
            return [[] for _ in range(num)]
        num_samples, decode = answers.correct_PN.shape[1], self._tokenizer.decode

        def record(p: int, n: int) -> dict[str, Any]:
            row, length = p * num_samples + n, int(answers.lengths_PN[p, n])
            ids = tokens_BT[row, starts_B[row] : starts_B[row] + length].tolist()
            return {
                "completion": decode(ids),
                "correct": bool(answers.correct_PN[p, n]),
                "tokens": length,
                "finish": finish_reason(ids, bool(answers.ended_PN[p, n]), self._tokenizer.end_ids),
            }

        return [[record(p, n) for n in range(num_samples)] for p in range(num)]

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
        on_step: OnStep | None,
        name: str,
        should_stop: Callable[[], bool] | None,
    ) -> Iterator[tuple[Rollouts, Prompts]]:
        """Yields (rollouts, the prompts they answer); the last batch is filled up with row 0."""
        total, size, group = (
            len(self.prompts.questions),
            engine.settings.num_prompts,
            engine.settings.group_size,
        )
        key = jax.random.fold_in(seed_key(self._config.seed), 2**31 - 1)
        for start in range(0, total, size):
            if should_stop is not None and should_stop():
                raise Stopped
            rows = np.arange(start, min(start + size, total))
            filled = np.concatenate([rows, np.zeros(size - len(rows), rows.dtype)])
            share = hosts.share(self._mesh, size)

            def on_chunk(chunk: Chunk, before: int = start * group, num: int = len(rows) * group) -> None:
                if on_step is not None:
                    # Which rows are done is not known, and those that fill up are among them.
                    done = num if not chunk.num_running else min(size * group - chunk.num_running, num - 1)
                    on_step(name, before + done, total * group)

            rollouts = engine.generate(
                params,
                take(self.prompts, filled[share.held]),
                key,
                temperature=self._config.eval.temperature,
                on_chunk=on_chunk,
                should_stop=should_stop,
            )
            rollouts = cut_at_stops(
                rollouts,
                self._tokenizer.decode,
                self._config.rollout.stop,
                pad_id=self._tokenizer.pad_id,
            )
            yield rollouts, take(self.prompts, rows)


def _votes(said: Sequence[str | None], num_samples: int) -> list[int]:
    """Of each answer, the first one to the same question that says the same; -1 if it says nothing.

    Args:
        said: final answers, of whole questions with `num_samples` each.
    """
    votes = []
    for start in range(0, len(said), num_samples):
        of_question = list(said[start : start + num_samples])
        votes += [-1 if answer is None else of_question.index(answer) for answer in of_question]
    return votes
