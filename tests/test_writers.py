"""What TensorBoard, W&B, trackio and MLflow show of a run, read back from what they keep on this machine."""

import collections
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import assert_same_run, config_file, run
from tiny_runs import metrics as metrics_of

from kdrl_jax.alarms import Alarm
from kdrl_jax.config import load_config
from kdrl_jax.main import main
from kdrl_jax.record import Record
from kdrl_jax.writers import background, check_writers, run_writers
from kdrl_jax.writers.base import plain_scalars

ROWS = [{"question": "1+1", "answer": "2", "completion": "*two*\n|", "reward": 1.0, "tokens": [1, 2]}]


# ---- Readers, which know nothing of the writers: (name, step) -> values, in order


def read_tensorboard(run_dir):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    found = collections.defaultdict(list)
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            texts = [x.decode() for x in event.tensor_proto.string_val]
            name = f"{tag} (text)" if texts else tag
            found[name, event.step].append(texts or float(event.tensor_proto.float_val[0]))
    return found


def read_wandb(run_dir):
    from wandb.proto.wandb_internal_pb2 import Record as Message

    found = collections.defaultdict(list)
    ids = set()
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in leveldb_records(file.read_bytes()[7:]):
            message = Message.FromString(record)
            if message.HasField("run"):
                ids.add(message.run.run_id)
            if message.HasField("alert"):
                found["alert", message.alert.text].append(message.alert.title)
            if message.HasField("history"):
                items = {"/".join(x.nested_key) or x.key: x.value_json for x in message.history.item}
                for name in items.keys() - {"step", "_step", "_runtime", "_timestamp"}:
                    found[name, int(json.loads(items["step"]))].append(json.loads(items[name]))
    assert len(ids) <= 1
    return found


def leveldb_records(data):
    """Of a log file in LevelDB's format: blocks of 32 KiB with pieces (crc, length, kind) of records."""
    whole, place = b"", 7  # the first block begins with seven bytes of W&B's own
    data = b" " * 7 + data
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""


def read_mlflow(run_dir):
    from mlflow import MlflowClient

    client, found = MlflowClient(), collections.defaultdict(list)
    (shown,) = client.search_runs([client.get_experiment_by_name("kdrl_jax").experiment_id])
    for name in shown.data.metrics:
        for metric in client.get_metric_history(shown.info.run_id, name):
            found[name, metric.step].append(metric.value)
    for name, value in shown.data.tags.items():
        found[name, 0].append(value)
    for file in client.list_artifacts(shown.info.run_id, "rollouts"):
        found[file.path, 0].append(True)
    found["status", 0].append(shown.info.status)
    return found


