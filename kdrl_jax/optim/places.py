"""Where the optimizer's state lies on the mesh."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from kdrl_jax.optim.layouts import Layout, layouts
from kdrl_jax.types import Params


def opt_state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Params, dims: Params, other: NamedSharding
) -> Any:
    """Shardings of the optimizer's state: moments like their parameters, factored statistics like the
    dimensions that they keep, the rest `other`.

    Whatever belongs to a parameter has the parameter's path at the end of its own, however optimizers are
    chained and masked.

    Args:
        abstract_params: with their shardings.
        dims: letters of their dimensions.
        other: of counts, and of the placeholders of what a parameter does not have.
    """
    params = jax.tree_util.tree_leaves_with_path(abstract_params)
    of_path = {path: (x, d) for (path, x), d in zip(params, jax.tree.leaves(layouts(dims)), strict=True)}

    def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
        start = len(path)
        while start and isinstance(path[start - 1], DictKey):
            start -= 1
        if path[start:] not in of_path:
            return other
        param, layout = of_path[path[start:]]
        if x.shape == param.shape:
            return param.sharding
        return _folded(x.shape, param, layout, path[:start]) or other

    abstract = jax.eval_shape(optimizer.init, abstract_params)
    return jax.tree_util.tree_map_with_path(place, abstract)


def _folded(
    shape: tuple[int, ...], param: jax.ShapeDtypeStruct, layout: Layout, field: tuple[Any, ...]
) -> NamedSharding | None:
    """The place of an array of a folded parameter's shape, or of its rows or columns; else None.

    A group of dimensions is cut as its first one is: the others of a group lie whole.
    """
    *stack, last = shape
    sizes, groups = layout.sizes(param.shape), list(layout.groups)
    layers = param.shape[: layout.stacked]
    if shape != layers + sizes:
        if tuple(stack) != layers or last not in sizes:
            return None
        # Which side, if they are of one size: see `scale_by_adafactor`.
        columns = sizes[0] != last or (sizes[-1] == last and GetAttrKey("v_col") in field)
        groups = [groups[-1] if columns else groups[0]]
    cut = [*param.sharding.spec, *[None] * len(param.shape)]
    spec = [cut[0]] * layout.stacked + [cut[group[0]] for group in groups]
    return NamedSharding(param.sharding.mesh, PartitionSpec(*spec))
