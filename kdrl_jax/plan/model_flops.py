"""Model FLOPs: what a decoder has to compute whatever the program, as in PaLM (arXiv 2204.02311, appendix B).

A token costs 2 operations for each entry of the matrices it meets, and in each layer 4 N H for each key it
sees: its product with the query, and its value's part of the sum. Training costs three times that, which is
the paper's 6 N + 12 L H Q T for each token, with two differences: the paper lets every token see all T
positions, and here it sees those up to its own, or its window; and the vocabulary head counts on the tokens
that meet it, which are the completions'. Looking up an embedding, norms, biases, adapters and what is
computed again in a backward pass cost nothing.
"""

import dataclasses

from kdrl_jax.models.block import READS_AND_WRITES
from kdrl_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class KeysSeen:
    """Keys that a token sees, its own included, in the mean over the tokens."""

    full: float
    """In layers without a window."""
    sliding: float
    """In sliding layers."""


def keys_seen(config: DecoderConfig, begin: int, end: int) -> KeysSeen:
    """What the tokens at positions [begin, end) of a sequence see: all of it, a completion, or one token.

    Raises:
        ValueError: when there are none.
    """
    if not 0 <= begin < end:
        raise ValueError(f"no positions in [{begin}, {end}): end must be above begin, and begin at least 0")
    window = end if config.sliding_window is None else config.sliding_window
    # Tokens before position `window` see all that is there.
    growing = max(min(window, end) - begin, 0)
    first = begin + 1
    total = growing * (2 * first + growing - 1) / 2 + (end - begin - growing) * window
    return KeysSeen((begin + 1 + end) / 2, total / (end - begin))


def layer_parameters(config: DecoderConfig) -> int:
    """Entries of the matrices of all layers."""
    sizes = config.sizes
    total = 0
    for reads, writes in READS_AND_WRITES.values():
        entries = sizes["L"]
        for letter in f"{reads} {writes}".split():
            entries *= sizes[letter]
        total += entries
    return total


def forward_flops(config: DecoderConfig, num_tokens: float, num_head_tokens: float, seen: KeysSeen) -> float:
    """Operations of one pass.

    Args:
        num_tokens: that the layers take.
        num_head_tokens: of them, those whose states meet the vocabulary.
        seen: in the mean over `num_tokens`.
    """
    num_sliding = sum(config.sliding_layers)
    keys = (config.num_layers - num_sliding) * seen.full + num_sliding * seen.sliding
    attention = 4 * config.num_heads * config.head_dim * keys
    head = 2 * config.vocab_size * config.embed_dim
    return num_tokens * (2 * layer_parameters(config) + attention) + num_head_tokens * head


def training_flops(
    config: DecoderConfig,
    num_tokens: float,
    num_head_tokens: float,
    seen: KeysSeen,
    *,
    frozen_weights: bool = False,
) -> float:
    """Operations of a pass and of the gradient in all matrices; arguments as `forward_flops`.

    Args:
        frozen_weights: only activations have a gradient, as under adapters: a third less, but for attention,
            which has no weights.
    """
    whole = 3 * forward_flops(config, num_tokens, num_head_tokens, seen)
    if frozen_weights:
        whole -= forward_flops(config, num_tokens, num_head_tokens, KeysSeen(0, 0))
    return whole
