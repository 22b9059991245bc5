"""What an evaluation measures, and the `eval` command."""

import gc
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import TASK, config_file, run

from kdrl_jax.config import load_run_config
from kdrl_jax.config.commands import EvalOptions, read_options
from kdrl_jax.config.errors import ConfigError
from kdrl_jax.config.evaluation import model_digest
from kdrl_jax.eval import command, evaluate
from kdrl_jax.eval.checkpoints import choose_steps
from kdrl_jax.eval.progress import EvalProgress
from kdrl_jax.evaluate.agreement import RowSums
from kdrl_jax.evaluate.results import Answers, agreement_results, answer_results, source_results
from kdrl_jax.held_out import make_evaluator
from kdrl_jax.main import main
from kdrl_jax.metrics import read_json, read_jsonl
from kdrl_jax.paths import check_writable
from kdrl_jax.progress import make_console
from kdrl_jax.record import Record, read_accuracies, read_teacher
from kdrl_jax.report import read_evaluations
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.setup import make_setup
from kdrl_jax.statistics import difference_interval, mean_interval, share_interval
from kdrl_jax.writers.base import plain_scalars

SOURCES = [
    {**TASK, "split": "heldout"},
    {"kind": "task", "task": "chain_sum", "max_value": 3, "max_terms": 2},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Evaluated at 0, 2 and 4, on questions of two sources."""
    folder = tmp_path_factory.mktemp("eval")
    data = {"eval": SOURCES}
    _, done = run(folder, "run", data=data, eval={"num_prompts": 11, "num_samples": 3, "keep_samples": 7})
    assert done
    return folder / "run"


def answers_of(correct, votes=None, lengths=None):
    correct = np.array(correct, bool)
    shape = correct.shape
    return Answers(
        correct_PN=correct,
        failed_PN=np.zeros(shape, bool),
        votes_PN=np.zeros(shape, int) if votes is None else np.array(votes),
        lengths_PN=np.full(shape, 3) if lengths is None else np.array(lengths),
        ended_PN=correct,
        ngrams_PN2=np.tile([1, 4], (*shape, 1)),
    )


def test_results_by_hand():
    answers = answers_of(
        [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
        votes=[[0, 0, 2, 3], [0, 1, 1, -1], [0, 0, 0, 0]],
        lengths=[[1, 2, 3, 4], [8, 8, 8, 8], [2, 2, 2, 2]],
    )
    found = answer_results("sampled", answers, longest=8)
    assert found["sampled/num_samples"] == 4
    assert found["sampled/accuracy"] == found["sampled/pass@1"] == 6 / 12
    assert found["sampled/pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert found["sampled/pass@4"] == pytest.approx(2 / 3)
    assert found["sampled/maj@4"] == pytest.approx(2 / 3)
    assert found["sampled/length_mean"] == (10 + 32 + 8) / 12
    assert found["sampled/truncated_frac"] == 6 / 12
    assert found["sampled/repeated_4gram_frac"] == 0.25
    # Of the three questions, not of the twelve answers.
    assert found["sampled/accuracy_ci"] == list(share_interval(np.array([0.5, 0, 1])))
    assert found["sampled/length_mean_ci"] == list(mean_interval(np.array([2.5, 8, 2]), most=8.0))
    json.dumps(found)
    assert source_results({"sampled": answers}, ["a"] * 3, 8) is None
    by_source = source_results({"sampled": answers}, ["a", "b", "a"], 8)
    assert by_source is not None
    assert by_source["a"]["num_prompts"] == 2
    assert by_source["a"]["sampled/accuracy"] == 6 / 8
    assert by_source["b"]["sampled/accuracy"] == 0


def test_agreement_is_of_tokens_and_its_interval_of_questions():
    sums = RowSums(np.array([1.0, 30.0]), np.array([2.0, 20.0]), np.array([1.0, 0.0]), np.array([1.0, 9.0]))
    found = agreement_results(sums)
    assert found["teacher_reverse_kl"] == 3.1
    assert found["teacher_forward_kl"] == 2.2
    assert found["teacher_top_agreement"] == 0.1
    assert found["teacher_reverse_kl_ci"] == list(mean_interval(sums.reverse_kl_B, sums.tokens_B))


def test_what_an_evaluation_leaves(trained):
    found = read_json(trained / "eval" / "step_000004.json")
    for name in (
        "greedy/accuracy",
        "sampled/accuracy",
        "sampled/pass@2",
        "sampled/maj@3",
        "teacher_forward_kl",
    ):
        low, high = found[f"{name}_ci"]
        assert low <= found[name] <= high
    assert len(found["by_source"]) == 2
    counts = [part["num_prompts"] for part in found["by_source"].values()]
    assert sum(counts) == found["num_prompts"] == 11
    weighted = [p["sampled/accuracy"] * n for p, n in zip(found["by_source"].values(), counts, strict=True)]
    assert sum(weighted) / 11 == pytest.approx(found["sampled/accuracy"])
    rows = read_jsonl(trained / "eval" / "samples" / "step_000004.jsonl")
    assert len(rows) == 7
    for row in rows:
        assert set(row) == {"question", "answer", "source", "greedy", "sampled"}
        assert len(row["sampled"]) == 3
        for answer in (row["greedy"], *row["sampled"]):
            assert set(answer) == {"completion", "correct", "tokens", "finish"}
            assert answer["finish"] in ("end", "length")
            # Of single characters; special tokens are no text.
            assert len(answer["completion"]) <= answer["tokens"] <= 10
            assert (answer["tokens"] == 10) or answer["finish"] == "end"
    assert found["settings"] == model_digest(load_run_config(trained), "student")
    scalars = plain_scalars(found, "eval/")
    assert scalars["eval/greedy/accuracy_ci_low"] == found["greedy/accuracy_ci"][0]
    assert all(isinstance(x, float) for x in scalars.values())


def test_samples_are_the_answers_that_were_judged(trained):
    """All kept: the numbers of the file follow from its samples."""
    config = load_run_config(trained, ["eval.keep_samples=64", "eval.agreement=false"])
    setup = make_setup(config)
    with RewardPool(["numeric"], 1, 2.0) as pool:
        evaluator = make_evaluator(setup, pool)
        params = setup.student_params(setup.init_trainable())
        found = evaluator.accuracy(setup.student, params)
        again = pool.score(
            [row["question"] for row in found.samples],
            [row["greedy"]["completion"] for row in found.samples],
            [row["answer"] for row in found.samples],
        )
        with pytest.raises(Stopped):
            evaluator.accuracy(setup.student, params, should_stop=lambda: True)
    assert found.results == {k: v for k, v in read_json(trained / "eval/step_000000.json").items()
                             if k not in ("step", "settings") and not k.startswith("teacher_")}  # fmt: skip
    assert len(found.samples) == 11
    assert [row["greedy"]["correct"] for row in found.samples] == [s.scores["numeric"] >= 1 for s in again]
    sampled = [[answer["correct"] for answer in row["sampled"]] for row in found.samples]
    np.testing.assert_array_equal(found.accuracy_P["sampled/accuracy"], np.mean(sampled, axis=1))
    assert found.results["sampled/accuracy"] == pytest.approx(np.mean(sampled))
    lengths = [answer["tokens"] for row in found.samples for answer in row["sampled"]]
    assert found.results["sampled/length_mean"] == np.mean(lengths)


def test_agreement_against_whole_logits(trained):
    """In float64, question by question, with the softmax of the whole vocabulary written out."""
    setup = make_setup(load_run_config(trained))
    assert setup.teacher is not None
    params, theirs = setup.student_params(setup.init_trainable()), setup.teacher.on_device()
    with RewardPool(["numeric"], 1, 2.0) as pool:
        evaluator = make_evaluator(setup, pool)
        results = evaluator.agreement(params)
        rows = [
            (
                np.asarray(r.tokens_BT),
                np.asarray(r.prompt_lengths_B),
                np.asarray(r.completion_lengths_B),
                len(n.questions),
            )
            for r, n in evaluator._answers_of_teacher(None, "", None)
        ]

    def logp(model, params, tokens):
        decoder = model.bind(params)
        hidden = decoder.hidden(jnp.asarray(tokens)[None])[0]
        head = decoder.output_head()
        logits = np.asarray(jnp.einsum("td,vd->tv", hidden, head.kernel), np.float64)[:, : setup.num_tokens]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    reverse, forward, same, counts = [], [], [], []
    with jax.set_mesh(setup.mesh):
        for tokens_BT, starts, lengths, num in rows:
            for tokens, start, length in list(zip(tokens_BT, starts, lengths, strict=True))[:num]:
                at = slice(start - 1, start + length - 1)
                s = logp(setup.student, params, tokens[: start + length])[at]
                t = logp(setup.teacher.model, theirs, tokens[: start + length])[at]
                reverse.append((np.exp(s) * (s - t)).sum())
                forward.append((np.exp(t) * (t - s)).sum())
                same.append((s.argmax(-1) == t.argmax(-1)).sum())
                counts.append(length)
    assert len(counts) == 11
    assert results["teacher_reverse_kl"] == pytest.approx(sum(reverse) / sum(counts), rel=1e-4)
    assert results["teacher_forward_kl"] == pytest.approx(sum(forward) / sum(counts), rel=1e-4)
    assert results["teacher_reverse_kl"] != pytest.approx(results["teacher_forward_kl"], rel=1e-3)
    assert results["teacher_top_agreement"] == pytest.approx(sum(same) / sum(counts))
    expected = mean_interval(np.array(forward), np.array(counts))
    assert results["teacher_forward_kl_ci"] == pytest.approx(expected, rel=1e-3)


def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def results_of(folder):
    """Of the only file there that the command has written."""
    (file,) = folder.glob("eval_*.json")
    return read_json(file)


def test_checkpoints_side_by_side(trained, tmp_path, capsys, monkeypatch):
    ends = []

    class Counted(EvalProgress):
        def __exit__(self, *error):
            ends.append((self._done, self._total))
            super().__exit__(*error)

    monkeypatch.setattr(command, "EvalProgress", Counted)
    run_dir = copied(trained, tmp_path)
    folder = run_dir / "eval"
    assert main(["eval", "--config", str(run_dir), "steps=2,4", "with_teacher=true"]) == 0
    # Of 11 questions 4 answers of three models, and two comparisons on what the teacher has said.
    assert ends == [(11 * 14, 11 * 14)]
    said = capsys.readouterr().out
    for text in ("step 2", "step 4", "teacher", "change, 2 to 4", "greedy/accuracy", " %"):
        assert text in said
    found = results_of(folder)
    assert found["overrides"] == []
    assert found["settings"]["data"]["eval"][0]["task"] == "chain_sum"
    assert found["settings"]["eval"]["temperature"] == 1.0
    each = found["evaluations"]
    assert list(each) == ["teacher", "step_000002", "step_000004"]
    for name, results in each.items():
        assert results == read_json(folder / f"{name}.json")
        kept = f"eval_{found['digest']}_{name}"
        rows, before = (read_jsonl(folder / "samples" / f"{n}.jsonl") for n in (kept, name))
        assert rows == before
    changed = found["change"]
    assert changed["greedy/accuracy"] == pytest.approx(
        each["step_000004"]["greedy/accuracy"] - each["step_000002"]["greedy/accuracy"]
    )
    assert changed["greedy/accuracy_ci"][0] <= changed["greedy/accuracy"] <= changed["greedy/accuracy_ci"][1]


def test_other_settings_have_a_file_of_their_own(trained, tmp_path, capsys):
    run_dir = copied(trained, tmp_path)
    command = ["eval", "--config", str(run_dir)]
    assert main([*command, "steps=2"]) == 0
    assert main([*command, "steps=4"]) == 0
    assert list(results_of(run_dir / "eval")["evaluations"]) == ["step_000002", "step_000004"]
    capsys.readouterr()
    other = ["reward.verifier=regex", "reward.pattern='[0-9]+'", "eval.agreement=false", "eval.greedy=false"]
    # Training's number of prompts is nothing to it, on 8 devices.
    assert main([*command, *other, "train.prompts_per_iteration=3"]) == 0
    # Of another verifier: what training has found of the teacher is not comparable.
    assert "in training" not in capsys.readouterr().out
    (found,) = (
        content for content in map(read_json, (run_dir / "eval").glob("eval_*.json")) if content["overrides"]
    )
    assert sorted(found["overrides"]) == [
        "eval.agreement=false",
        "eval.greedy=false",
        "reward.pattern='[0-9]+'",
        "reward.verifier='regex'",
    ]
    (results,) = found["evaluations"].values()
    assert "sampled/pass@2" in results
    assert not [key for key in results if "maj@" in key or key.startswith(("teacher_", "greedy"))]
    names = list(read_evaluations(run_dir))
    assert "eval, step 2" in names
    assert f"eval with {', '.join(found['overrides'])}, step 4" in names
    assert main([*command, "steps=best", *other]) == 2
    assert "with these settings" in capsys.readouterr().err


def test_the_best_checkpoint_and_the_teacher_as_it_was(trained, tmp_path, capsys):
    run_dir = copied(trained, tmp_path)
    file = run_dir / "eval" / "step_000002.json"
    file.write_text(json.dumps(read_json(file) | {"sampled/accuracy": 0.9}))
    words = ["eval", "--config", str(run_dir), "steps=best", "eval.keep_samples=1"]
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "step 2" in said
    assert "teacher, in training" in said
    assert list(results_of(tmp_path / "out")["evaluations"]) == ["step_000002"]
    assert not list((run_dir / "eval").glob("eval_*"))
    # Of equally good ones the newer, as `checkpoint.keep_best` has it.
    newer = run_dir / "eval" / "step_000004.json"
    newer.write_text(json.dumps(read_json(newer) | {"sampled/accuracy": 0.9}))
    assert choose_steps(load_run_config(run_dir), EvalOptions(steps="best")) == [4]


def test_numbers_of_other_settings_are_not_taken_for_these(trained, tmp_path):
    run_dir = copied(trained, tmp_path)
    config = load_run_config(run_dir)
    assert sorted(read_accuracies(config, run_dir, 4)) == [0, 2, 4]
    assert read_teacher(config, run_dir, "teacher") is not None
    for free in ("eval.every=7", "eval.keep_samples=0", "train.num_steps=20", "mesh.tensor=2"):
        assert len(read_accuracies(load_run_config(run_dir, [free]), run_dir, 4)) == 3
    for other in (
        "eval.num_prompts=12",
        "eval.top_p=0.9",
        "data.prompt_template='{question}?'",
        "data.eval=[{kind: task, task: word_sum}]",
        "rollout.max_new_tokens=9",
        "rollout.stop=[x]",
        "reward.verifier=exact",
    ):
        changed = load_run_config(run_dir, [other])
        assert read_accuracies(changed, run_dir, 4) == {}, other
        assert read_teacher(changed, run_dir, "teacher") is None, other
    # Another teacher answers otherwise; the student does not.
    changed = load_run_config(run_dir, ["teacher.compute_dtype=bfloat16"])
    assert len(read_accuracies(changed, run_dir, 4)) == 3
    assert read_teacher(changed, run_dir, "teacher") is None
    for overrides, num in (["eval.num_prompts=11"], 3), (["eval.num_prompts=12"], 0):
        changed = load_run_config(run_dir, [*overrides, "checkpoint.keep_best=1"])
        record = Record(changed, run_dir)
        assert record.has_teacher("teacher") == bool(num)
        assert len(record.checkpoints.accuracies) == num
        record.close()
    for broken in ("{", "[]", json.dumps({"num_prompts": 11})):
        (run_dir / "eval" / "teacher.json").write_text(broken)
        assert read_teacher(config, run_dir, "teacher") is None


def test_what_cannot_be_read_is_left_out(trained, tmp_path, capsys):
    """The results are written, and the table is shown."""
    run_dir = copied(trained, tmp_path)
    (run_dir / "eval" / "teacher.json").write_text("{")
    arrays = run_dir / "checkpoints" / "2" / "params"
    shutil.rmtree(arrays)
    assert main(["eval", "--config", str(run_dir), "steps=all", "eval.agreement=false"]) == 0
    said = capsys.readouterr().out
    assert "step 2 is left out: " in said
    assert "damaged" in said
    assert "greedy/accuracy" in said
    assert list(results_of(run_dir / "eval")["evaluations"]) == ["step_000004"]
    assert main(["eval", "--config", str(run_dir), "steps=2"]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["file", "file/inside"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    trained, tmp_path, named, capsys, monkeypatch
):
    monkeypatch.setattr("kdrl_jax.eval.command.make_setup", None)
    (tmp_path / "file").write_text("")
    assert main(["eval", "--config", str(trained), f"out={tmp_path / named}"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/file is a file; name another" in said
    assert len(said.splitlines()) == 1


def test_a_folder_that_may_not_be_written_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="may not be written"):
        check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_says_what_to_do(trained, capsys):
    assert main(["eval", "--config", str(trained), "student.architecture.hidden_size=32"]) == 2
    said = capsys.readouterr().err
    for text in (f"{trained}/checkpoints/4 does not fit", "is [", "undo what was changed"):
        assert text in said


def test_only_one_checkpoint_is_in_memory(trained, tmp_path, monkeypatch):
    """When the next one comes, the arrays of the one before are gone."""
    before, held = command.student_params, []

    def counted(setup, step):
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return before(setup, step)

    monkeypatch.setattr(command, "student_params", counted)
    config = load_run_config(trained, ["eval.agreement=false", "eval.greedy=false", "eval.num_samples=1"])
    options = EvalOptions(steps=(2, 4), out=str(tmp_path))
    assert evaluate(config, options, Console(quiet=True), lambda: False, is_run=True)
    assert len(held) == 2
    assert held[1] <= held[0]


def test_the_teacher_answers_once_and_its_answers_are_counted(trained):
    """With its own evaluation and without; and of a batch that runs, more is done from chunk to chunk."""
    setup = make_setup(load_run_config(trained))
    params = setup.student_params(setup.init_trainable())
    told = []

    def tell(*step):
        told.append(step)

    with RewardPool(["numeric"], 1, 2.0) as pool:
        for with_teacher in (False, True):
            evaluator = make_evaluator(setup, pool)
            told.clear()
            if with_teacher:
                model, theirs = setup.teacher.model, setup.teacher.on_device()
                evaluator.accuracy(model, theirs, on_step=tell)
                assert [step[0] for step in told if step[1] == step[2]] == ["greedy", "sampled"]
                told.clear()
            found = evaluator.agreement(params, on_step=tell)
            assert found == evaluator.agreement(params)
            passes = [step[0] for step in told if step[1] == step[2]]
            assert passes == ["comparing"] if with_teacher else ["answers of the teacher", "comparing"]
        told.clear()
        evaluator.accuracy(setup.student, params, on_step=tell)
        for name, of in (("greedy", 11), ("sampled", 33)):
            counts = [done for what, done, total in told if what == name and total == of]
            assert counts == sorted(counts)
            assert counts[-1] == of
            assert len(counts) > -(-of // 16)
            assert counts.count(of) == 1
        with pytest.raises(Stopped):
            evaluator.agreement(params, should_stop=lambda: True)


def test_only_the_models_that_are_needed_are_loaded(trained, monkeypatch):
    config = load_run_config(trained, ["ref.coef=0.1"])
    whole = make_setup(config)
    assert list(whole.teachers) == ["teacher"]
    assert whole.reference is not None
    alone = make_setup(config, needed=[])
    assert (alone.teachers, alone.reference, alone.teacher) == ({}, None, None)
    assert alone.num_tokens == whole.num_tokens
    asked = []

    def made(config, needed):
        asked.append(list(needed))
        raise ValueError("enough")

    monkeypatch.setattr(command, "make_setup", made)
    for words in (["eval.agreement=false"], ["eval.agreement=false", "with_teacher=true"], []):
        assert main(["eval", "--config", str(trained), *words]) == 2
    assert asked == [[], ["teacher"], ["teacher"]]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["steps=3"], "steps=3: "),
        (["steps=newest"], "steps='newest': write last, best, all, or steps: 10,20"),
        (["steps=[]"], "steps"),
        (["steps=-1"], "steps"),
        (["steps"], "has no '='"),
        (["step=3"], "did you mean steps"),
        (["out="], "out"),
    ],
)
def test_options_that_mean_nothing_are_refused(trained, words, shown, capsys):
    assert main(["eval", "--config", str(trained), *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert shown in said


def test_steps_of_what_is_no_run_are_refused(tmp_path, capsys):
    assert main(["eval", "--config", str(config_file(tmp_path)), "steps=all"]) == 2
    assert "names checkpoints of a run" in capsys.readouterr().err


def test_how_steps_are_written():
    for words, steps in (([], "last"), (["steps=10"], (10,)), (["steps=10, 20"], (10, 20)),
                         (["steps=[5,5,7]"], (5, 7)), (["steps=all"], "all")):  # fmt: skip
        assert read_options("eval", EvalOptions, words)[0].steps == steps
    with pytest.raises(ConfigError, match="steps"):
        read_options("eval", EvalOptions, ["steps=true"])


def test_stopped_it_keeps_the_models_that_are_done(trained, tmp_path, capsys):
    run_dir = copied(trained, tmp_path)
    config = load_run_config(run_dir, ["eval.agreement=false", "eval.num_samples=0"])
    asked = iter([False] * 3)
    options = EvalOptions(steps="all")
    assert not evaluate(config, options, Console(), lambda: next(asked, True), is_run=True)
    assert "stopped; nothing was written" in capsys.readouterr().out
    assert not list((run_dir / "eval").rglob("eval_*"))

    def once_something_is_there():
        return bool(list((run_dir / "eval").glob("eval_*")))

    assert not evaluate(config, options, Console(), once_something_is_there, is_run=True)
    said = capsys.readouterr().out
    assert "stopped; done before that: step 2" in said
    assert "greedy/accuracy" in said
    assert list(results_of(run_dir / "eval")["evaluations"]) == ["step_000002"]


def test_what_signals_mean_while_it_evaluates(trained, monkeypatch):
    """Nothing is saved, and nothing goes on from a checkpoint."""
    said = []

    def interrupted(config, options, console, should_stop, *, is_run):
        should_stop.tell = said.append
        should_stop.ask(signal.SIGTERM)
        assert should_stop()
        return False

    monkeypatch.setattr("kdrl_jax.eval.evaluate", interrupted)
    assert main(["eval", "--config", str(trained)]) == 128 + signal.SIGTERM
    assert said == [
        "SIGTERM: ending after the batch that is running now; what is done is written; once more ends at once"
    ]


def test_it_goes_on_where_nobody_reads_it(monkeypatch):
    receive, send = os.pipe()
    os.close(receive)
    with os.fdopen(send, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        console = make_console(lasting=True)
        for _ in range(3):
            console.print("a line")
        out.write("another")


def test_two_evaluations_of_the_same_questions_are_told_apart_better():
    """Paired: of questions that both find hard, a difference is surer than of others."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 0.3, 200)
    ours, theirs = rng.binomial(4, p) / 4, rng.binomial(4, p) / 4
    paired = np.subtract(*difference_interval(ours, theirs)[::-1])
    shuffled = np.subtract(*difference_interval(ours, rng.permutation(theirs))[::-1])
    assert paired < 0.6 * shuffled
