"""Runs, data and configs in buckets, against emulators of Google Cloud Storage and of S3."""

import contextlib
import io
import os
import shutil
import socket
from pathlib import Path

import pytest
import tiny_runs
from rich.console import Console

from kdrl_jax import paths
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import JsonlSourceConfig, load_config, load_run_config
from kdrl_jax.data.sources import open_source
from kdrl_jax.main import main
from kdrl_jax.metrics import MetricsWriter, read_metrics
from kdrl_jax.paths import as_path
from kdrl_jax.train import train

# Before gcsfs is imported: the emulator cannot be asked what kind of bucket it has, and need not be.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")

# Few programs, since compiling them is all that takes time here.
RUN = {
    "train": {"num_steps": 4, "diagnostics_every": 0},
    "eval": {"agreement": False, "num_samples": 1},
    "checkpoint": {"every": 2, "keep": 1},
}


serve = emulator.objects.download


def download(request, response, storage, *args, **options):
    """As the emulator's, and with the header that Google's bucket names the object's version by: tensorstore
    writes a file anew only if it is the version that it has read."""
    serve(request, response, storage, *args, **options)
    if response.status < 300:
        known = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = known["generation"]


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket that is in memory."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    url = f"http://localhost:{port}"
    # gcsfs and tensorstore each have a variable of their own; nobody asks for credentials.
    env = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_CLOUD_PROJECT": "project",
        "NO_GCE_CHECK": "true",
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(emulator.objects, "download", download)  # as its `get` calls it for an object's bytes
        for _, handlers in emulator.HANDLERS:
            if handlers.get("GET") is serve:
                patch.setitem(handlers, "GET", download)
        for name, value in env.items():
            patch.setenv(name, value)
        server.start()
        yield "gs://bucket"
        server.stop()


@pytest.fixture(scope="module")
def s3_bucket():
    """The same in S3, by moto."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("localhost", 0, verbose=False)
    server.start()
    env = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        paths.filesystem("s3://bucket").mkdir("bucket")
        yield "s3://bucket"
        server.stop()


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Questions in a file, and an uninterrupted run on them, on a disk."""
    folder = tmp_path_factory.mktemp("local")
    rows = [f'{{"question": "{a}+{b}", "answer": "{a + b}"}}' for a in range(1, 9) for b in range(1, 9)]
    file = folder / "sums.jsonl"
    file.write_text("\n".join(rows))
    _, done = tiny_runs.run(folder, "whole", data={"train": [{"kind": "jsonl", "path": str(file)}]}, **RUN)
    assert done
    return file, folder / "whole"


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_whether_results_can_be_written_is_known_before(store, request, monkeypatch):
    address = request.getfixturevalue(store)
    folder = as_path(f"{address}/results/of/eval")
    paths.check_writable(folder)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        paths.check_writable(as_path(f"{address}-that-is-not/results"))

    def refused(self, content):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(type(folder), "write_bytes", refused)
    with pytest.raises(PermissionError, match="403 Forbidden"):
        paths.check_writable(folder)


