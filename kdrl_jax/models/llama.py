"""The Llama family: Llama, SmolLM2 and others of `model_type: llama`."""

from typing import Any

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.fields import check_fields, decoder_config, hf_fields, with_defaults
from kdrl_jax.models.rope_fields import Fields, rope_from_hf
from kdrl_jax.models.tensors import Row

ARCHITECTURE = "LlamaForCausalLM"

TENSORS: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embed", "V D -> V D"),
    ("model.layers.{}.input_layernorm.weight", "layers.attn_norm", "D -> D"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers.attn.q", "(N H) D -> D N H"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers.attn.k", "(K H) D -> D K H"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers.attn.v", "(K H) D -> D K H"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers.attn.o", "D (N H) -> N H D"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm", "D -> D"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate", "F D -> D F"),
    ("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up", "F D -> D F"),
    ("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down", "D F -> F D"),
    ("model.norm.weight", "final_norm", "D -> D"),
    ("lm_head.weight", "head", "V D -> D V"),
)

# llama.cpp turns neighbouring pairs in RoPE, not halves, so it stores the rows of q and k with the two
# halves of a head interleaved.
GGUF_TENSORS: tuple[Row, ...] = (
    ("token_embd.weight", "embed", "V D -> V D"),
    ("blk.{}.attn_norm.weight", "layers.attn_norm", "D -> D"),
    ("blk.{}.attn_q.weight", "layers.attn.q", "(N half two) D -> D N (two half)"),
    ("blk.{}.attn_k.weight", "layers.attn.k", "(K half two) D -> D K (two half)"),
    ("blk.{}.attn_v.weight", "layers.attn.v", "(K H) D -> D K H"),
    ("blk.{}.attn_output.weight", "layers.attn.o", "D (N H) -> N H D"),
    ("blk.{}.ffn_norm.weight", "layers.mlp_norm", "D -> D"),
    ("blk.{}.ffn_gate.weight", "layers.mlp.gate", "F D -> D F"),
    ("blk.{}.ffn_up.weight", "layers.mlp.up", "F D -> D F"),
    ("blk.{}.ffn_down.weight", "layers.mlp.down", "D F -> F D"),
    ("output_norm.weight", "final_norm", "D -> D"),
    ("output.weight", "head", "V D -> D V"),
)


def config_from_hf(fields: Fields) -> DecoderConfig:
    """A decoder config from config.json; raises ValueError naming what is not supported."""
    # Files from before grouped queries leave the number of key heads out.
    fields = with_defaults(fields, num_key_value_heads=fields.get("num_attention_heads"))
    check_fields(fields, {"hidden_act": ("silu", "swish"), "sliding_window": ()}, read=())
    return decoder_config(fields, rope=rope_from_hf(fields))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return {
        "model_type": "llama",
        "architectures": [ARCHITECTURE],
        **hf_fields(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
