"""LoRA adapters as a part of a model's parameters: taken apart, put together, merged into the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax.models.block import READS_AND_WRITES, LoRA
from kdrl_jax.types import Params


def split(params: Params) -> tuple[Params, Params]:
    """(adapters, everything else), as two trees; a model without adapters gives ({}, params)."""
    adapters: Params = {}
    rest: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner, outer = split(value)
            if inner:
                adapters[name] = inner
            if outer:
                rest[name] = outer
        elif _is_adapter(name):
            adapters[name] = value
        else:
            rest[name] = value
    return adapters, rest


def overlay(base: Params, top: Params) -> Params:
    """One tree of both; a leaf of `top` stands over one of `base`. Leaves are not copied."""
    merged: dict[str, Any] = dict(base)
    for name, value in top.items():
        inner = merged.get(name)
        merged[name] = overlay(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def merge(params: Params, lora: LoRA, dtype: Any = None) -> Params:
    """The parameters of the model without adapters that computes the same: W + alpha / rank * A B.

    Each weight is summed in float32, and taken out of `params` for it, so that no second model is held.

    Args:
        params: of a model with adapters, as `overlay` gives them.
        dtype: of all that is returned; None keeps each leaf's own. Summed into bfloat16 weights, most of
            what small adapters have learnt would be rounded away.
    """
    out: dict[str, Any] = {}
    for name in [name for name in params if not _is_adapter(name)]:
        value = params[name]
        if isinstance(value, dict):
            out[name] = merge(value, lora, dtype)
        elif f"{name}_lora_a" in params:
            a, b = params[f"{name}_lora_a"], params[f"{name}_lora_b"]
            add = jax.jit(_add, static_argnums=(3, 4, 5), out_shardings=value.sharding)
            out[name] = add(params.pop(name), a, b, name, lora.scale, dtype or value.dtype)
        else:
            out[name] = value.astype(dtype or value.dtype)
    return out


def _is_adapter(name: str) -> bool:
    return name.endswith(("_lora_a", "_lora_b"))


def _add(weight: jax.Array, a: jax.Array, b: jax.Array, name: str, scale: float, dtype: Any) -> jax.Array:
    reads, writes = (dims.lower().replace(" ", "") for dims in READS_AND_WRITES[name])
    product = jnp.einsum(f"l{reads}r,lr{writes}->l{reads}{writes}", a, b, precision="highest")
    return (weight.astype(jnp.float32) + scale * product).astype(dtype)
