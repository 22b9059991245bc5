"""Rematerialisation: what of a layer is computed again in the backward pass, instead of kept for it.

A ladder from the least work to the least memory, each rung named by what it computes again. Whatever the
rung, what enters a layer is kept.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from kdrl_jax.models.blockwise import LOGSUMEXP, OUTPUT

Remat = Literal["none", "elementwise", "mlp", "products", "full", "offload"]
LADDER: tuple[Remat, ...] = get_args(Remat)

_ENTERS = "enters_layer"
_ATTENDED = (OUTPUT, LOGSUMEXP)
_KEPT: dict[str, tuple[str, ...]] = {
    # The outputs of products have the names of their weights; that of `down` is in the next layer's input.
    "elementwise": ("q", "k", "v", *_ATTENDED, "o", "gate", "up"),
    "mlp": ("q", "k", "v", *_ATTENDED, "o"),
    "products": _ATTENDED,
    "full": (),
}

Body = Callable[[jax.Array, Any], tuple[jax.Array, None]]


def rematerialised(body: Body, remat: Remat) -> Body:
    """The body of a scan over layers, of which the backward pass computes again what the rung names:
    nothing; norms, rotations and activations; and the products of the MLP; and the other products, but not
    attention's; everything; or everything, with what enters each layer waiting in host memory."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat != "offload":
        return jax.checkpoint(body, policy=policies.save_only_these_names(*_KEPT[remat]))

    def named(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        return body(checkpoint_name(x, _ENTERS), inputs)

    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_ENTERS],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(named, policy=policy)
