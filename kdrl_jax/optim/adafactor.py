"""Adafactor (arXiv 1804.04235): of a matrix's squared gradients only the means over rows and columns."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.optim.layouts import Layout
from kdrl_jax.types import Params

MIN_FACTORED = 128
"""Matrices with fewer rows or columns (adapters) keep a second moment per element, as do vectors."""


def scale_by_adafactor(layouts: Params, min_factored: int = MIN_FACTORED) -> optax.GradientTransformation:
    """Algorithm 4 of the paper with a learning rate from outside, so that the settings of the learning
    rate mean what they mean to Adam: no first moment, decay 1 - step^-0.8, and the update of each matrix
    divided by its root mean square where that is above 1.

    Optax factors over the two largest dimensions of whatever it is given: of [L, D, N, H] these can be
    layers, or both on one side of the matrix. So it is given one matrix [rows, columns], and mapped over L:
    no layer's statistics, and not its clipping, see another's.

    Args:
        layouts: a tree like the parameters'.

    Returns:
        A transformation whose state is optax's `FactoredState`: [L, rows] and [L, columns] are `v_row` and
        `v_col`, the smaller of the two first; `v` is the layout's whole [L, ...] where nothing is factored;
        what a parameter does not have of them is [1].
    """
    rms = optax.scale_by_factored_rms(min_dim_size_to_factor=min_factored)
    clip = optax.clip_by_block_rms(1.0)

    def axes(layout: Layout, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """Which of (v_row, v_col, v) a stacked parameter has for each layer."""
        factored = layout.is_matrix and min(layout.sizes(shape)) >= min_factored
        return (0, 0, None) if factored else (None, None, 0)

    def init(params: Params) -> Any:
        def one(param: jax.Array, layout: Layout) -> tuple[jax.Array, ...]:
            def layer(p: jax.Array) -> tuple[jax.Array, ...]:
                return tuple(rms.init(p)[1:])

            over = jax.vmap(layer, out_axes=axes(layout, param.shape)) if layout.stacked else layer
            return over(layout.fold(param))

        return optax.FactoredState(jnp.zeros((), jnp.int32), *_unzip(params, 3, one, layouts))

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        def one(grad: jax.Array, row: Any, column: Any, full: Any, layout: Layout) -> tuple[jax.Array, ...]:
            def layer(g: jax.Array, *moments: jax.Array) -> tuple[jax.Array, ...]:
                # Of the parameters optax asks the shape and type alone: the gradient's.
                scaled, new = rms.update(g, optax.FactoredState(state.count, *moments), g)
                return clip.update(scaled, optax.EmptyState())[0], *new[1:]

            over = layer
            if layout.stacked:
                mapped = (0, *axes(layout, grad.shape))
                over = jax.vmap(layer, in_axes=mapped, out_axes=mapped)
            scaled, *new = over(layout.fold(grad), row, column, full)
            return scaled.reshape(grad.shape), *new

        updates, *moments = _unzip(grads, 4, one, *state[1:], layouts)
        return updates, optax.FactoredState(optax.safe_increment(state.count), *moments)

    return optax.GradientTransformation(init, update)


def _unzip(tree: Params, number: int, function: Any, *rest: Any) -> list[Params]:
    """So many trees from a function that returns so many arrays per leaf."""
    results = jax.tree.map(function, tree, *rest)
    of_leaf = jax.tree.structure([0] * number)
    listed = jax.tree.map(list, results, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.transpose(jax.tree.structure(tree), of_leaf, listed)
