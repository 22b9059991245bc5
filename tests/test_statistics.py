"""pass@k and votes against enumeration, and intervals against simulation."""

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from kdrl_jax.statistics import (
    difference_interval,
    majority,
    mean_interval,
    pass_at_k,
    pass_sizes,
    share_interval,
)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(answers, k))
        expected = Fraction(sum(map(any, subsets)), len(subsets))
        assert pass_at_k(np.array([c]), n, k)[0] == float(expected), (n, c, k)


def test_pass_at_k_is_exact_where_products_of_factors_are_not():
    counts = np.arange(1001)
    for k in (1, 2, 64, 999, 1000):
        exact = [float(1 - Fraction(comb(1000 - c, k), comb(1000, k))) for c in counts]
        np.testing.assert_array_equal(pass_at_k(counts, 1000, k), exact)


def test_pass_at_k_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(np.array([1]), 4, 5)
    with pytest.raises(ValueError, match="0 to 5 right answers of 4"):
        pass_at_k(np.array([0, 5]), 4, 1)
    assert [pass_sizes(n) for n in (0, 1, 6, 8)] == [[], [1], [1, 2, 4], [1, 2, 4, 8]]


def vote_by_hand(votes, correct):
    """The mean over all answers that have most votes, each drawn as often as the others."""
    groups = {v: [c for w, c in zip(votes, correct, strict=True) if w == v] for v in votes if v >= 0}
    most = max(map(len, groups.values()), default=0)
    tied = [sum(g) / len(g) for g in groups.values() if len(g) == most]
    return sum(tied) / len(tied) if tied else 0.0


def test_majority_against_counting_by_hand():
    votes = np.array(list(itertools.product((-1, 0, 1, 2), repeat=4)))
    for right in (0, 1):
        correct = votes == right
        expected = [vote_by_hand(v, c) for v, c in zip(votes.tolist(), correct.tolist(), strict=True)]
        np.testing.assert_allclose(majority(votes, correct), expected)
        order = [2, 0, 3, 1]
        np.testing.assert_array_equal(majority(votes[:, order], correct[:, order]), majority(votes, correct))
    assert majority(np.array([[-1, -1, -1, 4]]), np.array([[False] * 3 + [True]])) == [1.0]


def covered(rng, draw, interval, truth, times=400):
    found = [interval(*draw(rng)) for _ in range(times)]
    return np.mean([low <= truth <= high for low, high in found])


def shares(num, accuracy, samples, spread):
    """Questions of unequal difficulty, each answered several times."""

    def draw(rng):
        p = rng.beta(accuracy * spread, (1 - accuracy) * spread, num)
        return (rng.binomial(samples, p) / samples,)

    return draw


SMALL = [(30, 0.02, 1, 1.0), (30, 0.5, 4, 1.0), (100, 0.98, 8, 0.3), (300, 0.2, 4, 5.0)]
GRID = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(
        (30, 100, 300, 1000), (0.02, 0.05, 0.2, 0.5, 0.9, 0.98), (1, 4, 8), (0.3, 1, 5)
    )
    if case not in SMALL
]


@pytest.mark.parametrize(("num", "accuracy", "samples", "spread"), [*SMALL, *GRID])
def test_intervals_of_shares_cover_them(num, accuracy, samples, spread):
    """95 % nominal, less five standard errors of 400 draws."""
    rng = np.random.default_rng(1)
    assert covered(rng, shares(num, accuracy, samples, spread), share_interval, accuracy) > 0.9


def test_intervals_of_pass_at_k_cover_it():
    """Of Beta(a, b) difficulties, E[1 - (1 - p)^2] = 1 - b (b + 1) / ((a + b) (a + b + 1))."""
    a, b, n = 0.4, 1.2, 4

    def draw(rng):
        return (pass_at_k(rng.binomial(n, rng.beta(a, b, 64)), n, 2),)

    truth = 1 - b * (b + 1) / ((a + b) * (a + b + 1))
    assert covered(np.random.default_rng(2), draw, share_interval, truth) > 0.91


@pytest.mark.parametrize("num", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_intervals_of_ratios_cover_them(num):
    """Nats per token: skewed, and of questions with unequally many tokens."""

    def draw(rng):
        tokens = np.clip(np.round(40 * np.exp(0.5 * rng.standard_normal(num))), 1, 128)
        return tokens * np.exp(0.5 * rng.standard_normal(num)), tokens

    rng = np.random.default_rng(3)
    assert covered(rng, draw, mean_interval, np.exp(0.125)) > 0.91


@pytest.mark.parametrize(("num", "accuracy"), [(30, 0.02), (100, 0.5)])
def test_intervals_of_differences_cover_them(num, accuracy):
    def draw(rng):
        p = rng.beta(accuracy, 1 - accuracy, num)
        ours, theirs = rng.binomial(4, p) / 4, rng.binomial(4, p * 0.8) / 4
        return ours, theirs

    truth = 0.2 * accuracy
    assert covered(np.random.default_rng(4), draw, difference_interval, truth) > 0.91


def test_nothing_is_certain_because_all_answers_were_right():
    for num in (1, 2, 30, 1000):
        low, high = share_interval(np.ones(num))
        assert high == 1.0
        assert 1 - 5 / num < low < 1
        assert share_interval(np.zeros(num)) == (0.0, pytest.approx(1 - low, abs=1e-6))
        low, high = difference_interval(np.ones(num), np.ones(num))
        assert low < 0 < high
    assert share_interval(np.zeros(0)) == (0.0, 1.0)
    assert difference_interval(np.zeros(0), np.zeros(0)) == (-1.0, 1.0)


def test_intervals_hold_their_value_and_stay_where_values_can_be():
    rng = np.random.default_rng(5)
    for num in (1, 2, 3, 7, 40):
        tokens = rng.integers(0, 100, num).astype(float)
        tokens[0] = 50.0
        part = rng.random(num) * tokens
        ratio = part.sum() / tokens.sum()
        low, high = share_interval(part, tokens)
        assert 0 <= low <= ratio + 1e-6
        assert ratio - 1e-6 <= high <= 1
        low, high = mean_interval(part, tokens, most=1.0)
        assert 0 <= low <= ratio + 1e-6
        assert ratio - 1e-6 <= high <= 1
    assert mean_interval(np.full(9, 7.0)) == (7.0, 7.0)
    # One other value among many: finite, though a third of all resamples hold it not at all.
    low, high = mean_interval(np.append(np.full(29, 128.0), 50.0), most=128.0)
    assert 100 < low < 125.4 < high <= 128


def test_intervals_of_skewed_means_reach_to_where_the_large_values_are():
    x = np.exp(np.random.default_rng(8).standard_normal(60))
    low, high = mean_interval(x)
    assert high - x.mean() > 1.3 * (x.mean() - low)


def test_intervals_are_of_questions_and_not_of_tokens():
    """A question's tokens count together: the same tokens in a hundredth of the questions know less."""
    rng = np.random.default_rng(6)
    values, ones = rng.random(1000), np.ones(1000)
    apart = mean_interval(values, ones)
    together = mean_interval(values.repeat(1)[:10] * 100, ones[:10] * 100)
    assert together[1] - together[0] > 5 * (apart[1] - apart[0])


def test_intervals_are_the_same_again_and_the_same_for_all_measures():
    x = np.random.default_rng(7).random(50)
    assert share_interval(x) == share_interval(x.copy())
    with pytest.raises(ValueError, match="50 questions and 49"):
        difference_interval(x, x[1:])
