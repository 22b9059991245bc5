"""Checkpoints: what is kept, what is damaged and never used, and arrays written while training goes on."""

import json
import os
import random
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization
from tiny_runs import abstract, assert_same_run, metrics, run, small_state

from kdrl_jax.checkpoint import Checkpoints, Keep
from kdrl_jax.checkpoint.fingerprint import fingerprints
from kdrl_jax.checkpoint.store import UNREADABLE
from kdrl_jax.config import load_run_config
from kdrl_jax.main import main
from kdrl_jax.record import _complete
from kdrl_jax.setup import make_setup

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32, jnp.bool_)


def random_tree(seed=0):
    draw = np.random.default_rng(seed)
    return {str(np.dtype(d)): jnp.asarray(draw.normal(size=(8, 3, 16)) * 3, d) for d in DTYPES}


def test_a_fingerprint_is_of_bits_not_of_places():
    tree = random_tree()
    marks = fingerprints(tree)
    assert len(set(marks.values())) == len(DTYPES)
    assert all(len(mark) == 16 for mark in marks.values())
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (PartitionSpec("a"), PartitionSpec("b", None, "a"), PartitionSpec(None, None, ("a", "b"))):
        placed = jax.device_put(tree, NamedSharding(mesh, spec))
        assert fingerprints(placed) == marks
    parked = jax.device_put(tree, NamedSharding(mesh, PartitionSpec("a"), memory_kind="pinned_host"))
    assert fingerprints(parked) == marks
    reshaped = fingerprints({"float32": tree["float32"].reshape(8, 48)})
    assert reshaped["float32"] == marks["float32"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(np.dtype(d)))
def test_every_flipped_bit_and_every_swap_shows(dtype):
    draw = random.Random(3)
    values = np.array(random_tree()[str(np.dtype(dtype))])
    before = fingerprints([jnp.asarray(values)])
    for _ in range(64):
        changed = values.copy()
        raw = changed.view(np.uint8).reshape(-1)
        if dtype == jnp.bool_:
            raw[draw.randrange(raw.size)] ^= 1
        else:
            raw[draw.randrange(raw.size)] ^= 1 << draw.randrange(8)
        assert fingerprints([jnp.asarray(changed)]) != before
        flat = values.reshape(-1).copy()
        i, j = draw.sample(range(flat.size), 2)
        if flat[i] != flat[j]:
            flat[i], flat[j] = flat[j], flat[i]
            assert fingerprints([jnp.asarray(flat.reshape(values.shape))]) != before
    assert fingerprints([jnp.asarray(values.reshape(-1)[:-1])]) != before


def test_what_is_kept():
    accuracies = {10: 0.5, 20: 0.9, 30: 0.9, 50: 0.1}
    steps = [10, 20, 25, 30, 40, 50]
    assert Keep(last=2)(steps, accuracies) == {40, 50}
    assert Keep(last=1, every=20)(steps, accuracies) == {20, 40, 50}
    assert Keep(last=1, best=1)(steps, accuracies) == {30, 50}
    assert Keep(last=1, best=3)(steps, accuracies) == {10, 20, 30, 50}
    assert Keep(last=9)(steps, {}) == set(steps)
    assert Keep(last=2)([], {}) == set()


