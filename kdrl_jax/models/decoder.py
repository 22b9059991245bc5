"""The decoder: RMSNorm, grouped-query attention, RoPE, gated MLP. One for all families.

NNX holds the modules and names the parameters; everything that is compiled is a plain function of
`(params, arrays)` that merges them inside the trace, where it costs nothing. Layers are stacked along
a leading L and scanned, so that compile time does not grow with depth.

Right padding only: position t of a row attends to positions <= t, so padding after the last token is
never seen by a real one and needs no mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdrl_jax.sharding import constrain
from kdrl_jax.types import Params

KVCache = tuple[jax.Array, jax.Array]
"""Keys and values, each [L, B, K, S, H]. Stacked, so that scanned layers write it in place."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder."""

    vocab_size: int
    """V: rows of the embedding, padding rows included."""
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    max_positions: int = 1 << 20
    """Positions the model was trained for; longer rows are refused at start-up."""


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) * scale * fan_in**-0.5


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32, returned in x's type."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., H/2] (float32) of rotary embeddings at integer positions [...]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates halves (the Hugging Face layout): x [..., heads, H], tables [..., H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def cached_attention(q_BNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, pos_B: jax.Array) -> jax.Array:
    """One query per row over the cache up to and including its own position; returns [B, N, H]."""
    b, n, h = q_BNH.shape
    k = k_BKSH.shape[1]
    q = q_BNH.reshape(b, k, n // k, h)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k_BKSH, preferred_element_type=jnp.float32) * h**-0.5
    seen = jnp.arange(k_BKSH.shape[2])[None, :] <= pos_B[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, :], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(v_BKSH.dtype), v_BKSH)
    return out.reshape(b, n, h)


class Attention(nnx.Module):
    """Grouped-query attention's projections, stacked over layers."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        L, D, N, K, H = c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.q = nnx.Param(_normal(rngs.params(), (L, D, N, H), D), dims="L D N H")
        self.k = nnx.Param(_normal(rngs.params(), (L, D, K, H), D), dims="L D K H")
        self.v = nnx.Param(_normal(rngs.params(), (L, D, K, H), D), dims="L D K H")
        # Branches that end in the residual stream start small, so that its size does not grow with depth.
        self.o = nnx.Param(_normal(rngs.params(), (L, N, H, D), N * H, (2 * L) ** -0.5), dims="L N H D")
        if c.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((L, N, H)), dims="L N H")
            self.k_bias = nnx.Param(jnp.zeros((L, K, H)), dims="L K H")
            self.v_bias = nnx.Param(jnp.zeros((L, K, H)), dims="L K H")
        self.has_bias = c.qkv_bias

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] to rotated q [..., N, H] and k, and v [..., K, H]."""
        dtype = x.dtype
        q = jnp.einsum("...d,dnh->...nh", x, self.q[...].astype(dtype))
        k = jnp.einsum("...d,dkh->...kh", x, self.k[...].astype(dtype))
        v = jnp.einsum("...d,dkh->...kh", x, self.v[...].astype(dtype))
        if self.has_bias:
            q = q + self.q_bias[...].astype(dtype)
            k = k + self.k_bias[...].astype(dtype)
            v = v + self.v_bias[...].astype(dtype)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def out(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...nh,nhd->...d", x, self.o[...].astype(x.dtype))


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), stacked over layers."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        L, D, F = c.num_layers, c.embed_dim, c.mlp_dim
        self.gate = nnx.Param(_normal(rngs.params(), (L, D, F), D), dims="L D F")
        self.up = nnx.Param(_normal(rngs.params(), (L, D, F), D), dims="L D F")
        self.down = nnx.Param(_normal(rngs.params(), (L, F, D), F, (2 * L) ** -0.5), dims="L F D")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = x @ self.gate[...].astype(x.dtype)
        up = x @ self.up[...].astype(x.dtype)
        return (jax.nn.silu(gate) * up) @ self.down[...].astype(x.dtype)


