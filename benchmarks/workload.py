"""The workload that speeds are measured on, and what benchmarks of it share.

A random Qwen2 of 8.0M parameters, whose end token has probability 1/192 at every step, so that completions
spread as real ones do; prompts of 64 tokens. Everything else that is measured runs beside it, each in a
process of its own.
"""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS, GROUP, WIDTH, NEW = 16, 8, 64, 512
VOCABULARY, WIDE, LAYERS, HEADS, KV_HEADS, HEAD, MLP = 4096, 256, 6, 4, 2, 64, 1024
END, MEAN = 1, 192


def write_model(folder: Path) -> None:
    """The checkpoint with a tokenizer, as Hugging Face writes them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDE,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": END,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, WIDE),
        "lm_head.weight": normal(VOCABULARY, WIDE),
    }
    tensors["model.norm.weight"] = np.ones(WIDE, np.float32)
    for i in range(LAYERS):
        name = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = np.ones(WIDE, np.float32)
        for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{name}self_attn.{letter}_proj.weight"] = normal(heads * HEAD, WIDE)
            tensors[f"{name}self_attn.{letter}_proj.bias"] = np.zeros(heads * HEAD, np.float32)
        tensors[f"{name}self_attn.o_proj.weight"] = normal(WIDE, HEADS * HEAD)
        tensors[f"{name}mlp.gate_proj.weight"] = normal(MLP, WIDE)
        tensors[f"{name}mlp.up_proj.weight"] = normal(MLP, WIDE)
        tensors[f"{name}mlp.down_proj.weight"] = normal(WIDE, MLP)
    # One feature of the hidden state is nearly constant, and alone decides the logit of the end token.
    tensors["model.embed_tokens.weight"][:, 0] = 1
    head = tensors["lm_head.weight"]
    head[:, 0] = 0
    head[END] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    model, params = load_ours(folder)
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (8, 128)), jnp.int32)
    hidden = jax.jit(lambda p, t: model.bind(p).hidden(t))(params, tokens)
    head[END, 0] = math.log((VOCABULARY - 1) / (MEAN - 1)) / float(hidden[..., 0].mean())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """Words `t0`, `t1`, ... beside the checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *(f"t{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load_ours(folder: Path) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    from kdrl_jax.config import ModelConfig
    from kdrl_jax.models.decoder import make_model
    from kdrl_jax.models.load import open_model

    source = open_model(ModelConfig(path=str(folder)))
    model = make_model(source.config)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.abstract())
    return model, source.load(abstract)


def measured_speeds() -> tuple[float, float]:
    """(bytes per second of reading a large array, FLOPs per second of a large product), on this device."""
    import jax
    import jax.numpy as jnp

    def best(fn: Callable[..., Any], *args: Any) -> float:
        jax.block_until_ready(fn(*args))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            times.append(time.perf_counter() - start)
        return min(times)

    x = jnp.ones((64, 1 << 20))
    a = jnp.ones((2048, 2048))
    read = x.nbytes / best(jax.jit(lambda x: x.max(axis=1)), x)
    return read, 2 * 2048**3 / best(jax.jit(jnp.matmul), a, a)


def call(fn: Callable[..., None], *arguments: Any) -> None:
    """Runs a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=fn, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


class Process:
    """One that is measured, in the environment that has it: `SCRIPT --worker NAME --model FOLDER`, which
    answers each line with one."""

    def __init__(self, name: str, python: str, script: str, folder: Path):
        command = [python, script, "--worker", name, "--model", str(folder)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self.name = name

    def round(self, seed: int) -> dict[str, Any]:
        """One round; the first waits for loading and warming up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            sys.exit(f"{self.name} failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
