"""A config to the things it names: mesh, tokenizer, models, optimizer, data. Shared by all commands."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, ModelConfig, TokenizerConfig, load_run_config
from kdrl_jax.data.tokenizer import Tokenizer, load_tokenizer
from kdrl_jax.metrics import read_json, write_json
from kdrl_jax.models import adapters
from kdrl_jax.models.block import Holding, LoRA
from kdrl_jax.models.decoder import FrozenModel, Model, make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.load import ModelSource, open_model
from kdrl_jax.models.quantize import quantize_params
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.pairing import Side, compare
from kdrl_jax.rollout.engine import Engine, EngineSettings
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.runs import Role, run_of
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.types import Params, TrainState

_BASE = "base.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """A model that is there, before anything of it is on a device."""

    config: DecoderConfig
    load: Callable[[Params], Params] | None
    """Abstract parameters with types and shardings -> parameters; None for random weights."""
    source: ModelSource
    """Where the model began, through all runs."""
    loads_int8: bool = False
    """Whether `load` itself quantises, tensor by tensor."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the commands work with."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    student: Model
    teacher: FrozenModel | None
    optimizer: optax.GradientTransformation
    frozen: Params
    """What of the student is not trained: all but its adapters with LoRA, else nothing."""
    init_trainable: Callable[[], Params]
    """What of the student is trained, as the config starts it (float32 master weights)."""
    num_tokens: int
    """Ids that are sampled and scored; see `pairing.Pairing`."""
    notes: tuple[str, ...]
    """What the comparison of the models found worth knowing, a line each."""

    def student_params(self, trainable: Params) -> Params:
        """All of the student's parameters."""
        return adapters.overlay(self.frozen, trainable)

    @property
    def head(self) -> HeadSettings:
        c = self.config
        return HeadSettings(
            num_tokens=self.num_tokens,
            chunk=c.train.head_chunk,
            max_new_tokens=c.rollout.max_new_tokens,
        )

    def engine(self, model: Model, num_prompts: int, group_size: int, sampler: SamplerSettings) -> Engine:
        """A sampling engine with this run's lengths and tokenizer."""
        c, t = self.config, self.tokenizer
        settings = EngineSettings(
            num_prompts=num_prompts,
            group_size=group_size,
            max_prompt_tokens=c.data.max_prompt_tokens,
            max_new_tokens=c.rollout.max_new_tokens,
            num_tokens=self.num_tokens,
            end_ids=t.end_ids,
            pad_id=t.pad_id,
            decode_chunk=c.rollout.decode_chunk,
            sampler=sampler,
        )
        return Engine(model, settings, self.mesh)

    def init_state(self) -> TrainState:
        """Step 0: the student's first parameters and empty moments, each on its devices."""
        params = self.init_trainable()
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)(params)
        zero = [jax.device_put(np.zeros((), np.int32), shardings.step) for _ in range(3)]
        return TrainState(zero[0], params, opt_state, zero[1], zero[2])

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state; nothing is loaded."""
        params = _abstract_trainable(self.student, self.mesh)
        everywhere = sharding.replicated(self.mesh)
        shardings = opt_state_shardings(
            self.optimizer, params, jax.tree.map(lambda x: x.sharding, params), everywhere
        )
        opt_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(self.optimizer.init, params),
            shardings,
        )
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(count, params, opt_state, count, count)  # type: ignore[arg-type]


def make_setup(config: Config) -> Setup:
    """Finds, checks and loads everything a config names; nothing is written.

    Raises:
        ValueError, FileNotFoundError: one line naming what does not fit and what to do.
    """
    mesh = check_mesh(config)
    finder = _Finder()
    tokenizer_of = {role: finder.own_tokenizer(config, role) for role in _roles(config)}
    tokenizer = _choose_tokenizer(config, finder, tokenizer_of)
    found = {role: finder.find(config, role, tokenizer.vocab_size) for role in _roles(config)}
    pairing = compare(
        tokenizer,
        [Side(role, found[role].config, own) for role, own in tokenizer_of.items()],
        same_end=config.kd.end_token,
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        prompt_template=config.data.prompt_template,
        chat=config.tokenizer.chat_template,
    ).require()
    # Nothing of either model is read, or on a device, before here.
    student = make_model(found["student"].config, _dtype(config.student), _holding(config.student))
    teacher = None
    if config.teacher is not None:
        holding = _holding(config.teacher)
        model = make_model(found["teacher"].config, _dtype(config.teacher), holding)
        params = _load(found["teacher"], model, mesh, _dtype(config.teacher), config.seed)
        teacher = FrozenModel(model, params)
    frozen, init_trainable = _prepare_student(config, found["student"], student, mesh)
    return Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        optimizer=make_optimizer(config.optimizer),
        frozen=frozen,
        init_trainable=init_trainable,
        num_tokens=pairing.num_tokens,
        notes=pairing.notes,
    )


def _prepare_student(
    config: Config, found: Found, student: Model, mesh: Mesh
) -> tuple[Params, Callable[[], Params]]:
    """(what is not trained, how what is trained begins)."""
    check_base(config)
    if student.holding.lora is None:
        return {}, lambda: _load(found, student, mesh, jnp.float32, config.seed)
    frozen = _load(found, make_model(student.config), mesh, _dtype(config.student), config.seed)
    abstract = _abstract_trainable(student, mesh)

    def init(key: jax.Array) -> Params:
        return adapters.split(student.init(key))[0]

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return frozen, lambda: jax.jit(init, out_shardings=shardings)(seed_key(config.seed))


@dataclasses.dataclass(frozen=True)
class SingleModel:
    """One model of a config, for commands that need no other (sample, export)."""

    mesh: Mesh
    tokenizer: Tokenizer
    """The run's, which both models share."""
    num_tokens: int
    """Ids that are sampled; see `pairing.Pairing`."""
    model: Model
    source: ModelSource
    """Where the model began: its family, and the files it came from."""
    start: Callable[[], Params]
    """The parameters as the config starts them; those of a student in float32, its master weights."""
    restore: Callable[[Path, int | None], Params]
    """The student's parameters at a run's checkpoint (None: the newest), adapters merged."""

    def params(self, run_dir: str | None = None, step: int | None = None) -> Params:
        """The whole parameters, on the devices.

        Args:
            run_dir: the run whose checkpoint to read; None takes them as the config starts them.
            step: which checkpoint; None is the newest.

        Raises:
            ValueError: no such checkpoint; it names those there.
        """
        if run_dir is None:
            return self.start()
        return self.restore(Path(run_dir), step)


