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
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import (
    END,
    GROUP,
    HEAD,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    NEW,
    PROMPTS,
    VOCABULARY,
    WIDE,
    WIDTH,
    Process,
    call,
    load_ours,
    measured_speeds,
    write_model,
)

SAMPLERS = ("ours", "ours, room for 1,024", "ours, one device", "hf", "tunix")


def prompt_tokens() -> Any:
    import numpy as np

    return np.random.default_rng(1).integers(3, VOCABULARY, (PROMPTS, WIDTH)).astype(np.int32)


# ---- The samplers: each returns what runs one round and gives its useful tokens


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
                processes.append(Process(sampler, python, __file__, folder))
                processes[-1].round(0)
        runs: dict[str, list[dict[str, Any]]] = {p.name: [] for p in processes}
        for number in range(1, args.rounds + 1):
            for process in processes:
                runs[process.name].append(process.round(number))
                last = runs[process.name][-1]
                speed = f"{last['tokens'] / last['seconds']:.0f} tokens/s"
                print(f"round {number}: {process.name}: {speed}", file=sys.stderr, flush=True)
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
