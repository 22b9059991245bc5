"""Final hidden states to logits: the one way, shared by the sampler and the trainer."""

import jax
import jax.numpy as jnp

# Finite, so that differences of two masked columns are 0 and not nan; exp() of it is 0.
MASKED = -1e30


def head_logits(hidden: jax.Array, kernel_DV: jax.Array, *, num_tokens: int, temperature: float) -> jax.Array:
    """Tempered float32 logits [..., V]; columns from `num_tokens` on are padding and masked out.

    Sampler, student and teacher all go through here, so that a log-probability means the same policy
    everywhere.
    """
    logits = jnp.einsum(
        "...d,dv->...v", hidden, kernel_DV.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if temperature != 1.0:
        logits = logits / temperature
    if num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, MASKED)
    return logits
