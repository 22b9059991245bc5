"""Whole runs of a tiny model, for tests."""

import json

import jax
import numpy as np
import yaml
from rich.console import Console

from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import load_config, load_run_config
from kdrl_jax.setup import make_setup
from kdrl_jax.train import train

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


def parameters(run_dir):
    config = load_run_config(run_dir)
    checkpoints = Checkpoints(run_dir)
    state, host = checkpoints.restore(make_setup(config).abstract_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.step)), host


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
        files = sorted(p.name for p in (a / folder).iterdir())
        assert files == sorted(p.name for p in (b / folder).iterdir())
        for name in files:
            assert (a / folder / name).read_text() == (b / folder / name).read_text()
