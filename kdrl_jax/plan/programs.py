"""The compiled programs of a run, lowered for devices that need not be there, from abstract arguments."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax import sharding
from kdrl_jax.config.schedules import is_zero
from kdrl_jax.models.attend import kv_heads_over
from kdrl_jax.models.cache import bytes_per_position
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.models.decoder_config import DecoderConfig
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
from kdrl_jax.rollout.weights import decode_layout, relay
from kdrl_jax.scoring import PackShape, make_scorer
from kdrl_jax.scoring.packer import config_pack_shape, minibatch_rows
from kdrl_jax.scoring.packing import place
from kdrl_jax.scoring.passes import slice_size
from kdrl_jax.setup import Setup
from kdrl_jax.step import Objective, make_diagnostics, make_update
from kdrl_jax.types import Params

ROLLOUT, SCORE, UPDATE, LOG = "rollout", "score", "update", "log"
"""The phases that the time of an iteration is made of; the last, in `logged`, of tokens that are written."""

STUDENT, FROZEN, OPTIMIZER, HEADS = "student", "frozen weights of the student", "optimizer", "heads"

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

    def spread(self, num: int, most: int) -> np.ndarray:
        """int [num]: completions spread evenly about their mean, as far as 1 and `most` let them."""
        half = min(self.completion - 1, most - self.completion)
        even = np.linspace(self.completion - half, self.completion + half, num)
        return np.random.default_rng(0).permutation(np.rint(even).astype(int))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a minibatch of such lengths holds."""

    passes: float
    """Over packed rows; with several kinds of rows, of all kinds."""
    tokens: float
    """In packed rows, prompts included."""
    scored: float
    """Completion tokens."""
    sequences: list[int]
    """Of each completion, its tokens and its prompt's."""


