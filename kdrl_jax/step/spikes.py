"""What loss and gradient norm usually are, to notice the ones that are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax.types import Usual

FIRST = 20
"""Updates that are only looked at."""
MEMORY = 50
"""Updates in which the past is forgotten: means are exact over the first so many, exponential then."""
_LEAST_SPREAD = np.array([0.05, 0.1], np.float32)
"""A spread is never taken for smaller: of the loss's mean, and of the logarithm of the norm in itself."""


def measures(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """float32 [2]: what is compared. The norm by its logarithm, since it ranges over powers of ten."""
    return jnp.stack([loss, jnp.log(jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny))])


def is_spike(usual: Usual, now_2: jax.Array, sigmas: float) -> jax.Array:
    """bool: whether one of the two is that many standard deviations above its usual values."""
    scale = jnp.stack([jnp.abs(usual.mean_2[0]), jnp.ones(())])
    spread = jnp.maximum(jnp.sqrt(usual.variance_2), _LEAST_SPREAD * scale)
    above = now_2 - usual.mean_2 > sigmas * spread
    return (usual.count >= FIRST) & jnp.any(above)


def remember(usual: Usual, now_2: jax.Array, counts: jax.Array) -> Usual:
    """With one more update, if it counts: Welford's mean and variance, later exponentially weighted ones."""
    weight = jnp.maximum(1.0 / (usual.count + 1), 1.0 / MEMORY)
    away = now_2 - usual.mean_2
    new: Any = Usual(
        usual.count + 1,
        usual.mean_2 + weight * away,
        (1 - weight) * (usual.variance_2 + weight * away**2),
    )
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, usual)
