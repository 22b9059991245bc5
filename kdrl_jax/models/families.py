"""The model families by name. A family is a table of tensors and two readings of config.json."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from kdrl_jax.models import gemma, llama, qwen2, qwen3
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope_fields import Fields
from kdrl_jax.models.tensors import Row


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    """`model_type` in config.json and `general.architecture` in GGUF."""
    architecture: str
    """The class in `architectures` of config.json."""
    config_from_hf: Callable[[Fields], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], dict[str, Any]]
    tensors: tuple[Row, ...]
    """Safetensors names."""
    gguf_tensors: tuple[Row, ...] = ()
    """GGUF names; empty where GGUF files of the family are not read."""


FAMILIES = {
    family.name: family
    for family in (
        *(
            Family(name, it.ARCHITECTURE, it.config_from_hf, it.config_to_hf, it.TENSORS, it.GGUF_TENSORS)
            for name, it in (("llama", llama), ("qwen2", qwen2), ("qwen3", qwen3))
        ),
        Family(
            "gemma2",
            gemma.GEMMA2_ARCHITECTURE,
            gemma.gemma2_from_hf,
            gemma.gemma2_to_hf,
            gemma.GEMMA2_TENSORS,
        ),
        Family(
            "gemma3_text",
            gemma.GEMMA3_ARCHITECTURE,
            gemma.gemma3_from_hf,
            gemma.gemma3_to_hf,
            gemma.GEMMA3_TENSORS,
        ),
    )
}


def family_named(name: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: naming the supported ones.
    """
    if name not in FAMILIES:
        moe = " (mixture of experts)" if "moe" in name or name in ("mixtral", "gpt_oss", "dbrx") else ""
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; the nearest that is: {near[0]}" if near and not moe else ""
        raise ValueError(f"model type {name!r}{moe} is not supported{hint}; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(fields: Fields) -> Family:
    """The family that a config.json names, by `model_type` or else by `architectures`.

    Raises:
        ValueError: for a model type that is not supported, or one with another head than a language
            model's.
    """
    architectures = fields.get("architectures") or []
    known = {family.architecture: family for family in FAMILIES.values()}
    model_type = fields.get("model_type")
    if model_type is None and len(architectures) == 1 and architectures[0] in known:
        return known[architectures[0]]
    if model_type is None:
        raise ValueError(f"no model_type, and architectures={architectures!r}; supported: {', '.join(known)}")
    family = family_named(str(model_type))
    if architectures and architectures != [family.architecture]:
        raise ValueError(f"architectures={architectures!r} is not supported; use a {family.architecture}")
    return family
