"""The decoder: RMSNorm, grouped-query attention, RoPE, gated MLP. One for all families.

NNX holds the modules and names the parameters; everything that is compiled is a plain function of
`(params, arrays)` that merges them inside the trace, where it costs nothing. Layers are stacked along
a leading L and scanned, so that compile time does not grow with depth; what differs between layers
(the window, the RoPE base) is scanned along with them as data.

A row of one sequence attends to all that stands before, so padding after the last token is never seen by a
real one and needs no mask. Rows of several sequences come with a `Layout`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from kdrl_jax.models.attend import PLAIN, RowAttention
from kdrl_jax.models.attention import ScoreRules
from kdrl_jax.models.block import Block, Holding
from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.head import Head
from kdrl_jax.models.layout import Layout, whole_rows
from kdrl_jax.models.remat import Remat, rematerialised
from kdrl_jax.models.rope import apply_rope, rope_tables
from kdrl_jax.sharding import constrain, gathered, move
from kdrl_jax.types import Params

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class AttendCached(Protocol):
    """Writes the keys and values of new tokens to one layer of a cache, and lets their queries read it."""

    def __call__(
        self,
        cache: KVCache,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rules: ScoreRules,
    ) -> tuple[jax.Array, KVCache]:
        """q [..., N, H], k and v [..., K, H] to (what the queries read, of q's shape; the new cache)."""


class Attention(Block):
    """Grouped-query attention's projections, stacked over layers."""

    def __init__(self, c: DecoderConfig, holding: Holding, rngs: nnx.Rngs):
        super().__init__(c, holding)
        for name in ("q", "k", "v"):
            self.add_weight(name, rngs, bias=c.qkv_bias)
        # Branches that end in the residual stream start small, so that its size does not grow with depth.
        self.add_weight("o", rngs, init_scale=(2 * c.num_layers) ** -0.5)
        if c.qk_norm:
            self.add_norm("q_norm", "L H")
            self.add_norm("k_norm", "L H")

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] to rotated q [..., N, H] and k, and v [..., K, H]."""
        q, k, v = (self.times(name, x) for name in ("q", "k", "v"))
        if self.config.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class MLP(Block):
    """down(act(gate(x)) * up(x)), stacked over layers."""

    def __init__(self, c: DecoderConfig, holding: Holding, rngs: nnx.Rngs):
        super().__init__(c, holding)
        self.add_weight("gate", rngs)
        self.add_weight("up", rngs)
        self.add_weight("down", rngs, init_scale=(2 * c.num_layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.times_both("gate", "up", x)
        gate = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        # Held once: computed again for each block of the product that reads it, it costs TPUs more.
        return self.times("down", jax.lax.optimization_barrier(gate * up))


class Layers(Block):
    """All layers, stacked; one slice of it along L is one layer."""

    def __init__(self, c: DecoderConfig, holding: Holding, rngs: nnx.Rngs):
        super().__init__(c, holding)
        self.attn = Attention(c, holding, rngs)
        self.mlp = MLP(c, holding, rngs)
        self.add_norm("attn_norm", "L D")
        self.add_norm("mlp_norm", "L D")
        if c.post_norms:
            self.add_norm("attn_post_norm", "L D")
            self.add_norm("mlp_post_norm", "L D")

    def layer(self, x: jax.Array, attend: Attend, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """One layer (of a slice): `attend(q, k, v)` is what prefill, decode and training differ in."""
        with jax.named_scope("attention"):
            q, k, v = self.attn.qkv(self.norm("attn_norm", x), cos, sin)
            with jax.named_scope("scores"):
                read = attend(q, k, v)
            out = self.attn.times("o", read)
            x = x + (self.norm("attn_post_norm", out) if self.config.post_norms else out)
        with jax.named_scope("mlp"):
            out = self.mlp(self.norm("mlp_norm", x))
            return x + (self.norm("mlp_post_norm", out) if self.config.post_norms else out)


class Decoder(Block):
    """Token ids to final hidden states. The vocabulary head is applied by `scoring`, in chunks."""

    def __init__(
        self,
        c: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: Any,
        holding: Holding,
        attention: RowAttention = PLAIN,
    ):
        super().__init__(c, holding)
        self.compute_dtype = compute_dtype
        self.attention = attention
        deviation = c.embed_dim**-0.5
        self.add_matrix("embed", "V D", "V", rngs.params(), deviation)
        self.layers = Layers(c, holding, rngs)
        self.add_norm("final_norm", "D")
        if not c.tie_embeddings:
            self.add_matrix("head", "D V", "V", rngs.params(), deviation)

    def output_head(self) -> Head:
        """The vocabulary head; when tied it is the embedding itself."""
        c, name = self.config, "embed" if self.config.tie_embeddings else "head"
        scale = self.read(f"{name}_scale") if self.holding.int8 else None
        return Head(self.read(name), scale, tied=c.tie_embeddings, softcap=c.final_softcap)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.read("embed")[tokens]
        if self.holding.int8:
            x = x * self.read("embed_scale")[tokens][..., None]
        x = x.astype(self.compute_dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.embed_dim**0.5, self.compute_dtype)
        return x

    def _differences(
        self, positions: jax.Array
    ) -> tuple[jax.Array | None, Callable[[Any], tuple[jax.Array, jax.Array, jax.Array | None]]]:
        """What layers differ in: data to scan along them, and how a layer's entry gives its cosines,
        sines and window."""
        c = self.config
        full = rope_tables(c.rope, positions, c.head_dim)
        if not any(c.sliding_layers):
            return None, lambda _: (*full, None)
        assert c.sliding_window is not None
        sees = c.sliding_window
        sliding = rope_tables(c.sliding_rope or c.rope, positions, c.head_dim)

        def of_layer(slides: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            cos, sin = (jnp.where(slides, a, b) for a, b in zip(sliding, full, strict=True))
            return cos, sin, jnp.where(slides, sees, jnp.iinfo(jnp.int32).max)

        return jnp.asarray(c.sliding_layers), of_layer

    def _rules(self, window: jax.Array | None) -> ScoreRules:
        c = self.config
        return ScoreRules(window, c.query_scale or c.head_dim**-0.5, c.attn_softcap, c.sliding_window)

    def hidden(
        self, tokens_BT: jax.Array, layout: Layout | None = None, *, remat: Remat = "none"
    ) -> jax.Array:
        """Final hidden states [B, T, D]; entry t has seen the tokens up to t of its sequence.

        Args:
            layout: where sequences lie; None is one in each row, padded on the right.
            remat: what is computed again in the backward pass.
        """
        layout = whole_rows(*tokens_BT.shape) if layout is None else layout
        with jax.named_scope("embed"):
            x = constrain(self._embed(tokens_BT), "B T E")
        slides_L, of_layer = self._differences(layout.positions_BT)
        layer_def, layer_params = nnx.split(self.layers)
        structure = jax.tree.structure(layer_params)
        # Of one layer: without the L that comes first.
        dims = [v.get_metadata()["dims"].removeprefix("L ") for _, v in nnx.to_flat_state(layer_params)]

        def body(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            params, slides = inputs
            cos, sin, window = of_layer(slides)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return self.attention(q, k, v, self._rules(window), layout)

            params = jax.tree.unflatten(
                structure, [gathered(w, d) for w, d in zip(jax.tree.leaves(params), dims, strict=True)]
            )
            x = nnx.merge(layer_def, params).layer(x, attend, cos, sin)
            return constrain(x, "B T E"), None

        with jax.named_scope("layers"):
            x, _ = jax.lax.scan(rematerialised(body, remat), x, (layer_params, slides_L))
        return self.norm("final_norm", x)

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, attend: AttendCached
    ) -> tuple[jax.Array, KVCache]:
        """Takes new tokens into rows whose earlier ones are in the cache.

        Args:
            tokens: int32 [B] (one per row) or [B, C].
            positions: of the tokens in their rows.
            attend: which rows of the cache these are, and how it is read.

        Returns:
            Final hidden states [..., D] and the cache, updated in place when its buffer is donated.
        """
        x = self._embed(tokens)
        slides_L, of_layer = self._differences(positions)
        layer_def, layer_params = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, KVCache], inputs: Any) -> tuple[tuple[jax.Array, KVCache], None]:
            x, cache = carry
            layer, params, slides = inputs
            cos, sin, window = of_layer(slides)

            def over_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal cache
                out, cache = attend(cache, layer, q, k, v, self._rules(window))
                return out

            x = nnx.merge(layer_def, params).layer(x, over_cache, cos, sin)
            return (x, cache), None

        layers = (jnp.arange(self.config.num_layers), layer_params, slides_L)
        with jax.named_scope("layers"):
            (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return self.norm("final_norm", x), cache


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: what compiled functions close over."""

    config: DecoderConfig
    graphdef: nnx.GraphDef[Decoder]
    dims: dict[str, Any]
    """The tree of `Params`, with the dimension letters of each tensor as leaves."""
    holding: Holding
    compute_dtype: Any
    attention: RowAttention

    def bind(self, params: Params) -> Decoder:
        """The module with these parameters; call it inside a traced function."""
        return nnx.merge(self.graphdef, params)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters; adapters take nothing from the others, which are the same without
        them. Compile it with `out_shardings` to create them sharded."""
        rngs = nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))
        module = Decoder(self.config, rngs=rngs, compute_dtype=jnp.float32, holding=self.holding)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self) -> Params:
        """Shapes and types of the parameters (float32 master weights)."""
        return jax.eval_shape(self.init, jax.random.key(0))


def make_model(
    config: DecoderConfig,
    compute_dtype: Any = jnp.float32,
    holding: Holding = Holding(),
    attention: RowAttention = PLAIN,
) -> Model:
    """The decoder of a config, computing in `compute_dtype`; parameters keep their own type.

    Args:
        attention: of whole rows; `extend` is given its own.
    """
    module = nnx.eval_shape(
        lambda: Decoder(
            config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype, holding=holding, attention=attention
        )
    )
    graphdef, state = nnx.split(module)
    dims: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = dims
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable.get_metadata()["dims"]
    return Model(config, graphdef, dims, holding, jnp.dtype(compute_dtype), attention)


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model with parameters that are never trained and never saved."""

    model: Model
    params: Params
    """In the model's compute type, or in int8; on the devices, or parked in host memory."""

    def parked(self) -> "FrozenModel":
        """The same model with its parameters in the hosts' memory, each part beside its device."""
        return dataclasses.replace(self, params=move(self.params, "pinned_host"))

    @property
    def is_parked(self) -> bool:
        return jax.tree.leaves(self.params)[0].sharding.memory_kind == "pinned_host"

    def on_device(self) -> Params:
        """The parameters where they can be computed with; keep them no longer than that."""
        return move(self.params, "device")

    @property
    def head(self) -> Head:
        """The vocabulary head, on the devices."""
        return move(self.model.bind(self.params).output_head(), "device")