def make_single(config: Config, role: Role) -> SingleModel:
    """Finds and checks one model of a config; of the other, at most the tokenizer is read.

    Raises:
        ValueError, FileNotFoundError: one line naming what does not fit and what to do.
    """
    if role not in _roles(config):
        raise ValueError(f"the config has no {role}; add a {role} section")
    mesh = sharding.make_mesh(config.mesh)
    finder = _Finder()
    own: dict[Role, Tokenizer | None] = {}
    if config.tokenizer.kind == "model":
        own["student"] = finder.own_tokenizer(config, "student")
        if own["student"] is None and config.teacher is not None:
            own["teacher"] = finder.own_tokenizer(config, "teacher")
    tokenizer = _choose_tokenizer(config, finder, own)
    found = finder.find(config, role, tokenizer.vocab_size)
    mine = finder.own_tokenizer(config, role)
    sides = [Side(role, found.config, mine)]
    chat = config.tokenizer.chat_template
    pairing = compare(tokenizer, sides, same_end=False, longest=0, chat=chat).require()
    described = _model_config(config, role)
    compute_dtype = _dtype(described)
    # Adapters begin as no change, and are merged where they were trained.
    model = make_model(found.config, compute_dtype, Holding(int8=described.weights == "int8"))
    dtype = jnp.float32 if role == "student" else compute_dtype
    return SingleModel(
        mesh=mesh,
        tokenizer=tokenizer,
        num_tokens=pairing.num_tokens,
        model=model,
        source=found.source,
        start=lambda: _load(found, model, mesh, dtype, config.seed),
        restore=lambda run, step: _load_run(run, config, found, abstract_params(model, mesh, dtype), step),
    )


def _base_step(config: Config) -> int | None:
    """The checkpoint of another run that adapters are trained on; None where they are not."""
    run = run_of(config, "student")
    if config.student.lora is None or run is None:
        return None
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.latest_step
    finally:
        checkpoints.close()


def record_base(config: Config) -> None:
    """Writes down which checkpoint a run's adapters are trained on, once."""
    file, step = Path(config.run_dir) / _BASE, _base_step(config)
    if step is not None and not file.exists():
        write_json(file, {"run": str(run_of(config, "student")), "step": step})


def check_base(config: Config) -> None:
    """Adapters mean nothing on other weights than those they were trained on.

    Raises:
        ValueError: the run they came from has been trained further.
    """
    file = Path(config.run_dir) / _BASE
    if not file.exists():
        return
    began, now = read_json(file), _base_step(config)
    if began["step"] != now:
        raise ValueError(
            f"{config.run_dir}: its adapters were trained on step {began['step']} of {began['run']}, which "
            f"is at step {now} now; put that checkpoint back, or train new adapters in another log.dir"
        )


def _roles(config: Config) -> list[Role]:
    return ["student"] if config.teacher is None else ["student", "teacher"]


def _model_config(config: Config, role: Role) -> ModelConfig:
    model = config.student if role == "student" else config.teacher
    assert model is not None
    return model


