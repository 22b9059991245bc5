"""What a checkpoint says of itself, so that damage is seen and told apart from other settings."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from kdrl_jax.checkpoint.fingerprint import fingerprints


class DamagedError(Exception):
    """A checkpoint does not hold what was written."""


class MisfitError(ValueError):
    """A checkpoint is in order, and of other settings, or of another version of this package."""


def seal(items: Mapping[str, Mapping[str, jax.Array]], host: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a checkpoint: what the host keeps, and each array's shape, type and fingerprint.

    Args:
        items: the checkpoint's arrays, `by_name`.
        host: JSON-able.
    """
    arrays = {}
    for name, named in items.items():
        marks = fingerprints(named)
        arrays[name] = {key: [list(x.shape), str(x.dtype), marks[key]] for key, x in named.items()}
    content = {"host": host, "arrays": arrays}
    return content | {"checksum": _checksum(content)}


def unseal(sealed: Any) -> dict[str, Any]:
    """`{"host", "arrays"}` of what `seal` made.

    Raises:
        DamagedError: it is not as it was made.
        MisfitError: it was made before there were fingerprints.
    """
    if isinstance(sealed, dict) and sealed.keys() == {"data", "last_eval"}:
        raise MisfitError("it was written by an earlier version; start a new run")
    if not isinstance(sealed, dict) or "checksum" not in sealed:
        raise DamagedError("no checksum in what the host kept")
    content = {name: value for name, value in sealed.items() if name != "checksum"}
    if _checksum(content) != sealed["checksum"]:
        raise DamagedError("what the host kept does not fit its checksum")
    return content


def saved_types(abstract: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Abstract arrays with the types that they were saved in.

    Raises:
        MisfitError: the checkpoint holds other arrays, or arrays of other shapes.
    """
    missing, extra = sorted(abstract.keys() - arrays.keys()), sorted(arrays.keys() - abstract.keys())
    if missing or extra:
        first = f"lacks {missing[0]}" if missing else f"holds {extra[0]} beside it"
        raise MisfitError(f"it {first} ({len(missing)} arrays missing, {len(extra)} extra)")
    found = {}
    for key, x in abstract.items():
        shape, dtype, _ = arrays[key]
        if shape != list(x.shape):
            raise MisfitError(f"{key} is {shape} there, and {list(x.shape)} here")
        found[key] = jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return found


def check(named: Mapping[str, jax.Array], arrays: Mapping[str, Any]) -> None:
    """Raises DamagedError: some arrays are not the ones that were saved."""
    marks = fingerprints(named)
    wrong = [path for path, mark in marks.items() if arrays[path][2] != mark]
    if wrong:
        raise DamagedError(f"{wrong[0]} does not fit its fingerprint ({len(wrong)} of {len(marks)} arrays)")


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
