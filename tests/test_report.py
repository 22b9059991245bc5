"""The report: what it is made from."""

import base64
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import HOSTILE, make_run, page_of, quiet, rollouts, unpacked
from rich.console import Console

from kdrl_jax import progress
from kdrl_jax.config import ConfigError
from kdrl_jax.config.schedules import value_at
from kdrl_jax.main import main, parse
from kdrl_jax.metrics import write_json, write_jsonl
from kdrl_jax.report import page as page_module
from kdrl_jax.report import report
from kdrl_jax.report import samples as samples_module
from kdrl_jax.report.panels import drawn
from kdrl_jax.report.reading import group_runs, names_of, read_evaluations, read_run, read_runs
from kdrl_jax.report.samples import Samples, fit, pack
from kdrl_jax.report.table import evaluation_table


def test_schedules_ahead_are_those_of_training():
    from kdrl_jax.config.schema import OptimizerConfig
    from kdrl_jax.optim import make_schedule

    for warmup in (0, 4):
        for setting in (
            3e-4,
            {"kind": "linear", "start": 1.0, "end": 0.2, "steps": 7},
            {"kind": "cosine", "start": 0.1, "end": 2.0, "steps": 9},
            {"kind": "exponential", "start": 1.0, "rate": 0.3, "steps": 5},
            {"kind": "exponential", "start": 1.0, "rate": 0.3, "steps": 5, "end": 0.4},
            {"kind": "exponential", "start": 1.0, "rate": 3.0, "steps": 5, "end": 4.0},
            {"kind": "piecewise", "values": {0: 1.0, 5: 0.5, 11: 0.1}},
            {"kind": "max_linear", "a": 1.0, "b": 0.1, "c": 0.3},
        ):
            full = setting if isinstance(setting, dict) else {"kind": "constant", "value": setting}
            schedule = OptimizerConfig(learning_rate=full | {"warmup_steps": warmup}).learning_rate
            expected = make_schedule(schedule)
            for step in (0, 1, 3, 4, 5, 9, 12, 30):
                assert value_at(schedule, step) == pytest.approx(float(expected(step)), rel=1e-5, abs=1e-7)


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    a, b = (make_run(tmp_path, f"a{i}", seed=i, every=20) for i in range(2))
    other = make_run(tmp_path, "b", every=20, overrides=["kd.coef=0.25"])
    out = report(a, quiet(), others=[b, other, a], out=tmp_path / "all.html")
    data = unpacked(out.read_text(), "data")
    assert [[r["name"] for r in g["runs"]] for g in data["groups"]] == [["a0", "a1"], ["b"]]
    assert data["groups"][1]["differs"] == ["kd.coef.kind=constant", "kd.coef.value=0.25"] or (
        "0.25" in str(data["groups"][1]["differs"])
    )
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert [g.label for g in group_runs([read_run(a), read_run(other)])] == ["a0", "b"]


def test_what_is_still_to_come_and_long_runs(tmp_path, monkeypatch):
    run = make_run(tmp_path, "run", steps=40, of=60)
    monkeypatch.setattr(page_module, "MAX_POINTS", 10)
    data = unpacked(page_of(run).read_text(), "data")
    (found,) = data["groups"][0]["runs"]
    assert found["ahead"]["steps"] == list(range(40, 60))
    assert found["ahead"]["series"]["kd/coef"] == [0.5] * 20
    assert "ref/coef" not in found["ahead"]["series"]
    assert data["groups"][0]["mean_of"] == 4
    assert len(found["steps"]) == 10
    assert found["series"]["completion/length_mean"][0] == pytest.approx(21.5)


def none_told(*_):
    pass


