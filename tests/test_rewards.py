"""Rewards: what counts as the same answer, and worker processes that nothing can hang or corrupt."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from kdrl_jax.rewards.answers import MAX_TEXT_CHARS, final_number, find_marked, last_number, parse_number
from kdrl_jax.rewards.choices import choice
from kdrl_jax.rewards.functions import MAX_REST_CHARS, exact, has_format, numeric, resolve
from kdrl_jax.rewards.pool import RewardPool, Scored, is_correct, total

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

USER_MODULE = """
import os, sys, time

def length(question, completion, answer):
    return len(completion)

def hang(question, completion, answer):
    while completion == "hang":
        pass
    return 1.0

def fail(question, completion, answer):
    if "fail" in completion:
        raise KeyError("no such\\nunit")
    return 1

def talk(question, completion, answer):
    print('{"id": 0, "scores": {"user_rewards:talk": 7.0}}', flush=True)
    os.write(1, b"to the descriptor\\n")
    os.system("echo from a child")
    return float(sys.stdin.read() == "")

def leave(question, completion, answer):
    if completion == "os":
        os._exit(3)
    if completion == "sys":
        sys.exit(4)
    return 1.0

def strange(question, completion, answer):
    return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1", "true": True}[completion]

def memory(question, completion, answer):
    return len(bytearray(2**int(completion)))

def orphan(question, completion, answer):
    if completion == "orphan":
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os._exit(0)
    return 1.0

def slow(question, completion, answer):
    time.sleep(float(completion))
    return float(completion)

def one_argument(question):
    return 1.0

not_a_function = 3
"""


@pytest.fixture
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory; its name."""
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    return "user_rewards"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(["numeric", "exact", "format"], num_workers=2, time_limit_s=10.0) as pool:
        yield pool


