"""Shapes of a config's models, without their weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_jax.config import Config, ModelConfig
from kdrl_jax.config.load import RUN_CONFIG
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.families import family_of
from kdrl_jax.paths import as_path
from kdrl_jax.runs import Role, model_of, prerequisites, roles
from kdrl_jax.setup.finder import Finder, choose_tokenizer


def _qwen2(hidden: int, mlp: int, layers: int, heads: int, vocab: int, *, tied: bool, theta: float) -> Any:
    kv_heads = {12: 2, 14: 2, 28: 4}[heads]
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
    }


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> Any:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
    }


_R1_1_5B = _qwen2(1536, 8960, 28, 12, 151936, tied=False, theta=10000.0)
_R1_7B = _qwen2(3584, 18944, 28, 28, 152064, tied=False, theta=10000.0)

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _R1_7B,
    "Skywork/Skywork-OR1-Math-7B": _R1_7B,
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 151936, tied=True, theta=1e6),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 151936, tied=True, theta=1e6),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 152064, tied=False, theta=1e6),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
}
"""What the config.json of these models says, by hub name: so that a plan of them needs neither a network nor
a download. Source: their model pages on huggingface.co."""


@dataclasses.dataclass(frozen=True)
class Ids:
    """In place of a tokenizer: which ids end and pad changes no program."""

    num_tokens: int
    end_ids: tuple[int, ...] = (0,)
    pad_id: int = 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is known of a config's models."""

    of_role: Mapping[Role, DecoderConfig]
    num_tokens: int
    """Ids that are sampled and scored: those of the smallest vocabulary, of which some may be padding."""


def model_shapes(config: Config) -> Shapes:
    """The shapes of a config's models.

    Raises:
        ValueError, FileNotFoundError: as `make_setup`, of models that are not in `PUBLISHED`.
    """
    finder = Finder()
    found = {role: _published(model_of(config, role)) for role in roles(config)}
    # A model that is trained first is what its own config says.
    found |= {role: model_shapes(inner).of_role["student"] for role, inner in _untrained(config).items()}
    unknown = [role for role, shape in found.items() if shape is None]
    num_tokens = 0
    if unknown:
        own = {role: finder.own_tokenizer(config, role) for role in unknown}
        num_tokens = choose_tokenizer(config, finder, own).vocab_size
    shapes = {
        role: finder.find(config, role, num_tokens).config if shape is None else shape
        for role, shape in found.items()
    }
    return Shapes(shapes, min(shape.vocab_size for shape in shapes.values()))


def _untrained(config: Config) -> dict[Role, Config]:
    inner = prerequisites(config).items()
    return {role: c for role, c in inner if not (as_path(c.run_dir) / RUN_CONFIG).exists()}


def _published(model: ModelConfig) -> DecoderConfig | None:
    if model.path is None or model.path not in PUBLISHED or Path(model.path).exists():
        return None
    fields = PUBLISHED[model.path]
    whole = family_of(fields).config_from_hf(fields)
    return whole.keep(model.layer_indices() or tuple(range(whole.num_layers)))
