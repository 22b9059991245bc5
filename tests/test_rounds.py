"""Which groups are trained on when those without signal are replaced."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_run, metrics, run

from kdrl_jax.rounds.choose import plan_groups


def test_groups_without_signal_are_replaced_for_rl_and_still_distil():
    signal = np.array([False, True, False, False, True, True, True])
    groups, rl, kd = plan_groups(signal, num_rl=3, num_places=6)
    assert groups[rl].tolist() == [1, 4, 5]
    assert groups[kd & ~rl].tolist() == [0, 2, 3]


def test_without_distillation_only_groups_with_signal_fill_the_batch():
    groups, rl, _ = plan_groups(np.array([False, True, False, True, True]), num_rl=2, num_places=2)
    assert groups[rl].tolist() == [1, 3]


def test_places_that_nothing_fills_train_nothing():
    groups, rl, kd = plan_groups(np.array([True, False]), num_rl=2, num_places=4)
    assert groups[kd].tolist() == [0, 1]
    assert rl.tolist() == [True, False, False, False]
    assert len(groups) == 4


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 8), st.booleans())
def test_every_place_holds_one_group_and_none_twice(signal, num, distils):
    places = 2 * num if distils else num
    groups, rl, kd = plan_groups(np.array(signal), num, places)
    assert len(groups) == len(rl) == len(kd) == places
    assert len(set(groups[kd])) == kd.sum() == min(places, len(signal))
    assert np.array(signal)[groups[rl]].all()
    assert rl.sum() == min(num, sum(signal))
    assert (kd | ~rl).all()


REPLACING = {"rl": {"resample_rounds": 2}, "reward": {"shaping": {"format": 0.1}, "num_workers": 1}}


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replaced")
    assert run(folder, "run", eval={"every": 0, "agreement": False}, **REPLACING)[1]
    return folder / "run"


def test_a_run_that_replaces_groups(replaced):
    rows = metrics(replaced)
    assert all(1 <= row["reward/rounds"] <= 3 for row in rows)
    for row in rows:
        parts = row["reward/part/numeric"] + 0.1 * row["reward/part/format"]
        assert row["reward/mean"] == pytest.approx(parts, abs=1e-6)
    drawn = json.loads((replaced / "done.json").read_text())
    assert drawn == {"step": 4}


@pytest.mark.slow
def test_it_resumes_bitwise(replaced, tmp_path):
    asked = iter([False] * 9 + [True])
    sections = {"eval": {"every": 0, "agreement": False}} | REPLACING
    done = run(tmp_path, "run", should_stop=lambda: next(asked, False), **sections)[1]
    assert not done
    assert run(tmp_path, "run", **sections)[1]
    assert_same_run(replaced, tmp_path / "run")