@pytest.mark.parametrize("store", [pytest.param("bucket", marks=pytest.mark.slow), "s3_bucket"])
def test_a_run_lives_in_a_bucket(store, sums, tmp_path, request, capsys):
    """Stopped, resumed by its address, evaluated and reported, with data there too: bitwise a local one."""
    address = request.getfixturevalue(store)
    (as_path(address) / "data" / "sums.jsonl").write_bytes(sums[0].read_bytes())
    where = f"{address}/runs/tiny"
    calls = iter(range(1000))
    remote = {"train": [{"kind": "jsonl", "path": f"{address}/data/sums.jsonl"}]}
    config = load_config(tiny_runs.config_file(tmp_path, data=remote, **RUN), [f"log.dir={where}"])
    assert not train(config, Console(quiet=True), lambda: next(calls) > 24)
    assert not (as_path(where) / "done.json").exists()
    stopped = Checkpoints(where)
    assert 0 < stopped.latest_step < 4
    # The start of a save that was cut off is none, and in nobody's way.
    (as_path(where) / "checkpoints" / "4" / "params" / "manifest.ocdbt").write_bytes(b"half")
    assert Checkpoints(where).latest_step == stopped.latest_step
    stopped.close()
    assert train(load_run_config(where), Console(quiet=True), lambda: False)
    assert main(["eval", "--config", where]) == 0
    assert main(["report", "--config", where]) == 0
    assert f"curves: {where}/report.png" in capsys.readouterr().out
    assert (as_path(where) / "report.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpoints(where).steps == [4]

    fetched = tmp_path / "fetched"
    paths.filesystem(where).get(where, str(fetched), recursive=True)
    (results,) = (fetched / "eval").glob("eval_*.json")
    (samples,) = (fetched / "eval" / "samples").glob("eval_*_step_000004.jsonl")
    results.unlink()
    samples.unlink()
    assert tiny_runs.metrics(fetched) == tiny_runs.metrics(sums[1])
    tiny_runs.assert_same_run(fetched, sums[1])


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_a_checkpoint_that_is_damaged_in_a_bucket_is_set_aside(store, request):
    where = f"{request.getfixturevalue(store)}/damaged"
    writer = Checkpoints(where, write=True)
    for step in (1, 2):
        writer.save(step, tiny_runs.small_state(step), {"at": step})
    writer.close()
    folder = as_path(where) / "checkpoints"
    system = paths.filesystem(where)
    largest = max(system.find(f"{folder}/2/params"), key=system.size)
    half = system.cat_file(largest)[: system.size(largest) // 2]
    for file in system.find(f"{folder}/2/params"):
        system.pipe_file(file, half)
    reader = Checkpoints(where)
    state, host, notes = reader.restore(tiny_runs.abstract(tiny_runs.small_state()))
    assert host == {"at": 1}
    assert float(state.params["w"][0, 0]) == 1.0
    assert ["checkpoint 2 cannot be read" in note for note in notes] == [True]
    assert reader.steps == [1]
    reader.close()
    aside = folder / "unreadable" / "2"
    assert any(half == system.cat_file(file) for file in system.find(str(aside)))
    assert not system.find(f"{folder}/2")
    # Another of the same number may be saved, and be read.
    writer = Checkpoints(where, write=True)
    writer.save(2, tiny_runs.small_state(2.5), {})
    writer.wait()
    state, *_ = writer.restore(tiny_runs.abstract(tiny_runs.small_state()))
    assert float(state.params["w"][0, 0]) == 2.5
    writer.close()


def test_metrics_are_written_whole_and_never_behind(bucket, monkeypatch):
    where = f"{bucket}/metrics"
    monkeypatch.setattr("kdrl_jax.metrics.REWRITE_S", 1000.0)
    writer = MetricsWriter(where)
    for step in range(3):
        writer.write({"step": step})
    assert read_metrics(where) == []
    writer.flush()
    assert [m["step"] for m in read_metrics(where)] == [0, 1, 2]
    writer.write({"step": 3})
    writer.close()
    # A run that was resumed at step 2 writes the later ones again.
    writer = MetricsWriter(where, read_metrics(where)[:2])
    assert [m["step"] for m in read_metrics(where)] == [0, 1]
    writer.close()


def test_a_config_may_lie_in_a_bucket_and_extend_another(bucket, tmp_path):
    folder = as_path(bucket) / "configs"
    (folder / "base.yaml").write_text(tiny_runs.config_file(tmp_path).read_text())
    (folder / "more" / "other.yaml").write_text(
        "extends: ../base.yaml\nname: other\nteacher: {run: ../base.yaml}\n"
    )
    other = load_config(f"{bucket}/configs/more/other.yaml")
    assert other.name == "other"
    assert other.teacher.run == f"{bucket}/configs/base.yaml"
    # A file on a disk may extend one in a bucket.
    (tmp_path / "mine.yaml").write_text(f"extends: {bucket}/configs/base.yaml\nname: mine\n")
    assert load_config(tmp_path / "mine.yaml").name == "mine"
    with pytest.raises(ValueError, match=r"gs://bucket/configs/none\.yaml: no such config file"):
        load_config(f"{bucket}/configs/none.yaml")


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_a_bucket_that_is_not_there_is_said_and_not_made(store, tmp_path, request, capfd, monkeypatch):
    address = request.getfixturevalue(store).replace("bucket", "no-such-bucket")
    # Nothing is loaded, or compiled, before.
    monkeypatch.setattr("kdrl_jax.train.make_setup", None)
    config = str(tiny_runs.config_file(tmp_path))
    for words in (["--config", config, f"log.dir={address}/run"], ["eval", "--config", f"{address}/run"]):
        status, line = said(capfd, *words)
        assert status == 2
        assert line.startswith(f"error: {address}/run: bucket {address}: there is no such bucket; check its")
    with pytest.raises(FileNotFoundError, match="there is no such bucket"):
        open_source(JsonlSourceConfig(kind="jsonl", path=f"{address}/rows.jsonl"), False)
    with pytest.raises(FileNotFoundError):
        paths.filesystem(address).ls(address)


def test_no_right_to_a_bucket_is_said_at_once(bucket, tmp_path, capfd, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("Anonymous caller does not have storage.objects.list access")

    monkeypatch.setattr(paths.filesystem(bucket), "ls", refuse)
    monkeypatch.setattr("kdrl_jax.train.make_setup", None)
    status, line = said(capfd, "--config", str(tiny_runs.config_file(tmp_path)), f"log.dir={bucket}/mine")
    assert status == 2
    assert "cannot be read (Anonymous caller does not have" in line
    assert "gcloud auth application-default login" in line


def said(capfd, *argv):
    """(exit status, the error line)."""
    status = main([*argv])
    return status, capfd.readouterr().err.strip().splitlines()[-1]


def test_mistakes_are_one_line(bucket, tmp_path, capfd, monkeypatch):
    config = str(tiny_runs.config_file(tmp_path))
    status, line = said(capfd, "--config", config, "log.dir=gs:///run")
    assert status == 2
    assert line.startswith("error: gs:///run: names no bucket; write gs://BUCKET/PATH")
    status, line = said(capfd, "--config", config, "log.dir=hdfs://x/run")
    assert status == 2
    assert "hdfs:// is not supported; give gs://, s3:// or a local path" in line
    status, line = said(capfd, "--config", f"{bucket}/runs/absent")
    assert status == 2
    assert "no such config file" in line
    status, line = said(capfd, "--config", config, f"student={{path: {bucket}/model}}")
    assert status == 2
    assert "is in a bucket, and weights are read from disks" in line
    monkeypatch.setattr(paths, "_is_installed", lambda module: False)
    status, line = said(capfd, "--config", "s3://bucket/config.yaml")
    assert status == 2
    assert "for s3:// paths, pip install 'kdrl_jax[s3]' (s3fs)" in line


def test_local_paths_stay_what_they_are(tmp_path):
    assert type(as_path(tmp_path / "x")) is type(Path())
    assert not paths.is_remote("runs/gs:/x")
    assert paths.absolute("~/x") == Path.home() / "x"
    paths.write_whole(tmp_path / "x", "é")
    assert (tmp_path / "x").read_text("utf-8") == "é"
    assert os.listdir(tmp_path) == ["x"]
    shutil.rmtree(tmp_path)