def test_what_is_kept_on_disk(tmp_path):
    with_keep = Checkpoints(tmp_path, keep=Keep(last=1, every=4, best=1), write=True)
    for step in range(1, 8):
        with_keep.save(step, small_state(step), {})
        with_keep.accuracies[step] = 0.9 if step == 3 else 0.1
    with_keep.wait()
    assert with_keep.steps == [3, 4, 7]
    with_keep.close()
    # Known again from outside when the run goes on.
    again = Checkpoints(tmp_path, keep=Keep(last=1, best=1), write=True)
    again.accuracies |= {3: 0.9, 4: 0.1, 7: 0.1}
    again.save(8, small_state(8), {})
    again.close()
    assert Checkpoints(tmp_path).steps == [3, 8]


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    """Forty updates in place right after the save: what is on disk is what was saved."""
    step_on = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    state, checkpoints = small_state(), Checkpoints(tmp_path, write=True)
    for number in range(1, 11):
        wanted = jax.tree.map(np.array, state)
        layout = abstract(state)
        checkpoints.save(number, state, {"number": number})
        for _ in range(40):
            state = step_on(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        found, host, notes = checkpoints.restore(layout)
        assert (host, notes) == ({"number": number}, [])
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    checkpoints.close()


def test_parameters_are_cast_after_they_were_checked(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, write=True), small_state(1 / 3)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state.params
    )
    found = checkpoints.restore_params(layout)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"], state.params["w"].astype(jnp.bfloat16))
    assert found["w"].sharding == state.params["w"].sharding


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, and not yet complete; and one left alone."""
    folder = tmp_path_factory.mktemp("damaged")
    _, done = run(folder, "whole", train={"num_steps": 6})
    assert done
    run(folder, "part", train={"num_steps": 4})
    (folder / "part" / "done.json").unlink()
    assert Checkpoints(folder / "part").steps == [2, 4]
    return folder


def data_files(step):
    """The largest file in each place that holds arrays: as each process wrote them, and merged."""
    places = [p for p in step.rglob("d") if p.is_dir()]
    assert len(places) == 4
    return [max(place.iterdir(), key=lambda p: p.stat().st_size) for place in places]


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 4
    file.write_bytes(bytes(content))


def of_another(step):
    """Arrays of the checkpoint before: each file by itself is in order."""
    for name in ("params", "rest"):
        shutil.rmtree(step / name)
        shutil.copytree(step.parent / "2" / name, step / name)


def in_json(step, old, new):
    file = step / "host" / "metadata"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


DAMAGE = {
    "an array's file cut off": lambda step: [truncate(p) for p in data_files(step)],
    "an array's file empty": lambda step: [p.write_bytes(b"") for p in data_files(step)],
    "an array's file gone": lambda step: [p.unlink() for p in data_files(step)],
    "a bit flipped in an array": lambda step: [flip(p) for p in data_files(step)],
    "a bit flipped at an array's end": lambda step: [flip(p, 0.95) for p in data_files(step)],
    "the arrays of another checkpoint": of_another,
    "the parameters gone": lambda step: shutil.rmtree(step / "params"),
    "the optimizer's metadata cut off": lambda step: truncate(step / "rest" / "_METADATA"),
    "an index of arrays flipped": lambda step: [flip(p) for p in step.rglob("manifest.ocdbt")],
    "what the host kept cut off": lambda step: truncate(step / "host" / "metadata"),
    "what the host kept gone": lambda step: shutil.rmtree(step / "host"),
    "the position in the data changed": lambda step: in_json(step, '"drawn": 32', '"drawn": 16'),
    "all of it gone": lambda step: [p.unlink() for p in step.rglob("*") if p.is_file()],
}


OFTEN = {
    "a bit flipped in an array",
    "the arrays of another checkpoint",
    "the optimizer's metadata cut off",
    "the position in the data changed",
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(f, id=name, marks=() if name in OFTEN else pytest.mark.slow) for name, f in DAMAGE.items()],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(stopped, tmp_path, damage, capfd):
    shutil.copytree(stopped / "part", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints"
    damage(place / "4")
    argv = ["--config", str(tmp_path / "run"), "train.num_steps=6"]
    assert main(argv) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "checkpoint 4 cannot be read" in said
    assert "resumed at step 2 of 6" in said
    assert [p.name for p in (place / UNREADABLE).iterdir()] == ["4"]
    assert metrics(tmp_path / "run") == metrics(stopped / "whole")
    shutil.rmtree(place / UNREADABLE)
    assert_same_run(tmp_path / "run", stopped / "whole")


def test_with_no_checkpoint_that_can_be_read_nothing_begins_anew(stopped, tmp_path, capfd):
    shutil.copytree(stopped / "part", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints"
    for step in ("2", "4"):
        for file in data_files(place / step):
            truncate(file)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        assert main(["--config", str(tmp_path / "run"), "train.num_steps=6"]) == 1
        said = capfd.readouterr().err
        assert "no checkpoint can be read (4: " in said
        assert "; 2: " in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert sorted(p.name for p in place.iterdir()) == ["2", "4"]
    place.rename(tmp_path / "elsewhere")
    assert main(["--config", str(tmp_path / "run"), "train.num_steps=6"]) == 0
    assert_same_run(tmp_path / "run", stopped / "whole")


def test_a_damaged_checkpoint_is_never_evaluated_nor_moved_by_who_only_reads(stopped, tmp_path, capfd):
    shutil.copytree(stopped / "part", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "4"
    for file in data_files(step):
        flip(file)
    for command in ("eval", "sample prompt=1+1", f"export out={tmp_path / 'out'}"):
        assert main([*command.split(), "--config", str(tmp_path / "run")]) == 2
        assert "checkpoints/4 is damaged" in capfd.readouterr().err
    assert step.is_dir()
    assert main(["sample", "prompt=1+1", "step=2", "--config", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_what_is_damaged_twice_is_set_aside_twice(stopped, tmp_path, capfd):
    shutil.copytree(stopped / "part", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints"
    for _ in range(2):
        for file in data_files(place / "4"):
            flip(file)
        (tmp_path / "run" / "done.json").unlink(missing_ok=True)
        assert main(["--config", str(tmp_path / "run")]) == 0
        assert "checkpoint 4 cannot be read" in " ".join(capfd.readouterr().out.split())
    assert sorted(p.name for p in (place / UNREADABLE).iterdir()) == ["4", "4.1"]


def test_a_write_that_fails_is_done_again(tmp_path, monkeypatch):
    """A disk that fails once costs nothing; one that goes on failing is told."""
    checkpoints, state = Checkpoints(tmp_path, write=True), small_state(1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    write = serialization.async_serialize_from_host
    bad, has_raised = [True], threading.Event()

    async def fails(*args, **options):
        if bad[0]:
            has_raised.set()
            raise OSError(28, "No space left on device")
        return await write(*args, **options)

    monkeypatch.setattr(serialization, "async_serialize_from_host", fails)
    assert not checkpoints.has_failed()
    checkpoints.save(2, state, {})
    deadline = time.monotonic() + 30
    while not checkpoints.has_failed():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert checkpoints.latest_step == 1
    has_raised.clear()
    checkpoints.save(3, state, {})
    assert has_raised.wait(30)
    bad[0] = False
    checkpoints.save(4, state, {})
    assert checkpoints.steps == [1, 4]
    bad[0] = True
    checkpoints.save(5, state, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(6, state, {})
    assert checkpoints.steps == [1, 4]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), ValueError("UNAVAILABLE: connection reset")]
)
def test_a_place_out_of_reach_is_neither_damage_nor_a_mistake(stopped, tmp_path, monkeypatch, capfd, error):
    """Nothing is set aside because a disk or a bucket does not answer, and another try may do."""
    shutil.copytree(stopped / "part", tmp_path / "run")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    assert main(["--config", str(tmp_path / "run"), "train.num_steps=6"]) == 1
    assert "checkpoints/4 cannot be reached: " in capfd.readouterr().err
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps == [2, 4]
    assert not (checkpoints.directory / UNREADABLE).exists()
    checkpoints.close()


def test_other_settings_are_not_damage(stopped):
    config = load_run_config(stopped / "part", ["student.architecture.hidden_size=32"])
    checkpoints = Checkpoints(stopped / "part")
    with pytest.raises(ValueError, match=r"is .* there, and .* here"):
        checkpoints.restore(make_setup(config).abstract_state())
    assert checkpoints.steps == [2, 4]
    checkpoints.close()


def test_changed_settings_are_named_refused_and_accepted(stopped, tmp_path, capfd):
    shutil.copytree(stopped / "part", tmp_path / "run")
    where = ["--config", str(tmp_path / "run")]
    assert main([*where, "train.num_steps=6", "kd.coef=0.5", "train.head_chunk=7"]) == 2
    said = capfd.readouterr().err
    assert "kd.coef.kind was 'max_linear', is 'constant'" in said
    assert "--accept-changes" in said
    assert "head_chunk" not in said  # changes no update
    assert not (tmp_path / "run" / "changes.jsonl").exists()
    assert main([*where, "train.num_steps=6", "kd.coef=0.5", "train.head_chunk=7", "--accept-changes"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "from step 4 on kd.coef.kind was" in said
    assert "from step 4 on train.head_chunk was 320, is 7" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").open()]
    assert {"train.num_steps", "train.head_chunk"} < {row["key"] for row in rows}
    assert {row["step"] for row in rows} == {4}
    assert [m["kd/coef"] for m in metrics(tmp_path / "run")][-2:] == [0.5, 0.5]
    # What was accepted once, at this checkpoint, need not be again.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "done.json").unlink()
    assert main(where) == 0
    assert len((tmp_path / "run" / "changes.jsonl").read_text().splitlines()) == len(rows)


def test_a_setting_that_there_was_none_of_is_no_change(stopped):
    config = load_run_config(stopped / "part").model_dump(mode="json")
    before = json.loads(json.dumps(config))
    del before["alarms"], before["train"]["spike_sigmas"], before["kd"]["bound"]
    assert _complete(before) == config
    assert _complete({"name": "x"}) == {"name": "x"}


def test_only_training_changes_a_run(capfd):
    assert main(["eval", "--config", "nowhere", "--accept-changes"]) == 2
    assert "--accept-changes is about training" in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_with_room(stopped, small_disk, capfd):
    where, ballast = small_disk / "run", small_disk / "ballast"
    shutil.copytree(stopped / "part", where)
    argv = ["--config", str(where), "train.num_steps=6"]
    room = os.statvfs(small_disk)
    # Room for lines of metrics, and not for another checkpoint.
    size = sum(p.stat().st_size for p in (where / "checkpoints" / "4").rglob("*"))
    ballast.write_bytes(b"x" * (room.f_bavail * room.f_frsize - size // 2))
    assert main(argv) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "No space left" in said or "RESOURCE_EXHAUSTED" in said
    assert Checkpoints(where).latest_step in (4, 2)
    ballast.unlink()
    assert main(argv) == 0
    assert_same_run(where, stopped / "whole")
