"""What loss and gradient norm usually are: against numpy's mean and variance, and what is called a spike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.step.spikes import FIRST, MEMORY, is_spike, measures, remember
from kdrl_jax.types import TrainState


def usual_after(losses, norms, counts=None):
    usual = TrainState.first({}, {}).usual
    step = jax.jit(lambda u, loss, norm, counts: remember(u, measures(loss, norm), counts))
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        usual = step(usual, jnp.float32(loss), jnp.float32(norm), True if counts is None else counts[i])
    return usual


def test_the_first_are_numpy_s():
    draw = np.random.default_rng(0)
    losses, norms = draw.normal(size=MEMORY), np.exp(draw.normal(size=MEMORY))
    usual = usual_after(losses, norms)
    wanted = np.stack([losses, np.log(norms)])
    np.testing.assert_allclose(usual.mean_2, wanted.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(usual.variance_2, wanted.var(1), rtol=1e-4)
    assert int(usual.count) == MEMORY


def test_the_past_is_forgotten():
    usual = usual_after([0.0] * 100 + [5.0] * 300, [1.0] * 400)
    np.testing.assert_allclose(usual.mean_2, [5, 0], atol=0.02)
    assert float(usual.variance_2[0]) < 0.1


def test_what_does_not_count_leaves_no_trace():
    draw = np.random.default_rng(1)
    losses, norms = draw.normal(size=30), np.exp(draw.normal(size=30))
    counts = [i % 3 != 0 for i in range(30)]
    losses[::3], norms[::3] = np.nan, np.inf
    ours = usual_after(losses, norms, counts)
    kept = [i for i in range(30) if counts[i]]
    theirs = usual_after(losses[kept], norms[kept])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("loss", "norm", "spikes"),
    [(1.0, 1.0, False), (1.5, 1.3, False), (9.0, 1.0, True), (1.0, 30.0, True), (-9.0, 1e-6, False)],
)
def test_only_what_is_far_above_is_a_spike(loss, norm, spikes):
    draw = np.random.default_rng(2)
    losses, norms = 1 + 0.2 * draw.normal(size=60), np.exp(0.2 * draw.normal(size=60))
    usual = usual_after(losses, norms)
    assert bool(is_spike(usual, measures(jnp.float32(loss), jnp.float32(norm)), 6.0)) == spikes
    # The first updates have nothing to be compared with.
    few = usual_after(losses[: FIRST - 1], norms[: FIRST - 1])
    assert not is_spike(few, measures(jnp.float32(loss), jnp.float32(norm)), 6.0)


def test_a_loss_that_never_changes_has_no_spikes_of_rounding():
    usual = usual_after([2.0] * 60, [1.0] * 60)
    assert not is_spike(usual, measures(jnp.float32(2.0001), jnp.float32(1.001)), 6.0)
    assert is_spike(usual, measures(jnp.float32(3.0), jnp.float32(1.0)), 6.0)
