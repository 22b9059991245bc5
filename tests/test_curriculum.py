"""What is left out because it is held out, and what is drawn less often because it taught nothing."""

import base64
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import SHARED, jsonl, numbered, stream, task, write_jsonl
from tiny_runs import assert_same_run, metrics, parameters, run

from kdrl_jax.config.data import CurriculumConfig
from kdrl_jax.data.curriculum import Curriculum
from kdrl_jax.data.decontaminate import HeldOutQuestions, words
from kdrl_jax.data.prompts import PromptStream

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


class TestHeldOut:
    def test_words(self) -> None:
        found = words("What’s 3 × (½ + x_1), in “ﬁfths”?")
        assert " ".join(found) == "what s 3 * 1 / 2 + x 1 in fifths"
        assert words("2+3") != words("2*3") != words("2^3")
        assert words("  How MANY\napples? ") == words("how many apples")

    @pytest.mark.parametrize(
        "spellings",
        [
            ("What is 7 × 8?", "What is 7 * 8?", r"What is $7 \times 8$?", r"what is 7 \cdot 8"),
            ("5−3", "5-3", "5–3", "$5 - 3$"),
            ("$2x+3$", "$2 x + 3$"),
            (r"\dfrac{1}{2}", r"\frac{1}{2}", r"\frac12", r"\tfrac 1 2"),
            (r"\left( x \right)", "(x)"),
            (r"5\text{ cm}", "5 cm", r"5\,\mathrm{cm}"),
            ("1,000 apples", "1000 apples", "$1{,}000$ apples"),
            ("10²", "10^2", "$10^{2}$", "10**2", "10 ** 2"),
            ("12 ÷ 4", "12 / 4", r"12 \div 4"),
            ("x ≤ 3", r"x \le 3", r"x \leq 3", "x<=3"),
            ("90°", r"$90^\circ$"),
            (r"\sqrt{2}", "√2", r"\sqrt2"),
            ("3½ cups", "3 1/2 cups"),
            ("2π", r"2\pi"),
            ("**Find** x", "Find x"),
            ("日本語で答えよ", "日本 語で答えよ。"),
        ],
    )
    def test_spellings_of_the_same(self, spellings: tuple[str, ...]) -> None:
        assert {tuple(words(s)) for s in spellings} == {tuple(words(spellings[0]))}

    @pytest.mark.parametrize(
        "questions",
        [
            ("What is 7 × 8?", "What is 7 ÷ 8?", "What is 7 − 8?", "What is 7 + 8?", "What is 7^8?"),
            ("10²", "102", "10 2"),
            ("3.5", "35", "3, 5"),
            ("🙂?", "😀?", "!"),
            (r"\frac{1}{2}", r"\frac{2}{1}"),
            ("x < 3", r"x \le 3"),
            ("日本", "本日"),
        ],
    )
    def test_questions_that_differ(self, questions: tuple[str, ...]) -> None:
        for question in questions:
            held_out = HeldOutQuestions([question], 13)
            assert [q for q in questions if held_out.match(q)] == [question]

    def test_each_character_is_a_word_where_there_are_no_spaces(self) -> None:
        held_out = HeldOutQuestions(
            ["太郎は林檎を四十八個買い、そのうち半分を食べました。残りはいくつですか。"], 13
        )
        assert held_out.match("問題：太郎は林檎を四十八個買い、そのうち三個をあげました。")
        assert not held_out.match("花子は蜜柑を四十八個買い、三個をあげました。")

    @pytest.mark.parametrize(
        ("question", "overlaps"),
        [
            (LONG, True),
            (LONG.upper().replace(",", " -- ,"), False),  # the dashes are signs of arithmetic
            (LONG.upper().replace(",", ";"), True),
            ("Listen: " + LONG + " How many in all?", True),
            # Thirteen words in a row, and twelve.
            ("natalia sold clips to 48 of her friends in april and then she", True),
            ("x natalia sold clips to 48 of her friends in april and then she y", True),
            ("x natalia sold clips to 48 of her friends in april and then y", False),
            ("12 + 7 = ?", True),
            ("What is 12 + 7 = ?", False),
            ("12 - 7 = ?", False),
        ],
    )
    def test_thirteen_words_in_a_row(self, question: str, overlaps: bool) -> None:
        held_out = HeldOutQuestions([LONG, "12+7 = "], 13)
        assert (held_out.match(question) is not None) is overlaps

    def test_whole_questions(self) -> None:
        held_out = HeldOutQuestions([LONG], None)
        assert held_out.match(LONG.lower() + "!") == LONG
        assert held_out.match(LONG + " More?") is None

    def test_time_grows_with_the_length(self) -> None:
        held_out = HeldOutQuestions(
            [" ".join(map(str, range(i, i + 500))) for i in range(0, 50_000, 500)], 13
        )
        took = []
        for size in (20_000, 80_000):
            question = " ".join("a" * (1 + i % 7) for i in range(size))
            start = time.process_time()
            assert held_out.match(question) is None
            took.append(time.process_time() - start)
        assert took[1] < 12 * took[0]  # 4, if it is linear; 16, if it is quadratic

    def test_left_out_counted_and_shown(self, tmp_path: Path) -> None:
        train = write_jsonl(tmp_path / "a", *({"question": f"{i}+1", "answer": 1} for i in range(9)))
        held_out = write_jsonl(tmp_path / "b", *({"question": f" {i} + 1", "answer": 1} for i in range(5)))
        sources = {"eval": [jsonl(held_out)], "decontaminate": {"ngram": 13}}
        prompts = stream(jsonl(train), rows=40, **sources)
        assert set(next(prompts).questions) == {f"{i}+1" for i in range(5, 9)}
        assert prompts.describe()[1:5] == [
            "a: 5 questions left out that overlap with data.eval, of which the first 3:",
            *(f"'{i}+1' overlaps with ' {i} + 1'" for i in range(3)),
        ]
        with pytest.raises(ValueError, match=r"a: all of its 9 questions overlap with those of data\.eval"):
            stream(jsonl(train), **sources | {"eval": [jsonl(train)]})

    def test_by_default_they_are_only_counted(self, tmp_path: Path) -> None:
        train = numbered(tmp_path / "a", 9)
        prompts = stream(jsonl(train), rows=9, eval=[jsonl(train, first=4)])
        assert len(set(next(prompts).questions)) == 9
        assert prompts.describe()[1].startswith("a: 4 questions are also in data.eval; data.decontaminate=")
        assert len(stream(jsonl(train), rows=9, eval=[task()]).describe()) == 1

    def test_questions_that_are_made_up(self) -> None:
        """A training split that holds what is held out: each is passed over when its turn comes."""

        def small(size: int) -> Any:
            return task(max_terms=2, max_value=4, size=size)

        def cleaned_of(size: int) -> PromptStream:
            return stream(small(30), rows=60, eval=[small(size)], decontaminate={"ngram": 13})

        held_out = set(next(stream(small(3), rows=3)).questions)
        cleaned = cleaned_of(3)
        before, after = next(stream(small(30), rows=60)).questions, next(cleaned).questions
        assert held_out & set(before)
        assert not held_out & set(after)
        assert all(b == a for b, a in zip(before, after, strict=True) if b not in held_out)
        assert "of the first 30 questions left out that overlap" in cleaned.describe()[1]
        # What is left out is part of what a position means.
        with pytest.raises(ValueError, match="restore the data files"):
            cleaned_of(4).set_state(cleaned.get_state())

    def test_the_state_of_stored_questions_does_not_change(self, tmp_path: Path) -> None:
        path = jsonl(numbered(tmp_path / "a", 9))
        state = stream(path).get_state()
        cleaned = stream(path, eval=[jsonl(numbered(tmp_path / "b", 3))], decontaminate={"ngram": 13})
        assert cleaned.get_state() == state


