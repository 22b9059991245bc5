"""The first rollouts of a run, and updates on recorded ones, on any mesh and any number of processes."""

import dataclasses

import jax
import numpy as np
import optax
import tiny_runs
from rich.console import Console

from kdrl_jax import hosts
from kdrl_jax.metrics import Clock
from kdrl_jax.rounds import choose
from kdrl_jax.setup import make_setup
from kdrl_jax.sharding import rows
from kdrl_jax.train import Run
from kdrl_jax.types import Rollouts

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SECTIONS = {
    "student": {"architecture": SHAPE},
    "teacher": {"architecture": {**SHAPE, "hidden_size": 64}},
    # Two sources, so that which row is of which is worth telling.
    "data": {
        "train": [tiny_runs.TASK, {**tiny_runs.TASK, "max_value": 5}],
        "eval": [{**tiny_runs.TASK, "split": "heldout"}],
    },
    "rollout": {"group_size": 2, "max_new_tokens": 12},
    "train": {"num_steps": 10, "prompts_per_iteration": 16, "diagnostics_every": 0},
    "reward": {"verifier": "some_reward:variety"},
    "optimizer": {"learning_rate": 0.1, "max_grad_norm": None},
}


def open_run(config, sgd):
    setup = make_setup(config)
    if sgd:
        # The update takes the learning rate itself.
        setup = dataclasses.replace(setup, optimizer=optax.identity())
    return Run(setup, Console(quiet=True), lambda: False, False, config.run_dir)


def record(run):
    """What the first iteration draws, all of it on every process."""
    sampled = run.verify(run.draw(1.0, Clock()), Clock())
    arrays = hosts.whole(
        {f.name: getattr(sampled.rollouts, f.name) for f in dataclasses.fields(sampled.rollouts)}
    )
    rewards, correct = sampled.total_rewards(run.config), sampled.correct_B
    return arrays | {"rewards": rewards, "correct": correct, "sources": np.array(sampled.sources)}


def replay(run, recorded, num):
    """(losses, parameters) of so many updates on recorded rollouts."""
    place = rows(run.setup.mesh)
    fields = {f.name: hosts.spread(recorded[f.name], place) for f in dataclasses.fields(Rollouts)}
    rollouts, sources = Rollouts(**fields), recorded["sources"].tolist()
    chosen = choose(run.config, [Rewarded(rollouts, recorded)], run.setup.mesh)
    scored = run.score(rollouts, sources, 1.0, Clock())
    (minibatch,) = run.minibatches(chosen, *scored, 1.0)
    losses = [float(run.run_update(minibatch)["loss"]) for _ in range(num)]
    leaves = jax.tree_util.tree_leaves_with_path(hosts.whole(run.state.params))
    return np.array(losses), {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class Rewarded:
    """As much of a round as is read where no groups are replaced."""

    def __init__(self, rollouts, recorded):
        self.rollouts, self.correct_B = rollouts, recorded["correct"]
        self.sources, self._rewards = recorded["sources"].tolist(), recorded["rewards"]

    def total_rewards(self, config):
        return self._rewards


def close(found, expected, limit=1e-5):
    """Losses and parameters are the same, to a share of the largest of each array."""
    np.testing.assert_allclose(found[0], expected[0], rtol=limit)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        assert np.abs(found[1][name] - values).max() <= limit * np.abs(values).max(), name
