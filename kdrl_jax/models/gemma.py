"""The Gemma families: Gemma 2, and the text model of Gemma 3.

Both scale the embedding by the root of D, store norms less one, norm what attention and MLP give, and
alternate sliding layers with full ones. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys
instead, and turns its sliding layers by a base of their own.
"""

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
from kdrl_jax.models.rope import Rope
from kdrl_jax.models.rope_fields import Fields, positive, rope_from_hf
from kdrl_jax.models.tensors import Row

GEMMA2_ARCHITECTURE = "Gemma2ForCausalLM"
GEMMA3_ARCHITECTURE = "Gemma3ForCausalLM"

GEMMA2_TENSORS: tuple[Row, ...] = (
    *(row for row in llama.TENSORS if row[1] != "layers.mlp_norm"),
    # The name that Llama gives to the norm before the MLP.
    ("model.layers.{}.post_attention_layernorm.weight", "layers.attn_post_norm", "D -> D"),
    ("model.layers.{}.pre_feedforward_layernorm.weight", "layers.mlp_norm", "D -> D"),
    ("model.layers.{}.post_feedforward_layernorm.weight", "layers.mlp_post_norm", "D -> D"),
)
GEMMA3_TENSORS: tuple[Row, ...] = (
    *GEMMA2_TENSORS,
    ("model.layers.{}.self_attn.q_norm.weight", "layers.attn.q_norm", "H -> H"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers.attn.k_norm", "H -> H"),
)

# What transformers takes where a file leaves a field out; published files leave out many.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    # Beside `hidden_activation` it is not read, and some files say "gelu" there.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
}
_READ = ("query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping")
_FEATURES: dict[str, Any] = {
    "post_norms": True,
    "norm_adds_one": True,
    "scale_embeddings": True,
    "activation": "gelu_tanh",
}


def _query_scale(fields: Fields) -> float:
    return positive("query_pre_attn_scalar", fields["query_pre_attn_scalar"]) ** -0.5


def _cap(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else positive(name, fields[name])


def gemma2_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from config.json; raises ValueError naming what is not supported."""
    # A cap that is null is none; only one that is left out has a default. `sliding_window_size` stands
    # beside `sliding_window` in published files, and transformers reads the latter.
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    absent = {name: value for name, value in caps.items() if name not in fields}
    fields = with_defaults(fields, **_DEFAULTS, max_position_embeddings=8192, **absent)
    check_fields(fields, _SUPPORTED, read=(*_READ, "attn_logit_softcapping", "sliding_window_size"))
    slides = [i % 2 == 0 for i in range(size(fields, "num_hidden_layers"))]
    return decoder_config(
        fields,
        rope=rope_from_hf(fields),
        query_scale=_query_scale(fields),
        attn_softcap=_cap(fields, "attn_logit_softcapping"),
        final_softcap=_cap(fields, "final_logit_softcapping"),
        **sliding_fields(fields, slides, fields["sliding_window"]),
        **_FEATURES,
    )


def gemma3_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from the config.json of a text model; raises ValueError naming what is not
    supported."""
    fields = with_defaults(fields, **_DEFAULTS, vocab_size=262208, max_position_embeddings=131072)
    # transformers reads a cap on scores here and does not apply it.
    own = (*_READ, "sliding_window_pattern", "rope_local_base_freq")
    check_fields(fields, _SUPPORTED | {"attn_logit_softcapping": ()}, read=own)
    pattern = size(with_defaults(fields, sliding_window_pattern=6), "sliding_window_pattern")
    slides = [(i + 1) % pattern != 0 for i in range(size(fields, "num_hidden_layers"))]
    full, sliding = _ropes(fields)
    return decoder_config(
        fields,
        rope=full,
        sliding_rope=sliding,
        # Unlike other files with linear RoPE, these state the context after stretching.
        states_stretched=True,
        qk_norm=True,
        query_scale=_query_scale(fields),
        final_softcap=_cap(fields, "final_logit_softcapping"),
        **sliding_fields(fields, slides, fields["sliding_window"]),
        **_FEATURES,
    )


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """RoPE of the full and of the sliding layers: newer files name both kinds of layer."""
    nested = fields.get("rope_parameters") or {}
    parts: dict[str, dict[str, Any]] = {}
    for kind, base in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        parts[kind] = {
            "rope_theta": fields.get(base),
            "rope_parameters": nested.get(kind),
            "rope_scaling": fields.get("rope_scaling") if kind == "full_attention" else None,
            "max_position_embeddings": fields.get("max_position_embeddings"),
        }
    strange = [name for name in nested if name not in parts]
    if strange:
        raise ValueError(f"rope_parameters with {', '.join(strange)} not supported; use a model without")
    sliding = rope_from_hf(parts["sliding_attention"], 10000.0)
    if sliding.kind != "default":
        raise ValueError(
            f"rope_parameters.sliding_attention.rope_type={sliding.kind!r} not supported; use a model without"
        )
    return rope_from_hf(parts["full_attention"], 1000000.0), sliding


def _common_fields(config: DecoderConfig) -> dict[str, Any]:
    assert config.query_scale is not None
    scalar = config.query_scale**-2
    return {
        **hf_fields(config),
        "hidden_activation": "gelu_pytorch_tanh",
        # Published values are whole, and transformers wants them so.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": hf_layer_types(config),
        "final_logit_softcapping": config.final_softcap,
        "attention_bias": False,
    }


def gemma2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return {
        "model_type": "gemma2",
        "architectures": [GEMMA2_ARCHITECTURE],
        **_common_fields(config),
        "attn_logit_softcapping": config.attn_softcap,
    }


def gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    assert config.sliding_rope is not None
    return {
        "model_type": "gemma3_text",
        "architectures": [GEMMA3_ARCHITECTURE],
        **_common_fields(config),
        "rope_local_base_freq": config.sliding_rope.theta,
    }
