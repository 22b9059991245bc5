"""The optimizers' states: where they lie, how much they are, that they are saved and parked to the bit."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from test_optim import KINDS, MODEL, PARAMS, after, assert_same, gradients, mesh_of, placed, scaling
from tiny_runs import assert_same_run, run

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import OptimizerConfig, load_run_config
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.optim import make_optimizer
from kdrl_jax.train import Run, train
from kdrl_jax.types import TrainState

P = jax.sharding.PartitionSpec


def bytes_on(device, tree):
    return sum(
        s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device
    )


def expected_bytes(kind, abstract, min_factored):
    """Bytes of moments on each device, from the places of the parameters."""
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(abstract):
        name = path[-1].key
        local, stack = x.sharding.shard_shape(x.shape), x.shape[0] if len(path) > 1 else 1
        size = int(np.prod(local))
        weight = name in ("q", "k", "v", "o", "gate", "up", "down")
        if kind == "adafactor" and (weight or name in ("embed", "head")):
            first = 1 if len(path) > 1 else 0
            last = first + (2 if name == "o" else 1)
            sides = int(np.prod(local[first:last])), int(np.prod(local[last:]))
            assert min(np.prod(x.shape[first:last]), np.prod(x.shape[last:])) >= min_factored
            total += 4 * stack * sum(sides)
        elif kind == "adafactor" or (kind == "muon" and weight and len(path) > 1):
            total += 4 * size
        else:
            total += (4 if kind == "adamw_bf16" else 8) * size
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_moments_lie_with_their_parameters(kind):
    mesh = mesh_of(4, 2)
    factored = 8 if kind == "adafactor" else None
    abstract, optimizer, shardings = placed(MODEL, mesh, kind, factored=factored)
    place = jax.tree.map(lambda x: x.sharding, abstract)
    params, grads = (jax.device_put(x, place) for x in (PARAMS, gradients()))
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    wanted = expected_bytes(kind, abstract, 8)
    whole = expected_bytes(kind, jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), PARAMS), 8)
    # A statistic has one of the mesh's axes, and norms of heads are whole everywhere.
    assert wanted < (0.5 if kind == "adafactor" else 0.3) * whole
    spare = 400  # counts, coefficients and placeholders
    for device in mesh.devices.flat:
        assert wanted <= bytes_on(device, state) <= wanted + spare
    update = jax.jit(optimizer.update, out_shardings=(place, shardings))
    updates, new = update(grads, state, params)
    assert bytes_on(mesh.devices.flat[0], new) <= wanted + spare
    alone, _ = after(
        scaling(kind) if factored else make_optimizer(OptimizerConfig(kind=kind), MODEL.dims),
        PARAMS,
        [gradients()],
    )
    assert_same(updates, alone, functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4))


def test_factored_statistics_lie_as_the_dimensions_they_keep():
    _, _, shardings = placed(MODEL, mesh_of(4, 2), "adafactor", factored=8)
    found = {
        (field, name): getattr(shardings, field)["layers"][room][name].spec
        for field in ("v_row", "v_col", "v")
        for room, name in (("attn", "q"), ("attn", "k"), ("attn", "o"), ("attn", "q_bias"), ("mlp", "up"))
    }
    rows, columns = P(None, "fsdp"), P(None, "tensor")
    assert found["v_row", "q"] == rows  # 16 by 16
    assert found["v_col", "q"] == columns
    assert found["v_row", "o"] == columns  # its heads are its rows
    assert found["v_col", "o"] == rows
    assert found["v_row", "k"] == columns  # 16 by 8: the smaller side first
    assert found["v_col", "k"] == rows
    assert found["v_row", "up"] == rows  # 16 by 20
    assert found["v", "q_bias"] == columns
    assert found["v", "q"] == P()
    assert shardings.v_row["embed"].spec == P("fsdp")  # 24 by 16
    assert shardings.v_col["embed"].spec == P("tensor")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_state_to_the_bit(kind, tmp_path):
    mesh = mesh_of(4, 2)
    abstract, optimizer, shardings = placed(MODEL, mesh, kind, factored=8 if kind == "adafactor" else None)
    place = jax.tree.map(lambda x: x.sharding, abstract)
    params, grads = (jax.device_put(x, place) for x in (PARAMS, gradients()))
    _, opt_state = jax.jit(optimizer.update)(
        grads, jax.jit(optimizer.init, out_shardings=shardings)(params), params
    )
    opt_state = jax.device_put(opt_state, shardings)
    counters = jax.device_put(TrainState.first({}, {}), sharding.replicated(mesh))
    state = dataclasses.replace(counters, params=params, opt_state=opt_state)
    checkpoints = Checkpoints(tmp_path, write=True)
    # Saved from the hosts' memory, as with train.park_optimizer.
    parked = dataclasses.replace(state, opt_state=sharding.move(opt_state, "pinned_host"))
    checkpoints.save(1, parked, {})
    checkpoints.wait()
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found, _, _ = checkpoints.restore(described)
    checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_same(found, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding
        assert a.dtype == b.dtype


SECTIONS = {"train": {"num_minibatches": 2, "num_steps": 6}, "eval": {"every": 0, "num_samples": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_parked_and_interrupted_run_is_the_same_run(kind, tmp_path, monkeypatch):
    """Of six updates, two an iteration; the second run is stopped after the first iteration, and has its
    state in the hosts' memory."""
    sections = {**SECTIONS, "optimizer": {"kind": kind}}
    _, done = run(tmp_path, "plain", **sections)
    assert done
    seen = []

    def watched(stage):
        method = getattr(Run, stage)

        def call(self, *args):
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(self.state.opt_state)}
            seen.append((stage, *kinds))
            return method(self, *args)

        monkeypatch.setattr(Run, stage, call)

    for stage in ("draw", "evaluate", "minibatches", "run_update", "save"):
        watched(stage)
    log = tmp_path / "parked" / "metrics.jsonl"
    parked = {**sections, "train": {**SECTIONS["train"], "park_optimizer": True}}
    _, done = run(tmp_path, "parked", lambda: log.exists() and log.read_text().count("\n") > 1, **parked)
    assert not done
    assert train(load_run_config(tmp_path / "parked"), Console(quiet=True), lambda: False)
    assert_same_run(tmp_path / "plain", tmp_path / "parked")
    assert {stage for stage, *_ in seen} == {"draw", "evaluate", "minibatches", "run_update", "save"}
    for stage, *where in seen:
        assert where == ["device" if stage == "run_update" else "pinned_host"], stage
    assert json.loads(log.read_text().splitlines()[-1])["time/compiles"] == 0  # moving it is no new program


PUBLISHED = {
    "Qwen2.5-1.5B": DecoderConfig(151_936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True, tie_embeddings=True),
    "Qwen2.5-7B": DecoderConfig(152_064, 3584, 18_944, 28, 28, 4, 128, qkv_bias=True),
}


def bytes_per_parameter(shape, kind):
    model = make_model(shape)
    abstract = model.abstract()
    state = jax.eval_shape(make_optimizer(OptimizerConfig(kind=kind), model.dims).init, abstract)
    count = sum(x.size for x in jax.tree.leaves(abstract))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / count


def test_the_documents_table_of_memory():
    text = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): [float(cell) for cell in row[-2:]] for row in rows}
    assert tuple(table) == KINDS
    for kind, written in table.items():
        measured = [bytes_per_parameter(shape, kind) for shape in PUBLISHED.values()]
        np.testing.assert_allclose(written, measured, atol=0.006, err_msg=kind)