# Completion, gold answer, and whether `numeric` holds them for equal.
GOLDEN: list[tuple[str, str, bool]] = [
    ("72", "72", True),
    ("The answer is 72.", "72", True),
    ("so 48 / 2 = 24 and 48 + 24 = 72\n#### 72", "48/2 = <<48/2=24>>24\n#### 72", True),
    ("#### 72\n", "#### 72", True),
    ("####72", "72", True),
    ("####\n72", "72", True),
    ("#### 72 ####", "72", True),
    ("#### 24\nno, wait\n#### 72", "72", True),
    ("#### **72**", "72", True),
    ("#### $72", "72", True),
    ("#### 72 dollars", "72", True),
    ("#### The total is 72.", "72", True),
    ("#### 3 * 24 = 72", "72", True),
    ("#### 72. The rest follows: 5 + 5", "72", False),
    ("#### Conclusion\n72", "72", False),
    (r"\boxed{72}", "72", True),
    (r"\boxed{71} or rather \boxed{72}", "72", True),
    (r"\boxed{72} as 3 \cdot 24 shows", "72", True),
    (r"\boxed{72", "72", True),
    (r"\boxed{72} and then \boxed{5", "72", True),
    (r"\boxed{\boxed{72}}", "72", True),
    (r"\boxed {72}", "72", True),
    (r"\boxed{ 72 }", "72", True),
    (r"\boxed{$72$}", "72", True),
    (r"\boxed{\text{72 eggs}}", "72", True),
    (r"\boxed{72\text{ cm}^2}", "72", True),
    (r"\boxed{72\,\mathrm{km/h}}", "72", True),
    (r"\boxed{x = 72}", "72", True),
    (r"\boxed{72^\circ}", "72", True),
    (r"$\boxed 72$", "72", True),
    (r"\boxed72. So it is 72, not 5", "72", True),
    (r"\boxed -72", "-72", True),
    (r"\boxed 1,234", "1234", True),
    (r"\boxed\frac{144}2 as 5", "72", True),
    (r"\boxed\frac{144}{2} as 5", "72", True),
    (r"\fbox{72} as 5", "72", True),
    (r"\boxed{71} or rather \boxed 72", "72", True),
    (r"\boxed 71 or rather \boxed{72}", "72", True),
    (r"\boxed{71} in \boxed form", "71", True),
    (r"\boxed{}", "72", False),
    (r"72 \boxed{}", "72", False),
    (r"\boxed{72x}", "72", False),
    (r"\boxed{72\pi}", "72", False),
    (r"\boxed{\sqrt{72}}", "72", False),
    (r"\boxed{(3, 72)}", "72", False),
    (r"\boxed{x = 3, y = 72}", "72", False),
    (r"\boxed{x - 2y = 72}", "72", False),
    (r"\boxed{7**2}", "72", False),
    (r"\boxed{7\text{2}}", "72", False),
    (r"\boxed{9**9**9}", "72", False),
    ("1,234", "1234", True),
    ("it is 1,234,567 in all", "1234567", True),
    (r"\boxed{1{,}234}", "1234", True),
    (r"\boxed{10,\!080}", "10080", True),
    (r"\boxed{10\,080}", "10080", True),
    ("\\boxed{10\u202f080}", "10080", True),
    ("1,23", "123", False),
    ("She pays $18.", "18", True),
    (r"\boxed{\$18.00}", "$18", True),
    ("-$18", "-18", True),
    ("$-18", "-18", True),
    ("18%", "18", True),
    (r"\boxed{18\%}", "18%", True),
    ("18 %", "18", True),
    ("0.18", "18%", False),
    ("-3", "-3", True),
    ("it is = -3.", "-3", True),
    ("\u22123", "-3", True),
    (r"\boxed{- 3}", "-3", True),
    ("+3", "3", True),
    ("7-3", "3", True),
    ("3", "-3", False),
    ("3.50", "3.5", True),
    ("3.50", "7/2", True),
    (".5", "1/2", True),
    ("0.333", "1/3", False),
    ("1/2", "0.5", True),
    ("1 / 2", "0.5", True),
    ("1 1/2", "1.5", True),
    ("-1/2", r"-\frac{1}{2}", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{\dfrac{1}{2}}", "0.5", True),
    (r"\boxed{\tfrac{1}{2}}", "0.5", True),
    (r"\boxed{\frac12}", "0.5", True),
    (r"\boxed{\frac{ 2 }{ 4 }}", "0.5", True),
    (r"so it is $\frac{1}{2}$.", "0.5", True),
    (r"\boxed{-\frac{1}{2}}", "-0.5", True),
    (r"\boxed{\frac{-1}{2}}", "-0.5", True),
    (r"\boxed{1\frac{1}{2}}", "1.5", True),
    (r"\boxed{\frac{1}{\frac{1}{2}}}", "2", False),
    ("1/0", "0", False),
    ("1e3", "1000", True),
    ("1e999999999", "1", False),
    ("12345678901234567890123", "12345678901234567890123", True),
    ("12345678901234567890124", "12345678901234567890123", False),
    ("the year \u0661\u0662", "12", False),
    ("", "72", False),
    ("no number here", "72", False),
]


def test_golden_answers_through_the_workers(pool: RewardPool) -> None:
    assert len(GOLDEN) >= 60
    completions, golds, _ = zip(*GOLDEN, strict=True)
    scored = pool.score([""] * len(GOLDEN), completions, golds)
    wrong = [row for row, s in zip(GOLDEN, scored, strict=True) if is_correct(s, "numeric") != row[2]]
    assert not wrong
    assert all(s.error is None for s in scored)
    assert all(s.scores.keys() == {"numeric", "exact", "format"} for s in scored)


def test_numbers_are_exact_fractions() -> None:
    assert parse_number("0.1") == Fraction(1, 10)
    assert final_number("1/3") == Fraction(1, 3)
    assert final_number("about 0.30000000000000000000000000000000001") != Fraction(3, 10)
    assert parse_number("1e100") == 10**100
    assert parse_number("1e101") is None
    assert last_number(f"9 {'1' * 65}") == "1" * 65
    assert final_number(f"9 {'1' * 65}") is None  # never an earlier number in its place
    assert final_number("1" * 64) == int("1" * 64)


@pytest.mark.parametrize(
    "gold", ["", "p - q", r"\left( 3, \frac{\pi}{2} \right)", "#### none", "1, -2", "x" * 999]
)
def test_a_gold_answer_that_is_no_number_is_an_error_and_not_a_wrong_answer(gold: str) -> None:
    with pytest.raises(ValueError, match=r"does not state one number.*exact"):
        numeric("", "5", gold)


@pytest.mark.parametrize(
    ("completion", "gold", "same"),
    [
        (r"thus \boxed{p-q}.", "p - q", True),
        (r"\boxed{(3,\dfrac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{\text{Evelyn}}", r"Evelyn", True),
        (r"#### Evelyn", r"\text{Evelyn}", True),
        (r"\boxed{New  York}", r"\text{New York}", True),
        (r"\boxed{NewYork}", r"\text{New York}", False),
        (r"\boxed{\frac34}", r"\frac{3}{4}", True),
        (r"\boxed{$x$}.", "x", True),
        ("Evelyn", "Evelyn", True),
        ("I think it is 12.", "12", True),
        ("2+3=5", "5", True),
        ("(1, 2)", "(1,2)", True),
        (r"\boxed{12}", "12.0", False),
        (r"\boxed{1 2}", "12", False),
        (r"\boxed{Q}", "q", False),
        (r"\boxed{}", "x", False),
        ("", "x", False),
    ],
)
def test_exact(completion: str, gold: str, same: bool) -> None:
    assert exact("", completion, gold) == float(same)


def test_exact_refuses_an_empty_gold_answer() -> None:
    with pytest.raises(ValueError, match="is empty"):
        exact("", "", " ")


@pytest.mark.parametrize(
    ("completion", "marked"),
    [
        ("2+3=5\n#### 5", True),
        ("#### 5\n", True),
        (r"It is $\boxed{5}$. I hope it is correct.", True),
        (r"\boxed{wrong but marked}", True),
        ("#### 5\n" + "x" * MAX_REST_CHARS, True),
        ("#### 5\n" + "x" * (MAX_REST_CHARS + 1), False),
        (r"\boxed{5}" + "x" * (MAX_REST_CHARS + 1), False),
        (r"\boxed{5} " + "so the answer is at hand, as I said: it is 5.\n#### 5", False),
        (r"\boxed{}", False),
        (r"\boxed{ }", False),
        (r"\boxed{5", False),
        ("####", False),
        ("5 ####\n", False),
        ("### 5", False),
        ("5", False),
        ("", False),
    ],
)
def test_format(completion: str, marked: bool) -> None:
    assert has_format("", completion, "5") == float(marked)


HOSTILE = [
    "9**9**9",
    r"\boxed{9**9**9}",
    "__import__('os')._exit(3)",
    "1e999999999",
    r"\boxed{1e999999999}",
    "9" * 1_000_000,
    "1/" + "9" * 5_000,
    "{" * 100_000 + "}" * 100_000,
    r"\boxed{" * 100_000,
    r"\boxed{" * 25_000 + "5" + "}" * 25_000,
    r"\boxed{" + "{" * 1_000_000,
    r"\boxed" * 100_000,
    r"\boxed" + " " * 1_000_000,
    r"\frac{" * 150_000 + "1",
    r"\text{" * 150_000 + "1",
    "^ " * 500_000 + "1",
    "1 " * 500_000,
    "1," * 500_000,
    "1/" * 500_000,
    "1e" * 500_000,
    "-" * 1_000_000 + "1",
    "####" * 250_000,
    "#### " * 200_000 + "1",
    "1" + "\n" * 1_000_000,
    "\x00\x1b[2J\r\u2028\ud800" * 50_000 + "1",
    "\u0661\u0662\uff11\u00b2\u00bd" * 100_000,
    "a" * 1_000_000,
]


def test_hostile_answers_return_in_bounded_time(pool: RewardPool) -> None:
    for index, completion in enumerate(HOSTILE):
        start = time.monotonic()
        (scored,) = pool.score([""], [completion], ["77777"])
        took = time.monotonic() - start
        assert took < 2.0, (index, completion[:20], took)
        assert scored.error is None, (index, scored.error)
        assert scored.scores["numeric"] == 0.0
    # The same as gold answers: an error at worst.
    start = time.monotonic()
    scored_golds = pool.score([""] * len(HOSTILE), ["1"] * len(HOSTILE), HOSTILE)
    assert time.monotonic() - start < 1.0 * len(HOSTILE)
    assert all(s.error is None or "gold answer" in s.error for s in scored_golds)


def test_parsing_is_linear_in_the_text() -> None:
    def seconds(text: str) -> float:
        # Of this thread alone: what else the machine does is not counted.
        start = time.thread_time()
        find_marked(text)
        final_number(text)
        exact("", text, "77777")
        return time.thread_time() - start

    for unit in (r"\boxed{", r"\frac{", "1 ", "^ ", r"\text{", "#### ", r"\^\circ "):
        repeats = MAX_TEXT_CHARS // len(unit)
        short = min(seconds(unit * (repeats // 8)) for _ in range(3))
        long = min(seconds(unit * repeats) for _ in range(3))
        assert long < 30 * short + 0.02, (unit, short, long)  # 8 if linear, 64 if quadratic


def test_gsm8k_gold_answers_verify(pool: RewardPool) -> None:
    path = DATA / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip("the GSM8K test set is not there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    golds = [row["answer"] for row in rows]
    assert len(golds) > 1000
    for completions in (golds, [f"So it is \\boxed{{{gold.rpartition('#### ')[2]}}}." for gold in golds]):
        scored = pool.score([row["question"] for row in rows], completions, golds)
        assert [s for s in scored if not (is_correct(s, "numeric") and is_correct(s, "format"))] == []
    shifted = pool.score([""] * len(golds), [f"#### 1{gold.rpartition('#### ')[2]}" for gold in golds], golds)
    assert not any(is_correct(s, "numeric") for s in shifted)


def test_order_is_kept_and_batches_overlap(user_rewards: str) -> None:
    times = ["0.3", "0", "0.1", "0", "0.2", "0.05"]
    with RewardPool([f"{user_rewards}:slow"], num_workers=2, time_limit_s=5.0) as pool:
        start = time.monotonic()
        first = pool.submit(times, times, times)
        second = pool.submit(["q"], ["0.01"], ["a"])
        assert time.monotonic() - start < 0.2  # submitting does not wait
        assert not first.done()
        assert [s.scores[f"{user_rewards}:slow"] for s in first.result(10)] == [float(t) for t in times]
        assert [s.scores[f"{user_rewards}:slow"] for s in second.result(10)] == [0.01]
        assert pool.score([], [], []) == []


def test_a_hanging_function_is_killed_and_the_next_answers_score(user_rewards: str) -> None:
    name = f"{user_rewards}:hang"
    with RewardPool(["numeric", name], num_workers=1, time_limit_s=0.5) as pool:
        start = time.monotonic()
        scored = pool.score([""] * 5, ["1", "hang", "1", "hang", "2"], ["1"] * 5)
        assert time.monotonic() - start < 10.0
        assert [s.error for s in scored] == [None, "timeout after 0.5 s", None, "timeout after 0.5 s", None]
        assert [s.scores["numeric"] for s in scored] == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert [s.scores[name] for s in scored] == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_a_function_that_raises_is_named_and_others_go_on(user_rewards: str) -> None:
    with RewardPool(["numeric", f"{user_rewards}:fail"], num_workers=1, time_limit_s=5.0) as pool:
        failed, good = pool.score(["", ""], ["fail 1", "1"], ["1", "1"])
    assert failed.error == "KeyError: 'no such\\nunit' (in user_rewards:fail)"
    assert failed.scores == {"numeric": 1.0, "user_rewards:fail": 0.0}
    assert is_correct(failed, "numeric")
    assert total(failed, "numeric", {"user_rewards:fail": 5.0}) == 1.0
    assert good == Scored({"numeric": 1.0, "user_rewards:fail": 1.0}, None)


def test_a_verifier_that_raises_scores_nothing(user_rewards: str) -> None:
    names = [f"{user_rewards}:fail", "numeric"]
    with RewardPool(names, num_workers=1, time_limit_s=5.0) as pool:
        (failed,) = pool.score([""], ["fail"], ["fail"])
        (alone,) = pool.score([""], ["fail 1"], ["1"], only="numeric")
    assert failed.error == "KeyError: 'no such\\nunit' (in user_rewards:fail)"
    assert failed.scores == dict.fromkeys(names, 0.0)
    assert not is_correct(failed, names[0])
    assert alone == Scored({"numeric": 1.0}, None)


def test_a_bad_gold_answer_is_an_error_of_its_own(pool: RewardPool) -> None:
    (scored,) = pool.score([""], ["5"], ["p - q"])
    assert scored.error is not None
    assert "'p - q'" in scored.error
    assert scored.error.endswith("(in numeric)")
    assert not is_correct(scored, "numeric")


def test_a_function_that_prints_does_not_reach_the_protocol(user_rewards: str) -> None:
    with RewardPool([f"{user_rewards}:talk"], num_workers=1, time_limit_s=5.0) as pool:
        assert pool.score([""] * 3, ["x"] * 3, [""] * 3) == [Scored({"user_rewards:talk": 1.0}, None)] * 3


def test_a_worker_that_ends_is_replaced(user_rewards: str) -> None:
    with RewardPool([f"{user_rewards}:leave"], num_workers=1, time_limit_s=5.0) as pool:
        left, caught, good = pool.score([""] * 3, ["os", "sys", "stay"], [""] * 3)
    assert left.error == "worker died with exit status 3"
    assert caught.error == "SystemExit: 4 (in user_rewards:leave)"
    assert good.error is None


def test_scores_must_be_finite_numbers(user_rewards: str) -> None:
    kinds = ["nan", "inf", "none", "text", "true"]
    with RewardPool([f"{user_rewards}:strange"], num_workers=1, time_limit_s=5.0) as pool:
        *bad, true = pool.score([""] * 5, kinds, [""] * 5)
    assert [s.error.partition(" (in")[0] for s in bad if s.error] == [
        "ValueError: a score must be finite, got nan",
        "ValueError: a score must be finite, got inf",
        "TypeError: a score must be a number, got NoneType None",
        "TypeError: a score must be a number, got str '1'",
    ]
    assert true.scores == {"user_rewards:strange": 1.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux")
def test_memory_is_limited(user_rewards: str) -> None:
    with RewardPool([f"{user_rewards}:memory"], num_workers=1, time_limit_s=5.0) as pool:
        small, large = pool.score(["", ""], ["20", "33"], ["", ""])
    assert small.error is None
    assert large.error == "MemoryError: (in user_rewards:memory)"


def test_what_a_function_started_cannot_hold_an_answer_up(user_rewards: str) -> None:
    # The forked child holds the worker's pipes open for a minute.
    with RewardPool([f"{user_rewards}:orphan"], num_workers=1, time_limit_s=1.0) as pool:
        start = time.monotonic()
        orphaned, good = pool.score(["", ""], ["orphan", "x"], ["", ""])
    assert time.monotonic() - start < 10.0
    assert orphaned.error == "timeout after 1.0 s"
    assert good.error is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("numerc", ["'numerc'", "nearest: numeric", "package.module:function"]),
        ("zzz", ["'zzz'", "choice, exact, format, math, numeric, regex"]),
        ("user_rewards", ["package.module:function"]),
        ("user_rewards:", ["package.module:function"]),
        ("no_such_module:f", ["ModuleNotFoundError", "no_such_module", "PYTHONPATH"]),
        ("user_rewards:nothing", ["AttributeError", "'nothing'"]),
        ("user_rewards:not_a_function", ["is a int, not a function"]),
        ("user_rewards:one_argument", ["(question)", "(question, completion, answer)"]),
    ],
)
def test_a_name_that_does_not_resolve_is_one_clear_line(
    user_rewards: str, name: str, parts: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"reward function") as raised:
        RewardPool(["numeric", name], num_workers=1, time_limit_s=1.0)
    text = str(raised.value)
    assert "\n" not in text
    assert [part for part in parts if part not in text] == []


def test_a_module_that_ends_the_worker_while_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone.py").write_text("import os\nprint('noise')\nos._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"ended while it imported the functions.*exit status 7"):
        RewardPool(["gone:f"], num_workers=2, time_limit_s=1.0)


def test_resolve_returns_built_in_functions() -> None:
    assert [resolve(name) for name in ("numeric", "exact", "format", "choice")] == [
        numeric,
        exact,
        has_format,
        choice,
    ]


def test_arguments_are_checked(pool: RewardPool) -> None:
    with pytest.raises(ValueError, match="2 questions, 1 completions and 1 answers"):
        pool.score(["a", "b"], ["1"], ["1"])
    with pytest.raises(TypeError, match="answer 1 is a int"):
        pool.score(["a", "b"], ["1", "2"], ["1", 2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="functions='numeric'"):
        RewardPool("numeric", num_workers=1, time_limit_s=1.0)
    with pytest.raises(ValueError, match="num_workers=0"):
        RewardPool(["numeric"], num_workers=0, time_limit_s=1.0)
    with pytest.raises(ValueError, match="time_limit_s=inf"):
        RewardPool(["numeric"], num_workers=1, time_limit_s=float("inf"))


def test_total_and_is_correct() -> None:
    right = Scored({"numeric": 1.0, "format": 1.0}, None)
    wrong = Scored({"numeric": 0.0, "format": 1.0}, None)
    error = Scored({"numeric": 0.0, "format": 0.0}, "timeout after 2.0 s")
    assert [total(s, "numeric", {"format": 0.25}) for s in (right, wrong, error)] == [1.25, 0.25, 0.0]
    assert [total(s, "numeric", {}) for s in (right, wrong, error)] == [1.0, 0.0, 0.0]
    assert [is_correct(s, "numeric") for s in (right, wrong, error)] == [True, False, False]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    # In a container there may be nobody to collect a process whose parent has gone: a zombie has ended, too.
    return not (status.exists() and "State:\tZ" in status.read_text())


def _wait_until_gone(pids: list[int], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in pids if _is_running(pid)]
    for pid in left:  # a failing test leaves nothing spinning either
        os.kill(pid, signal.SIGKILL)
    return not left


PRINT_PID = "import os\ndef pid(question, completion, answer):\n    return os.getpid()\n"


def test_closing_ends_processes_and_unfinished_batches(user_rewards: str, tmp_path: Path) -> None:
    (tmp_path / "pids.py").write_text(PRINT_PID)
    rows = [""] * 8
    pool = RewardPool(["pids:pid", f"{user_rewards}:hang"], num_workers=2, time_limit_s=60.0)
    pids = [int(s.scores["pids:pid"]) for s in pool.score(rows, rows, rows)]
    future = pool.submit(rows, ["hang"] * 8, rows)
    time.sleep(0.1)
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), pool:
        raise ZeroDivisionError
    assert time.monotonic() - start < 5.0
    assert _wait_until_gone(pids)
    with pytest.raises(RuntimeError, match="closed before"):
        future.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([""], [""], [""])
    pool.close()


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit", "os.kill(os.getpid(), 9)"])
def test_no_process_outlives_the_interpreter(tmp_path: Path, user_rewards: str, ending: str) -> None:
    (tmp_path / "pids.py").write_text(PRINT_PID)
    script = f"""
import os, time
from kdrl_jax.rewards.pool import RewardPool
pool = RewardPool(["pids:pid", "user_rewards:hang"], num_workers=2, time_limit_s=1.0)
print(*[int(s.scores["pids:pid"]) for s in pool.score([""] * 4, [""] * 4, [""] * 4)], flush=True)
future = pool.submit([""] * 4, ["hang"] * 4, [""] * 4)
time.sleep(0.3)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    # After SIGKILL nobody is left to end a hanging worker: its own timer must.
    assert _wait_until_gone(pids)


def _worker(*functions: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kdrl_jax.rewards.worker", *functions],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )


def test_the_protocol_of_a_worker() -> None:
    worker = _worker("numeric", "format")
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert json.loads(worker.stdout.readline()) == {"ready": True}
    worker.send_signal(signal.SIGINT)  # ignored
    request = {"id": 7, "question": "", "completion": "#### 5\n\u2028", "answer": "5"}
    worker.stdin.write(json.dumps(request).encode() + b"\nnonsense\n[]\n" + b'{"id": 8}\n')
    worker.stdin.close()
    replies = [json.loads(line) for line in worker.stdout]
    assert worker.wait(10) == 0
    assert replies[0] == {"id": 7, "scores": {"numeric": 1.0, "format": 1.0}}
    assert [reply["id"] for reply in replies[1:]] == [None, None, 8]
    assert "JSONDecodeError" in replies[1]["error"]
    assert "got list" in replies[2]["error"]
    assert replies[3]["error"] == "KeyError: 'question' (in numeric)"


def test_a_worker_reports_an_unknown_function_and_ends() -> None:
    worker = _worker("numerc")
    out, _ = worker.communicate(timeout=10)
    assert worker.returncode == 2
    assert json.loads(out)["error"].startswith("no reward function is called 'numerc'")


def test_workers_import_neither_jax_nor_numpy() -> None:
    script = (
        "import sys, kdrl_jax.rewards.worker, kdrl_jax.rewards.pool\n"
        "print([m for m in ('jax', 'jaxlib', 'numpy', 'flax', 'pydantic') if m in sys.modules])\n"
        "ours = [m for m in sys.modules if m.startswith('kdrl_jax.')]\n"
        "print([m for m in ours if not m.startswith('kdrl_jax.rewards')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert out.split("\n") == ["[]", "[]", ""]