def with_curriculum(*sources: Any, rows: int = 10, **skip: float) -> PromptStream:
    return stream(*sources, rows=rows, curriculum=CurriculumConfig(**skip))


def learn(prompts: PromptStream, solved: Any, iterations: int) -> Counter[str]:
    """Draws and observes; how often each question came."""
    drawn: Counter[str] = Counter()
    for _ in range(iterations):
        batch = next(prompts)
        drawn.update(batch.questions)
        prompts.observe(batch, np.array([solved(q) for q in batch.questions]).ravel())
    return drawn


ALL, NONE, SOME = [True, True], [False, False], [True, False]


class TestCurriculum:
    def test_nothing_changes_before_there_are_outcomes(self, tmp_path: Path) -> None:
        path = jsonl(numbered(tmp_path / "a", 40))
        plain, prompts = stream(path, rows=10), with_curriculum(path, skip_solved=1.0)
        for _ in range(4):
            assert next(plain).questions == next(prompts).questions
        mixed = with_curriculum(path, skip_solved=1.0, skip_unsolved=1.0)
        plain = stream(path, rows=10)
        for _ in range(12):
            batch = next(mixed)
            assert batch.questions == next(plain).questions
            mixed.observe(batch, np.array([SOME] * 10).ravel())

    @pytest.mark.parametrize(("setting", "outcome"), [("skip_solved", ALL), ("skip_unsolved", NONE)])
    def test_what_taught_nothing_comes_less_often(
        self, tmp_path: Path, setting: str, outcome: list[bool]
    ) -> None:
        path = jsonl(numbered(tmp_path / "a", 400))

        def solved(question: str) -> list[bool]:
            return outcome if int(question[1:]) < 200 else SOME

        shares = []
        for skip in (0.0001, 0.5, 1.0):
            settings = {"skip_solved": 0.0, "skip_unsolved": 0.0} | {setting: skip}
            prompts = with_curriculum(path, rows=200, **settings)
            learn(prompts, solved, 6)
            drawn = learn(prompts, solved, 10)
            shares.append(sum(n for q, n in drawn.items() if int(q[1:]) < 200) / 2000)
        # With r kept of half the questions and all of the others: r / (1 + r) of the draws.
        assert shares[0] == pytest.approx(0.5, abs=0.02)
        assert shares[1] == pytest.approx(1 / 3, abs=0.05)
        assert shares[2] == 0

    def test_an_outcome_is_that_of_the_last_time(self, tmp_path: Path) -> None:
        prompts = with_curriculum(jsonl(numbered(tmp_path / "a", 10)), skip_solved=0.5)
        learn(prompts, lambda q: ALL, 1)
        assert prompts.metrics() == {"curriculum/solved_frac": 1.0, "curriculum/unsolved_frac": 0.0}
        learn(prompts, lambda q: SOME, 10)
        assert prompts.metrics() == {"curriculum/solved_frac": 0.0, "curriculum/unsolved_frac": 0.0}
        learn(prompts, lambda q: NONE if q < "a5" else SOME, 4)
        assert prompts.metrics() == {"curriculum/solved_frac": 0.0, "curriculum/unsolved_frac": 0.5}

    def test_where_all_are_solved_draws_go_on(self, tmp_path: Path) -> None:
        prompts = with_curriculum(jsonl(numbered(tmp_path / "a", 10)), skip_solved=1.0)
        assert sum(learn(prompts, lambda q: ALL, 5).values()) == 50

    def test_mixtures_keep_their_shares(self, tmp_path: Path) -> None:
        """Another question takes a place within its source; those that are made up are left alone."""
        sources = jsonl(numbered(tmp_path / "a", 60), weight=3.0), jsonl(numbered(tmp_path / "b", 60)), task()
        plain, prompts = stream(*sources, rows=50), with_curriculum(*sources, rows=50, skip_solved=0.9)
        for _ in range(5):
            before, after = next(plain), next(prompts)
            assert before.sources == after.sources
            made = [(x, y) for x, y, s in zip(before.questions, after.questions, before.sources, strict=True)
                    if s == "chain_sum/train"]  # fmt: skip
            assert made
            assert all(x == y for x, y in made)
            prompts.observe(after, np.array([ALL if s != "b" else SOME for s in after.sources]).ravel())

    def test_a_state_without_outcomes_is_taken(self, tmp_path: Path) -> None:
        path = jsonl(numbered(tmp_path / "a", 30))
        plain, prompts = stream(path, rows=10), with_curriculum(path, skip_solved=1.0)
        next(plain)
        learn(prompts, lambda q: ALL, 3)
        state = json.loads(json.dumps(prompts.get_state()))
        prompts.set_state(plain.get_state())
        assert prompts.metrics()["curriculum/solved_frac"] == 0
        assert next(prompts).questions == next(plain).questions
        # And one with outcomes by a stream that has none.
        plain.set_state(state)
        assert "outcomes" not in plain.get_state()

    def test_a_state_is_small(self) -> None:
        table = Curriculum(CurriculumConfig(), [250_000, 0], 0)
        table.observe([(0, i) for i in range(250_000)], np.tile([ALL, NONE, SOME, ALL], (62_500, 1)))
        state = table.get_state()
        assert len(json.dumps(state)) < 90_000
        other = Curriculum(CurriculumConfig(), [250_000, 0], 0)
        other.set_state(json.loads(json.dumps(state)))
        assert other.get_state() == state
        assert table.shares() == (0.5, 0.25)

    def test_nothing_to_go_by(self) -> None:
        with pytest.raises(ValueError, match=r"data\.curriculum goes by how stored questions did"):
            with_curriculum(task())


