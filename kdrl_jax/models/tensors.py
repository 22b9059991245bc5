"""Between a file's tensors and the decoder's stacked parameters, by a family's table.

A row is `(name in the file, path of the leaf, einops pattern of one tensor)`. A name with `{}` stands
for one tensor per layer; the leaf stacks them along a leading L. Rows are read forwards to import and
backwards to export. Letters: V vocab, D embed, F mlp, N heads, K kv heads, H head dim; `half two` are
the factors of H.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.quantize import quantize, summed_axes
from kdrl_jax.types import Params

Row = tuple[str, str, str]
Shape = tuple[int, ...]

# Buffers that old checkpoints carry and that follow from the config.
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|position_ids|masked_bias)$")


class TensorFile(Protocol):
    """An opened checkpoint."""

    @property
    def where(self) -> str:
        """The path, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor in the file."""

    @property
    def unreadable(self) -> Sequence[str]:
        """Tensors that `read` cannot give, as `name (type)`."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, of any floating type; raises ValueError where it cannot be decoded."""


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return config.sizes | {"half": config.head_dim // 2, "two": 2}


def _shape(side: str, sizes: Mapping[str, int]) -> Shape:
    """The shape that one side of a pattern describes: `(N H) D` -> (N * H, D)."""
    groups = re.findall(r"\([^)]*\)|\w+", side)
    return tuple(math.prod(sizes[letter] for letter in group.strip("()").split()) for group in groups)


def _used(table: Sequence[Row], config: DecoderConfig) -> list[Row]:
    """The table without its head when the head is tied: a tied head is an absent row, not a copy."""
    return [row for row in table if not (config.tie_embeddings and row[1] == "head")]


def _names(row: Row, config: DecoderConfig) -> list[str]:
    """The row's tensors in the file, in layer order."""
    if "{}" not in row[0]:
        return [row[0]]
    return [row[0].format(layer) for layer in range(config.num_layers)]


def _collapse(names: Iterable[str]) -> str:
    """Sorted names, those that differ in the layer alone written once: `layers.[0-29].mlp`."""
    layers: dict[tuple[str, str], list[int]] = {}
    written = []
    for name in sorted(names):
        if number := re.search(r"\.(\d+)\.", name):
            around = (name[: number.start(1)], name[number.end(1) :])
            layers.setdefault(around, []).append(int(number[1]))
        else:
            written.append(name)
    for (before, after), found in layers.items():
        found.sort()
        together = len(found) > 1 and found == list(range(found[0], found[-1] + 1))
        numbers = f"{found[0]}-{found[-1]}" if together else ",".join(map(str, found))
        written.append(before + (numbers if len(found) == 1 else f"[{numbers}]") + after)
    return ", ".join(written)


def problems(table: Sequence[Row], config: DecoderConfig, file: TensorFile) -> list[str]:
    """What keeps the tensors of a file from being those that its config asks for; empty if nothing does.

    Compares names and shapes, and only where these do not fit reads the tensors too, so that everything
    that is wrong with a file is said at once.
    """
    sizes = _sizes(config)
    expected: dict[str, Shape] = {}
    for row in _used(table, config):
        expected |= dict.fromkeys(_names(row, config), _shape(row[2].split("->")[0], sizes))
    # A tied model's file may hold the head a second time.
    allowed = {name for row in table for name in _names(row, config)}
    missing = expected.keys() - file.shapes.keys()
    extra = {name for name in file.shapes.keys() - allowed if not _HARMLESS.search(name)}
    # A tied head need not be there, but if it is, it has the embedding's shape.
    expected |= _tied_heads(table, config, file)
    wrong = [name for name in expected if name in file.shapes and file.shapes[name] != expected[name]]
    parts = []
    integers = [name for name in file.unreadable if not _HARMLESS.search(name.split(" ")[0])]
    if integers:
        parts.append(f"not floats: {_collapse(integers)} (use the model that has not been quantised)")
    if missing:
        parts.append(f"missing tensors: {_collapse(missing)}")
    if extra:
        parts.append(f"unexpected tensors: {_collapse(extra)}")
    if wrong:
        differences: dict[str, list[str]] = {}
        for name in wrong:
            differences.setdefault(f"{file.shapes[name]}, not {expected[name]}", []).append(name)
        shown = (f"{_collapse(names)} is {difference}" for difference, names in differences.items())
        parts.append(f"wrong shapes: {', '.join(shown)}")
    if parts:
        found = [name for name in file.shapes if not _is_finite(file, name)]
        parts += [_not_finite(found)] if found else []
    return parts


def _is_finite(file: TensorFile, name: str) -> bool:
    try:
        return bool(np.isfinite(file.read(name)).all())
    except (ValueError, TypeError):  # not decoded: nothing can be said of its numbers
        return True


def _tied_heads(table: Sequence[Row], config: DecoderConfig, file: TensorFile) -> dict[str, Shape]:
    """Name and right shape of the head that a tied model's file holds beside the embedding, if it does."""
    names = [row[0] for row in table if row[1] == "head" and row[0] in file.shapes]
    return dict.fromkeys(names if config.tie_embeddings else [], (config.vocab_size, config.embed_dim))


def _not_finite(names: Iterable[str]) -> str:
    return f"NaN or infinity in {_collapse(names)}"


def load(
    table: Sequence[Row],
    config: DecoderConfig,
    file: TensorFile,
    layers: Sequence[int],
    abstract: Params,
) -> Params:
    """Reads the kept layers, tensor by tensor, straight into their place on the devices.

    The host holds one tensor at a time; a stacked leaf is filled in place, layer after layer. A leaf that
    `abstract` wants in int8 is quantised on the device as it arrives, and its scales are returned too.

    Args:
        config: of the whole file, before layers are cut; `problems` has found none.
        layers: the layers to keep, in order.
        abstract: the type and sharding of each leaf; leaves that the table lacks are left out.

    Raises:
        ValueError: naming every tensor that holds NaN or infinity, or a tied head that is another matrix.
    """
    for head in _tied_heads(table, config, file):
        embedding = next(row[0] for row in table if row[1] == "embed")
        # Bytes, in which a NaN is itself: those are reported below.
        ours, theirs = (file.read(name).view(np.uint8) for name in (head, embedding))
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"{file.where}: {head} is not {embedding}, though tie_word_embeddings is true; set it to "
                "false in config.json if the model was trained so, or remove the tensor"
            )
    params: Params = {}
    finite: list[tuple[str, jax.Array]] = []
    # What is not stacked is largest, and comes while little else is there.
    for row in sorted(_used(table, config), key=lambda row: "{}" in row[0]):
        names = _names(row, config)
        leaf, scale = find(abstract, row[1]), find(abstract, f"{row[1]}_scale")
        stacked = "{}" in row[0]
        place = _Place(leaf, scale, stacked, summed_axes(row[1]))
        for i, name in enumerate([names[layer] for layer in layers] if stacked else names):
            if finite:
                # The device must not fall behind, or tensors would pile up on the host.
                finite[-1][1].block_until_ready()
            finite.append((name, place.write(i, _rearrange(file.read(name), row[2], _sizes(config)))))
        _insert(params, row[1], place.leaf)
        if place.scale is not None:
            _insert(params, f"{row[1]}_scale", place.scale)
    bad = [name for name, flag in finite if not flag]
    if bad:
        raise ValueError(f"{file.where}: {_not_finite(bad)}; get the file again")
    return params


