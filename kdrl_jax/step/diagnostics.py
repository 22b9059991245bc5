"""The RL and KD gradients apart, at one point: how large each is, and whether they agree."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.models.adapters import overlay
from kdrl_jax.step.objective import Heads, Objective, accumulate, num_microbatches
from kdrl_jax.step.terms import TokenInputs
from kdrl_jax.types import Metrics, Params, TrainBatch


def make_diagnostics(
    objective: Objective,
) -> Callable[[jax.Array, Params, Params, TrainBatch, Heads], Metrics]:
    """Norms of the RL and KD gradients (without their coefficients) and their cosine, as a pure function of
    (step, trainable and frozen parameters, batch, teachers' heads).

    One forward pass and a backward pass per term.
    """
    terms = objective.terms
    names = [t for t in terms.in_use if t in ("rl", "kd")]

    def diagnose(
        step: jax.Array, trainable: Params, frozen: Params, batch: TrainBatch, heads: Heads
    ) -> Metrics:
        at = terms.scalars(step)

        def part(rows: TrainBatch, inputs: TokenInputs) -> list[Params]:
            def values(params: Params) -> list[jax.Array]:
                sums = objective.sums(overlay(frozen, params), rows, inputs, at, heads)
                return [sums[t] for t in names]

            _, pull = jax.vjp(values, trainable)
            one_hot = [[jnp.asarray(float(i == j)) for j in range(len(names))] for i in range(len(names))]
            return [pull(seed)[0] for seed in one_hot]

        parts = (batch, terms.inputs(batch, objective.head))
        grads = accumulate(part, parts, num_microbatches(objective.config, batch))
        norms = {t: optax.global_norm(g) for t, g in zip(names, grads, strict=True)}
        out: Metrics = {f"{t}/grad_norm": n for t, n in norms.items()}
        if len(names) == 2:
            dot = optax.tree.vdot(grads[0], grads[1])
            product = norms["rl"] * norms["kd"]
            out["grad_cosine"] = jnp.where(product > 0, dot / jnp.where(product > 0, product, 1.0), 0.0)
        return out

    return diagnose
