"""Reading a Hugging Face folder: config.json and safetensors, whole or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16, by which safetensors asks for it)
import numpy as np
from safetensors import SafetensorError, safe_open

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.families import Family, family_of
from kdrl_jax.models.fields import check_fields
from kdrl_jax.models.tensors import Shape

_FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file is absent or holds anything else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; a model folder needs {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); get the file again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object; get the file again")
    return fields


def read_config(folder: Path) -> tuple[Family, DecoderConfig]:
    """The family and the decoder that the folder's config.json describes.

    Raises:
        ValueError: naming the file and each field that is not supported.
    """
    path = folder / "config.json"
    fields = read_json(path)
    try:
        fields = _text_model(fields) if has_vision(fields) else fields
        family = family_of(fields)
        return family, family.config_from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def has_vision(fields: dict[str, Any]) -> bool:
    """Whether a config.json is of a Gemma 3 with vision, of which the text model is used."""
    return fields.get("model_type") == "gemma3" and isinstance(fields.get("text_config"), dict)


def _text_model(fields: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model inside one with vision.

    Raises:
        ValueError: for fields beside it that are not known, or contradict it.
    """
    outer = {k: v for k, v in fields.items() if k not in ("text_config", "vision_config")}
    check_fields(outer, {}, read=("mm_tokens_per_image",))
    text = {"model_type": "gemma3_text"} | fields["text_config"]
    tied = [x for x in (outer.get("tie_word_embeddings"), text.get("tie_word_embeddings")) if x is not None]
    if len(set(tied)) > 1:
        raise ValueError(
            f"tie_word_embeddings={tied[0]!r} and text_config.tie_word_embeddings={tied[1]!r} contradict "
            "each other; keep the one the model was trained with"
        )
    return text | ({"tie_word_embeddings": tied[0]} if tied else {})


def _text_name(name: str) -> str | None:
    """The name that a tensor has in a folder of the text model alone; None for what is not part of it.

    A Gemma 3 with vision keeps its text model below `language_model.` (published files) or below
    `model.language_model.` (those that newer libraries write).
    """
    plain = name.removeprefix("model.")
    if plain.startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


class SafetensorsFolder:
    """The tensors of a folder; opening it reads headers only.

    A file is mapped into memory only while one tensor is read, so that what was read is given back.
    """

    unreadable: tuple[str, ...]
    """Tensors that do not hold floats, as `name (type)`."""

    def __init__(self, folder: Path):
        """Raises ValueError if files are absent or not whole, or name a tensor twice."""
        self.where = str(folder)
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, Shape] = {}
        types: dict[str, str] = {}
        vision = has_vision(read_json(folder / "config.json"))
        for path in _shards(folder):
            reader = _open(path)
            for stored in reader.keys():  # noqa: SIM118  (not a dict)
                name = _text_name(stored) if vision else stored
                if name is None:
                    continue
                if name in self._places:
                    raise ValueError(f"{folder} holds {name} twice; get the files again")
                tensor = reader.get_slice(stored)
                self._places[name] = (path, stored)
                self._shapes[name] = tuple(tensor.get_shape())
                types[name] = tensor.get_dtype()
        self.unreadable = tuple(f"{name} ({kind})" for name, kind in types.items() if kind not in _FLOATS)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        path, stored = self._places[name]
        return _open(path).get_tensor(stored)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); get the file again") from error


def _shards(folder: Path) -> list[Path]:
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / _INDEX} has no weight_map; get the file again")
        shards = [folder / name for name in sorted(set(map(str, names.values())))]
        absent = [path.name for path in shards if not path.is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent)}, which {_INDEX} names; get them again")
        return shards
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} has pytorch_model.bin only, a pickle, which can run code when it is read; "
            f"save the model as {_WHOLE}"
        )
    raise ValueError(f"{folder} has neither {_WHOLE} nor {_INDEX}; give a folder with weights")
