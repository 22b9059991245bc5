"""Fields of a Hugging Face config.json that all families share."""

from collections.abc import Mapping
from typing import Any

from kdrl_jax.models.decoder import DecoderConfig

Fields = Mapping[str, Any]

# Fields that change the computation -> the values that leave it as the decoder computes it. Null
# always does. Fields that are not named anywhere here describe the file, the tokenizer or sampling.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "is_encoder_decoder": (False,),
}


def _unsupported(fields: Fields, supported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Every field with a value that the decoder does not compute, as `name=value`."""
    found = [
        f"{name}={fields[name]!r}"
        for name, values in supported.items()
        if fields.get(name) is not None and fields[name] not in values
    ]
    kinds = fields.get("layer_types") or []
    windowed = sorted(set(map(str, kinds)) - {"full_attention"}) if isinstance(kinds, list) else kinds
    if windowed:
        found.append(f"layer_types with {windowed!r}")
    found += [
        f"{name}={fields[name]!r}"
        for name in ("rope_scaling", "rope_parameters")
        if fields.get(name) is not None and not _is_plain_rope(fields[name])
    ]
    return found


def _is_plain_rope(rope: Any) -> bool:
    """Whether RoPE settings say no more than the base: nothing scaled, every dimension turned."""
    # `type` is the older spelling of `rope_type`.
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
    return isinstance(rope, Mapping) and all(
        name == "rope_theta" or value is None or plain.get(name) == value for name, value in rope.items()
    )


def _rope_theta(fields: Fields) -> float:
    """The rotary base: top-level, or in `rope_parameters` as newer files write it."""
    given = {
        f"{outer}rope_theta": _number(f"{outer}rope_theta", inner["rope_theta"])
        for outer, inner in (
            ("", fields),
            ("rope_scaling.", fields.get("rope_scaling") or {}),
            ("rope_parameters.", fields.get("rope_parameters") or {}),
        )
        if inner.get("rope_theta") is not None
    }
    if len(set(given.values())) > 1:
        shown = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"{shown} contradict each other; keep the one the model was trained with")
    return next(iter(given.values()), 10000.0)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name}={value!r}; it has to be a positive number")
    return float(value)


def _size(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}; it has to be a positive integer")
    return value


def decoder_config(
    fields: Fields, *, qkv_bias: bool, supported: Mapping[str, tuple[Any, ...]] | None = None
) -> DecoderConfig:
    """The decoder that a config.json describes.

    Args:
        fields: config.json.
        qkv_bias: whether the family adds biases to queries, keys and values.
        supported: the family's own fields that change the computation, and their supported values.

    Raises:
        ValueError: naming every field with a value that is not supported, or one that does not fit.
    """
    unsupported = _unsupported(fields, _SUPPORTED | dict(supported or {}))
    if unsupported:
        raise ValueError(f"{', '.join(unsupported)} not supported; use a model without")
    embed_dim, num_heads = _size(fields, "hidden_size"), _size(fields, "num_attention_heads")
    if fields.get("head_dim") is None and embed_dim % num_heads:
        raise ValueError(
            f"hidden_size={embed_dim} is not a multiple of num_attention_heads={num_heads} and there is "
            "no head_dim; add it"
        )
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r}; it has to be true or false")
    config = DecoderConfig(
        vocab_size=_size(fields, "vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=_size(fields, "intermediate_size"),
        num_layers=_size(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size(fields, "num_key_value_heads"),
        head_dim=embed_dim // num_heads if fields.get("head_dim") is None else _size(fields, "head_dim"),
        rope_theta=_rope_theta(fields),
        norm_eps=_number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        tie_embeddings=tied,
        qkv_bias=qkv_bias,
        max_positions=_size(fields, "max_position_embeddings"),
    )
    if num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads="
            f"{config.num_kv_heads}; correct one of them"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} is odd, and RoPE turns pairs; correct it")
    return config


def hf_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json that describe a decoder in every family; inverts `decoder_config`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }
