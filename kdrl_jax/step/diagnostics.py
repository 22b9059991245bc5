"""The RL and KD gradients apart, at one point: how large each is, and whether they agree."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.models.adapters import overlay
from kdrl_jax.step.objective import Heads, Minibatch, Objective, Part, StepInputs
from kdrl_jax.types import Metrics, Params


def make_diagnostics(
    objective: Objective,
) -> Callable[[jax.Array, Params, Params, Minibatch, Heads], Metrics]:
    """Norms of the RL and KD gradients (without their coefficients) and their cosine, as a pure function of
    (step, trainable and frozen parameters, minibatch, teachers' heads).

    One forward pass and a backward pass per term.
    """
    terms = objective.terms
    names = [t for t in terms.in_use if t in ("rl", "kd")]

    def diagnose(
        step: jax.Array, trainable: Params, frozen: Params, minibatch: Minibatch, heads: Heads
    ) -> Metrics:
        shared = StepInputs(terms.scalars(step), heads, minibatch.batch)

        def gradients(part: Part) -> list[Params]:
            def values(params: Params) -> list[jax.Array]:
                sums = objective.sums(overlay(frozen, params), part, shared)
                return [sums[t] for t in names]

            _, pull = jax.vjp(values, trainable)
            grads: list[Params] = []
            for i in range(len(names)):
                seed = [jnp.asarray(float(i == j)) for j in range(len(names))]
                # One after the other: side by side, they would need the memory of both.
                seed, grads = jax.lax.optimization_barrier((seed, grads))
                grads.append(pull(seed)[0])
            return grads

        grads = objective.accumulate(gradients, minibatch)
        norms = {t: optax.global_norm(g) for t, g in zip(names, grads, strict=True)}
        out: Metrics = {f"{t}/grad_norm": n for t, n in norms.items()}
        if len(names) == 2:
            dot = optax.tree.vdot(grads[0], grads[1])
            product = norms["rl"] * norms["kd"]
            out["grad_cosine"] = jnp.where(product > 0, dot / jnp.where(product > 0, product, 1.0), 0.0)
        return out

    return diagnose
