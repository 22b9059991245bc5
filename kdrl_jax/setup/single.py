"""One model of a config, for commands that need no other."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.config import Config
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.models.block import Holding
from kdrl_jax.models.decoder import Model, make_model
from kdrl_jax.models.load import ModelSource
from kdrl_jax.pairing import Side, compare
from kdrl_jax.paths import as_path
from kdrl_jax.runs import Role, model_of, roles
from kdrl_jax.setup.finder import Finder, choose_tokenizer
from kdrl_jax.setup.parameters import abstract_params, dtype_of, load_params, load_run
from kdrl_jax.types import Params


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
        return self.restore(as_path(run_dir), step)


def make_single(config: Config, role: Role) -> SingleModel:
    """Finds and checks one model of a config; of the other, at most the tokenizer is read.

    Raises:
        ValueError, FileNotFoundError: one line naming what does not fit and what to do.
    """
    if role not in roles(config):
        raise ValueError(
            f"the config has no {role} (it has {', '.join(roles(config))}); add a {role} section"
        )
    mesh = sharding.make_mesh(config.mesh)
    finder = Finder()
    own: dict[Role, Tokenizer | None] = {}
    if config.tokenizer.kind == "model":
        own["student"] = finder.own_tokenizer(config, "student")
        if own["student"] is None:
            own |= {teacher: finder.own_tokenizer(config, teacher) for teacher in config.all_teachers}
    tokenizer = choose_tokenizer(config, finder, own)
    found = finder.find(config, role, tokenizer.vocab_size)
    mine = finder.own_tokenizer(config, role)
    sides = [Side(role, found.config, mine)]
    chat = config.tokenizer.chat_template
    pairing = compare(tokenizer, sides, same_end=False, longest=0, chat=chat).require()
    described = model_of(config, role)
    compute_dtype = dtype_of(described)
    # Adapters begin as no change, and are merged where they were trained.
    model = make_model(found.config, compute_dtype, Holding(int8=described.weights == "int8"))
    dtype = jnp.float32 if role == "student" else compute_dtype
    return SingleModel(
        mesh=mesh,
        tokenizer=tokenizer,
        num_tokens=pairing.num_tokens,
        model=model,
        source=found.source,
        start=lambda: load_params(found, model, mesh, dtype, config.seed),
        restore=lambda run, step: load_run(run, config, found, abstract_params(model, mesh, dtype), step),
    )
