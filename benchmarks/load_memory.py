"""Says whether loading a checkpoint stays within its memory.

    python benchmarks/load_memory.py [CASE ...]

Writes two checkpoints of random numbers, each of 2 GB or more in sharded files, into a temporary folder,
and loads each in processes of their own on CPU. Per case: seconds, the process's peak resident memory over
the parameters' size in float32 (pass: at most 1.3, with all that Python and JAX hold), the fullest device's
bytes over its even share (pass: at most 1.01). Needs Linux, 3 GB of disk and 6 GB of memory.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 400e6
# The embedding is a quarter of the small one: the largest single tensor that published files have.
SHAPES: dict[str, dict[str, Any]] = {
    "float32": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 26},
    "bfloat16": {"hidden_size": 1280, "intermediate_size": 6912, "num_hidden_layers": 28},
}
COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
# Case -> stored type, type on the devices, fsdp, tensor.
CASES = {
    "f32 to f32, 1 device": ("float32", "float32", 1, 1),
    "f32 to bf16, 1 device": ("float32", "bfloat16", 1, 1),
    "bf16 to f32, 1 device": ("bfloat16", "float32", 1, 1),
    "bf16 to bf16, 1 device": ("bfloat16", "bfloat16", 1, 1),
    "bf16 to f32, fsdp=8": ("bfloat16", "float32", 8, 1),
    "bf16 to f32, fsdp=4 tensor=2": ("bfloat16", "float32", 4, 2),
    "f32 to f32, fsdp=8": ("float32", "float32", 8, 1),
}


def tensor_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen2 with a tied head, in the order of published files."""
    d, f = fields["hidden_size"], fields["intermediate_size"]
    kv = fields["num_key_value_heads"] * (d // fields["num_attention_heads"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], d)}
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, out in (("q", d), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, d)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, d)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (d, f)
        shapes |= {f"{at}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (d,)}


def write_checkpoint(folder: Path, stored: str) -> int:
    """Writes config.json, the index and the shards, one shard held at a time; returns the bytes stored."""
    fields = COMMON | SHAPES[stored] | {"torch_dtype": stored}
    fields["num_attention_heads"] = fields["hidden_size"] // 64
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    rng = np.random.default_rng(0)
    shards: list[list[str]] = [[]]
    shapes, filled = tensor_shapes(fields), 0
    for name, shape in shapes.items():
        if filled > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += math.prod(shape) * dtype.itemsize
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        save_file({n: rng.random(shapes[n], np.float32).astype(dtype) for n in names}, folder / file)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status. (The peak that getrusage gives begins with the parent's.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def load(folder: str, dtype: str, fsdp: int, tensor: int) -> dict[str, Any]:
    """Loads the folder as training does; runs in a process of its own."""
    import jax

    from kdrl_jax.config import MeshConfig, ModelConfig
    from kdrl_jax.models.decoder import make_model
    from kdrl_jax.models.load import open_model
    from kdrl_jax.setup import abstract_params
    from kdrl_jax.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor))
    before, start, cpu = resident("VmRSS"), time.monotonic(), time.process_time()
    source = open_model(ModelConfig(path=folder))
    params = source.load(abstract_params(make_model(source.config, dtype), mesh, dtype))
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "before": before,
        "peak": resident("VmHWM"),
        "num_params": sum(leaf.size for leaf in leaves),
        "share": max(held.values()) * len(held) / sum(leaf.nbytes for leaf in leaves),
    }


def measure(folder: Path, dtype: str, fsdp: int, tensor: int) -> dict[str, Any]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp * tensor}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, __file__, "--load", str(folder), dtype, str(fsdp), str(tensor)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    cases = {name: CASES[name] for name in sys.argv[1:]} or CASES
    holds = True
    titles = ("case", "GB stored", "GB in float32", "GB before", "GB peak", "peak / float32")
    titles += ("share", "s", "CPU s", "stored GB/s", "")
    print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for stored in dict.fromkeys(case[0] for case in cases.values()):
        with tempfile.TemporaryDirectory() as folder:
            written = write_checkpoint(Path(folder), stored)
            for name, (_, dtype, fsdp, tensor) in ((k, v) for k, v in cases.items() if v[0] == stored):
                found = measure(Path(folder), dtype, fsdp, tensor)
                size = 4 * found["num_params"]
                ok = written >= 2e9 and found["peak"] <= 1.3 * size and found["share"] <= 1.01
                holds &= ok
                print(
                    f"| {name} | {written / 1e9:.2f} | {size / 1e9:.2f} | {found['before'] / 1e9:.2f} | "
                    f"{found['peak'] / 1e9:.2f} | {found['peak'] / size:.2f} | {found['share']:.4f} | "
                    f"{found['seconds']:.1f} | {found['cpu_seconds']:.1f} | "
                    f"{written / 1e9 / found['seconds']:.2f} | {'pass' if ok else 'FAIL'} |",
                    flush=True,
                )
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        path, dtype, fsdp, tensor = sys.argv[2:]
        print(json.dumps(load(path, dtype, int(fsdp), int(tensor))))
    else:
        main()
