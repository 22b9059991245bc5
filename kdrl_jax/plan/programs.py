"""The compiled programs of a run, lowered for devices that need not be there, from abstract arguments."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax import sharding
from kdrl_jax.config.schedules import is_zero
from kdrl_jax.models.cache import bytes_per_position
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.plan.abstract import abstract_array, abstract_head, abstract_minibatch
from kdrl_jax.plan.model_flops import KeysSeen, forward_flops, keys_seen, training_flops
from kdrl_jax.plan.walk import Given, KernelWork
from kdrl_jax.rollout.attention import heads_divide
from kdrl_jax.rollout.decode import Call
from kdrl_jax.rollout.engine import Programs
from kdrl_jax.rollout.memory import choose_slots
from kdrl_jax.rollout.prefill import CHUNK
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.settings import EngineSettings
from kdrl_jax.rollout.weights import decode_layout
from kdrl_jax.scoring import make_scorer
from kdrl_jax.scoring.packer import config_pack_shape
from kdrl_jax.scoring.passes import slice_size
from kdrl_jax.setup import Setup
from kdrl_jax.step import Objective, make_diagnostics, make_update
from kdrl_jax.types import Params

ROLLOUT, SCORE, UPDATE = "rollout", "score", "update"
"""The phases that the time of an iteration is made of."""

FILLED = 0.96
"""Of the positions of packed rows; see `tests/test_packing.py`."""

BUSY = 0.8
"""Of the slots of a rollout, in the mean over its steps: the last completions leave others idle."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One program of a run."""

    name: str
    phase: str
    lowered: Any
    """`jax.stages.Lowered`."""
    resident: float
    """Bytes of each chip that live while it runs and are none of its arguments."""
    runs: float
    """How often it runs in an iteration."""
    given: Given
    model_flops: float
    """Of one run, on each chip; see `model_flops`."""


def bytes_on_chip(tree: Any) -> float:
    """Of each device, of abstract arrays with shardings; those parked in host memory are none."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What an iteration is taken to hold, in the mean; only times depend on it."""

    prompt: int
    completion: int


