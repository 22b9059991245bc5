"""Whole runs of a tiny model: what is written, exact resume, and what bad input leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console
from tiny_runs import SHAPE, TASK, TREE, assert_same_run, config_file, metrics, run

from kdrl_jax.before import trained_first
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import load_config, load_run_config, save_config
from kdrl_jax.main import main
from kdrl_jax.metrics import Clock
from kdrl_jax.profiling import Profiler
from kdrl_jax.report import report
from kdrl_jax.rollout.engine import Engine
from kdrl_jax.runs import check_same_run, is_complete, prerequisites
from kdrl_jax.train import train

train_module = sys.modules["kdrl_jax.train"]
ROOT = Path(__file__).parents[1]


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
        "tokens_per_second", "skipped_updates", "rollout/idle_slot_frac", "time/reward_hidden",
    }  # fmt: skip
    for row in rows:
        assert named <= set(row)
        assert all(v is None or isinstance(v, (int, float)) for v in row.values())
        measured = {"rl/grad_norm", "kd/grad_norm", "grad_cosine"}
        assert (measured <= set(row)) == (row["step"] % 2 == 0)
        assert row["sampler/logprob_gap"] < 1e-4
    np.testing.assert_allclose([r["kd/coef"] for r in rows], [1.0, 0.9, 0.8, 0.7], rtol=1e-6)
    names = ["step_000000", "step_000002", "step_000004", "teacher"]
    assert sorted(p.name for p in (uninterrupted / "eval").iterdir()) == [
        "samples", *(f"{name}.json" for name in names)
    ]  # fmt: skip
    kept = sorted(p.name for p in (uninterrupted / "eval" / "samples").iterdir())
    assert kept == [f"{name}.jsonl" for name in names]
    sample = json.loads((uninterrupted / "rollouts" / "step_000000.jsonl").read_text().splitlines()[0])
    assert {"question", "answer", "completion", "reward", "scores"} <= set(sample)
    assert load_run_config(uninterrupted).train.num_steps == 4


def test_nothing_is_compiled_after_the_first_iteration(tmp_path):
    """Other prompts, lengths, temperatures and limits are the same programs, evaluations too."""
    falling = {"kind": "linear", "start": 1.0, "end": 0.5, "steps": 4}
    growing = {"kind": "linear", "start": 3, "end": 9, "steps": 4}
    run(tmp_path, "run", rollout={"temperature": falling, "length_limit": growing, "stop": ["3", "+"]})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["time/compiles"] > 5
    assert [r["time/compiles"] for r in rows[1:]] == [0, 0, 0]
    first, last = (
        [json.loads(line) for line in (tmp_path / "run" / "rollouts" / f"step_00000{i}.jsonl").open()]
        for i in (0, 3)
    )
    assert max(len(r["completion"]) for r in first) == 3
    assert 3 < max(len(r["completion"]) for r in last) <= 8
    for row in first + last:
        stopped = any(text in row["completion"] for text in ("3", "+"))
        assert (row["finish"] == "stop") == stopped
        assert not any(text in row["completion"][:-1] for text in ("3", "+"))
    assert {r["finish"] for r in first + last} >= {"stop", "length"}


@pytest.mark.slow
def test_int8_keys_and_values_show_in_the_gap_and_slots_do_not(tmp_path, uninterrupted):
    run(tmp_path, "int8", rollout={"cache_dtype": "int8"})
    gaps = [r["sampler/logprob_gap"] for r in metrics(tmp_path / "int8")]
    assert all(1e-4 < gap < 0.05 for gap in gaps)
    run(tmp_path, "slots", rollout={"slots_per_device": 1})
    files = sorted(p.name for p in (uninterrupted / "rollouts").iterdir())
    assert len(files) > 1
    for name in files:
        ours, theirs = (
            [json.loads(line) for line in (d / "rollouts" / name).open()]
            for d in (tmp_path / "slots", uninterrupted)
        )
        assert [r["completion"] for r in ours] == [r["completion"] for r in theirs]


def test_a_report_can_be_drawn(uninterrupted, capsys):
    path = report(uninterrupted, Console())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.read_text().startswith("<!doctype html>")
    assert "greedy" in capsys.readouterr().out


class StopAt:
    """Asks to stop at the n-th time it is asked."""

    def __init__(self, n):
        self.n, self.asked = n, 0

    def __call__(self):
        self.asked += 1
        return self.asked >= self.n


@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 9, 14, 20))])
def test_stopped_and_resumed_is_bitwise_the_same(tmp_path, uninterrupted, n):
    """Stopped at many places (evaluation, sampling, between updates), then resumed to the end."""
    config, done = run(tmp_path, "run", should_stop=(stop := StopAt(n)))
    assert not done, f"only asked {stop.asked} times"
    assert not is_complete(config)
    again = load_run_config(tmp_path / "run")
    assert train(again, Console(quiet=True), lambda: False)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Also where Python orders its sets otherwise, and to the bytes of an export; another seed does not."""
    config, written = str(config_file(tmp_path, train={"num_steps": 3})), {}
    for name, hash_seed, seed in (("a", "1", 0), ("b", "2", 0), ("c", "2", 1)):
        place = tmp_path / name
        argv = [sys.executable, "-m", "kdrl_jax.main"]
        settings = [f"log.dir={place}", f"seed={seed}", "deterministic=true"]
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([*argv, "--config", config, *settings], env=env, check=True)
        subprocess.run([*argv, "export", "--config", str(place), f"out={place / 'out'}"], env=env, check=True)
        written[name] = {
            file.relative_to(place).as_posix(): file.read_bytes()
            for folder in ("rollouts", "eval", "out")
            for file in (place / folder).rglob("*")
            if file.is_file()
        }
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert any(name.endswith(".safetensors") for name in written["a"])
    assert written["a"] == written["b"]
    assert written["c"].keys() == written["a"].keys()
    assert all(written["c"][name] != written["a"][name] for name in written["a"] if "rollouts" in name)


