"""Between a file's tensors and the decoder's stacked parameters, by a family's table.

A row is `(name in the file, path of the leaf, einops pattern of one tensor)`. A name with `{}` stands
for one tensor per layer; the leaf stacks them along a leading L. Rows are read forwards to import and
backwards to export. Letters: V vocab, D embed, F mlp, N heads, K kv heads, H head dim; `half two` are
the factors of H.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import einops
import jax
import numpy as np

from kdrl_jax.models.decoder import DecoderConfig
from kdrl_jax.types import Params

Row = tuple[str, str, str]
Shape = tuple[int, ...]
Put = Callable[[str, np.ndarray], jax.Array]
"""Takes a leaf's path (`layers.attn.q`) and its float32 array; returns it on the devices."""

# Buffers that old checkpoints carry and that follow from the config.
_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")


class TensorFile(Protocol):
    """An opened checkpoint."""

    @property
    def where(self) -> str:
        """The path, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor in the file."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, of any floating type."""


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "half": config.head_dim // 2,
        "two": 2,
    }


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


def check(table: Sequence[Row], config: DecoderConfig, file: TensorFile) -> None:
    """Compares the names and shapes in the file with what the config asks for.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor.
    """
    sizes = _sizes(config)
    expected: dict[str, Shape] = {}
    for row in _used(table, config):
        expected |= dict.fromkeys(_names(row, config), _shape(row[2].split("->")[0], sizes))
    # A tied model's file may hold the head a second time.
    allowed = {name for row in table for name in _names(row, config)}
    missing = expected.keys() - file.shapes.keys()
    extra = {name for name in file.shapes.keys() - allowed if not _HARMLESS.search(name)}
    wrong = [name for name in expected if name in file.shapes and file.shapes[name] != expected[name]]
    parts = []
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
        raise ValueError(
            f"{file.where}: {'; '.join(parts)}. These weights do not fit their config: "
            "get both from one place, or another model"
        )


def load(
    table: Sequence[Row], config: DecoderConfig, file: TensorFile, layers: Sequence[int], put: Put
) -> Params:
    """Reads the kept layers leaf by leaf; host memory stays near one stacked float32 leaf.

    Args:
        config: of the whole file, before layers are cut; `check` has accepted it.
        layers: the layers to keep, in order.
        put: called once per leaf.

    Raises:
        ValueError: naming every tensor that holds NaN or infinity.
    """
    sizes = _sizes(config)
    params: Params = {}
    bad: list[str] = []
    for row in _used(table, config):
        names = _names(row, config)
        stacked = "{}" in row[0]
        if stacked:
            names = [names[layer] for layer in layers]
        leaf = np.empty((len(names), *_shape(row[2].split("->")[1], sizes)), np.float32)
        for one, name in zip(leaf, names, strict=True):
            one[...] = _rearrange(file.read(name), row[2], sizes)
            if not np.isfinite(one).all():
                bad.append(name)
        _insert(params, row[1], put(row[1], leaf if stacked else leaf[0]))
        del leaf
    if bad:
        raise ValueError(f"{file.where}: NaN or infinity in {_collapse(bad)}; get the file again")
    return params


def export(table: Sequence[Row], config: DecoderConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as the file's tensors, one at a time, in their own type and contiguous."""
    sizes = _sizes(config)
    for row in _used(table, config):
        leaf: Any = params
        for part in row[1].split("."):
            leaf = leaf[part]
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


def _insert(params: Params, path: str, leaf: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        params = params.setdefault(part, {})
    params[last] = leaf
