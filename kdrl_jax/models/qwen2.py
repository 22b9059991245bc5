"""The Qwen2 family: Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen. Llama with biases on q, k and v."""

from typing import Any

from kdrl_jax.models import llama
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.fields import (
    check_fields,
    decoder_config,
    hf_fields,
    hf_layer_types,
    size,
    sliding_fields,
    with_defaults,
)
from kdrl_jax.models.rope_fields import Fields, rope_from_hf
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


def qwen_config(fields: Fields, **features: Any) -> DecoderConfig:
    """What Qwen2 and Qwen3 read alike: with `use_sliding_window`, layers from `max_window_layers` on
    slide, unless `layer_types` says which."""
    # Null is no window; only one that is left out has a default.
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    fields = with_defaults(fields, num_key_value_heads=fields.get("num_attention_heads"))
    own = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    check_fields(fields, {"hidden_act": ("silu", "swish")}, read=own)
    first = fields.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"max_window_layers={first!r}; it has to be an integer, 0 or more")
    default = [window is not None and i >= first for i in range(size(fields, "num_hidden_layers"))]
    sliding = sliding_fields(fields, default, window)
    return decoder_config(fields, rope=rope_from_hf(fields), **sliding, **features)


def qwen_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json that Qwen2 and Qwen3 write alike."""
    fields = {**hf_fields(config), "hidden_act": "silu", "layer_types": hf_layer_types(config)}
    if not any(config.sliding_layers):
        return fields | {"use_sliding_window": False}
    return fields | {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        # Older readers know this one only; it says the same where the last layers slide.
        "max_window_layers": config.sliding_layers.index(True),
    }


def config_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from config.json; raises ValueError naming what is not supported."""
    return qwen_config(fields, qkv_bias=True)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return {"model_type": "qwen2", "architectures": [ARCHITECTURE], **qwen_fields(config)}
