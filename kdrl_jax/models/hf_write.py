"""Writing a Hugging Face folder: safetensors, whole or in shards, and JSON.

Shards are planned from shapes alone, and a file's header is written before its tensors, so that tensors
can be fetched from the devices one by one: the host never holds more than one of them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from kdrl_jax.models.tensors import Shape

DTYPES: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
}
"""Name -> its name in safetensors, and numpy's type."""


def stored_dtype(folder: Path) -> str | None:
    """The type that most parameters of a folder's safetensors have; None if it is none of `DTYPES`."""
    names = {stored: name for name, (stored, _) in DTYPES.items()}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_slice(name)
                kind = tensor.get_dtype()
                counts[kind] = counts.get(kind, 0) + math.prod(tensor.get_shape())
    return names.get(max(counts, key=lambda kind: counts[kind])) if counts else None


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_shards(
    shapes: Mapping[str, Shape], itemsize: int, max_bytes: float
) -> list[tuple[str, dict[str, Shape]]]:
    """Which file holds which tensors, in the order given.

    Args:
        itemsize: bytes of one number.
        max_bytes: largest sum of the tensors of one file; a larger tensor has a file of its own.

    Returns:
        (file name, its tensors) of each file; `model.safetensors` if there is one alone.
    """
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    total = len(groups)
    return [(f"model-{i:05}-of-{total:05}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    max_bytes: float,
    on_tensor: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Writes the tensors, and the index if they need more than one file.

    Args:
        shapes: what `tensors` will yield, in its order.
        dtype: one of `DTYPES`, which the numbers are cast to.
        on_tensor: called with the size of each tensor written.

    Returns:
        The number of files.

    Raises:
        ValueError: naming the tensors with numbers that are not finite, or too large for `dtype`.
    """
    stored, kind = DTYPES[dtype]
    itemsize = np.dtype(kind).itemsize
    shards = plan_shards(shapes, itemsize, max_bytes)
    overflown: list[str] = []
    broken: list[str] = []
    source = iter(tensors)
    for file_name, group in shards:
        with (folder / file_name).open("wb") as file:
            file.write(_header(group, stored, itemsize))
            for name, shape in group.items():
                found, tensor = next(source)
                assert (found, tensor.shape) == (name, shape), f"{found} {tensor.shape}, not {name} {shape}"
                with np.errstate(over="ignore"):
                    cast = np.ascontiguousarray(tensor.astype(kind, copy=False))
                if not np.isfinite(cast).all():
                    (overflown if np.isfinite(tensor).all() else broken).append(name)
                file.write(cast.reshape(-1).view(np.uint8).data)
                on_tensor(cast.nbytes)
    assert next(source, None) is None, "more tensors than planned"
    if broken:
        raise ValueError(f"NaN or infinity in {_some(broken)}; export a checkpoint from before that")
    if overflown:
        limit = float(ml_dtypes.finfo(kind).max)
        raise ValueError(
            f"dtype={dtype} holds numbers up to {limit:.6g}, and there are larger ones in "
            f"{_some(overflown)}; use float32 or bfloat16"
        )
    if len(shards) > 1:
        count = sum(math.prod(shape) for shape in shapes.values())
        weight_map = {name: file_name for file_name, group in shards for name in group}
        metadata = {"total_parameters": count, "total_size": count * itemsize}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return len(shards)


def _header(group: Mapping[str, Shape], stored: str, itemsize: int) -> bytes:
    """Length and JSON of a safetensors header, padded so that the numbers are aligned."""
    # As torch writes it: older versions of transformers refuse files that do not say so.
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in group.items():
        start, end = end, end + math.prod(shape) * itemsize
        fields[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
