"""Adam with both moments in bfloat16: half their memory."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.types import Params


def scale_by_adam_bf16(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Optax's Adam, computed in float32, whose moments are rounded to bfloat16 between updates.

    A second moment changes by (1 - b2) (g² - v) at a time. Rounded to the nearest of bfloat16's 8 bits,
    changes below v / 512 are lost, all of them: with b2 = 0.999 it never falls again, and stops on its way
    up. Rounded up or down at random, with the chances that make the mean right, each step is off but their
    sum is not (arXiv 2010.06192 does this with weights).

    The bits follow from the update's number and the parameter's place in the tree, and from nothing else:
    a run is the same when it is resumed, and on every mesh.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Params) -> Any:
        state = adam.init(params)
        half = (optax.tree.cast(moment, jnp.bfloat16) for moment in (state.mu, state.nu))
        return optax.ScaleByAdamState(state.count, *half)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        whole = (optax.tree.cast(moment, jnp.float32) for moment in (state.mu, state.nu))
        updates, new = adam.update(grads, optax.ScaleByAdamState(state.count, *whole), params)
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), new.count)
        mu, structure = jax.tree.flatten(new.mu)
        rounded = [
            _round_both(jax.random.fold_in(key, i), m, v)
            for i, (m, v) in enumerate(zip(mu, jax.tree.leaves(new.nu), strict=True))
        ]
        moments = (jax.tree.unflatten(structure, [pair[i] for pair in rounded]) for i in range(2))
        return updates, optax.ScaleByAdamState(new.count, *moments)

    return optax.GradientTransformation(init, update)


def _round_both(key: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both moments of one parameter; each takes half of one draw's 32 bits."""
    bits = jax.random.bits(key, mu.shape, jnp.uint32)
    return round_stochastically(mu, bits >> 16), round_stochastically(nu, bits & 0xFFFF)


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16, whose mean over the bits is x.

    bfloat16 is the upper half of float32: what is added to the lower half carries into the upper one as
    often as x is far from the smaller neighbour. A number that bfloat16 has stays what it is.

    Args:
        bits: uint32, uniform in [0, 2^16).
    """
    exact = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((exact + bits) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # the sum would make nan a number
