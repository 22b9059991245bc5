"""Activations times weights, with a gradient whose operands stand in the cheaper order."""

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, weight: jax.Array, reads: str, writes: str) -> jax.Array:
    """x [..., what the weight reads] times the weight: [..., what it writes].

    Args:
        reads, writes: one letter per dimension of the weight, `d` and `nh`.
    """
    return jnp.einsum(f"...{reads},{reads}{writes}->...{writes}", x, weight)


def _fwd(x: jax.Array, weight: jax.Array, reads: str, writes: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(x, weight, reads, writes), (x, weight)


def _bwd(
    reads: str, writes: str, kept: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    in_x = jnp.einsum(f"...{writes},{reads}{writes}->...{reads}", cotangent, weight)
    # The weight's gradient sums over all positions. On CPUs XLA lays the first operand of such a product
    # out anew, together with all that is fused into it; the wider one (of an MLP, the gated) costs more
    # than the product itself, and is what jax's own rule puts first.
    rows = x.shape[: x.ndim - len(reads)]
    x, cotangent = (y.reshape(math.prod(rows), *y.shape[len(rows) :]) for y in (x, cotangent))
    if math.prod(x.shape[1:]) <= math.prod(cotangent.shape[1:]):
        in_weight = jnp.einsum(f"r{reads},r{writes}->{reads}{writes}", x, cotangent)
    else:
        swapped = jnp.einsum(f"r{writes},r{reads}->{writes}{reads}", cotangent, x)
        in_weight = jnp.moveaxis(swapped, tuple(range(len(writes))), tuple(range(-len(writes), 0)))
    return in_x, in_weight


product.defvjp(_fwd, _bwd)
