"""What comes from others runs no code here, and nothing is fetched that no setting asked for."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_runs import config_file

ROOT = Path(__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "kdrl_jax").rglob("*.py"))}
# Formats that run what they hold; the libraries that read weights through them.
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "imp", "runpy"}
# Who speaks to the network or starts programs, and why.
ALLOWED = {
    "urllib": {
        "preemption.py"
    },  # this machine's own metadata server, if checkpoint.preemption_notice says so
    "socket": {"config/job.py", "watch.py"},  # the hosts of one job
    "subprocess": {"rewards/process.py"},  # the workers
    "huggingface_hub": {"models/load.py"},  # a model named by its hub name
    "datasets": {"data/stored.py"},  # a data set named by its hub name
    "http": {"preemption.py"},
    # Only if log.writers names them; wandb sends what it is given, unless WANDB_MODE says otherwise.
    "tensorboard": {"writers/tensorboard.py"},
    "wandb": {"writers/wandb.py"},
    "trackio": {"writers/trackio.py"},
    "mlflow": {"writers/mlflow.py"},
    "requests": set(),
    "multiprocessing": set(),
}

HOOK = """
import sys

def tell(line):
    with open({log!r}, "a") as file:
        file.write(line + "\\n")

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"):
        tell(event + repr(arguments))

tell("started")
sys.addaudithook(hook)
"""


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_no_module_reads_what_can_run_and_few_reach_out():
    reached = {}
    for path, tree in SOURCES.items():
        found = set(imports(tree))
        assert not found & NEVER, path
        for name in found & ALLOWED.keys():
            reached.setdefault(name, set()).add(path.relative_to(ROOT / "kdrl_jax").as_posix())
    for name, files in ALLOWED.items():
        assert reached.get(name, set()) == files, name


def test_nothing_is_evaluated():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}, path
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("allow_pickle", "False") == "False", path
            assert "trust_remote_code" not in arguments, path
            assert arguments.get("shell", "False") == "False", path
            if name == "yaml.load":
                assert arguments == {"Loader": "_Loader"}, path
    text = (ROOT / "kdrl_jax" / "config" / "load.py").read_text()
    assert "class _Loader(yaml.SafeLoader)" in text
    text = (ROOT / "kdrl_jax" / "data" / "chat.py").read_text()
    assert "class _Environment(ImmutableSandboxedEnvironment)" in text


def test_every_dependency_has_both_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x]
    named += [x for extra in project["project"]["optional-dependencies"].values() for x in extra]
    named += project["build-system"]["requires"]
    assert len(named) > 30
    for requirement in named:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z0-9_,]+\])?>=[0-9.]+,<[0-9.]+", requirement), requirement


@pytest.mark.slow
def test_a_run_without_names_of_hubs_uses_no_network(tmp_path, monkeypatch):
    """Neither this process nor its workers."""
    log = tmp_path / "used"
    (tmp_path / "hook").mkdir()
    # Python imports a module of this name in every process that starts, and tells the hook of every socket.
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    settings = ["--config", str(config_file(tmp_path, train={"num_steps": 1})), f"log.dir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, "-m", "kdrl_jax.main", *settings], check=True, cwd=ROOT)
    told = log.read_text().splitlines()
    assert told.count("started") >= 2  # the run and its worker
    assert set(told) == {"started"}
    # What the hook would have told of.
    subprocess.run([sys.executable, "-c", "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"])
    assert "socket.connect" in log.read_text()
