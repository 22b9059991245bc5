"""Logits to a token and its log-probability, one key per row."""

import dataclasses

import jax
import jax.numpy as jnp

from kdrl_jax.models.head import MASKED

# Candidates that top-p looks among: sorting a whole vocabulary each step costs more than the model.
MAX_CANDIDATES = 256
# Tokens that are drawn among at once: as many as a TPU's register is wide.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How tokens are drawn from a tempered distribution. Training uses all of it; the rest is for
    evaluation."""

    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    """No end token before so many others."""

    def __post_init__(self) -> None:
        if self.top_k > MAX_CANDIDATES:
            raise ValueError(f"top_k={self.top_k}: at most {MAX_CANDIDATES} candidates are kept")


def seed_key(seed: int) -> jax.Array:
    """The key everything random of a run is derived from. Always threefry: a batched key of another
    kind does not keep its identity."""
    return jax.random.key(seed, impl="threefry2x32")


def row_keys(key: jax.Array, draws_B: jax.Array, samples_B: jax.Array) -> jax.Array:
    """One key per completion from its identity alone: the prompt's draw and the sample's number."""
    fold = jax.vmap(lambda d, s: jax.random.fold_in(jax.random.fold_in(key, d), s))
    return fold(draws_B, samples_B)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    positions_B: jax.Array,
    settings: SamplerSettings,
    end_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Draws the token of each row at a completion position.

    Args:
        logits_BV: tempered, float32.
        keys_B: the rows' own keys; the position is folded in here.
        positions_B: int32, 0 for a completion's first token.
        end_ids: what `min_new_tokens` keeps from being drawn.

    Returns:
        int32 tokens [B] and their float32 log-probabilities [B] under the whole tempered distribution.
    """
    keys = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    if settings.greedy or settings.top_k or settings.top_p < 1.0 or settings.min_new_tokens:
        allowed = logits_BV
        if settings.min_new_tokens:
            ends = jnp.isin(jnp.arange(logits_BV.shape[-1]), jnp.asarray(end_ids, jnp.int32))
            allowed = jnp.where((positions_B < settings.min_new_tokens)[:, None] & ends, MASKED, logits_BV)
        if settings.greedy:
            tokens = jnp.argmax(allowed, -1)
        elif settings.top_k or settings.top_p < 1.0:
            tokens = _sample_candidates(allowed, keys, settings)
        else:
            tokens = _sample_blocks(allowed, keys)[0]
        total = jax.nn.logsumexp(logits_BV, axis=-1)
    else:
        tokens, total = _sample_blocks(logits_BV, keys)
    chosen = jnp.take_along_axis(logits_BV, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - total


def _sample_blocks(logits_BV: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token of each row's distribution, and the logsumexp of its logits.

    First a block of the vocabulary is drawn by its share of the probability, then a token of the block: the
    same distribution as one draw over all tokens, with a random number for each block and each token of one
    block instead of each token of all.
    """
    b, v = logits_BV.shape
    padding = -v % BLOCK
    blocks = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=MASKED).reshape(b, -1, BLOCK)
    shares = jax.nn.logsumexp(blocks, axis=-1)
    first, second = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(2))
    block = jax.vmap(jax.random.categorical)(first, shares)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    tokens = block * BLOCK + jax.vmap(jax.random.categorical)(second, inside)
    return tokens, jax.nn.logsumexp(shares, axis=-1)


def _sample_candidates(logits_BV: jax.Array, keys: jax.Array, settings: SamplerSettings) -> jax.Array:
    num = min(settings.top_k or MAX_CANDIDATES, logits_BV.shape[-1])
    top, ids = jax.lax.top_k(logits_BV, num)
    if settings.top_p < 1.0:
        # top-p of what top-k kept (probabilities renormalised over the candidates only under top-k).
        total = jax.nn.logsumexp(top if settings.top_k else logits_BV, axis=-1, keepdims=True)
        probs = jnp.exp(top - total)
        before = jnp.cumsum(probs, axis=-1) - probs
        top = jnp.where(before < settings.top_p, top, -jnp.inf)
    picked = jax.vmap(jax.random.categorical)(keys, top)
    return jnp.take_along_axis(ids, picked[:, None], axis=-1)[:, 0]
