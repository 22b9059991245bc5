"""What a terminal shows of a run, read from a recorded one."""

import io
import re
import time

import pytest
from rich.console import Console

from kdrl_jax import progress
from kdrl_jax.live_table import LEAST_HEIGHT, LEAST_WIDTH, LiveTable, sparkline
from kdrl_jax.progress import Reporter, Work

NUMBERS = {"loss": 0.5, "reward/mean": 0.25, "entropy": None, "grad_norm": float("nan"), "kd/reverse_kl": 1.0}
TIMES = {"time/rollout": 3.0, "time/update": 1.0, "tokens_per_second": 1234.0}


def shown(width=80, height=30, *, steps=3, terminal=True):
    """A reporter after some steps, and what it draws."""
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=terminal)
    reporter = Reporter(console, "a-run", 0, 10)
    for step in range(steps):
        reporter.step({"step": step + 1} | NUMBERS | {"loss": 0.5 + step} | TIMES)
    lines = console.render_lines(reporter._render())
    return reporter, console, ["".join(part.text for part in line).rstrip() for line in lines]


def test_the_table_has_what_the_run_has():
    reporter, _, lines = shown()
    table = {line[:14].strip(): line[14:].split() for line in lines}
    assert table["loss"] == ["2.5000", "1.5000", "▁▅█"]
    assert table["tokens/s"] == ["1,234", "1,234", "▄▄▄"]
    assert not table.keys() & {"entropy", "gradient norm", "solved"}  # none, not finite, and not there
    assert "time: rollout 75%, reward 0%, teacher 0%, update 25% of 4 s" in lines
    reporter.evaluated(
        4, {"greedy/accuracy": 0.5, "greedy/accuracy_ci": [0.25, 0.75], "sampled/accuracy": 0.4}
    )
    reporter.alarm("step 4: alarm [entropy_collapse]")
    said = reporter._table.render().plain.splitlines()
    assert said[-2:] == [
        "evaluated at step 4: greedy 50.0% [25.0%, 75.0%], sampled 40.0%",
        "step 4: alarm [entropy_collapse]",
    ]


@pytest.mark.parametrize("width", [LEAST_WIDTH, 80, 200])
def test_no_line_is_broken(width):
    reporter, console, lines = shown(width, steps=30)
    reporter.alarm("x" * 500)
    reporter.stage("y" * 500)
    again = console.render_lines(reporter._render())
    assert len(again) == len(lines) + 1
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(("width", "height"), [(LEAST_WIDTH - 1, 50), (200, LEAST_HEIGHT - 1)])
def test_where_there_is_no_room_there_are_two_lines(width, height):
    _, _, lines = shown(width, height)
    assert len([line for line in lines if line]) == 2
    assert "loss 2.500" in lines[1]


def test_what_stays_is_above_and_the_cursor_is_never_hidden_for_long():
    console = Console(width=80, height=30, file=io.StringIO(), force_terminal=True)
    with Reporter(console, "a-run", 0, 10) as reporter:
        reporter.step({"step": 1} | NUMBERS)
        reporter.note("a line that stays")
        written = console.file.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    assert "a line that stays" in written


def test_without_a_terminal_lines_are_plain():
    reporter, console, _ = shown(terminal=False, steps=10)
    text = console.file.getvalue()
    assert "\x1b" not in text
    first, last = text.splitlines()  # the first step, and the last: the others came within ten seconds
    assert first.startswith("a-run: step 1/10  loss 0.500  reward 0.250  kl 1.000")
    assert last.startswith("a-run: step 10/10  loss 9.500")
    assert last.endswith("0:00 left")
    with reporter:
        assert console.file.getvalue() == text


def test_a_log_file_hears_of_what_takes_long(monkeypatch):
    """Also of what tells nothing meanwhile: a program that is compiled, answers that are verified."""
    monkeypatch.setattr(progress, "STAGE_EVERY_S", 0.2)
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    with Reporter(console, "a-run", 3, 10) as reporter:
        reporter.stage("evaluating student, greedy", 1, 4)
        time.sleep(0.1)
        reporter.stage("evaluating student, greedy", 2, 4)
        deadline = time.monotonic() + 20
        while console.file.getvalue().count("\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        reporter.stage("verifying")
        while "verifying" not in console.file.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    said = console.file.getvalue()
    form = r"a-run: step 3/10  evaluating student, greedy: 2 of 4, 0:00 left, for 0:0\d now"
    assert re.fullmatch(form, said.splitlines()[0])
    assert re.search(r"a-run: step 3/10  verifying, for 0:0\d now", said)
    assert not reporter._beats.join(5)
    time.sleep(0.4)
    assert console.file.getvalue() == said


def test_work_that_is_no_run(monkeypatch):
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    with Work(console, "report") as work:
        work.at("reading")
        assert console.file.getvalue() == ""  # done before there is anything to tell
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        for done in range(3):
            work.at("packing", done, 3)
            time.sleep(0.01)
    assert console.file.getvalue().splitlines() == [
        "report: packing: 0 of 3",
        "report: packing: 1 of 3, 0:00 left",
        "report: packing: 2 of 3, 0:00 left",
    ]


def test_a_resumed_run_begins_with_what_it_had():
    before = [{"step": step, "loss": float(step)} for step in range(100)]
    console = Console(width=80, height=30, file=io.StringIO(), force_terminal=True)
    text = Reporter(console, "a-run", 100, 200, before)._table.render().plain
    assert "99.0000     89.5000" in text


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, None, 5]) == "▄ ▄"
    assert sparkline([None]) == " "


def test_ascii_terminals_have_no_blocks():
    table = LiveTable()
    table.add(NUMBERS)
    assert table.render(ascii_only=True).plain.isascii()
