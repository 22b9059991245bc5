"""One run on any mesh: the same updates, each device with its share, and checkpoints that any other reads."""

import math
import shutil

import jax
import job
import numpy as np
import pytest
import replay
import tiny_runs
from plan_programs import TPU

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import MeshConfig, load_config, load_run_config
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.setup import make_setup

UPDATES = 10
MESHES = {
    "fsdp=8": {"fsdp": 8},
    "fsdp=4,tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
ADAMW = {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 1.0}}


@pytest.fixture(scope="module", autouse=True)
def _reward():
    """Workers import it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(job.HERE))
        yield


def open_run(folder, mesh, **sections):
    folder.mkdir()
    tree = {**replay.SECTIONS, **ADAMW, "mesh": mesh, "log": {"dir": str(folder / "run")}, **sections}
    config = load_config(tiny_runs.config_file(folder, **tree))
    return replay.open_run(config, sgd=False)


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """(recorded rollouts, (losses, parameters)) of data=8: whole parameters on every device."""
    folder = tmp_path_factory.mktemp("meshes") / "data"
    with open_run(folder, {"data": 8, "fsdp": 1}) as run:
        recorded = replay.record(run)
        return recorded, replay.replay(run, recorded, UPDATES)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_meshes_give_the_same_losses(tmp_path, on_eight, mesh):
    recorded, (losses, _) = on_eight
    with open_run(tmp_path / "mesh", mesh) as run:
        found, _ = replay.replay(run, recorded, UPDATES)
        check_shares(run.state.params, mesh)
        moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(run.state.params))
        check_shares(moments, mesh)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert np.ptp(losses) > 0.01 * np.abs(losses).max(), "the updates change something"


def check_shares(tree, mesh):
    """Each device has its part of every matrix, and of all together."""
    parts = mesh["fsdp"] * mesh.get("tensor", 1)
    on_device = dict.fromkeys(jax.devices(), 0)
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        total += x.nbytes
        for shard in x.addressable_shards:
            on_device[shard.device] += shard.data.nbytes
        if math.prod(x.shape[-2:]) >= 32 * 16 and x.ndim > 1 and "norm" not in str(path):
            assert x.addressable_shards[0].data.size <= x.size / mesh["fsdp"], path
    assert len(on_device) == 8
    # Vectors, and what 2 devices of `tensor` cannot divide, are a few hundredths.
    assert max(on_device.values()) <= 1.1 * total / parts
    assert max(on_device.values()) == min(on_device.values())


# ---- Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on eight devices that was stopped after two of four steps, and the whole of it."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"eval": {"every": 0, "agreement": False, "num_samples": 0}, "log": {"rollouts_every": 0}}
    _, done = tiny_runs.run(folder, "whole", **settings, train={"num_steps": 4, "prompts_per_iteration": 16})
    assert done
    _, done = tiny_runs.run(folder, "half", **settings, train={"num_steps": 2, "prompts_per_iteration": 16})
    assert done
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "devices", "mesh"),
    [(1, 4, {}), (1, 16, {}), (1, 1, {}), (2, 2, {"tensor": 2})],
    ids=["four", "sixteen", "one", "two hosts"],
)
def test_a_run_goes_on_on_another_mesh(saved, tmp_path, num, devices, mesh):
    run = tmp_path / "run"
    shutil.copytree(saved / "half", run)
    overrides = ["train.num_steps=4", *(f"mesh.{axis}={size}" for axis, size in mesh.items())]
    with job.train(run, tmp_path, *overrides, num=num, devices=devices) as started:
        assert started.wait() == [0] * num, started.said()
        assert "resumed at step 2 of 4" in started.said(0)
    found, whole = tiny_runs.metrics(run), tiny_runs.metrics(saved / "whole")
    for name in ("loss", "reward/mean", "completion/length_mean", "kd/reverse_kl", "grad_norm"):
        np.testing.assert_allclose([m[name] for m in found], [m[name] for m in whole], rtol=1e-4)
    expected, _ = parameters(saved / "whole")
    after, _ = parameters(run)
    for x, y in zip(after, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def parameters(run_dir):
    """(leaves of parameters, leaves of the optimizer's state), read on this process's eight devices."""
    checkpoints = Checkpoints(run_dir)
    config = load_run_config(run_dir, ["mesh={data: 1, fsdp: -1, tensor: 1}"])
    state, _, _ = checkpoints.restore(make_setup(config).abstract_state())
    checkpoints.close()
    return [[np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (state.params, state.opt_state)]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_what_is_saved_is_read_bitwise_on_any_mesh(saved, mesh):
    abstract = make_setup(load_run_config(saved / "half")).abstract_state()
    other = make_setup(load_run_config(saved / "half", [f"mesh={mesh}"])).abstract_state()
    checkpoints = Checkpoints(saved / "half")
    for x, y in zip(
        *(jax.tree.leaves(checkpoints.restore(a)) for a in (abstract, other)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    checkpoints.close()


# ---- Meshes


def test_what_is_left_is_filled_in():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mesh data=3 x fsdp=-1 x tensor=1 does not fit 8 devices"):
        sharding.make_mesh(MeshConfig(data=3), jax.devices()[:8])


@TPU
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v6e:4x4", {"tensor": 2}),
        ("v6e:4x4", {"data": 2}),
        ("v5p:4x4x4", {"tensor": 2}),
        ("v4:2x2x4", {"data": 2, "tensor": 2}),
        ("v5e:4x4", {"tensor": 2}),
    ],
)
def test_an_axis_may_be_part_of_one_of_the_torus(topology, mesh):
    """And `tensor` lies on neighbours."""
    devices = sharding.make_mesh(MeshConfig(**mesh), make_topology(topology)[1]).devices
    assert devices.shape == (mesh.get("data", 1), devices.shape[1], mesh.get("tensor", 1))
    assert len(set(devices.flat)) == devices.size
    for row in devices.reshape(-1, devices.shape[-1]):
        places = np.array([device.coords for device in row])
        assert (np.abs(np.diff(places, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (2, None),
        (4, "mesh.tensor=4 does not divide its 2 heads of keys and values"),
        (8, "mesh.tensor=8 does not divide its 4 heads"),
    ],
)
def test_heads_that_do_not_divide_are_said(tmp_path, tensor, said):
    tree = {**replay.SECTIONS, "mesh": {"tensor": tensor}}
    notes = make_setup(load_config(tiny_runs.config_file(tmp_path, **tree))).notes
    expected = [f"{role}: {said}" for role in ("student", "teacher")] if said else []
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True))
