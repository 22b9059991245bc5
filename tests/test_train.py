"""Whole runs of a tiny model: what is written, exact resume, and what bad input leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import load_config, load_run_config
from kdrl_jax.eval import evaluate
from kdrl_jax.main import main
from kdrl_jax.report import report
from kdrl_jax.runs import is_complete
from kdrl_jax.setup import make_setup
from kdrl_jax.train import train

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TASK = {"kind": "task", "task": "chain_sum", "max_terms": 3}
TREE = {
    "name": "tiny",
    "student": {"architecture": SHAPE},
    "teacher": {"architecture": {**SHAPE, "hidden_size": 32}},
    "tokenizer": {"kind": "char"},
    "data": {"train": [TASK], "eval": [{**TASK, "split": "heldout"}], "max_prompt_tokens": 6},
    "rollout": {"group_size": 2, "max_new_tokens": 10, "decode_chunk": 4, "temperature": 0.8},
    "reward": {"shaping": {"format": 0.1}, "num_workers": 1},
    "kd": {"coef": {"kind": "max_linear", "a": 1.0, "b": 0.1, "c": 0.5}},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"num_steps": 4, "prompts_per_iteration": 8, "diagnostics_every": 2},
    "eval": {"every": 2, "num_prompts": 8, "num_samples": 2, "agreement": True},
    "checkpoint": {"every": 2},
    "log": {"rollouts_every": 2},
}
# Wall-clock readings; everything else of a resumed run must be the same.
TIMES = ("time/", "tokens_per_second")


def config_file(folder, **sections):
    tree = json.loads(json.dumps(TREE))
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "config_in.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(folder, name, should_stop=lambda: False, overrides=(), **sections):
    config = load_config(config_file(folder, **sections), [f"log.dir={folder / name}", *overrides])
    return config, train(config, Console(quiet=True), should_stop)


def parameters(run_dir):
    config = load_run_config(run_dir)
    checkpoints = Checkpoints(run_dir)
    state, host = checkpoints.restore(make_setup(config).abstract_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.step)), host


def metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    (ours, host), (theirs, other) = parameters(a), parameters(b)
    assert host == other
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(x, y)
    for folder in ("eval", "rollouts"):
        files = sorted(p.name for p in (a / folder).iterdir())
        assert files == sorted(p.name for p in (b / folder).iterdir())
        for name in files:
            assert (a / folder / name).read_text() == (b / folder / name).read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    config, done = run(folder, "run")
    assert done
    assert is_complete(config)
    return folder / "run"


def test_what_a_run_leaves(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    named = {
        "step", "loss", "rl/coef", "kd/coef", "kd/reverse_kl", "reward/mean", "reward/solved_frac",
        "completion/length_mean", "completion/truncated_frac", "entropy", "grad_norm",
        "sampler/logprob_gap", "lr", "time/rollout", "time/reward", "time/teacher", "time/update",
        "tokens_per_second", "skipped_updates",
    }  # fmt: skip
    for row in rows:
        assert named <= set(row)
        assert all(v is None or isinstance(v, (int, float)) for v in row.values())
        measured = {"rl/grad_norm", "kd/grad_norm", "grad_cosine"}
        assert (measured <= set(row)) == (row["step"] % 2 == 0)
        assert row["sampler/logprob_gap"] < 1e-4  # at a temperature that is not 1
    np.testing.assert_allclose([r["kd/coef"] for r in rows], [1.0, 0.9, 0.8, 0.7], rtol=1e-6)
    assert sorted(p.name for p in (uninterrupted / "eval").iterdir()) == [
        "step_000000.json", "step_000002.json", "step_000004.json", "teacher.json",
    ]  # fmt: skip
    sample = json.loads((uninterrupted / "rollouts" / "step_000000.jsonl").read_text().splitlines()[0])
    assert {"question", "answer", "completion", "reward", "scores"} <= set(sample)
    assert load_run_config(uninterrupted).train.num_steps == 4


def test_evaluation_samples_at_its_temperature(tmp_path):
    """Near 0 the samples are the greedy answers, at 1 they are not."""
    means = {}
    for temperature in (1.0, 1e-3):
        words = [f"eval.temperature={temperature}", "eval.agreement=false"]
        out = io.StringIO()
        evaluate(load_config(config_file(tmp_path), words), Console(file=out), lambda: False, is_run=False)
        cells = [line.split("│")[1:3] for line in out.getvalue().splitlines() if "repeated_4gram" in line]
        means[temperature] = {name.strip(): float(value) for name, value in cells}
    cold, warm = means[1e-3], means[1.0]
    assert cold["sampled/repeated_4gram_frac"] == cold["greedy/repeated_4gram_frac"]
    assert warm["sampled/repeated_4gram_frac"] < warm["greedy/repeated_4gram_frac"]


def test_a_report_can_be_drawn(uninterrupted, capsys):
    path = report(uninterrupted, Console())
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "greedy" in capsys.readouterr().out


class StopAt:
    """Asks to stop at the n-th time it is asked."""

    def __init__(self, n):
        self.n, self.asked = n, 0

    def __call__(self):
        self.asked += 1
        return self.asked >= self.n


@pytest.mark.parametrize("n", [1, 3, 9, 14, 20])
def test_stopped_and_resumed_is_bitwise_the_same(tmp_path, uninterrupted, n):
    """Stopped at many places (evaluation, sampling, between updates), then resumed to the end."""
    config, done = run(tmp_path, "run", should_stop=(stop := StopAt(n)))
    assert not done, f"only asked {stop.asked} times"
    assert not is_complete(config)
    again = load_run_config(tmp_path / "run")
    assert train(again, Console(quiet=True), lambda: False, resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_minibatches_and_several_resumes(tmp_path):
    """Two updates an iteration; stopped again and again."""
    sections = {"train": {"num_minibatches": 2, "num_steps": 4}, "kd": {"mask": "response"}}
    _, done = run(tmp_path, "whole", **sections)
    assert done
    _, done = run(tmp_path, "parts", should_stop=StopAt(6), **sections)
    turns = 0
    while not done:
        turns += 1
        assert turns < 30
        again = load_run_config(tmp_path / "parts")
        done = train(again, Console(quiet=True), StopAt(6 + 4 * turns), resume=True)
    assert turns > 1
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_trains_the_runs_it_needs(tmp_path):
    """Teacher and student by SFT first, inside the run; the second time they are just loaded."""
    sft = {
        **TREE,
        "teacher": None,
        "rollout": {"source": "dataset", "group_size": 1, "max_new_tokens": 10},
        "rl": {"coef": 0},
        "kd": {"coef": 0},
        "sft": {"coef": 1},
        "train": {"num_steps": 2, "prompts_per_iteration": 8},
        "eval": {"agreement": False, "num_prompts": 4},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    sections = {"student": None, "teacher": None}
    config_file(tmp_path, **sections)
    tree = yaml.safe_load((tmp_path / "config_in.yaml").read_text())
    tree |= {"student": {"run": "sft.yaml"}, "teacher": {"run": "sft.yaml"}, "seed": 3}
    tree["train"]["num_steps"] = 1
    (tmp_path / "kdrl.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "kdrl.yaml", [f"log.dir={tmp_path / 'run'}"])
    assert train(config, Console(quiet=True), lambda: False)
    for role in ("student", "teacher"):
        assert load_run_config(tmp_path / "run" / role).seed == 3
        assert (tmp_path / "run" / role / "done.json").exists()
    # Student and teacher are the same model here, so KL starts at 0.
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kd/reverse_kl"]) < 1e-6
    longer = load_run_config(tmp_path / "run", ["train.num_steps=2"])
    assert train(longer, Console(quiet=True), lambda: False, resume=True)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1]


def test_other_settings_in_the_same_directory_are_refused(uninterrupted, tmp_path):
    config = load_config(config_file(tmp_path), [f"log.dir={uninterrupted}", "train.num_steps=9"])
    before = (uninterrupted / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"train\.num_steps was 4, is 9"):
        train(config, Console(quiet=True), lambda: False)
    assert (uninterrupted / "config.yaml").read_text() == before


def test_a_refused_resume_changes_nothing(uninterrupted):
    """Settings that do not fit the checkpoint: one line, and the run is as it was."""
    before = (uninterrupted / "config.yaml").read_text()
    for override, wanted in {
        "student.architecture.hidden_size=32": "does not fit",
        "optimizer.weight_decay=0.1": "does not fit",
        "seed=5": "seed",
    }.items():
        config = load_run_config(uninterrupted, [override, "train.num_steps=6"])
        with pytest.raises(ValueError, match=wanted):
            train(config, Console(quiet=True), lambda: False, resume=True)
        assert (uninterrupted / "config.yaml").read_text() == before


def test_stopped_in_a_prerequisite_resumes_the_whole(tmp_path, capsys):
    sft = {**TREE, "teacher": None, "rollout": {"source": "dataset", "group_size": 1, "max_new_tokens": 10}}
    sft |= {"rl": {"coef": 0}, "kd": {"coef": 0}, "sft": {"coef": 1}, "eval": {"num_prompts": 8}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    tree = {**TREE, "student": {"run": "sft.yaml"}, "train": {**TREE["train"], "num_steps": 1}}
    (tmp_path / "kdrl.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "kdrl.yaml", [f"log.dir={tmp_path / 'run'}"])
    assert not train(config, Console(soft_wrap=True), StopAt(8))
    assert f"--config {tmp_path / 'run'}\n" in capsys.readouterr().out
    other = load_config(tmp_path / "kdrl.yaml", [f"log.dir={tmp_path / 'run'}", "seed=1"])
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(other, Console(quiet=True), lambda: False)
    again = load_run_config(tmp_path / "run")
    assert train(again, Console(quiet=True), lambda: False, resume=True)
    assert is_complete(config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_resume(tmp_path, number):
    path = config_file(tmp_path, train={"num_steps": 100_000}, eval={"every": 0})
    command = [sys.executable, "-m", "kdrl_jax.main", "--config", str(path), f"log.dir={tmp_path / 'run'}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert f"resume with python -m kdrl_jax.main --config {tmp_path / 'run'}" in out.replace("\n", "")
    steps = [m["step"] for m in metrics(tmp_path / "run")]
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest_step == len(steps) == steps[-1] + 1
    checkpoints.close()


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": \n')
    (tmp_path / "raises.py").write_text("raise OSError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    path = config_file(tmp_path)
    cases = {
        "data.train=[{kind: jsonl, path: missing.jsonl}]": "missing.jsonl",
        "data.train=[{kind: jsonl, path: rows.jsonl}]": "rows.jsonl:2",
        "data.max_prompt_tokens=1": "data.max_prompt_tokens=1",
        "student.path=nowhere": "nowhere",
        "tokenizer={kind: model}": "tokenizer.kind",
        "tokenizer={kind: file, path: none.json}": "none.json",
        "reward.verifier=raises:f": "no such thing",
        "reward.verifier=numerc": "numeric",
        "mesh={fsdp: 3}": "3",
        "train.prompts_per_iteration=7": "prompts_per_iteration",
        "student={run: nothere.yaml}": "nothere.yaml",
    }
    before = written(tmp_path)
    for override, wanted in cases.items():
        assert main(["--config", str(path), override]) == 2, override
        err = capfd.readouterr().err
        assert err.count("\n") == 1, err
        assert wanted in err
        assert "Traceback" not in err
        assert [f for f in written(tmp_path) if "__pycache__" not in f] == before, override


def test_teacher_of_another_vocabulary_is_refused(tmp_path, monkeypatch, capfd):
    from tokenizers import Tokenizer, models

    monkeypatch.chdir(tmp_path)
    vocab = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
    golden = ROOT / "tests" / "golden" / "llama"
    for name in golden.iterdir():
        if name.suffix in (".json", ".safetensors"):
            (tmp_path / "teacher").mkdir(exist_ok=True)
            (tmp_path / "teacher" / name.name).write_bytes(name.read_bytes())
    Tokenizer(models.WordLevel(vocab, unk_token="a")).save(str(tmp_path / "teacher" / "tokenizer.json"))
    (tmp_path / "teacher" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    path = config_file(tmp_path)
    assert main(["--config", str(path), "teacher={path: teacher, architecture: null}"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "do not share a vocabulary" in err
    assert "2: '\\n' vs 'a'" in err
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_raises_is_counted_and_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text("def f(question, completion, answer):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    _, done = run(
        tmp_path, "run", reward={"verifier": "moody:f"}, train={"num_steps": 1}, eval={"num_samples": 0}
    )
    assert done
    assert metrics(tmp_path / "run")[0]["reward/errors"] == 16
    row = json.loads((tmp_path / "run" / "rollouts" / "step_000000.jsonl").read_text().splitlines()[0])
    assert row["error"].startswith("ZeroDivisionError")
