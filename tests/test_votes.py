"""What completions vote for: the answer that their verifier judges."""

import dataclasses
import itertools

import numpy as np
import pytest
from verifier_sets import golden

from kdrl_jax.evaluate.evaluator import _votes
from kdrl_jax.evaluate.results import answer_results
from kdrl_jax.rewards.functions import resolve
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.rewards.votes import answer_reader
from kdrl_jax.statistics import majority

# Longer than any short answer, and without a digit.
THINKING = "First we look at each of the choices, and think about what the question asks. " * 5
LETTERS = [
    f"{THINKING}So the answer is (C)",
    "12/4=3 rows of 7, so the answer is (C).",
    "There are 15 of them.\nAnswer: C",
    "\\boxed{\\text{C}}",
]
PATTERN = r"<answer>(.*?)</answer>"


@pytest.mark.parametrize(
    ("verifier", "same", "others"),
    [
        ("numeric", ["\\boxed{1/2}", "so 0.5", "#### \\frac12", "7 and then .50"], ["\\boxed{2}", "", "5"]),
        ("choice", LETTERS, ["(B)", "7", "I do not know"]),
        ("regex", ["<answer> $x$</answer> 7", "1 <answer>x.</answer>"], ["<answer>y</answer>", "x"]),
        ("exact", ["Paris", "\\boxed{Paris.}", "#### Paris"], ["paris", "Rome", THINKING]),
        ("exact", ["There are 12 of them.", "12", "\\boxed{12}"], ["12.0", "B12", "13"]),
        ("math", ["\\boxed{1/2}", "so $0.5$", "#### \\frac12", "is: 50/100"], ["$\\frac{\\pi}{2}$", "2"]),
        ("math", ["$1/\\sqrt{2}$", "\\boxed{\\frac{\\sqrt 2}{2}}"], ["$\\sqrt{2}$", "$-1/\\sqrt{2}$"]),
        ("math", ["\\boxed{(1, \\infty)}", "so: $x > 1$"], ["\\boxed{[1, \\infty)}", "\\boxed{1}"]),
        ("math", ["\\boxed{\\{2, 1\\}}", "$1, 2$"], ["\\boxed{(1, 2)}", "2"]),
        ("math", ["\\boxed{x = 3, y = 4}", "\\boxed{y=4, x=3}", "\\boxed{(3,4)}"], ["\\boxed{(4,3)}"]),
        ("math", ["\\boxed{3^{99}}", "\\boxed{27 \\cdot 3^{96}}"], ["\\boxed{3^{99}+1}", "\\boxed{3^n}"]),
        ("math", ["$\\frac{\\pi}{2}$", "It is $\\dfrac{\\pi}{2}$.", "\\boxed{\\frac {\\pi}{2}}"], ["$\\pi$"]),
        ("math", ["she has 18 eggs.", "$18$", "\\boxed{x = 18}"], ["$\\sqrt{18}$", "$18x$", "$18!$"]),
        ("math", ["So she ate 3, which leaves 18 of all the eggs", "18"], ["3", "So she ate 18, and left 3"]),
        ("math", ["\\boxed{x + 1}", "$x+1$", "the answer is $1 \\cdot 1$, no: $x + 1$"], ["$x - 1$", "$1$"]),
        ("math", ["\\boxed{\\text{The east}}", "\\boxed{east}"], ["\\boxed{west}", THINKING]),
    ],
)
def test_equal_answers_are_one_vote(verifier, same, others):
    read = answer_reader(verifier, PATTERN)
    (vote,) = {read(text) for text in same}
    assert vote is not None
    assert vote not in {read(text) for text in others}
    assert read("") is None
    assert read("\\boxed{}") is None


def test_votes_on_the_golden_answers():
    """Right ones have the gold answer's vote, and wrong ones another, but where one spelling cannot say so:
    what `math` takes for equal to both of two that differ, since units and names may be left out."""
    read = answer_reader("math")
    rows = [row for row in golden() if row.verifier == "math"]
    same = {True: [], False: []}
    for row in rows:
        same[row.is_right].append(read(rf"\boxed{{{row.gold}}}") == read(row.completion))
    found = {is_right: (sum(votes), len(votes)) for is_right, votes in same.items()}
    print(f"right: {found[True]}, wrong: {found[False]}")
    assert np.mean(same[True]) > 0.9
    assert np.mean(same[False]) < 0.05


@pytest.mark.parametrize("verifier", ["numeric", "choice", "regex", "exact", "math"])
def test_answers_with_one_vote_have_one_verdict(verifier):
    """Whatever the gold answer is."""
    texts = [
        *LETTERS, "(B)", "so 0.5", "1/2", "\\boxed{\\frac{\\pi}{2}}", "$\\sqrt{2}$", "$2$", "2 cm", "#### 2",
        "<answer>2</answer>", "<answer>C</answer> 7", "it is 2 <answer>2</answer>", "C", "x = 2", THINKING,
    ]  # fmt: skip
    judge, read = resolve(verifier, PATTERN), answer_reader(verifier, PATTERN)
    golds = ["C", "B"] if verifier == "choice" else ["2", "1/2", "0.5"]
    golds += ["C", "\\frac{\\pi}{2}", "\\sqrt{2}"] if verifier in ("exact", "math", "regex") else []
    voted = [(read(text), [judge("", text, gold) for gold in golds]) for text in texts]
    assert len({vote for vote, _ in voted if vote is not None}) > 1
    for (one, ours), (other, theirs) in itertools.combinations(voted, 2):
        if one is not None and one == other:
            assert ours == theirs
    for vote, verdicts in voted:
        assert vote is not None or not any(verdicts)


@pytest.mark.parametrize(
    ("verifier", "pattern"), [("format", None), ("some_reward:variety", None), ("regex", r"(?:a|b)+")]
)
def test_without_a_known_answer_there_is_no_majority(verifier, pattern):
    assert answer_reader(verifier, pattern) is None


def test_a_result_without_votes_has_no_majority():
    from test_eval import answers_of

    answers = answers_of([[1, 0, 1]])
    assert "sampled/maj@3" in answer_results("sampled", answers, 8)

    without = dataclasses.replace(answers, votes_PN=None)
    found = answer_results("sampled", type(answers).joined([without, without.take(np.array([0]))]), 8)
    assert "sampled/pass@2" in found
    assert not [key for key in found if "maj" in key]


def test_workers_read_the_answers_that_they_judge():
    with RewardPool(["choice", "format"], 1, 5.0) as pool:
        completions = [*LETTERS, "nothing"]
        scored = pool.score(["q"] * 5, completions, ["C"] * 5, read_by="choice")
        assert [s.said for s in scored] == ["C"] * 4 + [None]
        assert [s.scores["choice"] for s in scored] == [1, 1, 1, 1, 0]
        plain = pool.score(["q"], ["(C)"], ["C"])
        assert plain[0].said is None
    votes = np.array([_votes([s.said for s in scored[:4]], 4)])
    assert majority(votes, np.ones((1, 4), bool)) == [1.0]


def test_a_pattern_that_runs_on_is_ended_and_has_no_vote():
    """In a worker: the process that evaluates would hang."""
    with RewardPool(["regex"], 1, 1.0, "(?:a|aa)+(b)c") as pool:
        late, next_one = pool.score(["q"] * 2, ["a" * 60, "abc"], ["b"] * 2, read_by="regex")
    assert late.error is not None
    assert late.said is None
    assert (next_one.scores["regex"], next_one.said) == (1.0, "b")
