"""The training loop. Read this file first: one iteration is eight named stages, each one call.

prompts   draw questions
rollouts  the student (or the dataset) completes them
teacher   the teacher scores the same tokens, dispatched before the host waits for rewards
rewards   worker processes verify the answers
batch     advantages and masks
update    one compiled optimizer step per minibatch
write     metrics and samples
save      a checkpoint, if due; nothing is in flight here
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kdrl_jax.batch import make_batch_builder, split
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, save_config
from kdrl_jax.data.prompts import PromptStream, encode_completion, open_prompts
from kdrl_jax.evaluate import Evaluator, Results, completion_ids
from kdrl_jax.metrics import (
    Clock,
    MetricsWriter,
    completion_metrics,
    reward_metrics,
    write_json,
    write_jsonl,
)
from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head
from kdrl_jax.progress import Reporter
from kdrl_jax.rewards.pool import RewardPool, Scored, is_correct, total
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.runs import check_same_run, is_complete, prerequisites
from kdrl_jax.scoring import score_in_passes, unwindow
from kdrl_jax.self_check import self_check
from kdrl_jax.setup import Setup, check_mesh, make_setup, record_base
from kdrl_jax.sharding import rows as row_sharding
from kdrl_jax.step import Objective, make_diagnostics, make_update
from kdrl_jax.types import Metrics, Params, Prompts, Rollouts, TrainingError, TrainState

ShouldStop = Callable[[], bool]


def train(
    config: Config,
    console: Console,
    should_stop: ShouldStop,
    *,
    resume: bool = False,
    within: str | None = None,
) -> bool:
    """Trains a run, or resumes it from its newest checkpoint; first the runs its models come from.

    Args:
        should_stop: asked often; when it says so, the state is saved and the function returns.
        resume: the config is the run directory's own, with changes its user asked for. Otherwise a
            directory that was started with other settings is refused.
        within: the run that this one is trained for, and that a user resumes.

    Returns:
        Whether the run is complete (False: stopped and saved).

    Raises:
        ValueError, FileNotFoundError: a mistake in config or data, before anything is written; in a run
            that trains others first, its own data are only looked at after those.
        TrainingError: updates that are not finite, N in a row; a teacher that is the student's own model
            and does not agree with it.
    """
    if not resume:
        check_same_run(config)
    needed = prerequisites(config)
    for inner in [*needed, config]:
        check_mesh(inner)
    if needed and not all(map(is_complete, needed)):
        # What was asked for is written first, so that this directory can be resumed from now on.
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        save_config(config, config.run_dir)
    for inner in needed:
        if not train(inner, console, should_stop, within=within or config.run_dir):
            return False
    if is_complete(config):
        return True
    setup = make_setup(config)
    with _Run(setup, Path(config.run_dir), console, should_stop, within or config.run_dir) as run:
        return run.loop()


class _Run:
    """One run's moving parts, and the loop over them."""

    def __init__(
        self, setup: Setup, run_dir: Path, console: Console, should_stop: ShouldStop, resume_dir: str
    ):
        c = setup.config
        self.setup, self.config, self.run_dir, self.should_stop = setup, c, run_dir, should_stop
        self.resume_dir = resume_dir
        self.told_errors = False
        self.from_dataset = c.rollout.source == "dataset"
        self.data = self._open_data()
        names = [c.reward.verifier, *c.reward.shaping]
        self.pool = RewardPool(names, c.reward.num_workers, c.reward.time_limit_s)
        self.evaluator = None
        if c.data.eval:
            self.evaluator = Evaluator(
                c,
                tokenizer=setup.tokenizer,
                mesh=setup.mesh,
                head=setup.head,
                student=setup.student,
                teacher=setup.teacher,
                make_engine=setup.engine,
                pool=self.pool,
            )
        self.engine = setup.engine(
            setup.student,
            c.train.prompts_per_iteration,
            c.rollout.group_size,
            SamplerSettings(),
        )
        self._compile()
        # Settings and data have been looked at; only now is anything written, and the config only
        # once the checkpoint (if any) fits it.
        self.checkpoints = Checkpoints(run_dir, keep=c.checkpoint.keep, write=True)
        self.state, self.last_eval = self._start()
        save_config(c, run_dir)
        record_base(c)
        self.writer = MetricsWriter(run_dir, first_step=int(self.state.step))
        self.reporter = Reporter(console, c.name, int(self.state.step), c.train.num_steps)

    def _open_data(self) -> PromptStream:
        c = self.config
        return open_prompts(
            c.data,
            self.setup.tokenizer,
            chat_template=c.tokenizer.chat_template,
            prompts_per_iteration=c.train.prompts_per_iteration,
            seed=c.seed,
            needs_completion=self.from_dataset,
        )

    def _compile(self) -> None:
        setup, c = self.setup, self.config
        objective = Objective(c, setup.student, setup.head)
        total_rows = c.train.prompts_per_iteration * c.rollout.group_size
        per_pass = c.train.microbatch_rows or total_rows // c.train.num_minibatches
        # The state comes back where it was, so that the next step is the same program.
        places = jax.tree.map(lambda x: x.sharding, setup.abstract_state())
        self.update = jax.jit(
            make_update(objective, setup.optimizer), donate_argnums=0, out_shardings=(places, None)
        )
        self.diagnose = jax.jit(make_diagnostics(objective))
        self.build_batch = make_batch_builder(c)

        def score(
            model: Model, keep_states: bool, params: Params, tokens: jax.Array, starts: jax.Array
        ) -> tuple[jax.Array, jax.Array | None]:
            temperature = jnp.full(starts.shape, c.rollout.temperature)
            logprobs, states = score_in_passes(
                model,
                params,
                tokens,
                starts,
                temperature,
                setup.head,
                rows_per_pass=per_pass,
                keep_states=keep_states,
            )
            return unwindow(logprobs, tokens, starts), states

        self.score_student = jax.jit(functools.partial(score, setup.student, False))
        self.exact_kl = c.uses_teacher and c.kd.estimator == "full"
        self.teacher_head: Head | None = None
        if setup.teacher is not None:
            self.score_teacher = jax.jit(functools.partial(score, setup.teacher.model, self.exact_kl))
            if self.exact_kl:
                self.teacher_head = setup.teacher.head

    def _start(self) -> tuple[TrainState, int]:
        """The first state, or the newest saved one with its position in the data."""
        if self.checkpoints.latest_step is None:
            return self.setup.init_state(), -1
        try:
            state, host = self.checkpoints.restore(self.setup.abstract_state())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.checkpoints.directory}: the checkpoint does not fit these settings of student and "
                f"optimizer ({str(error).splitlines()[0][:200]}); undo what was changed"
            ) from error
        self.data.set_state(host["data"])
        return state, host["last_eval"]

    def __enter__(self) -> "_Run":
        self.reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.reporter.__exit__(*error)
        self.writer.close()
        self.pool.close()
        self.checkpoints.close()

    def loop(self) -> bool:
        """Runs to the last step, or until asked to stop. Returns whether the run is complete."""
        c = self.config
        if int(self.state.step):
            self.reporter.note(f"resumed at step {int(self.state.step)} of {c.train.num_steps}")
        for line in (*self.setup.notes, *self.data.describe()):
            self.reporter.note(line)
        for source, count in (self.evaluator.dropped if self.evaluator else {}).items():
            if count:
                self.reporter.note(f"{source}: {count} held-out prompts too long, left out")
        if self.checkpoints.latest_step is None:
            self.reporter.stage("checking the models")
            s = self.setup
            if checked := self_check(c, s.student, self.student_params, s.teacher, s.head, s.mesh):
                self.reporter.note(checked)
        position = self.data.get_state()
        try:
            while (step := int(self.state.step)) < c.train.num_steps:
                position = self.data.get_state()
                self.evaluate_if_due(step)
                if self.should_stop():
                    raise Stopped
                self.iteration()
                position = self.data.get_state()
                if self.should_stop():
                    raise Stopped
                if c.checkpoint.every and _crossed(step, int(self.state.step), c.checkpoint.every):
                    self.save(position)
            self.evaluate_if_due(c.train.num_steps)
        except Stopped:
            # Until an iteration's first update nothing of it counts: it is done again on resume.
            self.save(position)
            self.reporter.note(
                f"stopped and saved at step {int(self.state.step)}; resume with "
                f"python -m kdrl_jax.main --config {self.resume_dir}"
            )
            return False
        self.save(position)
        write_json(self.run_dir / "done.json", {"step": int(self.state.step)})
        return True

    def save(self, position: dict[str, Any]) -> None:
        host = {"data": position, "last_eval": self.last_eval}
        self.reporter.stage("saving")
        self.checkpoints.save(int(self.state.step), self.state, host)

    def iteration(self) -> None:
        """One rollout cycle and its updates."""
        clock = Clock()
        prompts = next(self.data)
        rollouts = self.rollouts(prompts, clock)
        jax.block_until_ready(rollouts)
        clock.lap("time/rollout")
        teacher_logprobs, teacher_states = self.teacher_scores(rollouts)
        old_logprobs = None
        if self.config.train.num_minibatches > 1:
            with jax.set_mesh(self.setup.mesh):
                old_logprobs, _ = self.score_student(
                    self.student_params, rollouts.tokens_BT, rollouts.prompt_lengths_B
                )
        ids = completion_ids(rollouts)
        texts = [self.setup.tokenizer.decode(row.tolist()) for row in ids]
        scored = self.rewards(prompts, texts)
        clock.lap("time/reward")
        jax.block_until_ready(teacher_logprobs)
        clock.lap("time/teacher")
        rewards, correct = self.verdicts(scored, len(ids))
        put = row_sharding(self.setup.mesh)
        batch = self.build_batch(
            rollouts,
            jax.device_put(rewards, put),
            jax.device_put(correct, put),
            old_logprobs,
            teacher_logprobs,
            teacher_states,
        )
        shared = completion_metrics(ids, np.asarray(rollouts.ended_B))
        if scored is not None:
            errors = sum(s.error is not None for s in scored)
            shared |= reward_metrics(rewards, correct, errors, self.config.rollout.group_size)
        minibatches = split(batch, self.config.train.num_minibatches)
        for number, minibatch in enumerate(minibatches):
            metrics = self.diagnostics(minibatch) if number == 0 else {}
            clock.lap("time/diagnostics")
            metrics |= self.run_update(minibatch)
            clock.lap("time/update")
            # Time and throughput belong to the iteration; they are written with its last step.
            last = number == len(minibatches) - 1
            self.write(metrics | shared | (clock.summary(sum(map(len, ids))) if last else {}))
        self.write_rollouts(prompts, texts, scored, rewards, rollouts)

    @property
    def student_params(self) -> Params:
        """All of the student, frozen parts included."""
        return self.setup.student_params(self.state.params)

    def rollouts(self, prompts: Prompts, clock: Clock) -> Rollouts:
        c, t = self.config, self.setup.tokenizer
        if self.from_dataset:
            given = [encode_completion(t, text or "") for text in prompts.completions]
            return from_completions(
                prompts,
                given,
                max_new_tokens=c.rollout.max_new_tokens,
                end_ids=t.end_ids,
                pad_id=t.pad_id,
                mesh=self.setup.mesh,
            )
        self.reporter.stage("sampling")
        return self.engine.generate(
            self.student_params,
            prompts,
            jax.random.fold_in(seed_key(c.seed), int(self.state.step)),
            temperature=c.rollout.temperature,
            on_chunk=lambda tokens, running: self.reporter.stage(
                f"sampling: {tokens} tokens, {running} rows running"
            ),
            should_stop=self.should_stop,
        )

    def teacher_scores(self, rollouts: Rollouts) -> tuple[jax.Array | None, jax.Array | None]:
        teacher = self.setup.teacher
        if teacher is None or not self.config.uses_teacher:
            return None, None
        with jax.set_mesh(self.setup.mesh):
            return self.score_teacher(teacher.params, rollouts.tokens_BT, rollouts.prompt_lengths_B)

    def rewards(self, prompts: Prompts, texts: list[str]) -> list[Scored] | None:
        """Verdicts of the worker processes; None for completions of a dataset."""
        if self.from_dataset:
            return None
        self.reporter.stage("verifying")
        g = self.config.rollout.group_size
        future: Future[list[Scored]] = self.pool.submit(
            [q for q in prompts.questions for _ in range(g)],
            texts,
            [a for a in prompts.answers for _ in range(g)],
        )
        scored = future.result()
        errors = [s.error for s in scored if s.error is not None]
        if errors and not self.told_errors:
            self.told_errors = True
            self.reporter.note(
                f"{len(errors)} of {len(scored)} answers got no verdict and score 0, the first: {errors[0]} "
                "(later ones are counted in reward/errors)"
            )
        return scored

    def verdicts(self, scored: list[Scored] | None, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        r = self.config.reward
        if scored is None:
            return np.zeros(num_rows, np.float32), np.zeros(num_rows, bool)
        rewards = np.array([total(s, r.verifier, r.shaping) for s in scored], np.float32)
        return rewards, np.array([is_correct(s, r.verifier) for s in scored])

    def diagnostics(self, minibatch: Any) -> Metrics:
        """RL and KD gradients apart, if due: in the first iteration and then every so many steps."""
        c, step = self.config, int(self.state.step)
        every = c.train.diagnostics_every
        due = every and (step == 0 or _crossed(step - c.train.num_minibatches, step, every))
        if not due or not (c.uses_teacher or not self.from_dataset):
            return {}
        self.reporter.stage("measuring gradients")
        with jax.set_mesh(self.setup.mesh):
            return jax.device_get(
                self.diagnose(self.state.params, self.setup.frozen, minibatch, self.teacher_head)
            )

    def run_update(self, minibatch: Any) -> Metrics:
        step = int(self.state.step)
        with jax.set_mesh(self.setup.mesh):
            self.reporter.stage("updating")
            self.state, measured = self.update(self.state, self.setup.frozen, minibatch, self.teacher_head)
        metrics: Metrics = {"step": step} | jax.device_get(measured)
        skipped = int(metrics.pop("skipped_in_a_row"))
        if skipped >= self.config.train.max_skipped_updates:
            raise TrainingError(
                f"{skipped} updates in a row were not finite (step {step}, loss {metrics['loss']}); the "
                f"newest checkpoint is of step {self.checkpoints.latest_step}. Lower "
                "optimizer.learning_rate, or set kd.max_abs_logratio"
            )
        return metrics

    def write(self, metrics: Metrics) -> None:
        self.writer.write(metrics)
        # A step is shown once it is done, so that the bar ends at the last one.
        self.reporter.step(metrics | {"step": metrics["step"] + 1})

    def write_rollouts(
        self,
        prompts: Prompts,
        texts: list[str],
        scored: list[Scored] | None,
        rewards: np.ndarray,
        rollouts: Rollouts,
    ) -> None:
        """Readable samples: the first rows, group after group."""
        c, step = self.config, int(self.state.step)
        first = step - c.train.num_minibatches
        every = c.log.rollouts_every
        last = step >= c.train.num_steps
        if scored is None or not every or not (last or _crossed(first, step, every) or first == 0):
            return
        g, ended = c.rollout.group_size, np.asarray(rollouts.ended_B)
        rows = [
            {
                "step": first,
                "question": prompts.questions[i // g],
                "answer": prompts.answers[i // g],
                "source": prompts.sources[i // g],
                "sample": i % g,
                "completion": texts[i],
                "reward": float(rewards[i]),
                "scores": scored[i].scores,
                "error": scored[i].error,
                "ended": bool(ended[i]),
            }
            for i in range(min(c.log.rollouts_rows, len(texts)))
        ]
        write_jsonl(self.run_dir / "rollouts" / f"step_{first:06d}.jsonl", rows)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluates before the first step, every so often, and after the last; once per step."""
        c = self.config
        every = c.eval.every
        last = step >= c.train.num_steps
        due = step == 0 or last or (every and _crossed(step - c.train.num_minibatches, step, every))
        if self.evaluator is None or not due or self.last_eval == step:
            return
        teacher_file = self.run_dir / "eval" / "teacher.json"
        teacher = self.setup.teacher
        if teacher is not None and not teacher_file.exists():
            write_json(teacher_file, self.accuracy("teacher", teacher.model, teacher.params))
        results = self.accuracy("student", self.setup.student, self.student_params)
        if c.eval.agreement:
            self.reporter.stage("comparing with the teacher")
            results |= self.evaluator.agreement(self.student_params, should_stop=self.should_stop)
        write_json(self.run_dir / "eval" / f"step_{step:06d}.json", {"step": step} | results)
        self.last_eval = step
        self.reporter.note(f"step {step} evaluated: {summary_line(results)}")

    def accuracy(self, who: str, model: Any, params: Any) -> Results:
        assert self.evaluator is not None
        return self.evaluator.accuracy(
            model,
            params,
            on_step=lambda what, n, of: self.reporter.stage(f"evaluating {who}, {what}: {n} of {of}"),
            should_stop=self.should_stop,
        )


def summary_line(results: Results) -> str:
    """The headline numbers of an evaluation."""
    parts = [f"{k.split('/')[0]} {v:.1%}" for k, v in results.items() if k.endswith("/accuracy")]
    if "teacher_reverse_kl" in results:
        parts.append(f"KL to the teacher {results['teacher_reverse_kl']:.3f}")
        parts.append(f"same top token {results['teacher_top_agreement']:.1%}")
    return ", ".join(parts)


def _crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