class RunPrograms:
    """The programs of one iteration of `train`."""

    def __init__(self, setup: Setup, chip_memory: float, lengths: Lengths):
        """Chooses slots and shapes.

        Args:
            setup: of abstract parameters, on a mesh of the devices.
            chip_memory: bytes of each that may be filled.

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
        self.heads = {}
        if c.teacher_states:
            self.heads = {role: abstract_head(t, setup.mesh) for role, t in setup.teachers.items()}
        self.held = self._held()
        (rows_B, *_) = minibatch_rows(self.rows, c.rollout.group_size, c.train.num_minibatches)
        self.work = self.work_of(self.shape, rows_B)
        self.slots = 0
        if c.rollout.source != "dataset":
            self.engine = self._engine_settings()
            self.weights = decode_layout(self.sampled, self.sampled_params, setup.mesh)
            free = chip_memory - self.besides() - bytes_on_chip(self.weights)
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

    def _held(self) -> dict[str, float]:
        """Bytes of each chip that live between the phases, by what they are of."""
        setup = self.setup
        out = {
            STUDENT: bytes_on_chip(self.state.params),
            FROZEN: bytes_on_chip(setup.frozen),
            OPTIMIZER: 0.0 if setup.config.train.park_optimizer else bytes_on_chip(self.state.opt_state),
            # Of parked teachers the heads stay.
            HEADS: bytes_on_chip(self.heads) if setup.parks_frozen else 0.0,
        }
        for role, frozen in self.frozen.items():
            # Without its adapters, a student is its own reference.
            shared = frozen.params is setup.frozen
            out[role] = 0.0 if shared or setup.parks_frozen else bytes_on_chip(frozen.params)
        return out

    def besides(self, *arguments: str) -> float:
        """What lives while a program runs and is none of its arguments, which are named as in `held`."""
        return sum(size for name, size in self.held.items() if name not in arguments)

    @property
    def states(self) -> float:
        """Bytes of each chip of what teachers leave for the update of one minibatch."""
        return bytes_on_chip(self.minibatch.teacher)

    def names(self) -> list[str]:
        """Of the programs that `lower` will give, which takes minutes for all of them."""
        c, out = self.setup.config, []
        if self.slots:
            moved = relay(self.sampled, self.sampled_params, self.setup.mesh)[1]
            out += [*(["relay"] if moved else []), "prefill", "decode"]
        scored = [STUDENT] if c.train.updates_per_iteration > 1 else []
        scored += [*(self.setup.teachers if c.scores_teacher else ())]
        scored += [] if self.setup.reference is None else ["reference"]
        out += [f"score, {role}" for role in scored]
        return [*out, "update", *(["diagnostics"] if self._diagnoses else [])]

    @property
    def _diagnoses(self) -> bool:
        c = self.setup.config
        return bool(c.train.diagnostics_every) and not (is_zero(c.rl.coef) and is_zero(c.kd.coef))

    def lower(self, phases: Sequence[str] | None = None) -> Iterator[Planned]:
        """The programs (of some phases), each lowered when it is asked for."""
        phases = (ROLLOUT, SCORE, UPDATE) if phases is None else phases
        with jax.set_mesh(self.setup.mesh):
            if self.slots and ROLLOUT in phases:
                yield from self._rollout()
            if SCORE in phases:
                if self.setup.config.train.updates_per_iteration > 1:
                    yield self._score_student()
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

    def work_of(self, shape: PackShape, rows_B: np.ndarray) -> Work:
        """What some rows of an iteration hold, in packed rows of a shape."""
        c = self.setup.config
        lengths_B = self.lengths.spread(len(rows_B), c.rollout.max_new_tokens)
        prompt_lengths_B = np.full(len(rows_B), self.lengths.prompt)
        groups_B = rows_B // c.rollout.group_size
        kinds = c.num_kinds
        places = place(prompt_lengths_B, lengths_B, groups_B, shape, groups_B % kinds, kinds)
        stands_B = places.owner_B == np.arange(len(rows_B))  # whose prompts are there
        scored, prompts = float(lengths_B.sum()), float(prompt_lengths_B[stands_B].sum())
        sequences = (prompt_lengths_B + lengths_B).tolist()
        return Work(float(places.bounds[-1]), scored + prompts, scored, sequences)

    def seen(self, config: DecoderConfig, work: Work) -> KeysSeen:
        """By the tokens of some work, in the mean."""
        each = [(n, keys_seen(config, 0, n)) for n in work.sequences]
        total = sum(n for n, _ in each)
        return KeysSeen(
            sum(n * seen.full for n, seen in each) / total, sum(n * seen.sliding for n, seen in each) / total
        )

    def packed_loops(self, shape: PackShape, work: Work) -> dict[str, float]:
        """How often the loops over packed rows run."""
        of_row = work.scored / (work.passes * shape.rows_per_pass)
        size = slice_size(
            shape.length, self.setup.config.train.head_chunk // (shape.rows_per_pass // self.shards)
        )
        return {"microbatches": work.passes, "head_chunks": math.ceil(of_row / size)}

    def attention_kernels(self, model: Model, shape: PackShape) -> dict[str, KernelWork]:
        """Of one layer and pass, on each chip: every block up to the diagonal, whatever lies in it."""
        c, t = model.config, shape.length
        rows = shape.rows_per_pass / self.shards
        tensor = self.setup.mesh.shape["tensor"]
        kv_heads = kv_heads_over(c.num_heads, c.num_kv_heads, tensor)
        heads, of_keys = c.num_heads, c.num_kv_heads
        if kv_heads is not None:
            heads, of_keys = heads // tensor, kv_heads // tensor
        pairs = rows * heads * t * t / 2
        itemsize = model.compute_dtype.itemsize
        moved = rows * t * c.head_dim * itemsize * (2 * heads + 2 * of_keys)
        forward = KernelWork(4 * pairs * c.head_dim, moved)
        # Scores once more, and the products of four gradients.
        backward = KernelWork(10 * pairs * c.head_dim, 3 * moved)
        return {
            "splash_mha_fwd_segmented_residuals": forward,
            "splash_mha_fwd_segmented_no_residuals": forward,
            "splash_mha_dkv_segmented_no_residuals": backward,
        }

    def given(self, model: Model, shape: PackShape, work: Work) -> Given:
        return Given(loops=self.packed_loops(shape, work), kernels=self.attention_kernels(model, shape))

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
        held = self.besides()
        if c.rollout.source == "teacher" and self.setup.parks_frozen:
            held += bytes_on_chip(self.sampled_params)
        rounds = 1 + c.rl.resample_rounds / 2
        program, moved = relay(self.sampled, self.sampled_params, mesh)
        if moved:
            leaves = jax.tree.leaves(self.sampled_params)
            given = [leaves[i] for i in moved]
            # Its arguments are among what is held.
            besides = held - bytes_on_chip(given)
            yield Planned("relay", ROLLOUT, program.lower(given), besides, rounds, Given(), 0.0)
        yield Planned(
            "prefill",
            ROLLOUT,
            programs.start.lower(self.weights, *prompts),
            held,
            rounds,
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
            steps / engine.decode_chunk * rounds,
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
        """Of a teacher or the reference."""
        c = self.setup.config
        keeps = role != "reference"
        scorer: Any = make_scorer(
            frozen.model,
            self.setup.head,
            self.shape,
            keep_states=keeps and c.teacher_states,
            keep_entropy=keeps and c.kd.teacher_entropy_scale is not None,
        )
        held = self.besides(FROZEN if frozen.params is self.setup.frozen else role)
        # What all teachers leave of all minibatches; the last is this program's own result.
        held += c.train.num_minibatches * self.states
        if keeps and self.minibatch.teacher is not None:
            held -= bytes_on_chip(self.minibatch.teacher.states[list(self.setup.teachers).index(role)])
        # Each of several teachers by source has its share of the rows.
        share = 1 / c.num_kinds if keeps else 1.0
        return self._scoring(role, frozen.model, scorer, frozen.on_device(), held, share)

    def _score_student(self) -> Planned:
        """As it is before the first of several updates."""
        scorer = make_scorer(self.setup.student, self.setup.head, self.shape)
        held = self.besides(STUDENT, FROZEN) + self.setup.config.train.num_minibatches * self.states
        return self._scoring(STUDENT, self.setup.student, scorer, self.student_params, held, 1.0)

    def _scoring(
        self, role: str, model: Model, scorer: Any, params: Params, held: float, share: float
    ) -> Planned:
        everywhere = sharding.replicated(self.setup.mesh)
        bound = abstract_array((), jnp.int32, everywhere)
        rows = self.minibatch.packs.rows
        work = self.work
        flops = forward_flops(model.config, work.tokens, work.scored, self.seen(model.config, work))
        return Planned(
            f"score, {role}",
            SCORE,
            scorer.lower(params, rows, abstract_array((), jnp.float32, everywhere), (bound, bound)),
            held,
            self.setup.config.train.num_minibatches * share,
            self.given(model, self.shape, work),
            flops / self.chips,
        )

    def _update(self) -> Iterator[Planned]:
        setup, c = self.setup, self.setup.config
        objective = Objective(c, setup.student, setup.head, self.shape)
        heads = tuple(self.heads.values())
        given = self.given(setup.student, self.shape, self.work)
        config, work = setup.student.config, self.work
        lora = setup.student.holding.lora is not None
        flops = training_flops(config, work.tokens, work.scored, self.seen(config, work), frozen_weights=lora)
        flops /= self.chips
        held = self.besides(STUDENT, FROZEN, OPTIMIZER, HEADS)
        if not setup.parks_frozen:
            held -= bytes_on_chip(self.heads)  # parts of the teachers
        held += (c.train.num_minibatches - 1) * self.states
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
        if self._diagnoses:
            diagnose = jax.jit(make_diagnostics(objective))
            state = self.state
            yield Planned(
                "diagnostics",
                UPDATE,
                diagnose.lower(state.step, state.params, setup.frozen, self.minibatch, heads),
                held + bytes_on_chip(state.opt_state),
                min(1.0, c.train.updates_per_iteration / c.train.diagnostics_every),
                given,
                flops,
            )
