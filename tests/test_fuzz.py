"""Random and mutated data files, answers and run directories: an answer in one line, in bounded time, and
never a part taken for the whole. (Configs: `test_command_line`.)

Often with few examples; with -m slow, together with those of the configs, with 2,000.
"""

import functools
import json
import random
import shutil
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_chat import CHATML, byte_tokenizer
from tiny_runs import run

from kdrl_jax.config.data import DataConfig, JsonlSourceConfig
from kdrl_jax.data.prompts import open_prompts
from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.main import explain, main
from kdrl_jax.rewards.pool import RewardPool

LIMIT_S = 10.0
often = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
slow = settings(deadline=None, max_examples=800, suppress_health_check=list(HealthCheck))

# All that text can be: half surrogates, characters that are none, right to left, joined, combining.
WILD = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from(
            "\x00\x07\x1b\r\n\u2028\ufeff\u202e\u200d\u0301\U0001f468\ue000\uffff\ud800٣３{}\\\"'"
        ),
    ),
    max_size=40,
)
NUMBERS = st.sampled_from(
    [
        "9**9**9**9",
        "1e999999999",
        "1/0",
        "-" * 50,
        "\\frac{1}{0}",
        "0" * 500,
        "٣",
        "½",
        "∞",
        "NaN",
        "1_000",
        "0x10",
    ]
)
LATEX = st.lists(
    st.sampled_from(
        ["\\boxed{", "}", "{", "\\frac", "\\sqrt", "$", "####", " ", "\n", "7", ",", "^", "\\text{",
         "\\left(", "\\input{/etc/passwd}", "\\def\\a{\\a\\a}", "__import__('os')"]
    ),
    max_size=60,
).map("".join)  # fmt: skip
ANSWERS = st.one_of(WILD, NUMBERS, LATEX, st.tuples(LATEX, NUMBERS, WILD).map("".join))
VALUES = st.recursive(
    st.one_of(WILD, st.integers(), st.floats(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WILD, inner, max_size=3)),
    max_leaves=5,
)
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"question": st.just("1+1"), "answer": st.just("2")}),
        st.fixed_dictionaries({"question": WILD, "answer": ANSWERS}),
        st.dictionaries(st.sampled_from(["question", "answer", "id"]), VALUES),
    ),
    min_size=1,
    max_size=6,
)


