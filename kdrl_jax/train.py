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
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from kdrl_jax import hosts
from kdrl_jax.alarms import Alarms
from kdrl_jax.batch import make_batch_builder, take_rows
from kdrl_jax.before import trained_first
from kdrl_jax.config import Config
from kdrl_jax.config.schedules import is_zero
from kdrl_jax.data.prompts import PromptStream, open_prompts
from kdrl_jax.frozen import Frozen, FrozenScorer, LogprobScorer
from kdrl_jax.held_out import HeldOut, crossed
from kdrl_jax.logged import LoggedRollouts
from kdrl_jax.metrics import Clock, Compiles
from kdrl_jax.optim import make_schedule
from kdrl_jax.paths import as_path, is_outage
from kdrl_jax.profiling import Profiler
from kdrl_jax.progress import Reporter
from kdrl_jax.record import SKIPPED_KEPT, Record
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
from kdrl_jax.runs import check_same_run, is_complete
from kdrl_jax.scoring.packer import Packed, config_pack_shape, pack_rollouts
from kdrl_jax.self_check import self_check
from kdrl_jax.setup import Setup, make_setup, record_models
from kdrl_jax.step import Minibatch, Objective, make_diagnostics, make_update
from kdrl_jax.types import Metrics, Params, Rollouts, TrainingError, TrainState

ShouldStop = Callable[[], bool]


