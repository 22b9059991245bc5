"""Parameters as the decode loop reads them."""

import functools
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
    """The parameters in their `decode_layout`, by one program; leaves that are so already are not copied."""
    wanted = decode_layout(model, params, mesh)
    leaves, treedef = jax.tree.flatten(params)
    places = jax.tree.leaves(wanted)
    moved = [i for i, (x, to) in enumerate(zip(leaves, places, strict=True)) if not _lies_as(x, to)]
    if moved:
        relaid = relay(tuple(places[i] for i in moved))(tuple(leaves[i] for i in moved))
        for i, x in zip(moved, relaid, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


@functools.cache
def relay(wanted: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """The program that gives leaves the types and places wanted of them: rounded first, so that what crosses
    between devices is what is multiplied."""

    def move(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x.astype(to.dtype) for x, to in zip(leaves, wanted, strict=True))

    return jax.jit(move, out_shardings=tuple(to.sharding for to in wanted))


def _lies_as(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
    return x.dtype == wanted.dtype and x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
