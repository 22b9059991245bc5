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
    program, moved = relay(model, params, mesh)
    leaves, treedef = jax.tree.flatten(params)
    relaid = program([leaves[i] for i in moved]) if moved else []
    for i, x in zip(moved, relaid, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


def relay(model: Model, params: Params, mesh: Mesh) -> tuple[Any, list[int]]:
    """The program that lays out for sampling what is not laid out so, and which leaves these are.

    Args:
        params: arrays, or abstract ones.
    """
    leaves, wanted = (jax.tree.leaves(x) for x in (params, decode_layout(model, params, mesh)))
    moved = [i for i, (x, to) in enumerate(zip(leaves, wanted, strict=True)) if not _lies_as(x, to)]
    return _program(tuple(wanted[i] for i in moved)), moved


@functools.cache
def _program(wanted: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    def move(leaves: list[jax.Array]) -> list[jax.Array]:
        # Rounded first: what crosses between devices is what is multiplied.
        return [x.astype(to.dtype) for x, to in zip(leaves, wanted, strict=True)]

    return jax.jit(move, out_shardings=[to.sharding for to in wanted])


def _lies_as(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
    return x.dtype == wanted.dtype and x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