class Layers(nnx.Module):
    """All layers, stacked; one slice of it along L is one layer."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.attn_norm = nnx.Param(jnp.ones((c.num_layers, c.embed_dim)), dims="L D")
        self.attn = Attention(c, rngs)
        self.mlp_norm = nnx.Param(jnp.ones((c.num_layers, c.embed_dim)), dims="L D")
        self.mlp = MLP(c, rngs)
        self.eps = c.norm_eps

    def layer(
        self, x: jax.Array, attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], *rope: jax.Array
    ) -> jax.Array:
        """One layer (of a slice): `attend(q, k, v)` is what prefill, decode and training differ in."""
        q, k, v = self.attn.qkv(rms_norm(x, self.attn_norm[...], self.eps), *rope)
        x = x + self.attn.out(attend(q, k, v))
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps))


class Decoder(nnx.Module):
    """Token ids to final hidden states. The vocabulary head is applied by `scoring`, in chunks."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, compute_dtype: Any = jnp.float32):
        D, V = config.embed_dim, config.vocab_size
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed = nnx.Param(_normal(rngs.params(), (V, D), D), dims="V D")
        self.layers = Layers(config, rngs)
        self.final_norm = nnx.Param(jnp.ones((D,)), dims="D")
        if not config.tie_embeddings:
            self.head = nnx.Param(_normal(rngs.params(), (D, V), D), dims="D V")

    def head_kernel(self) -> jax.Array:
        """[D, V]; the embedding itself when tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.head[...]

    def _rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_tables(positions, self.config.head_dim, self.config.rope_theta)

    def _full(self, tokens_BT: jax.Array, keep_cache: bool, remat: bool) -> tuple[jax.Array, KVCache | None]:
        x = constrain(self.embed[...][tokens_BT].astype(self.compute_dtype), "B T E")
        rope = self._rope(jnp.arange(tokens_BT.shape[1])[None, :])
        layer_def, layer_params = nnx.split(self.layers)

        def body(x: jax.Array, params: Any) -> tuple[jax.Array, KVCache | None]:
            kept: list[KVCache] = []

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                if keep_cache:
                    kept.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
                return jax.nn.dot_product_attention(q, k, v, is_causal=True)

            x = nnx.merge(layer_def, params).layer(x, attend, *rope)
            return constrain(x, "B T E"), kept[0] if keep_cache else None

        x, cache = jax.lax.scan(jax.checkpoint(body) if remat else body, x, layer_params)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), cache

    def hidden(self, tokens_BT: jax.Array, *, remat: bool = False) -> jax.Array:
        """Final hidden states [B, T, D] of right-padded rows; entry t has seen tokens <= t.

        Args:
            remat: recompute each layer in the backward pass.
        """
        return self._full(tokens_BT, keep_cache=False, remat=remat)[0]

    def prefill(self, tokens_PT: jax.Array, lengths_P: jax.Array) -> tuple[jax.Array, KVCache]:
        """Hidden state [P, D] at each prompt's last token, and its cache [L, P, K, T, H]."""
        x, cache = self._full(tokens_PT, keep_cache=True, remat=False)
        assert cache is not None
        last = jnp.take_along_axis(x, (lengths_P - 1)[:, None, None], axis=1)[:, 0]
        return last, cache

    def decode(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache, *, window: int | None = None
    ) -> tuple[jax.Array, KVCache]:
        """One step: writes each row's token at its position, attends to positions up to it.

        Args:
            window: static length of the cache that is read; every position must be below it.

        Returns:
            Hidden states [B, D] and the cache, updated in place when its buffer is donated.
        """
        _, b, num_kv, length, h = cache[0].shape
        window = window or length
        x = self.embed[...][tokens_B].astype(self.compute_dtype)
        rope = self._rope(positions_B)
        rows, heads = jnp.arange(b)[:, None], jnp.arange(num_kv)[None, :]
        layer_def, layer_params = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, KVCache], inputs: Any) -> tuple[tuple[jax.Array, KVCache], None]:
            x, caches = carry
            i, params = inputs

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal caches
                at = (i, rows, heads, positions_B[:, None])
                write = functools.partial(_write, at=at)
                caches = (write(caches[0], new=k), write(caches[1], new=v))
                read = [
                    jax.lax.dynamic_slice(c, (i, 0, 0, 0, 0), (1, b, num_kv, window, h))[0] for c in caches
                ]
                return cached_attention(q, read[0], read[1], positions_B)

            x = nnx.merge(layer_def, params).layer(x, attend, *rope)
            return (x, caches), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(self.config.num_layers), layer_params))
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), cache


def _write(cache: jax.Array, at: tuple[jax.Array, ...], new: jax.Array) -> jax.Array:
    # Unique, in-bounds indices are what lets XLA write one column per row in place.
    return cache.at[at].set(new.astype(cache.dtype), unique_indices=True, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: what compiled functions close over."""

    config: DecoderConfig
    graphdef: nnx.GraphDef[Decoder]
    dims: dict[str, Any]
    """The tree of `Params`, with the dimension letters of each tensor as leaves."""

    def bind(self, params: Params) -> Decoder:
        """The module with these parameters; call it inside a traced function."""
        return nnx.merge(self.graphdef, params)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters. Compile it with `out_shardings` to create them sharded."""
        module = Decoder(self.config, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self) -> Params:
        """Shapes and types of the parameters (float32 master weights)."""
        return jax.eval_shape(self.init, jax.random.key(0))


def make_model(config: DecoderConfig, compute_dtype: Any = jnp.float32) -> Model:
    """The decoder of a config, computing in `compute_dtype`; parameters keep their own type."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype))
    graphdef, state = nnx.split(module)
    dims: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = dims
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable.get_metadata()["dims"]
    return Model(config, graphdef, dims)


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model with parameters that are never trained and never saved."""

    model: Model
    params: Params
    """In the model's compute type."""

    @property
    def kernel(self) -> jax.Array:
        """The vocabulary head [D, V]."""
        return self.model.bind(self.params).head_kernel()
