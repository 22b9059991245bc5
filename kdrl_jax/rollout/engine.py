"""The sampling engine: each prompt is prefilled once, then a compiled loop works through all completions.

Every shard of the mesh (a device of `data` and `fsdp`) has a fixed number of slots and a queue of rows. A
slot whose completion has ended takes the next row inside the compiled loop, so that no host has to hear
from another. The loop runs in chunks of at most N steps with a donated carry. Between chunks, and only
there, the host hears from the devices: it may show progress or notice a request to stop. Shapes never
change, so nothing recompiles.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdrl_jax import hosts, sharding
from kdrl_jax.models.cache import KVCache, empty_cache
from kdrl_jax.models.decoder import Model
from kdrl_jax.rollout.attention import attend_maker, heads_divide, on_own_heads
from kdrl_jax.rollout.decode import Call, decode_steps
from kdrl_jax.rollout.memory import choose_slots
from kdrl_jax.rollout.prefill import prefill, prefix_length
from kdrl_jax.rollout.settings import Carry, EngineSettings, cache_length
from kdrl_jax.rollout.weights import to_decode
from kdrl_jax.types import Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Chunk:
    """How far a call is after some decode steps."""

    carry: Carry
    """To be read before the next chunk is asked for: that one takes its arrays over."""
    num_tokens: int
    """Completion tokens so far, over all rows."""
    num_running: int
    """Rows that go on, or wait."""
    idle_frac: float
    """Share of slots' steps, up to now, in which the slot had no row."""


class Stopped(Exception):  # noqa: N818 - it is a request, not an error
    """Raised between chunks when the caller asked to stop; nothing of the call is kept."""