@pytest.mark.slow
def test_minibatches_and_several_resumes(tmp_path):
    """Two updates an iteration; stopped again and again."""
    sections = {"train": {"num_minibatches": 2, "num_steps": 4}, "kd": {"mask": "response"}}
    _, done = run(tmp_path, "whole", **sections)
    assert done
    _, done = run(tmp_path, "parts", should_stop=StopAt(10), **sections)
    turns = 0
    while not done:
        turns += 1
        assert turns < 30
        again = load_run_config(tmp_path / "parts")
        done = train(again, Console(quiet=True), StopAt(10 + 8 * turns))
    assert turns > 1
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
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
    assert train(longer, Console(quiet=True), lambda: False)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1]
    # Its teacher is not trained on behind its back.
    sft["train"]["num_steps"] = 3
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    longer = load_run_config(tmp_path / "run", ["train.num_steps=3"])
    with pytest.raises(ValueError, match=r"teacher|student") as refused:
        train(longer, Console(quiet=True), lambda: False)
    assert "train.num_steps was 2, is 3" in str(refused.value)
    assert len(metrics(tmp_path / "run")) == 2


def test_other_settings_in_the_same_directory_are_refused(uninterrupted, tmp_path):
    before = (uninterrupted / "config.yaml").read_text()
    settings = ["train.num_steps=9", "kd.max_abs_logratio=7"]
    for config in (
        load_config(config_file(tmp_path), [f"log.dir={uninterrupted}", *settings]),
        load_run_config(uninterrupted, settings),
    ):
        with pytest.raises(ValueError, match=r"\(kd\.max_abs_logratio was .*, is 7\.0\)") as refused:
            train(config, Console(quiet=True), lambda: False)
        assert "--accept-changes" in str(refused.value)
    assert (uninterrupted / "config.yaml").read_text() == before


