"""Log-probabilities, entropies and exact divergences of rows of tokens, without ever holding [B, T, V].

The only shift of the whole repository is here: the hidden state at t - 1 predicts the token at t, and
what is returned at t is about the token at t. Position 0 has no predictor and scores 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import head_logits
from kdrl_jax.objective.kl import full_reverse_kl
from kdrl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """Static settings of the chunked head."""

    num_tokens: int
    """Real tokens; the columns after them are padding of the vocabulary."""
    temperature: float
    chunk: int
    """Tokens per pass through the head."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per token, [B, T]; 0 at position 0."""

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    """Of the distribution the token was drawn from, nats; no gradient."""
    reverse_kl_BT: jax.Array | None
    """Exact KL(student || teacher) where the token was drawn; None without teacher states."""
    same_top_BT: jax.Array | None
    """bool: student and teacher have the same most likely token; None without teacher states."""


def score_hidden(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    tokens_BT: jax.Array,
    settings: HeadSettings,
    teacher_hidden_BTD: jax.Array | None = None,
    teacher_kernel_DV: jax.Array | None = None,
) -> TokenScores:
    """Scores tokens from final hidden states, differentiable in `hidden` and `kernel`.

    The head runs over slices of T (rows stay on their devices); each slice is recomputed in the
    backward pass, so that only hidden states are kept.
    """
    b, t = tokens_BT.shape
    size = max(1, min(t - 1, settings.chunk // b))
    num = -(-(t - 1) // size)
    pad = num * size - (t - 1)

    def slices(x: jax.Array, first: int) -> jax.Array:
        """[B, T, ...] from `first` on, t - 1 long, padded, as [num, B, size, ...]."""
        x = jax.lax.slice_in_dim(x, first, first + t - 1, axis=1)
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, num, size, *x.shape[2:]).swapaxes(0, 1)

    inputs = [slices(hidden_BTD, 0), slices(tokens_BT, 1)]
    if teacher_hidden_BTD is not None:
        inputs.append(slices(jax.lax.stop_gradient(teacher_hidden_BTD), 0))
    logits = functools.partial(head_logits, num_tokens=settings.num_tokens, temperature=settings.temperature)

    @jax.checkpoint
    def one(kernel: jax.Array, xs: list[jax.Array]) -> tuple[jax.Array, ...]:
        student = logits(xs[0], kernel)
        logp = jax.nn.log_softmax(student, axis=-1)
        chosen = jnp.take_along_axis(logp, xs[1][..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        out = (chosen, jax.lax.stop_gradient(entropy))
        if len(xs) == 2:
            return out
        assert teacher_kernel_DV is not None
        teacher = logits(xs[2], jax.lax.stop_gradient(teacher_kernel_DV))
        return *out, full_reverse_kl(student, teacher), student.argmax(-1) == teacher.argmax(-1)

    _, outs = jax.lax.scan(lambda _, xs: (None, one(kernel_DV, xs)), None, inputs)

    def rejoin(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1).reshape(b, num * size)[:, : t - 1]
        return jnp.pad(x, ((0, 0), (1, 0)))

    columns = [rejoin(x) for x in outs]
    return TokenScores(
        columns[0], columns[1], *(columns[2:] if teacher_hidden_BTD is not None else (None, None))
    )


def score_tokens(
    model: Model, params: Params, tokens_BT: jax.Array, settings: HeadSettings, *, keep_hidden: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """A frozen model's log-probabilities [B, T] of right-padded rows, and its final hidden states
    [B, T, D] if they are to be kept for the exact divergence."""
    decoder = model.bind(params)
    hidden = decoder.hidden(tokens_BT)
    scores = score_hidden(hidden, decoder.head_kernel(), tokens_BT, settings)
    return scores.logprobs_BT, hidden if keep_hidden else None


def score_in_passes(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    settings: HeadSettings,
    *,
    rows_per_pass: int,
    keep_hidden: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`score_tokens` over `rows_per_pass` rows at a time, which bounds the memory of activations."""
    num = tokens_BT.shape[0] // rows_per_pass
    if num == 1:
        return score_tokens(model, params, tokens_BT, settings, keep_hidden=keep_hidden)
    cut = tokens_BT.reshape(rows_per_pass, num, -1).swapaxes(0, 1)
    out = jax.lax.map(lambda t: score_tokens(model, params, t, settings, keep_hidden=keep_hidden), cut)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(tokens_BT.shape[0], *x.shape[2:]), out)
