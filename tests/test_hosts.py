"""Jobs of several processes do what one process does, and end as one."""

import json
import os
import re
import signal
import time

import fsspec
import job
import numpy as np
import pytest
import replay
import test_remote
import tiny_runs
import yaml

bucket = test_remote.bucket  # a fixture
UPDATES = 3


def replayed(folder, name, *, num, devices, recorded=None, **sections):
    """What `replay_worker` finds in a job of so many processes: (recorded, (losses, parameters))."""
    folder.mkdir(exist_ok=True)
    config = tiny_runs.config_file(
        folder, **{**replay.SECTIONS, **sections}, log={"dir": str(folder / name)}, eval={"every": 0}
    )
    address, out = job.free_address(), folder / f"{name}.npz"
    worker = str(job.HERE / "replay_worker.py")
    common = [worker, str(config), str(recorded or "-"), str(out), address, str(num)]
    with job.Job([[*common, str(i), str(devices), str(UPDATES)] for i in range(num)], folder) as started:
        assert started.wait() == [0] * num, started.said()
    found = dict(np.load(out))
    parts = {
        kind: {k.removeprefix(kind): x for k, x in found.items() if k.startswith(kind)}
        for kind in ("recorded/", "params/")
    }
    return parts["recorded/"], (found["losses"], parts["params/"]), out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices."""
    return replayed(tmp_path_factory.mktemp("alone"), "alone", num=1, devices=4)


def compare(found, expected):
    recorded, after, _ = found
    wanted, expected_after, _ = expected
    for name in ("tokens_BT", "prompt_lengths_B", "completion_lengths_B", "ended_B", "rewards", "correct"):
        np.testing.assert_array_equal(recorded[name], wanted[name])
    np.testing.assert_array_equal(recorded["sources"], wanted["sources"])
    replay.close(after, expected_after)


def save_recorded(found, path):
    np.savez(path, **found[0])
    return path


@pytest.mark.parametrize(
    "tensor",
    [1, pytest.param(4, marks=pytest.mark.slow)],
    ids=["rows over hosts", "tensor over hosts"],
)
def test_two_processes_are_one(tmp_path, alone, tensor):
    given = save_recorded(alone, tmp_path / "recorded.npz")
    found = replayed(tmp_path, "two", num=2, devices=2, recorded=given, mesh={"tensor": tensor})
    compare(found, alone)


def test_updates_have_something_to_go_by(alone):
    """Or the comparison above would hold of anything."""
    recorded, (losses, _), _ = alone
    assert np.ptp(losses) > 1e-3 * np.abs(losses).max()
    assert 0 < recorded["correct"].mean() < 1


@pytest.mark.slow
def test_four_processes_are_one(tmp_path):
    alone = replayed(tmp_path, "alone", num=1, devices=8)
    given = save_recorded(alone, tmp_path / "recorded.npz")
    compare(replayed(tmp_path, "four", num=4, devices=2, recorded=given), alone)


EVERYTHING = {
    "student": {"architecture": replay.SHAPE, "lora": {"rank": 2}},
    "teachers": {
        "small": {"architecture": replay.SHAPE},
        "large": {"architecture": {**replay.SHAPE, "hidden_size": 64}},
    },
    "teacher": None,
    "data": {
        "train": [
            {**tiny_runs.TASK, "teacher": "small"},
            {**tiny_runs.TASK, "max_value": 5, "teacher": "large"},
        ],
        "eval": [{**tiny_runs.TASK, "split": "heldout"}],
    },
    "rollout": {"group_size": 2, "max_new_tokens": 12, "stop": ["7", "+3"]},
    "reward": {"verifier": "some_reward:variety", "overlong_buffer": 4},
    "rl": {"resample_rounds": 1},
    "kd": {"estimator": "full"},
    "train": {"num_steps": 4, "num_minibatches": 2, "num_epochs": 2, "park_optimizer": True},
    "eval": {"every": 0, "agreement": False, "num_prompts": 5},
}


@pytest.mark.slow
def test_everything_that_hosts_tell_each_other(tmp_path):
    """Stop texts, replaced groups, teachers by source, several minibatches, adapters, parked moments: one
    iteration of it, and evaluations before and after."""
    for name, num, devices in (("one", 1, 4), ("two", 2, 2)):
        with train(tmp_path, name, num=num, devices=devices, **EVERYTHING) as started:
            assert started.wait() == [0] * num, started.said()
    one, two = (tiny_runs.metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert one[0]["reward/rounds"] > 1
    evaluations = [json.loads((tmp_path / x / "eval/step_000000.json").read_text()) for x in ("one", "two")]
    one_host, two_hosts = map(tiny_runs.numbers, evaluations)
    assert one_host == pytest.approx(two_hosts)
    # The first host writes down the answers of both.
    ours, theirs = ((tmp_path / x / "eval/samples/step_000000.jsonl").read_text() for x in ("one", "two"))
    assert len(ours.splitlines()) == 5
    assert ours == theirs
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / x / "rollouts/step_000000.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    )
    # The first process writes of its own rows.
    assert len(ours) == 16
    assert len(theirs) == 8
    for row, same in zip(theirs, ours, strict=False):
        assert row.pop("reward") == pytest.approx(same.pop("reward"))
        assert row == same


def with_curriculum(folder, data):
    """Sections of a run over 24 stored questions, which hosts may only pass over alike."""
    rows = [json.dumps({"question": f"{a}+{b}", "answer": "7"}) for a in range(1, 5) for b in range(1, 7)]
    (data / "sums.jsonl").write_text("\n".join(rows))
    folder.mkdir()
    return {
        "data": {
            "train": [{"kind": "jsonl", "path": str(data / "sums.jsonl")}],
            "eval": [{**tiny_runs.TASK, "split": "heldout"}],
            "curriculum": {"skip_solved": 0.9, "skip_unsolved": 0.3},
        },
        "reward": {"verifier": "some_reward:noted"},
        "train": {"num_steps": 8},
        "checkpoint": {"every": 1},
    }


def asked(folder):
    """Questions that were verified, by the process that had them verified."""
    return [path.read_text().splitlines() for path in sorted(folder.glob("asked_*.txt"))]


@pytest.mark.slow
def test_hosts_learn_all_verdicts_and_go_on_bitwise(tmp_path):
    """A curriculum: each host passes over what any of them found to be solved or hopeless."""
    for name, num, devices in (("one", 1, 4), ("two", 2, 2)):
        sections = with_curriculum(tmp_path / name, tmp_path)
        with train(tmp_path / name, "run", num=num, devices=devices, **sections) as started:
            assert started.wait() == [0] * num, started.said()
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    (alone,), halves = asked(one.parent), asked(two.parent)
    assert len(halves) == 2
    assert len(halves[0]) == len(halves[1]) == len(alone) / 2
    assert sorted(halves[0] + halves[1]) == sorted(alone)
    told = [
        [(row["curriculum/solved_frac"], row["curriculum/unsolved_frac"]) for row in tiny_runs.metrics(run)]
        for run in (one, two)
    ]
    assert told[0] == told[1]
    assert min(told[0][-1]) > 0.1
    assert tiny_runs.parameters(one)[1]["data"] == tiny_runs.parameters(two)[1]["data"]

    sections = with_curriculum(tmp_path / "stopped", tmp_path)
    with train(tmp_path / "stopped", "run", **sections) as started:
        wait_for_lines(tmp_path / "stopped" / "run" / "metrics.jsonl", 2, started)
        os.kill(started.processes[1].pid, signal.SIGTERM)
        assert started.wait(60) == [143, 143], started.said()
    stopped_at = len(tiny_runs.metrics(tmp_path / "stopped" / "run"))
    assert stopped_at < 8
    with train(tmp_path / "stopped", "run", **sections) as resumed:
        assert resumed.wait() == [0, 0], resumed.said()
        assert f"resumed at step {stopped_at}" in resumed.said(0)
    tiny_runs.assert_same_run(two, tmp_path / "stopped" / "run")


@pytest.mark.slow
def test_runs_within_a_run_in_a_bucket(tmp_path, bucket):
    """Teacher and student are trained first; the run, in a bucket, is evaluated by both hosts."""
    few = {"train": {"num_steps": 2, "prompts_per_iteration": 8}, "checkpoint": {"every": 0}}
    for role in ("student", "teacher"):
        config = tiny_runs.config_file(tmp_path, **{**RUN, **few, "name": role, "kd": {"coef": 0}})
        text = config.read_text()
        tree = yaml.safe_load(text) | {"teacher": None}
        (tmp_path / f"{role}.yaml").write_text(yaml.safe_dump(tree))
    sections = {
        "student": {"run": "student.yaml", "architecture": None},
        "teacher": {"run": "teacher.yaml", "architecture": None},
        "eval": {"every": 0, "agreement": True, "num_samples": 1},
        "train": {"num_steps": 2},
    }
    where = f"{bucket}/hosts"
    config = tiny_runs.config_file(tmp_path, **sections)
    with job.train(config, tmp_path, f"log.dir={where}") as started:
        assert started.wait() == [0, 0], started.said()
    with job.train(where, tmp_path, command="eval") as started:
        assert started.wait() == [0, 0], started.said()
        assert "step 2" in started.said(0)
    with job.train(config, tmp_path, f"log.dir={tmp_path / 'one'}", num=1, devices=4) as started:
        assert started.wait() == [0], started.said()
    fsspec.filesystem("gs").get(where, str(tmp_path / "two"), recursive=True)
    for file in ("eval/step_000000.json", "eval/step_000002.json"):
        one, two = (json.loads((tmp_path / name / file).read_text()) for name in ("one", "two"))
        one, two = tiny_runs.numbers(one), tiny_runs.numbers(two)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    (file,) = (tmp_path / "two" / "eval").glob("eval_*.json")
    (evaluated,) = json.loads(file.read_text())["evaluations"].values()
    assert tiny_runs.numbers(evaluated) == pytest.approx(two, rel=1e-5, abs=1e-5)


# ---- A process that fails

RUN = {"train": {"num_steps": 6}, "eval": {"every": 0, "agreement": False, "num_samples": 0}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with train(folder, "run") as started:
        assert started.wait() == [0, 0], started.said()
    return folder / "run"


def train(folder, name, *overrides, num=2, devices=2, **sections):
    config = tiny_runs.config_file(folder, **{**RUN, **sections})
    return job.train(config, folder, f"log.dir={folder / name}", *overrides, num=num, devices=devices)


def wait_for_lines(file, num, started, limit_s=300):
    end = time.monotonic() + limit_s
    while not file.exists() or len(file.read_text().splitlines()) < num:
        assert time.monotonic() < end, started.said()
        assert started.processes[0].poll() is None, started.said()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_pair_resumes_bitwise(tmp_path, uninterrupted, killed):
    with train(tmp_path, "run") as started:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, started)  # the checkpoint is of step 2
        started.processes[killed].send_signal(signal.SIGKILL)
        began = time.monotonic()
        status = started.processes[1 - killed].wait(60)
        assert time.monotonic() - began < 10, "at once, and not only after mesh.host_timeout_s"
        assert status == 1
        said = started.said(1 - killed)
        assert f"error: process {killed} " in said
        assert "it was killed, or its host is gone" in said
    assert not (tmp_path / "run" / "done.json").exists()
    with train(tmp_path, "run") as resumed:
        assert resumed.wait() == [0, 0], resumed.said()
        assert "resumed at step" in resumed.said(0)
    tiny_runs.assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_job(tmp_path):
    with train(tmp_path, "run", "mesh.host_timeout_s=5.0", "train.num_steps=500") as started:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, started)
        started.processes[1].send_signal(signal.SIGSTOP)
        assert started.processes[0].wait(15) == 1
        assert re.search(r"error: process 1 .* has not been heard from for [5-7] s", started.said(0))


@pytest.mark.slow
def test_an_error_on_one_host_is_told_on_all(tmp_path):
    with train(tmp_path, "run", "train.num_steps=500") as started:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, started)
        # A full disk, a folder that someone has removed: only the first process writes there.
        (tmp_path / "run" / "rollouts").rename(tmp_path / "run" / "gone")
        (tmp_path / "run" / "rollouts").write_text("a file where a folder was")
        assert started.wait(60) == [1, 1]
        assert "error: [Errno" in started.said(0)
        assert "error: process 0 " in started.said(1)
        assert "rollouts" in started.said(1)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_and_saves_all(tmp_path):
    with train(tmp_path, "run", "train.num_steps=500") as started:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, started)
        os.kill(started.processes[1].pid, signal.SIGTERM)
        assert started.wait(60) == [143, 143], started.said()
        assert "stopped and saved at step" in started.said(0)
        assert "stopped and saved" not in started.said(1), "the first process speaks"


def test_folders_of_their_own_are_refused(tmp_path):
    """Two hosts without a shared file system."""
    config = tiny_runs.config_file(tmp_path, **RUN)
    address = job.free_address()
    join = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    commands = [
        ["-m", "kdrl_jax.main", "--config", str(config), *join, str(i), f"log.dir={tmp_path / str(i)}"]
        for i in range(2)
    ]
    with job.Job(commands, tmp_path) as started:
        assert started.wait(120) == [2, 2], "a mistake in what was given, on all"
        assert "is not one folder to all hosts (1 of 2 do not see it)" in started.said()