def test_a_refused_resume_changes_nothing(uninterrupted):
    """Settings that do not fit the checkpoint: one line, and the run is as it was."""
    before = (uninterrupted / "config.yaml").read_text()
    for override, wanted in {
        "student.architecture.hidden_size=32": "does not fit",
        "optimizer.kind=muon": "does not fit",
        "seed=5": "seed",
    }.items():
        config = load_run_config(uninterrupted, [override, "train.num_steps=6"])
        with pytest.raises(ValueError, match=wanted):
            train(config, Console(quiet=True), lambda: False, accept_changes=True)
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
    assert train(again, Console(quiet=True), lambda: False)
    assert is_complete(config)
    # By its place inside, so that both can be moved.
    assert json.loads((tmp_path / "run" / "models.json").read_text())["student"]["run"] == "student"
    # What has been trained first is not trained again, whatever is accepted.
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**sft, "seed": 3, "optimizer": {"b1": 0.8}}))
    replaced = [f"log.dir={tmp_path / 'run'}", f"student.run={tmp_path / 'other.yaml'}"]
    other = load_config(tmp_path / "kdrl.yaml", replaced)
    with pytest.raises(ValueError, match=r"b1 was 0.9, is 0.8.*give student.run=.*run/student to take it"):
        trained_first(other, accept_changes=True)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
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


def test_runs_that_are_trained_first_have_this_run_s_seed_and_mesh(tmp_path):
    """A mesh is the machine's: on several slices `data` must be their number there, too."""
    inner = config_file(tmp_path)
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"extends: {inner.name}\nteacher: {{run: {inner.name}}}\nkd: {{coef: 1}}\n")
    config = load_config(outer, ["seed=5", "mesh.data=4", f"log.dir={tmp_path / 'run'}"])
    (first,) = prerequisites(config).values()
    assert (first.seed, first.mesh, first.run_dir) == (5, config.mesh, str(tmp_path / "run" / "teacher"))


def test_a_mistake_is_found_before_others_are_trained_and_can_be_mended(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    inner = config_file(tmp_path)
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"extends: {inner.name}\nteacher: {{run: {inner.name}}}\n")
    argv = ["--config", str(outer), "log.dir=run"]
    before = written(tmp_path)
    assert main([*argv, "reward.verifier=numerc"]) == 2
    assert "numerc" in capfd.readouterr().err
    assert written(tmp_path) == before
    assert main([*argv, "train.prompts_per_iteration=9"]) == 2
    assert "prompts_per_iteration=9 does not divide" in capfd.readouterr().err
    # Of the teacher's run it says whose they are.
    inner.write_text(inner.read_text().replace("prompts_per_iteration: 8", "prompts_per_iteration: 9"))
    assert main([*argv, "train.prompts_per_iteration=8"]) == 2
    assert f"teacher.run={tmp_path / inner.name}, which is trained first: train.pro" in capfd.readouterr().err
    assert written(tmp_path) == before


def test_nothing_depends_on_settings_before_the_first_step(tmp_path):
    config = load_config(config_file(tmp_path), [f"log.dir={tmp_path / 'run'}"])
    other = load_config(config_file(tmp_path), [f"log.dir={tmp_path / 'run'}", "kd.coef=0.5"])
    (tmp_path / "run").mkdir()
    save_config(config, config.run_dir)
    check_same_run(other)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"kd\.coef"):
        check_same_run(other)


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


