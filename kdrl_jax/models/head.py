"""Final hidden states to logits: the one way, shared by the sampler and the trainer."""

import dataclasses

import jax
import jax.numpy as jnp

from kdrl_jax.models.attention import soft_cap

# Finite, so that differences of two masked columns are 0 and not nan; exp() of it is 0.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A model's vocabulary head, as it travels through compiled functions."""

    kernel: jax.Array
    """[V, D] (the embedding itself) when tied, else [D, V]."""
    scale_V: jax.Array | None
    """Scale of each token's int8 column; None for a kernel of floats."""
    tied: bool = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})
    """Bound on |logit|, applied before temperature and padding."""

    @property
    def dims(self) -> str:
        """The kernel's dimensions, in the letters of `sharding`."""
        return "V D" if self.tied else "D V"

    @property
    def num_columns(self) -> int:
        """V: columns of the logits, padding included."""
        return self.kernel.shape[0 if self.tied else 1]


def head_logits(
    hidden: jax.Array, head: Head, *, num_tokens: int, temperature: jax.Array | float
) -> jax.Array:
    """Tempered float32 logits [..., V]; columns from `num_tokens` on are padding and masked out.

    Sampler, student and teacher all go through here, so that a log-probability means the same policy
    everywhere.

    Args:
        hidden: [..., D].
        temperature: a scalar, or an array about the leading dimensions of `hidden` (one per row).
    """
    return temper(products(hidden, head), head, num_tokens=num_tokens, temperature=temperature)


def products(hidden: jax.Array, head: Head) -> jax.Array:
    """The bare products [..., V] of states and kernel: taken in the states' type, summed in float32."""
    equation = "...d,vd->...v" if head.tied else "...d,dv->...v"
    kernel = head.kernel.astype(hidden.dtype)
    return jnp.einsum(equation, hidden, kernel, preferred_element_type=jnp.float32)


def products_gradient(
    cotangent: jax.Array, hidden: jax.Array, head: Head, *, kernel: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of `products` in the states (in their type) and, if asked for, in the kernel (float32).

    The cotangent [..., V] is rounded to the states' type, as the operands of `products` are, so that the
    two products here cost what that one does; all are summed in float32.
    """
    cotangent = cotangent.astype(hidden.dtype)
    to_states = "...v,vd->...d" if head.tied else "...v,dv->...d"
    weights = head.kernel.astype(hidden.dtype)
    in_states = jnp.einsum(to_states, cotangent, weights, preferred_element_type=jnp.float32)
    in_kernel = None
    if kernel:
        operands = (cotangent, hidden) if head.tied else (hidden, cotangent)
        a, b = (x.reshape(-1, x.shape[-1]) for x in operands)
        in_kernel = jnp.einsum("na,nb->ab", a, b, preferred_element_type=jnp.float32)
    return in_states.astype(hidden.dtype), in_kernel


def temper(products: jax.Array, head: Head, *, num_tokens: int, temperature: jax.Array | float) -> jax.Array:
    """What follows the product on the way to `head_logits`: scale, softcap, temperature, padding."""
    logits = products if head.scale_V is None else products * head.scale_V
    logits = soft_cap(logits, head.softcap)
    t = jnp.asarray(temperature, jnp.float32)
    logits = logits / t.reshape(t.shape + (1,) * (logits.ndim - t.ndim))
    if num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, MASKED)
    return logits
