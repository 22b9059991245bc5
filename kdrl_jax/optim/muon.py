"""Muon (kellerjordan.github.io/posts/muon): momentum, made orthogonal, for the layers' matrices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kdrl_jax.optim.layouts import Layout
from kdrl_jax.sharding import RULES, Rules, constrain
from kdrl_jax.types import Params

MOMENTUM = 0.95
"""With Nesterov's step, and five Newton-Schulz iterations, as in both sources."""

RMS = 0.2
"""Root mean square of an update before the learning rate, which is about AdamW's (arXiv 2502.16982, section
2.2), so that one learning rate, and one weight decay, serve both kinds of parameters."""


def scale_by_muon(layouts: Params, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, `adam` for embedding, head, norms and biases.

    Both sources leave these to AdamW: what multiplies one-hot tokens or gives logits is no hidden layer, and
    vectors have no singular values. q, k and v are matrices of their own (as the post found better), with
    all their heads, and each layer is made orthogonal alone.

    Args:
        layouts: a tree like the parameters'.
    """
    of_path = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layouts)}

    def orthogonal(updates: Params, _: Any) -> Params:
        # By path: Adam's leaves are masked out of the tree.
        return jax.tree_util.tree_map_with_path(lambda p, x: _orthogonal(x, of_path[_key(p)]), updates)

    muon = optax.chain(optax.trace(MOMENTUM, nesterov=True), optax.stateless(orthogonal))
    kinds = jax.tree.map(lambda x: "muon" if x.stacked and x.is_matrix else "adam", layouts)
    return optax.partition({"muon": muon, "adam": adam}, kinds)


def _orthogonal(x: jax.Array, layout: Layout) -> jax.Array:
    """Each layer's matrix with its singular values near 1, times what makes its root mean square `RMS`.

    Layers are dealt out to the devices for it, and each device takes one after the other. Products over
    sharded dimensions, 15 for a matrix, would bring all layers whole to every device, to do the same there.
    """
    # Without momentum, optax's Muon is the orthogonalisation alone, and its state is of no use.
    newton_schulz = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )

    def one_each(matrices: jax.Array) -> jax.Array:
        return newton_schulz.update(matrices, newton_schulz.init(matrices))[0]

    num_layers, *sizes = layout.fold(x).shape
    hands, places = _deal(num_layers)
    dims = " ".join(["L", *(layout.letters[group[0]] for group in layout.groups)])
    padded = jnp.pad(layout.fold(x), ((0, -num_layers % hands), (0, 0), (0, 0)))  # zeros stay zeros
    for rules in places:
        padded = constrain(padded, dims, rules)
    each = padded.reshape(hands, -1, *sizes).swapaxes(0, 1)
    made = jax.lax.map(one_each, each).swapaxes(0, 1).reshape(padded.shape)
    for rules in reversed(places):
        made = constrain(made, dims, rules)
    # An orthogonal [rows, columns] has a root mean square of 1 / sqrt(max(rows, columns)).
    return made[:num_layers].reshape(x.shape) * (RMS * math.sqrt(max(sizes)))


def _deal(num_layers: int) -> tuple[int, list[Rules]]:
    """Into how many hands layers are dealt, and the places on the way there from the parameters': one axis
    at a time, since XLA moves two at once by bringing everything everywhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, []
    axes = ["fsdp", "tensor"]
    hands = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if hands < num_layers:  # else copies of the parameters do the same work, at no loss of time
        axes, hands = [*axes, "data"], hands * mesh.shape["data"]
    whole = dict.fromkeys(RULES)
    between = {**RULES, "D": None, "L": "fsdp"}
    return hands, [RULES, between, {**whole, "L": tuple(axes)}]


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path)
