"""The Qwen3 family (dense): Qwen2 without biases, with a norm on each head of queries and keys."""

from typing import Any

from kdrl_jax.models import llama
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.fields import with_defaults
from kdrl_jax.models.qwen2 import qwen_config, qwen_fields
from kdrl_jax.models.rope_fields import Fields
from kdrl_jax.models.tensors import Row

ARCHITECTURE = "Qwen3ForCausalLM"

TENSORS: tuple[Row, ...] = (
    *llama.TENSORS,
    ("model.layers.{}.self_attn.q_norm.weight", "layers.attn.q_norm", "H -> H"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers.attn.k_norm", "H -> H"),
)

# Unlike Llama's, q and k are stored as Hugging Face stores them.
GGUF_TENSORS: tuple[Row, ...] = (
    *(row for row in llama.GGUF_TENSORS if row[1] not in ("layers.attn.q", "layers.attn.k")),
    ("blk.{}.attn_q.weight", "layers.attn.q", "(N H) D -> D N H"),
    ("blk.{}.attn_k.weight", "layers.attn.k", "(K H) D -> D K H"),
    ("blk.{}.attn_q_norm.weight", "layers.attn.q_norm", "H -> H"),
    ("blk.{}.attn_k_norm.weight", "layers.attn.k_norm", "H -> H"),
)


def config_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from config.json; raises ValueError naming what is not supported."""
    return qwen_config(with_defaults(fields, head_dim=128), qk_norm=True)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return {
        "model_type": "qwen3",
        "architectures": [ARCHITECTURE],
        **qwen_fields(config),
        "attention_bias": False,
    }