def test_samples_beyond_the_size_are_left_out_and_it_says_so(tmp_path, monkeypatch):
    run = make_run(tmp_path, "run", steps=40, every=2, text="a" * 200)
    whole = unpacked(page_of(run).read_text(), "data")["samples"][0]
    assert len(whole["steps"]) == whole["logged"] == 20
    block = samples_module._size(pack(rollouts(0, text="a" * 200)))
    monkeypatch.setattr(samples_module, "CAPS", (None,))
    for room, kept in ((block * 7.5, 7), (block * 2.7, 2), (block, 2), (100, 0)):
        shown, blocks = fit([Samples("run", read_run(run).rollouts())], int(room), none_told)
        assert sum(map(len, blocks)) <= room
        steps = [s["step"] for one in shown for s in one["steps"]]
        assert len(steps) == kept
        if kept:
            assert (steps[0], steps[-1]) == (0, 38)
        if room == block:
            assert shown[0]["steps"][0]["rows"] < shown[0]["steps"][0]["of"] == 16


def long_rows(num, length):
    """Rows of tokens whose numbers compress as little as real ones."""
    rng = np.random.default_rng(0)

    def row(sample):
        texts = [f" {x}" for x in rng.integers(0, 10**6, length)]
        numbers = [float(f"{x:.3g}") for x in rng.exponential(size=length)]
        tops = [[[text, x, x]] for text, x in zip(texts, numbers, strict=True)]
        told = {"texts": texts, "names": {}, "logprobs": [-x for x in numbers], "reverse_kl": numbers}
        told |= {"teacher_logprobs": numbers, "teacher_top": tops, "teacher_rank": [0] * length}
        asked = {"question": "?", "answer": "1", "source": "s", "sample": sample}
        verdict = {"reward": 1.0, "correct": True, "finish": "end", "advantage": 0.5}
        return asked | verdict | {"completion": "".join(texts), "tokens": told}

    return [row(sample) for sample in range(num)]


@pytest.mark.parametrize("room", [4_600_000, 300_000, 30_000, 3_000])
def test_long_completions_lose_numbers_and_never_the_room(tmp_path, room):
    """Files are read one at a time, and those alone that are shown."""
    rows = long_rows(4, 6000)
    for step in range(12):
        write_jsonl(tmp_path / f"step_{step:06d}.jsonl", rows)
    files = {step: tmp_path / f"step_{step:06d}.jsonl" for step in range(12)}
    seen = []

    def read(path):
        seen.append(path)
        return samples_module.read_jsonl(path)

    shown, blocks = fit([Samples(name, files, read) for name in "ab"], room, none_told)
    assert sum(map(len, blocks)) <= room
    assert len(seen) <= len(blocks) + 4
    if room > 3_000:
        assert [one["run"] for one in shown] == ["a", "b"]
        assert all({0, 11} <= {s["step"] for s in one["steps"]} for one in shown)
    if room == 4_600_000:
        assert all(len(one["steps"]) >= 10 and one["steps"][0]["rows"] == 4 for one in shown)
        (row, *_) = json.loads(gzip.decompress(base64.b64decode(blocks[0])))
        tokens = row["tokens"]
        assert tokens["of"] == 6000
        assert {len(tokens[k]) for k in tokens.keys() - {"of", "names"}} == {len(tokens["texts"])}
        assert row["completion"] == rows[0]["completion"]


