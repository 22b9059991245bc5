"""Rotary position embeddings, plain and with every published way to stretch the context.

Formulas: RoPE (arXiv 2104.09864); linear (arXiv 2306.15595); dynamic NTK (the NTK-aware base of the YaRN
paper, arXiv 2309.00071, section 3.1, for the length reached); YaRN (the same paper); `llama3` (the model
card of Llama 3.1). Constants and rounding follow transformers, whose files they are read from.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys. Fields that a kind does not name keep their defaults."""

    theta: float = 10000.0
    """The base: dimension pair i turns by theta^(-2i/H) per position."""
    kind: RopeKind = "default"
    factor: float = 1.0
    """How many times longer the context is made. All kinds but `default`."""
    original_positions: int | None = None
    """The context before it was stretched. `dynamic`, `llama3` and `yarn`."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths above original_positions / this are stretched whole."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below original_positions / this stay."""
    beta_fast: float = 32.0
    """`yarn`: pairs that turn at least so often within the original context stay."""
    beta_slow: float = 1.0
    """`yarn`: pairs that turn at most so often are stretched whole."""
    truncate: bool = True
    """`yarn`: whether those two bounds are rounded to whole pairs."""
    attention_factor: float = 1.0
    """`yarn`: multiplies cosines and sines, and so the scores by its square."""


def rope_tables(rope: Rope, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., H/2] (float32) at integer positions [...]."""
    angles = positions.astype(jnp.float32)[..., None] * _frequencies(rope, positions, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates halves (the Hugging Face layout): x [..., heads, H], tables [..., H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def _frequencies(rope: Rope, positions: jax.Array, head_dim: int) -> jax.Array | np.ndarray:
    """Radians per position of each pair: [H/2], or [..., H/2] where they depend on the position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if rope.kind == "dynamic":
        return _dynamic(rope, positions, head_dim, exponents)
    plain = np.float32(1) / np.float32(rope.theta) ** exponents
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / np.float32(rope.factor)
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, head_dim)


def _dynamic(rope: Rope, positions: jax.Array, head_dim: int, exponents: np.ndarray) -> jax.Array:
    """The base that fits a context of `position + 1` tokens, and the plain one within the original.

    A token is turned by the context it was written in, as transformers turns it when it generates one
    token at a time from a cache. transformers' single pass over a long row turns every token by the
    length of that row (of the longest in its batch) instead, so its scores differ from its own samples;
    here sampler and trainer agree.
    """
    assert rope.original_positions is not None
    length = jnp.maximum(positions + 1, rope.original_positions).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_positions - (rope.factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** exponents


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones stay, and those between are blended."""
    assert rope.original_positions is not None
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = np.float32(rope.original_positions) * plain / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * plain / rope.factor + blend * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Pairs that turn often stay, pairs that turn seldom are stretched, and those between are blended."""
    assert rope.original_positions is not None
    context = rope.original_positions / (2 * math.pi)

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        ratio = math.log(context / turns)
        return head_dim * ratio / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0, 1)
    return (plain / rope.factor * stretched + plain * (1 - stretched)).astype(np.float32)