class _Finder:
    """Opens a model's file once for its tokenizer and its weights, and a tokenizer once for all."""

    def __init__(self) -> None:
        self._sources: dict[ModelConfig, ModelSource] = {}
        self._tokenizers: dict[tuple[TokenizerConfig, str | None], Tokenizer] = {}

    def tokenizer(self, config: TokenizerConfig, path: str | None = None) -> Tokenizer:
        key = (config, path)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(config, path)
        return self._tokenizers[key]

    def own_tokenizer(self, config: Config, role: Role) -> Tokenizer | None:
        """The tokenizer beside a model's weights, or of the run that trained it."""
        model, run = _model_config(config, role), run_of(config, role)
        if run is not None:
            trained = load_run_config(run)
            if trained.tokenizer.kind != "model":
                return self.tokenizer(trained.tokenizer)
            return self.own_tokenizer(trained, "student")
        if model.path is None:
            return None
        return self.tokenizer(TokenizerConfig(), self._open(model).tokenizer_path)

    def find(self, config: Config, role: Role, num_tokens: int) -> Found:
        """Where a model's config and parameters come from.

        Args:
            num_tokens: vocabulary of a model with random weights.
        """
        model, run = _model_config(config, role), run_of(config, role)
        if run is not None:
            trained = load_run_config(run)
            inner = self.find(trained, "student", num_tokens)
            return Found(
                inner.config, lambda abstract: _load_run(run, trained, inner, abstract), inner.source
            )
        source = self._open(model) if model.path is not None else open_model(model, num_tokens)
        load = source.load if source.has_weights else None
        return Found(source.config, load, source, loads_int8=True)

    def _open(self, model: ModelConfig) -> ModelSource:
        if model not in self._sources:
            self._sources[model] = open_model(model)
        return self._sources[model]


def _load_run(run: Path, trained: Config, base: Found, abstract: Params, step: int | None = None) -> Params:
    """The student of a run's checkpoint (None: the newest), its adapters merged if it has some."""
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    holding = _holding(trained.student)
    if holding.lora is None:
        return _restore(run, abstract, step)
    check_base(trained)
    student = make_model(base.config, _dtype(trained.student), holding)
    saved = _restore(run, _abstract_trainable(student, mesh), step)
    # Not in the type it was computed in: what was not trained is given on as it was read.
    frozen = _load(base, make_model(base.config), mesh, jnp.float32, trained.seed)
    whole = adapters.overlay(frozen, saved)
    del frozen  # `merge` takes the leaves out of the only tree that holds them
    return adapters.merge(whole, holding.lora, jax.tree.leaves(abstract)[0].dtype)


def _restore(run: Path, abstract: Params, step: int | None = None) -> Params:
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.restore_params(abstract, step)
    finally:
        checkpoints.close()


def _choose_tokenizer(config: Config, finder: _Finder, own: dict[Role, Tokenizer | None]) -> Tokenizer:
    if config.tokenizer.kind != "model":
        return finder.tokenizer(config.tokenizer)
    tokenizer = own["student"] or own.get("teacher")
    if tokenizer is None:
        raise ValueError(
            "tokenizer.kind=model takes the tokenizer of a model, but student and teacher have random "
            "weights; set tokenizer.kind to char, or to file with tokenizer.path"
        )
    return tokenizer


def _load(found: Found, model: Model, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """The parameters of a model without adapters, in `dtype` or int8, sharded by the rules: from their
    file or run, or random."""
    abstract = abstract_params(model, mesh, dtype)
    if found.load is not None and (found.loads_int8 or not model.holding.int8):
        return found.load(abstract)
    plain = abstract_params(make_model(model.config), mesh, dtype)
    if found.load is not None:
        params = found.load(plain)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, plain)

        def init(key: jax.Array) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), make_model(model.config).init(key))

        params = jax.jit(init, out_shardings=shardings)(seed_key(seed))
    return quantize_params(params, abstract) if model.holding.int8 else params


def abstract_params(model: Model, mesh: Mesh, dtype: Any) -> Params:
    """Shapes, types and shardings of a model's parameters: floats in `dtype`, but scales of int8 and
    adapters in float32."""

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct, dims: str) -> jax.ShapeDtypeStruct:
        keeps = x.dtype == jnp.int8 or str(path[-1].key).endswith(("_scale", "_lora_a", "_lora_b"))
        place = sharding.sharding(dims, x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype if keeps else dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract(), model.dims)


def _abstract_trainable(student: Model, mesh: Mesh) -> Params:
    whole = abstract_params(student, mesh, jnp.float32)
    return whole if student.holding.lora is None else adapters.split(whole)[0]


def _holding(model: ModelConfig) -> Holding:
    lora = None
    if model.lora is not None:
        lora = LoRA(model.lora.rank, model.lora.alpha, model.lora.targets)
    return Holding(int8=model.weights == "int8", lora=lora)


def _dtype(model: ModelConfig) -> Any:
    return jnp.dtype(model.compute_dtype)


def check_mesh(config: Config) -> Mesh:
    """The mesh, if the config's row counts divide over it.

    Raises:
        ValueError: naming the count that does not.
    """
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.batch_shards(mesh)
    rows = config.train.prompts_per_iteration * config.rollout.group_size // config.train.num_minibatches
    counts = {
        "train.prompts_per_iteration": config.train.prompts_per_iteration,
        "rows of a minibatch": rows,
        "train.microbatch_rows": config.train.microbatch_rows or rows,
    }
    for name, count in counts.items():
        if count % shards:
            raise ValueError(
                f"{name}={count} does not divide over {shards} devices (data x fsdp); make it a multiple, "
                "or give devices to mesh.tensor"
            )
    return mesh
