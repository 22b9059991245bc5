"""The sampling engine: prefill once per prompt, then a compiled loop until every row has ended.

The loop runs in chunks of at most N decode steps with a donated carry. Between chunks, and only there,
the host hears from the device: it may show progress or notice a request to stop. Everything else stays
on the device, and the shapes never change, so nothing recompiles.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdrl_jax import sharding
from kdrl_jax.models.decoder import KVCache, Model
from kdrl_jax.models.head import Head, head_logits
from kdrl_jax.rollout.sampling import SamplerSettings, row_keys, sample
from kdrl_jax.types import Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Static shape and rules of an engine."""

    num_prompts: int
    """P: prompts per call."""
    group_size: int
    """G: completions per prompt."""
    max_prompt_tokens: int
    max_new_tokens: int
    num_tokens: int
    """Real tokens of the vocabulary."""
    end_ids: tuple[int, ...]
    pad_id: int
    decode_chunk: int
    """Decode steps between two words with the host."""
    sampler: SamplerSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """The state of the decode loop."""

    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    prompt_lengths_B: jax.Array
    counts_B: jax.Array
    """int32: completion tokens so far, at least 1 after prefill."""
    done_B: jax.Array
    """bool: ended, or at its maximum."""
    keys_B: jax.Array
    cache: KVCache
    steps: jax.Array
    """int32 scalar: decode steps so far."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """How far a call is after some decode steps."""

    carry: Carry
    """To be read before the next chunk is asked for: that one takes its arrays over."""
    num_tokens: int
    """Completion tokens so far, over all rows."""
    num_running: int
    """Rows that go on."""


class Stopped(Exception):  # noqa: N818 - it is a request, not an error
    """Raised between chunks when the caller asked to stop; nothing of the call is kept."""


def windows(length: int) -> tuple[int, ...]:
    """Static lengths of the cache that attention may read: each twice the last, up to all."""
    sizes, size = [], 64
    while size < length:
        sizes.append(size)
        size *= 2
    return (*sizes, length)


class Engine:
    """Samples completions of one model. Compiled once per engine; parameters are arguments."""

    def __init__(self, model: Model, settings: EngineSettings, mesh: Mesh):
        self.model = model
        self.settings = settings
        self.mesh = mesh
        rows, everywhere = sharding.rows(mesh), sharding.replicated(mesh)
        cache_spec = PartitionSpec(None, ("data", "fsdp"), *_heads(model, mesh))
        cache = NamedSharding(mesh, cache_spec)
        carry = Carry(rows, rows, rows, rows, rows, rows, (cache, cache), everywhere)  # type: ignore[arg-type]
        self._start = jax.jit(self._prefill, out_shardings=carry)
        self._chunk = jax.jit(
            self._decode_chunk, donate_argnums=1, out_shardings=(carry, everywhere, everywhere)
        )

    def generate(
        self,
        params: Params,
        prompts: Prompts,
        key: jax.Array,
        *,
        temperature: float = 1.0,
        on_chunk: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Rollouts:
        """Completes every prompt `group_size` times; row b is sample b % G of prompt b // G.

        A completion depends on the parameters, `key`, its prompt, the prompt's draw and its sample
        number; not on the batch it is in.

        Args:
            prompts: exactly `num_prompts` of them.
            temperature: divides the logits, above 0; another one is the same program.
            on_chunk: called between chunks with (completion tokens so far, rows still running).
            should_stop: asked between chunks.

        Raises:
            Stopped: when `should_stop` says so.
        """
        for chunk in self.stream(params, prompts, key, temperature=temperature):
            if on_chunk is not None:
                on_chunk(chunk.num_tokens, chunk.num_running)
            if chunk.num_running and should_stop is not None and should_stop():
                raise Stopped
        return self.rollouts(chunk.carry)

    def stream(
        self, params: Params, prompts: Prompts, key: jax.Array, *, temperature: float = 1.0
    ) -> Iterator[Chunk]:
        """As `generate`, one chunk of `decode_chunk` steps at a time (the first holds the prefill too).

        The last one is the one without running rows; `rollouts` of its carry is the result.
        """
        s = self.settings
        if prompts.tokens_PT.shape != (s.num_prompts, s.max_prompt_tokens):
            raise ValueError(
                f"prompts of shape {prompts.tokens_PT.shape}; this engine takes "
                f"{(s.num_prompts, s.max_prompt_tokens)}"
            )
        put = functools.partial(jax.device_put, device=sharding.rows(self.mesh))
        t = np.float32(temperature)
        # Set for each call alone: whoever takes a chunk goes on without it.
        with jax.set_mesh(self.mesh):
            carry = self._start(
                params, put(prompts.tokens_PT), put(prompts.lengths_P), put(prompts.draws_P), key, t
            )
        num_running = 1
        while num_running:
            with jax.set_mesh(self.mesh):
                carry, running, num_tokens = self._chunk(params, carry, t)
            num_running = int(running)
            yield Chunk(carry, int(num_tokens), num_running)

    def rollouts(self, carry: Carry) -> Rollouts:
        """What the rows of a carry hold by now."""
        ended = _ends(carry, self.settings.end_ids)
        return Rollouts(carry.tokens_BT, carry.prompt_lengths_B, carry.counts_B, ended, carry.logprobs_BT)

    def _logits(self, hidden: jax.Array, head: Head, temperature: jax.Array) -> jax.Array:
        return head_logits(hidden, head, num_tokens=self.settings.num_tokens, temperature=temperature)

    def _prefill(
        self,
        params: Params,
        tokens_PT: jax.Array,
        lengths_P: jax.Array,
        draws_P: jax.Array,
        key: jax.Array,
        temperature: jax.Array,
    ) -> Carry:
        s, g = self.settings, self.settings.group_size
        decoder = self.model.bind(params)
        hidden_PD, cache = decoder.prefill(tokens_PT, lengths_P)
        logits = jnp.repeat(self._logits(hidden_PD, decoder.output_head(), temperature), g, axis=0)

        def spread(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
            """A prompt's row for each of its samples, with room for their completions at axis + 1."""
            x = jnp.repeat(x, g, axis=axis)
            widths = [(0, 0)] * x.ndim
            widths[-1 if x.ndim == 2 else -2] = (0, s.max_new_tokens)
            return jnp.pad(x, widths, constant_values=fill)

        tokens = spread(tokens_PT, 0, s.pad_id)
        samples = jnp.tile(jnp.arange(g), s.num_prompts)
        keys = row_keys(key, jnp.repeat(draws_P, g), samples)
        zeros = jnp.zeros(tokens.shape[0], jnp.int32)
        carry = Carry(
            tokens_BT=tokens,
            logprobs_BT=jnp.zeros(tokens.shape, jnp.float32),
            prompt_lengths_B=jnp.repeat(lengths_P, g),
            counts_B=zeros,
            done_B=zeros.astype(bool),
            keys_B=keys,
            cache=(spread(cache[0], 1), spread(cache[1], 1)),
            steps=jnp.zeros((), jnp.int32),
        )
        return self._append(carry, logits, carry.cache)

    def _append(self, carry: Carry, logits: jax.Array, cache: KVCache) -> Carry:
        """Samples the next token of every row that has not ended."""
        s = self.settings
        token, logprob = sample(logits, carry.keys_B, carry.counts_B, s.sampler)
        rows = jnp.arange(token.shape[0])
        at = carry.prompt_lengths_B + carry.counts_B
        # A row that has ended writes past the end, which is dropped.
        at = jnp.where(carry.done_B, carry.tokens_BT.shape[1], at)
        counts = carry.counts_B + ~carry.done_B
        ends = jnp.isin(token, jnp.asarray(s.end_ids, jnp.int32)) | (counts >= s.max_new_tokens)
        return dataclasses.replace(
            carry,
            tokens_BT=carry.tokens_BT.at[rows, at].set(token, mode="drop", unique_indices=True),
            logprobs_BT=carry.logprobs_BT.at[rows, at].set(logprob, mode="drop", unique_indices=True),
            counts_B=counts,
            done_B=carry.done_B | ends,
            cache=cache,
        )

    def _decode_chunk(
        self, params: Params, carry: Carry, temperature: jax.Array
    ) -> tuple[Carry, jax.Array, jax.Array]:
        s = self.settings
        decoder = self.model.bind(params)
        head = decoder.output_head()
        sizes = jnp.asarray(windows(carry.tokens_BT.shape[1]))
        last = carry.steps + s.decode_chunk

        def step(carry: Carry) -> Carry:
            # The newest token of each row is not in the cache yet; this step puts it there.
            at = carry.prompt_lengths_B + carry.counts_B - 1
            rows = jnp.arange(at.shape[0])
            tokens = carry.tokens_BT[rows, at]
            needed = jnp.max(jnp.where(carry.done_B, 0, at)) + 1
            branches = [
                functools.partial(decoder.decode, window=int(w)) for w in windows(carry.tokens_BT.shape[1])
            ]
            which = jnp.sum(needed > sizes)
            hidden, cache = jax.lax.switch(which, branches, tokens, at, carry.cache)
            carry = self._append(carry, self._logits(hidden, head, temperature), cache)
            return dataclasses.replace(carry, steps=carry.steps + 1)

        carry = jax.lax.while_loop(lambda c: ~c.done_B.all() & (c.steps < last), step, carry)
        return carry, jnp.sum(~carry.done_B), jnp.sum(carry.counts_B)


def _heads(model: Model, mesh: Mesh) -> tuple[str | None, None, None]:
    """Partition of [K, S, H]: kv heads over `tensor` where it divides them."""
    divides = model.config.num_kv_heads % mesh.shape["tensor"] == 0
    return ("tensor" if divides else None, None, None)


@functools.partial(jax.jit, static_argnums=1)
def _ends(carry: Carry, end_ids: tuple[int, ...]) -> jax.Array:
    rows = jnp.arange(carry.counts_B.shape[0])
    last = carry.tokens_BT[rows, carry.prompt_lengths_B + carry.counts_B - 1]
    return jnp.isin(last, jnp.asarray(end_ids, jnp.int32))
