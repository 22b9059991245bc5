"""The training loop. Read this file first: one iteration is eight named stages, each one call.

prompts   draw questions
rollouts  the student (or its teacher, or the dataset) completes them
rewards   worker processes verify the answers,
teacher   and meanwhile the frozen models score the same tokens
batch     advantages and masks
update    one compiled optimizer step per minibatch
write     metrics and samples
save      a checkpoint, if due; nothing is in flight here
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from kdrl_jax.batch import make_batch_builder, split
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, save_config
from kdrl_jax.config.schedules import constant, is_zero
from kdrl_jax.data.prompts import PromptStream, encode_completion, open_prompts
from kdrl_jax.evaluate import Evaluator, Results
from kdrl_jax.frozen import FrozenScorer
from kdrl_jax.metrics import Clock, Compiles, MetricsWriter, write_json, write_jsonl
from kdrl_jax.optim import make_schedule
from kdrl_jax.progress import Reporter
from kdrl_jax.rewards.pool import RewardPool, Scored
from kdrl_jax.rollout.engine import Chunk, Stopped
from kdrl_jax.rollout.finish import completion_ids, cut_at_stops
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.rounds import Chosen, Round, choose, round_metrics, sample_rows, verdicts, wants_another
from kdrl_jax.runs import check_same_run, is_complete, prerequisites
from kdrl_jax.scoring import make_row_scorer
from kdrl_jax.self_check import self_check
from kdrl_jax.setup import Setup, check_mesh, make_setup, record_base
from kdrl_jax.step import Objective, make_diagnostics, make_update
from kdrl_jax.types import Metrics, Params, Prompts, Rollouts, TrainBatch, TrainingError, TrainState

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
        self.temperature = make_schedule(c.rollout.temperature)
        self.length_limit = make_schedule(c.rollout.length_limit or constant(c.rollout.max_new_tokens))
        sampled = setup.student
        if c.rollout.source == "teacher":
            assert setup.teacher is not None
            sampled = setup.teacher.model
        self.engine = setup.engine(
            sampled, c.train.prompts_per_iteration, c.rollout.group_size, SamplerSettings()
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
        self.compiles = Compiles()

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
        per_round = c.train.prompts_per_iteration * c.rollout.group_size
        per_pass = c.train.microbatch_rows or per_round // c.train.num_minibatches
        # The state comes back where it was, so that the next step is the same program.
        places = jax.tree.map(lambda x: x.sharding, setup.abstract_state())
        self.update = jax.jit(
            make_update(objective, setup.optimizer), donate_argnums=0, out_shardings=(places, None)
        )
        self.diagnose = jax.jit(make_diagnostics(objective))
        self.build_batch = make_batch_builder(c)
        self.score_student = make_row_scorer(setup.student, setup.head, per_pass)
        self.scorer = FrozenScorer(
            c, setup.teachers, setup.reference, setup.head, setup.mesh, rows_per_pass=per_pass
        )

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
        return self.setup.park(state), host["last_eval"]

    def __enter__(self) -> "_Run":
        self.reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.reporter.__exit__(*error)
        self.compiles.close()
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
        c, clock = self.config, Clock()
        temperature = float(self.temperature(int(self.state.step)))
        rounds = [self.round(temperature, clock)]
        while wants_another(c, rounds):
            rounds.append(self.round(temperature, clock))
        chosen = choose(c, rounds, self.setup.mesh)
        minibatches = split(self.batch(chosen, temperature), c.train.num_minibatches)
        shared = round_metrics(c, rounds) | {"temperature": temperature}
        self.state = self.setup.unpark(self.state)
        clock.lap("time/update")
        for number, minibatch in enumerate(minibatches * c.train.num_epochs):
            metrics = self.diagnostics(minibatch) if number == 0 else {}
            clock.lap("time/diagnostics")
            metrics |= self.run_update(minibatch)
            clock.lap("time/update")
            # Time and throughput belong to the iteration; they are written with its last step.
            last = number == c.train.updates_per_iteration - 1
            num_tokens = sum(len(ids) for r in rounds for ids in r.ids)
            of_iteration = clock.summary(num_tokens) | {"time/compiles": self.compiles.take()} if last else {}
            self.write(metrics | shared | of_iteration)
        self.state = self.setup.park(self.state)
        self.write_rollouts(rounds[0])

    def round(self, temperature: float, clock: Clock) -> Round:
        """Draws questions, samples, scores and verifies."""
        prompts = next(self.data)
        limit = round(float(self.length_limit(int(self.state.step))))
        rollouts, idle_frac = self.rollouts(prompts, temperature, limit)
        jax.block_until_ready(rollouts)
        clock.lap("time/rollout")
        ids = completion_ids(rollouts)
        texts = [self.setup.tokenizer.decode(row.tolist()) for row in ids]
        # Workers verify while the devices score; what they need beyond that is waited for.
        pending = self.submit(prompts, texts)
        verified = clock.in_background("time/reward_hidden", pending)
        group_size = self.config.rollout.group_size
        teachers = [self.data.teacher_of[s] for s in prompts.sources for _ in range(group_size)]
        frozen = self.scorer(rollouts, temperature, teachers)
        jax.block_until_ready(frozen)
        clock.lap("time/teacher")
        verified()
        scored = self.collect(pending)
        clock.lap("time/reward")
        rewards, correct = verdicts(self.config, scored, len(ids))
        return Round(prompts, rollouts, ids, texts, frozen, scored, rewards, correct, limit, idle_frac)

    def batch(self, chosen: Chosen, temperature: float) -> TrainBatch:
        """What the updates of this iteration are made from."""
        rollouts, old_logprobs = chosen.rollouts, None
        if self.config.train.updates_per_iteration > 1:
            temperatures = jnp.full_like(chosen.rewards_B, temperature)
            with jax.set_mesh(self.setup.mesh):
                old_logprobs = self.score_student(
                    self.student_params, rollouts.tokens_BT, rollouts.prompt_lengths_B, temperatures
                ).logprobs_BT
        return self.build_batch(
            rollouts,
            chosen.rewards_B,
            chosen.correct_B,
            temperature,
            old_logprobs,
            chosen.frozen,
            chosen.rl_rows_B,
        )

    @property
    def student_params(self) -> Params:
        """All of the student, frozen parts included."""
        return self.setup.student_params(self.state.params)

    def rollouts(self, prompts: Prompts, temperature: float, limit: int) -> tuple[Rollouts, float | None]:
        """Completions of at most `limit` tokens; and `Round.idle_frac`."""
        c, t = self.config, self.setup.tokenizer
        if self.from_dataset:
            given = [encode_completion(t, text or "") for text in prompts.completions]
            imitated = from_completions(
                prompts,
                given,
                max_new_tokens=c.rollout.max_new_tokens,
                end_ids=t.end_ids,
                pad_id=t.pad_id,
                mesh=self.setup.mesh,
            )
            return imitated, None
        params = self.student_params
        if c.rollout.source == "teacher":
            assert self.setup.teacher is not None
            params = self.setup.teacher.on_device()
        idle_frac = 0.0

        def on_chunk(chunk: Chunk) -> None:
            nonlocal idle_frac
            idle_frac = chunk.idle_frac
            self.reporter.stage(f"sampling: {chunk.num_tokens} tokens, {chunk.num_running} rows to go")

        self.reporter.stage("sampling")
        rollouts = self.engine.generate(
            params,
            prompts,
            jax.random.fold_in(seed_key(c.seed), int(self.state.step)),
            temperature=temperature,
            max_new_tokens=limit,
            on_chunk=on_chunk,
            should_stop=self.should_stop,
        )
        return cut_at_stops(rollouts, t.decode, c.rollout.stop, pad_id=t.pad_id), idle_frac

    def submit(self, prompts: Prompts, texts: list[str]) -> Future[list[Scored]] | None:
        """Hands the completions to the worker processes; None for those of a dataset."""
        if self.from_dataset:
            return None
        g = self.config.rollout.group_size
        return self.pool.submit(
            [q for q in prompts.questions for _ in range(g)],
            texts,
            [a for a in prompts.answers for _ in range(g)],
        )

    def collect(self, pending: Future[list[Scored]] | None) -> list[Scored] | None:
        """Waits for the workers' verdicts."""
        if pending is None:
            return None
        self.reporter.stage("verifying")
        scored = pending.result()
        errors = [s.error for s in scored if s.error is not None]
        if errors and not self.told_errors:
            self.told_errors = True
            self.reporter.note(
                f"{len(errors)} of {len(scored)} answers got no verdict and score 0, the first: {errors[0]} "
                "(later ones are counted in reward/errors)"
            )
        return scored

    def diagnostics(self, minibatch: Any) -> Metrics:
        """RL and KD gradients apart, if due: in the first iteration and then every so many steps."""
        c, s, step = self.config, self.state, int(self.state.step)
        every = c.train.diagnostics_every
        due = every and (step == 0 or _crossed(step - c.train.updates_per_iteration, step, every))
        if not due or (is_zero(c.rl.coef) and is_zero(c.kd.coef)):
            return {}
        self.reporter.stage("measuring gradients")
        with jax.set_mesh(self.setup.mesh):
            measured = self.diagnose(s.step, s.params, self.setup.frozen, minibatch, self.scorer.heads)
            return jax.device_get(measured)

    def run_update(self, minibatch: Any) -> Metrics:
        step = int(self.state.step)
        with jax.set_mesh(self.setup.mesh):
            self.reporter.stage("updating")
            self.state, measured = self.update(self.state, self.setup.frozen, minibatch, self.scorer.heads)
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

    def write_rollouts(self, sampled: Round) -> None:
        """Readable samples, if due: the first rows, group after group."""
        c, step = self.config, int(self.state.step)
        first = step - c.train.updates_per_iteration
        every = c.log.rollouts_every
        last = step >= c.train.num_steps
        if sampled.scored is None or not every or not (last or _crossed(first, step, every) or first == 0):
            return
        rows = sample_rows(c, sampled, first, self.setup.tokenizer.end_ids)
        write_jsonl(self.run_dir / "rollouts" / f"step_{first:06d}.jsonl", rows)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluates before the first step, every so often, and after the last; once per step."""
        c = self.config
        every = c.eval.every
        last = step >= c.train.num_steps
        due = step == 0 or last or (every and _crossed(step - c.train.updates_per_iteration, step, every))
        if self.evaluator is None or not due or self.last_eval == step:
            return
        for role, teacher in self.setup.teachers.items():
            file = self.run_dir / "eval" / f"{role}.json"
            if not file.exists():
                write_json(file, self.accuracy(role, teacher.model, teacher.on_device()))
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
