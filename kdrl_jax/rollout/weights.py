"""Parameters as the decode loop reads them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.models.decoder import Model
from kdrl_jax.types import Params


def decode_layout(model: Model, abstract: Params, mesh: Mesh) -> Params:
    """Types, shapes and shardings of a model's parameters while it samples.

    Weights have the type they are multiplied in: the loop reads each at every step, and float32 would be
    read to be rounded. Norms and scales are used in float32, and stay.
    """

    def leaf(path: tuple[Any, ...], x: Any, dims: str) -> jax.ShapeDtypeStruct:
        stays = x.dtype == jnp.int8 or str(path[-1].key).endswith(("norm", "_scale"))
        place = sharding.sharding(dims, x.shape, mesh, sharding.DECODE_RULES)
        return jax.ShapeDtypeStruct(x.shape, x.dtype if stays else model.compute_dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(leaf, abstract, model.dims)


def to_decode(model: Model, params: Params, mesh: Mesh) -> Params:
    """The parameters in their `decode_layout`; leaves that are so already are not copied."""
    return jax.tree.map(
        lambda x, wanted: jax.device_put(x.astype(wanted.dtype), wanted.sharding),
        params,
        decode_layout(model, params, mesh),
    )
