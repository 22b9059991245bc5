"""A module of norms and weights that are described by the letters of their dimensions.

A weight reads some dimensions and writes others: `q` reads D and writes N and H. From these follow its
shape, its product, the shape of its scales and of its adapter. The parameters of a weight `q` are `q`
itself and, where they are there, `q_bias`, `q_scale` (int8), `q_lora_a` and `q_lora_b`.

The adapters are our own. qwix 0.1.8 finds a weight by the module whose `__call__` is running, and a layer
that is merged inside `lax.scan` is none that it knows: it raises "Current module is not known". Before
that, the random state that it hangs on every module has no L, so that the layers can no longer be scanned.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.product import product

READS_AND_WRITES: dict[str, tuple[str, str]] = {
    "q": ("D", "N H"),
    "k": ("D", "K H"),
    "v": ("D", "K H"),
    "o": ("N H", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}
"""Every weight that the layers multiply by."""


JOINED_FROM = 1024
"""Tokens from which on two weights that read the same are joined; see `Block.times_both`."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685): x W + alpha / rank * (x A) B, with A and B trained alone."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names in `READS_AND_WRITES`."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Holding:
    """How a decoder's matrices are held; what they mean is the same."""

    int8: bool = False
    """8 bits and a scale per output channel. Frozen: nothing can be trained but adapters."""
    lora: LoRA | None = None


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32, returned in x's type."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class Block(nnx.Module):
    """Norms and weights under their names, stacked over layers where their dims begin with L."""

    def __init__(self, config: DecoderConfig, holding: Holding):
        self.config = config
        self.holding = holding

    def _shape(self, dims: str) -> tuple[int, ...]:
        sizes: Mapping[str, int] = self.config.sizes
        if self.holding.lora is not None:
            sizes = {**sizes, "R": self.holding.lora.rank}
        return tuple(sizes[letter] for letter in dims.split())

    def _hold(self, name: str, dims: str, values: jax.Array) -> None:
        setattr(self, name, nnx.Param(values, dims=dims))

    def read(self, name: str) -> jax.Array:
        """A parameter's value."""
        return getattr(self, name)[...]

    def add_norm(self, name: str, dims: str) -> None:
        """Scales of a norm that changes nothing yet."""
        one = 0.0 if self.config.norm_adds_one else 1.0
        self._hold(name, dims, jnp.full(self._shape(dims), one))

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """RMSNorm over the last dimension of x."""
        scale = self.read(name).astype(jnp.float32)
        return rms_norm(x, 1.0 + scale if self.config.norm_adds_one else scale, self.config.norm_eps)

    def add_matrix(self, name: str, dims: str, scale_dims: str, key: jax.Array, deviation: float) -> None:
        """Normal random values; in int8 zeros, and scales over `scale_dims`."""
        shape = self._shape(dims)
        if self.holding.int8:
            self._hold(name, dims, jnp.zeros(shape, jnp.int8))
            self._hold(f"{name}_scale", scale_dims, jnp.ones(self._shape(scale_dims)))
        else:
            self._hold(name, dims, jax.random.normal(key, shape) * deviation)

    def add_weight(self, name: str, rngs: nnx.Rngs, *, bias: bool = False, init_scale: float = 1.0) -> None:
        """The parameters of a weight of `READS_AND_WRITES`.

        Args:
            init_scale: of the random values, relative to one over the root of what they read.
        """
        reads, writes = READS_AND_WRITES[name]
        deviation = math.prod(self._shape(reads)) ** -0.5
        dims = f"L {reads} {writes}"
        self.add_matrix(name, dims, f"L {writes}", rngs.params(), deviation * init_scale)
        if bias:
            self._hold(f"{name}_bias", f"L {writes}", jnp.zeros(self._shape(f"L {writes}")))
        lora = self.holding.lora
        if lora is not None and name in lora.targets:
            a, b = f"L {reads} R", f"L R {writes}"
            self._hold(f"{name}_lora_a", a, jax.random.normal(rngs.lora(), self._shape(a)) * deviation)
            # Zero, so that an adapter begins as no change.
            self._hold(f"{name}_lora_b", b, jnp.zeros(self._shape(b)))

    def times_both(self, first: str, second: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`times` of two weights of one shape that read the same. Of many tokens, as one product, which reads
        x once and writes its gradient once; of few, joining the weights would cost more than that saves."""
        lora = self.holding.lora
        apart = self.holding.int8 or (lora is not None and {first, second} & set(lora.targets))
        if apart or math.prod(x.shape[:-1]) < JOINED_FROM:
            return self.times(first, x), self.times(second, x)
        reads, writes = (dims.lower().replace(" ", "") for dims in READS_AND_WRITES[first])
        joined = jnp.stack([self.read(name).astype(x.dtype) for name in (first, second)], axis=len(reads))
        both = checkpoint_name(product(x, joined, reads, f"z{writes}"), first)
        axis = x.ndim - len(reads)
        return jax.lax.index_in_dim(both, 0, axis, False), jax.lax.index_in_dim(both, 1, axis, False)

    def times(self, name: str, x: jax.Array) -> jax.Array:
        """x [..., what the weight reads] times the weight of one layer: [..., what it writes]. For
        rematerialisation it has the weight's name."""
        reads, writes = (dims.lower().replace(" ", "") for dims in READS_AND_WRITES[name])

        def held(suffix: str) -> jax.Array:
            return self.read(name + suffix).astype(x.dtype)

        y = product(x, held(""), reads, writes)
        if self.holding.int8:
            # A scale per output leaves the sum, so that the product itself reads 8-bit weights. In
            # float32: bfloat16 would round it for every input alike.
            y = (y * self.read(f"{name}_scale")).astype(x.dtype)
        if hasattr(self, f"{name}_bias"):
            y = y + held("_bias")
        lora = self.holding.lora
        if lora is not None and name in lora.targets:
            low = jnp.einsum(f"...{reads},{reads}r->...r", x, held("_lora_a"))
            y = y + jnp.einsum(f"...r,r{writes}->...{writes}", low, held("_lora_b")) * lora.scale
        return checkpoint_name(y, name)
