"""Which attention whole rows have, and its part on each device."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kdrl_jax.models.attention import ScoreRules, full_attention
from kdrl_jax.models.blockwise import blockwise_attention
from kdrl_jax.models.layout import Layout
from kdrl_jax.models.splash import splash_attention
from kdrl_jax.sharding import ROWS


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
        k, v = (_one_for_each_device(x, q.shape[2], mesh) for x in (k, v))
        rows_divide = q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        heads_divide = k.shape[2] % mesh.shape["tensor"] == 0
        rows = PartitionSpec(ROWS if rows_divide else None)
        heads = PartitionSpec(*rows, None, "tensor" if heads_divide else None)
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


def _one_for_each_device(x_BTKH: jax.Array, num_heads: int, mesh: AbstractMesh) -> jax.Array:
    """Keys or values repeated, where `tensor` has more devices than there are heads of them, so that each
    device has the one that its queries read."""
    heads, devices = x_BTKH.shape[2], mesh.shape["tensor"]
    fits = devices > heads and devices % heads == 0 and num_heads % devices == 0
    return jnp.repeat(x_BTKH, devices // heads, axis=2) if fits else x_BTKH
