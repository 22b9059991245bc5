"""Procedural tasks, sources and the prompt pipeline."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_chat import CHATML, byte_tokenizer

from kdrl_jax.config.data import DataConfig, JsonlSourceConfig, TaskSourceConfig
from kdrl_jax.data.encoded import encode_completion
from kdrl_jax.data.prompts import PromptStream, load_eval_prompts, open_prompts
from kdrl_jax.data.sources import open_source
from kdrl_jax.data.tasks import is_heldout, task_row
from kdrl_jax.data.tokenizer import CharTokenizer, Tokenizer
from kdrl_jax.types import Prompts

SHARED = Path(__file__).parents[2] / "shared" / "data"


def task(name: str = "chain_sum", **settings: Any) -> TaskSourceConfig:
    return TaskSourceConfig.model_validate({"kind": "task", "task": name, **settings})


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def jsonl(path: Path, **settings: Any) -> JsonlSourceConfig:
    return JsonlSourceConfig.model_validate({"kind": "jsonl", "path": str(path), **settings})


def numbered(path: Path, count: int, **more: str) -> Path:
    return write_jsonl(path, *({"question": f"{path.stem}{i}", "answer": i, **more} for i in range(count)))


class TestTasks:
    def test_fixed_rows(self) -> None:
        """The rows of every machine and version: a change here changes every recorded result."""
        assert task_row(task(min_terms=3, max_terms=3), 0) == ("4+5+7", "4+5=9,9+7=16####16", "16")
        assert task_row(task("word_sum", max_terms=3), 5) == (
            "Mia has 2 cookies. Mia finds 5 more. Mia buys 4 more. How many cookies does Mia have now?",
            "2 + 5 = 7. 7 + 4 = 11. Mia has 11 cookies now. #### 11",
            "11",
        )

    def test_fixed_rows_with_minuses_and_mistakes(self) -> None:
        mistakes = {"facts": 0.5, "belief": 1.0, "slips": 0.5}
        settings = task(min_terms=4, max_terms=4, minuses=[1, 2], mistakes=mistakes)
        assert task_row(settings, 0) == ("4+5+7-6", "4+5=10,10+7=16,16-6=11####11", "10")
        assert task_row(settings, 2) == ("8+6-6-2", "8+6=13,13-6=8,8-2=5####5", "6")

    def test_other_processes_make_the_same_rows(self) -> None:
        code = (
            "from kdrl_jax.config.data import TaskSourceConfig as C\n"
            "from kdrl_jax.data.tasks import task_row\n"
            "print([task_row(C(kind='task', task='word_sum'), i).question for i in range(20)])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == str([task_row(task("word_sum"), i).question for i in range(20)])

    def test_chain_sum_is_right(self) -> None:
        for i in range(500):
            row = task_row(task(max_terms=5, max_value=30), i)
            terms = [int(t) for t in row.question.split("+")]
            assert 2 <= len(terms) <= 5
            assert all(1 <= t <= 30 for t in terms)
            steps, _, last = row.completion.partition("####")
            assert int(last) == int(row.answer) == sum(terms)
            total = terms[0]
            for step, term in zip(steps.split(","), terms[1:], strict=True):
                assert step == f"{total}+{term}={total + term}"
                total += term

    def test_minuses_are_right(self) -> None:
        seen = set()
        for i in range(500):
            row = task_row(task(min_terms=3, max_terms=5, minuses=[1, 2]), i)
            terms = [int(t) for t in re.findall(r"-?\d+", row.question)]
            assert re.fullmatch(r"\d([+-]\d){2,4}", row.question)
            assert min(np.cumsum(terms)) >= 0
            seen.add(sum(t < 0 for t in terms))
            steps, _, last = row.completion.partition("####")
            assert int(last) == int(row.answer) == sum(terms)
            total = terms[0]
            for step, term in zip(steps.split(","), terms[1:], strict=True):
                assert step == f"{total}{term:+d}={total + term}"
                total += term
        assert seen == {1, 2}

    def test_mistakes(self) -> None:
        """Believed facts are wrong always in one way and in their share; other steps slip by one; what
        follows goes on from there; the answer and the question stay as they were."""
        settings: dict[str, Any] = {"min_terms": 3, "max_terms": 4, "minuses": [0, 1]}
        mistakes = {"facts": 0.3, "belief": 0.7, "slips": 0.1, "seed": 3}
        seen: dict[str, list[int]] = {}
        for i in range(6000):
            row = task_row(task(**settings, mistakes=mistakes), i)
            plain = task_row(task(**settings), i)
            assert (row.question, row.answer) == (plain.question, plain.answer)
            terms = [int(t) for t in re.findall(r"-?\d+", row.question)]
            steps, _, last = row.completion.partition("####")
            total = terms[0]
            for step, term in zip(steps.split(","), terms[1:], strict=True):
                left, _, right = step.partition("=")
                assert left == f"{total}{term:+d}"
                seen.setdefault(left, []).append(int(right) - max(0, total + term))
                total = int(right)
            assert int(last) == total >= 0
        common = {left: errors for left, errors in seen.items() if len(errors) >= 40}
        wrong = {left: sum(e != 0 for e in errors) / len(errors) for left, errors in common.items()}
        believed = {left for left, share in wrong.items() if share > 0.4}
        assert 0.2 < len(believed) / len(common) < 0.4
        assert all(len({e for e in common[left] if e}) == 1 for left in believed)
        assert abs(np.mean([wrong[left] for left in believed]) - 0.7) < 0.02
        others = [left for left in common if left not in believed]
        assert abs(np.mean([wrong[left] for left in others]) - 0.1) < 0.02
        assert {e for left in others for e in common[left]} == {-1, 0, 1}

    def test_other_mistakes_by_seed(self) -> None:
        def rows(seed: int) -> list[str]:
            mistakes = {"facts": 0.3, "belief": 1.0, "seed": seed}
            return [task_row(task(mistakes=mistakes), i).completion for i in range(50)]

        assert rows(0) == rows(0) != rows(1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"minuses": [2, 1]}, r"minuses=\[2, 1\]: write \[fewest, most\]"),
            ({"minuses": [0, 2]}, r"of min_terms=2 at most 1 can be taken away"),
            ({"task": "word_sum", "minuses": [0, 1]}, "minuses is for task=chain_sum, not for word_sum"),
            ({"task": "word_sum", "mistakes": {}}, "mistakes is for task=chain_sum, not for word_sum"),
        ],
    )
    def test_contradictions(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TaskSourceConfig.model_validate({"kind": "task", "task": "chain_sum", **settings})

    def test_word_sum_is_right(self) -> None:
        questions = set()
        for i in range(500):
            row = task_row(task("word_sum", max_terms=3), i)
            text = re.sub(r" on day \d", "", row.question)
            numbers = [int(n) for n in re.findall(r"\d+", text)]
            assert int(row.answer) == sum(numbers)
            assert len(numbers) in (2, 3)
            assert row.completion.endswith(f"#### {row.answer}")
            for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)", row.completion):
                assert int(a) + int(b) == int(c)
            assert not re.search(r"\b1 [a-z ]*s\b(?! on| and| more)", row.question.split(".")[0]), (
                row.question
            )
            questions.add(row.question)
        assert len(questions) > 400

    @pytest.mark.parametrize("name", ["chain_sum", "word_sum"])
    def test_splits_share_no_question(self, name: str) -> None:
        rows = {
            split: {task_row(task(name, split=split), i).question for i in range(2000)}
            for split in ("train", "heldout")
        }
        assert not rows["train"] & rows["heldout"]
        assert all(map(is_heldout, rows["heldout"]))
        assert not any(map(is_heldout, rows["train"]))

    def test_validation_and_test_are_halves_of_what_is_held_out(self) -> None:
        rows = {
            split: {task_row(task(max_terms=3, split=split), i).question for i in range(2000)}
            for split in ("heldout", "validation", "test")
        }
        assert not rows["validation"] & rows["test"]
        assert rows["validation"] | rows["test"] == rows["heldout"]
        assert 0.35 < len(rows["test"]) / len(rows["heldout"]) < 0.65

    def test_a_tenth_is_held_out(self) -> None:
        share = np.mean([is_heldout(f"{a}+{b}+{c}") for a in range(20) for b in range(20) for c in range(20)])
        assert 0.08 < share < 0.12

    def test_impossible_split(self) -> None:
        empty = "train" if is_heldout("1+1") else "heldout"  # the one question is in the other split
        with pytest.raises(
            ValueError, match=rf"max_value=1 has no question in split '{empty}' .*raise max_terms"
        ):
            open_source(task(max_terms=2, max_value=1, split=empty), False)


class TestSources:
    def test_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        rows = [{"q": "1+1", "a": 2, "why": "one more", "else": []}, {"q": "é\u2028", "a": " x", "why": "b"}]
        text = "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n \n"
        path.write_text(text, encoding="utf-8")
        fields = {"question_field": "q", "answer_field": "a", "completion_field": "why"}
        source = open_source(jsonl(path, **fields), needs_completion=True)
        assert [source[i].question for i in range(len(source))] == ["1+1", "é\u2028"]
        assert [source[i].answer for i in range(2)] == ["2", " x"]
        assert source[0].completion == "one more"
        assert (source.name, source[0].source, source.place(1)) == ("a.jsonl", "a.jsonl", f"{path}:3")
        with pytest.raises(IndexError):
            source[2]
        assert len(open_source(jsonl(path, **fields, first=1), False)) == 1

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{'a': 1}", "not JSON"),
            ('{"question": "q", "answer": "a"} x', "not JSON"),
            ("[" * 100_000, "not usable JSON|not JSON"),
            ("[1, 2]", r"expected a JSON object, got list \[1, 2\]"),
            ({"answer": "a"}, r"no field 'question' \(question_field\); the row has \['answer'\]"),
            ({"question": 3, "answer": "a"}, r"field 'question' .* must be text, got int 3"),
            ({"question": " ", "answer": "a"}, "field 'question' .* is empty"),
            ({"question": "q", "answer": None}, "field 'answer' .* must be text, got NoneType null"),
            ({"question": "q", "answer": True}, "field 'answer' .* must be text, got bool true"),
            ('{"question": "q", "answer": NaN}', "field 'answer' .* must be text, got float NaN"),
            ('{"question": "\\ud800", "answer": "a"}', "half a surrogate pair"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path: Path, line: Any, message: str) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"}, "", line)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: .*({message})"):
            open_source(jsonl(path), False)

    def test_files_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file .*working directory"):
            open_source(jsonl(Path("nowhere.jsonl")), False)
        with pytest.raises(ValueError, match="holds no rows"):
            open_source(jsonl(write_jsonl(tmp_path / "a.jsonl", "", " ")), False)
        (tmp_path / "b.jsonl").write_bytes(b'{"question": "\xff"}')
        with pytest.raises(ValueError, match=r"b\.jsonl:1: not UTF-8"):
            open_source(jsonl(tmp_path / "b.jsonl"), False)

    def test_completions_when_needed(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
        with pytest.raises(ValueError, match="set completion_field"):
            open_source(jsonl(path), needs_completion=True)
        with pytest.raises(ValueError, match=r":1: no field 'why' \(completion_field\)"):
            open_source(jsonl(path, completion_field="why"), needs_completion=True)

    def test_tasks_are_made_when_asked_for(self) -> None:
        source = open_source(task(size=10**9), needs_completion=True)
        assert len(source) == 10**9
        assert source[10**9 - 1].completion
        assert source[3].source == source.name == "chain_sum/train"
        with pytest.raises(IndexError):
            source[10**9]


def open_with(
    config: DataConfig, tokenizer: Tokenizer, rows: int, seed: int = 0, needs_completion: bool = False
) -> PromptStream:
    return open_prompts(
        config,
        tokenizer,
        chat_template="auto",
        prompts_per_iteration=rows,
        seed=seed,
        needs_completion=needs_completion,
    )


def stream(
    *train: Any, rows: int = 4, seed: int = 0, needs_completion: bool = False, **data: Any
) -> PromptStream:
    config = DataConfig(train=train, **data)
    return open_with(config, CharTokenizer(), rows=rows, seed=seed, needs_completion=needs_completion)


def assert_equal(a: Prompts, b: Prompts) -> None:
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


class TestPrompts:
    def test_contents(self, tmp_path: Path) -> None:
        prompts = stream(
            jsonl(numbered(tmp_path / "a", 7, why="z"), completion_field="why"), max_prompt_tokens=8
        )
        batch = next(prompts)
        tokenizer = CharTokenizer()
        assert (batch.tokens_PT.shape, batch.tokens_PT.dtype) == ((4, 8), np.int32)
        assert batch.lengths_P.tolist() == [2] * 4
        for tokens, length, question, answer in zip(
            batch.tokens_PT, batch.lengths_P, batch.questions, batch.answers, strict=True
        ):
            assert tokenizer.decode(tokens[:length]) == question == f"a{answer}"
            assert (tokens[length:] == tokenizer.pad_id).all()
        assert batch.completions == ("z",) * 4
        assert batch.sources == ("a",) * 4
        assert batch.draws_P.tolist() == [0, 1, 2, 3]
        assert next(prompts).draws_P.tolist() == [4, 5, 6, 7]

    def test_template_and_bos(self, tmp_path: Path) -> None:
        config = DataConfig(train=(jsonl(numbered(tmp_path / "a", 1)),), prompt_template="<{question}>\n")
        tokenizer = byte_tokenizer(add_bos=True)
        batch = next(open_with(config, tokenizer, rows=2))
        assert batch.tokens_PT[0, 0] == tokenizer.bos_id
        assert tokenizer.decode(batch.tokens_PT[0][: batch.lengths_P[0]]) == "<a0>\n"
        assert batch.questions[0] == "a0"
        assert encode_completion(tokenizer, "a") == [*tokenizer.encode("a"), 2]

    def test_every_row_once_per_epoch_in_a_new_order(self, tmp_path: Path) -> None:
        prompts = stream(jsonl(numbered(tmp_path / "a", 30)), rows=10)
        epochs = [[q for _ in range(3) for q in next(prompts).questions] for _ in range(3)]
        assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 30 for e in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != sorted(epochs[0])

    def test_seed_decides_the_order(self, tmp_path: Path) -> None:
        source = jsonl(numbered(tmp_path / "a", 50))
        first = [next(stream(source, rows=50, seed=s)).questions for s in (0, 0, 1)]
        assert first[0] == first[1] != first[2]
        # Epoch 1 of seed 0 is not epoch 0 of seed 1, as consecutive seeds would give.
        prompts = stream(source, rows=50, seed=0)
        next(prompts)
        assert next(prompts).questions != first[2]

    def test_mixture_follows_the_weights(self, tmp_path: Path) -> None:
        prompts = stream(
            jsonl(numbered(tmp_path / "a", 400), weight=3.0),
            jsonl(numbered(tmp_path / "b", 900)),
            task(weight=0.5),
            rows=900,
        )
        assert Counter(next(prompts).sources) == {"a": 600, "b": 200, "chain_sum/train": 100}

    def test_sources_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        prompts = stream(task(max_terms=2), task(max_terms=3), task(split="heldout"))
        assert list(prompts.dropped) == ["chain_sum/train", "chain_sum/train#2", "chain_sum/heldout"]
        assert set(next(prompts).sources) == set(prompts.dropped)

    @pytest.mark.parametrize("mixture", [False, True])
    def test_resume_is_exact(self, tmp_path: Path, mixture: bool) -> None:
        sources: list[Any] = [jsonl(numbered(tmp_path / "a", 7))]
        if mixture:
            # Over-long rows of tasks are stepped over when drawn; that too must resume.
            sources += [jsonl(numbered(tmp_path / "b", 11), weight=0.3), task(size=13, weight=0.7)]

        def fresh() -> PromptStream:
            return stream(*sources, rows=3, seed=5, max_prompt_tokens=5)

        through = fresh()
        states, batches = [], []
        for _ in range(25):  # 75 draws: several epochs of each source, their borders inside batches
            states.append(json.loads(json.dumps(through.get_state())))
            batches.append(next(through))
        assert [int(d) for b in batches for d in b.draws_P] == list(range(75))
        for position in (0, 1, 2, 3, 7, 12, 20, 24):
            resumed = fresh()
            resumed.set_state(states[position])
            assert resumed.get_state() == states[position]
            for batch in batches[position : position + 5]:
                assert_equal(next(resumed), batch)
        # Backwards in a stream that has run, as after a request to stop.
        through.set_state(states[3])
        assert_equal(next(through), batches[3])

    def test_state_of_another_stream_is_refused(self, tmp_path: Path) -> None:
        path = numbered(tmp_path / "a", 7)
        state = stream(jsonl(path)).get_state()
        for other in (stream(jsonl(path), seed=1), stream(jsonl(path, first=6)), stream(jsonl(path), task())):
            with pytest.raises(ValueError, match="restore the data files"):
                other.set_state(state)

    def test_over_long_prompts_are_left_out_and_counted(self, tmp_path: Path) -> None:
        rows = [{"question": "x" * n, "answer": "1"} for n in (3, 9, 4, 5, 8)] * 40
        prompts = stream(jsonl(write_jsonl(tmp_path / "a", *rows)), task(), rows=50, max_prompt_tokens=5)
        assert prompts.dropped["a"] == 80
        assert prompts.checked == {"a": 200, "chain_sum/train": 1000}
        assert prompts.describe()[0] == "a: 80 of 200 prompts longer than 5 tokens left out"
        assert prompts.describe()[1] == "a: 117 questions are there more than once"
        too_long = sum(len(task_row(task(), i).question) > 5 for i in range(1000))
        assert prompts.dropped["chain_sum/train"] == too_long > 100
        assert f"({too_long} of the first 1000)" in prompts.describe()[-1]
        lengths = {len(q) for _ in range(20) for q in next(prompts).questions}
        assert lengths == {3, 4, 5}

    def test_all_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"chain_sum/train: all 1000 prompts .*max_prompt_tokens=2; raise"
        ):
            stream(task(), max_prompt_tokens=2)

    def test_rows_that_cannot_be_encoded_are_named(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a", {"question": "1", "answer": "1", "why": "é"})
        with pytest.raises(ValueError, match=r"/a:1: .*U\+00E9"):
            stream(jsonl(path, question_field="why"))
        with pytest.raises(ValueError, match=r"/a:1: .*U\+00E9"):
            stream(jsonl(path, completion_field="why"), needs_completion=True)
        stream(jsonl(path, completion_field="why"))


class TestEvalPrompts:
    def load(self, num_prompts: int, *sources: Any, **data: Any) -> tuple[Prompts, list[str]]:
        config = DataConfig(train=(task(),), eval=sources, **data)
        return load_eval_prompts(config, CharTokenizer(), chat_template="auto", num_prompts=num_prompts)

    def test_sources_take_turns(self, tmp_path: Path) -> None:
        a, b = (jsonl(numbered(tmp_path / name, n)) for name, n in (("a", 9), ("b", 2)))
        prompts, notes = self.load(6, a, b)
        assert prompts.questions == ("a0", "b0", "a1", "b1", "a2", "a3")
        assert prompts.draws_P.tolist() == list(range(6))
        assert notes == []
        assert len(self.load(99, a, b)[0].questions) == 11

    def test_over_long_are_passed_over(self, tmp_path: Path) -> None:
        rows = [{"question": "x" * n, "answer": "1"} for n in (9, 1, 9, 2, 9)]
        source = jsonl(write_jsonl(tmp_path / "a", *rows))
        prompts, notes = self.load(2, source, max_prompt_tokens=4)
        assert (prompts.questions, notes) == (("x", "xx"), ["a: 2 held-out prompts too long, left out"])
        with pytest.raises(ValueError, match=r"all prompts of data\.eval are longer"):
            self.load(2, jsonl(write_jsonl(tmp_path / "b", rows[0])), max_prompt_tokens=4)

    def test_no_source(self) -> None:
        with pytest.raises(ValueError, match=r"data\.eval names no source"):
            self.load(2)


@pytest.mark.skipif(not SHARED.exists(), reason="GSM8K is not in ../shared/data")
def test_gsm8k() -> None:
    source = open_source(jsonl(SHARED / "gsm8k_train.jsonl", completion_field="answer"), True)
    assert len(source) == 7473
    assert all("####" in source[i].answer for i in range(len(source)))
    config = DataConfig(train=(jsonl(SHARED / "gsm8k_test.jsonl"),), max_prompt_tokens=300)
    prompts = open_with(config, byte_tokenizer(CHATML), rows=8)
    assert 0 < prompts.dropped["gsm8k_test.jsonl"] < 1319
    batch = next(prompts)
    assert (batch.tokens_PT[:, 0] == 1).all()
    assert set(batch.lengths_P.tolist()) <= set(range(1, 301))