def read_trackio(run_dir):
    from trackio.sqlite_storage import SQLiteStorage

    found = collections.defaultdict(list)
    (name,) = SQLiteStorage.get_runs("kdrl_jax")
    for row in SQLiteStorage.get_logs("kdrl_jax", name):
        for key in row.keys() - {"step", "timestamp"}:
            found[key, row["step"]].append(row[key])
    return found


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """Nothing leaves the machine, or the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    if "trackio" in sys.modules:
        sys.modules["trackio.utils"].TRACKIO_DIR = tmp_path
        sys.modules["trackio.sqlite_storage"].TRACKIO_DIR = tmp_path
    else:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))


def open_record(folder, writers, first_step=0, last_eval=-1):
    config = load_config(config_file(folder, log={"writers": writers}), [f"log.dir={folder / 'run'}"])
    record = Record(config, folder / "run")
    record.open(first_step, last_eval)
    return record


def write_steps(record, first, end):
    """As a run does, with an evaluation every two steps and completions every three."""
    if first == 0:
        record.teacher("teacher", {"greedy/accuracy": 0.75}, [])
    for step in range(first, end):
        if step % 2 == 0:
            results = {"sampled/pass@4": 0.5, "sampled/pass@4_ci": [0.25, 0.75], "num_prompts": 8}
            record.evaluation(step, results | {"by_source": {"gsm8k": {"greedy/accuracy": step / 8}}}, [])
        record.metrics({"step": step, "loss": np.float32(step / 2), "kd/coef": None, "lr": float("nan")})
        if step == 3:
            record.alarm(step, Alarm("entropy_collapse", 0.1, 0.2, "0.1 nats a token"))
        if step % 3 == 0:
            record.rollouts(step, ROWS)


def kill(record):
    """Everything is written, and nothing is closed."""
    for writer in record._writers._writers:
        deadline = time.monotonic() + 60
        while writer._waiting or not writer._thread.is_alive():
            assert time.monotonic() < deadline, record.notes()
            time.sleep(0.01)
        time.sleep(0.3)
        if name_of(writer) == "wandb":
            writer._writer._run.finish(exit_code=1)  # its process outlives ours, and writes the file
        if name_of(writer) == "tensorboard":
            writer._writer._file.flush()
        if name_of(writer) == "trackio":
            writer._writer._run.finish()
    record.checkpoints.close()


def name_of(writer):
    return writer.name


# Libraries that start processes and databases of their own take as long as they like.
@pytest.mark.parametrize(
    "name",
    ["tensorboard", *(pytest.param(x, marks=pytest.mark.slow) for x in ("wandb", "mlflow", "trackio"))],
)
def test_a_run_that_goes_on_is_one_run_and_no_step_is_there_twice(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setattr(run_writers, "CLOSE_WITHIN_S", 300.0)
    record = open_record(tmp_path, [name])
    write_steps(record, 0, 5)
    record.close()
    # From the checkpoint of step 3, and killed.
    record = open_record(tmp_path, [name], 3, 2)
    write_steps(record, 3, 8)
    kill(record)
    record = open_record(tmp_path, [name], 6, 4)
    write_steps(record, 6, 10)
    record.done(10)
    record.close()
    assert record.notes() == []
    found = READERS[name](tmp_path / "run")
    at = "_at_" if name == "mlflow" else "@"
    assert {step: found["loss", step] for step in range(10)} == {step: [step / 2] for step in range(10)}
    assert not [key for key in found if key[0] in ("lr", "kd/coef")]
    for step in (0, 2, 4, 6, 8):
        assert found[f"eval/sampled/pass{at}4", step] == [0.5]
        assert found[f"eval/sampled/pass{at}4_ci_high", step] == [0.75]
        assert found["eval/by_source/gsm8k/greedy/accuracy", step] == [step / 8]
    assert found["eval/teacher/greedy/accuracy", 0] == [0.75]
    if name == "tensorboard":
        said = [found["alarm/entropy_collapse (text)", step] for step in (3, 6)]
        assert said == [[["    0.1 nats a token\n"]], []]
        (cells,) = found["rollouts (text)", 9]
        assert dict(zip(cells[:7], cells[7:], strict=True))["completion"] == "    *two*\n    |\n"
    elif name == "mlflow":
        files = [key[0] for key in found if key[0].startswith("rollouts/")]
        assert files == [f"rollouts/step_00000{step}.json" for step in (0, 3, 6, 9)]
    else:
        tables = [key for key in found if key[0] in ("rollouts", "rollouts/_type")]
        assert {key[1]: len(found[key]) for key in tables} == {0: 1, 3: 1, 6: 1, 9: 1}
    if name == "wandb":
        assert found["alert", "step 3: 0.1 nats a token"] == ["alarm entropy_collapse"]
    if name == "mlflow":
        assert found["alarm/entropy_collapse", 0] == ["step 3: 0.1 nats a token"]
        assert found["status", 0] == ["FINISHED"]


def test_a_writer_that_comes_later_gets_what_it_missed(tmp_path):
    record = open_record(tmp_path, [])
    write_steps(record, 0, 6)
    record.close()
    # Stopped at the checkpoint of step 4, which was evaluated before: that is not done again.
    open_record(tmp_path, ["tensorboard"], 4, 4).close()
    record = open_record(tmp_path, ["tensorboard"], 4, 4)
    for step in range(4, 8):
        record.metrics({"step": step, "loss": 1.0})
    record.close()
    found = read_tensorboard(tmp_path / "run")
    steps = {kind: [step for name, step in found if name == kind] for kind, _ in found}
    assert steps["loss"] == list(range(8))
    assert steps["eval/sampled/pass@4"] == [0, 2, 4]
    assert steps["rollouts (text)"] == [0, 3]
    assert all(len(values) == 1 for values in found.values())


@pytest.mark.parametrize("between", ["without it", "it cannot be opened"])
def test_a_session_after_one_that_was_killed_is_sent_later(between, tmp_path, monkeypatch):
    """What is missing there is told from what may be there by the first session after the kill, whoever
    writes."""
    with_fake(monkeypatch)
    record = open_record(tmp_path, ["tensorboard"])
    write_steps(record, 0, 3)
    deadline = time.monotonic() + 60
    while record._writers._writers[0]._waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    record.checkpoints.close()  # and nothing else: it was killed

    def fails(what, step):
        raise ConnectionError("no route to host")

    with_fake(monkeypatch, fails)
    record = open_record(tmp_path, [] if between == "without it" else ["tensorboard"], 3, 2)
    write_steps(record, 3, 6)
    record.close()
    fake = with_fake(monkeypatch)
    record = open_record(tmp_path, ["tensorboard"], 6, 4)
    write_steps(record, 6, 8)
    record.close()
    assert [step for step, values in fake.got[:-1] if "loss" in values] == [3, 4, 5, 6, 7]
    assert [step for step, values in fake.got[:-1] if "eval/sampled/pass@4" in values] == [4, 6]


# ---- Writers that fail


class Row(dict):
    """One that says when it is gone."""


def test_rows_that_wait_for_a_stuck_writer_are_in_their_file_alone(tmp_path, monkeypatch):
    go = threading.Event()
    got = []
    fake = with_fake(monkeypatch, lambda what, step: what != "open" or go.wait(60))
    monkeypatch.setattr(fake, "rollouts", lambda step, rows: got.append((step, rows)))
    record = open_record(tmp_path, ["tensorboard"])
    row = Row(ROWS[0])
    gone = weakref.ref(row)
    record.rollouts(3, [row])
    del row
    gc.collect()
    assert gone() is None
    go.set()
    record.close()
    assert got == [(3, ROWS)]


@pytest.mark.slow
def test_wandb_does_not_keep_the_process_when_its_server_does_not_answer(tmp_path):
    """85 seconds, in W&B's own exit hook."""
    code = (
        "import pathlib, time\n"
        "from kdrl_jax.writers.background import Background, wait_for_all\n"
        "from kdrl_jax.writers.base import About\n"
        "from kdrl_jax.writers.wandb import WandbWriter\n"
        "about = About('a', 'kdrl_jax', None, {}, pathlib.Path('.'), 0, None)\n"
        "writers = [Background('wandb', WandbWriter(), about, backlog=[], say=print) for _ in range(2)]\n"
        "while not hasattr(writers[0]._writer, '_service'): time.sleep(0.1)\n"
        "wait_for_all(writers, 'finished', 2.0)\n"
        "print(f'ended {time.time()}', flush=True)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    took = time.time() - float(done.stdout.splitlines()[-1].split()[1])
    assert "not done after" in done.stdout
    assert took < 20, done.stdout
    assert not leftovers(tmp_path)


def leftovers(folder):
    """Other processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder) and process.name != str(os.getpid()):
                found.append(process.name)
    return found


class Fake:
    """Keeps what it is given."""

    rewrites = False

    def __init__(self, fails=lambda what, step: None):
        self.fails, self.got = fails, []

    def open(self, about):
        self.fails("open", None)
        return about.id or "an id"

    def scalars(self, step, values):
        self.fails("scalars", step)
        self.got.append((step, values))

    def rollouts(self, step, rows):
        self.fails("rollouts", step)

    def alarm(self, step, name, says):
        self.fails("alarm", step)

    def close(self, status):
        self.fails("close", None)
        self.got.append(status)


def with_fake(monkeypatch, fails=lambda what, step: None):
    fake = Fake(fails)
    monkeypatch.setitem(run_writers._WRITERS, "tensorboard", lambda: fake)
    return fake


def test_files_of_others_do_not_matter(tmp_path, monkeypatch):
    fake = with_fake(monkeypatch, lambda what, step: None)
    for folder, name in (("eval", "step_100_old.json"), ("rollouts", "step_best.jsonl")):
        (tmp_path / "run" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / folder / name).write_text("mine")
    record = open_record(tmp_path, ["tensorboard"])
    write_steps(record, 0, 2)
    record.close()
    assert [step for step, values in fake.got[:-1] if "loss" in values] == [0, 1]


def test_failures_are_told_once_and_counted(tmp_path, monkeypatch):
    def fails(what, step):
        if (what == "scalars" and step in (2, 3, 4)) or what in ("rollouts", "close"):
            raise OSError(28, "No space left on device")

    fake = with_fake(monkeypatch, fails)
    record = open_record(tmp_path, ["tensorboard"])
    write_steps(record, 0, 8)
    record.close()
    first, last = record.notes()
    assert "tensorboard: OSError: [Errno 28] No space left on device; the run goes on" in first
    # Two evaluations, three steps, three rollouts, and the end.
    assert "9 entries failed and 0 were left out" in last
    assert [step for step, values in fake.got if "loss" in values] == [0, 1, 5, 6, 7]
    assert len(metrics_of(tmp_path / "run")) == 8


def test_one_that_cannot_be_opened_gets_everything_in_the_next_session(tmp_path, monkeypatch):
    def fails(what, step):
        raise ConnectionError("no route to host")

    with_fake(monkeypatch, fails)
    record = open_record(tmp_path, ["tensorboard"])
    write_steps(record, 0, 4)
    record.close()
    (line,) = record.notes()
    assert "could not be opened" in line
    assert "no route to host" in line
    fake = with_fake(monkeypatch)
    record = open_record(tmp_path, ["tensorboard"], 4, 2)
    record.done(4)
    record.close()
    assert [step for step, values in fake.got[:-1] if "loss" in values] == [0, 1, 2, 3]
    assert fake.got[-1] == "finished"


def test_a_slow_one_slows_nothing_and_loses_its_oldest(tmp_path, monkeypatch):
    go = threading.Event()
    fake = with_fake(monkeypatch, lambda what, step: go.wait(60))
    monkeypatch.setattr(background, "MOST_WAITING", 5)
    monkeypatch.setattr(run_writers, "CLOSE_WITHIN_S", 0.2)
    record = open_record(tmp_path, ["tensorboard"])
    start = time.monotonic()
    for step in range(100):
        record.metrics({"step": step, "loss": 1.0})
    record.close()
    assert time.monotonic() - start < 5
    slow, late = record.notes()
    assert "its oldest entries are left out there" in slow
    assert "not done after 0 s" in late
    go.set()
    deadline = time.monotonic() + 60
    while len(fake.got) < 6:
        assert time.monotonic() < deadline, (fake.got, record.notes())
        time.sleep(0.01)
    assert [step for step, _ in fake.got[:-1]] == [95, 96, 97, 98, 99]
    assert len(metrics_of(tmp_path / "run")) == 100


@pytest.mark.parametrize(("failed", "status"), [(True, "failed"), (False, "stopped")])
def test_how_a_session_ended_is_told(tmp_path, monkeypatch, failed, status):
    fake = with_fake(monkeypatch)
    record = open_record(tmp_path, ["tensorboard"])
    record.close(failed=failed)
    assert fake.got == [status]


# ---- What is asked for


def test_plain_scalars():
    values = {"step": 3, "a": np.float32(0.5), "b": None, "c": "text", "d": float("inf"), "n": 2, "t": True}
    nested = {"by_source": {"x": {"acc": 1.0, "acc_ci": [0.5, 1.0]}}}
    assert plain_scalars(values | nested, "eval/") == {
        "eval/a": 0.5, "eval/n": 2.0, "eval/t": 1.0, "eval/by_source/x/acc": 1.0,
        "eval/by_source/x/acc_ci_low": 0.5, "eval/by_source/x/acc_ci_high": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_one_that_is_not_installed_is_named_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_writers.importlib.util, "find_spec", lambda module: None)
    path = config_file(tmp_path, log={"writers": [name], "dir": str(tmp_path / "run")})
    assert main(["--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"log.writers names {name}" in line
    assert f"pip install 'kdrl_jax[{name}]'" in line
    assert not (tmp_path / "run").exists()


def test_each_is_named_once(tmp_path, capsys):
    path = config_file(tmp_path, log={"writers": ["wandb", "wandb"]})
    assert main(["--config", str(path)]) == 2
    assert "name each once" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_without_a_key(tmp_path):
    """It asks nobody for one, and no server."""
    code = (
        "import socket\ndef refuse(*a): raise AssertionError('the network is used')\n"
        "socket.getaddrinfo = refuse\n"
        "from kdrl_jax.writers.wandb import check_login\n"
        "try: check_login()\nexcept ValueError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert "run `wandb login`, or set WANDB_MODE=offline" in done.stdout, done.stderr[-1000:]


@pytest.mark.slow
def test_wandb_that_is_told_to_stay_offline_is_accepted(tmp_path):
    check_writers(load_config(config_file(tmp_path, log={"writers": ["wandb"]})))


def test_writers_that_are_there_are_accepted(tmp_path):
    check_writers(load_config(config_file(tmp_path, log={"writers": ["tensorboard", "mlflow"]})))


@pytest.mark.slow
def test_a_whole_run_with_writers_is_the_same_run(tmp_path):
    """Stopped and gone on with; and bitwise that without writers."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > 12

    log = {"writers": ["tensorboard", "mlflow"]}
    _, done = run(tmp_path, "with", stop, log=log)
    assert not done
    _, done = run(tmp_path, "with", log=log)
    assert done
    run(tmp_path, "without")
    assert_same_run(tmp_path / "with", tmp_path / "without")
    for found in (read_tensorboard(tmp_path / "with"), read_mlflow(tmp_path / "with")):
        for row in metrics_of(tmp_path / "with"):
            assert found["loss", row["step"]] == [pytest.approx(row["loss"], rel=1e-6)]
        evals = [json.loads(file.read_text()) for file in (tmp_path / "with" / "eval").glob("step_*.json")]
        for results in evals:
            assert len(found["eval/greedy/accuracy", results["step"]]) == 1
