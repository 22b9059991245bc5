"""Compiles the sampling engine for TPUs, on any CPU host with libtpu, and says what it needs of a chip.

    pip install 'jax[tpu]'
    python benchmarks/rollout_tpu.py [v5e v5p v6e v4] [--cache bfloat16|int8] [--tensor 1]
        [--attention auto|windows|kernel] [--shapes]

Qwen2.5-1.5B in bfloat16, prompts of 1,024 tokens and completions of 7,168: 8,192 positions a slot; 16 slots a
chip on v5e and 64 on the others; 16 prompts a chip, 8 completions each; four chips, `fsdp` and `tensor` over
them. The table has both programs of the engine (`start` prefills, `chunk` decodes): seconds to compile, GiB
of a chip for arguments, for those that results are written into (cache and prefixes are donated), and for
temporaries, which are also a share of the cache; copies of a whole cache in the program. Pass: no copy, all
of cache and prefixes written in place, temporaries under 10 % of the cache.

The last column is the least time of one decode step with slots half full: weights and filled keys and values
over the bandwidth that Google names for the chip (cloud.google.com/tpu/docs). It is no measurement.
"""

import argparse
import functools
import os
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec

from kdrl_jax import sharding
from kdrl_jax.models.attention import ScoreRules
from kdrl_jax.models.cache import bytes_per_position, empty_cache
from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope import Rope
from kdrl_jax.rollout.attention import heads_divide
from kdrl_jax.rollout.decode import Call
from kdrl_jax.rollout.engine import Programs
from kdrl_jax.rollout.kernel import Kernel, block_size
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.settings import EngineSettings, cache_length
from kdrl_jax.rollout.weights import decode_layout

# Topology of four chips, slots a chip, GB/s of its memory.
CHIPS = {
    "v5e": ("v5e:2x2", 16, 819),
    "v5p": ("v5p:2x2x1", 64, 2765),
    "v6e": ("v6e:2x2", 64, 1640),
    "v4": ("v4:2x2x1", 64, 1228),
}
CONFIG = DecoderConfig(
    151_936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True, tie_embeddings=True, rope=Rope(1e6)
)
PROMPT, NEW, PROMPTS, GROUP = 1024, 7168, 16, 8
GIB = 2**30


def whole_copies(text: str, shape: tuple[int, ...]) -> int:
    """Instructions that copy an array of this shape. Inside a fusion that is aliased with its operand, a
    copy is only another way to address it."""
    aliased = set(re.findall(r"output_to_operand_aliasing=\{\{\}: \(0, \{\}\)\}, calls=%([\w.]+)", text))
    wanted = rf"\[{','.join(map(str, shape))}\]\S* copy(-start)?\("
    count, inside = 0, ""
    for line in text.splitlines():
        begins = re.match(r"%?([\w.]+) \(.*\{$", line)
        inside = begins.group(1) if begins else inside
        count += bool(re.search(wanted, line)) and inside not in aliased
    return count


