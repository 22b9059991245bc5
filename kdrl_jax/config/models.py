"""Where models and their tokenizer come from."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdrl_jax.config.base import AboveZero, Flag, Positive, Real, Section

DType = Literal["float32", "bfloat16"]


def _check_layer_item(item: Any) -> Any:
    if isinstance(item, bool) or not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", str(item)):
        raise ValueError("write an index (3) or a range (0-9), up to 9999")
    return item


LayerItem = Annotated[int | str, BeforeValidator(_check_layer_item)]


class ArchitectureConfig(Section):
    """A decoder built from random weights. Field names follow the Hugging Face config.json."""

    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive | None = None
    """Defaults to hidden_size / num_attention_heads."""
    rope_theta: Real = 10000.0
    tie_word_embeddings: Flag = True

    @model_validator(mode="after")
    def _check(self) -> "ArchitectureConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; set head_dim"
            )
        return self


class LoRAConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): the student's weights stay as they are, and the product of two
    thin matrices is trained beside each. Checkpoints hold the adapters alone."""

    rank: Positive = 16
    alpha: AboveZero = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        default=("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )
    """Weights that get an adapter."""


class ModelConfig(Section):
    """Where a model comes from: exactly one of `path`, `run` and `architecture`."""

    path: str | None = None
    """A Hugging Face folder, a .gguf file, or a hub name such as `Qwen/Qwen2.5-0.5B`."""
    run: str | None = None
    """A finished run directory, or a config (relative to the file naming it) that is trained first."""
    architecture: ArchitectureConfig | None = None
    """Random initial weights of this shape."""
    sha256: str | None = None
    """Expected checksum of the file at `path` (single files only)."""
    keep_layers: tuple[LayerItem, ...] | None = None
    """Layers to keep, in order, as indices or inclusive ranges: `[0-9, 20-29]`."""
    compute_dtype: DType = "float32"
    """Type of matrix products. The student's master weights are always float32 (with `lora`, those of its
    adapters; the rest is held in this type)."""
    weights: Literal["float", "int8"] = "float"
    """`int8` (teachers and reference only): matrices in 8 bits, with a scale per output channel."""
    lora: LoRAConfig | None = None
    """Student only: train adapters instead of the weights."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        given = [k for k in ("path", "run", "architecture") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, run and architecture; got {given or 'none'}")
        if self.sha256 is not None and self.path is None:
            raise ValueError(f"sha256={self.sha256} checks a file, so it needs path")
        if self.keep_layers is not None and self.path is None:
            items = list(self.keep_layers)
            raise ValueError(f"keep_layers={items} cuts a model that is read from path")
        self.layer_indices()
        return self

    def layer_indices(self) -> tuple[int, ...] | None:
        """`keep_layers` with its ranges written out, or None for all layers."""
        if self.keep_layers is None:
            return None
        kept: list[int] = []
        for item in self.keep_layers:
            first, _, last = str(item).partition("-")
            kept.extend(range(int(first), int(last or first) + 1))
        if not kept or kept != sorted(set(kept)):
            items = list(self.keep_layers)
            raise ValueError(f"keep_layers={items}: name at least one layer, in increasing order")
        return tuple(kept)


class TokenizerConfig(Section):
    kind: Literal["model", "char", "file"] = "model"
    """`model`: the one beside the student's (or else the teacher's) weights; `char`: built in;
    `file`: at `path`."""
    path: str | None = None
    """With kind `file`: a tokenizer.json, a SentencePiece or tiktoken .model, a .gguf, or their folder."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` wraps prompts in the tokenizer's chat template if it has one; `none` never does."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"kind={self.kind} with path={self.path or 'null'}; path goes with kind=file")
        return self
