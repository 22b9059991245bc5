"""Weights in 8 bits: symmetric, one scale per output channel."""

from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax.models.block import READS_AND_WRITES
from kdrl_jax.types import Params


def summed_axes(path: str) -> tuple[int, ...]:
    """The dimensions of a leaf (of one layer, where stacked) that its product sums over: the first two of
    `layers.attn.o`, the last of the embedding, whose rows are the columns of a tied head."""
    name = path.rpartition(".")[2]
    if name == "embed":
        return (1,)
    return tuple(range(len(READS_AND_WRITES[name][0].split()))) if name in READS_AND_WRITES else (0,)


def quantize(weight: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Rounds a weight to int8; the largest of each output channel becomes 127.

    Args:
        axes: the dimensions that a product sums over.

    Returns:
        int8 of the same shape, and float32 scales of the other dimensions; their product is the weight,
        to within half a scale.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=axes, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(weight / scale).astype(jnp.int8), scale.squeeze(axes)


def quantize_params(params: Params, abstract: Params, path: str = "") -> Params:
    """The parameters with those leaves in int8 that `abstract` (types and shardings) wants so.

    Leaf by leaf; each float leaf of `params` is taken out of the tree as soon as its int8 one is there.
    """
    out: dict[str, Any] = {}
    for name in list(params):
        wanted, inner = abstract[name], path + name
        value = params.pop(name)
        if isinstance(value, dict):
            out[name] = quantize_params(value, wanted, f"{inner}.")
        elif wanted.dtype != jnp.int8:
            out[name] = value
        else:
            axes = summed_axes(inner)
            if inner.startswith("layers."):  # stacked: the same of every layer
                axes = tuple(axis + 1 for axis in axes)
            scale = abstract[f"{name}_scale"]
            shrink = jax.jit(quantize, static_argnums=1, out_shardings=(wanted.sharding, scale.sharding))
            out[name], out[f"{name}_scale"] = shrink(value, axes)
    return out
