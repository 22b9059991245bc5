"""Sources of every kind give the same rows, by the same fields, and name what they cannot read."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pydantic import TypeAdapter, ValidationError
from test_data import SHARED, write_jsonl

from kdrl_jax.config.data import SourceConfig
from kdrl_jax.config.mappings import MAPPINGS
from kdrl_jax.data.sources import Source, open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def source(needs_completion: bool = False, **settings: Any) -> Source:
    return open_source(TypeAdapter(SourceConfig).validate_python(settings), needs_completion)


def rows_of(opened: Source) -> list[tuple[str, str, str | None]]:
    return [(r.question, r.answer, r.completion) for r in (opened[i] for i in range(len(opened)))]


ROWS = [
    {
        "ask": f"what is {i}?",
        "reward_model": {"ground_truth": str(i), "style": "rule"},
        "answers": [i + 0.5, 1.0],
        "a.b": f"flat {i}",
        "rate": None if i == 3 else i / 10,
        "level": "hard" if i % 2 else "easy",
        "several": i == 4,
    }
    for i in range(6)
]


def write_array_record(path: Path, records: list[bytes], **_: Any) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def stored(kind: str, folder: Path, rows: list[dict[str, Any]], name: str = "part") -> dict[str, Any]:
    """The settings of a source of these rows."""
    if kind == "jsonl":
        return {"kind": kind, "path": str(write_jsonl(folder / f"{name}.jsonl", *rows))}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=2)
        return {"kind": kind, "path": str(folder / f"{name}.parquet")}
    if kind == "array_record":
        records = [json.dumps(row).encode() for row in rows]
        return {"kind": kind, "path": str(write_array_record(folder / f"{name}.array_record", records))}
    (folder / "set").mkdir(exist_ok=True)
    write_jsonl(folder / "set" / "train.jsonl", *rows)
    return {"kind": "hub", "name": str(folder / "set")}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of local folders stays with the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


KINDS = ("jsonl", "parquet", "array_record", "hub")
FIELDS = {"question_field": "ask", "answer_field": "reward_model.ground_truth"}


@pytest.mark.parametrize("kind", KINDS)
class TestStored:
    def test_fields_inside_fields(self, kind: str, tmp_path: Path) -> None:
        where = stored(kind, tmp_path, ROWS)
        assert rows_of(source(**where, **FIELDS)) == [(f"what is {i}?", str(i), None) for i in range(6)]
        found = rows_of(
            source(**where, question_field="a.b", answer_field="answers.0", completion_field="ask")
        )
        assert found[2] == ("flat 2", "2.5", "what is 2?")

    def test_first_and_names(self, kind: str, tmp_path: Path) -> None:
        opened = source(**stored(kind, tmp_path, ROWS), **FIELDS, first=2)
        assert len(opened) == 2
        assert opened[0].source == opened.name
        opened.name = "other"
        assert opened[1].source == "other"

    def test_rows_that_are_not_wanted_are_counted(self, kind: str, tmp_path: Path) -> None:
        where = stored(kind, tmp_path, ROWS)
        opened = source(**where, **FIELDS, where={"level": "hard"})
        assert [r[1] for r in rows_of(opened)] == ["1", "3", "5"]
        assert opened.left_out == {'where level is not "hard"': 3}
        opened = source(**where, **FIELDS, where={"several": False})
        assert [r[1] for r in rows_of(opened)] == ["0", "1", "2", "3", "5"]
        with pytest.raises(ValueError, match="6 where several is not 0"):  # a number is no false
            source(**where, **FIELDS, where={"several": 0})
        opened = source(**where, **FIELDS, solve_rate_field="rate", solve_rate=[0.1, 0.4])
        assert [r[1] for r in rows_of(opened)] == ["1", "2", "4"]
        assert opened.left_out == {
            "with a solve rate outside [0.1, 0.4]": 2,
            "without a solve rate": 1,
        }
        with pytest.raises(ValueError, match=r"all rows are left out \(6 where level is not"):
            source(**where, **FIELDS, where={"level": "none"})

    def test_bad_rows_are_named_or_counted(self, kind: str, tmp_path: Path) -> None:
        bad = [{**ROWS[0], "ask": ""}, {**ROWS[0], "reward_model": {"ground_truth": None, "style": "x"}}]
        where = stored(kind, tmp_path, [ROWS[0], *bad, ROWS[1]])
        row = {"jsonl": r"part\.jsonl:2", "parquet": r"part\.parquet row 1", "array_record": "record 1"}
        with pytest.raises(ValueError, match=rf"{row.get(kind, 'set/train row 1')}: field 'ask' .* is empty"):
            source(**where, **FIELDS)
        opened = source(**where, **FIELDS, max_bad_rows=2)
        assert [r[1] for r in rows_of(opened)] == ["0", "1"]
        assert opened.bad.count == 2
        assert opened.place(1) in {p.format(3) for p in (f"{where.get('path')} row {{}}",
            f"{where.get('path')} record {{}}", f"{where.get('name')}/train row {{}}")} | {
            f"{where.get('path')}:4"
        }  # fmt: skip

    def test_a_field_that_is_not_there(self, kind: str, tmp_path: Path) -> None:
        where = stored(kind, tmp_path, ROWS)
        with pytest.raises(
            ValueError, match=r"no field 'answer' \(answer_field\); the row has \['a\.b'.*'ask'"
        ):
            source(**where, question_field="ask")
        with pytest.raises(ValueError, match=r"no field 'answers\.2' \(answer_field\)"):
            source(**where, question_field="ask", answer_field="answers.2")

    def test_completions_when_needed(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="names no field for them; set completion_field"):
            source(True, **stored(kind, tmp_path, ROWS), **FIELDS)


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
class TestFolders:
    def test_files_of_a_folder_in_the_order_of_their_names(self, kind: str, tmp_path: Path) -> None:
        stored(kind, tmp_path, ROWS[3:], "b")
        path = stored(kind, tmp_path, ROWS[:3], "a")["path"]
        (tmp_path / "README.md").write_text("no data")
        opened = source(kind=kind, path=str(tmp_path), **FIELDS)
        assert [r[1] for r in rows_of(opened)] == list("012345")
        assert opened.place(4).startswith(path.replace("a.", "b."))
        assert len(source(kind=kind, path=str(tmp_path), **FIELDS, first=4)) == 4

    def test_files_behind_the_first_rows_are_not_opened(self, kind: str, tmp_path: Path) -> None:
        stored(kind, tmp_path, ROWS[:3], "a")
        (tmp_path / f"b.{kind}").write_text("no such file")
        assert len(source(kind=kind, path=str(tmp_path), **FIELDS, first=3)) == 3
        with pytest.raises(ValueError, match=rf"/b\.{kind}: cannot be read as"):
            source(kind=kind, path=str(tmp_path), **FIELDS, first=4)

    def test_what_is_no_such_file(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such file .*working directory"):
            source(kind=kind, path=str(tmp_path / "none"), **FIELDS)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=f"no .{kind}"):
            source(kind=kind, path=str(tmp_path / "empty"), **FIELDS)
        path = write_jsonl(tmp_path / "rows", *ROWS)
        for allowed in (0, 9):
            with pytest.raises(ValueError, match=r"/rows: cannot be read as .* \(.+\); fetch it again"):
                source(kind=kind, path=str(path), **FIELDS, max_bad_rows=allowed)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"cannot be read as|holds no rows"):
            source(kind=kind, path=str(path), **FIELDS)

    def test_a_file_that_is_cut_off(self, kind: str, tmp_path: Path) -> None:
        path = Path(stored(kind, tmp_path, ROWS * 50)["path"])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"cannot be read as|holds no rows"):
            source(kind=kind, path=str(path), **FIELDS)


def test_array_records_hold_json(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    path = write_array_record(tmp_path / "a.array_record", [good, b"\x82\xa3ask\xa1q", good])
    settings = {"kind": "array_record", "path": str(path), **FIELDS}
    with pytest.raises(ValueError, match=r"a\.array_record record 1: not UTF-8 text|record 1: not JSON"):
        source(**settings)
    assert len(source(**settings, max_bad_rows=1)) == 2


def test_parquet_reads_only_the_columns_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = stored("parquet", tmp_path, ROWS)
    asked = []
    real = pq.ParquetFile.iter_batches

    def spy(self: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["columns"])
        return real(self, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    source(**where, **FIELDS, where={"level": "hard"})
    assert asked == [["ask", "level", "reward_model"]]


def test_parquet_types_that_are_no_text_are_said(tmp_path: Path) -> None:
    import datetime
    import decimal

    for value in (datetime.datetime(2024, 1, 1), decimal.Decimal("1.5"), b"x", [1]):
        rows = [{"question": "q", "answer": value}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        with pytest.raises(
            ValueError, match=rf"row 0: field 'answer' .* must be text, got {type(value).__name__}"
        ):
            source(kind="parquet", path=str(tmp_path / "a.parquet"))


class TestHub:
    def test_what_cannot_be_fetched_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def refuse(*args: Any, **kwargs: Any) -> Any:
            assert "trust_remote_code" not in kwargs
            raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\n(timeout)")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(
            ValueError, match=r"openai/gsm8k/main: the data set cannot be loaded \(Conn"
        ) as error:
            source(kind="hub", mapping="gsm8k")
        assert "\n" not in str(error.value)

    def test_settings_are_handed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        asked = []

        def load(*args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            return [{"question": "1+1?", "answer": "so\n#### 2"}]

        monkeypatch.setattr(datasets, "load_dataset", load)
        opened = source(kind="hub", mapping="gsm8k", split="test", revision="abc")
        assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
        assert (opened.name, opened.place(0)) == ("gsm8k/test", "openai/gsm8k/main/test row 0")
        assert rows_of(opened) == [("1+1?", "2", "so\n#### 2")]

    def test_a_split_that_is_not_there(self, tmp_path: Path) -> None:
        where = stored("hub", tmp_path, ROWS)
        with pytest.raises(ValueError, match=r'cannot be loaded .*Unknown split "none"'):
            source(**where, **FIELDS, split="none")
        assert len(source(**where, **FIELDS, split="train[:2]")) == 2

    def test_code_of_a_data_set_is_not_run(self, tmp_path: Path) -> None:
        folder = tmp_path / "evil"
        folder.mkdir()
        mark = tmp_path / "ran"
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
        with pytest.raises(ValueError, match="cannot be loaded"):
            source(kind="hub", name=str(folder))
        assert not mark.exists()


def test_extras_are_named_where_they_are_missing(tmp_path: Path) -> None:
    """In a process that has none of them; and none is imported before it is asked for."""
    lines = ["import sys", "from pydantic import TypeAdapter",
             "from kdrl_jax.config.data import SourceConfig",
             "from kdrl_jax.data.sources import open_source",
             "extras = ['pyarrow', 'array_record', 'datasets', 'reasoning_gym']",
             "assert not set(extras) & set(sys.modules), sys.modules.keys()",
             "for name in extras: sys.modules[name] = None",
             "for given in ({'kind': 'parquet', 'path': 'a'}, {'kind': 'array_record', 'path': 'a'},",
             "              {'kind': 'hub', 'name': 'a/b'}, {'kind': 'gym', 'task': 'gcd'}):",
             "    try: open_source(TypeAdapter(SourceConfig).validate_python(given), False)",
             "    except ImportError as error: print(error)"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    told = done.stdout.splitlines()
    assert [line.split("[")[1].split("]")[0] for line in told] == ["parquet", "array_record", "hub", "gym"]


class TestMappings:
    @pytest.mark.parametrize("name", MAPPINGS)
    def test_each_is_made_of_settings(self, name: str) -> None:
        adapter: TypeAdapter[Any] = TypeAdapter(SourceConfig)
        hub = adapter.validate_python({"kind": "hub", "mapping": name})
        assert hub.model_dump().items() >= MAPPINGS[name].items()
        local = adapter.validate_python({"kind": "parquet", "path": "p", "mapping": name})
        assert local.question_field == hub.question_field
        assert local.where == hub.where
        # What is written down says everything: the table may change.
        assert adapter.validate_python(hub.model_dump(mode="json")) == hub

    def test_settings_that_are_given_go_before(self) -> None:
        given = {
            "kind": "jsonl",
            "path": "p",
            "mapping": "math",
            "answer_field": "answer",
            "completion_field": None,
        }
        config = TypeAdapter(SourceConfig).validate_python(given)
        assert (config.question_field, config.answer_field) == ("problem", "answer")
        assert config.completion_field is None

    def test_another_name(self) -> None:
        with pytest.raises(ValidationError, match="gsm8k"):
            TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": "p", "mapping": "gsm9k"})

    @pytest.mark.parametrize(
        ("name", "row", "expected"),
        [
            ("gsm8k", {"question": "q", "answer": "4*2=<<4*2=8>>8\n#### 8"}, "8"),
            (
                "math",
                {"problem": "q", "solution": r"$\boxed{1}$? No, $\boxed{\frac{1}{2}}$."},
                r"\frac{1}{2}",
            ),
            ("deepscaler", {"problem": "q", "answer": "-1", "solution": ""}, "-1"),
            ("aime", {"problem": "q", "answer": "025", "solution": "s"}, "25"),
            ("aime", {"problem": "q", "answer": "000", "solution": "s"}, "0"),
            ("aime", {"problem": "q", "answer": 7, "solution": "s"}, "7"),
            ("amc", {"problem": "q", "answer": 142.0, "url": "u"}, "142"),
            ("amc", {"problem": "q", "answer": "142", "url": "u"}, "142"),
            ("amc", {"problem": "q", "answer": "142.0", "url": "u"}, "142"),
            ("amc", {"problem": "q", "answer": "-0.50", "url": "u"}, "-0.50"),
            (
                "olympiadbench",
                {"question": "q", "final_answer": ["2", "x"], "is_multiple_answer": False},
                "2",
            ),
            ("minerva", {"question": "q", "answer": "4.7e16"}, "4.7e16"),
            ("bigmath", {"problem": "q", "answer": "5", "llama8b_solve_rate": None}, "5"),
        ],
    )
    def test_rows_as_they_are_published(
        self, name: str, row: dict[str, Any], expected: str, tmp_path: Path
    ) -> None:
        opened = source(kind="jsonl", path=str(write_jsonl(tmp_path / "a", row)), mapping=name)
        assert (opened[0].question, opened[0].answer) == ("q", expected)

    def test_a_solution_without_a_box(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a", {"problem": "q", "solution": "it is 5"})
        with pytest.raises(ValueError, match=r"a:1: field 'solution' .* marks no answer .*'it is 5'"):
            source(kind="jsonl", path=str(path), mapping="math")

    def test_several_answers_and_rates(self, tmp_path: Path) -> None:
        rows = [{"question": "q", "final_answer": ["1"], "is_multiple_answer": x} for x in (True, False)]
        opened = source(kind="jsonl", path=str(write_jsonl(tmp_path / "a", *rows)), mapping="olympiadbench")
        assert len(opened) == 1
        rows = [{"problem": f"q{x}", "answer": "1", "llama8b_solve_rate": x} for x in (None, 0, 0.5, 1)]
        path = str(write_jsonl(tmp_path / "b", *rows))
        opened = source(kind="jsonl", path=path, mapping="bigmath", solve_rate=[0.2, 0.8])
        assert [r[0] for r in rows_of(opened)] == ["q0.5"]

    @pytest.mark.skipif(not SHARED.exists(), reason="GSM8K is not in ../shared/data")
    def test_all_of_gsm8k(self) -> None:
        from kdrl_jax.rewards.functions import numeric

        for name, size in (("train", 7473), ("test", 1319)):
            opened = source(True, kind="jsonl", path=str(SHARED / f"gsm8k_{name}.jsonl"), mapping="gsm8k")
            found = rows_of(opened)
            assert len(found) == size
            assert all(numeric("", completion or "", answer) == 1 for _, answer, completion in found)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"solve_rate": [0.2, 0.8]}, "needs solve_rate_field"),
            ({"solve_rate": [0.8, 0.2], "solve_rate_field": "r"}, r"write \[least, most\]"),
            ({"solve_rate": [0.2, 1.5], "solve_rate_field": "r"}, "less than or equal to 1"),
        ],
    )
    def test_contradictions(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(SourceConfig).validate_python({"kind": "jsonl", "path": "p", **settings})

    def test_a_rate_that_is_none(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a", {"question": "q", "answer": "a", "rate": "50%"})
        with pytest.raises(ValueError, match=r"a:1: field 'rate' .* share from 0 to 1, got str"):
            source(kind="jsonl", path=str(path), solve_rate_field="rate", solve_rate=[0, 1])


class TestGym:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym")

    def test_rows_follow_from_their_number(self) -> None:
        first, again = (source(kind="gym", task="leg_counting", size=50) for _ in range(2))
        rows = rows_of(first)
        assert rows == [rows_of(again)[i] for i in range(50)]
        assert (again[49].question, again[49].answer) == rows[49][:2]
        assert first.name == first[0].source == "leg_counting/0"
        assert rows[0][0].startswith("Your task is to count how many legs")
        assert rows[0][2] is None
        with pytest.raises(IndexError):
            first[50]

    def test_neighbouring_seeds_share_no_rows(self) -> None:
        """As the library's own would: its row 1 of seed 0 is row 0 of seed 1."""
        rows = [
            {r[0] for r in rows_of(source(kind="gym", task="count_bits", seed=s, size=200))} for s in range(4)
        ]
        assert all(not a & b for i, a in enumerate(rows) for b in rows[:i])

    def test_options_are_the_generators_own(self) -> None:
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        opened = source(kind="gym", task="chain_sum", options=options, size=20)
        assert all(len(r[0]) < 75 for r in rows_of(opened))
        with pytest.raises(
            ValueError, match=r"task=chain_sum, options=.*unexpected keyword argument 'terms'"
        ):
            source(kind="gym", task="chain_sum", options={"terms": 2})
        with pytest.raises(ValueError, match=r"options=\{'min_terms': 9\}: max_terms must be >= min_terms"):
            source(kind="gym", task="chain_sum", options={"min_terms": 9})
        with pytest.raises(ValueError, match="multiple values for keyword argument 'seed'"):
            source(kind="gym", task="chain_sum", options={"seed": 2})

    @pytest.mark.parametrize(
        ("task", "options", "says"),
        [
            ("caesar_cipher", {"min_words": 1000, "max_words": 1001}, "row 0: Cannot choose from an empty"),
            ("maze", {"min_dist": 500, "max_dist": 600}, "row 0: Could not find suitable path cell"),
            # An assertion without a word.
            ("number_sequence", {"min_value": 5, "max_value": 5},
             "AssertionError of `assert self.max_value > self.min_value`"),
        ],
    )  # fmt: skip
    def test_options_that_make_no_rows(self, task: str, options: dict[str, int], says: str) -> None:
        with pytest.raises(ValueError, match=re.escape(f"options={options}: {says}")) as raised:
            source(kind="gym", task=task, options=options)
        assert str(raised.value).endswith("; see the generator's config in reasoning-gym")
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("task", ["countdown", "codeio", "acre", "leg_countin"])
    def test_tasks_without_one_answer_in_text(self, task: str) -> None:
        with pytest.raises(ValueError, match=f"task='{task}' is none of the generators .*nearest: "):
            source(kind="gym", task=task)

    def test_its_scorers_are_not_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from reasoning_gym.factory import DATASETS

        def refuse(*_: Any, **__: Any) -> float:
            raise AssertionError("a scorer is called")

        for name in ("leg_counting", "string_insertion"):
            monkeypatch.setattr(DATASETS[name][0], "score_answer", refuse)
            assert len(rows_of(source(kind="gym", task=name, size=5))) == 5
        text = (Path(__file__).parents[1] / "kdrl_jax" / "data" / "gym.py").read_text()
        assert ".score_answer(" not in text

    def test_there_are_no_completions(self) -> None:
        with pytest.raises(ValueError, match="its questions have none"):
            source(True, kind="gym", task="gcd")

    @pytest.mark.slow
    def test_every_task_has_one_text_whatever_was_drawn_before(self) -> None:
        from kdrl_jax.data.gym import TASKS

        for task in sorted(TASKS):
            forwards = source(kind="gym", task=task, size=1000)
            backwards = source(kind="gym", task=task, size=1000)
            rows = [forwards[i] for i in range(5)]
            assert all(r.question.strip() and r.answer.strip() for r in rows), task
            assert [backwards[i] for i in (4, 2, 0)] == [rows[i] for i in (4, 2, 0)], task
