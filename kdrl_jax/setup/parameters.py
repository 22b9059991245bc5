"""Parameters: their types and places, and how they come there from files, runs or nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config, ModelConfig
from kdrl_jax.metrics import read_json, write_json
from kdrl_jax.models import adapters
from kdrl_jax.models.block import Holding, LoRA
from kdrl_jax.models.decoder import Model, make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.load import ModelSource
from kdrl_jax.models.quantize import quantize_params
from kdrl_jax.paths import absolute, as_path
from kdrl_jax.rollout.sampling import seed_key
from kdrl_jax.runs import Role, run_of
from kdrl_jax.types import Params

_MODELS = "models.json"


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
    run_step: int | None = None
    """Of the run that it comes from, if it comes from one: the checkpoint that `load` reads."""


def load_params(found: Found, model: Model, mesh: Mesh, dtype: Any, seed: int) -> Params:
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


def abstract_trainable(student: Model, mesh: Mesh) -> Params:
    whole = abstract_params(student, mesh, jnp.float32)
    return whole if student.holding.lora is None else adapters.split(whole)[0]


def trainable_dims(student: Model) -> Params:
    """The letters of the dimensions of what is trained, in a tree like it."""
    return student.dims if student.holding.lora is None else adapters.split(student.dims)[0]


def holding_of(model: ModelConfig) -> Holding:
    lora = None
    if model.lora is not None:
        lora = LoRA(model.lora.rank, model.lora.alpha, model.lora.targets)
    return Holding(int8=model.weights == "int8", lora=lora)


def dtype_of(model: ModelConfig) -> Any:
    return jnp.dtype(model.compute_dtype)


def load_run(run: Path, trained: Config, base: Found, abstract: Params, step: int | None = None) -> Params:
    """The student of a run's checkpoint (None: the newest), its adapters merged if it has some."""
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    holding = holding_of(trained.student)
    if holding.lora is None:
        return _restore(run, abstract, step)
    student = make_model(base.config, dtype_of(trained.student), holding)
    saved = _restore(run, abstract_trainable(student, mesh), step)
    # Not in the type it was computed in: what was not trained is given on as it was read.
    frozen = load_params(base, make_model(base.config), mesh, jnp.float32, trained.seed)
    whole = adapters.overlay(frozen, saved)
    del frozen  # `merge` takes the leaves out of the only tree that holds them
    return adapters.merge(whole, holding.lora, jax.tree.leaves(abstract)[0].dtype)


def _restore(run: Path, abstract: Params, step: int | None = None) -> Params:
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.restore_params(abstract, step)
    finally:
        checkpoints.close()


def record_models(config: Config, steps: Mapping[Role, int]) -> None:
    """Writes down which checkpoints of other runs a run is begun with: those may be trained on.

    Args:
        steps: what has been loaded, of the roles whose models come from runs.
    """
    now = {role: {"run": _name_of(config, role), "step": step} for role, step in steps.items()}
    if hosts.is_first() and now != _recorded(config):
        write_json(as_path(config.run_dir) / _MODELS, now)


def recorded_step(config: Config, role: Role) -> int | None:
    """The checkpoint that a role's model is from; None where none of its run was written down."""
    found = _recorded(config).get(role)
    return found["step"] if found is not None and found["run"] == _name_of(config, role) else None


def newest_step(run: Path) -> int | None:
    """The newest checkpoint of a run; None if there is none."""
    if not (absolute(run) / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.latest_step
    finally:
        checkpoints.close()


def _recorded(config: Config) -> dict[Role, Any]:
    file = as_path(config.run_dir) / _MODELS
    return read_json(file) if file.exists() else {}


def _name_of(config: Config, role: Role) -> str:
    """The run that a role's model comes from: one inside the run that it is for by its place there, so that
    both can be moved together."""
    run, here = run_of(config, role), absolute(config.run_dir)
    assert run is not None
    there = absolute(run)
    return str(there.relative_to(here) if there.is_relative_to(here) else there)
