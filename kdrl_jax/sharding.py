"""The device mesh and which dimension of a tensor lies on which of its axes.

Tensors are described by the letters of the house (`"L D N H"`); one table maps letters to mesh axes.
The mesh is Auto: the compiler propagates shardings between the constraints given here.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kdrl_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

ROWS = ("data", "fsdp")
"""Axes over which rows lie."""

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "B": ROWS,  # every device of these axes works on its own
    "P": ROWS,
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": "fsdp",  # parameters only; activations name their D "E" so that it stays whole
    "E": None,
    "L": None,
    "H": None,
    "R": None,  # rank of an adapter
    "T": None,
    "S": None,
}

DECODE_RULES = {**RULES, "D": None}
"""Of parameters that sample: whole on each device of `data` and `fsdp`, which then step on their own."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over the devices.

    `tensor` lies on neighbours. Of several TPU slices each holds whole rows of `data`, so that no other axis
    crosses the slower network between them.

    Raises:
        ValueError: when the sizes do not multiply to the number of devices, or `data` not over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices; the product of the sizes must")
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in a mesh's shape."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    data, *others = sizes
    if data % len(slices):
        raise ValueError(
            f"mesh.data={data} on {len(slices)} slices: between slices lies `data` alone; make it "
            f"{len(slices)}, or a multiple of that"
        )
    # Each in the order in which its chips are neighbours.
    shape = (data // len(slices), *others)
    # An axis may be a part of one of the torus: jax.make_mesh would refuse that on all but v5e.
    parts = [create_device_mesh(shape, slices[i], allow_split_physical_axes=True) for i in sorted(slices)]
    return np.concatenate(parts)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts rows are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(dims: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PartitionSpec:
    """The partition of a tensor: a dimension that its axis does not divide stays whole."""
    letters = dims.split()
    if len(letters) != len(shape):
        raise ValueError(f"dims {dims!r} do not describe shape {tuple(shape)}")
    entries: list[str | tuple[str, ...] | None] = []
    for letter, size in zip(letters, shape, strict=True):
        axis = rules[letter]
        names = (axis,) if isinstance(axis, str) else (axis or ())
        parts = math.prod(mesh.shape[n] for n in names)
        entries.append(axis if size % parts == 0 else None)
    return PartitionSpec(*entries)


def sharding(dims: str, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    return NamedSharding(mesh, spec(dims, shape, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; the rest whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def move(tree: Any, memory: str) -> Any:
    """Arrays in the memory of that kind, each part beside its device; those there already are not copied.

    Args:
        tree: of arrays, or of abstract ones.
        memory: `device`, or `pinned_host`, the hosts' memory.
    """

    def put(x: Any) -> Any:
        place = x.sharding.with_memory_kind(memory)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.device_put(x, place)

    return jax.tree.map(put, tree)


def constrain(x: jax.Array, dims: str, rules: Rules = RULES) -> jax.Array:
    """Pins an intermediate to its place on the mesh of `jax.set_mesh`; without one, returns it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, x.shape, mesh, rules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: jax.Array, dims: str) -> jax.Array:
    """A weight that lies by `RULES`, whole on each device of `fsdp`, for the products of its rows; and its
    gradient summed over them and cut in one, each device left with its part. Asked neither, the compiler may
    rather move activations."""
    return constrain(weight, dims, DECODE_RULES)


def _gathered_fwd(weight: jax.Array, dims: str) -> tuple[jax.Array, None]:
    return gathered(weight, dims), None


def _gathered_bwd(dims: str, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    return (constrain(cotangent, dims),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)
