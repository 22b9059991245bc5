"""The compiled update: one minibatch in, one optimizer step out.

Denominators are counted over the whole minibatch before it is cut, as weights that sum to 1; every
microbatch and shard then only adds its part of one sum, so how the batch is cut cannot change it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.config import Config
from kdrl_jax.config.schema import is_zero
from kdrl_jax.models.adapters import overlay
from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head
from kdrl_jax.objective.divergence import Divergence
from kdrl_jax.objective.kdrl import kd_token_loss
from kdrl_jax.objective.kl import bound_acts
from kdrl_jax.objective.masks import token_weights
from kdrl_jax.objective.policy import clipped_policy_loss
from kdrl_jax.optim import make_schedule
from kdrl_jax.scoring import HeadSettings, TeacherSide, predictors, score_predictors, unwindow, window
from kdrl_jax.types import Metrics, Params, TrainBatch, TrainState

TERMS = ("rl", "kd", "sft")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """What each token of a minibatch counts; each array sums to 1 over the minibatch, or is 0."""

    rl_BT: jax.Array
    kd_BT: jax.Array
    completion_BT: jax.Array
    """For means over all completion tokens, before masks (metrics)."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a minibatch, and the compiled functions made from it.

    All arrays of a `TrainBatch` have the minibatch's rows; `teacher_head` is needed by the exact
    divergence alone.
    """

    config: Config
    student: Model
    head: HeadSettings

    def weigh(self, batch: TrainBatch) -> TokenWeights:
        """Denominators of the whole minibatch."""
        return TokenWeights(
            token_weights(batch.rl_mask_BT, self.config.rl.denominator),
            token_weights(batch.kd_mask_BT, self.config.kd.denominator),
            token_weights(batch.completion_mask_BT, "tokens"),
        )

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms whose coefficient is not the constant 0; the others cost nothing."""
        return tuple(t for t in TERMS if not is_zero(getattr(self.config, t).coef))

    def coefs(self, step: jax.Array) -> dict[str, jax.Array]:
        """Coefficient of each term in use at a step."""
        return {t: jnp.asarray(make_schedule(getattr(self.config, t).coef)(step)) for t in self.terms}

    def sums(
        self, params: Params, batch: TrainBatch, weights: TokenWeights, teacher_head: Head | None
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """Each term's weighted sum over some rows, and the metrics' sums over the same rows."""
        c = self.config
        decoder = self.student.bind(params)
        hidden = decoder.hidden(batch.tokens_BT, remat=c.train.remat)
        starts = batch.prompt_lengths_B
        teacher = None
        if batch.teacher_states_BND is not None:
            assert teacher_head is not None
            teacher = TeacherSide((batch.teacher_states_BND,), (teacher_head,))
        scores = score_predictors(
            predictors(hidden, starts, self.head),
            decoder.output_head(),
            window(batch.tokens_BT, starts, self.head),
            jnp.full(starts.shape, c.rollout.temperature),
            self.head,
            teacher,
            None if teacher is None else Divergence("reverse_kl"),
            train_head=self.student.holding.lora is None,
        )
        scores = jax.tree.map(lambda x: unwindow(x, batch.tokens_BT, starts), scores)
        student = scores.logprobs
        # Without recorded old log-probabilities the samples are the student's own, just drawn.
        old = jax.lax.stop_gradient(student) if batch.old_logprobs_BT is None else batch.old_logprobs_BT
        terms: dict[str, jax.Array] = {}
        extra: dict[str, jax.Array] = {}
        if "rl" in self.terms:
            loss, clipped = clipped_policy_loss(
                student,
                old,
                batch.advantages_B[:, None],
                clip_low=c.rl.clip_low,
                clip_high=c.rl.clip_high,
            )
            terms["rl"] = jnp.sum(weights.rl_BT * loss)
            extra["rl/clip_frac"] = jnp.sum(weights.rl_BT * clipped)
        sampled = c.rollout.source == "student"
        if batch.teacher_logprobs_BT is not None and sampled:
            d = student - batch.teacher_logprobs_BT
            extra["kd/reverse_kl"] = jnp.sum(weights.completion_BT * d)
        if "kd" in self.terms:
            assert batch.teacher_logprobs_BT is not None
            loss = kd_token_loss(
                c.kd.estimator,
                student=student,
                teacher=batch.teacher_logprobs_BT,
                old=old,
                full=scores.divergence,
                bound=c.kd.max_abs_logratio,
            )
            terms["kd"] = jnp.sum(weights.kd_BT * loss)
            if c.kd.max_abs_logratio is not None:
                acts = bound_acts(student, batch.teacher_logprobs_BT, c.kd.max_abs_logratio)
                extra["kd/clip_frac"] = jnp.sum(weights.kd_BT * acts)
        if scores.reverse_kl is not None:
            extra["kd/reverse_kl_exact"] = jnp.sum(weights.completion_BT * scores.reverse_kl)
        if "sft" in self.terms:
            terms["sft"] = -jnp.sum(weights.rl_BT * student)
        extra["entropy"] = jnp.sum(weights.completion_BT * scores.entropy)
        if sampled:
            gap = jnp.abs(old - batch.sampler_logprobs_BT)
            extra["sampler/logprob_gap"] = jnp.sum(weights.completion_BT * gap)
        return terms, jax.lax.stop_gradient(extra)

    def loss(
        self,
        params: Params,
        batch: TrainBatch,
        weights: TokenWeights,
        coefs: dict[str, jax.Array],
        teacher_head: Head | None,
    ) -> tuple[jax.Array, Metrics]:
        """Coefficient-weighted sum of the terms over some rows, and the metrics' sums."""
        terms, extra = self.sums(params, batch, weights, teacher_head)
        return sum((coefs[t] * v for t, v in terms.items()), jnp.zeros(())), extra | {
            f"{t}/loss": v for t, v in terms.items()
        }


def microbatches(tree: Any, num: int) -> Any:
    """[B, ...] to [num, B / num, ...], taking every num-th row, so that each device's rows are split
    evenly and none moves."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1), tree)


def accumulate(fn: Callable[..., Any], parts: Any, num: int) -> Any:
    """Sum of `fn(*part)` over `num` microbatches, one at a time."""
    if num == 1:
        return fn(*parts)
    stacked = microbatches(parts, num)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, fn(*part)), None), zeros, stacked
    )
    return total


def make_update(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Params, TrainBatch, Head | None], tuple[TrainState, Metrics]]:
    """The update as a pure function of (state, frozen parameters, batch, teacher's head); compile it with
    the state donated. The student is the state's parameters over the frozen ones, of which there are none
    without adapters.

    A gradient that is not finite changes nothing but the counters: the step is taken for schedules,
    parameters and moments stay as they are.
    """
    config = objective.config
    learning_rate = make_schedule(config.optimizer.learning_rate)

    def update(
        state: TrainState, frozen: Params, batch: TrainBatch, teacher_head: Head | None
    ) -> tuple[TrainState, Metrics]:
        coefs = objective.coefs(state.step)
        weights = objective.weigh(batch)

        def part(rows: TrainBatch, rows_weights: TokenWeights) -> Any:
            def loss(params: Params) -> tuple[jax.Array, Metrics]:
                return objective.loss(overlay(frozen, params), rows, rows_weights, coefs, teacher_head)

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        (loss, metrics), grads = accumulate(part, (batch, weights), num_microbatches(config, batch))
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        lr = learning_rate(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new = TrainState(state.step + 1, params, opt_state, skipped, state.skipped_total + ~finite)
        metrics = metrics | {f"{t}/coef": coefs.get(t, jnp.zeros(())) for t in TERMS}
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(lr),
            "skipped_updates": new.skipped_total,
            "skipped_in_a_row": new.skipped,
        }
        return new, metrics

    return update


def make_diagnostics(
    objective: Objective,
) -> Callable[[Params, Params, TrainBatch, Head | None], Metrics]:
    """Norms of the RL and KD gradients (without their coefficients) and their cosine, at one point.

    One forward pass and a backward pass per term.
    """
    terms = [t for t in objective.terms if t in ("rl", "kd")]

    def diagnose(trainable: Params, frozen: Params, batch: TrainBatch, teacher_head: Head | None) -> Metrics:
        weights = objective.weigh(batch)

        def part(rows: TrainBatch, rows_weights: TokenWeights) -> list[Params]:
            def values(params: Params) -> list[jax.Array]:
                student = overlay(frozen, params)
                sums, _ = objective.sums(student, rows, rows_weights, teacher_head)
                return [sums[t] for t in terms]

            _, pull = jax.vjp(values, trainable)
            one_hot = [[jnp.asarray(float(i == j)) for j in range(len(terms))] for i in range(len(terms))]
            return [pull(seed)[0] for seed in one_hot]

        grads = accumulate(part, (batch, weights), num_microbatches(objective.config, batch))
        norms = {t: optax.global_norm(g) for t, g in zip(terms, grads, strict=True)}
        out: Metrics = {f"{t}/grad_norm": n for t, n in norms.items()}
        if len(terms) == 2:
            dot = optax.tree.vdot(grads[0], grads[1])
            product = norms["rl"] * norms["kd"]
            out["grad_cosine"] = jnp.where(product > 0, dot / jnp.where(product > 0, product, 1.0), 0.0)
        return out

    return diagnose


def num_microbatches(config: Config, batch: TrainBatch) -> int:
    """Into how many forward and backward passes a minibatch is cut."""
    rows = batch.tokens_BT.shape[0]
    return rows // (config.train.microbatch_rows or rows)
