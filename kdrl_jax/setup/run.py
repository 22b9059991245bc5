"""A config to all that a run works with: mesh, tokenizer, models, optimizer."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.config import Config
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.models import adapters
from kdrl_jax.models.attend import row_attention
from kdrl_jax.models.block import Holding
from kdrl_jax.models.decoder import FrozenModel, Model, make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.pairing import Side, compare
from kdrl_jax.rollout.attention import heads_divide
from kdrl_jax.rollout.engine import Engine
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.rollout.settings import EngineSettings, cache_type
from kdrl_jax.runs import Role, model_of, roles
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.setup.finder import Finder, Found, choose_tokenizer
from kdrl_jax.setup.parameters import (
    abstract_params,
    abstract_trainable,
    dtype_of,
    holding_of,
    load_params,
    trainable_dims,
)
from kdrl_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the commands work with."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    student: Model
    teachers: dict[str, FrozenModel]
    """By role, in the config's order: those that were asked for."""
    reference: FrozenModel | None
    """What the student is compared with; None unless a term asks for it, and it was asked for."""
    optimizer: optax.GradientTransformation
    frozen: Params
    """What of the student is not trained: all but its adapters with LoRA, else nothing."""
    init_trainable: Callable[[], Params]
    """What of the student is trained, as the config starts it (float32 master weights)."""
    num_tokens: int
    """Ids that are sampled and scored; see `pairing.Pairing`."""
    parks_frozen: bool
    """Whether teachers and reference wait in host memory while they do not score."""
    notes: tuple[str, ...]
    """What the comparison of the models found worth knowing, a line each."""
    run_steps: Mapping[Role, int] = dataclasses.field(default_factory=dict)
    """Of models that come from runs: the checkpoint that each is from."""

    def student_params(self, trainable: Params) -> Params:
        """All of the student's parameters."""
        return adapters.overlay(self.frozen, trainable)

    @property
    def teacher(self) -> FrozenModel | None:
        """The teacher, if there is just one."""
        return next(iter(self.teachers.values())) if len(self.teachers) == 1 else None

    @property
    def head(self) -> HeadSettings:
        c = self.config
        return HeadSettings(num_tokens=self.num_tokens, chunk=c.train.head_chunk)

    def engine(self, model: Model, num_prompts: int, group_size: int, sampler: SamplerSettings) -> Engine:
        """A sampling engine with this run's lengths and tokenizer."""
        return Engine(model, self.engine_settings(model, num_prompts, group_size, sampler), self.mesh)

    def engine_settings(
        self, model: Model, num_prompts: int, group_size: int, sampler: SamplerSettings
    ) -> EngineSettings:
        c, t = self.config, self.tokenizer
        return EngineSettings(
            num_prompts=num_prompts,
            group_size=group_size,
            max_prompt_tokens=c.data.max_prompt_tokens,
            max_new_tokens=c.rollout.max_new_tokens,
            num_tokens=self.num_tokens,
            end_ids=t.end_ids,
            pad_id=t.pad_id,
            decode_chunk=c.rollout.decode_chunk,
            sampler=sampler,
            slots=c.rollout.slots_per_device,
            cache_dtype=cache_type(c.rollout.cache_dtype, model.compute_dtype, self.mesh),
            attention=c.rollout.attention,
        )

    def init_state(self) -> TrainState:
        """Step 0: the student's first parameters on the devices and empty moments, parked if they are."""
        params = self.init_trainable()
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)(params)
        # Each counter is an array of its own, since all are donated.
        counters = jax.tree.map(lambda x: hosts.spread(x, shardings.step), TrainState.first({}, {}))
        return self.park(dataclasses.replace(counters, params=params, opt_state=opt_state))

    def park(self, state: TrainState) -> TrainState:
        """With train.park_optimizer, the optimizer's state in the hosts' memory, as it is between updates."""
        return self._with_optimizer_in(state, "pinned_host")

    def unpark(self, state: TrainState) -> TrainState:
        """What can be updated: all of the state on the devices."""
        return self._with_optimizer_in(state, "device")

    def _with_optimizer_in(self, state: TrainState, memory: str) -> TrainState:
        if not self.config.train.park_optimizer:
            return state
        return dataclasses.replace(state, opt_state=sharding.move(state.opt_state, memory))

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state; nothing is loaded."""
        params = abstract_trainable(self.student, self.mesh)
        everywhere = sharding.replicated(self.mesh)
        dims = trainable_dims(self.student)
        shardings = opt_state_shardings(self.optimizer, params, dims, everywhere)
        opt_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(self.optimizer.init, params),
            shardings,
        )
        counters = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), TrainState.first({}, {})
        )
        return dataclasses.replace(counters, params=params, opt_state=opt_state)


def make_setup(config: Config, needed: Collection[Role] | None = None) -> Setup:
    """Finds and checks everything a config names, and loads what is needed; nothing is written.

    Args:
        needed: models to load beside the student: teachers, `reference`. None: all. The others are looked at
            all the same, since which tokens are sampled follows from all vocabularies.

    Raises:
        ValueError, FileNotFoundError: one line naming what does not fit and what to do.
    """
    mesh = sharding.make_mesh(config.mesh)
    finder = Finder()
    tokenizer_of = {role: finder.own_tokenizer(config, role) for role in roles(config)}
    tokenizer = choose_tokenizer(config, finder, tokenizer_of)
    found = {role: finder.find(config, role, tokenizer.vocab_size) for role in roles(config)}
    pairing = compare(
        tokenizer,
        [Side(role, found[role].config, own) for role, own in tokenizer_of.items()],
        same_end=config.kd.end_token,
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        prompt_template=config.data.prompt_template,
        chat=config.tokenizer.chat_template,
    ).require()
    # Nothing of any model is read, or on a device, before here.

    def load(role: Role, model: Model) -> Params:
        return load_params(found[role], model, mesh, dtype_of(model_of(config, role)), config.seed)

    student = _student(config, found["student"].config, mesh)
    frozen, init_trainable = _prepare_student(config, found["student"], student, mesh)
    shapes = {role: source.config for role, source in found.items()}
    setup = _assemble(
        config,
        mesh,
        tokenizer,
        student,
        frozen,
        init_trainable,
        lambda role: _frozen_model(config, shapes[role], role, mesh, load),
        (pairing.num_tokens, (*pairing.notes, *_whole_heads(shapes, mesh))),
        (*config.all_teachers, "reference") if needed is None else needed,
    )
    steps = {role: source.run_step for role, source in found.items() if source.run_step is not None}
    return dataclasses.replace(setup, run_steps=steps)


def _whole_heads(shapes: Mapping[Role, DecoderConfig], mesh: Mesh) -> Iterator[str]:
    """A line for each model whose heads `tensor` does not divide."""
    tensor = mesh.shape["tensor"]
    for role, c in shapes.items():
        if c.num_heads % tensor:
            yield (
                f"{role}: mesh.tensor={tensor} does not divide its {c.num_heads} heads; every device of "
                "tensor attends with all of them"
            )
        elif not heads_divide(c, mesh):
            yield (
                f"{role}: mesh.tensor={tensor} does not divide its {c.num_kv_heads} heads of keys and "
                "values; every device of tensor holds all of them while it samples"
            )


def abstract_setup(config: Config, mesh: Mesh, shapes: Mapping[Role, DecoderConfig], ids: Any) -> Setup:
    """The setup of a run of which nothing is there: parameters are shapes, types and places on a mesh, which
    may be one of devices that are not there either. It can lower programs, and start nothing.

    Args:
        ids: in place of a tokenizer: `num_tokens`, `end_ids` and `pad_id`.
    """

    def load(role: Role, model: Model) -> Params:
        return abstract_params(model, mesh, dtype_of(model_of(config, role)))

    def nothing() -> Params:
        raise ValueError("an abstract setup has no weights to start from")

    student = _student(config, shapes["student"], mesh)
    frozen: Params = {}
    if student.holding.lora is not None:
        frozen = load("student", make_model(student.config))
    return _assemble(
        config,
        mesh,
        ids,
        student,
        frozen,
        nothing,
        lambda role: _frozen_model(config, shapes[role], role, mesh, load),
        (ids.num_tokens, ()),
        (*config.all_teachers, "reference"),
    )


def _assemble(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    student: Model,
    frozen: Params,
    init_trainable: Callable[[], Params],
    frozen_model: Callable[[Role], FrozenModel],
    paired: tuple[int, tuple[str, ...]],
    needed: Collection[Role],
) -> Setup:
    roles_of_teachers = [role for role in config.all_teachers if role in needed]
    has_reference = "reference" in needed and (config.reference is not None or config.uses_reference)
    # With several frozen models, only the one at work is on the devices.
    extra = has_reference and (config.reference is not None or not frozen)
    several = len(roles_of_teachers) + extra > 1
    park = several if config.train.park_frozen == "auto" else config.train.park_frozen == "always"

    def waiting(role: Role) -> FrozenModel:
        model = frozen_model(role)
        return model.parked() if park else model

    reference = None
    if has_reference and config.reference is not None:
        reference = waiting("reference")
    elif has_reference and frozen:
        # Without its adapters, the student is what it was.
        plain = make_model(student.config, dtype_of(config.student), attention=student.attention)
        reference = FrozenModel(plain, frozen)
    elif has_reference:
        reference = waiting("student")
    num_tokens, notes = paired
    return Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        student=student,
        teachers={role: waiting(role) for role in roles_of_teachers},
        reference=reference,
        optimizer=make_optimizer(config.optimizer, trainable_dims(student)),
        frozen=frozen,
        init_trainable=init_trainable,
        num_tokens=num_tokens,
        parks_frozen=park,
        notes=notes,
    )


def _student(config: Config, shape: DecoderConfig, mesh: Mesh) -> Model:
    attention = row_attention(config.train.attention, mesh)
    return make_model(shape, dtype_of(config.student), holding_of(config.student), attention)


def _frozen_model(
    config: Config, shape: DecoderConfig, role: Role, mesh: Mesh, load: Callable[[Role, Model], Params]
) -> FrozenModel:
    """A model that is never trained, in its compute type."""
    described = model_of(config, role)
    holding = Holding(int8=described.weights == "int8")
    attention = row_attention(config.train.attention, mesh)
    model = make_model(shape, dtype_of(described), holding, attention)
    return FrozenModel(model, load(role, model))


def _prepare_student(
    config: Config, found: Found, student: Model, mesh: Mesh
) -> tuple[Params, Callable[[], Params]]:
    """(what is not trained, how what is trained begins)."""
    if student.holding.lora is None:
        return {}, lambda: load_params(found, student, mesh, jnp.float32, config.seed)
    frozen = load_params(found, make_model(student.config), mesh, dtype_of(config.student), config.seed)
    abstract = abstract_trainable(student, mesh)

    def init(key: jax.Array) -> Params:
        return adapters.split(student.init(key))[0]

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return frozen, lambda: jax.jit(init, out_shardings=shardings)(seed_key(config.seed))


def check_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh, if the row counts of training divide over it.

    Args:
        devices: None is those that are there.

    Raises:
        ValueError: naming the count that does not.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    shards = sharding.batch_shards(mesh)
    counts = {
        "train.prompts_per_iteration": config.train.prompts_per_iteration,
        "train.microbatch_rows": config.train.microbatch_rows or shards,
    }
    for name, count in counts.items():
        if count % shards:
            raise ValueError(
                f"{name}={count} does not divide over {shards} devices (data x fsdp); make it a multiple, "
                "or give devices to mesh.tensor"
            )
    return mesh
