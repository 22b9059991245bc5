"""config.json files as they were published, field by field: each is understood as transformers does.

The synthetic checkpoints of tests/golden prove the mathematics; only these have the fields that real files
have.
"""

from typing import Any

import pytest

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.families import family_of
from kdrl_jax.models.rope import Rope

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [1, 106], "pad_token_id": 0}
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    **TOKENS,
}
QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
SMOLLM2 = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "vocab_size": 49152,
}
GEMMA2 = COMMON | {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA3_1B = COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# The text model of the 27B with vision: what is left out is the family's own.
GEMMA3_27B = {
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "model_type": "gemma3_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
PLAIN_QWEN = {"rope": Rope(1e4), "qkv_bias": True, "sliding_layers": (), "longest": 131072}

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (QWEN2, PLAIN_QWEN | {"head_dim": 128, "tie_embeddings": False}),
    # As its model card says to switch YaRN on, which leaves max_position_embeddings as it was.
    "Qwen2.5-7B-Instruct with YaRN": (
        QWEN2 | YARN | {"max_position_embeddings": 32768, "vocab_size": 152064},
        {"vocab_size": 152064, "longest": 131072},
    ),
    "Qwen3-0.6B": (
        QWEN3,
        {"qk_norm": True, "qkv_bias": False, "rope": Rope(1e6), "head_dim": 128, "tie_embeddings": True},
    ),
    "Llama-3.2-1B": (
        LLAMA,
        {
            "rope": Rope(5e5, "llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
            "longest": 131072,
            "num_kv_heads": 8,
        },
    ),
    "SmolLM2-135M": (SMOLLM2, {"rope": Rope(1e5), "head_dim": 64, "longest": 8192}),
    "gemma-2-27b": (
        GEMMA2,
        {
            "query_scale": 144**-0.5,
            "attn_softcap": 50.0,
            "final_softcap": 30.0,
            "sliding_window": 4096,
            "sliding_layers": (True, False) * 23,
            "tie_embeddings": True,
        },
    ),
    "gemma-3-1b": (
        GEMMA3_1B,
        {
            "rope": Rope(1e6),
            "sliding_rope": Rope(1e4),
            "sliding_layers": ((True,) * 5 + (False,)) * 4 + (True, True),
            "attn_softcap": None,
            "final_softcap": None,
            "longest": 32768,
        },
    ),
    "gemma-3-27b": (
        GEMMA3_27B,
        {
            "rope": Rope(1e6, "linear", 8.0),
            "sliding_rope": Rope(1e4),
            "query_scale": 168**-0.5,
            "vocab_size": 262208,
            "longest": 131072,
            "sliding_layers": ((True,) * 5 + (False,)) * 10 + (True, True),
        },
    ),
}


def read(fields: dict[str, Any]) -> DecoderConfig:
    return family_of(fields).config_from_hf(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood(name: str) -> None:
    fields, expected = PUBLISHED[name]
    config = read(fields)
    assert {key: getattr(config, key) for key in expected} == expected
    assert read(family_of(fields).config_to_hf(config)) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_understands_it_the_same(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    fields, _ = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(**fields)
    written = family_of(fields).config_to_hf(read(fields))
    back = transformers.AutoConfig.for_model(**written)
    for key in ("layer_types", "sliding_window", "head_dim", "query_pre_attn_scalar", "rope_parameters"):
        ours, original = getattr(back, key, None), getattr(theirs, key, None)
        if key == "rope_parameters" and "yarn" in str(original):
            # YaRN's defaults are written out, and `type` is an older name of `rope_type`.
            original = {k: v for k, v in original.items() if k != "type"}
            ours = {k: v for k, v in ours.items() if k in original}
        if key == "head_dim" and original is None:
            original = theirs.hidden_size // theirs.num_attention_heads
        assert ours == original, key


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        (QWEN2 | {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        (LLAMA | {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
        (LLAMA | {"use_rope": False}, "use_rope=False"),
        (LLAMA | {"attention_multiplier": 0}, "attention_multiplier=0"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "has not been quantised"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": "4"}, "max_window_layers='4'"),
        (QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        (QWEN3 | {"num_experts": 128}, "num_experts=128: mixture of experts"),
    ],
)
def test_what_would_change_the_model_is_refused(fields: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(fields)
    assert shown in str(caught.value)


def test_a_window_that_is_left_out_is_not_one_that_is_null() -> None:
    slides = QWEN2 | {"use_sliding_window": True, "max_window_layers": 4}
    assert read({k: v for k, v in slides.items() if k != "sliding_window"}).sliding_window == 4096
    assert read(slides | {"sliding_window": None}).sliding_window is None
