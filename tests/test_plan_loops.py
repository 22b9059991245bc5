"""How often loops and branches of compiled programs count."""

import jax
import jax.numpy as jnp
import pytest
from plan_programs import CHIP, PLACES, compiled, cost_of

from kdrl_jax.plan.cost import analyse
from kdrl_jax.plan.walk import Given

# The cache that tests share keeps no programs for topologies, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
f32 = jnp.float32


def nested(x, w):
    def inner(x, _):
        return x @ w, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=5)[0], None

    return jax.lax.scan(outer, x, None, length=3)[0]


def until(x, w, n):
    with jax.named_scope("microbatches"):
        return jax.lax.fori_loop(
            0, n, lambda _, x: jnp.tanh(jax.lax.fori_loop(0, 4, lambda _, y: y @ w, x)), x
        )


SQUARE = ((256, 256), f32)
PRODUCT = 2 * 256**3


@pytest.mark.parametrize("place", PLACES)
def test_nested_scans_count_as_often_as_they_run(place):
    cost = cost_of(nested, SQUARE, SQUARE, place=place)
    assert cost.flops == 15 * PRODUCT
    assert cost.uncounted_loops == ()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("begin", "end", "step", "count"),
    [(0, 10, 1, 10), (3, 10, 1, 7), (3, 10, 2, 4), (4, 10, 3, 2), (5, 5, 1, 0)],
)
def test_counters_begin_and_step_as_they_like(place, begin, end, step, count):
    def f(x, w):
        return jax.lax.while_loop(lambda c: c[0] < end, lambda c: (c[0] + step, c[1] @ w), (begin, x))[1]

    cost = cost_of(f, SQUARE, SQUARE, place=place)
    assert (cost.flops, cost.uncounted_loops) == (count * PRODUCT, ())


@pytest.mark.parametrize("place", PLACES)
def test_a_bound_that_outer_loops_hand_down_unchanged(place):
    def f(x, w):
        def inner(c):
            i, n, x = c
            return i + 1, n, x @ w

        def outer(c):
            j, n, x = c
            return j + 1, n, jax.lax.while_loop(lambda c: c[0] < c[1], inner, (0, n, x))[2]

        return jax.lax.while_loop(lambda c: c[0] < c[1], outer, (0, jnp.int32(6), x))[2]

    assert cost_of(f, SQUARE, SQUARE, place=place).flops == 36 * PRODUCT


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("moves", ["bound", "step"])
def test_a_loop_whose_bound_or_step_changes_is_of_unknown_count(place, moves):
    def body(c):
        i, n, step, x = c
        return (i + 1, n - step, step, x @ x) if moves == "bound" else (i + step, n, step, x @ x)

    def f(step, x):
        return jax.lax.while_loop(lambda c: c[0] < c[1], body, (1, jnp.int32(60), step, x))[3]

    cost = cost_of(f, ((), jnp.int32), SQUARE, place=place)
    assert (cost.flops, len(cost.uncounted_loops)) == (PRODUCT, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("given", [{}, {"microbatches": 12}, {"other": 12}])
def test_a_loop_of_unknown_count(place, given):
    cost = cost_of(until, SQUARE, SQUARE, ((), jnp.int32), place=place, given=Given(loops=given))
    if "microbatches" in given:
        # The loop inside stands in the same scope; its count is known.
        assert (cost.flops, cost.uncounted_loops) == (12 * 4 * PRODUCT, ())
    else:
        assert (cost.flops, len(cost.uncounted_loops)) == (4 * PRODUCT, 1)
        name = cost.uncounted_loops[0]
        assert "microbatches" in name
        again = cost_of(until, SQUARE, SQUARE, ((), jnp.int32), place=place, given=Given(loops={name: 3}))
        assert again.flops == 3 * 4 * PRODUCT


@pytest.mark.parametrize("place", PLACES)
def test_a_scope_around_says_nothing_of_loops_inside(place):
    def f(x, w, n):
        def body(_, x):
            with jax.named_scope("inner"):
                return jax.lax.fori_loop(0, n, lambda _, y: y @ w, x)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, body, x)

    cost = cost_of(
        f, SQUARE, SQUARE, ((), jnp.int32), place=place, given=Given(loops={"outer": 7, "inner": 2})
    )
    assert cost.flops == 14 * PRODUCT


@pytest.mark.parametrize("place", PLACES)
def test_a_loop_that_may_end_early_is_not_of_known_count(place):
    def f(x, w):
        def goes_on(carry):
            i, x = carry
            return (i < 64) & (x[0, 0] > 0)

        return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, c[1] @ w), (0, x))

    cost = cost_of(f, SQUARE, SQUARE, place=place)
    assert (cost.flops, len(cost.uncounted_loops)) == (PRODUCT, 1)


def choose(i, x, w):
    with jax.named_scope("choice"):
        branches = [lambda x: x + 1, lambda x: x @ w @ w, lambda x: x @ w]
        return jax.lax.switch(i, branches, x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("weights", "products"), [(None, 2), ((1, 0, 0), 0), ((0, 0.25, 0.75), 1.25), ((0, 0, 1), 1)]
)
def test_branches_count_as_weighed(place, weights, products):
    given = Given(branches={} if weights is None else {"choice": weights})
    cost = cost_of(choose, ((), jnp.int32), SQUARE, SQUARE, place=place, given=given)
    assert cost.flops == products * PRODUCT
    assert bool(cost.notes) == (weights is None)


def test_weights_of_another_number_of_branches_are_refused():
    with pytest.raises(ValueError, match="conditional of 3 branches"):
        cost_of(choose, ((), jnp.int32), SQUARE, SQUARE, given=Given(branches={"choice": (1, 2)}))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("weights", "products"), [((1, 0), 1), ((0, 1), 3)])
def test_false_comes_before_true(place, weights, products):
    def f(i, x, w):
        return jax.lax.cond(i > 0, lambda x: x @ w @ w @ w, lambda x: x @ w, x)

    text = compiled(f, ((), jnp.int32), SQUARE, SQUARE, place=place).as_text()
    (name,) = (note.partition(":")[0] for note in analyse(text, CHIP).notes)
    cost = analyse(text, CHIP, Given(branches={name: weights}))
    assert cost.flops == products * PRODUCT
