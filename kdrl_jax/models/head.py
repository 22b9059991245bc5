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
    def num_columns(self) -> int:
        """V: columns of the logits, padding included."""
        return self.kernel.shape[0 if self.tied else 1]


def head_logits(hidden: jax.Array, head: Head, *, num_tokens: int, temperature: float) -> jax.Array:
    """Tempered float32 logits [..., V]; columns from `num_tokens` on are padding and masked out.

    Sampler, student and teacher all go through here, so that a log-probability means the same policy
    everywhere.
    """
    equation = "...d,vd->...v" if head.tied else "...d,dv->...v"
    kernel = head.kernel.astype(hidden.dtype)
    logits = jnp.einsum(equation, hidden, kernel, preferred_element_type=jnp.float32)
    if head.scale_V is not None:
        logits = logits * head.scale_V
    logits = soft_cap(logits, head.softcap)
    if temperature != 1.0:
        logits = logits / temperature
    if num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, MASKED)
    return logits
