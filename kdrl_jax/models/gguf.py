"""Reading a GGUF file (llama.cpp): metadata and tensors, dequantised by the optional `gguf` package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.families import Family, family_named
from kdrl_jax.models.tensors import Shape

# Metadata below `{architecture}.` -> the config.json field that says the same.
_FIELDS = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Metadata that may be there if it leaves the computation as it is; whatever else is below
# `{architecture}.` is refused, because llama.cpp would compute something else.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFFile:
    """An opened GGUF file."""

    unreadable: tuple[str, ...] = ()

    def __init__(self, path: Path):
        """Raises ValueError if it is not a whole GGUF file, or the `gguf` package is not there."""
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it starts with {magic!r}); get the file again")
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ValueError(f"{path} needs the gguf package: pip install 'kdrl_jax[gguf]'") from error
        self.where = str(path)
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            # The reader indexes into the mapped file; past its end it fails in any of these ways.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is not a whole GGUF file ({reason}); get the file again") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        # GGUF counts dimensions from the fastest.
        return {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.where}: {name} has type {tensor.tensor_type.name}, which the gguf package does "
                "not decode; use a file of another quantisation, such as Q8_0"
            ) from error

    def config(self) -> tuple[Family, DecoderConfig]:
        """The family and the decoder that the metadata describes.

        Raises:
            ValueError: naming the file and the metadata that is absent or not supported.
        """
        architecture = self._fields.get("general.architecture")
        try:
            family = family_named(str(architecture.contents() if architecture else None))
            if not family.gguf_tensors:
                raise ValueError(f"GGUF files of {family.name} are not read; use its Hugging Face folder")
            return family, self._decoder_config(family)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def _decoder_config(self, family: Family) -> DecoderConfig:
        prefix = f"{family.name}."
        metadata = {
            name.removeprefix(prefix): _shortest(field.contents())
            for name, field in self._fields.items()
            if name.startswith(prefix)
        }
        absent = [prefix + name for name in _REQUIRED if name not in metadata]
        if absent:
            raise ValueError(f"no {', '.join(absent)} in the metadata; get a complete file")
        fields = {_FIELDS[name]: value for name, value in metadata.items() if name in _FIELDS}
        if "token_embd.weight" in self._tensors:
            fields.setdefault("vocab_size", self.shapes["token_embd.weight"][0])
        fields["tie_word_embeddings"] = "output.weight" not in self._tensors
        config = family.config_from_hf(fields)
        # Fewer rotated dimensions, or values of another size than keys, are another model.
        neutral = _NEUTRAL | dict.fromkeys(_HEAD_SIZES, (config.head_dim,))
        refused = [
            f"{prefix}{name}={value!r}"
            for name, value in metadata.items()
            if name not in _FIELDS and value not in neutral.get(name, ())
        ]
        refused += [f"tensor {name} (RoPE scaling)" for name in _ROPE_FACTORS if name in self._tensors]
        splits = self._fields.get("split.count")
        if splits and splits.contents() > 1:
            refused.append(f"split.count={splits.contents()}")
        if refused:
            raise ValueError(f"{', '.join(refused)} not supported; use a file without")
        return config


def _shortest(value: Any) -> Any:
    """A float32 as it was meant: 1e-05, not 9.999999747378752e-06, which is the same in float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
