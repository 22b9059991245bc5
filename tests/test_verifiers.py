"""Verifiers through their worker processes: golden sets, real gold answers, hostile text, and the parts that
a reward is made of."""

import collections
import json
import random
import re
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TREE
from verifier_sets import golden, hostile

from kdrl_jax.config import Config
from kdrl_jax.hosts import Share
from kdrl_jax.objective.advantages import length_reward
from kdrl_jax.rewards import symbolic
from kdrl_jax.rewards.expressions import MAX_CHARS, UnreadableError, read
from kdrl_jax.rewards.functions import resolve
from kdrl_jax.rewards.mathematics import answers_equal
from kdrl_jax.rewards.pool import RewardPool, Scored, function_names
from kdrl_jax.rounds.choose import Round, round_metrics, verdicts
from kdrl_jax.types import Prompts

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
GSM8K = [folder / "gsm8k_test.jsonl" for folder in (ROOT / "data", SHARED)]

KNOWN_DISAGREEMENTS: set[tuple[str, str, str]] = set()
"""(verifier, gold answer, answer): where code and truth differ; docs/verifiers.md says why."""


def judge(verifier, rows, num_workers=2, time_limit_s=10.0):
    """Verdicts on (gold, completion) pairs by a pool of its own."""
    name, _, pattern = verifier.partition(":")
    with RewardPool([name], num_workers, time_limit_s, pattern or None) as pool:
        golds, completions = zip(*rows, strict=True)
        scored = pool.score([""] * len(rows), completions, golds)
    return [(s.scores[name], s.error) for s in scored]


def test_golden_answers_through_the_workers():
    rows = golden()
    by_verifier = collections.defaultdict(list)
    for row in rows:
        by_verifier[row.verifier].append(row)
    wrong, counts = [], collections.Counter()
    for verifier, those in by_verifier.items():
        counts[verifier.partition(":")[0]] += len(those)
        for row, (score, error) in zip(
            those, judge(verifier, [(r.gold, r.completion) for r in those]), strict=True
        ):
            assert error is None, (row, error)
            if score != float(row.is_right):
                wrong.append((verifier, row.gold, row.answer))
    print(f"{len(rows)} answers ({dict(counts)}), {len(wrong)} disagreements: {wrong}")
    assert len(rows) >= 300
    assert set(counts) == {"numeric", "math", "choice", "exact", "regex"}
    assert len(wrong) <= 0.01 * len(rows)
    assert set(wrong) == KNOWN_DISAGREEMENTS
    listed = (ROOT / "docs" / "verifiers.md").read_text("utf-8")
    assert all(f"`{answer}`" in listed for _, _, answer in wrong)


def respelled(answer):
    """The same answer by rules that change the looks alone."""
    yield answer
    yield f"${answer}$"
    yield rf"\displaystyle {answer}"
    yield answer.replace(r"\frac", r"\dfrac")
    yield answer.replace(r"\left", "").replace(r"\right", "")
    yield re.sub(r"\s*([-+,=])\s*", r" \1 ", answer)
    yield answer.replace("^\\circ", "°").replace(r"\pi", "π").replace(r"\infty", "∞")


def spoiled(answer):
    """Others, by rules under which no answer of MATH-500 stays the same."""
    if re.fullmatch(r"-?[0-9]+", answer):
        yield str(int(answer) + 1)
        yield f"{answer}7"
        yield rf"{answer}\pi" if answer != "0" else "1"
        yield str(-int(answer)) if answer != "0" else "-1"
    elif re.fullmatch(r"\\d?frac\{[0-9]+\}\{[0-9]+\}", answer):
        yield f"-{answer}"
        yield rf"{answer}\sqrt{{2}}"
        yield re.sub(r"\{([0-9]+)\}\{([0-9]+)\}", r"{\2}{\1}", answer)
    elif "sqrt" in answer and "pm" not in answer and "(" not in answer:
        yield answer.replace("sqrt", r"sqrt[3]")
        yield f"-({answer})"
    elif re.fullmatch(r"[(\[].*,.*[)\]]", answer) and r"\cup" not in answer:
        yield answer[:-1] + ", 1" + answer[-1]
        yield ("[" if answer[0] == "(" else "(") + answer[1:]
    yield "nothing of the kind"