QUESTIONS = [f"{a}+{b}" for a in range(1, 5) for b in range(1, 5)]


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    write_jsonl(path, *({"question": q, "answer": 7} for q in QUESTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find some_reward
        yield {
            "data": {"train": [{"kind": "jsonl", "path": str(path)}], "curriculum": {"skip_unsolved": 0.8}},
            "reward": {"verifier": "some_reward:variety"},  # all right, all wrong and both
            "eval": {"every": 0, "agreement": False},
            "train": {"num_steps": 6},
            "checkpoint": {"every": 1},
            "log": {"rollouts_every": 1, "rollouts_tokens": False},
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "whole", **sections)[1]
    return folder / "whole"


@pytest.mark.slow
def test_a_run_learns_the_verdicts_on_its_own_completions(whole: Path) -> None:
    """The table that is saved, against the completions that are written down."""
    outcomes = dict.fromkeys(QUESTIONS, "mixed")
    for step in range(6):
        lines = (whole / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 16
        for first, second in zip(rows[::2], rows[1::2], strict=True):  # groups; a question may have two
            assert first["question"] == second["question"]
            num_right = first["correct"] + second["correct"]
            outcomes[first["question"]] = ("unsolved", "mixed", "solved")[num_right]
    assert {*outcomes.values()} == {"mixed", "solved", "unsolved"}
    saved = parameters(whole)[1]["data"]["outcomes"]
    for name in ("solved", "unsolved"):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(saved[name][0]), np.uint8), count=len(QUESTIONS))
        assert {q for q, bit in zip(QUESTIONS, bits, strict=True) if bit} == {
            q for q, outcome in outcomes.items() if outcome == name
        }
    assert metrics(whole)[-1]["curriculum/unsolved_frac"] > 0.2


@pytest.mark.slow
def test_a_run_goes_on_bitwise_wherever_it_is_stopped(
    tmp_path: Path, sections: dict[str, Any], whole: Path
) -> None:
    for asked_at in (4, 6, 9, 11, 14):  # before and after drawing, and before the first update
        asked = iter([False] * asked_at + [True])
        name = f"stopped{asked_at}"
        assert not run(tmp_path, name, should_stop=lambda asked=asked: next(asked, False), **sections)[1]
        assert run(tmp_path, name, **sections)[1]
        assert_same_run(whole, tmp_path / name)


@pytest.mark.skipif(not SHARED.exists(), reason="GSM8K is not in ../shared/data")
def test_gsm8k_overlaps_with_its_test_questions_in_few_places() -> None:
    train, test = (
        [json.loads(line)["question"] for line in (SHARED / f"gsm8k_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    for ngram, overlapping in ((8, 98), (10, 13), (13, 4), (20, 1), (None, 0)):
        held_out = HeldOutQuestions(test, ngram)
        assert sum(held_out.match(q) is not None for q in train) == overlapping
