"""Completion tokens per second of the sampling engine, beside other samplers, in one run.

    python benchmarks/rollout.py [--hf PYTHON] [--tunix PYTHON] [--rounds 5] [--bandwidth GB/S]

A random Qwen2 of 8.0M parameters, whose end token has probability 1/192 at every step, so that completions
spread as real ones do, completes 16 prompts of 64 tokens, 8 times each, in at most 512 tokens, at temperature
1 from the whole distribution, in float32. Each sampler is a process of its own that loads and warms up once;
then they take turns, one round each, and the table holds medians over the rounds of useful tokens (end token
included, nothing after it) per second. On a CPU `ours` has one device per core, as mesh.cpu_devices makes
them, and `ours, one device` one for all cores; `ours, room for 1,024` has twice the room for the same
completions.

PYTHON is the interpreter of an environment that has transformers and torch (--hf; by default this one, if it
has them), or google-tunix (--tunix). All run on the CPU, or on the first GPU where there is one.

The last lines are the floor by arithmetic for the step that was measured: what must be read (weights once a
step, and each row's filled keys and values) over the memory's bandwidth, and what must be multiplied over the
speed of a large product, both measured here unless --bandwidth says what the device is sold with. On TPUs and
GPUs reading is the floor, on CPUs multiplying.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
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
SAMPLERS = ("ours", "ours, room for 1,024", "ours, one device", "hf", "tunix")


# ---- The model


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
    model, params = load_ours(folder)
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (8, 128)), jnp.int32)
    hidden = jax.jit(lambda p, t: model.bind(p).hidden(t))(params, tokens)
    head[END, 0] = math.log((VOCABULARY - 1) / (MEAN - 1)) / float(hidden[..., 0].mean())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prompt_tokens() -> Any:
    import numpy as np

    return np.random.default_rng(1).integers(3, VOCABULARY, (PROMPTS, WIDTH)).astype(np.int32)


# ---- The samplers: each returns what runs one round and gives its useful tokens


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


def ours(folder: Path, room: int, most_devices: int | None = None) -> Callable[[int], dict[str, Any]]:
    import jax
    import numpy as np

    from kdrl_jax.config import MeshConfig
    from kdrl_jax.rollout.engine import Engine
    from kdrl_jax.rollout.sampling import SamplerSettings
    from kdrl_jax.rollout.settings import EngineSettings
    from kdrl_jax.sharding import make_mesh
    from kdrl_jax.types import Prompts

    jax.config.update("jax_num_cpu_devices", most_devices or len(os.sched_getaffinity(0)))
    jax.config.update("jax_default_matmul_precision", "float32")
    devices = jax.devices() if jax.default_backend() == "cpu" else jax.devices()[:1]
    model, params = load_ours(folder)
    settings = EngineSettings(
        num_prompts=PROMPTS,
        group_size=GROUP,
        max_prompt_tokens=WIDTH,
        max_new_tokens=room,
        num_tokens=VOCABULARY,
        end_ids=(END,),
        pad_id=0,
        decode_chunk=64,
        sampler=SamplerSettings(),
    )
    engine = Engine(model, settings, make_mesh(MeshConfig(), devices))
    lengths, draws = np.full(PROMPTS, WIDTH, np.int32), np.arange(PROMPTS, dtype=np.int32)
    prompts = Prompts(prompt_tokens(), lengths, draws, (), (), (), ())

    def round_of(seed: int) -> dict[str, Any]:
        *_, last = engine.stream(params, prompts, jax.random.key(seed), max_new_tokens=NEW)
        counts = np.asarray(last.carry.counts_B)
        return {
            "tokens": int(counts.sum()),
            "steps": int(np.max(last.carry.steps)),
            "slots": engine.programs().slots * len(devices),
            "devices": len(devices),
            # Position of each token that was fed, summed: what attention had to read.
            "positions": int(sum(WIDTH * n + n * (n - 1) // 2 for n in counts.tolist())),
        }

    return round_of


def hf(folder: Path) -> Callable[[int], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    ids = torch.tensor(prompt_tokens(), dtype=torch.int64, device=device).repeat_interleave(GROUP, 0)

    def round_of(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": NEW}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, WIDTH:].cpu()
        ends = (out == END).int()
        before = ends.cumsum(1) - ends
        return {"tokens": int((before == 0).sum())}

    return round_of


def tunix(folder: Path) -> Callable[[int], dict[str, Any]]:
    import jax.numpy as jnp
    from tunix.generate import sampler
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as loader

    config = qwen2.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDE,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD,
        num_kv_heads=KV_HEADS,
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=False,
    )

    class Words:
        """Tokens as words: its sampler takes texts."""

        dedup = None

        def encode(self, text: str, **_: Any) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(str(i) for i in ids)

        def bos_id(self) -> None:
            return None

        def eos_id(self) -> int:
            return END

        def pad_id(self) -> int:
            return 0

    model = loader.create_model_from_safe_tensors(str(folder), config, None, jnp.float32)
    cache = sampler.CacheConfig(
        cache_size=WIDTH + NEW, num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD
    )
    engine = sampler.Sampler(model, Words(), cache)
    texts = [" ".join(map(str, row)) for row in prompt_tokens() for _ in range(GROUP)]

    def round_of(seed: int) -> dict[str, Any]:
        out = engine(
            texts,
            max_generation_steps=NEW,
            max_prompt_length=WIDTH,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=seed,
            return_logprobs=True,
        )
        # Its rows come without the end token, which was sampled too.
        return {"tokens": sum(len(row) + (len(row) < NEW) for row in out.tokens)}

    return round_of


def work(sampler: str, folder: Path) -> None:
    """A sampler's process: one line in asks for a round, one line out answers."""
    with contextlib.redirect_stdout(sys.stderr):
        makers = {
            "ours": lambda: ours(folder, NEW),
            "ours, room for 1,024": lambda: ours(folder, 2 * NEW),
            "ours, one device": lambda: ours(folder, NEW, 1),
            "hf": lambda: hf(folder),
            "tunix": lambda: tunix(folder),
        }
        round_of = makers[sampler]()
        round_of(0)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            start = time.perf_counter()
            measured = round_of(int(line))
            measured["seconds"] = time.perf_counter() - start
        print(json.dumps(measured), flush=True)


