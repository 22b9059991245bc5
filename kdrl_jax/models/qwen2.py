"""The Qwen2 family: Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen. Llama with biases on q, k and v."""

from typing import Any

from kdrl_jax.models import llama
from kdrl_jax.models.decoder import DecoderConfig
from kdrl_jax.models.fields import Fields, decoder_config, hf_fields
from kdrl_jax.models.tensors import Row

ARCHITECTURE = "Qwen2ForCausalLM"

TENSORS: tuple[Row, ...] = (
    *llama.TENSORS,
    ("model.layers.{}.self_attn.q_proj.bias", "layers.attn.q_bias", "(N H) -> N H"),
    ("model.layers.{}.self_attn.k_proj.bias", "layers.attn.k_bias", "(K H) -> K H"),
    ("model.layers.{}.self_attn.v_proj.bias", "layers.attn.v_bias", "(K H) -> K H"),
)

# Unlike Llama's, q and k are stored as Hugging Face stores them.
GGUF_TENSORS: tuple[Row, ...] = (
    *(row for row in llama.GGUF_TENSORS if row[1] not in ("layers.attn.q", "layers.attn.k")),
    ("blk.{}.attn_q.weight", "layers.attn.q", "(N H) D -> D N H"),
    ("blk.{}.attn_k.weight", "layers.attn.k", "(K H) D -> D K H"),
    ("blk.{}.attn_q.bias", "layers.attn.q_bias", "(N H) -> N H"),
    ("blk.{}.attn_k.bias", "layers.attn.k_bias", "(K H) -> K H"),
    ("blk.{}.attn_v.bias", "layers.attn.v_bias", "(K H) -> K H"),
)


def config_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from config.json; raises ValueError naming what is not supported."""
    return decoder_config(fields, qkv_bias=True)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    assert config.qkv_bias, "Qwen2 has biases on q, k and v"
    return {
        "model_type": "qwen2",
        "architectures": [ARCHITECTURE],
        **hf_fields(config),
        "use_sliding_window": False,
    }
