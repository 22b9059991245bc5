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
from kdrl_jax.models.decoder import DecoderConfig, FrozenModel, Model, make_model
from kdrl_jax.models.load import ModelSource, open_model
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.rollout.engine import Engine, EngineSettings
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.types import Params, TrainState

Role = Literal["student", "teacher"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A model that is there, before anything of it is on a device."""

    config: DecoderConfig
    load: Callable[[Params], Params] | None
    """Abstract parameters with types and shardings -> parameters; None for random weights."""
    source: ModelSource
    """Where the model began, through all runs."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the commands work with."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    student: Model
    teacher: FrozenModel | None
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
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)(params)
        zero = [jax.device_put(np.zeros((), np.int32), shardings.step) for _ in range(3)]
        return TrainState(zero[0], params, opt_state, zero[1], zero[2])

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state; nothing is loaded."""
        params = abstract_params(self.student, self.mesh, jnp.float32)
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
    for role, own in tokenizer_of.items():
        if own is not None and own is not tokenizer:
            pair = (tokenizer, own) if role == "teacher" else (own, tokenizer)
            check_same_vocabulary(*pair, same_end=config.kd.end_token)
    for role, files in found.items():
        _check_fits(config, role, files.config, tokenizer)
    student = make_model(found["student"].config, _dtype(config.student))
    teacher = None
    if config.teacher is not None:
        model = make_model(found["teacher"].config, _dtype(config.teacher))
        params = _load(found["teacher"], model, mesh, _dtype(config.teacher), config.seed)
        teacher = FrozenModel(model, params)
    return Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        optimizer=make_optimizer(config.optimizer),
        init_student=lambda: _load(found["student"], student, mesh, jnp.float32, config.seed),
    )


@dataclasses.dataclass(frozen=True)
class SingleModel:
    """One model of a config, for commands that need no other (sample, export)."""

    mesh: Mesh
    tokenizer: Tokenizer
    """The run's, which both models share."""
    model: Model
    source: ModelSource
    """Where the model began: its family, and the files it came from."""
    dtype: Any
    """Type of its parameters in a run: the student's are float32 master weights."""
    start: Callable[[], Params]
    """The parameters as the config starts them."""

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
        return _restore(Path(run_dir), abstract_params(self.model, self.mesh, self.dtype), step)


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
    if mine is not None and mine is not tokenizer:
        check_same_vocabulary(tokenizer, mine, same_end=False)
    _check_vocabulary(role, found.config, tokenizer)
    compute_dtype = _dtype(_model_config(config, role))
    model = make_model(found.config, compute_dtype)
    dtype = jnp.float32 if role == "student" else compute_dtype
    return SingleModel(
        mesh=mesh,
        tokenizer=tokenizer,
        model=model,
        source=found.source,
        dtype=dtype,
        start=lambda: _load(found, model, mesh, dtype, config.seed),
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
            inner = self.find(load_run_config(run), "student", num_tokens)
            return Found(inner.config, lambda abstract: _restore(run, abstract), inner.source)
        source = self._open(model) if model.path is not None else open_model(model, num_tokens)
        if not source.has_weights:
            return Found(source.config, None, source)

        def load(abstract: Params) -> Params:
            def put(path: str, array: np.ndarray) -> jax.Array:
                leaf: Any = abstract
                for part in path.split("."):
                    leaf = leaf[part]
                return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

            return source.load(put)

        return Found(source.config, load, source)

    def _open(self, model: ModelConfig) -> ModelSource:
        if model not in self._sources:
            self._sources[model] = open_model(model)
        return self._sources[model]


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
    """Parameters in `dtype`, sharded by the rules: from their file or run, or random."""
    abstract = abstract_params(model, mesh, dtype)
    if found.load is not None:
        return found.load(abstract)

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(seed_key(seed))


def abstract_params(model: Model, mesh: Mesh, dtype: Any) -> Params:
    """Shapes, types and shardings of a model's parameters."""

    def leaf(x: jax.ShapeDtypeStruct, dims: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding.sharding(dims, x.shape, mesh))

    return jax.tree.map(leaf, model.abstract(), model.dims)


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


def _check_fits(config: Config, role: Role, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
    _check_vocabulary(role, decoder, tokenizer)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > decoder.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}, but the {role} was made for "
            f"{decoder.max_positions} positions; lower one of them"
        )


def _check_vocabulary(role: Role, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the {role} has rows for "
            f"{decoder.vocab_size}: it is not this model's tokenizer"
        )