class RunPrograms:
    """The programs of one iteration of `train`."""

    def __init__(self, setup: Setup, chip_memory: float, lengths: Lengths):
        """Chooses slots and shapes.

        Args:
            setup: of abstract parameters, on a mesh of the devices.
            chip_memory: bytes of each.

        Raises:
            ValueError: not one slot fits.
        """
        c = setup.config
        self.setup, self.lengths = setup, lengths
        self.shards = sharding.batch_shards(setup.mesh)
        self.chips = setup.mesh.size
        self.shape = config_pack_shape(c, setup.mesh)
        self.state = setup.abstract_state()
        self.student_params = setup.student_params(self.state.params)
        self.frozen = {**setup.teachers} | ({"reference": setup.reference} if setup.reference else {})
        with jax.set_mesh(setup.mesh):
            self.minibatch = abstract_minibatch(setup, self.shape)
        self.slots = 0
        if c.rollout.source != "dataset":
            self.engine = self._engine_settings()
            self.weights = decode_layout(self.sampled, self.sampled_params, setup.mesh)
            free = chip_memory - self.resident() - bytes_on_chip(self.weights)
            self.slots = choose_slots(self.sampled.config, self.engine, setup.mesh, max(int(free), 0))

    @property
    def sampled(self) -> Model:
        """The model that completes the prompts."""
        if self.setup.config.rollout.source == "teacher":
            assert self.setup.teacher is not None
            return self.setup.teacher.model
        return self.setup.student

    @property
    def sampled_params(self) -> Params:
        if self.setup.config.rollout.source == "teacher":
            assert self.setup.teacher is not None
            return self.setup.teacher.on_device()
        return self.student_params

    def resident(self, *, optimizer: bool = False, without: FrozenModel | None = None) -> float:
        """Bytes of each chip that live between the phases: the student, its optimizer unless it is parked
        now, and all frozen models that are not parked.

        Args:
            optimizer: whether the optimizer's state is there even if it is parked elsewhere.
            without: a frozen model that is counted elsewhere.
        """
        parked = self.setup.config.train.park_optimizer and not optimizer
        total = bytes_on_chip((self.state.params, self.setup.frozen))
        total += 0 if parked else bytes_on_chip(self.state.opt_state)
        if self.setup.parks_frozen:
            return total
        return total + sum(bytes_on_chip(f.params) for f in self.frozen.values() if f is not without)

    def lower(self, phases: Sequence[str] | None = None) -> Iterator[Planned]:
        """The programs (of some phases), each lowered when it is asked for."""
        phases = (ROLLOUT, SCORE, UPDATE) if phases is None else phases
        with jax.set_mesh(self.setup.mesh):
            if self.slots and ROLLOUT in phases:
                yield from self._rollout()
            if SCORE in phases:
                for role in self.setup.teachers if self.setup.config.scores_teacher else ():
                    yield self._score(role, self.setup.teachers[role])
                if self.setup.reference is not None:
                    yield self._score("reference", self.setup.reference)
            if UPDATE in phases:
                yield from self._update()

    # ---- What there is to do

    @property
    def rows(self) -> int:
        """Completions that an iteration trains on."""
        c = self.setup.config
        return c.groups_per_batch * c.rollout.group_size

    @property
    def tokens_of_minibatch(self) -> float:
        """In packed rows, prompts included, of a minibatch of mean lengths."""
        rows = self.rows / self.setup.config.train.num_minibatches
        prompts = rows
        if self.shape.share_prompts:
            together = (self.shape.length - self.lengths.prompt) / self.lengths.completion
            prompts = rows / max(1.0, min(together, self.setup.config.rollout.group_size))
        return rows * self.lengths.completion + prompts * self.lengths.prompt

    @property
    def passes(self) -> float:
        """Passes of a minibatch of mean lengths."""
        c, shape = self.setup.config, self.shape
        longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
        if self.lengths.prompt + self.lengths.completion == longest:  # all are alike: nothing to combine
            rows = self.rows / c.train.num_minibatches / (shape.length // longest)
        else:
            rows = self.tokens_of_minibatch / shape.length / FILLED
        return max(1.0, math.ceil(rows / shape.rows_per_pass))

    @property
    def seen(self) -> KeysSeen:
        return keys_seen(self.setup.student.config, 0, self.lengths.prompt + self.lengths.completion)

    def _scored_tokens(self) -> float:
        return self.rows / self.setup.config.train.num_minibatches * self.lengths.completion

    def _packed_loops(self) -> dict[str, float]:
        """How often the loops over packed rows run."""
        of_row = self._scored_tokens() / (self.passes * self.shape.rows_per_pass)
        size = slice_size(
            self.shape.length, self.setup.config.train.head_chunk // (self.shape.rows_per_pass // self.shards)
        )
        return {"microbatches": self.passes, "head_chunks": math.ceil(of_row / size)}

    def _attention_kernels(self, model: Model) -> dict[str, KernelWork]:
        """Of one layer and pass, on each chip: every block up to the diagonal, whatever lies in it."""
        c, t = model.config, self.shape.length
        rows = self.shape.rows_per_pass / self.shards
        heads = c.num_heads / self.setup.mesh.shape["tensor"]
        pairs = rows * heads * t * t / 2
        itemsize = model.compute_dtype.itemsize
        moved = rows * t * c.head_dim * itemsize * (2 * heads + 2 * c.num_kv_heads)
        forward = KernelWork(4 * pairs * c.head_dim, moved)
        # Scores once more, and the products of four gradients.
        backward = KernelWork(10 * pairs * c.head_dim, 3 * moved)
        return {
            "splash_mha_fwd_segmented_residuals": forward,
            "splash_mha_fwd_segmented_no_residuals": forward,
            "splash_mha_dkv_segmented_no_residuals": backward,
        }

    # ---- Rollouts

    def _engine_settings(self) -> EngineSettings:
        c = self.setup.config
        return self.setup.engine_settings(
            self.sampled, c.train.prompts_per_iteration, c.rollout.group_size, SamplerSettings()
        )

    def _rollout(self) -> Iterator[Planned]:
        c, mesh, engine = self.setup.config, self.setup.mesh, self.engine
        config = self.sampled.config
        programs = Programs(self.sampled, engine, mesh, self.slots)
        p = engine.num_prompts
        prompts = (
            abstract_array((p, engine.max_prompt_tokens), jnp.int32, sharding.rows(mesh)),
            abstract_array((p,), jnp.int32, sharding.rows(mesh)),
            abstract_array((p,), jnp.int32, sharding.rows(mesh)),
        )
        held = self.resident()
        yield Planned(
            "prefill",
            ROLLOUT,
            programs.start.lower(self.weights, *prompts),
            held,
            1 + c.rl.resample_rounds / 2,
            Given(loops={"prefill_chunks": math.ceil(engine.max_prompt_tokens / CHUNK)}),
            forward_flops(config, p * self.lengths.prompt, 0, keys_seen(config, 0, self.lengths.prompt))
            / self.chips,
        )
        everywhere = sharding.replicated(mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        call = Call(
            abstract_array(key.shape, key.dtype, everywhere),
            abstract_array((), jnp.float32, everywhere),
            abstract_array((), jnp.int32, everywhere),
        )
        carry = programs.abstract_carry(self.weights, *prompts)
        of_shard = p * engine.group_size / self.shards
        steps = max(of_shard / self.slots, 1.0) * self.lengths.completion / BUSY
        middle = self.lengths.prompt + self.lengths.completion // 2
        tokens = self.slots * engine.decode_chunk * BUSY
        seen = keys_seen(config, middle, middle + 1)
        yield Planned(
            "decode",
            ROLLOUT,
            programs.chunk.lower(self.weights, carry, call),
            held,
            steps / engine.decode_chunk * (1 + c.rl.resample_rounds / 2),
            Given(
                loops={
                    "decode_steps": engine.decode_chunk,
                    "refill": self.slots * BUSY / self.lengths.completion,
                },
                kernels={"slots_attention": self._decode_attention(middle)},
            ),
            forward_flops(config, tokens, tokens, seen) * self.shards / self.chips,
        )

    def _decode_attention(self, filled: int) -> KernelWork:
        """Of one layer and step, on each chip, with slots filled so far."""
        config, tensor = self.sampled.config, self.setup.mesh.shape["tensor"]
        divided = tensor if heads_divide(config, self.setup.mesh) else 1
        position = bytes_per_position(config, jnp.dtype(self.engine.cache_dtype)) / config.num_layers
        keys = self.slots * filled
        return KernelWork(4 * keys * config.num_heads * config.head_dim / divided, keys * position / divided)

    # ---- Scoring and update

    def _score(self, role: str, frozen: FrozenModel) -> Planned:
        c, model = self.setup.config, frozen.model
        keeps = role != "reference"
        scorer: Any = make_scorer(
            model,
            self.setup.head,
            self.shape,
            keep_states=keeps and c.teacher_states,
            keep_entropy=keeps and c.kd.teacher_entropy_scale is not None,
        )
        everywhere = sharding.replicated(self.setup.mesh)
        bound = abstract_array((), jnp.int32, everywhere)
        rows = self.minibatch.packs.rows
        lowered = scorer.lower(
            frozen.on_device(), rows, abstract_array((), jnp.float32, everywhere), (bound, bound)
        )
        # Each of several teachers by source has its share of the rows.
        share = 1 / c.num_kinds if keeps else 1.0
        flops = forward_flops(model.config, self.tokens_of_minibatch, self._scored_tokens(), self.seen)
        return Planned(
            f"score, {role}",
            SCORE,
            lowered,
            self.resident(without=frozen),
            c.train.num_minibatches * share,
            Given(loops=self._packed_loops(), kernels=self._attention_kernels(model)),
            flops / self.chips,
        )

    def _update(self) -> Iterator[Planned]:
        setup, c = self.setup, self.setup.config
        objective = Objective(c, setup.student, setup.head, self.shape)
        heads = (
            tuple(abstract_head(t, setup.mesh) for t in setup.teachers.values()) if c.teacher_states else ()
        )
        given = Given(loops=self._packed_loops(), kernels=self._attention_kernels(setup.student))
        flops = (
            training_flops(setup.student.config, self.tokens_of_minibatch, self._scored_tokens(), self.seen)
            / self.chips
        )
        if setup.student.holding.lora is not None:
            flops *= 2 / 3  # the frozen weights get no gradient
        in_arguments = bytes_on_chip((self.state.params, setup.frozen, self.state.opt_state))
        held = self.resident(optimizer=True) - in_arguments
        places = jax.tree.map(lambda x: x.sharding, self.state)
        update = jax.jit(
            make_update(objective, setup.optimizer), donate_argnums=0, out_shardings=(places, None)
        )
        yield Planned(
            "update",
            UPDATE,
            update.lower(self.state, setup.frozen, self.minibatch, heads),
            held,
            c.train.updates_per_iteration,
            given,
            flops,
        )
        if c.train.diagnostics_every and not (is_zero(c.rl.coef) and is_zero(c.kd.coef)):
            diagnose = jax.jit(make_diagnostics(objective))
            state = self.state
            yield Planned(
                "diagnostics",
                UPDATE,
                diagnose.lower(state.step, state.params, setup.frozen, self.minibatch, heads),
                held + bytes_on_chip(state.opt_state),
                1 / (c.train.diagnostics_every / c.train.updates_per_iteration),
                given,
                flops,
            )
