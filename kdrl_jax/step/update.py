"""The compiled update: one minibatch in, one optimizer step out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.models.adapters import overlay
from kdrl_jax.objective.policy import effective_sample_share
from kdrl_jax.optim import make_schedule
from kdrl_jax.step.objective import Heads, Minibatch, Objective, Part, StepInputs
from kdrl_jax.step.spikes import is_spike, measures, remember
from kdrl_jax.step.terms import finish_means
from kdrl_jax.types import Metrics, Params, TrainState


def make_update(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Params, Minibatch, Heads], tuple[TrainState, Metrics]]:
    """The update as a pure function of (state, frozen parameters, minibatch, teachers' heads); compile it
    with the state donated. The student is the state's parameters over the frozen ones, of which there are
    none without adapters.

    A loss, a gradient or an update that is not finite, or a spike, changes nothing but the counters: the step
    is taken for schedules, parameters and moments stay as they are.
    """
    config, terms = objective.config, objective.terms
    learning_rate = make_schedule(config.optimizer.learning_rate)

    def update(
        state: TrainState, frozen: Params, minibatch: Minibatch, heads: Heads
    ) -> tuple[TrainState, Metrics]:
        at = terms.scalars(state.step)
        shared = StepInputs(at, heads, minibatch.batch)

        def loss_and_gradient(part: Part) -> Any:
            def loss(params: Params) -> tuple[jax.Array, Metrics]:
                return objective.loss(overlay(frozen, params), part, shared)

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        (loss, sums), grads = objective.accumulate(loss_and_gradient, minibatch)
        grad_norm = optax.global_norm(grads)
        now_2 = measures(loss, grad_norm)
        spike = jnp.array(False)
        if config.train.spike_sigmas is not None:
            spike = is_spike(state.usual, now_2, config.train.spike_sigmas)
        taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~spike
        lr = learning_rate(state.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            # Finite gradients may still divide by a moment that is 0.
            taken &= jnp.isfinite(optax.global_norm(updates))
            params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=jnp.where(taken, 0, state.skipped + 1),
            skipped_total=state.skipped_total + ~taken,
            usual=remember(state.usual, now_2, taken & (grad_norm > 0)),
        )
        metrics = finish(sums) | {f"{t}/coef": at.coefs.get(t, jnp.zeros(())) for t in terms.schedules}
        if {"rl/clip_low_frac", "rl/clip_high_frac"} & metrics.keys():
            metrics |= {"rl/clip_low": at.clip_low, "rl/clip_high": at.clip_high}
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(lr),
            "skipped_updates": new.skipped_total,
            "skipped_in_a_row": new.skipped,
            "is_spike": spike,
            "padding_frac": minibatch.packs.padding_frac,
        }
        return new, metrics

    return update


def finish(sums: Metrics) -> Metrics:
    """What is no sum over tokens, from what is."""
    metrics = finish_means(sums)
    if "ratio/mean_square" in metrics:
        metrics["ratio/ess"] = effective_sample_share(metrics["ratio/mean"], metrics.pop("ratio/mean_square"))
    return metrics