class _Place:
    """Where the tensors of one leaf go: its buffer on the devices, and that of its scales."""

    def __init__(
        self,
        leaf: jax.ShapeDtypeStruct,
        scale: jax.ShapeDtypeStruct | None,
        stacked: bool,
        axes: tuple[int, ...],
    ):
        self._stacked = stacked
        self._tensor_sharding = _without_layers(leaf.sharding) if stacked else leaf.sharding
        wanted = (leaf,) if scale is None else (leaf, scale)
        make, self._write = _programs(wanted, stacked, None if scale is None else axes)
        self._buffers: tuple[jax.Array, ...] = make() if stacked else ()

    @property
    def leaf(self) -> jax.Array:
        return self._buffers[0]

    @property
    def scale(self) -> jax.Array | None:
        return self._buffers[1] if len(self._buffers) > 1 else None

    def write(self, i: int, tensor: np.ndarray) -> jax.Array:
        """Puts the tensor at index i along L (or in place of all); returns whether it is finite."""
        sharding = self._tensor_sharding
        if sharding is None:
            placed = jnp.asarray(tensor)
        else:
            # Each device gets its part of the host's array, which is a view of what was read.
            placed = jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])
        self._buffers, finite = self._write(self._buffers, placed, np.int32(i))
        return finite


@functools.cache
def _programs(
    wanted: tuple[jax.ShapeDtypeStruct, ...], stacked: bool, axes: tuple[int, ...] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes the buffers of a leaf, and what writes a tensor to them; leaves that are alike share both.

    Args:
        wanted: the leaf, and its scales where it is in int8.
        axes: that a scale is shared along; None for floats.
    """
    shardings = tuple(x.sharding for x in wanted)

    def make() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in wanted)

    def write(
        buffers: tuple[jax.Array, ...], tensor: jax.Array, at: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        new: tuple[jax.Array, ...] = (tensor,) if axes is None else quantize(tensor, axes)
        new = tuple(x.astype(want.dtype) for x, want in zip(new, wanted, strict=True))
        if stacked:
            # Not `.at[at].set`: a scatter, for which the CPU turns all of a bfloat16 buffer into float32.
            put = jax.lax.dynamic_update_index_in_dim
            new = tuple(put(buffer, x, at, 0) for buffer, x in zip(buffers, new, strict=True))
        return new, jnp.isfinite(tensor).all()

    return (
        jax.jit(make, out_shardings=shardings),
        jax.jit(write, donate_argnums=0, out_shardings=(shardings, None)),
    )


def _without_layers(sharding: Any) -> Any:
    """The sharding of one layer's tensor in a leaf that stacks them."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def export(table: Sequence[Row], config: DecoderConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as the file's tensors, one at a time, in their own type and contiguous."""
    sizes = _sizes(config)
    for row in _used(table, config):
        leaf = find(params, row[1])
        source, target = row[2].split("->")
        for i, name in enumerate(_names(row, config)):
            tensor = np.asarray(leaf[i] if "{}" in row[0] else leaf)
            yield name, np.ascontiguousarray(_rearrange(tensor, f"{target}->{source}", sizes))


def shapes(table: Sequence[Row], config: DecoderConfig) -> dict[str, Shape]:
    """The file's tensors and their shapes, in the order in which `export` yields them."""
    sizes = _sizes(config)
    return {
        name: _shape(row[2].split("->")[0], sizes)
        for row in _used(table, config)
        for name in _names(row, config)
    }


def _rearrange(tensor: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    letters = set(re.findall(r"\w+", pattern))
    return einops.rearrange(tensor, pattern, **{k: v for k, v in sizes.items() if k in letters})


def find(params: Params, path: str) -> Any:
    """The leaf at a dotted path, or None."""
    leaf: Any = params
    for part in path.split("."):
        leaf = leaf.get(part) if isinstance(leaf, dict) else None
    return leaf


def _insert(params: Params, path: str, leaf: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        params = params.setdefault(part, {})
    params[last] = leaf
