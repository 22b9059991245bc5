"""Which attention whole rows have, and its part on each device."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kdrl_jax.models.attention import ScoreRules, full_attention
from kdrl_jax.models.blockwise import blockwise_attention
from kdrl_jax.models.layout import Layout
from kdrl_jax.models.splash import BLOCKS, splash_attention
from kdrl_jax.sharding import ROWS

ROW_TILE = BLOCKS[-1]
"""Positions: the least block of the TPU kernel, as `train.pack_length` is checked for."""


@dataclasses.dataclass(frozen=True)
class RowAttention:
    """How whole rows attend; what it means is the same."""

    kind: Literal["plain", "blockwise", "splash"] = "plain"
    """All scores at once; block by block in XLA; by the TPU kernel."""
    block: int = 64
    """Most positions of a block of `blockwise`; 64 on CPUs by measurement (`benchmarks/update.py`)."""
    interpret: bool = False
    """Run the kernel without a TPU, slowly."""

    @property
    def takes_prefixes(self) -> bool:
        return self.kind != "splash"

    def tile(self, length: int) -> int:
        """What rows of about this length are best a multiple of: blocks divide it, and slices of the
        vocabulary head."""
        if self.kind == "splash":
            return ROW_TILE if length <= 1024 else 512
        return 8 if length < ROW_TILE else ROW_TILE

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, rules: ScoreRules, layout: Layout
    ) -> jax.Array:
        """q [B, T, N, H], k and v [B, T, K, H] to what the queries read, [B, T, N, H].

        On the mesh of `jax.set_mesh` each device attends its own rows with its own heads: kernels cannot be
        divided by the compiler, and loops over blocks not well.
        """
        if self.kind == "plain":
            return full_attention(q, k, v, rules, layout)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._own(q, k, v, rules, layout)
        kv_heads = kv_heads_over(q.shape[2], k.shape[2], mesh.shape["tensor"])
        k, v = (jnp.repeat(x, (kv_heads or x.shape[2]) // x.shape[2], axis=2) for x in (k, v))
        rows_divide = q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        rows = PartitionSpec(ROWS if rows_divide else None)
        heads = PartitionSpec(*rows, None, None if kv_heads is None else "tensor")
        return jax.shard_map(
            self._own,
            in_specs=(heads, heads, heads, PartitionSpec(), rows),
            out_specs=heads,
            check_vma=False,
        )(q, k, v, rules, layout)

    def _own(self, q: jax.Array, k: jax.Array, v: jax.Array, rules: ScoreRules, layout: Layout) -> jax.Array:
        """The attention of one device."""
        if self.kind == "splash":
            return splash_attention(q, k, v, rules, layout, interpret=self.interpret)
        length = q.shape[1]
        block = next(size for size in range(min(self.block, length), 0, -1) if length % size == 0)
        return blockwise_attention(q, k, v, layout.spans(rules.window), rules.scale, rules.softcap, block)


PLAIN = RowAttention()
"""The reference."""


def row_attention(setting: str, mesh: Mesh) -> RowAttention:
    """What `train.attention` means on a mesh."""
    platform = mesh.devices.flat[0].platform
    if setting == "auto":
        setting = "splash" if platform == "tpu" else "blockwise"
    if setting == "splash":
        return RowAttention("splash", interpret=platform != "tpu")
    return RowAttention(setting, block=64 if platform == "cpu" else 256)  # type: ignore[arg-type]


def kv_heads_over(num_heads: int, num_kv_heads: int, devices: int) -> int | None:
    """Heads of keys, once repeated, that so many devices of `tensor` share evenly, each with those that its
    queries read; None where each attends with all heads."""
    if num_kv_heads % devices == 0:
        return num_kv_heads
    if devices % num_kv_heads == 0 and num_heads % devices == 0:
        return devices
    return None