@pytest.mark.parametrize(
    "student",
    [{}, pytest.param({"lora": {"rank": 2}}, marks=pytest.mark.slow)],
    ids=["weights", "adapters"],
)
def test_at_learning_rate_0_the_mean_ratio_is_1(student, tmp_path):
    """Whatever the temperature and however many updates: sampler, trainer and old policy are one."""
    sections = {
        "student": student,
        "rollout": {"temperature": {"kind": "linear", "start": 0.6, "end": 1.4, "steps": 8}},
        "optimizer": {"learning_rate": 0.0},
        "train": {"num_steps": 8, "num_minibatches": 2, "num_epochs": 2},
        "ref": {"coef": 0.1},
        "data": {"eval": []},
        "eval": {"every": 0, "agreement": False},
    }
    assert run(tmp_path, "run", **sections)[1]
    rows = metrics(tmp_path / "run")
    np.testing.assert_allclose([r["temperature"] for r in rows], [0.6] * 4 + [1.0] * 4, rtol=1e-6)
    for row in rows:
        assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert row["ratio/ess"] == pytest.approx(1.0, abs=1e-5)
        assert row["sampler/logprob_gap"] < 1e-5
        assert row["rl/clip_low_frac"] == row["rl/clip_high_frac"] == 0
        # The reference is the student as it started, and it has not moved.
        assert abs(row["ref/reverse_kl"]) < 1e-5
    # Another pass over the same samples changes nothing at learning rate 0.
    for a, b in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert rows[a]["kd/reverse_kl"] == pytest.approx(rows[b]["kd/reverse_kl"], rel=1e-4)


def test_trained_ids_are_the_sampled_ids(tmp_path, monkeypatch):
    """Never retokenised: the update sees what the engine drew, as it drew it."""
    seen = {"sampled": [], "trained": []}
    generate, run_update = Engine.generate, train_module.Run.run_update

    def record_sampled(self, *args, **kwargs):
        rollouts = generate(self, *args, **kwargs)
        mask = np.asarray(rollouts.completion_mask_BT)
        seen["sampled"].append(np.where(mask, rollouts.tokens_BT, -1))
        return rollouts

    def record_trained(self, minibatch):
        rows = minibatch.packs.rows
        mask = minibatch.batch.completion_mask_BT
        seen["trained"].append(np.where(mask, rows.put_back(rows.targets_RN, mask), -1))
        # In the packed row each token follows the state that predicts it.
        r, n = np.nonzero(rows.is_token_RN)
        tokens, at = np.asarray(rows.tokens_RT), np.asarray(rows.predictors_RN)
        first = (
            np.asarray(rows.columns_RN)
            == np.asarray(minibatch.batch.starts_B)[np.minimum(rows.rows_RN, len(mask) - 1)]
        )
        later = ~first[r, n]
        np.testing.assert_array_equal(
            tokens[r[later], at[r[later], n[later]] + 1], np.asarray(rows.targets_RN)[r[later], n[later]]
        )
        return run_update(self, minibatch)

    monkeypatch.setattr(Engine, "generate", record_sampled)
    monkeypatch.setattr(train_module.Run, "run_update", record_trained)
    assert run(tmp_path, "run", data={"eval": []}, eval={"every": 0, "agreement": False})[1]
    assert len(seen["trained"]) == 4
    for sampled, trained in zip(seen["sampled"], seen["trained"], strict=True):
        np.testing.assert_array_equal(sampled, trained)


def test_schedules_compile_nothing_again(tmp_path, monkeypatch):
    """Another temperature, clip or coefficient is another number in the same program."""
    compiled, after = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    iteration = train_module.Run.iteration
    monkeypatch.setattr(
        train_module.Run, "iteration", lambda self: (iteration(self), after.append(len(compiled)))
    )
    rise = {"kind": "linear", "start": 0.5, "end": 1.5, "steps": 4}
    sections = {
        "rollout": {"temperature": rise},
        "rl": {"clip_low": {"kind": "linear", "start": 0.1, "end": 0.2, "steps": 4}, "coef": rise},
        "train": {"diagnostics_every": 0},
        "data": {"eval": []},
        "eval": {"every": 0, "agreement": False},
        "checkpoint": {"every": 0},
    }
    assert run(tmp_path, "run", **sections)[1]
    assert compiled
    assert after[1:] == [after[0]] * 3
    rows = metrics(tmp_path / "run")
    np.testing.assert_allclose([r["rl/clip_low"] for r in rows], [0.1, 0.125, 0.15, 0.175], rtol=1e-6)
    np.testing.assert_allclose([r["temperature"] for r in rows], [0.5, 0.75, 1.0, 1.25], rtol=1e-6)


