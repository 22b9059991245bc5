"""Keys and values of the tokens that rows have seen, in floats or in 8 bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax.models.decoder_config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One stacked array for all layers, so that scanned layers write it in place; and positions second to
    last: with rows or heads there, TPUs would lay it out anew for the products, at twice the memory."""

    keys: jax.Array
    """[L, B, K, S, H], rotated."""
    values: jax.Array
    key_scales: jax.Array | None = None
    """float32 [L, B, K, S]: what each int8 key is multiplied by; None for a cache of floats."""
    value_scales: jax.Array | None = None

    @property
    def length(self) -> int:
        """S: positions of each row."""
        return self.keys.shape[3]

    def write_columns(
        self, layer: jax.Array, positions_B: jax.Array, keys_BKH: jax.Array, values_BKH: jax.Array
    ) -> "KVCache":
        """Sets the key and the value of each row's position in a layer."""
        b, k, _ = keys_BKH.shape
        index = (layer, jnp.arange(b)[:, None], jnp.arange(k), positions_B[:, None])

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            if new.ndim == 3:
                # Promised unique and in bounds, a write is in place; without that it copies the cache.
                return old.at[index].set(new, unique_indices=True, mode="promise_in_bounds")
            # Scales, of which a layer has few: for single numbers TPUs would lay them all out anew.
            here = jnp.arange(old.shape[3]) == positions_B[:, None, None]
            held = jax.lax.dynamic_index_in_dim(old, layer, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(old, jnp.where(here, new[..., None], held), layer, 0)

        return jax.tree.map(put, self, self._like(keys_BKH, values_BKH))

    def write_block(self, start: tuple[Any, ...], keys: jax.Array, values: jax.Array) -> "KVCache":
        """Sets a block [R, K, C, H] of one layer, that begins at (layer, row, head, position)."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new[None], (*start, 0)[: old.ndim])

        return jax.tree.map(put, self, self._like(keys, values))

    def read_rows(self, layer: Any, rows: jax.Array, length: int) -> "KVCache":
        """Positions [0, length) of some rows of one layer, without the dimension L."""

        def take(x: jax.Array) -> jax.Array:
            return x.at[layer, rows, :, :length].get(mode="promise_in_bounds")

        return jax.tree.map(take, self)

    def copy_row(self, row: Any, other: "KVCache", other_row: Any) -> "KVCache":
        """All layers of a row of another cache, at the beginning of a row of this one."""

        def copy(to: jax.Array, source: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice_in_dim(source, other_row, 1, axis=1)
            return jax.lax.dynamic_update_slice(to, block, (0, row, *[0] * (to.ndim - 2)))

        return jax.tree.map(copy, self, other)

    def _like(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        if self.key_scales is None:
            return KVCache(keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        (k, k_scales), (v, v_scales) = quantize_vectors(keys), quantize_vectors(values)
        return KVCache(k, v, k_scales, v_scales)


def empty_cache(config: DecoderConfig, num_rows: int, length: int, dtype: Any) -> KVCache:
    """A cache of zeros: what is not seen must still be finite, since it is multiplied by 0."""
    shape = (config.num_layers, num_rows, config.num_kv_heads, length, config.head_dim)
    scales = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scales, scales)


def bytes_per_position(config: DecoderConfig, dtype: Any) -> int:
    """Bytes of one position of one row, over all layers and heads."""
    of_vector = config.head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == jnp.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * of_vector


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [..., H] to int8 and float32 scales [...]; the largest entry of each becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    divisor = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / divisor[..., None]).astype(jnp.int8), scale
