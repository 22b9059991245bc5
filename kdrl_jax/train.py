"""The training loop. Read this file first: one iteration is eight named stages, each one call.

prompts   draw questions
rollouts  the student (or its teacher, or the dataset) completes them
rewards   worker processes verify the answers,
score     and meanwhile the frozen models score the same tokens, in packed rows
batch     advantages and masks
update    one compiled optimizer step per minibatch
write     metrics and samples
save      a checkpoint, if due; nothing is in flight here
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from kdrl_jax import hosts
from kdrl_jax.batch import make_batch_builder, take_rows
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, save_config
from kdrl_jax.config.schedules import is_zero
from kdrl_jax.data.prompts import PromptStream, open_prompts
from kdrl_jax.evaluate import Evaluator, Results
from kdrl_jax.frozen import FrozenScorer, LogprobScorer, Scored
from kdrl_jax.metrics import Clock, Compiles, MetricsWriter, write_json, write_jsonl
from kdrl_jax.optim import make_schedule
from kdrl_jax.paths import as_path, is_outage, make_folder
from kdrl_jax.profiling import Profiler
from kdrl_jax.progress import Reporter
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.rollout.engine import Engine, Stopped
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rounds import (
    Chosen,
    Collector,
    Drawn,
    Round,
    choose,
    round_metrics,
    sample_rows,
    wants_another,
)
from kdrl_jax.runs import check_same_run, check_same_step, check_shared, is_complete, prerequisites
from kdrl_jax.scoring.packer import Packed, config_pack_shape, pack_rollouts
from kdrl_jax.self_check import self_check
from kdrl_jax.setup import Setup, check_mesh, make_setup, record_base
from kdrl_jax.step import Minibatch, Objective, make_diagnostics, make_update
from kdrl_jax.types import Metrics, Params, Rollouts, TrainingError, TrainState

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
        should_stop: asked often; when it says so on any host, the state is saved and the function returns.
        resume: the config is the run directory's own, with changes its user asked for. Otherwise a
            directory that was started with other settings is refused.
        within: the run that this one is trained for, and that a user resumes.

    Returns:
        Whether the run is complete (False: stopped and saved).

    Raises:
        ValueError, FileNotFoundError: a mistake in config or data, before anything is written; in a run
            that trains others first, its own data are only looked at after those.
        TrainingError: updates that are not finite, N in a row; a teacher that is the student's own model
            and does not agree with it; files that cannot be written any more.
    """
    if not resume:
        check_same_run(config)
    needed = list(prerequisites(config).values())
    for inner in [*needed, config]:
        check_mesh(inner)
    if needed and hosts.is_first() and not all(map(is_complete, needed)):
        # What was asked for is written first, so that this directory can be resumed from now on.
        make_folder(as_path(config.run_dir))
        save_config(config, config.run_dir)
    for inner in needed:
        if not train(inner, console, should_stop, within=within or config.run_dir):
            return False
    if hosts.of_first(is_complete(config)):
        return True
    setup = make_setup(config)
    run = Run(setup, as_path(config.run_dir), console, should_stop, within or config.run_dir)
    try:
        with run:
            return run.loop()
    except Exception as error:
        if not is_outage(error):
            raise
        # No mistake in what was given: the same command may go on.
        raise TrainingError(" ".join(str(error).split())) from error