def test_math500_answers_in_other_spellings_and_spoiled():
    path = SHARED / "math500.jsonl"
    if not path.is_file():
        pytest.skip("MATH-500 is not there")
    golds = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    rows = [(gold, text, True) for gold in golds for text in dict.fromkeys(respelled(gold))]
    rows += [(gold, text, False) for gold in golds for text in spoiled(gold)]
    assert len(rows) > 3000
    judged = judge("math", [(gold, rf"\boxed{{{text}}}") for gold, text, _ in rows])
    wrong = [
        (row, verdict)
        for row, verdict in zip(rows, judged, strict=True)
        if verdict != (float(row[2]), None)
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize("verifier", ["numeric", "math"])
def test_a_scale_that_the_question_speaks_of_is_what_is_counted(verifier):
    judge = resolve(verifier)
    dozens, eggs = "How many dozen eggs are 84 eggs?", "How many eggs are there?"
    for said in (r"\boxed{7 \text{ dozen}}", "So it is 7 dozen.", "#### 7 dozens", r"\boxed{7}"):
        assert judge(dozens, said, "7") == 1.0
        assert judge(eggs, said, "84") == float("dozen" in said)
        assert judge(eggs, said, "7") == float("dozen" not in said)
    assert judge("How many billion miles?", r"\boxed{7 \text{ dozen}}", "7") == 0.0
    assert judge("How many billion miles?", r"\boxed{26}", r"26 \text{ billion}") == float(verifier == "math")


def final_integer(solution):
    return int(solution.rpartition("####")[2].replace(",", ""))


@pytest.mark.parametrize("verifier", ["numeric", "math"])
def test_gsm8k_gold_answers_verify_and_shuffled_ones_at_the_chance_rate(verifier):
    path = next((p for p in GSM8K if p.is_file()), None)
    if path is None:
        pytest.skip("GSM8K is not there")
    golds = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    numbers = [final_integer(gold) for gold in golds]
    as_number = [str(number) for number in numbers]
    order = list(range(len(golds)))
    random.Random(0).shuffle(order)
    rows = [*zip(golds, golds), *zip(golds, as_number), *zip(golds, [golds[i] for i in order])]  # noqa: B905
    judged = judge(verifier, rows)
    whole, alone, shuffled = (judged[k * len(golds) : (k + 1) * len(golds)] for k in range(3))
    assert set(whole) == set(alone) == {(1.0, None)}
    right = [numbers[i] == own for i, own in zip(order, numbers, strict=True)]
    assert shuffled == [(float(same), None) for same in right]
    # Under a random order an answer meets one of its value with the probability of that value.
    chance = sum(n * n for n in collections.Counter(numbers).values()) / len(numbers) ** 2
    rate = sum(right) / len(right)
    deviation = (chance * (1 - chance) / len(right)) ** 0.5
    print(f"{verifier}: chance {chance:.5f}, found {rate:.5f} of {len(right)}")
    assert abs(rate - chance) < 4 * deviation


@pytest.mark.parametrize(
    ("verifier", "gold"),
    [
        ("numeric", "77777"),
        ("math", r"x^2 + y^2 \le 77777"),  # read by math-verify alone
        ("choice", "Q"),
        pytest.param("exact", "no such text", marks=pytest.mark.slow),
        pytest.param("format", "", marks=pytest.mark.slow),
        pytest.param("regex:(no such text)", "no such text", marks=pytest.mark.slow),
    ],
)
def test_hostile_answers_return_in_time_and_run_nothing(verifier, gold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # of the workers too
    name, _, pattern = verifier.partition(":")
    with RewardPool([name], 1, 2.0, pattern or None) as pool:
        for text in hostile():
            start = time.monotonic()
            (scored,) = pool.score([""], [text], [gold])
            assert time.monotonic() - start < 2.0, (text[:60], len(text))
            assert scored.error is None, (text[:60], scored.error)
            assert name == "format" or scored.scores[name] == 0.0, text[:60]
        # As gold answers: at worst an error that says so.
        for scored in pool.score([""] * len(hostile()), [r"\boxed{5}"] * len(hostile()), hostile()):
            assert scored.error is None or "gold answer" in scored.error, scored.error
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_runs_on_and_on_is_cut_off():
    with RewardPool(["regex"], 1, 1.0, r"((a+)+)+b") as pool:
        start = time.monotonic()
        hanging, good = pool.score(["", ""], ["a" * 60, "aab"], ["aa", "a"])
        assert time.monotonic() - start < 20
    assert hanging.error == "timeout after 1.0 s"
    assert good == Scored({"regex": 0.0}, None)


def test_math_verify_is_cut_off_where_it_hangs(monkeypatch):
    symbolic.warm_up()
    monkeypatch.setattr(symbolic, "is_readable", lambda text: True)
    monkeypatch.setattr(symbolic, "TIME_LIMIT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0\.3 s"):
        symbolic.same("x^" * 60 + "2", "1")
    assert time.monotonic() - start < 5


def test_what_is_not_read_here_goes_to_math_verify_if_it_is_small(monkeypatch):
    monkeypatch.setattr(symbolic, "TIME_LIMIT_S", 60.0)
    assert answers_equal(r"x^2 + y^2 \le 4", r"4 \ge y^2 + x^2")
    assert not answers_equal(r"x^2 + y^2 \le 4", r"x^2 + y^2 < 4")
    assert not symbolic.is_readable("x^" * 60 + "2")
    assert not symbolic.is_readable(r"\operatorname{zeros}(10000,10000)")
    assert not symbolic.is_readable("((((((1))))))")
    assert symbolic.is_readable(r"\{x \mid x \ne 2\}")


def test_reading_is_bounded():
    for text in (
        "1+" * MAX_CHARS,
        "(" * 200,
        "x" + "!" * 100,
        "9" * 65,
        "east",
        r"\int x dx",
        "x^y^z",
        "1 2",
        "",
    ):
        with pytest.raises(UnreadableError):
            read(text)


def test_math_without_its_extra_is_one_line_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"'math' needs an extra.*pip install 'kdrl_jax\[math\]'"):
        resolve("math")
    monkeypatch.undo()
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no antlr.*pip install 'kdrl_jax\[math\]'") as raised:
        RewardPool(["math"], 1, 2.0)
    assert "\n" not in str(raised.value)


def test_a_machine_that_takes_long_to_warm_up_is_no_late_answer(monkeypatch):
    monkeypatch.setattr(symbolic, "TIME_LIMIT_S", 0.05)
    monkeypatch.setattr(symbolic, "_are_equal", lambda gold, guess: not time.sleep(0.5))
    symbolic.warm_up()
    with pytest.raises(TimeoutError):
        symbolic.same(r"\{x \mid x > 2\}", r"f(x) + 1")


@pytest.mark.parametrize("verifier", ["math", "choice", "exact", "regex"])
def test_an_empty_gold_answer_is_an_error(verifier):
    with pytest.raises(ValueError, match=r"gold answer ''"):
        resolve(verifier, "(a)")("", "a", "")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"verifier": "regex"}, "needs reward.pattern"),
        ({"shaping": {"regex": 0.1}}, "needs reward.pattern"),
        ({"pattern": "x"}, "is read by regex alone"),
        ({"verifier": "regex", "pattern": "(x"}, "is no regular expression"),
        ({"length_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other(reward, says):
    with pytest.raises(ValueError, match=says):
        Config.model_validate(TREE | {"reward": reward})


def test_a_pool_as_the_settings_have_it(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def same(*x): return x[1] == x[2]\ndef size(*x): return len(x[1])\n")
    monkeypatch.chdir(tmp_path)
    shaping = {"mine:size": 0.5, "regex": 1.0, "mine:same": 0.25}
    reward = {"verifier": "mine:same", "pattern": "b+", "shaping": shaping, "num_workers": 1}
    config = Config.model_validate(TREE | {"reward": reward})
    with RewardPool.of(config.reward) as pool:
        scored = pool.score(["", ""], ["bb", "b"], ["bb", "c"])
    assert [s.scores for s in scored] == [
        {"mine:same": 1.0, "mine:size": 2.0, "regex": 1.0},
        {"mine:same": 0.0, "mine:size": 1.0, "regex": 1.0},
    ]


def test_the_length_reward_by_hand():
    # 0.5 - (l - min) / (max - min), of wrong ones at most 0, and 0 where all are equally long.
    lengths = jnp.array([10, 20, 30, 15, 7, 7, 7, 7, 1, 3, 3, 1])
    correct = jnp.array([True, True, True, True, True, False, True, False, False, False, True, True])
    want = [0.5, 0.0, -0.5, 0.25, 0, 0, 0, 0, 0.0, -0.5, -0.5, 0.5]
    np.testing.assert_allclose(length_reward(lengths, correct, 4), want, atol=1e-7)


def some_round(config, scored, lengths):
    share = Share(len(scored), np.arange(len(scored)), np.ones(len(scored), bool))
    rewards_B, correct_B, parts = verdicts(config, scored, share)
    ids = [np.arange(n) for n in lengths]
    nothing = np.zeros((0, 0), np.int32)
    prompts = Prompts(nothing, nothing, nothing, (), (), (), ())
    return Round(
        prompts, None, share, ids, [], scored, rewards_B, correct_B, parts, np.array(lengths, np.int32),
        np.ones(len(scored), bool), 20, None, [],
    )  # fmt: skip


def test_each_part_of_the_reward_is_logged_before_its_weight_and_they_add_up():
    reward = {
        "verifier": "numeric",
        "shaping": {"format": 0.25, "numeric": 0.5},
        "overlong_buffer": 5,
        "overlong_penalty": 2.0,
        "length_weight": 0.5,
    }
    rollout = TREE["rollout"] | {"group_size": 2, "max_new_tokens": 20}
    config = Config.model_validate(TREE | {"reward": reward, "rollout": rollout})
    names = function_names("numeric", config.reward.shaping)
    assert names == ["numeric", "format"]
    first = some_round(
        config,
        [
            Scored({"numeric": 1.0, "format": 1.0}, None),
            Scored({"numeric": 0.0, "format": 1.0}, None),
            Scored({"numeric": 1.0, "format": 0.0}, None),
            Scored({"numeric": 0.0, "format": 0.0}, "timeout after 2.0 s"),
        ],
        [10, 20, 18, 12],
    )
    second = some_round(config, [Scored({"numeric": 1.0, "format": 0.0}, None)] * 2, [4, 8])
    out = round_metrics(config, [first, second])
    part = {name.removeprefix("reward/part/"): value for name, value in out.items() if "part/" in name}
    assert part == {
        "numeric": pytest.approx(4 / 6),
        "format": pytest.approx(2 / 6),
        "overlong": pytest.approx((0 - 1 - 0.6 - 0) / 6),
        # (right 10, wrong 20), (right 18, failed 12), (right 4, right 8)
        "length": pytest.approx((0.5 - 0.5 - 0.5 + 0.0 + 0.5 - 0.5) / 6),
    }
    weights = {"numeric": 1.5, "format": 0.25, "overlong": 2.0, "length": 0.5}
    assert out["reward/mean"] == pytest.approx(sum(weights[name] * value for name, value in part.items()))
    assert out["reward/solved_frac"] == pytest.approx(4 / 6)
    assert first.correct_B.tolist() == [True, False, True, False]