# ---- The floor


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


def print_floor(run: dict[str, Any], bandwidth: float | None) -> None:
    """What one round of ours must at least take."""
    read, product = measured_speeds()
    how = "measured by reading 256 MiB"
    if bandwidth is not None:
        read, how = bandwidth * 1e9, "as given"
    weights = LAYERS * WIDE * (2 * HEAD * (HEADS + KV_HEADS) + 3 * MLP) + VOCABULARY * WIDE
    of_position = 2 * LAYERS * KV_HEADS * HEAD * 4
    read_weights = run["steps"] * run["devices"] * weights * 4
    held = read_weights + run["positions"] * of_position
    flops = 2 * run["tokens"] * weights + 4 * run["positions"] * LAYERS * HEADS * HEAD
    reading, multiplying = held / read, flops / product
    lines = [
        f"floor: {run['steps']} steps of {run['slots']} slots on {run['devices']} devices read "
        f"{held / 2**30:.2f} GiB (weights {read_weights / 2**30:.2f}, the rest keys and values), "
        f"{reading:.2f} s at {read / 1e9:.1f} GB/s ({how}); {flops / 1e9:.0f} GFLOP, {multiplying:.2f} s at "
        f"{product / 1e9:.0f} GFLOP/s (a product of 2,048 squared)",
        f"measured: {run['seconds']:.2f} s, {run['seconds'] / max(reading, multiplying):.1f} times the "
        f"larger and {run['seconds'] / (reading + multiplying):.1f} times the sum of both; "
        f"{run['tokens'] / run['steps']:.1f} slots were busy on average",
    ]
    print("\n".join(lines))


# ---- All of them


def call(fn: Callable[..., None], *arguments: Any) -> None:
    """Runs a function of this file in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=fn, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


class Process:
    """A sampler in the environment that has it."""

    def __init__(self, sampler: str, python: str, folder: Path):
        command = [python, __file__, "--worker", sampler, "--model", str(folder)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self.sampler = sampler

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
            sys.exit(f"{self.sampler} failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    has_hf = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    parser.add_argument("--hf", metavar="PYTHON", default=sys.executable if has_hf else None)
    parser.add_argument("--tunix", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, metavar="GB/S")
    parser.add_argument("--worker", choices=SAMPLERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model)
        return
    us = sys.executable
    pythons = dict(zip(SAMPLERS, (us, us, us, args.hf, args.tunix), strict=True))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        # In processes of their own: this one must not hold a GPU that the others need.
        call(write_model, folder)
        processes = []
        for sampler, python in pythons.items():
            if python is not None:
                # One after the other: no one warms up while another is timed.
                processes.append(Process(sampler, python, folder))
                processes[-1].round(0)
        runs: dict[str, list[dict[str, Any]]] = {p.sampler: [] for p in processes}
        for number in range(1, args.rounds + 1):
            for process in processes:
                runs[process.sampler].append(process.round(number))
                last = runs[process.sampler][-1]
                speed = f"{last['tokens'] / last['seconds']:.0f} tokens/s"
                print(f"round {number}: {process.sampler}: {speed}", file=sys.stderr, flush=True)
        for process in processes:
            process.close()
    speeds = {s: statistics.median(r["tokens"] / r["seconds"] for r in rs) for s, rs in runs.items()}
    print(
        "| sampler | tokens/s, median | lowest | highest | tokens a round | ours is |\n" + "| --- " * 6 + "|"
    )
    for sampler, rounds in runs.items():
        each = [r["tokens"] / r["seconds"] for r in rounds]
        tokens = statistics.mean(r["tokens"] for r in rounds)
        ratio = speeds["ours"] / speeds[sampler]
        cells = (f"{x:.0f}" for x in (speeds[sampler], min(each), max(each), tokens))
        print(f"| {sampler} | {' | '.join(cells)} | {ratio:.2f} times |")
    middle = sorted(runs["ours"], key=lambda r: r["tokens"] / r["seconds"])[len(runs["ours"]) // 2]
    call(print_floor, middle, args.bandwidth)


if __name__ == "__main__":
    main()
