"""A config to the things it names: mesh, tokenizer, models, optimizer, data. Shared by all commands."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, ModelConfig, TokenizerConfig, load_run_config
from kdrl_jax.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from kdrl_jax.models.decoder import DecoderConfig, Model, make_model
from kdrl_jax.models.load import open_model
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.rollout.engine import Engine, EngineSettings
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.step import Objective
from kdrl_jax.types import Params, TrainState

Role = Literal["student", "teacher"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A model that is there, before anything of it is on a device."""

    config: DecoderConfig
    tokenizer: Tokenizer | None
    """The one that belongs to its weights; None for random weights."""
    load: Callable[[Model, Params], Params] | None
    """(model, abstract parameters with types and shardings) -> parameters; None for random weights."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    model: Model
    params: Params
    """Frozen, in the teacher's compute type; never in a checkpoint."""

    @property
    def kernel(self) -> jax.Array:
        """The vocabulary head [D, V]."""
        return self.model.bind(self.params).head_kernel()


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the commands work with."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    student: Model
    teacher: Teacher | None
    optimizer: optax.GradientTransformation
    init_student: Callable[[], Params]
    """The student as the config starts it (float32 master weights)."""

    @property
    def head(self) -> HeadSettings:
        c = self.config
        return HeadSettings(
            num_tokens=self.tokenizer.vocab_size,
            temperature=c.rollout.temperature,
            chunk=c.train.head_chunk,
            max_new_tokens=c.rollout.max_new_tokens,
        )

    @property
    def objective(self) -> Objective:
        return Objective(self.config, self.student, self.head)

    def engine(self, model: Model, num_prompts: int, group_size: int, sampler: SamplerSettings) -> Engine:
        """A sampling engine with this run's lengths and tokenizer."""
        c, t = self.config, self.tokenizer
        settings = EngineSettings(
            num_prompts=num_prompts,
            group_size=group_size,
            max_prompt_tokens=c.data.max_prompt_tokens,
            max_new_tokens=c.rollout.max_new_tokens,
            num_tokens=t.vocab_size,
            end_ids=t.end_ids,
            pad_id=t.pad_id,
            decode_chunk=c.rollout.decode_chunk,
            sampler=sampler,
        )
        return Engine(model, settings, self.mesh)

    def init_state(self) -> TrainState:
        """Step 0: the student's first parameters and empty moments, each on its devices."""
        params = self.init_student()
        shardings = jax.tree.map(lambda x: x.sharding, params)
        everywhere = sharding.replicated(self.mesh)
        moments = opt_state_shardings(self.optimizer, params, shardings, everywhere)
        opt_state = jax.jit(self.optimizer.init, out_shardings=moments)(params)
        zero = [jax.device_put(np.zeros((), np.int32), everywhere) for _ in range(3)]
        return TrainState(zero[0], params, opt_state, zero[1], zero[2])


def make_setup(config: Config) -> Setup:
    """Finds, checks and loads everything a config names; nothing is written.

    Raises:
        ValueError, FileNotFoundError: one line naming what does not fit and what to do.
    """
    mesh = sharding.make_mesh(config.mesh)
    _check_rows(config, mesh)
    tokenizer_of = {role: _own_tokenizer(config, role) for role in _roles(config)}
    tokenizer = _choose_tokenizer(config, tokenizer_of)
    found = {role: _find(config, role, tokenizer) for role in _roles(config)}
    for role, own in tokenizer_of.items():
        if own is not None and own is not tokenizer:
            student, teacher = (tokenizer, own) if role == "teacher" else (own, tokenizer)
            check_same_vocabulary(student, teacher, same_end=config.kd.end_token)
    for role, model in found.items():
        _check_fits(config, role, model.config, tokenizer)
    student = make_model(found["student"].config, _dtype(config.student))
    teacher = None
    if config.teacher is not None:
        model = make_model(found["teacher"].config, _dtype(config.teacher))
        teacher = Teacher(model, _load(found["teacher"], model, mesh, _dtype(config.teacher), config.seed))
    return Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        optimizer=make_optimizer(config.optimizer),
        init_student=lambda: _load(found["student"], student, mesh, jnp.float32, config.seed),
    )


def run_of(config: Config, role: Role) -> Path | None:
    """The run directory that a model with `run` comes from: the one named, or inside this run."""
    model = config.student if role == "student" else config.teacher
    if model is None or model.run is None:
        return None
    named = Path(model.run)
    return named if named.is_dir() else Path(config.run_dir) / role


def _roles(config: Config) -> list[Role]:
    return ["student"] if config.teacher is None else ["student", "teacher"]


def _model_config(config: Config, role: Role) -> ModelConfig:
    model = config.student if role == "student" else config.teacher
    assert model is not None
    return model


def _own_tokenizer(config: Config, role: Role) -> Tokenizer | None:
    """The tokenizer beside a model's weights, or of the run that trained it."""
    model, run = _model_config(config, role), run_of(config, role)
    if run is not None:
        trained = load_run_config(run)
        if trained.tokenizer.kind != "model":
            return load_tokenizer(trained.tokenizer, None)
        return _own_tokenizer(trained, "student")
    if model.path is None:
        return None
    return load_tokenizer(TokenizerConfig(), open_model(model).tokenizer_path)


def _choose_tokenizer(config: Config, own: dict[Role, Tokenizer | None]) -> Tokenizer:
    if config.tokenizer.kind != "model":
        return load_tokenizer(config.tokenizer, None)
    tokenizer = own["student"] or own.get("teacher")
    if tokenizer is None:
        raise ValueError(
            "tokenizer.kind=model takes the tokenizer of a model, but student and teacher have random "
            "weights; set tokenizer.kind to char, or to file with tokenizer.path"
        )
    return tokenizer


def _find(config: Config, role: Role, tokenizer: Tokenizer) -> Found:
    model, run = _model_config(config, role), run_of(config, role)
    if run is not None:
        trained = load_run_config(run)
        inner = _find(trained, "student", tokenizer)

        def restore(_: Model, abstract: Params) -> Params:
            checkpoints = Checkpoints(run)
            try:
                return checkpoints.restore_params(abstract)
            finally:
                checkpoints.close()

        return Found(inner.config, None, restore)
    source = open_model(model, tokenizer.vocab_size)
    if not source.has_weights:
        return Found(source.config, None, None)

    def load(_: Model, abstract: Params) -> Params:
        def put(path: str, array: np.ndarray) -> jax.Array:
            leaf: Any = abstract
            for part in path.split("."):
                leaf = leaf[part]
            return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

        return source.load(put)

    return Found(source.config, None, load)


def _load(found: Found, model: Model, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """Parameters in `dtype`, sharded by the rules: from their file or run, or random."""
    shapes = model.abstract()
    shardings = jax.tree.map(lambda x, dims: sharding.sharding(dims, x.shape, mesh), shapes, model.dims)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)
    if found.load is not None:
        return found.load(model, abstract)

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _dtype(model: ModelConfig) -> Any:
    return jnp.dtype(model.compute_dtype)


def _check_rows(config: Config, mesh: Mesh) -> None:
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


def _check_fits(config: Config, role: Role, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the {role} has rows for "
            f"{decoder.vocab_size}: it is not this model's tokenizer"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > decoder.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}, but the {role} was made for "
            f"{decoder.max_positions} positions; lower one of them"
        )
