"""How many slots the free memory has room for, before anything runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.models.cache import bytes_per_position
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.rollout.attention import heads_divide
from kdrl_jax.rollout.prefill import CHUNK, prefill_rows, prefix_length
from kdrl_jax.rollout.settings import EngineSettings, cache_length
from kdrl_jax.sharding import batch_shards

MOST_ON_CPU = 32
"""Over the devices that a host's CPU is taken apart into: more buy little, and the last ones to end leave
more of them idle."""
_UNKNOWN = 1 << 50
SHARE = 0.9
"""Of a device's memory that is filled: the rest is for what the compiler and the allocator need."""


def choose_slots(config: DecoderConfig, settings: EngineSettings, mesh: Mesh, free: int | None = None) -> int:
    """Slots of each shard: those of the settings, or as many as its rows, the memory and the platform say.

    Args:
        free: bytes on each device that may be filled; None asks the devices.

    Raises:
        ValueError: one line with the numbers, when those asked for, or even one, do not fit.
    """
    rows = settings.num_prompts * settings.group_size // batch_shards(mesh)
    platform = mesh.devices.flat[0].platform
    fixed, each = _needs(config, settings, mesh)
    free = _free_bytes(mesh) if free is None else free
    fits = max(free - fixed, 0) // each
    wanted = settings.slots or rows
    if platform == "cpu" and not settings.slots:
        wanted = max(MOST_ON_CPU // len(_local(mesh)), 1)
    wanted = min(wanted, rows)
    if fits < (wanted if settings.slots else 1):
        asked = f"rollout.slots_per_device={settings.slots}" if settings.slots else "one slot"
        lower = "Lower rollout.slots_per_device," if settings.slots else "Lower"
        raise ValueError(
            f"sampling needs {_size(fixed)} on each device for prompts and workspace, and {_size(each)} "
            f"for each slot of {cache_length(settings)} positions in {settings.cache_dtype}; {_size(free)} "
            f"are free, and {asked} does not fit. {lower} rollout.max_new_tokens, data.max_prompt_tokens or "
            "train.prompts_per_iteration, use rollout.cache_dtype=int8, or give devices to mesh.tensor"
        )
    if settings.slots or fits >= wanted:
        return wanted
    # A power of two: a little more or less free memory another time should not make another program.
    return 1 << (fits.bit_length() - 1)


def _needs(config: DecoderConfig, settings: EngineSettings, mesh: Mesh) -> tuple[int, int]:
    """Bytes on each device: (whatever the slots, for each slot)."""
    tensor = mesh.shape["tensor"]
    prompts = settings.num_prompts // batch_shards(mesh)
    rows, width = prompts * settings.group_size, settings.max_prompt_tokens + settings.max_new_tokens
    position = bytes_per_position(config, jnp.dtype(settings.cache_dtype))
    if mesh.devices.flat[0].platform == "tpu":
        # A TPU keeps vectors in whole registers of 128.
        position = position * -(-config.head_dim // 128) * 128 // config.head_dim
    divide = heads_divide(config, mesh)
    if divide:
        position //= tensor
    prefix = prefix_length(settings.max_prompt_tokens)
    chunk = min(prefix, CHUNK)
    at_once = chunk * prefill_rows(prompts, prefix, config.num_heads)
    heads = config.num_heads // (tensor if divide else 1)
    # Activations in float32, and two arrays of attention scores.
    prefill = at_once * 4 * (4 * config.embed_dim + 3 * config.mlp_dim // tensor + 2 * heads * prefix)
    fixed = prompts * prefix * position + 8 * rows * width + prefill
    # Whole, and not over `tensor`, while a token is drawn.
    logits = 3 * 4 * config.vocab_size
    return fixed, cache_length(settings) * position + logits


def _local(mesh: Mesh) -> list[jax.Device]:
    """The devices of this host."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def _free_bytes(mesh: Mesh) -> int:
    """That may be filled yet, of the device of the mesh that has least, on any host."""
    local = _local(mesh)
    if local[0].platform == "cpu":
        least = int(SHARE * _host_bytes()) // len(local)
    else:
        stats = [d.memory_stats() or {} for d in local]
        # A device that does not tell is taken at the user's word.
        least = min(int(SHARE * s.get("bytes_limit", _UNKNOWN)) - s.get("bytes_in_use", 0) for s in stats)
    return hosts.least(least)


def _host_bytes() -> int:
    """Memory that processes can still have; without Linux's file, enough not to matter."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return _UNKNOWN
    lines = dict(line.split(":") for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _size(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
