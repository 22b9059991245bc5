"""The loss as a textbook has it: one sequence per row, padded, all logits at once, nothing computed again."""

import jax
import jax.numpy as jnp

from kdrl_jax.models.attend import PLAIN
from kdrl_jax.models.head import head_logits
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.scoring import TokenScores
from kdrl_jax.step.terms import Terms


class Rows:
    """Rows of rollouts where `Terms.inputs` expects packed ones."""

    def __init__(self, mask_BT):
        self.mask_BT = mask_BT

    def take(self, x):
        """As arrays [B, T], at the completion tokens."""
        x = x if x.ndim > 1 else jnp.broadcast_to(x[:, None], self.mask_BT.shape)
        return jnp.where(self.mask_BT, x, jnp.zeros_like(x))


def log_probabilities(model, params, tokens_BT, num_tokens, temperature=1.0):
    """[B, T, V] of each token given those before it; entry 0 of a row is about nothing."""
    assert model.attention == PLAIN
    decoder = model.bind(params)
    logits = head_logits(
        decoder.hidden(tokens_BT), decoder.output_head(), num_tokens=num_tokens, temperature=temperature
    )
    logp = jax.nn.log_softmax(logits)
    return jnp.concatenate([jnp.zeros_like(logp[:, :1]), logp[:, :-1]], axis=1)


def token_logprobs(logp_BTV, tokens_BT):
    return jnp.take_along_axis(logp_BTV, tokens_BT[:, :, None], axis=2)[:, :, 0]


def entropy(logp_BTV):
    return -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def loss(config, model, params, batch, tokens_BT, num_tokens, teacher_logp_BTV=None, step=0):
    """The update's loss and its metrics' sums."""
    terms = Terms(config)
    logp = log_probabilities(model, params, tokens_BT, num_tokens, batch.temperature)
    more = {}
    if teacher_logp_BTV is not None:
        width = min(logp.shape[-1], teacher_logp_BTV.shape[-1])
        pair = logp[..., :width], teacher_logp_BTV[..., :width]
        top = jnp.argmax(pair[0], axis=-1)
        mass = jnp.take_along_axis(pair[1], top[..., None], axis=-1)[..., 0]
        more = {
            "divergence": divergence(terms.divergence, *pair),
            "reverse_kl": jax.lax.stop_gradient(divergence(Divergence("reverse_kl"), *pair)),
            "same_top": mass >= pair[1].max(-1),
            "teacher_mass": jnp.exp(mass),
        }
    scores = TokenScores(token_logprobs(logp, tokens_BT), entropy(logp), **more)
    inputs = terms.inputs(batch, Rows(batch.completion_mask_BT))
    return terms.loss(scores, (inputs, terms.scalars(jnp.int32(step))))
