"""NaN in the loss of a whole run: skipped, counted, kept aside; in every step, the run stops and says so."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import config_file, metrics, run

from kdrl_jax.main import main
from kdrl_jax.record import SKIPPED_KEPT

train_module = sys.modules["kdrl_jax.train"]


@pytest.fixture
def poison(monkeypatch):
    """Lets the advantages of some steps be NaN, and with them the loss and the gradient."""
    make_update = train_module.make_update

    def set_steps(is_bad):
        def poisoned(objective, optimizer):
            update = make_update(objective, optimizer)

            def bad_update(state, frozen, minibatch, heads):
                factor = jnp.where(is_bad(state.step), jnp.nan, 1.0)
                batch = minibatch.batch
                batch = dataclasses.replace(batch, advantages_B=batch.advantages_B * factor)
                return update(state, frozen, dataclasses.replace(minibatch, batch=batch), heads)

            return bad_update

        monkeypatch.setattr(train_module, "make_update", poisoned)

    return set_steps


def test_one_bad_step_is_skipped_counted_and_kept_aside(tmp_path, poison, capsys):
    poison(lambda step: step == 1)
    _, done = run(tmp_path, "run")
    assert done
    rows = metrics(tmp_path / "run")
    assert [r["skipped_updates"] for r in rows] == [0, 1, 1, 1]
    assert [r["loss"] is None for r in rows] == [False, True, False, False]
    aside = tmp_path / "run" / "skipped"
    assert sorted(p.name for p in aside.iterdir()) == ["step_000001.jsonl", "step_000001.npz"]
    with np.load(aside / "step_000001.npz") as arrays:
        assert {"advantages_B", "completion_mask_BT", "rows/tokens_RT"} <= set(arrays)
        assert arrays["advantages_B"].shape == (16,)
    texts = [json.loads(line) for line in (aside / "step_000001.jsonl").open()]
    assert len(texts) == 16
    assert {"question", "completion", "reward"} <= set(texts[0])


def test_a_step_skipped_is_as_if_nothing_was_learnt_from_it(tmp_path, poison):
    """The step after it samples with the parameters from before."""
    poison(lambda step: step == 0)
    run(tmp_path, "run", train={"num_steps": 2})
    first, second = metrics(tmp_path / "run")
    assert first["grad_norm"] is None
    assert np.isfinite(second["loss"])
    assert second["sampler/logprob_gap"] < 1e-4


def test_an_update_that_is_no_number_is_left_out_whatever_its_gradient(tmp_path, monkeypatch):
    """As 0 / 0 of an optimizer's moments."""
    make_update = train_module.make_update

    def bad(objective, optimizer):
        def update(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return jax.tree.map(lambda x: x * jnp.nan, updates), state

        return make_update(objective, optax.GradientTransformation(optimizer.init, update))

    monkeypatch.setattr(train_module, "make_update", bad)
    run(tmp_path, "run", train={"num_steps": 2})
    rows = metrics(tmp_path / "run")
    assert [row["skipped_updates"] for row in rows] == [1, 2]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows)
    assert rows[1]["sampler/logprob_gap"] < 1e-4


def test_bad_steps_in_a_row_stop_the_run_with_an_explanation(tmp_path, poison, capfd):
    poison(lambda step: step >= 2)
    path = config_file(tmp_path, train={"num_steps": 40, "max_skipped_updates": 12}, eval={"every": 0})
    argv = ["--config", str(path), f"log.dir={tmp_path / 'run'}"]
    assert main(argv) == 1
    said = capfd.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("error: 12 updates in a row were skipped (step 13: loss nan")
    for part in ("train.max_skipped_updates=12", "checkpoint is of step", "optimizer.learning_rate"):
        assert part in line
    assert "Traceback" not in said.err
    assert "update 1 in a row that is skipped" in " ".join(said.out.split())
    assert len(list((tmp_path / "run" / "skipped").glob("*.npz"))) == SKIPPED_KEPT
    # Started again it is where it was, and says the same.
    assert main(argv) == 1
    assert "12 updates in a row" in capfd.readouterr().err