def test_what_is_not_finite_is_null(tmp_path):
    run = make_run(tmp_path, "run")
    nan = float("nan")
    rows = rollouts(0)
    rows[0]["tokens"]["reverse_kl"][1] = rows[0]["tokens"]["logprobs"][0] = rows[1]["reward"] = nan
    rows[0]["tokens"]["teacher_top"][0][0][1] = float("inf")
    found = {"step": 0, "num_prompts": 64, "greedy/accuracy": nan, "greedy/accuracy_ci": [nan, nan]}
    # As files of before have it, and as they are written now.
    (run / "eval" / "step_000000.json").write_text(json.dumps(found))
    (run / "rollouts" / "step_000000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "loss": nan, "entropy": 0.5}) + "\n")
    html = report(run, Console(file=io.StringIO())).read_text()
    data = unpacked(html, "data")
    assert data["groups"][0]["runs"][0]["series"]["loss"][-1] is None
    assert data["groups"][0]["runs"][0]["evaluations"][1]["greedy/accuracy"] is None
    assert unpacked(html, "block-0")[0]["tokens"]["reverse_kl"][1] is None
    write_json(tmp_path / "now.json", found)
    write_jsonl(tmp_path / "now.jsonl", rows)
    for name in ("now.json", "now.jsonl"):
        assert not re.search(r"\b(NaN|Infinity)\b", (tmp_path / name).read_text())
        assert re.search(r"\bnull\b", (tmp_path / name).read_text())


def test_runs_of_one_name_and_one_run_of_two_names(tmp_path, monkeypatch):
    ours, theirs = (
        make_run(tmp_path / "a", "run", every=20),
        make_run(tmp_path / "b", "run", every=20, seed=1),
    )
    monkeypatch.chdir(ours)
    runs = read_runs([Path("."), ours, tmp_path / "b" / ".." / "a" / "run", theirs])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert read_run(Path(".")).name == "run"
    data = unpacked(page_of(ours, Path("."), theirs).read_text(), "data")
    assert [(one["run"], len(one["steps"])) for one in data["samples"]] == [("a/run", 2), ("b/run", 2)]
    assert names_of([Path("/x/run"), Path("/run"), Path("/y/x/run")]) == ["x/run", "run", "y/x/run"]


def test_what_a_branch_that_was_given_up_has_left_is_not_shown(tmp_path):
    run = make_run(tmp_path, "run", steps=40)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:20]))  # back at a checkpoint, and on from there
    write_jsonl(run / "rollouts" / "some_notes.jsonl", [{}])
    write_jsonl(run / "rollouts" / "step_best.jsonl", [{}])
    found = read_run(run)
    assert list(found.rollouts()) == [0, 10]
    assert [name for name in found.evaluations if name.startswith("student")] == [
        "student, step 0",
        "student, step 10",
        "student, step 20",
    ]


def test_every_model_of_every_eval_is_shown(tmp_path):
    run = make_run(tmp_path, "run")
    each = {"teacher": {"num_prompts": 9, "greedy/accuracy": 0.9}}
    each |= {f"step_{s:06d}": {"step": s, "num_prompts": 9, "greedy/accuracy": s / 40} for s in (10, 20)}
    write_json(run / "eval" / "eval_1.json", {"overrides": [], "evaluations": each})
    other = {"step_000020": each["step_000020"]}
    write_json(run / "eval" / "eval_2.json", {"overrides": ["eval.temperature=0.5"], "evaluations": other})
    found = read_evaluations(run)
    assert [name for name in found if name.startswith("eval")] == [
        "eval, teacher",
        "eval, step 10",
        "eval, step 20",
        "eval with eval.temperature=0.5, step 20",
    ]


def test_evaluations_whose_names_are_the_same_or_hold_markup_are_all_shown(tmp_path):
    run = make_run(tmp_path, "run")
    overrides = [
        f"data.eval={json.dumps([{'kind': 'jsonl', 'other': 'x' * 90}])}",
        "rollout.stop=['[/INST]', '[b]']",
    ]
    for number, digest in enumerate(("aaaaaaa", "bbbbbbb")):
        each = {"step_000020": {"step": 20, "num_prompts": 9 + number, "greedy/accuracy": 0.5}}
        late = {"step_000099": {"step": 99, "num_prompts": 9, "greedy/accuracy": 0.5}}
        content = {"overrides": overrides, "evaluations": each | late}
        write_json(run / "eval" / f"eval_{digest}.json", content)
    found = read_run(run).evaluations
    assert sorted(results["num_prompts"] for name, results in found.items() if name.startswith("eval")) == [
        9,
        10,
    ]
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(evaluation_table("run [/b]", found))
    said = console.export_text()
    assert said.count("rollout.stop=['[/INST]', '[b]']") == 2
    assert "(bbbbbb), step 20" in said
    assert "run [/b]: held-out" in said


def test_an_evaluation_of_a_model_alone_has_no_step(tmp_path):
    """`eval --config MODEL out=RUN/eval`."""
    run = make_run(tmp_path, "run")
    results = {"step": None, "num_prompts": 9, "greedy/accuracy": 0.5}
    write_json(run / "eval" / "eval_1.json", {"overrides": [], "evaluations": {"student": results}})
    assert read_run(run).evaluations["eval, student"] == results


