"""Log-probabilities, entropies and exact divergences of rows of tokens, without ever holding [B, T, V].

The only shift of the whole repository is here, in `predictors`: the hidden state at t - 1 predicts the
token at t, and what is returned at t is about the token at t. Only completions are scored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head, head_logits
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """Static settings of the chunked head."""

    num_tokens: int
    """Real tokens; the columns after them are padding of the vocabulary."""
    temperature: float
    chunk: int
    """Tokens per pass through the head."""
    max_new_tokens: int
    """Tokens scored per row: those of the longest completion."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per token, [B, T]; 0 outside the scored window."""

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    """Of the distribution the token was drawn from, nats; no gradient."""
    reverse_kl_BT: jax.Array | None
    """Exact KL(student || teacher) where the token was drawn; None without teacher states."""
    same_top_BT: jax.Array | None
    """bool: student and teacher have the same most likely token; None without teacher states."""


def predictors(hidden_BTD: jax.Array, starts_B: jax.Array, settings: HeadSettings) -> jax.Array:
    """The hidden states [B, N, D] that predict each row's completion tokens: the shift by one.

    Only these ever meet the vocabulary; what predicts prompt and most padding never does.

    Args:
        starts_B: position of each completion's first token, at least 1 (the prompt's length).
    """
    at = _positions(starts_B, settings) - 1
    return jnp.take_along_axis(hidden_BTD, at[:, :, None], axis=1, mode="clip")


def _positions(starts_B: jax.Array, settings: HeadSettings) -> jax.Array:
    """[B, N] positions of the completion tokens; past a row's end for some of a short buffer."""
    return starts_B[:, None] + jnp.arange(settings.max_new_tokens)


def score_predictors(
    states_BND: jax.Array,
    head: Head,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    settings: HeadSettings,
    teacher_states_BND: jax.Array | None = None,
    teacher_head: Head | None = None,
) -> TokenScores:
    """Scores completion tokens from the states of `predictors`, differentiable in states and head.

    The head runs over slices of N (rows stay on their devices); each slice is recomputed in the
    backward pass, so that only hidden states are kept.
    """
    b, n = states_BND.shape[:2]
    at = _positions(starts_B, settings)
    targets = jnp.take_along_axis(tokens_BT, at, axis=1, mode="clip")
    size = max(1, min(n, settings.chunk // b))
    num = -(-n // size)
    pad = num * size - n

    def slices(x: jax.Array) -> jax.Array:
        """[B, N, ...], padded, as [num, B, size, ...]."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, num, size, *x.shape[2:]).swapaxes(0, 1)

    inputs = [slices(states_BND), slices(targets)]
    if teacher_states_BND is not None:
        inputs.append(slices(jax.lax.stop_gradient(teacher_states_BND)))
    logits = functools.partial(head_logits, num_tokens=settings.num_tokens, temperature=settings.temperature)

    @jax.checkpoint
    def one(head: Head, xs: list[jax.Array]) -> tuple[jax.Array, ...]:
        student = logits(xs[0], head)
        logp = jax.nn.log_softmax(student, axis=-1)
        chosen = jnp.take_along_axis(logp, xs[1][..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        out = (chosen, jax.lax.stop_gradient(entropy))
        if len(xs) == 2:
            return out
        assert teacher_head is not None
        teacher = logits(xs[2], jax.lax.stop_gradient(teacher_head))
        # One tokenizer, but each model pads its vocabulary its own way; the padding is masked out.
        width = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :width], teacher[..., :width]
        exact = divergence(Divergence(), jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))
        return *out, exact, student.argmax(-1) == teacher.argmax(-1)

    _, outs = jax.lax.scan(lambda _, xs: (None, one(head, xs)), None, inputs)

    def rejoin(x: jax.Array) -> jax.Array:
        """Back to [B, T], each value at its token; what lies past the row is dropped."""
        x = x.swapaxes(0, 1).reshape(b, num * size)[:, :n]
        return jnp.zeros(tokens_BT.shape, x.dtype).at[jnp.arange(b)[:, None], at].set(x, mode="drop")

    columns = [rejoin(x) for x in outs]
    return TokenScores(
        columns[0], columns[1], *(columns[2:] if teacher_states_BND is not None else (None, None))
    )


def score_tokens(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    settings: HeadSettings,
    *,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """A frozen model's log-probabilities [B, T] of the completions, and the states [B, N, D] that
    predict them if they are to be kept for the exact divergence."""
    decoder = model.bind(params)
    states = predictors(decoder.hidden(tokens_BT), starts_B, settings)
    scores = score_predictors(states, decoder.output_head(), tokens_BT, starts_B, settings)
    return scores.logprobs_BT, states if keep_states else None


def score_in_passes(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    settings: HeadSettings,
    *,
    rows_per_pass: int,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`score_tokens` over `rows_per_pass` rows at a time, which bounds the memory of activations."""
    num = tokens_BT.shape[0] // rows_per_pass

    def one(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        return score_tokens(model, params, *rows, settings, keep_states=keep_states)

    if num == 1:
        return one((tokens_BT, starts_B))
    cut = jax.tree.map(
        lambda x: x.reshape(rows_per_pass, num, *x.shape[1:]).swapaxes(0, 1), (tokens_BT, starts_B)
    )
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(tokens_BT.shape[0], *x.shape[2:]), jax.lax.map(one, cut)
    )
