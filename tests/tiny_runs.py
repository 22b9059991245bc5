"""Whole runs of a tiny model, for tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import load_config, load_run_config
from kdrl_jax.setup import make_setup
from kdrl_jax.train import train
from kdrl_jax.types import TrainState

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TASK = {"kind": "task", "task": "chain_sum", "max_terms": 3}
TREE = {
    "name": "tiny",
    "student": {"architecture": SHAPE},
    "teacher": {"architecture": {**SHAPE, "hidden_size": 32}},
    "tokenizer": {"kind": "char"},
    "data": {"train": [TASK], "eval": [{**TASK, "split": "heldout"}], "max_prompt_tokens": 6},
    "rollout": {"group_size": 2, "max_new_tokens": 10, "decode_chunk": 4},
    "reward": {"shaping": {"format": 0.1}, "num_workers": 1},
    "kd": {"coef": {"kind": "max_linear", "a": 1.0, "b": 0.1, "c": 0.5}},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"num_steps": 4, "prompts_per_iteration": 8, "diagnostics_every": 2},
    "eval": {"every": 2, "num_prompts": 8, "num_samples": 2, "agreement": True},
    "checkpoint": {"every": 2},
    "log": {"rollouts_every": 2},
}
# Wall-clock readings; everything else of a resumed run must be the same.
TIMES = ("time/", "tokens_per_second")


def config_file(folder, **sections):
    tree = json.loads(json.dumps(TREE))
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "config_in.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(folder, name, should_stop=lambda: False, overrides=(), **sections):
    config = load_config(config_file(folder, **sections), [f"log.dir={folder / name}", *overrides])
    return config, train(config, Console(quiet=True), should_stop)


def numbers(results):
    """The numbers of an evaluation, flat, for `pytest.approx`, which looks into no lists."""
    results = {k: v for k, v in results.items() if not isinstance(v, str)}
    lists = {k: v for k, v in results.items() if isinstance(v, list)}
    ends = {f"{k}[{i}]": x for k, v in lists.items() for i, x in enumerate(v)}
    return {k: v for k, v in results.items() if k not in lists} | ends


def parameters(run_dir):
    config = load_run_config(run_dir)
    checkpoints = Checkpoints(run_dir)
    state, host, _ = checkpoints.restore(make_setup(config).abstract_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.step)), host["run"]


def metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    (ours, host), (theirs, other) = parameters(a), parameters(b)
    assert host == other
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(x, y)
    for folder in ("eval", "rollouts"):
        files, others = (
            sorted(str(p.relative_to(d / folder)) for p in (d / folder).rglob("*.json*")) for d in (a, b)
        )
        assert files == others
        for name in files:
            assert (a / folder / name).read_text() == (b / folder / name).read_text()


def small_state(value=0.0):
    """A state of a few arrays over 8 devices, which is saved and read in no time."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    leaf = jax.device_put(jnp.full((64, 256), value), place)
    state = TrainState.first({"w": leaf}, {"m": leaf + 1})
    everywhere = sharding.replicated(mesh)
    counters = jax.device_put(dataclasses.replace(state, params={}, opt_state={}), everywhere)
    return dataclasses.replace(counters, params=state.params, opt_state=state.opt_state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