def test_panels_find_what_has_many_names(tmp_path):
    run = make_run(
        tmp_path, "run", of=60, overrides=["ref.coef={kind: piecewise, values: {0: 0.0, 50: 0.1}}"]
    )
    for step in (0, 40):
        more = {f"sampled/pass@{k}": 0.1 * step / 40 for k in (1, 2, 16)} | {"sampled/maj@16": 0.5}
        file = run / "eval" / f"step_{step:06d}.json"
        write_json(file, json.loads(file.read_text()) | more)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    write_jsonl(run / "metrics.jsonl", [row | {"reward/part/numeric": 0.5} for row in rows])
    assert "parts of the reward" not in [panel.title for panel in drawn([read_run(run)])]
    parts = {"reward/part/numeric": 0.5, "reward/part/format": 0.1}
    write_jsonl(run / "metrics.jsonl", [row | parts for row in rows])
    panels = {panel.title: panel.keys for panel in drawn([read_run(run)])}
    assert panels["held-out: pass@k and maj@k"] == ("sampled/pass@2", "sampled/pass@16", "sampled/maj@16")
    assert panels["parts of the reward"] == ("reward/part/format", "reward/part/numeric")
    # 0 so far, and not for ever.
    assert panels["coefficients"] == ("rl/coef", "kd/coef", "ref/coef")
    assert "entropy/coef" not in panels["coefficients"]


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    console = Console(file=io.StringIO())
    report(make_run(tmp_path, "run"), console)
    said = console.file.getvalue()
    assert "report: reading\n" in said
    assert "report: samples of run: 3 of 4, 0:00 left\n" in said


def test_a_log_file_has_whole_numbers_in_its_table(tmp_path, capsys):
    run = make_run(tmp_path, "run")
    for file in (run / "eval").glob("*.json"):
        every = {f"sampled/{x}": 0.123 for x in ("accuracy", "truncated_frac", "repeated_4gram_frac")}
        every |= {f"{key}_ci": [0.1, 0.2] for key in every} | {"sampled/length_mean": 20.0}
        write_json(file, json.loads(file.read_text()) | every)
    assert main(["report", "--config", str(run)]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert "12.3% (10.0–20.0)" in said


def test_hostile_texts_never_reach_the_markup(tmp_path):
    html = page_of(make_run(tmp_path, "run")).read_text()
    assert "onerror" not in html
    assert html.count("</script>") == html.count("<script")
    assert unpacked(html, "block-0")[0]["completion"].startswith(HOSTILE)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|https?://(?!www\.w3\.org/2000/svg)", html)


def test_options_of_the_command(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, "run", every=20)
    assert main(["report", "--config", str(run), f"runs={run}, ", f"out={tmp_path / 'x.html'}"]) == 0
    assert f"report: {tmp_path / 'x.html'}" in capsys.readouterr().out
    assert main(["report", "--config", str(run), "out=x.pdf"]) == 2
    assert "ends in .html" in capsys.readouterr().err
    assert main(["report", "--config", str(run), f"runs={tmp_path / 'none'}"]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean runs"):
        parse(["report", "--config", str(run), "run=x"])


def test_points_of_seeds_are_means_over_the_same_steps(tmp_path, monkeypatch):
    runs = [make_run(tmp_path, f"run{i}", steps=n, of=60, seed=i, every=30) for i, n in enumerate((40, 25))]
    monkeypatch.setattr(page_module, "MAX_POINTS", 10)
    data = unpacked(page_of(*runs).read_text(), "data")
    (first, second) = data["groups"][0]["runs"]
    assert first["steps"][:6] == second["steps"][:6] == [2, 6, 10, 14, 18, 22]
    assert (len(first["steps"]), len(second["steps"])) == (10, 7)


def test_the_assets_are_in_the_package():
    files = {p.suffix for p in Path(page_module.__file__).parent.iterdir()}
    wanted = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for suffix in files - {".py", ""}:
        assert f'"*{suffix}"' in wanted