@st.composite
def data_files(draw):
    """Bytes that were JSON lines once."""
    content = "".join(json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n" for row in draw(ROWS))
    raw = content.encode("utf-8", "surrogatepass")
    for what in draw(
        st.lists(st.sampled_from(["cut", "flip", "insert", "twice", "other", "crlf", "bom"]), max_size=2)
    ):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        if what == "cut":
            raw = raw[:at]
        elif what == "flip" and raw:
            raw = raw[:at] + bytes([raw[at] ^ 1 << draw(st.integers(0, 7))]) + raw[at + 1 :]
        elif what == "insert":
            raw = raw[:at] + draw(st.binary(max_size=8)) + raw[at:]
        elif what == "twice":
            raw += raw[at:]
        elif what == "other":
            raw = raw.decode("utf-8", "replace").encode("utf-16")
        elif what == "crlf":
            raw = raw.replace(b"\n", b"\r\n")
        else:
            raw = b"\xef\xbb\xbf" + raw
    return raw


def is_one_line(error):
    told = explain(error)
    assert told is not None, f"a traceback: {error!r}"
    line, status = told
    assert status == 2
    assert len(line.splitlines()) == 1, line


def as_python_reads_it(raw):
    """The rows of a file that are JSON objects with both texts, in order: a plain second reading."""
    found = []
    for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            row = json.loads(line.decode())
            question, answer = row["question"], row["answer"]
            if isinstance(question, str) and isinstance(answer, str | int | float):
                found.append((question, str(answer)))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    return found


def a_data_file_is_read_or_answered(folder, raw, bad_rows, chars):
    file = folder / "rows.jsonl"
    file.write_bytes(raw)
    tokenizer = CharTokenizer() if chars else bytes_tokenizer()
    source = JsonlSourceConfig(kind="jsonl", path=str(file), max_bad_rows=bad_rows)
    start = time.monotonic()
    try:
        prompts = open_prompts(
            DataConfig(train=(source,), max_prompt_tokens=64),
            tokenizer,
            chat_template="auto",
            prompts_per_iteration=4,
            seed=0,
            needs_completion=False,
        )
        drawn = [next(prompts) for _ in range(3)]
        lines = prompts.describe()
    except Exception as error:
        is_one_line(error)
    else:
        there = as_python_reads_it(raw)
        for batch in drawn:
            assert set(zip(batch.questions, batch.answers, strict=True)) <= set(there)
        num_lines = sum(bool(line.strip()) for line in raw.split(b"\n"))
        (left_out,) = [int(line.split()[1]) for line in lines if "that cannot be read" in line] or [0]
        assert left_out <= bad_rows
        assert prompts.checked["rows.jsonl"] <= len(there)
        assert prompts.checked["rows.jsonl"] + left_out >= num_lines
    assert time.monotonic() - start < LIMIT_S


@functools.cache
def bytes_tokenizer():
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


DATA = (data_files(), st.integers(0, 3), st.booleans())


@often
@given(*DATA)
@example(b"", 0, True)
@example(b"\n\n", 3, True)
@example(b"\xff\xfe", 0, False)
@example(b'{"question": "1+1", "answer": "2"}\n{"question": "2+2", "ans', 1, True)
@example(b'{"question": "1", "question": "2", "answer": "2"}\n', 0, True)
@example(b"[" * 100_000, 1, True)
@example(b'{"question": "1+1", "answer": ' + b"9" * 401 + b"}\n", 1, True)
@example(b'{"question": "1+1", "answer": ' + b"9" * 10_000 + b"}\n", 0, True)
def test_data_files(folder, raw, bad_rows, chars):
    a_data_file_is_read_or_answered(folder, raw, bad_rows, chars)


@pytest.mark.slow
@slow
@given(*DATA)
def test_many_data_files(folder, raw, bad_rows, chars):
    a_data_file_is_read_or_answered(folder, raw, bad_rows, chars)


@pytest.fixture(scope="module", params=[["numeric", "exact", "format"], ["math"]], ids=" ".join)
def pool(request):
    with RewardPool(request.param, num_workers=1, time_limit_s=2.0) as made:
        yield made


def an_answer_is_judged(pool, completion, gold):
    completion = completion.encode("utf-8", "replace").decode()  # what a tokenizer's decoder gives
    start = time.monotonic()
    (with_gold,) = pool.score(["q"], [completion], ["7"])
    assert time.monotonic() - start < LIMIT_S
    assert with_gold.error is None
    assert all(0 <= score <= 1 for score in with_gold.scores.values())
    (other,) = pool.score(["q"], [completion], [gold.encode("utf-8", "replace").decode()])
    assert other.error is None or len(other.error.splitlines()) == 1


@often
@given(ANSWERS, ANSWERS)
@example("\\boxed{" * 100_000, "7")
@example("9**9**9**9", "9**9**9**9")
def test_answers(pool, completion, gold):
    an_answer_is_judged(pool, completion, gold)


@pytest.mark.slow
@slow
@given(ANSWERS, ANSWERS)
def test_many_answers(pool, completion, gold):
    an_answer_is_judged(pool, completion, gold)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    _, done = run(place, "run", train={"num_steps": 2})
    assert done
    return place / "run"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 25))])
def test_a_run_directory_with_a_broken_file_is_read_right_or_answered(finished, tmp_path, seed, capfd):
    """One file of it cut off, emptied, overwritten or gone; then its table is asked for, and it goes on."""
    draw = random.Random(seed)
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    files = sorted(p for p in place.rglob("*") if p.is_file() and "checkpoints" not in p.parts)
    broken = draw.choice(files)
    content = broken.read_bytes()
    how = draw.choice(["cut off", "empty", "noise", "gone"])
    if how == "gone":
        broken.unlink()
    else:
        noise = bytes(draw.randrange(256) for _ in range(100))
        broken.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "noise": noise}[how])
    start = time.monotonic()
    statuses = [main(["report", "--config", str(place)]), main(["--config", str(place), "train.num_steps=3"])]
    said = capfd.readouterr()
    told = f"{how}: {broken.relative_to(place)}\n{said.err}"
    assert "Traceback" not in said.err + said.out, told
    assert time.monotonic() - start < 60, told
    for status, name in zip(statuses, ("report", "train"), strict=True):
        assert status in (0, 1, 2), told
        assert status == 0 or any(line.startswith("error: ") for line in said.err.splitlines()), (name, told)
    if statuses[1] == 0:
        steps = [json.loads(line)["step"] for line in (place / "metrics.jsonl").open()]
        assert steps == sorted(set(steps)), told
        assert steps[-1] == 2, told