def train(
    config: Config,
    console: Console,
    should_stop: ShouldStop,
    *,
    accept_changes: bool = False,
    within: str | None = None,
) -> bool:
    """Trains a run, or resumes it from its newest checkpoint; first the runs its models come from.

    Args:
        should_stop: asked often; when it says so on any host, the state is saved and the function returns.
        accept_changes: go on with a run under settings that give its updates another meaning.
        within: the run that this one is trained for, and that a user resumes.

    Returns:
        Whether the run is complete (False: stopped and saved).

    Raises:
        ValueError, FileNotFoundError: a mistake in config or data, before anything is written; in a run
            that trains others first, its own data are only looked at after those.
        TrainingError: updates that are not finite, N in a row; a teacher that is the student's own model
            and does not agree with it; files that cannot be written any more.
    """
    check_same_run(config, accept_changes)
    if hosts.of_first(is_complete(config)):
        return True
    for inner in trained_first(config, accept_changes):
        directory = within or config.run_dir
        if not train(inner, console, should_stop, accept_changes=accept_changes, within=directory):
            return False
    with console.status("loading the models"):
        setup = make_setup(config)
        run = Run(setup, console, should_stop, accept_changes, within or config.run_dir)
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
        self,
        setup: Setup,
        console: Console,
        should_stop: ShouldStop,
        accept_changes: bool,
        resume_dir: str,
    ):
        c = setup.config
        self.setup, self.config = setup, c
        self.should_stop = should_stop = hosts.agreed(should_stop)
        self.resume_dir = resume_dir
        self.data = self._open_data()
        self.pool = RewardPool.of(c.reward)
        self.held_out = HeldOut(setup, self.pool, should_stop)
        self.temperature = make_schedule(c.rollout.temperature)
        self.collector = Collector(
            c, setup.tokenizer, setup.mesh, self._engine(), setup.teacher, self.data, self.pool, should_stop
        )
        self._compile()
        # Settings and data have been looked at; only now is anything written, and the config only
        # once the checkpoint (if any) fits it.
        run_dir = as_path(c.run_dir)
        self.record = Record(c, run_dir)
        self.notes: list[str] = []
        self.state = self._start(accept_changes)
        self.record.checkpoints.prepare(self.state)
        self.alarms = Alarms(c.alarms)
        step = int(self.state.step)
        before = self.record.open(step, self.held_out.last_step)
        for metrics in before:
            self.alarms.at(metrics)
        if len(before) < step:
            self.notes.append(f"metrics.jsonl has {len(before)} of the {step} steps before; the rest is lost")
        record_models(c, setup.run_steps)
        self.reporter = Reporter(console, c.name, step, c.train.num_steps, before)
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
        self.logged = LoggedRollouts(setup, self.scorer, self.data.teacher_of)

    def _start(self, accept_changes: bool) -> TrainState:
        """The first state, or the newest saved one with its position in the data."""
        saved = self.record.restore(self.setup.abstract_state(), accept_changes)
        if saved is None:
            return self.setup.init_state()
        state, host, self.notes = saved
        self.data.set_state(host["data"])
        self.held_out.last_step = host["last_eval"]
        return self.setup.park(state)

    def __enter__(self) -> "Run":
        self.reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.reporter.__exit__(*error)
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(self.tell_notes)
            all_of_them.callback(self.record.close, failed=error[0] is not None)
            for part in (self.pool, self.compiles, self.profiler):
                all_of_them.callback(part.close)

    def tell_notes(self) -> None:
        """What the writers of log.writers have to say."""
        for line in self.record.notes():
            self.reporter.note(line)

    def loop(self) -> bool:
        """Runs to the last step, or until asked to stop. Returns whether the run is complete."""
        c = self.config
        if int(self.state.step):
            self.reporter.note(f"resumed at step {int(self.state.step)} of {c.train.num_steps}")
        for line in (*self.notes, *self.setup.notes, *self.data.describe(), *self.held_out.notes):
            self.reporter.note(line)
        if self.record.checkpoints.latest_step is None:
            self.reporter.stage("checking the models")
            s = self.setup
            if checked := self_check(c, s.student, self.student_params, s.teacher, s.head, s.mesh):
                self.reporter.note(checked)
        position = self.data.get_state()
        try:
            while (step := int(self.state.step)) < c.train.num_steps:
                position = self.data.get_state()
                self.evaluate(step)
                if self.should_stop():
                    raise Stopped
                self.profiler.at(step, step + c.train.updates_per_iteration)
                self.iteration()
                position = self.data.get_state()
                if self.should_stop():
                    raise Stopped
                if self.is_save_due(step) or self.record.has_failed():
                    self.save(position)
            self.save(position)
            self.evaluate(int(self.state.step))
        except Stopped:
            # Until an iteration's first update nothing of it counts: it is done again on resume.
            self.save(position)
            self.record.wait()
            self.reporter.note(
                f"stopped and saved at step {int(self.state.step)}; resume with "
                f"python -m kdrl_jax.main --config {self.resume_dir}"
            )
            return False
        self.record.wait()
        self.record.done(int(self.state.step))
        return True

    def evaluate(self, step: int) -> None:
        """Held-out accuracy, if due."""
        self.held_out.evaluate_if_due(step, self.student_params, self.record, self.reporter)

    def is_save_due(self, before: int) -> bool:
        """After an iteration that began at step `before`."""
        c, now = self.config, int(self.state.step)
        due = c.checkpoint.every and crossed(before, now, c.checkpoint.every)
        # What is found to be among the best must have been saved.
        return bool(due) or (c.checkpoint.keep_best > 0 and self.held_out.is_due(now))

    def save(self, position: dict[str, Any]) -> None:
        self.reporter.stage("saving")
        self.record.save(self.state, {"data": position, "last_eval": self.held_out.last_step})

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
        if self.should_stop():  # the last moment at which nothing of this iteration counts
            raise Stopped
        for sampled in rounds:
            self.data.observe(sampled.prompts, sampled.correct_B)
        shared |= self.data.metrics()
        clock.lap("time/update")
        logged = self.describe(rounds[0], temperature)
        clock.lap("time/diagnostics")
        self.state = self.setup.unpark(self.state)
        clock.lap("time/update")
        for number, minibatch in enumerate(minibatches * c.train.num_epochs):
            metrics = self.diagnostics(minibatch) if number == 0 else {}
            clock.lap("time/diagnostics")
            metrics |= self.run_update(minibatch)
            in_a_row, is_spike = int(metrics.pop("skipped_in_a_row")), bool(metrics.pop("is_spike"))
            if in_a_row:
                self.skipped(metrics, in_a_row, is_spike, minibatch, rounds)
            clock.lap("time/update")
            # Time and throughput belong to the iteration; they are written with its last step.
            last = number == c.train.updates_per_iteration - 1
            num_tokens = sum(int(r.lengths_B.sum()) for r in rounds)
            of_iteration = clock.summary(num_tokens) | {"time/compiles": self.compiles.take()} if last else {}
            self.write(metrics | shared | of_iteration)
        self.state = self.setup.park(self.state)
        if logged:
            self.record.rollouts(logged[0]["step"], logged)

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
    ) -> tuple[list[Packed], Frozen]:
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
        self, chosen: Chosen, packed: list[Packed], scored: Frozen, temperature: float
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

    def describe(self, sampled: Round, temperature: float) -> list[dict[str, Any]]:
        """Samples for a reader, of the parameters that they were drawn with; none if none are due."""
        c, first = self.config, int(self.state.step)
        after, every = first + c.train.updates_per_iteration, c.log.rollouts_every
        if sampled.scored is None or not every:
            return []
        due = first == 0 or after >= c.train.num_steps or crossed(first, after, every)
        if not due and self.logged.is_compiled:
            return []
        # In the first iteration after a resume they may go unused: no later one compiles anything.
        rows = self.logged.records(sampled, first, self.student_params, temperature)
        return rows if due else []

    def diagnostics(self, minibatch: Minibatch) -> Metrics:
        """RL and KD gradients apart, if due: in the first iteration and then every so many steps."""
        c, s, step = self.config, self.state, int(self.state.step)
        every = c.train.diagnostics_every
        due = every and (step == 0 or crossed(step - c.train.updates_per_iteration, step, every))
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
        return {"step": step} | jax.device_get(measured)

    def skipped(
        self, metrics: Metrics, in_a_row: int, is_spike: bool, minibatch: Minibatch, rounds: Sequence[Round]
    ) -> None:
        """Says that an update was skipped, and keeps what it was made from.

        Raises:
            TrainingError: too many in a row.
        """
        c, step = self.config, metrics["step"]
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        why = "not finite"
        if math.isfinite(loss) and math.isfinite(norm):
            why = "a spike (train.spike_sigmas)" if is_spike else "finite, but the optimizer's update is not"
        texts = [
            row
            for sampled in rounds
            if sampled.scored is not None
            for row in sample_rows(c, sampled, step, self.setup.tokenizer.end_ids)
        ]
        place = f"not kept, as {SKIPPED_KEPT} others are"
        if self.record.keeps_skipped:
            place = self.record.skipped(step, hosts.whole((minibatch.batch, minibatch.packs)), texts)
        what = f"step {step}: loss {loss:.4g} and gradient norm {norm:.4g} are {why}"
        self.reporter.note(f"{what}: update {in_a_row} in a row that is skipped; its batch: {place}")
        if in_a_row >= c.train.max_skipped_updates:
            raise TrainingError(
                f"{in_a_row} updates in a row were skipped ({what}; train.max_skipped_updates="
                f"{c.train.max_skipped_updates}); the newest checkpoint is of step "
                f"{self.record.checkpoints.latest_step}. Look at {self.record.run_dir / 'skipped'}; lower "
                "optimizer.learning_rate, or set kd.max_abs_logratio"
            )

    def write(self, metrics: Metrics) -> None:
        self.record.metrics(metrics)
        self.tell_notes()
        for alarm in self.alarms.at(metrics):
            self.reporter.alarm(f"step {metrics['step']}: {alarm}")
            self.record.alarm(metrics["step"], alarm)
        # A step is shown once it is done, so that the bar ends at the last one.
        self.reporter.step(metrics | {"step": metrics["step"] + 1})
