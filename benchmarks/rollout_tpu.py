"""Compiles the sampling engine for TPUs, on any CPU host with libtpu, and says what it needs of a chip.

    pip install 'jax[tpu]'
    python benchmarks/rollout_tpu.py [v5e v5p v6e v4] [--cache bfloat16|int8] [--tensor 1]

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
import os
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from kdrl_jax import sharding
from kdrl_jax.models.cache import bytes_per_position
from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope import Rope
from kdrl_jax.rollout.decode import Call
from kdrl_jax.rollout.engine import Programs
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


def compile_for(chip: str, cache: Any, tensor: int) -> bool:
    """Prints a chip's two rows. Returns whether they pass."""
    name, slots, bandwidth = CHIPS[chip]
    # Two cores of a v4 chip are one device.
    kind = {"chip_config_name": "megacore"} if chip == "v4" else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **kind).devices
    shards = len(devices) // tensor
    grid = np.array(devices).reshape(1, shards, tensor)
    mesh = Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
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
    filled = slots * cache_length(settings) // 2 * bytes_per_position(CONFIG, jnp.dtype(cache)) // tensor
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
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    titles = (
        "chip|program|slots|compiled in|arguments, GiB|cache|aliased|temporaries|of the cache|copies|verdict"
    )
    columns = [*titles.split("|"), "least time of a step"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    passed = [compile_for(chip, args.cache, args.tensor) for chip in args.chips]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