class Run:
    """One run's moving parts, and the loop over them."""

    def __init__(
        self, setup: Setup, run_dir: Path, console: Console, should_stop: ShouldStop, resume_dir: str
    ):
        c = setup.config
        self.setup, self.config, self.run_dir = setup, c, run_dir
        self.should_stop = should_stop = hosts.agreed(should_stop)
        self.resume_dir = resume_dir
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
        self.collector = Collector(
            c, setup.tokenizer, setup.mesh, self._engine(), setup.teacher, self.data, self.pool, should_stop
        )
        self._compile()
        # Settings and data have been looked at; only now is anything written, and the config only
        # once the checkpoint (if any) fits it.
        check_shared(run_dir)
        self.checkpoints = Checkpoints(run_dir, keep=c.checkpoint.keep, write=True)
        check_same_step(self.checkpoints.latest_step)
        self.state, self.last_eval = self._start()
        self.writer: MetricsWriter | None = None
        if hosts.is_first():
            save_config(c, run_dir)
            self.writer = MetricsWriter(run_dir, first_step=int(self.state.step))
        record_base(c)
        self.reporter = Reporter(console, c.name, int(self.state.step), c.train.num_steps)
        self.compiles = Compiles()
        self.profiler = Profiler(run_dir / "profile", c.log.profile_steps)

    def _open_data(self) -> PromptStream:
        c = self.config
        return open_prompts(
            c.data,
            self.setup.tokenizer,
            chat_template=c.tokenizer.chat_template,
            prompts_per_iteration=c.train.prompts_per_iteration,
            seed=c.seed,
            needs_completion=c.rollout.source == "dataset",
            rows=hosts.share(self.setup.mesh, c.train.prompts_per_iteration).held,
        )

    def _engine(self) -> Engine:
        """Of the model that completes the prompts."""
        setup, c = self.setup, self.config
        model = setup.student
        if c.rollout.source == "teacher":
            assert setup.teacher is not None
            model = setup.teacher.model
        return setup.engine(model, c.train.prompts_per_iteration, c.rollout.group_size, SamplerSettings())

    def _compile(self) -> None:
        setup, c = self.setup, self.config
        self.shape = config_pack_shape(c, setup.mesh)
        objective = Objective(c, setup.student, setup.head, self.shape)
        # The state comes back where it was, so that the next step is the same program.
        places = jax.tree.map(lambda x: x.sharding, setup.abstract_state())
        self.update = jax.jit(
            make_update(objective, setup.optimizer), donate_argnums=0, out_shardings=(places, None)
        )
        self.diagnose = jax.jit(make_diagnostics(objective))
        self.build_batch = make_batch_builder(c)
        self.score_student = LogprobScorer(setup.student, setup.head, self.shape)
        self.scorer = FrozenScorer(c, setup.teachers, setup.reference, setup.head, setup.mesh, self.shape)

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

    def __enter__(self) -> "Run":
        self.reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.reporter.__exit__(*error)
        with contextlib.ExitStack() as all_of_them:
            for part in (self.checkpoints, self.pool, self.writer, self.compiles, self.profiler):
                if part is not None:
                    all_of_them.callback(part.close)

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
                self.profiler.at(step, step + c.train.updates_per_iteration)
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
        if hosts.is_first():
            write_json(self.run_dir / "done.json", {"step": int(self.state.step)})
        return True

    def save(self, position: dict[str, Any]) -> None:
        host = {"data": position, "last_eval": self.last_eval}
        self.reporter.stage("saving")
        if self.writer is not None:
            self.writer.flush()  # metrics are never behind a checkpoint
        try:
            self.checkpoints.save(int(self.state.step), self.state, host)
        except ValueError as error:
            # So tensorstore, below orbax, calls a bucket that it cannot reach.
            raise TrainingError(f"the checkpoint could not be written: {error}") from error

    def iteration(self) -> None:
        """One rollout cycle and its updates."""
        c, clock = self.config, Clock()
        temperature = float(self.temperature(int(self.state.step)))
        drawn = self.draw(temperature, clock)
        verified = clock.in_background("time/reward_hidden", drawn.pending)
        scored = None
        if not c.rl.resample_rounds:  # else rewards decide what is trained on, and so come first
            scored = self.score(drawn.rollouts, drawn.sources, temperature, clock)
        verified()
        rounds = [self.verify(drawn, clock)]
        while wants_another(c, rounds):
            rounds.append(self.verify(self.draw(temperature, clock), clock))
        chosen = choose(c, rounds, self.setup.mesh)
        if scored is None:
            scored = self.score(chosen.rollouts, chosen.sources, temperature, clock)
        minibatches = self.minibatches(chosen, *scored, temperature)
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
            num_tokens = sum(int(r.lengths_B.sum()) for r in rounds)
            of_iteration = clock.summary(num_tokens) | {"time/compiles": self.compiles.take()} if last else {}
            self.write(metrics | shared | of_iteration)
        self.state = self.setup.park(self.state)
        self.write_rollouts(rounds[0])

    def draw(self, temperature: float, clock: Clock) -> Drawn:
        """Questions and completions, which workers begin to verify."""
        step = int(self.state.step)
        drawn = self.collector.draw(self.student_params, step, temperature, self.reporter)
        clock.lap("time/rollout")
        return drawn

    def verify(self, drawn: Drawn, clock: Clock) -> Round:
        """The verdicts."""
        verified = self.collector.verify(drawn, self.reporter)
        clock.lap("time/reward")
        return verified

    def score(
        self, rollouts: Rollouts, sources: Sequence[str], temperature: float, clock: Clock
    ) -> tuple[list[Packed], Scored]:
        """Minibatches in packed rows, and what frozen models say of them."""
        c = self.config
        self.reporter.stage("scoring")
        packed = pack_rollouts(
            rollouts,
            c.rollout.group_size,
            self.shape,
            self.setup.mesh,
            num_minibatches=c.train.num_minibatches,
            kinds_B=self.scorer.kinds([self.data.teacher_of[source] for source in sources]),
            num_kinds=c.num_kinds,
        )
        scored = jax.block_until_ready(self.scorer(rollouts, packed, temperature))
        clock.lap("time/teacher")
        return packed, scored

    def minibatches(
        self, chosen: Chosen, packed: list[Packed], scored: Scored, temperature: float
    ) -> list[Minibatch]:
        """What the updates of this iteration are made from."""
        old_logprobs = None
        with jax.set_mesh(self.setup.mesh):
            if self.config.train.updates_per_iteration > 1:
                old_logprobs = self.score_student(chosen.rollouts, packed, self.student_params, temperature)
            batch = self.build_batch(
                chosen.rollouts,
                chosen.rewards_B,
                chosen.correct_B,
                temperature,
                old_logprobs,
                scored.scores,
                chosen.rl_rows_B,
            )
            return [
                Minibatch(take_rows(batch, m.rows_B), m.packs, states)
                for m, states in zip(packed, scored.teacher_states, strict=True)
            ]

    @property
    def student_params(self) -> Params:
        """All of the student, frozen parts included."""
        return self.setup.student_params(self.state.params)

    def diagnostics(self, minibatch: Minibatch) -> Metrics:
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

    def run_update(self, minibatch: Minibatch) -> Metrics:
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
        if self.writer is not None:
            self.writer.write(metrics)
        # A step is shown once it is done, so that the bar ends at the last one.
        self.reporter.step(metrics | {"step": metrics["step"] + 1})

    def write_rollouts(self, sampled: Round) -> None:
        """Readable samples, if due: the first rows, group after group."""
        c, step = self.config, int(self.state.step)
        first = step - c.train.updates_per_iteration
        every = c.log.rollouts_every
        last = step >= c.train.num_steps
        due = every and (last or _crossed(first, step, every) or first == 0)
        if sampled.scored is None or not due or not hosts.is_first():
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
            if not hosts.of_first(file.exists()):
                self.write_eval(file, self.accuracy(role, teacher.model, teacher.on_device()))
        results = self.accuracy("student", self.setup.student, self.student_params)
        if c.eval.agreement:
            self.reporter.stage("comparing with the teacher")
            results |= self.evaluator.agreement(self.student_params, should_stop=self.should_stop)
        self.write_eval(self.run_dir / "eval" / f"step_{step:06d}.json", {"step": step} | results)
        self.last_eval = step
        self.reporter.note(f"step {step} evaluated: {summary_line(results)}")

    def write_eval(self, file: Path, results: Results) -> None:
        if hosts.is_first():
            write_json(file, results)

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