def mesh_of(chip: str, tensor: int) -> Mesh:
    """Four chips, `fsdp` and `tensor` over them."""
    # Two cores of a v4 chip are one device.
    kind = {"chip_config_name": "megacore"} if chip == "v4" else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0], **kind).devices
    grid = np.array(devices).reshape(1, len(devices) // tensor, tensor)
    return Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


# Query heads, kv heads, width of a head, positions: Qwen2.5-0.5B, SmolLM2, Gemma 3 1B, Gemma 7B, Llama 2 7B.
SHAPES = [(14, 2, 64, 8192), (9, 3, 64, 192), (4, 1, 256, 704), (16, 16, 256, 4096), (32, 32, 128, 4096)]


def compile_shapes(chip: str) -> bool:
    """Prints a row for each shape and type of the kernel on a chip. Returns whether all compile."""
    mesh = mesh_of(chip, tensor=1)
    place = sharding.replicated(mesh)
    passes = True
    for heads, kv_heads, width, positions in SHAPES:
        for dtype in ("bfloat16", "int8", "float32"):
            config = DecoderConfig(128, 64, 64, 2, heads, kv_heads, width)
            length = -(-positions // 128) * 128
            kernel = Kernel(length, block_size(length, kv_heads, width, dtype), interpret=False)
            rules = ScoreRules(jnp.int32(100), width**-0.5, 50.0)
            slots, float_type = 8, jnp.float32 if dtype == "float32" else jnp.bfloat16
            arguments = (
                jax.eval_shape(functools.partial(empty_cache, config, slots, length, jnp.dtype(dtype))),
                jax.ShapeDtypeStruct((slots,), jnp.int32),
                *(jax.ShapeDtypeStruct((slots, n, width), float_type) for n in (heads, kv_heads, kv_heads)),
            )
            placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)

            def attend(cache: Any, at: Any, *qkv: Any, kernel: Any = kernel, rules: Any = rules) -> Any:
                return kernel.attend(kernel.plan(at), cache, jnp.int32(1), *qkv, rules)

            whole = PartitionSpec()
            on_chip = jax.shard_map(attend, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
            try:
                with jax.set_mesh(mesh):
                    jax.jit(on_chip, donate_argnums=0).lower(*placed).compile()
                verdict = "pass"
            except Exception as error:  # whatever the compiler says is the result
                verdict = f"FAIL: {str(error).splitlines()[0][:120]}"
                passes = False
            cells = (chip, heads, kv_heads, width, length, dtype, kernel.block, verdict)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return passes


def compile_for(chip: str, cache: Any, tensor: int, attention: Any) -> bool:
    """Prints a chip's two rows. Returns whether they pass."""
    _, slots, bandwidth = CHIPS[chip]
    mesh = mesh_of(chip, tensor)
    shards = sharding.batch_shards(mesh)
    model = make_model(CONFIG, jnp.bfloat16)
    settings = EngineSettings(
        num_prompts=PROMPTS * shards,
        group_size=GROUP,
        max_prompt_tokens=PROMPT,
        max_new_tokens=NEW,
        num_tokens=151_665,
        end_ids=(151_643, 151_645),
        pad_id=151_643,
        decode_chunk=64,
        sampler=SamplerSettings(),
        cache_dtype=cache,
        attention=attention,
    )
    programs = Programs(model, settings, mesh, slots)
    params = decode_layout(model, model.abstract(), mesh)
    rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
    num = settings.num_prompts
    prompts = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=rows) for s in ((num, PROMPT), (num,), (num,))]
    key = jax.eval_shape(lambda: jax.random.key(0))
    call = Call(
        *(
            jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
            for dtype in (key.dtype, jnp.float32, jnp.int32)
        )
    )  # type: ignore[arg-type]
    with jax.set_mesh(mesh):
        carry = programs.abstract_carry(params, *prompts)
        lowered = {
            "start": programs.start.lower(params, *prompts),
            "chunk": programs.chunk.lower(params, carry, call),
        }
    local = carry.cache.keys.sharding.shard_shape(carry.cache.keys.shape)
    held = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves((carry.cache, carry.prefixes))]
    types = [x.dtype.itemsize for x in jax.tree.leaves((carry.cache, carry.prefixes))]
    sizes = [int(np.prod(s)) * t for s, t in zip(held, types, strict=True)]
    cache_size = sum(sizes[: len(sizes) // 2])
    weights = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(params)
    )
    divided = tensor if heads_divide(CONFIG, mesh) else 1
    filled = slots * cache_length(settings) // 2 * bytes_per_position(CONFIG, jnp.dtype(cache)) // divided
    passes = True
    for program, low in lowered.items():
        start = time.perf_counter()
        compiled = low.compile()
        seconds = time.perf_counter() - start
        stats = compiled.memory_analysis()
        copies = whole_copies(compiled.as_text(), local)
        share = stats.temp_size_in_bytes / cache_size
        aliased = program == "start" or stats.alias_size_in_bytes >= sum(sizes)
        good = not copies and aliased and share < 0.1
        passes &= good
        least = f"{(weights + filled) / bandwidth / 1e6:.1f} ms" if program == "chunk" else ""
        cells = [
            chip,
            program,
            str(slots),
            f"{seconds:.0f} s",
            f"{stats.argument_size_in_bytes / GIB:.2f}",
            f"{cache_size / GIB:.2f}",
            f"{stats.alias_size_in_bytes / GIB:.2f}",
            f"{stats.temp_size_in_bytes / GIB:.3f}",
            f"{share:.1%}",
            str(copies),
            "pass" if good else "FAIL",
            least,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("chips", nargs="*", default=list(CHIPS))
    parser.add_argument("--cache", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--attention", choices=("auto", "windows", "kernel"), default="auto")
    parser.add_argument("--shapes", action="store_true", help="the kernel alone, over shapes of other models")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    if args.shapes:
        columns = ["chip", "heads", "kv heads", "width", "positions", "cache", "block", "verdict"]
        print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        compiled = [compile_shapes(chip) for chip in args.chips]
        sys.exit(0 if all(compiled) else 1)
    titles = (
        "chip|program|slots|compiled in|arguments, GiB|cache|aliased|temporaries|of the cache|copies|verdict"
    )
    columns = [*titles.split("|"), "least time of a step"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    passed = [compile_for(chip, args.cache, args.tensor, args.attention) for chip in args.chips]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
