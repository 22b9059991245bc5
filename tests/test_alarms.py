"""Runs that go wrong are told of, once, by the name of their setting; runs that do not are not."""

import json
import math

import pytest
from tiny_runs import metrics, run

from kdrl_jax.alarms import Alarms
from kdrl_jax.config import AlarmsConfig

FINE = {
    "reward/solved_frac": 0.5,
    "completion/length_mean": 100.0,
    "completion/truncated_frac": 0.1,
    "entropy": 1.0,
    "kd/reverse_kl": 0.5,
}


def raised(rows, **settings):
    """(step, name) of every alarm that a run with these metrics raises."""
    alarms = Alarms(AlarmsConfig(window=5, **settings))
    return [(step, alarm.name) for step, row in enumerate(rows) for alarm in alarms.at(row)]


def then(changed, before=20, after=20):
    return [FINE] * before + [FINE | changed] * after


BAD = {
    "reward_collapse": {"reward/solved_frac": 0.1},
    "length_blow_up": {"completion/length_mean": 500.0, "completion/truncated_frac": 0.8},
    "entropy_collapse": {"entropy": 0.01},
    "teacher_mismatch": {"kd/reverse_kl": 8.0},
}


@pytest.mark.parametrize("name", BAD)
def test_each_is_raised_once_and_can_be_switched_off(name):
    ((step, found),) = raised(then(BAD[name]))
    assert found == name
    assert 20 <= step < 25
    assert raised(then(BAD[name]), **{name: None}) == []
    # It is raised again if it has passed meanwhile.
    again = then(BAD[name]) + [FINE] * 20 + [FINE | BAD[name]] * 20
    assert [n for _, n in raised(again)] == [name, name]


def test_a_run_that_goes_well_raises_none():
    rows = [
        {
            "reward/solved_frac": 0.1 + step / 200,
            "completion/length_mean": 100 + step,
            "completion/truncated_frac": 0.3 - step / 500,
            "entropy": math.exp(-step / 100),
            "kd/reverse_kl": 6 * math.exp(-step / 10),
        }
        for step in range(100)
    ]
    assert raised(rows) == []
    # Far from its teacher, and not nearer: at the second window at the earliest.
    assert raised([FINE | {"kd/reverse_kl": 6.0}] * 30) == [(9, "teacher_mismatch")]


def test_what_cannot_be_wrong_is_not():
    """Nothing was solved yet; longer completions that all end; metrics that are not there or not finite."""
    assert (
        raised([FINE | {"reward/solved_frac": 0.02}] * 20 + [FINE | {"reward/solved_frac": 0.0}] * 20) == []
    )
    assert raised(then({"completion/length_mean": 500.0})) == []
    assert raised([{"loss": 1.0}] * 40) == []
    # Sure of what it is right about.
    assert (
        raised(
            [FINE | {"reward/solved_frac": 0.9}] * 20
            + [FINE | {"reward/solved_frac": 0.9, "entropy": 0.01}] * 20
        )
        == []
    )
    assert raised([FINE | {"kd/reverse_kl": math.nan, "entropy": None}] * 40) == []


@pytest.mark.slow
def test_a_run_writes_them_and_a_resumed_one_does_not_repeat_them(tmp_path, capsys):
    sections = {"alarms": {"window": 1, "teacher_mismatch": 1e-6, "length_blow_up": None}}
    _, done = run(tmp_path, "run", **sections)
    assert done
    rows = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").open()]
    assert {"step", "name", "value", "threshold", "says"} == set(rows[0])
    assert "teacher_mismatch" in {row["name"] for row in rows}
    whole = (tmp_path / "run" / "alarms.jsonl").read_text()
    stop = [False] * 22
    _, done = run(tmp_path, "parts", should_stop=lambda: not stop or stop.pop(), **sections)
    assert not done
    assert 0 < len(metrics(tmp_path / "parts")) < 4
    _, done = run(tmp_path, "parts", **sections)
    assert done
    assert (tmp_path / "parts" / "alarms.jsonl").read_text() == whole
