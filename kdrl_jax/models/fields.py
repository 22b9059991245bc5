"""Fields of a Hugging Face config.json that families share.

Every field is read, or known to leave the logits as they are, or refused by name: a field that nobody
looks at is a model that is silently another one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope import Rope
from kdrl_jax.models.rope_fields import Fields, positive, rope_to_hf

# Fields that change the computation -> the values that leave it as the decoder computes it. Null
# always does.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "use_mrope": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_qk_norm": (False,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
    "tie_encoder_decoder": (False,),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_num_experts")
_READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "hidden_act",
}
# What describes the file, the tokenizer, training or sampling. Names that end in `_token_id`,
# `_token_index` or `_version` are of this kind too.
# fmt: off
_DESCRIPTIVE = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "_sliding_window_pattern", "architectures", "model_type", "dtype", "torch_dtype", "initializer_range",
    "use_cache",
    "attention_dropout", "hidden_dropout", "output_attentions", "output_hidden_states", "return_dict",
    "return_dict_in_generate", "output_scores", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "is_decoder", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "cache_implementation", "max_length", "min_length",
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "num_return_sequences", "early_stopping", "diversity_penalty", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values",
    "max_sequence_length", "tokenizer_model_max_length", "model_max_length", "is_llama_config",
    "unsloth_fixed", "transformers.js_config", "gradient_checkpointing", "num_logits_to_keep",
    "logits_to_keep", "use_flash_attn", "use_flash_attention_2", "attn_implementation",
}
# fmt: on


def _is_descriptive(name: str) -> bool:
    return name in _DESCRIPTIVE or name.endswith(("_token_id", "_token_ids", "_token_index", "_version"))


def check_fields(fields: Fields, supported: Mapping[str, tuple[Any, ...]], read: Sequence[str]) -> None:
    """Refuses every field with a value that the decoder does not compute.

    Args:
        supported: a family's own fields that change the computation, and the values it computes.
        read: fields that the family reads itself.

    Raises:
        ValueError: naming them all.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    experts = [f"{name}={given[name]!r}" for name in _EXPERTS if given.get(name)]
    if experts:
        raise ValueError(f"{', '.join(experts)}: mixture of experts is not supported; use a dense model")
    if given.get("quantization_config"):
        raise ValueError(
            f"quantization_config={given['quantization_config']!r} not supported; use the model that has not "
            "been quantised"
        )
    supported = _SUPPORTED | dict(supported)
    wrong = [f"{n}={given[n]!r}" for n in supported if n in given and given[n] not in supported[n]]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} not supported; use a model without")
    known = _READ | {"quantization_config"} | supported.keys() | set(read) | set(_EXPERTS)
    unread = {n: v for n, v in given.items() if n not in known and not _is_descriptive(n)}
    # What is empty asks for nothing; false and 0 may switch something off.
    strange = [f"{n}={v!r}" for n, v in unread.items() if v not in ("", [], {})]
    if strange:
        raise ValueError(
            f"{', '.join(strange)} is not known here, and may change what the model computes; if it does "
            "not, take it out of config.json"
        )


def size(fields: Fields, name: str) -> int:
    """A positive integer; raises ValueError with the name and value of anything else."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}; it has to be a positive integer")
    return value


def with_defaults(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields, with a family's own values for those that a file leaves out."""
    return defaults | {name: value for name, value in fields.items() if value is not None}


def decoder_config(fields: Fields, *, rope: Rope, **features: Any) -> DecoderConfig:
    """The decoder that a config.json describes; `check_fields` has accepted it.

    Args:
        fields: config.json.
        features: fields of `DecoderConfig` that the family decides.

    Raises:
        ValueError: naming a field with a value that does not fit.
    """
    embed_dim, num_heads = size(fields, "hidden_size"), size(fields, "num_attention_heads")
    if fields.get("head_dim") is None and embed_dim % num_heads:
        raise ValueError(
            f"hidden_size={embed_dim} is not a multiple of num_attention_heads={num_heads} and there is "
            "no head_dim; add it"
        )
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r}; it has to be true or false")
    config = DecoderConfig(
        vocab_size=size(fields, "vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=size(fields, "intermediate_size"),
        num_layers=size(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=size(fields, "num_key_value_heads"),
        head_dim=embed_dim // num_heads if fields.get("head_dim") is None else size(fields, "head_dim"),
        rope=rope,
        norm_eps=positive("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        tie_embeddings=tied,
        max_positions=size(fields, "max_position_embeddings"),
        **features,
    )
    if num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads="
            f"{config.num_kv_heads}; correct one of them"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} is odd, and RoPE turns pairs; correct it")
    return config


def sliding_fields(fields: Fields, default: Sequence[bool], window: Any) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers` of a `DecoderConfig`.

    Args:
        default: which layers slide where `layer_types` does not say.
        window: positions that a sliding layer sees; read only if one slides.

    Raises:
        ValueError: layer types that are not supported, or do not fit the layers or the window.
    """
    num_layers = size(fields, "num_hidden_layers")
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ValueError(f"layer_types={kinds!r} does not name {num_layers} layers; correct it")
        strange = sorted({repr(kind) for kind in kinds if kind not in known})
        if strange:
            raise ValueError(f"layer_types with {', '.join(strange)} not supported; use a model without")
        default = [kind == "sliding_attention" for kind in kinds]
    if not any(default):
        return {}
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"sliding_window={window!r}, but layers slide; it has to be a positive integer")
    return {"sliding_window": window, "sliding_layers": tuple(default)}


def hf_layer_types(config: DecoderConfig) -> list[str]:
    """`layer_types` of config.json."""
    slides = config.sliding_layers or (False,) * config.num_layers
    return ["sliding_attention" if s else "full_attention" for s in slides]


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
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        **rope_to_hf(config.rope),
    }