def test_a_run_with_two_teachers(tmp_path):
    """Each source's own; both are measured, and the rows of one never see the other."""
    tree = {
        "teacher": None,
        "teachers": {
            "small": {"architecture": {**SHAPE, "hidden_size": 32}},
            "wide": {"architecture": {**SHAPE, "hidden_size": 48}},
        },
        "data": {
            "train": [
                {**TASK, "teacher": "small"},
                {"kind": "task", "task": "chain_sum", "max_terms": 2, "teacher": "wide"},
            ],
        },
        "kd": {"estimator": "full"},
        "eval": {"every": 0, "agreement": False, "num_samples": 0},
    }
    assert run(tmp_path, "run", **tree)[1]
    names = sorted(p.name for p in (tmp_path / "run" / "eval").iterdir())
    assert names[-2:] == ["teachers.small.json", "teachers.wide.json"]
    assert all(row["kd/reverse_kl_exact"] > 0 for row in metrics(tmp_path / "run"))


@pytest.mark.parametrize(("done", "wanted"), [("before", 0.05), ("after", 0.1), ("never", 0.1)])
def test_hidden_time_ends_when_the_work_does_or_is_waited_for(done, wanted):
    clock, work = Clock(), Future()
    waits = clock.in_background("time/work_hidden", work)
    time.sleep(0.05)
    if done == "before":
        work.set_result(None)
    time.sleep(0.05)
    waits()
    if done == "after":
        time.sleep(0.05)
        work.set_result(None)
    clock.lap("time/other")
    summary = clock.summary(10)
    assert wanted - 1e-3 < summary["time/work_hidden"] < wanted + 0.04
    # What nobody waited for takes nothing from the throughput.
    assert summary["tokens_per_second"] == pytest.approx(10 / summary["time/other"])
    clock.in_background("time/none_hidden", None)()
    assert "time/none_hidden" not in clock.laps


@pytest.mark.slow
def test_a_cpu_is_taken_apart(tmp_path):
    """In a process of its own, before JAX starts: rows lie on both devices. Here it has started."""
    path = config_file(tmp_path, mesh={"cpu_devices": 2}, log={"dir": str(tmp_path / "run")})
    code = f"""
import jax
from kdrl_jax.main import main
status = main(["--config", {str(path)!r}, "train.num_steps=1", "eval.num_samples=0"])
print(status, jax.device_count())
"""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.splitlines()[-1] == "0 2"
    assert main(["--config", str(path), f"log.dir={tmp_path / 'other'}"]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("steps", "updates", "traced"),
    [((2, 4), 1, [2, 3]), ((2, 4), 4, [0]), ((5, 6), 4, [4]), ((4, 8), 4, [4]), ((3, 5), 4, [0, 4])],
)
def test_iterations_that_hold_the_steps_are_traced(monkeypatch, tmp_path, steps, updates, traced):
    on = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: on.append(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", on.clear)
    profiler, seen = Profiler(tmp_path, steps), []
    for step in range(0, 16, updates):
        profiler.at(step, step + updates)
        if on:
            seen.append(step)
    assert seen == traced


def test_what_only_observes_a_run_may_change(tmp_path):
    path = config_file(tmp_path, log={"dir": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    save_config(load_config(path, []), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    same = ["plan.topology=v6e:2x4", "cache_dir=null", "log.profile_steps=[1, 2]"]
    check_same_run(load_config(path, same))
    with pytest.raises(ValueError, match=r"seed was \d+, is 9"):
        check_same_run(load_config(path, [*same, "seed=9"]))


@pytest.mark.slow
def test_steps_are_traced(tmp_path):
    """One trace of whole iterations, with the scopes of the model's blocks in it."""
    _, done = run(tmp_path, "run", log={"profile_steps": [1, 2]}, eval={"every": 0, "agreement": False})
    assert done
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    held = trace.read_bytes()
    for scope in (b"attention", b"mlp", b"head", b"optimizer", b"microbatches"):
        assert scope in held, scope
