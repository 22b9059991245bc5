"""What a decoder computes, of whichever family."""

import dataclasses
from typing import Literal

from kdrl_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder computes. The defaults are Llama's."""

    vocab_size: int
    """V: rows of the embedding, padding rows included."""
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = Rope()  # noqa: RUF009 (frozen)
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    max_positions: int = 1 << 20
    """`max_position_embeddings` of its file; `longest` is what it means."""
    states_stretched: bool = False
    """Whether that is the context after `linear` RoPE stretched it, which most files do not count."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before they are turned."""
    post_norms: bool = False
    """RMSNorm on what attention and MLP give, before it is added to the residual stream."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + their scale (Gemma stores them so)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by the root of D."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    query_scale: float | None = None
    """Scale of the attention scores; None is one over the root of H."""
    attn_softcap: float | None = None
    final_softcap: float | None = None
    """Bounds on |attention score| and |logit|, by cap * tanh(x / cap)."""
    sliding_window: int | None = None
    """Positions that a sliding layer sees, its own included."""
    sliding_layers: tuple[bool, ...] = ()
    """Which layers slide, one entry per layer; empty where none does."""
    sliding_rope: Rope | None = None
    """RoPE of the sliding layers, where it is another."""

    def keep(self, layers: tuple[int, ...]) -> "DecoderConfig":
        """The same decoder with only these of its layers."""
        sliding = tuple(self.sliding_layers[i] for i in layers) if self.sliding_layers else ()
        return dataclasses.replace(self, num_layers=len(layers), sliding_layers=sliding)

    @property
    def longest(self) -> int:
        """The longest row the model was made for, in tokens; longer ones are refused at start-up."""
        rope = self.rope
        if rope.kind in ("linear", "dynamic"):
            return int(self.max_positions * (1 if self.states_stretched else rope.factor))
        if rope.kind == "yarn":
            # Switched on as model cards say, it leaves `max_position_embeddings` as it was.
            return max(self.max_positions, int(rope.factor * (rope.original_positions or 0)))
        return self.max_positions

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dimension letter."""
        return {
            "V": self.vocab_size,
            "D": self.embed_dim,
            "F": self.mlp_dim,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
        }