class Engine:
    """Samples completions of one model. Compiled once per engine; parameters are arguments."""

    def __init__(self, model: Model, settings: EngineSettings, mesh: Mesh):
        self.model = model
        self.settings = settings
        self.mesh = mesh
        shards = sharding.batch_shards(mesh)
        if settings.num_prompts % shards:
            raise ValueError(
                f"num_prompts={settings.num_prompts} does not divide over {shards} devices (data x fsdp)"
            )
        self._share = hosts.share(mesh, settings.num_prompts)
        self._ends = jax.jit(_ends, static_argnums=(1, 2), out_shardings=sharding.rows(mesh))
        self._programs: Programs | None = None

    def generate(
        self,
        params: Params,
        prompts: Prompts,
        key: jax.Array,
        *,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Rollouts:
        """Completes every prompt `group_size` times; row b is sample b % G of prompt b // G.

        A completion depends on the parameters, `key`, its prompt, the prompt's draw and its sample
        number; not on the batch it is in, nor on the slots.

        Args:
            prompts: exactly `num_prompts` of them; in a job of several processes, those that
                `hosts.share` gives this one.
            temperature: divides the logits, above 0; another one is the same program.
            max_new_tokens: of this call, at most the settings', which is the default; another one is the
                same program.
            on_chunk: called between chunks.
            should_stop: asked between chunks.

        Raises:
            Stopped: when `should_stop` says so.
            ValueError: prompts of another shape; not one slot fits the free memory.
        """
        for chunk in self.stream(
            params, prompts, key, temperature=temperature, max_new_tokens=max_new_tokens
        ):
            if on_chunk is not None:
                on_chunk(chunk)
            if chunk.num_running and should_stop is not None and should_stop():
                raise Stopped
        return self.rollouts(chunk.carry)

    def stream(
        self,
        params: Params,
        prompts: Prompts,
        key: jax.Array,
        *,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> Iterator[Chunk]:
        """As `generate`, one chunk of `decode_chunk` steps at a time (the first holds the prefill too).

        The last one is the one without running rows; `rollouts` of its carry is the result.
        """
        s = self.settings
        expected = (len(self._share.held), s.max_prompt_tokens)
        if prompts.tokens_PT.shape != expected:
            raise ValueError(
                f"prompts of shape {prompts.tokens_PT.shape}; this engine takes {expected} in this process"
            )
        limit = s.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= s.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={limit} of this call: it must be 1 to {s.max_new_tokens}, the engine's"
            )
        weights = to_decode(self.model, params, self.mesh)
        programs = self.programs()
        put = functools.partial(hosts.put, rows=self._share, mesh=self.mesh)
        call = Call(key, np.float32(temperature), np.int32(limit))  # type: ignore[arg-type]
        # Set for each call alone: whoever takes a chunk goes on without it.
        with jax.set_mesh(self.mesh):
            carry = programs.start(
                weights, put(prompts.tokens_PT), put(prompts.lengths_P), put(prompts.draws_P)
            )
        num_running = 1
        while num_running:
            with jax.set_mesh(self.mesh):
                carry, progress = programs.chunk(weights, carry, call)
            num_tokens, num_running, steps = (int(x) for x in jax.device_get(progress))
            slot_steps = steps * programs.slots * programs.shards
            yield Chunk(carry, num_tokens, num_running, 1 - num_tokens / slot_steps)

    def rollouts(self, carry: Carry) -> Rollouts:
        """What the rows of a carry hold by now."""
        s = self.settings
        with jax.set_mesh(self.mesh):
            lengths_B, ended_B = self._ends(carry, s.group_size, s.end_ids)
        return Rollouts(carry.tokens_BT, lengths_B, carry.counts_B, ended_B, carry.logprobs_BT)

    def programs(self) -> "Programs":
        """The compiled functions, made once, with as many slots as fit now."""
        if self._programs is None:
            slots = choose_slots(self.model.config, self.settings, self.mesh)
            self._programs = Programs(self.model, self.settings, self.mesh, slots)
        return self._programs


class Programs:
    """The two compiled programs of an engine: `start` prefills, `chunk` goes on some steps."""

    def __init__(self, model: Model, settings: EngineSettings, mesh: Mesh, slots: int):
        self.model, self.settings, self.mesh, self.slots = model, settings, mesh, slots
        self.shards = sharding.batch_shards(mesh)
        self.make_attend = attend_maker(settings, slots, model.config, mesh)
        rows, whole = PartitionSpec(sharding.ROWS), PartitionSpec()
        of_cache = PartitionSpec(None, sharding.ROWS)
        held = KVCache(of_cache, of_cache)  # type: ignore[arg-type]
        if settings.cache_dtype == "int8":
            held = KVCache(of_cache, of_cache, of_cache, of_cache)  # type: ignore[arg-type]
        specs = Carry(rows, rows, rows, rows, rows, held, held, rows, rows, rows)  # type: ignore[arg-type]
        self.places = jax.tree.map(lambda spec: self._place(spec, spec == of_cache), specs)
        everywhere = sharding.replicated(mesh)
        start = jax.shard_map(
            self._start,
            mesh=mesh,
            in_specs=(whole, rows, rows, rows),
            out_specs=specs,
            axis_names=set(sharding.ROWS),
            check_vma=False,
        )
        chunk = jax.shard_map(
            self._chunk,
            mesh=mesh,
            in_specs=(whole, specs, whole),
            out_specs=(specs, whole),
            axis_names=set(sharding.ROWS),
            check_vma=False,
        )
        self.start = jax.jit(start, out_shardings=self.places)
        self.chunk = jax.jit(chunk, donate_argnums=1, out_shardings=(self.places, everywhere))

    def abstract_carry(self, *arguments: Any) -> Carry:
        """Shapes, types and places of the state that `start` of these arguments gives."""
        carry = jax.eval_shape(self.start, *arguments)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), carry, self.places
        )

    def _place(self, spec: PartitionSpec, is_cache: bool) -> NamedSharding:
        """Of an array; a cache's heads lie over `tensor` where it divides them."""
        if is_cache and heads_divide(self.model.config, self.mesh):
            spec = PartitionSpec(*spec, "tensor")
        return NamedSharding(self.mesh, spec)

    def _start(self, params: Params, tokens_PT: jax.Array, lengths_P: jax.Array, draws_P: jax.Array) -> Carry:
        """The first state of one shard, with its prompts prefilled."""
        s, config = self.settings, self.model.config
        num_prompts, dtype = tokens_PT.shape[0], jnp.dtype(s.cache_dtype)
        num_rows = num_prompts * s.group_size
        prefixes = empty_cache(config, num_prompts, prefix_length(s.max_prompt_tokens), dtype)
        prefixes = prefill(
            self.model.bind(params),
            tokens_PT,
            lengths_P,
            prefixes,
            on_own_heads=lambda attend: on_own_heads(attend, config, self.mesh),
            longest_anywhere=self._anywhere,
        )
        tokens = jnp.repeat(tokens_PT, s.group_size, axis=0)
        tokens = jnp.pad(tokens, ((0, 0), (0, s.max_new_tokens)), constant_values=s.pad_id)
        return Carry(
            tokens_BT=tokens,
            logprobs_BT=jnp.zeros(tokens.shape, jnp.float32),
            counts_B=jnp.zeros(num_rows, jnp.int32),
            prompt_lengths_P=lengths_P,
            draws_P=draws_P,
            prefixes=prefixes,
            cache=empty_cache(config, self.slots, cache_length(s), dtype),
            row_of_slot=jnp.full(self.slots, num_rows, jnp.int32),
            next_row=jnp.zeros(1, jnp.int32),
            steps=jnp.zeros(1, jnp.int32),
        )

    def _chunk(self, params: Params, carry: Carry, call: Call) -> tuple[Carry, jax.Array]:
        """Some steps of one shard; and int32 [3] of all shards: completion tokens so far, rows that are
        not done, steps of the shard that has made most."""
        num_rows = carry.counts_B.shape[0]
        carry = decode_steps(
            self.model.bind(params),
            self.settings,
            call,
            carry,
            make_attend=self.make_attend,
            anywhere=lambda flag: self._anywhere(flag.astype(jnp.int32)) > 0,
        )
        running = jnp.sum(carry.row_of_slot < num_rows) + num_rows - carry.next_row[0]
        steps = jax.lax.pmax(carry.steps[0], sharding.ROWS)
        sums = jax.lax.psum(jnp.stack([jnp.sum(carry.counts_B), running]), sharding.ROWS)
        return carry, jnp.append(sums, steps)

    def _anywhere(self, count: jax.Array) -> jax.Array:
        """The largest count of the shards that step together: a shard alone, which stops when it is done;
        with `tensor`, whose devices talk in each step, all of them."""
        return count if self.mesh.shape["tensor"] == 1 else jax.lax.pmax(count, sharding.ROWS)


def _ends(carry: Carry, group_size: int, end_ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Of each row, the prompt's length, and whether its last token is an end token."""
    lengths_B = jnp.repeat(carry.prompt_lengths_P, group_size)
    last = jnp.take_along_axis(carry.tokens_BT, (lengths_B + carry.counts_B - 1)[:, None], axis=1)[:, 0]
    return lengths_B, jnp.isin(last, jnp.asarray(end_ids, jnp.int32)) & (carry.counts_B > 0)
